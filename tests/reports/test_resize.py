"""Tables that are resized after conversion (transformers#3532): nothing half done, and a way to go on."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from lightning_sketch import (
    BFloat16,
    CountSketch,
    Factored,
    Policy,
    Rule,
    compress,
    decompress,
    report,
    resize_states,
    restore,
)
from lightning_sketch.layers.record import RECORDS, LayerRecord
from tests.tiny import ADAM, ADAMW, CASES, CODECS, FOR_SGD, Tiny, assert_same, on_table, snapshot, train

ROWS, MORE, FEWER = 40, 52, 34
#: KernelState to the bit, stored up to rounding, and what several rows share.
EXACT, ROUNDED, SHARED = (
    ("exact", "bfloat16"),
    ("rows", "factored", "SM3", "SM3-I momentum"),
    ("sketch", "sketched rows"),
)
logging.getLogger("transformers").setLevel(logging.ERROR)


class Two(nn.Module):
    """Two tables; the second is the one that is resized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(ROWS, 4), nn.Embedding(ROWS, 4)


def trained(codec: str, case: Any = ADAMW) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Two()
    optimizer = compress(case.make(model.parameters()), model, on_table(**CODECS[codec]))
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    return model, optimizer


def resized(codec: str, rows: int) -> tuple[Any, Any]:
    model, optimizer = trained(codec)
    model.second.weight.data = torch.randn(rows, 4)
    return model, optimizer


@pytest.mark.parametrize("rows", [MORE, FEWER])
@pytest.mark.parametrize("codec", CODECS)
def test_decompress_of_a_resized_table_raises_and_changes_nothing(codec, rows):
    model, optimizer = resized(codec, rows)
    before, groups = snapshot(model, optimizer), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=rf"second.weight now has shape \[{rows}, 4\].*\[40, 4\].*resize_states"):
        decompress(optimizer)
    assert type(optimizer).__qualname__ == "CompressedAdamW"
    assert_same(snapshot(model, optimizer), before)
    assert [group[RECORDS] for group in optimizer.param_groups] == [group[RECORDS] for group in groups]


@pytest.mark.parametrize("codec", ["sketched rows", "sketch", "bfloat16"])
def test_nothing_else_takes_a_resized_table_for_the_old_one(codec, tmp_path):
    model, optimizer = resized(codec, MORE)
    saved = trained(codec)[1].state_dict()
    torch.save(saved, tmp_path / "checkpoint.pt")
    before = snapshot(model, optimizer)
    actions = [
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(saved),
        lambda: restore(optimizer, tmp_path / "checkpoint.pt"),
        lambda: train(model, optimizer, [2]),
    ]
    for action in actions:
        with pytest.raises(ValueError, match=r"second.weight .*shape \["):
            action()
        assert_same(snapshot(model, optimizer), before)
    assert report(optimizer).state > 0


@pytest.mark.parametrize("codec", ["sketch", "rows", "factored"])
def test_decompress_of_damaged_states_names_the_layer_and_changes_nothing(codec):
    model, optimizer = trained(codec)
    state = optimizer.state[model.second.weight]
    key = next(key for key in state if key.startswith("exp_avg_sq") and isinstance(state[key], Tensor))
    for damage in (lambda: state.pop(key), lambda: state.update({key: torch.zeros(3)})):
        damage()
        with pytest.raises(ValueError, match=r"second.weight: its exp_avg_sq\w+ in optimizer.state"):
            decompress(optimizer)
        assert "exp_avg_sq" not in optimizer.state[model.first.weight]


def test_decompress_takes_a_number_of_steps_and_foreign_keys():
    model, optimizer = trained("bfloat16")
    optimizer.state[model.first.weight] |= {"step": 2, "mine": "a note"}
    assert decompress(optimizer).state[model.first.weight]["step"] == 2


def table_of(rows: int, old: nn.Parameter) -> Tensor:
    data = torch.full((rows, *old.shape[1:]), 0.5)
    count = min(rows, len(old))
    data[:count] = old.detach()[:count]
    return data


def resize_by_data(model: Any, rows: int) -> None:
    model.table.weight.data = table_of(rows, model.table.weight)


def resize_by_parameter(model: Any, rows: int) -> None:
    model.table.weight = nn.Parameter(table_of(rows, model.table.weight))


def dense_state(optimizer: Any, name: str = "table.weight") -> dict[str, Any]:
    """The dense states of one layer."""
    index = optimizer.compression.names[0].index(name)
    plain = decompress(copy.deepcopy(optimizer))
    return plain.state[plain.param_groups[0]["params"][index]]


@pytest.mark.parametrize("rows", [MORE, FEWER])
@pytest.mark.parametrize("resize", [resize_by_data, resize_by_parameter])
@pytest.mark.parametrize("codec", CODECS)
def test_rows_that_stay_keep_their_states_and_new_rows_start_without(codec, resize, rows):
    torch.manual_seed(0)
    model = Tiny(ROWS)
    optimizer = compress(ADAMW.make(model.parameters()), model, on_table(**CODECS[codec]))
    train(model, optimizer, range(4))
    before, kept = dense_state(optimizer), optimizer.state[model.kept.weight]
    group = optimizer.param_groups[0]
    resize(model, rows)
    assert resize_states(optimizer, model) is optimizer
    after, count = dense_state(optimizer), min(rows, ROWS)
    assert after["step"] == before["step"] == 4
    for name in ("exp_avg", "exp_avg_sq"):
        assert after[name].shape == (rows, 4)
        if codec in EXACT or (name == "exp_avg" and CODECS[codec]["first_moment"] == BFloat16()):
            assert_same(after[name][:count], before[name][:count])
        elif codec in ROUNDED:
            torch.testing.assert_close(after[name][:count], before[name][:count], rtol=1e-6, atol=1e-12)
        if codec not in (*SHARED, "paper"):
            assert not after[name][count:].any()
    assert group["params"][0] is model.table.weight
    assert LayerRecord.from_record(group[RECORDS][0]).shape == (rows, 4)
    assert optimizer.state[model.kept.weight] is kept
    assert len(optimizer.state) == 3  # nothing of the old parameter is left
    train(model, optimizer, range(4, 6))
    optimizer.load_state_dict(optimizer.state_dict())


def test_rows_in_a_sketch_of_another_width_are_as_good_as_encoded_anew():
    torch.manual_seed(0)
    model = Tiny(ROWS)
    policy = on_table(**CODECS["sketch"])
    optimizer = compress(ADAM.make(model.parameters()), model, policy)
    train(model, optimizer, range(4))
    before = dense_state(optimizer)
    resize_by_data(model, MORE)
    resize_states(optimizer, model)
    other = ADAM.make(model.parameters())
    padding = torch.zeros(MORE - ROWS, 4)
    other.state[model.table.weight] = {
        k: torch.cat([v, padding]) if v.ndim else v for k, v in before.items()
    }  # what a user would have to write
    compress(other, model, policy)
    for key, value in other.state[model.table.weight].items():
        assert_same(optimizer.state[model.table.weight][key], value, key)
    assert optimizer.compression.errors == other.compression.errors


@pytest.mark.parametrize("codec", ["sketched rows", "sketch"])
def test_a_sketch_of_the_same_width_stays_as_it_is(codec):
    model = Tiny(ROWS)
    optimizer = compress(ADAMW.make(model.parameters()), model, on_table(**CODECS[codec]))
    train(model, optimizer, range(4))
    before = {k: v for k, v in dense_state(optimizer).items() if k != "step"}
    resize_by_data(model, ROWS + 1)  # of 7 or 4 buckets, as before
    resize_states(optimizer, model)
    after = dense_state(optimizer)
    for name, value in before.items():
        assert_same(after[name][:ROWS], value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_optimizer_goes_on_as_it_would_have(case):
    """With exact codecs the old rows move as those of a table that was as large from the beginning."""
    codecs = CODECS["bfloat16"] if str(case) in FOR_SGD or str(case) == "SGD" else CODECS["exact"]
    results = []
    for late in (True, False):
        torch.manual_seed(0)
        model = Tiny(ROWS)
        if not late:
            resize_by_parameter(model, MORE)
        optimizer = compress(case.make(model.parameters()), model, on_table(**codecs))
        for step in range(6):
            if late and step == 3:
                resize_by_parameter(model, MORE)
                resize_states(optimizer, model)
            for position, param in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * step + position)
                grad = torch.randn((ROWS, 4) if position == 0 else param.shape, generator=generator)
                if position == 0:  # rows that were added later have had no gradient
                    grad = torch.cat([grad, torch.zeros(len(param) - ROWS, 4)])
                param.grad = grad.to_sparse(1) if case.sparse else grad
            optimizer.step()
        results.append([param.detach()[:ROWS] for param in model.parameters()])
    assert_same(*results)


def test_layers_without_compression_are_resized_too():
    model = Tiny(ROWS)
    optimizer = compress(ADAMW.make(model.parameters()), model, on_table(**CODECS["rows"]))
    train(model, optimizer, range(3))
    old = {key: value.clone() for key, value in optimizer.state[model.kept.weight].items()}
    model.kept = nn.Linear(4, 5)
    resize_states(optimizer, model)
    state = optimizer.state[model.kept.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same(state[name][:3], old[name])
        assert not state[name][3:].any()
    assert state["step"] == 3
    train(model, optimizer, range(3, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m, "table", nn.Embedding(ROWS, 5)),
            r"table.weight was of shape \[40, 4\] and now is \[40, 5\]",
        ),
        (lambda m: setattr(m, "table", nn.Identity()), r"table.weight is no parameter of the model"),
        (lambda m: setattr(m.table, "weight", m.kept.weight), r"kept.weight is tied now to another parameter"),
        (lambda m: resize_by_data(m, 20), r"rule 1 .*matched no parameter; nearest is 'table.weight' with 20 rows"),
    ],
)
def test_other_changes_are_refused_before_anything_changes(change, message):
    model = Tiny(ROWS)
    policy = Policy([Rule(role="embedding", min_rows=30, first_moment="BFloat16", second_moment="RowWise")])
    optimizer = compress(ADAMW.make(model.parameters()), model, policy)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    state = {id(param): copy.deepcopy(value) for param, value in optimizer.state.items()}
    params, records = list(optimizer.param_groups[0]["params"]), list(optimizer.param_groups[0][RECORDS])
    model.kept = nn.Linear(4, 5)  # this one alone would do
    change(model)
    with pytest.raises(ValueError, match=message):
        resize_states(optimizer, model)
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == [id(param) for param in params]
    assert optimizer.param_groups[0][RECORDS] == records
    assert_same({id(param): value for param, value in optimizer.state.items()}, state)


def test_a_policy_must_decide_alike_before_and_after():
    model = Two()
    policy = Policy([Rule(role="embedding", min_rows=30, first_moment="BFloat16", second_moment="RowWise")])
    optimizer = compress(ADAMW.make(model.parameters()), model, policy)
    model.second.weight.data = torch.zeros(20, 4)
    with pytest.raises(ValueError, match=r"second.weight: at 20 rows instead of 40 the policy leaves it uncompressed"):
        resize_states(optimizer, model)


def test_only_converted_optimizers_can_follow():
    model = Tiny()
    with pytest.raises(TypeError, match="needs a converted optimizer, got AdamW"):
        resize_states(ADAMW.make(model.parameters()), model)


def test_a_trainers_wrapper_and_its_scheduler_go_on():
    model = gpt2(tied=True)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = accelerator.prepare(model, compress(inner, model, TIED), schedule)
    lm_step(model, optimizer, 0)
    schedule.step()
    model.resize_token_embeddings(MORE)
    assert resize_states(optimizer, model) is optimizer
    assert inner.param_groups[0]["params"][0] is model.transformer.wte.weight
    before = model.transformer.wte.weight.detach().clone()
    lm_step(model, optimizer, 1)
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.0025
    assert not torch.equal(model.transformer.wte.weight, before)


def gpt2(tied: bool) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=ROWS, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def bert(tied: bool = True) -> Any:
    """Its head has a bias of a number per word, too."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=ROWS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=8, tie_word_embeddings=tied, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


HUGGING_FACE = Policy(
    [
        Rule(role="embedding", min_rows=FEWER, first_moment=BFloat16(), second_moment=CountSketch(width=1 << 20)),
        Rule(role="softmax", first_moment=BFloat16(), second_moment=Factored()),
    ]
)


TIED = Policy(HUGGING_FACE.rules[:1])  # the table is the softmax layer, too


def lm_step(model: Any, optimizer: Any, step: int) -> float:
    tokens = torch.randint(0, FEWER, (4, 8), generator=torch.Generator().manual_seed(step % 2))
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("rows", [MORE, FEWER])
@pytest.mark.parametrize(("make", "tied"), [(gpt2, True), (gpt2, False), (bert, True)])
def test_resize_token_embeddings_in_the_middle_of_training(make, tied, rows):
    torch.manual_seed(0)
    model = make(tied)
    policy = TIED if tied else HUGGING_FACE
    optimizer = compress(torch.optim.AdamW(model.parameters(), lr=0.01), model, policy)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    first, *_ = [lm_step(model, optimizer, step) for step in range(4)]
    names = optimizer.compression.names[0]
    sized = [name for name, param in zip(names, optimizer.param_groups[0]["params"], strict=True) if len(param) == ROWS]
    before = {name: dense_state(optimizer, name) for name in sized}

    model.resize_token_embeddings(rows)
    resize_states(optimizer, model)

    held = {id(param) for param in optimizer.param_groups[0]["params"]}
    assert held == {id(param) for param in model.parameters()}
    assert all(len(dict(model.named_parameters())[name]) == rows for name in sized)
    assert len(sized) == (1 if make is gpt2 else 2) + (not tied)
    for name, old in before.items():
        new, count = dense_state(optimizer, name), min(rows, ROWS)
        assert new["step"] == 4
        for state in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(new[state][:count], old[state][:count], rtol=1e-5, atol=1e-12)
            assert not new[state][count:].any()
    losses = [lm_step(model, optimizer, step) for step in range(4, 12)]
    schedule.step()
    assert losses[-1] < first
    fresh = make(tied)
    fresh.resize_token_embeddings(rows)
    again = compress(torch.optim.AdamW(fresh.parameters(), lr=0.01), fresh, policy)
    again.load_state_dict(optimizer.state_dict())  # as a new process does
    assert re.search("BFloat16", str(report(again)))
