"""Damage drawn at random, and what each reader makes of it: python tests/jobs/random_damage.py [--count N] [--record]

A reader gets a small set whose pictures differ, and something is done to it: bytes of one file are changed, a file or
folder is added, taken away or renamed, a line of a list is doubled, a number of a label map is another one. Then the
set is read twice, by the product and by a few lines of this file (PIL, OpenCV, zipfile, splitting at commas), which
look at what lies on the disk now. There are four ends:

refused       one line, which names a file or folder that has to do with it
as it is      everything that was read is what is there: names, labels, order, every pixel or number
in silence    something else was read, or what cannot be read rightly was read at all, and nothing was said
traceback     of a kind that an entry point does not turn into a line

The last two are failures. What a damage cannot tell from data (a flipped bit of a JPEG) is read as other decoders do.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from shared_utils import UserError  # noqa: E402
from tests.jobs.damage_readers import READERS, Reader  # noqa: E402
from tests.jobs.damage_truths import FILMS, PICTURES, Damaged, Row, opened  # noqa: E402
from tests.jobs.pretraining import flags, record, stamp  # noqa: E402

HEADER = ("reader", "drawn", "refused in one line", "read as it is", "wrong in silence", "traceback", "commit, date")
LISTS = {".txt", ".csv", ".json"}

# --- what is done to a set --------------------------------------------------------------------------------------------

Damage = Callable[[Path, random.Random], object]


def changed(change: Callable[[bytearray, random.Random], object]) -> Damage:
    def apply(path: Path, rng: random.Random) -> None:
        data = bytearray(path.read_bytes())
        change(data, rng)
        path.write_bytes(data)

    return apply


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zeros(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + 16] = bytes(len(data[at : at + 16]))


def other_kind(path: Path, rng: random.Random) -> None:
    kind = rng.choice(["text", "GIF", "PNG", "BMP"])
    if kind == "text":
        path.write_text("404: Not Found\n")
    else:
        Image.new("RGB", (40, 40), (rng.randrange(256), 80, 160)).save(path, kind)


def with_another(path: Path, rng: random.Random) -> None:
    """Two files change their names."""
    others = [other for other in sorted(path.parent.iterdir()) if other.suffix == path.suffix and other != path]
    if others:
        other, between = rng.choice(others), path.with_name("between")
        path.rename(between), other.rename(path), between.rename(other)  # type: ignore[func-returns-value]


def link(path: Path, rng: random.Random) -> None:
    """The file lies elsewhere; or nowhere."""
    data = path.read_bytes()
    path.unlink()
    path.symlink_to(path.with_name(".apart") if rng.random() < 0.5 else path.with_name("gone"))
    path.with_name(".apart").write_bytes(data)


def hide(path: Path, rng: random.Random) -> None:
    """What file managers and notebooks leave."""
    kind = rng.choice(["._", ".ipynb_checkpoints", "Thumbs.db", "notes.txt", "more.heic"])
    if kind == ".ipynb_checkpoints":
        (path.parent / kind).mkdir()
        shutil.copy(path, path.parent / kind)
    else:
        path.with_name(kind + path.name if kind == "._" else kind).write_bytes(b"\0\5\26\7 of another program")


def deeper(path: Path, rng: random.Random) -> None:
    """Into a folder of its own."""
    (path.parent / "more").mkdir()
    path.rename(path.parent / "more" / path.name)


def emptied(path: Path, rng: random.Random) -> None:
    shutil.rmtree(path.parent)
    if rng.random() < 0.5:
        path.parent.mkdir()


BYTES: dict[str, Damage] = {
    "cut": lambda p, rng: os.truncate(p, rng.randrange(p.stat().st_size)),
    "a bit flipped": changed(flip),
    "a byte drawn": changed(lambda d, rng: d.__setitem__(rng.randrange(len(d)), rng.randrange(256))),
    "16 bytes of zero": changed(zeros),
    "bytes appended": changed(lambda d, rng: d.extend(rng.randbytes(64))),
    "another kind": other_kind,
}
FILES: dict[str, Damage] = BYTES | {
    "gone": lambda p, rng: p.unlink(),
    "copied": lambda p, rng: shutil.copy(p, p.with_name(f"{p.stem} (1){p.suffix}")),
    "renamed": lambda p, rng: p.rename(p.with_name(f"{p.stem}7{p.suffix}")),
    "ending in capitals": lambda p, rng: p.rename(p.with_suffix(p.suffix.upper())),
    "two exchanged": with_another,
    "linked": link,
    "others' files beside it": hide,
    "deeper": deeper,
    "its folder gone": emptied,
    "its folder renamed": lambda p, rng: p.parent.rename(p.parent.with_name(f"{p.parent.name}x")),
    "grey": lambda p, rng: opened(p).convert("L").save(p),
    "16-bit": lambda p, rng: Image.fromarray(np.full((40, 40), rng.randrange(65536), np.uint16)).save(p, "PNG"),
}
MAPS: dict[str, Damage] = {
    "another number": lambda p, rng: renumber(p, rng),
    "another size": lambda p, rng: opened(p).resize((39, 40)).save(p),
    "as JPEG": lambda p, rng: Image.fromarray((np.asarray(opened(p)) > 0) * np.uint8(255)).save(p, "JPEG"),
}


def renumber(path: Path, rng: random.Random) -> None:
    image = opened(path)
    ids = np.array(image)
    ids[ids > 0] = rng.choice([rng.randrange(4), rng.randrange(256)])
    new = Image.fromarray(ids)
    if image.mode == "P":
        new.putpalette(image.getpalette())  # type: ignore[arg-type]
    new.save(path)


def edited(edit: Callable[[list[str], random.Random], object]) -> Damage:
    """A change of the lines, each with its end."""

    def apply(path: Path, rng: random.Random) -> None:
        rows = path.read_text().splitlines(keepends=True)
        edit(rows, rng)
        path.write_text("".join(rows))

    return apply


def exchange(rows: list[str], rng: random.Random) -> None:
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    rows[i], rows[j] = rows[j], rows[i]


def letter(rows: list[str], rng: random.Random) -> None:
    i = rng.randrange(len(rows))
    at = rng.randrange(len(rows[i]))
    rows[i] = rows[i][:at] + rng.choice("0123456789 ,/\\\"'#;%xé\t") + rows[i][at + 1 :]


TEXTS: dict[str, Damage] = {
    "a line gone": edited(lambda rows, rng: rows.pop(rng.randrange(len(rows)))),
    "a line doubled": edited(lambda rows, rng: rows.append(rng.choice(rows))),
    "two lines exchanged": edited(exchange),
    "lines shuffled": edited(lambda rows, rng: rng.shuffle(rows)),
    "an empty line": edited(lambda rows, rng: rows.insert(rng.randrange(len(rows)), rng.choice(["\n", "  \n"]))),
    "another letter": edited(letter),
    "CR LF": changed(lambda d, rng: d.__setitem__(slice(None), bytes(d).replace(b"\n", b"\r\n"))),
    "byte order mark": changed(lambda d, rng: d.__setitem__(slice(None), b"\xef\xbb\xbf" + bytes(d))),
    "UTF-16": changed(lambda d, rng: d.__setitem__(slice(None), bytes(d).decode().encode("utf-16"))),
    "blanks at the ends": changed(lambda d, rng: d.__setitem__(slice(None), bytes(d).replace(b"\n", b" \t\n"))),
    "no last line's end": changed(lambda d, rng: d.__delitem__(slice(-1, None))),
    "gone": lambda p, rng: p.unlink(),
}


def draw(reader: Reader, root: Path, rng: random.Random) -> tuple[str, Path, Damage]:
    """The name of a damage, its file, and what does it; every kind of file is as likely."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and (not reader.files or re.fullmatch(reader.files, path.name)):
            kind = "map" if reader.maps in str(path) else "list" if path.suffix in LISTS else "file"
            kinds.setdefault(kind if path.suffix in {*PICTURES, *FILMS, *LISTS} else "bytes", []).append(path)
    kind = rng.choice(sorted(kinds))
    path = rng.choice(kinds[kind])
    some = {"bytes": BYTES, "list": BYTES | TEXTS, "file": FILES, "map": FILES | MAPS}[kind]
    names = [name for name in some if path.suffix in PICTURES or name not in ("grey", "16-bit")]
    if kind == "list" and rng.random() < 0.7:  # of the ways in which a list can be wrong most are a list's own
        names = list(TEXTS)
    name = rng.choice(names)
    return f"{kind}: {name}", path, some[name]


# --- the job ----------------------------------------------------------------------------------------------------------


def gather(rows: Iterable[Row]) -> dict[tuple[str, ...], Any]:
    out: dict[tuple[str, ...], Any] = {}
    for key, value in rows:
        while key in out:
            key = (*key, "again")
        out[key] = value
    return out


def difference(found: dict[tuple[str, ...], Any], there: dict[tuple[str, ...], Any], close: float) -> str:
    """What was read otherwise than it is there; "" where nothing was."""
    if more := sorted(found.keys() - there.keys()):
        return f"{len(found)} read, {len(there)} are there; not there: {more[0]}"
    if less := sorted(there.keys() - found.keys()):
        return f"{len(found)} read, {len(there)} are there; not read: {less[0]}"
    for key, value in found.items():
        a, b = np.asarray(value, np.float64), np.asarray(there[key], np.float64)
        if a.shape != b.shape or not np.array_equal(a, b, equal_nan=True) and not (np.abs(a - b) <= close).all():
            far = "" if a.shape != b.shape else f", by up to {np.abs(a - b).max():g}"
            return f"{key}: {a.shape} read, {b.shape} is there{far}"
    return ""


def attempt(reader: Reader, root: Path, names: set[str]) -> tuple[str, str]:
    """One of refused, as it is, in silence, traceback; and the line or the reason."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = gather(reader.read(root))
    except UserError as error:
        line = str(error)
        if "\n" in line or len(line) > 600 or not any(name in line for name in names):
            return "traceback", f"not a line that names it: {line}"
        return "refused", line
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    try:
        there = gather(reader.truth(root))
    except Damaged as error:
        return "in silence", f"{len(found)} read, though {error}"
    wrong = difference(found, there, reader.close)
    return ("in silence", wrong) if wrong else ("as it is", f"{len(found)} things")


ENDS = ("refused", "as it is", "in silence", "traceback")


def main() -> int:
    parser = flags(__doc__, list(READERS), "READER")
    parser.add_argument("--count", type=int, default=300, help="damages, dealt to the readers in turn")
    parser.add_argument("--loud", action="store_true", help="print every line, not only what fails")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
    names = [name for name in READERS if not args.only or name in args.only]
    ends: dict[str, Counter[str]] = {name: Counter() for name in names}
    with tempfile.TemporaryDirectory(prefix="damage-", dir=args.work) as folder:
        work = Path(folder)
        for name in names:
            (work / name).mkdir()
            READERS[name].make(work / name)
            end, line = attempt(READERS[name], work / name, set())
            if end != "as it is":
                raise SystemExit(f"{name}: its clean set: {end}: {line}")
        for number in range(args.count):
            name, case = names[number % len(names)], work / "case" / "set"
            rng = random.Random(f"{args.seed} {name} {number // len(names)}")
            shutil.copytree(work / name, case)
            what, path, damage = draw(READERS[name], case, rng)
            damage(path, rng)
            about = {case.name, path.stem, f"{path.parent.name}x", *path.relative_to(case).parts}
            about |= {file.name for file in case.rglob("*") if file.suffix in LISTS}
            end, line = attempt(READERS[name], case, about)
            ends[name][end] += 1
            if args.loud or end in ENDS[2:]:
                line = line.replace(str(case), "")
                print(f"{name} {number // len(names)} | {what}, {path.relative_to(case)} | {end} | {line}", flush=True)
            shutil.rmtree(case.parent)
    now = stamp()
    rows = {n: [str(c.total()), *(str(c[end]) for end in ENDS), now] for n, c in ends.items() if c}
    total = sum(ends.values(), Counter[str]())
    rows["all"] = [str(total.total()), *(str(total[end]) for end in ENDS), now]
    for name, row in rows.items():
        print(name, *row, sep=" | ")
    if args.record:
        record("damage", HEADER, rows)
    return int(any(total[end] for end in ENDS[2:]))


if __name__ == "__main__":
    raise SystemExit(main())
