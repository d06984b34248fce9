"""Shared by all tests: one thread (two workers share two cores), fixed seeds, nothing left behind."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a CUDA device are collected everywhere, and run where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_collection_finish() -> None:
    """Tests collect garbage: spare them the search through all that was imported and collected, a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # by itself: where no device is in use, torch writes down the whole stack for each kind, milliseconds a test
        torch.default_generator.manual_seed(0)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder that ends with the test. pytest's own keeps those of all tests, and lists them for each new one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch) -> None:
    """Trainers write logs and checkpoints into the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _quiet(caplog) -> None:
    caplog.set_level(logging.WARNING)
