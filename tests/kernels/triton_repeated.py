"""Tables of Triton's kernels that serve for further steps, in Triton's interpreter on CPU tensors.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_sketch import BFloat16, Codec, Drop, Factored, Policy, Quantized, RowWise, Rule, compress, kernels
from lightning_sketch.kernels.triton import launch
from tests.tiny import assert_same, snapshot

STEPS = 5
CODECS: dict[str, tuple[Codec, Codec]] = {
    "rows": (Drop(), RowWise()),
    "rows, sketched": (BFloat16(), RowWise(3)),
    "factored": (BFloat16(), Factored()),
    "quantized": (Quantized(), Quantized()),
}


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused_kernel", lambda device: launch.step)


def _train(codecs: tuple[Codec, Codec], *, forget: bool) -> dict[str, Tensor]:
    """Parameters and states after steps, of which all but the first could be prepared; at the last layers decay."""
    torch.manual_seed(0)
    model = nn.ModuleList([*(nn.Embedding(12, 16) for _ in range(3)), *(nn.Embedding(5, 3) for _ in range(2))])
    policy = Policy([Rule(name="*", first_moment=codecs[0], second_moment=codecs[1])])
    optimizer = compress(AdamW(model.parameters(), lr=0.1), model, policy, nonfinite="skip")
    for step in range(STEPS):
        for number, param in enumerate(model.parameters()):
            grads = torch.randn(param.numel() + 1)
            # In other memory at every step, and once at an address that is no multiple of 16.
            param.grad = (
                grads[1:].view(param.shape) if (step, number) == (3, 1) else grads[:-1].view(param.shape).clone()
            )
        model[step % 3].weight.grad[2, 1] = torch.nan
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        if forget:
            optimizer.compression.bindings.clear()
        assert (optimizer.compression.bindings.prepared is not None) == (step > 0 and not forget and step != 4)
        optimizer.step()
    return snapshot(model, optimizer)


@pytest.mark.filterwarnings("ignore:NaN or inf")
@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_steps_are_those_of_tables_made_anew(codecs: tuple[Codec, Codec]) -> None:
    assert_same(_train(codecs, forget=False), _train(codecs, forget=True))
