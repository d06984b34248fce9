"""Compiles the CPU kernels, as a part of building the package, and says where the wheel can be installed.

They are a plain shared library that knows neither Python nor torch, so one wheel serves all versions of both. Where
there is no C++ compiler the package is built without them, for any platform, and every step is done in plain PyTorch.
"""

from __future__ import annotations

import os
import platform
import re
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
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512",
    }
#: Which versions of glibc's and GCC's symbols libraries may need under each manylinux tag: auditwheel's table, but for
#: tags older than torch's own and those that allow no more than the one before.
MANYLINUX = {
    (2, 28): {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    (2, 34): {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    (2, 39): {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
}
Version = tuple[int, ...]


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
    """One wheel for all Pythons: for a platform if it has kernels, for any if not."""

    library: Path | None = None  # the kernels, once they are compiled

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        self.library = next(Path(self.get_finalized_command("build").build_lib).rglob("_cpu.so"), None)
        if self.library is None:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        machine = super().get_tag()[2]
        if self.library is not None and machine.startswith(("linux_", "manylinux_")):
            machine = manylinux(machine, symbol_versions(self.library))
        return "py3", "none", machine


def manylinux(machine: str, needed: dict[str, Version]) -> str:
    """The oldest manylinux that a library's symbols allow, and never one that this machine itself is not.

    Args:
        machine: ``linux_x86_64``; or the tag asked for by ``--plat-name``, which is checked.
        needed: what `symbol_versions` found.

    Raises:
        SystemExit: the library needs newer symbols than the tag asked for allows.
    """
    oldest = next((glibc for glibc, allowed in MANYLINUX.items() if fits(needed, allowed)), None)
    asked = re.match(r"manylinux_(\d+)_(\d+)_", machine)
    if asked and (oldest is None or oldest > tuple(map(int, asked.groups()))):
        newest = ", ".join(f"{name}_{'.'.join(map(str, version))}" for name, version in needed.items())
        raise SystemExit(f"not a wheel for {machine}: its kernels need {newest}")
    if asked or oldest is None or oldest > own_glibc():
        return machine
    return machine.replace("linux", "manylinux_{}_{}".format(*oldest))


def symbol_versions(library: Path) -> dict[str, Version]:
    """The newest versions of symbols that a library needs, by whose they are."""
    # They are strings in it: to read a few more than it needs would be on the safe side.
    found = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)(?=\0)", library.read_bytes())
    newest: dict[str, Version] = {}
    for name, numbers in found:
        version = tuple(map(int, numbers.split(b".")))
        newest[name.decode()] = max(version, newest.get(name.decode(), version))
    return newest


def fits(needed: dict[str, Version], allowed: dict[str, Version]) -> bool:
    return all(version <= allowed[library] for library, version in needed.items())


def own_glibc() -> Version:
    """Version of this machine's glibc; (0, 0) where the C library is another."""
    name, version = platform.libc_ver()
    return tuple(map(int, version.split(".")[:2])) if name == "glibc" else (0, 0)


def kernels() -> Extension:
    headers = (f"{SOURCES}/{name}" for name in sorted(os.listdir(SOURCES)) if name.endswith(".h"))
    return Extension(
        "lightning_sketch.kernels._cpu", [f"{SOURCES}/{name}" for name in COMMON], depends=[FIELDS, *headers]
    )


if __name__ == "__main__":  # so it is for every builder
    without = os.environ.get("LIGHTNING_SKETCH_NO_KERNELS")
    commands: dict[str, Any] = {"build_ext": BuildKernels, "bdist_wheel": Wheel}
    setup(ext_modules=[] if without else [kernels()], cmdclass=commands)
