"""What compression costs: held-out questions, and estimates before anything is spent."""
