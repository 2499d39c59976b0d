"""What the way over HTTP costs: our stack with an engine that costs nothing, beside vLLM's own server."""
