"""A step on an accelerator in plain PyTorch: what it launches, waits for and allocates, and that it is the CPU's step.

One 128,256 x 4,096 table under the default policy launched 296,601 kernels a step on CUDA, because blocks sized for a
CPU's cache hashed and gathered their rows anew, twice. Devices are fake here; `benchmarks.launches` counts.
"""

from __future__ import annotations

import logging
from functools import cached_property

import pytest
import torch
from torch import nn

from benchmarks.launches import LARGE, LAYERS, SMALL, count_step, counting, policies
from lightning_sketch import Policy, Quantized, Rule, compress, kernels, report
from lightning_sketch.codecs import encode
from lightning_sketch.kernels.reference import segment_add, sorted_segment_add
from lightning_sketch.layers.record import LayerPart
from lightning_sketch.rules import alike
from lightning_sketch.sharding import base
from lightning_sketch.sharding.gradient import RowGradient
from tests.tiny import CASES, CODECS, FOR_SGD, Tiny, assert_same, on_table, snapshot, train

#: For a table of any size; and what its temporaries are at most, in bytes for a byte of the parameter.
MOST_LAUNCHES, MOST_TEMPORARIES = 400, 2.0
#: For 200 layers of 1,024 x 256, which are three batches.
MOST_OF_SMALL = 600
POLICIES = policies() | {
    "Quantized in 4 bits, both": Policy(
        [Rule(role="embedding", first_moment=Quantized(bits=4), second_moment=Quantized(bits=4))]
    )
}
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", POLICIES)
def test_a_large_table_launches_four_hundred_kernels_at_most(name):
    counts, bound = count_step([LARGE], POLICIES[name])
    assert 0 < counts.launches <= MOST_LAUNCHES
    assert counts.waits == 0
    assert counts.temporaries <= bound
    if "CountSketch" not in name:  # which adds up as much as its table
        assert counts.temporaries <= MOST_TEMPORARIES * LARGE[0] * LARGE[1] * 4


def test_launches_do_not_grow_with_the_table():
    found = {count_step([(rows, 4_096)], POLICIES["default"])[0].launches for rows in (65_536, 1_000_000)}
    assert len(found) == 1


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "default"])  # which keeps small layers
def test_small_layers_that_are_alike_launch_what_one_does(name, monkeypatch):
    monkeypatch.setattr(alike, "MOST_NUMEL", 2 * SMALL[0] * SMALL[1])
    counts, bound = count_step([SMALL] * 6, POLICIES[name])  # three batches, as of 200
    assert 0 < counts.launches <= MOST_OF_SMALL - 3 * 10  # stacking 67 layers takes a few launches more
    assert counts.waits == 0
    assert counts.temporaries <= bound


def test_two_hundred_small_layers():
    counts, bound = count_step([SMALL] * LAYERS, POLICIES["BFloat16, both"])
    assert 0 < counts.launches <= MOST_OF_SMALL
    assert bound / 3 < counts.temporaries <= bound


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_a_step_waits_for_nothing(nonfinite):
    for policy in POLICIES.values():
        assert count_step([(30_000, 64)], policy, nonfinite=nonfinite)[0].waits == 0


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(60_000, 1_000), (3_000_000, 2)], ids=str)
def test_temporaries_are_within_the_reported_bound(name, shape):
    counts, bound = count_step([shape], POLICIES[name])
    assert bound / 20 < counts.temporaries <= bound


def test_squares_that_no_codec_reads_are_not_made():
    for name, squares in (("Drop + RowWise", 1), ("Drop + SM3", 1), ("CountSketch, both", 1)):
        counts, _ = count_step([(16_384, 1_024)], POLICIES[name])  # one block
        assert counts.operators["aten::pow"] == squares, name


def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the CPU's tensors cut into blocks as an accelerator's are."""
    blocks = cached_property(lambda self: tuple(self.shard.blocks(self.rows, CUDA)))
    blocks.__set_name__(RowGradient, "blocks")
    monkeypatch.setattr(RowGradient, "blocks", blocks)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_made_for_all_rows_at_once_is_what_blocks_make(case, sparse, monkeypatch):
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: None)
    monkeypatch.setattr(base, "BLOCK_NUMEL", 28)  # seven rows of 30
    monkeypatch.setattr(base, "ACCELERATOR_BLOCK_NUMEL", 28)
    for name in FOR_SGD if case.cls is torch.optim.SGD else CODECS:
        if (name == "paper" or case.sparse) and not (case.sparse and sparse):
            continue  # the paper's rule depends on the blocks; SparseAdam takes sparse gradients only
        runs = []
        for accelerator in (False, True):
            torch.manual_seed(0)
            model = Tiny()
            with monkeypatch.context() as patch:
                if accelerator:
                    _as_on_an_accelerator(patch)
                kwargs = {"weight_decay": 0.0} if sparse and "weight_decay" in case.kwargs else {}
                parameters = model.table.parameters()
                optimizer = compress(case.make(parameters, **kwargs), model.table, on_table(**CODECS[name]))
                train(model, optimizer, range(4), sparse=sparse)
            runs.append(snapshot(model, optimizer))
        assert_same(runs[1], runs[0])


def test_states_are_encoded_with_few_launches():
    """`compress` in the middle of training, and `load_state_dict` of a dense checkpoint."""
    with counting() as mode:
        model = nn.Embedding(1, 1)
        model.weight = nn.Parameter(mode.tensor(*LARGE))
        optimizer = compress(torch.optim.AdamW(model.parameters()), model)
        (_, layer, param), group = next(iter(optimizer.compressed_layers())), optimizer.param_groups[0]
        part = LayerPart(layer, base.Shard.whole(layer.shape))
        mode.reset()
        encode(layer.codecs["exp_avg_sq"], part.spec("exp_avg_sq", param, group), mode.tensor(*LARGE))
        assert mode.counts().launches <= MOST_LAUNCHES


@pytest.mark.parametrize("width", [1, 7, 40])
@pytest.mark.parametrize("tail", [(), (3,)], ids=str)
def test_sums_by_sorting_are_the_sums(width, tail):
    buckets = torch.randint(0, width, (100,))
    values, table = torch.randn(100, *tail), torch.randn(width, *tail)
    expected, found = table.clone(), table.clone()
    segment_add(expected, buckets, values)
    sorted_segment_add(found, buckets, values)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    sorted_segment_add(found, buckets[:0], values[:0])  # a rank without rows


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_sums_have_one_order_on_every_device(device):
    with counting(device) as mode:
        table, buckets, values = mode.tensor(50, 4), mode.tensor(9, dtype=torch.int64), mode.tensor(9, 4)
        segment_add(table, buckets, values)
        operators = mode.counts().operators
    assert "aten::sort" in operators
    assert not {"aten::index_add_", "aten::index_put_", "aten::scatter_add_"} & set(operators)


def test_the_first_step_on_an_accelerator_says_once_which_path_steps(caplog):
    kernels._announce.cache_clear()
    caplog.set_level(logging.INFO)
    count_step([(30_000, 4)], None)  # two steps
    count_step([(30_000, 4)], None)
    (said,) = [record for record in caplog.records if record.name == "lightning_sketch.kernels"]
    assert said.levelno == logging.WARNING  # plain PyTorch is the slow way there
    assert "plain PyTorch on cuda" in said.getMessage()
    assert "switched off by LIGHTNING_SKETCH_KERNELS" in said.getMessage()


def test_nothing_is_said_on_the_cpu(caplog):
    caplog.set_level(logging.INFO)
    model = Tiny()
    train(model, compress(torch.optim.Adam(model.parameters()), model, on_table(**CODECS["rows"])), [0])
    assert not [record for record in caplog.records if record.name == "lightning_sketch.kernels"]


def test_the_report_says_what_steps_on_the_parameters_device():
    with counting() as mode:
        model = nn.Embedding(1, 1)
        model.weight = nn.Parameter(mode.tensor(30_000, 4))
        optimizer = compress(torch.optim.AdamW(model.parameters()), model)
        assert report(optimizer).kernels.startswith("plain PyTorch on cuda")
    assert "cuda" not in report(torch.optim.AdamW(Tiny().parameters())).kernels
