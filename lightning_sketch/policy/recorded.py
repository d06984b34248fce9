"""The policy that a checkpoint was written under, as one line of Python."""

from __future__ import annotations

import glob
from collections.abc import Iterable

from lightning_sketch.kernels.reference import layer_seed
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.policy.rule import STATE_NAMES

# A layer's record holds a digest of the policy's seed and its name; seeds that people choose are found by trying.
_SEEDS_TRIED = 10_000


def policy_hint(saved: Iterable[LayerRecord], live: Iterable[LayerRecord], seed: int | None) -> str:
    """The end of an error message: the policy that loads a checkpoint, if the live one is what keeps it from loading.

    Args:
        saved: the checkpoint's compressed layers.
        live: those of the optimizer.
        seed: of the live policy, if it is known.

    Returns:
        Empty if codecs and seeds are the same, or the checkpoint is another optimizer's.
    """
    was, now = {layer.fqn: layer for layer in saved}, {layer.fqn: layer for layer in live}
    same = {fqn for fqn in was.keys() & now.keys() if _decision(was[fqn]) == _decision(now[fqn])}
    other_states = any(was[fqn].signed.keys() != now[fqn].signed.keys() for fqn in was.keys() & now.keys())
    if not was or other_states or was.keys() == now.keys() == same:
        return ""
    return f"\nThat policy is\n  {policy_line(list(was.values()), seed)}"


def policy_line(layers: Iterable[LayerRecord], seed: int | None = None) -> str:
    """A policy under which these layers have their codecs, as Python with the names of `lightning_sketch`.

    >>> from lightning_sketch import Drop, RowWise
    >>> states = {"exp_avg": True, "exp_avg_sq": False}
    >>> codecs = {"exp_avg": Drop(), "exp_avg_sq": RowWise(compression=10)}
    >>> names = ("emb.weight", "head.weight")
    >>> policy_line([LayerRecord(fqn, layer_seed(7, fqn), (9, 2), states, codecs) for fqn in names])
    "Policy([Rule(name=('emb.weight', 'head.weight'), exp_avg=Drop(), exp_avg_sq=RowWise(compression=10))], seed=7)"

    Args:
        seed: tried first.
    """
    from lightning_sketch.text import short  # rich is slow to import

    layers = list(layers)
    by_codecs: dict[str, list[str]] = {}
    for layer in layers:
        codecs = {state: codec for state, codec in layer.codecs.items() if not codec.exact}
        text = ", ".join(f"{state}={short(codec)}" for state, codec in codecs.items() if state in STATE_NAMES)
        if others := [f"{state!r}: {short(codec)}" for state, codec in codecs.items() if state not in STATE_NAMES]:
            text = ", ".join([text] * bool(text) + [f"states={{{', '.join(others)}}}"])
        by_codecs.setdefault(text, []).append(glob.escape(layer.fqn))
    rules = [f"Rule(name={(tuple(fqns) if fqns[1:] else fqns[0])!r}, {text})" for text, fqns in by_codecs.items()]
    found = _seed_of(layers, seed)
    if found is None:
        return f"Policy([{', '.join(rules)}], seed=...)  # the seed it was written under, which it does not name"
    return f"Policy([{', '.join(rules)}]{f', seed={found}' if found else ''})"


def _decision(layer: LayerRecord) -> tuple[object, ...]:
    return dict(layer.codecs), layer.seed


def _seed_of(layers: list[LayerRecord], first: int | None) -> int | None:
    candidates = [*([] if first is None else [first]), *range(_SEEDS_TRIED)]
    return next((s for s in candidates if all(x.seed == layer_seed(s, x.fqn) for x in layers)), None)
