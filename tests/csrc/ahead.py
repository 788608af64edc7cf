"""Have kernels compiled ahead for a device that is not there; prints what goes otherwise than `compile_ahead` says.

Run as a program of its own: a process that interprets kernels compiles none.
"""

from __future__ import annotations

import logging
import threading

import torch
import triton
import triton.language as tl
from count_variants import Hopper
from triton import knobs
from triton.runtime import driver

from nybble.csrc.compile_ahead import compiled_ahead

CUDA = torch.device("cuda", 0)


@triton.jit
def add_one(x_ptr, y_ptr, n, BLOCK: tl.constexpr, HALF: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, (x + 0.5 if HALF else x + 1).to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def nonsense(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 2 * BLOCK)))


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        print(f"{what}: {found}, not {wanted}")


def asked(*launches) -> int:
    """How many of some launches Triton would have to compile something for; they are not made."""
    before, count = knobs.runtime.jit_cache_hook, 0

    def note(**_) -> bool:
        nonlocal count
        count += 1
        return True

    knobs.runtime.jit_cache_hook = note
    for kernel, *args in launches:
        kernel.warmup(*args, grid=(1,))
    knobs.runtime.jit_cache_hook = before
    return count


def main() -> None:
    driver.set_active(Hopper())
    torch.cuda.set_device = lambda device: None
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("nybble").addHandler(handler)
    logging.getLogger("nybble").setLevel(logging.INFO)

    x, y = torch.ones(7), torch.ones(7, dtype=torch.bfloat16)
    variants = [(add_one, x, x, 7, 8, True), (add_one, x, x, 7, 8, False), (add_one, y, x, 7, 8, True)]
    expect("variants at first", asked(*variants), 3)
    others: list[bool] = []

    def other_hook(**_) -> bool:
        others.append(True)
        return True

    knobs.runtime.jit_cache_hook = None
    with compiled_ahead(CUDA):
        for _ in range(2):
            for kernel, *args in variants:
                kernel[(1,)](*args)
        nonsense[(1,)](x, 8)
        for made in (torch.empty(1000), torch.empty_like(x), x.new_empty(5), torch.empty_strided((2, 2), (2, 1))):
            expect("unwritten memory", bool(made.any()), False)
    expect("left to compile", asked(*variants), 0)
    expect("what does not compile", asked((nonsense, x, 8)), 1)
    expect("launches", x.tolist(), [1.0] * 7)
    expect("reports", [text.split(":")[0] for text in said],
           ["a kernel could not be compiled ahead", "4 Triton kernels compiled, or found compiled"])
    expect("hook", knobs.runtime.jit_cache_hook, None)

    # somebody else's launches meanwhile are their own affair, and what they had asked to be told they are told
    knobs.runtime.jit_cache_hook = other_hook
    with compiled_ahead(CUDA):
        thread = threading.Thread(target=add_one[(1,)], args=(y, y, 7, 8, True))
        thread.start()
        thread.join()
    expect("told to the other", others, [True])
    expect("hook", knobs.runtime.jit_cache_hook, other_hook)

    class Stop(Exception):
        pass

    try:
        with compiled_ahead(CUDA):
            raise Stop
    except Stop:
        expect("hook", knobs.runtime.jit_cache_hook, other_hook)
    else:
        print("an error was lost")


if __name__ == "__main__":
    main()
