"""Benchmarks: a file each, or a folder."""
