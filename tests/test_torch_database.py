"""PyTorch's own database of optimizer configurations, run over the converted classes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing._internal.common_optimizers import _get_optim_inputs_including_global_cliquey_kwargs, optim_db

from lightning_sketch import compress, decompress, decompress_state_dict
from lightning_sketch.optimizer.classes import COMPRESSED
from tests.tiny import EXACTLY, LOSSY, Tiny, assert_same, give_gradients, snapshot, train

INFOS = {info.optim_cls: info for info in optim_db if info.optim_cls in COMPRESSED}
CONFIGURATIONS = [
    pytest.param(cls, given.kwargs, id=f"{cls.__name__}-{given.desc}")
    for cls, info in INFOS.items()
    for given in _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
    if not (isinstance(given.kwargs.get("lr"), torch.Tensor) and given.kwargs.get("foreach"))  # torch refuses
]
REFUSED = ("amsgrad", "differentiable")


def refused(kwargs):
    return [flag for flag in REFUSED if kwargs.get(flag)]


def stateless(cls, kwargs):
    return cls is torch.optim.SGD and not kwargs.get("momentum")


works = pytest.mark.parametrize(
    ("cls", "kwargs"), [p for p in CONFIGURATIONS if not refused(p.values[1]) and not stateless(*p.values)]
)


def test_every_supported_class_is_in_the_database():
    assert INFOS.keys() == COMPRESSED.keys()


@works
def test_exact_codecs_train_as_torch_does(cls, kwargs):
    sparse = INFOS[cls].only_supports_sparse_grads
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer = cls(model.parameters(), **copy.deepcopy(kwargs))
    stock = cls(plain.parameters(), **copy.deepcopy(kwargs))
    compress(optimizer, model, EXACTLY)
    train(model, optimizer, range(8), sparse=sparse)
    train(plain, stock, range(8), sparse=sparse)
    assert any(key.endswith("_table") for key in optimizer.state[model.table.weight])
    decompress(optimizer)
    found, expected = snapshot(model, optimizer), snapshot(plain, stock)
    kept = [key for key in found if key.startswith("kept")]
    assert_same({key: found[key] for key in kept}, {key: expected[key] for key in kept})
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


@works
def test_copies_and_checkpoints_go_on_alike(cls, kwargs):
    sparse = INFOS[cls].only_supports_sparse_grads
    model = Tiny()
    optimizer = compress(cls(model.parameters(), **copy.deepcopy(kwargs)), model, LOSSY)
    train(model, optimizer, range(2), sparse=sparse)
    loaded = copy.deepcopy(model)
    again = compress(cls(loaded.parameters(), **copy.deepcopy(kwargs)), loaded, LOSSY)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    dense = copy.deepcopy(model)
    stock = cls(dense.parameters(), **copy.deepcopy(kwargs))
    stock.load_state_dict(decompress_state_dict(optimizer.state_dict()))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer))), (loaded, again)]
    train(model, optimizer, range(2, 4), sparse=sparse)
    for pair in pairs:
        train(*pair, range(2, 4), sparse=sparse)
        assert_same(snapshot(*pair), snapshot(model, optimizer))
    train(dense, stock, range(2, 4), sparse=sparse)


@pytest.mark.parametrize(("cls", "kwargs"), [p for p in CONFIGURATIONS if refused(p.values[1])])
def test_flags_that_compressed_layers_cannot_have_are_refused(cls, kwargs):
    model = Tiny()
    optimizer = cls(model.parameters(), **kwargs)
    message = r"no state at all" if stateless(cls, kwargs) else rf"({'|'.join(refused(kwargs))})=True is not supported"
    with pytest.raises(ValueError, match=message):
        compress(optimizer, model, EXACTLY)
    assert type(optimizer) is cls


@pytest.mark.parametrize("cls", INFOS)
def test_schedulers_of_the_database_drive_it(cls):
    sparse = INFOS[cls].only_supports_sparse_grads
    kwargs = {"lr": 0.1} | ({"momentum": 0.5} if cls is torch.optim.SGD else {})
    for constructors in INFOS[cls].scheduler_inputs:
        pairs = []
        for policy in (EXACTLY, None):
            torch.manual_seed(0)
            model = Tiny()
            optimizer = cls(model.parameters(), **kwargs)
            schedulers = [make(optimizer) for make in constructors]
            if policy is not None:
                compress(optimizer, model, policy)
            for step in range(12):
                give_gradients(model, step, sparse=sparse)
                optimizer.step()
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([float(step)] if plateau else []))
            pairs.append((model, optimizer))
        (model, optimizer), (plain, stock) = pairs
        assert optimizer.param_groups[0]["lr"] == stock.param_groups[0]["lr"] != 0.1
        torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-4, atol=1e-5)
