"""MoEBlock: router, experts, and the experts that every token goes to."""

from __future__ import annotations

from torch import Tensor, nn

from .experts import Experts
from .router import Router


class MoEBlock(nn.Module):
    """A feed-forward layer of experts: x [T, hidden] -> [T, hidden]. `shared` is added for every token."""

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.router(x), None if self.shared is None else self.shared(x))
