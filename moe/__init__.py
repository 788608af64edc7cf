"""Mixture of experts: router, experts, combine; backends that run them."""

from ..csrc.moe_route import Routing
from .backend import Backends, Expert, MoEBackend, MoEProblem
from .block import MoEBlock
from .experts import Experts
from .router import Router

__all__ = ["Backends", "Expert", "Experts", "MoEBackend", "MoEBlock", "MoEProblem", "Router", "Routing"]
