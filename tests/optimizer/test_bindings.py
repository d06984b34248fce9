"""What is kept from one step to the next never outlives what it was made of.

The oracle is an optimizer that forgets: whatever happens between two steps, one that keeps its bindings trains on bit
for bit like one that makes them anew at every step.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor import distribute_tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_sketch import CountSketch, Policy, RowWise, Rule, compress, decompress
from lightning_sketch.layers.record import LayerPart, LayerRecord
from lightning_sketch.optimizer.bindings import Bindings
from lightning_sketch.rules import StateDef
from lightning_sketch.sharding import Shard
from tests.optimizer.layers_tools import give, make_layers, policy
from tests.ranks import run_ranks
from tests.tiny import CODECS, assert_same, snapshot

STEPS = 6


def _run(happens, *, forget, make=AdamW, **kwargs):
    """Parameters and states after some steps, between which `happens(model, optimizer, step)`.

    It may return another model and optimizer to go on with.
    """
    model, optimizer = make_layers(make, **kwargs)
    for step in range(STEPS):
        give(model, step)
        model, optimizer = happens(model, optimizer, step) or (model, optimizer)
        if forget:
            optimizer.compression.bindings.clear()
        optimizer.step()
    return snapshot(model, optimizer), optimizer


def _compressed(model):
    return [param for param in model.parameters() if param is not model.kept.weight]


def _nothing(model, optimizer, step):
    pass


def _other_memory(model, optimizer, step):
    for param in model.parameters():
        param.data = param.data.clone()


def _other_memory_of_gradients(model, optimizer, step):
    for param in model.parameters():
        param.grad = param.grad.clone() if step % 2 else param.grad.t().contiguous().t()


def _other_strides(model, optimizer, step):
    for param in model.parameters():
        param.data = param.data.t().contiguous().t() if step % 2 else param.data.contiguous()


def _other_dtype(model, optimizer, step):
    for param in _compressed(model):  # torch's own step refuses it
        grad, dtype = param.grad, torch.bfloat16 if step % 2 else torch.float32
        param.grad = None
        param.data, param.grad = param.data.to(dtype), grad.to(dtype)


def _other_states(model, optimizer, step):
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.clone()


def _other_memory_of_states(model, optimizer, step):
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.data = value.data.clone()


def _other_dictionaries(model, optimizer, step):
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _other_scales(model, optimizer, step):
    """The same states, divided by other scales."""
    for param, state in optimizer.state.items():
        if "exp_avg_sq_row" in state and param.shape == (20, 8):
            state["exp_avg_sq_scale"] *= 0.5
            for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
                if key in state:
                    state[key].mul_(2)


def _loaded(model, optimizer, step):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _plain_and_back(model, optimizer, step):
    compress(decompress(optimizer), model, policy())


def _deepcopied(model, optimizer, step):
    model, optimizer = copy.deepcopy((model, optimizer))
    give(model, step)
    return model, optimizer


def _pickled(model, optimizer, step):
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    give(model, step)
    return model, optimizer


def _scheduled(model, optimizer, step):
    group = optimizer.param_groups[0]
    group["lr"] = torch.tensor(0.1 / (step + 1)) if step % 2 else 0.1 / (step + 1)
    group["betas"] = (0.9 - 0.1 * step, 0.99)
    group["eps"], group["weight_decay"], group["maximize"] = 1e-8 * (step + 1), 0.1 * step, step == 4


def _absent(model, optimizer, step):
    for position, param in enumerate(model.parameters()):
        if (step + position) % 3 == 0:
            param.grad = None


def _not_finite(model, optimizer, step):
    optimizer.compression.nonfinite = "skip"
    for position, param in enumerate(model.parameters()):
        if (step + position) % 3 == 0 and param.ndim and param is not model.kept.weight:
            param.grad[3, 1] = float("nan")


def _threads(model, optimizer, step):
    torch.set_num_threads(1 + step % 3)


def _other_groups(model, optimizer, step):
    """A trainer that assigns param_groups of its own."""
    optimizer.param_groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]


HAPPENINGS = [
    _nothing, _other_memory, _other_memory_of_gradients, _other_strides, _other_dtype, _other_states,
    _other_memory_of_states, _other_dictionaries, _other_scales, _loaded, _plain_and_back,
    _deepcopied, _pickled, _scheduled, _absent, _not_finite, _threads, _other_groups,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:NaN or inf in the gradient")
@pytest.mark.parametrize("happens", HAPPENINGS, ids=lambda f: f.__name__.strip("_"))
def test_it_trains_like_one_that_forgets(happens):
    threads = torch.get_num_threads()
    try:
        found, optimizer = _run(happens, forget=False, lr=0.05)
        expected, _ = _run(happens, forget=True, lr=0.05)
    finally:
        torch.set_num_threads(threads)
    assert_same(found, expected)
    assert len(optimizer.compression.bindings) > 0


@pytest.mark.parametrize(
    "happens", [_other_memory, _other_states, _threads, _other_memory_of_states], ids=lambda f: f.__name__
)
def test_what_changes_nothing_changes_nothing(happens):
    """The oracle above would not notice if both trained on memory that was left behind."""
    threads = torch.get_num_threads()
    try:
        assert_same(_run(happens, forget=False)[0], _run(_nothing, forget=True)[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Adam, {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.2, "maximize": True}),
        (Adagrad, {"lr": 0.3, "lr_decay": 0.5, "eps": 0.1, "weight_decay": 0.2, "maximize": True}),
        (RMSprop, {"lr": 0.3, "alpha": 0.5, "eps": 0.1, "weight_decay": 0.2, "maximize": True}),
        (SGD, {"lr": 0.3, "momentum": 0.2, "dampening": 0.5, "weight_decay": 0.2, "maximize": True}),
        (SGD, {"momentum": 0.2, "nesterov": True}),
    ],
    ids=str,
)
def test_every_hyperparameter_that_changes_counts(make, change):
    options = {"momentum": 0.9} if make is SGD else {}
    codecs = {"first_moment": CountSketch(width=99)} if make is SGD else {"second_moment": RowWise()}

    def trained(changed):
        torch.manual_seed(0)
        model = nn.Linear(8, 20, bias=False)
        optimizer = compress(make(model.parameters(), lr=0.1, **options), model, Policy([Rule(name="*", **codecs)]))
        for step in range(3):
            if step == 2:
                optimizer.param_groups[0].update(changed)
            model.weight.grad = torch.full((20, 8), 1.0 + step) * torch.linspace(-1, 2, 8)
            optimizer.step()
        return model.weight.detach()

    unchanged = trained({})
    for name, value in change.items():
        if name != "dampening":  # of no effect where momentum is as before
            assert not torch.equal(trained({name: value}), unchanged), name
    assert not torch.equal(trained(change), unchanged)


def test_nothing_is_bound_anew_while_nothing_is_replaced(monkeypatch):
    bound = []
    bind = Bindings.bind

    def spy(self, param, *rest):
        bound.append(param)
        return bind(self, param, *rest)

    monkeypatch.setattr(Bindings, "bind", spy)
    model, optimizer = make_layers()
    for step in range(STEPS):
        give(model, step)
        optimizer.step()
    assert len(bound) == len(CODECS) + 1  # the scalar, too, whose rows are a view
    model.scalar.data = model.scalar.data.clone()
    optimizer.state[model.l0.weight] = dict(optimizer.state[model.l0.weight])
    rows, key = model.get_submodule(f"l{list(CODECS).index('rows')}").weight, "exp_avg_sq_row"
    optimizer.state[rows][key] = optimizer.state[rows][key].clone()
    del bound[:]
    optimizer.step()
    assert {id(param) for param in bound} == {id(model.scalar), id(model.l0.weight), id(rows)}


def _part(shard, span=None):
    states = (StateDef("exp_avg_sq", signed=False),)
    layer = LayerRecord.make("w", 7, torch.empty(20, 8), states, {"exp_avg_sq": RowWise()})
    return LayerPart(layer, shard, span)


def test_parts_of_a_flat_tensor_follow_its_memory():
    flat = torch.randn(3 + 5 * 8)
    part = _part(Shard((20, 8), 2, 5), slice(3, 43))
    bindings, state = Bindings(), part.allocate(flat, {})
    arguments = (flat, (part,), {"exp_avg_sq"})
    bound = bindings.bind(*arguments, {}, state)
    assert bindings.find(*arguments, state) is bound

    flat.data = flat.data.clone()
    assert bindings.find(*arguments, state) is None
    (again,) = bindings.bind(*arguments, {}, state)
    assert again.param.data_ptr() == flat.data_ptr() + 3 * 4

    other = torch.randn(43)
    assert bindings.find(other, (part,), {"exp_avg_sq"}, state) is None
    moved = (_part(Shard((20, 8), 3, 5), slice(3, 43)),)
    bindings.bind(*arguments, {}, state)
    assert bindings.find(flat, moved, {"exp_avg_sq"}, state) is None
    assert bindings.find(*arguments, dict(state)) is None


@pytest.mark.parametrize("compiled_from", [0, 2])
def test_a_compiled_step_is_the_step(compiled_from):
    def trained(compiled):
        model, optimizer = make_layers(lr=0.05)
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        for number in range(STEPS):
            give(model, number)
            if number == 3:
                _other_memory(model, optimizer, number)
                _other_states(model, optimizer, number)
            step() if compiled and number >= compiled_from else optimizer.step()
        return snapshot(model, optimizer)

    torch.compiler.reset()
    found, expected = trained(True), trained(False)
    for values in (found, expected):  # torch's compiled step of the kept layer rounds otherwise
        for key in [key for key in values if key.startswith("kept.")]:
            del values[key]
    assert_same(found, expected)


def _moved_shards(rank, world_size):
    """A DTensor whose local tensor is replaced between steps, as FSDP2 does when it moves its shards."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = []
    for replace, forget in itertools.product((False, True), (False, True)):
        torch.manual_seed(0)
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.randn(21, 8), mesh, [Split(0)]))
        optimizer = compress(AdamW(model.parameters(), lr=0.1), model, Policy([Rule(second_moment=RowWise())]))
        for _ in range(4):
            model.weight.grad = distribute_tensor(torch.randn(21, 8), mesh, [Split(0)])
            if replace:
                model.weight._local_tensor = model.weight._local_tensor.clone()
            if forget:
                optimizer.compression.bindings.clear()
            optimizer.step()
        found.append(model.weight.full_tensor().detach().clone())
        assert len(optimizer.compression.bindings) == 1
    return found


def test_shards_of_a_dtensor_follow_its_local_tensor():
    for found in run_ranks(_moved_shards, 2):
        assert all(torch.equal(weight, found[0]) for weight in found)
