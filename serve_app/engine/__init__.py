"""Engines: one protocol, an implementation a folder."""
