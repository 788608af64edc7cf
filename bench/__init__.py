"""Benchmarks users run: latency, throughput, serving. Its commands reach the CLI through `nybble_cli`."""
