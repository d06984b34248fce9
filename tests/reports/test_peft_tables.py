"""What PEFT trains in place of a table has the table's role (peft#3499). The modules are built as PEFT builds them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_sketch import Factored, compress, default_policy, plan
from lightning_sketch.layers.roles import named_layers
from tests.tiny import on_table

POLICY = on_table(first_moment="BFloat16", second_moment="RowWise")


class TrainableTokensLayer(nn.Module):
    def __init__(self, base_layer: nn.Module, tokens: list[int]) -> None:
        super().__init__()
        self.base_layer, self.tokens = base_layer, torch.tensor(tokens)
        self.trainable_tokens_delta = nn.ParameterDict({"default": base_layer.weight.detach()[tokens].clone()})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.base_layer.weight.index_copy(0, self.tokens, self.trainable_tokens_delta["default"])
        return nn.functional.embedding(ids, weight)


class TrainableTokensWrapper(nn.Module):
    def __init__(self, original: nn.Module, tokens: list[int]) -> None:
        super().__init__()
        self.original_module, self.token_adapter = original, TrainableTokensLayer(original, tokens)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token_adapter(ids)


class ModulesToSaveWrapper(nn.Module):
    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
        original.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.modules_to_save["default"](x)


def model(rows: int = 12) -> nn.ModuleDict:
    """A frozen table with trained rows, a softmax layer and a hidden one, each trained as a copy."""
    made = nn.ModuleDict({"tokens": nn.Embedding(rows, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, rows)})
    made.requires_grad_(False)
    made["tokens"] = TrainableTokensWrapper(made["tokens"], [3, 5])
    for name in ("hidden", "head"):
        made[name].requires_grad_(True)
        made[name] = ModulesToSaveWrapper(made[name])
    return made


def roles(made: nn.Module, hints: dict[str, str] | None = None) -> dict[str, set[str]]:
    return {layer.fqn: layer.roles for layer in named_layers(made, hints).values()}


def test_the_rows_of_trainable_tokens_are_an_embedding():
    found = roles(model())
    assert found["tokens.token_adapter.trainable_tokens_delta.default"] == {"embedding"}
    assert found["tokens.original_module.weight"] == {"embedding"}


def test_a_copy_of_modules_to_save_has_the_roles_of_its_original_and_no_others():
    found = roles(model(), {"head.original_module.weight": "softmax"})
    assert found["head.modules_to_save.default.weight"] == {"softmax"}
    assert found["head.modules_to_save.default.bias"] == {"other"}
    assert found["hidden.modules_to_save.default.weight"] == {"hidden"}


def test_a_whole_block_that_is_saved_keeps_the_roles_inside_it():
    block = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 4))
    found = roles(ModulesToSaveWrapper(block))
    assert found["modules_to_save.default.0.weight"] == {"embedding"}
    assert found["modules_to_save.default.1.weight"] == {"hidden"}


def test_trained_rows_are_compressed_and_the_frozen_table_takes_nothing():
    made = model()
    optimizer = compress(AdamW([p for p in made.parameters() if p.requires_grad]), made, POLICY)
    made["tokens"](torch.tensor([3, 4])).square().sum().backward()
    optimizer.step()
    assert set(optimizer.state) == {made["tokens"].token_adapter.trainable_tokens_delta["default"]}
    (state,) = optimizer.state.values()
    assert "exp_avg_sq_row" in state


@pytest.mark.parametrize("sparse", [False, True])
def test_a_large_copied_table_is_one_for_the_default_policy(sparse):
    made = ModulesToSaveWrapper(nn.Embedding(10_000, 2, sparse=sparse))
    optimizer = AdamW([p for p in made.parameters() if p.requires_grad])
    (planned,) = plan(made, optimizer, default_policy()).layers
    assert planned.layer.fqn == "modules_to_save.default.weight"
    assert planned.layer.codecs["exp_avg_sq"] == Factored(floor=1.0)
