"""The GPU benchmarks run from a checkout that is not installed, on a machine with torch and little else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).parents[2]
# As where there is no distribution of that name, nor what only installing it brings.
BARE = """
import importlib.metadata, os, runpy, sys
for name in ("yaml", "rich"):
    sys.modules[name] = None
version = importlib.metadata.version
def missing(name):
    if name.replace("_", "-") == "lightning-sketch":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = missing
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
assert sys.modules["lightning_sketch"].__file__.startswith(os.getcwd())
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("checkout")
    for name in ("lightning_sketch", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, where / name, ignore=ignored)
    return where


def test_the_benchmark_runs_from_a_checkout(checkout):
    command = [sys.executable, "-c", BARE, "benchmarks.gpu", "--device", "cpu", "--quick", "--groups", "bandwidth"]
    environment = {**os.environ, "PYTHONPATH": os.fspath(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((checkout / "runs/gpu_quick.json").read_text())["groups"]["bandwidth"]["copy"] > 0


def test_the_check_runs_every_section_and_sums_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", os.fspath(tmp_path / "out"))
    for section in (*gpu_check.SECTIONS, "summary"):
        monkeypatch.setattr(sys, "argv", ["gpu_check", section, "--device", "cpu", "--quick"])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        assert ended.value.code == 0, capsys.readouterr().out
    assert "0 failed" in capsys.readouterr().out.splitlines()[-1]


def test_a_row_that_fails_is_printed_and_counted(tmp_path, capsys):
    for section in gpu_check.SECTIONS:
        rows = [{"what": "AdamW", "kernels": "Triton", "distance": 0.5, "error": "farther"}]
        (tmp_path / f"{section}.json").write_text(json.dumps(rows))
    (tmp_path / "times.json").unlink()
    assert gpu_check.summary(tmp_path) == len(gpu_check.SECTIONS)
    printed = capsys.readouterr().out
    assert "FAILED equal: AdamW: kernels Triton, distance 0.5, error farther" in printed
    assert "FAILED times: nothing was written" in printed


def test_the_script_exits_with_an_error_where_a_section_fails(tmp_path):
    environment = {**os.environ, "OUT": os.fspath(tmp_path), "PYTHON": sys.executable, "SECTIONS": "nothing"}
    done = subprocess.run(
        [ROOT / "benchmarks/gpu_check.sh", "--device", "cpu", "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{len(gpu_check.SECTIONS)} failed" in done.stdout
