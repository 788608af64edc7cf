"""Walk two checkpoints side by side, one decoder layer at a time: weights, experts, routers, hidden states, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...csrc.norm_rope import silu_mul
from ...models.decoder import DecoderLM
from ...moe import Expert, MoEBlock
from ...plugins.errors import UsageError
from ..command import track
from . import outliers
from .divergence import Divergences
from .forward import Part, block_input, block_of, parts, run_layer
from .passages import Passage
from .report import Comparison, ExpertSqnr, LayerSqnr, MatrixSqnr, RouterAgreement
from .sqnr import Noise, sqnr
from .stream import Source, dequantized

Observer = Callable[[str], None]


def _differing_tokens(model: Source, reference: Source) -> str | None:
    """In words; None when all are the same, or a side has no tokenizer."""
    if model.tokenizer is None or reference.tokenizer is None:
        return None
    mine, other = (source.backend.get_vocab() for source in (model.tokenizer, reference.tokenizer))
    tokens = sorted(token for token, _ in mine.items() ^ other.items())
    return f"{len(set(tokens))} tokens of the tokenizer, {tokens[0]!r} among them" if tokens else None


def check_pair(model: Source, reference: Source) -> None:
    """Raise UsageError with all that keeps two checkpoints from being compared."""
    differ = [
        f"{what} {mine} and {other}" for what, mine, other in (
            ("architecture", model.config.model.architecture, reference.config.model.architecture),
            ("layers", model.layers, reference.layers),
            ("vocabulary", model.config.model.vocab_size, reference.config.model.vocab_size),
        ) if mine != other
    ]
    if (tokens := _differing_tokens(model, reference)) is not None:
        differ.append(tokens)
    shapes = ((a, b) for a, b in zip(model.matrices, reference.matrices) if a.shape != b.shape)
    if not differ and (first := next(shapes, None)) is not None:
        differ.append(" and ".join(f"{matrix.name} {list(matrix.shape)}" for matrix in first))
    elif not differ and len(model.matrices) != len(reference.matrices):
        differ.append(f"{len(model.matrices)} and {len(reference.matrices)} matrices")
    if differ:
        raise UsageError("these two checkpoints cannot be compared", found="; ".join(differ),
                         fix="give the checkpoint that the model was quantized from")


@torch.inference_mode()
def compare(model: Source, reference: Source, passages: Sequence[Passage], *,
            observe: Observer | None = None) -> Comparison:
    """Measure `model` against `reference` over the same token ids.

    In memory are the hidden states of all tokens, twice, and of each checkpoint one piece at a time: its embedding, one
    decoder layer, its head. `observe` is called with a piece's name ("embedding", "layer 0", "head") while the pieces
    of both are in memory.

    Raises UsageError when the two do not fit each other.
    """
    check_pair(model, reference)
    walk = _Walk(model, reference, passages, observe or (lambda piece: None))
    for index in track(range(model.layers), "comparing layers"):
        walk.layer(index)
    divergences = walk.head()
    return Comparison(
        tokens=len(walk.ids), dtype=str(model.dtype).removeprefix("torch."), divergence=divergences.rows(),
        histogram=divergences.histogram(), layers=walk.layers, experts=walk.experts, matrices=walk.matrices,
        outliers=outliers.find(walk.layers, walk.experts, walk.matrices),
    )


class _Walk:
    """The hidden states of both models between two layers, and what was found so far."""

    def __init__(self, model: Source, reference: Source, passages: Sequence[Passage], observe: Observer) -> None:
        self.sources, self.passages, self.observe = (reference, model), passages, observe
        self.ids = torch.tensor([i for passage in passages for i in passage.ids], device=model.device)
        self.longest = max(len(passage.ids) for passage in passages)
        self.parts = list(parts([len(passage.ids) for passage in passages]))
        self.reference, self.model = (source.embed(self.ids) for source in self.sources)
        observe("embedding")
        self.layers: list[LayerSqnr] = []
        self.experts: list[ExpertSqnr] = []
        self.matrices: list[MatrixSqnr] = []

    def layer(self, index: int) -> None:
        """Load layer `index` of both, weigh it, run it, and drop it."""
        reference, model = (source.layer(index, self.longest) for source in self.sources)
        self.observe(f"layer {index}")
        self._weigh(reference, model)
        blocks = block_of(reference), block_of(model)
        routers = None if blocks[0] is None or blocks[1] is None else _Blocks(blocks[0], blocks[1])
        same, own = Noise(), Noise()
        for part in self.parts:
            self._run(part, reference, model, same, own, routers)
        self.layers.append(LayerSqnr(layer=index, same=same.result(), own=own.result(),
                                     router=routers.agreement() if routers else None))
        if routers:
            self.experts += routers.outputs(index)

    def _run(self, part: Part, reference: DecoderLM, model: DecoderLM, same: Noise, own: Noise,
             routers: _Blocks | None) -> None:
        """Move some sequences past the layer, in place."""
        ids, lengths = self.ids[part.rows], part.lengths
        true = run_layer(reference, ids, self.reference[part.rows], lengths)
        alone = run_layer(model, ids, self.reference[part.rows], lengths)
        after = run_layer(model, ids, self.model[part.rows], lengths)
        same.add(true.hidden, alone.hidden)
        own.add(true.hidden, after.hidden)
        if routers:
            routers.route(*(ran.block_input for ran in (true, alone, after) if ran.block_input is not None))
            routers.run(*(block_input(side, true.middle) for side in (reference, model)))
        self.reference[part.rows], self.model[part.rows] = true.hidden, after.hidden

    def _weigh(self, reference: torch.nn.Module, model: torch.nn.Module) -> None:
        for (name, stored, found), (_, _, true) in zip(dequantized(model), dequantized(reference)):
            layer, expert, _ = outliers.numbers_of(name)
            self.matrices.append(MatrixSqnr(name=name, layer=layer, expert=expert, stored=stored,
                                            sqnr=sqnr(true, found)))

    def head(self) -> Divergences:
        """Load both heads and compare what they say of every scored token."""
        reference, model = (source.head() for source in self.sources)
        self.observe("head")
        self._weigh(reference, model)
        start, rows, tasks = 0, list[int](), list[str]()
        for passage in self.passages:
            rows += range(start + passage.first - 1, start + len(passage.ids) - 1)
            tasks += [passage.task] * (len(passage.ids) - passage.first)
            start += len(passage.ids)
        found = Divergences(tasks)
        step = max(1, found.values_at_once // self.sources[0].config.model.vocab_size)
        scored = torch.tensor(rows, device=self.ids.device)
        for some in scored.split(step):
            want, got = (m.compute_logits(m.norm(hidden[some])[0])
                         for m, hidden in ((reference, self.reference), (model, self.model)))
            found.add(want, got, self.ids[some + 1])
        return found


class _Blocks:
    """A layer's two blocks of experts: what they choose, and what each expert gives."""

    def __init__(self, reference: MoEBlock, model: MoEBlock) -> None:
        self.reference, self.model = reference, model
        count = len(reference.experts.experts)
        self.noise, self.tokens = [Noise() for _ in range(count)], [0] * count
        self.total, self.agree = 0, torch.zeros(4, dtype=torch.int64)

    def route(self, true: Tensor, alone: Tensor, own: Tensor) -> None:
        """What the blocks were given, [T, hidden]: in the reference, in the model's layer on the reference's hidden
        states, and in the model."""
        _, want = self.reference.router(true)
        _, same = self.model.router(alone)
        _, after = self.model.router(own)
        self.total += len(true)
        self.agree += torch.stack([_same_set(want, same), want[:, 0] == same[:, 0],
                                   _same_set(want, after), want[:, 0] == after[:, 0]]).sum(1).cpu()

    def run(self, true: Tensor, same: Tensor) -> None:
        """The same hidden states of the reference after each side's own norm, [T, hidden]: a quantizer may have moved
        scales from the experts' matrices into it (AWQ does)."""
        _, want = self.reference.router(true)
        for number, (expert, other) in enumerate(zip(self.reference.experts.experts, self.model.experts.experts)):
            rows = (want == number).any(1).nonzero()[:, 0]
            if len(rows):
                self.noise[number].add(_output(expert, true[rows]), _output(other, same[rows]))
                self.tokens[number] += len(rows)

    def agreement(self) -> RouterAgreement:
        shares = (self.agree.double() / self.total).tolist()
        return RouterAgreement(same_set=shares[0], same_top1=shares[1], own_set=shares[2], own_top1=shares[3])

    def outputs(self, layer: int) -> list[ExpertSqnr]:
        return [
            ExpertSqnr(name=f"{self.model.experts.name}.{number}", layer=layer, expert=number, tokens=tokens,
                       sqnr=noise.result() if tokens else None)
            for number, (noise, tokens) in enumerate(zip(self.noise, self.tokens))
        ]


def _same_set(a: Tensor, b: Tensor) -> Tensor:
    """a, b [T, top_k] -> [T] bool."""
    return (a.sort(1).values == b.sort(1).values).all(1)


def _output(expert: Expert, x: Tensor) -> Tensor:
    """One expert alone, its routing weight left out."""
    found: Tensor = expert.down(silu_mul(expert.gate_up(x)))
    return found
