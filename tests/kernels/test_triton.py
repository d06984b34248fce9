"""The Triton kernels, in processes of their own: in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

HERE = Path(__file__).parent
LIMIT = 1800  # seconds: each takes one to ten minutes
INTERPRETED = [
    f"triton_{subject}.py" for subject in ("interpreted", "left_out", "on_device", "orders", "quantized", "repeated")
]


@pytest.mark.parametrize("file", INTERPRETED)
def test_kernels_equal_the_reference_in_the_interpreter(file: str) -> None:
    _pytest(file, TRITON_INTERPRET="1")


def test_kernels_compile_for_devices_without_spills(tmp_path: Path) -> None:
    print(_pytest("triton_compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)))


def _pytest(file: str, **environment: str) -> str:
    """Run the tests of a file, and return what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout
