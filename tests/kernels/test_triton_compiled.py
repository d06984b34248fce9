"""The Triton kernels compiled for GPUs that are not here, in a process of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.kernels.test_triton import run_apart

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_kernels_compile_for_devices_without_spills(tmp_path: Path) -> None:
    print(run_apart("triton_compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)))
