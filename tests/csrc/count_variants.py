"""What Triton would compile for steps of every size, without compiling; prints each kernel that warm-up does not cover.

Run as a program of its own: a process that interprets kernels has no variants of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nybble.csrc.attention import paged
from nybble.csrc.attention.cache import rope_and_cache
from nybble.csrc.attention.paged import Ragged, attend_latent, attend_paged, attend_plain, rope_and_attend
from nybble.csrc.matrix import QuantizedMatrix
from nybble.csrc.moe_gemm import CodedStack
from nybble.csrc.moe_gemm.grouped import sort_slots
from nybble.csrc.moe_route import Routing, align, choose_experts
from nybble.csrc.norm_rope.fused import fused_rms_norm, fused_silu_mul
from nybble.csrc.quantize import Rounding
from nybble.csrc.sampling import take_pending
from nybble.csrc.scaled_gemm import TritonScaledKernel
from nybble.csrc.scaled_gemm import linear as scaled
from nybble.csrc.scheme import Activation, Scheme
from nybble.csrc.w4a16_gemm import MANY_TOKENS, TritonW4A16Kernel
from nybble.csrc.w4a16_gemm import linear as w4a16
from nybble.engine.worker.warm_steps import rehearsal_sizes, warm_steps
from nybble.moe.fused import TILES, tile_for

# As GPUWorker.compile_kernels has them; then what requests bring.
SEQS = (256, 64)
ODD = [2, 3, 4, 5, 7, 9, 12, 13, 17, 23, 33, 50, 65, 100, 129, 150, 200, 257, 300, 777, 1000, 1001, 2047, 3333, 4095]
LATE = [*([tokens] for tokens in ODD), *([tokens] * 3 for tokens in ODD), *([tokens] * 40 for tokens in ODD[:8]),
        [1, 300], [1] * 15 + [1000], [1] * 60 + [12], [1] * 200 + [5, 9], *([1] * rows for rows in range(1, 257))]
TOKEN = Activation(dtype="fp8_e4m3", scale="token")
WIDE = 57344
SHAPES = ((1536, 1024), (1024, 1024), (1024, 3584), (WIDE, 1024))
HEADS, GROUPS, LATENT_HEADS, WIDTH, PAGE, EXPERTS, TOP_K = 32, (4, 8), 16, 128, 16, 8, 2
NOPE, ROPE, VALUE = 128, 64, 128  # of latent attention: keys and values that are made of latents
# The most queries of a request that are taken to the latents: beyond, keys are made of those.
ABSORBED = 170
# Blocks of a request, by which keys are split: of 8192 tokens.
BLOCKS = 512
BF16 = torch.bfloat16


class Hopper:
    """A device that is only asked what it is."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def fp8(rows, columns):
    return QuantizedMatrix(scheme=Scheme(code="fp8_e4m3", bits=8, activation=TOKEN), rows=rows, columns=columns,
                           codes=lambda start, stop: torch.zeros(stop - start, columns, dtype=torch.float8_e4m3fn),
                           scales=torch.ones(rows, 1))


def int4(rows, columns):
    groups = columns // 128
    return QuantizedMatrix(scheme=Scheme(code="uint", bits=4, group=128, zero_point=True), rows=rows, columns=columns,
                           codes=lambda start, stop: torch.zeros(stop - start, columns, dtype=torch.uint8),
                           scales=torch.ones(rows, groups, dtype=BF16), zeros=torch.zeros(rows, groups).byte())


class Steps:
    """Everything that a step launches, on CPU tensors that no kernel ever sees."""

    def __init__(self) -> None:
        self.linears = [kind(matrix(*shape), BF16) for shape in SHAPES
                        for kind, matrix in ((TritonScaledKernel, fp8), (TritonW4A16Kernel, int4))]
        self.gate, self.up = (CodedStack(EXPERTS, None, None) for _ in range(2))
        for stack in (self.gate, self.up):
            for number in range(EXPERTS):
                stack.put_plain(number, torch.zeros(512, 1024, dtype=BF16))
        self.caches = [torch.zeros(2, 4, PAGE, HEADS // group, WIDTH, dtype=BF16) for group in GROUPS]
        self.latents = torch.zeros(1, 4, PAGE, 1, 512 + 64, dtype=BF16)

    def run(self, lens: list[int], *, latent: bool, apart: bool) -> None:
        """Requests with `lens` tokens each; latents attend to themselves, as they do where most keys are cached.

        With `apart`, those whose keys are made of latents are part of a step: their queries are copied out of it.
        """
        tokens, count = sum(lens), len(lens)
        for linear in self.linears:
            if linear.rows == WIDE and tokens >= MANY_TOKENS:
                continue  # torch multiplies those, here too
            linear(torch.zeros(tokens, linear.columns, dtype=BF16))
        batch = Ragged(query_start=torch.zeros(count + 1, dtype=torch.int32), max_query_len=max(lens),
                       seq_lens=torch.zeros(count, dtype=torch.int32), block_table=torch.zeros(count, BLOCKS).int())
        slots, angle = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, 1, WIDTH, dtype=BF16)
        for cache in self.caches:
            qkv = torch.zeros(tokens, (HEADS + 2 * cache.shape[3]) * WIDTH, dtype=BF16)
            if batch.max_query_len == 1:
                rope_and_attend(qkv, angle, angle, cache, slots, batch, heads=HEADS, scale=1.0)
            else:
                attend_paged(rope_and_cache(qkv, angle, angle, cache, slots, heads=HEADS), cache, batch, scale=1.0)
        if latent:
            attend_latent(torch.zeros(tokens, LATENT_HEADS, 512, dtype=BF16),
                          torch.zeros(tokens, LATENT_HEADS, 64, dtype=BF16), self.latents, batch, scale=1.0)
        if batch.max_query_len > 1:
            q = torch.zeros(tokens, LATENT_HEADS, NOPE + ROPE, dtype=BF16)[..., :NOPE]
            k, v = torch.zeros(tokens, LATENT_HEADS, NOPE + VALUE, dtype=BF16).split((NOPE, VALUE), -1)
            for queries in (q, q.clone(memory_format=torch.contiguous_format))[: 1 + apart]:
                attend_plain(queries, torch.zeros(tokens, LATENT_HEADS, ROPE, dtype=BF16), k,
                             torch.zeros(tokens, 1, 512 + ROPE, dtype=BF16)[..., 512:], v, batch,
                             torch.zeros(count, dtype=torch.int32), scale=1.0)
        x = torch.zeros(tokens, 1024, dtype=BF16)
        fused_rms_norm(x, x[0], 1e-5, residual=x, rounding=Rounding(activation=TOKEN))
        fused_silu_mul(x, Rounding(activation=TOKEN))
        choose_experts(x, torch.zeros(EXPERTS, 1024, dtype=BF16), Routing(top_k=TOP_K))
        chosen = torch.zeros(tokens, TOP_K, dtype=torch.int64)
        tile = tile_for(-(-chosen.numel() // EXPERTS), TILES)
        layout = align(chosen, EXPERTS, tile.m)
        self.gate.run(x, layout, x.new_empty(chosen.numel(), 512), tile, rows_per_slot=TOP_K, up=self.up)
        sort_slots(chosen, EXPERTS)
        take_pending(torch.zeros(tokens, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))


def variants(steps: Steps, runs: Iterable[tuple[list[int], bool]], *, apart: bool = False) -> dict[str, set[str]]:
    """What Triton would compile for some requests, (tokens of each, whether latents attend), by kernel."""
    seen = defaultdict[str, set[str]](set)

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        """Called for a variant that is not there; that it answers yes keeps it from being compiled and launched."""
        seen[fn.name].add(str(key))
        return True

    knobs.runtime.jit_cache_hook = note
    for lens, latent in runs:
        steps.run(lens, latent=latent, apart=apart)
    return seen


def warm_runs(seqs: int) -> Iterator[tuple[list[int], bool]]:
    """What a start with up to `seqs` requests runs."""
    for tokens, prompts, chunk in warm_steps(max_tokens=8192, max_seqs=seqs, longest=8190, block_size=16,
                                             num_blocks=10**5, spare=2):
        yield [tokens - chunk] * prompts, False
        if chunk:
            yield [chunk] * prompts, True
    yield from (([1] * rows, True) for rows in rehearsal_sizes(seqs))


def main() -> None:
    driver.set_active(Hopper())
    for module in (scaled, w4a16, paged):
        module.multiprocessors = lambda device: 132
    steps = Steps()
    for seqs in SEQS:
        warm = variants(steps, warm_runs(seqs))
        late = variants(steps, ((lens, max(lens) <= ABSORBED) for lens in LATE if len(lens) <= seqs), apart=True)
        for name in sorted(late):
            if more := late[name] - warm.get(name, set()):
                print(f"{name}, {seqs} requests at most: {len(warm.get(name, ()))} variants in warm-up, {len(more)} "
                      "more for other numbers of tokens")


if __name__ == "__main__":
    main()
