"""Files and folders that are complete or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from myllm_ray.common.files import published


def write(path: Path, text: str, existing: Literal["replace", "keep", "error"] = "error") -> None:
    with published(path, existing) as beside:
        beside.mkdir(parents=True)
        (beside / "a.txt").write_text(text)
        assert beside.parent == path.parent


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    write(folder, "first")
    assert [p.read_text() for p in folder.iterdir()] == ["first"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(("existing", "found"), [("keep", "first"), ("replace", "second")])
def test_what_is_there_already(tmp_path: Path, existing: Literal["keep", "replace"], found: str) -> None:
    write(tmp_path / "folder", "first")
    write(tmp_path / "folder", "second", existing)
    assert (tmp_path / "folder" / "a.txt").read_text() == found
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path / "folder", "third")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def fail(path: Path, existing: Literal["replace", "keep"], make: Callable[[Path], object]) -> None:
    with published(path, existing) as beside:
        assert beside.suffix == (path.suffix or ".tmp"), "numpy appends the suffix that it misses"
        make(beside)
        raise ZeroDivisionError


def test_after_an_error_nothing_is_left_and_nothing_lost(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("old")
    for name, existing, make in (("a.npy", "replace", lambda path: path.write_text("half")), ("b", "keep", Path.mkdir)):
        with pytest.raises(ZeroDivisionError):
            fail(tmp_path / name, existing, make)  # type: ignore[arg-type]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.npy": "old"}
