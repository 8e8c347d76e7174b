# SPDX-License-Identifier: MIT
"""The C++ operators of csrc/: compiled at first use, kept in a cache folder, loaded from there ever after.

One library per version of torch, processor and source text, in $TORCH_EXTENSIONS_DIR, else in `extensions` of the
cache folder of downloads. Needs a C++ compiler and ninja for the first use and nothing afterwards. What cannot be
compiled is not tried twice, and nothing but speed depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from torch_utils.distributed import is_main
from torch_utils.download import cache_folder

NAME = "stylesan_cpu"  # namespace of the operators in torch.ops
SOURCE_FOLDER = Path(__file__).parent / "csrc"

# Not linked with -fopenmp: torch has loaded an OpenMP library already, and a second one would mean a second set of
# threads.
_TUNE_FOR = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
COMPILER_FLAGS = ("-O3", _TUNE_FOR, "-fopenmp", "-Wno-psabi")


class BuildError(Exception):
    """The operators cannot be had; the message is a clause that says why."""


@lru_cache(maxsize=1)
def load_operators() -> str:
    """Make `torch.ops.stylesan_cpu` usable: "" if it is, otherwise the reason why not.

    The first call on a machine compiles for about half a minute and says so on stderr.
    """
    try:
        _load(library_path())
    except BuildError as error:
        return str(error)
    return ""


class Operators:
    """The operators that one module serves; `register_rules` tells torch their shapes and derivatives."""

    def __init__(self, register_rules: Callable[[], None]) -> None:
        self._register_rules = register_rules
        self._reason: str | None = (
            None  # known from the first call on: torch.compile reads it then as a constant
        )

    def reason_for_absence(self) -> str:
        """Empty if they are there, after building them if need be; otherwise why not.

        Call it once before a `torch.compile(fullgraph=True)`, which cannot look into the building.
        """
        if self._reason is None:
            self._reason = load_operators()
            if not self._reason:
                self._register_rules()
        return self._reason


def library_path() -> Path:
    """Where this machine's library is or will be."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder().parent / "extensions"
    return Path(folder) / f"{NAME}-torch{torch.__version__}-{_fingerprint()}.so"


def _load(library: Path) -> None:
    """Load `library` after making it, if need be. Raises BuildError."""
    try:
        if library.exists():
            torch.ops.load_library(library)
            return
        _check_tools()
        library.parent.mkdir(parents=True, exist_ok=True)
        failure = library.with_suffix(".failed")
        with FileLock(f"{library}.lock"):  # of the processes of a run, one compiles and the others wait
            if library.exists():
                torch.ops.load_library(library)
                return
            if failure.exists():
                raise BuildError(f"an earlier attempt failed, see {failure}; delete that file to try again")
            _build(library, failure)
    except OSError as error:  # a folder without write permission, a full disk, a library that does not load
        raise BuildError(f"{library}: {error.strerror or error}") from error


def _build(library: Path, failure: Path) -> None:
    """Compile in a folder of this process's own and load; others see the library whole or not at all."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(
        logging.ERROR
    )  # CUDA is none of its business here
    from torch.utils import cpp_extension  # imported here: it takes half a second and most runs never need it

    if is_main():
        print("Compiling fast operators for this processor (once; about half a minute) ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f"{NAME}-") as folder, _path_with_ninja():
        try:
            cpp_extension.load(
                NAME,
                [str(source) for source in sorted(SOURCE_FOLDER.glob("*.cpp"))],
                extra_cflags=list(COMPILER_FLAGS),
                build_directory=folder,
                with_cuda=False,
                is_python_module=False,
            )
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
            failure.write_text(f"{error}\n", encoding="utf-8")
            raise BuildError(f"the compiler failed, see {failure}") from error
        os.replace(Path(folder) / f"{NAME}.so", library)


def _check_tools() -> None:
    """Raises BuildError if there is nothing to build with."""
    if sys.platform != "linux":
        raise BuildError(f"they are only built on Linux, not on {sys.platform}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BuildError(f"there is no C++ compiler ({compiler}); install g++")
    with _path_with_ninja():
        if shutil.which("ninja") is None:
            raise BuildError("there is no ninja; pip install ninja")


@contextlib.contextmanager
def _path_with_ninja() -> Iterator[None]:
    """Programs that pip installed beside this Python are found, though its environment may not be activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _fingerprint() -> str:
    """Changes with everything that the compiled code depends on, torch apart."""
    digest = hashlib.sha256()
    for part in (platform.machine(), _processor(), os.environ.get("CXX", "c++"), *COMPILER_FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCE_FOLDER.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Model and instruction sets: a home folder may serve machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model", "model name", "cpu family", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip() in wanted}))
