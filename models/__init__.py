"""Model architectures; one architecture is one file that names shapes and nothing else."""

from .attention import Attention
from .base import AttentionLayer, AttentionRun, Batch, CausalLM, FusedAttentionRun
from .fields import Fields
from .make import Make
from .mla import MLAAttention

__all__ = ["Attention", "AttentionLayer", "AttentionRun", "Batch", "CausalLM", "Fields", "FusedAttentionRun",
           "MLAAttention", "Make"]
