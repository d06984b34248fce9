"""``lightning-sketch plan``: models, optimizers and policies as users write them, and what is printed."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch import nn
from torch.optim import SGD, AdamW, SparseAdam

from lightning_sketch.cli import main
from lightning_sketch.cli.arguments import dtype_of, model_of, optimizer_of, policy_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 20_000,
    "tie_word_embeddings": True,
}  # fmt: skip


def table_and_hidden():
    return nn.Sequential(nn.Embedding(20_000, 8), nn.Linear(8, 8))


def huge_table():
    return nn.Embedding(1_000_000_000, 100)


HERE = f"{__name__}:table_and_hidden"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def printed(capsys, *arguments, status=0):
    assert main(["plan", *arguments]) == status
    streams = capsys.readouterr()
    return streams.err if status else streams.out


def test_repeated_blocks_share_a_line(capsys, config):
    text = printed(capsys, "--model", f"transformers:{config}", "--policy", "whole-model")
    lines = [line for line in text.splitlines() if "x 5" in line]
    names = {line.split("│")[1].strip() for line in lines}
    assert "model.layers.*.mlp.gate_proj.weight  x 5" in names
    assert len(lines) == 7  # of each block's 7 matrices
    assert "embedding, softmax" in text  # the tied table is one


def test_bytes_are_those_of_the_plan(capsys, config):
    found = json.loads(printed(capsys, "--model", f"transformers:{config.parent}", "--dtype", "bf16", "--json"))
    table = next(layer for layer in found["layers"] if "embed_tokens" in layer["name"])
    assert table["bytes_before"] == {"exp_avg": 20_000 * 16 * 2, "exp_avg_sq": 20_000 * 16 * 2}
    assert table["bytes_after"] == {"exp_avg": 0, "exp_avg_sq": 4 * (20_000 + 16) + 8}
    (rank,) = found["ranks"]
    assert sum(rank["state_by_layer"].values()) == sum(sum(x["bytes_after"].values()) for x in found["layers"])


def test_ranks_hold_their_share(capsys):
    arguments = ("--model", HERE, "--engine", "fsdp2", "--world-size", "4", "--json")
    ranks = json.loads(printed(capsys, *arguments))["ranks"]
    assert [rank["parameters"] for rank in ranks] == [4 * (20_000 * 8 + 8 * 8 + 8) // 4] * 4
    assert "each of 4 ranks, fsdp2, at most" in printed(capsys, *arguments[:-1])


def test_a_table_of_a_hundred_billion_parameters_costs_nothing(capsys):
    text = printed(capsys, "--model", f"{__name__}:huge_table")
    assert "1,000,000,000 x 100" in text
    assert "745.06 GiB" in text  # both moments before
    assert "3.73 GiB" in text  # a number per row


@pytest.mark.parametrize(
    ("text", "cls", "options"),
    [
        ("adamw", AdamW, {"lr": 1e-3}),
        ("AdamW(lr=0.1, betas=(0.0, 0.99))", AdamW, {"lr": 0.1, "betas": (0.0, 0.99)}),
        ("sgd(momentum=0.9)", SGD, {"momentum": 0.9}),
        ("sparse_adam", SparseAdam, {}),
        ("torch.optim:SGD(lr=1)", SGD, {"lr": 1}),
    ],
)
def test_optimizers_by_name(text, cls, options):
    model = table_and_hidden()
    made = optimizer_of(text, model)
    assert type(made) is cls
    assert options.items() <= made.param_groups[0].items()
    assert [id(p) for p in made.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_policies_by_name_by_file_and_by_budget(tmp_path):
    model = table_and_hidden()
    optimizer = AdamW(model.parameters())
    preset = policy_of("whole-model", model, optimizer)
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(preset.to_dict()))
    assert policy_of(str(path), model, optimizer) == preset
    assert policy_of("budget:700kB", model, optimizer).rules[0].codecs["first_moment"].to_dict()["codec"] == "BFloat16"


def test_models_lie_on_the_meta_device_and_have_the_dtype():
    model = model_of(HERE).to(dtype_of("bf16"))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no_such_module:make"], "--model no_such_module:make: No module named 'no_such_module'"),
        (["--model", f"{__name__}:CONFIG_"], "has no attribute 'CONFIG_'"),
        (["--model", "builtins:dict"], "returned a dict, not a module"),
        (["--model", HERE, "--optimizer", "lamb"], "--optimizer lamb: torch.optim has"),
        (["--model", HERE, "--optimizer", "sgd(0.9)"], "write options like sgd(momentum=0.9)"),
        (["--model", HERE, "--optimizer", "adamw(momentum=1)"], "unexpected keyword argument 'momentum'"),
        (["--model", HERE, "--optimizer", "builtins:dict"], "--optimizer builtins:dict"),
        (["--model", HERE, "--policy", "half"], "--policy half: neither a preset"),
        (["--model", HERE, "--policy", "missing.yaml"], "missing.yaml"),
        (["--model", HERE, "--policy", "budget:1B"], "no policy fits 1 B"),
        (["--model", HERE, "--dtype", "float33"], "--dtype float33: not a torch dtype"),
        (["--model", HERE, "--world-size", "0"], "world_size=0: must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, arguments, message):
    text = printed(capsys, *arguments, status=1)
    assert text.startswith("lightning-sketch: ")
    assert message in text
    assert len(text.splitlines()) == 1


def test_what_a_module_computes_when_it_is_imported_is_no_meta_tensor(capsys, tmp_path, monkeypatch):
    (tmp_path / "sized_by_a_tensor.py").write_text(
        "import torch\nROWS = int(torch.tensor(20_000))\ndef make(): return torch.nn.Embedding(ROWS, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    (layer,) = json.loads(printed(capsys, "--model", "sized_by_a_tensor:make", "--json"))["layers"]
    assert layer["bytes_before"] == {"exp_avg": 20_000 * 8 * 4, "exp_avg_sq": 20_000 * 8 * 4}
