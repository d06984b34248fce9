"""The demonstration of docs/guide.md, small: a sketch that is far too small is found out, widened, and learns."""

from __future__ import annotations

import json

from benchmarks.monitor_demo import Settings, last_loss, plot, train

SMALL = Settings(words=600, width=16, batch=64, steps=400, every=40, compression=100, lr=0.02)


def test_widening_brings_the_loss_nearer_to_that_of_exact_states(tmp_path):
    runs = {run: train(run, SMALL) for run in ("exact", "sketch", "widen", "keep")}
    exact, sketch, widened = (last_loss(runs[run]["losses"]) for run in ("exact", "sketch", "widen"))
    assert exact < widened < sketch
    assert widened - exact < (sketch - exact) * 0.7
    assert runs["sketch"]["bytes"] < runs["widen"]["bytes"] <= runs["exact"]["bytes"] + 100
    assert runs["sketch"]["losses"][: SMALL.every] == runs["widen"]["losses"][: SMALL.every]
    results = json.loads(json.dumps({"settings": vars(SMALL), "runs": runs}))
    plot(results, tmp_path / "monitor.png")
    assert (tmp_path / "monitor.png").stat().st_size > 10_000
