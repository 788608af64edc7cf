"""Model architectures; one architecture is one file that names shapes and nothing else."""

from .attention import Attention
from .base import AttentionRun, Batch, CausalLM
from .fields import Fields
from .make import Make

__all__ = ["Attention", "AttentionRun", "Batch", "CausalLM", "Fields", "Make"]
