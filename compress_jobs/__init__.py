"""The compression job: Ray tasks around the library, from object storage to object storage."""
