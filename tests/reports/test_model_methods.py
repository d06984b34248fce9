"""Users' methods are not called by their names (vllm#22999)."""

from __future__ import annotations

import pytest
from torch import nn
from torch.optim import AdamW
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_sketch import compress
from lightning_sketch.layers.roles import named_layers
from tests.tiny import on_table

POLICY = on_table(first_moment="BFloat16", second_moment="RowWise")
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tables(model):
    """Roles of all embedding and softmax layers, by name."""
    found = {layer.fqn: "/".join(sorted(layer.roles)) for layer in named_layers(model).values()}
    return {fqn: role for fqn, role in found.items() if role not in ("hidden", "other")}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(30, 4), nn.Linear(4, 4)
        self.calls = 0


class TakesTokens(Model):
    def get_input_embeddings(self, tokens):  # vLLM's
        return self.table(tokens)


class Raises(Model):
    def get_input_embeddings(self):
        raise RuntimeError("not before setup()")


class HasAnotherMeaning(Model):
    def get_output_embeddings(self):
        self.calls += 1
        return self.body


class IsAProperty(Model):
    @property
    def get_input_embeddings(self):
        raise KeyError("table")


@pytest.mark.parametrize("cls", [TakesTokens, Raises, HasAnotherMeaning, IsAProperty])
@pytest.mark.parametrize("nested", [False, True])
def test_methods_of_modules_that_are_no_hugging_face_models_are_not_called(cls, nested):
    inner = cls()
    model = nn.Sequential(inner) if nested else inner
    compress(AdamW(model.parameters()), model, POLICY)
    assert list(tables(model).values()) == ["embedding"]
    assert inner.calls == 0


def gpt2(cls=GPT2LMHeadModel):
    return cls(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=16, **SPECIAL))


@pytest.mark.parametrize("error", [TypeError, KeyError, NotImplementedError, AssertionError])
def test_getters_that_raise_leave_the_roles_of_structure(error):
    class Custom(GPT2LMHeadModel):
        broken = False

        def get_input_embeddings(self):
            if self.broken:
                raise error("no table")
            return super().get_input_embeddings()

    model = gpt2(Custom)
    model.broken = True
    assert tables(model).keys() == {"transformer.wte.weight", "transformer.wpe.weight"}
    compress(AdamW(model.parameters()), model, POLICY)


def test_getters_of_users_own_hugging_face_models_are_asked():
    class Custom(GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.own_head = nn.Linear(8, 50)

        def get_output_embeddings(self):
            return self.own_head

    assert tables(nn.ModuleDict({"model": gpt2(Custom)}))["model.own_head.weight"] == "softmax"


def test_an_encoder_and_decoder_that_share_one_tied_table():
    config = T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    found = tables(T5ForConditionalGeneration(config))
    assert found["shared.weight"] == "embedding/softmax"
    size = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    found = tables(BartForConditionalGeneration(BartConfig(vocab_size=50, **size, **heads, **SPECIAL)))
    assert found["model.shared.weight"] == "embedding/softmax"
    assert found["model.encoder.embed_positions.weight"] == "embedding"


def test_an_encoder_and_a_decoder_with_tables_of_their_own():
    encoder = gpt2().transformer
    decoder = gpt2(GPT2LMHeadModel)
    found = tables(EncoderDecoderModel(encoder=encoder, decoder=decoder))
    assert found["encoder.wte.weight"] == "embedding"
    assert found["decoder.transformer.wte.weight"] == "embedding/softmax"


class Wrapper(nn.Module):
    """As PEFT's ModulesToSaveWrapper: the layer, its trained copy, and attributes of the copy."""

    def __init__(self, layer, copy):
        super().__init__()
        self.original_module, self.modules_to_save = layer, nn.ModuleDict({"default": copy})


class Adapted(nn.Module):
    """As PEFT's LoRA layers."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.Linear(8, 2, bias=False)


def test_layers_that_peft_puts_around_a_head_are_seen_through():
    model = gpt2()
    model.lm_head = Wrapper(nn.Linear(8, 50, bias=False), nn.Linear(8, 50, bias=False))
    found = tables(nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})}))
    assert found["base_model.model.lm_head.original_module.weight"] == "softmax"
    assert found["base_model.model.lm_head.modules_to_save.default.weight"] == "softmax"
    model = gpt2()
    model.lm_head = Adapted(nn.Linear(8, 50, bias=False))
    found = tables(model)
    assert found["lm_head.base_layer.weight"] == "softmax"
    assert "lm_head.lora_A.weight" not in found
