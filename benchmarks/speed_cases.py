"""The races: what steps what. A function for each group of rows, which share their parameters and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, SparseAdam

import lightning_sketch as ls
from benchmarks.roofline import dense_bytes, sparse_bytes
from benchmarks.speed_measure import Contestant

LR = 1e-4
#: "propagate" looks at a gradient no more than torch does; "raise", the default, leaves out rows that are not finite.
NonFinite = Literal["propagate", "raise"]
NONFINITE: tuple[NonFinite, ...] = ("propagate", "raise")
GRADIENTS = 8  # of sparse races, with other rows each
LINE = 64  # bytes of a cache line: what a random access moves
SKETCH_SHARE = 4 / 20  # bytes per element of a float32 CountSketch at 20x


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    dense: tuple[int, int] = (65_536, 1_024)
    peers: tuple[int, int] = (16_384, 1_024)
    sparse: tuple[int, int] = (1_000_000, 64)
    touched: int = 20_000
    small_layers: tuple[int, int] = (200, 256)
    sharded: tuple[int, int, int] = (16_384, 1_024, 16)  # rows of a table, columns, further square layers
    offloaded: tuple[int, int, int] = (131_072, 640, 12)  # rows and columns of a table, decoder blocks
    tables: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 100_000_000)
    table_columns: int = 16
    bandwidth: int = 1 << 26
    cold_repeats: int = 3
    rounds: Mapping[str, int] = field(default_factory=lambda: {"dense": 15, "sparse": 40, "peers": 7})


FULL = Sizes()
QUICK = Sizes(  # to see that everything runs; the figures mean nothing
    dense=(1_024, 1_024),
    peers=(1_024, 256),
    sparse=(20_000, 64),
    touched=500,
    small_layers=(20, 64),
    sharded=(512, 64, 2),
    offloaded=(10_240, 64, 2),
    tables=(10_000, 100_000),
    bandwidth=1 << 20,
    cold_repeats=1,
    rounds={"dense": 3, "sparse": 4, "peers": 2},
)


@dataclass(frozen=True)
class Codecs:
    """Codecs of the two moments, and what a float32 step with them moves.

    Args:
        first: ``None`` for optimizers without a first moment.
        state: bytes per element of a dense step, read and written.
        row_state: bytes per touched row of 64 columns of a sparse step.
        passes: over the gradient.
        rows_first: whether rows that are not finite are found in a pass of their own, before others share their sums.
    """

    label: str
    second: ls.Codec
    first: ls.Codec | None = None
    state: float = 0.0
    row_state: float = 0.0
    passes: int = 1
    rows_first: bool = False

    def looks(self, check: bool) -> bool:
        """Whether a step with or without the check reads the gradient once more for it."""
        return check and self.rows_first

    def rule(self, **selectors: Any) -> ls.Rule:
        """The policy's rule for the layers that `selectors` match."""
        return ls.Rule(**selectors, first_moment=self.first, second_moment=self.second)


_DROP, _BF16, _CS = ls.Drop(), ls.BFloat16(), ls.CountSketch(compression=20)
_CS_STATE, _CS_ROW = 3 * SKETCH_SHARE, 3 * 3 * 4 * 64  # depth 3: each bucket read and written, then read
DENSE = {
    "rw": Codecs("RowWise", ls.RowWise(), _DROP),
    "sm3": Codecs("SM3-II", ls.SM3(), _DROP),
    "factored": Codecs("Factored", ls.Factored(), _DROP, passes=2),
    "floored": Codecs("Factored(floor=1)", ls.Factored(floor=1.0), _DROP, passes=2),
    "rw10": Codecs("RowWise in a 10x sketch", ls.RowWise(compression=10), _DROP, passes=2),
    "rw_bf16": Codecs("RowWise, bf16 first moment", ls.RowWise(), _BF16, state=4),
    "sm3_bf16": Codecs("SM3-II, bf16 first moment", ls.SM3(), _BF16, state=4),
    "factored_bf16": Codecs("Factored, bf16 first moment", ls.Factored(), _BF16, state=4, passes=2),
    "8bit_both": Codecs("8 bits of both moments", ls.Quantized(), ls.Quantized(), state=4),
    "factored_8bit": Codecs("Factored, first moment in 8 bits", ls.Factored(), ls.Quantized(), state=2, passes=2),
    "cs20_both": Codecs("CountSketch 20x, both moments", _CS, _CS, state=2 * _CS_STATE, rows_first=True),
}
SPARSE = {
    "rw": Codecs("RowWise", ls.RowWise(), _DROP, row_state=2 * LINE),
    "floored": Codecs("Factored(floor=1)", ls.Factored(floor=1.0), _DROP, row_state=2 * LINE, passes=2),
    "rw10": Codecs("RowWise in a 10x sketch", ls.RowWise(compression=10), _DROP, row_state=9 * LINE, passes=2),
    "cs20": Codecs("CountSketch 20x, no first moment", _CS, _DROP, row_state=_CS_ROW, passes=2, rows_first=True),
    "cs20_both": Codecs("CountSketch 20x, both moments", _CS, _CS, row_state=2 * _CS_ROW, passes=2, rows_first=True),
}


def dense(sizes: Sizes) -> list[Contestant]:
    """AdamW over one float32 table."""
    return dense_race(sizes.dense, DENSE)


def bf16(sizes: Sizes) -> list[Contestant]:
    """AdamW over one table of bfloat16 parameters and gradients."""
    return dense_race(sizes.dense, {key: DENSE[key] for key in ("rw", "sm3")}, torch.bfloat16)


def dense_race(
    shape: tuple[int, int], codecs: Mapping[str, Codecs], dtype: torch.dtype = torch.float32
) -> list[Contestant]:
    """Fused AdamW, and AdamW under each of `codecs` without and with the check."""
    exact = dense_bytes(dtype.itemsize, state=4 * dtype.itemsize)
    return _dense_race(shape, codecs, AdamW, ("adamw", "AdamW(fused=True)"), exact, dtype)


def adagrad(sizes: Sizes) -> list[Contestant]:
    """Adagrad over one float32 table."""
    codecs = {"sm3": Codecs("SM3-II", ls.SM3()), "rw": Codecs("RowWise", ls.RowWise())}
    return _dense_race(sizes.dense, codecs, Adagrad, ("adagrad", "Adagrad(fused=True)"), dense_bytes(4, state=8))


def _dense_race(
    shape: tuple[int, int],
    codecs: Mapping[str, Codecs],
    make: Any,
    exact: tuple[str, str],
    exact_bytes: float,
    dtype: torch.dtype = torch.float32,
) -> list[Contestant]:
    table, gradients, numel = _table(shape, dtype), [[torch.randn(shape).to(dtype)]], shape[0] * shape[1]

    def moved(chosen: Codecs, check: bool) -> float:
        return numel * dense_bytes(dtype.itemsize, state=chosen.state, passes=chosen.passes, check=chosen.looks(check))

    key, label = exact
    fused = make(table.parameters(), lr=LR, fused=True)
    first = Contestant(key, label, fused, gradients, numel * exact_bytes, key, keep=table)
    # What remains of a step without any states.
    plain, plain_bytes = SGD(table.parameters(), lr=LR, fused=True), numel * dense_bytes(dtype.itemsize, state=0)
    bare = Contestant("sgd", "SGD(fused=True)", plain, gradients, plain_bytes, key, keep=table)
    return [first, bare, *_compressed(codecs, make, table, gradients, moved, key)]


def sparse(sizes: Sizes) -> list[Contestant]:
    """SparseAdam, other rows at every step; coalesced beforehand."""
    gradients = [[row_gradient(*sizes.sparse, sizes.touched)] for _ in range(GRADIENTS)]
    return _sparse_race(sizes, SparseAdam, "sparse_adam", "SparseAdam", SPARSE, gradients)


def sparse_uncoalesced(sizes: Sizes) -> list[Contestant]:
    """SparseAdam, with gradients as ``nn.Embedding(sparse=True)`` makes them: unsorted, with duplicates."""
    rows, columns = sizes.sparse
    gradients = []
    for _ in range(GRADIENTS):
        # A few tokens are frequent, as in text.
        tokens = (torch.rand(sizes.touched).pow(3) * rows).long()
        values = torch.randn(sizes.touched, columns)
        gradients.append([torch.sparse_coo_tensor(tokens[None], values, (rows, columns), check_invariants=False)])
    chosen = {key: SPARSE[key] for key in ("rw", "floored", "cs20")}
    return _sparse_race(sizes, SparseAdam, "sparse_adam", "SparseAdam", chosen, gradients)


def sparse_adagrad(sizes: Sizes) -> list[Contestant]:
    """Adagrad with sparse gradients."""
    gradients = [[row_gradient(*sizes.sparse, sizes.touched)] for _ in range(GRADIENTS)]
    chosen = {key: replace(SPARSE[key], first=None) for key in ("rw", "floored")}
    return _sparse_race(sizes, Adagrad, "adagrad", "Adagrad", chosen, gradients)


def _sparse_race(
    sizes: Sizes,
    make: Any,
    key: str,
    label: str,
    codecs: Mapping[str, Codecs],
    gradients: Sequence[Sequence[Tensor]],
) -> list[Contestant]:
    columns, table = sizes.sparse[1], _table(sizes.sparse)

    def moved(chosen: Codecs, check: bool) -> float:
        return sizes.touched * sparse_bytes(
            columns, state=chosen.row_state, passes=chosen.passes, check=chosen.looks(check)
        )

    exact_state = 4 * columns * (4 if make is SparseAdam else 2)  # each moment read and written
    exact_bytes = sizes.touched * sparse_bytes(columns, state=exact_state)
    first = Contestant(key, label, make(table.parameters(), lr=LR), gradients, exact_bytes, key, keep=table)
    return [first, *_compressed(codecs, make, table, gradients, moved, key)]


def _compressed(
    codecs: Mapping[str, Codecs],
    make: Any,
    table: nn.Embedding,
    gradients: Sequence[Sequence[Tensor]],
    moved: Callable[[Codecs, bool], float],
    against: str,
) -> list[Contestant]:
    """An optimizer of the class `make` under each of `codecs`, with nothing and with rows left out."""
    return [
        Contestant(
            key,
            chosen.label,
            converted(make(table.parameters(), lr=LR), table, chosen, nonfinite),
            gradients,
            moved(chosen, nonfinite == "raise"),
            against,
            nonfinite,
            keep=table,
        )
        for key, chosen in codecs.items()
        for nonfinite in NONFINITE
    ]


def small_layers(sizes: Sizes) -> list[Contestant]:
    """Many small Linear layers; a fifth each is kept, and under four kinds of states. Biases are kept."""
    count, width = sizes.small_layers
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(count)])
    gradients = [[torch.randn_like(param) for param in model.parameters()]]
    mixed = {  # by the last digit of the layer's number; 0 and 5 are kept
        "[16]": DENSE["rw"],
        "[27]": DENSE["sm3"],
        "[38]": DENSE["factored_bf16"],
        "[49]": Codecs("BFloat16, both moments", _BF16, _BF16, state=8),
    }
    policy = ls.Policy([chosen.rule(name=rf"re:{digits}\.weight$") for digits, chosen in mixed.items()])
    exact = dense_bytes(4, state=16)
    numel = sum(param.numel() for param in model.parameters())
    weights = count * width * width

    def moved(check: bool) -> float:
        own = [dense_bytes(4, state=c.state, passes=c.passes, check=c.looks(check)) for c in mixed.values()]
        return (weights * sum([*own, exact]) / (1 + len(mixed))) + (numel - weights) * exact

    fused = AdamW(model.parameters(), lr=LR, fused=True)
    entries = [Contestant("adamw", "AdamW(fused=True)", fused, gradients, numel * exact, "adamw", keep=model)]
    for nonfinite in NONFINITE:
        own = ls.compress(AdamW(model.parameters(), lr=LR, fused=True), model, policy, nonfinite=nonfinite)
        bound = moved(nonfinite == "raise")
        entries.append(Contestant("mixed", "mixed policy", own, gradients, bound, "adamw", nonfinite, keep=model))
    return entries


def tables(sizes: Sizes) -> list[Contestant]:
    """The same number of rows touched in ever larger tables; each is measured against itself in the smallest one."""
    columns, entries = sizes.table_columns, []
    smallest = sizes.tables[0]
    # Buckets of 16 floats are one cache line: three of them, read and written, then read.
    codecs = {"rw": (SPARSE["rw"], 2 * LINE), "cs20": (SPARSE["cs20"], 9 * LINE)}
    for rows in sizes.tables:
        if _available() < 1.5 * (4 * rows * columns):
            print(f"  a table of {rows:,} rows does not fit into memory: left out")
            continue
        # Memory that was never written takes no room until its pages are touched, so not torch.zeros.
        table = nn.Embedding(rows, columns, sparse=True, _weight=torch.empty(rows, columns))
        gradients = [[row_gradient(rows, columns, min(sizes.touched, rows // 2))] for _ in range(GRADIENTS)]
        for key, (chosen, state) in codecs.items():
            moved = gradients[0][0]._nnz() * sparse_bytes(columns, state=state, passes=chosen.passes)
            optimizer = converted(SparseAdam(table.parameters(), lr=LR), table, chosen, "propagate")
            label = f"{chosen.label.split(',')[0]}, {rows:,} rows"
            against = f"{key}_{smallest}/propagate"
            name = f"{key}_{rows}"
            entries.append(Contestant(name, label, optimizer, gradients, moved, against, "propagate", keep=table))
    return entries


def converted(optimizer: Optimizer, table: nn.Module, codecs: Codecs, nonfinite: NonFinite) -> Optimizer:
    """An optimizer of a table, compressed."""
    policy = ls.Policy([codecs.rule(role="embedding")])
    return ls.compress(optimizer, table, policy, nonfinite=nonfinite)


def row_gradient(rows: int, columns: int, touched: int) -> Tensor:
    """A coalesced gradient of `touched` random rows."""
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < touched:
        found = torch.cat([found, torch.randint(rows, (2 * touched,))]).unique()  # type: ignore[no-untyped-call]
    ids = found[torch.randperm(found.numel())[:touched]].sort().values
    return torch.sparse_coo_tensor(
        ids[None], torch.randn(touched, columns), (rows, columns), is_coalesced=True, check_invariants=False
    )


def _table(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Embedding:
    return nn.Embedding(*shape, _weight=torch.zeros(shape, dtype=dtype))


def _available() -> int:
    """Bytes of memory that may still be used; without end where the system does not say."""
    try:
        with open("/proc/meminfo") as meminfo:
            return next(1024 * int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
    except OSError:  # not Linux
        return 1 << 62
