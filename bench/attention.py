"""The attention family of `nybble bench kernels`: every registered backend, decoding and prompts, paged caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..csrc.attention.reference import decode
from ..engine.attention.base import AttentionBackend, AttentionProblem, StepShape
from ..engine.plan import KVCacheGroup, KVCacheLayout, KVCacheSpec
from ..models import Attention, AttentionLayer, MLAAttention
from ..quant import LayerShape, Linear, Part, Unquantized
from .floors import copies_for
from .measured import Collector, Measured

# Of the norm of the result: outputs are rounded to 16 bits, probabilities and latent queries too.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
# Query rows that are compared, of each of the first and the last request.
CHECKED = 8
K_SCALE, V_SCALE = 0.02, 0.015


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """`requests` times: `query` new tokens at the end of `context` tokens.

    `latent` is DeepSeek-V2-Lite's attention, 16 heads over rows of 512 and 64 values; else 32 heads share 8.
    """

    label: str
    requests: int
    query: int
    context: int
    block_size: int = 16
    fp8: bool = False
    latent: bool = False
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 0  # 0: as many as the cache takes to be cold

    @property
    def visible(self) -> float:
        """Pairs of a query and a key that it sees, over all requests."""
        return self.requests * (self.query * (self.context - self.query) + self.query * (self.query + 1) / 2)


DECODES = ((1, 1024), (1, 8192), (1, 32768), (16, 4096), (64, 4096), (256, 1024))
PROMPTS = ((1, 4096, 4096), (8, 2048, 2048), (1, 512, 8192))  # requests, query, context
NOPE, ROPE, LATENT, VALUE = 128, 64, 512, 128


def cases(small: bool) -> Iterator[AttentionCase]:
    """What matters most first."""
    if small:
        for latent in (False, True):
            kind = "mla-" if latent else ""
            base = AttentionCase(label=f"{kind}decode/4x40", requests=4, query=1, context=40, latent=latent, heads=4,
                                 kv_heads=2, head_dim=64, layers=2)
            yield from (base, replace(base, label=f"{kind}prompt/2x24", requests=2, query=24, context=24))
        yield replace(base, label="decode/4x40/fp8", latent=False, fp8=True)
        return
    decodes = [AttentionCase(label=f"decode/{b}x{c}", requests=b, query=1, context=c) for b, c in DECODES]
    prompts = [AttentionCase(label=f"prompt/{b}x{q}of{c}", requests=b, query=q, context=c) for b, q, c in PROMPTS]
    yield from (*decodes, *prompts)
    yield from (replace(case, label=f"mla-{case.label}", latent=True, heads=16) for case in decodes)
    yield from (replace(case, label=f"{case.label}/fp8", fp8=True) for case in decodes)
    yield from (replace(case, label=f"{case.label}/64", block_size=64) for case in decodes)
    yield from (replace(case, label=f"mla-{case.label}", latent=True, heads=16) for case in prompts)


def run_attention(backends: Mapping[str, type[AttentionBackend]], small: bool, dtype: torch.dtype,
                  collector: Collector) -> None:
    """Every backend that takes a case; an error in one costs no other."""
    for case in cases(small):
        if collector.done():
            return
        for name, backend in backends.items():
            try:
                run_case(name, backend, case, dtype, collector)
            except (RuntimeError, AssertionError) as error:
                collector.fail(f"{case.label}/{name}", error)
            if collector.device.type == "cuda":
                torch.cuda.empty_cache()


def run_case(name: str, backend: type[AttentionBackend], case: AttentionCase, dtype: torch.dtype,
             collector: Collector) -> None:
    """Check and time one backend: in every layer, new tokens are written to the cache and attention is computed."""
    device = collector.device
    width = (LATENT + ROPE) if case.latent else 2 * case.kv_heads * case.head_dim
    cache_dtype = torch.float8_e4m3fn if case.fp8 else dtype
    cached = case.requests * case.context * width * cache_dtype.itemsize
    count = case.layers or copies_for(cached, device)
    layers = make_layers(case, count, dtype, device)
    problem = AttentionProblem(
        device=device, dtype=dtype, cache_dtype=cache_dtype, head_dim=layers[0].head_dim, num_heads=case.heads,
        num_kv_heads=layers[0].num_kv_heads, kv_lora_rank=layers[0].kv_lora_rank, sliding_window=None,
        block_size=case.block_size)
    if (reason := backend.supports(problem)) is not None:
        collector.skip(f"{case.label}/{name}", reason)
        return
    per_request = -(-case.context // case.block_size)
    spec = KVCacheSpec(shape=layers[0].kv_shape, dtype_bytes=cache_dtype.itemsize)
    layout = KVCacheLayout(num_blocks=1 + case.requests * per_request, block_size=case.block_size,
                           groups=[KVCacheGroup(layers=list(range(count)), spec=spec)])
    made = backend(layers, layout, dtype=dtype, device=device, cache_dtype=cache_dtype)
    caches: list[Tensor] | None = getattr(made, "caches", None)
    if caches is None:
        collector.skip(f"{case.label}/{name}", "has no `caches` that could be filled")
        return
    rng = torch.Generator(device).manual_seed(0)
    for cache in caches:
        for plane in cache.flatten(0, 1).split(4096):
            values = torch.randn(plane.shape, generator=rng, device=device, dtype=torch.float32)
            plane.copy_(values.mul_(64) if case.fp8 else values)
    step = make_step(case, device, rng)
    run, inputs = made.prepare(step), make_inputs(case, dtype, device, rng)
    call: Any = run.run_latent if case.latent else run.run
    with_layer: list[Any] = [partial(call, layer, *inputs) for layer in layers]
    error = check(with_layer[0](), layers[0], caches[0], step, case, inputs) / TOLERANCE[dtype]
    if not error <= 1:
        collector.refuse(f"{case.label}/{name}", error, "of what is allowed")
        return
    out = case.requests * case.query * case.heads * layers[0].head_dim * dtype.itemsize
    moved, operations = cached + 2.0 * out, 4.0 * case.heads * case.head_dim * case.visible
    if case.latent:
        weights, pairs = case.heads * (NOPE + VALUE) * LATENT, case.heads * case.visible
        absorbed = (2 * LATENT + ROPE) * pairs + weights * case.requests * case.query
        expanded = (NOPE + ROPE + VALUE) * pairs + weights * case.requests * case.context
        moved, operations = moved + weights * dtype.itemsize, 2.0 * min(absorbed, expanded)
    collector.add(Measured(
        family="attention", case=case.label, kernel=name, size=case.requests if case.query == 1 else case.query,
        seconds=collector.time(name, with_layer), moved=moved, operations=operations, kind="float", error=error))


def make_layers(case: AttentionCase, count: int, dtype: torch.dtype, device: torch.device) -> list[AttentionLayer]:
    """Layers whose caches take turns."""
    layers: list[AttentionLayer] = []
    for index in range(count):
        layer: AttentionLayer
        if case.latent:
            parts = (Part(name="kv_b", size=case.heads * (NOPE + VALUE)),)
            kv_b = Linear("", LayerShape(in_features=LATENT, parts=parts), Unquantized(), dtype=dtype, device=device)
            kv_b.weights["weight"].normal_(0, LATENT**-0.5)
            layer = MLAAttention(index, kv_b, num_heads=case.heads, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
                                 kv_lora_rank=LATENT, v_head_dim=VALUE, scale=(NOPE + ROPE) ** -0.5)
            layer.after_load()
        else:
            layer = Attention(index, num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.head_dim)
        if case.fp8:
            layer.k_scale, layer.v_scale = K_SCALE, V_SCALE
        layers.append(layer)
    return layers


def make_step(case: AttentionCase, device: torch.device, rng: torch.Generator) -> StepShape:
    """A step whose blocks lie scattered, as they do in an engine that has run for a while."""
    size, per_request = case.block_size, -(-case.context // case.block_size)
    table = 1 + torch.randperm(case.requests * per_request, generator=rng, device=device).view(case.requests, -1)
    positions = torch.arange(case.context - case.query, case.context, device=device)
    slots = table[:, positions // size] * size + positions % size
    query, lengths = (np.full(case.requests, n, dtype=np.int32) for n in (case.query, case.context))
    starts = torch.arange(case.requests + 1, dtype=torch.int32, device=device) * case.query
    block_table = table.int()
    return StepShape(
        query_lens=query, seq_lens=lengths, block_table=block_table, host_block_table=block_table.cpu().numpy(),
        slots=slots.flatten(), query_start=starts, device_seq_lens=torch.from_numpy(lengths).to(device),
        max_query_len=case.query)


def make_inputs(case: AttentionCase, dtype: torch.dtype, device: torch.device,
                rng: torch.Generator) -> tuple[Tensor, ...]:
    """(q, k, v), or of latent attention (q_nope, q_pe, rows)."""
    tokens = case.requests * case.query
    widths = ((case.heads, case.head_dim), *((case.kv_heads, case.head_dim),) * 2)
    if case.latent:
        widths = ((case.heads, NOPE), (case.heads, ROPE), (1, LATENT + ROPE))
    made = [torch.randn(tokens, *shape, generator=rng, device=device).to(dtype) for shape in widths]
    return (*made[:2], made[2][:, 0]) if case.latent else tuple(made)


def check(out: Tensor, layer: AttentionLayer, cache: Tensor, step: StepShape, case: AttentionCase,
          inputs: tuple[Tensor, ...]) -> float:
    """Relative error of the last query rows of the first and the last request, against float64 over what is cached."""
    errors = []
    rows = min(CHECKED, case.query)
    for request in {0, case.requests - 1}:
        blocks, last = step.block_table[request].long(), (request + 1) * case.query
        chosen = slice(last - rows, last)
        kept = cache.view(torch.uint8)[:, blocks] if case.fp8 else cache[:, blocks]
        planes = kept.flatten(1, 2)[:, : case.context]
        if case.latent:
            assert isinstance(layer, MLAAttention)
            row = decode(planes[0][:, 0], cache.dtype, layer.k_scale, torch.float64).double()
            latent, shared = row.split((LATENT, ROPE), -1)
            key, value = (torch.einsum("lc,hdc->lhd", latent, w.double()) for w in (layer.w_uk, layer.w_uv))
            key = torch.cat((key, shared[:, None].expand(-1, case.heads, -1)), -1)
            query = torch.cat(inputs[:2], -1)[chosen].double()
        else:
            key, value = (decode(planes[i], cache.dtype, scale, torch.float64).double()
                          .repeat_interleave(case.heads // case.kv_heads, dim=1)
                          for i, scale in enumerate((layer.k_scale, layer.v_scale)))
            query = inputs[0][chosen].double()
        scores = torch.einsum("qhd,lhd->hql", query, key) * layer.scale
        place = torch.arange(case.context - rows, case.context, device=out.device)
        scores.masked_fill_(torch.arange(case.context, device=out.device) > place[:, None], float("-inf"))
        expected = torch.einsum("hql,lhd->qhd", scores.softmax(-1), value)
        errors.append(float((out[chosen].double() - expected).norm() / expected.norm()))
    return max(errors)
