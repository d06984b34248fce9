"""A small causal Transformer whose softmax is tied to the embedding: dense gradients.

The 20,000 commonest words, full softmax, 2 layers, width 128, 4 heads, context 64; 800 steps of 512
words, warm-up over 10 % and a linear fall to 2 % (SM3's own schedule: a quadratic warm-up over 10 %,
then constant; Adafactor's: a linear one, then the inverse root of the step), the gradient's norm
clipped to 1. AdamW's fused class at its defaults but the learning rate, which is tuned by factors of
two on validation blocks with seed 0 and shared by the table and the hidden layers. Where it says so, the table's eps is
tuned as well.

    python -m benchmarks.tied_transformer --methods adamw,rw_bf16 --workers 2  # results/tied_transformer.json
    python -m benchmarks.tied_transformer --summarise                # only write it, from finished runs

Peers are other libraries' (``pip install '.[bench]'``); those that are not installed are left out.

Matrix products in training take bfloat16 inputs where the CPU has the instructions; there the
softmax's gradients are rounded to bfloat16, as under autocast. Parameters and sums are float32.

Clipping is what makes seeds agree. The first steps' gradients are the largest (norms to 2.4; about 1
at step 150), and at beta2 = 0.999 the second moments remember them for long. Unclipped, exact AdamW
at 1e-3 falls from a loss of 5.6 to 5.1 in 50 steps or in 150, as the seed has it, and ends at a
perplexity of 66 or 97. With the norm clipped, or with beta2 = 0.98, the slow seed is as fast as the
other. Products in float32 do not help, nor do keys that mix in the previous word's ("smeared keys").
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import gcide, schedules
from benchmarks.causal_lm import CausalLM, draw_sequences, loss_of, mean_loss
from benchmarks.command import run_command
from benchmarks.precision import bfloat16_products
from benchmarks.sparse_methods import state_bytes
from benchmarks.sweep import Cache, Result, Setting, Sweep, false_if_diverged
from benchmarks.tied_methods import METHODS, build

WORDS = 20_000
WIDTH = 128
LAYERS = 2
HEADS = 4
CONTEXT = 64  # words
BATCH = 8  # sequences
STEPS = 800
WARM_UP = 0.1  # of the steps
LAST_LR = 0.02  # of the peak
LARGEST_NORM = 1.0  # of all gradients together; the usual value (GPT-3, among others)
VALID_SEQUENCES = 256
TEST_SEQUENCES = 512
EVALUATION_SEED = 1

START_LR = {"adam": 2e-3, "adagrad": 0.1, "adagrad_momentum": 0.025, "adafactor": 32e-3, "came": 1e-3}
DEFAULT_EPS = {"adam": 1e-8, "adagrad": 1e-10, "adagrad_momentum": 1e-10, "adafactor": 1e-3, "came": 1e-16}

#: By a method's `schedule`.
SCHEDULES: dict[str, Callable[[int], float]] = {
    "linear": lambda step: schedules.linear(step, STEPS, warm_up=WARM_UP, last=LAST_LR),
    "quadratic": lambda step: schedules.quadratic_then_constant(step, STEPS, warm_up=WARM_UP),
    "inverse_root": lambda step: schedules.linear_then_inverse_root(step, STEPS, warm_up=WARM_UP),
}


def make_model(vocabulary: int) -> CausalLM:
    return CausalLM(vocabulary, width=WIDTH, heads=HEADS, layers=LAYERS, context=CONTEXT)


def run(setting: Setting) -> Result:
    """Train once; perplexities (None if it diverged), state bytes and seconds."""
    began = time.perf_counter()
    method, corpus = METHODS[setting.method], _corpus()
    torch.manual_seed(setting.seed)
    model = make_model(corpus.vocabulary)
    optimizer = build(method, model, model.words, lr=setting.lr, eps=setting.eps)
    batches = draw_sequences(corpus.train, STEPS * BATCH, np.random.default_rng(setting.seed), CONTEXT)
    schedule = SCHEDULES[method.schedule]
    finite = _train(model, optimizer, batches, lambda step: schedule(step) * setting.lr)
    trained = time.perf_counter()

    return {
        "valid": _perplexity(model, corpus.valid, VALID_SEQUENCES) if finite else None,
        "test": _perplexity(model, corpus.test, TEST_SEQUENCES) if finite else None,
        "state_bytes": state_bytes(optimizer),
        "version": method.version,
        "seconds": {"train": trained - began, "all": time.perf_counter() - began},
    }


@false_if_diverged
def _train(model: CausalLM, optimizer: torch.optim.Optimizer, batches: Tensor, lr: Callable[[int], float]) -> bool:
    """All steps; False if the run diverged."""
    with bfloat16_products():
        for step in range(STEPS):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's, which refuses another object
                    group["lr"].fill_(lr(step))
                else:
                    group["lr"] = lr(step)
            loss_of(model, batches[step * BATCH : (step + 1) * BATCH]).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@functools.lru_cache(maxsize=1)
def _corpus() -> gcide.Corpus:
    return gcide.load(max_words=WORDS)


def _perplexity(model: CausalLM, blocks: gcide.Ids, sequences: int) -> float | None:
    mean = mean_loss(model, draw_sequences(blocks, sequences, np.random.default_rng(EVALUATION_SEED), CONTEXT), BATCH)
    return math.exp(mean) if mean < 50 else None


def main() -> None:
    searches = {
        name: (method.start_lr or START_LR[method.family], method.epsilons or (DEFAULT_EPS[method.family],))
        for name, method in METHODS.items()
    }
    sweep = Sweep(run, Cache(gcide.cache_folder() / "tied_transformer.jsonl"), searches)
    labels = {name: method.label for name, method in METHODS.items()}
    missing = {name: method.package for name, method in METHODS.items() if not method.is_installed}
    run_command("tied_transformer", __doc__, sweep, labels, prepare=_corpus, not_installed=missing)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
