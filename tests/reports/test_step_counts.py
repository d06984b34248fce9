"""A state dict whose ``step`` is a number loads, as under torch (older releases of torch wrote Python numbers)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import AdamW

from lightning_sketch import compress, decompress, decompress_state_dict, report, restore
from tests.tiny import ADAMW, CASES, LOSSY, Tiny, assert_same, snapshot, train

FORMS = {
    "int": int, "float": float, "int64": lambda x: torch.tensor(int(x)), "float32": lambda x: torch.tensor(float(x)),
    "float64": lambda x: torch.tensor(float(x), dtype=torch.float64), "bfloat16": lambda x: torch.tensor(x).bfloat16(),
}  # fmt: skip
BAD = [float("nan"), float("inf"), -1, torch.tensor(-1.0), "3", None, torch.ones(2), 1j]


def _trained(case, policy):
    torch.manual_seed(0)
    model = Tiny()
    optimizer = case.make(model.parameters())
    if policy is not None:
        compress(optimizer, model, policy)
    train(model, optimizer, range(3), sparse=case.sparse)
    return model, optimizer


def _counted(optimizer, form):
    """Its checkpoint, with step counts in that form."""
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for state in checkpoint["state"].values():
        if "step" in state:
            state["step"] = form(float(state["step"]))
    return checkpoint


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("policy", [LOSSY, None], ids=["compressed", "dense"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_of_a_step_count_loads(case, policy, form):
    source = _trained(case, policy)[1]
    results = []
    for checkpoint in (copy.deepcopy(source.state_dict()), _counted(source, form)):
        model, optimizer = _trained(case, LOSSY)
        optimizer.load_state_dict(checkpoint)
        train(model, optimizer, [3], sparse=case.sparse)
        # Of kept layers torch does as it pleases: SparseAdam computes in the dtype of its step.
        results.append({k: v for k, v in snapshot(model, optimizer).items() if k.startswith("table")})
    assert_same(*results)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_is_made_dense_and_restored(case, form, tmp_path):
    source = _trained(case, LOSSY)[1]
    dense = [decompress_state_dict(checkpoint) for checkpoint in (_counted(source, form), source.state_dict())]
    assert_same(dense[0]["state"][0], dense[1]["state"][0])
    torch.save(_counted(source, form), tmp_path / "optimizer.pt")
    model, optimizer = _trained(case, LOSSY)
    restore(optimizer, tmp_path / "optimizer.pt")
    assert optimizer.state[model.table.weight]["step"] == 3


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_live_count_of_any_form_goes_on(form):
    model, optimizer = _trained(ADAMW, LOSSY)
    for goes_on in (lambda: train(model, optimizer, [3]), optimizer.state_dict, lambda: decompress(optimizer)):
        optimizer.state[model.table.weight]["step"] = form(5)
        report(optimizer)
        goes_on()
        assert optimizer.state[model.table.weight]["step"] in (5, 6)


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("policy", [LOSSY, None], ids=["compressed", "dense"])
def test_what_is_no_count_is_refused_by_name_before_anything_changes(policy, bad, tmp_path):
    source = _trained(ADAMW, policy)[1]
    checkpoint = _counted(source, lambda _: bad)
    model, optimizer = _trained(ADAMW, LOSSY)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"table.weight: its step is"):
        optimizer.load_state_dict(checkpoint)
    assert_same(snapshot(model, optimizer), before)


def test_a_plain_optimizer_with_a_bad_count_is_not_converted():
    model, optimizer = _trained(ADAMW, None)
    optimizer.state[model.table.weight]["step"] = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match=r"table.weight: its step is"):
        compress(optimizer, model, LOSSY)
    assert type(optimizer) is AdamW
