"""A codec of somebody else's, written in a test module alone, does what the package's own do.

Under FSDP2, ZeRO and in conversions it is one of the tables of tests/checkpoints/engines.py.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_sketch import (
    Codec,
    Drop,
    ElementwiseCodec,
    Policy,
    Rule,
    compress,
    decompress,
    decompress_state_dict,
    plan,
    report,
)
from lightning_sketch.codecs import codec_from
from tests.codecs.halves import Halves
from tests.tiny import assert_same

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
}


def _policy(codec: Codec) -> Policy:
    return Policy([Rule(name="*", first_moment=codec, second_moment=codec)])


def _model(sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"table": nn.Embedding(30, 8, sparse=sparse), "other": nn.Linear(8, 5)})


def _give(model: nn.Module, step: int) -> None:
    for number, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + number)
        param.grad = torch.randn(param.shape, generator=generator)


def _train(name: str, codec: Codec | None, steps: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    cls, options = OPTIMIZERS[name]
    model = _model()
    optimizer = cls(model.parameters(), **options)
    if codec is not None:
        compress(optimizer, model, _policy(codec))
    for step in range(steps):
        _give(model, step)
        optimizer.step()
    return model, optimizer


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("codec", [Halves(), Halves(relative=False)], ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_close_to_the_exact_optimizer(name: str, codec: Codec) -> None:
    exact, found, start = _weights(_train(name, None)[0]), _weights(_train(name, codec)[0]), _weights(_model())
    assert (found - exact).norm() < 0.01 * (exact - start).norm()
    assert not torch.equal(found, exact)


def test_dense_checkpoints_go_both_ways() -> None:
    model, optimizer = _train("adamw", Halves())
    dense = decompress_state_dict(optimizer.state_dict())
    again, back = _train("adamw", Halves(), steps=0)
    back.load_state_dict(dense)
    assert_same(dict(back.state[again["table"].weight]), dict(optimizer.state[model["table"].weight]))
    decompress(optimizer)
    torch.testing.assert_close(
        optimizer.state[model["table"].weight]["exp_avg"], dense["state"][0]["exp_avg"], rtol=0, atol=0
    )


def test_copies_and_pickles_go_on() -> None:
    model, optimizer = _train("adamw", Halves())
    for other_model, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        _give(other_model, 9)
        other.step()
    _give(model, 9)
    optimizer.step()
    assert torch.equal(_weights(model), _weights(other_model))


def test_rows_of_a_sparse_gradient_are_the_only_ones_that_change() -> None:
    model = _model(sparse=True)["table"]
    optimizer = compress(torch.optim.SparseAdam(model.parameters()), model, _policy(Halves()))
    for rows in ([0, 3, 29], [3, 4]):
        before = {key: x.clone() for key, x in optimizer.state[model.weight].items() if x.ndim}
        values = torch.randn(len(rows), 8)
        model.weight.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, (30, 8), check_invariants=True)
        optimizer.step()
        for key, was in before.items():
            now = optimizer.state[model.weight][key]
            changed = (now != was).flatten(1).any(dim=1) if now.ndim > 1 else now != was
            assert set(changed.nonzero().flatten().tolist()) <= set(rows)


def test_policies_know_it_by_name(tmp_path: Any) -> None:
    policy = Policy([Rule(name="*", first_moment=Drop(), second_moment=Halves(relative=False))])
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(policy.to_dict()))
    assert Policy.from_yaml(file) == policy
    assert codec_from({"codec": "Halves", "relative": False}) == Halves(relative=False)
    with pytest.raises(ValueError, match=r"codec Halves: .*relativ"):
        codec_from({"codec": "Halves", "relativ": False})


def test_bytes_are_planned_as_they_are() -> None:
    _, optimizer = _train("adamw", Halves())
    fresh = _model()
    planned = plan(fresh, torch.optim.AdamW(fresh.parameters()), _policy(Halves())).bytes_after
    counters = sum(state["step"].nbytes for state in optimizer.state.values())
    assert planned == report(optimizer).state - counters == 2 * ((30 * 8 + 5 * 8 + 5) * 2 + (30 + 5 + 5) * 4)


def test_names_are_not_taken_twice() -> None:
    with pytest.raises(TypeError, match=r"codec BFloat16 is defined in lightning_sketch\.codecs\.bfloat16 already"):

        @dataclass(frozen=True)
        class BFloat16(ElementwiseCodec):
            pass

    def define() -> type[Codec]:
        @dataclass(frozen=True)
        class Again(Halves):
            pass

        return Again

    first, second = define(), define()  # as a cell of a notebook that is run again
    assert Codec.registry["Again"] is second is not first
    del Codec.registry["Again"]


def test_what_is_not_shaped_like_the_values_is_refused() -> None:
    @dataclass(frozen=True)
    class Columns(Halves):
        def encode(self, values: Tensor, signed: bool) -> dict[str, Tensor]:
            return {"column": values.sum(dim=0)}

    try:
        with pytest.raises(TypeError, match=r"Columns.encode of \[2, 3\] returned 'column' of \[3\]"):
            _train("adamw", Columns())
    finally:
        del Codec.registry["Columns"]
