"""The targets set before the kernels were written, and what ``results/speed.json`` says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KernelState = dict[str, Any]
Row = dict[str, Any]

NO_TEMPORARIES = 0.01  # bytes per parameter: what does not grow with the table, such as sums of columns, is below that
SPARSE_TEMPORARIES = 3.0  # times the gradient's own bytes
COLD_MILLISECONDS = 100.0
SPARSE_GROUPS = ("sparse", "sparse_uncoalesced", "sparse_adagrad")
DENSE_GROUPS = ("dense", "bf16", "adagrad")
#: Numbers of threads that the targets are for. What is measured with more threads than processors is shown elsewhere.
THREADS = ("1", "2")


@dataclass(frozen=True)
class Target:
    """The largest allowed ratio of medians.

    Args:
        keys: rows of the group that must all meet it; empty for all that are ours and not the reference.
    """

    text: str
    against: str
    most: float
    group: str
    keys: tuple[str, ...] = ()


TARGETS = (
    Target("dense fp32, no first moment: RowWise", "fused AdamW", 0.50, "dense", ("rw",)),
    Target("dense fp32, no first moment: SM3-II", "fused AdamW", 0.50, "dense", ("sm3",)),
    Target("dense fp32, no first moment: Factored", "fused AdamW", 0.50, "dense", ("factored",)),
    Target("the same, bf16 first moment: RowWise", "fused AdamW", 0.65, "dense", ("rw_bf16",)),
    Target("the same, bf16 first moment: SM3-II", "fused AdamW", 0.65, "dense", ("sm3_bf16",)),
    Target("the same, bf16 first moment: Factored", "fused AdamW", 0.65, "dense", ("factored_bf16",)),
    Target("dense, 8 bits of both moments", "fused AdamW", 0.90, "dense", ("8bit_both",)),
    Target("dense, CountSketch 20x, both moments", "fused AdamW", 1.0, "dense", ("cs20_both",)),
    Target("dense Adagrad with SM3", "fused Adagrad", 0.70, "adagrad", ("sm3",)),
    Target("bf16 parameters and gradients, RowWise", "fused AdamW bf16", 0.60, "bf16", ("rw",)),
    Target("sparse: RowWise", "SparseAdam", 0.10, "sparse", ("rw",)),
    Target("sparse: CountSketch 20x, no first moment", "SparseAdam", 0.10, "sparse", ("cs20",)),
    Target("sparse: CountSketch 20x, both moments", "SparseAdam", 0.10, "sparse", ("cs20_both",)),
    Target("sparse Adagrad, RowWise", "Adagrad", 0.20, "sparse_adagrad", ("rw",)),
    Target("many small layers, mixed policy", "fused AdamW", 1.2, "small_layers", ("mixed",)),
    Target("flat ZeRO segments", "whole parameters", 1.1, "sharded", ("flat",)),
    Target("DTensor shards", "whole parameters", 1.1, "sharded", ("dtensor",)),
    Target("per touched row, RowWise", "the smallest table", 1.3, "tables", ("rw_",)),
    Target("per touched row, CountSketch 20x", "the smallest table", 1.3, "tables", ("cs20_",)),
)
#: Of parameters that are offloaded; `results/speed_offload.json`.
OFFLOAD_TARGETS = (
    Target("offloaded table, default policy", "DeepSpeedCPUAdam", 0.60, "offload_table", ("default",)),
    Target("offloaded decoder, default policy", "DeepSpeedCPUAdam", 0.60, "offload_decoder", ("default",)),
    Target('offloaded decoder, preset "whole-model"', "DeepSpeedCPUAdam", 0.60, "offload_decoder", ("whole_model",)),
)


def targets_table(stored: KernelState) -> str:
    """Every target, with the ratio at one and two threads, without and with the check of the gradient."""
    lines = ratio_lines(stored, TARGETS)
    lines.append(_temporaries(stored, "step temporaries, dense", DENSE_GROUPS, "0 B/param", NO_TEMPORARIES))
    text = "step temporaries, sparse"
    lines.append(_temporaries(stored, text, SPARSE_GROUPS, f"{SPARSE_TEMPORARIES:g}x gradient", SPARSE_TEMPORARIES))
    lines.append(_cold(stored))
    return "\n".join(lines)


def ratio_lines(stored: KernelState, targets: Sequence[Target]) -> list[str]:
    """A table of ratios at one and two threads, with its heading."""
    head = "| step | against | at most | no check, 1 thread | 2 threads | with the check, 1 thread | 2 threads "
    return [
        f"{head}| bound | met |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_ratio_line(stored, m) for m in targets),
    ]


def worst(stored: KernelState, target: Target, count: str, nonfinite: str) -> float | None:
    """The largest ratio of the target's rows; ``None`` where there are none."""
    rows = [
        row for row in _rows(stored, target.group, count) if row["nonfinite"] == nonfinite and _belongs(row, target)
    ]
    return max((row["ratio"] for row in rows), default=None)


def _belongs(row: Row, target: Target) -> bool:
    named = any(row["key"] == key or (key.endswith("_") and row["key"].startswith(key)) for key in target.keys)
    return named and row["name"] != row["against"]


def _rows(stored: KernelState, group: str, count: str) -> list[Row]:
    return [row for row in stored["threads"].get(count, {}).get(group, ()) if "error" not in row]


def _ratio_line(stored: KernelState, target: Target) -> str:
    found = {check: [worst(stored, target, count, check) for count in THREADS] for check in ("propagate", "raise")}
    cells = [f"{ratio:.2f}" if ratio is not None else "-" for ratios in found.values() for ratio in ratios]
    complete = {check: [r for r in ratios if r is not None] for check, ratios in found.items() if None not in ratios}
    met = {check: max(ratios) <= target.most for check, ratios in complete.items()}
    text = target.text
    if target.group == "tables":  # the largest may not have fitted into memory
        sizes = [int(row["key"].split("_")[1]) for count in THREADS for row in _rows(stored, target.group, count)]
        text += f", tables up to {max(sizes, default=0):,} rows"
    shown = [text, target.against, f"{target.most:.2f}", *cells, _bound(stored, target), verdict(met)]
    return f"| {' | '.join(shown)} |"


def verdict(met: dict[str, bool]) -> str:
    """Yes or no; or that only the step without the check meets it. Nothing, if a number of threads is missing."""
    if not met:
        return "not measured"
    if all(met.values()):
        return "yes"
    return "without the check only" if met.get("propagate") else "**no**"


def _bound(stored: KernelState, target: Target) -> str:
    """The largest ratio to the reference that bandwidth alone would leave, without the check."""
    ratios = []
    for count in THREADS:
        rows = {row["name"]: row for row in _rows(stored, target.group, count)}
        ratios += [
            row["bound_milliseconds"] / rows[row["against"]]["milliseconds"]
            for row in rows.values()
            if row["nonfinite"] == "propagate" and _belongs(row, target) and "bound_milliseconds" in row
        ]
    return f"{max(ratios):.2f}" if ratios else "-"


def _temporaries(stored: KernelState, text: str, groups: tuple[str, ...], shown: str, most: float) -> str:
    measure = "transient_bytes_per_parameter" if groups == DENSE_GROUPS else "transient_per_gradient_byte"
    cells: list[str] = []
    met: dict[str, bool] = {}
    for check in ("propagate", "raise"):
        for count in THREADS:
            values = [
                row[measure]
                for group in groups
                for row in _rows(stored, group, count)
                if row["nonfinite"] == check  # ours; in torch it is None
            ]
            cells.append(f"{max(values):.3f}" if values else "-")
            if values:
                met[check] = met.get(check, True) and max(values) <= most
    if "-" in cells:
        met = {}
    return f"| {text} | - | {shown} | {' | '.join(cells)} | - | {verdict(met)} |"


def _cold(stored: KernelState) -> str:
    extra = {
        count: row["extra"]
        for count in THREADS
        for row in stored["threads"].get(count, {}).get("cold", ())
        if row["name"] == "compressed"
    }
    cells = [f"{extra[count]:.0f} ms" if count in extra else "-" for count in THREADS]
    complete = set(THREADS) <= set(extra)
    met = {"raise": max(extra.values()) <= COLD_MILLISECONDS} if complete else {}
    return f"| first step of a process | the second | + 100 ms | - | - | {' | '.join(cells)} | - | {verdict(met)} |"
