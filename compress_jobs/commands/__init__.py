"""A command a file: its options, and the call."""
