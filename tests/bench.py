"""Time what a method adds to its backbone: python tests/bench.py <paper>|all [--device cpu|cuda] [--record]

`python tests/bench.py loader` times the augmentation backends beside other libraries instead (tests/jobs/loader.py),
`python tests/bench.py loader-memory` the growth of a data worker's own memory over an epoch of 100,000 images.

Each paper folder has `bench.py` with `cases(device) -> list of dicts`:
    name      what is timed
    floor     a function: the forward and backward passes that the paper demands anyway (one step)
    step      a function: the whole training step;  or  method: the added work alone
    items     images, crops, clips or frames of a step
    note      sizes, and what differs from the paper's
    floor_scale   optional factor on the floor's time (a floor measured on part of the batch)
    release       optional function: the original release's step, timed side by side
The overhead is step - floor (or method) over the floor, `x release` our time over the release's (below 1: faster).
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from shared_utils import UserError  # noqa: E402
from shared_utils.data import EpochSampler, Keyed, image_folder  # noqa: E402
from shared_utils.flags import Parser, positive  # noqa: E402
from shared_utils.lab.compare import peak_mib  # noqa: E402
from shared_utils.run import cli, worker_init  # noqa: E402
from tests.jobs.pretraining import record, stamp  # noqa: E402

FUNCTIONS = ("floor", "step", "method", "release")
KEYS: dict[str, Any] = {"name": str, "items": int, "note": str, "floor_scale": (int, float)}


def validate(case: Mapping[str, Any]) -> None:
    """UserError when a case has unknown or missing keys, or values of the wrong kind."""
    label = f"bench case {case.get('name', '?')!r}"
    unknown = set(case) - set(FUNCTIONS) - set(KEYS)
    if unknown:
        raise UserError(f"{label}: unknown keys {sorted(unknown)}")
    if missing := {"name", "floor", "items", "note"} - set(case):
        raise UserError(f"{label}: missing keys {sorted(missing)}")
    if ("step" in case) == ("method" in case):
        raise UserError(f"{label}: needs either step (the whole) or method (the added work alone)")
    wrong = [key for key in FUNCTIONS if key in case and not callable(case[key])]
    wrong += [key for key, kind in KEYS.items() if key in case and not isinstance(case[key], kind)]
    if wrong:
        raise UserError(f"{label}: wrong kind of value for {wrong}")


def seconds(functions: Sequence[Callable[[], None]], device: torch.device, repeats: int, budget: float) -> list[float]:
    """Median wall times after two warm-up calls; `budget` seconds each, about.

    The functions take turns, so that a machine that slows down meanwhile slows all of them.
    """

    def once(function: Callable[[], None]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    warm = sum(once(function) for function in functions)
    if warm < budget:
        for function in functions:
            once(function)
    times: list[list[float]] = [[] for _ in functions]
    while len(times[0]) < repeats and sum(map(sum, times)) < budget * len(functions):
        for function, taken in zip(functions, times):
            taken.append(once(function))
    return [statistics.median(taken) for taken in times]


def measure(case: Mapping[str, Any], device: torch.device, repeats: int, budget: float) -> dict[str, Any]:
    """Time one case; milliseconds, per cent and MiB under the names of the printed columns."""
    validate(case)
    kind = "step" if "step" in case else "method"
    peak = peak_mib(case[kind], device)
    functions = [case[key] for key in ("floor", kind, "release") if key in case]
    floor, timed, *release = (1e3 * value for value in seconds(functions, device, repeats, budget))
    floor *= case.get("floor_scale", 1.0)
    added = timed - floor if kind == "step" else timed
    return {
        "items/s": rate(1e3 * case["items"] / (floor + added)),
        "step ms": f"{floor + added:.1f}",
        "floor ms": f"{floor:.1f}",
        "overhead ms": f"{added:.2f}",
        "overhead %": f"{100 * added / floor:.1f}",
        "peak MiB": f"{peak:.0f} ({kind})",
        "x release": f"{timed / release[0]:.2f}" if release else "-",
        "note": case["note"],
    }


def rate(per_second: float) -> str:
    """Three digits, without an exponent."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def own_memory(pid: int) -> int:
    """Bytes of a process that no other process shares (private pages; Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def loader_memory(count: int, folder: Path, classes: int = 100) -> tuple[int, int]:
    """A data worker's own memory in bytes after the first batch and after an epoch of `count` linked images."""
    for c in range(classes):
        (folder / f"class{c:03d}").mkdir()
        first = folder / f"class{c:03d}" / "image_00000.png"
        Image.new("RGB", (2, 2), (c, 0, 0)).save(first)
        for i in range(1, count // classes):
            os.link(first, first.with_name(f"image_{i:05d}.png"))
    images = image_folder(folder, np.array)
    sampler = EpochSampler(len(images), 100, 0).at(0)
    loader = DataLoader(Keyed(images, 0), batch_sampler=sampler, num_workers=1, worker_init_fn=worker_init)
    batches: Any = iter(loader)
    next(batches)
    (worker,) = batches._workers
    before = own_memory(worker.pid)
    for _ in range(len(sampler) - 3):  # at the end the worker goes: all but what it has fetched ahead
        next(batches)
    return before, own_memory(worker.pid)


def papers() -> list[str]:
    return sorted(path.parents[1].name for path in ROOT.glob("*/lab/bench.py"))


def get_parser() -> Parser:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    kinds = f"a folder with a bench.py, all, loader, or loader-memory: {', '.join(papers())}"
    parser.add_argument("paper", help=kinds)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--repeats", type=positive, default=20, help="calls a median is taken of, at most")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds a timed function gets, about")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--record", action="store_true", help="write the rows into docs/speed.md")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.paper == "loader-memory":
        with tempfile.TemporaryDirectory() as folder:
            before, after = loader_memory(100_000, Path(folder))
        print(f"a worker's own memory: {before / 2**20:.1f} MiB, after 100,000 images {after / 2**20:.1f} MiB, "
              f"{(after - before) / 100_000:.0f} bytes an image")  # fmt: skip
        return 0
    if args.paper == "loader":
        from tests.jobs import loader

        loader.main(args.repeats, args.budget, args.only)
        return 0
    chosen = papers() if args.paper == "all" else [args.paper]
    if unknown := [name for name in chosen if name not in papers()]:
        raise UserError(f"{unknown[0]}: no such folder with a bench.py; there are: {', '.join(papers()) or 'none'}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: this machine has no GPU that torch can use")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{where}, torch {torch.__version__}; medians of up to {args.repeats} calls\n")
    header: list[str] = []
    for name in chosen:
        for case in importlib.import_module(f"{name}.lab.bench").cases(device):
            if args.only not in case.get("name", ""):
                continue
            row = {"case": f"{name}: {case['name']}", **measure(case, device, args.repeats, args.budget)}
            if not header:
                header = [*row, "made"]
                print(f"| {' | '.join(row)} |\n|{' --- |' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)
            if args.record:
                first, *rest = row.values()
                made = f"{where}, torch {torch.__version__}; {stamp()}"
                record(f"bench-{device.type}", header, {first: [*rest, made]}, ROOT / "docs" / "speed.md")
    return 0


if __name__ == "__main__":
    cli(main)
