"""Ray's token authentication, for clients. Imports no Ray: Ray reads these variables when it is imported."""

from __future__ import annotations

import os
from pathlib import Path


def use_token_if_there_is_one() -> None:
    """Turn on token authentication for this process where a token is at hand.

    Clusters of Ray 2.59 and later ask for one, but a client sends none to an explicit address unless told to
    (`RAY_AUTH_MODE=token`). A cluster without authentication ignores the token. A Ray that this process starts itself
    needs none of this: it turns authentication on and hands the token on by itself.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or path.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
