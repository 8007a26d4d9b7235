"""Optional libraries: imported where they are used, and missed in one clear line."""

from __future__ import annotations

import importlib
from types import ModuleType

from myllm_ray.config.errors import UserError


def require(module: str, package: str, why: str) -> ModuleType:
    """Import `module`, or say which `pip install` brings it.

    Raises:
        UserError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise
        raise UserError(f"{why} needs {module}: pip install '{package}'") from None
