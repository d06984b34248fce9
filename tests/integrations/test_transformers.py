"""The Hugging Face Trainer: ``optimizer_cls_and_kwargs=compressed_optimizer(args, policy)`` and ``optimizers=``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Policy, RowWise, Rule, compress, report
from lightning_sketch.integrations.transformers import CompressedOptimizerFactory, compressed_optimizer
from lightning_sketch.optimizer.classes import COMPRESSED, CompressedAdamW
from lightning_sketch.rules.inside import unwrap

VOCABULARY = 64
POLICY = Policy(
    [
        Rule(role="embedding", min_rows=VOCABULARY, exp_avg=BFloat16(), exp_avg_sq=CountSketch(compression=4)),
        Rule(role="softmax", exp_avg=Drop(), exp_avg_sq=RowWise()),
        Rule(name="*.mlp.*", min_numel=256, exp_avg_sq=SM3()),
    ]
)
#: In a tied model the embedding's rule takes the softmax layer with it.
TIED = Policy([POLICY.rules[0], POLICY.rules[2]])


def llama() -> nn.Module:
    """Untied: the embedding and the softmax layer are two tables."""
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )


def gpt2() -> nn.Module:
    """Tied: one table is both. Has dropout, so a resumed run needs its random state."""
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2))


MODELS = {"llama": (llama, POLICY), "gpt2": (gpt2, TIED)}


def arguments(out: str = "out", **options: Any) -> TrainingArguments:
    defaults = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": [], "use_cpu": True}
    return TrainingArguments(out, **defaults | options)


def data() -> list[dict[str, torch.Tensor]]:
    """24 sentences that count from 0 to 5, from 1 to 6, ...: a part of the vocabulary."""
    words = torch.arange(24)[:, None] + torch.arange(6)
    return [{"input_ids": sentence, "labels": sentence} for sentence in words]


def trainer_for(model: nn.Module, args: TrainingArguments, policy: Policy | None, entry: str = "arguments") -> Trainer:
    """A Trainer that compresses by way of `entry`; without a policy, one that does not compress."""
    options: dict[str, Any] = {}
    if policy is None:
        pass
    elif entry == "arguments":
        options["optimizer_cls_and_kwargs"] = compressed_optimizer(args, policy)
    elif entry == "factory":
        kwargs = {"optimizer_cls": torch.optim.AdamW, "policy": policy, "lr": args.learning_rate, "weight_decay": 0.0}
        options["optimizer_cls_and_kwargs"] = (CompressedOptimizerFactory, kwargs)
    elif entry == "optimizers":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
        options["optimizers"] = (compress(optimizer, model, policy), None)
    return Trainer(model, args, train_dataset=data(), **options)


def log(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_all_entries_train_alike(kind):
    make, policy = MODELS[kind]
    trainers = {}
    for entry in ("arguments", "factory", "optimizers"):
        trainers[entry] = trainer_for(make(), arguments(optim="adamw_torch"), policy, entry)
        trainers[entry].train()
        assert type(unwrap(trainers[entry].optimizer)) is CompressedAdamW
        assert set(report(trainers[entry].optimizer).state_by_codec) >= {"Keep", "BFloat16", "CountSketch", "SM3"}
    weights = [trainer.model.state_dict() for trainer in trainers.values()]
    assert_same(weights[1], weights[0])
    assert_same(weights[2], weights[0])
    losses = log(trainers["arguments"], "loss")
    assert len(losses) == 8
    assert losses[-1] < 0.95 * losses[0]


def test_logged_learning_rates_are_those_of_the_plain_run():
    plain, ours = (trainer_for(llama(), arguments(warmup_steps=3), policy) for policy in (None, POLICY))
    plain.train()
    ours.train()
    assert log(ours, "learning_rate") == log(plain, "learning_rate")
    assert len(set(log(ours, "learning_rate"))) > 4


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch", "adam_beta2": 0.99, "adam_epsilon": 1e-6},
        {"optim": "adamw_torch_fused"},
        {"optim": "adagrad", "optim_args": "lr_decay=0.1"},
        {"optim": "sgd", "optim_args": "momentum=0.9,weight_decay=0.5"},
        {"optim": "rmsprop"},
    ],
    ids=lambda options: options["optim"],
)
def test_groups_and_options_are_those_of_the_plain_trainer(kind, options):
    args = arguments(weight_decay=0.1, **options)
    policy = Policy([Rule(role="embedding", first_moment=BFloat16(), second_moment=RowWise())])
    model = MODELS[kind][0]()
    model.get_parameter({"llama": "model.norm.weight", "gpt2": "transformer.wpe.weight"}[kind]).requires_grad = False
    plain = Trainer(model, args).create_optimizer()
    ours = trainer_for(model, args, policy).create_optimizer()
    assert type(ours) is COMPRESSED[type(plain)]
    assert ours.defaults == plain.defaults | {"weight_decay": 0.1}  # the plain trainer sets it in the groups only
    for group, expected in zip(ours.param_groups, plain.param_groups, strict=True):
        assert len(group.pop("compression")) == len(group["params"])
        assert [id(p) for p in group.pop("params")] == [id(p) for p in expected.pop("params")]
        assert group == expected
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("entry", ["arguments", "optimizers"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_is_the_undisturbed_one(kind, entry):
    make, policy = MODELS[kind]
    args = arguments(save_strategy="steps", save_steps=5, gradient_accumulation_steps=2)
    undisturbed, resumed = (trainer_for(make(), args, policy, entry) for _ in range(2))
    undisturbed.train()
    steps = []
    resumed.create_optimizer().register_step_post_hook(lambda *_: steps.append(1))
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    assert len(steps) == 3
    assert_same(resumed.model.state_dict(), undisturbed.model.state_dict())
    assert_same(resumed.optimizer.state_dict()["state"], undisturbed.optimizer.state_dict()["state"])
    assert log(resumed, "loss") == log(undisturbed, "loss")


def test_a_dense_checkpoint_resumes_compressed():
    args = arguments(save_strategy="steps", save_steps=5)
    plain = trainer_for(llama(), args, None)
    plain.train()
    resumed = trainer_for(llama(), args, POLICY)
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    state = unwrap(resumed.optimizer).state[resumed.model.lm_head.weight]
    assert float(state["step"]) == 8
    assert state["exp_avg_sq_row"].shape == (VOCABULARY,)
    errors = report(resumed.optimizer).conversion_errors
    assert errors["lm_head.weight"]["exp_avg"] == 1  # dropped
    assert 0 < errors["model.embed_tokens.weight"]["exp_avg"] < 0.01
    # compression starts at step 5, so what comes before is the plain run
    assert log(resumed, "loss")[:6] == log(plain, "loss")[:6]
    assert log(resumed, "loss")[-1] == pytest.approx(log(plain, "loss")[-1], rel=0.1)


def test_bfloat16_training_keeps_float32_states():
    trainer = trainer_for(llama().bfloat16(), arguments(bf16=True), POLICY)
    trainer.train()
    state = unwrap(trainer.optimizer).state[trainer.model.lm_head.weight]
    assert trainer.model.lm_head.weight.dtype == torch.bfloat16
    assert state["exp_avg_sq_row"].dtype == torch.float32
    assert log(trainer, "loss")[-1] < 0.9 * log(trainer, "loss")[0]


@pytest.mark.parametrize("form", ["Policy", "dictionary", "path", "str"])
def test_a_policy_comes_in_any_form(form, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(POLICY.to_dict()))
    policy = {"Policy": POLICY, "dictionary": POLICY.to_dict(), "path": path, "str": str(path)}[form]
    optimizer = CompressedOptimizerFactory()(llama(), lr=1e-3, policy=policy)
    assert [layer.fqn for _, layer, _ in optimizer.compressed_layers()] == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ]


def test_a_factory_needs_a_learning_rate():
    # AdamW's own default would silently replace TrainingArguments.learning_rate
    with pytest.raises(TypeError, match="'lr'"):
        CompressedOptimizerFactory()(llama(), policy=POLICY)


def test_sparse_adam_gets_no_weight_decay_from_a_group():
    model = nn.Sequential(nn.Embedding(64, 4, sparse=True), nn.Embedding(64, 4, sparse=True))
    policy = Policy([Rule(name="0.weight", second_moment=RowWise())])
    optimizer = CompressedOptimizerFactory()(model, optimizer_cls=torch.optim.SparseAdam, lr=1e-3, policy=policy)
    assert all("weight_decay" not in group for group in optimizer.param_groups)


def test_an_optimizer_without_a_rule_takes_elementwise_codecs():
    policy = Policy([Rule(role=("embedding", "softmax"), first_moment=BFloat16(), second_moment=BFloat16())])
    kwargs = {"optimizer_cls": torch.optim.NAdam, "policy": policy, "lr": 1e-2}
    args, options = arguments(), {"optimizer_cls_and_kwargs": (CompressedOptimizerFactory, kwargs)}
    trainer = Trainer(llama(), args, train_dataset=data(), **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    state = unwrap(trainer.optimizer).state[trainer.model.lm_head.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_adafactor_of_the_trainer_keeps_nothing_that_the_policy_names():
    trainer = trainer_for(llama(), arguments(optim="adafactor"), Policy([Rule(role="embedding", exp_avg=BFloat16())]))
    with pytest.raises(ValueError, match="gives codecs for exp_avg, but this optimizer keeps exp_avg_sq"):
        trainer.train()


def test_importing_the_integration_imports_no_transformers():
    code = "import sys, lightning_sketch.integrations.transformers; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
