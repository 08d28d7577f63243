"""The entry point of a script: mistakes, full disks and readers that have gone end it with one line and a code."""

import contextlib
import errno
import io
import multiprocessing
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from shared_utils import UserError, distributed

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

open_runs: list[Any] = []  # whose tensorboard files are still being written


class Diverged(UserError):
    """A non-finite loss."""


def _thread_died(what: threading.ExceptHookArgs) -> None:
    """tensorboard's thread hands a full disk on to the next call, whose one line is enough."""
    if not (isinstance(what.exc_value, OSError) and what.exc_value.errno in FULL):
        threading.__excepthook__(what)


def _cause(error: Exception) -> Exception:
    """A loss that was not finite and that its run has not looked at yet, where a later line failed by it."""
    if not isinstance(error, UserError | OSError):
        for run in open_runs:
            try:
                run.look()
            except Diverged as first:
                return first
            except Exception:  # the device itself has failed
                return error
    return error


def _say(error: Exception) -> tuple[int, bool]:
    """What ended an entry point, on stderr; its exit code, and whether nothing more can be written."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2, False
    if isinstance(error, BrokenPipeError):
        stdout = select.poll()
        stdout.register(sys.stdout.fileno(), 0)
        if stdout.poll(0):  # its reader has gone (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE, True
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        # Told by a signal, perhaps in the middle of a step: there is nothing to save, and nothing wrong with the code.
        reason = " ".join(str(error).split())[:200]
        print(
            f"error: {reason}; where memory is short give fewer --workers (0: none), then start again", file=sys.stderr
        )
        return 2, False
    if isinstance(error, OSError) and error.errno in FULL:  # logs and pictures are small: any may be what does not fit
        where = error.filename or ", ".join(str(run.dir) for run in open_runs) or "the output folder"
        print(f"error: {where}: {error.strerror}; free space, then the same command goes on", file=sys.stderr)
        return 2, True
    traceback.print_exception(error)
    return 1, False


def cli(main: Callable[[list[str] | None], int | None]) -> NoReturn:
    """Run an entry point; a UserError becomes one line on stderr and exit code 2 (diverged: 1); a full disk too.

    Ctrl-C: one line and 130.
    """
    at_once, threading.excepthook = False, _thread_died
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text that it can write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: Any = main(None) or 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:  # outside the steps of a run, which save first
        print("stopped by SIGINT", file=sys.stderr)
        code, at_once = 128 + signal.SIGINT, True
        for run in open_runs:
            run.note("stopped by SIGINT")
    except Exception as error:
        error = _cause(error)
        code, at_once = _say(error)
        for run in open_runs:
            run.note(f"failed: {str(error) or type(error).__name__}".splitlines()[0])
    if (code == 0 or code > 128) and not at_once:  # all processes are here; after an error others may wait for this one
        distributed.leave()
    for run in list(open_runs):
        with contextlib.suppress(OSError):  # what is left of tensorboard's file, on a full disk
            run.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly exit would wait for data workers that a traceback still holds, and for other processes that wait for
    # this one, and would try once more to write what did not fit. At once, then: workers go when their parent has gone.
    # So torchrun also learns soon that a process has failed because another one has gone.
    if at_once or distributed.world() > 1 or multiprocessing.active_children():
        os._exit(code)
    sys.exit(code)
