"""report: the bytes that training holds now."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Adam, AdamW, RMSprop
from torch.testing._internal.two_tensor import TwoTensor

from lightning_sketch import SM3, BFloat16, CountSketch, Policy, RowWise, Rule, compress, report
from lightning_sketch.kernels import native
from lightning_sketch.layers.temporaries import fused_step, transient_bytes
from lightning_sketch.sharding.base import BLOCK_NUMEL
from tests.profiled import peak_bytes
from tests.tiny import ADAM, CODECS, LOSSY, Tiny, on_table, train

TABLE, KEPT = 30 * 4, 4 * 3 + 3  # elements
SCALE = 8  # bytes


def test_before_the_first_step_there_are_only_parameters():
    model = Tiny()
    found = report(compress(Adam(model.parameters()), model, LOSSY))
    assert (found.parameters, found.gradients, found.state, found.dense_state) == (4 * (TABLE + KEPT), 0, 0, 0)


def test_state_bytes_by_codec():
    model = Tiny()
    policy = on_table(exp_avg=BFloat16(), exp_avg_sq=CountSketch(width=5, depth=3))
    optimizer = compress(Adam(model.parameters()), model, policy)
    train(model, optimizer, range(2))
    found = report(optimizer)
    counters = 3 * 4  # one float32 step per layer
    kept = 2 * 4 * KEPT
    assert found.state_by_codec == {
        "Keep": kept + counters,
        "BFloat16": 2 * TABLE,
        "CountSketch": 4 * 3 * 5 * 4 + SCALE,
    }
    assert found.state == sum(found.state_by_codec.values())
    assert found.gradients == 4 * (TABLE + KEPT)
    assert found.dense_state == 2 * 4 * TABLE + kept + 2 * 4  # the kept layers' counters with them


def test_a_plain_optimizer_is_reported_too():
    model = Tiny()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(1))
    found = report(optimizer)
    assert found.state == found.dense_state == sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert found.state_by_codec.keys() == {"Keep"}
    assert (found.transient, found.conversion_errors, found.skipped) == (0, {}, {})


def test_states_in_lists_and_tensors_made_of_others_are_counted():
    model = Tiny()
    optimizer = AdamW(model.parameters())
    param = next(model.parameters())
    inside = TwoTensor(torch.zeros(3), torch.zeros(3))
    optimizer.state[param] = {"factors": [torch.zeros(5), (torch.zeros(2), None)], "by_name": {"x": inside}, "n": 3}
    assert report(optimizer).state == 4 * (5 + 2 + 3 + 3)


@pytest.mark.parametrize("name", CODECS)
def test_every_tensor_is_counted_once(name):
    model = Tiny()
    optimizer = compress(Adam(model.parameters()), model, on_table(**CODECS[name]))
    train(model, optimizer, range(2))
    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert report(optimizer).state == sum(t.nbytes for t in held)


def test_sparse_gradients_count_their_indices_and_values():
    model = nn.Embedding(1000, 4, sparse=True)
    optimizer = compress(Adam(model.parameters()), model, Policy([Rule(second_moment=RowWise())]))
    model(torch.tensor([3, 3, 8])).sum().backward()
    assert report(optimizer).gradients == 3 * 8 + 3 * 4 * 4


@pytest.mark.parametrize("wrap", [LightningOptimizer, lambda o: Accelerator(cpu=True).prepare(o)], ids=["L", "A"])
def test_wrappers_are_looked_through(wrap):
    model = Tiny()
    optimizer = compress(Adam(model.parameters()), model, LOSSY)
    train(model, optimizer, [0])
    assert report(wrap(optimizer)).state_by_codec == report(optimizer).state_by_codec


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got Linear"):
        report(nn.Linear(2, 2))


def test_the_report_is_frozen_and_logs_as_numbers():
    model = Tiny()
    optimizer = compress(Adam(model.parameters()), model, on_table(second_moment=SM3()))
    train(model, optimizer, [0])
    found = report(optimizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.parameters = 0
    figures = found.to_dict()
    assert figures["optimizer_state/bytes"] == found.state
    assert figures["optimizer_state/bytes_SM3"] == 4 * (30 + 4) + SCALE
    assert figures["optimizer_state/dense_bytes"] == found.dense_state
    assert all(type(value) is int for value in figures.values())


def test_the_table_says_it_all():
    model = Tiny()
    optimizer = Adam(model.parameters())
    train(model, optimizer, [0])
    compress(optimizer, model, on_table(second_moment=SM3()), nonfinite="skip")
    model.table.weight.grad.fill_(torch.nan)
    with pytest.warns(UserWarning, match=r"NaN or inf in the gradient of table.weight"):
        optimizer.step()
    text = str(report(optimizer))
    for part in ("parameters", "540 B", "optimizer state", "less than dense", "  SM3", "144 B", "step temporaries",
                 "conversion error of table.weight", "exp_avg 0, exp_avg_sq ", "steps without rows of table.weight",
                 "1 (non-finite gradient)"):  # fmt: skip
        assert part in text
    assert "none yet" in str(report(Adam(model.parameters())))


def test_the_process_is_measured():
    found = report(ADAM.make(Tiny().parameters()))
    assert 50 << 20 < found.process <= found.process_peak * 1.1 < 1 << 40
    assert found.cuda_peak == 0


NARROW = ("exact", "sketch", "sketched rows")  # one number per row: hashes outweigh values


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("name", "dim"), [*((name, 64) for name in CODECS), *((name, 1) for name in NARROW)])
def test_a_step_needs_no_more_than_the_reported_temporaries(name, dim, sparse):
    rows = 5 * BLOCK_NUMEL // 4 // dim
    model = nn.Embedding(rows, dim, sparse=sparse)
    optimizer = compress(RMSprop(model.parameters(), centered=True, momentum=0.5), model, on_table(**CODECS[name]))
    if sparse:
        ids = torch.randint(0, rows, (1, rows))
        model.weight.grad = torch.sparse_coo_tensor(ids, torch.randn(rows, dim), (rows, dim), check_invariants=True)
    else:
        model.weight.grad = torch.randn(rows, dim)
    optimizer.step()  # allocates the states
    bound = report(optimizer).transient
    (part,) = next(iter(optimizer.compressed_tensors()))[2]
    # The fused kernels' temporaries are small anyway; the reference's bound should say something.
    least = 0 if fused_step(optimizer.rule, part, model.weight, model.weight.device) else bound / 20
    assert least < peak_bytes(optimizer.step) <= bound


@pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")
@pytest.mark.parametrize("name", ["sketch", "bfloat16", "quantized", "rows", "sketched rows", "factored", "SM3"])
def test_a_step_by_compiled_kernels_takes_what_is_reported(name):
    """The library is asked, not estimated."""
    model = nn.Embedding(5 * BLOCK_NUMEL // 4 // 64, 64)
    optimizer = compress(Adam(model.parameters()), model, on_table(**CODECS[name]))
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    bound = report(optimizer).transient
    assert bound - 4096 < peak_bytes(optimizer.step) <= bound


@pytest.mark.parametrize("name", CODECS)
def test_temporaries_grow_with_the_table_by_a_number_for_each_row_at_most(name):
    noted = {"factored": 5, "sketched rows": 5, "sketch": 1}  # bytes a row: means, and what is left out
    bounds, more = [], noted.get(name, 0) * BLOCK_NUMEL // 2 if native.library() else 0
    for rows in (BLOCK_NUMEL // 4, 3 * BLOCK_NUMEL // 4):  # one block of rows of 4 elements, and three
        model = Tiny(rows=rows)
        optimizer = compress(Adam(model.parameters()), model, on_table(**CODECS[name]))
        (part,) = next(iter(optimizer.compressed_tensors()))[2]
        bounds.append(transient_bytes(optimizer.rule, part, model.table.weight))
        assert report(optimizer).transient == bounds[-1]
    assert bounds[1] == bounds[0] + more


def test_lazy_dense_gradients_cost_a_copy():
    model = Tiny()
    costs = []
    for lazy in (False, True):
        optimizer = compress(Adam(model.parameters()), model, on_table(second_moment=RowWise(lazy=lazy)))
        (part,) = next(iter(optimizer.compressed_tensors()))[2]
        model.table.weight.grad = None
        without = transient_bytes(optimizer.rule, part, model.table.weight)
        model.table.weight.grad = torch.zeros(30, 4)
        costs.append(transient_bytes(optimizer.rule, part, model.table.weight) - without)
    assert costs[0] == 0
    assert costs[1] > 4 * TABLE
