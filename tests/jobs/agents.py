"""Two nodes on one machine: python tests/jobs/agents.py [--only FOLDER] [--record]

Two torchrun agents, one process each, meet through the PET_ variables of docs/running.md, and run each folder's
script. With the same global batch as one process they must end with its loss (EARLY, LATE), as far as the folder can
make two processes compute what one does: see `note` in pretraining.py.

Then the same again, and a drawn worker gets SIGKILL after a drawn step: under PET_MAX_RESTARTS the agents start both
workers anew, which resume; the end must be bit-identical to that of the two that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.checkpoints import differing  # noqa: E402
from tests.jobs.pretraining import (  # noqa: E402
    PRETRAININGS,
    ROOT,
    Forked,
    command,
    environment,
    flags,
    log,
    prepare,
    record,
    script,
    stamp,
)

HEADER = ("folder", "one process", "two agents", "difference", "a worker killed", "without", "commit, date")
EARLY, LATE = 0.001, 0.03  # tolerated in the loss: of the first three steps, where a wrong gradient shows, and of all
CHAOTIC = {"sscl": 0.1}  # its pseudo-labels: one process by other kernels leaves itself by 4.5 %, by two threads 7.7 %
PATIENCE = 1800.0


class Failed(Exception):
    """What a run did otherwise than it must."""


def workers(out: Path) -> list[int]:
    """Process ids of the two training processes: those of this output folder whose parent is a torchrun."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            above = Path(f"/proc/{parent}/cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if str(out) in words and "torch.distributed.run" in above and "torch.distributed.run" not in words:
            found.append(int(entry.name))
    return sorted(found)


def two_agents(name: str, runs: Path, out: Path, disturb: Callable[[], object] = lambda: None) -> str:
    """Both agents from start to end; what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    short = PRETRAININGS[name]
    start = script(name, f"{short.script} {short.flags} {short.two}", out)
    meeting = {
        "PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_RDZV_ID": f"{name}-{out.name}", "PET_MAX_RESTARTS": "3", "GPUS": "1",
    }  # fmt: skip
    said = [open(runs / f"{out.name}-{n}.txt", "w+") for n in (0, 1)]  # noqa: SIM115
    agents = [
        subprocess.Popen(
            start, cwd=ROOT, env={**os.environ, **environment(runs), **meeting}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for file in said
    ]  # fmt: skip
    try:
        disturb()
        codes = [agent.wait(PATIENCE) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    text = ""
    for file in said:
        file.seek(0)
        text += file.read()
        file.close()
    if codes != [0, 0]:
        raise Failed(f"agents ended with {codes}: {' '.join(text.split())[-400:]}")
    return text


def folder(name: str, runs: Path, rng: random.Random) -> list[str]:
    """The cells of a folder's row."""
    short = PRETRAININGS[name]
    prepare(name, runs)
    words = command(name, f"{short.script} {short.flags} {short.one}", runs, runs / "one")
    code, _, error = Forked(words, runs / "alone", lambda: os.chdir(ROOT), environment(runs)).wait(PATIENCE)
    if code:
        raise Failed(f"one process: exit code {code}: {error[-300:]}")
    two_agents(name, runs, runs / "two")
    one, two = log(runs / "one"), log(runs / "two")
    if [step for step, _ in one] != [step for step, _ in two]:
        raise Failed(f"{len(one)} steps of one process, {len(two)} of two")
    apart = [abs(b - a) / max(abs(a), 1e-3) for (_, a), (_, b) in zip(one, two)]
    said = f"{100 * max(apart[:3]):.4f} %, {100 * max(apart):.2f} %"
    cells = [f"{one[-1][1]:.4f} after {one[-1][0]} steps", f"{two[-1][1]:.4f}", said]
    if max(apart[:3]) > EARLY or max(apart) > CHAOTIC.get(name, LATE):
        cells[-1] += ": FAILED"

    step, out = rng.randint(3, one[-1][0] - 3), runs / "killed"
    victim = rng.randrange(2)

    def kill() -> None:
        until = time.monotonic() + PATIENCE
        while not (rows := log(out)) or rows[-1][0] < step:
            if time.monotonic() > until:
                raise Failed(f"step {step} was not reached")
            time.sleep(0.05)
        os.kill(workers(out)[victim], signal.SIGKILL)

    said = two_agents(name, runs, out, kill)
    if "resumed: " not in said:
        raise Failed("no worker resumed")
    unequal = differing(runs / "two", out)
    if log(out) != two:
        unequal.append("the log")
    end = f"FAILED: {len(unequal)} differ, {unequal[0]}" if unequal else "bit-identical"
    return [*cells, f"after step {step}: {end}", short.note or "-", stamp()]


def main() -> int:
    args = flags(__doc__, list(PRETRAININGS), "FOLDER").parse_args()
    failed = False
    for name in args.only or PRETRAININGS:
        runs = Path(tempfile.mkdtemp(prefix=f"agents-{name}-", dir=args.work))
        try:
            cells = folder(name, runs, random.Random(f"{name} {args.seed}"))
        except (Failed, subprocess.TimeoutExpired) as error:
            cells = [f"FAILED: {error}", *[""] * 4, stamp()]
        finally:
            shutil.rmtree(runs, ignore_errors=True)
        failed |= "FAILED" in str(cells)
        print(name, *cells, sep=" | ", flush=True)
        if args.record:
            record("agents", HEADER, {name: cells})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
