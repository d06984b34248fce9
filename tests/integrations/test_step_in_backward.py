"""Steps in backward by way of trainers: the same training, and the trainers' settings that do not go with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from transformers import Trainer

from lightning_sketch import compress
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from lightning_sketch.integrations.transformers import compressed_optimizer
from tests.integrations.lightning_tools import (
    POLICY,
    adamw,
    assert_same_weights,
    assert_table_compressed,
    batches,
    fit,
    tiny,
    trainer,
    weights,
)
from tests.integrations.test_transformers import MODELS, arguments, data


def callback() -> OptimizerStateCompression:
    return OptimizerStateCompression(POLICY, log_memory=False, step_in_backward=True)


def two_adamw(module: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (module.table, module.head)]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_trains_as_with_ordinary_steps(manual: bool, sparse: bool) -> None:
    configure = two_adamw if manual else adamw
    ordinary, module = (tiny(configure, manual=manual, sparse=sparse) for _ in range(2))
    fit(ordinary)
    freed: list[bool] = []
    module.on_after_backward = lambda: freed.append(module.table.weight.grad is None)
    assert_table_compressed(fit(module, callbacks=[callback()], compressed=False))
    assert_same_weights(module, ordinary)
    assert freed == [True] * 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gradient_clip_val": 0.5}, "gradient_clip_val=0.5"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, "GradientAccumulationScheduler"),
        ({"strategy": "ddp"}, "DDPStrategy"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, 'precision="16-mixed"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_lightning_that_do_not_go_with_it_are_refused(options: dict[str, Any], said: str) -> None:
    made = trainer(**options)
    with pytest.raises(ValueError, match=f"does not work with {said}.*step_in_backward=False"):
        callback().setup(made, tiny(adamw), "fit")


def _trained(**options: Any) -> nn.Module:
    make, policy = MODELS["llama"]
    model, args = make(), arguments(max_grad_norm=0)
    Trainer(
        model, args, train_dataset=data(), optimizer_cls_and_kwargs=compressed_optimizer(args, policy, **options)
    ).train()
    return model


def test_the_hugging_face_trainer_trains_as_with_ordinary_steps() -> None:
    assert_same_weights(_trained(step_in_backward=True), _trained())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "max_grad_norm=1.0"),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
    ],
)
def test_arguments_of_hugging_face_that_do_not_go_with_it_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"does not work with {said}"):
        compressed_optimizer(arguments(**options), MODELS["llama"][1], step_in_backward=True)


def _accelerated(in_backward: bool, **options: Any) -> tuple[Accelerator, Any, Any]:
    module = tiny(adamw)
    accelerator = Accelerator(cpu=True, **options)
    model, optimizer = accelerator.prepare(module, adamw(module))
    return accelerator, model, compress(optimizer, model, POLICY, step_in_backward=in_backward)


def _train(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    for tokens, target in batches():
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model.head(model.table(tokens).mean(1)), target))
        optimizer.step()
    return weights(model)


def test_accelerate_trains_as_with_ordinary_steps() -> None:
    ordinary = _train(*_accelerated(in_backward=False))
    accelerator, model, optimizer = _accelerated(in_backward=True)
    _train(accelerator, model, optimizer)
    assert_same_weights(model, ordinary)


def test_accumulation_by_accelerate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"over 3 backward passes.*table\.weight.*gradient_accumulation_steps=1"):
        _accelerated(in_backward=True, gradient_accumulation_steps=3)
