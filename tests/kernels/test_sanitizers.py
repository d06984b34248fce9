"""The kernels' tests once more, with the kernels compiled under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sketch.kernels import fields, native

SOURCES = Path(native.__file__).with_name("csrc")
#: Of undefined behaviour all but what the address sanitizer finds anyway, and what takes long to compile. Accesses are
#: checked by calls, and functions that are always inlined elsewhere are not: else it compiles three times as long.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all"]
SANITIZE += ["--param", "asan-instrumentation-with-call-threshold=0", "-Dalways_inline=unused"]
SANITIZE += ["-fno-omit-frame-pointer", "-O1", "-g0"]
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-pthread"]
ISAS = {"generic": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]}
CASES = Path(__file__).with_name("sanitized.py")

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or native.library() is None, reason="needs g++ and the compiled kernels"
)


def test_the_kernels_under_sanitizers(tmp_path: Path) -> None:
    # What this processor runs. Other instruction sets take the same ways through memory, and are compared with it bit
    # for bit elsewhere.
    isa = native.ISAS[native.isa()]
    library = compile_with_sanitizers(tmp_path, isa)
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


def compile_with_sanitizers(folder: Path, isa: str) -> Path:
    """The library, with the code of one instruction set: no step finds functions of another."""
    (folder / "fields.h").write_text(fields.c_header())
    others = "".join(f"extern const Steps steps_{name} = {{}};\n" for name in ISAS if name != isa)
    (folder / "others.cpp").write_text(f'#include "steps.h"\n{others}')
    sources = [*(SOURCES / f"{name}.cpp" for name in ("steps", "api", "coalesce")), folder / "others.cpp"]
    compiling = [["g++", *FLAGS, *SANITIZE, f"-I{folder}", f"-I{SOURCES}", "-c", str(source)] for source in sources]
    compiling[0] += [f"-DISA={isa}", *ISAS[isa]]
    assert [process.wait() for process in [subprocess.Popen(each, cwd=folder) for each in compiling]] == [0] * 4
    library = folder / "_cpu.so"
    objects = [str(folder / source.with_suffix(".o").name) for source in sources]
    subprocess.run(["g++", "-shared", "-pthread", *SANITIZE, *objects, "-o", str(library)], check=True)
    return library
