"""Executors: how a plan reaches every worker and one result comes back."""
