"""In Lightning a policy is judged over all optimizers, once (peft#3499, peft#2376)."""

from __future__ import annotations

import logging

import lightning
import pytest
import torch
from torch.optim import AdamW

from lightning_sketch import OptimizerStateCompression, Policy, Rule
from lightning_sketch.optimizer.base import CompressedOptimizer
from tests.integrations.lightning_tools import (
    PACKAGES,
    POLICY,
    assert_same_weights,
    assert_table_compressed,
    batches,
    fit,
    tiny,
    trainer,
)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="lightning_sketch.optimizer.coverage")
    return lambda: [
        record.getMessage() for record in caplog.records if record.name == "lightning_sketch.optimizer.coverage"
    ]


def frozen_table(module):
    module.table.requires_grad_(False)
    return AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def one_by_one(module):
    return [AdamW(module.head.parameters(), lr=1e-2), AdamW(module.table.parameters(), lr=1e-2)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_table_that_no_optimizer_trains_is_an_error(package):
    with pytest.raises(ValueError, match=r"rule 1 .*: table.weight: not in the optimizer, frozen"):
        fit(tiny(frozen_table, package))


def test_allow_empty_trains_with_one_warning(warnings):
    module, plain = tiny(frozen_table), tiny(frozen_table)
    callback = OptimizerStateCompression(POLICY, allow_empty=True)
    made = fit(module, callbacks=[callback], compressed=False)
    fit(plain, compressed=False)
    assert isinstance(made.optimizers[0], CompressedOptimizer)
    assert_same_weights(module, plain)
    assert len(warnings()) == 1
    assert "table.weight: not in the optimizer" in warnings()[0]


def test_rules_for_different_optimizers_are_all_in_use(warnings):
    policy = Policy([*POLICY.rules, Rule(name="head.weight", first_moment="BFloat16", second_moment="Factored")])
    made = trainer(callbacks=[OptimizerStateCompression(policy)])
    made.fit(tiny(one_by_one, manual=True), batches())
    assert warnings() == []
    assert all("exp_avg_sq_row" in made.optimizers[i].state[p] for i, p in
               enumerate([made.lightning_module.head.weight, made.lightning_module.table.weight]))  # fmt: skip


def test_nothing_is_converted_if_one_optimizer_cannot_be():
    made = []

    def configure(module):
        made.extend([AdamW(module.table.parameters()), AdamW([*module.head.parameters(), torch.nn.Parameter()])])
        return made

    with pytest.raises(ValueError, match="not a parameter of the model"):
        fit(tiny(configure, manual=True))
    assert [type(optimizer) for optimizer in made] == [AdamW, AdamW]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_bare_callback_without_large_tables_trains_with_one_warning(package, warnings):
    module, plain = tiny(one_by_one, package, manual=True), tiny(one_by_one, package, manual=True)
    made = fit(module, callbacks=[OptimizerStateCompression()], compressed=False)
    fit(plain, compressed=False)
    assert_same_weights(module, plain)
    (message,) = warnings()
    assert "the largest, table.weight, has 40. To compress the hidden layers, pass Policy(" in message

    made.save_checkpoint("bare.ckpt")
    resumed, without = tiny(one_by_one, package, manual=True), tiny(one_by_one, package, manual=True)
    fit(resumed, callbacks=[OptimizerStateCompression()], compressed=False, max_epochs=2, ckpt_path="bare.ckpt")
    fit(without, compressed=False, max_epochs=2, ckpt_path="bare.ckpt")
    assert_same_weights(resumed, without)


def test_the_bare_callback_leaves_an_unsupported_optimizer_alone(warnings):
    fit(tiny(lambda m: torch.optim.Adamax(m.parameters())), callbacks=[OptimizerStateCompression()], compressed=False)
    assert len(warnings()) == 1


def test_a_frozen_table_in_the_optimizer_is_compressed_once_it_is_unfrozen(warnings):
    class Unfreeze(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.table.requires_grad_(trainer.current_epoch == 1)

    def configure(module):
        module.table.requires_grad_(False)
        return AdamW(module.parameters(), lr=1e-2)

    callbacks = [OptimizerStateCompression(POLICY, allow_empty=True), Unfreeze()]
    assert_table_compressed(fit(tiny(configure), callbacks=callbacks, compressed=False, max_epochs=2))
    assert "Frozen layers of the optimizer will be compressed once they are unfrozen" in warnings()[0]
