"""One replica of a group, and the base's files on its machine."""
