# SPDX-License-Identifier: MIT
"""What can go wrong in reading an image file: which errors pass, and which say that the file is damaged."""

from __future__ import annotations

import errno
import struct
import zipfile
import zlib

from PIL import Image, UnidentifiedImageError

from training.dataset_labels import DatasetError

READ_ERRORS = (
    OSError,
    SyntaxError,  # Pillow: broken PNG chunk
    ValueError,
    EOFError,
    NotImplementedError,  # zipfile: unknown compression
    RuntimeError,  # zipfile: encrypted member
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
RETRY_DELAYS_S = (0.1, 1.0, 5.0, 20.0)  # before each new attempt at storage that fails for a moment
TRANSIENT_ERRNOS = {  # of network storage, and of disks behind it; ENOENT and EACCES would stay as they are
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ENOLINK", "ENOTCONN", "ECONNRESET"),
        *(
            "ECONNABORTED",
            "ECONNREFUSED",
            "EHOSTDOWN",
            "EHOSTUNREACH",
            "ENETDOWN",
            "ENETUNREACH",
            "ESHUTDOWN",
        ),
    )
    if hasattr(errno, name)  # not every system has all
}


class StorageError(DatasetError):
    """Storage that still failed after all attempts: the file may well be good."""


def is_transient_error(error: BaseException | None) -> bool:
    """Whether the same file may well be read a moment later."""
    if isinstance(error, DatasetError):
        error = error.__cause__
    return isinstance(error, TimeoutError) or getattr(error, "errno", None) in TRANSIENT_ERRNOS


def describe_error(error: Exception) -> str:
    """One line about a failed read."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text shows a memory address
        return "its content is no image format that Pillow knows"
    return str(error).partition("\n")[0] or type(error).__name__
