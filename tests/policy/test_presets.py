"""Policies that have a name."""

from __future__ import annotations

import pytest
from torch import nn
from torch.optim import SGD, AdamW

from lightning_sketch import BFloat16, Drop, Factored, Keep, Policy, Quantized, default_policy, plan
from lightning_sketch.cli import main
from lightning_sketch.policy.presets import PRESETS


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(10_000, 64, device="meta"), nn.Linear(64, 256, device="meta"))


#: Bytes for each parameter of the two matrices together, at most.
BYTES = {"tables": 0.3, "whole-model": 0.4, "bf16": 4.05, "8bit": 2.2}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_bytes_that_it_says(name: str) -> None:
    network = model()
    found = plan(network, AdamW(network.parameters()), Policy.preset(name))
    numel = sum(parameter.numel() for parameter in network.parameters())
    assert found.bytes_after / numel <= BYTES[name]
    assert found.bytes_before / numel == 8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_written_out_and_read_again(name: str) -> None:
    policy = Policy.preset(name, seed=3, role_hints={"1.weight": "softmax"})
    assert Policy.from_dict(policy.to_dict()) == policy
    assert policy.seed == 3


def test_the_default_policy_is_the_preset_of_tables() -> None:
    assert default_policy() == Policy.preset("tables")


def test_what_presets_do_to_tables_and_hidden_layers() -> None:
    network = model()
    codecs = {
        name: [
            planned.layer.codecs for planned in plan(network, AdamW(network.parameters()), Policy.preset(name)).layers
        ]
        for name in PRESETS
    }
    kept = {"exp_avg": Keep(), "exp_avg_sq": Keep()}
    assert codecs["tables"] == [{"exp_avg": Drop(), "exp_avg_sq": Factored(floor=1.0)}, kept, kept]
    assert codecs["whole-model"] == [codecs["tables"][0], {"exp_avg": Quantized(), "exp_avg_sq": Factored()}, kept]
    assert codecs["bf16"] == [{"exp_avg": BFloat16(), "exp_avg_sq": BFloat16()}] * 2 + [kept]
    assert codecs["8bit"] == [{"exp_avg": Quantized(), "exp_avg_sq": Quantized()}] * 2 + [kept]


@pytest.mark.parametrize("name", ["whole-model", "bf16", "8bit"])
def test_presets_serve_optimizers_with_other_states(name: str) -> None:
    network = model()
    found = plan(network, SGD(network.parameters(), momentum=0.9), Policy.preset(name))
    assert found.bytes_after < found.bytes_before


def test_an_unknown_name_is_an_error_that_lists_the_presets() -> None:
    with pytest.raises(ValueError, match="no preset 'fp8'; there are 'tables', 'whole-model', 'bf16', '8bit'"):
        Policy.preset("fp8")


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PRESETS)
    assert "2.06 B/param" in printed
