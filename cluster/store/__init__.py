"""Object stores: one small interface over S3 and a folder."""
