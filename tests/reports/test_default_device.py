"""``torch.set_default_device`` says nothing about where our tensors are: "meta" stands for the GPU that users name."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import lightning_sketch
from lightning_sketch import Monitor, Policy, Rule, compress, report
from tests.tiny import CODECS

FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def train(codecs: dict[str, Any], *, sparse: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Embedding(300, 8, sparse=sparse)
    optimizer = compress(AdamW(model.parameters(), lr=0.01), model, Policy([Rule(**codecs)]))
    gradients = [torch.randn(300, 8) for _ in range(4)]
    rows = torch.tensor([[3, 1, 299, 1]])
    values = torch.randn(4, 8)
    found = []
    for gradient in gradients:
        model.weight.grad = torch.sparse_coo_tensor(rows, values, (300, 8), device="cpu") if sparse else gradient
        with torch.device("meta"):
            optimizer.step()
            report(optimizer)
        found.append(model.weight.detach().clone())
    return found


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_steps_are_made_where_the_parameters_are(name, sparse):
    steps = train(CODECS[name], sparse=sparse)
    assert all(not torch.equal(before, after) for before, after in itertools.pairwise(steps))


def test_conversions_checkpoints_and_monitors_too():
    model = nn.Embedding(300, 8)
    with torch.device("meta"):
        optimizer = compress(
            AdamW(model.parameters()), model, Policy([Rule(**CODECS["rows"])]), monitor=Monitor(rows=5)
        )
        for _ in range(2):
            model.weight.grad = torch.ones(300, 8, device="cpu")
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    assert model.weight.isfinite().all()


def test_every_tensor_of_the_package_is_made_on_a_named_device():
    unnamed = []
    for path in Path(lightning_sketch.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "torch"
                and node.func.attr in FACTORIES
                and not any(keyword.arg in ("device", None) for keyword in node.keywords)
            ):
                unnamed.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert unnamed == []
