"""What a command finds where it runs."""
