"""The documentation builds as a site without a warning, names everything public, and quotes what is in the source."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning_sketch
from tests.docs_code import ROOT

DOCS = ROOT / "docs"


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(
        [*command, "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "site/index.html").exists()


def test_the_api_pages_have_every_public_name():
    pages = [path.read_text().splitlines() for path in DOCS.joinpath("api").glob("*.md")]
    shown = {line for page in pages for line in page if line.startswith("::: ")}
    source = ast.parse(Path(lightning_sketch.__file__).read_text())
    imports = (statement for statement in ast.walk(source) if isinstance(statement, ast.ImportFrom))
    on_demand = {name.asname for statement in imports for name in statement.names if name.asname}
    assert "OptimizerStateCompression" in on_demand
    public = {*lightning_sketch.__all__, *on_demand}
    assert {f"::: lightning_sketch.{name}" for name in public} <= shown


def test_quoted_messages_are_in_the_source():
    messages = re.findall(r"(?m)^\| `(.+?)` \| ", DOCS.joinpath("troubleshooting.md").read_text())
    source = list(_texts())
    assert len(messages) > 40
    assert [message for message in messages if not any(_one_line(message) in text for text in source)] == []


def _texts() -> Iterator[str]:
    """Every text in the package, on one line, with an ellipsis for what is put in."""
    for path in ROOT.joinpath("lightning_sketch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield _one_line("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield _one_line(re.sub(r"\{\}|%s", "…", node.value))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_readme_is_short_and_has_the_table_of_the_home_page():
    readme, home = ROOT.joinpath("README.md").read_text(), DOCS.joinpath("index.md").read_text()
    assert len(readme.splitlines()) <= 120
    assert _frontier(readme) == _frontier(home)
    assert "make test" in readme
    assert "make test" in ROOT.joinpath(".ci/run").read_text()


def test_the_figures_of_that_table_are_those_of_the_quality_page():
    quality = DOCS.joinpath("quality.md").read_text()
    perplexities = [float(found) for found in re.findall(r"\| (\d+\.\d\d) \(", quality)]
    states = set(re.findall(r"\| (1(?:/[\d.,]+)?) \|", quality))
    for row in _frontier(ROOT.joinpath("README.md").read_text())[2:]:
        _, *figures = [cell.strip() for cell in row.strip("|").split("|")]
        assert {*figures[::2]} <= states | {""}
        for figure in filter(None, figures[1::2]):  # rounded twice, at most
            assert min(abs(float(figure) - found) for found in perplexities) < 0.051


def _frontier(page: str) -> list[str]:
    """Rows of the table of states and perplexities."""
    return page.split("<!-- frontier -->")[1].strip().splitlines()
