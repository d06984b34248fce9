"""A checkpoint of another policy names, in one line, the policy that loads it: the default one has changed."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

import lightning_sketch
from lightning_sketch import OptimizerStateCompression, Policy, RowWise, Rule, compress, restore
from lightning_sketch.integrations.resharding import needs_resharding
from tests.tiny import CODECS, EVERY, Tiny, assert_same, on_table, snapshot, train

#: The default policy of version 0.1, which docs/checkpoints.md names.
FORMER = Policy(
    [
        Rule(
            role=("embedding", "softmax"),
            min_rows=10_000,
            exp_avg="Drop",
            first_moment="BFloat16",
            second_moment=RowWise(compression=10),
        )
    ]
)


def policy_in(message: str) -> Policy:
    """The policy of an error's last line."""
    return eval(message.splitlines()[-1], vars(lightning_sketch))


def tables() -> nn.ModuleDict:
    return nn.ModuleDict({"emb": nn.Embedding(10_000, 2), "head": nn.Embedding(10_001, 2), "h": nn.Linear(2, 2)})


def test_a_checkpoint_of_the_former_default_names_its_policy():
    model = tables()
    old = compress(AdamW(model.parameters()), model, FORMER)
    train(model, old, range(1))
    new = compress(AdamW(model.parameters()), model)
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(ValueError, match=r"emb.weight: its codecs in the checkpoint is .*RowWise") as raised:
        new.load_state_dict(old.state_dict())
    assert_same(new.state_dict(), before)
    assert str(raised.value).splitlines()[-1].strip() == (
        "Policy([Rule(name=('emb.weight', 'head.weight'), exp_avg=Drop(), exp_avg_sq=RowWise(compression=10))])"
    )
    again = compress(AdamW(model.parameters()), model, policy_in(str(raised.value)))
    again.load_state_dict(old.state_dict())
    assert_same(snapshot(model, again), snapshot(model, old))


@pytest.mark.parametrize(("case", "codecs"), EVERY, ids=str)
def test_the_printed_policy_loads_the_checkpoint_of_any_codec_and_optimizer(case, codecs):
    policy = Policy([*on_table(**CODECS[codecs]).rules, Rule(name="kept.bias", first_moment="BFloat16")], seed=41)
    if "Adagrad" in str(case):
        policy = Policy(policy.rules[:1], seed=41)
    model = Tiny()
    old = compress(case.make(model.parameters()), model, policy)
    train(model, old, range(2), sparse=case.sparse)
    new = compress(case.make(model.parameters()), model, on_table(first_moment="BFloat16", second_moment="BFloat16"))
    with pytest.raises(ValueError, match="That policy is") as raised:
        new.load_state_dict(old.state_dict())
    printed = policy_in(str(raised.value))
    assert printed.seed == 41
    again = compress(case.make(model.parameters()), model, printed)
    again.load_state_dict(old.state_dict())
    assert_same(snapshot(model, again), snapshot(model, old))


def test_names_are_matched_literally():
    model = nn.ModuleDict({"a[0]": nn.Embedding(9, 2), "a0": nn.Embedding(9, 2)})
    old = compress(AdamW(model.parameters()), model, Policy([Rule(match=lambda fqn, *_: "[" in fqn, exp_avg="Drop")]))
    new = compress(AdamW(model.parameters()), model, Policy([Rule(exp_avg="BFloat16")]))
    with pytest.raises(ValueError, match=r"compressed by the policy|codecs") as raised:
        new.load_state_dict(old.state_dict())
    again = compress(AdamW(model.parameters()), model, policy_in(str(raised.value)))
    assert again.param_groups[0]["compression"] == old.param_groups[0]["compression"]


def test_a_seed_that_cannot_be_found_is_said():
    model = Tiny()
    old = compress(Adam(model.parameters()), model, Policy([Rule(role="embedding", exp_avg="Drop")], seed=123_456_789))
    new = compress(Adam(model.parameters()), model, Policy([Rule(role="embedding", exp_avg="Drop")]))
    with pytest.raises(ValueError, match=r"seed=\.\.\.\)  # the seed it was written under"):
        new.load_state_dict(old.state_dict())


def test_no_policy_is_named_where_it_is_not_the_policy():
    old_model, model = Tiny(rows=30), Tiny(rows=31)
    policy = on_table(exp_avg="Drop")
    old, new = (compress(Adam(m.parameters()), m, policy) for m in (old_model, model))
    train(old_model, old, range(1))
    with pytest.raises(ValueError, match="its shape in the checkpoint") as raised:
        new.load_state_dict(old.state_dict())
    assert "That policy is" not in str(raised.value)


def test_a_trainer_s_check_before_loading_names_it_and_restore_needs_none(tmp_path):
    model = tables()
    old = compress(AdamW(model.parameters()), model, FORMER)
    train(model, old, range(1))
    path = tmp_path / "optimizer.pt"
    torch.save(old.state_dict(), path)
    new = compress(AdamW(model.parameters()), model)
    with pytest.raises(ValueError, match="written under another policy") as raised:
        needs_resharding([new], [(path, 0)])
    assert policy_in(str(raised.value)).rules[0].exp_avg_sq == RowWise(compression=10)
    restore(new, path)  # encodes anew
    assert "exp_avg_sq_col" in new.state[model["emb"].weight]


class _Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tables()

    def training_step(self, batch, index):
        return self.model["h"](self.model["emb"](batch) + self.model["head"](batch)).square().mean()

    def configure_optimizers(self):
        return AdamW(self.parameters())


class _OtherRecords(L.Callback):
    """Put groups of another policy into the live optimizer, as BaseFinetuning does when it resumes."""

    def __init__(self, records) -> None:
        self.records = records

    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["compression"] = self.records


def test_the_callback_names_it_when_training_starts():
    module = _Module()
    records = compress(module.configure_optimizers(), module, FORMER).param_groups[0]["compression"]
    trainer = L.Trainer(
        callbacks=[OptimizerStateCompression(log_memory=False), _OtherRecords(records)],
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"another policy: model\.emb\.weight, model\.head\.weight") as raised:
        trainer.fit(module, [torch.arange(3)])
    found = compress(module.configure_optimizers(), module, policy_in(str(raised.value)))
    assert found.param_groups[0]["compression"] == records
