"""Tables under spectral_norm, weight_norm, pruning and parametrizations keep their role (pytorch#25092)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import AdamW

from lightning_sketch import Policy, Rule, compress, plan
from lightning_sketch.layers.roles import named_layers
from tests.tiny import assert_same, on_table, train

POLICY = on_table(first_moment="BFloat16", second_moment="RowWise")


class Evaluated(nn.Module):
    """A parametrization that must not run."""

    armed = False

    def forward(self, original):
        assert not Evaluated.armed, "the parametrization was evaluated"
        return 2 * original


@pytest.fixture
def armed(monkeypatch):
    """From here on evaluating `Evaluated` fails."""
    return lambda: monkeypatch.setattr(Evaluated, "armed", True)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def generic(layer):
    parametrize.register_parametrization(layer, "weight", Evaluated())
    return layer


#: How, and the name of the tensor that has the weight's shape.
WAYS = {
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "old weight_norm": (nn.utils.weight_norm, "weight_v"),
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "pruned": (pruned, "weight_orig"),
    "parametrize": (generic, "parametrizations.weight.original"),
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def roles(model, hints=None):
    return {layer.fqn: "/".join(sorted(layer.roles)) for layer in named_layers(model, hints).values()}


@pytest.mark.parametrize("way", WAYS)
def test_the_tensor_of_the_tables_shape_has_its_role(way):
    parametrized, name = WAYS[way]
    model = nn.ModuleDict({"emb": parametrized(nn.Embedding(30, 4)), "bag": parametrized(nn.EmbeddingBag(20, 4))})
    found = roles(model)
    assert found.pop(f"emb.{name}") == "embedding"
    assert found.pop(f"bag.{name}") == "embedding"
    assert set(found.values()) <= {"hidden"}  # the norms of rows, [30, 1]


@pytest.mark.parametrize("way", WAYS)
def test_planning_and_converting_evaluate_nothing(way, armed):
    parametrized, name = WAYS[way]
    model = nn.Sequential(parametrized(nn.Embedding(30, 4)), nn.Linear(4, 2))
    optimizer = AdamW(model.parameters())
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    armed()
    plan(model, optimizer, POLICY)
    compress(optimizer, model, POLICY)
    assert [layer.fqn for _, layer, _ in optimizer.compressed_layers()] == [f"0.{name}"]
    assert_same(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("way", WAYS)
def test_they_train(way):
    parametrized, _ = WAYS[way]
    model = nn.Sequential(parametrized(nn.Embedding(30, 4)), nn.Linear(4, 2))
    optimizer = compress(AdamW(model.parameters(), lr=0.1), model, POLICY)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(torch.arange(30)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("way", WAYS)
def test_rules_and_hints_written_for_the_plain_model_match(way):
    parametrized, name = WAYS[way]
    model = nn.ModuleDict({"emb": parametrized(nn.Embedding(30, 4)), "head": parametrized(nn.Linear(4, 30))})
    for pattern in ("emb.weight", f"emb.{name}"):
        layers = named_layers(model)
        (index,) = Policy([Rule(name=pattern, second_moment="RowWise")]).assign(layers).items()
        assert layers[index[0]].fqn == f"emb.{name}"
    assert roles(model, {"head.weight": "softmax"})[f"head.{name}"] == "softmax"
    assert roles(model, "last_linear")[f"head.{name}"] == "softmax"
    assert roles(model, "last_linear")["head.bias"] == "other"
    assert len(Policy([Rule(module=nn.Embedding, second_moment="RowWise")]).assign(named_layers(model))) >= 1


@pytest.mark.parametrize("way", WAYS)
def test_names_stay_in_the_order_of_named_parameters(way):
    parametrized, _ = WAYS[way]
    model = nn.Sequential(nn.Linear(2, 2), parametrized(nn.Embedding(30, 4)), nn.Linear(4, 2))
    model.append(model[1])
    assert [layer.fqn for layer in named_layers(model).values()] == [name for name, _ in model.named_parameters()]
    shared = next(layer for layer in named_layers(model).values() if "embedding" in layer.roles)
    assert {"1.weight", "3.weight"} <= set(shared.names)


def test_an_original_of_another_shape_is_no_table():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.columns = nn.Parameter(torch.randn(2, 4))

        def forward(self, rows):
            return rows @ self.columns

        def right_inverse(self, weight):
            return weight[:, :2].clone()

    table = nn.Embedding(30, 4)
    parametrize.register_parametrization(table, "weight", LowRank())
    assert roles(table) == {
        "parametrizations.weight.original": "hidden",
        "parametrizations.weight.0.columns": "hidden",
    }


@pytest.mark.parametrize("way", WAYS)
def test_every_matrix_of_an_adaptive_softmax(way):
    parametrized, name = WAYS[way]
    softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 50, [10, 20])
    parametrized(softmax.head)
    found = roles(softmax)
    assert found[f"head.{name}"] == found["tail.0.1.weight"] == "softmax"
    assert found.get("head.weight_g", "hidden") == "hidden"


@pytest.mark.parametrize("way", WAYS)
def test_a_hugging_face_models_head(way, armed):
    from transformers import LlamaConfig, LlamaForCausalLM

    parametrized, name = WAYS[way]
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=50, tie_word_embeddings=False, **shape))
    parametrized(model.lm_head)
    parametrized(model.model.embed_tokens)
    armed()
    found = roles(model)
    assert found[f"lm_head.{name}"] == "softmax"
    assert found[f"model.embed_tokens.{name}"] == "embedding"


def test_checkpoints_and_copies_of_parametrized_tables():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Embedding(30, 4)), nn.Linear(4, 2))
    optimizer = compress(AdamW(model.parameters()), model, POLICY)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(model)
    fresh = compress(AdamW(other.parameters()), other, POLICY)
    fresh.load_state_dict(saved)
    assert_same(fresh.state_dict(), saved)
