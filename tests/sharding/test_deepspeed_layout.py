"""DeepSpeed's flat tensors, on real engines: every element is where the layout says, and lies are found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch.sharding.deepspeed import FlatLayout, read_layout
from lightning_sketch.sharding.wrapper import find_wrapper, wrapper_of
from tests.deepspeed_tools import config, engine, init_deepspeed
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Pairs of one shape, sizes that no world size divides, fewer elements than ranks, one and three dimensions.
SHAPES = [(41, 7), (13, 7), (13,), (13,), (3,), (7, 13), (41, 7), (5, 3, 2), (1,), (41,)]
FROZEN, TIED = 2, (0, 6)  # cells, in the models that have such


@dataclass(frozen=True)
class Case:
    """One configuration of DeepSpeed, and of the model."""

    stage: int
    dtype: str = "fp32"
    per_layer: bool = False  # a parameter group for each
    frozen: bool = False
    tied: bool = False
    zero_init: range = range(0)  # cells built under zero.Init
    more: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if k not in ("stage", "dtype") and v}
        return f"stage {self.stage} {self.dtype} {changed or ''}"


FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # what selects BF16_Optimizer in stage 1
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ALL, SOME = range(len(SHAPES)), range(3, 7)
CASES = [
    *[Case(stage) for stage in (1, 2, 3)],
    *[Case(stage, "bf16", per_layer=True) for stage in (0, 1, 2, 3)],
    *[Case(stage, "fp16") for stage in (0, 2, 3)],
    Case(1, "bf16", per_layer=True, more=FP32_ACCUMULATION),
    Case(2, zero={"round_robin_gradients": True}),
    Case(2, zero={"parameter_alignment": True}),
    Case(1, "bf16", zero={"parameter_alignment": True, "round_robin_gradients": True}),
    Case(3, "bf16", zero={"sub_group_size": 50}),
    Case(3, zero={"stage3_param_persistence_threshold": 10**6}),
    Case(3, "bf16", zero_init=ALL),
    Case(3, zero_init=SOME),
    Case(3, per_layer=True, zero_init=ALL, zero={"stage3_param_persistence_threshold": 50, "sub_group_size": 200}),
    *[Case(stage, zero=OFFLOAD) for stage in (2, 3)],
    Case(3, "bf16", zero=OFFLOAD | {"offload_param": {"device": "cpu", "pin_memory": False}}),
    *[Case(stage, frozen=True, tied=True) for stage in (2, 3)],
    Case(0, "bf16", frozen=True, tied=True),
    Case(1, "bf16", frozen=True, tied=True, more=FP32_ACCUMULATION),
]
#: By the number of ranks. Where elements lie does not depend on the dtype.
CASES_ON = {2: CASES, 3: [case for case in CASES if case.dtype == "fp32"]}
WRAPPERS = {  # of each stage, and what the layout calls it; stage 0 in fp32 has none
    0: ("FP16_UnfusedOptimizer", "FP16_UnfusedOptimizer"),
    1: ("DeepSpeedZeroOptimizer", "ZeRO-1/2"),
    2: ("DeepSpeedZeroOptimizer", "ZeRO-1/2"),
    3: ("DeepSpeedZeroOptimizer_Stage3", "ZeRO-3"),
}


class Cell(nn.Module):
    """One parameter, and the gradient that it will get: integers, further apart than bf16 rounds."""

    def __init__(self, number: int, weight: Tensor) -> None:
        super().__init__()
        self.gradient = torch.arange(weight.numel()).mul(31).add(17 * number).remainder(61).add(1).view(weight.shape)
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return (self.weight * self.gradient.to(self.weight.dtype)).sum()


class Cells(nn.Module):
    """Independent parameters."""

    def __init__(self, weights: list[Tensor], case: Case) -> None:
        import deepspeed

        super().__init__()
        self.cells = nn.ModuleList()
        for number, weight in enumerate(weights):
            inside = number in case.zero_init
            settings = config(case.stage, case.dtype, case.more, **case.zero) if inside else None
            with deepspeed.zero.Init(config_dict_or_path=settings) if inside else nullcontext():
                self.cells.append(Cell(number, weight))
        if case.frozen:
            self.cells[FROZEN].weight.requires_grad_(False)
        if case.tied:
            self.cells[TIED[1]].weight = self.cells[TIED[0]].weight

    def forward(self) -> Tensor:
        return sum(cell() for cell in self.cells)

    def gradients(self) -> list[Tensor]:
        of = [cell.gradient.float() for cell in self.cells]
        if self.cells[TIED[0]].weight is self.cells[TIED[1]].weight:
            of[TIED[0]] += of[TIED[1]]
        return of

    def groups(self, case: Case) -> list[dict[str, Any]]:
        params = list(self.parameters())  # the frozen one too, as most people do
        return [{"params": [p]} for p in params] if case.per_layer else [{"params": params}]


def distinct(dtype: str) -> list[Tensor]:
    """Weights of which no two elements are equal in `dtype`: consecutive bit patterns of finite numbers."""
    low = torch.float16 if dtype == "fp16" else torch.bfloat16
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    numbers = torch.arange(1024, 1024 + sum(sizes), dtype=torch.int16).view(low)  # from 1024 on they are normal
    return [part.view(shape).float() for part, shape in zip(numbers.split(sizes), SHAPES, strict=True)]


def owners(layout: FlatLayout, model: Cells, per_cell: list[Tensor]) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
    """For every flat tensor, for each segment: its first element, and what the elements of `per_cell` are there."""
    number = {cell.weight: i for i, cell in reversed(list(enumerate(model.cells)))}  # the first of tied ones
    tensors = []
    for flat, segments in layout.tensors:
        parts = []
        for segment in segments:
            whole = per_cell[number[segment.param]]
            assert segment.shape == tuple(whole.shape)
            parts.append((segment.start, whole.flatten()[segment.offset : segment.offset + segment.length]))
            assert parts[-1][1].numel() == segment.length
        tensors.append((flat, parts))
    return tensors


class Spy(torch.optim.SGD):
    """Looks for the caller in every step, and compares every gradient with what it must be."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.model: Cells | None = None  # set after the dummy step
        self.callers: list[tuple[str, bool]] = []
        self.checked = 0

    def step(self, closure: Any = None) -> None:
        wrapper, dummy = find_wrapper(self)
        self.callers.append((type(wrapper).__name__, dummy))
        layout = read_layout(wrapper) if wrapper is not None else None
        if self.model is not None and layout is not None:
            gradients = self.model.gradients()
            for flat, parts in owners(layout, self.model, gradients):
                if any(flat is p for group in self.param_groups for p in group["params"]):
                    wanted = torch.zeros(flat.numel())  # also between the segments
                    for start, values in parts:
                        wanted[start : start + values.numel()] = values
                    torch.testing.assert_close(flat.grad.flatten(), wanted, rtol=2**-7, atol=0)  # bf16 thirds
                    self.checked += flat.numel()
        super().step(closure)


def build(case: Case, weights: list[Tensor]) -> Any:
    model = Cells(weights, case)
    return engine(model, Spy(model.groups(case), lr=0.0), case.stage, case.dtype, case.more, **case.zero)


def train(made: Any) -> Spy:
    """Two steps, in which the client looks around."""
    wrapper = wrapper_of(made)
    spy = made.optimizer if wrapper is None else wrapper.optimizer
    spy.model = made.module
    for _ in range(2):
        made.backward(made())
        made.step()
    return spy


def observe(case: Case) -> dict[str, Any]:
    """Compare every element of every flat tensor with the weights put into the model, and train it with a `Spy`."""
    weights = distinct(case.dtype)
    made = build(case, weights)
    layout = read_layout(wrapper_of(made))
    seen = []
    for flat, parts in owners(layout, made.module, weights):
        for start, values in parts:  # what lies between is not initialized under ZeRO-3
            held = flat.detach().flatten()[start : start + values.numel()]
            torch.testing.assert_close(held, values, rtol=0, atol=0)
            seen.append(held.clone())
    spy = train(made)
    return {
        "engine": layout.engine,
        "weights": torch.cat(seen),
        "callers": sorted(set(spy.callers)),
        "every gradient": spy.checked == 2 * sum(flat.numel() for flat, _ in layout.tensors),
    }


def attempt(case: Case) -> dict[str, Any] | str:
    try:
        return observe(case)
    except Exception as error:  # reported together with all others, instead of ending the ranks
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Lie:
    """A change to a wrapper after which `read_layout` must refuse, and a part of the message."""

    case: Case
    tell: Callable[[Any], object]
    message: str


def swap(items: list[Any], i: int, j: int) -> None:
    items[i], items[j] = items[j], items[i]


def shift(offsets: list[int], i: int) -> None:
    offsets[i] += 1


TWO, THREE, HALF = Case(2), Case(3), Case(0, "bf16")
BF16 = Case(1, "bf16", more=FP32_ACCUMULATION)
LIES = [
    Lie(TWO, lambda w: shift(w.round_robin_bit16_offsets[0], 1), "'cells.2.weight' lies over"),
    Lie(TWO, lambda w: shift(w.round_robin_bit16_offsets[0], 9), "'cells.9.weight' does not lie"),  # into the padding
    Lie(TWO, lambda w: swap(w.round_robin_bit16_groups[0], 2, 3), "'cells.3.weight' does not lie"),
    Lie(TWO, lambda w: swap(w.round_robin_bit16_groups[0], 0, 1), "lies over another"),
    Lie(TWO, lambda w: swap(w.round_robin_bit16_offsets[0], 0, 1), "'cells.0.weight'"),
    Lie(TWO, lambda w: w.round_robin_bit16_offsets[0].pop(), "9 offsets for 10 parameters"),
    Lie(TWO, lambda w: w.single_partition_of_fp32_groups.pop(), "differ in length"),
    Lie(TWO, lambda w: delattr(w, "round_robin_bit16_groups"), "no attribute 'round_robin_bit16_groups'"),
    Lie(TWO, lambda w: setattr(w, "optimizer", torch.optim.SGD([torch.zeros(2)])), "unknown tensor"),
    Lie(TWO, lambda w: setattr(w, "zenflow", True), "ZenFlow"),
    Lie(THREE, lambda w: swap(w.fp16_groups[0], 2, 3), "does not lie"),
    Lie(THREE, lambda w: setattr(w.fp16_groups[0][1].ds_tensor, "ds_numel", 47), "in a tensor of"),
    Lie(THREE, lambda w: setattr(w.fp16_groups[0][1], "ds_shape", torch.Size((12, 7))), "84 of the 91 elements"),
    Lie(THREE, lambda w: w.fp16_groups[0].pop(), "in a tensor of"),
    Lie(THREE, lambda w: delattr(w, "fp16_partitioned_groups_flat"), "no attribute 'fp16_partitioned_groups_flat'"),
    Lie(THREE, lambda w: delattr(w.fp16_groups[0][1], "ds_shape"), "'cells.1.weight' has no attribute 'ds_shape'"),
    Lie(THREE, lambda w: setattr(w, "swap_optimizer", True), "NVMe"),
    Lie(BF16, lambda w: swap(w.bf16_groups[0], 0, 6), "'cells.6.weight' does not lie"),
    Lie(BF16, lambda w: w.bf16_groups[0].append(w.bf16_groups[0][2]), "'cells.2.weight'"),
    Lie(HALF, lambda w: swap(w.fp16_groups[0], 0, 1), "a copy of shape (41, 7) for an unnamed"),
    Lie(HALF, lambda w: w.fp16_groups[0].pop(), "differ in length"),
    Lie(HALF, lambda w: w.fp16_groups[0].__setitem__(3, w.fp16_groups[0][2]), "appears twice"),
]


def refusals() -> list[str]:
    """What `read_layout` says to each of `LIES`."""
    said = []
    for lie in LIES:
        wrapper = wrapper_of(build(lie.case, distinct(lie.case.dtype)))
        read_layout(wrapper)
        lie.tell(wrapper)
        try:
            read_layout(wrapper)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


def unwrapped() -> dict[str, bool]:
    """Whether `wrapper_of` finds the wrapper in everything that it accepts."""
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper

    made = build(Case(2), distinct("fp32"))
    optimizer = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)  # its constructor wants an Accelerator
    optimizer.optimizer = made.optimizer
    plain = build(Case(0), distinct("fp32"))
    return {
        "engine": wrapper_of(made) is made.optimizer,
        "wrapper": wrapper_of(made.optimizer) is made.optimizer,
        "accelerate's engine": wrapper_of(DeepSpeedEngineWrapper(made)) is made.optimizer,
        "accelerate's optimizer": wrapper_of(optimizer) is made.optimizer,
        "none in stage 0": wrapper_of(plain) is None and wrapper_of(plain.optimizer) is None,
        "none in a step of stage 0": set(train(plain).callers) == {("NoneType", False)},
        "nothing": wrapper_of(None) is None,
    }


def everything(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    results: dict[str, Any] = {"cases": [attempt(case) for case in CASES_ON[world_size]]}
    if world_size == 2:  # on which the rest does not depend
        results |= {"refusals": refusals(), "unwrapped": unwrapped()}
    return results


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], list[dict[str, Any]]]:
    """What `everything` returned on each rank. Processes are started once for each world size."""
    return cache(partial(run_ranks, everything))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_element_is_where_the_layout_says_and_on_one_rank(ranks, world_size):
    for case, *by_rank in zip(CASES_ON[world_size], *(result["cases"] for result in ranks(world_size)), strict=True):
        failed = [result for result in by_rank if not isinstance(result, dict)]
        assert not failed, f"{case}: {failed}"
        absent = ({FROZEN} if case.frozen else set()) | ({TIED[1]} if case.tied else set())
        wanted = torch.cat([w.flatten() for i, w in enumerate(distinct(case.dtype)) if i not in absent])
        held = [result["weights"] for result in by_rank]
        for weights in [torch.cat(held)] if case.stage > 0 else held:
            torch.testing.assert_close(weights.sort().values, wanted.sort().values, rtol=0, atol=0, msg=str(case))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_finds_its_wrapper_and_gradients_where_the_layout_says(ranks, world_size):
    for rank in ranks(world_size):
        for case, result in zip(CASES_ON[world_size], rank["cases"], strict=True):
            wrapper, engine_name = WRAPPERS[case.stage] if not case.more else ("BF16_Optimizer", "BF16_Optimizer")
            assert result["engine"] == engine_name, str(case)
            dummy = [(wrapper, True)] if case.stage == 0 else []
            assert result["callers"] == [(wrapper, False), *dummy], str(case)
            assert result["every gradient"], str(case)


def test_records_that_are_not_true_are_refused(ranks):
    import deepspeed

    for rank in ranks(2):
        for lie, message in zip(LIES, rank["refusals"], strict=True):
            assert lie.message in message, f"{lie.case}: {message!r} lacks {lie.message!r}"
            assert f"deepspeed {deepspeed.__version__}" in message


def test_the_wrapper_inside_an_engine_and_inside_accelerates_wrappers(ranks):
    for rank in ranks(2):
        assert all(rank["unwrapped"].values()), rank["unwrapped"]


def test_a_subclass_is_refused_because_it_may_step_other_tensors():
    wrapper = type("SuperOffloadOptimizer_Stage3", (), {})()
    with pytest.raises(RuntimeError, match=r"SuperOffloadOptimizer_Stage3 is not among DeepSpeedZeroOptimizer"):
        read_layout(wrapper)


def test_without_deepspeed_no_wrapper_is_found():
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    assert find_wrapper(optimizer) == (None, False)
    assert wrapper_of(optimizer) is None
    assert wrapper_of(nn.Linear(2, 2)) is None
