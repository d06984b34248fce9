"""The demo's model and text, small, trained under every engine, for :mod:`benchmarks.exactness`.

Every rank takes its share of the same global batches, so that the averaged gradient is one process's but for rounding.
Unlike prescribed gradients, these react to the parameters: what a codec does to one layer reaches every other.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.exactness_prescribed import CODECS, Parameters, whole
from lightning_sketch import Policy, Rule, compress
from tests.deepspeed_tools import engine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))
import corpus
from batches import HeldOutTokens, RandomWindows
from model import NextToken
from settings import Settings

#: A prime number of rows: no number of ranks divides them. The columns, which FSDP2 cuts evenly only, divide by 1 to 4,
#: as the windows of a batch do.
VOCABULARY = 1021
SETTINGS = Settings(
    steps=200, dim=12, hidden=48, context=4, negatives=128, windows=12, length=8, validations=1, validation_tokens=4800
)

ENGINES = {
    "ddp": "DDP",
    "ddp sparse": "DDP, sparse gradients",
    "rows": "FSDP2, Shard(0)",
    "columns": "FSDP2, Shard(1)",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}


@dataclass(frozen=True)
class Data:
    """A part of the demo's text: training batches, held-out batches, how often each token occurs."""

    train: RandomWindows
    held_out: HeldOutTokens
    counts: Any  # int64 [vocabulary]


@cache
def data() -> Data:
    """The source of torch.nn's modules, in the demo's tokens; rare ones are one token, the first."""
    files = [path for name, path in corpus.source_files() if name.startswith("nn/modules/")]
    text = [token for path in files for token in corpus.TOKEN.findall(path.read_text(encoding="utf-8"))]
    common = Counter(text).most_common(VOCABULARY - 1)
    ids = {token: number for number, (token, _) in enumerate(common, start=1)}
    tokens = np.array([ids.get(token, corpus.UNKNOWN) for token in text], dtype=np.int32)
    train, held_out = np.split(tokens, [len(tokens) * 9 // 10])
    counts = np.bincount(train, minlength=VOCABULARY)
    return Data(RandomWindows(train, SETTINGS), HeldOutTokens(held_out, SETTINGS), counts)


class Training(nn.Module):
    """The demo's model; what it is called with is a batch, and what it returns the loss, as engines expect it."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = NextToken(SETTINGS, data().counts)
        self.model.input.sparse = self.model.output.sparse = sparse

    def forward(self, batch: Tensor) -> Tensor:
        features: Tensor = self.model(batch[:, :-1])
        return self.model.sampled_loss(features, self.model.targets(batch))


def train(kind: str, codecs: str, *, parts: int = 1, seed: int = 0, steps: int = SETTINGS.steps) -> Parameters:
    """Train on this rank's share of the batches; the whole parameters afterwards.

    Args:
        kind: one of `ENGINES`, for which the ranks must have been joined, or "single" or "single sparse".
        codecs: of the two tables, by their name in `CODECS`; without any ("head") nothing is compressed.
        parts: in how many parts a single process takes each batch, adding their gradients up.
        seed: of the hashes.
    """
    rule = Rule(name=["*input.weight", "*output.weight"], **CODECS.get(codecs, {}))
    rank, world_size = (0, 1) if kind.startswith("single") else (dist.get_rank(), dist.get_world_size())
    module = Training(kind.endswith("sparse"))
    if kind in ("rows", "columns"):
        cut = 0 if kind == "rows" else 1
        tables = {id(module.model.input.weight), id(module.model.output.weight)}
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(cut if id(p) in tables else 0))
    optimizers, schedulers = optimizers_of(module.model, kind.endswith("sparse"))
    compress(optimizers, module, Policy([rule, Rule()], seed=seed))
    trained: Any = DistributedDataParallel(module) if kind.startswith("ddp") else module
    if kind.startswith("zero"):
        (optimizer,), (scheduler,) = optimizers, schedulers
        trained = engine(module, optimizer, int(kind[-1]), lr_scheduler=scheduler, **BUCKETS)
    for step in range(steps):
        batch = data().train[step][rank::world_size]
        for part in range(parts):
            torch.manual_seed(step)  # the same negatives for all
            loss = trained(batch[part::parts]) / parts
            trained.backward(loss) if kind.startswith("zero") else loss.backward()
        if kind.startswith("zero"):
            trained.step()  # and the scheduler's, and sets gradients to zero
            continue
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return whole(module.model)


#: Of DeepSpeed, large enough for all gradients at once.
BUCKETS = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}


def optimizers_of(model: NextToken, sparse: bool) -> tuple[list[Any], list[Any]]:
    """The demo's own: SparseAdam for the tables, AdamW for the rest. Without sparse gradients: one AdamW for both."""
    (tables, hidden), schedulers = model.configure_optimizers()
    if sparse:
        return [tables, hidden], schedulers
    groups = [{"params": o.param_groups[0]["params"], "lr": o.defaults["lr"]} for o in (tables, hidden)]
    adamw = AdamW([groups[0] | {"weight_decay": 0.0}, groups[1]])
    return [adamw], [LambdaLR(adamw, schedulers[0].lr_lambdas[0])]


def loss_of(trained: Parameters) -> float:
    """The mean loss over the held-out tokens, in nats."""
    model = NextToken(SETTINGS, data().counts).to(torch.float64)
    model.load_state_dict({k: v.double() for k, v in trained.items()}, strict=False)  # the buffers are the model's own
    with torch.no_grad():
        losses = [float(model.full_loss(model(batch[:, :-1]), model.targets(batch))) for batch in data().held_out]
    return sum(losses) / len(losses)


def distance(found: Parameters, expected: Parameters) -> float:
    """How far apart two trainings end, relative to the way from the initial parameters to the second."""
    start = dict(Training(sparse=False).model.double().named_parameters())
    apart = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in expected)
    moved = sum(float((expected[k].double() - start[k].detach()).square().sum()) for k in expected)
    return (apart / moved) ** 0.5
