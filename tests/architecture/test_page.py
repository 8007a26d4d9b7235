"""docs/architecture.md names files, definitions and layers that exist."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "myllm_ray"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
_REFERENCE = re.compile(r"`([\w./]+\.py)(?::([\w.]+))?`")
_FOLDER = re.compile(r"`([a-z_]+(?:/[a-z_]+)*/)`")
_FENCE = re.compile(r"^```text\n(.*?)^```$", re.S | re.M)


def references() -> list[tuple[str, str | None]]:
    """Returns the pairs (file, definition or None) that the page names in backticks, such as `a/b.py:Class.method`."""
    return sorted({(path, name or None) for path, name in _REFERENCE.findall(PAGE)}, key=str)


def located(path: str) -> Path | None:
    """Returns the file or folder of a path that is relative to the package or to the repository, or None."""
    return next((base / path for base in (PACKAGE, ROOT) if (base / path).exists()), None)


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Yields the names that a module or a class defines, dotted within classes: `Class`, `Class.method`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@cache
def names_in(path: Path) -> frozenset[str]:
    return frozenset(definitions(ast.parse(path.read_text()).body))


def test_the_page_names_enough_to_check() -> None:
    assert len(references()) > 80
    assert sum(name is not None for _, name in references()) > 50


@pytest.mark.parametrize(("path", "name"), references())
def test_every_file_and_definition_on_the_page_exists(path: str, name: str | None) -> None:
    file = located(path)
    assert file is not None, f"docs/architecture.md: there is no {path}"
    assert name is None or name in names_in(file), f"docs/architecture.md: {path} does not define {name}"


@pytest.mark.parametrize("folder", sorted(set(_FOLDER.findall(PAGE))))
def test_every_folder_on_the_page_exists(folder: str) -> None:
    assert located(folder) is not None


def test_no_reference_lacks_its_file_in_backticks() -> None:
    """A name after the colon that the pattern does not match would not be checked."""
    spans = re.findall(r"`([^`\n]*\.py:[^`\n]*)`", PAGE)
    assert spans
    assert [span for span in spans if not _REFERENCE.fullmatch(f"`{span}`")] == []


def test_the_picture_shows_the_layers_that_import_linter_checks() -> None:
    picture = _FENCE.search(PAGE)
    assert picture is not None
    shown = []
    for line in picture[1].splitlines():
        if line and not line.startswith(" "):
            names = re.split(r"\s{2,}", line)[0].split(" | ")
            shown.append({n.removesuffix("/").removesuffix(".py") for n in names if (PACKAGE / n).exists()})
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert shown == [{name.removeprefix("myllm_ray.") for name in layer.split(" | ")} for layer in layers]


def test_no_line_of_prose_is_longer_than_120_characters() -> None:
    assert [line for line in PAGE.splitlines() if len(line) > 120 and line[:1] != "|"] == []
