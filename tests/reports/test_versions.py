"""Updates in place that autograd must see: a graph that saved what a step then changed raises (pytorch#39141)."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor import distribute_tensor
from torch.optim import AdamW

from lightning_sketch import Drop, Keep, Policy, RowWise, Rule, compress
from tests.kernels.fused_cases import FIRST, RULES, SECOND, by_reference, unraised
from tests.kernels.fused_cases import Case as Fused
from tests.ranks import run_ranks
from tests.tiny import CODECS, EVERY, Tiny, give_gradients, on_table, train

KERNELS = {"compiled": nullcontext, "reference": by_reference}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rule", RULES)
def test_every_parameter_and_state_that_a_step_changes_has_its_version_raised(rule, sparse, kernels):
    second = {"none": Keep()} if rule in ("sgd", "nesterov") else SECOND
    first = {"none": Drop()} if rule in ("adagrad", "rmsprop") else FIRST
    with KERNELS[kernels]():
        for one, other in itertools.product(second.values(), first.values()):
            if isinstance(one, Keep) and isinstance(other, Keep | Drop):
                continue  # nothing is compressed, or no state is left
            case = Fused(rule, one, other, rows=7, columns=3, sparse=sparse)
            assert unraised(case) == [], case


@pytest.mark.parametrize(("case", "codecs"), EVERY, ids=str)
def test_the_versions_that_are_raised_are_those_that_torch_raises(case, codecs):
    """A frozen parameter's is not, nor that of one without a gradient."""
    stock, own = (Tiny() for _ in range(2))
    optimizers = case.make(stock.parameters()), case.make(own.parameters())
    compress(optimizers[1], own, on_table(**CODECS[codecs]))
    raised = []
    for model, optimizer in zip((stock, own), optimizers, strict=True):
        model.kept.bias.requires_grad_(False)
        for withheld in (model.kept.weight, model.table.weight):
            before = {name: param._version for name, param in model.named_parameters()}
            give_gradients(model, 0, sparse=case.sparse)
            model.kept.bias.grad = withheld.grad = None
            optimizer.step()
            raised.append({name for name, param in model.named_parameters() if param._version > before[name]})
    assert raised[:2] == raised[2:] == [{"table.weight"}, {"kept.weight"}]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("codecs", ["bfloat16", "rows", "factored", "SM3", "sketch"])
def test_a_gan_that_steps_before_its_second_backward_raises_as_under_torch(codecs, kernels):
    def gan(*, compressed: bool) -> None:
        model = nn.Linear(8, 8)
        optimizer = AdamW(model.parameters(), lr=0.1)
        if compressed:
            compress(optimizer, model, Policy([Rule(role="hidden", **CODECS[codecs])]))
        x = torch.ones(1, 8, requires_grad=True)
        discriminator, generator = model(x).sum(), model(x).square().sum()
        discriminator.backward()
        optimizer.step()
        generator.backward()

    for compressed in (False, True):
        with KERNELS[kernels](), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gan(compressed=compressed)


def test_a_graph_over_a_state_raises_as_under_torch():
    """A penalty on a moment that the next step changes."""
    model = Tiny()
    optimizer = compress(AdamW(model.parameters()), model, on_table(**CODECS["factored"]))
    train(model, optimizer, [0])
    for state in list(optimizer.state[model.table.weight].values()):
        if torch.is_tensor(state):
            factor = torch.ones(state.shape, requires_grad=True)
            loss = (factor * state).sum()
            train(model, optimizer, [1])
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_parameters_made_in_inference_mode_train_as_before():
    """They have no versions."""
    with torch.inference_mode():
        model = nn.Embedding(30, 4)
    normal = nn.Embedding(30, 4)
    normal.load_state_dict(copy.deepcopy(model.state_dict()))
    weights = []
    for layer in (model, normal):
        optimizer = compress(
            AdamW(layer.parameters(), lr=0.1), layer, Policy([Rule(name="*", exp_avg_sq=RowWise(), exp_avg="BFloat16")])
        )
        mode = torch.inference_mode if layer is model else nullcontext
        with mode():
            for _ in range(2):
                layer.weight.grad = torch.ones(30, 4)
                optimizer.step()
        weights.append(layer.weight.detach().clone())
    assert torch.equal(*weights)


def _versions_of_a_dtensor(rank, world_size):
    """Versions raised of a DTensor by stock and converted steps; the last row is on no rank but the first."""
    mesh = init_device_mesh("cpu", (world_size,))
    raised = []
    for compressed in (False, True):
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.ones(1, 3), mesh, [Split(0)]))
        optimizer = AdamW(model.parameters())
        if compressed:
            compress(optimizer, model, Policy([Rule(first_moment="BFloat16", second_moment="RowWise")]))
        for _ in range(2):
            before = model.weight._version
            model.weight.grad = distribute_tensor(torch.ones(1, 3), mesh, [Split(0)])
            optimizer.step()
        raised.append(model.weight._version > before)
    return raised


def test_a_dtensor_s_own_version_is_raised_also_where_a_rank_holds_none_of_it():
    assert run_ranks(_versions_of_a_dtensor, 2) == [[True, True]] * 2
