"""Choose the attention backend: the user's pin, else the highest priority that does not refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...models import Attention
from ...plugins.errors import UsageError, nearest
from ...plugins.manager import PluginHost
from .base import AttentionBackend, AttentionProblem


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen backend and why the others were not taken."""

    backend: type[AttentionBackend]
    refusals: dict[str, str]


def attention_problems(layers: Sequence[Attention], *, dtype: torch.dtype, device: torch.device,
                       block_size: int) -> set[AttentionProblem]:
    """The distinct shapes of a model's attention layers."""
    return {
        AttentionProblem(device=device, dtype=dtype, head_dim=layer.head_dim, num_heads=layer.num_heads,
                         num_kv_heads=layer.num_kv_heads, sliding_window=layer.sliding_window, block_size=block_size)
        for layer in layers
    }


def choose_attention_backend(problems: set[AttentionProblem], pin: str | None, host: PluginHost) -> Choice:
    """One backend for all layers. Raises UsageError with every reason when none, or not the pinned one, can run."""
    known = host.names("attention_backend")
    if pin is not None and pin not in known:
        guess = nearest(pin, known)
        raise UsageError(f"no attention backend is named {pin!r}", known=known,
                         fix=f"did you mean {guess}?" if guess else None)
    candidates = {name: host.resolve("attention_backend", name) for name in ([pin] if pin else known)}
    refusals: dict[str, str] = {}
    able: list[type[AttentionBackend]] = []
    for name, backend in candidates.items():
        reason = next(filter(None, (backend.supports(problem) for problem in problems)), None)
        if reason is None:
            able.append(backend)
        else:
            refusals[name] = reason
    if not able:
        raise UsageError("no attention backend can run this model",
                         found="; ".join(f"{name}: {reason}" for name, reason in refusals.items()), known=known)
    best = max(able, key=lambda backend: backend.priority)
    refusals.update({b.name: f"priority {b.priority} < {best.priority}" for b in able if b is not best})
    return Choice(backend=best, refusals=refusals)
