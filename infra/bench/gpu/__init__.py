"""What the project does on a GPU, checked and timed: `python -m infra.bench.gpu --help`."""
