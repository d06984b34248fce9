"""A converted optimizer has its stock class's interface and name, in everything that is derived from either.

Lightning's own tests of LearningRateMonitor and EarlyStopping, torch's of every optimizer, and wrappers that construct
``type(optimizer)(params, **options)``.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam

from lightning_sketch import compress, decompress
from lightning_sketch.optimizer.classes import COMPRESSED
from tests.integrations.lightning_tools import fit, tiny
from tests.tiny import CASES, EXACTLY, LOSSY, Tiny, assert_same, give_gradients, snapshot, train

every_case = pytest.mark.parametrize("case", CASES, ids=str)

#: A call of every public method of torch's classes.
CALLS: dict[str, Any] = {
    "add_param_group": lambda o, m: o.add_param_group({"params": m.later.parameters()}),
    "load_state_dict": lambda o, m: o.load_state_dict(o.state_dict()),
    "profile_hook_step": lambda o, m: o.profile_hook_step(lambda self: self.zero_grad())(o),
    "register_load_state_dict_post_hook": lambda o, m: o.register_load_state_dict_post_hook(lambda o: None),
    "register_load_state_dict_pre_hook": lambda o, m: o.register_load_state_dict_pre_hook(lambda o, d: None),
    "register_state_dict_post_hook": lambda o, m: o.register_state_dict_post_hook(lambda o, d: None),
    "register_state_dict_pre_hook": lambda o, m: o.register_state_dict_pre_hook(lambda o: None),
    "register_step_post_hook": lambda o, m: o.register_step_post_hook(lambda o, a, k: None),
    "register_step_pre_hook": lambda o, m: o.register_step_pre_hook(lambda o, a, k: None),
    "share_memory": lambda o, m: o.share_memory(),
    "state_dict": lambda o, m: o.state_dict(),
    "step": lambda o, m: o.step(),
    "zero_grad": lambda o, m: o.zero_grad(),
}


def public(cls: type) -> set[str]:
    aliases = {"OptimizerPreHook", "OptimizerPostHook"}  # of types
    return {name for name in dir(cls) if not name.startswith("_")} - aliases


class Later(Tiny):
    def __init__(self):
        super().__init__()
        self.later = nn.Linear(2, 2)


@every_case
def test_every_public_method_works(case):
    methods = public(case.cls)
    assert methods <= CALLS.keys(), "torch has a new one"
    for name in methods:
        model = Later()
        optimizer = compress(case.make([*model.table.parameters(), *model.kept.parameters()]), model, LOSSY)
        give_gradients(model, 0, sparse=case.sparse)
        CALLS[name](optimizer, model)
        if name == "profile_hook_step":
            assert model.table.weight.grad is None
        for param in model.later.parameters():
            param.grad = None
        train(model.table, optimizer, [1, 2], sparse=case.sparse)
        assert optimizer.state[model.table.weight]["step"] >= 2


@every_case
def test_every_attribute_of_a_stock_instance_is_there(case):
    stock = case.make(Tiny().parameters())
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, LOSSY)
    missing = {name for name in dir(stock) if not hasattr(optimizer, name)}
    assert not missing


def _train_there(model, optimizer):
    train(model, optimizer, [2, 3])


def test_states_of_adagrad_in_shared_memory_are_trained_by_another_process():
    torch.set_num_threads(1)
    found = []
    for elsewhere in (True, False):
        torch.manual_seed(0)
        model = Tiny().share_memory()
        optimizer = compress(Adagrad(model.parameters(), lr=0.1), model, LOSSY)
        train(model, optimizer, [0, 1])
        optimizer.share_memory()
        for param in model.parameters():
            param.grad = None
            for name, value in optimizer.state[param].items():
                assert name == "step" or not isinstance(value, Tensor) or value.is_shared()
        if elsewhere:
            process = torch.multiprocessing.get_context("fork").Process(target=_train_there, args=(model, optimizer))
            process.start()
            process.join()
            assert process.exitcode == 0
        else:
            _train_there(model, optimizer)
        states = snapshot(model, optimizer)
        found.append({name: value for name, value in states.items() if not name.endswith("step")})
    assert_same(*found)


@every_case
def test_the_name_is_the_stock_class_s(case):
    model = Tiny()
    stock, optimizer = case.make(model.parameters()), compress(case.make(model.parameters()), model, LOSSY)
    assert type(optimizer).__name__ == case.cls.__name__
    assert type(optimizer).__qualname__ == f"Compressed{case.cls.__name__}"
    assert str(type(optimizer)) == f"<class 'lightning_sketch.optimizer.classes.Compressed{case.cls.__name__}'>"
    assert repr(optimizer) == repr(stock)
    assert type(LightningOptimizer(optimizer)).__name__ == f"Lightning{case.cls.__name__}"
    wrapper = compress(LightningOptimizer(case.make(model.parameters())), model, LOSSY)
    assert type(wrapper).__name__ == f"Lightning{case.cls.__name__}"


@every_case
def test_profiles_have_the_names_of_the_plain_run(case):
    def names(converted: bool) -> list[str]:
        model = Tiny()
        optimizer = case.make(model.parameters())
        if converted:
            compress(optimizer, model, LOSSY)
        with torch.autograd.profiler.profile() as profile:
            train(model, optimizer, [0], sparse=case.sparse)
            optimizer.zero_grad()
        return [event.name for event in profile.function_events if event.name.startswith("Optimizer.")]

    assert names(True) == names(False)
    assert len(names(True)) == 2


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@every_case
def test_pickles_find_the_converted_class(case, protocol):
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, LOSSY)
    train(model, optimizer, [0], sparse=case.sparse)
    assert pickle.loads(pickle.dumps(type(optimizer), protocol)) is COMPRESSED[case.cls]
    if protocol >= 2:  # torch's parameters need that
        assert type(pickle.loads(pickle.dumps(optimizer, protocol))) is COMPRESSED[case.cls]


@every_case
def test_torch_save_and_copies_give_the_converted_class(case):
    model = Tiny()
    optimizer = compress(case.make(model.parameters()), model, LOSSY)
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.copy(optimizer), copy.deepcopy(optimizer)):
        assert type(twin) is COMPRESSED[case.cls]
        assert type(decompress(copy.deepcopy(twin))) is case.cls


@every_case
def test_the_class_constructs_a_plain_optimizer(case):
    """For wrappers that make another one like it: `compress` it, too, or train on without."""
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer = compress(case.make(model.parameters()), model, EXACTLY)
    options = {key: value for key, value in optimizer.defaults.items() if key != "decoupled_weight_decay"}
    other = type(optimizer)(plain.parameters(), **options)  # as torch.optim.AdamW, which does not take that of its own
    assert type(other) is case.cls
    train(plain, other, range(3), sparse=case.sparse)
    train(model, optimizer, range(3), sparse=case.sparse)
    torch.testing.assert_close(model.table.weight, plain.table.weight, rtol=1e-4, atol=1e-5)
    assert type(compress(type(optimizer)(plain.parameters(), **options), plain, LOSSY)) is COMPRESSED[case.cls]
    with pytest.raises(ValueError, match="empty parameter list"):
        type(optimizer)([])


def adam(module):
    return Adam(module.parameters(), lr=1e-2)


def sgd(module):
    return SGD(module.parameters(), lr=1e-2, momentum=0.9)


@pytest.mark.parametrize("configure", [adam, sgd])
def test_lightning_s_metrics_are_those_of_the_plain_run(configure):
    """LearningRateMonitor names its metrics after the class, and EarlyStopping may watch one."""

    def metrics(compressed: bool) -> tuple[dict[str, list[float]], int]:
        monitor = LearningRateMonitor(logging_interval="step", log_momentum=True)
        module = tiny(configure)
        stopping = EarlyStopping(f"lr-{type(configure(module)).__name__}", patience=1, check_on_train_epoch_end=True)
        made = fit(
            module,
            compressed=compressed,
            callbacks=[monitor, stopping],
            logger=CSVLogger("."),
            log_every_n_steps=1,
            max_epochs=4,
        )
        return monitor.lrs, made.current_epoch

    assert metrics(True) == metrics(False)
    assert metrics(True)[1] == 2  # the rate is constant
