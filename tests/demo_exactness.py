"""The demo's model under every engine against one process: measured, and as two tables of docs/sharding.md.

``python -m tests.exactness`` writes them; `tests/test_exactness.py` holds a diagonal of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from tests.checkpoints.engines import TABLES
from tests.deepspeed_tools import init_deepspeed
from tests.demo_training import ENGINES, Case, Parameters, distance, loss_of, train
from tests.exactness import LABELS
from tests.ranks import run_ranks

WORLDS = (1, 2, 3, 4)
CASES = {name: Case(codecs) for name, codecs in TABLES.items()} | {"head": Case({})}
#: Whose hashes are seeded.
HASHED = ("sketch", "sketched_rows")
SEEDS = (1, 2, 3)
#: Equal is what differs no more than this many times the most that summing the batch in parts does on one process.
TOLERANCE = 10
EQUAL, WITHIN = "=", "≈"

Pair = tuple[str, str]  # engine, codecs
PAIRS = tuple((kind, name) for kind in ENGINES for name in CASES)


@dataclass(frozen=True)
class Compared:
    """A training against one process that takes each batch in as many parts as there are ranks.

    Args:
        word: `EQUAL` bit for bit, `WITHIN` rounding, or "" if neither.
        distance: of the parameters, relative to the way that training moved them.
        loss: what the loss on held-out tokens is higher by, in nats.
    """

    word: str
    distance: float
    loss: float


@dataclass(frozen=True)
class OneProcess:
    """A training in one process.

    Args:
        parts: the parameters, by the number of parts in which each batch was taken.
        spread: the largest distance that taking it in parts makes.
    """

    parts: dict[int, Parameters]
    spread: float

    def compare(self, found: Parameters, world_size: int) -> Compared:
        own = self.parts[world_size]
        if all(torch.equal(found[name], value) for name, value in own.items()):
            return Compared(EQUAL, 0.0, 0.0)
        apart = distance(found, own)
        word = WITHIN if apart <= TOLERANCE * self.spread else ""
        return Compared(word, apart, loss_of(found) - loss_of(own))


def measure(rank: int, world_size: int, pairs: Iterable[Pair] = PAIRS) -> dict[Pair, Parameters]:
    """Parameters after training; on the first rank, to save the others' way through files."""
    init_deepspeed(rank, world_size)
    found = {(kind, name): train(kind, CASES[name]) for kind, name in pairs}
    return found if rank == 0 else {}


def alone(kind: str, name: str, parts: Iterable[int] = WORLDS) -> OneProcess:
    """What an engine is compared with."""
    single = "single sparse" if kind.endswith("sparse") else "single"
    found = {number: train(single, CASES[name], number) for number in parts}
    first = next(iter(found.values()))
    return OneProcess(found, max(distance(other, first) for other in found.values()))


def compare_all() -> tuple[dict[Pair, dict[int, Compared]], dict[Pair, OneProcess]]:
    """Everything, for every pair; and the single processes, for a kind with dense and with sparse gradients."""
    dense = {name: alone("single", name) for name in CASES}
    sparse = {name: alone("single sparse", name) for name in CASES}
    single = {(kind, name): (sparse if kind.endswith("sparse") else dense)[name] for kind, name in PAIRS}
    found: dict[Pair, dict[int, Compared]] = {pair: {} for pair in PAIRS}
    for world_size in WORLDS:
        for pair, trained in run_ranks(measure, world_size)[0].items():
            found[pair][world_size] = single[pair].compare(trained, world_size)
    return found, single


def tables() -> dict[str, str]:
    """Measure, and write both tables: by the name of their markers."""
    found, single = compare_all()
    seeds = other_seeds(single)
    return {"demo": distance_table(found, single, seeds), "demo-loss": loss_table(found, single, seeds)}


def other_seeds(single: dict[Pair, OneProcess]) -> dict[str, list[Compared]]:
    """How far one process is from one process with another hash seed, for some of them."""
    return {
        name: [single["ddp", name].compare(train("single", Case(CASES[name].codecs, seed=seed)), 1) for seed in SEEDS]
        for name in HASHED
    }


def distance_table(
    found: dict[Pair, dict[int, Compared]],
    single: dict[Pair, OneProcess],
    seeds: dict[str, list[Compared]],
) -> str:
    """Codecs by engines: the distance of the parameters for every number of ranks."""
    spread = {name: f"{single['ddp', name].spread:.0e}" for name in LABELS}
    return _comparison(found, seeds, lambda c: f"{c.distance:.1%}", "the batch in parts", spread)


def loss_table(
    found: dict[Pair, dict[int, Compared]],
    single: dict[Pair, OneProcess],
    seeds: dict[str, list[Compared]],
) -> str:
    """Codecs by engines: what the loss is higher by for every number of ranks."""
    loss = {name: f"{loss_of(single['ddp', name].parts[1]):.3f}" for name in LABELS}
    return _comparison(found, seeds, lambda c: f"{c.loss:+.3f}", "one process", loss)


def _comparison(
    found: dict[Pair, dict[int, Compared]],
    seeds: dict[str, list[Compared]],
    show: Callable[[Compared], str],
    reference: str,
    references: dict[str, str],
) -> str:
    """A row for each codec: every engine, one process (under the heading `reference`), other hash seeds."""
    rows = {
        name: [
            *(_cell(found[kind, name], lambda c: c.word or show(c)) for kind in ENGINES),
            references[name],
            " / ".join(map(show, seeds.get(name, ()))),
        ]
        for name in LABELS
    }
    return _table([reference, "other hash seeds"], rows)


def _cell(by_world: dict[int, Compared], show: Callable[[Compared], str]) -> str:
    return " / ".join(show(by_world[world_size]) for world_size in WORLDS)


def _table(more: list[str], rows: dict[str, list[str]]) -> str:
    columns = [*ENGINES.values(), *more]
    lines = [f"| codecs | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {LABELS[name]} | {' | '.join(cells)} |" for name, cells in rows.items())])
