"""Every codec under every engine trains as in one process, and each rank holds its share of the states."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks import exactness_demo
from benchmarks.exactness import EQUAL, WITHIN, compare_demo, compare_prescribed, spread
from benchmarks.exactness_prescribed import CODECS, ENGINES, LABELS, Found, by_layer, state_bytes, train
from tests.deepspeed_tools import init_deepspeed
from tests.ranks import run_ranks

STEPS = 8
#: What is not one process's: each rank's own sketch of its rows, and blocks of `Quantized`, which begin anew at a cut.
APART = {(codecs, kind) for codecs in ("sketch", "quantized") for kind in ENGINES}
APART -= {("sketch", "columns"), ("quantized", "rows")}
FAR = 0.2  # at most, of parameters that are apart; 0.15 after 200 steps
#: Under Shard(1) row vectors are whole on every rank, and a row has a block at least on each. Shared sketches are, too.
WHOLE = {(codecs, "columns") for codecs in ("default", "rows", "quantized", "sm3", "factored")}
WHOLE |= {(codecs, kind) for codecs in ("sketched_rows", "synced") for kind in ENGINES}
#: Of the demo's trainings every engine and every codec once. But for DDP with sparse gradients, which test_ddp.py has.
DIAGONAL = (
    ("ddp", "factored"),
    ("zero3", "default"),
    ("rows", "sketched_rows"),
    ("rows", "synced"),
    ("rows", "exact"),
    ("columns", "rounded"),
    ("columns", "sketch"),
    ("columns", "sm3"),
    ("zero1", "quantized"),
    ("zero2", "head"),
    ("zero3", "rows"),
)
#: On how many ranks parameters are compared and bytes counted, and on how many the demo is trained.
WORLD, DEMO_WORLD, DEMO_STEPS = 3, 2, 10

every_engine = pytest.mark.parametrize("kind", ENGINES)


def measure(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    return {
        "trained": {kind: by_layer(train(kind, STEPS)) for kind in ENGINES},
        "bytes": {kind: {codecs: state_bytes(kind, codecs) for codecs in CODECS} for kind in ENGINES},
    }


def train_demo(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    return {pair: exactness_demo.train(*pair, steps=DEMO_STEPS) for pair in DIAGONAL}


@cache
def ranks() -> list[dict[str, Any]]:
    return run_ranks(measure, WORLD)


@cache
def alone() -> Found:
    return by_layer(train("single", STEPS))


@pytest.mark.distributed
@every_engine
def test_parameters_are_those_of_one_process(kind):
    found = ranks()[0]["trained"][kind]
    assert found.keys() == set(LABELS)
    for codecs, expected in alone().items():
        made = compare_prescribed(found[codecs], expected)
        assert made["word"] or (codecs, kind) in APART, (codecs, made)
        assert made["distance"] <= FAR, (codecs, made)


def on_a_grid(rank: int, world_size: int) -> dict[str, Any]:
    return {kind: by_layer(train(kind, STEPS)) for kind in ("grid", "columns")}


@pytest.mark.distributed
def test_two_dimensions_of_the_mesh_are_as_one():
    """Tensor parallelism and FSDP2 both by columns; both by rows is in fsdp2/test_tensor_parallel.py."""
    for rank in run_ranks(on_a_grid, 4):
        for codecs, expected in rank["columns"].items():
            assert compare_prescribed(rank["grid"][codecs], expected)["word"], codecs


@pytest.mark.distributed
def test_zero_2_is_zero_1():
    found = ranks()[0]["trained"]
    for codecs, expected in found["zero1"].items():
        assert compare_prescribed(found["zero2"][codecs], expected)["word"] == EQUAL, codecs


@pytest.mark.distributed
@every_engine
def test_every_rank_ends_with_the_same_parameters(kind):
    first, *others = (found["trained"][kind] for found in ranks())
    for other in others:
        for codecs, expected in first.items():
            assert compare_prescribed(other[codecs], expected)["word"] == EQUAL, codecs


@pytest.mark.distributed
def test_each_rank_holds_its_share_of_the_states():
    for codecs in CODECS:
        whole = state_bytes("single", codecs)
        for found in ranks():
            for kind in ENGINES:
                share = found["bytes"][kind][codecs] / whole
                assert share <= 1 / WORLD + 0.01 or (codecs, kind) in WHOLE, (kind, codecs, share)


@pytest.mark.distributed
def test_the_demo_trains_as_in_one_process():
    assert {kind for kind, _ in DIAGONAL} == exactness_demo.ENGINES.keys() - {"ddp sparse"}
    assert {codecs for _, codecs in DIAGONAL} == LABELS.keys()
    for (_, codecs), trained in run_ranks(train_demo, DEMO_WORLD)[0].items():
        parts = [exactness_demo.train("single", codecs, parts=n, steps=DEMO_STEPS) for n in (1, 2, 3)]
        made = compare_demo(trained, parts[DEMO_WORLD - 1], spread(parts))
        assert made["word"] in (EQUAL, WITHIN), (codecs, made)
