"""Training with prescribed gradients under every engine, for :mod:`benchmarks.exactness`; and the bytes of states.

What happens to one layer cannot reach another through the loss, so each table shows its codecs alone.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_sketch import CountSketch, Policy, Rule, compress
from lightning_sketch.sharding import local
from tests.checkpoints.engines import TABLES, make
from tests.deepspeed_tools import engine

STEPS = 200
ENGINES = {
    "rows": "FSDP2, Shard(0)",
    "columns": "FSDP2, Shard(1)",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
LABELS = {
    "default": "Drop + Factored(floor=1), the default of tables",
    "rows": "Drop + RowWise",
    "sketched_rows": "Keep + RowWise(compression)",
    "rounded": "BFloat16 of both",
    "sm3": "Keep + SM3",
    "factored": "BFloat16 + Factored",
    "quantized": "Quantized of both, 4 and 8 bits",
    "synced": "CountSketch(sync=True) of both",
    "sketch": "CountSketch of both",
    "exact": "CountSketch as wide as the table",
    "head": "uncompressed layers",
}
#: By the names of `LABELS`, but for the layers that no codec is for.
CODECS: dict[str, dict[str, Any]] = TABLES | {
    "synced": {name: CountSketch(compression=3, sync=True) for name in ("exp_avg", "exp_avg_sq")}
}
CODECS = {name: CODECS[name] for name in LABELS if name in CODECS}

Parameters = dict[str, Tensor]
#: What trainings came to, by the names of `LABELS`.
Found = dict[str, Parameters]
#: For memory: a table large enough that borders and counters do not matter.
LARGE = (8192, 24)


def train(kind: str, steps: int = STEPS, *, seed: int = 0) -> Parameters:
    """The whole parameters after training.

    Args:
        kind: one of `ENGINES`, for which the ranks must have been joined, or "single".
        seed: of the hashes.
    """
    policy = Policy([Rule(name=f"{name}.*", **codecs) for name, codecs in CODECS.items()], seed=seed)
    run = make(kind, policy, separate=True, tables=CODECS)  # a group for each layer: ZeRO-1 and -2 cut every group
    run.train(range(steps))
    return whole(run.model)


def whole(model: nn.Module) -> Parameters:
    """All parameters, gathered."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    gathered: Any = contextlib.nullcontext()
    if sharded:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(sharded)
    with gathered:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def by_layer(found: Parameters) -> Found:
    """Parameters by the name of the layer, which is that of its codecs."""
    layers: Found = {}
    for name, value in found.items():
        layers.setdefault(name.split(".")[0], {})[name] = value
    return layers


def distance(found: Parameters, expected: Parameters) -> float:
    """How far apart parameters are, relative to the second."""
    apart = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    return (apart / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


class OneTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(*LARGE)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sum()


def state_bytes(kind: str, codecs: str) -> int:
    """Bytes of the states of one large table on this rank."""
    model: nn.Module = OneTable()
    if kind in ("rows", "columns"):
        dim = 0 if kind == "rows" else 1
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(dim))
    policy = Policy([Rule(role="embedding", **CODECS[codecs])])
    optimizer = compress(torch.optim.AdamW(model.parameters()), model, policy)
    if kind.startswith("zero"):
        trained = engine(model, optimizer, int(kind[-1]))
        trained.backward(trained(torch.arange(LARGE[0])))
        trained.step()
    else:
        model(torch.arange(LARGE[0])).backward()
        optimizer.step()
    return sum(local(v).nbytes for s in optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor))
