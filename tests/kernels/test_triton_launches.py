"""What a step by Triton's kernels launches, copies, waits for and allocates, counted on fake CUDA tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from benchmarks.launches import CODECS, SMALL, count_step
from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Factored, Policy, RowWise, Rule

pytest.importorskip("triton")

#: Of kernels, for all layers of one dtype and width, also where the numbers of a step stay on the device.
MOST = 6
#: Operators that no dense step may use: they wait, sort, or make shapes that depend on values.
NEVER = ("sort", "nonzero", "_unique2", "unique_consecutive", "masked_select", "index_put_", "topk")
WIDE = (600, 1_032)  # rows of which `observe` settles in a launch of its own
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {"first_moment": BFloat16(), "second_moment": Factored()}),
    "Adam": (partial(Adam, weight_decay=0.1), {"first_moment": Drop(), "second_moment": RowWise()}),
    "Adagrad": (Adagrad, {"second_moment": SM3(momentum=0.9)}),
    "RMSprop": (RMSprop, {"second_moment": CountSketch()}),
    "SGD": (partial(SGD, momentum=0.9, nesterov=True), {"first_moment": BFloat16()}),
}


def _policy(codecs: dict[str, Any]) -> Policy:
    return Policy([Rule(role="embedding", **codecs)])


def _assert_nothing_is_waited_for(counts: Any) -> None:
    assert counts.waits == 0
    assert not [name for name in counts.operators if name.removeprefix("aten::") in NEVER]


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_any_number_of_layers_takes_six_launches_and_one_copy(name: str, shape: tuple[int, int]) -> None:
    found = []
    for layers in (1, 7):
        counts, _ = count_step([shape] * layers, _policy(CODECS[name]), triton=True, nonfinite="propagate")
        assert 1 <= counts.kernels <= MOST
        assert counts.copies == 1  # the table, with hyperparameters
        _assert_nothing_is_waited_for(counts)
        found.append(counts.launches)
    assert found[0] == found[1] <= MOST + 1  # torch zeroes what the kernels count in


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_takes_six_launches(name: str) -> None:
    make, codecs = OPTIMIZERS[name]
    found = []
    for layers in (1, 7):
        counts, _ = count_step([WIDE] * layers, _policy(codecs), make=make, triton=True)
        assert 1 <= counts.kernels <= MOST
        _assert_nothing_is_waited_for(counts)
        found.append(counts.launches)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", CODECS)
def test_a_capturable_step_copies_nothing_from_the_host(name: str) -> None:
    found = []
    for layers in (1, 7):
        make = partial(AdamW, capturable=True)
        counts, _ = count_step([WIDE] * layers, _policy(CODECS[name]), make=make, triton=True, nonfinite="propagate")
        assert 1 <= counts.kernels <= MOST
        assert counts.copies == 0
        _assert_nothing_is_waited_for(counts)
        found.append(counts.launches)
    assert found[0] == found[1]


def test_what_is_left_out_is_counted_by_one_copy_to_the_host() -> None:
    policy = _policy(CODECS["Drop + Factored"])
    copies = [count_step([SMALL], policy, triton=True, nonfinite=x)[0].copies for x in ("propagate", "raise", "skip")]
    assert copies == [1, 2, 2]


@pytest.mark.parametrize("shape", [(3_000, 256), (40_000, 50), (300, 4_096), (20, 20_000), (7, 1)], ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_temporaries_are_those_that_the_report_says(name: str, shape: tuple[int, int]) -> None:
    dtype = torch.bfloat16 if shape[0] in (300, 7) else torch.float32
    make = partial(AdamW, capturable=shape[0] == 300)
    counts, bound = count_step([shape] * 3, _policy(CODECS[name]), make=make, dtype=dtype, triton=True)
    spare = 3 * (1 << 12)  # of each layer: words of a step whose numbers stay on the device
    kept = bound if "CountSketch" in name else counts.temporaries  # orders of rows stay, and are no temporaries
    assert counts.temporaries <= bound <= max(kept, counts.temporaries + spare)
