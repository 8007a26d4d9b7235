"""The wheel contains the whole package: installed in an empty environment, it trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl

import myllm_ray

pytestmark = pytest.mark.slow

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
"""The environment of all processes here: nothing in it leads to the checkout."""


def run(*command: str | Path, cwd: Path) -> str:
    """Returns the standard output of a command, which must succeed."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a wheel of the checkout. It is built from a copy, so that no `build` folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "myllm_ray", source / "myllm_ray", ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation, pip builds with the installed setuptools and downloads nothing.
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    run(*pip, *build, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a virtual environment with the wheel, and with the dependencies that are installed here."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths in a .pth file come after the environment's own packages. The .pth files in these paths are not read, so an
    # editable install of the checkout has no effect here.
    here = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    return folder


def test_the_wheel_contains_every_file_of_the_package(wheel: Path) -> None:
    files = [p for p in (ROOT / "myllm_ray").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert any(path.name == "py.typed" for path in files)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}


def test_the_import_is_that_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, importlib.metadata, importlib.resources, myllm_ray\n"
        "typed = importlib.resources.files('myllm_ray').joinpath('py.typed').is_file()\n"
        "print(json.dumps([myllm_ray.__file__, typed, importlib.metadata.version('myllm_ray')]))"
    )
    file, typed, version = json.loads(run(installed / "bin" / "python", "-c", code, cwd=tmp_path))
    assert Path(file).is_relative_to(installed)
    assert not Path(file).is_relative_to(ROOT)
    assert typed
    assert version == myllm_ray.__version__


def test_the_installed_command_trains(installed: Path, tmp_path: Path) -> None:
    run(installed / "bin" / "myllm-ray", "train", ROOT / "configs" / "tiny_sft.yaml", "run.max_steps=2", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert read_jsonl(tmp_path / "runs" / "tiny-sft" / "metrics.jsonl")[-1]["step"] == 2
