"""Errors that the user can fix. The command line prints one line and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Base of the errors in the config, the data or the environment.

    The message is one line that states what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.

    Args:
        message: The message. Line breaks are replaced with spaces.
    """

    exit_code = 2

    def __init__(self, message: object = ""):
        super().__init__(" ".join(str(message).split("\n")))  # keys and values of the user may contain line breaks


class ConfigError(UserError):
    """The config names a key that does not exist, has a wrong value, or contradicts itself."""


class DataError(UserError):
    """The data can't be read, is empty, or a row lacks what its format needs."""


class CheckpointError(UserError):
    """A checkpoint can't be written, is damaged, or does not belong to this run."""


class TrainingError(UserError):
    """Training can't continue correctly, for example after a non-finite loss or with data in the wrong order."""
