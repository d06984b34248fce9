"""Steps for a process of their own: repeated, under a profiler, or under a sanitizer.

    python -m benchmarks.gpu_cases repeat             # hashes of parameters and states, as JSON
    python -m benchmarks.gpu_cases profile            # steps of a large table, between cudaProfilerStart and Stop
    python -m benchmarks.gpu_cases small              # a few steps of small tables, every codec, dense and sparse

`benchmarks/gpu_check.py` runs them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import launches
from lightning_sketch import Policy, Rule, compress

#: Codecs whose steps launch, together, the kernels that move the most memory: observe, reduce_columns, insert,
#: hash_columns, apply.
PROFILED = ("Drop + Factored", "CountSketch, both", "Quantized, both")
STEPS = 3


def _rows(shape: tuple[int, int], sparse: bool, generator: torch.Generator) -> Tensor:
    grad = torch.randn(shape, generator=generator)
    if not sparse:
        return grad
    ids = torch.randint(0, shape[0], (max(2, shape[0] // 3),), generator=generator)
    return torch.sparse_coo_tensor(ids[None], grad[: len(ids)], shape, check_invariants=False)


def trained(
    codecs: str, sparse: bool, shape: tuple[int, int], device: torch.device, steps: int = STEPS
) -> list[Tensor]:
    """The table and its states after a few steps from the same seed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    model = nn.Embedding(*shape, sparse=sparse, _weight=weight.to(device))
    policy = Policy([Rule(role="embedding", **launches.CODECS[codecs])])
    optimizer = compress(torch.optim.AdamW(model.parameters(), weight_decay=0.0), model, policy, nonfinite="skip")
    for _ in range(steps):
        model.weight.grad = _rows(shape, sparse, generator).to(device)
        optimizer.step()
    return [model.weight.detach(), *(x for _, x in sorted(optimizer.state[model.weight].items()))]


def repeat(device: torch.device, quick: bool) -> None:
    """Print a hash of parameters and states of every codec, dense and sparse."""
    found: dict[str, str] = {}
    for name in list(launches.CODECS)[: 3 if quick else None]:
        for sparse in (False, True):
            digest = hashlib.sha256()
            for shape in ((300, 64),) if quick else ((5_000, 256), (333, 50)):
                for tensor in trained(name, sparse, shape, device):
                    digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            found[f"{name}, {'sparse' if sparse else 'dense'}"] = digest.hexdigest()
    print(json.dumps(found))


def profile(device: torch.device, quick: bool) -> None:
    """Steps of a large table, of which the last of each codec is between calls that a profiler waits for."""
    model = nn.Embedding(*((2_000, 64) if quick else launches.LARGE), device=device)
    model.weight.grad = torch.randn_like(model.weight)
    for name in PROFILED:
        policy = Policy([Rule(role="embedding", **launches.CODECS[name])])
        optimizer: Any = compress(torch.optim.AdamW(model.parameters()), model, policy)
        for _ in range(2):
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def small(device: torch.device, quick: bool) -> None:
    """A few steps of small tables."""
    for name in launches.CODECS:
        for sparse in (False, True):
            for shape in ((40, 64), (33, 50)):
                trained(name, sparse, shape, device, steps=2)


def main() -> None:
    what = {"repeat": repeat, "profile": profile, "small": small}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=list(what))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    arguments = parser.parse_args()
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)  # it warns about first moments that it drops
    warnings.filterwarnings("ignore", message="NaN or inf in the gradient")
    what[arguments.what](torch.device(arguments.device), arguments.quick)


if __name__ == "__main__":
    main()
