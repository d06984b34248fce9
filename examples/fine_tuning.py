"""Fine-tune a Hugging Face causal language model with a tied table, half of its blocks frozen; save, and resume.

A tiny model with random weights, nothing is downloaded; --model takes a real one, with its tokenizer.

python examples/fine_tuning.py
python examples/fine_tuning.py --model Qwen/Qwen2.5-0.5B
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_sketch import report
from lightning_sketch.integrations.transformers import compressed_optimizer

LENGTH, STEPS = 64, 20
TEXT = " ".join(topics.values())


def load(name: str | None) -> tuple[Any, Tensor]:
    """The model and the ids of a text."""
    if name:
        tokenized = AutoTokenizer.from_pretrained(name)(TEXT, return_tensors="pt")
        return AutoModelForCausalLM.from_pretrained(name), tokenized["input_ids"][0]
    tokens = re.findall(r"\w+|[^\w\s]", TEXT.lower())
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    config = LlamaConfig(
        vocab_size=12_000, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.tensor([ids[token] for token in tokens])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a name of the Hub, or a folder")
    torch.manual_seed(0)
    model, ids = load(parser.parse_args().model)
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    blocks[: len(blocks) // 2].requires_grad_(False)
    untrained = copy.deepcopy(model)
    data = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)]

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=3e-3, lr_scheduler_type="cosine",
            logging_steps=STEPS // 2, save_steps=STEPS // 2, report_to=[], disable_tqdm=True,
        )  # fmt: skip

        def trainer(model: nn.Module) -> Trainer:
            return Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=compressed_optimizer(args))

        first = trainer(model)
        first.train()  # prints the loss
        print(report(first.optimizer))

        resumed = trainer(untrained)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    pairs = zip(model.state_dict().values(), untrained.state_dict().values(), strict=True)
    distance = max(float((one - other).abs().max()) for one, other in pairs)
    print(f"resumed from step {STEPS // 2}: weights differ by at most {distance:.2g} in the end")


if __name__ == "__main__":
    main()
