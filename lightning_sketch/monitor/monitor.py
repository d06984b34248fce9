"""`Monitor`: measures in training how well compressed states do, and acts where they drift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.layers.roles import check_pattern
from lightning_sketch.monitor.drift import OnDrift, Threshold
from lightning_sketch.monitor.figures import LayerFigures
from lightning_sketch.monitor.refused import refuse
from lightning_sketch.monitor.watch import Watch
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.groups import NO_MONITOR
from lightning_sketch.rules.inside import unwrap


class Monitor:
    """Keep exact states of a few rows of every compressed layer, and compare.

    Give it to ``compress(..., monitor=monitor)`` or to Lightning's callback, or attach it to a converted optimizer.
    From then on the states that torch's optimizer would keep of the sampled rows are advanced in every step by the same
    gradients, as the optimizer sees them: unscaled, clipped. What a step leaves out is to them what rows are that a
    sparse gradient lacks, and a step that a GradScaler skips is none. Every `every` steps the stored states are
    compared with them: `figures`.

    Half of the rows are drawn from those of the layer's first gradient, half from all rows that this rank holds, by the
    layer's seed; they are the same from then on. States that exist then, or are loaded later, are taken for exact: what
    encoding them lost is in ``report(optimizer).conversion_errors``.

    Sums over the rows are added up over all ranks of the default process group, so figures, and what is done about
    them, are the same on every rank. That is one collective in the steps in which figures are made; only these wait for
    an accelerator. Every rank must make the same steps.

    Args:
        rows: how many of each layer, on each rank.
        every: steps between figures.
        on_drift: what to do about a layer whose figures are past the threshold. "log" and "warn" say so when it begins;
            "raise" raises `StateDrift` after the step was made. "widen" gives all sketches of the layer twice as many
            buckets, whenever figures are past it, in the end one for each row: `CountSketch` and
            ``RowWise(compression=)``. Rows that shared a bucket stay mixed up in what is stored until it has decayed.
            "keep" makes its states dense, as they are estimated then; a dropped moment stays dropped.
            Where nothing can be widened or kept, these warn.
        threshold: see `Threshold`.
        layers: names of the compressed parameters to watch, or patterns as in `Rule`; ``None`` for all. Each
            takes 10 to 20 small operations more in a step.

    Attributes:
        made: how often figures were made.

    Raises:
        ValueError: an option is out of range.

    >>> import torch
    >>> from lightning_sketch import Monitor, Policy, Rule, compress
    >>> model = torch.nn.Embedding(30_000, 16)
    >>> policy = Policy([Rule(role="embedding", exp_avg="Drop", exp_avg_sq="RowWise")])
    >>> monitor = Monitor(every=10, on_drift="warn")
    >>> optimizer = compress(torch.optim.AdamW(model.parameters()), model, policy, monitor=monitor)
    >>> for step in range(10):
    ...     model(torch.arange(50)).square().sum().backward()
    ...     optimizer.step()
    >>> sorted(monitor.figures())  # doctest: +NORMALIZE_WHITESPACE
    ['optimizer_state/weight/exp_avg_sq_error', 'optimizer_state/weight/left_out',
     'optimizer_state/weight/update_cosine', 'optimizer_state/weight/update_norm_ratio']
    """

    def __init__(
        self,
        rows: int = 64,
        every: int = 100,
        on_drift: OnDrift = "log",
        threshold: Threshold | None = None,
        layers: str | Sequence[str] | None = None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"Monitor(rows={rows}): must be >= 1")
        if every < 1:
            raise ValueError(f"Monitor(every={every}): must be >= 1")
        if on_drift not in get_args(OnDrift):
            raise ValueError(f"Monitor(on_drift={on_drift!r}): must be one of {', '.join(get_args(OnDrift))}")
        self.layers = None if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
        for pattern in self.layers or ():
            check_pattern(pattern)
        self.rows, self.every = rows, every
        self.on_drift: OnDrift = on_drift
        self.threshold = Threshold() if threshold is None else threshold
        self.made = 0
        self._latest: dict[str, LayerFigures] = {}

    def by_layer(self) -> dict[str, LayerFigures]:
        """The figures of every layer that was stepped, by name, as they were made last."""
        return dict(self._latest)

    def figures(self) -> dict[str, float]:
        """The same for a logger, under ``optimizer_state/<layer>/...``; empty before any were made."""
        return {key: value for fqn, layer in self._latest.items() for key, value in layer.to_dict(fqn).items()}

    def attach(self, optimizer: Any) -> None:
        """Watch a converted optimizer from its next step on, in place of another monitor if it has one.

        Args:
            optimizer: a converted optimizer, or a trainer's wrapper around one. Several may have the same monitor.

        Raises:
            TypeError: it is not converted.
            ValueError: it has no update rule of ours, steps in backward, or is ``capturable``. Nothing was changed.
            RuntimeError: under DeepSpeed's ZeRO. In the first step, where a layer is cut by columns.
        """
        inner = unwrap(optimizer)
        if not isinstance(inner, CompressedOptimizer):
            raise TypeError(
                f"a monitor watches converted optimizers, and this is a {type(inner).__name__}; call compress() first"
            )
        layers = map(LayerRecord.from_record, inner.compression.records)
        self.check(layers, inner.param_groups, step_in_backward=inner.compression.step_in_backward)
        if inner.compression.flat is not None or any(map(inner.is_flat, inner.param_groups)):
            raise RuntimeError(NO_MONITOR)
        inner.compression.watcher = Watch(self.rows, self.every, self.on_drift, self.threshold, self.layers, self._tell)

    def detach(self, optimizer: Any) -> None:
        """Leave a converted optimizer alone; one that no monitor watches stays as it is."""
        inner = unwrap(optimizer)
        if isinstance(inner, CompressedOptimizer):
            inner.compression.watcher = None

    def check(
        self, layers: Iterable[LayerRecord], groups: Iterable[Mapping[str, Any]], *, step_in_backward: bool
    ) -> None:
        """Raise ValueError if these layers cannot be watched; see `attach`."""
        refuse(layers, groups, step_in_backward=step_in_backward)

    def _tell(self, figures: Mapping[str, LayerFigures]) -> None:
        self._latest |= figures
        self.made += 1
