"""Hugging Face Trainer: a tiny GPT-2 (random weights, nothing is downloaded) with a policy for its tied table.

python examples/hf_trainer.py

The one line is the same under torchrun (DDP), with ``TrainingArguments(fsdp=True)`` (FSDP2) and with ``deepspeed=...``.
"""

from __future__ import annotations

import re
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_sketch import BFloat16, Drop, Factored, Policy, Rule, report
from lightning_sketch.integrations.transformers import compressed_optimizer

POLICY = Policy(
    [
        Rule(role="embedding", min_rows=1_000, exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0)),
        Rule(name="*.mlp.*", min_numel=1_000, exp_avg=BFloat16(), exp_avg_sq=Factored()),
    ]
)


def main() -> None:
    torch.manual_seed(0)
    tokens = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()).lower())
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    text = torch.tensor([ids[token] for token in tokens])
    rows = text[: len(text) // 16 * 16].view(-1, 16)

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(ids), n_positions=16, n_embd=48, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=100, per_device_train_batch_size=16, learning_rate=5e-3, weight_decay=0.01,
            logging_steps=50, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model,
            args,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            optimizer_cls_and_kwargs=compressed_optimizer(args, POLICY),  # the one line
        )
        trainer.train()  # prints the loss
    print(report(trainer.optimizer))


if __name__ == "__main__":
    main()
