"""Fine-tuning a pretrained model, SmolLM2-135M, on a dictionary's articles by the Hugging Face Trainer.

300 steps of 4 articles of at most 64 tokens, AdamW's defaults in Transformers (betas (0.9, 0.999), no decay), warm-up
over 10 %, then linearly to 0, the gradient's norm clipped to 1; all parameters are trained, in float32. Each run is a
process of one thread and takes half an hour; the peak is the system's figure for it from the optimizer's making on, the
model included.

    pip install -e '.[benchmark,transformers]' gguf bitsandbytes
    python -m benchmarks.fine_tuning --workers 2                # results/fine_tuning.json
    python -m benchmarks.fine_tuning --lr 1e-3 --workers 2      # another learning rate
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import smollm2
from benchmarks.command import chosen
from benchmarks.gcide import cache_folder
from benchmarks.memory_cap import answer, begin_phase, run_capped, status
from benchmarks.sparse_methods import state_bytes
from benchmarks.summary import RESULTS, environment
from benchmarks.sweep import Cache, Result, Setting, each
from lightning_sketch import Codec, Drop, Factored, Keep, Policy, Quantized, RowWise, Rule, default_policy

LENGTH = 64  # tokens
BATCH = 4  # articles
STEPS = 300
HELD_OUT = 256  # articles
START_LR = 3e-4
EPS = 1e-8

Options = Callable[[Any], dict[str, Any]]  # of TrainingArguments -> of Trainer


def _compressed(policy: Policy) -> Options:
    def options(args: Any) -> dict[str, Any]:
        from lightning_sketch.integrations.transformers import compressed_optimizer

        return {"optimizer_cls_and_kwargs": compressed_optimizer(args, policy)}

    return options


def _table(first: Codec, second: Codec) -> Options:
    return _compressed(Policy([Rule(role=("embedding", "softmax"), first_moment=first, second_moment=second)]))


@dataclass(frozen=True)
class Method:
    label: str
    options: Options = lambda args: {}
    optim: str = "adamw_torch_fused"  # Transformers' name of an optimizer


METHODS: dict[str, Method] = {
    "adamw": Method("AdamW, exact"),
    "default": Method("default policy", _compressed(default_policy())),
    "table_8bit": Method("table: first Quantized, second Factored", _table(Quantized(), Factored())),
    "table_dropped": Method("table: first dropped, second exact", _table(Drop(), Keep())),
    "table_8bit_second": Method("table: first dropped, second Quantized", _table(Drop(), Quantized())),
    "table_factored": Method("table: first dropped, second Factored", _table(Drop(), Factored())),
    "table_row_wise": Method("table: first dropped, second RowWise", _table(Drop(), RowWise())),
    "whole_model": Method('preset "whole-model"', _compressed(Policy.preset("whole-model"))),
    "8bit": Method('preset "8bit"', _compressed(Policy.preset("8bit"))),
    "bnb_8bit": Method("bitsandbytes AdamW8bit", optim="adamw_bnb_8bit"),
}


def train(setting: Setting) -> Result:
    """One run, in this process."""
    from transformers import Trainer, TrainingArguments

    method = METHODS[setting.method]
    torch.manual_seed(setting.seed)
    model = smollm2.load()
    ids, labels = smollm2.articles(HELD_OUT + STEPS * BATCH, LENGTH)
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=setting.lr,
            adam_epsilon=setting.eps, optim=method.optim, lr_scheduler_type="linear", warmup_steps=STEPS // 10,
            max_grad_norm=1.0, use_cpu=True, logging_steps=max(1, STEPS // 10), save_strategy="no", report_to=[],
            disable_tqdm=True, seed=setting.seed,
        )  # fmt: skip
        before = held_out_loss(model, ids[:HELD_OUT], labels[:HELD_OUT])
        began = time.perf_counter()
        begin_phase()
        trainer = Trainer(model, args, train_dataset=data[HELD_OUT:], **method.options(args))
        trainer.train()
        peak, seconds = status("VmHWM"), time.perf_counter() - began
    found = held_out_loss(model, ids[:HELD_OUT], labels[:HELD_OUT])
    return {
        "before": before,
        "valid": found if math.isfinite(found) else None,
        "curve": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "state_bytes": state_bytes(trainer.optimizer.optimizer),
        "peak_bytes": peak,
        "seconds": seconds,
    }


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    """Nats a token."""
    was_training = model.training
    model.eval()
    total = tokens = 0.0
    for batch, label in zip(torch.split(ids, BATCH), torch.split(labels, BATCH), strict=True):
        counted = int((label[:, 1:] != smollm2.PADDING).sum())
        total += float(model(input_ids=batch, labels=label).loss) * counted
        tokens += counted
    model.train(was_training)
    return total / tokens


def run(setting: Setting) -> Result:
    """One run, in a process of its own."""
    arguments = [setting.method, "--lr", str(setting.lr), "--seed", str(setting.seed)]
    found = run_capped("benchmarks.fine_tuning", ["--child", *arguments])
    assert found is not None  # there is no cap
    return found


def cached(name: str, lr: float, seeds: int) -> None:
    cache = Cache(cache_folder() / "fine_tuning.jsonl")
    for seed in range(seeds):
        cache.run(Setting(name, lr, EPS, seed), run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="names, comma-separated; default: all")
    parser.add_argument("--lr", type=float, default=START_LR, help="the peak learning rate")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--summarise", action="store_true", help="train nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        answer(lambda: train(Setting(arguments.child, arguments.lr, EPS, arguments.seed)))
        return
    names = chosen(arguments.methods, METHODS)
    if not arguments.summarise:
        smollm2.articles(1, LENGTH)  # model and text are fetched once
        each(functools.partial(cached, lr=arguments.lr, seeds=arguments.seeds), names, workers=arguments.workers)
    runs = Cache(cache_folder() / "fine_tuning.jsonl").results()
    (RESULTS / "fine_tuning.json").write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
