"""What the site needs beside mkdocs: pages of the repository's files that the documentation links to, and formulas.

On GitHub a link out of ``docs/`` shows the file. Here the file becomes a page of the site, so the same link works.
Formulas become MathML, which browsers draw by themselves.
"""

from __future__ import annotations

import html
import re
from os.path import dirname, join, normpath, relpath
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".json": "json", "": "bash"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file or folder outside of ``docs/`` that a page links to."""
    waiting = [
        target for file in files.documentation_pages() for target in _outwards(file.content_string, _source(file))
    ]
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(_page_of(path)) is None:
            text = _content(ROOT / path)
            files.append(File.generated(config, _page_of(path), content=text))
            if path.endswith(".md"):
                waiting += _outwards(text, path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links out of ``docs/``, and those of files out there, to the pages of the site."""
    source = _source(page.file)
    if not source.startswith("docs/") and not source.endswith(".md"):
        return markdown

    def on_site(match: re.Match[str]) -> str:
        target = _target(source, match)
        uri = target.removeprefix("docs/") if target.startswith("docs/") else _page_of(target)
        return f"]({relpath(uri, dirname(page.file.src_uri) or '.')}{match['anchor'] or ''})"

    return _LINK.sub(on_site, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML."""
    inline = r'<span class="arithmatex">\\\((.*?)\\\)</span>'
    block = r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>'
    content = re.sub(inline, lambda match: convert(html.unescape(match[1])), content, flags=re.S)
    return re.sub(block, lambda match: convert(html.unescape(match[1]), display="block"), content, flags=re.S)


def _source(file: File) -> str:
    """The path in the repository of what a page shows."""
    uri = file.src_uri
    if not uri.startswith("repository/"):
        return f"docs/{uri}"
    path = uri.removeprefix("repository/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def _page_of(path: str) -> str:
    """``examples/fabric_lm.py`` -> ``repository/examples/fabric_lm.py.md``."""
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _target(source: str, match: re.Match[str]) -> str:
    """The path in the repository that a link of `source` points to."""
    return normpath(join(dirname(source), match["path"]))


def _outwards(text: str, source: str) -> list[str]:
    """Paths outside of ``docs/`` that `text` links to."""
    found = [_target(source, match) for match in _LINK.finditer(text)]
    return [path for path in found if not path.startswith("docs/") and (ROOT / path).exists()]


def _content(path: Path) -> str:
    title = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        names = sorted(
            child.relative_to(path).as_posix() for child in path.rglob("*") if "__pycache__" not in child.parts
        )
        return f"# {title}/\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = path.read_text()
    if path.suffix == ".md":
        return text
    return f"# {title}\n\n````{_LANGUAGES[path.suffix]}\n{text}````\n"
