"""The Python code in the pages about Ray and sweeps works as documented."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT
from e2e.test_docs import blocks


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_and_sweeps_pages_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    exec(blocks("docs/ray.md", "python")[0], {})
    exec(blocks("docs/sweeps.md", "python")[0], {})
    assert (tmp_path / "runs" / "tiny-sft" / "checkpoints" / "step-00000010" / "manifest.json").is_file()
