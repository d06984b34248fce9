"""What test_transformers_ddp.py runs under torchrun: a Trainer over a tiny Llama; every rank saves what it ended with.

``torchrun --nproc_per_node 2 trainer_script.py STEPS [sparse]``: "sparse" gives the embedding sparse gradients.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Policy, RowWise, Rule
from lightning_sketch.integrations.transformers import compressed_optimizer

POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=BFloat16(), exp_avg_sq=CountSketch(compression=4)),
        Rule(role="softmax", exp_avg=Drop(), exp_avg_sq=RowWise(compression=4)),
        Rule(name="*.mlp.*", exp_avg=CountSketch(compression=4), exp_avg_sq=CountSketch(compression=4)),
        Rule(name="*.self_attn.*", exp_avg_sq=SM3()),
    ]
)


class WithoutNorm(Trainer):
    """The Trainer logs the norm of all gradients, which torch does not compute for sparse ones."""

    def _get_grad_norm(self, *args: object, **kwargs: object) -> None:
        return None


def main(steps: int, sparse: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    words = torch.arange(48)[:, None] + torch.arange(6)
    args = TrainingArguments(
        "out", max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=10, use_cpu=True,
        save_strategy="steps", save_steps=steps * 3 // 4, disable_tqdm=True, report_to=[],
        max_grad_norm=0.0 if sparse else 1.0,
    )  # fmt: skip

    seen: list[list[int]] = []

    def train(resume: str | None) -> tuple[Trainer, dict[str, Tensor]]:
        trainer = (WithoutNorm if sparse else Trainer)(
            make_model(config, sparse), args, train_dataset=[{"input_ids": x, "labels": x} for x in words],
            optimizer_cls_and_kwargs=compressed_optimizer(args, POLICY),
        )  # fmt: skip
        trainer.model.register_forward_pre_hook(
            lambda _, __, batch: seen.append(batch["input_ids"][:, 0].tolist()), with_kwargs=True
        )
        trainer.train(resume_from_checkpoint=resume)
        kept = {"model": trainer.model.state_dict(), "states": trainer.optimizer.state_dict()["state"]}
        return trainer, kept

    trainer, end = train(None)
    _, resumed = train(f"out/checkpoint-{args.save_steps}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"processes": args.world_size, "losses": losses, "seen": seen, "end": end, "resumed": resumed}
    torch.save(result, f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    os._exit(0)  # without destructors: gloo's joins a thread while holding the GIL that this thread may wait for


def make_model(config: LlamaConfig, sparse: bool) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().sparse = sparse
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["sparse"])
