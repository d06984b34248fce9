"""What is distributed: what is in it, which of it pip takes, and that it trains where there is no compiler."""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples/demo"
KERNELS = "lightning_sketch/kernels/_cpu.so"
STEPS = 10
#: What setup.py is made of.
SETUP = runpy.run_path(str(ROOT / "setup.py"))


@dataclass
class Built:
    source: Path  # distribution
    compiled: Path  # wheel
    pure: Path  # wheel, of a machine without a compiler
    asked: Path  # the same, asked for on a machine that has one


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    """What ``python -m build`` makes: a source distribution of the tree, and wheels of the source distribution."""
    with tempfile.TemporaryDirectory() as folder:
        tree, dist = Path(folder, "tree"), Path(folder, "dist")
        tree.mkdir()
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        for name in ("lightning_sketch", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        source = build("build_sdist", tree, dist)
        made = []
        for name, variables in (
            # Without optimizations, in half the time: the same steps, and the same symbols.
            ("compiled", {"LIGHTNING_SKETCH_REQUIRE_KERNELS": "1", "LIGHTNING_SKETCH_CXXFLAGS": "-O0"}),
            ("pure", {"PATH": no_compiler(Path(folder))}),
            ("asked", {"LIGHTNING_SKETCH_NO_KERNELS": "1"}),
        ):
            shutil.unpack_archive(source, Path(folder, name))
            (unpacked,) = Path(folder, name).iterdir()
            made.append(build("build_wheel", unpacked, Path(folder, f"{name}-wheel"), **variables))
        yield Built(source, *made)


def build(hook: str, tree: Path, into: Path, **variables: str) -> Path:
    """Call a hook of the package's build backend, as pip and build do, in this environment: nothing is downloaded."""
    into.mkdir()
    code = f"import sys, setuptools.build_meta; print('made', setuptools.build_meta.{hook}(sys.argv[1]))"
    return into / run(sys.executable, "-c", code, into, cwd=tree, **variables).split("made ")[-1].strip()


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints, away from this clone and from how it is set up for tests."""
    ours = ("PYTHONPATH", "LIGHTNING_SKETCH_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | {"OMP_NUM_THREADS": "1"} | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def no_compiler(folder: Path) -> str:
    """A PATH without anything."""
    (folder / "empty").mkdir(exist_ok=True)
    return str(folder / "empty")


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_source_distribution_has_what_a_build_needs_and_no_tests(built: Built) -> None:
    with tarfile.open(built.source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_sketch").rglob("*.*")}
    assert {name for name in package if name.endswith((".py", ".cpp", ".h", ".typed"))} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".so")]


def test_wheels_have_the_package_alone(built: Built) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_sketch").rglob("*.py")}
    expected = {*modules, "lightning_sketch/py.typed"}
    for wheel, more in ((built.compiled, {KERNELS}), (built.pure, set()), (built.asked, set())):
        assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected | more, wheel.name


def test_a_wheel_without_kernels_is_for_any_platform(built: Built) -> None:
    for wheel in (built.pure, built.asked):
        assert wheel.name.endswith("-py3-none-any.whl")


def test_kernels_are_tagged_by_the_symbols_that_they_need(built: Built, tmp_path: Path) -> None:
    found = re.search(r"-py3-none-manylinux_(\d+)_(\d+)_(\w+)\.whl$", built.compiled.name)
    assert found, built.compiled.name
    assert found[3] == platform.machine()
    with zipfile.ZipFile(built.compiled) as archive:
        library = Path(archive.extract(KERNELS, tmp_path))
    needed: dict[str, set[tuple[int, ...]]] = {}
    for name, version in re.findall(r"\((\w+)_([\d.]+)\)", run("objdump", "-T", library)):
        needed.setdefault(name, set()).add(tuple(map(int, version.split("."))))
    assert SETUP["symbol_versions"](library) == {name: max(versions) for name, versions in needed.items()}
    assert max(needed["GLIBC"]) <= (int(found[1]), int(found[2]))


def test_a_tag_is_the_oldest_that_the_symbols_allow_and_this_machine_has() -> None:
    tag = SETUP["manylinux"]
    assert tag("linux_x86_64", {"GLIBC": (2, 14), "GLIBCXX": (3, 4, 22)}) == "manylinux_2_28_x86_64"
    assert tag("linux_aarch64", {"GLIBC": (2, 17), "CXXABI": (1, 3, 11)}) == "manylinux_2_28_aarch64"
    assert tag("linux_x86_64", {"GLIBC": (2, 99)}) == "linux_x86_64"
    assert tag("linux_x86_64", {"GLIBCXX": (3, 5)}) == "linux_x86_64"


def test_a_tag_that_is_asked_for_and_older_than_the_symbols_is_refused() -> None:
    tag = SETUP["manylinux"]
    assert tag("manylinux_2_34_x86_64", {"GLIBCXX": (3, 4, 29)}) == "manylinux_2_34_x86_64"
    with pytest.raises(SystemExit, match=r"not a wheel for manylinux_2_28_x86_64: its kernels need GLIBCXX_3\.4\.29"):
        tag("manylinux_2_28_x86_64", {"GLIBCXX": (3, 4, 29)})


def test_pip_takes_the_wheel_with_kernels_where_it_fits_and_the_other_elsewhere(built: Built, tmp_path: Path) -> None:
    def taken(*options: str) -> str:
        found = [f"--find-links={file.parent}" for file in (built.source, built.compiled, built.pure)]
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        command = [sys.executable, "-m", "pip", "download", "--no-index", "--no-deps", *found, *options]
        run(*command, f"--dest={folder}", "lightning-sketch")
        (file,) = folder.iterdir()
        return file.name

    elsewhere = ("macosx_14_0_arm64", "win_amd64", "manylinux_2_17_x86_64", "manylinux_2_17_aarch64")
    assert taken() == built.compiled.name
    assert taken("--only-binary=:all:", *(f"--platform={name}" for name in elsewhere)) == built.pure.name


class Environment:
    """A fresh virtual environment with a wheel in it. What the package depends on comes from this environment."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        python = folder / "bin/python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
        packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # A line of a .pth file is a place to look in; .pth files that lie there, such as that of a clone, are not read.
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(self, command: str, *arguments: str | Path) -> str:
        return run(self.folder / "bin" / command, *arguments, cwd=self.folder, PATH=str(self.folder / "bin"))


def test_ten_steps_of_the_demo_without_a_compiler(built: Built, tmp_path: Path) -> None:
    """As the demo is: on PyTorch's own source, twice, but with a small model."""
    compiled, pure = Environment(tmp_path / "compiled", built.compiled), Environment(tmp_path / "pure", built.pure)
    for environment in (compiled, pure):
        commands = {path.name for path in (environment.folder / "bin").iterdir()}
        assert commands.isdisjoint({"cc", "c++", "gcc", "g++", "clang", "clang++"})
        where = "from importlib.util import find_spec; print(find_spec('lightning_sketch').origin)"
        assert environment.folder in Path(environment.run("python", "-c", where)).parents
    assert "compiled, " in compiled.run("lightning-sketch", "doctor")
    assert "the kernels are not compiled" in pure.run("lightning-sketch", "doctor")

    demo = tmp_path / "demo"
    printed = compiled.run("python", DEMO / "run.py", "--fast", f"--steps={STEPS}", "--out", demo)
    assert "perplexity" in printed
    results = json.loads((demo / "results.json").read_text())
    plain, compressed = results["as_it_is"], results["compressed"]
    assert compressed["bytes"]["parameters"] == plain["bytes"]["parameters"]
    assert compressed["bytes"]["optimizer_state"] < plain["bytes"]["optimizer_state"] / 5
    assert len(compressed["train_loss"]) == len(plain["train_loss"]) == results["settings"]["steps"] == STEPS
    assert compressed["train_loss"][-1] < compressed["train_loss"][0]
    assert (demo / "report.png").read_bytes().startswith(b"\x89PNG")

    options = ["--cache", demo / "corpus", "--result", demo / "pure.json", "--compressed"]
    pure.run("python", DEMO / "train.py", json.dumps(results["settings"]), *options)
    again = json.loads((demo / "pure.json").read_text())
    assert again["bytes"]["optimizer_state"] == compressed["bytes"]["optimizer_state"]
    assert again["train_loss"] == pytest.approx(compressed["train_loss"], rel=1e-5)
