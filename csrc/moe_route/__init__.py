"""Routing tokens to experts, sorting them by expert, and adding up what the experts say."""

from .fused import choose_experts, fused_route, router_logits
from .layout import Layout, align, combine
from .reference import Routing, route

__all__ = ["Layout", "Routing", "align", "choose_experts", "combine", "fused_route", "route", "router_logits"]
