"""shared_utils/env.sh, with stand-ins for Python that record what is asked of them: nothing is installed here."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Answers like a bare Python: it serves nothing, makes virtual environments (copies of itself) and installs by taking
# note. FAIL_PIP lets the installation fail, SLOW makes it last, LACKS names a module that is missing.
BARE = """#!/bin/bash
for word in "$@"; do [ -n "$LACKS" ] && case $word in *"import $LACKS"*) exit 1 ;; esac; done
case "$*" in
  *" - run" | *" - tests") echo everything ;;
  *"-m venv"*)
    echo "venv $*" >> "$NOTES"
    target=${!#}; rm -rf "$target"; mkdir -p "$target/bin"; cp "$0" "$target/bin/python" ;;
  *"pip install"*) echo "pip $*" >> "$NOTES"; sleep "${SLOW:-0}"; [ -z "$FAIL_PIP" ] ;;
  *sys.executable*) echo "$0" ;;
esac
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A root with the requirement files and env.sh, and beside it a PATH with the bare Python only."""
    (tmp_path / "root" / "tests").mkdir(parents=True)
    (tmp_path / "root" / "shared_utils").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("requirements.txt", "tests/requirements.txt", "shared_utils/env.sh"):
        shutil.copy(ROOT / name, tmp_path / "root" / name)
    for name in ("bash", "cat", "cksum", "mkdir", "flock", "sleep", "tail", "rm", "cp"):
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    python = tmp_path / "bin" / "python3.11"
    python.write_text(BARE)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def start(house: Path, *words: str, **extra: str) -> subprocess.Popen[str]:
    line = f'set -euo pipefail; source shared_utils/env.sh {" ".join(words)}; echo "PYTHON=$PYTHON"'
    environment = {"PATH": str(house / "bin"), "NOTES": str(house / "notes"), "LACKS": "", "FAIL_PIP": "", **extra}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["bash", "-c", line],
        cwd=house / "root",
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def source(house: Path, *words: str, **extra: str) -> tuple[int, str, str]:
    process = start(house, *words, **extra)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err.strip()


def notes(house: Path) -> list[str]:
    path = house / "notes"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_made_once_and_where_it_says(house: Path) -> None:
    venv = house / "root" / ".venv"
    code, out, err = source(house)
    assert (code, out) == (0, f"PYTHON={venv}/bin/python")
    assert str(venv) in err and "GB" in err and "minutes" in err
    assert notes(house) == ["venv", "pip"]
    assert source(house) == (0, f"PYTHON={venv}/bin/python", "")
    assert notes(house) == ["venv", "pip"]


def test_another_place(house: Path) -> None:
    code, out, _ = source(house, VENV=str(house / "elsewhere"))
    assert (code, out) == (0, f"PYTHON={house}/elsewhere/bin/python")
    assert not (house / "root" / ".venv").exists()


def test_changed_requirements_are_installed_into_it(house: Path) -> None:
    source(house)
    with (house / "root" / "requirements.txt").open("a") as stream:
        stream.write("einops==1.0\n")
    assert source(house)[0] == 0
    assert notes(house) == ["venv", "pip", "pip"]
    assert source(house)[2] == ""


def test_what_the_tests_need_is_added_once(house: Path) -> None:
    source(house)
    assert source(house, "tests")[0] == 0
    assert "-r tests/requirements.txt" in (house / "notes").read_text().splitlines()[-1]
    assert source(house, "tests")[2] == "" and source(house)[2] == ""
    assert notes(house) == ["venv", "pip", "pip"]


def test_failed_installation_is_said_and_made_anew(house: Path) -> None:
    code, out, err = source(house, FAIL_PIP="1")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: pip could not install")
    assert source(house)[0] == 0
    assert notes(house) == ["venv", "pip", "venv", "pip"]


def test_killed_installation_is_made_anew(house: Path) -> None:
    process = start(house, SLOW="60")
    while "pip" not in notes(house):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # its own session, see start()
    process.communicate()
    code, _, err = source(house)
    assert code == 0 and "ready" in err
    assert notes(house) == ["venv", "pip", "venv", "pip"]


def test_two_at_once_install_once(house: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("no flock on this machine: two first runs at once are not kept apart")
    first, second = start(house, SLOW="0.7"), start(house, SLOW="0.7")
    said = first.communicate(timeout=60)[1] + second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (0, 0)
    assert notes(house) == ["venv", "pip"]
    assert "another run is preparing" in said


def test_no_python(house: Path) -> None:
    (house / "bin" / "python3.11").unlink()
    code, out, err = source(house)
    assert (code, out) == (2, "")
    assert err.splitlines() == [line for line in err.splitlines() if line.startswith("error: no Python 3.10")]


def test_no_venv_module(house: Path) -> None:
    code, _, err = source(house, LACKS="ensurepip")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: python3.11 cannot make") and "apt-get install python3-venv" in err


def test_unwritable_place(house: Path) -> None:
    (house / "file").write_text("")
    code, _, err = source(house, VENV=str(house / "file" / "venv"))
    assert code == 2 and "VENV=" in err.splitlines()[-1]


def test_not_from_the_root(tmp_path: Path) -> None:
    script = f"set -e; source {ROOT}/shared_utils/env.sh; echo unreachable"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "root of the repository" in done.stderr


def test_active_environment_is_taken_when_it_serves(house: Path) -> None:
    lacks = 'source shared_utils/env.sh >/dev/null 2>&1; _env_lacks "$0" run'
    environment = {**os.environ, "PYTHON": sys.executable, "SKIP_ENV": "1"}
    done = subprocess.run(
        ["bash", "-c", lacks, sys.executable], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.stdout:
        pytest.skip(f"this environment lacks {done.stdout}")
    code, out, err = source(house, PYTHON=sys.executable, VENV=str(house / "unused"))
    assert (code, out, err) == (0, f"PYTHON={sys.executable}", "")
    assert not (house / "unused").exists()


def test_skip_takes_python_as_it_is(house: Path) -> None:
    assert source(house, SKIP_ENV="1", PYTHON="any") == (0, "PYTHON=any", "")
