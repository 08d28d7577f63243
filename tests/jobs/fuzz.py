"""Give each loader damaged and odd folders: python tests/jobs/fuzz.py [--only LOADER] [--case CASE] [--record]

Every loader gets a small set in its publisher's layout, and then the same set with one thing wrong (CASES). It must
either work, on as many files and classes as before, or end with exit code 2 and one line that names the file and the
cure. A traceback, a line without the name, and a set that is smaller than before without a word are failures.

Entry points run as they are (in a forked process, so that libraries are imported once), with a real layout's flags;
where an entry point needs weights or minutes, its reader runs and every item is read.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from shared_utils.run import cli  # noqa: E402
from tests.jobs.fuzz_loaders import LOADERS, Loader  # noqa: E402
from tests.jobs.pretraining import Forked, flags, record, stamp  # noqa: E402

HEADER = ("loader", "how", "works on", "one line, exit code 2", "fails", "commit, date")
CURE = re.compile(r";|expected|give |take |unpack|remove|replace|restore|must |needs |see ")
SECONDS = 120


# --- what is wrong ----------------------------------------------------------------------------------------------------


def convert(mode: str, kind: str = "PNG") -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        image = Image.open(path) if path.suffix in (".jpg", ".png") else Image.new("RGB", (48, 48))
        image = image.convert("RGB")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "animated":
            return image.save(path, "GIF", save_all=True, append_images=[image.rotate(90)])
        else:
            image = image.convert(mode)
        image.save(path, kind)

    return spoil


def bomb(path: Path) -> None:
    """A PNG whose header says 60,000 x 60,000."""
    Image.new("L", (8, 8)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def instead(path: Path, make: Callable[[Path], object]) -> None:
    """Something else where a file or folder was."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def pack(path: Path) -> None:
    """The folder becomes PATH.tar; the archive under the folder's own name where it is the set's root."""
    with tarfile.open(f"{path}.tar", "w") as tar:
        tar.add(path, path.name)
    shutil.rmtree(path)


def link(path: Path, where: Path) -> None:
    """The folder, or half of its files, lies elsewhere and is linked at `where`."""
    apart = Path.cwd() / "apart"
    if where == path:
        path.rename(apart)
    else:
        apart.mkdir()
        for file in sorted(path.iterdir())[::2]:
            file.rename(apart / file.name)
    where.symlink_to(apart, target_is_directory=True)


def latin(path: Path) -> None:
    path.rename(path.with_name(os.fsdecode(b"\xff\xe9") + path.suffix))


FILES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "zero bytes": lambda p: os.truncate(p, 0),
    "16-bit": convert("I;16"),
    "RGBA": convert("RGBA"),
    "CMYK": convert("CMYK", "JPEG"),
    "palette": convert("P"),
    "animated": convert("animated"),
    "huge header": bomb,
    "symlink loop": lambda p: instead(p, lambda q: q.symlink_to(q)),
    "a folder": lambda p: instead(p, lambda q: q.mkdir()),
    "missing": lambda p: p.unlink(),
    "name not UTF-8": latin,
}
FOLDERS: dict[str, Callable[[Path], object]] = {
    "missing": shutil.rmtree,
    "empty": lambda p: instead(p, lambda q: q.mkdir()),
    "a file": lambda p: instead(p, lambda q: q.write_text("x")),
    "an archive": pack,
    "symlink loop": lambda p: instead(p, lambda q: q.symlink_to(q)),
    "a loop inside": lambda p: (p / "loop").symlink_to(p.parent, target_is_directory=True),
    "linked": lambda p: link(p, p),
    "partly linked": lambda p: link(p, p / "more"),
}
LISTS: dict[str, Callable[[Path], object]] = {
    "zero bytes": lambda p: os.truncate(p, 0),
    "binary": lambda p: p.write_bytes(bytes(range(256)) * 8),
    "not UTF-8": lambda p: p.write_bytes(p.read_bytes() + b"\xff\xe9.jpg 1\n"),
    "a folder": lambda p: instead(p, lambda q: q.mkdir()),
    "missing": lambda p: p.unlink(),
}
ROOTS = {name: FOLDERS[name] for name in ("missing", "empty", "a file", "an archive", "symlink loop")}
CASES = {
    f"{kind}: {name}": (kind, spoil)
    for kind, group in (("file", FILES), ("mask", FILES), ("folder", FOLDERS), ("list", LISTS), ("root", ROOTS))
    for name, spoil in group.items()
}


# --- the job ----------------------------------------------------------------------------------------------------------


def attempt(loader: Loader, case: Path, spoil: Callable[[], object]) -> tuple[int, str, str]:
    """Spoil, then run in a forked process; exit code, stdout, stderr."""

    def before() -> None:
        os.chdir(case)
        spoil()

    if callable(loader.how):
        reader = loader.how
        run = Forked(lambda: cli(lambda _: print(f"  data: {reader(case / 'set')}")), case / "said", before)
    else:
        run = Forked(loader.how.format(root=case / "set", out=case / "out").split(), case / "said", before)
    return run.wait(SECONDS)


def facts(stdout: str, case: Path) -> list[str]:
    """What the run said of its data."""
    return [line.replace(str(case), "") for line in stdout.splitlines() if line.startswith("  data: ")]


def judge(code: int, stdout: str, stderr: str, case: Path, clean: list[str], target: Path) -> tuple[str, str]:
    """works, refuses or FAILS, and the line or the reason."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if "Traceback" in stderr or code not in (0, 2):
        return "FAILS", f"exit code {code}: {(stderr.splitlines() or ['nothing said'])[-1][:160]}"
    if code == 0:
        now = facts(stdout, case)
        told = re.search(r"beside the frames are left out: .+", stdout)
        if now != clean and told:
            return "works", told[0]
        return ("works", "") if now == clean else ("FAILS", f"another set: {now}")
    line = (errors or [""])[0].replace(str(case), "")
    named = {target.name, target.stem, target.parent.name, "\\udcff"}
    if len(errors) != 1 or len(errors[0]) > 600:
        return "FAILS", f"not one line: {stderr[-200:]}"
    if not any(name and name in line for name in named):
        return "FAILS", f"does not name {target.name}: {line}"
    return ("refuses", line) if CURE.search(line) else ("FAILS", f"names no cure: {line}")


def fuzz(name: str, work: Path, chosen: str, loud: bool) -> list[str]:
    """All cases of one loader; the cells of its row."""
    loader, found = LOADERS[name], {"works": [], "refuses": [], "FAILS": []}  # type: ignore[var-annotated]
    first = work / "first"
    (first / "set").mkdir(parents=True)
    loader.make(first / "set")
    if callable(loader.how):
        loader.how(first / "set")  # so that what it imports is there for every fork
    code, said, wrong = attempt(loader, first, lambda: None)
    clean = facts(said, first)
    if code or not clean:
        raise SystemExit(f"{name}: its clean set does not work (exit code {code})\n{wrong[-2000:]}{said[-500:]}")
    if loud:
        print(f"{name}: {clean}", flush=True)
    # Where no list names the images, the size that is printed is all that can be said.
    listed = bool(loader.names) and Path(loader.image).stem.encode() in (first / "set" / loader.names).read_bytes()
    fewer = not listed or "attributes" in loader.names
    # A folder within a folder of frames is another sequence, or none.
    linked = ["partly linked"] if name.startswith(("fame fight", "uvos_dino")) else []
    for number, (title, (kind, spoil)) in enumerate(CASES.items()):
        place = {"file": loader.image, "mask": loader.mask, "folder": loader.folder, "list": loader.names, "root": "."}[
            kind
        ]
        if not place or chosen not in title:
            continue
        case = work / f"case{number}"
        shutil.copytree(first / "set", case / "set")
        target = case / "set" / place
        result = attempt(loader, case, lambda t=target, s=spoil: s(t))  # type: ignore[misc]
        verdict, line = judge(*result, case, clean, target)
        if line.startswith("another set") and fewer and title.endswith(("missing", "a folder", *linked)):
            verdict, title = "works", f"{title} (counts fewer)"
        elif verdict == "works" and line:
            title += " (left out, which is said)"
        found[verdict].append(title)
        if loud or verdict == "FAILS":
            print(f"  {name} | {title} | {verdict} | {line}", flush=True)
        shutil.rmtree(case)
    how = "its reader" if callable(loader.how) else loader.how.split()[0]
    return [how, *(summary(found[verdict]) for verdict in found), stamp()]


def summary(titles: list[str]) -> str:
    """`file: a, b; folder: c`."""
    groups: dict[str, list[str]] = {}
    for title in titles:
        kind, _, case = title.partition(": ")
        groups.setdefault(kind, []).append(case)
    return "; ".join(f"{kind}: {', '.join(cases)}" for kind, cases in groups.items()) or "-"


def main() -> int:
    parser = flags(__doc__, [], "LOADER")
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as `file: 16-bit`")
    parser.add_argument("--loud", action="store_true", help="print every line, not only what fails")
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[str]] = {}
    for name in LOADERS:
        if args.only and not any(only in name for only in args.only):
            continue
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=args.work) as work:
            rows[name] = fuzz(name, Path(work), args.case, args.loud)
        print(f"{name}: {' | '.join(rows[name][1:4])}", flush=True)
        if args.record and not args.case:
            record("fuzz", HEADER, {name: rows[name]})
    return int(any(row[3] != "-" for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
