"""Two checkpoints side by side: against transformers in float64, against themselves, and with planted faults."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nybble.bench.eval.compare import compare
from nybble.bench.eval.passages import Passage
from nybble.plugins.errors import CheckpointError, UsageError
from nybble.quant import Linear

FILE = "model.safetensors"
SCALE = "model.layers.1.block_sparse_moe.experts.5.w2.weight_scale"
DEEPSEEK = dict(
    kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=48, n_shared_experts=1, first_k_dense_replace=1, head_dim=8,
    num_key_value_heads=4, n_group=1, topk_group=1, topk_method="greedy",
)
QWEN = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
ARCHITECTURES = {
    "llama": ("Llama", {}), "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral, window": ("Mistral", {"sliding_window": 7}), "qwen2": ("Qwen2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 16}), "deepseek_v2": ("DeepseekV2", DEEPSEEK),
}


def truth(folder: Path, passages: list[Passage]) -> tuple[list, torch.Tensor, torch.Tensor, list]:
    """(hidden states after layer 0, log-probabilities and targets of scored tokens, router logits), in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64,
                                                              experts_implementation="eager").eval()
    hidden, logs, targets, routers = [], [], [], []
    for passage in passages:
        ids = torch.tensor([passage.ids])
        with torch.inference_mode():
            out = model(ids, output_hidden_states=True, output_router_logits=True)
        hidden.append(out.hidden_states[1][0])
        logs.append(out.logits[0, passage.first - 1 : -1].log_softmax(-1))
        targets.append(ids[0, passage.first :])
        routers.append(torch.stack([layer.view(len(passage.ids), -1) for layer in out.router_logits]))
    return torch.cat(hidden), torch.cat(logs), torch.cat(targets), torch.cat(routers, 1)


def test_against_transformers(reference, fp8, source, passages):
    stored, dense = fp8()
    found = compare(source(stored), source(reference), passages)
    (true, p, targets, want), (noisy, q, _, got) = truth(reference, passages), truth(dense, passages)
    kl = (p.exp() * (p - q)).sum(-1)
    first = found.divergence[0]
    assert (first.task, first.tokens, found.tokens) == ("all", len(kl), sum(len(p.ids) for p in passages))
    for name, value in (("kl_mean", kl.mean()), ("kl_max", kl.max()),
                        ("top1", (p.argmax(-1) == q.argmax(-1)).double().mean()),
                        ("nll_reference", -p.gather(1, targets[:, None]).mean()),
                        ("nll_model", -q.gather(1, targets[:, None]).mean())):
        assert getattr(first, name) == pytest.approx(float(value), rel=1e-3), name
    assert {d.task: d.tokens for d in found.divergence[1:]} == {
        task: sum(len(p.ids) - p.first for p in passages if p.task == task) for task in "ab"}
    assert sum(found.histogram.counts) == len(kl)
    level = 10 * math.log10(float(true.square().sum() / (true - noisy).square().sum()))
    assert found.layers[0].own.db == found.layers[0].same.db == pytest.approx(level, abs=0.01)
    for layer, a, b in zip(found.layers, want, got):
        a, b = (logits.topk(2).indices for logits in (a, b))
        assert layer.router is not None
        assert layer.router.own_top1 == pytest.approx(float((a[:, 0] == b[:, 0]).double().mean()))
        assert layer.router.own_set == pytest.approx(float((a.sort().values == b.sort().values).all(1).double().mean()))
    assert found.layers[1].own.db < found.layers[1].same.db and not found.outliers


def test_weights_against_a_hand_computation(reference, fp8, source, passages):
    stored, dense = fp8()
    true, noisy = load_file(reference / FILE), load_file(dense / FILE)
    found = {m.name: m for m in compare(source(stored), source(reference), passages).matrices}
    assert len(found) == 2 * (4 + 8 * 3) + 1
    for name, matrix in found.items():
        a, b = (side[f"{name}.weight"].double() for side in (true, noisy))
        noise = float((a - b).square().sum())
        assert matrix.sqnr.noise == pytest.approx(noise)
        level = 10 * math.log10(float(a.square().sum()) / noise) if noise else math.inf
        assert matrix.sqnr.level == pytest.approx(level)
    w2 = found["model.layers.1.block_sparse_moe.experts.5.w2"]
    assert (w2.layer, w2.expert) == (1, 5) and w2.stored.startswith("fp8")


def test_expert_outputs_against_a_hand_computation(reference, fp8, source, passages):
    """An expert whose last matrix is halved gives half of what it should, whatever its inputs: 6 dB."""
    stored, _ = fp8({SCALE: 0.5})
    experts = {(e.layer, e.expert): e for e in compare(source(stored), source(reference), passages).experts}
    assert experts[1, 5].sqnr is not None and experts[1, 5].tokens > 0
    assert experts[1, 5].sqnr.level == pytest.approx(20 * math.log10(2), abs=0.3)  # |y - y / 2| is half of |y|
    assert min(e.sqnr.level for at, e in experts.items() if e.sqnr and at != (1, 5)) > 20
    assert sum(e.tokens for e in experts.values()) == 2 * 2 * sum(len(p.ids) for p in passages)


def test_planted_scale_is_named(reference, fp8, source, passages):
    found = compare(source(fp8({SCALE: 2.0})[0]), source(reference), passages)
    matrices = [o for o in found.outliers if o.what == "weights"]
    assert [o.name for o in matrices] == [SCALE.removesuffix(".weight_scale")]
    assert str(matrices[0]).startswith("layer 1 expert 5 ") and matrices[0].db < 1 and matrices[0].others_db > 25
    assert {o.place for o in found.outliers if o.what == "expert outputs"} == {"layer 1 expert 5"}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_identical_checkpoints(case, make_checkpoint, source, passages):
    arch, settings = ARCHITECTURES[case]
    folder = make_checkpoint(arch, **settings)
    found = compare(source(folder), source(folder), passages)
    assert all(d.kl_max == 0 and d.top1 == 1 and d.nll_model == d.nll_reference for d in found.divergence)
    assert all(one.same.exact and one.own.exact and str(one.own) == "inf dB" for one in found.layers)
    assert all(m.sqnr.exact for m in found.matrices) and not found.outliers
    assert all(e.sqnr is None or e.sqnr.exact for e in found.experts)
    routers = [one.router for one in found.layers if one.router]
    assert bool(routers) == bool(found.experts) == ("moe" in case or case in ("mixtral", "deepseek_v2"))
    assert all((r.same_set, r.same_top1, r.own_set, r.own_top1) == (1, 1, 1, 1) for r in routers)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_likelihood_is_that_of_the_whole_model(case, make_checkpoint, source, passages, forward_logits):
    """A model that streams says what it says when it is loaded at once."""
    arch, settings = ARCHITECTURES[case]
    folder = make_checkpoint(arch, **settings)
    found = compare(source(folder), source(folder), passages[:1]).divergence[0]
    ids, first = torch.tensor(passages[0].ids), passages[0].first
    logs = forward_logits(folder, ids)[first - 1 : -1].double().log_softmax(-1)
    assert found.nll_model == pytest.approx(-float(logs.gather(1, ids[first:, None]).mean()), rel=1e-5)


@pytest.mark.parametrize(("name", "other"), [
    ("mixtral-awq", "mixtral-bf16"), ("mixtral-fp8-block", "mixtral-bf16"), ("qwen2moe-gptq-int4", "qwen2moe-bf16"),
    ("dsv2-gptq-int4", "dsv2-bf16"), ("dsv2lite-fp8-block", "dsv2lite-bf16"), ("qwen2-ct-fp8-static", "qwen2-bf16"),
])
def test_real_quantizers(name, other, shared_fixtures, source, passages):
    found = compare(source(shared_fixtures / name), source(shared_fixtures / other), passages)
    assert 0 < found.divergence[0].kl_mean < 2 and not found.outliers
    coded = [m.sqnr.level for m in found.matrices if m.stored != "unquantized"]
    assert all(14 < level < 40 for level in coded), (min(coded), max(coded))


DIFFERENT = {
    "layers": ("Mixtral", {"num_hidden_layers": 3}, "layers 3 and 2"),
    "vocabulary": ("Mixtral", {"vocab_size": 308}, "vocabulary 308 and 300"),
    "architecture": ("Llama", {}, "architecture LlamaForCausalLM and MixtralForCausalLM"),
    "shapes": ("Mixtral", {"intermediate_size": 128}, r"\[128, 64\] and .* \[96, 64\]"),
    "experts": ("Mixtral", {"num_local_experts": 4}, "matrices|lm_head|layers.0"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_mismatched_pairs_are_refused(case, make_checkpoint, reference, source, passages):
    arch, settings, says = DIFFERENT[case]
    other = make_checkpoint(arch, **({"num_local_experts": 8, **settings} if arch == "Mixtral" else settings))
    with pytest.raises(UsageError, match=f"cannot be compared(.|\n)*({says})"):
        compare(source(other), source(reference), passages)


def test_another_tokenizer_is_refused(fp8, reference, source, passages):
    folder = fp8()[0]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="2 tokens of the tokenizer, 'a'"):
        compare(source(folder), source(reference), passages)


def test_what_loading_refuses_is_refused(fp8, source):
    folder = fp8()[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(CheckpointError, match="weight_scale"):
        source(folder)


def test_one_layer_at_a_time(make_checkpoint, source, passages, monkeypatch):
    """While a piece of both is at work, no weights of another piece's linear layers are alive."""
    folder = make_checkpoint("Mixtral", num_local_experts=4, num_hidden_layers=6)
    made, alive, init = WeakSet(), {}, Linear.__init__

    def spy(self: Linear, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        made.add(self)

    def observe(piece: str) -> None:
        tensors = [t for layer in made for t in layer.weights.values() if t.device.type != "meta"]
        alive[piece] = sum(t.numel() * t.dtype.itemsize for t in tensors)

    monkeypatch.setattr(Linear, "__init__", spy)
    compare(source(folder), source(folder), passages, observe=observe)
    one = sum(t.nbytes for name, t in load_file(folder / FILE).items()
              if "layers.3." in name and "norm" not in name and "gate.weight" not in name)
    assert alive == {"embedding": 0, **{f"layer {i}": 2 * one for i in range(6)}, "head": 2 * 300 * 64 * 4}
