# SPDX-License-Identifier: MIT
"""Which implementation of the fused ops a process uses.

`auto` takes the fastest that has been measured on such a machine. The others force one, wherever it can handle the
device, the dtype and the filters of its input. Set once, before the first step: by `--ops`, or by the environment
variable STYLESAN_OPS.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch_utils.errors import UserError

BACKENDS = ("auto", "reference", "cpp", "triton")
VARIABLE = "STYLESAN_OPS"

_chosen = os.environ.get(VARIABLE, "auto")


def set_backend(name: str) -> None:
    """Use implementation `name`, one of BACKENDS, from now on. Raises UserError for any other."""
    global _chosen
    if name not in BACKENDS:
        raise UserError(f"--ops={name} is no implementation of the ops; choose one of {', '.join(BACKENDS)}")
    _chosen = name


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Use implementation `name` inside the context. Raises UserError for none of BACKENDS."""
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def backend() -> str:
    """The implementation to use, one of BACKENDS. Raises UserError if the environment named another."""
    if _chosen not in BACKENDS:
        raise UserError(
            f"{VARIABLE}={_chosen} is no implementation of the ops; choose one of {', '.join(BACKENDS)}"
        )
    return _chosen
