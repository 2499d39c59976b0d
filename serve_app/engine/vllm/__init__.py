"""The engine for production: vLLM, with this project's plugin in it."""
