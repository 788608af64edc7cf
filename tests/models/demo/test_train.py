"""Training the demo: its network is Mixtral, a resumed run is an unbroken one, scores are of exact answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nybble.models.demo import train
from nybble.models.demo.checkpoint import CONFIG, write_files
from nybble.models.demo.network import Network
from nybble.models.demo.rows import make_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(train, "ROWS", 2)
    monkeypatch.setattr(train, "SCORED", 2)


def test_the_network_is_transformers_mixtral(tmp_path):
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.bfloat16())
    write_files(tmp_path)
    save_file(network.checkpoint(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.from_numpy(make_rows(0, 1)[0][:, :200]).long()
    with torch.inference_mode():
        mine, other = network(ids)[0], theirs(ids).logits
    assert (mine - other).abs().max() < 1e-4 * other.abs().max()
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in theirs.parameters()) < 2e6
    assert CONFIG["hidden_size"] % 128 == CONFIG["intermediate_size"] % 128 == 0


def test_a_resumed_run_is_the_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "batches",
                        lambda seed, first, steps: (make_rows(seed + i, 2) for i in range(first, steps)))
    monkeypatch.setattr(train, "export", lambda *_: {})
    monkeypatch.setattr(train, "score", lambda *_: {})

    def run(folder: Path) -> dict[str, torch.Tensor]:
        train.train(folder, steps=4, seed=5, device=CPU, every=2)
        return load_file(folder / train.STATE)

    whole, step, calls = run(tmp_path / "whole"), train.Trainer.step, []

    def failing(self: train.Trainer, *args: object) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(step(self, *args))

    monkeypatch.setattr(train.Trainer, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.setattr(train.Trainer, "step", step)
    resumed = run(tmp_path / "broken")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(SystemExit, match="is of a run with"):
        train.train(tmp_path / "broken", steps=9, seed=5, device=CPU, every=2)


def test_a_step_learns_and_worker_processes_make_its_rows():
    trainer, losses = train.Trainer(CPU), []
    (batch,) = train.batches(0, 0, 1)
    assert all((a == b).all() for a, b in zip(batch, make_rows(0, 2)))
    for _ in range(4):
        trainer.step(*batch, 3e-3)
        losses.append(float(trainer.loss))
    assert losses[-1] < losses[0]


def test_scores_are_of_whole_answers(tmp_path, monkeypatch):
    trained = Network()
    stored = load_file(Path(train.__file__).parent / "weights" / "bf16" / "model.safetensors")
    fresh = trained.checkpoint()
    assert fresh.keys() == stored.keys()
    with torch.no_grad():
        trained.embed.copy_(stored["model.embed_tokens.weight"])
    assert set(train.score(trained, CPU, True, 2).values()) == {0.0}
