"""A plain optimizer that was given a compressed one's states says so, instead of failing obscurely or training on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim import AdamW

from lightning_sketch import Policy, RowWise, Rule, compress
from tests.scripts import run_script

POLICY = Policy([Rule(name="weight", exp_avg_sq=RowWise())])


def compressed_state(path: Path) -> None:
    layer = nn.Linear(4, 3)
    optimizer = compress(AdamW(layer.parameters()), layer, POLICY)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), path)


def test_a_plain_optimizer_that_loaded_a_compressed_checkpoint(tmp_path: Path) -> None:
    compressed_state(tmp_path / "state.pt")
    layer = nn.Linear(4, 3)
    plain = AdamW(layer.parameters())
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    layer(torch.ones(2, 4)).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="compress"):
        plain.step()
    assert torch.equal(before, layer.weight)


@pytest.mark.parametrize("made", ["by compress", "by pickle", "never"])
def test_the_first_converted_optimizer_of_a_process_is_enough(made: str, tmp_path: Path) -> None:
    compressed_state(tmp_path / "state.pt")
    layer = nn.Linear(4, 3)
    torch.save(compress(AdamW(layer.parameters()), layer, POLICY), tmp_path / "optimizer.pt")
    program = (
        "import torch, lightning_sketch\n"
        "layer = torch.nn.Linear(4, 3)\n"
        f"if {made == 'by compress'}:\n"
        "    policy = {'rules': [{'name': 'weight', 'exp_avg_sq': 'RowWise'}]}\n"
        "    lightning_sketch.compress(torch.optim.AdamW(layer.parameters()), layer, policy)\n"
        f"if {made == 'by pickle'}:\n"
        f"    torch.load({str(tmp_path / 'optimizer.pt')!r}, weights_only=False)\n"
        "plain = torch.optim.AdamW(layer.parameters())\n"
        f"plain.load_state_dict(torch.load({str(tmp_path / 'state.pt')!r}, weights_only=True))\n"
        "layer(torch.ones(2, 4)).sum().backward()\n"
        "plain.step()\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    with pytest.raises(ProcessRaisedException) as raised:
        run_script(script)
    last = str(raised.value).strip().splitlines()[-1]
    assert last == "KeyError: 'exp_avg_sq'" if made == "never" else "convert the optimizer with compress" in last
