"""Phrases and names that must not return: the prose is plain technical English, and the names are the field's."""

from __future__ import annotations

import re
import subprocess

from conftest import ROOT

PHRASES = [
    r"for ever\b",
    r"\bstands? (in|at|for|once|beside|there|on)\b",
    r"\b(goes|go|going|went|gone) on\b",
    r"\b(is|are|was|were|be|been) told\b",
    r"\btells? (of|that|how|what|which|whether)\b",
    r"\bhouse\b",
    r"(?<!\.)\bfloors?\b(?!\()",
    r"\bknobs?\b",
    r"\bnumbers? that (is|are) none\b",
    r"\bso-manieth\b",
    r"\bof one's own\b",
    r"\bof the user's own\b",
    r"\bwired by hand\b",
    r"\bbegins? anew\b",
    r"\b(at|of) this moment\b",
    r"\btorso\b",
    r"\bgets? to know\b",
    r"\bnobody\b",
    r"\bsomebody\b",
    r"\bits? affair\b",
    r"\bwhere there (is|are) (one|any|none)\b",
    r"\bthere is none\b",
    r"\bas it stands\b",
    r"\btowards metrics\b",
]
NAMES = [
    r"\broles?_of\b",
    r"\bcheck_roles\b",
    r"\bDesk\b",
    r"\bPulse\b",
    r"\bpulse\b",
    r"\bLag\b",
    r"\bMirror\(",
    r"\bDriverDisplay\b",
    r"\bengine/engine\.py\b",
    r"\bengine\.engine\b",
    r"Knobs\b",
    r"\bself\._heard\b",
    r"\brewound\b",
]
WORDS = re.compile("|".join([*(f"(?i:{phrase})" for phrase in PHRASES), *NAMES]))
EXEMPT = {
    "CHANGELOG.md",  # describes names as they were
    "CONTRIBUTING.md",  # lists the phrases
    "tests/architecture/test_prose.py",
}


def found(text: str) -> list[tuple[int, str]]:
    """Returns the lines, with numbers, in which a phrase occurs."""
    return [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if WORDS.search(line)]


def test_phrases() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    hits = []
    for name in listed.stdout.split():
        if name.endswith((".py", ".md", ".yaml", ".toml")) and name not in EXEMPT:
            hits += [f"{name}:{i}: {line[:120]}" for i, line in found((ROOT / name).read_text(encoding="utf-8"))]
    assert hits == []


def test_the_lint_finds_phrases() -> None:
    text = "A run that goes on.\nThe mask stands on the answer.\nIt waits for ever.\nplain text\n"
    assert [i for i, _ in found(text)] == [1, 2, 3]


def test_no_line_is_longer_than_120() -> None:
    """ruff checks Python files; a page's tables and links may be longer, and so may a generated page."""
    long = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]):
        if path.name == "models-supported.md":
            continue
        fenced = False
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fenced ^= line.startswith("```")
            if len(line) > 120 and not fenced and not line.startswith("|") and "](" not in line and "http" not in line:
                long.append(f"{path.relative_to(ROOT)}:{i}")
    assert long == []
