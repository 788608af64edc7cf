"""Layers of settings, what the engine decides from a checkpoint, and how each mistake is reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nybble import hookimpl
from nybble.engine import explain as explain_module
from nybble.engine import settings
from nybble.engine.args import EngineArgs, setting_fields
from nybble.engine.explain import explain
from nybble.engine.settings import build_engine_config, read_layers
from nybble.engine.values import merge
from nybble.plugins.errors import CheckpointError, NybbleError, PluginError, UsageError
from nybble.plugins.manager import PluginHost

Make = Callable[..., str]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NYBBLE_PLUGINS", raising=False)
    set_cuda(monkeypatch, 0, "there is no CUDA driver here")


def set_cuda(monkeypatch: pytest.MonkeyPatch, count: int, why: str = "") -> None:
    for module in (settings, explain_module):
        monkeypatch.setattr(module, "cuda_devices", lambda: (count, why))


def make_host(**hooks: Callable[..., Any]) -> PluginHost:
    """The built-ins and one plugin with these hooks."""
    plugin = SimpleNamespace(NYBBLE_API=(1, 0), **{name: hookimpl(hook) for name, hook in hooks.items()})
    return PluginHost.load(extra=[("toy", plugin)] if hooks else [])


def resolve_args(
    cli: dict[str, Any], names: Iterable[str] = (), **sources: Any
) -> tuple[EngineArgs, dict[str, str]]:
    """The settings that these flags, this environment and this file give; `names` are settings of others."""
    return merge(EngineArgs, read_layers(cli, [*setting_fields(), *names], **sources))


def build(model: str, host: PluginHost | None = None, **args: Any) -> Any:
    return build_engine_config(EngineArgs(model=model, **args), host or make_host())


# Layers


@pytest.mark.parametrize(
    ("cli", "env", "file", "value", "origin"),
    [
        ("1", "2", "3", 1, "--max-model-len"),
        (None, "2", "3", 2, "env NYBBLE_MAX_MODEL_LEN"),
        (None, None, "3", 3, "serve.yaml"),
        ("1", None, "3", 1, "--max-model-len"),
        (None, None, None, None, "default"),
        ("none", "2", "3", None, "--max-model-len"),
    ],
)
def test_precedence(
    tmp_path: Path, cli: str | None, env: str | None, file: str | None, value: int | None, origin: str
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(f"max-model-len: {file}\n" if file else "")
    args, origins = resolve_args(
        {"max_model_len": cli} if cli else {},
        environ={"NYBBLE_MAX_MODEL_LEN": env} if env else {},
        config_file=path,
    )
    assert (args.max_model_len, origins["max_model_len"]) == (value, origin)


NUMBERS = ["max_num_seqs", "max_queue", "seed", "max_num_batched_tokens", "cpu_threads"]
layer = st.dictionaries(st.sampled_from(NUMBERS), st.integers(1, 999))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cli=layer, env=layer, file=layer, dashes=st.booleans())
def test_the_highest_layer_wins_field_by_field(
    tmp_path: Path, cli: dict[str, int], env: dict[str, int], file: dict[str, int], dashes: bool
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({k.replace("_", "-") if dashes else k: v for k, v in file.items()}))
    args, origins = resolve_args(
        {k: str(v) for k, v in cli.items()},
        environ={f"NYBBLE_{k.upper()}": str(v) for k, v in env.items()} | {"PATH": "x"},
        config_file=path,
    )
    for name in setting_fields():
        layers = [(cli, "--" + name.replace("_", "-")), (env, f"env NYBBLE_{name.upper()}"), (file, "c.yaml")]
        expected = next(((values[name], o) for values, o in layers if name in values), None)
        assert (getattr(args, name), origins[name]) == (expected or (getattr(EngineArgs(), name), "default"))


@pytest.mark.parametrize(
    ("cli", "env", "file", "words"),
    [
        ({"max_model_len": "x"}, {}, "", "--max-model-len must be a whole number"),
        ({}, {"NYBBLE_MAX_MODEL_LEN": "x"}, "", "NYBBLE_MAX_MODEL_LEN must be a whole number"),
        ({}, {}, "max-model-len: x", "max-model-len in c.yaml must be a whole number"),
        ({}, {}, "max_model_len: 0", "max_model_len in c.yaml must be at least 1"),
        ({}, {}, "dtype: no", "dtype in c.yaml must be text"),
        ({"max_modle_len": "1"}, {}, "", "unknown flag --max-modle-len.*did you mean --max-model-len"),
        ({}, {"NYBBLE_MAX_MODLE_LEN": "1"}, "", "NYBBLE_MAX_MODLE_LEN.*did you mean NYBBLE_MAX_MODEL_LEN"),
        ({}, {}, "max-modle-len: 1", "unknown key max-modle-len in c.yaml.*did you mean max-model-len"),
        ({}, {}, "zzz: 1", "unknown key zzz in c.yaml.*known: async-scheduling, attention-backend, "),
        ({}, {}, "seed: 1\nmax-model-len: 1\nmax_model_len: 2", "c.yaml sets max_model_len twice"),
        ({}, {}, "- seed", "must map settings to values"),
        ({}, {}, "1: 2", "must map settings to values"),
        ({}, {}, "a: [", "not valid YAML"),
        ({}, {}, "a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ({}, {}, "\x00", "not valid YAML"),
        ({}, {}, None, "--config: cannot read .*c.yaml"),
    ],
)
def test_a_mistake_is_named_as_it_was_spelled(
    tmp_path: Path, cli: dict[str, str], env: dict[str, str], file: str | None, words: str
) -> None:
    path = tmp_path / "c.yaml"
    if file is not None:
        path.write_text(file)
    with pytest.raises(UsageError, match=f"(?s){words}"):
        resolve_args(cli, environ=env, config_file=path)


def test_keys_of_others_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: 1\nseed: 2\n")
    environ = {"NYBBLE_PORT": "x"}
    args, origins = resolve_args({}, ["port"], environ=environ, config_file=tmp_path / "c.yaml")
    assert args.seed == 2 and "port" not in origins


# What the checkpoint decides


def test_defaults_of_a_plain_checkpoint(checkpoint: Make) -> None:
    config = build(folder := checkpoint())
    model = config.model
    assert (model.model, model.tokenizer, model.served_model_name) == (folder, folder, "tiny-llama")
    assert (model.architecture, model.dtype, model.quantization) == ("LlamaForCausalLM", "float32", None)
    assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (2048, 384, (1,))
    assert (model.is_demo, config.device.device) == (False, "cpu")
    assert (config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs) == (2048, 256)
    assert any(line.startswith("builtin ") for line in config.plugins.fingerprint)


def test_a_relative_folder_is_made_absolute(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder := checkpoint())
    assert build(".").model.model == folder


def test_the_demo_is_known_by_its_config(checkpoint: Make) -> None:
    model = build(checkpoint(nybble_demo=True)).model
    assert (model.is_demo, model.served_model_name) == (True, "nybble-demo")


def test_overrides_replace_top_level_keys(checkpoint: Make) -> None:
    config = build(checkpoint(), hf_overrides={"max_position_embeddings": 9000}, max_model_len="9k").model
    assert (config.max_model_len, config.hf_config["vocab_size"]) == (9000, 384)


@pytest.mark.parametrize(
    ("asked", "saved", "cpu", "cuda"),
    [
        ("auto", {}, "float32", "bfloat16"),
        ("auto", {"torch_dtype": "float16"}, "float32", "float16"),
        ("auto", {"dtype": "float16", "torch_dtype": "float32"}, "float32", "float16"),
        ("auto", {"torch_dtype": None}, "float32", "bfloat16"),
        ("float16", {"torch_dtype": "float8_e4m3fn"}, "float16", "float16"),
    ],
)
def test_dtype(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, asked: str, saved: dict[str, Any], cpu: str, cuda: str
) -> None:
    assert build(checkpoint(**saved), dtype=asked).model.dtype == cpu
    set_cuda(monkeypatch, 1)
    config = build(checkpoint(**saved), dtype=asked)
    assert (config.model.dtype, config.device.device) == (cuda, "cuda")
    assert config.scheduler.max_num_batched_tokens == 8192


@pytest.mark.parametrize(("asked", "count"), [("cpu", 1), ("cuda:1", 2), ("cuda", 1)])
def test_device(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, asked: str, count: int) -> None:
    set_cuda(monkeypatch, count)
    assert build(checkpoint(), device=asked).device.device == asked


def test_an_idle_gpu_is_not_passed_over_in_silence(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_cuda(monkeypatch, 0, "the driver has a device, but torch 2 cannot use it")
    monkeypatch.setattr(settings.logger.parent, "propagate", True)
    assert build(checkpoint()).device.device == "cpu"
    assert "but torch 2 cannot use it" in caplog.text


def test_chat_template_and_tokenizer(checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    model = build(checkpoint(), chat_template=str(tmp_path / "t.jinja"), tokenizer=str(tmp_path)).model
    assert (model.chat_template, model.tokenizer) == ("{{ messages }}", str(tmp_path))
    assert build(checkpoint(), skip_tokenizer_init=True).model.tokenizer is None


BAD: list[tuple[type[NybbleError], dict[str, Any], dict[str, Any], str]] = [
    (
        CheckpointError,
        {"architectures": ["LamaForCausalLM"]},
        {},
        "'LamaForCausalLM'.*did you mean LlamaForC",
    ),
    (CheckpointError, {"max_position_embeddings": None}, {}, "max_model_len is needed.*--max-model-len 4096"),
    (CheckpointError, {"torch_dtype": "float64"}, {}, "a torch_dtype that nybble does not compute in"),
    (CheckpointError, {"quantization_config": {"quant_method": "awk"}}, {}, "method 'awk'.*_config: awk"),
    (
        UsageError,
        {},
        {"max_model_len": 2049},
        "2049 is more than the 2048.*_embeddings = 2048.*--hf-ov",
    ),
    (UsageError, {}, {"trust_remote_code": True}, "trust_remote_code is not supported.*plugin"),
    (UsageError, {}, {"tensor_parallel_size": 2}, "one device so far"),
    (UsageError, {}, {"block_size": 24}, "block_size must be a power of two"),
    (UsageError, {}, {"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
    (UsageError, {}, {"max_num_seqs": "many"}, "max_num_seqs must be a whole number"),
    (UsageError, {}, {"device": "tpu"}, "no device 'tpu'.*known: auto, cpu, cuda, cuda:N"),
    (UsageError, {}, {"device": "cuda"}, "device cuda was asked for, but there is no CUDA driver"),
    (UsageError, {}, {"chat_template": "/no/such.jinja"}, "chat_template: cannot read /no/such.jinja"),
    (UsageError, {}, {"tokenizer": "/no/such"}, "tokenizer: there is no folder /no/such"),
    (UsageError, {}, {"max_num_batched_tokens": 8, "max_num_seqs": 9}, "8 is less than max_num_seqs 9"),
    (
        UsageError,
        {},
        {"max_num_batched_tokens": 512, "enable_chunked_prefill": False},
        "512 is less than max_m",
    ),
    (UsageError, {}, {"long_prefill_token_threshold": 9, "enable_chunked_prefill": False}, "splits prompts"),
    (
        UsageError,
        {"quantization_config": {"quant_method": "q"}},
        {"quantization": "awq"},
        "awq was asked for.*with q",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "args", "words"), BAD)
def test_refusals(
    checkpoint: Make, kind: type[NybbleError], changes: dict[str, Any], args: dict[str, Any], words: str
) -> None:
    with pytest.raises(kind, match=f"(?s){words}") as error:
        build(checkpoint(**changes), **args)
    assert type(error.value) is kind


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"load_format": "safetensor"}, "loader.*'safetensor'.*did you mean safetensors"),
        ({"attention_backend": "flush"}, "attention backend.*'flush'"),
        ({"distributed_executor_backend": "uniprog"}, "'uniprog'.*uniproc"),
        ({"logits_processors": ["nope"]}, "logits processor.*'nope'"),
        ({"quantization": "nope"}, "quant.*'nope'"),
    ],
)
def test_parts_must_be_provided_by_a_plugin(checkpoint: Make, args: dict[str, Any], words: str) -> None:
    with pytest.raises(PluginError, match=f"(?s){words}"):
        build(checkpoint(), **args)


def test_the_demo_must_be_written_first() -> None:
    with pytest.raises(UsageError, match="resolve_demo"):
        build("nybble-demo")


# Quantization and plugins


@pytest.mark.parametrize(
    ("changes", "sidecar", "asked", "method"),
    [
        ({"quantization_config": {"quant_method": "toy"}}, None, None, "toy"),
        ({"quantization_config": {"quant_method": "toy"}}, None, "toy", "toy"),
        ({"compression_config": {"quant_method": "toy"}}, None, None, "toy"),
        ({}, ("quantize_config.json", '{"quant_method": "toy"}'), None, "toy"),
        ({}, ("quantize_config.json", '{"bits": 4}'), None, "gptq"),
        ({}, ("hf_quant_config.json", '{"producer": {"name": "modelopt"}}'), None, "modelopt"),
        ({}, None, "toy", "toy"),
        ({}, None, None, None),
    ],
)
def test_quantization_evidence(
    checkpoint: Make,
    changes: dict[str, Any],
    sidecar: tuple[str, str] | None,
    asked: str | None,
    method: str | None,
) -> None:
    folder = checkpoint(**changes)
    if sidecar:
        Path(folder, sidecar[0]).write_text(sidecar[1])
    host = make_host(nybble_quants=lambda: dict.fromkeys(("toy", "modelopt"), "json:dumps"))
    assert build(folder, host, quantization=asked).model.quantization == method


def test_a_plugin_may_claim_a_checkpoint(checkpoint: Make) -> None:
    from nybble.plugins.hookspecs import Claim

    def nybble_detect_quant(hf_config: dict[str, Any], files: Any) -> Claim | None:
        return Claim(name="toy", reason="it has a config") if "config.json" in files else None

    host = make_host(nybble_detect_quant=nybble_detect_quant, nybble_quants=lambda: {"toy": "json:dumps"})
    assert build(checkpoint(), host).model.quantization == "toy"


def test_what_a_plugin_configures_is_used_checked_and_explained(checkpoint: Make) -> None:
    def sets(**changes: Any) -> PluginHost:
        return make_host(nybble_configure=lambda config: changes)

    args = EngineArgs(model=checkpoint())
    config = build_engine_config(args, sets(block_size=32))
    assert config.cache.block_size == 32
    origins = {row.name: row.origin for row in explain(args, {}, config)}
    assert origins["block_size"] == "plugin (nybble_configure)"
    with pytest.raises(UsageError, match="block_size must be a power of two"):
        build_engine_config(args, sets(block_size=33))


# The scheduler's budget


@pytest.mark.parametrize(
    ("args", "budget", "seqs"),
    [
        ({"max_num_seqs": 4000}, 4000, 4000),
        ({"max_num_batched_tokens": 64}, 64, 64),
        ({"enable_chunked_prefill": False}, 2048, 256),
        ({"enable_chunked_prefill": False, "hf_overrides": {"max_position_embeddings": 5000}}, 5000, 256),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 8}, 64, 8),
    ],
)
def test_budget(checkpoint: Make, args: dict[str, Any], budget: int, seqs: int) -> None:
    scheduler = build(checkpoint(), **args).scheduler
    assert (scheduler.max_num_batched_tokens, scheduler.max_num_seqs) == (budget, seqs)


# Explaining


def test_explain_covers_every_setting_with_its_effective_value(checkpoint: Make) -> None:
    folder = checkpoint(rope_scaling={"type": "linear", "factor": 2.0})
    given = {"model": folder, "max_num_batched_tokens": "64", "num_gpu_blocks_override": "7"}
    args, origins = resolve_args(given, environ={"NYBBLE_SEED": "3"})
    config = build_engine_config(args, make_host())
    rows = {row.name: (row.value, row.origin) for row in explain(args, origins, config)}
    assert list(rows) == list(setting_fields())
    json.dumps(rows)
    for name, value, origin in [
        ("model", folder, "--model"),
        ("served_model_name", "tiny-llama", "folder name"),
        ("tokenizer", folder, "the model's folder"),
        ("seed", 3, "env NYBBLE_SEED"),
        ("max_model_len", 4096, "checkpoint: config.json max_position_embeddings x rope_scaling.factor"),
        ("dtype", "float32", "device: always float32 on CPU"),
        ("device", "cpu", "probe: there is no CUDA driver here"),
        ("num_gpu_blocks_override", 7, "--num-gpu-blocks-override"),
        ("max_num_seqs", 64, "lowered to max_num_batched_tokens"),
        ("max_queue", 0, "default"),
        ("quantization", None, "default"),
    ]:
        assert rows[name] == (value, origin)


def test_steps_run_ahead_where_that_is_exact(checkpoint: Make) -> None:
    """What is computed in vain must not be counted."""
    folder = checkpoint()
    assert not build(folder).scheduler.async_scheduling  # on CPU
    assert build(folder, async_scheduling=True).scheduler.async_scheduling
    assert not build(folder, async_scheduling=True, expert_stats=True).scheduler.async_scheduling
