"""Which modules are searched for tests and doctests, and which files come first."""

import importlib.util
from pathlib import Path

import pytest

# They import triton, which is optional.
TRITON = ["lightning_sketch/kernels/triton/*", "tests/kernels/triton_*.py"]
collect_ignore_glob = [] if importlib.util.find_spec("triton") else TRITON

#: Files that take half a minute or more: where files are divided over workers, the others fill up beside them.
LONGEST = (
    "test_triton.py",
    "test_triton_compiled.py",
    "test_sanitizers.py",
    "test_distribution.py",
    "test_restore.py",
    "test_examples.py",
    "test_killed_saves.py",
    "test_training.py",
    "test_accelerate_deepspeed.py",
    "test_lightning_deepspeed.py",
    "test_shared_states.py",
    "test_transformers_ddp.py",
    "test_streaming.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, whatever the number of their tests."""

    def order(item: pytest.Item) -> int:
        name = Path(item.path).name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=order)
