"""The engine that needs nothing but transformers."""
