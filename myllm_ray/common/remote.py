"""Access to remote storage by URL (s3://, gs://, hf://, memory://, ...) through fsspec.

s3:// uses pyarrow's S3 client, so it needs no package besides those of the project. Credentials and region come from
the environment (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, ...) or from `~/.aws`; `AWS_ENDPOINT_URL` names another server.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper

from myllm_ray.common.extras import require
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import UserError

_LIBRARIES = {"gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}

# Without bare numbers such as 503, which the names of files may contain.
_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|INTERNAL[_ ](FAILURE|SERVER ERROR)|SERVICE[_ ]UNAVAILABLE|BAD GATEWAY"
    r"|HTTP status 5\d\d|time(d out|out)|connection (refused|reset|aborted)",
    re.IGNORECASE,
)
"""Texts of errors that end by themselves, such as those of a server that is restarted."""
_ATTEMPTS = 5
"""How often the client sends a request; it waits longer before each repetition."""
_REQUEST_SECONDS, _CONNECT_SECONDS = 60.0, 10.0
PATIENCE_SECONDS = 300.0
"""How long an operation is repeated while the storage can't be reached, in seconds."""
FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 30.0
log = logging.getLogger(__name__)
Result = TypeVar("Result")


class S3(ArrowFSWrapper):
    """S3 and compatible servers, through pyarrow."""

    cachable = False  # the environment may change between two runs of a process

    def __init__(self, **options: Any):
        from pyarrow import fs

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        super().__init__(
            fs.S3FileSystem(
                region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
                endpoint_override=endpoint,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
                request_timeout=_REQUEST_SECONDS,
                connect_timeout=_CONNECT_SECONDS,
            ),
            **options,
        )

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        # A range from 0 on also needs a file with random access.
        return super().cat_file(path, start, end, **{"seekable": True, **options})


for scheme in ("s3", "s3a"):  # also where s3fs is installed: a URL means the same on every machine
    fsspec.register_implementation(scheme, S3, clobber=True)


def is_transient(error: BaseException) -> bool:
    """Returns whether an error of remote storage may end by itself, so that a repetition is useful."""
    return isinstance(error, (ConnectionError, TimeoutError)) or _TRANSIENT.search(str(error)) is not None


def open_storage(url: str, key: str, error: type[UserError]) -> tuple[Any, str]:
    """Returns the file system of a URL or path, and the path inside that file system.

    Args:
        url: The URL or local path.
        key: The config key that contains the URL, for error messages.
        error: The exception class to raise for an invalid URL.

    Raises:
        UserError: The library for this kind of storage is not installed, or the URL is invalid (then of class `error`).
    """
    try:
        filesystem, inner = url_to_fs(url)
    except ImportError:
        scheme = url.split("://")[0]
        library = _LIBRARIES.get(scheme, f"the fsspec package for {scheme}")
        require(library, library, f"{key}: {scheme}://")
        raise
    except ValueError as problem:
        raise error(f"{key}: {url!r}: {problem}") from None
    return filesystem, inner


def patiently(operation: Callable[[], Result], failure: str, error: type[UserError]) -> Result:
    """Calls an operation, again and again while the storage can't be reached, and returns its result.

    Args:
        operation: The operation.
        failure: What has failed, for messages.
        error: The exception class to raise.

    Raises:
        UserError: Any other error, or the time is over. One line, with secrets in URLs masked.
    """
    until, wait = time.monotonic() + PATIENCE_SECONDS, FIRST_WAIT_SECONDS
    while True:
        try:
            return operation()
        except UserError:
            raise
        except Exception as problem:  # each file system raises its own types of exceptions
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
            text = mask_text(f"{failure}: {reason}")
            if not is_transient(problem) or time.monotonic() + wait > until:
                raise error(text) from None
            log.warning("%s; trying again in %.0f s", text, wait)
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
