"""The package's own structure, read from its source: which file may know which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

import lightning_sketch
from lightning_sketch import Codec

ROOT = Path(lightning_sketch.__file__).parent
#: From what users see down to what everything stands on. A file imports from its own package or from those below.
ORDER = (
    "cli",
    "integrations",
    "memory",
    "estimate",
    "activations",
    "checkpoints",
    "monitor",
    "optimizer",
    "policy",
    "layers",
    "rules",
    "codecs",
    "sharding",
    "kernels",
    "text",
)
#: Where pickles of version 0.1 look for what has moved.
OLD_PLACES = ("lightning_sketch.classes", "lightning_sketch.stock", "lightning_sketch.stock.optimizer")
#: Who may read what is private to a class.
OWN = ("self", "cls")


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(["lightning_sketch", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


MODULES = _modules()


def _imported(tree: ast.Module) -> Iterator[str]:
    """Everything of the package that a file imports, also inside functions and for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_sketch"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


IMPORTS = {name: set(_imported(tree)) for name, tree in MODULES.items()}


def _part(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_down() -> None:
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        if name != "lightning_sketch" and name not in OLD_PLACES
        for other in others
        if other == "lightning_sketch" or ORDER.index(_part(other)) < ORDER.index(_part(name))
    ]
    assert not upwards


def test_there_are_no_circles() -> None:
    left = {name: set(others) for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "each of these imports another one, in a circle or above one"


def test_nobody_asks_for_a_codec_by_its_class() -> None:
    """What a codec can do it says itself, so that one from elsewhere is treated as ours are."""
    asked = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name, tree in MODULES.items()
        if not name.startswith("lightning_sketch.codecs")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass")
        if {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & Codec.registry.keys()
    ]
    assert not asked


def test_nobody_reads_what_is_private_to_another() -> None:
    own = {
        node.name
        for tree in MODULES.values()
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.FunctionDef)
    }
    own |= {
        node.attr
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _owner(node) in OWN
    }
    torchs = {*dir(nn.Module()), *dir(Optimizer)}
    private = {name for name in own if name.startswith("_") and not name.endswith("__") and name not in torchs}
    assert private
    read = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in private and _owner(node) not in (*OWN, "super()")
    ]
    assert not read


def _owner(node: ast.Attribute) -> str:
    return ast.unparse(node.value)
