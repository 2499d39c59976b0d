"""What changes a bundle that is published."""
