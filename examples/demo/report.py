"""The comparison for people: a table in the terminal and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.table import Table

Result = dict[str, Any]  # what train.train returned

# Okabe and Ito's palette: told apart by every kind of colour vision.
PLAIN, COMPRESSED = "#0072B2", "#D55E00"
INK, FAINT = "#333333", "#8a8a8a"
GREYS = ("#e3e3e3", "#cfcfcf", "#b4b4b4")
MIB = 2**20

matplotlib.rc("font", size=11)
matplotlib.rc("text", color=INK)
matplotlib.rc("axes", labelcolor=INK, edgecolor=FAINT)
matplotlib.rc("xtick", color=INK)
matplotlib.rc("ytick", color=INK)


@dataclass(frozen=True)
class Part:
    """A part of a process's peak memory, in bytes."""

    name: str
    size: float


def memory_parts(result: Result) -> list[Part]:
    """What the peak was made of, from the bottom of the picture to the top."""
    b = result["bytes"]
    libraries = max(0, b["before_training"] - b["parameters"])
    rest = max(0, b["peak_process"] - libraries - b["parameters"] - b["optimizer_state"])
    return [
        Part("Python and\nits libraries", libraries),
        Part("activations,\ngradients, data", rest),
        Part("parameters", b["parameters"]),
        Part("optimizer\nstate", b["optimizer_state"]),
    ]


def table(plain: Result, compressed: Result) -> Table:
    """The rows that a reader compares, with the change in words of the unit."""
    out = Table(title="The same training, twice", title_justify="left")
    out.add_column("")
    for column in ("as it is", "compressed", "change"):
        out.add_column(column, justify="right")

    def row(name: str, of: str, form: str, unit: str = "", scale: float = 1.0) -> None:
        a, b = (_get(r, of) / scale for r in (plain, compressed))
        out.add_row(name, f"{a:{form}}{unit}", f"{b:{form}}{unit}", _change(a, b))

    row("validation loss", "validation_loss", ".3f", " nats")
    row("validation perplexity", "perplexity", ".2f")
    out.add_section()
    row("parameters", "bytes.parameters", ",.1f", " MiB", MIB)
    row("gradients", "bytes.gradients", ",.1f", " MiB", MIB)
    row("optimizer state", "bytes.optimizer_state", ",.2f", " MiB", MIB)
    row("peak process memory", "bytes.peak_process", ",.0f", " MiB", MIB)
    out.add_section()
    row("optimizer time a step (median)", "optimizer_ms", ".2f", " ms")
    row("training speed", "tokens_per_second", ",.0f", " tokens/s")
    return out


def picture(plain: Result, compressed: Result, path: Path) -> None:
    """Loss curves on the left, peak memory on the right."""
    engine = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.06)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.6), width_ratios=(1.25, 1), layout=engine)
    figure.suptitle(_headline(plain, compressed), x=0.012, ha="left", fontsize=17, fontweight="bold")
    _curves(left, plain, compressed)
    _memory(right, plain, compressed)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(values: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Means of consecutive windows and the steps at their middles."""
    starts = range(0, len(values) - window + 1, window)
    return [i + window // 2 for i in starts], [sum(values[i : i + window]) / window for i in starts]


def _headline(plain: Result, compressed: Result) -> str:
    a, b = (r["bytes"]["optimizer_state"] / MIB for r in (plain, compressed))
    return (
        f"Optimizer state {_short(a)} → {_short(b)} MiB, "
        f"perplexity {_short(plain['perplexity'], 100)} → {_short(compressed['perplexity'], 100)}"
    )


def _curves(axes: Axes, plain: Result, compressed: Result) -> None:
    _title(axes, "Learning", "loss in nats per token; line: held-out files, dots: training (sampled softmax)")
    runs = ((plain, PLAIN, "as it is"), (compressed, COMPRESSED, "compressed"))
    ends = sorted(runs, key=lambda run: run[0]["validation_loss"])  # the lower curve first
    for result, colour, name in runs:
        window = max(1, len(result["train_loss"]) // 50)
        axes.plot(*smooth(result["train_loss"], window), ".", color=colour, alpha=0.35, markersize=4)
        steps, losses = zip(*result["validation"], strict=True)
        dashes = "-" if result is plain else (0, (4, 2))  # both show where they coincide
        axes.plot(steps, losses, linestyle=dashes, marker="o", color=colour, lw=2, clip_on=False)
        axes.annotate(
            f"{name}\n{losses[-1]:.3f}, perplexity {_short(result['perplexity'], 100)}",
            (steps[-1], losses[-1]),
            xytext=(10, -14 if result is ends[0][0] else 14),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
    lowest = min(r["validation_loss"] for r in (plain, compressed))
    highest = max(r["validation"][0][1] for r in (plain, compressed))
    axes.set_ylim(lowest - 0.3 * (highest - lowest), highest + 0.6 * (highest - lowest))
    axes.set_xlim(0, len(plain["train_loss"]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.grid(axis="y", color="#ececec")
    axes.spines[["top", "right"]].set_visible(False)


def _memory(axes: Axes, plain: Result, compressed: Result) -> None:
    _title(axes, "Memory", "of the whole training process at its peak, in MiB")
    state = [r["bytes"]["optimizer_state"] for r in (plain, compressed)]
    peaks = [r["bytes"]["peak_process"] / MIB for r in (plain, compressed)]
    runs = ((plain, PLAIN), (compressed, COMPRESSED))
    for x, (result, accent) in enumerate(runs):
        bottom = 0.0
        for part, colour in zip(memory_parts(result), (*GREYS, accent), strict=True):
            height = part.size / MIB
            axes.bar(x, height, 0.62, bottom, color=colour, edgecolor="white", linewidth=1.5)
            middle, is_state = bottom + height / 2, colour == accent
            if height > 0.035 * max(peaks):
                ink = "white" if is_state else INK
                axes.text(x, middle, f"{height:,.0f}", ha="center", va="center", color=ink)
            elif is_state:
                label = f"{_short(height)}\n{_change(*state)}"
                axes.text(x + 0.35, middle, label, va="center", color=accent, fontweight="bold")
            if x == 0 and height > 0.06 * max(peaks):
                weight, ink = ("bold", accent) if is_state else ("normal", INK)
                axes.text(-0.38, middle, part.name, ha="right", va="center", color=ink, weight=weight)
            bottom += height
        axes.text(x, bottom + 0.015 * max(peaks), f"{peaks[x]:,.0f} MiB", ha="center", weight="bold")
    axes.set_xticks([0, 1], ["as it is", "compressed"], fontweight="bold")
    for tick, colour in zip(axes.get_xticklabels(), (PLAIN, COMPRESSED), strict=True):
        tick.set_color(colour)
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_xlim(-1.0, 1.6)
    axes.set_ylim(0, 1.08 * max(peaks))
    axes.spines[["top", "right", "left"]].set_visible(False)


def _title(axes: Axes, title: str, what: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=15, fontweight="bold")
    axes.text(0, 1.03, what, transform=axes.transAxes, color=FAINT)


def _short(value: float, whole_from: float = 20) -> str:
    """Whole numbers from ``whole_from`` on, one decimal below, two digits below one."""
    if value >= whole_from:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _get(result: Result, dotted: str) -> float:
    value: Any = result
    for key in dotted.split("."):
        value = value[key]
    return float(value)


def _change(before: float, after: float) -> str:
    if after > 0 and before / after >= 2:
        return f"{before / after:,.0f}x less"
    return f"{(after / before - 1) * 100:+.1f} %" if before else ""
