"""Prints the number of comments per 100 lines of code, for each package of myllm_ray.

A line of code contains a token that is neither a comment nor part of a docstring. A comment line contains a `#`
comment, alone or after code. Usage: `python tools/comment_density.py [folder of the package]`.
"""

from __future__ import annotations

import sys
import tokenize
from pathlib import Path

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
"""Tokens that do not make a line a line of code."""


def count(path: Path) -> tuple[int, int]:
    """Returns the numbers of code lines and of comment lines in a file."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    code: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    for token in tokens:
        if token.type not in _LAYOUT:
            statement.append(token)
        elif token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            # A statement that consists of one string is a docstring.
            if [t.type for t in statement] != [tokenize.STRING]:
                code |= {line for t in statement for line in range(t.start[0], t.end[0] + 1)}
            statement = []
    return len(code), len(comments)


def density(package: Path) -> list[tuple[str, int, int]]:
    """Returns (name, code lines, comment lines) of each folder of a package, of its own files, and of all files."""
    folders = sorted(path.parent for path in package.glob("*/__init__.py"))
    groups = [(folder.name, sorted(folder.rglob("*.py"))) for folder in folders]
    groups += [("(top level)", sorted(package.glob("*.py"))), ("all", sorted(package.rglob("*.py")))]
    rows = []
    for name, files in groups:
        counts = [count(file) for file in files]
        rows.append((name, sum(code for code, _ in counts), sum(comments for _, comments in counts)))
    return rows


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "myllm_ray"
    print(f"{'package':<16}{'code lines':>12}{'comment lines':>16}{'per 100 lines':>16}")
    for name, code, comments in density(package):
        print(f"{name:<16}{code:>12}{comments:>16}{100 * comments / max(code, 1):>16.1f}")


if __name__ == "__main__":
    main()
