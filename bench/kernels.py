"""`nybble bench kernels`: every registered kernel on real layer shapes, checked first, then timed against its floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..csrc.contract import Bound, check_product
from ..csrc.matrix import QuantizedMatrix
from ..csrc.quantize import dequantize, quantize
from ..csrc.scheme import Activation, Scheme
from ..csrc.select import LinearKernel, Problem
from ..engine.args import setting
from ..engine.loader.kernels import linear_kernels
from ..plugins.errors import UsageError, did_you_mean
from ..plugins.manager import PluginHost
from .command import make_parser, publish, read_settings
from .floors import Floors, copies_for, measure_floors, time_calls
from .results import Metric, make_result

T = TypeVar("T")

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
# Kernels that round dequantized weights to the inputs' dtype, those that round the quantized inputs back to it, and
# those that never quantize them.
ROUND_WEIGHTS = ("tiles", "cpu_int4", "cpu_int8")
ROUND_INPUTS = ("tiles",)
KEEP_INPUTS = ("triton_w8a16",)


@dataclass(frozen=True, kw_only=True)
class KernelArgs:
    """What is run."""

    shapes: str = setting("llama-3-8b", "whose layers", group="benchmark", choices=tuple(SHAPES))
    tokens: str = setting("1,16,128,2048", "tokens in a step, separated by commas", group="benchmark")
    schemes: str = setting("all", "schemes, separated by commas", group="benchmark")
    kernels: str = setting("all", "kernels, separated by commas", group="benchmark")
    dtype: str = setting("bfloat16", "of inputs and outputs", group="benchmark",
                         choices=("bfloat16", "float16", "float32"))
    device: str = setting("cuda", "cuda or cpu", group="benchmark", choices=("cuda", "cpu"))
    samples: int = setting(15, "times each is timed", group="benchmark", low=1)


def main(argv: list[str]) -> int:
    parser = make_parser("kernels", KernelArgs, "Time linear kernels with cold weights beside torch's 16-bit product. "
                                                "A kernel whose result breaks the numerical contract is not timed.")
    parsed = parser.parse(argv)
    args = read_settings(KernelArgs, parsed)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", fix="--device cpu")
    known = linear_kernels(PluginHost.load(), None).known
    schemes, kernels = picked(args.schemes, SCHEMES, "scheme"), picked(args.kernels, known, "kernel")
    floors = measure_floors(device)
    print(f"floors: {floors.bandwidth / 1e9:.0f} GB/s, "
          + ", ".join(f"{kind} {rate / 1e12:.1f} T/s" for kind, rate in floors.operations.items()))
    print(f"{'layer':<8} {'scheme':<12} {'kernel':<14} {'tokens':>6} {'us':>10} {'floor us':>9} {'share':>6} "
          f"{'GB/s':>7} {'Tops':>7} {'error/bound':>11}")
    metrics: dict[str, Metric] = {}
    with torch.inference_mode():
        for layer, shape in SHAPES[args.shapes].items():
            for name, scheme in schemes.items():
                metrics |= run_layer(layer, name, scheme, shape, kernels, args, floors)
    publish(make_result("kernels", argv, model=args.shapes, toy_model=False, device=args.device,
                        workload=asdict(args), metrics=metrics), parsed.output_json)
    return 0


def picked(asked: str, known: Mapping[str, T], what: str) -> dict[str, T]:
    """The entries named by a comma-separated list; "all" is all. Raises UsageError."""
    names = list(known) if asked == "all" else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}", known=known, fix=did_you_mean(name, known))
    return {name: known[name] for name in names}


def run_layer(layer: str, label: str, scheme: Scheme, shape: tuple[int, int], kernels: Mapping[str, type[LinearKernel]],
              args: KernelArgs, floors: Floors) -> dict[str, Metric]:
    """Every kernel that takes the scheme, at every number of tokens, beside torch's product of 16-bit weights."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    matrix = random_matrix(scheme, *shape, device)
    weight = matrix.dequant(0, matrix.rows)
    problem = Problem.of(matrix, dtype)
    metrics: dict[str, Metric] = {}
    able = {name: kernel for name, kernel in kernels.items() if kernel.supports(problem) is None}
    made = {name: _copies(partial(kernel, matrix, dtype), device) for name, kernel in able.items()}
    plain = weight.to(dtype)
    products = [plain.clone() for _ in range(copies_for(plain.nbytes, device))]
    for tokens in map(int, args.tokens.split(",")):
        x = torch.randn(tokens, matrix.columns, device=device, dtype=dtype) / 4
        for name, copies in made.items():
            ratio = check(copies[0], scheme, matrix, x, weight)
            if ratio > 1:
                print(f"{layer:<8} {label:<12} {name:<14} {tokens:>6} WRONG: worst error {ratio:.3g} of its bound")
                continue
            stored = sum(tensor.nbytes for tensor in copies[0].weights.values())
            seconds = time_calls([partial(copy, x) for copy in copies], device, samples=args.samples)
            kind = scheme.activation.dtype if scheme.activation else "float"
            metrics |= _row(layer, label, name, x, matrix.rows, stored, kind, seconds, floors, f"{ratio:.2f}")
        seconds = time_calls([partial(torch.nn.functional.linear, x, w) for w in products], device,
                             samples=args.samples)
        metrics |= _row(layer, label, "torch-plain", x, matrix.rows, plain.nbytes, "float", seconds, floors, "-")
    return metrics


def _copies(make: Callable[[], LinearKernel], device: torch.device) -> list[LinearKernel]:
    """One packed matrix several times over, so that its weights are cold at every call."""
    first = make()
    count = copies_for(sum(tensor.nbytes for tensor in first.weights.values()), device)
    return [first, *(make() for _ in range(count - 1))]


def check(kernel: LinearKernel, scheme: Scheme, matrix: QuantizedMatrix, x: Tensor, weight: Tensor) -> float:
    """The worst error of an output as a share of its bound (`csrc/contract.py`)."""
    actual, bound = kernel(x), Bound(weights=x.dtype if kernel.name in ROUND_WEIGHTS else None)
    if scheme.activation is not None and kernel.name not in KEEP_INPUTS:
        x = dequantize(*quantize(x, scheme.activation, matrix.input_scale), scheme.activation)
        if kernel.name in ROUND_INPUTS:
            x, bound = x.to(actual.dtype), Bound(weights=actual.dtype)
        elif scheme.activation.dtype == "fp8_e4m3" and x.device.type == "cuda":
            bound = Bound(accumulate=FP8_ACCUMULATE)
    return check_product(actual, x, weight, bound=bound).ratio


def _row(layer: str, label: str, name: str, x: Tensor, outputs: int, stored: int, kind: str, seconds: list[float],
         floors: Floors, error: str) -> dict[str, Metric]:
    """Print one measurement, and give it as a metric in microseconds."""
    tokens, inputs = x.shape
    moved = stored + x.nbytes + tokens * outputs * x.element_size()
    operations = 2.0 * tokens * outputs * inputs
    least, taken = floors.seconds(moved, operations, kind), statistics.median(seconds)
    print(f"{layer:<8} {label:<12} {name:<14} {tokens:>6} {taken * 1e6:>10.1f} {least * 1e6:>9.1f}",
          f"{least / taken:>6.1%} {moved / taken / 1e9:>7.0f} {operations / taken / 1e12:>7.1f} {error:>11}",
          flush=True)
    return {f"{layer}/{label}/{name}/{tokens}": Metric.of([1e6 * s for s in seconds], "us", better="lower"),
            f"{layer}/{label}/{name}/{tokens}/share": Metric.of([least / s for s in seconds], "of floor",
                                                               better="higher")}


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
