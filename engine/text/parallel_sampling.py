"""n > 1: one prompt becomes n requests of the core that share its cached blocks."""

from __future__ import annotations

import msgspec

from ..request import EngineCoreRequest

SEEDS = 1 << 64


def fan_out(core: EngineCoreRequest) -> list[EngineCoreRequest]:
    """The requests that the core gets for one of the user's: itself for n = 1, else n children.

    Child i has id "{i}_{id}" and seed + i, so that a request with a seed gives the same n texts each time.
    Log probabilities of the prompt are equal for all, and only child 0 asks for them.
    """
    params = core.params
    if params.n == 1:
        return [core]
    first = params.replace(n=1)
    others = first.replace(prompt_logprobs=None)
    return [
        msgspec.structs.replace(core, request_id=f"{i}_{core.request_id}", params=others if i else first,
                                seed=(core.seed + i) % SEEDS)
        for i in range(params.n)
    ]
