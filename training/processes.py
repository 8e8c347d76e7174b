# SPDX-License-Identifier: MIT
"""A command that runs as one of many processes: how it joins the others, how it ends, and who shows which error.

A mistake of the user is one line from rank 0. A crash is a trace with the rank and host above it, from the rank that
crashed. Whatever ends one process ends all of them, see `watchdog.py`. One process alone behaves like any command.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback

import click
import torch
import torch.distributed as dist

from torch_utils.checkpoint import atomic_write
from torch_utils.distributed import barrier, init_from_environment, shut_down
from torch_utils.errors import UserError
from torch_utils.process_environment import ProcessEnvironment, read_environment
from training.sampling import pick_device
from training.stopping import INTERRUPTED, ORDERLY_CODES, PEER_FAILED, STOPPED
from training.watchdog import current_watchdog, end_process, start_watchdog, stop_watchdog, write_line

# Rank 0 writes its exit code there, as torchrun turns every code into 1.
EXIT_FILE_VARIABLE = "STYLESAN_EXIT_FILE"
QUIET_EXIT_S = 3.0  # before there is a store: time for rank 0 to say it before the launcher stops everybody
_COLLECTIVE_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "socket", "tcpstore")


def join_processes(device: str) -> torch.device:
    """The device that --device names; with torchrun's variables set, this process joins the others first."""
    environment = read_environment()
    if environment is None or environment.world_size == 1:
        return pick_device(device)
    return init_from_environment(pick_device(device).type, on_connect=start_watchdog)


def run_command(command: click.Command) -> None:
    """Run a script's command and end this process with its exit code. The last line of a script."""
    try:
        environment = read_environment()
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    if environment is None or environment.world_size == 1:
        _run_alone(command)
        return
    if environment.rank != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- until the end; what all ranks would print, rank 0 prints
    try:
        code = command.main(standalone_mode=False) or 0
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    except click.exceptions.Exit as exit_request:
        code = exit_request.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail(environment, "interrupted", INTERRUPTED, is_common=True)
    except (click.ClickException, UserError) as error:
        _fail_for_user(environment, error)
    except BaseException as error:
        _fail_by_crash(environment, error)
    if code not in ORDERLY_CODES:
        _fail(environment, f"ended with exit code {code}", code, is_common=True)
    try:
        barrier()  # nobody leaves while another one may still need it
        stop_watchdog()
        shut_down()
    except BaseException as error:
        _fail_by_crash(environment, error)
    write_exit_code(environment, code)
    if code != 0:
        _write_error_file("stopped on request, everything is saved; start again with --resume", "")
    sys.exit(code_for_agent(environment, code))


def write_exit_code(environment: ProcessEnvironment | None, code: int) -> None:
    """Leave rank 0's exit code for a script to read, where STYLESAN_EXIT_FILE says; nothing without it."""
    path = os.environ.get(EXIT_FILE_VARIABLE)
    if not path or (environment is not None and environment.rank != 0):
        return
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(f"{code}\n", encoding="utf-8")
    except OSError as error:
        write_line(f"Warning: {EXIT_FILE_VARIABLE}={path} cannot be written ({error.strerror})")


def code_for_agent(environment: ProcessEnvironment, code: int) -> int:
    """The exit code for whoever started this process.

    A torchrun that may restart would take a requested stop for a failure and start again at once: it is told 0.
    """
    is_stop = code in (STOPPED, INTERRUPTED)
    return 0 if is_stop and environment.max_restarts > 0 else code


def _run_alone(command: click.Command) -> None:
    code = 1  # of what crashes
    try:
        code = command.main(standalone_mode=False) or 0
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
        raise
    except click.exceptions.Abort:  # a KeyboardInterrupt, for which click itself would exit with 1
        click.echo("Aborted!", err=True)
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    finally:
        write_exit_code(None, code)
    sys.exit(code)


def _fail_for_user(environment: ProcessEnvironment, error: click.ClickException | UserError) -> None:
    """One line from rank 0, whichever ranks raise it."""
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    code = error.exit_code if isinstance(error, click.ClickException) else 1
    if environment.rank == 0:
        sys.stdout.flush()
        if isinstance(error, click.ClickException):
            error.show()
        else:
            click.echo(f"Error: {error}", err=True)
    _fail(environment, message, code, is_common=getattr(error.__cause__, "is_common", True))


def _fail_by_crash(environment: ProcessEnvironment, error: BaseException) -> None:
    """The trace, with rank and host on top; but if only a connection broke, whoever broke it comes first."""
    watchdog = current_watchdog()
    if watchdog is not None and is_of_connection(error):
        watchdog.await_verdict()  # usually does not return
    place = environment.describe()
    text = "".join(traceback.format_exception(error))
    write_line(f"{place} failed: {type(error).__name__}: {error}\n{text.rstrip()}")
    _fail(environment, f"{type(error).__name__}: {error}", 1, is_common=False, trace=text)


def is_of_connection(error: BaseException) -> bool:
    """Whether an error came from talking to other ranks, so that the fault may be theirs."""
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _COLLECTIVE_WORDS)


def _fail(environment: ProcessEnvironment, message: str, code: int, is_common: bool, trace: str = "") -> None:
    """Tell the other ranks and the launcher, and end this process."""
    _write_error_file(message, trace)
    write_exit_code(environment, code)
    watchdog = current_watchdog()
    if watchdog is None:
        if environment.rank != 0 and is_common:
            time.sleep(QUIET_EXIT_S)
        end_process(code)
    is_first = watchdog.fail(message, is_common)
    if environment.rank == 0:
        watchdog.mark_shown()
        time.sleep(2 * watchdog.limits.interval_s)  # the store may live here: let the others read why
    end_process(code if is_first or is_common else PEER_FAILED)


def _write_error_file(message: str, trace: str) -> None:
    """What torchrun shows in its summary, in the form that its ErrorHandler reads."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"timestamp": str(int(time.time()))} | ({"py_callstack": trace} if trace else {})
    content = {"message": {"message": message, "extraInfo": extra}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
