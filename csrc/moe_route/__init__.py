"""Routing tokens to experts."""

from .reference import Routing, route

__all__ = ["Routing", "route"]
