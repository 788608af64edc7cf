"""`nybble bench kernels`: every registered kernel on real layer shapes, checked first, then timed against its floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..csrc.contract import Bound, check_product
from ..csrc.fp8_gemm import BY_SHAPE, CutlassFp8Kernel, fits, multiply
from ..csrc.matrix import QuantizedMatrix
from ..csrc.quantize import Quantized, dequantize, quantize, triton_quantize
from ..csrc.scheme import Activation, Scheme
from ..csrc.select import LinearKernel, Problem
from ..csrc.w4a16_gemm import MANY_TOKENS
from ..engine.args import setting
from ..engine.loader.kernels import linear_kernels, moe_backends
from ..plugins.errors import UsageError
from ..plugins.manager import PluginHost
from .command import make_parser, pick, read_settings
from .floors import copies_for, measure_floors
from .measured import COLUMNS, Collector, Measured
from .page import write_page
from .results import make_result, write_json

T = TypeVar("T")
WRONG = 1

# (outputs, inputs) of a layer's products.
SHAPES = {
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "small": {"square": (512, 512)},
}
TOKEN = Activation(dtype="fp8_e4m3", scale="token")
SCHEMES = {
    "w4": Scheme(code="uint", bits=4, group=128),
    "w4-zp": Scheme(code="uint", bits=4, group=128, zero_point=True),
    "w4-order": Scheme(code="uint", bits=4, group=128, act_order=True),
    "w3": Scheme(code="uint", bits=3, group=128),
    "w2": Scheme(code="uint", bits=2, group=128, zero_point=True),
    "w8": Scheme(code="uint", bits=8, group=128),
    "int8": Scheme(code="int8", bits=8),
    "int8-int8": Scheme(code="int8", bits=8, activation=Activation(dtype="int8", scale="token")),
    "fp8-weight": Scheme(code="fp8_e4m3", bits=8),
    "fp8-tensor": Scheme(code="fp8_e4m3", bits=8, activation=Activation(dtype="fp8_e4m3", scale="tensor", static=True)),
    "fp8-channel": Scheme(code="fp8_e4m3", bits=8, activation=TOKEN),
    "fp8-block": Scheme(code="fp8_e4m3", bits=8, group=128, group_rows=128,
                        activation=Activation(dtype="fp8_e4m3", scale="group", group=128)),
}
# Hopper's FP8 products are summed in fewer bits than float32's 24; the worst element seen says how many.
FP8_ACCUMULATE = 2.0**-17
# Kernels that round dequantized weights to the inputs' dtype, and from how many tokens on; those that round the
# quantized inputs back to it, and those that never quantize them.
ROUND_WEIGHTS = {"tiles": 0, "cpu_int4": 0, "cpu_int8": 0, "triton_w4a16": MANY_TOKENS}
ROUND_INPUTS = ("tiles",)
KEEP_INPUTS = ("triton_w8a16",)


FAMILIES = ("linear", "attention", "moe")


@dataclass(frozen=True, kw_only=True)
class KernelArgs:
    """What is run."""

    family: str = setting("linear", "which kernels", group="benchmark", choices=(*FAMILIES, "all"))
    shapes: str = setting("llama-3-8b", "whose layers; small runs every family on a CPU in seconds",
                          group="benchmark", choices=tuple(SHAPES))
    tokens: str = setting("1,16,128,2048", "tokens in a step, separated by commas", group="benchmark")
    schemes: str = setting("all", "schemes of linear layers, separated by commas", group="benchmark")
    kernels: str = setting("all", "kernels or backends, separated by commas", group="benchmark")
    dtype: str = setting("bfloat16", "of inputs and outputs", group="benchmark",
                         choices=("bfloat16", "float16", "float32"))
    device: str = setting("cuda", "cuda or cpu", group="benchmark", choices=("cuda", "cpu"))
    samples: int = setting(15, "times each is timed", group="benchmark", low=1)
    budget: float = setting(0.0, "seconds, shared by the families, after which no case is begun (0: no limit)",
                            group="benchmark", low=0)
    html: str | None = setting(None, "a page with rooflines and curves to write there", group="benchmark")


def main(argv: list[str]) -> int:
    parser = make_parser("kernels", KernelArgs, "Time every registered kernel with cold inputs, as CUDA graphs, beside "
                                                "torch and the card's own floors. A kernel whose result breaks the "
                                                "numerical contract is not timed.")
    parsed = parser.parse(argv)
    args = read_settings(KernelArgs, parsed)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", fix="--device cpu")
    floors = measure_floors(device)
    print(f"floors: {floors.bandwidth / 1e9:.0f} GB/s, "
          + ", ".join(f"{kind} {rate / 1e12:.1f} T/s" for kind, rate in floors.operations.items()))
    print(COLUMNS, flush=True)
    host = PluginHost.load()

    def keep(collector: Collector) -> None:
        result = make_result("kernels", argv, model=args.shapes, toy_model=False, device=args.device,
                             workload=asdict(replace(args, html=None)), metrics=collector.metrics())
        if parsed.output_json:
            extra = {"floors": asdict(floors), "absent": collector.absent, "wrong": collector.wrong}
            write_json(Path(parsed.output_json), result, extra)
        if args.html:
            write_page(Path(args.html), result, collector)

    collector = Collector(floors=floors, device=device, samples=args.samples, keep=keep)
    try:
        with torch.inference_mode():
            families = FAMILIES if args.family == "all" else (args.family,)
            for number, family in enumerate(families, 1):
                collector.budget = args.budget * number / len(families)
                run_family(family, args, host, collector)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    finally:  # what was measured is kept, whatever happened to the rest
        keep(collector)
    return WRONG if collector.wrong else 0


def run_family(family: str, args: KernelArgs, host: PluginHost, collector: Collector) -> None:
    """Every case of a family, by every implementation that is registered and asked for."""
    if family == "linear":
        kernels = _asked(args, linear_kernels(host, None).known)
        for layer, shape in SHAPES[args.shapes].items():
            for name, scheme in pick(args.schemes, SCHEMES, "scheme").items():
                run_layer(layer, name, scheme, shape, kernels, args, collector)
    elif family == "attention":
        from .attention import run_attention

        run_attention(_asked(args, {name: host.resolve("attention_backend", name)
                                    for name in host.names("attention_backend")}), args.shapes == "small",
                      getattr(torch, args.dtype), collector)
    else:
        from .experts import run_experts

        run_experts(_asked(args, moe_backends(host, None).known), args.shapes == "small",
                    list(map(int, args.tokens.split(","))), linear_kernels(host, None), collector)


def _asked(args: KernelArgs, known: Mapping[str, T]) -> dict[str, T]:
    """The kernels that are asked for; with several families a name need not be of each."""
    if args.family == "all" and args.kernels != "all":
        return {name: known[name] for name in args.kernels.split(",") if name in known}
    return pick(args.kernels, known, "kernel")


def run_layer(layer: str, label: str, scheme: Scheme, shape: tuple[int, int], kernels: Mapping[str, type[LinearKernel]],
              args: KernelArgs, collector: Collector) -> None:
    """Every kernel that takes the scheme, at every number of tokens, beside torch's product of 16-bit weights."""
    if collector.done():
        return
    device, dtype, case = torch.device(args.device), getattr(torch, args.dtype), f"{layer}/{label}"
    matrix = random_matrix(scheme, *shape, device)
    weight = matrix.dequant(0, matrix.rows)
    problem = Problem.of(matrix, dtype)
    refusals = {name: kernel.supports(problem) for name, kernel in kernels.items()}
    made = {name: _copies(partial(kernels[name], matrix, dtype), device)
            for name, refusal in refusals.items() if refusal is None}
    plain = weight.to(dtype)
    products = [plain.clone() for _ in range(copies_for(plain.nbytes, device))]
    kind = scheme.activation.dtype if scheme.activation else "float"

    def add(name: str, x: Tensor, calls: list[Callable[[], object]], stored: int, kind: str,
            error: float | None) -> None:
        moved = stored + x.nbytes + len(x) * matrix.rows * x.element_size()
        collector.add(Measured(family="linear", case=case, kernel=name, size=len(x), moved=moved, kind=kind,
                               operations=2.0 * len(x) * matrix.rows * matrix.columns, error=error,
                               seconds=collector.time(name, calls)))

    for tokens in map(int, args.tokens.split(",")):
        x = torch.randn(tokens, matrix.columns, device=device, dtype=dtype) / 4
        for name, copies in made.items():
            try:
                ratio = check(copies[0], scheme, matrix, x, weight)
                if not ratio <= 1:
                    collector.refuse(f"{case}/{name}/{tokens}", ratio, "of what is allowed")
                    continue
                stored = sum(tensor.nbytes for tensor in copies[0].weights.values())
                add(name, x, [partial(copy, x) for copy in copies], stored, kind, ratio)
            except RuntimeError as error:
                collector.fail(f"{case}/{name}/{tokens}", error)
        add("torch-plain", x, [partial(torch.nn.functional.linear, x, w) for w in products], plain.nbytes, "float",
            None)
        for name, calls in scaled_products(made.get(CutlassFp8Kernel.name, ()), x).items():
            add(name, x, calls, matrix.rows * matrix.columns, kind, None)
    for name, refusal in refusals.items():
        if refusal is not None:
            collector.absent[f"{case}/{name}"] = refusal


def scaled_products(kernels: Sequence[LinearKernel], x: Tensor) -> dict[str, list[Callable[[], object]]]:
    """FP8 products of inputs that are already rounded, by CUTLASS's tiles at any number of tokens, and by torch."""
    calls: dict[str, list[Callable[[], object]]] = {"cutlass-scaled": [], "torch-scaled": []}
    for kernel in kernels:
        assert isinstance(kernel, CutlassFp8Kernel)
        weights = kernel.weights
        codes, scales = triton_quantize(x, kernel.activation, weights.get("input_scale"))
        out = x.new_empty(len(x), kernel.rows)
        calls["cutlass-scaled"].append(partial(kernel.gemm, out, codes, weights["codes"], scales, weights["scales"],
                                               None, BY_SHAPE, kernel.multiprocessors))
        if fits(kernel.rows, x.dtype, x.device):
            rounded = Quantized(codes=codes, scales=scales, dtype=x.dtype)
            calls["torch-scaled"].append(partial(multiply, rounded, weights["codes"], weights["scales"], None))
    return {name: each for name, each in calls.items() if each}


def _copies(make: Callable[[], LinearKernel], device: torch.device) -> list[LinearKernel]:
    """One packed matrix several times over, so that its weights are cold at every call."""
    first = make()
    count = copies_for(sum(tensor.nbytes for tensor in first.weights.values()), device)
    return [first, *(make() for _ in range(count - 1))]


def check(kernel: LinearKernel, scheme: Scheme, matrix: QuantizedMatrix, x: Tensor, weight: Tensor) -> float:
    """The worst error of an output as a share of its bound (`csrc/contract.py`)."""
    rounds = len(x) >= ROUND_WEIGHTS.get(kernel.name, math.inf)
    actual, bound = kernel(x), Bound(weights=x.dtype if rounds else None)
    if scheme.activation is not None and kernel.name not in KEEP_INPUTS:
        x = dequantize(*quantize(x, scheme.activation, matrix.input_scale), scheme.activation)
        if kernel.name in ROUND_INPUTS:
            x, bound = x.to(actual.dtype), Bound(weights=actual.dtype)
        elif scheme.activation.dtype == "fp8_e4m3" and x.device.type == "cuda":
            bound = Bound(accumulate=FP8_ACCUMULATE)
    return check_product(actual, x, weight, bound=bound).ratio


def random_matrix(scheme: Scheme, rows: int, columns: int, device: torch.device, seed: int = 0) -> QuantizedMatrix:
    """Codes, scales and zeros of the sizes that models have."""
    rng = torch.Generator(device).manual_seed(seed)
    if scheme.code == "uint":
        codes = torch.randint(1 << scheme.bits, (rows, columns), generator=rng, dtype=torch.uint8, device=device)
    elif scheme.code == "int8":
        codes = torch.randint(-128, 128, (rows, columns), generator=rng, dtype=torch.int8, device=device)
    else:
        codes = (torch.randn(rows, columns, generator=rng, device=device) * 64).to(torch.float8_e4m3fn)
    groups, strips = -(-columns // (scheme.group or columns)), -(-rows // scheme.group_rows)
    spread = 64 if scheme.code == "fp8_e4m3" else (1 << scheme.bits) * 0.29  # of the codes, as a standard deviation
    scales = (torch.rand(strips, groups, generator=rng, device=device) + 0.5) / (spread * columns**0.5)
    zeros = torch.randint(1 << scheme.bits, (rows, groups), generator=rng, dtype=torch.uint8, device=device)
    static = scheme.activation is not None and scheme.activation.static
    shuffle = torch.randperm(columns, generator=rng, device=device)
    return QuantizedMatrix(
        scheme=scheme, rows=rows, columns=columns, codes=lambda start, stop: codes[start:stop],
        scales=scales.half() if scheme.code == "uint" else scales, zeros=zeros if scheme.zero_point else None,
        scale_rows=torch.arange(rows, device=device).div(scheme.group_rows, rounding_mode="floor").int()
        if scheme.group_rows > 1 else None,
        groups=(shuffle // (scheme.group or columns)).int() if scheme.act_order else None,
        input_scale=torch.tensor(0.004, device=device) if static else None)
