"""Compile Triton kernels before they are needed: a model runs on zeros, and threads build what it would launch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..plugins.log import get_logger

log = get_logger(__name__)

UNWRITTEN = (torch.empty, torch.empty_like, torch.empty_strided, torch.empty_permuted, Tensor.new, Tensor.new_empty,
             Tensor.new_empty_strided)
# Triton has one hook a process: two rehearsals take turns.
_TURN = threading.Lock()


class _Zeros(TorchFunctionMode):
    """Memory that Python asks for and nothing has written is zeros: whoever reads what a launch would have left there
    finds an index of 0. It does not reach into torch's own operators, nor into custom ones."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in UNWRITTEN else made


def _build(function: Any, variant: str, first: Future[Any] | None) -> None:
    if first is not None:
        wait([first])
    function.preload(variant)


def _has_text(value: Any) -> bool:
    """Whether a constant is or holds text: `preload` takes "int8" for the type of that name, another kernel."""
    value = getattr(value, "value", value)
    return isinstance(value, str) or (isinstance(value, tuple | list) and any(map(_has_text, value)))


@contextmanager
def _untuned(owner: int) -> Iterator[None]:
    """A thread's kernels that time their configurations do nothing: launches that do not happen take no time."""
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == owner else run(self, *args, **kwargs)

    Autotuner.run = leave
    try:
        yield
    finally:
        Autotuner.run = run


@contextmanager
def compiled_ahead(device: torch.device) -> Iterator[None]:
    """Run something for its kernels' sake; its results mean nothing.

    A Triton kernel that this thread would have to compile is compiled by another one instead, and not launched; every
    variant once, as many side by side as there are processors. Whatever else is launched runs, on zeros where it would
    read what those kernels write (`_Zeros`). Leaving waits for the compilers.

    What does not compile is left for its first real launch, which raises. So are variants with text among their
    constants, and kernels that Triton tunes. One that Triton cannot put in words raises here (a function among its
    constants, in Triton 3.6).

    Threads do for this: Triton lets go of the interpreter's lock while it compiles and assembles. The first variant is
    compiled alone, since that works out what all of them need (a hash of Triton itself, a third of a second).
    """
    if device.type != "cuda" or find_spec("triton") is None:
        yield
        return
    with _TURN:
        yield from _rehearsal(device)


def _rehearsal(device: torch.device) -> Iterator[None]:
    from triton import knobs

    owner, before = threading.get_ident(), knobs.runtime.jit_cache_hook
    builds: dict[str, Future[Any]] = {}

    def note(*, fn: Any, compile: Mapping[str, Any], **more: Any) -> bool:
        """Triton asks about a variant that it has not compiled: yes leaves it, and the launch."""
        if threading.get_ident() != owner:  # a compiling thread, or a launch of somebody else's
            return bool(before and before(fn=fn, compile=compile, **more))
        variant = compile["specialization_data"]
        if variant not in builds and not any(map(_has_text, compile["constants"].values())):
            first = next(iter(builds.values()), None)
            builds[variant] = pool.submit(_build, fn.jit_function, variant, first)
        return True

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=torch.cuda.set_device, initargs=(device,))
    knobs.runtime.jit_cache_hook = note
    try:
        with _Zeros(), _untuned(owner):
            yield
        errors = [error for build in builds.values() if (error := build.exception()) is not None]
    finally:
        knobs.runtime.jit_cache_hook = before
        pool.shutdown(cancel_futures=True)
    for error in errors:
        log.warning("a kernel could not be compiled ahead: %s: %s", type(error).__name__, error)
    log.info("%d Triton kernels compiled, or found compiled", len(builds) - len(errors))
