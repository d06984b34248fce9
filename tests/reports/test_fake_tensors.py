"""Memory is estimated under ``FakeTensorMode`` (torchtune, TorchTitan): nothing is read from tensors without values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW, SparseAdam

from lightning_sketch import compress, decompress, decompress_state_dict, plan, report, resize_states
from tests.tiny import ADAM, CASES, CODECS, EVERY, on_table


def make(case, *, sparse=False):
    model = nn.Sequential(nn.Embedding(40, 4, sparse=sparse), nn.Linear(4, 3))
    params = model[:1].parameters() if case.cls is SparseAdam else model.parameters()
    return model, case.make(params)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.tensor([1, 2, 1])).square().sum().backward()
    optimizer.step()


def allocated(optimizer):
    """Shapes and dtypes of all states."""
    return [
        {key: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for key, x in state.items()}
        for state in optimizer.state.values()
    ]


@pytest.mark.parametrize(("case", "codecs"), EVERY, ids=str)
def test_steps_allocate_what_real_ones_do(case, codecs):
    policy, found = on_table(**CODECS[codecs]), []
    for mode in (None, FakeTensorMode()):
        with mode or torch.enable_grad():
            model, optimizer = make(case, sparse=case.sparse)
            compress(optimizer, model, policy)
            for _ in range(2):
                step(model, optimizer)
            measured = report(optimizer)
            found.append((measured.state_by_codec, measured.dense_state, measured.parameters))
            found[-1] += ([{k: v for k, v in state.items() if "scale" not in k} for state in allocated(optimizer)],)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("codecs", "nonfinite"), [*((codecs, "raise") for codecs in CODECS), ("rows", "skip"), ("rows", "propagate")]
)
def test_conversion_in_the_middle_of_training_and_checkpoints(codecs, nonfinite):
    with FakeTensorMode():
        model = nn.Sequential(nn.Embedding(40, 4), nn.Linear(4, 3))
        optimizer = AdamW(model.parameters())
        step(model, optimizer)
        policy = on_table(**CODECS[codecs])
        plan(model, optimizer, policy)
        compress(optimizer, model, policy, nonfinite=nonfinite)
        step(model, optimizer)
        compress(optimizer, nn.ModuleList([model]), policy, nonfinite=nonfinite)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        step(model, optimizer)
        dense = decompress_state_dict(saved)
        optimizer.load_state_dict(dense)
        assert report(optimizer).state > 0
        decompress(optimizer)
        step(model, optimizer)
        assert optimizer.state[model[0].weight]["exp_avg_sq"].shape == (40, 4)


@pytest.mark.parametrize("codecs", CODECS)
def test_a_table_is_resized(codecs):
    with FakeTensorMode():
        model, optimizer = make(ADAM)
        compress(optimizer, model, on_table(**CODECS[codecs]))
        step(model, optimizer)
        model[0].weight = nn.Parameter(torch.empty(60, 4))
        resize_states(optimizer, model)
        step(model, optimizer)
        decompress(optimizer)
        assert optimizer.state[model[0].weight]["exp_avg_sq"].shape == (60, 4)


def test_real_steps_after_an_estimate_are_real():
    torch.manual_seed(0)
    model, optimizer = make(CASES[1])
    compress(optimizer, model, on_table(**CODECS["rows"]))
    with FakeTensorMode():
        fake, estimated = make(CASES[1])
        compress(estimated, fake, on_table(**CODECS["rows"]))
        step(fake, estimated)
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert float(optimizer.state[model[0].weight]["step"]) == 1
