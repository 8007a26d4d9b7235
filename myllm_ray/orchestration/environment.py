"""Sets the environment variables that Ray reads when it is imported. Does not import Ray.

The package's `__init__` imports this module, so it is imported before any `import ray` in the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

AUTH_MODE = "RAY_AUTH_MODE"


def prepare(joining: bool | None = None) -> None:
    """Sets the variables that Ray reads at import, unless the user has set them.

    Clusters of Ray 2.59 and later require a token, but a client sends none to an explicit address unless
    `RAY_AUTH_MODE=token` is set. A cluster without authentication ignores the token. For a local Ray that this process
    starts, the mode must not be set: Ray enables authentication and distributes the token itself, and
    fails with the mode set.

    Args:
        joining: whether this process connects to a cluster; default: whether `RAY_ADDRESS` is set.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray Train detects the end or failure of a worker within this interval.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Workers keep the working directory, so relative paths in user code keep their meaning.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    joining = bool(os.environ.get("RAY_ADDRESS")) if joining is None else joining
    # Ray reads the mode at import. If Ray is imported already, `session.use_token` changes the mode.
    if joining and has_token() and "ray" not in sys.modules:
        os.environ.setdefault(AUTH_MODE, "token")


@contextmanager
def environment_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables inside the context and restores them at the end."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def has_token() -> bool:
    """Returns whether Ray finds a token."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_path().is_file()


def token_path() -> Path:
    """Returns the file from which Ray reads the token if `RAY_AUTH_TOKEN` is not set."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def describe_token() -> str:
    """Returns where Ray looks for a token and finds one, for messages. The text does not contain the token."""
    if os.environ.get(AUTH_MODE, "token").lower() != "token":
        return f"{AUTH_MODE}={os.environ[AUTH_MODE]}, so none is sent; set {AUTH_MODE}=token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the one in the environment variable RAY_AUTH_TOKEN; set it to the cluster's token"
    if token_path().is_file():
        return (
            f"the one in {token_path()}; set RAY_AUTH_TOKEN to the cluster's token, "
            "or RAY_AUTH_TOKEN_PATH to a file that holds it"
        )
    return (
        f"none found in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and {token_path()}; "
        "set RAY_AUTH_TOKEN to the cluster's token"
    )


prepare()
