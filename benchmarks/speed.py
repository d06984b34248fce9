"""How long a step takes on the CPU, beside torch and other libraries, and beside what memory allows.

    python -m benchmarks.speed                       # results/speed.json, about ten minutes
    python -m benchmarks.speed --groups dense        # one group of rows again, into the same file
    python -m benchmarks.speed --quick               # small sizes, to see that it runs: runs/speed_quick.json
    python -m benchmarks.speed --groups bandwidth,offload_table,offload_decoder --threads 1,2 \
        --out benchmarks/results/speed_offload.json  # beside DeepSpeedCPUAdam, which takes minutes to compile

Wall time. Each group of rows at each number of threads is measured in a process of its own, where all optimizers step
the same parameters in turn (:mod:`benchmarks.speed_measure`).
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline, speed_cases, speed_offload
from benchmarks.speed_cases import FULL, QUICK, Sizes
from benchmarks.speed_measure import Contestant, Row, race
from benchmarks.summary import RESULTS
from lightning_sketch.kernels import native

QUICK_RESULT = Path("runs/speed_quick.json")
Race = Callable[[Sizes], list[Contestant]]


def _sharded(sizes: Sizes) -> list[Contestant]:
    from benchmarks.speed_shards import sharded  # imports torch.distributed

    return sharded(sizes)


def _peers(sizes: Sizes) -> list[Contestant]:
    from benchmarks.speed_peers import peers

    return peers(sizes)


#: Each group's contestants, and whose number of rounds it has.
RACES: dict[str, tuple[Race, str]] = {
    "dense": (speed_cases.dense, "dense"),
    "bf16": (speed_cases.bf16, "dense"),
    "adagrad": (speed_cases.adagrad, "dense"),
    "sparse": (speed_cases.sparse, "sparse"),
    "sparse_uncoalesced": (speed_cases.sparse_uncoalesced, "sparse"),
    "sparse_adagrad": (speed_cases.sparse_adagrad, "sparse"),
    "small_layers": (speed_cases.small_layers, "sparse"),
    "sharded": (_sharded, "dense"),
    "tables": (speed_cases.tables, "sparse"),
    "peers": (_peers, "peers"),
    "offload_table": (speed_offload.table, "dense"),
    "offload_decoder": (speed_offload.decoder, "dense"),
}
GROUPS = ("bandwidth", *RACES, "cold")
THREADS = (1, 2, 4)
OFFLOAD = ("offload_table", "offload_decoder")  # not among those that are measured if none is named
OVERSUBSCRIBED = ("bandwidth", "dense")  # the groups measured with more threads than there are processors
#: What must be as it was for new rows to stand beside old ones.
SAME = ("quick", "processor", "processors", "torch", "kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    usual = ",".join(group for group in GROUPS if group not in OFFLOAD)
    parser.add_argument("--groups", default=usual, help=f"comma-separated, of {', '.join(GROUPS)}; default: {usual}")
    parser.add_argument("--threads", default=",".join(map(str, THREADS)), help="comma-separated; default: 1,2,4")
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="where to write; what is there and not measured again stays")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    groups, threads = arguments.groups.split(","), [int(count) for count in arguments.threads.split(",")]
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise SystemExit(f"Unknown groups {unknown}; known: {list(GROUPS)}")
    if missing := native.why_not():
        raise SystemExit(f"There is nothing to measure: the kernels are {missing}")
    out = arguments.out or (QUICK_RESULT if arguments.quick else RESULTS / "speed.json")
    sizes = QUICK if arguments.quick else FULL
    if arguments.worker:
        torch.set_num_threads(threads[0])
        out.write_text(json.dumps(measure(groups[0], sizes, threads[0])))
        return
    failed = drive(groups, threads, sizes, arguments.quick, out)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def drive(groups: list[str], threads: list[int], sizes: Sizes, quick: bool, out: Path) -> list[str]:
    """Measure in processes of their own, and write after each; returns what failed."""
    environment = _environment(quick)
    stored: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if stored and any(stored["environment"].get(key) != environment[key] for key in SAME):
        print(f"{out} was measured elsewhere or otherwise: begun anew")
        stored = {}
    stored["environment"] = environment
    failed = []
    for count in threads:
        crowded = count > processors()
        own = stored.setdefault("threads", {}).setdefault(str(count), {})
        for group in groups:
            if crowded and group not in OVERSUBSCRIBED:
                continue
            began = time.perf_counter()
            found = _in_process(group, count, quick)
            print(f"\n{group}, {count} thread{'s' * (count > 1)}: {time.perf_counter() - began:.0f} s", flush=True)
            if found is None:
                failed.append(f"{group} at {count} threads")
                continue
            own[group] = found
            _add_bounds(own)
            _show(group, own[group])
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(stored, indent=1) + "\n")
    return failed


def measure(group: str, sizes: Sizes, threads: int) -> Any:
    """One group, in this process."""
    torch.manual_seed(0)
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)  # it warns about first moments that it drops
    if group == "bandwidth":
        return roofline.bandwidth(sizes.bandwidth)
    if group == "cold":
        return [_cold(kind, sizes.cold_repeats, threads) for kind in ("stock", "compressed")]
    make, kind = RACES[group]
    # Every gradient comes once before the clock counts: then all pages were touched.
    warm_up = speed_cases.GRADIENTS if kind == "sparse" else 2
    return race(make(sizes), warm_up=warm_up, rounds=sizes.rounds[kind])


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_process(group: str, threads: int, quick: bool) -> Any | None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.speed", "--worker", "--groups", group]
        command += ["--threads", str(threads), "--out", str(out), *(["--quick"] if quick else [])]
        quiet = {"KINETO_LOG_LEVEL": "6", **os.environ}  # the profiler that counts temporaries announces every start
        done = subprocess.run(command, check=False, env=quiet)
        return json.loads(out.read_text()) if done.returncode == 0 else None


def _cold(kind: str, repeats: int, threads: int) -> Row:
    """Median first and second step of new processes, in milliseconds."""
    seconds = []
    for _ in range(repeats):
        command = [sys.executable, "-m", "benchmarks.cold_step", str(threads), kind]
        seconds.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    first, second = (1e3 * statistics.median(step) for step in zip(*seconds, strict=True))
    label = {"stock": "AdamW(fused=True)", "compressed": "compressed"}[kind]
    return {"name": kind, "label": label, "first": first, "second": second, "extra": first - second}


def _add_bounds(own: dict[str, Any]) -> None:
    """The least time of every row, from the bandwidth at the same number of threads."""
    if "bandwidth" not in own:
        return
    best = max(own["bandwidth"].values())
    for group, rows in own.items():
        if group in RACES:
            for row in rows:
                if "error" not in row:
                    row["bound_milliseconds"] = 1e3 * row["bytes_moved"] / best


def _show(group: str, found: Any) -> None:
    if group == "bandwidth":
        print("  " + ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in found.items()))
    for row in found if isinstance(found, list) else ():
        if "error" in row:
            print(f"  {row['name']:24} {row['error']}")
        elif "extra" in row:
            print(f"  {row['name']:24} first {row['first']:.1f} ms, second {row['second']:.1f} ms")
        else:
            bound = f"bound {row['bound_milliseconds']:8.2f}" if "bound_milliseconds" in row else ""
            print(
                f"  {row['name']:24} {row['milliseconds']:9.2f} ms  {row['ratio']:6.2f}x  {bound}  "
                f"state {row['state_bytes_per_parameter']:.3g} B  temporaries {row['transient_bytes']:,} B"
            )


def _environment(quick: bool) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "processors": processors(),
        "kernels": native.describe(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of others, before the first row
        "quick": quick,
    }


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
