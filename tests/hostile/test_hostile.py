"""The test suite and the program on simulated machines that differ from this one: `make test-hostile`.

Each environment runs a representative part of the suite in a separate process, then a training run on Ray with the
same variables and without the clean environment of the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import environment
import pytest
from conftest import ROOT, read_jsonl

pytestmark = [pytest.mark.hostile, pytest.mark.timeout(900)]
PART = [
    "tests/unit",
    "tests/contracts/test_accelerators.py",
    "tests/contracts/test_backend_options.py",
    "tests/e2e/test_cli.py",
    "tests/e2e/test_docs.py",
    "tests/numerics/test_losses.py",
    "tests/numerics/test_sampling.py",
]
EXPRESSION = (
    "not micro_size and not generation and not hybrid and not options_change and not takes_the_same and not between "
    "and not ray_and_sweeps and not preferences_and_rollouts and not readme_commands"
)
DROP = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner,-chown,-sys_admin", "--inh-caps=-all"]
STRANGER = 65534


@dataclass
class Machine:
    """A simulated machine.

    `variables` are set for both runs, `ray` only for the suite: the program honours the latter, the suite must not.
    """

    variables: dict[str, str]
    ray: dict[str, str] = field(default_factory=dict)
    folder: str = ""
    """Name of the folder that the checkout is copied to; empty: no copy is made."""
    home: str = "read-only"
    """"read-only", or "token": writable, with Ray's token file in it."""


MACHINES = {
    "poorest": Machine(
        {
            "TEST_CPU": "poor",
            "TEST_CORES": "1",
            "LANG": "C",
            "LC_ALL": "C",
            "TZ": "Pacific/Chatham",
            "TERM": "dumb",
            "COLUMNS": "30",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "1",
        }
    ),
    "richest": Machine(
        {
            "TEST_CPU": "rich",
            "TEST_CORES": "64",
            "TZ": "America/St_Johns",
            "FORCE_COLOR": "1",
            "COLUMNS": "400",
            "OMP_NUM_THREADS": "7",
            "PYTHONHASHSEED": "2",
            "HF_HOME": "/nowhere/hf",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_VERBOSITY": "debug",
            **dict.fromkeys(
                ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
            ),
        },
        ray={
            "RAY_ADDRESS": "127.0.0.1:9",
            "RAY_AUTH_MODE": "token",
            "RAY_TRAIN_V2_ENABLED": "0",
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "9",
        },
        home="token",
    ),
    "spaces": Machine({"TEST_CORES": "2", "no_proxy": "localhost"}, folder="a folder with spaces", home="token"),
}


@pytest.fixture
def place() -> Iterator[Path]:
    """Yields a folder with a short path that other users may enter; pytest's folders are private to the user."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    folder.chmod(0o755)
    yield folder
    subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def checkout(place: Path, machine: Machine) -> Path:
    """Returns this repository, or a copy of the files that git would add, with a link to the virtual environment."""
    if not machine.folder:
        return ROOT
    copy = place / machine.folder
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(Path(sys.prefix))
    return copy


def home(place: Path, machine: Machine) -> Path:
    folder = place / "home"
    (folder / ".ray").mkdir(parents=True)
    if machine.home == "token":
        (folder / ".ray" / "auth_token").write_text(
            "0123456789abcdef0123456789abcdef0123456789abcdef", encoding="utf-8"
        )
    else:
        folder.chmod(0o500)
        (folder / ".ray").chmod(0o500)
    return folder


def without_rights() -> list[str]:
    """Returns the command prefix that makes root respect file permissions; empty for an ordinary user."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv") or subprocess.run([*DROP, "true"], capture_output=True, check=False).returncode:
        pytest.skip("as root, and setpriv can't drop capabilities here")
    return DROP


def run(command: list[str], cwd: Path, variables: dict[str, str], seconds: float) -> str:
    ran = subprocess.run(
        command,
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.parametrize("name", MACHINES)
def test_the_suite_passes_and_a_run_trains(name: str, place: Path) -> None:
    machine = MACHINES[name]
    where, folder = checkout(place, machine), home(place, machine)
    prefix = without_rights() if machine.home == "read-only" else []
    python = str(where / ".venv" / "bin" / "python") if (where / ".venv").exists() else sys.executable
    kept = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES") if k in os.environ}
    variables = {
        **kept,
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(where), str(where / "tests")]),
        **machine.variables,
    }
    if prefix:
        wanted = (
            "import pathlib\ntry: pathlib.Path.home().joinpath('x').touch()\nexcept PermissionError: print('refused')"
        )
        assert run([*prefix, python, "-c", wanted], place, variables, 60) == "refused\n", "HOME is read-only"
    imported = run([*prefix, python, "-c", "import myllm_ray; print(myllm_ray.__file__)"], place, variables, 120)
    assert Path(imported.strip()).is_relative_to(where), "the copy is tested, not the checkout"
    out = run(
        [
            *prefix,
            python,
            "-m",
            "pytest",
            *PART,
            "-k",
            EXPRESSION,
            "-x",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            str(place / "t"),
        ],
        where,
        {**variables, **machine.ray},
        600,
    )
    assert "100%" in out

    command = [
        python,
        str(where / "tests/hostile/product.py"),
        "train",
        str(where / "configs/tiny_sft.yaml"),
        "accelerator.name=ddp",
        "scaling.workers=1",
        "run.max_steps=3",
        f"run.storage={place / 'a run'}",
        "data.train.limit=40",
    ]
    variables["TEST_CORES"] = str(
        min(4, int(variables["TEST_CORES"]))
    )  # Ray starts an idle process for each core that is reported
    out = run([*prefix, *command], place, variables, 200)
    assert "done: 3 steps" in out
    rows = read_jsonl(place / "a run" / "tiny-sft" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_what_is_neutralized() -> None:
    """`tests/environment.py` removes or sets every variable that a hostile machine sets, except those that may stay."""
    may_stay = {"TEST_CPU", "TEST_CORES", "LANG", "LC_ALL", "TZ", "PYTHONHASHSEED"}
    for machine in MACHINES.values():
        variables = {**machine.variables, **machine.ray}
        cleaned = dict(variables)
        environment.neutralize(cleaned)
        assert {k for k in variables if cleaned.get(k) == variables[k]} <= may_stay
