"""DeepSpeed's stage 0, which partitions nothing: its checkpoints are read, and others restored into it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.optim import AdamW

from lightning_sketch import decompress, restore
from lightning_sketch.checkpoints import read_checkpoint
from lightning_sketch.checkpoints.rewrite import convert_checkpoint
from tests.checkpoints.engines import POLICY, STEPS, Run, fresh_model, make, optimizer_of
from tests.deepspeed_tools import engine, init_deepspeed
from tests.ranks import run_ranks
from tests.tiny import assert_same


def stage0(dtype: str, policy: Any = POLICY) -> Run:
    model = fresh_model()
    optimizer = optimizer_of(model, policy)
    return Run("zero0", model, optimizer, engine(model, optimizer, 0, dtype))


def states(run: Run) -> list[dict[str, Any]]:
    """In the order of the parameters; the head's weight is the last but one."""
    tensors = [tensor for group in run.optimizer.param_groups for tensor in group["params"]]
    return copy.deepcopy([dict(run.optimizer.state[tensor]) for tensor in tensors])


def write(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Checkpoints of stage 0 and one of ZeRO-1; and what stage 0 holds once it has loaded them."""
    init_deepspeed(rank, world_size)
    found: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        run = stage0(dtype)
        run.train(range(STEPS))
        run.save(Path(folder, dtype))
        found[dtype] = states(run)
    plain = stage0("fp32", None)
    plain.train(range(STEPS))
    plain.save(Path(folder, "plain"))
    found["plain"] = states(plain)
    zero = make("zero1")
    zero.train(range(STEPS))
    zero.save(Path(folder, "zero1"))
    for dtype in ("fp32", "bf16"):
        for source in (dtype, "zero1"):
            run = stage0(dtype)
            restore(run.target, Path(folder, source))
            found[f"{source} to {dtype}"] = states(run)
            run.train(range(STEPS, STEPS + 1))
    other = make("zero1")
    restore(other.target, Path(folder, "fp32"))
    other.save(Path(folder, "moved"))
    other.train(range(STEPS, STEPS + 1))
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stage0")
    return folder, run_ranks(write, 2, str(folder))[0]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_same_stage_is_exact(written, dtype):
    found = written[1]
    assert_same(found[f"{dtype} to {dtype}"], found[dtype])


@pytest.mark.distributed
def test_fp32_into_a_single_process_is_exact(written):
    run = make("single")
    assert restore(run.optimizer, written[0] / "fp32") == {}
    assert_same(states(run), written[1]["fp32"])
    run.train(range(STEPS, STEPS + 1))


@pytest.mark.distributed
def test_bf16_into_a_single_process(written):
    run = make("single")
    restore(run.optimizer, written[0] / "bf16")
    kept = run.optimizer.state[run.model.head.weight]
    assert_same(kept, {key: value for key, value in written[1]["bf16"][-2].items() if key in kept})
    assert kept["step"] == STEPS
    run.train(range(STEPS, STEPS + 1))


@pytest.mark.distributed
@pytest.mark.parametrize("source", ["fp32 to fp32", "zero1 to fp32", "zero1 to bf16"])
def test_states_have_the_shape_of_what_torch_steps(written, source):
    assert written[1][source][-2]["exp_avg"].shape == (5, 12)


@pytest.mark.distributed
def test_into_zero_and_back(written):
    run = make("single")
    restore(run.optimizer, written[0] / "moved")
    for name in ("exact", "rounded", "head"):
        weight = getattr(run.model, name).weight
        expected = make("single")
        restore(expected.optimizer, written[0] / "fp32")
        assert_same(run.optimizer.state[weight], expected.optimizer.state[getattr(expected.model, name).weight])


@pytest.mark.distributed
@pytest.mark.parametrize("source", ["fp32", "plain"])
def test_fp32_becomes_a_plain_file_that_numbers_its_parameters(written, tmp_path, source):
    convert_checkpoint(written[0] / source, tmp_path / "plain.pt", to="plain")
    optimizer = AdamW(fresh_model().parameters(), lr=1.0)
    optimizer.load_state_dict(torch.load(tmp_path / "plain.pt"))
    assert optimizer.param_groups[0]["lr"] == 0.01
    run = make("single", None if source == "plain" else POLICY)
    if source == "plain":
        assert_same(list(optimizer.state_dict()["state"].values()), written[1]["plain"])
    else:
        restore(run.optimizer, written[0] / source)
        expected = decompress(run.optimizer)
        assert_same(optimizer.state_dict()["state"], expected.state_dict()["state"])


@pytest.mark.distributed
def test_bf16_becomes_a_plain_file_with_names(written, tmp_path):
    convert_checkpoint(written[0] / "bf16", tmp_path / "plain.pt", to="plain")
    model = fresh_model()
    optimizer = AdamW(model.parameters())
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, torch.load(tmp_path / "plain.pt"), options=options)
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], written[1]["bf16"][-2]["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.distributed
def test_zero_without_its_rank_files_is_refused(written, tmp_path):
    folder = tmp_path / "zero"
    folder.mkdir()
    (file,) = (written[0] / "zero1" / "step").glob("mp_rank_*_model_states.pt")
    (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="ZeRO keeps it in zero_pp_rank files, which are missing"):
        read_checkpoint(folder)
    (folder / "mp_rank_01_model_states.pt").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="split over 2 files"):
        read_checkpoint(folder)
