"""The callback converts whatever ``configure_optimizers`` returns, and leaves no other trace."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import AdamW, lr_scheduler

from lightning_sketch import Policy, RowWise, Rule, compress
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from lightning_sketch.optimizer.classes import CompressedAdamW
from tests.integrations.lightning_tools import (
    PACKAGES,
    POLICY,
    adamw,
    assert_same_weights,
    assert_table_compressed,
    batches,
    fit,
    tiny,
    trainer,
)


def _step(optimizer):
    return lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


FORMS = {
    "optimizer": lambda o: o,
    "list": lambda o: [o],
    "tuple": lambda o: (o,),
    "lists of optimizers and schedulers": lambda o: ([o], [_step(o)]),
    "lists of optimizers and configs": lambda o: ([o], [{"scheduler": _step(o), "interval": "step"}]),
    "list and bare scheduler": lambda o: ([o], _step(o)),
    "dict": lambda o: {"optimizer": o},
    "dict and scheduler": lambda o: {"optimizer": o, "lr_scheduler": _step(o)},
    "dict and config": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": _step(o), "interval": "step"}},
    "dict and monitor": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": lr_scheduler.ReduceLROnPlateau(o), "monitor": "loss", "interval": "step"},
    },
    "list of dict": lambda o: [{"optimizer": o}],
}

OPTIMIZERS = {
    "named parameters": lambda m: AdamW(m.named_parameters(), lr=1e-2),
    "groups": lambda m: AdamW([{"params": m.head.parameters(), "lr": 1e-3}, {"params": m.table.parameters()}], lr=1e-2),
    "fused": lambda m: AdamW(m.parameters(), lr=1e-2, fused=True),
    "foreach": lambda m: AdamW(m.parameters(), lr=1e-2, foreach=True),
    "tensor lr": lambda m: AdamW(m.parameters(), lr=torch.tensor(1e-2), foreach=False),
}

SCHEDULERS = {
    "StepLR": _step,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), _step(o)]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
}


def _two_optimizers(module):
    return AdamW(module.table.parameters(), lr=1e-2), AdamW(module.head.parameters(), lr=1e-3)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_trains_as_if_the_user_had_called_compress(form, package):
    module = tiny(lambda m: form(adamw(m)), package)
    made = fit(module, max_epochs=2)

    expected = tiny(lambda m: form(compress(adamw(m), m, POLICY)), package)
    fit(expected, max_epochs=2, compressed=False)
    assert_table_compressed(made)
    assert_same_weights(module, expected)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_way_to_build_the_optimizer_is_converted(make):
    module = tiny(lambda m: FORMS["dict and config"](make(m)))
    made = fit(module)

    expected = tiny(lambda m: FORMS["dict and config"](compress(make(m), m, POLICY)))
    fit(expected, compressed=False)
    assert_table_compressed(made)
    assert_same_weights(module, expected)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_set_the_same_learning_rates_as_without_compression(make):
    def configure(m):
        optimizer = adamw(m)
        config = {"scheduler": make(optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    module, plain = tiny(configure), tiny(configure)
    fit(module)
    fit(plain, compressed=False)
    assert module.lrs == plain.lrs
    assert len({tuple(lrs) for lrs in module.lrs}) > 1, "the schedule moves"


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: [a, b],
        lambda a, b: ({"optimizer": a}, {"optimizer": b, "lr_scheduler": _step(b)}),
        lambda a, b: ([a, b], [_step(a), _step(b)]),
    ],
    ids=["list", "dicts", "lists"],
)
def test_manual_optimization_of_several_optimizers(form, package):
    module = tiny(lambda m: form(*_two_optimizers(m)), package, manual=True)
    made = fit(module)

    def converted(m):
        return form(*(compress(o, m, POLICY, allow_empty=True) for o in _two_optimizers(m)))

    expected = tiny(converted, package, manual=True)
    fit(expected, compressed=False)
    assert [type(o) for o in made.optimizers] == [CompressedAdamW] * 2
    assert_table_compressed(made)
    assert_same_weights(module, expected)


@pytest.mark.parametrize("package", PACKAGES)
def test_sparse_gradients_train_with_adamw(package):
    module = tiny(adamw, package, sparse=True)
    before = module.table.weight.detach().clone()
    assert_table_compressed(fit(module, batches(1)))
    touched = torch.zeros(len(before), dtype=torch.bool)
    touched[next(iter(batches(1)))[0].unique()] = True
    assert torch.equal((module.table.weight != before).any(1), touched)


def test_configure_optimizers_may_return_none():
    module = tiny(lambda m: None)
    before = tiny(adamw)
    fit(module)
    assert_same_weights(module, before)


def test_an_unsupported_optimizer_that_the_policy_does_not_touch_is_left_alone():
    def configure(m):
        return [AdamW(m.table.parameters(), lr=1e-2), torch.optim.Adamax(m.head.parameters())]

    made = fit(tiny(configure, manual=True))
    assert [type(o) for o in made.optimizers] == [CompressedAdamW, torch.optim.Adamax]
    assert len(made.optimizers[1].state) == 2


def test_an_optimizer_without_a_rule_says_which_codecs_it_takes():
    with pytest.raises(ValueError, match=r"cannot hold .*: there is no update rule for Adamax, .* use BFloat16\(\)"):
        fit(tiny(lambda m: torch.optim.Adamax(m.parameters())))


def test_a_rule_that_matches_nothing_stops_the_fit():
    callback = OptimizerStateCompression(Policy([Rule(role="embedding", min_rows=1_000, second_moment=RowWise())]))
    with pytest.raises(ValueError, match=r"matched no parameter; nearest is 'table\.weight' with 40 rows"):
        fit(tiny(adamw), callbacks=[callback], compressed=False)


def test_the_users_own_handle_stays_valid():
    def configure(m):
        m.handle = adamw(m)
        return m.handle

    module = tiny(configure)
    made = fit(module)
    assert module.handle is made.optimizers[0]
    assert isinstance(module.handle, AdamW)


def test_the_users_hooks_run_once_a_step_and_see_every_gradient():
    seen = Counter()

    def configure(m):
        def see(hook):
            seen[hook] += all(p.grad is not None for p in m.parameters())

        optimizer = adamw(m)
        optimizer.register_step_pre_hook(lambda *_: seen.update(["pre"]))  # Lightning's backward is inside the step
        optimizer.register_step_post_hook(lambda *_: see("post"))
        m.on_before_optimizer_step = lambda _: see("on_before_optimizer_step")
        m.configure_gradient_clipping = lambda *_, **__: see("clipping")
        return optimizer

    def optimizer_step(epoch, batch, optimizer, closure):
        seen.update(["optimizer_step"])
        optimizer.step(closure=closure)

    module = tiny(configure)
    module.optimizer_step = optimizer_step
    fit(module)
    hooks = ("pre", "post", "on_before_optimizer_step", "clipping", "optimizer_step")
    assert seen == dict.fromkeys(hooks, 6)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_module_is_not_left_patched(package):
    module = tiny(adamw, package)
    patched = []
    on_batch = module.on_train_batch_end
    module.on_train_batch_end = lambda *_: (patched.append("configure_optimizers" in vars(module)), on_batch())
    fit(module)
    del module.on_train_batch_end
    assert patched == [False] * 6
    assert "configure_optimizers" not in vars(module)
    assert pickle.dumps(module)
    plain = fit(module, compressed=False)
    assert type(plain.optimizers[0]) is AdamW


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_configure_optimizers_leaves_the_module_unpatched(error):
    def configure(m):
        raise error("in configure_optimizers")

    module = tiny(configure)
    with pytest.raises((error, SystemExit)):
        fit(module)
    assert "configure_optimizers" not in vars(module)


def test_an_exception_before_configure_optimizers_leaves_the_module_unpatched():
    def setup(stage):
        raise RuntimeError("in setup")

    module = tiny(adamw)
    module.setup = setup
    with pytest.raises(RuntimeError, match="in setup"):
        fit(module)
    assert "configure_optimizers" not in vars(module)


def test_a_method_that_was_set_on_the_instance_is_set_again():
    module = tiny(None)
    mine = module.configure_optimizers = lambda: adamw(module)
    assert_table_compressed(fit(module))
    assert module.configure_optimizers is mine


@pytest.mark.parametrize("keep_optimizer", [False, True], ids=["new optimizer", "same optimizer"])
def test_a_module_may_be_fitted_twice(keep_optimizer):
    def configure(m):
        if not (keep_optimizer and hasattr(m, "handle")):
            m.handle = adamw(m)
        return m.handle

    module = tiny(configure)
    callback = OptimizerStateCompression(POLICY)
    for expected_steps in (6, 12 if keep_optimizer else 6):
        made = fit(module, callbacks=[callback], compressed=False)
        assert_table_compressed(made)
        assert made.optimizers[0].state[module.table.weight]["step"] == expected_steps


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_validate_and_test_do_nothing(loop):
    module = tiny(adamw)
    patched = []
    module.on_validation_start = module.on_test_start = lambda: patched.append("configure_optimizers" in vars(module))
    made = trainer(callbacks=[OptimizerStateCompression(POLICY)])
    getattr(made, loop)(module, batches(), verbose=False)
    assert patched == [False]
    assert made.optimizers == []


def test_the_callback_keeps_no_model_alive():
    callback = OptimizerStateCompression(POLICY)
    module = tiny(lambda m: [torch.optim.Adamax(m.head.parameters()), AdamW(m.table.parameters())], manual=True)
    fit(module, callbacks=[callback], compressed=False)
    kept = [weakref.ref(module), weakref.ref(module.head.weight)]
    del module, callback.log, callback.log_dict  # Lightning binds these two to the module
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


class _Swap(Callback):
    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.optimizers = [adamw(pl_module)]


def test_an_optimizer_that_came_from_elsewhere_is_refused_before_training():
    module = tiny(adamw)
    with pytest.raises(RuntimeError, match="AdamW did not come from configure_optimizers"):
        fit(module, callbacks=[_Swap()])
    assert module.losses == []


def test_an_optimizer_that_the_user_compressed_under_another_policy_is_an_error():
    other = Policy([Rule(role="embedding", second_moment="SM3")])
    with pytest.raises(ValueError, match="already compressed under another policy"):
        fit(tiny(lambda m: compress(adamw(m), m, other)))


class _CpuFSDP(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself on a CPU."""


def test_fsdp1_is_refused_and_fsdp2_named():
    callback, module = OptimizerStateCompression(POLICY), tiny(adamw)
    refusal = r"does not work with FSDPStrategy: it flattens .* use FSDP2, that is ModelParallelStrategy .* DDPStrategy"
    with pytest.raises(ValueError, match=refusal):
        callback.setup(trainer(strategy=_CpuFSDP()), module, "fit")
    assert "configure_optimizers" not in vars(module)
