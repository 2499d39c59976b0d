"""A training recipe for collections of real adapters: `python -m infra.train_zoo --help`."""
