"""Importing is cheap and leaves things alone; the package is typed; the linters are content."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_sketch

ROOT = Path(lightning_sketch.__file__).parent.parent
#: Optional, slow to import, or both.
OPTIONAL = {"accelerate", "deepspeed", "lightning", "pytorch_lightning", "rich", "transformers", "triton"}


#: One interpreter for all questions: importing torch takes seconds. What torch itself imports does not count.
SCRIPT = f"""
import sys, torch
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks
torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).step()
known = set(sys.modules)
def tell(when):
    print(when, len(hooks), *sorted({OPTIONAL} & {{name.split(".")[0] for name in set(sys.modules) - known}}))
import lightning_sketch as ls
tell("imported")
model = torch.nn.Embedding(20_000, 4)
optimizer = ls.compress(torch.optim.AdamW(model.parameters()), model)
model(torch.tensor([1, 2])).sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
ls.compress(torch.optim.AdamW(model.parameters()), model)
ls.report(optimizer), ls.plan(model, ls.decompress(optimizer))
tell("used")
print("CUDA", torch.cuda.is_initialized())
assert ls.OptimizerStateCompression is ls.integrations.lightning.OptimizerStateCompression
tell("asked")
"""


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)


def test_optional_packages_are_imported_when_asked_for_and_cuda_and_torch_s_hooks_are_left_alone():
    done = run("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    imported, used, cuda, asked = done.stdout.splitlines()
    assert (imported, used, cuda) == (
        "imported 0",
        "used 1",
        "CUDA False",
    )
    assert "lightning" in asked.split()


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'lightning_sketch' has no attribute 'compres'"):
        _ = lightning_sketch.compres


def test_everything_public_exists_and_is_documented():
    for name in lightning_sketch.__all__:
        assert getattr(lightning_sketch, name).__doc__, name


def test_the_version_is_that_of_the_distribution():
    assert lightning_sketch.__version__ == importlib.metadata.version("lightning-sketch")


def test_the_package_is_typed():
    assert (Path(lightning_sketch.__file__).parent / "py.typed").exists()
    done = run("-m", "mypy", "--no-error-summary")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_is_content():
    done = run("-m", "ruff", "check", "--no-cache", "lightning_sketch", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
