"""How far every codec under every engine is from one process: measured on gloo ranks, for docs/sharding.md.

    nice python -m benchmarks.exactness                 # 1 to 4 ranks -> results/exactness.json, docs/sharding.md
    nice python -m benchmarks.exactness --worlds 2      # these ranks only, for a first look; writes nothing
    python -m benchmarks.exactness --tables             # results/exactness.json -> docs/sharding.md

Two trainings, by AdamW: with prescribed gradients (:mod:`benchmarks.exactness_prescribed`), and of the demo's model
(:mod:`benchmarks.exactness_demo`), whose gradients react to the parameters. What a training came to is kept in the
cache folder (see README.md), in ``exactness/``, a file for each engine and number of ranks: an interrupted measurement
goes on where it stopped. Delete the folder to measure anew. All of it takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import exactness_demo as demo
from benchmarks import exactness_prescribed as prescribed
from benchmarks.exactness_prescribed import CODECS, LABELS, Parameters
from benchmarks.exactness_tables import write_tables
from benchmarks.gcide import cache_folder
from benchmarks.summary import RESULTS, environment
from tests.deepspeed_tools import init_deepspeed
from tests.ranks import run_ranks

WORLDS = (1, 2, 3, 4)
#: Whose hashes are seeded, and with what else.
HASHED, SEEDS = ("sketched_rows", "synced", "sketch"), (1, 2, 3)
#: Rounding: a relative distance of the parameters of at most this; of the demo's also at most so many times what one
#: process is from itself when it takes each batch in parts.
ROUNDING, TOLERANCE = 1e-5, 3
EQUAL, WITHIN = "=", "≈"

#: How a training compares with one process: `EQUAL` (to the bit), `WITHIN` (rounding) or "" (neither); the relative
#: distance of the parameters; and, where the demo is neither, what the loss on held-out text is higher by, in nats.
Compared = dict[str, Any]
#: What is kept of a training by every engine: of "demo" and "prescribed" parameters by codecs, of "bytes" each rank's.
Kept = dict[str, Any]
Job = tuple[str, str]  # what is measured, and by which engine


def jobs() -> list[Job]:
    """What is done on every number of ranks."""
    return [
        *[(what, kind) for what in ("prescribed", "bytes") for kind in prescribed.ENGINES],
        *[("demo", kind) for kind in demo.ENGINES],
    ]


def measure(job: Job) -> Kept:
    """Do a job on ranks that were joined."""
    what, kind = job
    if what == "prescribed":
        return prescribed.by_layer(prescribed.train(kind))
    if what == "demo":
        return {codecs: demo.train(kind, codecs) for codecs in LABELS}
    found: Kept = {}
    for codecs in CODECS:
        found[codecs] = [0] * dist.get_world_size()
        dist.all_gather_object(found[codecs], prescribed.state_bytes(kind, codecs))
    return found


def measure_on_ranks(rank: int, world_size: int, wanted: list[Job], folder: str) -> None:
    """Do the jobs, and keep what each came to."""
    init_deepspeed(rank, world_size)
    for job in wanted:
        found = measure(job)
        if rank == 0:
            keep(found, file_of(Path(folder), *job, world_size))


def measure_alone(what: str, kind: str, parts: int, seed: int) -> Kept:
    """One process, with each batch of the demo in as many parts as there are ranks."""
    if what == "prescribed":
        return prescribed.by_layer(prescribed.train(kind, seed=seed))
    if what == "bytes":
        return {codecs: prescribed.state_bytes(kind, codecs) for codecs in CODECS}
    names = LABELS if seed == 0 else HASHED
    return {codecs: demo.train(kind, codecs, parts=parts, seed=seed) for codecs in names}


def alone(what: str, kind: str = "single", *, parts: int = 1, seed: int = 0) -> Kept:
    """`measure_alone`, unless it is kept from before."""
    file = file_of(cache_folder() / "exactness", what, kind if seed == 0 else f"{kind}-seed{seed}", parts)
    if not file.exists():
        keep(measure_alone(what, kind, parts, seed), file)
    return load(file)


def file_of(folder: Path, what: str, kind: str, number: int) -> Path:
    return folder / f"{what}-{kind.replace(' ', '_')}-{number}.pt"


def keep(found: Kept, file: Path) -> None:
    """Save; a file is there when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(found, partial)
    partial.replace(file)
    print(file.stem, flush=True)


def load(file: Path) -> Kept:
    found: Kept = torch.load(file)
    return found


def measure_all(worlds: Iterable[int]) -> None:
    """Every job that is not kept from before, on as many ranks as asked for."""
    folder = cache_folder() / "exactness"
    for world_size in worlds:
        wanted = [job for job in jobs() if not file_of(folder, *job, world_size).exists()]
        if wanted:
            run_ranks(measure_on_ranks, world_size, wanted, str(folder))


def compare(found: Parameters, expected: Parameters, apart: float, most: float) -> Compared:
    """How parameters compare that are `apart`, where `most` is rounding."""
    if all(torch.equal(found[name], value) for name, value in expected.items()):
        return {"word": EQUAL, "distance": 0.0}
    return {"word": WITHIN if apart <= most else "", "distance": apart}


def compare_prescribed(found: Parameters, expected: Parameters) -> Compared:
    """How the parameters of one layer compare with prescribed gradients."""
    return compare(found, expected, prescribed.distance(found, expected), ROUNDING)


def compare_demo(found: Parameters, expected: Parameters, spread: float) -> Compared:
    """How the demo's parameters compare, where one process is `spread` from itself."""
    most = max(TOLERANCE * spread, ROUNDING)
    made = compare(found, expected, demo.distance(found, expected), most)
    return made if made["word"] else made | {"loss": demo.loss_of(found) - demo.loss_of(expected)}


def spread(whole: list[Parameters]) -> float:
    """The largest distance between one process that takes batches at once and one that takes them in parts."""
    first, *others = whole
    return max(demo.distance(other, first) for other in others)


def results(worlds: Iterable[int] = WORLDS) -> dict[str, Any]:
    """What docs/sharding.md is made of, from the trainings that are kept."""
    folder, worlds = cache_folder() / "exactness", list(worlds)

    def table(what: str, kinds: Iterable[str], cell: Callable[[str, str, int, Kept], Any]) -> dict[str, Any]:
        """By codecs, engine and number of ranks."""
        made: dict[str, Any] = {}
        for kind in kinds:
            for n in worlds:
                found = load(file_of(folder, what, kind, n))
                for codecs, own in found.items():
                    made.setdefault(codecs, {}).setdefault(kind, {})[str(n)] = cell(kind, codecs, n, own)
        return {codecs: made[codecs] for codecs in LABELS if codecs in made}

    single, sizes = alone("prescribed"), alone("bytes")
    parts = {kind: {n: alone("demo", kind, parts=n) for n in WORLDS} for kind in ("single", "single sparse")}
    spreads = {kind: {name: spread([f[name] for f in by.values()]) for name in LABELS} for kind, by in parts.items()}

    def demo_cell(kind: str, codecs: str, n: int, own: Any) -> Compared:
        one = "single sparse" if kind.endswith("sparse") else "single"
        return compare_demo(own, parts[one][n][codecs], spreads[one][codecs])

    return {
        "environment": environment(),
        "steps": prescribed.STEPS,
        "prescribed": table(
            "prescribed", prescribed.ENGINES, lambda _kind, codecs, _n, own: compare_prescribed(own, single[codecs])
        ),
        "prescribed_seeds": {
            codecs: [prescribed.distance(alone("prescribed", seed=s)[codecs], single[codecs]) for s in SEEDS]
            for codecs in HASHED
        },
        "bytes_alone": sizes,
        "bytes": table("bytes", prescribed.ENGINES, lambda _kind, _codecs, _n, own: own),
        "demo": table("demo", demo.ENGINES, demo_cell),
        "demo_spread": spreads["single"],
        "demo_loss": {codecs: demo.loss_of(own) for codecs, own in parts["single"][1].items()},
        "demo_seeds": {
            codecs: [compare_demo(alone("demo", seed=s)[codecs], parts["single"][1][codecs], 0.0) for s in SEEDS]
            for codecs in HASHED
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of ranks; default: 1 2 3 4")
    parser.add_argument("--tables", action="store_true", help="only write the tables of docs/sharding.md")
    arguments = parser.parse_args()
    path = RESULTS / "exactness.json"
    if not arguments.tables:
        torch.set_num_threads(1)
        measure_all(arguments.worlds)
        found = results(arguments.worlds)
        if set(arguments.worlds) != set(WORLDS):
            print(json.dumps(found, indent=1))
            return
        path.write_text(json.dumps(found, indent=1) + "\n")
    write_tables(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
