"""The environment variables that Ray reads when it is imported. Imports no Ray.

The package's `__init__` imports this module, so it is imported before any `import ray` in the package.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

AUTH_MODE = "RAY_AUTH_MODE"


def prepare(joining: bool | None = None) -> None:
    """Set what Ray reads at import, where the user has not set it.

    Clusters of Ray 2.59 and later ask for a token, but a client sends none to an explicit address unless
    `RAY_AUTH_MODE=token` is set. A cluster without authentication ignores the token. A Ray that this process starts
    needs no mode: it turns authentication on and passes the token on by itself, and fails if the mode is set for it.

    Args:
        joining: whether this process connects to a cluster; default: whether `RAY_ADDRESS` is set.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a worker's end or failure is seen after this long
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a relative path in a user's own code keeps its meaning
    joining = bool(os.environ.get("RAY_ADDRESS")) if joining is None else joining
    # Where Ray is imported already, the mode is changed through Ray itself: `session.use_token`.
    if joining and has_token() and "ray" not in sys.modules:
        os.environ.setdefault(AUTH_MODE, "token")


def has_token() -> bool:
    """Whether Ray would find a token."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_path().is_file()


def token_path() -> Path:
    """The file in which Ray looks for a token, if `RAY_AUTH_TOKEN` is not set."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def describe_token() -> str:
    """Where Ray looks for a token, and where it finds one, for messages. Does not show the token."""
    if os.environ.get(AUTH_MODE, "token").lower() != "token":
        return f"{AUTH_MODE}={os.environ[AUTH_MODE]}, so none is sent; set {AUTH_MODE}=token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the one in the environment variable RAY_AUTH_TOKEN; set it to the cluster's token"
    if token_path().is_file():
        return f"the one in {token_path()}; set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it"
    return f"none found in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and {token_path()}; set RAY_AUTH_TOKEN to the cluster's token"


prepare()
