"""A causal Transformer by the usual recipe: which states do its tables need, tied and untied?

16,384 words, full softmax, 2 layers, width 128, 4 heads, context 128; 2,000 steps of 2,048 words, AdamW's fused class
with betas (0.9, 0.95), weight decay 0.1 on the matrices of the hidden layers (none on tables and norms), warm-up over
10 % and a cosine to 10 % of the peak, the gradient's norm clipped to 1. The learning rate is tuned for every method by
factors of two on validation blocks with seed 0, and shared by all parameters.

    python -m benchmarks.usual_recipe --workers 2                        # results/usual_recipe.json
    python -m benchmarks.usual_recipe --methods tied_adamw --seeds 3
    python -m benchmarks.usual_recipe --summarise                        # only write it, from finished runs

First every method is run at one learning rate, then each climbs from there, so that an interrupted sweep has compared
all methods at least at that.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks import gcide, schedules
from benchmarks.causal_lm import CausalLM, draw_sequences, loss_of, mean_loss
from benchmarks.command import chosen
from benchmarks.precision import bfloat16_products
from benchmarks.sparse_methods import state_bytes
from benchmarks.summary import RESULTS, environment
from benchmarks.sweep import Cache, Result, Setting, climb, each, perplexity

WORDS = 16_384
WIDTH = 128
LAYERS = 2
HEADS = 4
CONTEXT = 128  # words
BATCH = 16  # sequences
STEPS = 2_000
WARM_UP = 0.1  # of the steps
LAST_LR = 0.1  # of the peak
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
LARGEST_NORM = 1.0
EPS = 1e-8
START_LR = 4e-3
TEST_SEQUENCES = 512
EVALUATION_SEED = 1

Codecs = tuple[Callable[[Any], Any], Callable[[Any], Any]]  # the package -> codec of the first and of the second moment


@dataclass(frozen=True)
class Method:
    """AdamW, its beta1 on either table, and what is compressed.

    Args:
        beta1: of the input embedding and of the head; of a tied table the first.
        words, head: codecs of either table; ``None`` for exact states.
        preset: a policy for all layers, in place of these.
        table_eps: of both tables; ``None`` for what all have.
    """

    label: str
    tied: bool
    beta1: tuple[float, float] = (BETAS[0], BETAS[0])
    words: Codecs | None = None
    head: Codecs | None = None
    preset: str = ""
    table_eps: float | None = None

    def optimizer(self, model: CausalLM, lr: float, eps: float) -> Optimizer:
        tables = [model.words.weight] if model.head is None else [model.words.weight, model.head.weight]
        known = {id(table) for table in tables}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
        hidden = {id(module.weight) for module in model.blocks.modules() if isinstance(module, nn.Linear)}
        groups: list[dict[str, Any]] = [
            {"params": [table], "betas": (beta1, BETAS[1]), "eps": eps if self.table_eps is None else self.table_eps}
            for table, beta1 in zip(tables, self.beta1, strict=False)
        ]
        groups += [
            {"params": [parameter for parameter in rest if id(parameter) in hidden], "weight_decay": WEIGHT_DECAY},
            {"params": [parameter for parameter in rest if id(parameter) not in hidden]},
        ]
        optimizer = AdamW(groups, lr=lr, betas=BETAS, eps=eps, weight_decay=0.0, fused=True)
        if not (self.words or self.head or self.preset):
            return optimizer

        import lightning_sketch as ls

        if self.preset:
            return ls.compress(optimizer, model, ls.Policy.preset(self.preset))
        rules = [
            ls.Rule(name=name, first_moment=codecs[0](ls), second_moment=codecs[1](ls))
            for name, codecs in (("words.weight", self.words), ("head.weight", self.head))
            if codecs is not None
        ]
        return ls.compress(optimizer, model, ls.Policy(rules))


DROP, KEEP = (lambda ls: ls.Drop()), (lambda ls: ls.Keep())
BF16, EIGHT = (lambda ls: ls.BFloat16()), (lambda ls: ls.Quantized())
ROWS, ROWS_10 = (lambda ls: ls.RowWise()), (lambda ls: ls.RowWise(compression=10))
FACTORED, FLOORED = (lambda ls: ls.Factored()), (lambda ls: ls.Factored(floor=1.0))
FLOORED_LESS, FLOORED_MORE = (lambda ls: ls.Factored(floor=0.3)), (lambda ls: ls.Factored(floor=3.0))

METHODS: dict[str, Method] = {
    "tied_adamw": Method("AdamW, exact", True),
    "tied_b0": Method("AdamW, exact; beta1 = 0 on the table", True, (0.0, 0.0)),
    "tied_b0_eps4": Method(
        "AdamW, exact; beta1 = 0 and eps = 1e-4 on the table", True, (0.0, 0.0), table_eps=1e-4
    ),
    "tied_drop_factored": Method("Factored, no first moment", True, words=(DROP, FACTORED)),
    "tied_drop_floored": Method('Factored(floor=1), no first moment (preset "tables")', True, words=(DROP, FLOORED)),
    "tied_drop_less": Method("Factored(floor=0.3), no first moment", True, words=(DROP, FLOORED_LESS)),
    "tied_drop_more": Method("Factored(floor=3), no first moment", True, words=(DROP, FLOORED_MORE)),
    "tied_eps4": Method("AdamW, exact; eps = 1e-4 on the table", True, table_eps=1e-4),
    "tied_8bit_floored": Method("Factored(floor=1), first moment in 8 bits", True, words=(EIGHT, FLOORED)),
    "tied_8bit_factored": Method("Factored, first moment in 8 bits", True, words=(EIGHT, FACTORED)),
    "tied_b5": Method("AdamW, exact; beta1 = 0.5 on the table", True, (0.5, 0.5)),
    "tied_drop_rows": Method("RowWise, no first moment", True, words=(DROP, ROWS)),
    "tied_whole": Method('all layers: preset "whole-model"', True, preset="whole-model"),
    "tied_bf16_factored": Method("Factored, first moment BFloat16", True, words=(BF16, FACTORED)),
    "tied_bf16_rows": Method("RowWise, first moment BFloat16", True, words=(BF16, ROWS)),
    "tied_drop_rows_10": Method("RowWise in a 10x sketch, no first moment", True, words=(DROP, ROWS_10)),
    "tied_8bit": Method('all layers: preset "8bit"', True, preset="8bit"),
    "untied_adamw": Method("AdamW, exact", False),
    "untied_b0": Method("AdamW, exact; beta1 = 0 on both tables", False, (0.0, 0.0)),
    "untied_words_b0": Method("AdamW, exact; beta1 = 0 on the embedding", False, (0.0, BETAS[0])),
    "untied_head_b0": Method("AdamW, exact; beta1 = 0 on the head", False, (BETAS[0], 0.0)),
    "untied_drop_factored": Method(
        "both tables: Factored, no first moment", False, words=(DROP, FACTORED), head=(DROP, FACTORED)
    ),
    "untied_drop_floored": Method(
        "both tables: Factored(floor=1), no first moment",
        False, words=(DROP, FLOORED), head=(DROP, FLOORED),
    ),
    "untied_head_8bit": Method(
        "embedding: Factored, no first moment; head: Factored, first moment in 8 bits",
        False, words=(DROP, FACTORED), head=(EIGHT, FACTORED),
    ),
    "untied_8bit_factored": Method(
        "both tables: Factored, first moment in 8 bits", False, words=(EIGHT, FACTORED), head=(EIGHT, FACTORED)
    ),
    "untied_head_8bit_floored": Method(
        "embedding: Factored(floor=1), no first moment; head: Factored(floor=1), first moment in 8 bits",
        False, words=(DROP, FLOORED), head=(EIGHT, FLOORED),
    ),
    "untied_drop_rows": Method(
        "both tables: RowWise, no first moment", False, words=(DROP, ROWS), head=(DROP, ROWS)
    ),
    "untied_words_rows": Method(
        "embedding: RowWise, no first moment; head: Factored, no first moment",
        False, words=(DROP, ROWS), head=(DROP, FACTORED),
    ),
    "untied_whole": Method('all layers: preset "whole-model"', False, preset="whole-model"),
}  # fmt: skip


def run(setting: Setting, watch: Callable[[int, nn.Module, Optimizer], None] | None = None) -> Result:
    """Train once; perplexities (None if it diverged), state bytes and seconds.

    Args:
        watch: called after every step, with how many there were.
    """
    began = time.perf_counter()
    corpus = _corpus()
    model, optimizer = make(setting)
    finite = True
    for step, norm in enumerate(train(model, optimizer, setting), start=1):
        if not (finite := bool(norm.isfinite())):
            break
        if watch is not None:
            watch(step, model, optimizer)
    trained = time.perf_counter()
    return {
        "valid": _perplexity(model, corpus.valid) if finite else None,
        "test": _perplexity(model, corpus.test) if finite else None,
        "state_bytes": state_bytes(optimizer),
        "seconds": {"train": trained - began, "all": time.perf_counter() - began},
    }


def make(setting: Setting) -> tuple[CausalLM, Optimizer]:
    """The model with the seed's first weights, and the method's optimizer."""
    method = METHODS[setting.method]
    torch.manual_seed(setting.seed)
    model = CausalLM(_corpus().vocabulary, width=WIDTH, heads=HEADS, layers=LAYERS, context=CONTEXT, tied=method.tied)
    return model, method.optimizer(model, setting.lr, setting.eps)


def train(model: CausalLM, optimizer: Optimizer, setting: Setting) -> Iterator[Tensor]:
    """The gradient's norm before it is clipped, after every step; a step with a norm that is not finite is not done."""
    batches = draw_sequences(_corpus().train, STEPS * BATCH, np.random.default_rng(setting.seed), CONTEXT)
    for step, ids in enumerate(torch.split(batches, BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = schedules.cosine(step, STEPS, warm_up=WARM_UP, last=LAST_LR) * setting.lr
        with bfloat16_products():
            loss_of(model, ids).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        yield norm


def _perplexity(model: CausalLM, blocks: gcide.Ids) -> float | None:
    ids = draw_sequences(blocks, TEST_SEQUENCES, np.random.default_rng(EVALUATION_SEED), CONTEXT)
    mean = mean_loss(model, ids, BATCH)
    return math.exp(mean) if mean < 50 else None


@functools.lru_cache(maxsize=1)
def _corpus() -> gcide.Corpus:
    return gcide.load(max_words=WORDS)


def cache() -> Cache:
    return Cache(gcide.cache_folder() / "usual_recipe.jsonl")


def score(name: str, lr: float, seed: int = 0) -> float:
    """Validation perplexity of one run."""
    return perplexity(cache().run(Setting(name, lr, EPS, seed), run))


def run_once(name: str) -> None:
    score(name, START_LR)


def tune_and_repeat(name: str, seeds: int) -> None:
    lr = climb(lambda rate: score(name, rate), START_LR)
    for seed in range(1, seeds):
        score(name, lr, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="names, comma-separated; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="runs at the best learning rate; 0: only one rate")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--summarise", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    names = chosen(arguments.methods, METHODS)
    if not arguments.summarise:
        _corpus()  # the text is downloaded and tokenised once
        each(run_once, names, workers=arguments.workers)
        if arguments.seeds:
            each(functools.partial(tune_and_repeat, seeds=arguments.seeds), names, workers=arguments.workers)
    stored = {"environment": environment(), "runs": cache().results()}
    (RESULTS / "usual_recipe.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
