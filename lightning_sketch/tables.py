"""Tables for people, printed with rich."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lightning_sketch.flat import FlatTensors
    from lightning_sketch.memory import MemoryReport
    from lightning_sketch.plan import LayerPlan, Plan
    from lightning_sketch.portable.convert import Conversion

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Bytes in binary units.

    >>> human_bytes(512), human_bytes(3 * 2**20)
    ('512 B', '3.00 MiB')
    """
    unit = 0
    while abs(count) >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.2f} {_UNITS[unit]}"


def render(table: Table) -> str:
    """A rich table as plain text, wide enough for its contents."""
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def plan_table(plan: Plan) -> str:
    """Layer, shape, role, rule, codecs, bytes before and after. Kept layers that no rule matched share one line."""
    table = Table(title="optimizer states", title_justify="left")
    for column in ("layer", "shape", "role", "rule", "state: codec"):
        table.add_column(column)
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    lazy = [x for x in plan.layers if x.roles == ("lazy",)]
    unmatched = [x for x in plan.layers if x.rule is None and x not in lazy]
    for layer in plan.layers:
        if layer.rule is not None:
            table.add_row(*_row(layer))
    if unmatched:
        size = human_bytes(sum(sum(x.bytes_before.values()) for x in unmatched))
        frozen = sum(x.frozen for x in unmatched)
        what = "kept as they are" + (f" ({frozen} frozen)" if frozen else "")
        table.add_row(f"{len(unmatched)} other parameters", "", "", "none", what, size, size)
    if lazy:
        table.add_row(f"{len(lazy)} lazy parameters", "not known yet", "", "none", "kept as they are", "", "")
    table.add_section()
    table.add_row("total", "", "", "", "", human_bytes(plan.bytes_before), human_bytes(plan.bytes_after))
    return render(table)


def _row(planned: LayerPlan) -> tuple[str, ...]:
    layer = planned.layer
    return (
        layer.fqn + (" (frozen)" if planned.frozen else ""),
        " x ".join(f"{n:,}" for n in layer.shape) or "scalar",
        ", ".join(planned.roles),
        str(planned.rule),
        "\n".join(f"{state}: {short(codec)}" for state, codec in layer.codecs.items()),
        human_bytes(sum(planned.bytes_before.values())),
        human_bytes(sum(planned.bytes_after.values())),
    )


def short(codec: object) -> str:
    """A codec with the options that differ from its defaults.

    >>> from lightning_sketch import CountSketch
    >>> short(CountSketch(compression=5)), short(CountSketch())
    ('CountSketch(compression=5)', 'CountSketch()')
    """
    import dataclasses

    given = [
        f"{f.name}={getattr(codec, f.name)!r}"
        for f in dataclasses.fields(codec)  # type: ignore[arg-type]
        if getattr(codec, f.name) != f.default
    ]
    return f"{type(codec).__name__}({', '.join(given)})"


def conversion_table(done: Conversion) -> str:
    """Bytes, and the relative error of every state that was encoded anew."""
    table = Table(title="converted checkpoint", title_justify="left")
    table.add_column("layer")
    table.add_column("relative error of its states")
    for fqn, errors in done.errors.items():
        table.add_row(fqn, ", ".join(f"{state} {error:.3g}" for state, error in errors.items()))
    table.add_section()
    table.add_row("optimizer states", f"{human_bytes(done.bytes_before)} -> {human_bytes(done.bytes_after)}")
    return render(table)


def flat_table(flats: FlatTensors) -> str:
    """Which rows of which layers lie in DeepSpeed's flat tensors on this rank, and how their states are kept."""
    table = Table(title=f"{flats.engine}: what this rank's flat tensors hold", title_justify="left")
    table.add_column("flat tensor")
    table.add_column("elements", justify="right")
    table.add_column("layer")
    table.add_column("rows")
    table.add_column("columns")
    table.add_column("state: codec")
    for number, flat in enumerate(flats):
        for place in flat.places():
            span = f"{place.start:,}:{place.start + place.length:,}"
            if place.part is None:
                first, last, count = place.fqns[0], place.fqns[-1], len(place.fqns)
                names = first if count == 1 else f"{first} ... {last} ({count} layers)"
                table.add_row(str(number), span, names, "", "", "kept as they are")
                continue
            shard, codecs = place.part.shard, place.part.layer.codecs
            rows = f"{shard.row_offset:,}:{shard.row_offset + shard.local_rows:,} of {shard.global_rows:,}"
            cut = f"{shard.column_offset:,}:{shard.column_offset + shard.row_numel:,}"
            table.add_row(
                str(number),
                span,
                place.fqns[0],
                rows,
                "all" if shard.part_shape is None else cut,
                "\n".join(f"{state}: {short(codec)}" for state, codec in codecs.items()),
            )
        if flat.padding:
            table.add_row(str(number), "", f"padding, {flat.padding:,} elements", "", "", "")
        table.add_section()
    return render(table)


def memory_table(report: MemoryReport) -> str:
    """Parameters, gradients, states by codec, the step's temporaries, and the whole process."""
    table = Table(title="memory of training", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("")
    table.add_row("parameters", human_bytes(report.parameters), "")
    table.add_row("gradients", human_bytes(report.gradients), "")
    ratio = f"{report.dense_state / report.state:.1f}x less than dense" if report.state else "none yet"
    table.add_row("optimizer state", human_bytes(report.state), ratio)
    for codec, count in sorted(report.state_by_codec.items()):
        table.add_row(f"  {codec}", human_bytes(count), "")
    table.add_row("step temporaries, at most", human_bytes(report.transient), "compressed layers")
    table.add_row("kernels", "", report.kernels)
    if report.process is not None:
        table.add_row("process", human_bytes(report.process), f"peak {human_bytes(report.process_peak)}")
    if report.cuda_peak:
        table.add_row("CUDA peak", human_bytes(report.cuda_peak), "")
    for fqn, errors in report.conversion_errors.items():
        text = ", ".join(f"{state} {error:.3g}" for state, error in errors.items())
        table.add_row(f"conversion error of {fqn}", "", text)
    for fqn, count in report.skipped.items():
        table.add_row(f"steps without rows of {fqn}", "", f"{count} (non-finite gradient)")
    return render(table)
