"""Say of every setting what it is in effect and where that came from: `nybble config show`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import hf_config
from .args import DEMO, EngineArgs, setting_fields
from .config import EngineConfig
from .device import cuda_devices
from .settings import decide_dtype

# EngineArgs field -> its name in the config part that carries it; fields not here keep their name
RENAMED = {
    "num_gpu_blocks_override": "num_gpu_blocks",
    "load_report": "report",
    "use_tqdm_on_load": "use_tqdm",
    "distributed_executor_backend": "executor",
    "strict_plugins": "strict",
}
# fields whose effective value is what was given: the config holds what they led to
AS_GIVEN = ("hf_overrides", "generation_config", "chat_template", "skip_tokenizer_init", "trust_remote_code")
PLUGIN = "plugin (nybble_configure)"


class Setting(NamedTuple):
    """A setting's effective value and where it came from."""

    name: str
    value: Any
    origin: str


def explain(args: EngineArgs, origins: Mapping[str, str], config: EngineConfig) -> list[Setting]:
    """Every field of EngineArgs with the value the engine runs with, in the order of the table."""
    rows = []
    for name in setting_fields():
        given = getattr(args, name)
        value = given if name in AS_GIVEN else _effective(name, config)
        if value == given or (name == "model" and Path(value) == Path(given).expanduser().absolute()):
            origin = origins.get(name, "default")
        elif given in (None, "auto", DEMO) or name == "max_num_seqs":
            origin = _why(name, config)
        else:
            origin = PLUGIN
        rows.append(Setting(name, value, origin))
    return rows


def _effective(name: str, config: EngineConfig) -> Any:
    name = RENAMED.get(name, name)
    c = config
    parts = (c.model, c.cache, c.scheduler, c.parallel, c.device, c.load, c.plugins)
    value = next(getattr(part, name) for part in parts if hasattr(part, name))
    return list(value) if isinstance(value, tuple) else value


def _why(name: str, config: EngineConfig) -> str:
    """Where a value that nobody gave came from."""
    hf, device = config.model.hf_config, config.device.device
    if name == "max_model_len" and (limit := hf_config.context_length(hf)):
        return f"checkpoint: {limit.origin}"
    if name == "quantization":
        found = hf_config.quantization_of(hf, Path(config.model.model))
        return f"checkpoint: {found.origin}" if found else "plugin (nybble_detect_quant)"
    if name == "dtype":
        return decide_dtype("auto", hf, device).origin
    if name == "device":
        return "probe: " + (cuda_devices()[1] if device == "cpu" else "a CUDA device was found")
    prefill = "" if config.scheduler.enable_chunked_prefill else ", max_model_len"
    return {
        "model": "embedded demo checkpoint",
        "served_model_name": "embedded demo checkpoint" if config.model.is_demo else "folder name",
        "tokenizer": "the model's folder",
        "gpu_memory_utilization": f"default on {device.partition(':')[0]}",
        "max_num_seqs": "lowered to max_num_batched_tokens",
        "max_num_batched_tokens": f"derived: {device}, max_num_seqs{prefill}",
    }.get(name, PLUGIN)
