"""The matrix: every codec that is registered, under every optimizer family, by density and by layout.

A codec that is registered later has a place in it with its defaults. Until its option sets are declared here,
`test_declared.py` fails.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer

from lightning_sketch import (
    SM3,
    BFloat16,
    Codec,
    CountSketch,
    Drop,
    Factored,
    Keep,
    Policy,
    Quantized,
    RowWise,
    Rule,
    compress,
)
from lightning_sketch.layers.flat import NamedSegment, layer_parts
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.rules import StateDef
from lightning_sketch.rules.families import rule_of
from lightning_sketch.sharding import Shard
from tests.codecs.halves import Halves
from tests.rules.left_out import RULES, SHARDS, Part


@dataclass(frozen=True)
class Variant:
    """A codec with options that make it another thing.

    Args:
        codec: the codec.
        exact: whether it stores a state as it is, so that steps are torch's: of dense gradients only, where absent rows
            of sparse ones decay, too; or of both.
        exact_vectors: whether it stores states of less than two dimensions so.
        distance: of parameter and states after three steps from the same in float64, by their largest element.
        kernel: whether compiled kernels take it; ``None`` for not declared.
    """

    codec: Codec
    exact: Literal["", "dense", "both"] = ""
    exact_vectors: bool = False
    distance: float = 1e-5
    kernel: bool | None = True


#: A step of bfloat16 or of a code, where float32 and float64 round to either side of an element.
BF16, CODE8, CODE4, HALF = 2.0**-7, 2.0**-6, 0.3, 2.0**-9

#: By class, with a name each. Everything there is about a codec is said here.
OPTION_SETS: dict[type[Codec], dict[str, Variant]] = {
    Keep: {"Keep": Variant(Keep(), exact="both")},
    Drop: {"Drop": Variant(Drop(), exact="both")},  # under `WITHOUT_FIRST`
    BFloat16: {
        "BFloat16": Variant(BFloat16(), distance=BF16),
        "BFloat16 to nearest": Variant(BFloat16(stochastic=False), distance=BF16),
    },
    Quantized: {
        "Quantized": Variant(Quantized(), distance=CODE8),
        "Quantized to 4 bits": Variant(Quantized(bits=4, block=16), distance=CODE4),
    },
    CountSketch: {
        "CountSketch": Variant(CountSketch(compression=4)),
        "CountSketch of depth 1": Variant(CountSketch(compression=4, depth=1)),
        "CountSketch of depth 2": Variant(CountSketch(compression=4, depth=2)),
        "CountSketch lazy": Variant(CountSketch(compression=4, lazy=True)),
        "CountSketch of the paper": Variant(CountSketch(compression=4, update="paper"), kernel=False),
        "CountSketch exact": Variant(CountSketch(width=1000), exact="dense"),
        "CountSketch exact, lazy": Variant(CountSketch(width=1000, lazy=True), exact="both"),
        "CountSketch exact, of the paper": Variant(
            CountSketch(width=1000, update="paper"), exact="both", kernel=False
        ),
    },
    RowWise: {
        "RowWise": Variant(RowWise(), exact_vectors=True),
        "RowWise sketched": Variant(RowWise(compression=4)),
        "RowWise lazy": Variant(RowWise(lazy=True), exact_vectors=True),
    },
    SM3: {
        "SM3": Variant(SM3(), exact_vectors=True),
        "SM3-I": Variant(SM3("I"), exact_vectors=True, kernel=False),
        "SM3 with momentum": Variant(SM3(momentum=0.9)),
    },
    Factored: {
        "Factored": Variant(Factored(), exact_vectors=True),
        "Factored with a floor": Variant(Factored(floor=2.0)),
    },
    Halves: {
        "a codec of somebody else's": Variant(Halves(), distance=HALF, kernel=False),
        "a codec of somebody else's, with an option": Variant(Halves(relative=False), distance=HALF, kernel=False),
    },
}  # fmt: skip


def variants() -> dict[str, Variant]:
    """Every registered codec in its option sets; with its defaults where none are declared."""
    found: dict[str, Variant] = {}
    for name, cls in Codec.registry.items():
        found |= OPTION_SETS.get(cls) or {name: Variant(cls(), distance=1.0, kernel=None)}
    return found


VARIANTS = variants()
#: An optimizer without a rule, whose own step works on decoded states.
NADAM = "nadam"
#: Optimizer classes and their options.
FAMILIES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    name: (cls, options) for name, (_, cls, options) in RULES.items()
} | {NADAM: (NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True})}
_NO_BETA1, _NO_MOMENTUM = {"betas": (0.0, 0.999)}, {"momentum": 0.0}
#: Options under which torch does without the first moment, too.
WITHOUT_FIRST: dict[str, dict[str, Any]] = {
    "adam": _NO_BETA1, "adamw": _NO_BETA1, "sparse_adam": _NO_BETA1, "sgd": _NO_MOMENTUM,
    "rmsprop, momentum": {"momentum": 0.0, "centered": False}, "nesterov": {"momentum": 0.0, "nesterov": False},
}  # fmt: skip
#: The parts of a layer that one rank holds. A flat segment begins and ends inside a row.
LAYOUTS: dict[str, tuple[Shard, ...]] = {
    name: (SHARDS[name],) for name in ("whole", "row shard", "column shard", "vector")
} | {
    "flat segment": tuple(
        part.shard
        for part in layer_parts(
            LayerRecord("table", 7, (30, 8), {}, {}), NamedSegment("table", (30, 8), 0, 3 + 20 * 8 + 4, 3 * 8 + 5)
        )
    )
}
DENSITIES = ("dense", "sparse")


def excluded(variant: Variant, family: str, density: str = "", layout: str = "") -> str:
    """Why a combination makes no sense; nothing where it does."""
    if not any(_fits(variant.codec, state) for state in states_of(family)):
        return "the family has no state that the codec may hold"
    if family == "sparse_adam" and density == "dense":
        return "SparseAdam refuses dense gradients"
    if family == NADAM and not variant.codec.elementwise:
        return "an optimizer without a rule needs states that are stored by element"
    if family == NADAM and density == "sparse":
        return "NAdam refuses sparse gradients"
    if family == NADAM and layout != "whole":
        return "without a rule it is the optimizer that steps a part of a layer: tests/stock/test_distributed.py"
    if density == "sparse" and layout == "flat segment":
        return "engines that flatten parameters have dense gradients"
    if density == "sparse" and layout == "column shard":
        return "FSDP2, which cuts columns, makes gradients dense"
    if density == "sparse" and layout == "vector":
        return "sparse gradients are of tables"
    return ""


@functools.cache
def states_of(family: str) -> tuple[StateDef, ...]:
    """What the family keeps under its options."""
    cls, options = FAMILIES[family]
    optimizer = cls([torch.zeros(2, 2)], lr=0.1, **options)  # type: ignore[call-arg]
    return tuple(rule_of(optimizer).states(optimizer.param_groups[0]))


def _fits(codec: Codec, state: StateDef) -> bool:
    return not (codec.refuses_signed if state.signed else codec.refuses_unsigned)


@dataclass(frozen=True)
class Case:
    """One cell of the matrix: a codec, where it may be, and dense states beside it."""

    variant: str
    family: str
    density: str = "dense"
    layout: str = "whole"

    def __str__(self) -> str:
        return "-".join((self.variant, self.family, self.density, self.layout))

    @property
    def codec(self) -> Codec:
        return VARIANTS[self.variant].codec

    @property
    def moments(self) -> dict[str, Codec]:
        """Codecs by moment, ``first_moment`` and ``second_moment``, of those that the family has."""
        beside = Drop() if getattr(self.codec, "momentum", 0) else Keep()  # which is then the layer's first moment
        found: dict[str, Codec] = {}
        for state in states_of(self.family):
            moment = "first_moment" if state.signed else "second_moment"
            found[moment] = self.codec if _fits(self.codec, state) else beside
        return found

    @property
    def codecs(self) -> dict[str, Codec]:
        """Codecs by torch's name of the state."""
        moments = self.moments
        return {s.name: moments["first_moment" if s.signed else "second_moment"] for s in states_of(self.family)}

    @property
    def shards(self) -> tuple[Shard, ...]:
        return LAYOUTS[self.layout]

    @property
    def compresses(self) -> bool:
        """Whether anything is stored otherwise than torch does."""
        return any(not isinstance(codec, Keep) for codec in self.moments.values())

    @property
    def kernel(self) -> bool | None:
        """Whether compiled kernels take its steps in float32."""
        kept = self.moments.get("first_moment") != Drop()  # what RMSprop is centered by, and its momentum
        if (self.family == "rmsprop, momentum" and kept) or (
            isinstance(self.codec, Quantized) and self.layout == "vector"
        ):
            return False
        return VARIANTS[self.variant].kernel

    def optimizer(self, params: Any, **options: Any) -> Optimizer:
        """torch's own, as the family has it."""
        cls, fixed = FAMILIES[self.family]
        return cls(params, lr=0.1, **fixed | options)  # type: ignore[call-arg]

    def converted(self, weight: Tensor, **options: Any) -> tuple[nn.Module, Any]:
        """A model of that one parameter, and its converted optimizer."""
        model = nn.ParameterDict({"weight": nn.Parameter(weight.clone(memory_format=torch.preserve_format))})
        return model, compress(self.optimizer(model.parameters()), model, self.policy, **options)

    @property
    def policy(self) -> Policy:
        return Policy([Rule(name="*", **self.moments)])

    def part(self, shard: Shard, dtype: torch.dtype = torch.float32) -> Part:
        """A part of a layer, of the same random parameters in any dtype."""
        first, second = self.moments.get("first_moment"), self.moments.get("second_moment", Keep())
        return Part.make(self.family, first, second, shard, dtype)

    def gradients(self, shard: Shard, steps: int = 3) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Values, and ids of their rows where they are sparse: of all rows first, so that all have states."""
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            rows: Tensor | None = None
            if self.density == "sparse":
                touched = shard.local_rows if step == 0 else (shard.local_rows + 1) // 2
                rows = torch.randperm(shard.local_rows, generator=generator)[:touched].sort().values
            shape = shard.local_shape if rows is None else (len(rows), *shard.row_shape)
            yield torch.randn(shape, generator=generator), rows


def matrix(*densities: str, layouts: tuple[str, ...] = ("whole",)) -> list[Case]:
    """All cells that make sense."""
    return [
        Case(*cell)
        for cell in itertools.product(VARIANTS, FAMILIES, densities, layouts)
        if not excluded(VARIANTS[cell[0]], *cell[1:])
    ]


#: Of parts of layers, which rules step.
PARTS = [case for case in matrix(*DENSITIES, layouts=tuple(LAYOUTS)) if case.family != NADAM]
#: Of whole optimizers; where nothing is compressed, they are torch's.
OPTIMIZERS = [case for case in matrix(*DENSITIES) if case.compresses]


def every(cases: list[Case], such: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrize by ``case``."""
    return pytest.mark.parametrize("case", [case for case in cases if such(case)], ids=str)


def give(model: nn.Module, gradient: tuple[Tensor, Tensor | None]) -> None:
    """Set the gradient of the model's one parameter: dense, or sparse and in another order than its rows."""
    values, rows = gradient
    weight = model.weight
    if rows is None:
        weight.grad = values.to(weight.dtype)
        return
    weight.grad = torch.sparse_coo_tensor(
        rows.flip(0)[None], values.flip(0).to(weight.dtype), weight.shape, check_invariants=True
    )
