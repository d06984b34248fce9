"""``lightning-sketch doctor``: say what steps compressed layers on this machine, what is slow here, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

import torch

from lightning_sketch.kernels import describe, fused_kernel, native
from lightning_sketch.text import table

#: Trainers and engines that the package works with, if they are installed.
BESIDE = ("lightning", "pytorch-lightning", "accelerate", "transformers", "deepspeed", "triton")


def add_options(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> str:
    """Versions, devices, and what to do about what is slow."""
    found = table("lightning_sketch on this machine", ("what", "found"), [*_versions(), None, *_devices()])
    advice = list(_advice())
    return "\n".join([found, "", *(advice or ["Nothing is slow here."])])


def _versions() -> Iterator[tuple[str, str]]:
    yield "lightning_sketch", _version("lightning-sketch")
    yield "Python", platform.python_version()
    yield "torch", torch.__version__
    for name in BESIDE:
        yield name, _version(name)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    yield "steps on cpu", describe(torch.device("cpu"))
    for kind, name in _accelerators():
        yield f"steps on {kind}", f"{describe(torch.device(kind))} ({name})"


def _accelerators() -> Iterator[tuple[str, str]]:
    """Kind and name of the accelerators here."""
    if torch.cuda.is_available():
        yield "cuda", torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        yield "mps", platform.processor()
    if torch.xpu.is_available():
        yield "xpu", torch.xpu.get_device_name()


def _advice() -> Iterator[str]:
    missing = native.why_not()
    if native.wants_reference():
        yield f"- {native.VARIABLE}=reference switches all kernels off: unset it."
    elif missing:
        yield (
            f"- On the CPU every step is done in plain PyTorch, several times as slowly: the kernels are {missing}. "
            "With a C++ compiler (g++ or clang++) install the package again, from a clone or with "
            "--no-binary lightning-sketch."
        )
    elif native.ISAS[native.isa()] == "generic":
        yield "- This processor has neither AVX2 nor AVX-512: the kernels use vectors of 16 bytes."
    for kind, _ in _accelerators():
        if fused_kernel(torch.device(kind)) is None and not native.wants_reference():
            remedy = (
                "install Triton, which torch with CUDA brings" if kind == "cuda" else "there are no kernels for it yet"
            )
            yield f"- On {kind} steps are done in plain PyTorch, in hundreds of launches: {remedy}."
