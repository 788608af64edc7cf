"""The MoE family of `nybble bench kernels`: every registered backend, and torch, on the experts of real models."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..csrc.matrix import QuantizedMatrix
from ..csrc.scheme import Scheme
from ..csrc.select import Kernels
from ..moe import Expert, MoEBackend, MoEProblem
from ..moe.backend import PLAIN
from ..plugins.errors import NybbleError
from ..quant import LayerShape, Linear, Part, SplitLinear, Unquantized
from ..quant.base import CodedMethod, Weights, WeightSpec
from .measured import EAGER, Collector, Measured
from .moe import FORMATS, SHAPES, TOLERANCE, TURNS, check, random_backend, random_turn, random_weight
from .torch_experts import torch_can, torch_experts

MODELS = ("deepseek-v2-lite", "mixtral-8x7b", "qwen3-30b-a3b")
TIMED_FORMATS = ("fp8", "int4", "bf16")
# From this many tokens on weights come from memory whatever the turn, and turns would take memory themselves.
MANY_TOKENS = 256
TORCH = "torch-grouped"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
# Of what the fused kernels are allowed: others round gate and up, or their weights, to 16 bits on the way.
ROUNDED = 2.0


@dataclass(frozen=True, kw_only=True)
class Held(CodedMethod):
    """A method that is given its matrix."""

    held: QuantizedMatrix = field(hash=False, compare=False)

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        return {}

    def matrix(self, weights: Weights) -> QuantizedMatrix:
        return self.held

    @property
    def scheme(self) -> Scheme:
        return self.held.scheme


def run_experts(backends: Mapping[str, type[MoEBackend]], small: bool, tokens: Sequence[int], kernels: Kernels,
                collector: Collector) -> None:
    """Every backend on every model and format; an error in one costs no other."""
    for model in ("small",) if small else MODELS:
        for label in TIMED_FORMATS:
            for name, backend in backends.items():
                if collector.done():
                    return
                try:
                    run_backend(f"{model}/{label}", name, backend, FORMATS[label], SHAPES[model], tokens, kernels,
                                collector)
                except (RuntimeError, AssertionError, NybbleError) as error:
                    collector.fail(f"{model}/{label}/{name}", error)
                if collector.device.type == "cuda":
                    torch.cuda.empty_cache()
            if collector.done():
                return
            try:
                run_torch(f"{model}/{label}", FORMATS[label], SHAPES[model], tokens, collector)
            except (RuntimeError, AssertionError) as error:
                collector.fail(f"{model}/{label}/{TORCH}", error)


def run_backend(case: str, name: str, backend: type[MoEBackend], scheme: Scheme | None,
                shape: tuple[int, int, int, int], tokens: Sequence[int], kernels: Kernels,
                collector: Collector) -> None:
    """Check and time one backend at every number of tokens, against the bytes of the experts that are hit."""
    hidden, intermediate, count, top_k = shape
    device = collector.device
    problem = MoEProblem(schemes=(scheme or PLAIN,) * 3, even=True, experts=count, top_k=top_k, hidden=hidden,
                         intermediate=intermediate, dtype=torch.bfloat16, device=device)
    reason = backend.supports(problem)
    if reason is None and device.type == "cuda" and name in EAGER:
        reason = "takes one expert after another and asks the host: the yardstick, and no contender"
    if reason is not None:
        collector.skip(f"{case}/{name}", reason)
        return
    experts = make_experts(scheme, shape, kernels, device)
    each = sum(linear.nbytes if linear.method.plain else _stored(linear) for linear in experts[0].linears())
    made = backend(experts, problem)
    del experts
    time_layer(case, name, made, each, scheme, shape, tokens, collector)


def run_torch(case: str, scheme: Scheme | None, shape: tuple[int, int, int, int], tokens: Sequence[int],
              collector: Collector) -> None:
    """The same for torch's grouped products, in formats that it has."""
    if not torch_can(scheme) or (scheme is not None and collector.device.type != "cuda"):
        collector.skip(f"{case}/{TORCH}", "multiplies 16 bits, and on CUDA FP8 with a scale for each output")
        return
    tensors = random_backend(scheme, shape, collector.device).tensors
    each = sum(tensor.nbytes for tensor in tensors.values()) // shape[2]
    time_layer(case, TORCH, torch_experts(tensors, scheme), each, scheme, shape, tokens, collector)


def time_layer(case: str, name: str, made: Layer, each: int, scheme: Scheme | None, shape: tuple[int, int, int, int],
               tokens: Sequence[int], collector: Collector) -> None:
    """Check a layer, then time it; `each`: bytes of an expert."""
    hidden, intermediate, _, top_k = shape
    device = collector.device
    kind = scheme.activation.dtype if scheme is not None and scheme.activation else "float"
    for batch in tokens:
        turns = [random_turn(batch, shape, device, seed) for seed in range(TURNS if batch <= MANY_TOKENS else 2)]
        error = check(made, scheme, shape, turns[0]) / (ROUNDED * TOLERANCE[kind])
        if not error <= 1:
            collector.refuse(f"{case}/{name}/{batch}", error, "of what is allowed")
            continue
        hit = statistics.mean(len(ids.unique()) for _, _, ids in turns)
        collector.add(Measured(
            family="moe", case=case, kernel=name, size=batch, kind=kind, error=error, note=f"{hit:.1f} experts hit",
            seconds=collector.time(name, [partial(made, *turn) for turn in turns]),
            moved=hit * each + 4.0 * batch * hidden, operations=6.0 * batch * top_k * hidden * intermediate))


def _stored(linear: Linear) -> int:
    """Bytes that a matrix's codes, scales and zeros cannot do without."""
    matrix = linear.method.matrix(linear.weights)
    assert matrix is not None
    codes = matrix.rows * matrix.columns * matrix.scheme.bits // 8
    zeros = 0 if matrix.zeros is None else matrix.zeros.numel() * matrix.scheme.bits // 8
    return codes + matrix.scales.nbytes + zeros


def make_experts(scheme: Scheme | None, shape: tuple[int, int, int, int], kernels: Kernels,
                 device: torch.device) -> list[Expert]:
    """Random experts, each matrix a layer of its own: the same for the same shape and scheme, as `check` makes them."""
    hidden, intermediate, count, _ = shape
    sizes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}

    def linear(number: int, place: int) -> Linear:
        name, (rows, columns) = list(sizes.items())[place]
        weight = random_weight(scheme, rows, columns, device, 3 * number + place)
        method = Unquantized() if isinstance(weight, Tensor) else Held(held=weight)
        declared = LayerShape(in_features=columns, parts=(Part(name=name, size=rows),))
        made = Linear(f"experts.{number}", declared, method, dtype=torch.bfloat16, device=device, kernels=kernels)
        if isinstance(weight, Tensor):
            made.weights = {"weight": weight}
        return made

    return [Expert(SplitLinear([linear(number, 0), linear(number, 1)]), linear(number, 2)) for number in range(count)]
