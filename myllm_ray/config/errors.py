"""Errors that are the user's to fix: one clear line, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something in the config, the data or the environment is wrong.

    The message is one line that says what is wrong, where, and what to do. The command line prints it without
    a traceback and exits with 2; code that calls the library can catch it.
    """

    exit_code = 2

    def __init__(self, message: object = ""):
        super().__init__(" ".join(str(message).split("\n")))  # also where a key or a value of the user's has a line break


class ConfigError(UserError):
    """The config names a key that does not exist, has a wrong value, or contradicts itself."""


class DataError(UserError):
    """The data can't be read, is empty, or a row lacks what its format needs."""


class CheckpointError(UserError):
    """A checkpoint can't be written, is damaged, or does not belong to this run."""


class TrainingError(UserError):
    """Training reached a state from which going on would be wrong (a non-finite loss, a stream out of order)."""
