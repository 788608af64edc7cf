"""Have kernels compiled ahead for a device that is not there; prints what goes otherwise than `compile_ahead` says.

Run as a program of its own: a process that interprets kernels compiles none.
"""

from __future__ import annotations

import logging
import threading
import time

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
def by_name(x_ptr, KIND: tl.constexpr):
    tl.store(x_ptr, 1.0 if KIND == "int8" else 2.0)


tried: list[int] = []


@triton.autotune([triton.Config({"BLOCK": size}, pre_hook=lambda _: tried.append(0)) for size in (8, 16)], key=["n"])
@triton.jit
def tuned(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


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
        by_name[(1,)](x, "int8")
        tuned[(1,)](x, 7)
        for made in (torch.empty(1000), torch.empty_like(x), x.new_empty(5), x.new(3),
                     torch.empty_strided((2, 2), (2, 1)), torch.empty_permuted((2, 3), (1, 0))):
            expect("unwritten memory", bool(made.any()), False)
    expect("left to compile", asked(*variants), 0)
    expect("what does not compile", asked((nonsense, x, 8)), 1)
    expect("what preload would take for another", asked((by_name, x, "int8")), 1)
    expect("configurations tried, and chosen", (tried, tuned.cache), ([], {}))
    expect("launches", x.tolist(), [1.0] * 7)
    expect("reports", [text.split(":")[0] for text in said],
           ["a kernel could not be compiled ahead", "3 Triton kernels compiled, or found compiled"])
    expect("hook", knobs.runtime.jit_cache_hook, None)

    # somebody else's launches meanwhile are their own affair, and what they had asked to be told they are told
    knobs.runtime.jit_cache_hook = other_hook
    with compiled_ahead(CUDA):
        thread = threading.Thread(target=add_one[(1,)], args=(y, y, 7, 8, True))
        thread.start()
        thread.join()
    expect("told to the other", others, [True])
    expect("hook", knobs.runtime.jit_cache_hook, other_hook)

    # two that start at once take turns, each with what the other left
    order: list[str] = []

    def rehearse(name: str) -> None:
        with compiled_ahead(CUDA):
            order.append(name)
            time.sleep(0.2)
            order.append(name)

    threads = [threading.Thread(target=rehearse, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect("turns", order in (list("aabb"), list("bbaa")), True)
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
