"""Sections of `benchmarks.gpu_check` that need other programs or wheels: what is not there is skipped."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_peers, roofline, speed_cases
from benchmarks.gpu_measure import allocated, by_each, event_time, kernels_on
from benchmarks.speed_measure import race
from benchmarks.speed_peers import NOT_INSTALLED
from benchmarks.step_cost import transient

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
#: Where wheels of other libraries may lie, unless `WHEELS` says it.
WHEELS = ROOT / "wheels"
#: What `ncu` is asked for: the part of the largest throughput of memory that was reached, bytes, and time.
METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_peak",
    "dram__bytes.sum": "dram_bytes",
    "gpu__time_duration.sum": "duration",
}
#: Of our kernels, by name: those that move the most.
PROFILED = ("observe", "reduce_columns", "insert", "hash_columns", "apply")
SANITIZERS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}


def repeats(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Two processes with the same seed: hashes of parameters and states, dense and sparse."""
    command = _cases("repeat", device, quick)
    found = []
    for number in (1, 2):
        done = _run(command, deadline)
        if done is None or done.returncode:
            yield {"what": f"process {number}"} | _failure(done)
            return
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for name, digest in found[0].items():
        row: Row = {"what": name, "hash": digest[:16], "same": digest == found[1][name]}
        yield row if row["same"] else row | {"error": "two processes end at other bits"}


def peers(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Other libraries' optimizers on one table, from wheels in a folder; those that cannot run are no failures."""
    with tempfile.TemporaryDirectory() as where:
        yield from _installed(Path(os.environ.get("WHEELS") or WHEELS), where)
        sys.path.append(where)
        try:
            full = replace(speed_cases.FULL, peers=speed_cases.FULL.dense)
            entries = gpu_peers.peers(speed_cases.QUICK if quick else full)
            entries = [entry for entry in entries if entry.nonfinite in (None, "raise")]
            if time.monotonic() > deadline:
                yield {"what": "peers", "skipped": "out of time"}
                return
            on_gpu = device.type == "cuda"
            rows = race(
                by_each(entries, kernels_on(device)),
                warm_up=speed_cases.GRADIENTS,
                rounds=3 if quick else 10,
                timed=event_time if on_gpu else roofline.wall_time,
                temporaries=allocated if on_gpu else transient,
            )
        finally:
            sys.path.remove(where)
    for row in rows:
        found = {"what": row["label"]}
        if "error" not in row:
            found |= {
                key: row[key] for key in ("milliseconds", "ratio", "transient_bytes", "state_bytes_per_parameter")
            }
        elif row["nonfinite"] is None:
            found["skipped"] = NOT_INSTALLED if row["label"].endswith(f"({NOT_INSTALLED})") else row["error"][:200]
        else:
            found["error"] = row["error"][:200]
        yield found


def _installed(folder: Path, where: str) -> Iterator[Row]:
    """Wheels of a folder, each unpacked into another; without network and without what they depend on."""
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if not wheels:
        yield {"what": "wheels", "skipped": f"none in {folder.name}/"}
    for wheel in wheels:
        try:
            shutil.unpack_archive(wheel, where, "zip")
            yield {"what": f"wheel {wheel.name}"}
        except (OSError, shutil.ReadError) as error:
            yield {"what": f"wheel {wheel.name}", "skipped": str(error)[:200]}


def profiler(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """How much of the memory's throughput kernels reach, by Nsight Compute where it is installed."""
    ncu = _program("ncu")
    if ncu is None or device.type != "cuda":
        yield {"what": "ncu", "skipped": "not installed" if device.type == "cuda" else "no GPU"}
        return
    names = "|".join(PROFILED)
    command = [ncu, "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", f"regex:^({names})$", *_cases("profile", device, quick)]
    done = _run(command, deadline)
    if done is None or done.returncode or "==ERROR==" in done.stdout:
        said = _failure(done)["error"]  # often that counters may be read by administrators only
        yield {"what": "ncu", "skipped": said}
        return
    yield from measured(done.stdout)


def measured(printed: str) -> Iterator[Row]:
    """What ``ncu --csv`` printed, a row for each launch."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    launches: dict[str, Row] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines))):
        row = launches.setdefault(line["ID"], {"what": line["Kernel Name"].split("(")[0]})
        if (name := METRICS.get(line["Metric Name"])) is not None:
            row[name] = float(line["Metric Value"].replace(",", ""))
            if name != "percent_of_peak":
                row[f"{name}_unit"] = line["Metric Unit"]
    yield from launches.values()


def sanitizer(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Small cases under compute-sanitizer, where it is installed: accesses beyond tensors, and races."""
    program = _program("compute-sanitizer")
    for tool, summary in SANITIZERS.items():
        row: Row = {"what": tool}
        if program is None or device.type != "cuda":
            yield row | {"skipped": "not installed" if device.type == "cuda" else "no GPU"}
            continue
        # The allocator's large segments would hide what lies beyond a tensor.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = _run([program, "--tool", tool, *_cases("small", device, quick)], deadline, **alone)
        if done is None:
            yield row | {"skipped": "out of time"}
            continue
        found = re.search(summary, done.stdout + done.stderr)
        if found is None:
            yield row | {"skipped": _failure(done)["error"]}
        else:
            row["errors"] = int(found[1])
            yield row | ({"error": (done.stdout + done.stderr)[-500:]} if row["errors"] else {})


def _cases(what: str, device: torch.device, quick: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_cases", what, "--device", device.type]
    return [*command, "--quick"] if quick else command


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def _run(command: list[str], deadline: float, **environment: str) -> subprocess.CompletedProcess[str] | None:
    """What a process did; ``None`` if its time was up."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    path = os.pathsep.join(filter(None, (os.fspath(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=left,
        )
    except subprocess.TimeoutExpired:
        return None


def _failure(done: subprocess.CompletedProcess[str] | None) -> Row:
    if done is None:
        return {"error": "out of time"}
    said = (done.stderr or done.stdout).strip().splitlines() or ["nothing was said"]
    return {"error": f"exit status {done.returncode}: {said[-1][:200]}"}
