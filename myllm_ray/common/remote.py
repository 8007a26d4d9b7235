"""Access to remote storage by URL (s3://, gs://, hf://, memory://, ...) through fsspec."""

from __future__ import annotations

from typing import Any

from fsspec.core import url_to_fs

from myllm_ray.common.extras import require
from myllm_ray.config.errors import UserError

_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}


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
