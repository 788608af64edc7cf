"""KL divergence, top-1 agreement and likelihood of two models' next-token distributions, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .report import Divergence, Histogram

ALL = "all"
EDGES = [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
"""Powers of ten of a KL in nats: no more than the logarithm of a probability that float32 logits can tell."""


class Divergences:
    """Collects the scored tokens' numbers in float64; `tasks` names the task of each in order."""

    values_at_once = 2**22  # logits of one model, in float64: 32 MiB

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = list(tasks)
        self._columns: list[Tensor] = []

    def add(self, reference: Tensor, model: Tensor, targets: Tensor) -> None:
        """Logits [S, vocab] of both, and the tokens [S] that follow."""
        p, q = (logits.double().log_softmax(-1) for logits in (reference, model))
        kl = (p.exp() * (p - q)).nan_to_num(nan=0.0, posinf=torch.inf).sum(-1).clamp_min(0)
        kl[q.isnan().any(-1)] = torch.inf  # a broken model must not look like a perfect one
        same = (p.argmax(-1) == q.argmax(-1)).double()
        nll = [-logs.gather(1, targets[:, None])[:, 0] for logs in (q, p)]
        self._columns.append(torch.stack([kl, same, *nll]).cpu())

    def _table(self) -> Tensor:
        """[4, S]: KL, agreement, the model's and the reference's negative log-likelihood."""
        return torch.cat(self._columns, dim=1).nan_to_num(nan=torch.inf).clamp_max(torch.finfo(torch.float32).max)

    def rows(self) -> list[Divergence]:
        """Over all tokens, then by task."""
        table = self._table()
        names = dict.fromkeys(self._tasks)
        rows = [_row(ALL, table)]
        for name in names if len(names) > 1 else ():
            rows.append(_row(name, table[:, torch.tensor([task == name for task in self._tasks])]))
        return rows

    def histogram(self) -> Histogram:
        logs = self._table()[0].clamp_min(10 ** EDGES[0]).log10()
        bins = torch.bucketize(logs, torch.tensor(EDGES[1:-1], dtype=torch.float64), right=True)
        return Histogram(edges=EDGES, counts=bins.bincount(minlength=len(EDGES) - 1).tolist())


def _row(task: str, table: Tensor) -> Divergence:
    kl, same, model, reference = table
    return Divergence(
        task=task, tokens=len(kl), kl_mean=float(kl.mean()), kl_p50=_quantile(kl, 0.5), kl_p99=_quantile(kl, 0.99),
        kl_max=float(kl.max()), top1=float(same.mean()), nll_model=float(model.mean()),
        nll_reference=float(reference.mean()),
    )


def _quantile(values: Tensor, share: float) -> float:
    """The nearest rank: `torch.quantile` refuses more than 16 million values."""
    return float(values.sort().values[round(share * (len(values) - 1))])
