"""plan and explain: what a conversion would do, in bytes, before anything is allocated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from benchmarks.launches import counting
from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Policy, Quantized, RowWise, Rule, compress, plan, report
from lightning_sketch.kernels import native
from lightning_sketch.text import human_bytes, short
from tests.tiny import CASES, CODECS, FOR_SGD, LOSSY, Tiny, assert_same, on_table, snapshot, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_planned_bytes_are_the_live_ones(case, codecs, dtype):
    if case.cls is SGD and codecs not in FOR_SGD:
        codecs = "bfloat16"
    model = Tiny(rows=37, dtype=dtype)
    optimizer = case.make(model.parameters())
    policy = on_table(**CODECS[codecs])
    made = plan(model, optimizer, policy)
    compress(optimizer, model, policy)
    train(model, optimizer, range(2), sparse=case.sparse)
    live = report(optimizer)
    counters = sum(s["step"].nbytes for s in optimizer.state.values() if isinstance(s.get("step"), torch.Tensor))
    assert made.bytes_after == live.state - counters
    planned: dict[str, int] = {}
    for x in made.layers:
        for state, codec in x.layer.codecs.items():
            name = type(codec).__name__
            planned[name] = planned.get(name, 0) + x.bytes_after[state]
    found = {**live.state_by_codec, "Keep": live.state_by_codec["Keep"] - counters}
    assert {k: v for k, v in planned.items() if v} == {k: v for k, v in found.items() if v}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_before_are_those_of_the_plain_optimizer(case):
    model = Tiny()
    optimizer = case.make(model.parameters())
    made = plan(model, optimizer, LOSSY)
    train(model, optimizer, range(1), sparse=case.sparse)
    tensors = [v for s in optimizer.state.values() for k, v in s.items() if k != "step" and v is not None]
    assert made.bytes_before == sum(t.nbytes for t in tensors)


def test_planning_changes_and_allocates_nothing():
    model = Tiny()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    before, groups = snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    plan(model, optimizer, LOSSY)
    assert_same(snapshot(model, optimizer), before)
    assert_same(optimizer.state_dict()["param_groups"], groups)
    assert type(optimizer) is AdamW


def test_a_model_that_does_not_fit_into_memory_can_be_planned():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(1_000_000_000, 256), nn.Linear(256, 256))
    optimizer = AdamW(model.parameters())
    policy = Policy([Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=RowWise(compression=10))])
    made = plan(model, optimizer, policy)
    assert made.bytes_before == 2 * 4 * (256_000_000_000 + 256 * 256 + 256)
    scale = 8
    assert sum(made.layers[0].bytes_after.values()) == 3 * 4 * 33_333_334 + scale  # depth * ceil(rows / (10 * depth))


def test_a_plan_on_meta_is_that_of_the_real_model():
    real = Tiny()
    with torch.device("meta"):
        meta = Tiny()
    plans = [plan(m, Adam(m.parameters()), LOSSY) for m in (real, meta)]
    assert plans[0] == plans[1]


def test_groups_are_planned_in_order():
    model = Tiny()
    optimizer = Adam([{"params": model.kept.parameters()}, {"params": model.table.parameters()}])
    made = plan(model, optimizer, LOSSY)
    assert [[x.layer.fqn for x in group] for group in made.groups] == [["kept.weight", "kept.bias"], ["table.weight"]]
    assert [x.rule for x in made.layers] == [None, None, 1]
    assert made.layers[2].roles == ("embedding",)


def test_dropped_states_are_listed():
    model = Tiny()
    policy = Policy([Rule(first_moment=Drop(), second_moment=RowWise())])
    assert plan(model, Adam(model.parameters()), policy).dropped() == {
        "exp_avg": ["table.weight", "kept.weight", "kept.bias"]
    }


def test_a_converted_optimizer_can_be_planned_too():
    model = Tiny()
    optimizer = AdamW(model.parameters())
    before = plan(model, optimizer, LOSSY)
    assert plan(model, compress(optimizer, model, LOSSY), LOSSY) == before


EXPLAINED = """
layer shape role rule state: codec before after
a.weight 20,000 x 8 embedding 1 exp_avg: Drop() 1.22 MiB 31.32 KiB
exp_avg_sq: CountSketch()
b.weight 10 x 8 embedding 3 exp_avg: Keep() 640 B 640 B
exp_avg_sq: Keep()
c.weight 100 x 8 hidden 2 exp_avg: Keep() 6.25 KiB 3.55 KiB
exp_avg_sq: SM3(variant='I')
c.bias 100 other 2 exp_avg: Keep() 800 B 808 B
exp_avg_sq: SM3(variant='I')
1 other parameters none kept as they are 8 B 8 B
total 1.23 MiB 36.30 KiB
"""


def test_explain_is_the_table_of_the_plan():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Embedding(20_000, 8), nn.Embedding(10, 8), nn.Linear(8, 100)
            self.scale = nn.Parameter(torch.ones(()))

    model = Model()
    policy = Policy(
        [
            Rule(role="embedding", min_rows=10_000, exp_avg=Drop(), exp_avg_sq=CountSketch()),
            Rule(name="c.*", second_moment=SM3("I")),
            Rule(role="embedding"),
        ]
    )
    optimizer = AdamW(model.parameters())
    text = policy.explain(model, optimizer)
    assert text == str(plan(model, optimizer, policy))
    rows = ["".join(c if c not in "│┃" else " " for c in line).split() for line in text.splitlines()]
    found = [" ".join(row) for row in rows if row and row[0][0].isalnum()]
    made = plan(model, optimizer, policy)
    temporaries = [
        f"temporaries of a step on {device}, at most {human_bytes(made.transient(device))}"
        for device in ("cpu", "cuda")
    ]
    assert found == ["optimizer states", *EXPLAINED.strip().splitlines(), *temporaries]


PLANNED = {
    "default": None,
    "rows": Policy([Rule(first_moment=Drop(), second_moment=RowWise(compression=4))]),
    "8 bits": Policy([Rule(first_moment=Quantized(), second_moment=Quantized())]),
    "sketches": Policy([Rule(first_moment=CountSketch(), second_moment=CountSketch())]),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_says_of_a_step_what_the_report_will_say(name):
    model = nn.Sequential(nn.Embedding(12_000, 7), nn.Linear(7, 30))
    made = plan(model, AdamW(model.parameters()), PLANNED[name])
    optimizer = compress(AdamW(model.parameters()), model, PLANNED[name])
    assert 0 < made.transient("cpu") == report(optimizer).transient


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_says_what_a_step_will_allocate_on_a_device_that_is_not_here(name, triton, monkeypatch):
    if triton:
        pytest.importorskip("triton")
    with torch.device("meta"):
        here = nn.Sequential(nn.Embedding(12_000, 7), nn.Linear(7, 30))
    monkeypatch.setenv(native.VARIABLE, "" if triton else "reference")
    made = plan(here, AdamW(here.parameters()), PLANNED[name])
    with counting(triton=triton) as mode:
        model = nn.Sequential(nn.Embedding(12_000, 7), nn.Linear(7, 30))
        for module, attribute in ((model[0], "weight"), (model[1], "weight"), (model[1], "bias")):
            setattr(module, attribute, nn.Parameter(mode.tensor(*getattr(module, attribute).shape)))
        optimizer = compress(AdamW(model.parameters()), model, PLANNED[name])
        assert 0 < made.transient("cuda") == report(optimizer).transient


def test_a_plan_does_not_know_what_an_optimizers_own_step_allocates():
    model = nn.Linear(300, 300)
    policy = Policy([Rule(role="hidden", exp_avg=BFloat16())])
    made = plan(model, torch.optim.NAdam(model.parameters()), policy)
    assert made.transient("cpu") is None
    assert "temporaries" not in str(made)


def test_a_scalar_is_called_one():
    model = nn.ParameterDict({"s": nn.Parameter(torch.ones(()))})
    assert " scalar " in str(plan(model, Adam(model.parameters()), Policy([Rule(first_moment="BFloat16")])))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1.5 * 2**30, "1.50 GiB"), (2**52, "4096.00 TiB")],
)  # fmt: skip
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


def test_codecs_are_shown_with_what_differs_from_their_defaults():
    assert short(CountSketch(depth=2, lazy=True)) == "CountSketch(depth=2, lazy=True)"
    assert short(RowWise()) == "RowWise()"
