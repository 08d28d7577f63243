"""uvos_dino's training scripts: what a step does, exact resume, two processes, arms, bad input."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils import UserError, checkpoint
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing
from uvos_dino import dino, losses, main_dino, vision_transformer
from uvos_dino import train_RGB_cluster as script
from uvos_dino.inference import load_model
from uvos_dino.lab import arms

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--dino_path none --arch vit_mini --patch_size 8 --resolution 32 48 --num_heads 4 --num_points 3 --batch_size 2 "
    "--num_train_steps 4 --lr 1e-3 --keep_every 0 --workers 0 --threads 1 --log-every 1 --amp none"
).split()
DINO = (
    "--image_size 32 48 --arch vit_mini --global_size 32 --local_size 16 --local_crops 1 --out_dim 32 --hidden_dim 32 "
    "--bottleneck_dim 16 --batch_size 4 --epochs 2 --workers 0 --threads 1 --log-every 1 --amp none"
).split()


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of eight noisy frames with a bright square, DAVIS-2016's layout."""
    root, rng = tmp_path_factory.mktemp("davis"), np.random.default_rng(0)
    for name in ("aa", "bb"):
        for t in range(8):
            mask = np.zeros((32, 48), np.uint8)
            mask[8:24, 2 * t : 2 * t + 16] = 255
            rgb = rng.integers(0, 90, (32, 48, 3)) + mask[..., None] // 2
            for kind, image in (("JPEGImages", rgb.astype(np.uint8)), ("Annotations", mask)):
                file = root / kind / "480p" / name / f"{t:05d}.{'jpg' if kind == 'JPEGImages' else 'png'}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(file)
    return root


def train(davis: Path, out: Path, *more: str) -> list[dict]:
    argv = [*SMALL, "--basepath", str(davis / "JPEGImages"), "--output-dir", str(out), *more]
    assert script.main(argv) == 0
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    "arm",
    [
        "",
        "--semantic_weight 0 --cache",
        "--motion_weight 0 --augment false",
        "--point_weights uniform --num_t 2",
        "--counts 2,9,1,4 --gap 1 --num_frames 2",
    ],
)
def test_every_arm_trains(arm: str, davis: Path, tmp_path: Path) -> None:
    log = train(davis, tmp_path, *arm.split(), "--keep_every", "2")
    assert len(log) == 4 and log[0]["lr"] == 1e-3 > log[-1]["lr"]
    names = {"train/loss", "slot_loss", "motion_loss", "train/attn_entropy", "train/attn_frame_share"}
    weights = [0.0 if f"--{name}_weight" in arm else 1.0 for name in ("semantic", "motion")]
    for row in log:
        assert names <= set(row)
        assert weights[0] * row["slot_loss"] + weights[1] * row["motion_loss"] == pytest.approx(row["loss"], abs=1e-4)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    assert saved["iteration"] == 4 and {"model_state_dict", "optimizer_state_dict"} <= set(saved)
    model, said, minutes = load_model(tmp_path / "checkpoint_2.pth")
    assert "iteration 2" in said and "4 heads" in said and minutes is None
    assert len(model.temporal_transformer) == 1 + ("num_t" in arm)
    assert load_model(tmp_path / "checkpoint.pth")[2] is not None


def test_tensorboard_has_the_promised_names(davis: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = train(davis, tmp_path, *f"--probe_every 2 --val_basepath {davis} --split all --probe_videos 1".split())
    assert ["probe/clusters" in row and "probe/J" in row for row in log] == [True, True, False, True]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {
        "train/loss", "train/slot_loss", "train/motion_loss", "train/lr", "train/attn_entropy",
        "train/attn_frame_share", "probe/clusters", "probe/J",
    }  # fmt: skip


def test_the_random_block_is_kept_as_it_is(davis: Path, tmp_path: Path) -> None:
    assert train(davis, tmp_path / "none", "--num_train_steps", "0") == []
    train(davis, tmp_path / "some")
    none, some = (checkpoint.load(tmp_path / name / "checkpoint.pth")["model_state_dict"] for name in ("none", "some"))
    changed = {key for key in none if not torch.equal(none[key], some[key])}
    assert changed and all(key.startswith("temporal_transformer.") for key in changed)


def test_the_first_step_is_adamw_on_both_losses(davis: Path, tmp_path: Path) -> None:
    """One step by hand, dropout off: the same weights as the script's."""
    off = ["--drop", "0", "--attn_drop_t", "0", "--num_train_steps", "1"]
    train(davis, tmp_path / "start", *off[:-1], "0")
    train(davis, tmp_path / "one", *off)
    model = load_model(tmp_path / "start" / "checkpoint.pth")[0]
    model.temporal_transformer.train()
    args = script.get_parser().parse_args(SMALL)
    videos = script.chosen_videos(davis / "JPEGImages", None)
    clips = script.Clips(videos, 2, 3, 4, (32, 48), script.ClipAugment((32, 48), 0))
    clip = torch.stack([script.Keyed(clips, 0)[(0, i)] for i in range(2)])
    z, A = model(clip)
    P = losses.sample_points(24, 3, torch.Generator().manual_seed(script.mix_key(0, 0, 1) % 2**63))
    counts = losses.Counts().scaled(24)
    (losses.semantic(z, A, P, *counts[:2]) + losses.motion(A, P, 3, *counts[2:])).backward()
    groups = script.param_groups(model.temporal_transformer)
    assert {p.dim() for p in groups[0]["params"]} == {2} and {p.dim() for p in groups[1]["params"]} == {1}
    torch.optim.AdamW(groups, args.lr, weight_decay=0.1).step()
    saved = checkpoint.load(tmp_path / "one" / "checkpoint.pth")["model_state_dict"]
    assert all(torch.allclose(value, saved[key], atol=1e-6) for key, value in model.state_dict().items())


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM after step `at`, as a scheduler sends it."""
    log = Run.log

    def kill(self: Run, *args, **kwargs) -> None:
        log(self, *args, **kwargs)
        if self.step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", kill)


def test_a_killed_run_goes_on_to_the_same_end(davis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(davis, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupted(patched, 2)
        with pytest.raises(SystemExit) as stop:
            train(davis, tmp_path / "cut")
        assert stop.value.code == 143
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pth")["progress"]["step"] == 2
    with pytest.raises(UserError, match="--lr was 0.001, is 0.002"):
        train(davis, tmp_path / "cut", "--lr", "2e-3")
    log = train(davis, tmp_path / "cut")
    assert [row["step"] for row in log] == [1, 2, 3, 4] and differing(tmp_path / "whole", tmp_path / "cut") == []
    train(davis, tmp_path / "other", "--seed", "1")
    assert differing(tmp_path / "whole", tmp_path / "other")


def test_two_processes_equal_one_on_both_batches(davis: Path, tmp_path: Path, python: str) -> None:
    off = ["--drop", "0", "--attn_drop_t", "0", "--num_train_steps", "2"]
    one = train(davis, tmp_path / "one", *off, "--batch_size", "4")
    argv = [*SMALL, "--basepath", str(davis / "JPEGImages"), "--output-dir", str(tmp_path / "two"), *off]
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "uvos_dino.train_RGB_cluster", *argv, "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=2e-5)
    a, b = (checkpoint.load(tmp_path / name / "checkpoint.pth")["model_state_dict"] for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=2e-4) for key in a)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--num_points", "0"], "--num_points 0: must be at least 1"),
        (["--num_points", "25"], "--num_points 25: a frame has 24 patches"),
        (["--counts", "30,200,10,50"], "more than the 24 patches of a frame"),
        (["--counts", "1,2,3"], "must be auto or four numbers"),
        (["--semantic_weight", "0", "--motion_weight", "0"], "no loss is left"),
        (["--attn_drop_t", "1"], "--attn_drop_t at least 0 and below 1"),
        (["--num_heads", "7"], "--num_heads 7: does not divide"),
        (["--resolution", "30", "48"], "multiples of the encoder's patch"),
        (["--probe_every", "2"], "needs --val_basepath"),
        (["--dino_path", "nosuch.pth"], "--dino_path nosuch.pth: no such file"),
        (["--basepath", "nosuch"], "nosuch: no folder of"),
        (["--train_list", "nosuch.txt"], "--train_list nosuch.txt: no such file"),
    ],
)
def test_bad_flags_are_one_line(davis: Path, tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(davis, tmp_path, *more)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_probe_without_an_object_is_named(davis: Path, tmp_path: Path) -> None:
    root = shutil.copytree(davis, tmp_path / "davis")
    for file in (root / "Annotations" / "480p" / "aa").iterdir():
        Image.fromarray(np.zeros((32, 48), np.uint8)).save(file)
    more = f"--probe_every 2 --val_basepath {root} --probe_videos 1".split()
    with pytest.raises(UserError, match="00000.png: no object in the first annotated frame or later"):
        train(davis, tmp_path / "out", *more, "--split", "all")
    with pytest.raises(UserError, match="--split val: .* has no list of that name; expected .*2016/val.txt"):
        train(davis, tmp_path / "out", *more)


def test_a_loss_that_is_not_finite_stops_the_run(davis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "semantic", lambda z, *_: z.sum() * float("nan"))
    with pytest.raises(Diverged, match="step 0: the loss is nan"):
        train(davis, tmp_path)


def test_a_list_chooses_the_videos(davis: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("bb\n")
    (video,) = script.chosen_videos(davis / "JPEGImages", tmp_path / "list.txt")
    assert video[0].parent.name == "bb" and len(video) == 8
    (tmp_path / "list.txt").write_text("/JPEGImages/480p/bb/00000.jpg /Annotations/480p/bb/00000.png\n")
    (same,) = script.chosen_videos(davis / "JPEGImages", tmp_path / "list.txt")
    assert same == video
    (tmp_path / "list.txt").write_text("cc\n")
    with pytest.raises(UserError, match="cc: no such video"):
        script.chosen_videos(davis / "JPEGImages", tmp_path / "list.txt")


# --- DINO ------------------------------------------------------------------------------------------------------------


def run_dino(davis: Path, out: Path, *more: str) -> None:
    assert main_dino.main([*DINO, "--data_dir", str(davis), "--output-dir", str(out), *more]) == 0


def test_dino_trains_resumes_and_feeds_the_block(davis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dino(davis, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupted(patched, 5)
        with pytest.raises(SystemExit):
            run_dino(davis, tmp_path / "cut")
    run_dino(davis, tmp_path / "cut")
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    file = tmp_path / "whole" / "checkpoint.pth"
    saved = checkpoint.load(file)
    assert saved["dino_loss"]["center"].abs().sum() > 0
    encoder, _ = vision_transformer.load(str(file), "vit_small", 16)
    assert all(torch.equal(v, saved["teacher"][f"backbone.{k}"]) for k, v in encoder.state_dict().items())
    train(davis, tmp_path / "block", "--dino_path", str(file), "--num_train_steps", "1")
    with pytest.raises(UserError, match="--global_size 30: must be a multiple"):
        run_dino(davis, tmp_path / "bad", "--global_size", "30")


def test_dino_loss_against_a_loop() -> None:
    torch.manual_seed(0)
    criterion = dino.DinoLoss(7, 0.1, 0.04)
    criterion.center.copy_(torch.randn(7) / 9)
    student, teacher = torch.randn(4 * 3, 7) / 9, torch.randn(2 * 3, 7) / 9
    total = 0.0
    for t in range(2):
        for s in (s for s in range(4) if s != t):
            p = ((teacher[3 * t : 3 * t + 3] - criterion.center) / 0.04).softmax(-1)
            total += float(-(p * (student[3 * s : 3 * s + 3] / 0.1).log_softmax(-1)).sum(-1).mean())
    assert criterion(student, teacher, 4).item() == pytest.approx(total / 6, abs=1e-5)
    before = criterion.center.clone()
    criterion.update(teacher)
    assert torch.allclose(criterion.center, 0.9 * before + 0.1 * teacher.mean(0), atol=1e-6)


def test_views_are_crops_of_their_image() -> None:
    flat = torch.rand(6, 3, 1, 1).expand(6, 3, 20, 30)
    out = dino.views(flat, 8, (0.1, 0.5), torch.Generator().manual_seed(0))
    assert out.shape == (6, 3, 8, 8) and float((out - out.mean((2, 3), keepdim=True)).abs().max()) < 1e-4
    theta = dino.crop_grid(500, 1.5, (0.2, 0.4), torch.Generator().manual_seed(0))
    area = theta[:, 0, 0].abs() * theta[:, 1, 1]
    assert 0.19 < float(area.min()) and float(area.max()) < 0.41
    assert float((theta[:, :, 2].abs() + theta[:, [0, 1], [0, 1]].abs()).max()) <= 1 + 1e-6  # inside the image
    whole = dino.views(flat, 8, (0.1, 0.5), torch.Generator().manual_seed(0))
    half = dino.views(flat[3:], 8, (0.1, 0.5), torch.Generator().manual_seed(0), rank=1, world=2)
    assert torch.equal(whole[3:], half)


# --- arms ------------------------------------------------------------------------------------------------------------


def finish(root: Path, arm: str, seed: int, J: float, clusters: float) -> None:
    folder = root / arm / f"seed{seed}"
    folder.mkdir(parents=True)
    facts = {"git_commit": "0123456789ab", "hardware": "2 CPU cores", "date": "2026-11-27"}
    (folder / "config.json").write_text(json.dumps(facts))
    rows = [{"step": s, "loss": 2.0, "probe/clusters": clusters * s / 300, "probe/J": J} for s in (1, 100, 200, 300)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for job, extra in (("test", {"minutes": 1.5}), ("tau0.3", {})):
        result = {"frame": {"J-Mean": J, "J&F-Mean": J - 1}, "sequence": {"J-Mean": J - 2}, "clusters": clusters}
        folder.with_name(f"seed{seed}-{job}").mkdir()
        (folder.with_name(f"seed{seed}-{job}") / "result.json").write_text(json.dumps(result | extra))


def test_arms_are_recorded_from_the_json_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    home, root = tmp_path / "home", tmp_path / "small" / "davis2016"
    home.mkdir()
    (home / "results.csv").write_text((ROOT / "uvos_dino" / "results.csv").read_text().splitlines()[0] + "\n")
    monkeypatch.setattr(arms.ARMS, "home", home)
    for seed in range(2):
        finish(root, "both", seed, 30.0 + seed, 5.0)
        finish(root, "random", seed, 10.0 + seed, 1.0)
    assert arms.read(root / "both" / "seed7") is None
    assert arms.main([str(root), "--record", "--plot", str(tmp_path / "plot.png")]) == 0
    said = capsys.readouterr().out
    assert "| both losses | 2 | 30.50 ± 0.71 |" in said and "+20.00 (20.00 to 20.00)" in said
    assert "27 rows" in said  # 3, and 11 and 13 arms left out
    log = json.loads((home / "lab/logs" / "davis2016-both.json").read_text())["0"]
    assert log["facts"]["minutes"] == 1.5 and log["metrics"]["clusters_other"] == 5.0
    assert log["curve"][-1] == {"step": 300, "loss": 2.0, "probe/clusters": 5.0, "probe/J": 30.0}
    assert colours_of(tmp_path / "plot.png") >= set(arms.COLOURS[:2])
    shutil.rmtree(root)  # what was recorded is drawn where the runs are gone
    assert arms.main([str(root), "--plot", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "plot.png").read_bytes()


def colours_of(file: Path) -> set[str]:
    found = np.unique(np.asarray(Image.open(file)).reshape(-1, 3), axis=0)
    return {"#" + bytes(colour.tolist()).hex() for colour in found}


def test_runs_that_have_not_ended_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(arms.ARMS, "home", tmp_path)
    root = tmp_path / "small" / "davis2016"
    with pytest.raises(UserError, match="no run here was probed"):
        arms.main([str(root), "--plot", str(tmp_path / "plot.png")])
    for number, arm in enumerate(arms.ARMS.arms):
        folder = root / arm / "seed0"
        folder.mkdir(parents=True)
        rows = [{"step": step, "loss": 1.0, "probe/clusters": number + step, "probe/J": 9.0} for step in (1, 2)]
        text = "\n".join(map(json.dumps, [{"step": 1, "loss": 1.0}, *rows, rows[-1]]))
        (folder / "log.jsonl").write_text(text[:-9])  # the last line is being written
    assert arms.main([str(root), "--plot", str(tmp_path / "plot.png")]) == 0
    assert capsys.readouterr().out == f"courses -> {tmp_path / 'plot.png'}\n"
    assert len(arms.COLOURS) == len(arms.ARMS.arms) and colours_of(tmp_path / "plot.png") >= set(arms.COLOURS)
    for folder in root.glob("*/seed0"):
        (folder / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}))
    with pytest.raises(UserError, match="no run here was probed"):
        arms.main([str(root), "--plot", str(tmp_path / "plot.png")])
