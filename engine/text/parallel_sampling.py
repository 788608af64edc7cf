"""n > 1: one prompt becomes n requests of the core that share its cached blocks."""

from __future__ import annotations

import msgspec

from ..request import EngineCoreRequest

SEEDS = 1 << 64


def fan_out(core: EngineCoreRequest, serial: int) -> list[EngineCoreRequest]:
    """The requests that the core gets for one of the user's, the `serial`-th: n of them.

    Their ids are never used again, though the user may use his: the core runs ahead of an abort, and what it still
    says of an old request must not reach a new one. Child i has seed + i, so that a request with a seed gives the
    same n texts each time. Log probabilities of the prompt are equal for all, and only child 0 asks for them.
    """
    params = core.params
    first = params.replace(n=1)
    others = first.replace(prompt_logprobs=None)
    return [
        msgspec.structs.replace(core, request_id=f"{core.request_id}#{serial}.{i}", params=others if i else first,
                                seed=(core.seed + i) % SEEDS)
        for i in range(params.n)
    ]
