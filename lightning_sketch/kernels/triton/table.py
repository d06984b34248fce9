"""The table of layers that kernels read: a row of 64-bit words for each layer, in device memory.

A word is an address, an integer, or a float32 in its lower half. One launch serves all layers in the table: a program
finds its layer by the numbers of the first programs of all layers, which are words, too.
"""

from __future__ import annotations

import struct

import triton.language as tl

from lightning_sketch.kernels.fields import STATE, STATES, STEP
from lightning_sketch.kernels.triton.jit import inlined

# Words are the fields of `fields` that kernels read, and others of these kernels alone; numbers are float32, all others
# int64.
STATE_WORDS = tuple(field.name for field in STATE if field.word)
STATE_FLOATS = tuple(field.name for field in STATE if field.word and field.is_float)
HEAD = tuple(field.name for field in STEP if field.word and not field.is_float)
RULE = tuple(field.name for field in STEP if field.word and field.is_float)
_DERIVED = ("sign", "of_column", "of_scale")  # of maximize, columns and the second state's scale
SCRATCH = ("count", "means", "row_sums", "partials", "groups", "shape", "hashes", "largest", "sums", "exponents")
# Rows by bucket of a sketch: `orders.Order`.
_ORDER = ("order", "edges", "keys", "entry", "key", "rows")
#: Kernels whose programs are numbered through all layers.
PROGRAMS = (
    *("observe", "settle", "add", "fold", "reduce", "finish", "apply"),
    *("hash_second", "hash_first", "insert_second", "insert_first"),
    "hash_columns",
)
NAMES = (
    *HEAD,
    *(f"{state}_{word}" for state in STATES for word in STATE_WORDS),
    *RULE,
    *_DERIVED,
    *SCRATCH,
    *(f"{state}_{word}" for state in ("second", "first") for word in _ORDER),
    *(f"{kernel}_program" for kernel in PROGRAMS),
    "splits",
    "chunks",
)
FLOATS = {*RULE, *_DERIVED, *(f"{state}_{word}" for state in STATES for word in STATE_FLOATS)}
_SEEDS = {f"{state}_seed" for state in STATES}
ROW = struct.Struct("<" + "".join("f4x" if name in FLOATS else "Q" if name in _SEEDS else "q" for name in NAMES))
#: Words of a layer. A multiple of 16 bytes, so that a part of the table is aligned as the table is.
COUNT = len(NAMES) + len(NAMES) % 2
PADDING = bytes(8 * COUNT - ROW.size)


def _word(name: str) -> tl.constexpr:
    return tl.constexpr(NAMES.index(name))


WORDS = tl.constexpr(COUNT)
SCRATCH_WORDS = tl.constexpr(len(SCRATCH))  # from LEFT_OUT on
PARAM, GRAD, IDS, ROWS, COLUMNS = map(_word, ("param", "grad", "ids", "rows", "columns"))
ROW_OFFSET, COLUMN_OFFSET, ALL_ROWS = map(_word, ("row_offset", "column_offset", "all_rows"))
SPLITS, CHUNKS = map(_word, ("splits", "chunks"))
SECOND, FIRST, MOMENTUM = map(_word, ("second_data", "first_data", "momentum_data"))
# Of a state, from its first word.
STATE_COLUMNS, WIDTH, SEED, DECAY, WEIGHT, COLUMN_WEIGHT, SCALE, FLOOR = (
    tl.constexpr(STATE_WORDS.index(word)) for word in ("columns", *STATE_WORDS[2:])
)
LR, DECAY_FACTOR, EPS, WEIGHT_DECAY = map(_word, ("lr", "decay_factor", "eps", "weight_decay"))
CORRECTION, BOUND, NESTEROV, SIGN = map(_word, ("correction", "bound", "nesterov", "sign"))
# One over the number of columns, and over the second state's scale.
OF_COLUMN, OF_SCALE = map(_word, ("of_column", "of_scale"))
LEFT_OUT, MEANS, ROW_SUMS, PARTIALS, GROUPS = map(_word, ("count", "means", "row_sums", "partials", "groups"))
SHAPE, HASHES, LARGEST, SUMS, EXPONENTS = map(_word, ("shape", "hashes", "largest", "sums", "exponents"))
SECOND_SORTED, FIRST_SORTED = map(_word, ("second_order", "first_order"))
# Of rows by bucket, from their first word; rows as ROWS, but never 0 for a step that is to change nothing.
EDGES, KEYS, ENTRY, KEY, SORTED = map(tl.constexpr, range(1, 6))
OBSERVE, SETTLE, ADD, FOLD, REDUCE, FINISH, APPLY, HASH_SECOND, HASH_FIRST, INSERT_SECOND, INSERT_FIRST, HASH = (
    _word(f"{kernel}_program") for kernel in PROGRAMS
)


@inlined
def find(
    words: tl.tensor, layers: tl.tensor, FIRST_PROGRAM: tl.constexpr, SEARCH: tl.constexpr, RUN: tl.constexpr = False
) -> tl.tuple:
    """Where the words of this program's layer begin, and this program's number within the layer (int64).

    Args:
        FIRST_PROGRAM: the word that numbers the layer's first program.
        SEARCH: steps of the binary search; ``2 ** SEARCH`` is at least the number of layers.
        RUN: whether there may be other layers before these.
    """
    program = tl.program_id(0)
    if RUN:
        program += tl.load(words + FIRST_PROGRAM)
    at = program * 0
    for step in tl.static_range(SEARCH):
        further = at + (1 << (SEARCH - 1 - step))
        first = tl.load(words + further * WORDS + FIRST_PROGRAM, mask=further < layers, other=1 << 62)
        at = tl.where(first <= program, further, at)
    layer = words + at * WORDS
    return layer, program - tl.load(layer + FIRST_PROGRAM)


@inlined
def number(layer: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """A float32 of a layer."""
    return tl.load(layer + WORD).to(tl.int32).to(tl.float32, bitcast=True)


@inlined
def values(layer: tl.tensor, WORD: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """A pointer to float32, or with HALF to bfloat16's bits (int16).

    Args:
        ALIGNED: whether the memory begins at a multiple of 16 bytes.
    """
    address = tl.load(layer + WORD)
    if HALF:
        found = address.to(tl.pointer_type(tl.int16))
    else:
        found = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@inlined
def numel_of_row(layer: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """The number of columns, int64; with ALIGNED a multiple of 8."""
    columns = tl.load(layer + COLUMNS)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    return columns


@inlined
def unaligned(layer: tl.tensor, WORD: tl.constexpr) -> tl.tensor:
    """A pointer to float32 anywhere."""
    return tl.load(layer + WORD).to(tl.pointer_type(tl.float32))
