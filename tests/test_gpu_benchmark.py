"""The GPU benchmark, on the CPU: what it measures, prints and stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.gpu_measure import by_each
from benchmarks.speed_measure import Contestant, race
from lightning_sketch.kernels import native

ROOT = Path(__file__).parent.parent
RACES = ("dense", "sparse", "tables", "peers")


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What was printed and stored."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = _run("--device", "cpu", "--quick", "--groups", ",".join(("bandwidth", *RACES)), "--out", os.fspath(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.parametrize("group", RACES)
def test_every_contestant_has_a_time_and_its_bytes(group: str, measured: tuple[str, dict[str, Any]]) -> None:
    printed, stored = measured
    rows = stored["groups"][group]
    assert len({row["name"] for row in rows}) == len(rows) > 3
    for row in rows:
        assert f"| {row['label']}" in printed
        if "error" in row:
            assert group == "peers"
            assert row["nonfinite"] is None, f"ours failed: {row}"
            continue
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high
        assert row["bound_milliseconds"] > 0
        assert row["transient_bytes"] >= 0
        against = next(other for other in rows if other["name"] == row["against"])
        assert row["ratio"] == pytest.approx(row["milliseconds"] / against["milliseconds"])


def test_peers_that_cannot_run_are_rows_too(measured: tuple[str, dict[str, Any]]) -> None:
    rows = {row["name"]: row for row in measured[1]["groups"]["peers"]}
    assert {"ao8", "ao4", "bnb8", "flash"} <= set(rows)
    assert "error" in rows["flash"]  # needs a GPU, installed or not


class Spy(SGD):
    """Sees the kernels that are asked for during its steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.seen: list[str | None] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append(os.environ.get(native.VARIABLE))
        super().step(closure)


def test_ours_run_once_under_each_kind_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    layer = nn.Linear(3, 2, bias=False)
    gradients: list[list[Tensor]] = [[torch.ones(2, 3)]]
    peer, own = Spy(layer.parameters()), Spy(layer.parameters())
    entries = [
        Contestant("peer", "a peer", peer, gradients, 1.0, "peer"),
        Contestant("rw", "ours", own, gradients, 1.0, "rw/raise", nonfinite="raise"),
    ]
    rows = race(by_each(entries, {"reference": "plain", "": "Triton"}), warm_up=1, rounds=2)
    assert [row["name"] for row in rows] == ["peer", "rw (plain)/raise", "rw (Triton)/raise"]
    assert [row["ratio"] for row in rows] == [1.0, 1.0, 1.0]  # each is measured against itself
    assert set(peer.seen) == {None}
    assert own.seen.count("reference") == own.seen.count("") == len(own.seen) / 2
    assert native.VARIABLE not in os.environ


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so() -> None:
    done = _run()
    assert done.returncode == 1
    assert "There is no GPU to measure" in done.stderr
    assert "--device cpu --quick" in done.stderr
