"""From what users gave to what the engine runs: merge the layers, read the checkpoint, decide."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..plugins import env
from ..plugins.errors import CheckpointError, PluginError, UsageError, nearest
from ..plugins.log import get_logger
from . import hf_config
from .args import DEMO, DEMO_FORMS, EngineArgs, setting_fields
from .config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    PluginConfig,
    SchedulerConfig,
)
from .device import cuda_devices
from .hf_config import Derived
from .values import Entry, merge

if TYPE_CHECKING:
    from ..plugins.manager import PluginHost

logger = get_logger(__name__)

MAX_TEXT_BYTES = 2**20
CUDA_DEVICE = re.compile(r"cuda(?::(\d{1,4}))?", re.ASCII)


def flag_name(field: str) -> str:
    """`max_model_len` -> `--max-model-len`."""
    return "--" + field.replace("_", "-")


def read_layers(
    cli: Mapping[str, Any],
    names: Iterable[str],
    *,
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> dict[str, Entry]:
    """Flags over environment over YAML: what each gives of the fields `names`, for `merge` to parse.

    Args:
        cli: raw values by field name, of the flags that were given.
        names: every field that may be set, of whatever settings class.
        environ: the environment; None reads the process's.
        config_file: YAML mapping of settings; keys with dashes or underscores.

    Returns:
        The winning entry of each field; its origin is "--max-model-len", "env NYBBLE_MAX_MODEL_LEN" or "serve.yaml".

    Raises:
        UsageError: an unknown name, under the spelling it arrived with.
    """
    names = list(names)
    file = read_config_file(config_file, names) if config_file else {}
    variables = {
        f: Entry(raw, env.setting_name(f), f"env {env.setting_name(f)}")
        for f, raw in env.read_settings(names, environ).items()
    }
    return {**file, **variables, **flag_entries(cli, names)}


def flag_entries(cli: Mapping[str, Any], names: Iterable[str]) -> dict[str, Entry]:
    """Command line values as entries. Raises UsageError for a field that is not among `names`."""
    names = list(names)
    for field in cli:
        if field not in names:
            _unknown(flag_name(field), map(flag_name, names), "flag")
    return {f: Entry(raw, flag_name(f), flag_name(f)) for f, raw in cli.items()}


def read_config_file(path: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Entries of a YAML file for the fields `names`.

    Raises UsageError: no such file, not a YAML mapping, an unknown key or the same key twice.
    """
    import yaml

    names = list(names)
    try:
        data = yaml.safe_load(read_text(path, "--config"))
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML", found=str(error).replace("\n", " ")) from error
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"{path} must map settings to values", fix="lines such as  max-model-len: 8k")
    entries: dict[str, Entry] = {}
    for key, raw in data.items():
        field = key.replace("-", "_")
        if field in entries:
            raise UsageError(f"{path.name} sets {field} twice", fix="keep one of the two spellings")
        if field not in names:
            _unknown(f"{key} in {path.name}", [n.replace("_", "-") for n in names], "key")
        entries[field] = Entry(raw, f"{key} in {path.name}", path.name)
    return entries


def _unknown(given: str, known: Iterable[str], what: str) -> NoReturn:
    known = sorted(known)
    guess = nearest(given.split(" ")[0], known)
    raise UsageError(
        f"unknown {what} {given}",
        known=None if guess else known,
        fix=f"did you mean {guess}?" if guess else None,
    )


def read_text(path: Path, asked: str) -> str:
    """A file of at most 1 MiB of UTF-8 that the setting `asked` names. Raises UsageError."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UsageError(f"{asked}: {path} is larger than {MAX_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{asked}: cannot read {path}", found=error) from error


def build_engine_config(args: EngineArgs, host: PluginHost | None = None, *, device: str | None = None) -> EngineConfig:
    """Decide everything that `args` left open and check everything against everything.

    A `device` that is given is taken unseen: what would be decided on a machine that has it.

    Plugins see the settings first (`nybble_configure`); what they change is checked like a user's value.
    Raises UsageError or CheckpointError.
    """
    host = host or _load_host(args)
    args = _checked(host.configure(asdict(args)))
    if args.model in DEMO_FORMS:
        raise UsageError("the demo model's folder must be found first", fix="call resolve_demo(args)")
    folder, hf = hf_config.read_checkpoint(args.model, args.hf_overrides)
    device = device or _device(args.device)
    model = _model_config(args, host, folder, hf, device)
    return EngineConfig(
        model=model,
        cache=CacheConfig(
            block_size=args.block_size,
            kv_cache_dtype=args.kv_cache_dtype,
            gpu_memory_utilization=args.gpu_memory_utilization or (0.5 if device == "cpu" else 0.9),
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            num_gpu_blocks=args.num_gpu_blocks_override,
            enable_prefix_caching=args.enable_prefix_caching,
        ),
        scheduler=_scheduler_config(args, model.max_model_len, device),
        parallel=ParallelConfig(
            tensor_parallel_size=args.tensor_parallel_size,
            executor=_provided(host, "executor", args.distributed_executor_backend),
        ),
        device=DeviceConfig(
            device=device,
            attention_backend=args.attention_backend
            and _provided(host, "attention_backend", args.attention_backend),
            linear_backend=args.linear_backend,
            moe_backend=args.moe_backend,
            expert_stats=args.expert_stats,
            enforce_eager=args.enforce_eager,
            cpu_threads=args.cpu_threads,
        ),
        load=LoadConfig(
            load_format=args.load_format
            if args.load_format == "auto"
            else _provided(host, "loader", args.load_format),
            report=args.load_report,
            use_tqdm=args.use_tqdm_on_load,
        ),
        plugins=PluginConfig(
            strict=args.strict_plugins, prefer=tuple(args.prefer), fingerprint=tuple(host.fingerprint())
        ),
    )


def _load_host(args: EngineArgs) -> PluginHost:
    from ..plugins.manager import PluginHost

    return PluginHost.load(strict=args.strict_plugins, prefer=args.prefer)


def _checked(values: Mapping[str, Any]) -> EngineArgs:
    """Settings as Python or a plugin gave them, parsed and bounded like a flag's."""
    names = list(setting_fields())
    for field in values:
        if field not in names:
            _unknown(field, names, "setting")
    args, _ = merge(EngineArgs, {f: Entry(raw, f, "") for f, raw in values.items()})
    if args.trust_remote_code:
        raise UsageError(
            "trust_remote_code is not supported: a checkpoint is data, and may not bring code that runs",
            fix="install the architecture as a plugin: see docs/plugins.md",
        )
    if args.tensor_parallel_size != 1:
        raise UsageError(
            "tensor_parallel_size must be 1: this version runs on one device so far",
            found=args.tensor_parallel_size,
        )
    if args.block_size & (args.block_size - 1):
        raise UsageError("block_size must be a power of two", found=args.block_size)
    if args.long_prefill_token_threshold and not args.enable_chunked_prefill:
        raise UsageError(
            "long_prefill_token_threshold splits prompts, which enable_chunked_prefill=False forbids",
            found=f"long_prefill_token_threshold {args.long_prefill_token_threshold}",
            fix="leave one of the two out",
        )
    return args


def _device(asked: str) -> str:
    """ "cpu", "cuda" or "cuda:N"; "auto" takes CUDA when torch can use it."""
    match = CUDA_DEVICE.fullmatch(asked)
    if not match and asked not in ("auto", "cpu"):
        raise UsageError(f"there is no device {asked!r}", known=["auto", "cpu", "cuda", "cuda:N"])
    if asked == "cpu":
        return "cpu"
    count, why = cuda_devices()
    if asked == "auto":
        if not count and "torch" in why:  # a GPU is here and lies idle: say so
            logger.warning("running on the CPU: %s", why)
        return "cuda" if count else "cpu"
    if not count:
        raise UsageError(f"device {asked} was asked for, but {why}", known=["cpu"], fix="--device cpu")
    if match and match[1] and int(match[1]) >= count:
        raise UsageError(f"there is no device {asked}", known=[f"cuda:{i}" for i in range(count)])
    return asked


def _model_config(
    args: EngineArgs, host: PluginHost, folder: Path, hf: dict[str, Any], device: str
) -> ModelConfig:
    is_demo = hf.get("nybble_demo") is True
    tokenizer = None if args.skip_tokenizer_init else str(_tokenizer_folder(args.tokenizer) or folder)
    template = args.chat_template and read_text(Path(args.chat_template).expanduser(), "chat_template")
    return ModelConfig(
        model=str(folder),
        served_model_name=args.served_model_name or (DEMO if is_demo else folder.name),
        tokenizer=tokenizer,
        hf_config=hf,
        architecture=_architecture(host, hf),
        dtype=decide_dtype(args.dtype, hf, device).value,
        max_model_len=_max_model_len(args.max_model_len, hf),
        vocab_size=hf_config.vocabulary_size(hf),
        quantization=_quantization(args.quantization, host, hf, folder),
        quantization_config=_quantization_config(hf, folder),
        seed=args.seed,
        max_logprobs=args.max_logprobs,
        generation_config=hf_config.read_generation_config(folder, hf, args.generation_config),
        chat_template=template,
        logits_processors=tuple(_provided(host, "logits_processor", n) for n in args.logits_processors),
        is_demo=is_demo,
    )


def _tokenizer_folder(asked: str | None) -> Path | None:
    if asked is None:
        return None
    folder = Path(asked).expanduser().absolute()
    if not folder.is_dir():
        raise UsageError(f"tokenizer: there is no folder {folder}", fix="a folder that holds tokenizer.json")
    return folder


def _provided(host: PluginHost, kind: str, name: str) -> str:
    """`name` when a plugin provides it. Raises PluginError, naming the nearest and plugins that failed."""
    host.owner(kind, name)
    return name


def _architecture(host: PluginHost, hf: dict[str, Any]) -> str:
    """The first of the checkpoint's architectures that a plugin implements."""
    asked: list[str] = hf["architectures"]
    known = host.names("model")
    if picked := next((name for name in asked if name in known), None):
        return picked
    raise _missing(host, "model", asked[0], "architecture", "config.json architectures")


def _missing(host: PluginHost, kind: str, name: str, what: str, where: str) -> CheckpointError:
    """The checkpoint needs a part that no plugin provides; one that failed to load may be why."""
    try:
        host.owner(kind, name)
    except PluginError as error:
        failed = f"\n         {error.found}" if error.found else ""
        return CheckpointError(
            f"no plugin implements this checkpoint's {what} {name!r}",
            found=f"{where}: {name}{failed}",
            known=error.known,
            fix=f"{error.fix} (nybble plugins list shows what is installed)",
        )
    raise AssertionError(f"{kind}:{name} is provided after all")


def decide_dtype(asked: str, hf: dict[str, Any], device: str) -> Derived:
    """The dtype of activations and unquantized weights, and why that one."""
    if asked != "auto":
        return Derived(asked, "given")
    saved = hf_config.checkpoint_dtype(hf)
    if device == "cpu":
        return Derived("float32", "device: always float32 on CPU")
    if saved is None:
        return Derived("bfloat16", "default on CUDA")
    return Derived(saved.value, f"checkpoint: {saved.origin}")


def _max_model_len(asked: int | None, hf: dict[str, Any]) -> int:
    limit = hf_config.context_length(hf)
    if limit is None:
        if asked is None:
            raise CheckpointError(
                "config.json does not say how long a sequence may be, so max_model_len is needed",
                found=f"none of {', '.join(hf_config.LENGTH_KEYS)}",
                fix="--max-model-len 4096, or what the model was trained for",
            )
        return asked
    if asked is not None and asked > limit.value:
        raise UsageError(
            f"max_model_len {asked} is more than the {limit.value} tokens that the checkpoint was made for",
            found=f"{limit.origin} = {limit.value}",
            fix=f"lower it, or, if the model can do it, change {limit.origin} with --hf-overrides, "
            f"""such as '{{"max_position_embeddings": {asked}}}'""",
        )
    return asked or int(limit.value)


def _quantization(asked: str | None, host: PluginHost, hf: dict[str, Any], folder: Path) -> str | None:
    """The method that the user pins, a plugin claims or the checkpoint's own files name, in that order."""
    claim = None if asked else host.detect_quant(hf, sorted(p.name for p in folder.iterdir()))
    found = Derived(claim.name, claim.reason) if claim else hf_config.quantization_of(hf, folder)
    if found is None:
        return asked and _provided(host, "quant", asked)
    if asked is not None and asked != found.value:
        raise UsageError(
            f"quantization {asked} was asked for, but the checkpoint is quantized with {found.value}",
            found=f"{found.origin}: {found.value}",
            fix="leave quantization out; the checkpoint decides",
        )
    if found.value not in host.names("quant"):
        raise _missing(host, "quant", found.value, "quantization method", found.origin)
    return str(found.value)


def _quantization_config(hf: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the checkpoint says of its quantization; {} when it says nothing."""
    settings = hf_config.quantization_settings(hf, folder)
    return dict(settings.value) if settings else {}


def _async_scheduling(args: EngineArgs, device: str) -> bool:
    """Not with a plugin's logits processors, which may read tokens that are still being sampled, nor where experts are
    counted: a step that was run in vain would be, too."""
    if args.logits_processors or args.expert_stats:
        return False
    return device != "cpu" if args.async_scheduling is None else args.async_scheduling


def _scheduler_config(args: EngineArgs, max_model_len: int, device: str) -> SchedulerConfig:
    budget, seqs = args.max_num_batched_tokens, args.max_num_seqs
    floor = 1 if args.enable_chunked_prefill else max_model_len
    if budget is None:
        budget = max(2048 if device == "cpu" else 8192, seqs, floor)
    if budget < floor:
        raise UsageError(
            "without chunked prefill a step must hold the longest prompt: "
            f"max_num_batched_tokens {budget} is less than max_model_len {max_model_len}",
            fix=f"max_num_batched_tokens {max_model_len}, a smaller max_model_len, or enable_chunked_prefill",
        )
    if budget < seqs:
        if seqs != setting_fields()["max_num_seqs"].default:
            raise UsageError(
                f"max_num_batched_tokens {budget} is less than max_num_seqs {seqs}: "
                "every running request needs a token in a step",
                fix=f"raise max_num_batched_tokens to {seqs}, or lower max_num_seqs to {budget}",
            )
        seqs = budget
    return SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        enable_chunked_prefill=args.enable_chunked_prefill,
        scheduling_policy=args.scheduling_policy,
        long_prefill_token_threshold=args.long_prefill_token_threshold,
        max_queue=args.max_queue,
        async_scheduling=_async_scheduling(args, device),
    )
