"""Checks that collectives never depend on local state.

Local state is hash order, the listing order of a folder, a clock, or the file system of one rank.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "myllm_ray"
ON_EVERY_RANK = sorted(
    [
        *(
            p
            for folder in ("engine", "accelerators", "trainers", "ops", "models", "common")
            for p in (PACKAGE / folder).rglob("*.py")
        ),
        PACKAGE / "worker.py",
        PACKAGE / "dependencies.py",
    ]
)
"""Files whose code runs in a worker, on every rank."""
OUTSIDE = {
    "amendments.py",
    "heartbeat.py",
    "hang_detector.py",
    "run_folder.py",
    "files.py",
    "report.py",
    "remote_store.py",
    "manager.py",
    "verification.py",
    "worker.py",
    "dependencies.py",
    "remote.py",
    "pretrained.py",
    "starting_weights.py",
    "environment.py",
    "jsonl.py",
}
"""Files that may read clocks and files: they run in the driver, in a separate thread, or on rank 0 for all ranks."""
_UNORDERED_CALLS = {"set", "frozenset", "iterdir", "glob", "rglob", "listdir", "scandir", "walk"}
_SET_METHODS = {"union", "intersection", "difference", "symmetric_difference"}
_ORDER_DOES_NOT_MATTER = {"sorted", "set", "frozenset", "len", "any", "all", "min", "max"}
_LOCAL = {"time", "monotonic", "perf_counter", "random", "exists", "is_file", "is_dir", "stat", "getpid", "gethostname"}


def _called(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    return (
        node.func.id
        if isinstance(node.func, ast.Name)
        else node.func.attr
        if isinstance(node.func, ast.Attribute)
        else None
    )


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _set_names(tree: ast.AST) -> set[str]:
    """Returns the names and attributes that are annotated as sets or assigned a set anywhere in the file."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.AnnAssign, ast.arg)) and node.annotation is not None:
            kind = node.annotation.value if isinstance(node.annotation, ast.Subscript) else node.annotation
            if _name(kind) in ("set", "frozenset"):
                names.add(str(node.arg if isinstance(node, ast.arg) else _name(node.target)))
    for node in ast.walk(tree):
        pairs: list[tuple[ast.AST, ast.AST]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += list(zip(target.elts, node.value.elts, strict=True))
                else:
                    pairs.append((target, node.value))
        names |= {str(_name(target)) for target, value in pairs if _name(target) and _unordered(value, names)}
    return names


def _unordered(node: ast.AST, names: set[str]) -> bool:
    """Returns whether an expression is a set or a folder listing."""
    if isinstance(node, (ast.Set, ast.SetComp)) or _name(node) in names or _called(node) in _UNORDERED_CALLS:
        return True
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.Sub, ast.BitXor)):
        return any(_unordered(side, names) or _called(side) == "keys" for side in (node.left, node.right))
    if isinstance(node, ast.IfExp):
        return _unordered(node.body, names) or _unordered(node.orelse, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SET_METHODS:
        return True
    return isinstance(node, ast.GeneratorExp) and any(_unordered(g.iter, names) for g in node.generators)


def unordered_iterations(source: str) -> list[int]:
    """Returns the lines that iterate over a set or a folder listing where the order may matter."""
    tree = ast.parse(source)
    names = _set_names(tree)
    harmless = {
        id(argument) for node in ast.walk(tree) if _called(node) in _ORDER_DOES_NOT_MATTER for argument in node.args
    }  # type: ignore[attr-defined]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            found += [node.lineno] * _unordered(node.iter, names)
        elif isinstance(node, (ast.ListComp, ast.DictComp, ast.GeneratorExp)) and id(node) not in harmless:
            found += [node.lineno] * any(_unordered(g.iter, names) for g in node.generators)
        elif _called(node) in ("list", "tuple", "enumerate", "zip", "iter", "next", "join", "map", "fromkeys"):
            found += [node.lineno] * any(_unordered(a, names) for a in node.args)  # type: ignore[attr-defined]
        elif isinstance(node, (ast.List, ast.Tuple)) and isinstance(node.ctx, ast.Load):
            found += [node.lineno] * any(isinstance(e, ast.Starred) and _unordered(e.value, names) for e in node.elts)
        elif _called(node) == "pop" and not node.args and _name(node.func.value) in names:  # type: ignore[attr-defined]
            found.append(node.lineno)  # type: ignore[attr-defined]
    return sorted(set(found))


def local_decisions(source: str) -> list[int]:
    """Returns the lines that branch on a clock, a random number, a file or a process."""
    tests = [node.test for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.If, ast.While, ast.IfExp))]
    return sorted({test.lineno for test in tests for node in ast.walk(test) if _called(node) in _LOCAL})


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("for name in {'preempt', 'abort'} & self._agreed:\n    pass", [1]),
        ("def f(self):\n    self._agreed: set[str] = set()\n    for n in self._agreed:\n        pass", [3]),
        ("names = {p.name for p in x}\nfirst = next(iter(names))", [2]),
        ("a, b = 1, set(x)\nc = [y for y in b]", [2]),
        ("kinds = {1: 2}.keys() - {3}\nfor k in kinds:\n    pass", [2]),
        ("for p in folder.glob('*'):\n    pass", [1]),
        ("x = [*{1, 2}]\ny = list(a.union(b))\nz = ', '.join({'a'})", [1, 2, 3]),
        ("def f(names: frozenset[str]):\n    return {n: 0 for n in names}", [2]),
        ("seen = set()\none = seen.pop()", [2]),
        ("for n in sorted({1, 2}):\n    pass\nbest = max(x for x in {1, 2})\nother = {n for n in {1, 2}}", []),
        ("known = set(x)\nif name in known:\n    pass", []),
        ("files = sorted(p for p in folder.iterdir() if p.is_file())", []),
    ],
)
def test_the_check_detects_unordered_iterations(code: str, lines: list[int]) -> None:
    assert unordered_iterations(code) == lines


def test_no_iteration_in_an_order_that_differs_between_ranks() -> None:
    found = [f"{p.relative_to(ROOT)}:{line}" for p in ON_EVERY_RANK for line in unordered_iterations(p.read_text())]
    assert found == [], "iterate over sorted(...), or over a tuple in order of priority"


def test_no_branch_on_what_only_one_rank_sees() -> None:
    assert local_decisions("if path.exists() or time.monotonic() > until:\n    pass") == [1]
    found = [f"{p.relative_to(ROOT)}:{line}" for p in _deciding() for line in local_decisions(p.read_text())]
    assert found == [], "let rank 0 look, and give its answer to all ranks: distributed.from_main"


def _deciding() -> list[Path]:
    # Trackers run on rank 0 and in processes of their own; they make no request and enter no collective.
    return [p for p in ON_EVERY_RANK if p.parent.name not in ("models", "trackers") and p.name not in OUTSIDE]
