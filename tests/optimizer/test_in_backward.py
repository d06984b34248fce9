"""Layers that are stepped in backward train bit for bit as those that ``optimizer.step()`` steps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.checkpoint import checkpoint

from lightning_sketch import Factored, Keep, Policy, Quantized, RowWise, Rule, compress, decompress, report
from tests.optimizer.in_backward_tools import loss_of, make, train
from tests.tiny import ADAMW, CODECS, EVERY, Case, Tiny, assert_same, give_gradients, on_table, snapshot

STEPS = range(5)
ROWS = on_table(**CODECS["rows"])


def both(happens: Callable[[bool], Any]) -> None:
    """What `happens` leaves behind is the same with and without steps in backward."""
    assert_same(happens(True), happens(False))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("case", "codecs"), EVERY, ids=str)
def test_every_codec_and_optimizer_trains_as_with_ordinary_steps(case: Case, codecs: str, sparse: bool) -> None:
    if case.sparse and not sparse:
        sparse = True

    def happens(in_backward: bool) -> dict[str, Any]:
        model, optimizer = make(on_table(**CODECS[codecs]), case, in_backward=in_backward)
        if sparse:  # torch's own step does not take sparse gradients of the kept layer, but for SparseAdam
            model.kept.requires_grad_(case.sparse)
        train(model, optimizer, STEPS, sparse=sparse)
        return snapshot(model, optimizer)

    both(happens)


def test_gradients_are_gone_after_backward_and_those_of_kept_layers_are_not() -> None:
    model, optimizer = make()
    loss_of(model, 0).backward()
    assert model.table.weight.grad is None
    assert model.kept.weight.grad is not None
    assert optimizer.state[model.table.weight]["step"] == 1
    assert model.kept.weight not in optimizer.state
    assert report(optimizer).gradients == model.kept.weight.nbytes + model.kept.bias.nbytes


def test_no_two_gradients_of_compressed_layers_exist_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    policy = Policy([Rule(name="*", first_moment=Keep(), second_moment=RowWise())])
    optimizer = compress(AdamW(model.parameters()), model, policy, step_in_backward=True)
    alive: list[int] = []
    for module in model:
        # Registered after ours, so it runs after the layer was stepped.
        module.weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    model(torch.ones(2, 4)).sum().backward()
    assert alive == [0, 0, 0, 0]
    assert len(optimizer.state) == 4


def test_a_layer_is_stepped_under_the_learning_rate_at_the_time_of_backward() -> None:
    def happens(in_backward: bool) -> dict[str, Any]:
        model, optimizer = make(ROWS, in_backward=in_backward)
        schedule = ExponentialLR(optimizer, 0.5)
        train(model, optimizer, STEPS, after=schedule.step)
        return snapshot(model, optimizer) | {"lr": optimizer.param_groups[0]["lr"]}

    both(happens)


def test_a_closure_may_do_the_backward_pass() -> None:
    def happens(in_backward: bool) -> dict[str, Any]:
        model, optimizer = make(ROWS, in_backward=in_backward)
        for step in STEPS:

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
        return snapshot(model, optimizer)

    both(happens)


def test_step_hooks_see_compressed_layers_stepped_and_without_gradients() -> None:
    model, optimizer = make()
    table, seen = model.table.weight, []
    optimizer.register_step_pre_hook(lambda *_: seen.append((table.grad, int(optimizer.state[table]["step"]))))
    optimizer.register_step_post_hook(lambda *_: seen.append((table.grad, int(optimizer.state[table]["step"]))))
    train(model, optimizer, [0, 1])
    assert seen == [(None, 1), (None, 1), (None, 2), (None, 2)]


def _halve(param: Tensor) -> None:
    param.grad.mul_(0.5)


def test_gradient_hooks_from_before_are_heeded() -> None:
    def happens(in_backward: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Tiny()
        for param in model.parameters():
            param.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
            param.register_post_accumulate_grad_hook(_halve)
        optimizer = compress(ADAMW.make(model.parameters()), model, ROWS, step_in_backward=in_backward)
        train(model, optimizer, STEPS)
        return snapshot(model, optimizer)

    both(happens)


def test_a_layer_that_was_not_stepped_in_backward_is_stepped_by_the_step() -> None:
    """A gradient that was assigned, a layer that was unfrozen. Then that and a group that was added have hooks."""

    def happens(in_backward: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: Tiny() for name in ("first", "frozen", "added")})
        model["frozen"].requires_grad_(False)
        own = [*model["first"].parameters(), *model["frozen"].parameters()]
        policy = Policy([Rule(name="*.table.weight", **CODECS["rows"])])
        optimizer = compress(AdamW(own, lr=0.1), model, policy, step_in_backward=in_backward)
        give_gradients(model["first"], 0)
        optimizer.step()
        model["frozen"].requires_grad_(True)
        optimizer.add_param_group({"params": list(model["added"].parameters()), "lr": 0.01})
        train(model, optimizer, range(1, 3))
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        freed = [model[name].table.weight.grad is None for name in ("first", "frozen", "added")]
        assert freed == [in_backward] * 3
        optimizer.step()
        return snapshot(model, optimizer)

    both(happens)


def test_a_replaced_parameter_has_a_hook_after_the_next_step() -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, [0])
    old, new = model.table.weight, nn.Parameter(torch.zeros(30, 4))
    model.table.weight = optimizer.param_groups[0]["params"][0] = new
    train(model, optimizer, [1])
    loss_of(model, 2).backward()
    assert new.grad is None
    old.sum().backward()
    assert old.grad is not None, "the one that it took the place of has none"


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_step_in_backward_by_themselves(copied: Callable[[Any], Any]) -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, range(2))
    other, its = copied((model, optimizer))
    before = snapshot(model, optimizer)
    train(other, its, range(2, 4))
    assert_same(snapshot(model, optimizer), before)
    its.zero_grad()
    loss_of(other, 4).backward()
    assert other.table.weight.grad is None
    its.step()
    train(model, optimizer, range(2, 5))
    assert_same(snapshot(other, its), snapshot(model, optimizer))


def test_a_checkpoint_between_steps_resumes_bit_for_bit() -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, range(2))
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    other, its = make(ROWS, in_backward=False)
    other.load_state_dict(weights)
    its.load_state_dict(states)
    train(other, its, range(2, 4))
    assert_same(snapshot(other, its), snapshot(model, optimizer))


def test_loading_after_backward_goes_back_and_begins_anew() -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, range(2))
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    loss_of(model, 9).backward()
    model.load_state_dict(weights)
    optimizer.load_state_dict(states)
    train(model, optimizer, range(2, 4))
    other, its = make(ROWS)
    train(other, its, range(4))
    assert_same(snapshot(model, optimizer), snapshot(other, its))


def test_decompress_and_compress_without_it_remove_the_hooks() -> None:
    model, optimizer = make(ROWS)
    compress(optimizer, model, ROWS)
    loss_of(model, 0).backward()
    assert model.table.weight.grad is not None
    optimizer.step()
    optimizer.zero_grad()
    compress(optimizer, model, ROWS, step_in_backward=True)
    loss_of(model, 1).backward()
    assert model.table.weight.grad is None
    decompress(optimizer)
    loss_of(model, 2).backward()
    assert model.table.weight.grad is not None


def test_hooks_keep_no_optimizer_alive() -> None:
    model, optimizer = make(ROWS)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    loss_of(model, 0).backward()
    assert model.table.weight.grad is not None


class Shared(nn.Module):
    """A tied table, used twice, with a part that is computed again in backward."""

    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 20, bias=False)
        self.head.weight = self.table.weight
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        def part(tokens: Tensor) -> Tensor:
            return self.hidden(self.table(tokens)).tanh() @ self.table.weight.T

        if self.recompute is None:
            return part(tokens) + self.head(self.table(tokens))
        return checkpoint(part, tokens, use_reentrant=False) + self.head(self.table(tokens))  # type: ignore[no-any-return]


@pytest.mark.parametrize("recompute", [None, False], ids=["plain", "checkpointed"])
def test_a_weight_that_is_used_several_times_is_stepped_once(recompute: bool | None) -> None:
    def happens(in_backward: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Shared(recompute)
        policy = Policy([Rule(name="*weight", first_moment=Quantized(), second_moment=Factored())])
        optimizer = compress(AdamW(model.parameters(), lr=0.1), model, policy, step_in_backward=in_backward)
        for step in STEPS:
            tokens = torch.arange(step, step + 6)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens + 1).backward(retain_graph=step == 1)
            optimizer.step()
        return snapshot(model, optimizer)

    both(happens)


def test_autograd_grad_steps_nothing() -> None:
    model, optimizer = make(ROWS)
    before = snapshot(model, optimizer)
    torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, [0])


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_rows_that_are_not_finite_are_judged_by_the_step(nonfinite: Any) -> None:
    """Everything is stepped before it raises, and training may go on."""

    def happens(in_backward: bool) -> tuple[dict[str, Any], list[str]]:
        model, optimizer = make(ROWS, in_backward=in_backward, nonfinite=nonfinite)
        model.table.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3, 5]), torch.nan))
        said = []
        for step in STEPS:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            try:
                optimizer.step()
            except FloatingPointError as error:
                said.append(str(error))
        assert len(said) == (len(STEPS) if nonfinite == "raise" else 0)
        return snapshot(model, optimizer), [*said, str(dict(report(optimizer).skipped))]

    with pytest.warns(UserWarning, match="2 rows") if nonfinite == "skip" else nullcontext():
        both(happens)


def test_rows_left_out_of_several_layers_are_reported_together() -> None:
    model = nn.ModuleList([Tiny(), Tiny()])
    policy = Policy([Rule(name="*.table.weight", **CODECS["rows"])])
    optimizer = compress(AdamW(model.parameters()), model, policy, step_in_backward=True)
    for part in model:
        part.table.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), torch.inf))
    loss_of(model, 0).backward()
    with pytest.raises(FloatingPointError) as raised:
        optimizer.step()
    assert all(f"{number}.table.weight (1 row)" in str(raised.value) for number in range(2))
    assert optimizer.state[model[0].kept.weight]["step"] == 1


def test_an_error_in_backward_leaves_the_layer_as_it_was() -> None:
    model, optimizer = make(ROWS)
    train(model, optimizer, [0])
    before = snapshot(model, optimizer)
    model.table.weight.data = model.table.weight.data[:29]
    with pytest.raises(ValueError, match=r"table\.weight"):
        (model.table.weight.sum() * 2).backward()
    assert optimizer.state[model.table.weight]["step"] == 1
    assert_same(model.kept.weight.detach(), before["kept.weight"])
