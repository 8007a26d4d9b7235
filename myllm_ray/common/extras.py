"""Imports of optional libraries, with an error that names the package to install."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from myllm_ray.config.errors import UserError


def require(module: str, package: str, why: str) -> ModuleType:
    """Imports and returns an optional module.

    Args:
        module: The module to import.
        package: The package to install when the module is missing.
        why: The feature that needs the module, for the error message.

    Raises:
        UserError: The module is not installed. The message contains the `pip install` command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise  # the module is installed, and one of its own imports is missing
        raise UserError(f"{why} needs {module}: pip install '{package}'") from None


def require_installed(module: str, package: str, why: str) -> None:
    """Checks that an optional module is installed, without importing it.

    Args:
        module: The module.
        package: The package to install when the module is missing.
        why: The feature that needs the module, for the error message.

    Raises:
        UserError: The module is not installed. The message contains the `pip install` command.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{why} needs {module}: pip install '{package}'")
