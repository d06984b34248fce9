"""Real training under ``fully_shard``: what users combine it with."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_sketch import BFloat16, CountSketch, Keep, Policy, RowWise, Rule, compress, decompress
from lightning_sketch.sharding import local
from tests.fsdp2.tools import COLUMNS, ROWS, held, loss_of, make_net, net_policy, tokens_of, train_as, train_net
from tests.ranks import run_ranks
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed

STEPS = 20
#: Equal to one process under row shards, up to the order in which gradients are summed.
EQUAL = Policy([Rule(role="embedding", first_moment=BFloat16(stochastic=False), second_moment=RowWise())])
SKETCHED = Policy([Rule(role="embedding", first_moment=CountSketch(2), second_moment=CountSketch(2))])


class Tied(nn.Module):
    """A table that is also the output layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(ROWS, COLUMNS)
        self.hidden = nn.Linear(COLUMNS, COLUMNS)
        self.head = nn.Linear(COLUMNS, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.hidden(self.table(tokens)).tanh())


def build(mesh, policy, *, bf16=False, model=Tied, **adam):
    """A model under ``fully_shard`` (or in one process), its converted optimizer."""
    torch.manual_seed(0)
    net = model()
    if mesh is not None:
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if bf16 else {}
        fully_shard(net, mesh=mesh, **options)
    optimizer = AdamW(net.parameters(), lr=0.02, **adam)
    return net, optimizer if policy is None else compress(optimizer, net, policy)


def clipped(model, optimizer, ranks, steps):
    """Training with gradient clipping; losses and norms. `ranks` is this rank, or all of them in one process."""
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        found = [loss_of(model, rank, step) for rank in ranks]
        (sum(found[1:], found[0]) / len(found)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        losses.append([float(loss.detach()) for loss in found])
    return losses, norms


def grouped(mesh, ranks):
    """Two groups, a scheduler and a frozen layer."""
    torch.manual_seed(0)
    net = Tied()
    net.hidden.weight.requires_grad_(False)
    if mesh is not None:
        fully_shard(net, mesh=mesh)
    groups = [{"params": [net.table.weight], "lr": 0.05}, {"params": net.hidden.parameters(), "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=0.01)
    schedule = CosineAnnealingLR(optimizer, STEPS)
    compress(optimizer, net, EQUAL)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = [loss_of(net, rank, step) for rank in ranks]
        (sum(found[1:], found[0]) / len(found)).backward()
        optimizer.step()
        schedule.step()
        losses.append([float(loss.detach()) for loss in found])
    whole = {n: p.detach().full_tensor() if mesh is not None else p.detach() for n, p in net.named_parameters()}
    return {"losses": losses, "params": whole, "lr": [group["lr"] for group in optimizer.param_groups]}


def converted_midway(mesh, rank):
    """Plain AdamW for three steps, compressed for three, plain again for two; kept layers as under plain AdamW."""
    net, optimizer = build(mesh, None)
    train_net(net, optimizer, rank, range(3))
    plain = held(net, optimizer)
    compress(optimizer, net, EQUAL)
    found = {"plain": plain, "compressed": held(net, optimizer)}
    train_net(net, optimizer, rank, range(3, 6))
    decompress(optimizer)
    found["dense again"] = held(net, optimizer)
    found["losses"] = train_net(net, optimizer, rank, range(6, 8))
    found["dtensors"] = [type(x).__name__ for x in optimizer.state[net.table.weight].values()]
    return found


def all_kept(mesh, rank):
    """A policy that keeps every state: plain AdamW, bit for bit."""
    found = []
    for policy in (None, Policy([Rule(role="embedding", first_moment=Keep(), second_moment=Keep())])):
        net, optimizer = build(mesh, policy)
        found.append((train_net(net, optimizer, rank, range(5)), held(net, optimizer)))
    return found


def too_early(mesh):
    """`fully_shard` after `compress`: the optimizer holds parameters that the model no longer has."""
    torch.manual_seed(0)
    net = Tied()
    optimizer = compress(AdamW(net.parameters()), net, EQUAL)
    fully_shard(net, mesh=mesh)
    before = local(net.table.weight.detach()).clone()
    try:
        train_net(net, optimizer, 0, range(2))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "moved" if not torch.equal(before, local(net.table.weight.detach())) else "nothing moved, no error"


def everything(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    found = {}
    net, optimizer = build(mesh, EQUAL)
    found["clipped"] = clipped(net, optimizer, [rank], STEPS)
    found["tied"] = [name for name, _ in net.named_parameters()]
    for name, policy in (("bf16", SKETCHED), ("bf16 plain", None)):
        net, optimizer = build(mesh, policy, bf16=True)
        found[name] = train_net(net, optimizer, rank, range(3 * STEPS))
        states = [v for k, v in optimizer.state[net.table.weight].items() if not k.endswith("_scale")]  # a number
        found[f"{name} dtypes"] = sorted({str(x.dtype) for x in (*states, net.table.weight)})
    found["grouped"] = grouped(mesh, [rank])
    found["midway"] = converted_midway(mesh, rank)
    found["kept"] = all_kept(mesh, rank)
    found["too early"] = too_early(mesh)
    return found


def replicated(rank, world_size):
    """HSDP: two replicas of two shards; and all codecs on the same mesh."""
    grid = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    model = make_net(grid)
    optimizer = compress(AdamW(model.parameters(), lr=0.02), model, net_policy())
    losses = train_net(model, optimizer, rank, range(STEPS))
    found = {"losses": losses, "held": held(model, optimizer)}
    # one replica's NaN reaches the other through the gradients' all-reduce, and all leave out the same and raise alike
    optimizer.zero_grad()
    loss = loss_of(model, rank, 0)
    (loss * (torch.nan if rank == 3 else 1.0)).backward()
    try:
        optimizer.step()
        found["nan"] = ""
    except FloatingPointError as error:
        found["nan"] = str(error)[:40]
    found["held after nan"] = after = held(model, optimizer)
    found["nan rows"] = rows = {}
    for name, param in model.named_parameters():
        if name.endswith("bias") or name.startswith("head"):
            continue  # kept
        bad = ~local(param.grad).isfinite().all(dim=1)
        same = (after[name] == found["held"][name]).all(dim=1)
        rows[name] = {
            "bad": bad.nonzero().flatten().tolist(),
            "moved": (bad & ~same).any(),
            "stuck": (~bad & same).all(),
        }
    return found


@functools.cache
def ranks():
    return run_ranks(everything, 2)


@functools.cache
def hybrid():
    return run_ranks(replicated, 4)


def test_clipping_and_tied_weights_are_one_process():
    net, optimizer = build(None, EQUAL)
    losses, norms = clipped(net, optimizer, [0, 1], STEPS)
    assert sum(losses[-1]) < 0.8 * sum(losses[0])
    for rank, found in enumerate(ranks()):
        assert found["tied"] == ["table.weight", "hidden.weight", "hidden.bias"]
        found_losses, found_norms = found["clipped"]
        assert [x[0] for x in found_losses] == pytest.approx([x[rank] for x in losses], rel=1e-3)
        assert found_norms == pytest.approx(norms, rel=1e-3)


def test_mixed_precision_trains_with_fp32_states():
    for found in ranks():
        assert found["bf16 dtypes"] == found["bf16 plain dtypes"] == ["torch.float32"]
        assert sum(found["bf16"][-5:]) < 0.8 * sum(found["bf16"][:5])
        assert found["bf16"][0] == found["bf16 plain"][0]


def test_groups_schedulers_and_frozen_layers_are_one_process():
    alone = grouped(None, [0, 1])
    for rank, found in enumerate(ranks()):
        assert found["grouped"]["lr"] == alone["lr"]
        assert [x[0] for x in found["grouped"]["losses"]] == pytest.approx([x[rank] for x in alone["losses"]], rel=1e-3)
        for name, param in alone["params"].items():
            torch.testing.assert_close(found["grouped"]["params"][name], param, rtol=1e-2, atol=1e-3)
        assert_same(found["grouped"]["params"]["hidden.weight"], alone["params"]["hidden.weight"])  # frozen


def test_plain_adamw_is_converted_midway_and_back():
    for found in (found["midway"] for found in ranks()):
        plain, compressed = found["plain"], found["compressed"]
        for name in ("hidden.weight", "hidden.bias"):
            for key in ("", ".exp_avg", ".exp_avg_sq", ".step"):
                assert_same(compressed[name + key], plain[name + key])
        assert_same(compressed["table.weight"], plain["table.weight"])
        assert_same(compressed["table.weight.exp_avg"], plain["table.weight.exp_avg"].to(torch.bfloat16))
        row = compressed["table.weight.exp_avg_sq_row"] * compressed["table.weight.exp_avg_sq_scale"]
        torch.testing.assert_close(row, plain["table.weight.exp_avg_sq"].mean(dim=1))
        again = found["dense again"]
        assert again["table.weight.exp_avg_sq"].shape == plain["table.weight"].shape
        assert float(again["table.weight.step"]) == 6
        assert found["dtensors"] == ["Tensor", "DTensor", "DTensor"]
        assert all(loss == loss for loss in found["losses"])


def test_kept_layers_are_plain_adamw_bit_for_bit():
    for found in ranks():
        assert_same(*found["kept"])


def test_converting_before_sharding_is_an_error():
    for found in ranks():
        assert found["too early"].startswith("RuntimeError: none of the optimizer's parameters is the model's any more")
        assert "Call fully_shard(model) before constructing the optimizer" in found["too early"]


def test_hybrid_shards_keep_their_replicas_equal():
    first, second, third, fourth = hybrid()
    assert_same(third["held"], first["held"])
    assert_same(fourth["held"], second["held"])
    assert sum(first["losses"][-3:]) < sum(first["losses"][:3]) * 0.9


def test_hybrid_shards_train_like_pure_ones():
    """Two shards are two shards, however many replicas there are; only the gradients are averaged over more data."""
    model = make_net()
    optimizer = compress(AdamW(model.parameters(), lr=0.02), model, net_policy())
    losses = train_as(4, model, optimizer, range(3))
    found = [sum(x["losses"][step] for x in hybrid()) / 4 for step in range(3)]
    assert found == pytest.approx(losses, rel=0.02)


def test_a_nan_in_one_replica_raises_everywhere_and_its_rows_are_left_out_of_both():
    theirs = sorted(set(tokens_of(3, 0).tolist()))
    first, second, third, fourth = hybrid()
    for found in hybrid():
        assert found["nan"].startswith("NaN or inf in the gradient of")
        for name, rows in found["nan rows"].items():
            assert rows["bad"] == theirs or not name.startswith("by_columns")
            assert not rows["moved"], name
            assert not rows["stuck"] or len(rows["bad"]) == len(found["held"][name]), name
        for key, value in found["held after nan"].items():
            if key.split(".weight")[0] in {name.split(".weight")[0] for name in found["nan rows"]}:
                assert torch.as_tensor(value).isfinite().all(), key
            if key.endswith(".step"):
                assert float(value) == STEPS + 1
    assert_same(third["held after nan"], first["held after nan"])
    assert_same(fourth["held after nan"], second["held after nan"])
