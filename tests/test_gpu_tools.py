"""What is run on a borrowed GPU beside the benchmarks: other programs' output as it is read, and training."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_cases, gpu_tokens, gpu_tools, gpu_train

CUDA = torch.device("cuda")
NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","observe","dram__bytes.sum","Gbyte","2.10"
"0","1","observe","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.5"
"0","1","observe","gpu__time_duration.sum","us","1,024.5"
"1","1","apply","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","90"
"""


def _program(folder: Path, name: str, prints: str, status: int = 0) -> None:
    """A program of that name in a folder."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\nexit {status}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is looked through for programs."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_what_ncu_measured_is_a_row_for_each_launch(programs: Path) -> None:
    _program(programs, "ncu", NCU)
    first, second = gpu_tools.profiler(CUDA, True, time.monotonic() + 60)
    assert first == {
        "what": "observe", "dram_bytes": 2.1, "dram_bytes_unit": "Gbyte", "percent_of_peak": 81.5, "duration": 1024.5,
        "duration_unit": "us",
    }  # fmt: skip
    assert second == {"what": "apply", "percent_of_peak": 90.0}


def test_counters_that_only_administrators_may_read_are_no_failure(programs: Path) -> None:
    _program(programs, "ncu", "==ERROR== ERR_NVGPUCTRPERM", status=1)
    (row,) = gpu_tools.profiler(CUDA, True, time.monotonic() + 60)
    assert "ERR_NVGPUCTRPERM" in row["skipped"]


def test_what_a_sanitizer_found_is_an_error(programs: Path) -> None:
    _program(programs, "compute-sanitizer", "========= ERROR SUMMARY: 0 errors")
    memory, races = gpu_tools.sanitizer(CUDA, True, time.monotonic() + 60)
    assert memory == {"what": "memcheck", "errors": 0}
    assert "skipped" in races  # it said nothing of races
    _program(programs, "compute-sanitizer", "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)")
    _, races = gpu_tools.sanitizer(CUDA, True, time.monotonic() + 60)
    assert races["errors"] == 2
    assert "hazards displayed" in races["error"]


def test_programs_that_are_not_there_are_skipped() -> None:
    for section in (gpu_tools.profiler, gpu_tools.sanitizer):
        assert all("skipped" in row for row in section(torch.device("cpu"), True, time.monotonic() + 60))


def test_a_section_ends_when_its_time_is_up() -> None:
    (row,) = gpu_tools.repeats(torch.device("cpu"), True, time.monotonic())
    assert row == {"what": "process 1", "error": "out of time"}


def test_wheels_beside_the_script_are_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("other_library/__init__.py", "")
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("nothing")
    where = tmp_path / "where"
    broken, fine = gpu_tools._installed(tmp_path, os.fspath(where))
    assert "skipped" in broken
    assert fine == {"what": "wheel other-1.0-py3-none-any.whl"}
    assert (where / "other_library").is_dir()


def test_cases_that_are_sanitized_run_every_codec() -> None:
    gpu_cases.small(torch.device("cpu"), True)
    gpu_cases.profile(torch.device("cpu"), True)


def test_tokens_of_text_are_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tokens, "VOCABULARY", gpu_tokens.BYTES + 2)
    (tmp_path / "a.txt").write_text("one two one two three")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    tokens = gpu_tokens.of_text(tmp_path)
    gpu_tokens.write(tmp_path / "tokens.bin", tokens)
    assert tokens.dtype == torch.uint16
    found = gpu_tokens.read(tmp_path / "tokens.bin").tolist()
    assert found == tokens.tolist()
    assert max(found) == gpu_tokens.VOCABULARY - 1
    assert bytes(found[-6:]) == b" three"


def test_made_tokens_are_the_same_every_time_and_follow_each_other() -> None:
    tokens = gpu_tokens.made(5_000)
    assert torch.equal(tokens.to(torch.int32), gpu_tokens.made(5_000).to(torch.int32))
    pairs = tokens.to(torch.int64)[1:-1].view(-1, 2)
    common = pairs[pairs[:, 0] == 0, 1]
    assert common.bincount().max() > 0.5 * len(common)


def test_a_model_is_trained_by_each_method_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", os.fspath(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu_train", "--device", "cpu", "--quick"])
    gpu_train.main()
    adamw, ours = json.loads((tmp_path / "train.json").read_text())
    assert (adamw["what"], ours["what"]) == ("adamw", "default")
    for row in (adamw, ours):
        assert row["tokens"] > 0 < row["tokens_per_second"]
        assert row["losses"][-1][2] == row["loss"]
    assert ours["state_bytes"] < adamw["state_bytes"] / 4
    assert capsys.readouterr().out.count("a second, at most") == 2


def test_the_model_has_124_million_parameters() -> None:
    with torch.device("meta"):
        model = gpu_train.GPT(gpu_train.FULL)
    assert round(sum(param.numel() for param in model.parameters()) / 1e6) == 124
