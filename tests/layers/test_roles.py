"""Roles: what each parameter is for, from the structure of the model and from hints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_sketch.layers.roles import matches_name, named_layers


def roles(model, hints=None):
    return {layer.fqn: "/".join(sorted(layer.roles)) for layer in named_layers(model, hints).values()}


def gpt2():
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=16, **special))


def llama():
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=50, tie_word_embeddings=False, **shape))


def test_embeddings_matrices_and_vectors():
    model = nn.ModuleDict({
        "emb": nn.Embedding(9, 4), "bag": nn.EmbeddingBag(9, 4), "fc": nn.Linear(4, 9), "norm": nn.LayerNorm(4),
        "conv": nn.Conv2d(1, 2, 3, bias=False),
    })  # fmt: skip
    model.scale = nn.Parameter(torch.ones(()))
    assert roles(model) == {
        "scale": "other", "emb.weight": "embedding", "bag.weight": "embedding", "fc.weight": "hidden",
        "fc.bias": "other", "norm.weight": "other", "norm.bias": "other", "conv.weight": "hidden",
    }  # fmt: skip


def test_a_linear_head_is_never_guessed():
    assert roles(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 100_000, bias=False)))["1.weight"] == "hidden"


def test_every_matrix_of_an_adaptive_softmax():
    found = roles(nn.Sequential(nn.Linear(8, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 50, [10, 20], head_bias=True)))
    assert found == {
        "0.weight": "hidden", "0.bias": "other", "1.head.weight": "softmax", "1.head.bias": "other",
        "1.tail.0.0.weight": "softmax", "1.tail.0.1.weight": "softmax", "1.tail.1.0.weight": "softmax",
        "1.tail.1.1.weight": "softmax",
    }  # fmt: skip


@pytest.mark.parametrize("depth", [0, 2])
def test_a_tied_language_model(depth):
    model = gpt2()
    for _ in range(depth):  # as inside a LightningModule
        model = nn.ModuleDict({"model": model})
    prefix = "model." * depth
    found = roles(model)
    assert found[f"{prefix}transformer.wte.weight"] == "embedding/softmax"
    assert found[f"{prefix}transformer.wpe.weight"] == "embedding"
    assert found[f"{prefix}transformer.h.0.mlp.c_fc.weight"] == "hidden"
    assert f"{prefix}lm_head.weight" not in found
    tied = next(layer for layer in named_layers(model).values() if layer.aliases)
    assert tied.names == [f"{prefix}transformer.wte.weight", f"{prefix}lm_head.weight"]


def test_an_untied_language_model():
    found = roles(llama())
    assert {fqn: role for fqn, role in found.items() if role not in ("hidden", "other")} == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "softmax",
    }


def test_getters_that_are_only_declared_are_passed_over():
    class Base(nn.Linear):
        def get_output_embeddings(self):
            raise NotImplementedError

        def get_input_embeddings(self):
            return None

    assert roles(Base(2, 3)) == {"weight": "hidden", "bias": "other"}


@pytest.mark.parametrize("names", [{"0.weight": "first"}, {"*": "softmax "}])
def test_a_hint_of_an_unknown_role(names):
    with pytest.raises(ValueError, match=r"role_hints\[.*\]: unknown role .*; roles are embedding, softmax"):
        roles(nn.Sequential(nn.Linear(2, 3)), names)


def test_hints_by_pattern_add_roles():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    found = roles(model, {"head.*": "softmax", r"re:^em": "hidden"})
    assert found == {
        "emb.weight": "embedding/hidden", "body.weight": "hidden", "body.bias": "other", "head.weight": "softmax",
        "head.bias": "softmax",
    }  # fmt: skip


def test_a_hint_that_matches_nothing_shows_what_names_look_like():
    with pytest.raises(ValueError, match=r"role_hints\['top'\] matches no parameter; names look like '0.weight', '0.b"):
        roles(nn.Sequential(nn.Linear(2, 3)), {"top": "softmax"})


def test_the_last_linear_when_it_is_the_widest():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Embedding(99, 2))
    assert roles(model, "last_linear")["1.weight"] == "softmax"
    assert roles(model, "last_linear")["0.weight"] == "hidden"


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 8)), nn.Embedding(3, 2)])
def test_a_last_linear_that_is_no_softmax_layer(model):
    with pytest.raises(ValueError, match=r"last_linear': the last nn.Linear must have the most outputs of all"):
        roles(model, "last_linear")


def test_wrapped_models_have_the_names_of_the_model():
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    assert roles(torch.compile(model, backend="eager")) == roles(model)
    assert roles(nn.DataParallel(model)) == roles(model)
    assert roles(torch.compile(nn.DataParallel(model), backend="eager")) == roles(model)
    assert roles(nn.Sequential(checkpoint_wrapper(model[0]), offload_wrapper(model[1]))) == roles(model)


def test_wrapped_parts_of_a_model_have_the_names_of_the_parts():
    parts = [nn.Sequential(nn.Embedding(4, 2)), nn.Sequential(nn.Linear(2, 2))]
    wrapped = [nn.DataParallel(parts[0]), torch.compile(parts[1], backend="eager")]
    assert roles(nn.ModuleList(wrapped)) == roles(nn.ModuleList(parts))


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("emb.weight", True), ("emb", False), ("*.weight", True), ("EMB.*", False), ("e?b.*", True), ("re:^emb", True),
        ("re:b.w", True), ("re:^weight", False), ("", False),
    ],
)  # fmt: skip
def test_a_pattern_is_fnmatch_or_a_searched_regular_expression(pattern, matches):
    assert matches_name(pattern, "emb.weight") is matches


def test_a_models_own_attribute_called_module_stays_in_the_name():
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "module": nn.ModuleDict({"table": nn.Embedding(3, 2)})})
    assert [layer.fqn for layer in named_layers(model).values()] == ["table.weight", "module.table.weight"]
