"""A Python that starts at once: a fork of one process that has imported torch before.

`forks(folder)` starts that process and gives the path of an executable that stands for `sys.executable` in commands and
scripts. What it is asked for (`-m module`, `-c code`, a file) runs as `__main__` in a process of its own, with the
caller's files, folder and variables; signals and the exit code are handed on, and it is killed when its caller is.
With other words for Python, or with other values of what libraries read while they are loaded, the real one is started.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

# Libraries only: the modules of the tree are imported by each fork, as by each start.
IMPORTED = (
    "torch", "torchvision", "torch._dynamo", "torch._inductor.config", "torch.utils.tensorboard",
    "torch.distributed.launcher.api", "torch.distributed.elastic.agent.server.local_elastic_agent",
    "cv2", "PIL.Image", "scipy.optimize", "sklearn.linear_model", "timm", "matplotlib.pyplot", "av",
)  # fmt: skip
LOADED = ("OMP_", "MKL_", "ATEN_", "ONEDNN_", "DNNL_", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONWARNINGS")

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
real, words = {python!r}, sys.argv[1:]
def start(): os.execv(real, [real, *words])
rest = words[1:] if words[:1] == ["-u"] else words
if not rest or rest[0][:1] == "-" and (rest[0] not in ("-m", "-c") or len(rest) < 2): start()
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
try: server.connect({address!r})
except OSError: start()
asked = json.dumps(dict(words=rest, unbuffered=rest != words, folder=os.getcwd(), env=dict(os.environ))).encode()
files = array.array("i", [0, 1, 2])
handed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)  # one that comes before there is somebody to hand it on to, waits
server.sendmsg([len(asked).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(asked)
answer = server.makefile("r")
child = int(answer.readline() or 0)
for number in handed_on if child else ():
    signal.signal(number, lambda number, frame: os.kill(child, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, handed_on)
if not child: start()
code = int(answer.readline())
if code < 0:
    if -code != signal.SIGKILL: signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def forks(folder: Path) -> Iterator[str]:
    """The executable, in an empty `folder` with a short name; its server ends with the context."""
    address, client = str(folder / "s"), folder / "python"
    command = [sys.executable, "-c", "import sys; from tests.forks import serve; serve(sys.argv[1])", address]
    root = Path(__file__).resolve().parent.parent
    server = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        yield str(client)
    finally:
        server.communicate()  # its stdin ends: so does it


def serve(address: str) -> None:
    """Fork for whoever connects, until stdin ends."""
    own = loaded(dict(os.environ))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([0, listener.fileno()], [], [])
        if 0 in ready:
            os._exit(0)
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            attend(caller, own)
        caller.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def loaded(environment: dict[str, str]) -> dict[str, str]:
    """The variables that libraries read while they are loaded."""
    return {name: value for name, value in environment.items() if name.startswith(LOADED)}


def attend(caller: socket.socket, own: dict[str, str]) -> NoReturn:
    """Watch one start until it or its caller ends."""
    files = array.array("i")
    head, sent, _, _ = caller.recvmsg(4, socket.CMSG_LEN(3 * files.itemsize))
    files.frombytes(sent[0][2])
    stream = caller.makefile("rb")
    asked = json.loads(stream.read(int.from_bytes(head, "big")))
    if loaded(asked["env"]) != own:
        os._exit(0)  # the caller starts the real Python
    if (child := os.fork()) == 0:
        stream.close()
        caller.close()
        start(asked, list(files))
    for file in files:
        os.close(file)
    caller.sendall(b"%d\n" % child)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, caller.fileno()], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        caller.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def start(asked: dict, files: list[int]) -> NoReturn:
    """What the real Python does with these words, here."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["env"])
    assert isinstance(sys.stdout, io.TextIOWrapper)  # nothing was written to it before
    sys.stdout.reconfigure(write_through=asked["unbuffered"])
    sys.modules["__main__"] = types.ModuleType("__main__")
    code: object = 0
    try:
        execute(asked["words"], asked["folder"], asked["env"].get("PYTHONPATH", "").split(":"))
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # An interpreter that takes down all that its server has imported is half a second slower.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def execute(words: list[str], folder: str, path: list[str]) -> None:
    """`words` as Python's command line, `path` before the libraries."""
    path = [entry for entry in path if entry]
    main = vars(sys.modules["__main__"])
    if words[0] == "-m":
        sys.argv, sys.path[0:1] = ["-m", *words[2:]], [folder, *path]
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    elif words[0] == "-c":
        sys.argv, sys.path[0:1] = ["-c", *words[2:]], ["", *path]
        exec(compile(words[1], "<string>", "exec"), main)
    else:
        sys.argv, sys.path[0:1] = words, [os.path.dirname(os.path.realpath(words[0])), *path]
        main["__file__"] = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main)
