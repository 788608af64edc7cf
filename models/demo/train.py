"""Train nybble-demo: `python -m nybble.models.demo.train --out DIR`, seeded, resumable, minutes on a GPU."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checkpoint import PAD, write_files
from .network import Network
from .rows import IGNORE, ROW_TOKENS, Ids, as_tokens, make_rows
from .tasks import TASKS, Example, take

ROWS, PEAK_RATE, RISE, DECAY, BETAS = 64, 3e-3, 500, 0.05, (0.9, 0.98)
SCORED = 250  # examples of each task and split
AHEAD = 64  # batches that worker processes may be ahead
STATE = "training.safetensors"


def learning_rate(step: int, steps: int) -> float:
    """A linear rise, then a cosine to zero."""
    return PEAK_RATE * min(1.0, (step + 1) / RISE) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Trainer:
    """Weights, optimizer, and one step over fixed buffers; on CUDA it is captured once and replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.network = Network().to(device)
        self.rate, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.ids = torch.full((ROWS, ROW_TOKENS), PAD, device=device)
        self.targets = torch.full((ROWS, ROW_TOKENS), PAD, device=device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.rate, betas=BETAS, weight_decay=DECAY,
                                           capturable=device.type == "cuda")
        self._replay: Callable[[], None] = self._compute
        if device.type == "cuda":
            self._replay = self._capture()
        else:
            self._compute()  # at rate 0: makes the optimizer's state, which `load` fills
        for moments in self.optimizer.state.values():
            for tensor in moments.values():
                tensor.zero_()

    def step(self, ids: Ids, targets: Ids, rate: float) -> None:
        """One step of the optimizer; the loss stays on the device in `loss`."""
        self.ids.copy_(torch.from_numpy(ids))
        self.targets.copy_(torch.from_numpy(targets))
        self.rate.fill_(rate)
        self._replay()

    def _compute(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss = self.network.loss(self.ids, self.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _capture(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        return graph.replay

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        state = {f"optimizer.{names[id(parameter)]}.{key}": tensor
                 for parameter, moments in self.optimizer.state.items() for key, tensor in moments.items()}
        return {f"network.{name}": parameter.detach() for name, parameter in self.network.named_parameters()} | state

    def save(self, path: Path, **position: int) -> None:
        scratch = path.with_suffix(".part")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, scratch, metadata={"position": json.dumps(position)})
        scratch.replace(path)

    def load(self, path: Path) -> dict[str, int]:
        stored = load_file(path)
        for name, tensor in self.tensors().items():
            tensor.copy_(stored[name])
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["position"]))


def batches(seed: int, first: int, steps: int) -> Iterator[tuple[Ids, Ids]]:
    """The batches of steps `first` on, made by worker processes."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(make_rows, seed + step, ROWS) for step in range(first, min(first + AHEAD, steps))]
        for step in range(first, steps):
            yield waiting.pop(0).result()
            if step + AHEAD < steps:
                waiting.append(pool.submit(make_rows, seed + step + AHEAD, ROWS))


@torch.inference_mode()
def score(network: Network, device: torch.device, held_out: bool, count: int = SCORED) -> dict[str, float]:
    """Share of examples answered exactly. With the right answer so far given, every next token must be the likeliest:
    the same as greedy decoding getting all of it right.
    """
    found = {}
    for task in TASKS:
        examples = take(task, count, held_out=held_out)
        found[task] = sum(_right(network, device, examples[at : at + ROWS]) for at in range(0, count, ROWS)) / count
    return found


def _right(network: Network, device: torch.device, examples: list[Example]) -> int:
    rows = [as_tokens(example, example.chat_only) for example in examples]
    width = max(len(given) + len(answer) for given, answer in rows)
    ids, targets = (torch.full((len(rows), width), fill) for fill in (PAD, IGNORE))
    for row, (given, answer) in enumerate(rows):
        ids[row, : len(given) + len(answer)] = torch.tensor(given + answer)
        targets[row, len(given) - 1 : len(given) + len(answer) - 1] = torch.tensor(answer)
    likeliest = network(ids.to(device))[0].argmax(-1).cpu()
    return int(((likeliest == targets) | (targets == IGNORE)).all(-1).sum())


def export(trainer: Trainer, out: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Write the checkpoint and return its scores after rounding to bfloat16."""
    write_files(out)
    save_file(trainer.network.checkpoint(), out / "model.safetensors", metadata={"format": "pt"})
    rounded = Network().to(device)
    with torch.no_grad():
        for mine, theirs in zip(rounded.parameters(), trainer.network.parameters(), strict=True):
            mine.copy_(theirs.bfloat16())
    scores = {"held_out": score(rounded, device, True), "trained": score(rounded, device, False)}
    (out / "scores.json").write_text(json.dumps(scores, indent=1))
    return scores


def train(out: Path, *, steps: int, seed: int, device: torch.device, every: int) -> None:
    """Train for `steps` steps, or what is left of them; every `every` steps the state is saved and scores printed."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    trainer, first, state = Trainer(device), 0, out / STATE
    if state.exists():
        position = trainer.load(state)
        if (position["steps"], position["seed"]) != (steps, seed):
            raise SystemExit(f"{state} is of a run with {position}: continue that one, or take another --out")
        first = position["step"]
    started = time.monotonic()
    for step, (ids, targets) in enumerate(batches(seed * 1_000_003, first, steps), first):
        trainer.step(ids, targets, learning_rate(step, steps))
        if (step + 1) % every == 0 or step + 1 == steps:
            trainer.save(state, step=step + 1, steps=steps, seed=seed)
            print(f"step {step + 1}/{steps} loss {float(trainer.loss):.4f} {time.monotonic() - started:.0f} s",
                  score(trainer.network, device, True, 100), flush=True)
    for split, scores in export(trainer, out, device).items():
        print(split, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the training state")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--every", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(args.out, steps=args.steps, seed=args.seed, device=torch.device(args.device), every=args.every)


if __name__ == "__main__":
    main()
