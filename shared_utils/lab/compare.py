"""Our functions beside an original release's, in one process: the checkout, the table of differences, its verdict.

A folder's compare_release.py imports the release from a checkout and yields rows; nothing here knows a paper.
"""

import argparse
import ctypes
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from shared_utils import UserError
from shared_utils.flags import natural

CPU = torch.device("cpu")


class Row(NamedTuple):
    """One line of the table; `off` is the largest difference over the largest value of the release."""

    what: str
    ours: float
    theirs: float
    off: float
    limit: float


def row(what: str, ours: Any, theirs: Any, limit: float) -> Row:
    """Compare two numbers or tensors; a tensor is shown by its norm."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach().flatten() for x in (ours, theirs))
    off = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.shape == b.shape else math.inf
    first, second = (float(x) if len(x) == 1 else float(x.norm()) for x in (a, b))
    return Row(what, first, second, off, limit)


def add_flags(p: argparse.ArgumentParser, url: str, timed: str) -> None:
    """`timed`: what --speed times."""
    p.add_argument("--release", type=Path, required=True, metavar="PATH", help=f"a checkout of {url}")
    p.add_argument("--speed", action="store_true", help=f"also time {timed}")
    p.add_argument("--threads", type=natural, default=0, help="0: as torch chooses")


def add_step_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--step", metavar="DEVICE", help="also time the whole training step there: cpu, cuda, cuda:1")


@contextmanager
def one_process(device: torch.device = CPU) -> Iterator[None]:
    """A process group of this process alone, for releases that gather before they look how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def check(root: Path, url: str, files: Sequence[str], packages: Mapping[str, str]) -> None:
    """UserError unless `root` is a checkout with these files and the packages {import name: name for pip} are there."""
    missing = [name for name in files if not (root / name).is_file()]
    if missing:
        raise UserError(f"--release {root}: no checkout of the release, {missing[0]} is missing; git clone {url}")
    wanted = [pip for name, pip in packages.items() if importlib.util.find_spec(name) is None]
    if wanted:
        raise UserError(f"packages that the release imports are missing: pip install {' '.join(wanted)}")


def report(rows: Iterable[Row]) -> int:
    """Print the table; how many rows differ by more than they may."""
    print(f"{'':66s} {'ours':>12s} {'release':>12s} {'difference':>11s} {'allowed':>8s}")
    failed = 0
    for line in rows:
        bad = not line.off <= line.limit
        failed += bad
        numbers = f"{line.ours:12.6g} {line.theirs:12.6g} {line.off:11.1e} {line.limit:8.0e}"
        print(f"{line.what:66s} {numbers}{'  DIFFERS' if bad else ''}", flush=True)
    return failed


def verdict(failed: int) -> int:
    """Say how many demands were missed; the exit code."""
    print("all within tolerance" if not failed else f"{failed} beyond what is allowed")
    return int(failed > 0)


def updater(network: nn.Module, fused: bool) -> Callable[[torch.Tensor], None]:
    """A function that takes a loss and does the rest of a step: gradients and SGD with the releases' momentum."""
    sgd = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=fused)

    def update(loss: torch.Tensor) -> None:
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    return update


def time_steps(
    ours: Callable[[], Any], theirs: Callable[[bool], Any], device: torch.device, images: int, repeats: int
) -> None:
    """Print time, images per second and peak memory of whole training steps on a device; they take turns.

    Args:
        theirs: the release's step; whether it runs under the bfloat16 autocast of ours, or as published.
    """
    steps = {
        "ours, bfloat16": ours,
        "release, bfloat16 autocast": lambda: theirs(True),
        "release, float32": lambda: theirs(False),
    }

    def synchronised(step: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    with one_process(device):
        calls = [synchronised(step) for step in steps.values()]
        peaks = []
        for call in calls:
            call()  # the first one allocates what stays
            peaks.append(peak_mib(call, device))
        times = fastest(calls, repeats)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"whole step, {images} images, {where}, torch {torch.__version__}")
    for name, seconds, peak in zip(steps, times, peaks):
        print(f"  {name:28s} {1e3 * seconds:9.1f} ms {images / seconds:8.1f} images/s  peak {peak:6.0f} MiB")


def fastest(functions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Shortest wall time of each; they take turns, so that a busy machine slows all of them."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            function()
            if turn or repeats == 1:  # the first round warms up
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def peak_mib(function: Callable[[], Any], device: torch.device = CPU) -> float:
    """Peak of the memory allocated during one call on a GPU; else growth of the resident high-water mark (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) / 2**20

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is given back, so that it counts again
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        function()
        return status("VmHWM") - before
    except (OSError, AttributeError):
        return math.nan
