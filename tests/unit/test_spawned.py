"""Processes of a test: separate hash seeds, the environment of the test, and errors that are raised in the test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from machine import VARIABLE
from spawned import start_processes


def note(rank: int, folder: str) -> None:
    if not folder:
        raise ValueError("planted")
    fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    known = {
        "hash": hash("a"),
        "marker": os.environ.get("A_MARKER"),
        "fp16": fp16,
        "path": sys.path,
        "ray": "ray" in sys.modules,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(known), encoding="utf-8")


def test_what_processes_start_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, fp16 in (("poor", False), ("rich", True)):
        monkeypatch.setenv("A_MARKER", cpu)
        monkeypatch.setenv(VARIABLE, cpu)
        start_processes(note, (str(tmp_path),), 2)
        one, two = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
        assert one["hash"] != two["hash"], "sets iterate in different orders"
        for known in (one, two):
            assert (known["marker"], known["fp16"]) == (cpu, fp16)
            assert known["path"] == sys.path
            assert not known["ray"]


def test_an_error_in_a_process_is_raised_in_the_test() -> None:
    with pytest.raises(Exception, match="planted"):
        start_processes(note, ("",), 2)
