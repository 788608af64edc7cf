"""What a model will take of a device's memory, from its config and headers alone: `nybble plan`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..csrc.scheme import Scheme
from ..csrc.w4a16_gemm.packing import MIN_BLOCK, MIN_BYTES, ROWS, block_of
from ..models import CausalLM, Fields, Make, MLAAttention
from ..models.rope import Rotary
from ..moe import Experts, MoEBlock
from ..plugins.errors import OutOfMemoryError
from ..plugins.manager import PluginHost
from ..quant import Linear
from .args import EngineArgs
from .attention.triton_paged import EXPANDED_TOKENS
from .config import EngineConfig
from .executor.base import plan_layout
from .inspection import role_of
from .loader import check_quantized, quantization, stored_modules
from .loader.scan import SUFFIX, scan
from .plan import KVCacheGroup, KVCacheSpec
from .settings import build_engine_config

# About what torch reports of a whole device, which is less than the name on the box says.
GPUS = {
    "h100": int(79.2 * 2**30),
    "h200": int(139.8 * 2**30),
    "a100": int(79.2 * 2**30),
    "l40s": int(44.4 * 2**30),
}
# An estimate of CUDA's context with the kernels of torch, Triton and cuBLAS loaded, and of cuBLAS's workspace.
CONTEXT_BYTES = int(0.6 * 2**30)
# The largest number of inputs that share a block of an 8-bit weight, and of a plain one of an expert.
SCALED_BLOCK, PLAIN_BLOCK = 128, 64


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes, but for what is named otherwise. `weights` by the part of the model that they serve, as `nybble inspect`.

    Attributes:
        scratch: what the largest step needs at its peak besides weights and cache (`scratch_bytes`).
        kv_bytes_per_token: of one token, over all layers.
        kv_tokens: how many the cache then holds; 0 when the model does not fit.
        context: the length that `concurrency` requests of can be held at once.
    """

    model: str
    device_bytes: int
    usable: int
    context_bytes: int
    weights: dict[str, int]
    scratch: int
    kv_bytes_per_token: int
    kv_bytes: int
    kv_tokens: int
    context: int
    concurrency: float
    max_num_batched_tokens: int
    max_num_seqs: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weight_bytes": self.weight_bytes}


def plan_memory(args: EngineArgs, device_bytes: int, context: int | None, host: PluginHost) -> MemoryPlan:
    """Predict what `nybble serve` with these settings would take of a CUDA device of `device_bytes`.

    Args:
        context: tokens of a request, for the concurrency; None takes the longest that the settings allow.
    Raises UsageError and CheckpointError as loading would; reads no weights and touches no device.
    """
    config = build_engine_config(args, host, device="cuda")
    model = meta_model(config, host)
    scheduler, cache = config.scheduler, config.cache
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    weights = weight_bytes(model, dtype)
    scratch = scratch_bytes(model, dtype, scheduler.max_num_batched_tokens, scheduler.max_num_seqs,
                            config.model.vocab_size)
    usable = int(device_bytes * cache.gpu_memory_utilization)
    left = usable - CONTEXT_BYTES - sum(weights.values()) - scratch
    if cache.kv_cache_memory_bytes is not None:
        left = cache.kv_cache_memory_bytes
    width = 1 if cache.kv_cache_dtype == "fp8" else dtype.itemsize
    specs = [KVCacheSpec(shape=layer.kv_shape, dtype_bytes=width) for layer in model.attention_layers()]
    groups = [KVCacheGroup(layers=list(range(len(specs))), spec=specs[0])]
    per_token = sum(spec.bytes_per_block(1) for spec in specs)
    try:
        layout = plan_layout(config, groups, max(left, 0))
        tokens, taken = layout.max_tokens, layout.num_blocks * layout.block_size * per_token
    except OutOfMemoryError:
        tokens = taken = 0
    length = min(context or config.model.max_model_len, config.model.max_model_len)
    blocks = -(-length // cache.block_size)
    return MemoryPlan(
        model=config.model.served_model_name, device_bytes=device_bytes, usable=usable, context_bytes=CONTEXT_BYTES,
        weights=weights, scratch=scratch, kv_bytes_per_token=per_token, kv_bytes=taken, kv_tokens=tokens,
        context=length, concurrency=min(tokens / (blocks * cache.block_size), scheduler.max_num_seqs),
        max_num_batched_tokens=scheduler.max_num_batched_tokens, max_num_seqs=scheduler.max_num_seqs,
    )


def meta_model(config: EngineConfig, host: PluginHost) -> CausalLM:
    """The model without memory (torch's meta device); weights are made up where the folder has no files of them."""
    folder, quant = Path(config.model.model), quantization(config, host)
    made_up = config.load.load_format == "dummy" or not any(folder.glob(f"*{SUFFIX}"))
    make = Make(dtype=getattr(torch, config.model.dtype), device=torch.device("meta"),
                max_len=config.model.max_model_len, quant=quant,
                stored=None if made_up else stored_modules(scan(folder)))
    model: CausalLM = host.resolve("model", config.model.architecture)(
        Fields(config.model.hf_config, config.model.architecture), make)
    if quant is not None:
        check_quantized(model, config)
    return model


def weight_bytes(model: CausalLM, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of what stays in memory after loading on CUDA, every layer packed for its kernel, by role."""
    blocks = {path for path, module in model.named_modules() if isinstance(module, MoEBlock)}
    owned = {id(layer) for m in model.modules() if isinstance(m, Experts) for layer in m.layers}
    total: Counter[str] = Counter()
    counted: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            size = expert_bytes(module, dtype) if id(module) in owned else linear_bytes(module, dtype)
        else:  # a tied head is the embedding's tensor, and counts there
            own = {id(tensor): tensor.nbytes for tensor in _tensors(module) if id(tensor) not in counted}
            counted |= own.keys()
            size = sum(own.values())
        total[role_of(path, blocks) or "rotary"] += size
    for layer in model.modules():
        if isinstance(layer, MLAAttention):  # kept as the matrix that its codes stand for
            shape = layer.kv_b.shape
            total["attn"] += shape.out_features * shape.in_features * dtype.itemsize - linear_bytes(layer.kv_b, dtype)
    return {role: size for role, size in total.items() if size}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own tensors, rotary tables among them."""
    for value in vars(module).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Rotary):
            yield from (value.cos, value.sin)


def linear_bytes(layer: Linear, dtype: torch.dtype) -> int:
    """Of one linear layer as its kernel packs it."""
    bias = 0 if layer.bias is None else layer.bias.nbytes
    scheme, shape = layer.method.scheme, layer.shape
    if layer.method.plain:
        return bias + shape.out_features * shape.in_features * dtype.itemsize
    if scheme is None:  # known to its method alone, which keeps what it loads
        return bias + sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layer.specs.values())
    return bias + _coded(scheme, [part.size for part in shape.parts], shape.in_features, _scale_bytes(layer))


def expert_bytes(layer: Linear, dtype: torch.dtype) -> int:
    """Of one layer of one expert in its stack: every part by itself, plain inputs padded to whole blocks."""
    scheme, columns = layer.method.scheme, layer.shape.in_features
    if layer.method.plain:
        return layer.shape.out_features * _up(columns, PLAIN_BLOCK) * dtype.itemsize
    if scheme is None:
        return linear_bytes(layer, dtype)
    parts = [_coded(scheme, [part.size], columns, _scale_bytes(layer), stacked=True) for part in layer.shape.parts]
    return sum(parts)


def _scale_bytes(layer: Linear) -> int:
    """Of one stored scale."""
    return next((spec.dtype.itemsize for name, spec in layer.specs.items()
                 if "scale" in name and not name.startswith("input")), 4)


def _coded(scheme: Scheme, parts: list[int], columns: int, scale_bytes: int, *, stacked: bool = False) -> int:
    """Codes, scales, zeros and order of a matrix, as csrc's kernels lay them out."""
    rows, groups = sum(parts), -(-columns // (scheme.group or columns))
    if scheme.code != "uint":
        activation = scheme.activation
        sizes = [group for group in (scheme.group, activation and activation.group) if group]
        codes = rows * _up(columns, math.gcd(SCALED_BLOCK, *sizes))
        if scheme.group_rows > 1:  # each part begins a row of blocks; a stack's experts share the table of rows
            strips = sum(-(-part // scheme.group_rows) for part in parts)
            return codes + 4 * strips * groups + (0 if stacked else 4 * rows)
        static = activation is not None and activation.static and not stacked
        return codes + 4 * rows * groups + (4 if static else 0)
    extra = rows * groups * (scale_bytes + scheme.zero_point) + (4 * columns if scheme.act_order else 0)
    block = block_of(scheme.group)
    if block < MIN_BLOCK:  # packed to the bit, for torch
        return rows * scheme.bits * -(-columns // 8) + extra
    width = next(w for w in (2, 4, 8) if w >= scheme.bits and block * w // 8 >= MIN_BYTES)
    return _up(rows, ROWS) * _up(columns, block) * width // 8 + extra


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def scratch_bytes(model: CausalLM, dtype: torch.dtype, tokens: int, seqs: int, vocab: int) -> int:
    """Bytes at the peak of the largest step, and of what backends set aside for it.

    T tokens of H hidden values of d bytes, in the layer with the greatest need:

    * always: the residual and the normed input, 2 T H d.
    * attention: queries, keys and values and the result, T (Q + 2 KV + Q) d; latent attention has its queries twice
      (before and after rotation) and the result, and keeps a buffer of EXPANDED_TOKENS keys and values of all heads.
    * a dense layer of I: gate and up, their product, and its rounded copy: T (3 d + 1) I.
    * experts of I, of which each token has k: for any routing, whatever the load, slots hold k T rows. The fused
      kernels keep I and H a slot, CUTLASS with FP8 inputs gate and up and their rounded product, (2 d + 1) I, and H
      codes; then H float32 values a token are added up.
    * sampling, beside none of these: logits of every request in `dtype` and float32, and as much again for a draw,
      S V (d + 8).
    """
    width, most, kept = dtype.itemsize, 0, 0
    for module in model.modules():
        need = 0
        if isinstance(module, MLAAttention):
            per_token = module.num_heads * (module.qk_nope_head_dim + module.v_head_dim)
            kept = max(kept, EXPANDED_TOKENS * per_token * width)
            need = tokens * module.num_heads * (2 * module.head_dim + module.v_head_dim) * width
        elif isinstance(module, Experts):
            size = module.sizes
            hidden, inner, slots = size["hidden"], size["intermediate"], tokens * size["top_k"]
            plain = slots * (inner + hidden) * width
            schemes = [layer.method.scheme for layer in module.layers if isinstance(layer, Linear)]
            fp8 = any(s and s.activation and s.activation.dtype == "fp8_e4m3" for s in schemes)
            rounded = slots * ((2 * width + 1) * inner + hidden * max(1, width))
            need = max(plain, rounded if fp8 else 0) + 4 * tokens * hidden
        elif isinstance(module, Linear) and len(module.shape.parts) == 2:
            need = tokens * module.shape.out_features // 2 * (3 * width + 1)
        elif isinstance(module, Linear) and len(module.shape.parts) == 3:
            need = tokens * (module.shape.out_features + module.shape.parts[0].size) * width
        most = max(most, need)
    hidden = next(m for m in model.modules() if isinstance(m, Linear)).shape.in_features
    return kept + max(2 * tokens * hidden * width + most, seqs * vocab * (width + 8))

