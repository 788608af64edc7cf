"""Attention backends: how q, k, v meet the paged cache."""
