"""The Python that starts at once does what the real one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORDS = (
    "import os, sys; print(sys.argv, __name__, os.environ['X'], os.getcwd(), 'torch' in sys.modules, sys.stdin.read())"
)


@pytest.mark.parametrize("how", ["-c", "-m", "file", "-X"])
def test_files_words_variables_and_folder_are_the_caller_s(how: str, python: str, tmp_path: Path) -> None:
    (tmp_path / "mod.py").write_text(WORDS)
    first = {"-c": ["-c", WORDS], "-m": ["-m", "mod"], "file": ["mod.py"], "-X": ["-X", "utf8", "mod.py"]}[how]
    answers = []
    for start in (sys.executable, python):
        command, told = [start, *first, "c d"], {**os.environ, "X": "a b"}
        done = subprocess.run(
            command, env=told, cwd=tmp_path, input="typed", capture_output=True, text=True, check=True
        )
        answers.append(done.stdout)
    known = {True: "True", False: "False"}[how != "-X"]  # words that the forks do not know start the real one
    assert answers[0].replace("False typed", f"{known} typed") == answers[1]


def test_other_values_of_what_libraries_read_start_the_real_one(python: str) -> None:
    command = [python, "-c", "import sys; print('torch' in sys.modules)"]
    for value, expected in ((os.environ.get("OMP_NUM_THREADS", ""), "True"), ("7", "False")):
        environment = {k: v for k, v in {**os.environ, "OMP_NUM_THREADS": value}.items() if v}
        assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == expected


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os.kill(os.getpid(), 15)", -15, ""),
    ],
)
def test_ends_as_the_real_one(code: str, expected: int, said: str, python: str) -> None:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode == expected and done.stderr.strip().endswith(said) and bool(done.stderr) == bool(said)


def test_signals_reach_the_fork_and_it_goes_with_its_caller(python: str) -> None:
    code = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    for number, expected in ((signal.SIGTERM, 5), (signal.SIGKILL, -9)):
        started = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE)
        assert started.stdout is not None
        fork = int(started.stdout.readline())
        assert fork != started.pid
        started.send_signal(number)
        assert started.wait(30) == expected
        started.stdout.close()
        until = time.monotonic() + 30
        while Path(f"/proc/{fork}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{fork}").exists()
