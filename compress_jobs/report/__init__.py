"""What a run tells: the summary, and report.html."""
