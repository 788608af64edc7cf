"""The report of `nybble eval`: what it holds, and its JSON."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from ...plugins.errors import UsageError
from ..results import Device
from .sqnr import Sqnr

SCHEMA = 1


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One side of the comparison.

    Attributes:
        quantization: the method's name; None for floating point.
        schemes: how linear layers are stored -> how many checkpoint matrices are.
        sha256: of every weight file, by name; {} with --no-hash.
        toy_model: a model made for tests: its numbers say nothing of a real one.
    """

    folder: str
    name: str
    architecture: str
    quantization: str | None
    schemes: dict[str, int]
    weight_bytes: int
    sha256: dict[str, str]
    toy_model: bool


class Wrong(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that is not the expected one."""

    asked: str
    got: str
    expected: str


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Exact match: `right` of `total` answers; some of the others in `wrong`."""

    right: int
    total: int
    wrong: list[Wrong]

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0


class TaskScore(msgspec.Struct, frozen=True, kw_only=True):
    """One task and split. `skipped` questions did not fit the model's context, or need a chat template it has not."""

    task: str
    split: str
    skipped: int
    model: Score
    reference: Score | None


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """How the next-token distributions differ over the same tokens; nats, mean over `tokens`.

    Attributes:
        task: "all", a task, or "text".
        kl_*: KL(reference || model) of a token: mean, median, 99th percentile, largest.
        top1: share of tokens whose likeliest next token is the same.
        nll_model, nll_reference: mean negative log-likelihood of the token that follows; exp() is the perplexity.
    """

    task: str
    tokens: int
    kl_mean: float
    kl_p50: float
    kl_p99: float
    kl_max: float
    top1: float
    nll_model: float
    nll_reference: float


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens by KL: `counts[i]` lie in [10^edges[i], 10^edges[i + 1]); the first bin takes all that is less."""

    edges: list[float]
    counts: list[int]


class MatrixSqnr(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint matrix under the model's own name; `stored` is how the model stores it.

    Scales that a quantizer moved from one matrix into another or into a norm (AWQ, SmoothQuant) count as noise here,
    though together they change nothing: of such checkpoints trust the outputs.
    """

    name: str
    layer: int | None
    expert: int | None
    stored: str
    sqnr: Sqnr


class ExpertSqnr(msgspec.Struct, frozen=True, kw_only=True):
    """An expert's outputs, given the reference's hidden states through the layer's own norm, for the tokens that the
    reference sends there; None where it sends none."""

    name: str
    layer: int
    expert: int
    tokens: int
    sqnr: Sqnr | None


class RouterAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of tokens: the same set of experts, and the same first one.

    `same_*`: the model's layer is given the reference's hidden states, so that only its own attention and router can
    make a difference. `own_*`: it comes after the model's own earlier layers, as when it runs.
    """

    same_set: float
    same_top1: float
    own_set: float
    own_top1: float


class LayerSqnr(msgspec.Struct, frozen=True, kw_only=True):
    """Hidden states after a layer. `same`: given the reference's input; `own`: each after its own earlier layers."""

    layer: int
    same: Sqnr
    own: Sqnr
    router: RouterAgreement | None


class Outlier(msgspec.Struct, frozen=True, kw_only=True):
    """Something far noisier than its peers. `what` is "weights", "expert outputs" or "layer outputs"."""

    what: str
    name: str
    place: str
    db: float | None
    others_db: float | None

    def __str__(self) -> str:
        """ "layer 1 expert 5 w2: 3.1 dB, others 21.4 dB median (weights)"."""
        mine = "not finite" if self.db is None else f"{self.db:.1f} dB"
        others = "inf" if self.others_db is None else f"{self.others_db:.1f}"
        return f"{self.place}: {mine}, others {others} dB median ({self.what})"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The model against the reference. `tokens` went through the layers; `divergence[0]` is over all that were scored.

    Attributes:
        dtype: of the arithmetic.
    """

    tokens: int
    dtype: str
    divergence: list[Divergence]
    histogram: Histogram
    layers: list[LayerSqnr]
    experts: list[ExpertSqnr]
    matrices: list[MatrixSqnr]
    outliers: list[Outlier]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `nybble eval`.

    Attributes:
        date: ISO 8601, UTC.
        libraries: distribution -> version.
        failed: the limits that were exceeded, in words; not empty means exit code 1.
    """

    schema: int
    command: str
    date: str
    device: Device
    libraries: dict[str, str]
    model: CheckpointInfo
    reference: CheckpointInfo | None
    tasks: list[TaskScore]
    comparison: Comparison | None
    failed: list[str]


def totals(tasks: list[TaskScore]) -> dict[str, tuple[Score, Score | None]]:
    """Split -> (the model's score over all of its tasks, the reference's)."""
    splits: dict[str, list[TaskScore]] = {}
    for task in tasks:
        splits.setdefault(task.split, []).append(task)
    found = {}
    for split, group in splits.items():
        references = [task.reference for task in group if task.reference is not None]
        found[split] = _sum([task.model for task in group]), _sum(references) if references else None
    return found


def _sum(scores: list[Score]) -> Score:
    return Score(right=sum(s.right for s in scores), total=sum(s.total for s in scores), wrong=[])


def limits_exceeded(tasks: list[TaskScore], comparison: Comparison | None, *, max_kl: float | None,
                    max_drop: float | None) -> list[str]:
    """What is worse than allowed: the mean KL in nats, and in any split the drop of exact match in points."""
    failed = []
    if max_kl is not None and comparison is not None and not (mean := comparison.divergence[0].kl_mean) <= max_kl:
        failed.append(f"mean KL {mean:.3g} is more than {max_kl:g}")
    for split, (model, reference) in totals(tasks).items():
        if max_drop is None or reference is None:
            continue
        drop = 100 * (reference.share - model.share)
        if drop > max_drop:
            failed.append(f"exact match{f' ({split})' if split else ''} is {drop:.2f} points below the reference's, "
                          f"more than {max_drop:g}")
    return failed


def perplexity(nll: float) -> float:
    """exp, without overflow."""
    return math.exp(min(nll, 700.0))


def write(path: Path, content: bytes) -> None:
    """Raises UsageError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"cannot write {path}", found=error) from error


def to_json(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def from_json(data: bytes) -> Report:
    """What `to_json` wrote. Raises UsageError for anything else, another schema's report among it."""
    try:
        found = msgspec.json.decode(data)
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise UsageError("this is no report of this version", found=f"schema {schema}", known=[str(SCHEMA)])
        return msgspec.convert(found, Report)
    except msgspec.MsgspecError as error:
        raise UsageError("this is no report of nybble eval", found=error) from error
