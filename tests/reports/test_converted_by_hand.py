"""Lightning's callback beside optimizers that a user converted by hand, and beside plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch.optim import Adam, AdamW

from lightning_sketch import compress
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from lightning_sketch.layers.record import LayerRecord
from tests.integrations.lightning_tools import assert_same_weights, batches, tiny, trainer
from tests.tiny import on_table

POLICY = on_table(first_moment="BFloat16", second_moment="RowWise")
OTHER = on_table(first_moment="BFloat16", second_moment="Factored")


def fit(configure, **options):
    module = tiny(configure, manual=options.pop("manual", False))
    made = trainer(callbacks=[OptimizerStateCompression(POLICY, log_memory=False)], **options)
    made.fit(module, batches())
    return made


def names(optimizer):
    """Names of the compressed layers, in the records and as the optimizer remembers them."""
    return [layer.fqn for _, layer, _ in optimizer.compressed_layers()]


def of_parts(module):
    """Two optimizers; the table's is converted with the table alone as the model."""
    table = AdamW(module.table.parameters(), lr=1e-2)
    return compress(table, module.table, POLICY), AdamW(module.head.parameters(), lr=1e-2)


def test_a_part_converted_by_hand_gets_the_names_of_the_whole_module():
    made = fit(of_parts, manual=True)
    by_hand, other = made.optimizers
    assert names(by_hand) == ["table.weight"]
    assert by_hand.compression.names == [["table.weight"]]
    assert [LayerRecord.from_record(record).fqn for record in by_hand.compression.records] == ["table.weight"]
    assert names(other) == []
    by_callback = fit(
        lambda m: (AdamW(m.table.parameters(), lr=1e-2), AdamW(m.head.parameters(), lr=1e-2)), manual=True
    )
    assert_same_weights(made.lightning_module, by_callback.lightning_module)


def test_what_it_compresses_is_known_to_be_compressed(caplog):
    fit(of_parts, manual=True)
    assert not [record for record in caplog.records if record.name == "lightning_sketch.optimizer.coverage"]


def test_checkpoints_of_it_resume(tmp_path):
    made = fit(of_parts, manual=True)
    made.save_checkpoint(tmp_path / "last.ckpt")
    module = tiny(lambda m: (AdamW(m.table.parameters()), AdamW(m.head.parameters())), manual=True)
    callbacks = [OptimizerStateCompression(POLICY, log_memory=False)]
    trainer(callbacks=callbacks, max_epochs=2).fit(module, batches(), ckpt_path=tmp_path / "last.ckpt")


def test_an_optimizer_that_was_stepped_before_keeps_its_names_and_seeds():
    def configure(module):
        optimizer = compress(AdamW(module.table.parameters(), lr=1e-2), module.table, POLICY)
        module.table.weight.grad = torch.ones_like(module.table.weight)
        optimizer.step()
        return optimizer, AdamW(module.head.parameters(), lr=1e-2)

    assert names(fit(configure, manual=True).optimizers[0]) == ["weight"]


@pytest.mark.parametrize("part", [False, True])
def test_another_policy_is_refused_and_nothing_is_said_of_checkpoints(part):
    def configure(module):
        model = module.table if part else module
        return compress(AdamW(model.parameters(), lr=1e-2), model, OTHER)

    with pytest.raises(ValueError, match="already compressed under another policy; call decompress") as raised:
        fit(configure)
    assert "checkpoint" not in str(raised.value)


def test_an_optimizer_of_plain_tensors_alone_is_left_alone():
    def configure(module):  # as SAC has one for its temperature
        module.log_alpha = torch.zeros((), requires_grad=True)
        return AdamW(module.parameters(), lr=1e-2), Adam([module.log_alpha], lr=1e-2)

    made = fit(configure, manual=True)
    assert names(made.optimizers[0]) == ["table.weight"]
    assert type(made.optimizers[1]) is Adam


def test_plain_tensors_beside_the_modules_parameters(tmp_path):
    def configure(module):
        module.scale = torch.ones((), requires_grad=True)
        return AdamW([*module.parameters(), module.scale], lr=1e-2)

    made = fit(configure)
    made.save_checkpoint(tmp_path / "last.ckpt")
    module = tiny(configure)
    callbacks = [OptimizerStateCompression(POLICY, log_memory=True)]
    resumed = trainer(callbacks=callbacks, max_epochs=2)
    resumed.fit(module, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert names(resumed.optimizers[0]) == ["table.weight"]


def test_converting_again_with_another_model_fails_before_anything_changes():
    module = tiny(None)
    optimizer = compress(AdamW(module.table.parameters()), module.table, POLICY)
    with pytest.raises(ValueError, match=r"not a parameter of the model|matched no parameter"):
        compress(optimizer, module.head, POLICY, nonfinite="skip")
    assert optimizer.compression.nonfinite == "raise"
    assert optimizer.compression.model() is module.table
