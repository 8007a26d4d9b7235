"""Files that are either whole or absent, and JSON lines that can be continued."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO


@contextmanager
def published(path: Path, existing: Literal["replace", "keep", "error"]) -> Iterator[Path]:
    """Yield a path beside `path` for a file or a folder, and rename it to `path` when the block ends without an error.

    Readers find nothing at `path`, or all of it. After an error nothing is left.

    Args:
        path: of a file or a folder.
        existing: what becomes of a folder that is there already, maybe from another process meanwhile. `keep`: this one is
            discarded, as both are the same; `error`: OSError. A file is always replaced.
    """
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield beside
        if existing == "replace" and path.is_dir():
            shutil.rmtree(path)
        try:
            os.replace(beside, path)
        except OSError:
            if existing != "keep" or not path.is_dir():
                raise
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def write_atomic(path: Path, text: str, durable: bool = True) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half. `durable`: also after a power cut."""
    with published(path, existing="replace") as beside, open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line cut off by a kill is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value


class JSONLines:
    """Append objects to a file, one a line, flushed one by one.

    Opening keeps only the earlier lines that satisfy `keep`: a run that resumes from step 10 drops what was written
    about steps 11 and later, so that each step has one line however often it was trained.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            write_atomic(path, "".join(self._dump(row) for row in read_jsonl(path) if keep(row)))
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (stays open for the run)

    @staticmethod
    def _dump(row: dict[str, Any]) -> str:
        return json.dumps(row, ensure_ascii=False) + "\n"

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(self._dump(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file that never changes, as good as a copy of it; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def why_not_writable(folder: Path) -> str | None:
    """Make a folder and write into it; the reason where that fails, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None
