"""Kill each folder's pretraining, and show that it ends as if nothing had happened: python tests/crash.py [--record]

A short pretraining of the mini tier runs once undisturbed and then, into other folders, under each event:

SIGKILL         at drawn moments: while it starts, inside a step, while a checkpoint is written
SIGTERM         at a drawn moment; it must save, say so and exit with 143
full disk       the folder of the checkpoint has no room left after a drawn step; then there is room again
truncated       SIGKILL, then the checkpoint is cut at a drawn byte; then the cure that the error names

After each of them the same command goes on. The end must be bit-identical: every tensor of the checkpoint (weights,
optimiser, queues, generators) and every line of the log. Where a run must stop, it stops with exit code 2 and one line.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.checkpoints import differing  # noqa: E402
from tests.pretraining import (  # noqa: E402
    PRETRAININGS,
    ROOT,
    Forked,
    command,
    environment,
    flags,
    log,
    prepare,
    record,
    stamp,
    table,
)  # fmt: skip

HEADER = ("folder", "undisturbed", "SIGKILL", "SIGTERM", "full disk", "truncated checkpoint", "commit, date")
PATIENCE = 600.0  # seconds that one process may take


class Failed(Exception):
    """What a run did otherwise than it must."""


class Folder:
    """One folder's pretraining: starts it, waits for moments of it, compares its end."""

    def __init__(self, name: str, work: Path, seed: int):
        self.name, self.work, self.rng = name, work, random.Random(f"{name} {seed}")
        self.whole = work / "whole"
        self.before, self.seconds, self.steps = 0.0, 0.0, 0  # until the first step, from there on, and how many

    def start(self, out: Path, extra: str = "", limit: int = 0) -> Forked:
        """`limit`: bytes that a file may have."""
        short = PRETRAININGS[self.name]
        words = command(self.name, f"{short.script} {short.flags} {extra}", self.work, out)

        def before() -> None:
            os.chdir(ROOT)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return Forked(words, self.work / out.name, before, **environment(self.work))

    def end(self, run: Forked, code: int) -> tuple[str, str]:
        """What the run said, after its end, which must have this exit code."""
        found, said, error = run.wait(PATIENCE)
        if found != code:
            raise Failed(f"exit code {found} instead of {code}: {' '.join(error.split())[-300:]}")
        return said, error

    def stop(self, run: Forked) -> str:
        """SIGKILL; what it had said."""
        run.kill(signal.SIGKILL)
        return run.wait(PATIENCE)[1]

    def refused(self, run: Forked, *words: str) -> str:
        """The one line of a run that must stop with exit code 2; it names these words."""
        lines = [line for line in self.end(run, 2)[1].splitlines() if line.strip()]
        if len(lines) != 1 or not all(word in lines[0] for word in ("error: ", *words)):
            raise Failed(f"not one line with {', '.join(words)}: {' / '.join(lines)[-400:]}")
        return lines[0]

    def until(self, run: Forked, there: Callable[[], bool]) -> bool:
        """Wait for something; False if the run has ended without it."""
        while not there():
            if run.ended():
                return False
            time.sleep(0.001)
        return True

    def reached(self, out: Path, step: int) -> Callable[[], bool]:
        return lambda: bool(rows := log(out)) and rows[-1][0] >= step

    def within_a_step(self) -> None:
        time.sleep(self.rng.random() * self.seconds / self.steps)

    def finish(self, out: Path, extra: str = "") -> None:
        """Start again, and compare the end with the undisturbed run's."""
        self.end(self.start(out, extra), 0)
        if unequal := differing(self.whole, out):
            raise Failed(f"{len(unequal)} tensors differ, among them {unequal[0]}")
        if log(self.whole) != log(out):
            raise Failed("the log has other lines than the undisturbed run's")
        if left := list(out.glob(".*")):
            raise Failed(f"left over: {left[0].name}")


def undisturbed(it: Folder) -> str:
    begun = time.perf_counter()
    run = it.start(it.whole)
    it.until(run, it.reached(it.whole, 1))
    first = time.perf_counter()
    it.end(run, 0)
    it.before, it.seconds, it.steps = first - begun, time.perf_counter() - first, log(it.whole)[-1][0]
    return f"{it.steps} steps"


def killed(it: Folder) -> str:
    """Once while it starts, twice inside a step, once while a checkpoint is written (its temporary is there)."""
    out, seen, said = it.work / "killed", [], ""
    run = it.start(out)
    time.sleep(it.rng.random() * it.before)
    it.stop(run)
    for step in sorted(it.rng.sample(range(2, it.steps), 2)):
        run = it.start(out)
        it.until(run, it.reached(out, step))
        it.within_a_step()
        said += it.stop(run)
        seen.append(log(out)[-1][0])
    run = it.start(out)
    writing = it.until(run, lambda: any(out.glob(".checkpoint.pth.*.tmp")))
    said += it.stop(run)
    shutil.copytree(out, it.work / "truncated")
    it.finish(out)
    if "resumed: " not in said:
        raise Failed("no run went on from a checkpoint")
    return f"start, steps {', '.join(map(str, seen))}{', a write' if writing else ''}: identical"


def terminated(it: Folder) -> str:
    out = it.work / "terminated"
    run = it.start(out)
    it.until(run, it.reached(out, it.rng.randrange(1, it.steps - 1)))
    it.within_a_step()
    run.kill(signal.SIGTERM)
    said, _ = it.end(run, 143)
    if "stopped by SIGTERM" not in said:
        raise Failed("nothing was said of SIGTERM")
    at = log(out)[-1][0]
    it.finish(out)
    return f"exit code 143 at step {at}: identical"


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path | None]:
    """A file system of so many bytes; None where this user may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        mounted = subprocess.run(words, capture_output=True).returncode == 0
        try:
            yield Path(folder) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


def full_disk(it: Folder) -> str:
    size = sum(file.stat().st_size for file in it.whole.rglob("*") if file.is_file())
    step = it.rng.randrange(3, it.steps - 2)
    with small_disk(4 * size + 2**22) as disk:
        if disk is None:  # a file may not become as large as the checkpoint: another error number, the same path
            out, how = it.work / "full", "RLIMIT_FSIZE"
            error = it.refused(it.start(out, limit=(it.whole / "checkpoint.pth").stat().st_size // 2), str(out))
        else:
            out, how = disk / "run", f"tmpfs, full after step {step}"
            run = it.start(out)
            it.until(run, it.reached(out, step))
            with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
                while ballast.write(bytes(2**16)):
                    pass
            error = it.refused(run, str(out), "free space")
            (disk / "ballast").unlink()
        print(f"    {error}", flush=True)
        it.finish(out)
    return f"{how}: one line, then identical"


def truncated(it: Folder) -> str:
    """The folder that `killed` left before its last start."""
    out, share = it.work / "truncated", it.rng.random()
    file = out / "checkpoint.pth"
    os.truncate(file, int(share * file.stat().st_size))
    error = it.refused(it.start(out), str(file), "--overwrite")
    print(f"    {error}", flush=True)
    it.finish(out, "--overwrite")
    return f"cut at {100 * share:.0f} %: one line, after --overwrite identical"


def main() -> int:
    args = flags(__doc__, list(PRETRAININGS), "FOLDER").parse_args()
    rows: dict[str, list[str]] = {}
    for name in args.only or PRETRAININGS:
        work = Path(tempfile.mkdtemp(prefix=f"crash-{name}-", dir=args.work))
        it, cells = Folder(name, work, args.seed), []
        try:
            prepare(name, work)
            for event in (undisturbed, killed, terminated, full_disk, truncated):
                try:
                    cells.append(event(it))
                except Failed as error:
                    cells.append(f"FAILED: {error}")
                print(f"{name} {event.__name__}: {cells[-1]}", flush=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        rows[name] = [*cells, stamp()]
        if args.record:
            record("crash", HEADER, {name: rows[name]})
    print(table(HEADER, rows))
    return int("FAILED" in str(rows))


if __name__ == "__main__":
    raise SystemExit(main())
