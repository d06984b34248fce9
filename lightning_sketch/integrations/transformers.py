"""Hugging Face Trainer: ``Trainer(optimizer_cls_and_kwargs=compressed_optimizer(args, policy))``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sketch.integrations.resharding import accelerate_place, move, needs_resharding
from lightning_sketch.monitor import Monitor
from lightning_sketch.optimizer.convert import compress
from lightning_sketch.optimizer.in_backward import refuse_settings
from lightning_sketch.optimizer.nonfinite import NonFinite
from lightning_sketch.policy.policy import PolicyLike


class CompressedOptimizerFactory:
    """Makes the Trainer's optimizer and compresses it.

    The Trainer instantiates whatever ``optimizer_cls_and_kwargs`` names that is not an Optimizer class, and calls it
    with the model: the one entry that knows the parameters' names and roles, and comes before a checkpoint is restored.

    >>> factory, kwargs = CompressedOptimizerFactory, {
    ...     "optimizer_cls": torch.optim.AdamW,
    ...     "policy": {"rules": [{"role": "embedding", "first_moment": "Drop", "second_moment": "RowWise"}]},
    ...     "lr": 3e-4,
    ...     "weight_decay": 0.01,
    ... }  # Trainer(..., optimizer_cls_and_kwargs=(factory, kwargs)) then does
    >>> optimizer = factory()(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 2)), **kwargs)
    >>> type(optimizer).__qualname__, [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    ('CompressedAdamW', [(2, 0.01), (1, 0.0)])
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        optimizer_cls: type[Optimizer] = torch.optim.AdamW,
        policy: PolicyLike = None,
        nonfinite: NonFinite = "raise",
        allow_empty: bool = False,
        step_in_backward: bool = False,
        monitor: Monitor | None = None,
        **kwargs: Any,
    ) -> Optimizer:
        """The compressed optimizer over the trainable parameters of `model`, in the Trainer's own two groups.

        Args:
            model: given by the Trainer.
            lr: learning rate. ``TrainingArguments.learning_rate`` does not reach a factory; see `compressed_optimizer`.
            optimizer_cls: any class of optimizers that takes ``lr``.
            policy: as of `compress`.
            nonfinite: see `lightning_sketch.compress`.
            allow_empty: see `lightning_sketch.compress`.
            step_in_backward: see `lightning_sketch.compress`; `compressed_optimizer` looks at the arguments for what
                does not go with it.
            monitor: see `lightning_sketch.compress`, and `transformers_monitor` for the Trainer's log.
            kwargs: for `optimizer_cls`. Its ``weight_decay`` spares biases and norms.

        Raises:
            TypeError: what an optimizer of a class without a rule keeps cannot be found out, or the model is sharded by
                FSDP1.
            ValueError: the policy does not fit, or compresses nothing.
        """
        optimizer = optimizer_cls(_groups(model, optimizer_cls), lr=lr, **kwargs)  # type: ignore[call-arg]
        return compress(
            optimizer,
            model,
            policy,
            nonfinite=nonfinite,
            allow_empty=allow_empty,
            step_in_backward=step_in_backward,
            monitor=monitor,
        )


def compressed_optimizer(
    args: Any,
    policy: PolicyLike = None,
    *,
    nonfinite: NonFinite = "raise",
    allow_empty: bool = False,
    step_in_backward: bool = False,
    monitor: Monitor | None = None,
) -> tuple[type[CompressedOptimizerFactory], dict[str, Any]]:
    """The optimizer that the Trainer would make from its arguments, compressed.

    >>> from transformers import TrainingArguments
    >>> args = TrainingArguments("out", optim="adamw_torch", learning_rate=3e-4, weight_decay=0.01, use_cpu=True)
    >>> factory, kwargs = compressed_optimizer(args)  # for Trainer(model, args, optimizer_cls_and_kwargs=...)
    >>> kwargs["optimizer_cls"].__name__, kwargs["lr"], kwargs["weight_decay"]
    ('AdamW', 0.0003, 0.01)

    Args:
        args: ``TrainingArguments``; their optim, optim_args, learning_rate, weight_decay and adam_* count.
        policy: as of `compress`.
        nonfinite: see `lightning_sketch.compress`.
        allow_empty: see `lightning_sketch.compress`.
        step_in_backward: see `lightning_sketch.compress`. Needs ``max_grad_norm=0`` (the default clips), no
            accumulation, no fp16 and no DeepSpeed.
        monitor: see `lightning_sketch.compress`. For the Trainer's log see `transformers_monitor`.

    Returns:
        the value of the Trainer's ``optimizer_cls_and_kwargs``.

    Raises:
        ValueError: DeepSpeed's configuration names an optimizer, which the Trainer would take instead. Or the
            arguments ask for what does not go with `step_in_backward`.
    """
    if step_in_backward:
        _refuse_step_in_backward(args)
    from transformers import Trainer  # slow to import, and loaded already where arguments exist

    plugin = args.deepspeed_plugin
    if plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise ValueError(
            'DeepSpeed\'s configuration has an "optimizer", which the Trainer takes instead of the compressed one: '
            "remove it there, and choose the optimizer by TrainingArguments(optim=..., learning_rate=...)"
        )
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    ours = {"optimizer_cls": optimizer_cls, "policy": policy, "nonfinite": nonfinite, "allow_empty": allow_empty}
    ours |= {"step_in_backward": step_in_backward, "monitor": monitor}
    return CompressedOptimizerFactory, {**kwargs, "weight_decay": args.weight_decay, **ours}


def _refuse_step_in_backward(args: Any) -> None:
    refuse_settings(
        {
            f"max_grad_norm={args.max_grad_norm}: clipping needs all gradients at once; set max_grad_norm=0": (
                args.max_grad_norm
            ),
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}: a layer would be stepped in every one": (
                args.gradient_accumulation_steps > 1
            ),
            "fp16=True: a GradScaler unscales gradients after backward; set bf16=True": args.fp16,
            "DeepSpeed: it averages gradients after they are complete; use FSDP2": args.deepspeed_plugin is not None,
        }
    )


class MovesStates:
    """Mixin for a Trainer that resumes, under FSDP2, what was saved plain or by another number of processes.

    Put it in front: ``class MovingTrainer(MovesStates, Trainer): pass``. Without it the Trainer resumes what it saved
    itself, under the same policy on as many processes: it reads into tensors of the live optimizer's names and shapes.
    """

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if checkpoint is None or not (trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        optimizers, places = [trainer.optimizer], [accelerate_place(Path(checkpoint), 0)]
        if not needs_resharding(optimizers, places):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        move(optimizers, places)
        # The rest of the method, which loads both or neither.
        trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))


def _groups(model: nn.Module, optimizer_cls: type[Optimizer]) -> list[dict[str, Any]]:
    """Parameter groups as ``Trainer.create_optimizer`` makes them, so that checkpoints fit with and without us."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # a method that does not use self
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    # SparseAdam has no weight decay, and must not be given any by way of a group.
    spared = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(optimizer_cls).parameters else {}
    return [
        {"params": [param for name, param in trainable if name in decayed]},
        {"params": [param for name, param in trainable if name not in decayed], **spared},
    ]
