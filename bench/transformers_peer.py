"""`nybble bench transformers`: ragged requests through transformers' `generate` and nybble, in one process.

The sides take turns. The peer is used as its documentation shows: left-padded batches in arrival order, each
run to its own longest output. A second, kinder row sorts requests by output length first, which a server
cannot do. Only tokens that a request asked for count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..engine.args import setting
from ..plugins.errors import NybbleError
from .command import make_parser, publish, read_settings, track
from .results import Metric, make_result
from .workload import Rng, generate_exactly, make_rng, random_prompts

if TYPE_CHECKING:
    from ..engine.llm import LLM

PAD_ID = 0
TIE = 1e-3
"""Logits closer than this are a tie that rounding may settle either way."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the random Llama that both sides load from one checkpoint."""

    hidden_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 1376
    vocab_size: int = 32000
    max_position_embeddings: int = 1024


@dataclass(frozen=True, kw_only=True)
class PeerArgs:
    """The requests, and how often they are run."""

    num_prompts: int = setting(64, "requests", group="benchmark", low=1)
    min_len: int = setting(16, "fewest prompt tokens, and fewest output tokens", group="benchmark", low=1)
    max_len: int = setting(256, "most of each; uniform in between", group="benchmark", low=1, high=512)
    batch_size: int = setting(16, "transformers' batch", group="benchmark", low=1)
    single_len: int = setting(128, "prompt and output tokens of the lone request", group="benchmark", low=1, high=512)
    threads: int = setting(2, "torch threads of both", group="benchmark", low=1)
    repeats: int = setting(3, "turns each side gets", group="benchmark", low=1)
    seed: int = setting(0, "draws weights and requests", group="benchmark")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: its prompt, and how many tokens it wants."""

    prompt: list[int]
    output_len: int


Side = Callable[[Sequence[Request]], list[list[int]]]


def main(argv: list[str]) -> int:
    parser = make_parser(
        "transformers",
        PeerArgs,
        "Compare with transformers' generate on a random 4-layer Llama in "
        "float32 on the CPU. Greedy tokens must agree first.",
    )
    parsed = parser.parse(argv)
    args, shape = read_settings(PeerArgs, parsed), Shape()
    print("random Llama, float32: " + ", ".join(f"{name} {value}" for name, value in asdict(shape).items()))
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as folder:
        metrics = run(Path(folder), shape, args)
    result = make_result(
        "transformers",
        argv,
        model="random-llama",
        toy_model=True,
        device="cpu",
        workload=asdict(args) | {"shape": asdict(shape)},
        metrics=metrics,
    )
    publish(result, parsed.output_json)
    return 0


def run(folder: Path, shape: Shape, args: PeerArgs) -> dict[str, Metric]:
    """Make the checkpoint, load both sides, check that they agree, measure. Raises NybbleError."""
    from ..engine.args import EngineArgs
    from ..engine.llm import LLM

    make_checkpoint(folder, shape, args.seed)
    model = load_peer(folder)
    tokens = args.num_prompts * 2 * args.max_len
    llm = LLM.from_engine_args(
        EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            device="cpu",
            cpu_threads=args.threads,
            dtype="float32",
            max_num_seqs=args.num_prompts,
            use_tqdm_on_load=False,
            enable_prefix_caching=False,  # every turn runs the same prompts
            num_gpu_blocks_override=1 + args.num_prompts + tokens // 16,
        )
    )
    try:
        return compare(llm, model, args, shape.vocab_size)
    finally:
        llm.shutdown()


def compare(llm: LLM, model: Any, args: PeerArgs, vocab_size: int) -> dict[str, Metric]:
    """Both sides in turn, `repeats` times; the warm-up is the comparison of their tokens."""
    rng = make_rng(args.seed)
    requests = draw_requests(rng, args, vocab_size)
    single = [Request(prompt=random_prompts(rng, [args.single_len], vocab_size)[0], output_len=args.single_len)]
    sides: dict[str, Side] = {
        "nybble": lambda asked: run_nybble(llm, asked),
        "transformers": lambda asked: run_peer(model, asked, args.batch_size),
        "transformers_sorted": lambda asked: run_peer(
            model, sorted(asked, key=lambda r: r.output_len, reverse=True), args.batch_size
        ),
    }
    ties = sum(
        check_agreement(model, asked, sides["nybble"](asked), sides["transformers"](asked))
        for asked in (single, requests)
    )
    print(f"greedy tokens agree on {1 + len(requests)} requests ({ties} of them up to a tie)")

    batch: dict[str, list[float]] = {name: [] for name in sides}
    alone: dict[str, list[float]] = {"nybble": [], "transformers": []}
    for turn in track(range(args.repeats), "turns"):
        order = list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]
        for name in order:
            batch[name].append(_seconds(sides[name], requests))
        for name in [name for name in order if name in alone]:
            alone[name].append(_seconds(sides[name], single))
    wanted = sum(request.output_len for request in requests)
    metrics = {
        f"{name}_tokens_per_s": Metric.of([wanted / s for s in batch[name]], "tok/s", better="higher") for name in sides
    }
    for peer in ("transformers", "transformers_sorted"):
        metrics[f"speedup_over_{peer}"] = _ratio(batch[peer], batch["nybble"])
    metrics |= {f"{name}_single_latency": Metric.of(alone[name], "s", better="lower") for name in alone}
    metrics["speedup_single"] = _ratio(alone["transformers"], alone["nybble"])
    return metrics


def _seconds(side: Side, requests: Sequence[Request]) -> float:
    start = time.perf_counter()
    side(requests)
    return time.perf_counter() - start


def _ratio(theirs: list[float], ours: list[float]) -> Metric:
    return Metric.of([a / b for a, b in zip(theirs, ours)], "x", better="higher")


def make_checkpoint(folder: Path, shape: Shape, seed: int) -> None:
    """Write a Llama with seeded weights of unit gain, so that argmax has clear winners; no end token."""
    import transformers

    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        **asdict(shape), tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=PAD_ID
    )
    generator = torch.Generator().manual_seed(seed % 2**63)
    model = transformers.LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(
                    0,
                    (4.0 if name.startswith("lm_head") else 1.0) / weight.shape[-1] ** 0.5,
                    generator=generator,
                )
    model.save_pretrained(folder)


def load_peer(folder: Path) -> Any:
    """transformers' model, as `from_pretrained` gives it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def draw_requests(rng: Rng, args: PeerArgs, vocab_size: int) -> list[Request]:
    """Ragged prompts and outputs; no prompt holds the padding id."""
    lens = rng.integers(args.min_len, args.max_len, (args.num_prompts, 2), endpoint=True).tolist()
    return [
        Request(prompt=rng.integers(PAD_ID + 1, vocab_size, prompt_len).tolist(), output_len=output_len)
        for prompt_len, output_len in lens
    ]


def run_nybble(llm: LLM, requests: Sequence[Request]) -> list[list[int]]:
    outputs = generate_exactly(llm, [r.prompt for r in requests], [r.output_len for r in requests], detokenize=False)
    return [output.outputs[0].token_ids for output in outputs]


@torch.inference_mode()
def run_peer(model: Any, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Greedy `generate` over left-padded batches, each until its longest output; what is over is cut off."""
    done: list[list[int]] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(r.prompt) for r in batch)
        ids = torch.tensor([[PAD_ID] * (width - len(r.prompt)) + r.prompt for r in batch])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(r.output_len for r in batch))
        done += [row[width : width + r.output_len] for r, row in zip(batch, out.tolist())]
    return done


def check_agreement(
    model: Any, requests: Sequence[Request], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> int:
    """How many requests part ways at a tie. Raises NybbleError when one does where the winner is clear."""
    ties = 0
    for i, (request, a, b) in enumerate(zip(requests, ours, theirs)):
        if a == b:
            continue
        at = next(j for j, (x, y) in enumerate(zip(a, b)) if x != y)
        with torch.inference_mode():
            logits = model(torch.tensor([request.prompt + b[:at]])).logits[0, -1]
        gap = float((logits.max() - logits[[a[at], b[at]]]).max())
        if gap > TIE:
            raise NybbleError(
                f"request {i} gets other greedy tokens than from transformers",
                found=f"token {at}: {a[at]} here, {b[at]} there; logits {gap:.3g} apart",
            )
        ties += 1
    return ties
