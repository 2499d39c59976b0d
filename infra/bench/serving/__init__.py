"""Throughput and latency of serving many adapters: ours beside vLLM's own; ``python -m infra.bench.serving --help``."""
