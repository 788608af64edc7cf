"""Choose the attention backend: the user's pin, else the highest priority that does not refuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...csrc.select import Choice, check_pin, choose
from ...models import AttentionLayer
from ...plugins.errors import UsageError
from ...plugins.log import get_logger
from ...plugins.manager import PluginHost
from ..layer_report import AttentionReport
from .base import AttentionBackend, AttentionProblem

log = get_logger(__name__)


def attention_problems(layers: Sequence[AttentionLayer], *, dtype: torch.dtype, device: torch.device,
                       block_size: int, cache_dtype: torch.dtype | None = None) -> set[AttentionProblem]:
    """The distinct shapes of a model's attention layers; `cache_dtype` None is `dtype`."""
    return {
        AttentionProblem(device=device, dtype=dtype, cache_dtype=cache_dtype or dtype, head_dim=layer.head_dim,
                         num_heads=layer.num_heads, num_kv_heads=layer.num_kv_heads, kv_lora_rank=layer.kv_lora_rank,
                         sliding_window=layer.sliding_window, block_size=block_size)
        for layer in layers
    }


def choose_attention_backend(problems: set[AttentionProblem], pin: str | None,
                             host: PluginHost) -> Choice[type[AttentionBackend]]:
    """One backend for all layers. Raises UsageError with every reason when none, or not the pinned one, can run."""
    known = host.names("attention_backend")
    check_pin(pin, known, "attention backend")
    candidates = {name: host.resolve("attention_backend", name) for name in ([pin] if pin else known)}
    choice = choose(problems, candidates)
    if pin is not None:
        passed_over = {name: f"{pin} is pinned" for name in known if name != pin}
        choice = Choice(chosen=choice.chosen, refusals={**choice.refusals, **passed_over})
    if choice.chosen is None:
        raise UsageError("no attention backend can run this model",
                         found="; ".join(f"{name}: {choice.refusals[name]}" for name in candidates), known=known)
    return choice


def attention_report(problems: set[AttentionProblem], choice: Choice[type[AttentionBackend]],
                     layers: int) -> AttentionReport:
    """What was chosen, for the load report; a backend that fails to explain itself is used all the same."""
    assert choice.chosen is not None
    parts: dict[str, list[str]] = {}
    try:
        for problem in problems:
            for part, how in choice.chosen.explain(problem).items():
                parts.setdefault(part, []).append(how)
    except Exception as error:
        log.warning("attention backend %s does not explain itself: %s: %s", choice.chosen.name, type(error).__name__,
                    error)
    caches = {str(problem.cache_dtype).removeprefix("torch.") for problem in problems}
    return AttentionReport(backend=choice.chosen.name, layers=layers, cache=", ".join(sorted(caches)),
                           parts={part: " or ".join(sorted(set(hows))) for part, hows in parts.items()},
                           refusals=dict(choice.refusals))
