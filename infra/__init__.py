"""Everything around the library and its two applications: benchmarks, demo, data, deployment."""
