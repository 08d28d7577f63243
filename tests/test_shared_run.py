"""Checkpoints of several processes: what differs between them comes back to each. What is logged, and when."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

from shared_utils import UserError, checkpoint
from shared_utils.data import EpochSampler, Keyed, image_folder
from shared_utils.flags import Parser, add_run_flags
from shared_utils.run import Diverged, Run, cli, plain_errors

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


def train(python: str, folder: Path, out: Path, **environment: str) -> int:
    """Two processes; what each ends with lies in out/rankN.pth. Returns the exit code."""
    out.mkdir(exist_ok=True)
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [python, "-c", TRAIN, "--output-dir", str(folder), "--save-every", "2", "--workers", "0"]
    variables = {**os.environ, "OUT": str(out), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*command, "--device", "cpu"], cwd=ROOT, env=variables, capture_output=True).returncode


def test_each_process_gets_its_own_statistics_back(tmp_path: Path, python: str) -> None:
    assert train(python, tmp_path / "whole", tmp_path / "a") == 0
    assert train(python, tmp_path / "broken", tmp_path / "b", STOP="3") != 0
    assert checkpoint.load(tmp_path / "broken" / "checkpoint.pth")["progress"]["step"] == 2
    assert train(python, tmp_path / "broken", tmp_path / "b") == 0
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


def test_a_full_disk_is_one_line(tmp_path: Path, python: str) -> None:
    command = [python, "-c", FULL, "--output-dir", str(tmp_path), "--workers", "0", "--device", "cpu"]
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


def test_ctrl_c_outside_the_steps_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as stop:
        cli(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"


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


# --- waits for the device, true losses, one run a folder, --compile ---------------------------------------------------


class Reads(TorchFunctionMode):
    """Counts what waits for a GPU: tensors that become Python numbers."""

    names = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in self.names
        return function(*args, **(kwargs or {}))


def short_run(folder: Path, *more: str) -> Run:
    p = Parser()
    add_run_flags(p, "x")
    flags = ["--output-dir", str(folder), "--device", "cpu", "--workers", "0", "--threads", "1", *more]
    run = Run(p.parse_args(flags), "shared", "test")
    run.preflight({})
    return run


def steps(run: Run, epochs: int = 1, images: int = 24) -> Iterator[int]:
    """The steps of epochs of 12."""
    sampler = EpochSampler(images, 2, 0)
    data = torch.utils.data.TensorDataset(torch.zeros(images))
    for _ in run.batches(run.loader(Keyed(data, 0), sampler), sampler, epochs):
        yield run.step


def test_a_step_waits_for_the_device_once_in_log_every_steps(tmp_path: Path) -> None:
    run, found = short_run(tmp_path, "--log-every", "5"), []
    for step in steps(run):
        loss, lr, acc = torch.tensor(float(step)), torch.tensor(0.5), torch.tensor(3, dtype=torch.int64)
        with Reads() as reads:
            run.log(loss, lr=lr, acc=acc)
        found.append(reads.count)
    run.finish()
    assert found == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1]  # steps 1, 5, 10 and the last
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["lr"], row["acc"]) for row in rows] == [
        (step, step - 1.0, 0.5, 3) for step in (1, 5, 10, 12)
    ]  # fmt: skip


def test_queues_know_their_place_without_the_device() -> None:
    from bingo.builder import MoCo
    from fame.moco.builder import MoCo as Fame
    from hsa import arch
    from hsa.builder import CsMl
    from kscl import arch as kscl_arch
    from kscl.builder import KSCL
    from kscl.subspace import RankRule

    def net() -> Any:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    kscl = KSCL(kscl_arch.build("resnet10", 4, "cifar_pool"), RankRule(max_rank=1), 4, 6)
    hsa = CsMl(arch.build("resnet10", 4, "cifar_pool"), 4, 6)
    drawn = iter([kscl.subspaces(nn.functional.normalize(torch.randn(2, 4, 1), dim=1))[0] for _ in range(8)])
    moves = {
        "bingo": (MoCo(net(), net(), 4, 6), lambda m: m.enqueue(torch.randn(2, 4))),
        "fame": (Fame(net(), 4, 6), lambda m: m.enqueue([torch.randn(1, 4), torch.randn(1, 4)])),
        "hsa": (hsa, lambda m: m.enqueue([torch.randn(2, 4)])),
        "kscl": (kscl, lambda m: m.enqueue(next(drawn))),
    }
    for name, (model, move) in moves.items():
        move(model)
        with Reads() as reads:
            for _ in range(4):
                move(model)
        assert (reads.count, model.queue_ptr.tolist()) == (0, [4]), name  # 5 x 2 modulo 6
        state = {key: value.clone() for key, value in model.state_dict().items()}
        move(model)
        assert model.queue_ptr.tolist() == [0], name
        before = model.queue.clone()
        checkpoint.load_strict(model, state)  # in place, by none of the model's methods
        move(model)
        assert model.queue_ptr.tolist() == [0], name
        assert not torch.equal(before[..., 4:], model.queue[..., 4:]), name
        model.load_state_dict(state)
        model.double()  # new buffers
        model.float()
        move(model)
        assert model.queue_ptr.tolist() == [0], name


@pytest.mark.parametrize("end", ["due", "save", "epoch"])
def test_a_loss_that_is_not_finite_stops_before_a_checkpoint_is_overwritten(tmp_path: Path, end: str) -> None:
    run = short_run(tmp_path, "--log-every", "5" if end == "due" else "100")
    seen = 0
    with pytest.raises(Diverged, match="step 7: the loss is inf; "):
        for step in steps(run):
            seen = step
            if step == 3:
                run.save()
            if step == 8 and end == "save":
                run.save()
            run.log(torch.tensor(math.inf if step == 7 else 1.0))
    assert seen == {"due": 9, "save": 8, "epoch": 11}[end]
    with pytest.raises(Diverged):  # whatever is tried afterwards
        run.save()
    run.close()
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 3


def test_a_failure_that_follows_from_the_loss_is_told_as_such(python: str) -> None:
    script = (
        "import sys, torch\nfrom shared_utils.flags import Parser, add_run_flags\n"
        "from shared_utils.run import Run, cli\n"
        "def main(_):\n p = Parser()\n add_run_flags(p, 'x')\n run = Run(p.parse_args(), 'shared', 'test')\n"
        " run.preflight({})\n run.step = 3\n run.log(torch.tensor(float('nan')))\n"
        " torch.multinomial(torch.tensor([float('nan')]), 1)\n"
        "cli(main)"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", script, "--output-dir", folder, "--device", "cpu"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: step 3: the loss is nan"), done.stderr
    assert done.stderr.count("\n") == 1


def test_the_printed_loss_is_the_epochs_mean_also_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def go(run: Run, stop: int = -1) -> None:
        for step in steps(run, 2):
            if step == stop:
                break
            run.log(torch.tensor(float(step)), lr=0.1)
        run.close()

    go(short_run(tmp_path / "whole"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  epoch")]
    assert [line.split("min: ")[1] for line in lines] == [
        "mean loss 5.5; last line: loss 9.0 lr 0.1", "mean loss 17.5; last line: loss 23.0 lr 0.1"
    ]  # fmt: skip
    go(short_run(tmp_path / "cut", "--save-every", "4"), 6)
    go(short_run(tmp_path / "cut", "--save-every", "4"))
    means = EventAccumulator(str(tmp_path / "cut")).Reload().Scalars("loss/epoch")
    assert [(event.step, event.value) for event in means] == [(12, 5.5), (24, 17.5)]


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_alive(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom shared_utils.run import lock\n"
        "held = lock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    )
    (tmp_path / ".x.tmp").write_bytes(b"being written")
    first = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"another run writes here .process {first.pid} on .*another --output-dir"):
        short_run(tmp_path)
    assert (tmp_path / ".x.tmp").exists() and not (tmp_path / "log.jsonl").exists()
    first.kill()
    first.wait()
    first.stdout.close()
    short_run(tmp_path).close()  # its lock ended with it
    assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_compile_keeps_names_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hsa import arch
    from hsa.builder import CsMl

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without a C++ compiler
    x, found = torch.rand(4, 3, 16, 16), []
    for more in ([], ["--compile"]):
        torch.manual_seed(0)
        model = CsMl(arch.build("resnet10", 4, "cifar_pool"), 8, 8)
        before = list(model.state_dict())
        run = short_run(tmp_path / str(len(more)), *more)
        run.track(model=model)
        run.compile(model.encoder_q, model.encoder_k, method="levels")
        (z,) = model([x])
        z.square().mean().sub(z.mean()).backward()
        gradient = model.encoder_q.conv1.weight.grad
        assert gradient is not None and list(model.state_dict()) == before
        found.append((z.detach(), gradient, model.embed_keys(x, torch.Generator())[0]))
        run.save()
        run.close()
    for plain, compiled in zip(*found):
        torch.testing.assert_close(plain, compiled)


def test_compile_is_refused_where_nothing_is_compiled_and_told_in_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = short_run(tmp_path, "--compile")
    with pytest.raises(UserError, match="--compile: this script has nothing to compile yet"):
        next(steps(run))
    run.save()
    run.close()
    capsys.readouterr()
    short_run(tmp_path).close()
    assert "--compile was True, is False: from here on the same up to rounding" in capsys.readouterr().out


MORTAL = """
import os, signal, torch
from pathlib import Path
from torch.utils.data import Dataset
from shared_utils.data import EpochSampler, Keyed
from shared_utils.flags import Parser, add_run_flags
from shared_utils.run import Run, cli

class Mortal(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if run.step == 0 and index == last and not run.dir.joinpath("checkpoint.pth").is_file():
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)

def main(_):
    global run, last
    p = Parser()
    add_run_flags(p, "x")
    run = Run(p.parse_args(), "shared", "test")
    sampler = EpochSampler(8, 2, 0)
    last = list(sampler)[-1][-1][1]
    run.preflight({})
    for epoch, x in run.batches(run.loader(Keyed(Mortal(), 0), sampler), sampler, 1):
        run.log(1.0)
    run.finish()

cli(main)
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_connection_that_broke_is_of_the_worker_that_was_killed(killed: bool) -> None:
    """Where a worker falls between a batch and its memory; without a fallen worker the error is what it was."""
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    if killed:
        worker.kill()

    class Ended:
        """A process as multiprocessing shows it."""

        pid = worker.pid

        def join(self, timeout: float) -> None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(timeout)

        exitcode = property(lambda self: worker.poll())

    class Loader:
        _workers = [Ended()]

        def __iter__(self):
            return self

        def __next__(self):
            raise ConnectionResetError(104, "Connection reset by peer")

    expected = rf"^DataLoader worker \(pid {worker.pid}\) ended by signal 9: " if killed else "reset by peer"
    try:
        with pytest.raises(RuntimeError if killed else ConnectionResetError, match=expected):
            list(plain_errors(cast(Any, Loader())))
    finally:
        worker.kill()
        worker.wait()


def test_a_data_worker_that_was_killed_is_one_line(tmp_path: Path, python: str) -> None:
    command = [python, "-c", MORTAL, "--output-dir", str(tmp_path), "--workers", "1", "--device", "cpu"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: DataLoader worker") and "--workers" in lines[0], done.stderr
    assert json.loads((tmp_path / "end.json").read_text())["state"].startswith("failed: DataLoader worker")
