"""What happens to runs in shared folders and on busy machines: python tests/jobs/mishaps.py [--only FOLDER] [--record]

A short pretraining of the mini tier, on a copy of its data and with two data workers, suffers one after another

a data worker killed   SIGKILL, as from a machine without memory, after a drawn step
the data changed       one byte more in one of its files; it is taken away again afterwards
a second run           started in the same folder while the first one is alive

Each must end with exit code 2 and one line that names the cause, and the same command goes on. Its end must be
bit-identical to that of a run that nobody disturbed. Then a full disk: an evaluation, prediction or picture of the
trained network is made twice, the second time without room for its files. One line must name the file, and what the
first time left must be as it was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.jobs.crash import Failed, Folder, small_disk, table, undisturbed  # noqa: E402
from tests.jobs.pretraining import (  # noqa: E402
    ROOT,
    Forked,
    environment,
    log,
)

HEADER = ("folder", "a data worker killed", "a file changed", "a second run", "both ends", "full disk", "commit, date")
PATIENCE = 600.0
KNN = "main_knn --pretrained {run}/checkpoint.pth --data_dir {mini}/images --img_size 32 --per_class 12"
WRITES = {  # what writes results, tables or pictures from a trained network
    "uvos_dino": "segment {mini}/davis/JPEGImages/480p/shape-val-00 --resume_path {run}/checkpoint.pth --window 6",
    "mra": "visualize --mae_ckpt {run}/checkpoint.pth --data_path {mini}/texture_shortcut",
    "sage": KNN,
    "fame": "main_cam {mini}/video --pretrained {run}/checkpoint.pth",
    "bingo": KNN,
    "mdp": "predict {mini}/segmentation/cityscapes/leftImg8bit/val --pretrained {run}",
    "sscl": "predict {mini}/images/val --pretrained {run}",
    "hsa": KNN,
    "kscl": KNN,
    "flat": "predict --pretrained {run} --support {mini}/fewshot/test --shots 5 --query {mini}/fewshot/test",
}
READS = {  # files of which a run reads the first one
    "uvos_dino": "davis/JPEGImages/480p/shape-train-00/*", "mra": "texture_shortcut/train/**/*.png",
    "fame": "video/UCF-101/*/*_g03_*", "mdp": "segmentation/VOCdevkit/VOC2012/JPEGImages/*",
    "flat": "fewshot/train/*/*",
}  # fmt: skip
TO = {  # where that goes
    "uvos_dino": "--save_path {out}", "mra": "--out {out}/rows.png", "fame": "--out {out}", "mdp": "--out {out}",
    "sscl": "--out {out}/p.csv", "flat": "--out {out}/p.csv",
}  # fmt: skip


class Copied(Folder):
    """A folder's pretraining on a copy of the mini data."""

    def start(self, out: Path, extra: str = "", limit: int = 0, slow: str = "") -> Forked:
        return super().start(out, f"--workers 2 {extra}", limit, slow)

    def change(self, words: list[str]) -> list[str]:
        if not (self.work / "mini").exists():
            shutil.copytree(ROOT / "data/mini", self.work / "mini")
        words = [word for word in words if word != "--resident"]  # mra's: of images in memory no worker reads any
        return [word.replace("data/mini", str(self.work / "mini")) for word in words]


def children(pid: int) -> list[int]:
    """The data workers of a run: its own processes, which python has forked."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            same = (entry / "cmdline").read_bytes() == Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if parent == pid and same:
            found.append(int(entry.name))
    return sorted(found)


def worker_killed(it: Copied, out: Path) -> str:
    run = it.start(out, slow="step")
    it.until(run, it.reached(out, it.rng.randint(3, 4)))
    it.until(run, lambda: bool(children(run.pid)))
    os.kill(it.rng.choice(children(run.pid)), signal.SIGKILL)
    print(f"    {it.refused(run, 'DataLoader worker', '--workers')}", flush=True)
    return f"after step {log(out)[-1][0]}: one line"


def changed(it: Copied, out: Path) -> str:
    path = min(path for path in (it.work / "mini").glob(READS.get(it.name, "images/train/*/*")) if path.is_file())
    size = path.stat().st_size
    with open(path, "ab") as handle:
        handle.write(b"\0")
    print(f"    {it.refused(it.start(out), str(out), 'saved on other data')}", flush=True)
    os.truncate(path, size)
    return f"{path.suffix.removeprefix('.')}, a byte more: one line"


def second(it: Copied, out: Path) -> str:
    first = it.start(out, slow="step")
    it.until(first, lambda: it.number(out) != it.old and bool(log(out)))
    os.kill(first.pid, signal.SIGSTOP)  # the other one takes longer to start than this one to end
    try:
        print(f"    {it.refused(it.start(out), 'another run writes here')}", flush=True)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    it.end(first, 0)
    return "one line"


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def full_disk(it: Copied) -> str:
    """The same results anew, without room for them."""
    with small_disk(2**25) as disk:
        if disk is None:
            return "not run: nothing may be mounted here"
        out = disk / "out"
        line = f"{it.name}.{WRITES[it.name]} {TO.get(it.name, '--output-dir {out}')}"
        words = [*line.format(run=it.whole, mini=it.work / "mini", out=out).split(), "--device", "cpu"]

        def start() -> Forked:
            return Forked(words, it.work / "written", lambda: os.chdir(ROOT), environment(it.work))

        it.end(start(), 0)
        before, largest = hashes(out), max(path.stat().st_size for path in out.rglob("*") if path.is_file())
        room = it.rng.randrange(max(1, largest // 2))
        status = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - room)))
        error = it.refused(start(), str(out), "free space")
        print(f"    {error}", flush=True)
        if hashes(out) != before:
            raise Failed("what the first time left is not as it was")
        named = Path(error.removeprefix("error: ").split(": ")[0]).name
        return f"{it.name}.{words[0].rpartition('.')[2]}, no room for {named}: one line, older files as they were"


def events(it: Copied) -> list[str]:
    undisturbed(it)
    out = it.work / "run"
    cells = [worker_killed(it, out), changed(it, out), second(it, out)]
    it.compare(out)
    return [*cells, "bit-identical", full_disk(it)]


def main() -> int:
    return table(__doc__, "mishaps", HEADER, Copied, events)


if __name__ == "__main__":
    raise SystemExit(main())
