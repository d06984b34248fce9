"""``lightning-sketch doctor`` says what does the steps, and what to do about what is slow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lightning_sketch.cli import main
from lightning_sketch.kernels import native


def run(**environment):
    code = "import sys; from lightning_sketch.cli import main; sys.exit(main(['doctor']))"
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return process.stdout


def test_versions_and_kernels(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert native.describe() in text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (native.VARIABLE, "reference", f"{native.VARIABLE}=reference switches all kernels off: unset it"),
        (native.LIBRARY, "/nowhere/library.so", "With a C++ compiler (g++ or clang++) install the package again"),
    ],
)
def test_what_is_slow_comes_with_a_remedy(variable, value, message):
    assert message in run(**{variable: value})


def test_nothing_slow_is_said_in_a_sentence():
    if native.why_not() is None and native.ISAS[native.isa()] != "generic" and not torch.cuda.is_available():
        assert "Nothing is slow here." in run()
