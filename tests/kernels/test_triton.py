"""The Triton kernels in Triton's interpreter, in processes of their own."""

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
    f"triton_{subject}.py"
    for subject in (
        "agreed",
        "bytes",
        "interpreted",
        "left_out",
        "observe",
        "on_device",
        "orders",
        "quantized",
        "repeated",
    )
]


@pytest.mark.parametrize("file", INTERPRETED)
def test_kernels_equal_the_reference_in_the_interpreter(file: str) -> None:
    run_apart(file, TRITON_INTERPRET="1")


def run_apart(file: str, **environment: str) -> str:
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
