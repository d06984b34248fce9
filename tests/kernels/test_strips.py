"""Dense steps of count-sketches in strips of columns: few threads take them, too many for the columns do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sketch import Codec, CountSketch, Drop, Policy, Rule, compress
from lightning_sketch.kernels import native
from tests.kernels.fused_cases import Case, by_isa, check, threads, train
from tests.tiny import assert_same

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.why_not()}")

SKETCHES = [CountSketch(compression=4, depth=depth) for depth in (1, 2, 3)]
INSTRUCTION_SETS = range(native.library().lightning_sketch_isa() + 1) if native.library() else ()
MANY = 8  # threads, for up to 15 strips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["adam", "adamw"])
@pytest.mark.parametrize("first", [True, False], ids=["both", "second"])
@pytest.mark.parametrize("codec", SKETCHES, ids=repr)
def test_equal_to_the_reference(codec: Codec, first: bool, rule: str, dtype: torch.dtype) -> None:
    check(Case(rule, codec, codec if first else Drop(), rows=300, columns=149, dtype=dtype))


@pytest.mark.parametrize("columns", [64, 128, 205, 900])
@pytest.mark.parametrize("codec", SKETCHES, ids=repr)
def test_the_same_bits_as_without_strips(codec: Codec, columns: int) -> None:
    results = []
    for count in (1, 2, 3, MANY):
        for number in INSTRUCTION_SETS:
            with by_isa(number), threads(count):
                results.append(train(Case("adam", codec, codec, rows=400, columns=columns)))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("start", [1, 16, 63])
def test_strips_begin_where_memory_is_aligned(start: int) -> None:
    """Where a gradient lies decides where its strips begin, and nothing else."""
    torch.manual_seed(0)
    initial, gradient = torch.randn(200, 150), torch.randn(200, 150)
    results = []
    for shift in (0, start):
        layer = nn.Linear(150, 200, bias=False)
        layer.weight.data = _shifted(initial, shift)
        policy = Policy([Rule(name="*", exp_avg=SKETCHES[2], exp_avg_sq=SKETCHES[2])])
        optimizer = compress(torch.optim.AdamW(layer.parameters()), layer, policy)
        layer.weight.grad = _shifted(gradient, shift)
        with threads(1):
            for _ in range(3):
                optimizer.step()
        results.append(layer.weight.detach())
    assert torch.equal(*results)


def _shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy that many elements into its memory."""
    memory = torch.empty(tensor.numel() + elements)
    return memory[elements:].view(tensor.shape).copy_(tensor)
