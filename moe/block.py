"""MoEBlock: router, experts, and the experts that every token goes to."""

from __future__ import annotations

from torch import Tensor, nn

from ..csrc.quantize import Quantized, Rounding
from ..quant import shared_rounding
from .experts import Experts
from .router import Router


class MoEBlock(nn.Module):
    """A feed-forward layer of experts: x [T, hidden] -> [T, hidden]. `shared` is added for every token.

    Where experts and `shared` take their inputs rounded in one way, x comes so, with its values for the router.
    """

    keeps_values = True

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    @property
    def rounding(self) -> Rounding | None:
        return shared_rounding([self.experts, *([] if self.shared is None else [self.shared])])

    def forward(self, x: Tensor | Quantized) -> Tensor:
        values = x.values if isinstance(x, Quantized) else x
        assert values is not None
        return self.experts(x, *self.router(values), None if self.shared is None else self.shared(x))
