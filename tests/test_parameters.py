"""All kinds of parameters and gradients, in models as they are really trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_sketch import SM3, BFloat16, CountSketch, Policy, RowWise, Rule, compress, decompress
from lightning_sketch.layers.record import LayerRecord
from tests.tiny import ADAMW, CASES, CODECS, EXACTLY, LOSSY, Tiny, assert_same, on_table, snapshot, train

TOKENS = torch.tensor([[1, 2, 2], [5, 2, 7]])
TARGETS = torch.tensor([[0, 1, 2], [2, 1, 0]])


def backward(model, scale=1.0):
    (cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten()) * scale).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_of_low_precision_parameters_are_float32_and_stay_so(case, dtype):
    model = Tiny(dtype=dtype)
    optimizer = case.make(model.parameters())
    compress(optimizer, model, on_table(**CODECS["sketch" if case.cls is SGD else "factored"]))
    train(model, optimizer, range(3), sparse=case.sparse)
    tables = [key for key in optimizer.state[model.table.weight] if key.endswith(("_table", "_row", "_col"))]
    assert tables
    for _ in range(2):
        state = optimizer.state[model.table.weight]
        assert {state[key].dtype for key in tables} == {torch.float32}
        before = snapshot(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_same(snapshot(model, optimizer), before)
    assert model.table.weight.dtype == dtype
    assert model.table.weight.isfinite().all()
    for state in decompress(optimizer).state[model.table.weight].values():
        assert not isinstance(state, torch.Tensor) or state.ndim == 0 or state.dtype == dtype


def test_a_bfloat16_parameter_is_rounded_once_a_step():
    model = Tiny(dtype=torch.bfloat16)
    exact = nn.Embedding.from_pretrained(model.table.weight.float(), freeze=False)
    optimizer = compress(AdamW(model.parameters(), lr=0.05), model, EXACTLY)
    stock = AdamW(exact.parameters(), lr=0.05)
    for step in range(3):
        exact.weight.data.copy_(model.table.weight)  # the step starts from what bfloat16 can hold
        train(model, optimizer, [step])
        exact.weight.grad = model.table.weight.grad.float()
        stock.step()
        different = model.table.weight != exact.weight.bfloat16()
        assert different.float().mean() < 0.02  # where float32 itself differs in its last bit


@pytest.mark.parametrize("fused", [True, False])
def test_decoded_states_lie_in_memory_as_their_parameter_does(fused):
    """torch's fused kernels pair up memory, not indices."""
    model = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    policy = Policy([Rule(name="weight", **CODECS["exact"])])
    optimizers = [Adam(m.parameters(), lr=0.1, fused=fused) for m in (model, plain)]
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        for step in range(6):
            if m is model and step in (2, 4):
                (compress(optimizer, m, policy) if step == 2 else decompress(optimizer))
            optimizer.zero_grad()
            m(torch.ones(1, 8, 3, 3) * step).square().sum().backward()
            optimizer.step()
    state, stock = (o.state[m.weight] for m, o in zip((model, plain), optimizers, strict=True))
    assert state["exp_avg"].stride() == stock["exp_avg"].stride() != (72, 9, 3, 1)
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-4, atol=1e-5)


def test_a_frozen_parameter_is_left_alone():
    model = Tiny()
    model.table.weight.requires_grad_(False)
    optimizer = compress(ADAMW.make(model.parameters()), model, LOSSY, allow_empty=True)
    before = snapshot(model, optimizer)
    backward(model)
    optimizer.step()
    assert torch.equal(model.table.weight, before["table.weight"])
    assert model.table.weight not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert model.table.weight not in decompress(optimizer).state


def test_steps_without_a_gradient_do_not_count():
    model = Tiny()
    optimizer = compress(ADAMW.make(model.parameters()), model, LOSSY)
    for step in range(4):
        backward(model)
        if step % 2:
            model.table.weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[model.table.weight]["step"] == 2
    assert optimizer.state[model.kept.weight]["step"] == 4


def test_a_tied_weight_is_one_layer_with_two_names():
    class Tied(Tiny):
        def __init__(self):
            super().__init__(rows=6)
            self.kept = nn.Linear(4, 6, bias=False)
            self.kept.weight = self.table.weight

    model = Tied()
    plain = copy.deepcopy(model)
    exact = CountSketch(width=100)
    policy = Policy([Rule(name="kept.weight", first_moment=exact, second_moment=exact)])  # the second name
    optimizer, stock = compress(Adam(model.parameters()), model, policy), Adam(plain.parameters())
    assert [LayerRecord.from_record(record).fqn for record in optimizer.param_groups[0]["compression"]] == [
        "table.weight"
    ]
    for _ in range(3):
        for m, o in ((model, optimizer), (plain, stock)):
            o.zero_grad()
            m(torch.tensor([1, 3])).square().sum().backward()
            o.step()
    torch.testing.assert_close(model.table.weight, plain.table.weight)


def test_a_compiled_model_has_its_plain_names():
    model = Tiny()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    policy = Policy([Rule(name="table.weight", second_moment=RowWise())])
    optimizers = [compress(AdamW(m.parameters()), m, policy) for m in (compiled, plain)]
    for m, optimizer in zip((compiled, plain), optimizers, strict=True):
        backward(m)
        optimizer.step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())  # same names, so same hashes
    assert_same(snapshot(model, optimizers[0]), snapshot(plain, optimizers[1]))


def test_clipped_gradients_are_used():
    model = Tiny()
    plain = copy.deepcopy(model)
    optimizer, stock = compress(SGD(model.parameters(), 1.0, 0.9), model, EXACTLY), SGD(plain.parameters(), 1.0, 0.9)
    norms = []
    for m, o in ((model, optimizer), (plain, stock)):
        for _ in range(3):
            o.zero_grad()
            backward(m, scale=100.0)
            norms.append(clip_grad_norm_(m.parameters(), 0.01))
            o.step()
    assert min(norms) > 1
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, plain.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_optimizer_in_backward():
    """One optimizer per parameter, stepped by its gradient hook, so that gradients never coexist."""
    model = Tiny()
    plain = copy.deepcopy(model)
    everything = on_table(first_moment=BFloat16(), second_moment=RowWise())
    whole = compress(AdamW(plain.parameters(), lr=0.1), plain, everything)
    own = {p: compress(AdamW([p], lr=0.1), model, everything, allow_empty=True) for p in model.parameters()}

    def step(param):
        own[param].step()
        own[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        backward(model)
        assert all(p.grad is None for p in model.parameters())
        whole.zero_grad()
        backward(plain)
        whole.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, plain.get_parameter(name))


@pytest.mark.parametrize("cls", [Adam, AdamW, Adagrad, RMSprop])
@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_tables_train_under_every_optimizer(module, cls):
    """Without compression, torch's Adam, AdamW and RMSprop refuse such gradients."""
    model = nn.Sequential(module(50, 4, sparse=True))
    optimizer = compress(cls(model.parameters(), lr=0.1), model, Policy([Rule(role="embedding", second_moment="RowWise",
                                                                             first_moment="Drop")]))  # fmt: skip
    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        assert model[0].weight.grad.is_sparse
        optimizer.step()
    moved = (model[0].weight != before).any(dim=1).nonzero().flatten()
    assert moved.tolist() == sorted(set(TOKENS.flatten().tolist()))


@pytest.mark.parametrize("sparse", [True, False])
def test_accumulated_gradients_are_summed(sparse):
    models = [nn.Embedding(20, 4, sparse=sparse) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    policy = Policy([Rule(role="embedding", second_moment=CountSketch(width=5))])
    optimizers = [compress(AdamW(m.parameters(), lr=0.1), m, policy) for m in models]
    for tokens in TOKENS:
        models[0](tokens).square().sum().backward()
    models[1](TOKENS).square().sum().backward()
    if sparse:
        assert not models[0].weight.grad.is_coalesced()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_an_unused_sparse_gradient_changes_no_row():
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = compress(AdamW(model.parameters(), lr=0.1), model, Policy([Rule(second_moment=RowWise())]))
    before = model.weight.detach().clone()
    model(torch.empty(0, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert optimizer.state[model.weight]["step"] == 1


@pytest.mark.parametrize("lazy", [True, False])
def test_rows_of_zeros_in_a_dense_gradient_are_absent_to_a_lazy_layer(lazy):
    model = nn.Embedding(20, 4)
    codec = CountSketch(width=100, lazy=lazy)
    policy = Policy([Rule(first_moment=codec, second_moment=codec)])
    optimizer = compress(Adam(model.parameters(), lr=0.1), model, policy)
    model.weight.grad = torch.ones(20, 4)
    optimizer.step()
    before = model.weight.detach().clone()
    model.weight.grad[3:] = 0
    optimizer.step()
    assert torch.equal(model.weight[3:], before[3:]) == lazy
    assert (model.weight[:3] != before[:3]).all()


def test_the_momentum_of_sm3_averages_its_updates():
    moved = []
    for momentum in (0.0, 0.75):
        model = nn.Linear(4, 3, bias=False)
        before = model.weight.detach().clone()
        policy = Policy([Rule(first_moment="Drop", second_moment=SM3(momentum=momentum))])
        train(model, compress(Adam(model.parameters(), lr=0.1), model, policy), [0])
        moved.append(model.weight - before)
    torch.testing.assert_close(moved[1], moved[0] / 4, rtol=1e-4, atol=1e-6)
