"""Converting checkpoint files and directories, from Python and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adagrad, Adam, AdamW

from lightning_sketch import CountSketch, Drop, Policy, RowWise, Rule, compress, decompress, restore
from lightning_sketch.checkpoints import read_checkpoint
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from lightning_sketch.cli import main
from tests.checkpoints.engines import POLICY, STEPS, TABLES, fresh_model, make, optimizer_of
from tests.deepspeed_tools import init_deepspeed
from tests.ranks import run_ranks
from tests.tiny import CASES, LOSSY, Tiny, assert_same, train


def model_of_the_tests() -> nn.Module:
    """What ``--model`` names."""
    return Tiny()


def write(rank: int, world_size: int, folder: str) -> None:
    init_deepspeed(rank, world_size)
    for kind in ("rows", "columns", "zero1", "zero3"):
        run = make(kind)
        run.train(range(STEPS))
        run.save(Path(folder, kind))


def resume(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    """Load a checkpoint converted for three ranks by torch's own means."""
    run = make("rows")
    state = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    other = make("rows")
    restore(other.optimizer, folder)
    assert_same(other.optimizer.state_dict()["state"].keys(), run.optimizer.state_dict()["state"].keys())
    for mine, theirs in zip(other.model.parameters(), run.model.parameters(), strict=True):
        for key, value in run.optimizer.state[theirs].items():
            found = other.optimizer.state[mine][key]
            same = torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
            assert same, key
    run.train(range(STEPS, STEPS + 1))
    return {name: value.full_tensor() for name, value in run.model.state_dict().items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    run_ranks(write, 2, str(folder))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["rows", "columns", "zero1", "zero3"])
def test_to_plain_loads_into_a_plain_optimizer(written, tmp_path, kind):
    convert_checkpoint(written / kind, tmp_path / "plain", to="plain")
    model = fresh_model()
    optimizer = AdamW(model.parameters(), lr=1.0)
    if kind.startswith("zero"):
        saved = torch.load(tmp_path / "plain")
    else:
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(saved, checkpoint_id=tmp_path / "plain")
        saved = saved["optimizer"]
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    compressed = optimizer_of(fresh_model())
    restore(compressed, written / kind)
    plain = decompress(compressed)
    assert optimizer.param_groups[0]["lr"] == 0.01
    for mine, theirs in zip(optimizer.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert optimizer.state[mine]["step"] == plain.state[theirs]["step"] == STEPS
        name = next(n for n, p in model.named_parameters() if p is mine)
        for state in ("exp_avg", "exp_avg_sq"):
            # Otherwise sketched twice here: restored into a table, and decoded.
            if name.split(".")[0] in ("exact", "rounded", "head"):
                assert torch.equal(optimizer.state[mine][state], plain.state[theirs][state]), (name, state)
    optimizer.step()


@pytest.mark.distributed
def test_to_another_world_size_loads_by_torchs_own_means(written, tmp_path):
    done = convert_checkpoint(written / "rows", tmp_path / "three", to="compressed", world_size=3)
    assert done.errors["exact.weight"] == {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    assert done.errors["sketch.weight"]["exp_avg"] > 0
    first, *others = run_ranks(resume, 3, str(tmp_path / "three"))
    for other in others:
        assert_same(other, first)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_there_and_back(tmp_path, case):
    model = Tiny()
    optimizer = compress(case.make(model.table.parameters() if case.sparse else model.parameters()), model, LOSSY)
    train(model.table if case.sparse else model, optimizer, range(3), sparse=case.sparse)
    torch.save(optimizer.state_dict(), tmp_path / "compressed.pt")
    convert_checkpoint(tmp_path / "compressed.pt", tmp_path / "plain.pt", to="plain")
    expected = decompress(optimizer).state_dict()
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert_same(plain, {**expected, "param_groups": plain["param_groups"]})
    fresh = case.make(model.table.parameters() if case.sparse else model.parameters())
    fresh.load_state_dict(plain)
    train(model.table if case.sparse else model, fresh, [3], sparse=case.sparse)
    # and compressed again
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(LOSSY.to_dict()))
    if not case.sparse:
        arguments = ["convert", str(tmp_path / "plain.pt"), str(tmp_path / "again.pt"), "--to", "compressed"]
        assert main([*arguments, "--policy", str(policy), "--model", f"{__name__}:model_of_the_tests"]) == 0
        again = compress(case.make(model.parameters()), model, LOSSY)
        again.load_state_dict(torch.load(tmp_path / "again.pt"))


def test_a_lightning_checkpoint_keeps_everything_else(tmp_path, capsys):
    model = Tiny()
    optimizer = compress(AdamW(model.parameters()), model, LOSSY)
    train(model, optimizer, range(2))
    weights = dict(model.state_dict())
    torch.save(
        {"epoch": 3, "state_dict": weights, "optimizer_states": [optimizer.state_dict()]}, tmp_path / "last.ckpt"
    )
    assert main(["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "plain.ckpt"), "--to", "plain"]) == 0
    assert "KiB" in capsys.readouterr().out
    plain = torch.load(tmp_path / "plain.ckpt")
    assert plain["epoch"] == 3
    assert_same(plain["state_dict"], weights)
    AdamW(model.parameters()).load_state_dict(plain["optimizer_states"][0])


def test_another_policy_for_a_compressed_file(tmp_path):
    model = Tiny()
    optimizer = compress(AdamW(model.parameters()), model, LOSSY)
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "old.pt")
    policy = Policy([Rule(role="embedding", exp_avg=Drop(), exp_avg_sq=RowWise())], seed=3)
    done = convert_checkpoint(tmp_path / "old.pt", tmp_path / "new.pt", to="compressed", policy=policy, model=model)
    assert done.errors.keys() == {"table.weight"}
    assert done.errors["table.weight"].keys() == {"exp_avg_sq"}
    assert done.bytes_after < done.bytes_before
    fresh = compress(AdamW(model.parameters()), model, policy)
    fresh.load_state_dict(torch.load(tmp_path / "new.pt"))
    train(model, fresh, [2])


def test_a_preset_for_a_plain_file(tmp_path):
    model = Tiny()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "plain.pt")
    arguments = ["convert", str(tmp_path / "plain.pt"), str(tmp_path / "new.pt"), "--to", "compressed"]
    assert main([*arguments, "--policy", "8bit", "--model", f"{__name__}:model_of_the_tests"]) == 0
    fresh = compress(AdamW(model.parameters()), model, Policy.preset("8bit"))
    fresh.load_state_dict(torch.load(tmp_path / "new.pt"))
    assert fresh.state[model.table.weight].keys() >= {"exp_avg_codes", "exp_avg_sq_codes"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt", "new.pt", "--to", "plain"], "there is no checkpoint|No such file"),
        (["old.pt", "old.pt", "--to", "plain"], "exists"),
        (["old.pt", "new.pt", "--to", "plain", "--world-size", "2"], "no number of ranks"),
        (["old.pt", "new.pt", "--to", "compressed", "--world-size", "0"], "must be at least 1"),
        (["old.pt", "new.pt", "--to", "plain", "--dtype", "float"], None),
        (["old.pt", "new.pt", "--to", "plain", "--dtype", "int"], None),
        (["old.pt", "new.pt", "--to", "plain", "--dtype", "Tensor"], "not a torch dtype"),
        (["old.pt", "new.pt", "--to", "compressed", "--policy", "policy.yaml"], "needs the model"),
        (["old.pt", "new.pt", "--to", "compressed", "--policy", "budget:1GiB"], "--policy budget:1GiB: neither"),
        (["old.pt", "new.pt", "--to", "compressed", "--model", "no_such:thing"], "no_such"),
        (["garbage.pt", "new.pt", "--to", "plain"], "cannot be read"),
        (["other.pt", "new.pt", "--to", "plain"], "found 0"),
        (["empty", "new.pt", "--to", "plain"], "no .metadata"),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path, capsys, arguments, message):
    model = Tiny()
    optimizer = compress(SGD(model.parameters(), momentum=0.9), model, LOSSY)
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), "old.pt")
    torch.save({"weights": model.state_dict()}, "other.pt")
    Path("garbage.pt").write_bytes(b"garbage")
    Path("empty").mkdir()
    Path("policy.yaml").write_text(yaml.safe_dump(LOSSY.to_dict()))
    before = sorted(path.name for path in tmp_path.iterdir())
    status = main(["convert", *arguments])
    if message is None:
        assert status == 0
        return
    assert status == 1
    import re

    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_restore_changes_nothing_when_it_refuses(tmp_path):
    model = fresh_model()
    optimizer = optimizer_of(model)
    other = Tiny()
    foreign = compress(AdamW(other.parameters()), other, LOSSY)
    train(other, foreign, range(2))
    torch.save(foreign.state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign.pt: group 0 of the checkpoint has 3 parameters, not 12"):
        restore(optimizer, tmp_path / "foreign.pt")
    with pytest.raises(TypeError, match="needs a converted optimizer"):
        restore(Adagrad(model.parameters()), tmp_path / "foreign.pt")
    assert not optimizer.state
    assert read_checkpoint(tmp_path / "foreign.pt", [["table.weight", "a", "b"]]).layers.keys() == {
        "table.weight",
        "a",
        "b",
    }


def test_restore_keeps_what_the_class_decides_and_states_of_amsgrad(tmp_path):
    model = Tiny()
    policy = Policy([Rule(role="embedding", exp_avg_sq=RowWise())])

    def groups():
        return [{"params": model.table.parameters()}, {"params": model.kept.parameters(), "amsgrad": True}]

    adam = compress(Adam(groups(), lr=0.5), model, policy)
    train(model, adam, range(2))
    torch.save(adam.state_dict(), tmp_path / "adam.pt")
    adamw = compress(AdamW(groups(), lr=0.1), model, policy)
    restore(adamw, tmp_path / "adam.pt")
    assert adamw.param_groups[0]["lr"] == 0.5
    assert adamw.param_groups[0]["decoupled_weight_decay"]
    assert_same(adamw.state[model.kept.weight], adam.state[model.kept.weight])
    train(model, adamw, [2])


def test_restore_wants_every_state_of_kept_layers_too(tmp_path):
    model = Tiny()
    sgd = SGD(model.parameters(), momentum=0.9)
    train(model, sgd, range(2))
    torch.save(sgd.state_dict(), tmp_path / "sgd.pt")
    policy = Policy([Rule(role="embedding", exp_avg_sq=RowWise())])
    with pytest.raises(ValueError, match="has no exp_avg"):
        restore(compress(AdamW(model.parameters()), model, policy), tmp_path / "sgd.pt")


def test_names_are_the_records_own(tmp_path):
    model = Tiny()
    optimizer = compress(AdamW([model.kept.weight, model.kept.bias, model.table.weight]), model, LOSSY)
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "old.pt")
    policy = Policy([Rule(role="embedding", exp_avg_sq=RowWise())])
    convert_checkpoint(tmp_path / "old.pt", tmp_path / "new.pt", to="compressed", policy=policy, model=model)
    fresh = compress(AdamW([model.kept.weight, model.kept.bias, model.table.weight]), model, policy)
    fresh.load_state_dict(torch.load(tmp_path / "new.pt"))


def test_parameters_in_another_order_are_noticed(tmp_path):
    model = Tiny()
    for params, match in (
        ([model.kept.weight, model.kept.bias, model.table.weight], r"in the checkpoint, .* in the model"),
        ([{"params": [model.table.weight]}, {"params": model.kept.parameters()}], "over several groups"),
    ):
        optimizer = AdamW(params)
        train(model, optimizer, range(2))
        torch.save(optimizer.state_dict(), tmp_path / "plain.pt")
        with pytest.raises(ValueError, match=match):
            convert_checkpoint(
                tmp_path / "plain.pt", tmp_path / "new.pt", to="compressed", policy=LOSSY, model=model
            )  # fmt: skip


def test_a_policy_that_compress_would_refuse_is_refused(tmp_path):
    model = Tiny()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "plain.pt")
    policy = Policy([Rule(role="embedding", exp_avg=RowWise())])
    with pytest.raises(ValueError, match="RowWise cannot hold exp_avg of table"):
        convert_checkpoint(tmp_path / "plain.pt", tmp_path / "new.pt", to="compressed", policy=policy, model=model)


def test_every_optimizer_of_a_lightning_checkpoint_is_converted(tmp_path):
    models = Tiny(), Tiny()
    optimizers = [compress(AdamW(model.parameters()), model, LOSSY) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
    torch.save({"optimizer_states": [optimizer.state_dict() for optimizer in optimizers]}, tmp_path / "two.ckpt")
    convert_checkpoint(tmp_path / "two.ckpt", tmp_path / "plain.ckpt", to="plain")
    for model, plain in zip(models, torch.load(tmp_path / "plain.ckpt")["optimizer_states"], strict=True):
        AdamW(model.parameters()).load_state_dict(plain)
        assert "compression" not in plain["param_groups"][0]


def test_the_matrix_covers_every_kind_of_codec():
    assert {type(codec).__name__ for codecs in TABLES.values() for codec in codecs.values()} == {
        "CountSketch", "Drop", "RowWise", "Keep", "BFloat16", "SM3", "Factored", "Quantized", "Halves"
    }  # fmt: skip
    assert isinstance(POLICY.rules[0].codecs["exp_avg"], CountSketch)
