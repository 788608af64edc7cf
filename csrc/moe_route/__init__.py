"""Routing tokens to experts, sorting them by expert, and adding up what the experts say."""

from .layout import Layout, align, combine
from .reference import Routing, route

__all__ = ["Layout", "Routing", "align", "combine", "route"]
