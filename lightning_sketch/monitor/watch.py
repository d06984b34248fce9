"""One optimizer under a monitor: told of its steps, it advances the samples, makes figures, and acts on drift."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of Dynamo

from lightning_sketch.codecs import Codec, Keep
from lightning_sketch.kernels.capture import capturing
from lightning_sketch.layers.record import LayerPart
from lightning_sketch.layers.roles import matches_name
from lightning_sketch.monitor.drift import OnDrift, StateDrift, Threshold
from lightning_sketch.monitor.figures import LayerFigures, Sums, measure, over_ranks
from lightning_sketch.monitor.refused import refuse_part
from lightning_sketch.monitor.shadow import Shadow, Taken
from lightning_sketch.optimizer.bound import PendingUpdate
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.optimizer.nonfinite import Counted, Unit
from lightning_sketch.optimizer.on_device import stay_on_device
from lightning_sketch.optimizer.recode import change_codecs, wider_codecs
from lightning_sketch.sharding.agree import gather_objects, is_rank_zero
from lightning_sketch.sharding.fake import is_fake
from lightning_sketch.text import short

logger = logging.getLogger(__name__)


class Watch:
    """The samples of one optimizer's layers. Neither copied nor pickled with it.

    Args:
        rows, every, on_drift, threshold, layers: see `Monitor`.
        tell: called with figures of all layers, whenever they were made.

    Attributes:
        shadows: the sampled rows of each layer that was stepped, by name.
    """

    def __init__(
        self,
        rows: int,
        every: int,
        on_drift: OnDrift,
        threshold: Threshold,
        layers: Sequence[str] | None,
        tell: Callable[[Mapping[str, LayerFigures]], None],
    ) -> None:
        self._rows, self._every, self._on_drift, self._threshold, self._tell = rows, every, on_drift, threshold, tell
        self._layers, self._watched = layers, dict[str, bool]()
        self.shadows: dict[str, Shadow] = {}
        self._calls = 0
        self._left_out: Counter[str] = Counter()  # by layer
        self._counts: list[tuple[Sequence[Unit], Tensor]] = []  # what is to be added to it
        # Layers whose update, and which altogether, were past the threshold when figures were made last.
        self._update_past: set[str] = set()
        self._past: set[str] = set()

    @_disable_dynamo
    def before(self, optimizer: CompressedGroups, ready: Sequence[PendingUpdate]) -> list[Taken]:
        """Copy what a step is going to do to the sampled rows.

        Raises:
            RuntimeError: a graph is being captured, or a layer cannot be watched. Nothing was changed then.
        """
        if capturing():
            raise RuntimeError(
                "a step under a monitor cannot be captured into a graph: replays would not tell it of their steps. "
                "Call monitor.detach(optimizer) before"
            )
        if not ready or is_fake(ready[0].param):
            return []
        taken: list[Taken] = []
        for own in ready:
            (part, *_) = own.parts
            shadow = self.shadows.get(part.layer.fqn)
            if shadow is None and not self._is_watched(part.layer.fqn):
                continue
            gradient = own.gradients[0] if own.gradients else part.gradient(own.grad)  # type: ignore[arg-type]
            if shadow is None or shadow.part.shard != part.shard or shadow.rows.device != own.param.device:
                if own.grad is None:
                    continue  # rows are chosen by a gradient
                refuse_part(part)
                shadow = self.shadows[part.layer.fqn] = Shadow(part, own, gradient, self._rows)
            shadow.part = part
            taken.append(shadow.take(optimizer, own, gradient))
        return taken

    def _is_watched(self, fqn: str) -> bool:
        if self._layers is None:
            return True
        if fqn not in self._watched:  # asked in every step
            self._watched[fqn] = any(fqn == pattern or matches_name(pattern, fqn) for pattern in self._layers)
        return self._watched[fqn]

    @_disable_dynamo
    def after(self, optimizer: CompressedGroups, taken: Sequence[Taken], counted: Counted | None) -> None:
        """Advance the samples by the step that was made; every so often make figures, which is collective.

        Raises:
            StateDrift: figures are past the threshold, and ``on_drift="raise"``.
        """
        self._calls += 1
        left_out = counted is not None and (not counted.counts.is_cpu or bool(counted.counts.any()))
        made = {}
        for each in taken:
            shadow = self.shadows[each.own.parts[0].layer.fqn]
            if shadow.advance(optimizer.rule, each, leave_out=left_out):
                made[shadow.part.layer.fqn] = each
        if counted is not None and left_out:
            self._count(counted)
        if self._calls % self._every == 0:
            self._look(optimizer, made)

    def forget(self, layers: Collection[str] | None = None) -> None:
        """Take the states of these layers, or of all, for exact in the next step: they were replaced from outside."""
        for fqn in list(self.shadows) if layers is None else layers:
            if fqn in self.shadows:
                self.shadows[fqn].replaced = True

    def _count(self, counted: Counted) -> None:
        """Keep what was left out until figures are made, on the device."""
        counts, units, _ = counted
        if self._counts and list(self._counts[-1][0]) == list(units):
            self._counts[-1][1].add_(counts)
        else:
            self._counts.append((units, counts.clone()))

    def _look(self, optimizer: CompressedGroups, made: Mapping[str, Taken]) -> None:
        figures = over_ranks(gather_objects(self._sums(optimizer, made)))
        if figures:
            self._tell(figures)
        updates = {fqn: words for fqn, layer in figures.items() if (words := self._threshold.update_past(layer))}
        past: dict[str, list[str]] = {}
        for fqn, layer in figures.items():
            twice = updates.get(fqn, []) if fqn in self._update_past else []
            if words := self._threshold.moments_past(layer) + twice:
                past[fqn] = words
        self._update_past = set(updates)
        news, self._past = past.keys() - self._past, set(past)
        if past:
            self._act(optimizer, past, news)

    def _sums(self, optimizer: CompressedGroups, made: Mapping[str, Taken]) -> dict[str, Sums]:
        for units, counts in self._counts:
            for (fqn, _), count in zip(units, counts.tolist(), strict=True):
                self._left_out[fqn] += count
        self._counts.clear()
        found: dict[str, Sums] = {}
        for group, param, parts in optimizer.compressed_tensors():
            part, state = parts[0], optimizer.state.get(param)
            shadow = self.shadows.get(part.layer.fqn)
            if shadow is None or not state:
                continue
            taken = made.get(part.layer.fqn)
            stored = shadow.stored(param, group, state, on_device=stay_on_device(group, param, parts))
            updates = None if taken is None else shadow.updates(optimizer.rule, taken, stored)
            sums = found[part.layer.fqn] = measure(part, state, stored, shadow.states, updates)
            sums.left_out = self._left_out[part.layer.fqn]
        return found

    def _act(self, optimizer: CompressedGroups, past: Mapping[str, Sequence[str]], news: Collection[str]) -> None:
        on_drift = self._on_drift
        said = {fqn: ", ".join(words) for fqn, words in past.items()}
        if on_drift == "raise":
            raise StateDrift(
                "compressed states have drifted from exact ones on the sampled rows:\n  "
                + "\n  ".join(f"{fqn}: {words}" for fqn, words in said.items())
                + "\nGive these layers a milder codec (a lower compression, BFloat16), or let the monitor change them: "
                'on_drift="widen" or "keep"'
            )
        changed: dict[str, dict[str, Codec]] = {}
        if on_drift in ("widen", "keep"):
            parts = [part for _, _, (part, *_) in optimizer.compressed_tensors() if part.layer.fqn in past]
            every = {part.layer.fqn: wider_codecs(part) if on_drift == "widen" else _dense(part) for part in parts}
            changed = {fqn: codecs for fqn, codecs in every.items() if codecs}
            change_codecs(optimizer, changed, wider=on_drift == "widen")
            self._past -= changed.keys()
        if not is_rank_zero():
            return
        for fqn, words in said.items():
            if codecs := changed.get(fqn):
                now = ", ".join(f"{state} in {short(codec)}" for state, codec in codecs.items())
                logger.warning("%s: %s; from now on %s", fqn, words, now)
            elif fqn in news:
                level = logging.INFO if on_drift == "log" else logging.WARNING
                nothing = "" if on_drift in ("log", "warn") else f'; nothing is left to be done by "{on_drift}"'
                logger.log(level, "%s: compressed states have drifted: %s%s", fqn, words, nothing)


def _dense(part: LayerPart) -> dict[str, Codec]:
    """Dense states for all that a layer stores; what the policy drops stays dropped."""
    return {name: Keep() for name, codec in part.layer.persistent_codecs().items() if not codec.exact}
