"""Shared by all tests: one thread (two workers share two cores), fixed seeds, nothing left behind."""

from __future__ import annotations

import gc
import logging
import os
import shutil
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
    """What would be done again for every test, over all that was imported."""
    # Tests collect garbage: spare them the search through everything, a second each.
    gc.collect()
    gc.freeze()
    # Where a logger does not propagate, pytest adds its handlers to it six times a test; torch has dozens.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True


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


@pytest.fixture(scope="session")
def _shared_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _in_tmp_path(request, _shared_folder) -> Iterator[None]:
    """Trainers write logs and checkpoints into the working directory: it is `tmp_path`, or an empty one like it.

    Most tests write nothing, and removing a folder for each takes milliseconds. So they share one.
    """
    before, own = os.getcwd(), "tmp_path" in request.fixturenames
    os.chdir(request.getfixturevalue("tmp_path") if own else _shared_folder)
    yield
    os.chdir(before)
    for name in os.listdir(_shared_folder):
        left = _shared_folder / name
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


@pytest.fixture(autouse=True)
def _quiet(caplog) -> Iterator[None]:
    caplog.handler.setLevel(logging.WARNING)  # for `set_level` all loggers forget what they have cached
    yield
    if (package := logging.getLogger("lightning_sketch")).level:  # scripts of benchmarks silence it
        package.setLevel(logging.NOTSET)
