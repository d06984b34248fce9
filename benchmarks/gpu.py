"""How long a step takes on a GPU, beside torch and other libraries, and beside what its memory allows.

    python -m benchmarks.gpu                         # everything: prints tables, writes results/gpu.json
    python -m benchmarks.gpu --groups dense,sparse   # some groups of rows again, into the same file
    python -m benchmarks.gpu --quick                 # small sizes, to see that it runs: runs/gpu_quick.json
    python -m benchmarks.gpu --device cpu --quick    # without a GPU, to try the script itself

No GPU has run it yet. The races are those of :mod:`benchmarks.speed`; our steps are done once in plain PyTorch and once
by the Triton kernels. All optimizers of a race step the same parameters in turn, in one process; a step is timed by two
CUDA events, with the device idle beforehand. Temporaries are what torch's allocator says.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lightning_sketch
from benchmarks import gpu_peers, roofline, speed, speed_cases
from benchmarks.gpu_measure import allocated, by_each, event_time, kernels_on
from benchmarks.speed_cases import FULL, QUICK, Sizes
from benchmarks.speed_measure import Row, race
from benchmarks.speed_peers import NOT_INSTALLED, version
from benchmarks.speed_targets import TARGETS
from benchmarks.step_cost import transient
from benchmarks.summary import RESULTS

QUICK_RESULT = Path("runs/gpu_quick.json")
#: Steps are short, so there can be many rounds; caches are larger than a processor's, so the peers' table is too.
SIZES = replace(FULL, peers=FULL.dense, rounds={"dense": 50, "sparse": 100, "peers": 50})
RACES: Mapping[str, tuple[speed.Race, str]] = speed.RACES | {
    "peers": (gpu_peers.peers, "peers"),
    "peers_bf16": (gpu_peers.peers_bf16, "peers"),
}
GROUPS = ("bandwidth", *RACES)
SPARSE = ("sparse", "sparse_uncoalesced", "sparse_adagrad", "tables")
#: What must be as it was for new rows to stand beside old ones.
SAME = ("quick", "device", "torch", "triton")
CHECKS = {None: "", "propagate": ", no check", "raise": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--groups", default=",".join(GROUPS), help="names, comma-separated; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures mean nothing")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script, with --quick"
    )
    parser.add_argument("--out", type=Path, help="where to write; what is there and not measured again stays")
    arguments = parser.parse_args()
    groups = arguments.groups.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise SystemExit(f"Unknown groups {unknown}; known: {list(GROUPS)}")
    if arguments.device == "cpu" and not arguments.quick:
        raise SystemExit("--device cpu is there to try this script, with --quick; benchmarks.speed measures processors")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"There is no GPU to measure: torch {torch.__version__} finds no CUDA device. "
            "`--device cpu --quick` tries the script without one."
        )
    out = arguments.out or (QUICK_RESULT if arguments.quick else RESULTS / "gpu.json")
    failed = drive(groups, QUICK if arguments.quick else SIZES, torch.device(arguments.device), arguments.quick, out)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def drive(groups: list[str], sizes: Sizes, device: torch.device, quick: bool, out: Path) -> list[str]:
    """Measure, print, and write after each group; returns what failed."""
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)  # it warns about first moments that it drops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts a processor's bytes announces every start
    environment = _environment(device, quick)
    stored: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if stored and any(stored["environment"].get(key) != environment[key] for key in SAME):
        print(f"{out} was measured elsewhere or otherwise: begun anew")
        stored = {}
    stored["environment"] = environment
    found: dict[str, Any] = stored.setdefault("groups", {})
    print(", ".join(f"{key}: {value}" for key, value in environment.items()))
    failed = []
    for group in groups:
        try:
            found[group] = measure(group, sizes, device)
        except Exception as error:  # of a device that is out of memory, say: the other groups may do
            failed.append(f"{group} ({type(error).__name__}: {error})")
            continue
        finally:
            if dist.is_initialized():  # by the sharded race
                dist.destroy_process_group()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        _add_bounds(found)
        print("\n".join(("", *table(group, found[group]))), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(stored, indent=1) + "\n")
    return failed


def measure(group: str, sizes: Sizes, device: torch.device) -> Any:
    """One group."""
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    timed = event_time if on_gpu else roofline.wall_time
    if group == "bandwidth":
        with device:
            return roofline.bandwidth(sizes.bandwidth, timed)
    if on_gpu:
        sizes = _fitting(sizes)
    make, kind = RACES[group]
    with device:  # what is made; steps must not depend on a default device
        entries = make(sizes)
    return race(
        by_each(entries, kernels_on(device)),
        warm_up=speed_cases.GRADIENTS,  # every gradient once
        rounds=sizes.rounds[kind],
        timed=timed,
        temporaries=allocated if on_gpu else transient,
    )


def _fitting(sizes: Sizes) -> Sizes:
    """The sizes, but of the tables only those which fit into the device's memory beside the smaller ones."""
    free, _ = torch.cuda.mem_get_info()
    return replace(sizes, tables=tuple(rows for rows in sizes.tables if 2 * 4 * rows * sizes.table_columns < free))


def _add_bounds(found: dict[str, Any]) -> None:
    """The least time of every row, from the best bandwidth measured."""
    if "bandwidth" not in found:
        return
    best = max(found["bandwidth"].values())
    for group in RACES:
        for row in found.get(group, ()):
            if "error" not in row:
                row["bound_milliseconds"] = 1e3 * row["bytes_moved"] / best


def table(group: str, found: Any) -> Iterator[str]:
    """Lines of Markdown."""
    if group == "bandwidth":
        yield "bandwidth: " + ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in found.items())
        return
    sparse = group in SPARSE
    temporaries = "temporaries / gradient" if sparse else "temporaries, B/param"
    yield f"{group}:"
    yield f"| | ms (quartiles) | bound | ratio | against | target set for CPUs | state, B/param | {temporaries} |"
    yield "|---" * 8 + "|"
    for row in found:
        yield f"| {row['label']}{CHECKS[row['nonfinite']]} | {' | '.join(_cells(row, group, sparse))} |"


def _cells(row: Row, group: str, sparse: bool) -> list[str]:
    if "error" in row:
        missing = row["label"].endswith(f"({NOT_INSTALLED})")
        return ["-" if missing else row["error"].replace("|", "\\|"), *["-"] * 6]
    low, high = row["quartiles"]
    bound = f"{row['bound_milliseconds']:.3g}" if "bound_milliseconds" in row else "-"
    share = row["transient_per_gradient_byte"] if sparse else row["transient_bytes_per_parameter"]
    target = _target(group, row)
    return [
        f"{row['milliseconds']:.3g} ({low:.3g}-{high:.3g})",
        bound,
        f"{row['ratio']:.2f}",
        row["against"],
        "-" if target is None else f"{target:.2f}",
        f"{row['state_bytes_per_parameter']:.3g}",
        f"{share:.3g}",
    ]


def _target(group: str, row: Row) -> float | None:
    """The largest ratio that was aimed at on CPUs."""
    key = row["key"].split(" (")[0]
    for target in TARGETS:
        named = any(key == wanted or (wanted.endswith("_") and key.startswith(wanted)) for wanted in target.keys)
        if target.group == group and named and row["name"] != row["against"]:
            return target.most
    return None


def _environment(device: torch.device, quick: bool) -> dict[str, Any]:
    name, memory = platform.processor() or platform.machine(), None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    return {
        "device": name,
        "memory": memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": version("triton"),
        "python": platform.python_version(),
        "ours": lightning_sketch.__version__,
        "quick": quick,
    }


if __name__ == "__main__":
    main()
