"""Who computes what in a step, and which KV-cache blocks hold it. Host-only: imports no torch."""
