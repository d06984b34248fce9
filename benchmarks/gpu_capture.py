"""Steps in CUDA graphs, under `torch.compile` and under a GradScaler, against the same steps made one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_measure import kernels_on, under
from lightning_sketch import Policy, compress, report

Row = dict[str, Any]
SHAPES = ((1_000, 64), (333, 50))
#: Steps before the capture, and replays after it; in the last of these the learning rate is another one.
WARM_UP, REPLAYS = 3, 5
LR, LAST_LR = 1e-2, 3e-3
#: Largest ``|found - expected| / |expected - start|``: float32 in another order of operations; where states are rounded
#: stochastically, a rounding apart.
CLOSE, CLOSE_ROUNDED = 1e-5, 2e-2
RULES: dict[str, Callable[..., Any]] = {
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "SGD": torch.optim.SGD,
}


def in_graphs(policies: Mapping[str, Policy], device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """What is to be tried, in words, and how; a row with an ``error`` is a failure."""
    if device.type != "cuda":
        yield "capturable=True without a graph", partial(_refused, next(iter(policies.values())), device)
    by_kernels = dict(reversed(kernels_on(device).items()))  # Triton's first
    for kernels, words in by_kernels.items() if device.type == "cuda" else ():
        for name in policies:
            yield f"AdamW, {name}, {words}: a graph", partial(_graph, "AdamW", name, policies, device, kernels)
        for rule, name in (("RMSprop", "Drop + Factored"), ("SGD", "BFloat16 + Factored")):
            yield f"{rule}, {name}, {words}: a graph", partial(_graph, rule, name, policies, device, kernels)
        factored = partial(_graph, "AdamW", "Drop + Factored", policies, device, kernels)
        yield f"{words}: a graph in which gradients are made", partial(factored, made_inside=True)
        yield f"{words}: NaN in a replay", partial(_nan_in_a_replay, policies["Drop + Factored"], device, kernels)
        yield (
            f"{words}: a graph without a step before",
            partial(_unprepared, policies["Drop + Factored"], device, kernels),
        )
    for kernels, words in by_kernels.items():
        yield f"{words}: torch.compile", partial(_compiled, policies["BFloat16 + Factored"], device, kernels)


def scaled(policies: Mapping[str, Policy], device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Six steps under a GradScaler, with an infinity in the third, for each policy and kind of kernels."""
    for kernels, words in reversed(kernels_on(device).items()):
        for name, policy in policies.items():
            yield f"GradScaler, {name}, {words}", partial(_scaled, name, policy, device, kernels)


def _model(device: torch.device, kept: bool = True) -> nn.ModuleList:
    """Tables, which policies compress, and what they keep."""
    tables = [
        nn.Embedding(*shape, _weight=torch.randn(shape, generator=torch.Generator().manual_seed(i)))
        for i, shape in enumerate(SHAPES)
    ]
    return nn.ModuleList([*tables, *([nn.LayerNorm(64)] if kept else [])]).to(device)


def _gradients(model: nn.Module, steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator).to(p.device) for p in model.parameters()] for _ in range(steps)]


def _distance(found: nn.Module, expected: nn.Module, start: nn.Module) -> float:
    """How far parameters are from what is expected, of how far these have moved."""
    return max(
        float(((one - other).norm() / (other - before).norm()).detach())
        for one, other, before in zip(found.parameters(), expected.parameters(), start.parameters(), strict=True)
    )


def _judged(found: nn.Module, expected: nn.Module, start: nn.Module, name: str) -> Row:
    distance = _distance(found, expected, start)
    same = all(torch.equal(one, other) for one, other in zip(found.parameters(), expected.parameters(), strict=True))
    limit = CLOSE_ROUNDED if "BFloat16" in name or "Quantized" in name else CLOSE
    row: Row = {"distance": distance, "same_bits": same}
    return row if distance <= limit else row | {"error": f"farther than {limit:g}"}


def _optimizer(
    rule: str, model: nn.Module, policy: Policy, capturable: bool, device: torch.device, nonfinite: Any = "raise"
) -> Any:
    options: dict[str, Any] = {"lr": torch.tensor(LR, device=device) if capturable else LR}
    if rule == "SGD":
        options["momentum"] = 0.9
    elif capturable:
        options["capturable"] = True
    return compress(RULES[rule](model.parameters(), **options), model, policy, nonfinite=nonfinite)


def _graph(
    rule: str,
    name: str,
    policies: Mapping[str, Policy],
    device: torch.device,
    kernels: str,
    made_inside: bool = False,
) -> Row:
    policy = policies[name]
    kept = rule != "SGD"  # torch's reads a tensor lr on the host
    start, eager, captured = (_model(device, kept) for _ in range(3))
    gradients = _gradients(start, WARM_UP + REPLAYS)
    with under(kernels):
        plain = _optimizer(rule, eager, policy, False, device)
        for number, grads in enumerate(gradients):
            if number == len(gradients) - 1:
                plain.param_groups[0]["lr"] = LAST_LR
            for param, grad in zip(eager.parameters(), grads, strict=True):
                param.grad = grad.clone()
            plain.step()
        optimizer = _optimizer(rule, captured, policy, True, device)
        graph, static = _capture(captured, optimizer, gradients[:WARM_UP], made_inside)
        for number, grads in enumerate(gradients[WARM_UP:]):
            if number == REPLAYS - 1:
                optimizer.param_groups[0]["lr"].fill_(LAST_LR)
            for place, grad in zip(static, grads, strict=True):
                place.copy_(grad)
            graph.replay()
        torch.cuda.synchronize()
        row = _judged(captured, eager, start, name)
        steps = {float(optimizer.state[param]["step"]) for param in captured.parameters()}
        if steps != {float(len(gradients))}:
            row["error"] = f"steps are counted as {steps}"
        return row | {"waits": _waits(optimizer.step)} | _replay_time(graph)


def _capture(
    model: nn.Module, optimizer: Any, warm_up: list[list[Tensor]], made_inside: bool
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one step after steps on a side stream, and where its gradients are to be put."""
    static = [torch.zeros_like(param) for param in model.parameters()]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for grads in warm_up:
            for param, place, grad in zip(model.parameters(), static, grads, strict=True):
                place.copy_(grad)
                param.grad = place.clone() if made_inside else place
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if made_inside:
        optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        if made_inside:  # as a backward pass in the graph does
            for param, place in zip(model.parameters(), static, strict=True):
                param.grad = place * 1.0
        optimizer.step()
    return graph, static


def _replay_time(graph: torch.cuda.CUDAGraph) -> Row:
    event: Callable[..., Any] = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return {"microseconds_a_replay": round(start.elapsed_time(end) * 100, 1)}


def _waits(run: Callable[[], object]) -> int | str:
    """Whether a call waits for the device: 0, or what torch says."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        return 0
    except RuntimeError as error:
        return str(error)[:150]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _nan_in_a_replay(policy: Policy, device: torch.device, kernels: str) -> Row:
    """It is left out, and said by the next step that is made one by one, or by `report`."""
    model = _model(device)
    gradients = _gradients(model, WARM_UP + 1)
    with under(kernels):
        optimizer = _optimizer("AdamW", model, policy, True, device)
        graph, static = _capture(model, optimizer, gradients[:WARM_UP], False)
        for place, grad in zip(static, gradients[-1], strict=True):
            place.copy_(grad)
        static[0][5, 3] = torch.nan
        row = next(model.parameters())[5]
        before = row.clone()
        graph.replay()
        try:
            report(optimizer)
        except FloatingPointError as error:
            said = str(error)
        else:
            return {"error": "report() did not say so"}
        if "0.weight (1 row)" not in said or not torch.equal(row, before):
            return {"error": f"not that row alone: {said}"[:200]}
        report(optimizer)  # said once
        return {"found": "1 row"}


def _unprepared(policy: Policy, device: torch.device, kernels: str) -> Row:
    model = _model(device)
    (grads,) = _gradients(model, 1)
    with under(kernels):
        optimizer = _optimizer("AdamW", model, policy, True, device)
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
        except RuntimeError as error:
            return {"refused": str(error)[:100]} if "side stream" in str(error) else {"error": str(error)[:200]}
        return {"error": "it was captured"}


def _refused(policy: Policy, device: torch.device) -> Row:
    """As torch does on such a device."""
    said = []
    for converted in (False, True):
        model = _model(device, kept=False)
        optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
        if converted:
            compress(optimizer, model, policy)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        try:
            optimizer.step()
        except AssertionError as error:
            said.append(str(error)[:60])
    return {"refused": said[1]} if len(set(said)) == 1 and len(said) == 2 else {"error": f"said was {said}"}


def _compiled(policy: Policy, device: torch.device, kernels: str) -> Row:
    """`torch.compile` of a step: the same steps, and nothing compiled again after the second."""
    start, eager, compiled = (_model(device) for _ in range(3))
    gradients = _gradients(start, 6)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    cuda, made = device.type == "cuda", list[int]()
    with under(kernels):
        plain = _optimizer("AdamW", eager, policy, False, device)
        optimizer = _optimizer("AdamW", compiled, policy, cuda, device)
        step: Callable[[], object] = torch.compile(optimizer.step, backend="inductor" if cuda else "eager")
        for grads in gradients:
            for model in (eager, compiled):
                for param, grad in zip(model.parameters(), grads, strict=True):
                    param.grad = grad.clone()
            plain.step()
            step()
            made.append(graphs["unique_graphs"])
        row = _judged(compiled, eager, start, "BFloat16")
        if made[-1] != made[2]:
            row["error"] = f"graphs were compiled after the third step: {made}"
    return row


def _scaled(name: str, policy: Policy, device: torch.device, kernels: str) -> Row:
    start, plain, scaled_model = (_model(device) for _ in range(3))
    gradients = _gradients(start, 6)
    with under(kernels):
        expected = compress(torch.optim.AdamW(plain.parameters(), lr=LR), plain, policy)
        optimizer = torch.optim.AdamW(scaled_model.parameters(), lr=LR, fused=True)
        compress(optimizer, scaled_model, policy)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1_000)
        scaler.scale(torch.ones((), device=device))  # makes the scale
        waits: list[int | str] = []
        for number, grads in enumerate(gradients):
            overflows, scale = number == 2, scaler.get_scale()
            for param, grad in zip(scaled_model.parameters(), grads, strict=True):
                param.grad = grad * scale
            if overflows:
                next(scaled_model.parameters()).grad[7, 1] = torch.inf  # type: ignore[index]
            before = copy.deepcopy(scaled_model)
            if device.type == "cuda" and number > 1:
                waits.append(_waits(lambda: scaler.step(optimizer)))
            else:
                scaler.step(optimizer)
            scaler.update()
            if overflows:
                same = zip(before.parameters(), scaled_model.parameters(), strict=True)
                if not all(torch.equal(*pair) for pair in same) or scaler.get_scale() != scale / 2:
                    return {"error": "the step that overflowed was not skipped"}
                continue
            for param, grad in zip(plain.parameters(), grads, strict=True):
                param.grad = grad
            expected.step()
        row = _judged(scaled_model, plain, start, name) | {"waits": next((w for w in waits if w), 0)}
        steps = {float(optimizer.state[param]["step"]) for param in scaled_model.parameters()}
        if steps != {5.0}:
            row["error"] = f"steps are counted as {steps}"
        if row["waits"]:
            row["error"] = f"a step waits: {row['waits']}"
        report(optimizer)
    return row
