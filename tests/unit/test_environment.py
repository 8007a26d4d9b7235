"""The environment variables that Ray reads at import are set before any module of the package imports Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from myllm_ray.common.secrets import mask_text
from myllm_ray.config import ConfigError
from myllm_ray.orchestration import environment, session

_IMPORTS = """
import importlib, os, sys

class Spy:
    seen = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            Spy.seen.append([os.environ.get(n) for n in ("RAY_AUTH_MODE", "RAY_CHDIR_TO_TRIAL_DIR")])
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Spy())
checked = 0
for name in sys.argv[1:]:
    for variable in ("RAY_AUTH_MODE", "RAY_CHDIR_TO_TRIAL_DIR"):
        os.environ.pop(variable, None)
    for module in [m for m in sys.modules if m.startswith("myllm_ray.orchestration")]:
        del sys.modules[module]
    Spy.seen.clear()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert Spy.seen[0] == ["token", "0"], (name, Spy.seen)
        checked += 1
print(checked)
"""


def modules() -> list[str]:
    files = (ROOT / "myllm_ray" / "orchestration").rglob("*.py")
    names = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files)
    return [*names, "jobs.train"]


def test_the_environment_is_set_before_ray_is_imported(tmp_path: Path) -> None:
    """Checks every module that can be imported first, with a token file and the address of a cluster."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x" * 40)
    of_ray = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", _IMPORTS, *modules()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**of_ray, "HOME": str(tmp_path), "RAY_ADDRESS": "127.0.0.1:6379", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10


@pytest.mark.parametrize(("address", "joins"), [(None, False), ("127.0.0.1:6379", True)])
def test_the_mode_is_for_clusters_that_are_joined(tmp_path: Path, address: str | None, joins: bool) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x" * 40)
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    code = (
        "import myllm_ray.orchestration, os, sys; assert 'ray' not in sys.modules; "
        "print(os.environ.get('RAY_AUTH_MODE'))"
    )
    for home, expected in ((tmp_path, "token" if joins else "None"), (tmp_path / "none", "None")):
        said = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**rest, "HOME": str(home), "PYTHONPATH": str(ROOT), **({"RAY_ADDRESS": address} if address else {})},
        ).stdout
        assert said.strip() == expected


def test_messages_say_where_the_token_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    path = tmp_path / ".ray" / "auth_token"
    assert f"none found in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and {path}; set RAY_AUTH_TOKEN" in session._refused(
        "a:1", refused
    )
    path.parent.mkdir()
    path.write_text("s3cret")
    said = session._refused("a:1", refused)
    assert f"Token: the one in {path}; set RAY_AUTH_TOKEN to the cluster's token" in said
    assert "s3cret" not in said
    assert mask_text(said) == said, "the command line takes nothing in it for a secret"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    assert "the one in the environment variable RAY_AUTH_TOKEN" in session._refused("a:1", refused)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert environment.describe_token() == "RAY_AUTH_MODE=disabled, so none is sent; set RAY_AUTH_MODE=token"


@pytest.mark.parametrize(
    ("home", "mode", "made"),
    [
        ("/proc/nowhere", None, True),
        ("/proc/nowhere", "token", True),
        ("/proc/nowhere", "disabled", False),
        ("writable", None, False),
        ("with a token", None, False),
    ],
)
def test_a_token_is_set_if_it_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str, mode: str | None, made: bool
) -> None:
    """Regression: with a read-only home, Ray could not start because it could not save its token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # monkeypatch restores it after the test
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    folder = tmp_path if not home.startswith("/") else Path(home)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("RAY_AUTH_MODE")
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if home == "with a token":
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text("x" * 40)
    session._token_without_a_file()
    assert bool(os.environ["RAY_AUTH_TOKEN"]) == made


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/bin/python3.11", {}),
        ("/a b/bin/python", {"py_executable": "'/a b/bin/python'"}),
        ("/it's/python", {"py_executable": "'/it'\"'\"'s/python'"}),
    ],
)
def test_a_path_with_spaces_is_quoted_for_ray(
    monkeypatch: pytest.MonkeyPatch, path: str, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(sys, "executable", path)
    assert session.interpreter() == expected


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"Ray at {address} can't be reached: Connection refused"):
        session._check_address(address)
    session._check_address("auto")
    session._check_address("ray://head:10001")
