"""From logits to tokens: per-row sampling state, the sampler, log probabilities, and logits processors."""

from ...csrc.sampling import apply_penalties, apply_top_k_top_p
from .logprobs import LogprobTensors, to_lists, token_logprobs
from .metadata import SamplingMetadata
from .processors import LogitsProcessor, RowView
from .sampler import Sampler, SamplerOutput
from .state import SamplingState

__all__ = [
    "LogitsProcessor",
    "LogprobTensors",
    "RowView",
    "Sampler",
    "SamplerOutput",
    "SamplingMetadata",
    "SamplingState",
    "apply_penalties",
    "apply_top_k_top_p",
    "to_lists",
    "token_logprobs",
]
