"""Which kernels step the layers of one key, with which tiles."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_sketch.kernels.capture import capturing
from lightning_sketch.kernels.fields import Kind
from lightning_sketch.kernels.triton.apply import apply
from lightning_sketch.kernels.triton.columns import finish_factored, finish_sm3, reduce_columns
from lightning_sketch.kernels.triton.device_numbers import hold
from lightning_sketch.kernels.triton.insert import hash_rows, insert
from lightning_sketch.kernels.triton.jit import OPTIONS, WIDE_OPTIONS
from lightning_sketch.kernels.triton.layout import (
    GROUP,
    SPAN,
    TILE_COLUMNS,
    TILE_FINISH,
    TILE_HASH,
    TILE_SKETCH,
    Key,
    ceil,
)
from lightning_sketch.kernels.triton.observe import observe, settle
from lightning_sketch.kernels.triton.orders import Sorting
from lightning_sketch.kernels.triton.quantized import hash_columns
from lightning_sketch.kernels.triton.row_sketch import add_rows, fold_rows
from lightning_sketch.kernels.triton.table import COUNT


class Launched(Protocol):
    """Layers with one key, one behind the other in a table; see `host_table.Group`."""

    begin: int
    count: int
    programs: dict[str, int]
    sorted: tuple[Sorting | None, Sorting | None]


def launch_observe(key: Key, table: Tensor, group: Launched) -> None:
    """The launches of the layers with one key before anything changes; arguments as in `launch`."""
    count, programs, words, search = group.count, group.programs, table[group.begin * COUNT :], _search(group)
    common = _common(key, search)
    if key.observed:
        rows, columns = key.observe_tile
        seen = common | {
            "KIND": int(key.summed),
            "DEPTH": key.second_depth if key.summed == Kind.ROW_SKETCH else 0,
            "BLOCK_ROWS": key.block_rows,
            "TILE_ROWS": rows,
            "TILE_COLUMNS": columns,
            **_hashed(key),
        }
        options = OPTIONS | {"num_warps": key.observe_warps}
        observe[(programs["observe"],)](words, count, **seen, ONE_CHUNK=key.one_chunk, **options)
        if not key.one_chunk:
            settle[(programs["settle"],)](words, count, **seen, **OPTIONS)
    if key.summed == Kind.FACTORED:
        reduce_columns[(programs["reduce"],)](
            words, count, GROUP=GROUP, SEARCH=search, TILE_ROWS=16, TILE_COLUMNS=TILE_COLUMNS, **WIDE_OPTIONS
        )


def launch(key: Key, table: Tensor, group: Launched) -> None:
    """All launches of the layers with one key.

    Args:
        table: words of all layers, int64 ``[layers * COUNT]``.
    """
    count, programs, words, search = group.count, group.programs, table[group.begin * COUNT :], _search(group)
    common = _common(key, search)
    launch_observe(key, table, group)
    if key.summed == Kind.ROW_SKETCH:
        add_rows[(programs["add"],)](
            words,
            count,
            DEPTH=key.second_depth,
            SPARSE=key.sparse,
            SEARCH=search,
            TILE_ROWS=TILE_SKETCH,
            **OPTIONS,
        )
        fold_rows[(programs["fold"],)](words, count, DEPTH=key.second_depth, SEARCH=search, TILE=TILE_SKETCH, **OPTIONS)
    if key.second == Kind.FACTORED:
        finish_factored[(count,)](words, count, HELD=key.held, GROUP=GROUP, TILE=1024, **WIDE_OPTIONS)
    for into_second, into_first, depth in key.insertions:
        _insert(key, group, words, common, into_second, into_first, depth)
    if key.quantized and not key.observed:
        hash_columns[(programs["hash_columns"],)](
            words, count, **_hashed(key), SEARCH=search, TILE=TILE_HASH, **OPTIONS
        )
    rows, columns = key.apply_tile
    apply[(programs["apply"],)](
        words,
        count,
        SECOND_KIND=int(key.second),
        FIRST_KIND=int(key.first),
        MOMENTUM_KIND=int(key.momentum),
        SECOND_HALF=key.second_half,
        FIRST_HALF=key.first_half,
        MOMENTUM_HALF=key.momentum_half,
        SECOND_DEPTH=key.second_depth,
        FIRST_DEPTH=key.first_depth,
        SECOND_BLOCK=key.second_block,
        FIRST_BLOCK=key.first_block,
        **common,
        BOUNDED=key.bounded,
        NESTEROV_USED=key.nesterov,
        COLUMNS_USED=key.columns_used,
        OBSERVED=key.observed,
        HELD=key.held,
        BY_ROWS=key.by_rows,
        AT_ONCE=key.at_once,
        SPAN=SPAN if key.split else 0,
        TILE_ROWS=rows,
        TILE_COLUMNS=columns,
        **(OPTIONS | {"num_warps": key.apply_warps}),
    )
    if key.columns_used:
        finish_sm3[(programs["finish"],)](words, count, SEARCH=search, TILE=TILE_FINISH, **OPTIONS)


def _search(group: Launched) -> int:
    """Steps in which a program finds its layer: few values, each of which is compiled."""
    return 0 if group.count == 1 else -(-(group.count - 1).bit_length() // 3) * 3


def _common(key: Key, search: int) -> dict[str, Any]:
    return {
        "HALF": key.half,
        "SPARSE": key.sparse,
        "DECAYED": key.decayed,
        "LEAVE_OUT": key.leave_out,
        "ALIGNED": key.aligned,
        "SEARCH": search,
    }


def _hashed(key: Key) -> dict[str, bool]:
    """Of which states, which have codes, columns are hashed."""
    return {"HASH_SECOND": key.second == Kind.QUANTIZED, "HASH_FIRST": key.first == Kind.QUANTIZED}


def _insert(
    key: Key, group: Launched, words: Tensor, common: dict[str, Any], into_second: bool, into_first: bool, depth: int
) -> None:
    """Insert rows into one or both states' sketches, in two launches at most, and a sort where no order was kept."""
    count, sketch = group.count, "second" if into_second else "first"
    rows = group.sorted[0 if into_second else 1]
    assert rows is not None
    for begin, end in rows.runs():  # hashing would overwrite an order that was kept
        hash_rows[(sum(ceil(order.of[0], TILE_SKETCH) for order in rows.orders[begin:end]),)](
            words[begin * COUNT :],
            end - begin,
            OF_SECOND=into_second,
            DEPTH=depth,
            SPARSE=key.sparse,
            SEARCH=common["SEARCH"],
            TILE_ROWS=TILE_SKETCH,
            **OPTIONS,
        )
    rows.sort(0 if into_second else 1)
    if capturing():
        hold(*(tensor for order in rows.orders for tensor in order.batch.tensors()))
    slots, columns = key.insert_tile
    insert[(group.programs[f"insert_{sketch}"],)](
        words,
        count,
        INTO_SECOND=into_second,
        INTO_FIRST=into_first,
        **common,
        BY_BUCKET=key.by_bucket,
        TILE_SLOTS=slots,
        TILE_COLUMNS=columns,
        **OPTIONS,
    )
