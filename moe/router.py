"""Router: a layer's choice of experts for every token; its matrix is never quantized."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..csrc.launch import missing
from ..csrc.moe_route import Routing, choose_experts, route
from ..plugins.errors import CheckpointError
from ..quant import Slot


class Router(nn.Module):
    """x [T, hidden] -> weights [T, top_k] float32, experts [T, top_k] int64. Logits are computed in float32.

    Args:
        name: of the matrix in the checkpoint ("model.layers.0.mlp.gate").
        bias: name beside `weight` of the bias that only decides the choice, if there is one.

    Raises CheckpointError: there are not as many experts to choose from as `routing` wants of them.
    """

    def __init__(self, name: str, hidden: int, experts: int, routing: Routing, *, bias: str | None = None,
                 dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size, rest = divmod(experts, routing.groups)
        if rest or routing.top_k > size * min(routing.groups, routing.top_groups):
            raise CheckpointError(f"{name}: a token cannot have {routing.top_k} of {experts} experts",
                                  found=f"{routing.groups} group(s) of experts, {routing.top_groups} to choose from",
                                  fix="check the settings of experts in config.json")
        self.name, self.routing, self.bias_name = name, routing, bias
        self.fused = missing(device, (8, 0)) is None
        self.weight = torch.empty(experts, hidden, dtype=dtype, device=device)
        self.bias = None if bias is None else torch.empty(experts, dtype=torch.float32, device=device)

    def slots(self) -> Iterator[Slot]:
        yield Slot(name=f"{self.name}.weight", target=self.weight)
        if self.bias is not None:
            yield Slot(name=f"{self.name}.{self.bias_name}", target=self.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.fused:
            return choose_experts(x, self.weight, self.routing, self.bias)
        logits = nn.functional.linear(x.float(), self.weight.float())
        return route(logits, self.routing, self.bias)
