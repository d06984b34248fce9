"""Optimizers without a rule train as they do uncompressed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sketch import Keep, Policy, Rule, compress, report
from tests.stock.optimizers import BF16, CASES, LION, MUON, NADAM, PRODIGY, SCHEDULE_FREE, TORCH, Matrices
from tests.tiny import assert_same, give_gradients, train

ALL = (*CASES, PRODIGY)


def pair(case, policy, **kwargs):
    """The same model twice: with the optimizer as it is, and compressed."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Matrices())
    plain, ours = (case.make(model.parameters(), **kwargs) for model in models)
    return models[0], plain, models[1], compress(ours, models[1], policy)


def parameters(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("case", ALL, ids=str)
def test_decoded_steps_are_the_optimizer_s_own_bit_for_bit(case, exactly):
    if case.cls is torch.optim.ASGD:  # averaged weights are no moment
        exactly = Policy([Rule(name="table.*", states={"ax": exactly.rules[0].first_moment})])
    plain_model, plain, model, optimizer = pair(case, exactly)
    for step in range(5):
        train(plain_model, plain, [step])
        train(model, optimizer, [step])
        assert_same(parameters(model), parameters(plain_model))
    stored = [key for entry in optimizer.state.values() for key in entry if key.endswith("_table")]
    assert stored, "states are encoded between steps"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_keep_on_all_is_the_optimizer_itself(case):
    everything = Policy([Rule(first_moment=Keep(), second_moment=Keep())])
    plain_model, plain, model, optimizer = pair(case, everything)
    train(plain_model, plain, range(3))
    train(model, optimizer, range(3))
    assert_same(parameters(model), parameters(plain_model))


@pytest.mark.parametrize("case", [x for x in CASES if x.cls not in (torch.optim.Rprop, torch.optim.ASGD)], ids=str)
def test_bfloat16_states_end_near(case):
    plain_model, plain, model, optimizer = pair(case, BF16)
    before = parameters(model)
    train(plain_model, plain, range(20))
    train(model, optimizer, range(20))
    for name, param in plain_model.named_parameters():
        went = (param.detach() - before[name]).norm()
        off = (param.detach() - parameters(model)[name]).norm()
        assert off <= case.distance * went if name != "kept.weight" else off == 0, name


@pytest.mark.parametrize("case", [NADAM, MUON, LION], ids=str)
def test_states_are_stored_in_two_bytes(case):
    _, _, model, optimizer = pair(case, BF16)
    train(model, optimizer, range(2))
    table = optimizer.state[model.table.weight]
    dense = [value.dtype for value in table.values() if getattr(value, "shape", None) == model.table.weight.shape]
    assert dense
    assert set(dense) == {torch.bfloat16}
    measured = report(optimizer)
    assert measured.state < measured.dense_state
    assert measured.kernels == "the optimizer's own step"


def test_rounding_draws_other_noise_at_every_step():
    """Muon counts no steps; without a count of ours, what is rounded up once would be so for ever."""
    model = Matrices()
    optimizer = compress(torch.optim.Muon(model.parameters(), lr=0.0, momentum=0.99), model, BF16)
    for _ in range(300):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    buffer = optimizer.state[model.table.weight]["momentum_buffer"].float()
    assert buffer.min() > 0.9, "0.95 without rounding, 0.80 to nearest"


@pytest.mark.parametrize("case", [NADAM, SCHEDULE_FREE, LION], ids=str)
def test_a_closure_is_called_once_and_its_loss_returned(case, exactly):
    plain_model, plain, model, optimizer = pair(case, exactly)
    calls = []

    def closure(model, optimizer, step):
        assert torch.is_grad_enabled()
        calls.append(model)
        optimizer.zero_grad()
        loss = model(torch.arange(30)).square().mean()
        loss.backward()
        return loss

    for step in range(3):
        losses = [
            o.step(lambda m=m, o=o, s=step: closure(m, o, s)) for m, o in ((plain_model, plain), (model, optimizer))
        ]
        assert losses[0] == losses[1]
    assert len(calls) == 6
    assert_same(parameters(model), parameters(plain_model))


def test_hooks_run_once_a_step(exactly):
    model = Matrices()
    optimizer = NADAM.make(model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    compress(optimizer, model, exactly)
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, range(2))
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("case", [NADAM, MUON, SCHEDULE_FREE], ids=str)
def test_schedulers_go_on(case, exactly):
    models, optimizers = [], []
    for compressed in (False, True):
        torch.manual_seed(0)
        models.append(Matrices())
        optimizers.append(case.make(models[-1].parameters()))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizers[-1], 1, 0.5)
        if compressed:
            compress(optimizers[-1], models[-1], exactly)
        for step in range(4):
            train(models[-1], optimizers[-1], [step])
            scheduler.step()
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    assert_same(parameters(models[1]), parameters(models[0]))


@pytest.mark.parametrize("options", [{"maximize": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("case", [x for x in TORCH if x is not MUON], ids=str)
def test_options_are_the_optimizer_s_own(case, options, exactly):
    if case.cls is torch.optim.ASGD:
        exactly = Policy([Rule(name="table.*", states={"ax": exactly.rules[0].first_moment})])
    plain_model, plain, model, optimizer = pair(case, exactly, **options)
    train(plain_model, plain, range(3))
    train(model, optimizer, range(3))
    assert_same(parameters(model), parameters(plain_model))


def test_a_learning_rate_may_be_a_tensor(exactly):
    plain_model, plain, model, optimizer = pair(NADAM, exactly, lr=torch.tensor(0.05), foreach=False)
    train(plain_model, plain, range(3))
    train(model, optimizer, range(3))
    assert_same(parameters(model), parameters(plain_model))


def test_a_grad_scaler_skips_steps_with_inf(exactly):
    _, _, model, optimizer = pair(NADAM, exactly)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = parameters(model)
    give_gradients(model, 0)
    scaler.scale(torch.ones(()))
    model.table.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(parameters(model), before)
    give_gradients(model, 0)
    scaler.step(optimizer)
    assert not torch.equal(model.table.weight, before["table.weight"])


def test_layers_without_a_gradient_stay(exactly):
    plain_model, plain, model, optimizer = pair(NADAM, exactly)
    for step in range(4):
        for m, o in ((plain_model, plain), (model, optimizer)):
            give_gradients(m, step)
            if step % 2:
                m.table.weight.grad = None
            o.step()
    assert_same(parameters(model), parameters(plain_model))
    assert optimizer.state[model.table.weight]["step"] == 2


def test_gradients_that_are_not_finite_are_the_optimizer_s_affair(exactly):
    plain_model, plain, model, optimizer = pair(NADAM, exactly)
    for m, o in ((plain_model, plain), (model, optimizer)):
        give_gradients(m, 0)
        m.table.weight.grad[3, 1] = torch.nan
        o.step()
    assert_same(parameters(model), parameters(plain_model))
    assert model.table.weight.isnan().sum() == 1


def test_averaged_weights_are_no_first_moment():
    model = Matrices()
    optimizer = compress(SCHEDULE_FREE.make(model.parameters()), model, BF16)
    train(model, optimizer, range(2))
    entry = optimizer.state[model.table.weight]
    assert entry["z"].dtype == torch.float32
    assert entry["exp_avg_sq"].dtype == torch.bfloat16
    optimizer.eval()  # reads z
    optimizer.train()


def test_a_subclass_of_adamw_makes_its_own_step(exactly):
    class Halved(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad.mul_(0.5)
            return super().step(closure)

    models = []
    for compressed in (False, True):
        torch.manual_seed(0)
        models.append(Matrices())
        optimizer = Halved(models[-1].parameters(), lr=0.1, eps=1.0)
        if compressed:
            compress(optimizer, models[-1], exactly)
        train(models[-1], optimizer, range(3))
    assert_same(parameters(models[1]), parameters(models[0]))


def test_bf16_parameters_keep_states_in_their_dtype():
    models = []
    for compressed in (False, True):
        torch.manual_seed(0)
        models.append(Matrices(torch.bfloat16))
        optimizer = NADAM.make(models[-1].parameters())
        if compressed:
            compress(optimizer, models[-1], BF16)
        train(models[-1], optimizer, range(3))
    assert_same(parameters(models[1]), parameters(models[0]))


def test_vectors_and_scalars_are_encoded_too():
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector, self.scalar = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(()))

    model = Small()
    optimizer = compress(NADAM.make(model.parameters()), model, Policy([Rule(first_moment="BFloat16")]))
    train(model, optimizer, range(3))
    assert optimizer.state[model.scalar]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model.scalar]["exp_avg_sq"].dtype == torch.float32
