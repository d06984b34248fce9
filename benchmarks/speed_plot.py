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
    sizes = [10 ** (x / 50) for x in range(-150, 60)]  # 0.001 to 15 bytes
    roofline = [(LEAST + 2 * size) / FUSED_ADAMW for size in sizes]  # a state is read and written
    axes.plot(sizes, roofline, color="black", lw=1, label="memory bandwidth: (12 + 2 x state) / 28")
    styles = {
        None: ("o", "tab:gray", "tab:gray", "other libraries"),
        "raise": ("o", "tab:blue", "tab:blue", "lightning_sketch"),
        "propagate": ("o", "tab:blue", "white", "lightning_sketch, no check of the gradient"),
    }
    named: set[str] = set()
    for place, row in enumerate(sorted(rows, key=lambda row: row["state_bytes_per_parameter"])):
        marker, edge, face, label = styles[row["nonfinite"]]
        at = row["state_bytes_per_parameter"], row["ratio"]
        axes.plot(
            *at,
            marker,
            markeredgecolor=edge,
            markerfacecolor=face,
            label=label if label not in named else None,
        )
        named.add(label)
        if row["nonfinite"] != "propagate":  # the same name beside it
            beside = (6, 4) if place % 4 < 2 else (6, -9)  # above and below in turn: some hold as many bytes as others
            axes.annotate(_brief(row["label"]), at, xytext=beside, textcoords="offset points", fontsize=7)
    axes.axhline(1, color="gray", lw=0.7, ls="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(8e-4, 60)
    axes.set_xlabel("optimizer state, bytes per parameter")
    axes.set_ylabel("time of a step / time of AdamW(fused=True)")
    axes.set_title(f"One dense float32 table on the CPU, {count} thread{'s' * (count != '1')}")
    axes.grid(alpha=0.3, which="major")
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _brief(label: str) -> str:
    return label.split(" (")[0]
