"""Checkpoints of several processes: what differs between them comes back to each. What is logged, and when."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from shared_utils import UserError, checkpoint
from shared_utils.data import EpochSampler, Keyed, image_folder
from shared_utils.flags import Parser, add_run_flags
from shared_utils.run import Run

ROOT = Path(__file__).resolve().parents[1]

# Trains four steps of two processes with batch norms of their own, and prints each one's running statistics. STOP ends
# the run after so many steps, as a crash would: the last checkpoint is the one of --save-every.
TRAIN = """
import os, sys
import torch
from torch import nn
from shared_utils import distributed
from shared_utils.data import EpochSampler, Keyed
from shared_utils.flags import Parser, add_run_flags
from shared_utils.run import Run

class Wrapped:
    def __init__(self, model): self.model = model
    def state_dict(self): return {f"module.{k}": v for k, v in self.model.state_dict().items()}
    def load_state_dict(self, state): self.model.load_state_dict({k[7:]: v for k, v in state.items()})

class Noise(torch.utils.data.Dataset):
    def __len__(self): return 16
    def __getitem__(self, i): return torch.randn(3, 2, 2) * (1 + i)

p = Parser()
add_run_flags(p, "x")
run = Run(p.parse_args(), "shared", "test")
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
ddp = distributed.wrap(model)
sgd = torch.optim.SGD(model.parameters(), 0.1)
sampler = EpochSampler(16, 2, 0, run.rank, run.world)
loader = run.loader(Keyed(Noise(), 0), sampler)
run.track(state_dict=Wrapped(model), optimizer=sgd)
run.preflight({})
for epoch, x in run.batches(loader, sampler, 1):
    if run.step == int(os.environ.get("STOP", 9)):
        os._exit(3)
    loss = ddp(x).square().mean()
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    run.log(loss)
where = os.environ["OUT"] + f"/rank{run.rank}.pth"
torch.save({k: v.clone() for k, v in model.state_dict().items()}, where)
run.finish()
"""


def train(folder: Path, out: Path, **environment: str) -> int:
    """Two processes; what each ends with lies in out/rankN.pth. Returns the exit code."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", TRAIN, "--output-dir", str(folder), "--save-every", "2", "--workers", "0"]
    variables = {**os.environ, "OUT": str(out), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*command, "--device", "cpu"], cwd=ROOT, env=variables, capture_output=True).returncode


def test_each_process_gets_its_own_statistics_back(tmp_path: Path) -> None:
    assert train(tmp_path / "whole", tmp_path / "a") == 0
    assert train(tmp_path / "broken", tmp_path / "b", STOP="3") != 0
    assert checkpoint.load(tmp_path / "broken" / "checkpoint.pth")["progress"]["step"] == 2
    assert train(tmp_path / "broken", tmp_path / "b") == 0
    ends = [[torch.load(tmp_path / name / f"rank{r}.pth", weights_only=True) for r in (0, 1)] for name in "ab"]
    for whole, resumed in zip(*ends):
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not torch.equal(ends[0][0]["1.running_mean"], ends[0][1]["1.running_mean"])  # they do differ
    assert torch.equal(ends[0][0]["0.weight"], ends[0][1]["0.weight"])


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return index


def test_an_evaluation_is_written_whatever_step_it_falls_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    p = Parser()
    add_run_flags(p, "x")
    flags = f"--output-dir {tmp_path} --device cpu --workers 0 --threads 1 --log-every 4"
    run = Run(p.parse_args(flags.split()), "shared", "test")
    sampler = EpochSampler(6, 2, 0)
    run.preflight({})
    for epoch, _ in run.batches(run.loader(Keyed(Numbers(), 0), sampler), sampler, 2):
        tested = {"val/top1": 50.0 + epoch} if run.step_in_epoch == 2 else {}
        run.log(2.0, lr=0.1, evaluated=tested)
    run.finish()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"], row.get("val/top1")) for row in rows] == [
        (1, 0, None), (3, 0, 50.0), (4, 1, None), (6, 1, 51.0)
    ]  # fmt: skip
    assert all(row["loss"] == 2 and row["lr"] == 0.1 for row in rows)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/top1")] == [(3, 50.0), (6, 51.0)]


FULL = """
import torch
from shared_utils.data import EpochSampler, Keyed
from shared_utils.flags import Parser, add_run_flags
from shared_utils.run import Run, cli

def main(_):
    p = Parser()
    add_run_flags(p, "x")
    run = Run(p.parse_args(), "shared", "test")
    sampler = EpochSampler(16, 2, 0)
    loader = run.loader(Keyed(torch.utils.data.TensorDataset(torch.zeros(16)), 0), sampler)
    run.preflight({})
    run._writer.flush()  # a thread of tensorboard writes; what it has is on the disk first
    (events,) = run.dir.glob("events.*")
    events.unlink()
    events.symlink_to("/dev/full")
    for epoch, x in run.batches(loader, sampler, 1):
        run.log(1.0)
    run.finish()

cli(main)
"""


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, "--output-dir", str(tmp_path), "--workers", "0", "--device", "cpu"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--log-every", "1"], env=variables, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}") and "free space" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_leftovers_of_a_killed_run_are_removed_and_a_damaged_checkpoint_has_a_cure(tmp_path: Path) -> None:
    def start(*more: str) -> Run:
        parser = Parser()
        add_run_flags(parser, "x")
        run = Run(parser.parse_args(["--output-dir", str(tmp_path), "--device", "cpu", *more]), "shared", "test")
        run.preflight({})
        return run

    half = tmp_path / ".checkpoint.pth.1.tmp"
    half.write_bytes(b"half")
    run = start()
    assert not half.exists()
    run.save()
    run.close()
    os.truncate(tmp_path / "checkpoint.pth", 100)
    with pytest.raises(UserError, match="checkpoint.pth: not a readable .*, or start anew with --overwrite"):
        start()
    start("--overwrite").close()


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    script = "from shared_utils.run import cli\ncli(lambda _: print('x' * 1000000))"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-c", script], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    assert (started.stderr.read(), started.wait()) == (b"", 141)
    started.stderr.close()


# --- resuming by another version, and with the data in another place ------------------------------------------------


def fill(root: Path, sizes: tuple[int, ...] = (4, 4, 4)) -> Path:
    for i, size in enumerate(sizes):
        (root / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (20 * i, 0, 0)).save(root / "train" / "ab"[i % 2] / f"{i}.png")
    return root


def start(out: Path, data: Path, *more: str, margin: bool = False, reads: bool = True, save: bool = True) -> Run:
    p = Parser(prog="shared.test")
    p.add_argument("--data_dir", type=Path)
    p.add_argument("--depth", type=int, default=3)
    if margin:  # a flag of a later version
        p.add_argument("--margin", type=float, default=0.5)
    add_run_flags(p, "x")
    flags = ["--output-dir", str(out), "--data_dir", str(data), "--device", "cpu", "--workers", "0", *more]
    run = Run(p.parse_args(flags), "shared", "test")
    if reads:
        run.reads(image_folder(data / "train"))
    run.preflight({})
    if save:
        run.step += 1
        run.save()
    run.close()
    return run


def test_a_flag_that_the_checkpoint_does_not_have_counts_as_its_default(tmp_path: Path) -> None:
    data = fill(tmp_path / "data")
    start(tmp_path / "out", data)
    assert start(tmp_path / "out", data, margin=True, save=False).step == 1
    assert start(tmp_path / "out", data, "--margin", "0.5", margin=True, save=False).step == 1
    with pytest.raises(UserError, match=r"--margin was not there yet, 0.5 by default, is 0.25\); repeat"):
        start(tmp_path / "out", data, "--margin", "0.25", margin=True)
    with pytest.raises(UserError, match=r"saved with other flags \(--depth was 3, is 4\)"):
        start(tmp_path / "out", data, "--depth", "4", margin=True)
    start(tmp_path / "out", data, margin=True)  # from now on it is there
    with pytest.raises(UserError, match="--margin was 0.5, is 0.25"):
        start(tmp_path / "out", data, "--margin", "0.25", margin=True)


def test_moved_data_goes_on_and_changed_data_does_not(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = fill(tmp_path / "data")
    start(tmp_path / "out", data)
    data = data.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert start(tmp_path / "out", data, save=False).step == 1
    assert "  data:" not in capsys.readouterr().out  # silent
    more = fill(tmp_path / "more", (4, 4, 4, 4))
    where = re.escape(str(tmp_path / "data"))
    with pytest.raises(UserError, match=rf"other data \(3 files then, 4 now; it was --data-dir {where}\)"):
        start(tmp_path / "out", more)
    other = fill(tmp_path / "other", (4, 4, 64))
    with pytest.raises(UserError, match="as many files, of other names, sizes or order"):
        start(tmp_path / "out", other)
    Image.new("RGB", (50, 50)).save(data / "train/a/0.png")  # changed where it is
    with pytest.raises(UserError, match="saved on other data") as caught:
        start(tmp_path / "out", data)
    assert "\n" not in str(caught.value)
    # who does not say what is read has to repeat the path
    start(tmp_path / "plain", data, reads=False)
    with pytest.raises(UserError, match="--data-dir was"):
        start(tmp_path / "plain", other, reads=False)


def test_checkpoints_of_before_the_hash_go_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, other = fill(tmp_path / "data"), fill(tmp_path / "other", (4,) * 5)
    start(tmp_path / "out", data)
    saved = checkpoint.load(tmp_path / "out/checkpoint.pth")
    assert saved["job"] == "shared.test" and saved.pop("data")[0][0] == 3
    checkpoint.save(tmp_path / "out/checkpoint.pth", saved)
    capsys.readouterr()
    assert start(tmp_path / "out", data, save=False).step == 1
    assert "older checkpoint" not in capsys.readouterr().out
    assert start(tmp_path / "out", other, save=False).step == 1
    assert f"was --data-dir {data}; this older checkpoint does not tell" in capsys.readouterr().out


def test_the_preflight_says_what_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = fill(tmp_path / "data")
    for name in ("x.heic", "y.heic", "z.avif"):
        (data / "train/a" / name).write_bytes(b"x")
    start(tmp_path / "out", data, save=False)
    assert "  not read: 2 .heic, 1 .avif between the images\n" in capsys.readouterr().out


def test_entry_points_are_imported_without_torchvision_and_the_compiler() -> None:
    """Each costs as much as torch itself. (An optimiser's first step imports the compiler in any case, torch 2.14.)"""
    code = (
        "import sys; import hsa.main_moco, bingo.main_moco, bingo.main_teacher, kscl.main_kscl, hsa.main_knn\n"
        "import hsa.main_lincls, kscl.main_lincls, bingo.main_lincls\n"
        "import sage.train, sage.main_knn, sage.main_lincls, sage.main_semi, sage.main_attributes\n"
        "print(sorted({'torchvision', 'torch._dynamo', 'sympy', 'tensorboard', 'timm', 'sklearn'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
