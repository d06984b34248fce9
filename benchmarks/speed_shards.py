"""The same data as whole parameters, as the flat tensors of DeepSpeed's ZeRO, and as FSDP2's DTensors.

All on one rank: what is measured is the step itself, not communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import lightning_sketch as ls
from benchmarks.roofline import dense_bytes
from benchmarks.speed_cases import DENSE, LR, NONFINITE, Sizes
from benchmarks.speed_measure import Contestant
from lightning_sketch.layers.flat import FlatTensors
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.sharding.deepspeed import FlatLayout, Segment

TABLE, HIDDEN = DENSE["rw"], DENSE["factored_bf16"]
POLICY = ls.Policy([TABLE.rule(role="embedding"), HIDDEN.rule(name="layers.*.weight")])


class Model(nn.Module):
    """A table and square layers with biases."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        rows, columns, layers = sizes.sharded
        self.table = nn.Embedding(rows, columns)
        self.layers = nn.ModuleList(nn.Linear(columns, columns) for _ in range(layers))


def sharded(sizes: Sizes) -> list[Contestant]:
    """Whole parameters, flat segments and DTensors, with and without the check."""
    whole = Model(sizes)
    gradients = [torch.randn_like(param) for param in whole.parameters()]
    mesh = _mesh()
    entries = []
    for nonfinite in NONFINITE:
        makers = {
            "whole": ("whole parameters", _whole(whole, nonfinite), gradients),
            "flat": ("two flat tensors, cut inside a row", *_flat(whole, gradients, nonfinite)),
            "dtensor": ("DTensors of fully_shard", *_dtensors(sizes, gradients, nonfinite, mesh)),
        }
        for key, (label, optimizer, own) in makers.items():
            moved, against = _moved(whole, check=nonfinite == "raise"), f"whole/{nonfinite}"
            entries.append(Contestant(key, label, optimizer, [own], moved, against, nonfinite, keep=whole))
    return entries


def _whole(model: Model, nonfinite: Any) -> Optimizer:
    return ls.compress(AdamW(model.parameters(), lr=LR, fused=True), model, POLICY, nonfinite=nonfinite)


def _flat(model: Model, gradients: list[Tensor], nonfinite: Any) -> tuple[Optimizer, list[Tensor]]:
    """Two tensors one behind the other, as DeepSpeed lays them out, and their gradients."""
    optimizer = _whole(model, nonfinite)
    params = list(model.parameters())
    everything = torch.cat([param.detach().flatten() for param in params])
    grads = torch.cat([grad.flatten() for grad in gradients])
    cut = everything.numel() // 2 + 13  # inside a row, and so that the second tensor does not start at a multiple of 64
    tensors = [everything[:cut].clone(), everything[cut:].clone()]
    layout: list[tuple[Tensor, list[Segment]]] = []
    for tensor, begin in zip(tensors, (0, cut), strict=True):
        segments, position = [], 0
        for param in params:
            start, stop = max(position, begin), min(position + param.numel(), begin + tensor.numel())
            if start < stop:
                segments.append(Segment(param, tuple(param.shape), start - begin, stop - start, start - position))
            position += param.numel()
        layout.append((tensor, segments))
    optimizer.param_groups[0]["params"] = tensors
    anywhere = [[segment.param for segment in segments] for _, segments in layout]
    records = [LayerRecord.from_record(record) for record in optimizer.compression.records]  # type: ignore[attr-defined]
    optimizer.compression.flat = FlatTensors(  # type: ignore[attr-defined]
        FlatLayout("ZeRO-3", layout, anywhere, [[()] * len(params) for params in anywhere], None),
        named_layers(model, None),
        {layer.fqn: layer for layer in records},
    )
    return optimizer, [grads[:cut].clone(), grads[cut:].clone()]


def _dtensors(sizes: Sizes, gradients: list[Tensor], nonfinite: Any, mesh: Any) -> tuple[Optimizer, list[Tensor]]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = Model(sizes)
    fully_shard(model, mesh=mesh)
    optimizer = _whole(model, nonfinite)
    optimizer.model = model  # type: ignore[attr-defined]  # the optimizer knows its model by weak reference
    placed: list[tuple[Any, Tensor]] = list(zip(model.parameters(), gradients, strict=True))
    return optimizer, [DTensor.from_local(grad, mesh, param.placements, run_check=False) for param, grad in placed]


def _mesh() -> Any:
    """One rank on its own, without a network, on torch's default device."""
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh

    device = torch.get_default_device().type
    if not dist.is_initialized():
        dist.init_process_group({"cpu": "gloo", "cuda": "nccl"}[device], store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,))


def _moved(model: Model, check: bool) -> float:
    def bytes_of(codecs: Any) -> float:
        return dense_bytes(4, state=codecs.state, passes=codecs.passes, check=codecs.looks(check))

    weights = sum(param.numel() for param in model.layers.parameters() if param.ndim == 2)
    biases = sum(param.numel() for param in model.layers.parameters() if param.ndim == 1)
    table = model.table.weight.numel()
    return table * bytes_of(TABLE) + weights * bytes_of(HIDDEN) + biases * dense_bytes(4, state=16)
