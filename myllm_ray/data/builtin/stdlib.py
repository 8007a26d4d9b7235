"""The standard library of the running Python as a data source. Provides real text without a download."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "ensurepip",
    "pydoc_data",
    "encodings",
    "turtledemo",
}


def files() -> list[str]:
    """Returns the sorted paths of the library's `.py` files, without tests, data tables and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in root.rglob("*.py") if not _LEFT_OUT.intersection(p.relative_to(root).parts)]
    return [str(p) for p in sorted(found) if not p.name.startswith("_sysconfigdata")]


def text(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the content of one file as `text`. Empty files are skipped."""
    content = _read(path)
    if content.strip():
        yield path, {"text": content}


def functions(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each function with a docstring: signature and docstring as `prompt`, the body as `completion`.

    Files that the running Python can't parse are skipped.
    """
    content = _read(path)
    try:
        tree = ast.parse(content)
    except SyntaxError:
        return
    lines = content.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not ast.get_docstring(node):
            continue
        if len(node.body) < 2:  # only a docstring: nothing to complete
            continue
        doc_end = node.body[0].end_lineno or 0
        if node.body[1].lineno <= doc_end:  # `"""doc"""; return 1` on one line
            continue
        prompt = "".join(lines[node.lineno - 1 : doc_end])
        body = "".join(lines[doc_end : node.end_lineno])
        if body.strip():
            yield f"{path}:{node.lineno}", {"prompt": prompt, "completion": body, "name": node.name}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return Path(path).read_text(encoding="latin-1")
