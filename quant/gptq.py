"""GPTQ: 2, 3, 4 or 8-bit codes packed along the inputs, scales by group, optionally in activation order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..csrc.matrix import QuantizedMatrix
from ..csrc.scheme import Scheme
from ..plugins.errors import CheckpointError
from .base import (
    FLOAT_SOURCES,
    CodedMethod,
    Found,
    LayerShape,
    LinearMethod,
    QuantizationConfig,
    Weights,
    WeightSpec,
)
from .evidence import check_scale, contradiction
from .rules import Override, dynamic_overrides, first_override
from .words import block, check_groups, check_stored, group_size, is_packed, one_of, setting, unpack, unpack_range

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, kw_only=True)
class GPTQMethod(CodedMethod):
    """W[n, k] = (q[k, n] - z[g, n]) * scales[g, n], g = g_idx[k], or k // group without g_idx.

    Codes q are `qweight` [K * bits / 32, N] int32, packed along K; zeros z are `qzeros` [G, N * bits / 32] int32,
    packed along N. Layout: AutoGPTQ and GPTQModel; algorithm: Frantar et al., arXiv:2210.17323.

    Attributes:
        group: inputs that share a scale; None: all.
        sym: every zero is 2^(bits - 1) and `qzeros` is not looked at: files exist whose label of it is wrong.
        v2: zeros are stored as they are; v1 stores them less one.
        act_order: `g_idx` scatters the inputs over the groups; each matrix in its own way.
        scales: type of the scales.
        optional: tensors stored though they say nothing: "g_idx" in order, "qzeros" of symmetric codes, a "bias" of
            zeros that old writers gave every layer. Loaded to be checked, then dropped.
    """

    bits: int
    group: int | None
    sym: bool = True
    v2: bool = False
    act_order: bool = False
    scales: torch.dtype = torch.float16
    optional: frozenset[str] = frozenset()

    @property
    def scheme(self) -> Scheme:
        return Scheme(code="uint", bits=self.bits, group=self.group, zero_point=not self.sym, act_order=self.act_order)

    @property
    def fusable(self) -> bool:
        """Not with a g_idx for each part, nor where a code may lie in two words and no word ends with a part."""
        return not self.act_order and 32 % self.bits == 0

    def specs(self, shape: LayerShape, dtype: torch.dtype) -> dict[str, WeightSpec]:
        inputs, out = shape.in_features, shape.out_features
        groups = 1 if self.group is None else -(-inputs // self.group)
        specs = {
            "qweight": WeightSpec(shape=(inputs * self.bits // 32, out), dtype=torch.int32, out_dim=1),
            "scales": WeightSpec(shape=(groups, out), dtype=self.scales, out_dim=1),
        }
        if not self.sym or "qzeros" in self.optional:
            whole = 32 % self.bits == 0
            specs["qzeros"] = WeightSpec(shape=(groups, out * self.bits // 32), dtype=torch.int32,
                                         out_dim=1 if whole else None, out_per=32 // self.bits if whole else 1)
        if self.act_order or "g_idx" in self.optional:
            specs["g_idx"] = WeightSpec(shape=(len(shape.parts), inputs), dtype=torch.int32, out_dim=None,
                                        per_part=True, sources=(torch.int32, torch.int64))
        if "bias" in self.optional and not shape.bias:
            specs["bias"] = WeightSpec(shape=(out,), dtype=dtype, sources=FLOAT_SOURCES)
        return specs

    def after_load(self, weights: Weights, shape: LayerShape) -> Weights:
        """Check the values and drop what says nothing: the result has `qweight`, `scales`, `qzeros` unless symmetric,
        and `g_idx` [K] int32 where inputs are out of order."""
        names = ", ".join(part.name for part in shape.parts)
        check_scale(weights["scales"], "scales", shape)
        kept = {name: weights[name] for name in ("qweight", "scales")}
        if not self.sym:
            kept["qzeros"] = weights["qzeros"]
        if "bias" in weights and bool(weights["bias"].any()):
            raise CheckpointError(f"{names}: a bias is stored, but the model has none here",
                                  found="a bias that is not zero")
        if "g_idx" in weights:
            self._check_order(names, weights["g_idx"], weights["scales"].shape[0])
            order = weights["g_idx"][0]
            if not torch.equal(order, self._in_order(order)):
                kept["g_idx"] = order
        return kept

    def _in_order(self, like: Tensor) -> Tensor:
        """The g_idx [K] of inputs in order, as int32."""
        inputs = like.shape[-1]
        return torch.arange(inputs, device=like.device, dtype=torch.int32) // (self.group or inputs)

    def _check_order(self, names: str, g_idx: Tensor, groups: int) -> None:
        """g_idx [parts, K] names groups that exist, and is out of order only where the config says so."""
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            raise CheckpointError(f"{names}: g_idx names a group that does not exist",
                                  found=f"groups {low} to {high}", known=[f"0 to {groups - 1}"],
                                  fix="the checkpoint is damaged: download it again")
        if not self.act_order and not torch.equal(g_idx, self._in_order(g_idx).expand_as(g_idx)):
            raise CheckpointError(f"{names}: the quantization config says desc_act false, but inputs are out of order",
                                  found="a g_idx that is not k // group_size",
                                  fix="set desc_act to true in quantization_config")

    def matrix(self, weights: Weights) -> QuantizedMatrix:
        qweight, scales = weights["qweight"], weights["scales"]
        outputs = scales.shape[1]
        zeros = None
        if not self.sym:
            zeros = unpack_range(weights["qzeros"].T, self.bits, 0, outputs)
            zeros = (zeros if self.v2 else (zeros + 1) & ((1 << self.bits) - 1)).to(torch.uint8)
        return QuantizedMatrix(
            scheme=self.scheme, rows=outputs, columns=qweight.shape[0] * 32 // self.bits,
            codes=lambda start, stop: unpack(qweight[:, start:stop], self.bits).T.to(torch.uint8),
            scales=scales.T, zeros=zeros, groups=weights.get("g_idx"),
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `dynamic` may change from module to module. `group_size` None: whole rows; `desc_act` None: not said."""

    bits: int
    group_size: int | None
    sym: bool
    desc_act: bool | None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Settings:
        return cls(
            bits=one_of("bits", setting(config, ["bits"], int), BITS),
            group_size=group_size(config, "group_size"),
            sym=setting(config, ["sym"], bool, True),
            desc_act=setting(config, ["desc_act"], bool, None),
        )


@dataclass(frozen=True, kw_only=True)
class GPTQConfig(QuantizationConfig):
    """A GPTQ checkpoint's config, in AutoGPTQ's and GPTQModel's spellings.

    Attributes:
        settings: of modules that no rule of `dynamic` names.
        dynamic: GPTQModel's rules, each with all the settings of its modules.
        v2: zeros are stored as they are.
        lm_head: the head is quantized too; read only when weights are made up.
        modules: ends of the names of quantized modules, None for all; read only when weights are made up.
    """

    settings: Settings
    dynamic: tuple[Override, ...] = ()
    v2: bool = False
    lm_head: bool = False
    modules: tuple[str, ...] | None = None

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> GPTQConfig:
        layout = setting(config, ["checkpoint_format", "format"], str, "gptq")
        if setting(config, ["is_marlin_format"], bool, False):
            layout = "marlin"
        one_of("checkpoint_format", layout, FORMATS)
        one_of("pack_dtype", setting(config, ["pack_dtype"], str, "int32"), ["int32"])
        dynamic = setting(config, ["dynamic"], dict, {})
        for rule, changes in dynamic.items():
            if not isinstance(changes, dict | None):
                raise CheckpointError(f"quantization config: dynamic rule {rule!r} must map to settings", found=changes)
        modules = setting(config, ["modules_in_block_to_quantize"], list, None)
        return cls(
            settings=Settings.read(config),
            dynamic=tuple(
                override if override.changes is None else
                replace(override, changes=tuple(vars(Settings.read({**config, **dict(override.changes)})).items()))
                for override in dynamic_overrides(dynamic)
            ),
            v2=layout == "gptq_v2",
            lm_head=setting(config, ["lm_head"], bool, False),
            modules=None if modules is None else tuple(_flat(modules)),
        )

    def method_for(self, layer_name: str, shape: LayerShape, found: Found | None) -> LinearMethod | None:
        override = first_override(self.dynamic, layer_name)
        skip = override.rule.pattern if override and override.changes is None else None
        if not is_packed(layer_name, found, expected=self._expected(layer_name), skip=skip):
            return None
        settings = Settings(**dict(override.changes)) if override and override.changes else self.settings
        check_divisible(layer_name, shape, settings.bits)
        group = settings.group_size
        group = None if group is None or group >= shape.in_features else group
        # Unsaid, desc_act was true in AutoGPTQ; a stored g_idx that turns out to be in order costs nothing.
        said = "g_idx" in (found or ()) if settings.desc_act is None else settings.desc_act
        method = GPTQMethod(bits=settings.bits, group=group, sym=settings.sym, v2=self.v2,
                            act_order=said and group is not None)
        if found is None:
            return method
        check_codes(layer_name, shape, settings.bits, found)
        needed = ["scales", *([] if method.sym else ["qzeros"]), *(["g_idx"] if method.act_order else [])]
        scales = check_stored(layer_name, found, needed)
        check_groups(layer_name, shape.in_features, settings.group_size, found)
        return replace(method, scales=scales, optional=frozenset(found) & {"qzeros", "g_idx", "bias"})

    def _expected(self, name: str) -> bool:
        if name.rpartition(".")[2] == "lm_head":
            return self.lm_head
        return self.modules is None or any(name == end or name.endswith(f".{end}") for end in self.modules)


def _flat(names: list[Any]) -> list[str]:
    """`modules_in_block_to_quantize` is a list of names or a list of such lists."""
    return [inner for name in names for inner in (_flat(name) if isinstance(name, list) else [str(name)])]


def check_divisible(name: str, shape: LayerShape, bits: int) -> None:
    """Raises CheckpointError when inputs or outputs do not fill their words."""
    values, _ = block(bits)
    for what, size in (("inputs", shape.in_features), ("outputs", shape.out_features)):
        if size % values:
            raise CheckpointError(f"{name}: {bits}-bit GPTQ packs {values} {what} together", found=f"{size} {what}",
                                  fix="leave this module unquantized")


def check_codes(name: str, shape: LayerShape, bits: int, found: Found) -> None:
    """Raises CheckpointError, with both readings, when qweight is not [K * bits / 32, N]."""
    inputs, out = shape.in_features, shape.out_features
    stored = found["qweight"].shape
    if stored == (inputs * bits // 32, out):
        return
    raise contradiction(name, f"{bits}-bit GPTQ, so qweight {[inputs * bits // 32, out]}", found,
                        f"the stored one fits {_fits(stored, inputs, out)}: correct quantization_config")


def _fits(stored: tuple[int, ...], inputs: int, out: int) -> str:
    if stored == (inputs, out // 8):
        return "4-bit AWQ (gemm)"
    fits = [f"{bits}-bit GPTQ" for bits in BITS if stored == (inputs * bits // 32, out)]
    return fits[0] if fits else f"neither GPTQ nor AWQ of {inputs} inputs and {out} outputs"
