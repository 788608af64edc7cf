"""The one linear layer: fused parts declared by the model, storage and arithmetic given by a LinearMethod."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..csrc.quantize import Quantized, Rounding
from ..csrc.select import Kernels, LinearKernel, Problem
from ..plugins.errors import CheckpointError, NybbleError, PluginError, UsageError
from .base import FLOAT_SOURCES, REFERENCE, LayerShape, LinearMethod, Slot, WeightSpec, part_slots


class Linear(nn.Module):
    """y = x W^T + b over one or several fused parts.

    Args:
        prefix: checkpoint name of the parent module ("model.layers.0.self_attn").
        shape: input size and the fused parts in order.
        method: how the matrix is stored and applied.
        dtype: of activations, bias and unquantized weights.
        kernels: what may run it, asked once every tensor is in place.

    Weights are allocated uninitialised; a loader fills every slot or refuses. An owner, such as a layer of experts,
    sets `stored` to false where the checkpoint stores the weights under another name, and `owner` to what runs them.
    """

    def __init__(self, prefix: str, shape: LayerShape, method: LinearMethod, *, dtype: torch.dtype,
                 device: torch.device, kernels: Kernels = Kernels()) -> None:  # noqa: B008  frozen
        super().__init__()
        self.prefix, self.shape, self.method, self.dtype, self.device, self.kernels = (
            prefix, shape, method, dtype, device, kernels)
        self.specs = method.specs(shape, dtype)
        self.weights: Mapping[str, Tensor] = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in self.specs.items()
        }
        self.bias = torch.empty(shape.out_features, dtype=dtype, device=device) if shape.bias else None
        self.stored, self.packed, self._released = True, False, 0
        self.owner: str | None = None
        self.kernel: LinearKernel | None = None
        self.refusals: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        parts = "+".join(part.name for part in self.shape.parts)
        return f"{self.prefix}.{parts}" if self.prefix else parts

    def slots(self) -> Iterator[Slot]:
        return self.own_slots() if self.stored else iter(())

    def own_slots(self) -> Iterator[Slot]:
        """A slot for every tensor of every part, whoever fills them."""
        yield from part_slots(self.prefix, self.shape, self.specs, self.weights)
        if self.bias is not None:
            spec = WeightSpec(shape=tuple(self.bias.shape), dtype=self.bias.dtype, sources=FLOAT_SOURCES)
            yield from part_slots(self.prefix, self.shape, {"bias": spec}, {"bias": self.bias})

    def after_load(self) -> None:
        """Check the values, choose a kernel and let it pack them; only what runs stays in memory.

        Does nothing for a layer that an owner, such as a layer of experts, has already packed.
        """
        if not self.packed:
            self.check()
            self.pack()

    def check(self) -> None:
        """Take over what was loaded. Raises CheckpointError naming the layer whose values cannot be meant."""
        try:
            self.weights = self.method.after_load(dict(self.weights), self.shape)
        except CheckpointError as error:
            asked = f"{self.prefix}.{error.asked}" if self.prefix else error.asked
            raise CheckpointError(asked, found=error.found, known=error.known, fix=error.fix) from error

    def pack(self) -> None:
        """Choose the kernel of a checked layer and let it pack the weights."""
        self.packed = True
        if self.method.plain:
            return
        matrix = self.method.matrix(self.weights)
        if matrix is None:
            reason = f"{type(self.method).__name__} gives kernels no codes"
            self.refusals = {**self.refusals, **dict.fromkeys(self.kernels.known, reason), **self.kernels.broken}
            chosen = None
        else:
            choice = self.kernels.choose(Problem.of(matrix, self.dtype))
            chosen, self.refusals = choice.chosen, {**self.refusals, **choice.refusals}
        if chosen is None and self.kernels.pin not in (None, REFERENCE):
            assert self.kernels.pin is not None
            raise UsageError(f"{self.name}: the pinned kernel {self.kernels.pin} cannot run this layer",
                             found=f"{self.scheme}: {self.refusals[self.kernels.pin]}",
                             fix="leave --linear-backend out, or pin another")
        if chosen is not None and matrix is not None:
            try:
                self.kernel = chosen(matrix, self.dtype)
            except NybbleError:
                raise
            except Exception as exc:
                raise PluginError(f"{self.name}: kernel {chosen.name} said it could run this layer, then failed",
                                  found=f"{type(exc).__name__}: {exc}",
                                  fix=f"pin another: --linear-backend {REFERENCE}") from exc
            self.weights = self.kernel.weights

    def release(self, nbytes: int) -> None:
        """Drop the weights: an owner has packed them with others, of which `nbytes` are this layer's."""
        self.packed, self.weights, self._released = True, {}, nbytes

    @property
    def scheme(self) -> str:
        """How the matrix is stored, in words: the scheme, the dtype of plain weights, else the method's name."""
        if self.method.plain:
            return str(self.dtype).removeprefix("torch.")
        return str(self.method.scheme or type(self.method).__name__.removesuffix("Method").lower())

    @property
    def runs_by(self) -> str:
        """The name of what multiplies: a kernel's, or that of the method's own arithmetic."""
        if self.owner is not None and not self.weights:
            return self.owner
        own = self.kernel.name if self.kernel is not None else self.method.runs_by(self.weights)
        return own if self.owner is None else f"{self.owner}, {own}"

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the layer keeps."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self._released + bias + sum(tensor.nbytes for tensor in self.weights.values())

    @property
    def rounding(self) -> Rounding | None:
        """How the layer's kernel takes an input that is rounded already, known once it is packed; None: not at all."""
        return None if self.kernel is None else self.kernel.rounding

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x [..., in_features], or Quantized where `rounding` asks for it -> [..., out_features]."""
        if isinstance(x, Quantized):
            assert self.kernel is not None
            return self.kernel.run_rounded(x, self.bias)
        if self.kernel is not None:
            return self.kernel(x, self.bias)
        return self.method.apply(self.weights, x, self.bias)

    def extra_repr(self) -> str:
        parts = "+".join(f"{p.name}:{p.size}" for p in self.shape.parts)
        bias = ", bias" if self.shape.bias else ""
        return f"{self.shape.in_features} -> {parts}{bias}, {type(self.method).__name__}, {self.scheme}"


class SplitLinear(nn.Module):
    """Parts of one input that are stored in different ways, side by side; the outputs are joined in order."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts, self.device = nn.ModuleList(parts), parts[0].device

    @property
    def rounding(self) -> Rounding | None:
        return shared_rounding(self.parts)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def shared_rounding(consumers: Iterable[nn.Module]) -> Rounding | None:
    """What all of a tensor's consumers, by their attribute `rounding`, want of it; None when one does not say so, or
    they differ. Static scales are taken to differ."""
    wanted: list[Rounding | None] = [getattr(consumer, "rounding", None) for consumer in consumers]
    first = wanted[0]
    if first is None or (len(wanted) > 1 and any(
            other is None or other.activation != first.activation or other.static_scale is not None
            for other in wanted)):
        return None
    return first
