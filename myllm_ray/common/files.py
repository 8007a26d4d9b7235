"""Atomic file writes, and JSON Lines files that a resumed run continues."""

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
    """Yields a temporary path next to `path` and renames it to `path` when the block ends without an error.

    Readers see either no file or folder at `path`, or the complete one. After an error the temporary one is removed.

    Args:
        path: The final path of the file or folder.
        existing: What to do if a folder already exists at `path`, possibly created by another process in the meantime.
            `replace` removes it first. `keep` keeps it and discards the new one, which has the same content. `error`
            raises OSError. A file is always replaced.
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
    """Writes a text file atomically: a reader sees either the old file or the complete new one.

    Args:
        path: The file to write.
        text: Its content.
        durable: Whether to flush the file to disk, so that it also survives a power failure.
    """
    with published(path, existing="replace") as beside, open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically and flushed to disk."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON Lines file, and nothing if the file does not exist.

    Lines that are not valid JSON are skipped: a process that is killed leaves a truncated last line.
    """
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
    """Appends objects to a JSON Lines file and flushes after each line.

    Opening the file removes the existing lines that do not satisfy `keep`. A run that resumes from step 10 drops the
    lines of steps 11 and later, so that each step has one line even if it was trained several times.
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
        """Appends one object and flushes the file."""
        self._file.write(self._dump(row))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def link_or_copy(source: str, target: str) -> None:
    """Creates a hard link to a file, or a copy where the file system does not support hard links.

    Both names share the content, so the file must never be modified afterwards.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def why_not_writable(folder: Path) -> str | None:
    """Creates a folder and writes a test file into it; returns the reason if that fails, else None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None
