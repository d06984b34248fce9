"""Training code takes every value of ``optimizer.state[param]`` for a tensor.

Trainers move them, scripts average, measure and log them: ``for v in state.values(): v.norm()``. torch's optimizers
made their step count and whatever else is 0-d a tensor (pytorch#127197). So is the scale of a decayed state, and a
scale that such code moved, cast or replaced is put right at the next step.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Adam, AdamW

from lightning_sketch import compress, decompress, decompress_state_dict, restore
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from lightning_sketch.codecs import scale_tensor
from lightning_sketch.sharding import local
from tests import tiny
from tests.ranks import run_ranks
from tests.tiny import ADAM, CODECS, Case, Tiny, assert_same, on_table, snapshot, train

WITH_SCALE = ("sketch", "exact", "rows", "sketched rows", "factored", "SM3", "SM3-I momentum")
EVERY = [
    (case, name, sparse)
    for case, name in tiny.EVERY
    for sparse in (False, True)
    if sparse or not case.sparse
    if not (sparse and (case.kwargs.get("weight_decay") or str(case) == "RMSprop"))  # torch refuses the kept layer's
]
every_pair = pytest.mark.parametrize(("case", "name", "sparse"), EVERY, ids=lambda x: str(x))
every_scale = pytest.mark.parametrize("name", WITH_SCALE)


def started(name: str, case: Case = ADAM, *, sparse: bool = False, steps: int = 3):
    torch.manual_seed(0)
    model = Tiny()
    if case.sparse:  # SparseAdam takes nothing but tables
        model.kept = nn.Embedding(3, 4)
    optimizer = compress(case.make(model.parameters()), model, on_table(**CODECS[name]))
    train(model, optimizer, range(steps), sparse=sparse)
    return model, optimizer


def scales(optimizer) -> dict:
    """Every scale, as ``(state, key)``."""
    return {(id(state), key): (state, key) for state in optimizer.state.values() for key in state if "_scale" in key}


def change_scales(optimizer, change) -> None:
    for state, key in scales(optimizer).values():
        state[key] = change(state[key])


def move_as_trainers_do(optimizer) -> None:
    """What Lightning's ``_optimizer_to_device`` does."""
    for param, state in optimizer.state.items():
        optimizer.state[param] = {key: value.to("cpu", copy=True) for key, value in state.items()}


def as_floats(state_dict: dict) -> dict:
    """A checkpoint as older versions wrote it: scales are Python floats."""
    old = copy.deepcopy(state_dict)
    for entry in old["state"].values():
        entry |= {key: value.item() for key, value in entry.items() if key.endswith("_scale")}
    return old


def saved(thing):
    """Through a file, as plain PyTorch loads it."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_pair
def test_every_value_is_a_tensor(case, name, sparse):
    model, optimizer = started(name, case, sparse=sparse)
    state = optimizer.state[model.table.weight]
    assert all(torch.is_tensor(value) for value in state.values())
    found = [value for key, value in state.items() if key.endswith("_scale")]
    assert len(found) == sum(key.endswith(("_table", "_row", "_dim0")) for key in state)
    assert all((value.dtype, value.shape, value.device.type) == (torch.float64, (), "cpu") for value in found)
    before = snapshot(model, optimizer)
    for value in state.values():
        assert value.element_size() * value.nelement() == value.nbytes
        if value.is_floating_point():  # codes are not
            assert value.norm().isfinite()
            torch.zeros_like(value).lerp_(value.detach().to("cpu").clone(), 0.5)
    assert_same(snapshot(model, optimizer), before)


@every_scale
@pytest.mark.parametrize(
    "move",
    [
        move_as_trainers_do,
        lambda optimizer: [v.share_memory_() for s in optimizer.state.values() for v in s.values()],
        lambda optimizer: change_scales(optimizer, torch.clone),
        lambda optimizer: change_scales(optimizer, lambda x: x[None]),
        lambda optimizer: change_scales(optimizer, torch.Tensor.item),
        lambda optimizer: optimizer.load_state_dict(saved(optimizer.state_dict())),
        lambda optimizer: optimizer.load_state_dict(as_floats(optimizer.state_dict())),
    ],
    ids=["moved", "shared memory", "cloned", "one dimension", "numbers", "saved", "saved by old versions"],
)
def test_a_moved_state_trains_on_bit_for_bit(name, move):
    (model, optimizer), (other, expected) = started(name), started(name)
    move(optimizer)
    train(model, optimizer, [3, 4])
    train(other, expected, [3, 4])
    assert_same(snapshot(model, optimizer), snapshot(other, expected))


@every_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scale_of_another_dtype_is_cast_back(name, dtype):
    model, optimizer = started(name)
    change_scales(optimizer, lambda x: x.to(dtype))
    rounded = {key: state[name].item() for key, (state, name) in scales(optimizer).items()}
    train(model, optimizer, [3])
    for key, (state, name) in scales(optimizer).items():
        beta = ADAM.make([torch.ones(1)]).param_groups[0]["betas"]["exp_avg_sq" in name]
        assert state[name].dtype == torch.float64
        assert state[name].item() in (rounded[key], rounded[key] * beta)  # a lazy sketch's does not decay


def test_no_default_dtype_rounds_a_scale():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        model = nn.Embedding(30, 4, dtype=torch.float32)
        optimizer = compress(Adam(model.parameters()), model, on_table(**CODECS["rows"]))
        model.weight.grad = torch.ones(30, 4, dtype=torch.float32)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_dtype(before)
    assert_same(optimizer.state[model.weight]["exp_avg_sq_scale"], torch.tensor(0.999, dtype=torch.float64))


DAMAGED = {
    "underflow": lambda x: torch.tensor(2.0**-31, dtype=torch.float64).half(),
    "inf": lambda x: float("inf"),
    "nan": lambda x: x * float("nan"),
    "nan in place": lambda x: x.fill_(float("nan")),
    "negative": lambda x: -x,
    "two": lambda x: x.repeat(2),
    "complex": lambda x: x.to(torch.complex128),
    "text": lambda x: "1.0",
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_scale_is_an_error_by_layer_before_anything_changes(change):
    model, optimizer = started("rows")
    change_scales(optimizer, change)
    before = snapshot(model, optimizer)
    damaged = before.pop("table.weight.exp_avg_sq_scale")
    with pytest.raises(ValueError, match=r"exp_avg_sq_scale of table.weight is .*, expected one finite number above 0"):
        train(model, optimizer, [3])
    found = snapshot(model, optimizer)
    assert type(found.pop("table.weight.exp_avg_sq_scale")) is type(damaged)
    assert_same(found, before)


@pytest.mark.parametrize("kind", ["rows", "sketch", "factored"])
def test_states_that_are_zeroed_in_place_are_reset(kind):
    found = []
    for in_place in (True, False):
        model, optimizer = started(kind)
        for state in optimizer.state.values():
            for key, value in state.items():
                state[key] = value.zero_() if in_place else torch.zeros_like(value)
        train(model, optimizer, [3, 4])
        found.append(snapshot(model, optimizer))
        assert all(bool(value.isfinite().all()) for value in found[-1].values())
    assert_same(*found)


def test_a_copy_has_its_own_scale():
    model, optimizer = started("rows")
    other = copy.deepcopy(optimizer)
    (mine, key), (theirs, _) = [next(iter(scales(o).values())) for o in (optimizer, other)]
    train(model, optimizer, [3])
    assert theirs[key].item() == pytest.approx(0.999**3)
    assert mine[key].item() == pytest.approx(0.999**4)


# --- checkpoints of older versions, whose scales are numbers ---


@every_scale
def test_an_old_checkpoint_decompresses_to_the_same(name):
    _, optimizer = started(name)
    new = optimizer.state_dict()
    assert_same(decompress_state_dict(as_floats(new)), decompress_state_dict(new))


@every_scale
def test_an_old_file_is_restored_and_converted_as_a_new_one(name, tmp_path):
    model, optimizer = started(name)
    torch.save(as_floats(optimizer.state_dict()), tmp_path / "old.pt")
    other, restored = started(name, steps=0)
    other.load_state_dict(model.state_dict())
    assert restore(restored, tmp_path / "old.pt") == {}
    assert_same(snapshot(other, restored), snapshot(model, optimizer))
    convert_checkpoint(tmp_path / "old.pt", tmp_path / "new.pt", to="compressed")
    found = torch.load(tmp_path / "new.pt", weights_only=True)["state"]
    assert_same(found[0], dict(saved(optimizer.state_dict())["state"][0]))
    convert_checkpoint(tmp_path / "old.pt", tmp_path / "plain.pt", to="plain")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)["state"][0]
    assert_same(plain["exp_avg_sq"], decompress(optimizer).state[model.table.weight]["exp_avg_sq"])


@every_scale
def test_an_old_directory_loads_into_todays_state(name, tmp_path):
    """torch.distributed.checkpoint wrote a number as an object, and reads into the live optimizer's tensors."""
    model, optimizer = started(name)
    dcp.save(as_floats(get_optimizer_state_dict(model, optimizer)), checkpoint_id=tmp_path / "old", no_dist=True)
    other, loaded = started(name, steps=1)
    other.load_state_dict(model.state_dict())
    target = get_optimizer_state_dict(other, loaded)
    dcp.load(target, checkpoint_id=tmp_path / "old", no_dist=True)
    set_optimizer_state_dict(other, loaded, target)
    assert_same(snapshot(other, loaded), snapshot(model, optimizer))
    again, restored = started(name, steps=0)
    again.load_state_dict(model.state_dict())
    restore(restored, tmp_path / "old")
    assert_same(snapshot(again, restored), snapshot(model, optimizer))


# --- sharded parameters: a scale for each rank ---


def _sharded(rank: int, world_size: int) -> None:
    init_device_mesh("cpu", (world_size,))
    model = nn.Embedding(6, 4)
    fully_shard(model)
    optimizer = compress(AdamW(model.parameters()), model, on_table(**CODECS["factored"]))

    def step() -> None:
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    (state,) = optimizer.state.values()
    assert all(torch.is_tensor(value) for value in state.values())
    scale = state["exp_avg_sq_scale"]
    assert_same(scale, torch.tensor(0.999, dtype=torch.float64))
    # In checkpoints as ever: a number for each shard.
    wrapped = optimizer.state_dict()["state"][0]["exp_avg_sq_scale"]
    assert (wrapped.dtype, wrapped.shape, local(wrapped).shape) == (torch.float64, (world_size,), (1,))
    saved_then = copy.deepcopy(optimizer.state_dict())
    step()
    optimizer.load_state_dict(saved_then)
    (state,) = optimizer.state.values()
    assert_same(state["exp_avg_sq_scale"], torch.tensor(0.999, dtype=torch.float64))
    state["exp_avg_sq_scale"] = 0.5  # of user code
    assert local(optimizer.state_dict()["state"][0]["exp_avg_sq_scale"]).tolist() == [0.5]
    step()
    assert_same(state["exp_avg_sq_scale"], torch.tensor(0.5 * 0.999, dtype=torch.float64))


def test_of_a_sharded_layer_too():
    run_ranks(_sharded, 2)


def test_a_scale_that_is_in_order_is_taken_as_it_is():
    scale = scale_tensor(0.25)
    assert scale_tensor(scale) is scale
    assert_same(scale_tensor(torch.tensor([0.25])), scale)
