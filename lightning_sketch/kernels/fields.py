"""What a step of one layer is made of, listed once: kinds of states, and the fields of a state and of a step.

The structures that the C library reads (`c_header`, written when it is compiled), what Python packs into them
(kernels/cpu.py) and the words that Triton's kernels read (kernels/triton/table.py) are made from these lists. This file
needs nothing but Python: it is read before torch is installed.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import NamedTuple

#: Of the C library's functions. To be raised when one of them is changed; the structures need no number.
INTERFACE = 8


class DType(IntEnum):
    """dtype of a parameter, a gradient or a state in C."""

    FLOAT32 = 0
    BFLOAT16 = 1


class Kind(IntEnum):
    """How a state is stored. Below, `true` is what the state means; x is the gradient or its square."""

    NONE = 0
    DENSE = 1  # true, shaped like the parameter
    STOCHASTIC = 2  # the same in bfloat16, rounded stochastically
    SCALED = 3  # true / scale, shaped like the parameter
    ROW = 4  # true / scale of each row
    ROW_SKETCH = 5  # true / scale, [depth, width] row scalars
    SM3 = 6  # rows: true / scale; columns: true
    FACTORED = 7  # rows and columns: true / scale
    SKETCH = 8  # true / scale, [depth, width, *row_shape]
    QUANTIZED = 9  # codes of 8 or 4 bits, rounded stochastically; columns: the largest magnitude of every block


#: The states of a step, and the kinds that kernels take there. Every other kind is refused, by C and by Triton.
STATES: dict[str, frozenset[Kind]] = {
    "second": frozenset(Kind),
    "first": frozenset({Kind.NONE, Kind.DENSE, Kind.STOCHASTIC, Kind.SCALED, Kind.SKETCH, Kind.QUANTIZED}),
    "momentum": frozenset({Kind.NONE, Kind.DENSE, Kind.STOCHASTIC, Kind.SCALED}),
}


class Source(Enum):
    """Who says what is in a field."""

    LAYOUT = "how the layer is laid out"  # the same at every step
    STEP = "the step"
    DRIVER = "the C library"  # while it works


class Field(NamedTuple):
    """A field of a structure in C.

    Args:
        name: there, in Python and of Triton's word.
        type: in C.
        source: who fills it. Those of one source lie together, in the order of `Source`.
        word: whether Triton reads it from the table of layers. What it does not read, it compiles into its kernels, or
            lays out otherwise.
        note: what it is.
    """

    name: str
    type: str
    source: Source
    word: bool
    note: str = ""

    @property
    def code(self) -> str:
        """Its type in a format of `struct`."""
        return _CODES.get(self.type, "q")  # pointers, in place of which Python packs positions

    @property
    def is_float(self) -> bool:
        return self.type == "float"

    @property
    def is_address(self) -> bool:
        return self.type.endswith("*")


_CODES = {"int32_t": "i", "int64_t": "q", "uint64_t": "Q", "float": "f"}

#: s <- decay * s + weight * x. Where values are stored divided by `scale`, decay is in the scale and weight is divided
#: by it already. ROW, ROW_SKETCH and FACTORED with a weight of 0 hold this step already, so no sums are made.
STATE = (
    Field("kind", "int32_t", Source.LAYOUT, False, "a Kind"),
    Field("dtype", "int32_t", Source.LAYOUT, False, "a DType; of codes 0"),
    Field("is_signed", "int32_t", Source.LAYOUT, False, "whether a sketch or codes have signs"),
    Field("depth", "int32_t", Source.LAYOUT, False, "of a sketch; bits of a code (QUANTIZED)"),
    Field("data", "void*", Source.STEP, True, "what Kind says, for all rows of the parameter"),
    Field("columns", "float*", Source.STEP, True, "[columns] or null (SM3, FACTORED); [rows, blocks] (QUANTIZED)"),
    Field("width", "int64_t", Source.STEP, True, "of a sketch; elements of a block (QUANTIZED)"),
    Field("seed", "uint64_t", Source.STEP, True, "of the row hashes (sketches) or of the rounding noise"),
    Field("decay", "float", Source.STEP, True),
    Field("weight", "float", Source.STEP, True),
    Field("column_weight", "float", Source.STEP, True, "of the column sums (FACTORED); factor of the columns (SM3)"),
    Field("scale", "float", Source.STEP, True),
    Field("floor", "float", Source.STEP, True, "times the mean of all rows is added to each (FACTORED)"),
    Field("scratch", "void*", Source.DRIVER, False),
)

#: A step of one layer, without its states.
STEP = (
    Field("row_offset", "int64_t", Source.LAYOUT, True, "of this shard in the whole parameter, for hashes"),
    Field("column_offset", "int64_t", Source.LAYOUT, True),
    Field("param", "void*", Source.STEP, True),
    Field("grad", "const void*", Source.STEP, True),
    Field("ids", "const int64_t*", Source.STEP, True, "[rows], local row ids; null: all rows in order"),
    Field("left_out", "int64_t*", Source.STEP, False, "where rows (or elements, see leave_out) are counted"),
    Field("rows", "int64_t", Source.STEP, True, "of the gradient"),
    Field("columns", "int64_t", Source.STEP, True, "elements of a row"),
    Field("dtype", "int32_t", Source.STEP, False, "of param and grad"),
    Field("all_rows", "int32_t", Source.STEP, True, "whether every row of the parameter is in the gradient"),
    Field("maximize", "int32_t", Source.STEP, False),
    Field("use_bound", "int32_t", Source.STEP, False, "whether m is clamped"),
    Field("lr", "float", Source.STEP, True),
    Field("decay_factor", "float", Source.STEP, True, "of the parameter: 1 - lr * decoupled weight decay"),
    Field("eps", "float", Source.STEP, True),
    Field("weight_decay", "float", Source.STEP, True, "coupled"),
    Field("correction", "float", Source.STEP, True, "update = m / (sqrt(v) * correction + eps)"),
    Field("bound", "float", Source.STEP, True, "clamp m to bound * sqrt(v)"),
    Field("nesterov", "float", Source.STEP, True, "0, or the momentum factor"),
    Field("leave_out", "int32_t", Source.STEP, False, "rows that are not finite; elements where no state has rows"),
    Field("sums", "float*", Source.DRIVER, False, "of squares: means of all rows, padded, then partial column sums"),
    Field("left", "uint8_t*", Source.DRIVER, False, "[rows], 1 where a row was found that is left out; or null"),
    Field("wave", "int64_t", Source.DRIVER, False, "first of the rows whose order by bucket is in memory"),
)


def part(fields: Sequence[Field], source: Source) -> tuple[struct.Struct, int]:
    """How the fields of one source are packed, and at which byte of the structure they begin."""
    before = "".join(f.code for f in fields[: _first(fields, source)])
    mine = [f for f in fields if f.source == source]
    at = struct.calcsize(f"@{before}0{mine[0].code}")  # after what aligns the first
    return struct.Struct("@" + "".join(f.code for f in mine)), at


def size(fields: Sequence[Field]) -> int:
    """Bytes of the structure, as an element of an array."""
    return struct.calcsize("@" + "".join(f.code for f in fields) + "0q")


def offset(fields: Sequence[Field], name: str) -> int:
    """At which byte of the structure a field begins."""
    at = [f.name for f in fields].index(name)
    return struct.calcsize("@" + "".join(f.code for f in fields[:at]) + f"0{fields[at].code}")


def step_size() -> int:
    """Bytes of a step of one layer with its states."""
    return size(STEP) + len(STATES) * size(STATE)


def state_offset(number: int) -> int:
    """At which byte of a step one of its states begins."""
    return size(STEP) + number * size(STATE)


def _first(fields: Sequence[Field], source: Source) -> int:
    return next(i for i, f in enumerate(fields) if f.source == source)


@functools.cache
def version() -> int:
    """A number that is another one for other structures, kinds or functions."""
    return zlib.crc32(_declarations().encode()) >> 1


def c_header() -> str:
    """The declarations in C++."""
    return f"""// Made from lightning_sketch/kernels/fields.py when the library is compiled.
#pragma once

#include <cstddef>
#include <cstdint>

{_declarations()}
constexpr int VERSION = {version()};
"""


def _declarations() -> str:
    masks = "\n".join(
        f"constexpr uint32_t {name.upper()}_KINDS = {sum(1 << kind for kind in kinds)};"
        for name, kinds in STATES.items()
    )
    checks = [f'static_assert(sizeof(State) == {size(STATE)}, "");']
    checks += [f'static_assert(sizeof(StepArgs) == {step_size()}, "");']
    for structure, fields in (("State", STATE), ("StepArgs", STEP)):
        checks += [f'static_assert(offsetof({structure}, {f.name}) == {offset(fields, f.name)}, "");' for f in fields]
    return "\n".join(
        [
            f"// Interface {INTERFACE}.",
            *_enum("DType", DType),
            *_enum("Kind", Kind),
            masks,
            *_struct("State", STATE, ""),
            *_struct("StepArgs", STEP, f"    State {', '.join(STATES)};"),
            *checks,
            "",
        ]
    )


def _enum(name: str, members: type[IntEnum]) -> list[str]:
    return [f"enum {name} : int32_t {{", *(f"    {member.name} = {int(member)}," for member in members), "};", ""]


def _struct(name: str, fields: Sequence[Field], last: str) -> list[str]:
    lines = [f"    {f.type} {f.name};" + (f"  // {f.note}" if f.note else "") for f in fields]
    return [f"struct {name} {{", *lines, *([last] if last else []), "};", ""]
