"""The pretraining script of kscl: arms, what a step does, MoCo v2 to the bit, resume, two processes, bad input."""

import copy
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kscl import arch, losses, main_knn
from kscl.builder import KSCL, ReleaseKeys
from kscl.data import Views, training_images
from kscl.lab import export_detection
from kscl.main_kscl import forwards, get_parser, learning_rate, main, picture, telemetry
from kscl.subspace import RankRule
from shared_utils import UserError, augment, checkpoint
from shared_utils.data import Keyed
from shared_utils.lab import mini
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing, tensors

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--img_size 16 --arch resnet10 --width 4 --stem cifar_pool --moco_dim 16 --moco_k 24 --batch_size 8 --bn_splits 2 "
    "--moco_m 0.9 --init_lr 0.05 --shots 3 --workers 0 --threads 1 --log-every 1 --end_epoch 1 --cache"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three classes of eight noisy images: three steps an epoch."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        noise = rng.integers(0, 120, (20, 20, 3)) + 60 * np.eye(3, dtype=np.int64)[i // 8]
        path = root / "train" / f"class{i // 8}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.astype(np.uint8)).save(path)
    return root


def train(data: Path, out: Path, *extra: str) -> list[dict]:
    """Run in this process; the rows of the log."""
    assert main([*SMALL, "--data_dir", str(data), "--output-dir", str(out), *extra]) == 0
    return rows(out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "room"),
    [
        ("", 3),
        ("--shots 1 --sim signed", 1),
        ("--shots 1", 1),
        ("--shots 5 --rank_rule fixed --rank 1 --aug_plus false", 1),
        ("--energy 1 --amp bf16", 3),
        ("--rank_rule relative --rel_gamma 0.3 --max_rank 2 --sim signed", 2),
        ("--subspace_grad pos --decay_method step --schedule 1", 3),
        ("--subspace_grad pos --sim proj_len_sq --amp bf16", 3),
        ("--center 1 --sim proj_len_sq", 2),
    ],
)
def test_every_arm_trains(arm, room, data, tmp_path):
    log = train(data, tmp_path, *arm.split())
    names = {"rank_mean", "queue_rank_mean", "lambda1_frac", "pos_sim", "neg_sim", "pos_cos"}
    assert len(log) == 3 and log[-1].keys() >= {"loss", "lr", "data_wait", "acc1", "acc5", "feat/std", "train/loss"}
    assert log[-1].keys() >= {f"subspace/{name}" for name in names}
    assert 1 <= log[-1]["subspace/rank_mean"] <= room and 0 < log[-1]["subspace/lambda1_frac"] <= 1 + 1e-6
    assert log[0]["train/loss"] == pytest.approx(log[0]["loss"], abs=1e-4)
    state = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    assert state["module.queue"].shape == (room, 16, 24) and int(state["module.queue_ptr"]) == 0
    lengths = state["module.queue"].norm(dim=1)  # [P, M]: as many unit columns as the rank says, zeros beyond
    torch.testing.assert_close(lengths.sum(0), state["module.queue_rank"].float())
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["max_rank"] == room


def test_a_run_with_one_shot_is_a_run_of_moco_v2_to_the_last_bit(data, tmp_path, monkeypatch):
    """Two epochs beside the MoCo v2 of hsa: networks, queue, momentum buffers and generators end the same."""
    from hsa import main_moco
    from hsa.data import Views as Pairs

    class QueryFirst(Pairs):
        """kscl draws the query before the keys, hsa after them."""

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            views = super().__getitem__(index)
            return {"query": views["key"], "key": views["query"]}

    monkeypatch.setattr(main_moco, "Views", QueryFirst)
    shared = [word for word in SMALL if word not in ("--shots", "3")] + ["--data_dir", str(data), "--end_epoch", "2"]
    assert main_moco.main([*shared, "--mode", "moco", "--output-dir", str(tmp_path / "moco")]) == 0
    train(data, tmp_path / "kscl", "--shots", "1", "--sim", "signed", "--end_epoch", "2")
    moco, ours = tensors(tmp_path / "moco"), tensors(tmp_path / "kscl")
    assert ours.pop("/state_dict/module.queue_rank").tolist() == [1] * 24
    queue = ours.pop("/state_dict/module.queue")
    assert torch.equal(queue[0], moco.pop("/state_dict/module.queue")) and len(queue) == 1
    assert ours.keys() == moco.keys() and len(ours) > 100
    assert [key for key in ours if not torch.equal(ours[key], moco[key])] == []
    for a, b in zip(rows(tmp_path / "kscl"), rows(tmp_path / "moco"), strict=True):
        assert a["loss"] == b["loss"] and a["acc1"] == b["acc1"]


def test_views_are_drawn_alike_and_the_query_is_the_same_for_every_shot_count(data):
    images = training_images(data)
    one, five = (Keyed(Views(images, augment.moco_v2(16), shots), 0)[(2, 7)] for shots in (1, 5))
    assert five[1].shape == (5, 3, 16, 16)
    assert torch.equal(one[0], five[0]) and torch.equal(one[1], five[1][:1])
    views = [five[0], *five[1]]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])  # no view twice
    grid = picture(torch.stack([five[0]] * 4), torch.stack([five[1]] * 4), 3)
    assert grid.shape == (3, 6 * 18 + 2, 3 * 18 + 2)
    torch.testing.assert_close(grid[:, 2:18, 2:18], augment.denormalise(five[0]))
    torch.testing.assert_close(grid[:, 20:36, 20:36], augment.denormalise(five[1][0]))


def test_tensorboard_holds_scalars_and_the_views(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(data, tmp_path, "--image_every", "2")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"train/loss", "train/acc1", "train/lr", "subspace/rank_mean", "subspace/lambda1_frac", "subspace/pos_sim"}
    assert set(events.Tags()["scalars"]) >= names | {"subspace/neg_sim", "subspace/pos_cos", "loss/total"}
    shown = events.Images("views/query_and_keys")
    assert len(shown) == 2 and (shown[0].height, shown[0].width) == (4 * 18 + 2, 8 * 18 + 2)


def test_what_telemetry_says():
    torch.manual_seed(0)
    model = KSCL(arch.build("resnet10", 4), RankRule(3), 16, 24)
    q, Z = F.normalize(torch.randn(8, 16), dim=1), F.normalize(torch.randn(8, 16, 1) + torch.randn(8, 16, 3), dim=1)
    own, _ = model.subspaces(Z)
    model.enqueue(own)  # 8 of 24; the others have rank 1
    s = (own.U.mT @ q[:, :, None]).norm(dim=1)[:, 0]
    found = {name: float(value) for name, value in telemetry(q, Z, own, s, model, "proj_len").items()}
    others = torch.einsum("nd,pdm->pnm", q, model.queue).norm(dim=0)
    place = (others > s[:, None]).sum(1)
    expected = {
        "acc1": 100 * (place < 1).float().mean(), "acc5": 100 * (place < 5).float().mean(),
        "subspace/rank_mean": own.rank.float().mean(), "subspace/pos_sim": s.mean(), "subspace/neg_sim": others.mean(),
        "subspace/queue_rank_mean": (own.rank.sum() + 16) / 24, "feat/std": 4 * q.std(0).mean(),
        "subspace/lambda1_frac": torch.linalg.matrix_norm(Z, 2).square().mean() / 3,
        "subspace/pos_cos": torch.stack([(q * Z[:, :, k]).sum(1) for k in range(3)]).mean(),
    }  # fmt: skip
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)
    away = telemetry(-q, Z, own, s, model, "proj_len")  # the length does not change, the cosine's sign does
    assert float(away["subspace/pos_cos"]) == pytest.approx(-found["subspace/pos_cos"], abs=1e-6)


def test_telemetry_is_taken_at_log_steps_only(data, tmp_path, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(1)
        return losses.against_queue(*args)

    monkeypatch.setattr("kscl.main_kscl.against_queue", counted)
    train(data, tmp_path, "--end_epoch", "2", "--log-every", "3")
    assert len(calls) == 3  # steps 1, 3 and 6


def test_defaults_and_schedule():
    args = get_parser().parse_args([])
    expected = {
        "moco_dim": 128, "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.2, "init_lr": 0.03, "momentum": 0.9, "wd": 1e-4,
        "batch_size": 256, "end_epoch": 200, "schedule": [120, 160], "lr_decay": 0.1, "decay_method": "cos",
        "aug_plus": True, "arch": "resnet50", "width": 64, "stem": "imagenet", "shots": 5, "energy": 0.9,
        "rank_rule": "energy", "sim": "proj_len", "subspace_grad": "none", "center": 0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert learning_rate(args, 0) == 0.03 and learning_rate(args, 100) == pytest.approx(0.015)
    steps = get_parser().parse_args(["--decay_method", "step"])
    assert [learning_rate(steps, e) for e in (119, 120, 160)] == pytest.approx([0.03, 0.003, 0.0003])
    for flags, cost in (("--shots 1", 4), ("--shots 5", 8), ("--shots 3 --subspace_grad pos", 15)):
        assert forwards(get_parser().parse_args(flags.split())) == cost


# --- what a step does ------------------------------------------------------------------------------------------------


def test_a_step_in_its_order(data, tmp_path, monkeypatch):
    states: list[dict] = []
    stored: list = []
    seen: list[tuple] = []
    save, enqueue, loss = Run.save, KSCL.enqueue, losses.kscl_loss

    def saving(run):
        states.append(copy.deepcopy(run._tracked["state_dict"].state_dict()))
        save(run)

    def enqueuing(model, own):
        stored.append(own)
        enqueue(model, own)

    def losing(q, own, queue, *args):
        seen.append((own.U.clone(), queue.clone()))
        return loss(q, own, queue, *args)

    monkeypatch.setattr(Run, "save", saving)
    monkeypatch.setattr(KSCL, "enqueue", enqueuing)
    monkeypatch.setattr("kscl.main_kscl.kscl_loss", losing)
    train(data, tmp_path, "--end_epoch", "3", "--save-every", "1")
    steps = [state for i, state in enumerate(states) if i % 4 != 3]  # after each step; an epoch's end saves once more
    assert len(steps) == len(stored) == 9
    for before, after in zip(steps, steps[1:]):
        for name, value in after.items():
            if "encoder_k" in name and name.split(".")[-1] in ("weight", "bias"):  # the query's, before this update
                old_q = before[name.replace("encoder_k", "encoder_q")]
                torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * old_q, rtol=1e-5, atol=1e-6)
        assert not torch.equal(before["module.encoder_q.conv1.weight"], after["module.encoder_q.conv1.weight"])
    assert int(steps[-1]["module.encoder_q.bn1.num_batches_tracked"]) == 9
    assert int(steps[-1]["module.encoder_k.bn1.num_batches_tracked"]) == 27  # three shots a step
    newest = torch.cat([own.U for own in stored[-3:]]).permute(2, 1, 0)
    assert torch.equal(steps[-1]["module.queue"], newest)
    assert int(steps[-1]["module.queue_ptr"]) == 0 and int(steps[3]["module.queue_ptr"]) == 8
    for (U, queue), before in zip(seen[1:], steps):  # the queue as the step before left it: no positive is in it
        assert torch.equal(queue, before["module.queue"])
        assert all(not torch.equal(u, column) for u in U.mT for column in queue.permute(2, 0, 1))


def test_gradient_through_the_subspace_leaves_the_memory_to_the_momentum_encoder(data, tmp_path, monkeypatch, capsys):
    runs: dict[str, dict[str, torch.Tensor]] = {}
    enqueue = KSCL.enqueue

    def enqueuing(model, own):
        assert not own.U.requires_grad
        enqueue(model, own)

    monkeypatch.setattr(KSCL, "enqueue", enqueuing)
    for mode in ("none", "pos"):  # the first step's keys come from equal weights either way
        log = train(data, tmp_path / mode, "--per_class", "3", "--moco_k", "8", "--subspace_grad", mode)
        assert len(log) == 1
        runs[mode] = checkpoint.load(tmp_path / mode / "checkpoint.pth")["state_dict"]
        assert ("watch feat/std, which falls to 0 then" in capsys.readouterr().out) == (mode == "pos")
    assert torch.equal(runs["none"]["module.queue"], runs["pos"]["module.queue"])
    assert not torch.equal(runs["none"]["module.encoder_q.conv1.weight"], runs["pos"]["module.encoder_q.conv1.weight"])
    assert int(runs["pos"]["module.encoder_q.bn1.num_batches_tracked"]) == 4
    assert int(runs["pos"]["module.encoder_k.bn1.num_batches_tracked"]) == 3


def test_a_checkpoint_of_moco_v2_starts_a_run(data, tmp_path):
    train(data, tmp_path / "moco", "--shots", "1", "--sim", "signed")
    state = checkpoint.load(tmp_path / "moco/checkpoint.pth")["state_dict"]
    public = {k: v for k, v in state.items() if k != "module.queue_rank"}
    public["module.queue"] = public["module.queue"][0]  # [D, M]
    checkpoint.save(tmp_path / "moco.pth", {"epoch": 200, "state_dict": public})
    start: dict[str, torch.Tensor] = {}
    load = ReleaseKeys.load_state_dict

    def noted(keys, state):
        load(keys, state)
        start.update({k: v.clone() for k, v in keys.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReleaseKeys, "load_state_dict", noted)
        train(data, tmp_path / "out", "--pretrained", str(tmp_path / "moco.pth"))
    assert torch.equal(start["module.queue"][0], public["module.queue"]) and not start["module.queue"][1:].any()
    assert all(torch.equal(start[k], v) for k, v in public.items() if "encoder" in k)
    with pytest.raises(
        UserError,
        match=r"moco.pth: .* do not fit KSCL: 2 mis-shaped \(queue \(3, 16, 24\) in the file, \(3, 16, 16\) here",
    ):
        train(data, tmp_path / "b", "--pretrained", str(tmp_path / "moco.pth"), "--moco_k", "16")
    checkpoint.save(tmp_path / "plain.pth", {"state_dict": {"conv1.weight": torch.zeros(3)}})
    with pytest.raises(UserError, match="plain.pth: no MoCo checkpoint"):
        train(data, tmp_path / "b", "--pretrained", str(tmp_path / "plain.pth"))


# --- resume ----------------------------------------------------------------------------------------------------------


def stop_at(step: int, how, monkeypatch) -> None:
    """Let `how()` happen inside the step with this number."""
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            how()

    monkeypatch.setattr(Run, "log", patched)


FULL = ["--end_epoch", "3", "--save-every", "2", "--subspace_grad", "pos"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Three epochs (nine steps) without interruption."""
    out = tmp_path_factory.mktemp("whole")
    train(data, out, *FULL)
    return out


@pytest.mark.parametrize("part", ["nothing", "queue", "pointer", "optimizer"])
def test_terminated_and_resumed_is_bit_identical_unless_a_part_is_lost(part, data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(4, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit) as stopped:
            train(data, tmp_path, *FULL)
    assert stopped.value.code == 143
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    assert saved["progress"]["step"] == 5
    if part == "queue":
        saved["state_dict"]["module.queue"][1:] = 0
    elif part == "pointer":
        saved["state_dict"]["module.queue_ptr"].add_(8).remainder_(24)
    elif part == "optimizer":
        saved["optimizer"]["state"] = {}
    checkpoint.save(tmp_path / "checkpoint.pth", saved)
    log = train(data, tmp_path, *FULL, *(["--workers", "2"] if part == "nothing" else []))
    assert (differing(whole, tmp_path) == []) == (part == "nothing")
    if part == "nothing":
        keys = ("step", "loss", "lr", "acc1", "subspace/rank_mean")
        assert [[r[k] for k in keys] for r in log] == [[r[k] for k in keys] for r in rows(whole)]


def test_resume_with_other_flags_is_refused(data, whole):
    with pytest.raises(UserError, match=r"--energy was 0.9, is 0.8; --moco-t was 0.2, is 0.1.*--overwrite"):
        train(data, whole, *FULL, "--energy", "0.8", "--moco_t", "0.1")
    before = rows(whole)
    train(data, whole, *FULL, "--log-every", "2")  # a runtime flag; and the run is complete
    assert rows(whole) == before


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr("kscl.main_kscl.learning_rate", lambda args, epoch: 0.05 if epoch < 1 else float("inf"))
    with pytest.raises(Diverged, match=r"step \d: the loss is nan"):
        train(data, tmp_path, "--end_epoch", "3")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step"] == 3


# --- processes and bad input -----------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_two_splits(data, tmp_path, python):
    """With gradient through the keys: those of both encoders are dealt over the processes."""
    flags = [*SMALL, "--data_dir", str(data), "--init_lr", "0.002", "--subspace_grad", "pos", "--end_epoch", "2"]
    flags += ["--aug_backend", "batch"]
    assert main([*flags, "--output-dir", str(tmp_path / "one")]) == 0
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "kscl.main_kscl", *flags, "--bn_splits", "1", "--output-dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    assert two["progress"]["world"] == 2 and len(two["rng"]) == 2
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    for key, value in one["state_dict"].items():
        other = two["state_dict"][key]
        if key == "module.queue":  # signs of the later directions are arbitrary: the projectors count
            value, other = (torch.einsum("pdm,pem->mde", x, x) for x in (value, other))
        # batch-norm buffers are those of the first process there, and the mean over the splits here
        if "running" not in key:
            torch.testing.assert_close(value, other, rtol=0, atol=2e-3)
    assert int(two["state_dict"]["module.queue_ptr"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere", r"nowhere/train: no such folder; expected .*train/CLASS"),
        ("--moco_k 100", r"--moco_k 100 does not divide by the global batch of 8; take --moco_k 96"),
        ("--batch_size 9", r"--batch_size 9 does not divide over 1 processes x 2 --bn_splits"),
        ("--batch_size 8 --bn_splits 8", r"at least 2 images a share"),
        (
            "--batch_size 4096 --moco_k 4096",
            r"^--batch_size 4096: a step takes 4096 images, the data has 24; give --batch_size 16 or",
        ),
        ("--shots 0", r"--shots 0: must be at least 1"),
        ("--shots 16", r"--moco_dim 16: subspaces of rank 16 can fill the whole space"),
        ("--energy 0", r"--energy and --rel_gamma must lie above 0 and up to 1"),
        ("--rank_rule fixed --rank 4", r"--rank 4: 3 shots span no more than 3 directions"),
        ("--center 1 --shots 1", r"--center 1 leaves nothing of one shot"),
        ("--center 1 --sim signed", r"--center 1 takes away the direction that --sim signed is oriented by"),
        ("--max_rank -1", r"--max_rank -1: must not be negative"),
        ("--moco_t 0", r"--moco_t and --init_lr must be above 0"),
        ("--moco_m 1.5", r"--moco_m must lie in 0..1"),
        ("--pretrained {tmp}/no.pth", r"no.pth: no such checkpoint file"),
        ("--output-dir /dev/null/x", r"/dev/null/x: cannot write here"),
    ],
)
def test_bad_flags_are_one_line(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(data, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_images_of_ones_own_in_class_folders_and_without_labels(data, tmp_path, capsys):
    """D/train, D's own class folders and files right below D, names with spaces and other endings among them."""
    whole = [path for folder in sorted((data / "train").iterdir()) for path in sorted(folder.iterdir())][:9]
    classes, plain = tmp_path / "my classes", tmp_path / "my photographs"
    for i, path in enumerate(whole):
        for folder in (classes / f"class {i % 2}", plain / ("more" if i == 8 else "")):
            folder.mkdir(parents=True, exist_ok=True)
            Image.open(path).resize((20 + i, 17)).save(folder / f"photo {i}.{('png', 'jpg')[i % 2]}")
    for folder, said in ((classes, "9 images of 2 classes"), (plain, "9 images, without labels")):
        train(folder, tmp_path / "out" / folder.name)
        printed = capsys.readouterr().out
        assert f"{folder}: {said}" in printed
        if folder == classes:
            hint = shlex.split(printed.split("evaluate: python -m kscl.main_knn ", 1)[1].splitlines()[0])
            assert main_knn.main([*hint, "--output-dir", str(tmp_path / "knn"), "--workers", "0"]) == 0
        else:
            hint = shlex.split(printed.split("backbone: python -m kscl.lab.export_detection ", 1)[1].splitlines()[0])
            assert export_detection.main(hint) == 0 and (tmp_path / "out" / folder.name / "backbone.pth").is_file()
    with pytest.raises(UserError, match="--per_class 2: the images of .* lie in no class folders"):
        train(plain, tmp_path / "none", "--per_class", "2")


def test_the_command_line_on_mini_data(tmp_path, python):
    command = [python, "-m", "kscl.main_kscl", *SMALL, "--output-dir", str(tmp_path / "out")]
    command += ["--data_dir", str(mini.ensure("images").resolve()), "--per-class", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("40 images of 10 classes", "expected initial loss", "estimated time", "python -m kscl.main_knn"):
        assert line in done.stdout
