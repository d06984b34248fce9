"""What to look at on a borrowed CUDA machine, section by section; `benchmarks/gpu_check.sh` runs all of them.

    python -m benchmarks.gpu_check equal                         # or another of SECTIONS; then summary
    python -m benchmarks.gpu_check equal --device cpu --quick    # without a GPU, to try the script itself

Each section writes ``SECTION.json`` into ``$OUT`` (``runs/gpu``). It needs torch alone, and Triton for its kernels.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_sketch as ls
from benchmarks import gpu_capture, gpu_tools, launches, roofline
from benchmarks.gpu_measure import allocated, by_each, event_time, kernels_on, under
from benchmarks.launches import CODECS
from benchmarks.speed_measure import Contestant, race
from benchmarks.speed_peers import version
from benchmarks.step_cost import transient
from lightning_sketch import Policy, Rule, compress
from lightning_sketch.kernels import unproved

Row = dict[str, Any]
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-2}),
    "SGD": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
}
#: Largest ``|found - exact| / |exact - start|``: of float32, and where states are rounded stochastically,
#: after which float64 and float32 may be a rounding apart.
CLOSE, CLOSE_ROUNDED = 1e-4, 2e-2
SHAPES, STEPS = ((1_000, 64), (333, 50), (70, 1_024)), 4


def policy(name: str) -> Policy:
    return Policy([Rule(role="embedding", **CODECS[name])])


def versions(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """What runs, and how fast memory is."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    found = {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip, "triton": version("triton")}
    yield {"what": "versions", "device": name, "lightning_sketch": ls.__version__, **found}
    with device:
        rates = roofline.bandwidth(1 << 16 if quick else roofline.NUMEL, _timed(device))
    yield {"what": "bandwidth, GB/s", **{kind: round(rate / 1e9) for kind, rate in rates.items()}}


def equal(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Every rule and codec pair against the same steps in float64 on the CPU; and whether twice gives the same bits."""
    cases = [("AdamW", codecs, sparse) for codecs in CODECS for sparse in (False, True)]
    cases += [(rule, "Drop + RowWise", False) for rule in ("Adagrad", "RMSprop")]
    cases += [("SGD", "BFloat16 + Factored", sparse) for sparse in (False, True)]
    for rule, codecs, sparse in cases:
        for kernels, words in kernels_on(device).items():
            row = {"what": f"{rule}, {codecs}, {'sparse' if sparse else 'dense'}", "kernels": words}
            if time.monotonic() > deadline:
                yield row | {"skipped": "out of time"}
                continue
            try:
                distances, bits = [], []
                for shape in SHAPES[: 1 if quick else None]:
                    exact = _trained(rule, codecs, sparse, shape, torch.float64, torch.device("cpu"), "")
                    one, two = (_trained(rule, codecs, sparse, shape, torch.float32, device, kernels) for _ in range(2))
                    moved = (exact - _start(shape).double()).norm()
                    distances.append(float((one.double() - exact).norm() / moved))
                    bits.append(torch.equal(one, two))
                limit = CLOSE_ROUNDED if "BFloat16" in codecs or "Quantized" in codecs else CLOSE
                row |= {"distance": max(distances), "same_bits": all(bits)}
                if not (max(distances) <= limit and all(bits)):
                    row["error"] = f"farther than {limit:g}, or other bits the second time"
            except Exception as error:  # every other case is worth knowing
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            yield row
    for kind, problem in unproved.items():
        yield {"what": f"kernels are proved on {kind}", "error": problem}


def launched(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Launches of plain PyTorch, counted on fake tensors; on a GPU also those of each kind of kernels, and waits."""
    shape = (20_000, 64) if quick else launches.LARGE
    for name in CODECS:
        counts, bound = launches.count_step([shape], policy(name))
        yield {"what": name, "kernels": "counted, plain PyTorch", "launches": counts.launches, "waits": counts.waits}
        if not counts.launches:
            yield {"what": name, "error": "no launches were counted"}
        if counts.temporaries > bound:
            yield {"what": name, "error": f"temporaries of {counts.temporaries} bytes, reported are {bound}"}
        for kernels, words in kernels_on(device).items() if device.type == "cuda" else ():
            try:
                yield {"what": name, "kernels": words, **_observed(name, kernels, device)}
            except Exception as error:
                yield {"what": name, "kernels": words, "error": f"{type(error).__name__}: {error}"[:300]}


def capture(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Steps captured into CUDA graphs and replayed, and under `torch.compile`, against steps made one by one."""
    return _tried(gpu_capture.in_graphs({name: policy(name) for name in CODECS}, device), deadline)


def scaler(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Steps under a GradScaler, one of which overflows, against the others without it."""
    return _tried(gpu_capture.scaled({name: policy(name) for name in CODECS}, device), deadline)


def _tried(cases: Iterator[tuple[str, Callable[[], Row]]], deadline: float) -> Iterator[Row]:
    for what, case in cases:
        row: Row = {"what": what}
        if time.monotonic() > deadline:
            yield row | {"skipped": "out of time"}
            continue
        try:
            row |= case()
        except Exception as error:  # every other case is worth knowing
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        yield row
    for kind, problem in unproved.items():
        yield {"what": f"kernels are proved on {kind}", "error": problem}


def times(device: torch.device, quick: bool, deadline: float) -> Iterator[Row]:
    """Steps against torch's fused AdamW, in turn: one large table, and 200 small layers."""
    large, small, layers = ((2_000, 64), (64, 16), 5) if quick else (launches.LARGE, launches.SMALL, launches.LAYERS)
    for words, shapes, rounds in (("large table", [large], 20), (f"{layers} small layers", [small] * layers, 10)):
        if time.monotonic() > deadline:
            yield {"what": words, "skipped": "out of time"}
            continue
        entries = by_each(list(_contestants(shapes, device)), kernels_on(device))
        found = race(
            entries,
            warm_up=2,
            rounds=3 if quick else rounds,
            timed=_timed(device),
            temporaries=allocated if device.type == "cuda" else transient,
        )
        for row in found:
            yield {"what": f"{words}: {row['label']}"} | {
                key: row[key] for key in ("milliseconds", "ratio", "transient_bytes", "error") if key in row
            }


def _contestants(shapes: list[tuple[int, int]], device: torch.device) -> Iterator[Contestant]:
    model = nn.ModuleList(nn.Embedding(*shape, device=device) for shape in shapes)
    # Two sets of gradients in turn, so that none is found in a cache.
    gradients = [[torch.randn_like(param) for param in model.parameters()] for _ in range(2)]
    numel = sum(param.numel() for param in model.parameters())
    fused = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    yield Contestant("adamw", "torch AdamW(fused=True)", fused, gradients, 28 * numel, "adamw", keep=model)
    for name in CODECS:
        optimizer = compress(torch.optim.AdamW(model.parameters(), lr=1e-3), model, policy(name))
        yield Contestant(
            name, name, optimizer, gradients, 16 * numel, "adamw", nonfinite="raise", may_fail=True, keep=model
        )


def _start(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _trained(
    rule: str,
    codecs: str,
    sparse: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    kernels: str,
) -> Tensor:
    """The table after a few steps with gradients of very different rows, some of which are not finite, on the CPU."""
    model = nn.Embedding(*shape, sparse=sparse, _weight=_start(shape).to(device, dtype))
    cls, options = RULES[rule]
    options = {key: value for key, value in options.items() if not (sparse and key == "weight_decay")}
    optimizer = compress(cls(model.parameters(), **options), model, policy(codecs), nonfinite="skip")
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-3, 1, shape[0])[:, None]
    with under(kernels):
        for step in range(STEPS):
            grad = torch.randn(shape, generator=generator) * scale
            grad[step * 7] = math.nan
            grad[step * 7 + 2, -1] = -math.inf
            if sparse:
                ids = torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 5)].sort().values
                values = grad[ids].to(device, dtype)
                model.weight.grad = torch.sparse_coo_tensor(
                    ids[None].to(device), values, shape, is_coalesced=True, check_invariants=False
                )
            else:
                model.weight.grad = grad.to(device, dtype)
            optimizer.step()
    return model.weight.detach().cpu()


def _observed(name: str, kernels: str, device: torch.device) -> Row:
    """Kernels that the profiler sees in a step, and whether one waits for the device."""
    model = nn.Embedding(40_000, 1_024, device=device)
    optimizer = compress(torch.optim.AdamW(model.parameters()), model, policy(name))
    model.weight.grad = torch.randn_like(model.weight)
    with under(kernels):
        optimizer.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            optimizer.step()
            torch.cuda.synchronize()
        count = sum(event.count for event in recorded.key_averages() if not event.key.startswith(("cuda", "Mem")))
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            waits: int | str = 0
        except RuntimeError as error:
            waits = str(error)[:100]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"launches": count, "waits": waits}


def _timed(device: torch.device) -> roofline.Timed:
    return event_time if device.type == "cuda" else roofline.wall_time


SECTIONS: dict[str, Callable[[torch.device, bool, float], Iterator[Row]]] = {
    "versions": versions,
    "repeats": gpu_tools.repeats,
    "equal": equal,
    "launches": launched,
    "capture": capture,
    "scaler": scaler,
    "times": times,
    "peers": gpu_tools.peers,
    "profiler": gpu_tools.profiler,
    "sanitizer": gpu_tools.sanitizer,
}


def _words(row: Row) -> str:
    figures = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in list(row.values())[1:]]
    names = list(row)[1:]
    return f"{row['what']}: " + ", ".join(f"{name} {figure}" for name, figure in zip(names, figures, strict=True))


def summary(out: Path) -> int:
    """Print what was found, failures last; returns their number."""
    failed = []
    for section in SECTIONS:
        path = out / f"{section}.json"
        rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
        failed += [f"{section}: {_words(row)}" for row in rows if "error" in row]
        if not rows:
            failed.append(f"{section}: nothing was written")
        fine = [row for row in rows if "error" not in row and "skipped" not in row]
        print(f"{section}: {len(fine)} of {len(rows)} rows")
        for row in rows:
            if "skipped" in row:
                print(f"  skipped: {row['what']}: {row['skipped']}")
        if section == "equal":
            farthest: dict[str, float] = {}
            for row in fine:
                farthest[row["kernels"]] = max(farthest.get(row["kernels"], 0.0), row["distance"])
            fine = [{"what": f"farthest from float64, {kernels}", "is": far} for kernels, far in farthest.items()]
        for row in fine:
            print(f"  {_words(row)}")
    for each in failed:
        print(f"FAILED {each}")
    print(f"{len(failed)} failed")
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("section", choices=[*SECTIONS, "summary"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes; the times mean nothing")
    parser.add_argument("--seconds", type=float, default=120.0, help="when to begin nothing more")
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT") or "runs/gpu")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.section == "summary":
        raise SystemExit(1 if summary(out) else 0)
    logging.getLogger("lightning_sketch").setLevel(logging.ERROR)  # it warns about first moments that it drops
    warnings.filterwarnings("ignore", message="NaN or inf in the gradient")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces every start
    rows: list[Row] = []
    deadline = time.monotonic() + arguments.seconds
    path = out / f"{arguments.section}.json"
    path.unlink(missing_ok=True)
    for row in SECTIONS[arguments.section](torch.device(arguments.device), arguments.quick, deadline):
        print(_words(row), flush=True)
        rows.append(row)
        path.write_text(json.dumps(rows, indent=1) + "\n")  # what a time limit cuts off keeps what was found
    raise SystemExit(1 if any("error" in row for row in rows) else 0)


if __name__ == "__main__":
    main()
