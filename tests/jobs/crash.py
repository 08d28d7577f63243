"""Kill each folder's pretraining and show that it ends as if nothing happened: python tests/jobs/crash.py [--record]

A short pretraining of the mini tier runs once undisturbed. Then it runs again, in a folder on a small disk, and suffers

SIGKILL         at drawn moments: while it starts, inside a step, while a checkpoint is half written
SIGTERM         at a drawn moment; it must save, say so and exit with 143
full disk       no room is left after a drawn step; it must stop with exit code 2 and one line; then there is room again

one after another, and the same command goes on each time. Its end must be bit-identical: every tensor of the checkpoint
(weights, optimiser, queues, generators) and every line of the log. At last (truncated) the checkpoint that was there
after the full disk is cut at a drawn byte: one line must name it and the cure, which again leads to the same end.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared_utils.run import Run  # noqa: E402
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
    stamp,
)  # fmt: skip

HEADER = ("folder", "undisturbed", "SIGKILL", "SIGTERM", "full disk", "truncated", "both ends", "commit, date")
PATIENCE = 1800.0  # seconds that one process may take


class Failed(Exception):
    """What a run did otherwise than it must."""


class Folder:
    """One folder's pretraining: starts it, waits for moments of it, compares its end."""

    def __init__(self, name: str, work: Path, seed: int):
        self.name, self.work, self.rng = name, work, random.Random(f"{name} {seed}")
        self.whole, self.old = work / "whole", 0
        self.before, self.seconds, self.steps = 0.0, 0.0, 0  # until the first step, from there on, and how many

    def start(self, out: Path, extra: str = "", limit: int = 0, slow: str = "") -> Forked:
        """`limit`: bytes that a file may have. `slow`: `save`, checkpoints are written in halves, see `in_halves`;
        `step`, a pause after each step, so that a run of milliseconds can be met inside it.
        """
        short, self.old = PRETRAININGS[self.name], self.number(out)
        words = self.change(command(self.name, f"{short.script} {short.flags} {extra}", self.work, out))

        def before() -> None:
            os.chdir(ROOT)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if slow == "save":
                torch.save = in_halves(torch.save)  # type: ignore[assignment]
            if slow == "step":
                Run.log = after_a_pause(Run.log)  # type: ignore[method-assign]

        return Forked(words, self.work / out.name, before, environment(self.work))

    def change(self, words: list[str]) -> list[str]:
        """What is other than in the command that the folder's script starts."""
        return words

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

    def until(self, run: Forked, there: Callable[[], bool], every: float = 0.005) -> None:
        """Wait for something, which must come before the run ends."""
        while not there():
            if run.ended() and not there():
                raise Failed(f"it ended before the drawn moment: {' '.join(run.wait(1)[2].split())[-300:]}")
            time.sleep(every)

    def reached(self, out: Path, step: int) -> Callable[[], bool]:
        """Whether the run that was started last, which writes its log anew from where it resumes, has done `step`."""
        return lambda: self.number(out) != self.old and bool(rows := log(out)) and rows[-1][0] >= step

    def number(self, out: Path) -> int:
        """Of the log's file."""
        return (out / "log.jsonl").stat().st_ino if (out / "log.jsonl").exists() else 0

    def within_a_step(self) -> None:
        time.sleep(self.rng.random() * min(1.0, self.seconds / self.steps))  # it may go faster than the first one went

    def finish(self, out: Path, extra: str = "") -> None:
        """Start again, and compare the end with the undisturbed run's."""
        self.end(self.start(out, extra), 0)
        self.compare(out)
        if left := list(out.glob(".*.tmp")):
            raise Failed(f"left over: {left[0].name}")

    def compare(self, out: Path) -> None:
        """Every tensor and every line of the log with the undisturbed run's."""
        if unequal := differing(self.whole, out):
            raise Failed(f"{len(unequal)} tensors differ, among them {unequal[0]}")
        if log(self.whole) != log(out):
            raise Failed("the log has other lines than the undisturbed run's")


F = TypeVar("F", bound=Folder)
PAUSE = 1.0  # seconds in the middle of a file


def after_a_pause(log: Callable[..., None]) -> Callable[..., None]:
    """`Run.log`, which ends a step, a fifth of a second later."""

    def slowly(*args: Any, **values: Any) -> None:
        log(*args, **values)
        time.sleep(0.2)

    return slowly


def in_halves(save: Callable[[object, IO[bytes]], object]) -> Callable[[object, IO[bytes]], None]:
    """`torch.save` with a pause after half of the file: a small one is written too fast for another process to meet."""

    def slowly(obj: object, handle: IO[bytes]) -> None:
        whole = io.BytesIO()
        save(obj, whole)
        half = len(whole.getbuffer()) // 2
        handle.write(whole.getbuffer()[:half])
        handle.flush()
        time.sleep(PAUSE)
        handle.write(whole.getbuffer()[half:])

    return slowly


def undisturbed(it: Folder) -> str:
    run = it.start(it.whole)  # which imports its libraries, the others do not
    begun = time.perf_counter()
    it.until(run, it.reached(it.whole, 1))
    first = time.perf_counter()
    it.end(run, 0)
    it.before, it.seconds, it.steps = first - begun, time.perf_counter() - first, log(it.whole)[-1][0]
    return f"{it.steps} steps"


def killed(it: Folder, out: Path) -> str:
    """Once while it starts, once inside a step, once while a checkpoint is written (half of its temporary file is)."""
    run = it.start(out)
    moment = time.perf_counter() + it.rng.random() * it.before
    it.until(run, lambda: time.perf_counter() > moment or it.number(out) > 0)  # it may start faster than the first did
    it.stop(run)
    run = it.start(out, slow="step")
    it.until(run, it.reached(out, it.rng.randint(3, 4)))
    it.within_a_step()
    it.stop(run)
    at = log(out)[-1][0]
    run = it.start(out, slow="save")
    half = out / f".checkpoint.pth.{run.pid}.tmp"
    it.until(run, lambda: half.exists() and half.stat().st_size > 0)
    if "resumed: " not in it.stop(run):
        raise Failed("it did not go on from its checkpoint")
    if not half.exists():
        raise Failed("it was not met inside a write")
    return f"while starting, in step {at + 1}, in a write"


def terminated(it: Folder, out: Path) -> str:
    run = it.start(out, slow="step")
    it.until(run, it.reached(out, it.rng.randint(6, 7)))
    it.within_a_step()
    run.kill(signal.SIGTERM)
    if "stopped by SIGTERM" not in it.end(run, 143)[0]:
        raise Failed("nothing was said of SIGTERM")
    return f"exit code 143 after step {log(out)[-1][0]}"


def full_disk(it: Folder, out: Path, mounted: bool) -> str:
    if mounted:
        how, step = "tmpfs", it.rng.randint(8, 9)
        run = it.start(out, slow="step")
        it.until(run, it.reached(out, step))
        with contextlib.suppress(OSError), open(out.parent / "ballast", "wb", buffering=0) as ballast:
            while ballast.write(bytes(2**16)):
                pass
        error = it.refused(run, str(out), "free space")
        (out.parent / "ballast").unlink()
    else:  # a file may not become as large as the checkpoint: another error number, the same path
        how = "RLIMIT_FSIZE"
        error = it.refused(it.start(out, limit=(it.whole / "checkpoint.pth").stat().st_size // 2), str(out))
    print(f"    {error}", flush=True)
    return f"{how}, {log(out)[-1][0]} steps done: one line"


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
                subprocess.run(["umount", "--lazy", folder], check=True)


def truncated(it: Folder) -> str:
    out, share = it.work / "truncated", it.rng.random()
    file = out / "checkpoint.pth"
    os.truncate(file, int(share * file.stat().st_size))
    error = it.refused(it.start(out), str(file), "--overwrite")
    print(f"    {error}", flush=True)
    it.finish(out, "--overwrite")
    return f"cut at {100 * share:.0f} %: one line"


def disturbed(it: Folder) -> list[str]:
    """One run that suffers everything; what each event did."""
    size = sum(file.stat().st_size for file in it.whole.rglob("*") if file.is_file())
    with small_disk(4 * size + 2**22) as disk:
        out = (disk or it.work) / "run"
        cells = [killed(it, out), terminated(it, out), full_disk(it, out, disk is not None)]
        shutil.copytree(out, it.work / "truncated")
        it.finish(out)
    return [*cells, truncated(it)]


def table(about: str | None, job: str, header: Sequence[str], kind: type[F], cells: Callable[[F], list[str]]) -> int:
    """A row for each folder that the command line asks for, printed and with --record written down.

    `cells` gives what lies between the folder's name and the commit. Returns the exit code: 1 where a row failed.
    """
    args = flags(about, list(PRETRAININGS), "FOLDER").parse_args()
    rows: dict[str, list[str]] = {}
    for name in args.only or PRETRAININGS:
        work = Path(tempfile.mkdtemp(prefix=f"{job}-{name}-", dir=args.work))
        try:
            prepare(name, work)
            rows[name] = [*cells(kind(name, work, args.seed)), stamp()]
        except Failed as error:
            rows[name] = [f"FAILED: {error}", *[""] * (len(header) - 3), stamp()]
        finally:
            shutil.rmtree(work, ignore_errors=True)
        print(name, *rows[name], sep=" | ", flush=True)
        if args.record:
            record(job, header, {name: rows[name]})
    return int("FAILED" in str(rows))


def main() -> int:
    return table(__doc__, "crash", HEADER, Folder, lambda it: [undisturbed(it), *disturbed(it), "bit-identical"])


if __name__ == "__main__":
    raise SystemExit(main())
