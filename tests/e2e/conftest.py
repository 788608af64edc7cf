"""Tiny quantized checkpoints, made of a random Llama by the plainest quantizers that write the real layouts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
BLOCK = 64, 48
MATRIX = re.compile(r"_proj(_with_mqa)?\.weight|\.w[123]\.weight")
FILE = "model.safetensors"


def pack(codes: Tensor) -> Tensor:
    """4-bit codes [V, C] -> int32 words [V / 8, C], lowest first."""
    words = (codes.long().unflatten(0, (-1, 8)) << torch.arange(0, 32, 4)[:, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def four_bits(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> codes [N, K] round a zero of 8, scales [N, G], and what they stand for."""
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).to(dtype)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    return (codes + 8).flatten(1), scales, (codes * scales.float()[..., None]).flatten(1)


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, dense = four_bits(weight, torch.float16)
    seven = torch.full(scales.shape, 7)  # v1 stores a zero less one
    return {"qweight": pack(codes.T), "scales": scales.T, "qzeros": pack(seven).T,
            "g_idx": torch.arange(weight.shape[1]).int() // GROUP}, dense


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    def interleaved(codes: Tensor) -> Tensor:
        return pack(codes.unflatten(0, (-1, 8))[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(0, 1)).T

    codes, scales, dense = four_bits(weight, torch.float16)
    eight = torch.full(scales.shape, 8)
    return {"qweight": interleaved(codes), "scales": scales.T, "qzeros": interleaved(eight)}, dense


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_block(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks of 64x48, the last ones short."""
    (rows, columns), (high, wide) = weight.shape, BLOCK
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
    blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    scales = blocks.abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread


def ct(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, dense = four_bits(weight, torch.bfloat16)
    return {"weight_packed": pack(codes.T).T, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}, dense


FORMS: dict[str, tuple[Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": None}),
    "fp8-block": (fp8_block, {"quant_method": "fp8", "activation_scheme": None, "weight_block_size": list(BLOCK)}),
    "ct": (ct, {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [], "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
                                                       "strategy": "group", "group_size": GROUP}}}}),
}


@dataclass
class Quantized:
    """A checkpoint still in hands: change `tensors` and `config`, then write it.

    `dense` is the unquantized checkpoint that its tensors stand for.
    """

    source: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    dense: dict[str, Tensor]

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def write(self, folder: Path) -> Path:
        return self._write(folder, self.config, self.tensors)

    def write_dense(self, folder: Path) -> Path:
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        return self._write(folder, config, self.dense)

    def _write(self, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        shutil.copytree(self.source, folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
                  folder / FILE)
        return folder


@pytest.fixture(scope="session")
def quantized(make_checkpoint):
    """quantized(form, arch, head=False, **config) -> Quantized of a tiny model; `head` quantizes lm_head as well."""

    def make(form: str, arch: str = "Llama", *, head: bool = False, **settings: Any) -> Quantized:
        source = make_checkpoint(arch, **settings)
        quantizer, method = FORMS[form]
        tensors, dense = load_file(source / FILE), load_file(source / FILE)
        for name, weight in dense.items():
            if MATRIX.search(name) or (head and "lm_head" in name):
                module = name.removesuffix(".weight")
                del tensors[name]
                stored, dense[name] = quantizer(weight)
                tensors.update({f"{module}.{last}": value for last, value in stored.items()})
        config = json.loads((source / "config.json").read_text())
        return Quantized(source, {**config, "quantization_config": deepcopy(method)}, tensors, dense)

    return make


@pytest.fixture
def load():
    """load(folder) -> LoadedModel, in float32 on CPU."""
    from nybble.engine.args import EngineArgs
    from nybble.engine.loader import get_model
    from nybble.plugins.manager import PluginHost

    host = PluginHost.load(allow="")

    def run(folder: Path) -> Any:
        args = EngineArgs(model=str(folder), device="cpu", dtype="float32", use_tqdm_on_load=False)
        return get_model(args.create_engine_config(host), host, torch.device("cpu"))

    return run
