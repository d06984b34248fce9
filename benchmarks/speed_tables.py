"""The tables and the picture of docs/performance.md, from ``results/speed*.json``.

python -m benchmarks.speed_tables
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS, write_tables
from benchmarks.speed_plot import plot
from benchmarks.speed_targets import OFFLOAD_TARGETS, ratio_lines, targets_table
from benchmarks.summary import RESULTS

PAGE = DOCS / "performance.md"
PICTURE = DOCS / "img" / "speed.png"
KernelState = dict[str, Any]

#: Groups that have a table of rows, and what the ratio there is against.
RACES = {
    "dense": "fused AdamW",
    "bf16": "fused AdamW",
    "adagrad": "fused Adagrad",
    "sparse": "SparseAdam",
    "sparse_uncoalesced": "SparseAdam",
    "sparse_adagrad": "Adagrad",
    "small_layers": "fused AdamW",
    "sharded": "whole parameters",
    "tables": "itself in the smallest",
    "peers": "fused AdamW",
}
#: The same of parameters that are offloaded, from a file of their own.
OFFLOAD_RACES = {"offload_table": "DeepSpeedCPUAdam", "offload_decoder": "DeepSpeedCPUAdam"}
CHECKS = {None: "", "propagate": ", no check", "raise": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--offload", type=Path, default=RESULTS / "speed_offload.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    stored: KernelState = json.loads(arguments.results.read_text())
    makers: dict[str, Callable[[KernelState], str]] = {
        "speed_machine": machine,
        "speed_targets": targets_table,
        "speed_cold": cold_table,
    }
    makers |= {f"speed_{group}": partial(race_table, group=group) for group in RACES}
    tables = {name: make(stored) for name, make in makers.items()}
    if arguments.offload.exists():
        found: KernelState = json.loads(arguments.offload.read_text())
        tables |= {f"speed_{group}": race_table(found, group) for group in OFFLOAD_RACES}
        tables |= {"offload_machine": machine(found), "offload_marks": "\n".join(ratio_lines(found, OFFLOAD_TARGETS))}
    write_tables(arguments.page, tables)
    plot(stored, arguments.picture)


def machine(stored: KernelState) -> str:
    """What was measured on, with the bandwidth at each number of threads."""
    found = stored["environment"]
    lines = [
        f"{found['processor']}, {found['processors']} processors; torch {found['torch']}, Python {found['python']}; "
        f"kernels: {found['kernels']}; load average of the machine beforehand: {found['load']:.2f}.",
        "",
        "| threads | read | copy | update in place |",
        "|---|---|---|---|",
    ]
    if found["quick"]:
        lines.insert(0, "**Small sizes, to see that the script runs: the figures mean nothing.**\n")
    for count, groups in stored["threads"].items():
        if "bandwidth" in groups:
            speeds = [f"{groups['bandwidth'][name] / 1e9:.1f} GB/s" for name in ("read", "copy", "update")]
            lines.append(f"| {count} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def race_table(stored: KernelState, group: str) -> str:
    """Every row of a group, with times at each number of threads side by side."""
    counts = [count for count, groups in stored["threads"].items() if group in groups]
    if not counts:
        return "Not measured."
    crowded = stored["environment"]["processors"]
    heads = [_threads(count, crowded) for count in counts]
    sparse = group.startswith("sparse") or group == "tables"
    temporary = "temporaries / gradient" if sparse else "temporaries, B/param"
    against = (RACES | OFFLOAD_RACES)[group]
    columns = [f"ms, {head} (quartiles) | bound | against {against}" for head in heads]
    lines = [f"| | {' | '.join(columns)} | state, B/param | {temporary} |"]
    lines.append("|---" * (3 * len(counts) + 3) + "|")
    by_name = [{row["name"]: row for row in stored["threads"][count][group]} for count in counts]
    for name in by_name[0]:
        rows = [found.get(name, {"error": "not measured"}) for found in by_name]
        label = rows[0]["label"] + CHECKS[rows[0]["nonfinite"]]
        cells = [cell for row in rows for cell in _timing(row)]
        good = next((row for row in rows if "error" not in row), None)
        if good is None:
            lines.append(f"| {label} | {' | '.join(cells)} | - | - |")
            continue
        share = good["transient_per_gradient_byte"] if sparse else good["transient_bytes_per_parameter"]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {_short(good['state_bytes_per_parameter'])} | {_short(share)} |"
        )
    return "\n".join(lines)


def cold_table(stored: KernelState) -> str:
    """The first step of a new process."""
    lines = ["| | threads | first step, ms | second step, ms | more, ms |", "|---|---|---|---|---|"]
    for count, groups in stored["threads"].items():
        for row in groups.get("cold", ()):
            lines.append(
                f"| {row['label']} | {count} | {row['first']:.1f} | {row['second']:.1f} | {row['extra']:.1f} |"
            )
    return "\n".join(lines)


def _timing(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"].replace("|", "\\|"), "-", "-"]
    low, high = row["quartiles"]
    bound = f"{row['bound_milliseconds']:.3g}" if "bound_milliseconds" in row else "-"
    return [f"{row['milliseconds']:.3g} ({low:.3g}-{high:.3g})", bound, f"{row['ratio']:.2f}"]


def _threads(count: str, processors: int) -> str:
    more = f" on {processors} processors" if int(count) > processors else ""
    return f"{count} thread{'s' * (count != '1')}{more}"


def _short(value: float) -> str:
    if value < 0.0005:
        return "0" if value < 0.00005 else f"{value:.4f}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


if __name__ == "__main__":
    main()
