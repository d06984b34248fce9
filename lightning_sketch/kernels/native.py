"""The compiled CPU kernels: a shared library behind a plain C interface, found beside this file."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from lightning_sketch.kernels import fields

#: Set to "reference" to have every step done in plain PyTorch, or to "generic", "avx2" or "avx512" for kernels of that
#: instruction set. By default the best that the processor has, and Triton's on CUDA devices.
VARIABLE = "LIGHTNING_SKETCH_KERNELS"
#: Path of another build of the library, for tests with sanitizers.
LIBRARY = "LIGHTNING_SKETCH_CPU_LIBRARY"

ISAS = ("generic", "avx2", "avx512")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or ``None`` if it was not built or is switched off (`why_not` says why)."""
    if why_not():
        return None
    found = ctypes.CDLL(str(_path()))
    found.lightning_sketch_scratch.restype = ctypes.c_int64
    found.lightning_sketch_sort_ids.restype = ctypes.c_int64
    return found


@functools.cache
def why_not() -> str | None:
    """Why there are no compiled kernels, or ``None`` if there are.

    Raises:
        ValueError: the environment variable has an unknown value.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference", *ISAS):
        raise ValueError(f"{VARIABLE}={wanted!r}: must be reference, generic, avx2 or avx512")
    if wanted == "reference":
        return f"switched off by {VARIABLE}=reference"
    if not _path().exists():
        return "not compiled when lightning_sketch was installed (is there a C++ compiler?)"
    try:
        found = ctypes.CDLL(str(_path()))
    except OSError as error:
        return f"could not be loaded: {error}"
    version = getattr(found, "lightning_sketch_version", None)
    if version is None or version() != fields.version():
        return "compiled for another version of lightning_sketch: install it again"
    return None


@functools.cache
def isa() -> int:
    """Which instruction set is used, as a position in `ISAS`.

    Raises:
        RuntimeError: the one asked for is not this processor's.
    """
    found = library()
    assert found is not None
    best: int = found.lightning_sketch_isa()
    wanted = os.environ.get(VARIABLE) or ISAS[best]
    if ISAS.index(wanted) > best:
        raise RuntimeError(f"{VARIABLE}={wanted}: this processor has {ISAS[best]} at best")
    return ISAS.index(wanted)


def wants_reference() -> bool:
    """Whether every step is to be done in plain PyTorch."""
    return os.environ.get(VARIABLE) == "reference"


def describe() -> str:
    """What does the steps on the CPU, in words for a report."""
    missing = why_not()
    return f"plain PyTorch; kernels {missing}" if missing else f"compiled, {ISAS[isa()]}"


@functools.cache
def gomp_parallel() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded: its threads are shared.

    Without one (macOS, Windows) threads are started for each call.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for line in maps.splitlines():
        path = line.split(maxsplit=5)[-1]
        if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")):
            function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value
    return None


def _path() -> Path:
    return Path(os.environ.get(LIBRARY) or Path(__file__).with_name("_cpu.so"))
