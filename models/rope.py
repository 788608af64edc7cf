"""Rotary position embeddings: default, linear, dynamic, llama3 and yarn, from either spelling of the config."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plugins.errors import CheckpointError
from .fields import Fields

# Old checkpoints store these tables: tensor name pattern -> why it is not read.
ROTARY_TABLES = {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "recomputed from the rope settings"}
TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
}
_REQUIRED = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """What a checkpoint says of its rotary embedding; `params` holds the fields of `kind` only."""

    kind: str
    theta: float
    params: dict[str, Any]
    max_position_embeddings: int

    @classmethod
    def read(cls, fields: Fields) -> RopeConfig:
        """From `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`. Two that disagree are refused."""
        scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
        if scaling and parameters and _plain(scaling) != _plain(parameters):
            raise CheckpointError("config.json: rope_scaling and rope_parameters disagree",
                                  found=f"{scaling} and {parameters}", fix="drop one with --hf-overrides")
        given = parameters or scaling
        theta_field = fields.number("rope_theta", None)
        theta_given = given.get("rope_theta")
        if theta_field is not None and theta_given is not None and theta_field != theta_given:
            raise CheckpointError("config.json: rope_theta and rope_parameters.rope_theta disagree",
                                  found=f"{theta_field} and {theta_given}", fix="drop one with --hf-overrides")
        theta = theta_given if theta_given is not None else theta_field
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in TYPES:
            raise CheckpointError(f"{fields.reader} does not implement rope type {kind!r}", known=TYPES)
        max_position = fields.integer("max_position_embeddings")
        params = {k: v for k, v in given.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
        if params.pop("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{fields.reader} does not implement partial_rotary_factor",
                                  found=given["partial_rotary_factor"], known=["1.0"])
        if unknown := set(params) - _KEYS[kind]:
            raise CheckpointError(f"rope type {kind!r} has no parameter {', '.join(sorted(unknown))}",
                                  known=sorted(_KEYS[kind]))
        if missing := _REQUIRED[kind] - set(params):
            raise CheckpointError(f"rope type {kind!r} needs {', '.join(sorted(missing))}", found=given)
        _check_numbers({"rope_theta": theta, **params})
        if kind in ("llama3", "yarn"):
            params.setdefault("original_max_position_embeddings", max_position)
        return cls(kind=kind, theta=float(theta) if theta is not None else 10000.0, params=params,
                   max_position_embeddings=max_position)


def _check_numbers(params: dict[str, Any]) -> None:
    """Raises CheckpointError for a parameter that is no positive number (mscale may be 0; truncate is a flag)."""
    for name, value in params.items():
        if name == "truncate":
            fits = isinstance(value, bool)
        else:
            fits = type(value) in (int, float) and 0 <= value <= sys.float_info.max
            fits = fits and (value > 0 or name.startswith("mscale"))
        if value is not None and not fits:
            raise CheckpointError(f"config.json: rope parameter {name} cannot be this", found=repr(value)[:80],
                                  known=["true, false" if name == "truncate" else "a positive number"])


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    renamed = {("rope_type" if k == "type" else k): v for k, v in given.items() if k != "rope_theta"}
    return {k: v for k, v in renamed.items() if v is not None}


class Rotary:
    """cos and sin tables of every position, computed once in float64.

    Calling it with positions [T] gives (cos, sin), each [T, 1, D], for `csrc.norm_rope.rotary`.

    With "dynamic", position p beyond the trained length is rotated by the base of a sequence that ends at p: the
    frequencies transformers uses when p is generated token by token. They depend on p alone, so that cached keys
    stay right and chunks, batches and prefix hits cannot change a result.
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_len: int, *, dtype: torch.dtype,
                 device: torch.device) -> None:
        positions = torch.arange(max_len, dtype=torch.float64)
        inv_freq, scale = _inverse_frequencies(config, head_dim)
        angles = torch.outer(positions, inv_freq)
        if config.kind == "dynamic" and max_len > config.max_position_embeddings:
            start = config.max_position_embeddings
            angles[start:] = _dynamic_angles(config, head_dim, positions[start:])
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos = torch.cat((cos, cos), -1).to(device, dtype)[:, None]
        self.sin = torch.cat((-sin, sin), -1).to(device, dtype)[:, None]

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions], self.sin[positions]


def _inverse_frequencies(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Frequencies [dim / 2] in float64 and the factor on cos and sin."""
    plain = _base_frequencies(config.theta, dim)
    if config.kind == "linear":
        return plain / config.params["factor"], 1.0
    if config.kind == "llama3":
        return _llama3(config, plain), 1.0
    if config.kind == "yarn":
        return _yarn(config, plain, dim)
    return plain, 1.0


def _base_frequencies(theta: float | Tensor, dim: int) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return 1.0 / torch.as_tensor(theta, dtype=torch.float64).unsqueeze(-1).pow(exponents).squeeze(0)


def _dynamic_angles(config: RopeConfig, dim: int, positions: Tensor) -> Tensor:
    """NTK-aware scaling whose base follows the sequence length (transformers `_compute_dynamic_ntk_parameters`)."""
    factor, trained = config.params["factor"], config.max_position_embeddings
    base = config.theta * (factor * (positions + 1) / trained - (factor - 1)) ** (dim / (dim - 2))
    return positions[:, None] * _base_frequencies(base, dim)


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a linear ramp between."""
    p = config.params
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / p["factor"] * (1 - keep) + plain * keep


def _yarn(config: RopeConfig, plain: Tensor, dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071), with mscale as DeepSeek writes it."""
    p = config.params
    factor, trained = p["factor"], p["original_max_position_embeddings"]

    def correction(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = correction(p.get("beta_fast") or 32), correction(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    stretch = ramp.clamp(0, 1)
    scale = p.get("attention_factor")
    if scale is None:
        if p.get("mscale") and p.get("mscale_all_dim"):
            scale = yarn_mscale(factor, p["mscale"]) / yarn_mscale(factor, p["mscale_all_dim"])
        else:
            scale = yarn_mscale(factor)
    return plain / factor * stretch + plain * (1 - stretch), float(scale)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature, sqrt(1/t) in the paper."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
