"""Fine-tuning, linear probe, testing, retrieval and probes of fame; what its arms leave."""

import json
import os
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fame import augment, main_probe, main_retrieve
from fame import eval as fame_eval
from fame.backbone import build
from fame.data import VideoSet
from fame.eval import Classifier, accuracy, main
from fame.lab import arms
from fame.main_retrieve import recall, video_feature
from fame.network import outputs, resolve
from fame.video import Video
from shared_utils import UserError, checkpoint

ROOT = Path(__file__).resolve().parents[1]
NET = "-a tiny --width 2 -cs 32 -fpc 4 --stride 1 --cache --workers 0 --threads 1".split()
TRAIN = "-b 4 --lr 0.05 --epochs 2 --clip_per_video 2 --log-every 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes that differ in colour, eight training and four test videos of five frames; UCF101's layout."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    parts: dict[str, list[str]] = {"train": [], "test": []}
    table = ["path,background"]
    for i in range(12):
        name = f"class{i % 2}/v{i:02d}"
        (root / "data" / name).mkdir(parents=True)
        for t in range(5):
            frame = rng.integers(0, 90, (36, 40, 3)) + 120 * np.eye(3, dtype=np.int64)[i % 2]
            Image.fromarray(frame.astype(np.uint8)).save(root / "data" / name / f"img_{t:05d}.png")
        parts["train" if i < 8 else "test"].append(f"{name}.avi\n")
        table.append(f"{name}.avi,{'sea' if i % 4 < 2 else 'wood'}")
    (root / "anno").mkdir()
    for part, lines in parts.items():
        (root / "anno" / f"{part}list01.txt").write_text("".join(lines))
    (root / "attributes.csv").write_text("\n".join(table) + "\n")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A checkpoint as fame.train leaves it."""
    torch.manual_seed(0)
    model = build("tiny", 8, width=2)
    state = {f"module.encoder_q.{key}": value for key, value in model.state_dict().items()}
    flags = {"arch": "tiny", "width": 2, "crop_size": 32, "frame_per_clip": 4, "stride": 1}
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    checkpoint.save(path, {"state_dict": state, "args": flags, "progress": {"seconds": 90.0}})
    return path


def evaluate(data: Path, weights: Path | str, out: Path, *extra: str) -> dict:
    flags = ["--pretrained", str(weights), "--output-dir", str(out), "--index_cache", str(out / "i.pth"), *extra]
    assert main([str(data), *NET, *TRAIN, *flags]) == 0
    return json.loads((out / "result.json").read_text())


# --- training a classifier -------------------------------------------------------------------------------------------


def test_finetuning_trains_everything_and_its_checkpoint_tests_alike(data, pretrained, tmp_path):
    found = evaluate(data, pretrained, tmp_path / "a", "--finetune", "--dropout", "0", "--epochs", "6")
    assert found["acc1"] == 100 and found["chance"] == 50 and found["acc5"] == 100
    assert [row[0] for row in found["history"]] == [0, 5] and found["history"][-1][1:] == [100, 100]
    before = checkpoint.read_weights(pretrained)
    after = checkpoint.read_weights(tmp_path / "a/checkpoint.pth")
    assert not torch.equal(before["features.0.weight"], after["features.0.weight"])
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert log[-1]["lincls_val/acc1"] == 100 and "lincls_train/acc1" in log[0] and log[-1]["loss"] < log[0]["loss"]
    again = evaluate(data, tmp_path / "a/checkpoint.pth", tmp_path / "b", "--evaluate")
    assert again["acc1"] == found["acc1"]
    with pytest.raises(UserError, match="taken as tiny: .*fc.weight"):
        evaluate(data, pretrained, tmp_path / "c", "--evaluate")


def test_the_probe_changes_the_classifier_alone(data, pretrained, tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []
    forward = Classifier.forward

    def spied(self, x):
        seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(Classifier, "forward", spied)
    found = evaluate(data, pretrained, tmp_path, "--freeze", "--normalise", "l2", "--lr", "3", "--epochs", "8")
    assert found["acc1"] == 100
    assert set(checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]) == {"module.fc.weight", "module.fc.bias"}
    assert all(x.shape[1] == 16 for x in seen)


def test_training_clips_of_a_frozen_network_are_normalised(data, pretrained, tmp_path, monkeypatch):
    """The release feeds them as they are, and normalised ones in testing."""
    means: list[float] = []
    colours = augment.Colours.__call__

    def spied(self, x, u, order):
        out = colours(self, x, u, order)
        means.append(float(out.mean()))
        return out

    monkeypatch.setattr(augment.Colours, "__call__", spied)
    evaluate(data, pretrained, tmp_path, "--freeze")
    assert len(means) == 4 and all(mean < 0 for mean in means)  # pixels around 0.3, less than Kinetics' mean


def test_a_frozen_network_that_moves_is_noticed(data, pretrained, tmp_path, monkeypatch):
    def thaw(network):
        return {key: value.clone() + 1 for key, value in network.state_dict().items()}

    monkeypatch.setattr(fame_eval, "freeze", thaw)
    with pytest.raises(RuntimeError, match="of the frozen backbone changed"):
        evaluate(data, pretrained, tmp_path, "--freeze")


def test_a_stopped_run_goes_on_to_the_bit(data, pretrained, tmp_path, monkeypatch):
    flags = ("--finetune", "--epochs", "3", "--save-every", "1")
    evaluate(data, pretrained, tmp_path / "whole", *flags)
    calls: list[int] = []
    entropy = fame_eval.F.cross_entropy

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return entropy(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fame_eval.F, "cross_entropy", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(data, pretrained, tmp_path / "cut", *flags)
    assert checkpoint.load(tmp_path / "cut/checkpoint.pth")["progress"]["step"] == 3
    evaluate(data, pretrained, tmp_path / "cut", *flags)
    whole, cut = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    with pytest.raises(UserError, match="--backbone-sha256 was"):
        evaluate(data, "none", tmp_path / "cut", *flags)


# --- testing ---------------------------------------------------------------------------------------------------------


def still(count: int) -> VideoSet:
    """Videos whose frames are all alike."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (1, 40, 40, 3), dtype=np.uint8).repeat(12, 0) for _ in range(count)]
    videos = [Video(Path(str(n)), 12) for n in range(count)]
    return VideoSet(videos, list(range(count)), [str(n) for n in range(count)], 4, 1, 1, frames)


def test_the_mean_of_identical_clips_is_one_clip():
    model = build("tiny", classes=3, width=2).eval()
    found = []
    for clips in (1, 10):
        args = Namespace(crop_size=32, val_resize="36", clip_per_video=clips, workers=0)
        rows = [out for out, _ in outputs(model, still(3), args, torch.device("cpu"))]
        assert sum(len(row) for row in rows) == 3 and rows[0].shape[1:] == (clips, 3)
        found.append(torch.cat(rows).mean(1))
    torch.testing.assert_close(found[0], found[1])


def test_accuracy_counts_the_mean_output():
    out = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, 1.0]]])  # means (.5, 1.5), (1, .5)
    assert accuracy([(out, torch.tensor([1, 1]))], 2, torch.device("cpu")) == [50.0, 100.0]


def test_retrieval():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30)
    assert recall(x, labels, x, labels)[1] == 100
    shifted = recall(x, labels, x + 100 * torch.ones(8), labels)
    assert shifted[1] == 100  # each set's own mean is taken off
    at = recall(x, labels // 2, torch.randn(10, 8), torch.arange(10))
    assert list(at) == [1, 5, 10, 20, 50] and at[50] == 100 and sorted(at.values()) == list(at.values())
    clips = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])
    torch.testing.assert_close(video_feature(clips), torch.tensor([[0.5, 0.5]]))


def test_a_process_without_videos_takes_part_in_retrieval(data, pretrained, tmp_path, monkeypatch):
    """Five videos over four processes are shares of 2, 2, 1 and 0."""
    shapes: list[torch.Size] = []

    def gathered(rows: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
        shapes.append(rows.shape)
        return torch.rand(count, *rows.shape[1:])

    monkeypatch.setattr(main_retrieve, "outputs", lambda *args: iter(()))
    monkeypatch.setattr(main_retrieve, "gather_rows", gathered)
    flags = [str(data), "--pretrained", str(pretrained), "--output-dir", str(tmp_path), "--workers", "0"]
    assert main_retrieve.main([*flags, "--index_cache", str(tmp_path / "i.pth")]) == 0
    assert shapes == [(0, 16), (0, 16)]


def test_retrieval_and_probes_of_a_checkpoint(data, pretrained, tmp_path, capsys):
    common = [str(data), "--pretrained", str(pretrained), "-cpv", "2", "--workers", "0", "--cache"]
    common += ["--index_cache", str(tmp_path / "i.pth")]
    results = []
    for stats in ("kinetics", "imagenet"):
        out = tmp_path / stats
        assert main_retrieve.main([*common, "--stats", stats, "--output-dir", str(out)]) == 0
        results.append(json.loads((out / "result.json").read_text()))
    assert results[0]["r1"] == 100 and results[0].keys() == {"r1", "r5", "r10", "r20", "r50", "pretrained"}
    words = ["--probe", "class/1", "background/1", "--output-dir", str(tmp_path / "p")]
    assert main_probe.main([*common, *words]) == 0
    found = json.loads((tmp_path / "p/result.json").read_text())
    assert found["linear/class/1"] == found["r1/class/1"] == 100 and found["chance/class/1"] == 50
    assert found["linear/background/1"] < 100 and found["minutes"] == 1.5
    with pytest.raises(UserError, match="--probe class/4: expected LABEL/FOLD"):
        main_probe.main([*common, "--probe", "class/4"])


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", "give one of --finetune, --freeze and --evaluate"),
        ("--finetune --freeze", "give one of"),
        ("--finetune --normalise l2", "--normalise belongs to --freeze"),
        ("--evaluate", "--evaluate tests the classifier of a checkpoint"),
        ("--finetune --num_class 101", "--num_class 101: .* has 2"),
        ("--finetune --dropout 1", "--dropout from 0 to below 1"),
        ("--finetune --wd -1", "--wd -1: must not be negative"),
        ("--finetune --val_resize 20", "at least the crop's 32 pixels"),
        ("--finetune --clip_per_video 0", "must be at least 1"),
        ("--finetune --fold 2", "trainlist02.txt: no such file"),
        ("--finetune -b 9", "--batch_size 9: the data has 8 training videos; give --batch_size 8"),
    ],
)
def test_bad_flags_are_named(extra, expected, data, tmp_path):
    with pytest.raises(UserError, match=expected):
        evaluate(data, "none", tmp_path, *extra.split())


def test_weights_of_another_network_are_refused(data, pretrained, tmp_path):
    with pytest.raises(UserError, match="taken as tiny: the weights do not fit"):
        evaluate(data, pretrained, tmp_path, "--freeze", "--width", "3")


def test_a_checkpoint_of_an_image_network_is_told_as_such(tmp_path):
    checkpoint.save(
        tmp_path / "r18.pth", {"state_dict": {"conv1.weight": torch.zeros(1)}, "args": {"arch": "resnet18"}}
    )
    args = Namespace(pretrained=str(tmp_path / "r18.pth"), arch=None, width=None, crop_size=64, frame_per_clip=None,
                     stride=None, val_resize="auto")  # fmt: skip
    with pytest.raises(UserError, match="r18.pth: holds a resnet18, which is no video network"):
        resolve(args)


def test_flags_left_to_the_checkpoint(pretrained):
    args = Namespace(
        pretrained=str(pretrained), arch=None, width=None, crop_size=64, frame_per_clip=None, stride=None,
        clip_per_video=10, val_resize="auto",
    )  # fmt: skip
    resolve(args)
    assert (args.arch, args.width, args.crop_size, args.frame_per_clip, args.stride) == ("tiny", 2, 64, 4, 1)
    assert args.val_resize == "73"
    for size, side in ((112, "128"), (224, "256")):
        args.crop_size, args.val_resize = size, "auto"
        resolve(args)
        assert args.val_resize == side


def test_the_command_line(data, pretrained, tmp_path, python):
    """Each evaluation as a process: it answers, or ends with one line and code 2."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for module, extra, code, said in (
        ("fame.eval", ["--freeze", "--epochs", "1", "-b", "4"], 0, "acc1"),
        ("fame.main_retrieve", [], 0, "r1"),
        ("fame.main_probe", ["--probe", "colour/1"], 2, "error: --target colour: no such column"),
    ):
        command = [python, "-m", module, str(data), "--pretrained", str(pretrained), "-cpv", "1", *extra]
        command += ["--index_cache", str(tmp_path / "i.pth"), "--output-dir", str(tmp_path / module), "--workers", "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == code, done.stderr[-1500:]
        assert said in (done.stderr if code else done.stdout)
        assert len(done.stderr.strip().splitlines()) == (1 if code else 0)


# --- arms ------------------------------------------------------------------------------------------------------------


def test_what_is_read_of_an_arm(tmp_path):
    folder = tmp_path / "fame/seed1"
    assert arms.read(folder) is None
    probe = {"linear/class/1": 40.0, "r1/class/1": 30.0, "linear/class/2": 80.0, "r1/class/2": 70.0}
    probe |= {"linear/background/2": 60.0, "r5/class/1": 50.0, "minutes": 2.0}
    (tmp_path / "fame/seed1-linear").mkdir(parents=True)
    file = tmp_path / "fame/seed1-linear/result.json"
    file.write_text(json.dumps(probe))
    expected = {"linear": 40.0, "r1": 30.0, "linear_free": 80.0, "r1_free": 70.0, "blind": 40.0}
    assert arms.read(folder) == expected
    file.write_text(json.dumps({"linear/class/2": 55.0, "r1/class/2": 50.0, "linear/source_video/2": 90.0}))
    assert arms.read(folder) is None  # fight: fine-tuning is part of it
    (tmp_path / "fame/seed1-finetune").mkdir()
    (tmp_path / "fame/seed1-finetune/result.json").write_text(json.dumps({"acc1": 60.0}))
    assert arms.read(folder) == {"linear": 55.0, "r1": 50.0, "blind": 10.0, "finetuned": 60.0}


def test_rows_are_recorded_from_json_files_alone(tmp_path, monkeypatch):
    from shared_utils.lab import results

    home, root = tmp_path / "home", tmp_path / "small/motion"
    home.mkdir()
    (home / "results.csv").write_text(",".join(results.COLUMNS) + "\n")
    config = {"git_commit": "0123456789ab", "git_dirty": False, "hardware": "one GPU", "date": "2026-11-27"}
    for arm, score in (("moco", 20.0), ("fame", 40.0)):
        for seed in (0, 1, 2):
            folder = root / arm / f"seed{seed}"
            for name in (folder, folder.with_name(f"seed{seed}-linear")):
                name.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
            found = {f"{kind}/class/{n}": score + seed for kind in ("linear", "r1") for n in (1, 2)}
            found |= {"linear/background/2": 100 - score - 2 * seed, "minutes": 0.5}
            folder.with_name(f"seed{seed}-linear").joinpath("result.json").write_text(json.dumps(found))
    monkeypatch.setattr(arms.ARMS, "home", home)
    assert arms.main([str(root), "--record"]) == 0
    rows = [row for row in results.read(home)[0] if not row["status"].startswith("not run")]
    assert [row["metric"].split()[0] for row in rows] == ["linear", "retrieval", "linear", "retrieval", "error"]
    assert rows[0]["status"].startswith("not testable at this size (3 seeds, 5 needed; no floor measured")
    assert {row["status"] for row in rows[1:]} == {"descriptive"} and all(row["p"] and row["ci_low"] for row in rows)
    assert rows[0]["ours_mean"] == "41.00" and rows[0]["baseline_mean"] == "21.00" and rows[0]["minutes"] == "0.5"
