"""A layer of experts against a loop over tokens in float64, whatever its experts are stored by and who runs them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from nybble.models import Make
from nybble.moe import Backends, Expert, Experts, MoEBackend
from nybble.moe.reference import ReferenceBackend
from nybble.plugins.errors import CheckpointError, PluginError, UsageError
from nybble.quant import LayerShape, Linear, LinearMethod, Part, SplitLinear, Stored, Unquantized
from nybble.quant.gptq import GPTQConfig, GPTQMethod

HIDDEN, INTERMEDIATE, GROUP = 64, 96, 32
CPU = torch.device("cpu")
PLAIN, FOUR = Unquantized(), GPTQMethod(bits=4, group=GROUP)
EIGHT, ZEROS = replace(FOUR, bits=8), replace(FOUR, sym=False)
ORDERED = replace(FOUR, act_order=True)
REFERENCE = Backends(known={"reference": ReferenceBackend})

# The method of every expert, and how many kinds they are of.
CASES = {
    "plain": ([PLAIN] * 4, 1),
    "4 bits": ([FOUR] * 4, 1),
    "zero points": ([ZEROS] * 4, 1),
    "an order of inputs for each": ([ORDERED] * 4, 1),
    "8 bits, 4 bits and plain": ([EIGHT, FOUR, PLAIN, FOUR], 3),
    "all different": ([PLAIN, ORDERED, ZEROS, EIGHT], 4),
}


def fill(linear: Linear, *, scattered: bool = False) -> None:
    """Random weights that can be meant; `scattered` gives the groups of an order of inputs different sizes."""
    for name, tensor in linear.weights.items():
        groups = torch.arange(tensor.shape[-1]) // GROUP
        order = torch.randint(int(groups.max()) + 1, groups.shape) if scattered else groups[torch.randperm(len(groups))]
        tensor.copy_({
            "weight": lambda t: torch.randn(t.shape) / t.shape[-1] ** 0.5,
            "scales": lambda t: torch.rand(t.shape) / 50 + 0.01,
            "qweight": lambda t: torch.randint(-(1 << 31), 1 << 31, t.shape),
            "qzeros": lambda t: torch.randint(-(1 << 31), 1 << 31, t.shape),
            "g_idx": lambda t, order=order: order,
        }[name](tensor))


def expert_of(method: LinearMethod, *, scattered: bool = False) -> Expert:
    def linear(inputs: int, *outputs: int) -> Linear:
        parts = tuple(Part(name=f"p{i}", size=size) for i, size in enumerate(outputs))
        layer = Linear("expert", LayerShape(in_features=inputs, parts=parts), method, dtype=torch.float32, device=CPU)
        fill(layer, scattered=scattered)
        return layer

    if method.fusable:
        return Expert(linear(HIDDEN, INTERMEDIATE, INTERMEDIATE), linear(INTERMEDIATE, HIDDEN))
    return Expert(SplitLinear([linear(HIDDEN, INTERMEDIATE) for _ in range(2)]), linear(INTERMEDIATE, HIDDEN))


def layer_of(experts: list[Expert], backends: Backends = REFERENCE, *, count: bool = False) -> Experts:
    layer = Experts("mlp.experts", experts, hidden=HIDDEN, intermediate=INTERMEDIATE, top_k=2, dtype=torch.float32,
                    device=CPU, backends=backends, count=count)
    layer.after_load()
    return layer


def dense(experts: list[Expert]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """gate over up, and down, of every expert that is not loaded yet, in float64."""
    found = []
    for expert in experts:
        linears = copy.deepcopy(expert.linears())
        for linear in linears:
            linear.check()
        *gate_up, down = (linear.method.dequant(linear.weights).double() for linear in linears)
        found.append((torch.cat(gate_up), down))
    return found


def loop(matrices: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor, weights: torch.Tensor,
         experts: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for weight, expert in zip(weights[t].double(), experts[t].tolist()):
            if expert >= 0:
                gate_up, down = matrices[expert]
                gate, up = (gate_up @ row).chunk(2)
                out[t] += weight * (down @ (gate * gate.sigmoid() * up))
    return out


def tokens(count: int, choose: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights and experts of `count` tokens: two of four experts each, here and there nobody."""
    if choose is None:
        choose = torch.rand(count, 4).argsort(-1)[:, :2]
        choose = torch.where(torch.rand(count, 2) < 0.2, -1, choose)
    chosen = choose.expand(count, 2)
    return torch.randn(count, HIDDEN), torch.rand(count, 2), chosen


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool(((found - expected).abs() <= 1e-5 * (1 + expected.abs().max())).all())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_is_the_loop(case):
    methods, kinds = CASES[case]
    experts = [expert_of(method) for method in methods]
    matrices, layer = dense(experts), layer_of(experts)
    assert len(layer.runs) == kinds
    for count in (1, 2, 33):
        batch = tokens(count)
        assert close(layer(*batch), loop(matrices, *batch))
    assert layer(*tokens(0)).shape == (0, HIDDEN)


def test_scattered_inputs_are_a_kind_of_their_own():
    experts = [expert_of(ORDERED), expert_of(ORDERED, scattered=True), expert_of(ORDERED), expert_of(ORDERED)]
    matrices, layer, batch = dense(experts), layer_of(experts), tokens(20)
    assert len(layer.runs) == 2 and close(layer(*batch), loop(matrices, *batch))


@pytest.mark.parametrize("choose", [[2, 2], [3, -1], [-1, 0]], ids=["twice the same", "first of two", "second of two"])
def test_one_expert_takes_all_and_others_are_not_touched(choose):
    experts = [expert_of(method) for method in (FOUR, PLAIN, FOUR, EIGHT)]
    matrices, layer, batch = dense(experts), layer_of(experts), tokens(9, torch.tensor(choose))
    called = []
    for number, expert in enumerate(experts):
        for linear in expert.linears():
            linear.register_forward_hook(lambda *_, number=number: called.append(number))
    assert close(layer(*batch), loop(matrices, *batch))
    assert called == [max(choose)] * 2  # gate and up at once, and down


def test_nobody_adds_nothing():
    layer = layer_of([expert_of(method) for method in (FOUR, PLAIN, FOUR, EIGHT)])
    x, weights, chosen = tokens(8)
    chosen[3:5] = -1
    out = layer(x, weights, chosen)
    assert (out[3:5] == 0).all()
    x[3:5], weights[3:5] = float("nan"), float("inf")
    assert torch.equal(layer(x, weights, chosen), out)


def test_tokens_are_counted_when_asked_for():
    layer = layer_of([expert_of(PLAIN) for _ in range(4)], count=True)
    for chosen in ([[0, 1], [1, -1]], [[3, 1], [-1, -1]]):
        layer(torch.randn(2, HIDDEN), torch.rand(2, 2), torch.tensor(chosen))
    assert layer.counts.tolist() == [1, 3, 0, 1]
    assert layer_of([expert_of(PLAIN)]).counts is None


class Watching(ReferenceBackend):
    """Notes the experts that it was given."""

    name, priority = "watching", 5

    def __init__(self, experts, problem):
        super().__init__(experts, problem)
        self.given = []

    def __call__(self, x, weights, experts):
        self.given.append(experts.clone())
        return super().__call__(x, weights, experts)


def test_extreme_routings_crowd_every_kind_and_spread_over_all():
    layer = layer_of([expert_of(method) for method in (EIGHT, FOUR, PLAIN, FOUR)])
    assert layer.extremes == [[0, 1, 2, 3], [0, 1], [1, 3], [2, 0]]
    assert layer_of([expert_of(FOUR) for _ in range(4)]).extremes == [[0, 1, 2, 3], [0, 1]]


@pytest.mark.parametrize("numbers, expected", [
    ([0, 1, 2, 3], [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]), ([3, 1], [[3, 1]] * 5),
], ids=["spread", "crowded"])
def test_slots_are_dealt_while_it_lasts(numbers, expected):
    experts = [expert_of(FOUR) for _ in range(4)]
    matrices, layer = dense(experts), layer_of(experts, backends(Watching))
    x, weights, chosen = tokens(5)
    with layer.dealt(numbers):
        dealt = layer(x, weights, chosen)
    assert close(dealt, loop(matrices, x, weights, torch.tensor(expected)))
    with pytest.raises(ZeroDivisionError), layer.dealt(numbers):
        raise ZeroDivisionError
    layer(x, weights, chosen)
    [(backend, _)] = layer.runs
    assert [given.tolist() for given in backend.given] == [expected, chosen.tolist()]


class Fussy(ReferenceBackend):
    """Takes plain experts alone, and says what it was given."""

    name, priority = "fussy", 5

    @classmethod
    def supports(cls, problem):
        return None if set(problem.schemes) == {"plain"} else "takes plain experts alone"


class Idle(ReferenceBackend):
    """Leaves the weights as they were loaded."""

    name = "idle"

    def __init__(self, experts, problem):
        self.experts, self.tensors = experts, {}


class Broken(Fussy):
    name = "broken"
    error: Exception = RuntimeError("out of shared memory")

    def __init__(self, experts, problem):
        raise self.error


class Honest(Broken):
    error = CheckpointError("a scale is NaN")


def backends(*known: type[MoEBackend], pin: str | None = None) -> Backends:
    return Backends(known={backend.name: backend for backend in known}, pin=pin)


def test_every_kind_has_its_own_backend():
    experts = [expert_of(method) for method in (FOUR, PLAIN, FOUR, PLAIN)]
    matrices, layer, batch = dense(experts), layer_of(experts, backends(Fussy, ReferenceBackend)), tokens(20)
    assert [type(backend) for backend, _ in layer.runs] == [ReferenceBackend, Fussy]
    assert close(layer(*batch), loop(matrices, *batch))
    assert experts[0].down.refusals["fussy"] == "takes plain experts alone"
    assert "priority 5 over -10" in experts[1].down.refusals["reference"]
    assert [expert.down.runs_by.partition(",")[0] for expert in experts] == ["reference", "fussy"] * 2


def test_a_backend_need_not_pack():
    experts = [expert_of(method) for method in (FOUR, PLAIN, FOUR, PLAIN)]
    matrices, layer, batch = dense(experts), layer_of(experts, backends(Idle)), tokens(20)
    for linear in layer.layers:
        linear.after_load()  # as CausalLM.after_load asks every linear layer
    assert close(layer(*batch), loop(matrices, *batch))


@pytest.mark.parametrize("given, error, says", [
    (backends(Fussy, ReferenceBackend, pin="fussy"), UsageError,
     r"(?s)mlp.experts: the pinned MoE backend fussy cannot run.*fussy: takes plain experts alone.*--moe-backend"),
    (backends(Fussy), UsageError,
     r"(?s)mlp.experts: no MoE backend can run.*int4 g32.*fussy: takes plain experts alone"),
], ids=["pinned", "nobody"])
def test_refusals_say_why(given, error, says):
    with pytest.raises(error, match=says):
        layer_of([expert_of(FOUR)], given)


@pytest.mark.parametrize("backend, error, says", [
    (Broken, PluginError, r"(?s)mlp.experts: MoE backend broken said.*RuntimeError: out of shared memory.*reference"),
    (Honest, CheckpointError, "a scale is NaN"),
], ids=["fails", "refuses"])
def test_a_backend_that_cannot_be_made(backend, error, says):
    with pytest.raises(error, match=says):
        layer_of([expert_of(PLAIN)], backends(backend, ReferenceBackend))


def test_it_can_be_printed():
    assert "4 experts, top_k 2" in repr(layer_of([expert_of(FOUR) for _ in range(4)]))


NAMES = ("gate_proj", "up_proj", "down_proj")
SHAPES = dict(zip(NAMES, [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]))
DYNAMIC = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "dynamic": {
    r"+:.*\.experts\.0\..*": {"bits": 8}, r"-:.*\.experts\.2\..*": {}}}


def stored_as(methods: list[LinearMethod]) -> dict[str, dict[str, Stored]]:
    """The tensors of experts stored by `methods`, as headers show them."""
    found = {}
    for number, method in enumerate(methods):
        for name, (out, inputs) in SHAPES.items():
            specs = method.specs(LayerShape(in_features=inputs, parts=(Part(name=name, size=out),)), torch.float32)
            found[f"mlp.experts.{number}.{name}"] = {n: Stored(s.dtype, s.shape) for n, s in specs.items()}
    return found


def made(stored: dict[str, dict[str, Stored]]) -> Experts:
    make = Make(dtype=torch.float32, device=CPU, max_len=1, quant=GPTQConfig.from_checkpoint(DYNAMIC), stored=stored,
                backends=REFERENCE, prefix="mlp")
    return make.experts("experts", 4, HIDDEN, INTERMEDIATE, top_k=2, parts=(NAMES,))


def test_gptq_gives_each_expert_its_bits():
    layer = made(stored_as([EIGHT, FOUR, PLAIN, FOUR]))
    assert [expert.linears()[0].scheme for expert in layer.experts] == [
        "int8 g32", "int4 g32", "float32", "int4 g32"]
    for linear in layer.layers:
        fill(linear)
    matrices, batch = dense(layer.experts), tokens(20)
    layer.after_load()
    assert close(layer(*batch), loop(matrices, *batch))


def test_stacks_are_floating_point_whatever_the_config_says():
    stacks = {"gate_up_proj": Stored(torch.bfloat16, (4, 2 * INTERMEDIATE, HIDDEN)),
              "down_proj": Stored(torch.bfloat16, (4, HIDDEN, INTERMEDIATE))}
    layer = made({"mlp.experts": stacks})
    assert all(linear.method == Unquantized() for linear in layer.layers)
    assert {slot.name: tuple(slot.target.shape) for slot in layer.slots()} == {
        f"mlp.experts.{name}": found.shape for name, found in stacks.items()}
    assert not [slot for linear in layer.layers for slot in linear.slots()]


@pytest.mark.parametrize("stored", [
    {"gate_up_proj_scale_inv": Stored(torch.float32, (4, 2, 1)),
     "down_proj_scale_inv": Stored(torch.float32, (4, 1, 2))},
    {"gate_up_proj": Stored(torch.float8_e4m3fn, (4, 2 * INTERMEDIATE, HIDDEN))},
], ids=["scales", "codes"])
def test_stacks_of_codes_or_scales_are_refused_by_name(stored):
    with pytest.raises(CheckpointError, match="experts stacked with their codes or scales are not implemented"):
        made({"mlp.experts": stored})
