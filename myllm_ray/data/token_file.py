"""Files of encoded tokens (see `tokenize.encode`), with random access to ranges.

There are two formats. `tokens-<i>.bin` contains int32, as encoded. For vocabularies of at most `NARROW` tokens,
`tokens-<i>.u16` contains the ids as uint16, and `trained-<i>.bits` one bit per token, the lowest bit of a byte first,
which is set if the token is trained on; the second file does not exist if all tokens are trained on. Both give the same
values.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from myllm_ray.config.errors import DataError

NARROW = 2**16
"""Largest vocabulary whose ids are stored in 16 bits."""
_BLOCK = 2**16


class BitWriter:
    """Writes one bit per token, the lowest bit of a byte first. There is no file as long as all bits are set."""

    def __init__(self, path: Path):
        self._path, self._count = path, 0
        self._file: BinaryIO | None = None
        self._rest = np.empty(0, bool)  # the bits that do not fill a byte yet

    @property
    def masked(self) -> bool:
        """Whether a bit is not set, so that there is a file."""
        return self._file is not None

    def write(self, bits: np.ndarray) -> None:
        """Appends bits (n,) bool."""
        if self._file is None and not bits.all():
            # All bits so far are set.
            self._file = open(self._path, "wb")  # noqa: SIM115
            whole = self._count // 8
            for first in range(0, whole, _BLOCK):
                self._file.write(b"\xff" * min(_BLOCK, whole - first))
            self._rest = np.ones(self._count % 8, bool)
        if self._file is not None:
            every = np.concatenate([self._rest, bits])
            at = len(every) // 8 * 8
            self._file.write(np.packbits(every[:at], bitorder="little").data)
            self._rest = every[at:].copy()
        self._count += len(bits)

    def close(self) -> None:
        """Writes the last bits and closes the file."""
        if self._file is not None:
            self._file.write(np.packbits(self._rest, bitorder="little").data)
            self._file.close()


class TokenWriter:
    """Writes the tokens of one source. To be used as a context manager.

    Args:
        folder: Folder of the files.
        index: Number of the source, or another part of the names of the files.
        narrow: Whether all ids are below `NARROW`.
    """

    def __init__(self, folder: Path, index: int | str, narrow: bool):
        self.narrow, self.count = narrow, 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._file: BinaryIO = open(folder / f"tokens-{index}.{'u16' if narrow else 'bin'}", "wb")  # noqa: SIM115
        self._bits = BitWriter(folder / f"trained-{index}.bits")

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._bits.close()

    @property
    def masked(self) -> bool:
        """Whether a token is not trained on, so that there is a file of bits."""
        return self._bits.masked

    @property
    def digest(self) -> str:
        """The hash of the ids, as they are stored."""
        return self._digest.hexdigest()

    @property
    def described(self) -> dict[str, object]:
        """The format, for `TokenReader`."""
        return {"dtype": "uint16", "masked": self.masked} if self.narrow else {"dtype": "int32"}

    def write(self, values: np.ndarray) -> None:
        """Appends encoded tokens (n,) int32.

        Raises:
            DataError: An id does not fit.
        """
        if not self.narrow:
            self._write(values)
            return
        trained = values >= 0
        ids = np.where(trained, values, ~values)
        if len(ids) and int(ids.max()) >= NARROW:
            raise DataError(
                f"the tokenizer returned the token id {int(ids.max())}, but it has at most {NARROW} tokens; "
                "it can't be used"
            )
        self._write(ids.astype("<u2"))
        self._bits.write(trained)

    def _write(self, stored: np.ndarray) -> None:
        self._file.write(stored.data)
        self._digest.update(stored.data)
        self.count += len(stored)


class TokenReader:
    """Reads ranges of the tokens of one source with `pread`.

    Args:
        folder: Folder of the files.
        index: Number of the source.
        described: `TokenWriter.described`; empty for files of int32.
    """

    def __init__(self, folder: Path, index: int, described: dict[str, object]):
        self._folder = folder
        self._narrow = described.get("dtype") == "uint16"
        self._path = folder / f"tokens-{index}.{'u16' if self._narrow else 'bin'}"
        self._file = os.open(self._path, os.O_RDONLY)
        self._bits: int | None = None
        if described.get("masked"):
            self._bits = os.open(folder / f"trained-{index}.bits", os.O_RDONLY)

    def close(self) -> None:
        """Closes the files."""
        os.close(self._file)
        if self._bits is not None:
            os.close(self._bits)

    def read(self, first: int, count: int) -> np.ndarray:
        """Returns the encoded tokens [first, first + count), (count,) int32.

        Raises:
            DataError: A file is truncated.
        """
        if not self._narrow:
            return np.frombuffer(self._bytes(self._file, 4 * first, 4 * count), np.int32)
        ids = np.frombuffer(self._bytes(self._file, 2 * first, 2 * count), "<u2").astype(np.int32)
        if self._bits is None:
            return ids
        skipped = first % 8
        packed = self._bytes(self._bits, first // 8, -(-(skipped + count) // 8))
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        # -1 where a token is not trained on: `ids ^ -1` is `~ids`.
        ids ^= bits[skipped : skipped + count].astype(np.int32) - 1
        return ids

    def _bytes(self, file: int, first: int, count: int) -> bytes:
        data = os.pread(file, count, first)
        if len(data) != count:
            raise DataError(
                f"{self._path} is shorter than its index; delete {self._folder}, and the next run prepares the data "
                "again"
            )
        return data
