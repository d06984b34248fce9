"""The kernels' tests once more, with the kernels compiled under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_sketch.kernels import fields, native

SOURCES = Path(native.__file__).with_name("csrc")
#: Of undefined behaviour all but what the address sanitizer finds anyway, and what takes long to compile.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all"]
SANITIZE += ["-fno-omit-frame-pointer", "-O1", "-g0"]
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-pthread"]
ISAS = {"generic": [], "avx2": ["-mavx2"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]}
CASES = Path(__file__).with_name("sanitized.py")

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or native.library() is None, reason="needs g++ and the compiled kernels"
)


def test_the_kernels_under_sanitizers(tmp_path: Path) -> None:
    # What this processor runs. Other instruction sets take the same ways through memory, and are compared with it bit
    # for bit elsewhere; each takes more than a minute to compile with sanitizers.
    isa = native.ISAS[native.isa()]
    library = compile_with_sanitizers(tmp_path, [isa])
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        native.LIBRARY: str(library),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)],
        env=environment | {native.VARIABLE: isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def compile_with_sanitizers(folder: Path, isas: Sequence[str]) -> Path:
    """The library, with sanitizers in the code of `isas`: what is not run takes minutes to compile with them."""
    objects, compiling = [], []
    (folder / "fields.h").write_text(fields.c_header())
    for name in ("api", "coalesce"):
        objects.append(folder / f"{name}.o")
        command = ["g++", *FLAGS, f"-I{folder}", *SANITIZE, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(objects[-1])]
        compiling.append(subprocess.Popen(command))
    for name in sorted(ISAS, key=lambda name: name not in isas):  # inline functions are taken from the first object
        objects.append(folder / f"{name}.o")
        options = [*(SANITIZE if name in isas else ["-O0"]), *ISAS[name]]
        command = ["g++", *FLAGS, f"-I{folder}", *options, f"-DISA={name}", "-c", str(SOURCES / "steps.cpp")]
        compiling.append(subprocess.Popen([*command, "-o", str(objects[-1])]))
    assert [process.wait() for process in compiling] == [0] * len(compiling)
    library = folder / "_cpu.so"
    subprocess.run(["g++", "-shared", "-pthread", *SANITIZE, *map(str, objects), "-o", str(library)], check=True)
    return library
