"""Engines: one protocol, one implementation a file."""
