"""CompressedTensorsConfig: `quant_method: "compressed-tensors"`, what llm-compressor writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..csrc.scheme import Activation
from ..plugins.errors import CheckpointError
from .base import Found, LayerShape, LinearMethod, QuantizationConfig
from .evidence import check_plain, contradiction, is_plain, name_list, refuse_unknown, unsupported
from .pack_quantized import PackedMethod, read_packed
from .rules import Rule, first_match, target_rules
from .scaled import Code, ScalePer, assume_scaled, code_dtype, read_scaled

Strategy = Literal["tensor", "channel", "group", "block"]

KNOWN = frozenset(
    """quant_method format config_groups ignore kv_cache_scheme quantization_status global_compression_ratio version
    sparsity_config transform_config""".split()
)
KNOWN_GROUP = frozenset("targets weights input_activations output_activations format".split())
KNOWN_ARGS = frozenset(
    """num_bits type symmetric group_size strategy block_structure dynamic actorder observer observer_kwargs
    scale_dtype zp_dtype""".split()
)
FORMATS = {"float-quantized": "float", "int-quantized": "int", "pack-quantized": "int", "naive-quantized": None}


@dataclass(frozen=True, kw_only=True)
class Group:
    """One entry of `config_groups`: which layers, and how they are stored.

    Attributes:
        packed: codes lie several to a word; else one to a byte.
        strategy: what shares a weight scale; `block` is (rows, columns) for strategies group and block.
    """

    name: str
    targets: tuple[Rule, ...]
    packed: bool
    code: Code
    bits: int
    strategy: Strategy
    block: tuple[int, int] | None
    symmetric: bool
    act_order: bool
    activation: Activation | None

    def read(self, layer: str, shape: LayerShape, found: Found) -> LinearMethod:
        """The method of a layer that is stored quantized."""
        if self.packed:
            if "weight_packed" not in found:
                raise contradiction(layer, f"{self.name}: pack-quantized", found)
            return read_packed(layer, shape, found, bits=self.bits, group=self.block and self.block[1],
                               per=self.strategy, symmetric=self.symmetric,
                               act_order=self.act_order)
        if "weight" not in found or found["weight"].dtype != code_dtype(self.code):
            raise contradiction(layer, f"{self.name}: {self.code} weights", found)
        return read_scaled(layer, shape, found, says=f"{self.name}: {self.code} per {self.strategy}", code=self.code,
                           per=self._per, block=self.block, activation=self.activation)

    def assume(self) -> LinearMethod:
        """The method when weights are made up: without g_idx and shape, which cannot be."""
        if self.packed:
            return PackedMethod(bits=self.bits, group=self.block and self.block[1], zero_point=not self.symmetric,
                                per_tensor=self.strategy == "tensor", shaped=False)
        return assume_scaled(code=self.code, per=self._per, block=self.block, activation=self.activation)

    @property
    def _per(self) -> ScalePer:
        """A group is a block of one row."""
        return "block" if self.strategy == "group" else self.strategy


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsConfig(QuantizationConfig):
    """Groups of layers, each stored in its own way. Also reads what very old files call `compression_config`."""

    groups: tuple[Group, ...]
    ignored: tuple[Rule, ...] = ()

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> CompressedTensorsConfig:
        refuse_unknown(config, KNOWN, "quantization config of compressed-tensors")
        for name in ("sparsity_config", "transform_config"):
            if config.get(name) and config[name] != {"format": "dense"}:
                raise unsupported(name, config[name], ["empty"])
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("quantization config of compressed-tensors has no config_groups", found=groups)
        return cls(groups=tuple(_group(name, group, config.get("format")) for name, group in groups.items()),
                   ignored=target_rules(name_list(config.get("ignore"), "ignore")))

    def method_for(self, layer_name: str, shape: LayerShape, found: Found | None) -> LinearMethod | None:
        group = self._group_of(layer_name)
        if found is None:
            return None if group is None or first_match(self.ignored, layer_name) else group.assume()
        weight = found.get("weight")
        if "weight_packed" not in found and (weight is None or is_plain(weight.dtype)):
            check_plain(layer_name, "compressed-tensors, so weight_packed or weight", found)
            return None
        if group is None:
            raise contradiction(layer_name, "no target of config_groups names it", found)
        return group.read(layer_name, shape, found)

    def _group_of(self, layer: str) -> Group | None:
        """A target that is the layer's name goes before one that matches it, and that before its class."""
        for kind in ("exact", "regex", "class"):
            for group in self.groups:
                if first_match((rule for rule in group.targets if rule.kind == kind), layer):
                    return group
        return None


def _group(name: str, raw: Any, default_format: Any) -> Group:
    where = f"config_groups.{name}"
    if not isinstance(raw, Mapping) or not isinstance(raw.get("weights"), Mapping):
        raise CheckpointError(f"quantization config: {where} does not say how weights are quantized", found=repr(raw))
    refuse_unknown(raw, KNOWN_GROUP, where)
    weights: Mapping[str, Any] = raw["weights"]
    refuse_unknown(weights, KNOWN_ARGS, f"{where}.weights")
    form = raw.get("format") or default_format
    if form not in list(FORMATS):
        raise unsupported(f"{where}: format", form, FORMATS)
    packed, kind = form == "pack-quantized", weights.get("type", "int")
    if kind != (FORMATS[form] or kind) or kind not in ("int", "float"):
        raise unsupported(f"{where}: {form} weights of type", kind, [FORMATS[form] or "int, float"])
    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    if bits not in ((4, 8) if packed else (8,)):
        raise unsupported(f"{where}: {form} weights with num_bits", bits, [4, 8] if packed else [8])
    if not symmetric and not packed:
        raise unsupported(f"{where}: {form} weights with symmetric", symmetric, [True])
    if weights.get("dynamic"):
        raise unsupported(f"{where}.weights: dynamic", weights["dynamic"], [False])
    if raw.get("output_activations"):
        raise unsupported(f"{where}: output_activations", raw["output_activations"], [None])
    strategy = _strategy(weights, where, packed)
    code: Code = "fp8_e4m3" if kind == "float" else "int8"
    activation = _activation(raw.get("input_activations"), kind, f"{where}.input_activations")
    if packed and activation is not None:
        raise unsupported(f"{where}: pack-quantized with input_activations", raw["input_activations"], [None])
    targets = target_rules(name_list(raw.get("targets"), f"{where}.targets"))
    return Group(name=name, targets=targets, packed=packed, code=code, bits=bits, strategy=strategy,
                 block=_block(weights, strategy, where), symmetric=bool(symmetric),
                 act_order=packed and _act_order(weights, where), activation=activation)


def _strategy(weights: Mapping[str, Any], where: str, packed: bool) -> Strategy:
    """Left out, it follows from group_size: -1 channel, other numbers group, none tensor."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if not size else "channel" if size == -1 else "group")
    known = ["tensor", "channel", "group"] if packed else ["tensor", "channel", "group", "block"]
    if strategy not in known:
        raise unsupported(f"{where}.weights: strategy", strategy, known)
    if packed and strategy == "tensor" and not weights.get("symmetric", True):
        raise unsupported(f"{where}.weights: asymmetric with strategy", strategy, ["channel", "group"])
    return cast(Strategy, strategy)


def _block(weights: Mapping[str, Any], strategy: Strategy, where: str) -> tuple[int, int] | None:
    """(rows, columns) that share a scale, for the strategies that have such."""
    if strategy not in ("group", "block"):
        return None
    size = [1, weights.get("group_size")] if strategy == "group" else weights.get("block_structure")
    if isinstance(size, str):  # older writers: "128x128"
        size = [int(n) if n.isdecimal() else n for n in size.split("x")]
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(f"quantization config: {where}.weights has no size for strategy {strategy!r}",
                              found=f"group_size = {weights.get('group_size')!r}, "
                                    f"block_structure = {weights.get('block_structure')!r}")
    return size[0], size[1]


def _act_order(weights: Mapping[str, Any], where: str) -> bool:
    """Whether columns of a group lie scattered on disk; "weight" and "static" were undone by the writer."""
    order = weights.get("actorder")
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise unsupported(f"{where}.weights: actorder", order, [None, "group", "dynamic", "weight", "static"])
    return order in (True, "group", "dynamic")


def _activation(raw: Any, kind: str, where: str) -> Activation | None:
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"quantization config: {where} is no mapping", found=repr(raw))
    refuse_unknown(raw, KNOWN_ARGS, where)
    dynamic = raw.get("dynamic", False)
    strategy = raw.get("strategy") or ("token" if dynamic else "tensor")
    for name, value, known in (("type", raw.get("type", "int"), [kind]), ("num_bits", raw.get("num_bits", 8), [8]),
                               ("symmetric", raw.get("symmetric", True), [True]), ("dynamic", dynamic, [True, False]),
                               ("actorder", raw.get("actorder"), [None])):
        if value not in known:
            raise unsupported(f"{where}: {name}", value, known)
    dtype: Literal["fp8_e4m3", "int8"] = "fp8_e4m3" if kind == "float" else "int8"
    if not dynamic and strategy == "tensor":
        return Activation(dtype=dtype, scale="tensor", static=True)
    if dynamic and strategy in ("token", "tensor"):
        # One scale for a whole batch would make results depend on who else is in it; per token is finer.
        return Activation(dtype=dtype, scale="token")
    group = raw.get("group_size")
    if dynamic and strategy == "group" and type(group) is int and group > 0:
        return Activation(dtype=dtype, scale="group", group=group)
    raise unsupported(f"{where}: {'dynamic' if dynamic else 'static'} with group_size {group!r} and strategy", strategy,
                      ["static tensor", "dynamic token", "dynamic group with a size"])
