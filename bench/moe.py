"""`nybble bench moe`: the fused experts of real models, checked first, then timed against the experts really hit."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from ..csrc.matrix import QuantizedMatrix
from ..csrc.moe_gemm import CodedStack, PackedStack, Stack
from ..csrc.quantize import dequantize, quantize
from ..csrc.scheme import Scheme
from ..engine.args import setting
from ..moe import Backends, Expert, Experts, MoEProblem
from ..moe.backend import PLAIN
from ..moe.fused import FusedBackend
from ..moe.many_rows import ManyRows
from ..moe.reference import ReferenceBackend
from ..plugins.errors import UsageError
from ..quant import LayerShape, Linear, Part, Unquantized
from .command import make_parser, pick, publish, read_settings
from .floors import Floors, measure_floors, time_calls
from .kernels import SCHEMES, random_matrix
from .results import Metric, make_result
from .torch_experts import torch_can, torch_experts

# hidden, intermediate, experts, top_k
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "small": (256, 128, 8, 2),
}
READ_SHAPE = (256, 128, 128, 8)
FORMATS: dict[str, Scheme | None] = {"bf16": None, "fp8": SCHEMES["fp8-channel"], "fp8-block": SCHEMES["fp8-block"],
                                     "int4": SCHEMES["w4"], "int4-zp": SCHEMES["w4-zp"]}
# Routings that take turns, so that their weights come from memory.
TURNS = 16
CHECKED = 24
# Of the norm of the result: outputs are rounded to 16 bits, and hidden values too, which may then get another code.
TOLERANCE = {"float": 5e-3, "fp8_e4m3": 1e-2}


@dataclass(frozen=True, kw_only=True)
class MoEArgs:
    """What is run."""

    models: str = setting("mixtral-8x7b,qwen3-30b-a3b,deepseek-v2-lite", "whose experts, separated by commas",
                          group="benchmark")
    formats: str = setting("bf16,fp8,int4", "of the weights, separated by commas", group="benchmark")
    tokens: str = setting("1,16,64,256,4096", "tokens in a step, separated by commas", group="benchmark")
    device: str = setting("cuda", "cuda, or cpu: how many experts the reference backend reads", group="benchmark",
                          choices=("cuda", "cpu"))
    samples: int = setting(15, "times each is timed", group="benchmark", low=1)


def main(argv: list[str]) -> int:
    parser = make_parser("moe", MoEArgs, "Time the fused MoE backend beside torch's grouped products, as CUDA graphs.")
    parsed = parser.parse(argv)
    args = read_settings(MoEArgs, parsed)
    metrics: dict[str, Metric]
    if args.device == "cpu":
        metrics = {}
        for tokens in map(int, args.tokens.split(",")):
            metrics |= experts_read(tokens, args.samples)
        publish(make_result("moe", argv, model="random", toy_model=False, device="cpu",
                            workload=asdict(args) | {"shape": READ_SHAPE}, metrics=metrics), parsed.output_json)
        return 0
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", fix="run it where there is one")
    device = torch.device("cuda")
    shapes, formats = pick(args.models, SHAPES, "model"), pick(args.formats, FORMATS, "format")
    floors = measure_floors(device)
    print(f"floors: {floors.bandwidth / 1e9:.0f} GB/s, "
          + ", ".join(f"{kind} {rate / 1e12:.0f} T/s" for kind, rate in floors.operations.items()))
    print(f"{'model':<17} {'format':<9} {'tokens':>6} {'hit':>5} {'fused us':>9} {'floor us':>9} {'share':>6} "
          f"{'torch us':>9} {'error':>8}")
    metrics = {}
    with torch.inference_mode():
        for model, shape in shapes.items():
            for name, scheme in formats.items():
                metrics |= run_format(model, name, scheme, shape, args, floors)
                torch.cuda.empty_cache()
    publish(make_result("moe", argv, model=args.models, toy_model=False, device="cuda", workload=asdict(args),
                        metrics=metrics), parsed.output_json)
    return 0


def run_format(model: str, label: str, scheme: Scheme | None, shape: tuple[int, int, int, int], args: MoEArgs,
               floors: Floors) -> dict[str, Metric]:
    """One model's experts in one format at every number of tokens."""
    hidden, intermediate, count, top_k = shape
    device = torch.device("cuda")
    backend = random_backend(scheme, shape, device)
    each = sum(tensor.nbytes for tensor in backend.tensors.values()) / count
    peer = torch_experts(backend.tensors, scheme) if torch_can(scheme) else None
    kind = scheme.activation.dtype if scheme is not None and scheme.activation else "float"
    metrics: dict[str, Metric] = {}
    for tokens in map(int, args.tokens.split(",")):
        turns = [random_turn(tokens, shape, device, seed) for seed in range(TURNS if tokens <= 256 else 2)]
        error = check(backend, scheme, shape, turns[0])
        if error > TOLERANCE[kind]:
            print(f"{model:<17} {label:<9} {tokens:>6} WRONG: relative error {error:.3g}", flush=True)
            continue
        hit = statistics.mean(len(ids.unique()) for _, _, ids in turns)
        moved = hit * each + 2 * tokens * hidden * 2
        least = floors.seconds(moved, 6.0 * tokens * top_k * hidden * intermediate, kind)
        ours = time_calls([partial(backend, *turn) for turn in turns], device, samples=args.samples)
        theirs = [] if peer is None else time_calls([partial(peer, *turn) for turn in turns], device,
                                                    samples=args.samples)
        taken, other = statistics.median(ours), statistics.median(theirs) if theirs else float("nan")
        print(f"{model:<17} {label:<9} {tokens:>6} {hit:>5.0f} {taken * 1e6:>9.1f} {least * 1e6:>9.1f} "
              f"{least / taken:>6.1%} {other * 1e6:>9.1f} {error:>8.1e}", flush=True)
        key = f"{model}/{label}/{tokens}"
        metrics[f"{key}/fused"] = Metric.of([1e6 * s for s in ours], "us", better="lower")
        metrics[f"{key}/share"] = Metric.of([least / s for s in ours], "of floor", better="higher")
        if theirs:
            metrics[f"{key}/torch"] = Metric.of([1e6 * s for s in theirs], "us", better="lower")
    return metrics


def experts_read(tokens: int, samples: int) -> dict[str, Metric]:
    """On CPU: experts whose weights a step reads, counted by watching them run, beside those it routes to."""
    hidden, intermediate, count, top_k = READ_SHAPE
    cpu = torch.device("cpu")

    def linear(name: str, inputs: int, *sizes: int) -> Linear:
        parts = tuple(Part(name=f"{name}{i}", size=size) for i, size in enumerate(sizes))
        made = Linear(name, LayerShape(in_features=inputs, parts=parts), Unquantized(), dtype=torch.float32, device=cpu)
        made.weights["weight"].normal_(0, inputs**-0.5)
        return made

    experts = [Expert(linear("gate_up", hidden, intermediate, intermediate), linear("down", intermediate, hidden))
               for _ in range(count)]
    run: set[int] = set()
    for number, expert in enumerate(experts):
        expert.down.register_forward_hook(lambda *_, number=number: run.add(number))
    layer = Experts("experts", experts, hidden=hidden, intermediate=intermediate, top_k=top_k, dtype=torch.float32,
                    device=cpu, backends=Backends(known={"reference": ReferenceBackend}))
    layer.after_load()
    routed, read = [], []
    with torch.inference_mode():
        for seed in range(samples):
            x, weights, ids = random_turn(tokens, READ_SHAPE, cpu, seed)
            run.clear()
            layer(x.float(), weights, ids)
            routed.append(float(len(ids.unique())))
            read.append(float(len(run)))
    print(f"{tokens:>6} tokens: {statistics.median(routed):g} of {count} experts routed to, "
          f"{statistics.median(read):g} read")
    return {f"cpu/{tokens}/routed": Metric.of(routed, "experts", better="lower"),
            f"cpu/{tokens}/read": Metric.of(read, "experts", better="lower")}


def random_turn(tokens: int, shape: tuple[int, int, int, int], device: torch.device,
                seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weights and a uniformly random choice of experts."""
    hidden, _, count, top_k = shape
    rng = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=rng, device=device).bfloat16()
    ids = torch.rand(tokens, count, generator=rng, device=device).topk(top_k, dim=-1).indices
    weights = torch.rand(tokens, top_k, generator=rng, device=device).softmax(dim=-1)
    return x, weights, ids


def random_weight(scheme: Scheme | None, rows: int, columns: int, device: torch.device,
                  seed: int) -> QuantizedMatrix | Tensor:
    """One matrix of one expert, the same for the same seed."""
    if scheme is not None:
        return random_matrix(scheme, rows, columns, device, seed)
    rng = torch.Generator(device).manual_seed(seed)
    return (torch.randn(rows, columns, generator=rng, device=device) * columns**-0.5).bfloat16()


def random_backend(scheme: Scheme | None, shape: tuple[int, int, int, int], device: torch.device) -> FusedBackend:
    """The fused backend over random experts, made one after another."""
    hidden, intermediate, count, top_k = shape
    problem = MoEProblem(schemes=(scheme or PLAIN,) * 2, even=True, experts=count, top_k=top_k, hidden=hidden,
                         intermediate=intermediate, dtype=torch.bfloat16, device=device)
    backend = FusedBackend([], problem)
    backend.count = count
    for place, (name, rows, columns) in enumerate((("gate", intermediate, hidden), ("up", intermediate, hidden),
                                                   ("down", hidden, intermediate))):
        stack: Stack
        if scheme is not None and scheme.code == "uint":
            stack = PackedStack(count)
        else:
            stack = CodedStack(count, scheme, None if scheme is None else scheme.activation)
        for number in range(count):
            weight = random_weight(scheme, rows, columns, device, 3 * number + place)
            if isinstance(weight, Tensor):
                assert isinstance(stack, CodedStack)
                stack.put_plain(number, weight)
            else:
                assert isinstance(stack, CodedStack | PackedStack)
                stack.put(number, weight)
        setattr(backend, name, stack)
        backend.tensors = {**backend.tensors, **{f"{name}.{key}": tensor for key, tensor in stack.tensors.items()}}
    backend.many_rows = ManyRows.over(backend.gate, backend.up, backend.down, problem.dtype, device)
    return backend


def check(backend: Callable[[Tensor, Tensor, Tensor], Tensor], scheme: Scheme | None, shape: tuple[int, int, int, int],
          turn: tuple[Tensor, Tensor, Tensor]) -> float:
    """Relative error of the first tokens against float32 products of what the codes stand for, expert by expert.

    Inputs and hidden values are rounded as the scheme says, so that what is left is the kernels' own.
    """
    hidden, intermediate, _, _ = shape
    x, weights, ids = (tensor[:CHECKED] for tensor in turn)
    expected = torch.zeros(x.shape, device=x.device)
    sizes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    for expert in ids.unique().tolist():
        made = [random_weight(scheme, *size, x.device, 3 * expert + i) for i, size in enumerate(sizes)]
        gate, up, down = (w.float() if isinstance(w, Tensor) else w.dequant(0, w.rows) for w in made)
        tokens, place = (ids == expert).nonzero(as_tuple=True)
        chosen = rounded(x[tokens], scheme)
        hidden_values = torch.nn.functional.silu(chosen @ gate.T) * (chosen @ up.T)
        y = rounded(hidden_values.to(x.dtype), scheme) @ down.T
        expected.index_add_(0, tokens, y * weights[tokens, place, None])
    return float((backend(*turn)[:CHECKED] - expected).norm() / expected.norm())


def rounded(x: Tensor, scheme: Scheme | None) -> Tensor:
    """x as its product sees it, in float32."""
    if scheme is None or scheme.activation is None:
        return x.float()
    return dequantize(*quantize(x, scheme.activation), scheme.activation)
