"""Compiles the CPU kernels, as a part of building the package.

They are a plain shared library that knows neither Python nor torch, so one wheel serves all versions of both. Where
there is no C++ compiler the package is built without them, and every step is done in plain PyTorch.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "lightning_sketch/kernels/csrc"
#: What the structures are made from, which C and Python share.
FIELDS = "lightning_sketch/kernels/fields.py"
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    # No fused multiply-adds: the same bits on every processor.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
#: What is compiled once, for any processor.
COMMON = ("api.cpp", "coalesce.cpp")
#: Every instruction set that steps.cpp is compiled for; one is chosen when the library is loaded.
ISAS = {"generic": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {
        "avx2": "-mavx2",
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512",
    }


class BuildKernels(build_ext):
    """Compiles ``steps.cpp`` once for each instruction set."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile(ext)
        except Exception as error:  # setuptools has one exception for every compiler
            if os.environ.get("LIGHTNING_SKETCH_REQUIRE_KERNELS"):
                raise
            print(f"warning: lightning_sketch is built without compiled kernels: {error}", file=sys.stderr)

    def _compile(self, ext: Extension) -> None:
        extra = os.environ.get("LIGHTNING_SKETCH_CXXFLAGS", "").split()
        made = Path(self.build_temp, "include", "fields.h")
        header = runpy.run_path(FIELDS)["c_header"]()
        if not made.exists() or made.read_text() != header:
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(header)
        include = [str(made.parent)]
        objects = []
        for name, options in ISAS.items():
            objects += self.compiler.compile(
                [f"{SOURCES}/steps.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                macros=[("ISA", name)],
                include_dirs=include,
                extra_postargs=[*FLAGS, *options.split(), *extra],
                depends=ext.depends,
            )
        objects += self.compiler.compile(
            [f"{SOURCES}/{name}" for name in COMMON],
            output_dir=self.build_temp,
            include_dirs=include,
            extra_postargs=[*FLAGS, *extra],
            depends=ext.depends,
        )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread", *extra],
            target_lang="c++",
        )

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in it: it is loaded by ctypes


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


headers = [FIELDS, *(f"{SOURCES}/{name}" for name in sorted(os.listdir(SOURCES)) if name.endswith(".h"))]
commands: dict[str, Any] = {"build_ext": BuildKernels, "bdist_wheel": Wheel}
setup(
    ext_modules=[Extension("lightning_sketch.kernels._cpu", [f"{SOURCES}/{name}" for name in COMMON], depends=headers)],
    cmdclass=commands,
)
