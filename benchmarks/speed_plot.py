"""The picture of docs/performance.md: step time against state size, with the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FUSED_ADAMW = 28  # bytes per parameter: four arrays read, three written
LEAST = 12  # parameter and gradient read, parameter written
PLOTTED = "2"  # threads


def plot(stored: dict[str, Any], path: Path) -> None:
    """Time relative to fused AdamW over state bytes per parameter, ours and peers, of the group ``peers``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = stored["threads"]
    measured = [count for count in threads if "peers" in threads[count]]
    if not measured:
        return
    count = PLOTTED if PLOTTED in measured else measured[0]
    rows = [row for row in threads[count]["peers"] if "error" not in row]
    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=110)
    sizes = [10 ** (x / 50) for x in range(-185, 60)]  # 0.0002 to 15 bytes
    roofline = [(LEAST + 2 * size) / FUSED_ADAMW for size in sizes]  # a state is read and written
    axes.plot(sizes, roofline, color="black", lw=1, label="memory bandwidth: (12 + 2 x state) / 28")
    styles = {
        None: ("tab:gray", "tab:gray", "other libraries"),
        "raise": ("tab:blue", "tab:blue", "lightning_sketch"),
        "propagate": ("tab:blue", "white", "lightning_sketch, no check of the gradient"),
    }
    named: set[str] = set()
    points: dict[str, list[tuple[float, float]]] = {}  # of each name: with and without the check
    for row in rows:
        edge, face, label = styles[row["nonfinite"]]
        at = row["state_bytes_per_parameter"], row["ratio"]
        axes.plot(*at, "o", markeredgecolor=edge, markerfacecolor=face, label=label if label not in named else None)
        named.add(label)
        points.setdefault(_brief(row["label"]), []).append(at)
    for both in points.values():
        axes.plot(*zip(*both, strict=True), color="tab:blue", lw=0.7, zorder=0)
    axes.axhline(1, color="gray", lw=0.7, ls="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(2e-4, 150)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("optimizer state, bytes per parameter")
    axes.set_ylabel("time of a step / time of AdamW(fused=True)")
    axes.set_title(f"One dense float32 table on the CPU, {count} thread{'s' * (count != '1')}")
    axes.grid(alpha=0.3, which="major")
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    _label(axes, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _label(axes: Any, points: dict[str, list[tuple[float, float]]]) -> None:
    """Write the names to the right of their points, lowest first, each above those that it would cover."""
    from matplotlib.transforms import Bbox

    drawn = [axes.transData.transform(at) for both in points.values() for at in both]
    shown = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in drawn]
    for name, both in sorted(points.items(), key=lambda item: min(y for _, y in item[1])):
        x, y = both[0][0], min(y for _, y in both)
        for up in range(-3, 200):
            text = axes.annotate(name, (x, y), xytext=(9, up), textcoords="offset points", fontsize=7)
            extent = text.get_window_extent()
            if not any(extent.overlaps(other) for other in shown):
                shown.append(extent)
                break
            text.remove()


def _brief(label: str) -> str:
    return label.split(" (")[0].removesuffix(", no check")
