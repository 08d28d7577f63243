"""BINGO's scripts on mini data: bags, teacher, distillation, every arm, exact resume, two processes, bad input."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from bingo import compute_knn, main_knn, main_moco, main_teacher
from bingo.arch import build
from bingo.data import save_bags
from bingo.lab import arms
from bingo.options import learning_rate
from shared_utils import UserError, checkpoint
from shared_utils.augment import plain
from shared_utils.data import load_image
from shared_utils.lab import mini
from shared_utils.run import Diverged, Run
from tests.checkpoints import differing, flat

ROOT = Path(__file__).resolve().parents[1]
DATA = "--per_class 5 --img_size 16 --cache --workers 0 --threads 1".split()  # 50 images
NETS = "--t_arch resnet10 --t_width 8 --t_stem cifar --s_arch resnet10 --s_width 4 --s_stem cifar --hidden 16".split()
RUN = "--batch_size 8 --moco_k 32 --log-every 1 --end_epoch 2 --init_lr 0.05 --warmup_epochs 1".split()  # 12 steps


@pytest.fixture(scope="module")
def data() -> Path:
    return mini.ensure("images")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    flags = "--arch resnet10 --width 8 --stem cifar --moco_dim 16 --batch_size 8 --moco_k 32 --end_epoch 1".split()
    assert (
        main_teacher.main([*DATA, "--data_dir", str(data), *flags, "--log-every", "1", "--output-dir", str(out)]) == 0
    )
    return out


@pytest.fixture(scope="module")
def corr(data, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corr")
    network = [
        "--arch",
        "resnet10",
        "--t_width",
        "8",
        "--t_stem",
        "cifar",
        "--ckpt_name",
        str(teacher / "checkpoint.pth"),
    ]
    for kind in ("knn", "kmeans", "label", "random"):
        flags = ["--bags", kind, "--corr_dir", str(folder), "--corr_name", f"{kind}.npy", *network]
        assert compute_knn.main([*DATA, "--data_dir", str(data), *flags]) == 0
    return folder


@pytest.fixture
def train(data, teacher, corr):
    """Distil in this process; the rows of the log."""
    base = [*DATA, *NETS, *RUN, "--data_dir", str(data), "--pretrain_path", str(teacher / "checkpoint.pth")]
    base += ["--corr_npy", str(corr / "knn.npy"), "--check_teacher", "20"]

    def run(out: Path, *extra: str) -> list[dict[str, Any]]:
        assert main_moco.main([*base, "--output-dir", str(out), *extra]) == 0
        return rows(out)

    run.flags = base  # type: ignore[attr-defined]
    return run


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_bag_files(corr, data):
    knn, label, random = (np.load(corr / f"{kind}.npy") for kind in ("knn", "label", "random"))
    assert knn.dtype == np.int64 and knn.shape == random.shape == (50, 5) and label.shape == (50,)
    for array in (knn, random):
        assert not (array == np.arange(50)[:, None]).any() and array.min() >= 0 and array.max() < 50
    assert label.tolist() == [c for c in range(10) for _ in range(5)]
    assert len(np.unique(np.load(corr / "kmeans.npy"))) > 1
    assert json.loads((corr / "knn.json").read_text())["kind"] == "knn"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--corr_dir /dev/null/x",
            r"/dev/null/x/k.npy: cannot be written \(Not a directory\); give another --corr_dir",
        ),
        ("--feature_file /dev/null/f.npy", r"/dev/null/f.npy: features cannot be written there \("),
        ("--bags kmeans --clusters 51", r"--clusters 51: there are only 50 images"),
        ("--bags kmeans --clusters -1", r"--clusters -1: must not be negative"),
        ("--img_size 0", r"--img_size 0: must be at least 1"),
        ("--clus_pos_num 50", r"--clus_pos_num 50 needs more than so many images, there are 50"),
        ("--bags random --data_dir {one}", r"--bags random needs two images at least, there is one"),
    ],
)
def test_bad_flags_of_the_bags_are_one_line(flags, message, data, teacher, tmp_path):
    """The folder is tried before any feature is computed."""
    (tmp_path / "one/train/a").mkdir(parents=True)
    shutil.copy(next((data / "train").rglob("*.*")), tmp_path / "one/train/a")
    network = ["--arch", "resnet10", "--t_width", "8", "--t_stem", "cifar", "--ckpt_name"]
    out = ["--corr_dir", str(tmp_path / "corr"), "--corr_name", "k.npy"]
    with pytest.raises(UserError, match=message) as error:
        compute_knn.main(
            [*DATA, "--data_dir", str(data), *network, str(teacher / "checkpoint.pth"), *out]
            + flags.format(one=tmp_path / "one").split()
        )
    assert "\n" not in str(error.value) and not list(tmp_path.glob("corr/*"))


def test_the_output_is_tried_before_the_features(data, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(compute_knn, "features", None)
    flags = ["--corr_dir", "/dev/null/x", "--ckpt_name", str(teacher / "checkpoint.pth")]
    with pytest.raises(UserError, match="cannot be written"):
        compute_knn.main(
            [*DATA, "--data_dir", str(data), *"--arch resnet10 --t_width 8 --t_stem cifar".split(), *flags]
        )


def test_bags_from_mapped_features_are_the_same(corr, data, teacher, tmp_path):
    flags = [
        "--arch",
        "resnet10",
        "--t_width",
        "8",
        "--t_stem",
        "cifar",
        "--ckpt_name",
        str(teacher / "checkpoint.pth"),
    ]
    flags += ["--corr_dir", str(tmp_path), "--corr_name", "k.npy", "--feature_file", str(tmp_path / "features.npy")]
    assert compute_knn.main([*DATA, "--data_dir", str(data), *flags, "--batch_size", "7"]) == 0
    assert np.array_equal(np.load(tmp_path / "k.npy"), np.load(corr / "knn.npy"))
    stored = np.load(tmp_path / "features.npy")
    assert stored.shape == (50, 64) and np.allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "arm",
    [
        "",
        "--one_pass --bn_splits 2",
        "--loss paper",
        "--loss intra",
        "--mix none --lam 1,0",
        "--corr_npy {corr}/random.npy",
        "--corr_npy {corr}/label.npy",
        "--corr_npy {corr}/kmeans.npy --teacher_bn train --bn_splits 2",
        "--s_arch efficientnet-b0 --s_width 64 --s_stem imagenet --img_size 32 --end_epoch 1",
        "--s_arch mobilenetv3 --s_width 64 --s_stem imagenet --img_size 32 --end_epoch 1 --loss intra",
        "--amp bf16 --aug_plus false --decay_method step --schedule 1",
    ],
)
def test_every_arm_trains(arm, train, corr, tmp_path):
    log = train(tmp_path, *arm.format(corr=corr).split())
    assert len(log) >= 5 and all(0 < row["loss"] < 12 for row in log)
    assert log[0].keys() >= {"step", "epoch", "loss", "lr", "acc1", "acc5", "sim/positive", "feat/std", "data_wait"}
    assert ("loss/mix" in log[0]) is ("none" not in arm and "loss" not in arm)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    assert {"module.queue", "module.queue_ptr"} < set(saved) and list(tmp_path.glob("events.*"))
    assert {key.split(".")[1] for key in saved} == {"queue", "queue_ptr", "encoder_q", "encoder_k"}


def test_the_teacher_in_the_checkpoint_is_the_one_of_the_file(train, teacher, tmp_path):
    train(tmp_path)
    source = checkpoint.load(teacher / "checkpoint.pth")["state_dict"]
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    keys = [key for key in saved if key.startswith("module.encoder_k.")]
    assert len(keys) > 50  # the q encoder of the file, though it holds a k encoder too
    for key in keys:
        assert torch.equal(saved[key], source[key.replace("encoder_k", "encoder_q")]), key
    assert not torch.equal(source["module.encoder_k.conv1.weight"], source["module.encoder_q.conv1.weight"])


def test_teacher_check_sees_neighbours_even_with_more_classes_than_images_to_look_at(data):
    from shared_utils.data import image_folder

    images = image_folder(data / "train")
    some = main_moco.sample_classes(images, 64)
    assert len(some) == 64 and some.labels.unique().tolist() == [0, 5]  # two classes of 32
    assert len(main_moco.sample_classes(images, 512)) == 320
    finer = type(images)([(path, i // 50) for i, path in enumerate(images.paths())], [str(c) for c in range(20)])
    assert torch.bincount(main_moco.sample_classes(finer, 96).labels).max() == 32


def test_a_students_checkpoint_loads_into_torchvision(train, tmp_path):
    """Without `module.encoder_q.` and the head, only the classifier is missing."""
    train(tmp_path, *"--s_arch resnet18 --s_width 64 --s_stem imagenet --end_epoch 1 --loss intra".split())
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"]
    own = {k.removeprefix("module.encoder_q."): v for k, v in saved.items() if k.startswith("module.encoder_q.")}
    net = torchvision.models.resnet18()
    classifier = {k: v for k, v in net.state_dict().items() if k.startswith("fc.")}
    net.load_state_dict({k: v for k, v in own.items() if not k.startswith("fc.")} | classifier)  # else an error
    assert len(classifier) == 2
    assert all(torch.equal(v, own[k]) for k, v in net.state_dict().items() if k not in classifier)


def test_one_pass_is_three_passes(train, tmp_path):
    three, one = (
        train(tmp_path / "three", "--end_epoch", "1"),
        train(tmp_path / "one", "--end_epoch", "1", "--one_pass"),
    )
    assert [r["loss"] for r in three] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    a, b = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("three", "one"))
    assert (
        int(a["module.encoder_q.bn1.num_batches_tracked"]) == int(b["module.encoder_q.bn1.num_batches_tracked"]) == 18
    )
    name = "module.encoder_q.bn1.running_mean"
    torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


def test_cross_terms_start_after_the_warmup(train, tmp_path):
    """Runs with other cross weights agree until the first epoch after the warm-up, and not from there on."""
    a, b = train(tmp_path / "a"), train(tmp_path / "b", "--lam", "0.2,0.8")
    assert [r["loss"] for r in a[:6]] == [r["loss"] for r in b[:6]]
    assert all(x["loss"] != y["loss"] for x, y in zip(a[6:], b[6:]))


# --- resume ----------------------------------------------------------------------------------------------------------


def stop_at(step: int, monkeypatch) -> None:
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", patched)


@pytest.fixture(scope="module")
def whole_flags() -> list[str]:
    return ["--save-every", "2", "--bn_splits", "2", "--teacher_bn", "train"]


@pytest.mark.parametrize(("step", "backend"), [(3, "pil"), (8, "batch")])
def test_terminated_and_resumed_is_bit_identical(step, backend, train, whole_flags, tmp_path, monkeypatch):
    whole_flags = [*whole_flags, "--aug_backend", backend]
    train(tmp_path / "whole", *whole_flags)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "cut", *whole_flags)
    assert stopped.value.code == 143
    train(tmp_path / "cut", *whole_flags, "--workers", "2")
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    assert [r["loss"] for r in rows(tmp_path / "whole")] == [r["loss"] for r in rows(tmp_path / "cut")]


def test_killed_and_resumed_is_bit_identical_and_a_lost_pointer_is_not(train, whole_flags, tmp_path, python):
    train(tmp_path / "whole", *whole_flags)
    script = (
        "import os, signal; from shared_utils.run import Run, cli; from bingo.main_moco import main; log = Run.log\n"
        "def patched(self, *a, **k):\n    log(self, *a, **k)\n"
        "    self.step == 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.log = patched; cli(main)"
    )
    command = [python, "-c", script, *train.flags, "--output-dir", str(tmp_path / "cut"), *whole_flags]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    saved = checkpoint.load(tmp_path / "cut/checkpoint.pth")
    assert saved["progress"]["step"] == 8
    train(tmp_path / "cut", *whole_flags)
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    saved["state_dict"]["module.queue_ptr"].add_(8).remainder_(32)
    checkpoint.save(tmp_path / "lost/checkpoint.pth", saved)
    train(tmp_path / "lost", *whole_flags)
    assert differing(tmp_path / "whole", tmp_path / "lost") != []


def test_resume_with_dropout_is_bit_identical(train, tmp_path, monkeypatch):
    flags = "--s_arch efficientnet-b0 --s_width 64 --s_stem imagenet --img_size 32 --end_epoch 1 --loss intra".split()
    train(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(SystemExit):
            train(tmp_path / "cut", *flags)
    train(tmp_path / "cut", *flags)
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_teacher_run_resumes_bit_identical(data, tmp_path, monkeypatch):
    flags = "--arch resnet10 --width 8 --stem cifar --batch_size 8 --moco_k 32 --end_epoch 2 --bn_splits 2".split()
    flags = [*DATA, "--data_dir", str(data), *flags, "--output-dir"]
    main_teacher.main([*flags, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(SystemExit):
            main_teacher.main([*flags, str(tmp_path / "cut")])
    main_teacher.main([*flags, str(tmp_path / "cut")])
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_resume_with_other_flags_is_refused(train, tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="--lam was .*; --moco-t was 0.2, is 0.1.*--overwrite"):
        train(tmp_path, "--lam", "0.6,0.4", "--moco_t", "0.1")


def test_resume_with_other_bags_or_images_is_refused(train, data, corr, teacher, tmp_path, monkeypatch):
    """The same names, but other things behind them."""
    images = tmp_path / "data"
    for folder in sorted((data / "train").iterdir()):
        (images / "train" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:6]:
            shutil.copy(file, images / "train" / folder.name)
    bags = tmp_path / "bags.npy"
    for name in ("bags.npy", "bags.json"):
        shutil.copy(corr / name.replace("bags", "knn"), tmp_path / name)
    where = ["--data_dir", str(images), "--corr_npy", str(bags)]
    first = next(file for file in sorted((images / "train").rglob("*")) if file.is_file())

    def refused(out: str, match: str, *flags: str) -> None:
        before = (tmp_path / out / "checkpoint.pth").read_bytes()
        with pytest.raises(UserError, match=match):
            train(tmp_path / out, *where, *flags)
        assert (tmp_path / out / "checkpoint.pth").read_bytes() == before

    train(tmp_path / "bags", *where, "--end_epoch", "1")
    train(tmp_path / "intra", *where, "--end_epoch", "1", "--loss", "intra")
    flags = "--arch resnet10 --width 4 --stem cifar --batch_size 8 --moco_k 32 --end_epoch 1".split()
    moco = [*DATA, "--data_dir", str(images), *flags, "--output-dir", str(tmp_path / "teacher")]
    main_teacher.main(moco)

    array = np.load(bags)
    array[7, 0] = (array[7, 0] + 1) % 50 if (array[7, 0] + 1) % 50 != 7 else 8
    save_bags(bags, array, main_moco.train_images(main_moco.get_parser().parse_args([*train.flags, *where])), "knn")
    refused("bags", "--bags-sha256 was .*, is .*--overwrite", "--end_epoch", "1")
    train(tmp_path / "intra", *where, "--end_epoch", "1", "--loss", "intra")  # needs no bags

    first.rename(first.with_name(f"0-{first.name}"))  # still the first of its class
    refused("intra", "--images-sha256 was .*, is .*--overwrite", "--end_epoch", "1", "--loss", "intra")
    with pytest.raises(UserError, match="--images-sha256 was"):
        main_teacher.main(moco)


# --- what the preflight says -----------------------------------------------------------------------------------------


def test_bags_of_another_teacher_are_told(train, data, corr, teacher, tmp_path, capsys):
    facts = json.loads((corr / "knn.json").read_text())
    assert facts["k"] == 5 and facts["teacher"]["name"] == f"resnet10 of {teacher / 'checkpoint.pth'} (moco)"
    assert json.loads((corr / "random.json").read_text())["teacher"] is None
    end = ["--end_epoch", "1"]
    train(tmp_path / "own", *end)
    assert "CAUTION" not in capsys.readouterr().out
    saved = checkpoint.load(teacher / "checkpoint.pth")
    saved["state_dict"]["module.encoder_q.conv1.weight"].mul_(2)
    checkpoint.save(tmp_path / "other.pth", saved)
    train(tmp_path / "a", *end, "--pretrain_path", str(tmp_path / "other.pth"))
    assert f"CAUTION, bags: made with another teacher, {facts['teacher']['name']}," in capsys.readouterr().out
    saved["state_dict"]["module.encoder_q.conv1.weight"].div_(2)
    saved["state_dict"]["module.encoder_q.fc.0.weight"].mul_(2)  # bags are of what lies below the head
    checkpoint.save(tmp_path / "other.pth", saved)
    train(tmp_path / "b", *end, "--pretrain_path", str(tmp_path / "other.pth"))
    assert "CAUTION" not in capsys.readouterr().out
    shutil.copy(corr / "knn.npy", tmp_path / "release.npy")  # a file of the release's has no .json
    train(tmp_path / "c", *end, "--corr_npy", str(tmp_path / "release.npy"))
    said = capsys.readouterr().out
    assert "order of the images and teacher not checked" in said and "CAUTION" not in said


def test_the_printed_evaluation_runs(train, data, tmp_path, capsys):
    teacher = "--arch resnet10 --width 4 --stem cifar --batch_size 8 --moco_k 32 --end_epoch 1 --output-dir".split()
    main_teacher.main([*DATA, "--data_dir", str(data), *teacher, str(tmp_path / "teacher")])
    train(tmp_path / "student", "--end_epoch", "1")
    said = capsys.readouterr().out
    module, *flags = shlex.split(re.findall("if it is to teach: python -m (.*)", said)[0])
    assert module == "bingo.compute_knn" and compute_knn.main([*flags, "--workers", "0", "--threads", "1"]) == 0
    assert (tmp_path / "teacher/bags.npy").is_file()
    commands = re.findall("evaluate: python -m (.*)", said)
    for command, name in zip(commands, ("teacher", "student"), strict=True):
        module, *flags = shlex.split(command)
        assert module == "bingo.main_knn" and flags[-2:] == ["--per_class", "5"]
        assert main_knn.main([*flags, "--output-dir", str(tmp_path / "knn"), "--workers", "0", "--threads", "1"]) == 0
        result = json.loads((tmp_path / "knn/result.json").read_text())
        assert 0 <= result["knn"] <= 100 and result["pretrained"] == str(tmp_path / name / "checkpoint.pth")


def test_one_share_of_batch_statistics_is_cautioned_against(train, data, tmp_path, capsys):
    end, says = ["--end_epoch", "1"], "CAUTION, batch norm: --teacher_bn train in one share"
    for flags, told in (("", False), ("--teacher_bn train", True), ("--teacher_bn train --bn_splits 2", False)):
        train(tmp_path / str(len(flags)), *end, *flags.split())
        assert (says in capsys.readouterr().out) is told
    moco = [*DATA, "--data_dir", str(data), *"--arch resnet10 --width 4 --stem cifar --batch_size 8".split()]
    for splits in (1, 2):
        out = tmp_path / f"moco{splits}"
        main_teacher.main(
            [*moco, *"--moco_k 32 --end_epoch 1 --bn_splits".split(), str(splits), "--output-dir", str(out)]
        )
        assert ("CAUTION, batch norm: one batch norm over" in capsys.readouterr().out) is (splits == 1)


def test_the_preflight_counts_tensors_and_measures_the_teacher(train, data, teacher, tmp_path, capsys):
    """Two classes of five images: 5-NN purity of the pooled features of the file's q encoder, by brute force."""
    train(tmp_path, "--end_epoch", "1", "--check_teacher", "50")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  teacher: "))
    found = re.search(r"5-NN purity ([\d.]+) % on 10 images of 2 classes, chance ([\d.]+) %", line)
    assert found, line
    saved = checkpoint.load(teacher / "checkpoint.pth")["state_dict"]
    own = {k.removeprefix("module.encoder_q."): v for k, v in saved.items() if k.startswith("module.encoder_q.")}
    assert f"loaded {len(own)} tensors, dropped 0, left new 0" in line
    net = build("resnet10", 8, "cifar")
    net.load_state_dict({k: v for k, v in own.items() if not k.startswith("fc.")})
    folders = sorted((data / "train").iterdir())
    files = [file for folder in (folders[0], folders[5]) for file in sorted(folder.iterdir())[:5]]
    with torch.no_grad():
        x = net.eval()(torch.stack([plain(16)(load_image(file)) for file in files]), pre_out=True)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2).fill_diagonal_(-2)
    same = cosine.topk(5, dim=1).indices // 5 == torch.arange(10)[:, None] // 5
    assert float(found[1]) == pytest.approx(100 * float(same.double().mean()), abs=0.06)
    assert float(found[2]) == pytest.approx(100 * 4 / 9, abs=0.06)


# --- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_two_splits(train, data, tmp_path, python):
    """Two processes are --bn_splits 2 on one: batch norms, the teacher's shuffled batch, CutMix boxes."""
    flags = ["--teacher_bn", "train", "--init_lr", "0.002"]
    train(tmp_path / "one", *flags, "--bn_splits", "2")
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "bingo.main_moco", *train.flags, *flags, "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("one", "two"))
    assert torch.equal(one["module.queue_ptr"], two["module.queue_ptr"])
    torch.testing.assert_close(one["module.queue"], two["module.queue"], rtol=0, atol=2e-4)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
    for name, value in one.items():
        if name.startswith("module.encoder_q") and "running" not in name:
            torch.testing.assert_close(value, two[name], rtol=0, atol=2e-3)


def test_bags_of_two_processes_are_those_of_one(data, teacher, tmp_path, python):
    """Of 49 images the second process has a row less."""
    images = tmp_path / "images"
    for folder in sorted((data / "train").iterdir()):
        (images / "train" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[: 4 if not list(images.glob("train/*/*")) else 5]:
            shutil.copy(file, images / "train" / folder.name)
    flags = [
        "--arch",
        "resnet10",
        "--t_width",
        "8",
        "--t_stem",
        "cifar",
        "--ckpt_name",
        str(teacher / "checkpoint.pth"),
    ]
    flags += ["--corr_dir", str(tmp_path), "--corr_name", "k.npy", "--feature_file", str(tmp_path / "f.npy")]
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "bingo.compute_knn", *DATA, "--data_dir", str(images), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one = ["--corr_name", "one.npy", "--feature_file", str(tmp_path / "one-f.npy")]
    assert compute_knn.main([*DATA, "--data_dir", str(images), *flags, *one]) == 0
    assert np.load(tmp_path / "k.npy").shape == (49, 5)
    assert np.array_equal(np.load(tmp_path / "k.npy"), np.load(tmp_path / "one.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), np.load(tmp_path / "one-f.npy"), atol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_dir {tmp}/nowhere", r"nowhere/train: no such folder; expected"),
        ("--pretrain_path {tmp}/none.pth", r"none.pth: no such checkpoint file"),
        ("--pretrain_alg swav", r"looks like a moco checkpoint, expected swav"),
        ("--t_width 16", r"taken as moco resnet10 \(width 16, stem cifar\): .*mis-shaped"),
        ("--corr_npy {tmp}/none.npy", r"none.npy: no such correlation file; make it with bingo/run_knn.sh"),
        ("--per_class 4", r"expected integers \[40, K\] for these images"),
        ("--clus_pos_num 6", r"5 neighbours an image, --clus_pos_num asks for 6"),
        ("--moco_k 30", r"--moco_k 30 is no multiple of --batch_size 8; try --moco_k 32"),
        ("--batch_size 6 --bn_splits 4", r"--batch_size 6 does not divide over 1 processes x 4 --bn_splits"),
        ("--bn_splits 8", r"leaves fewer than 2 images for a batch norm"),
        (
            "--batch_size 64 --moco_k 64",
            r"^--batch_size 64: a step takes 64 images, the data has 50; give --batch_size 32 or",
        ),
        ("--moco_dim 64", r"--moco_dim 64: the embedding of this teacher has 16 dimensions"),
        ("--lam 0.5", r"--lam \[0.5\]: two weights"),
        ("--moco_t 0", r"--moco_t, --init_lr and --alpha must be above 0"),
        ("--init_lr 0", r"--moco_t, --init_lr and --alpha must be above 0"),
        ("--end_epoch -1", r"--end_epoch -1: must not be negative"),
        ("--img_size 0", r"--img_size 0: must be at least 1"),
        ("--hidden 0", r"--hidden 0: must be at least 1"),
        ("--s_width 0", r"--s_width 0: must be at least 1"),
        ("--per_class -1", r"--per_class -1: must not be negative"),
        ("--warmup_epochs -1", r"--warmup_epochs -1: must not be negative"),
    ],
)
def test_bad_flags_are_one_line(flags, message, train, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--img_size 0", r"--img_size 0: must be at least 1"),
        ("--width 0", r"--width 0: must be at least 1"),
        ("--per_class -1", r"--per_class -1: must not be negative"),
        ("--init_lr 0", r"--moco_t and --init_lr must be above 0"),
        ("--moco_m 1.5", r"--moco_m in 0..1"),
    ],
)
def test_bad_flags_of_the_teacher_are_one_line(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message):
        main_teacher.main([*DATA, "--data_dir", str(data), "--output-dir", str(tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()


def test_an_empty_class_and_a_broken_file_are_named(train, data, teacher, tmp_path):
    images = tmp_path / "data"
    for folder in sorted((data / "train").iterdir()):
        (images / "train" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:5]:
            shutil.copy(file, images / "train" / folder.name)
    plain_flags = [flag for flag in DATA if flag != "--cache"]
    network = ["--arch", "resnet10", "--t_width", "8", "--t_stem", "cifar", "--ckpt_name"]
    bags = [*network, str(teacher / "checkpoint.pth"), "--corr_dir", str(tmp_path / "corr")]
    moco = "--arch resnet10 --width 4 --stem cifar --batch_size 8 --moco_k 32 --end_epoch 2".split()

    def refused(match: str) -> None:
        where = ["--data_dir", str(images)]
        for call in (
            lambda: train(tmp_path / "out", *where, "--loss", "intra", "--check_teacher", "0"),
            lambda: compute_knn.main([*plain_flags, *where, *bags]),  # met on the way, not while it is cached
            lambda: main_teacher.main([*plain_flags, *where, *moco, "--output-dir", str(tmp_path / "out2")]),
        ):
            with pytest.raises(UserError, match=match) as error:
                call()
            assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("corr/*"))

    (images / "train/zebra").mkdir()
    refused("zebra: no image")
    (images / "train/zebra").rmdir()
    broken = sorted((images / "train").rglob("*.*"))[7]
    broken.write_bytes(broken.read_bytes()[:60])
    refused(f"^{broken}: not a readable image")


def test_defaults_are_the_releases():
    for module, expected in (
        (main_moco, {
            "moco_k": 65536, "moco_t": 0.2, "aug_plus": "true", "decay_method": "cos", "init_lr": 0.03, "momentum": 0.9,
            "wd": 1e-4, "batch_size": 256, "end_epoch": 200, "schedule": [120, 160], "lr_decay": 0.1, "lam": [0.5, 0.5],
            "clus_pos_num": 5, "s_arch": "resnet18", "t_arch": "resnet50", "pretrain_alg": "moco", "warmup_epochs": 11,
            "loss": "release", "mix": "cutmix", "alpha": 2.0, "hidden": 2048, "img_size": 224,
            "corr_npy": Path("imgs_corr/imgs_corr_epoch800_MoCo.npy"),
            "pretrain_path": Path("moco_v2_800ep_pretrain.pth.tar"),
        }),
        (compute_knn, {
            "arch": "resnet50", "batch_size": 32, "clus_pos_num": 5, "bags": "knn", "corr_dir": Path("imgs_corr"),
            "corr_name": Path("imgs_corr_moco_epoch800.npy"), "img_size": 224,
        }),
        (main_teacher, {
            "arch": "resnet50", "moco_dim": 128, "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.2, "init_lr": 0.03,
            "wd": 1e-4, "momentum": 0.9, "batch_size": 256, "end_epoch": 200, "decay_method": "cos",
        }),
    ):  # fmt: skip
        args = vars(module.get_parser().parse_args([]))
        assert {name: args[name] for name in expected} == expected


def test_diverged_run_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    monkeypatch.setattr("bingo.main_moco.learning_rate", lambda args, epoch: 0.05 if epoch < 1 else float("inf"))
    with pytest.raises(Diverged, match="the loss is nan"):
        train(tmp_path, "--save-every", "1")
    saved = flat(checkpoint.load(tmp_path / "checkpoint.pth")["state_dict"])
    assert all(bool(value.isfinite().all()) for key, value in saved.items() if "encoder_k" in key)


def test_command_line_prints_one_line_and_exits_with_2(tmp_path, python):
    command = [python, "-m", "bingo.main_moco", "--data_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_learning_rate_of_the_release():
    class Args:
        init_lr, end_epoch, decay_method, schedule, lr_decay = 0.03, 200, "cos", [120, 160], 0.1

    assert learning_rate(Args, 0) == 0.03 and learning_rate(Args, 100) == pytest.approx(0.015)  # type: ignore[arg-type]
    Args.decay_method = "step"
    assert [learning_rate(Args, e) for e in (119, 120, 160)] == pytest.approx([0.03, 0.003, 0.0003])  # type: ignore[arg-type]


# --- arms ------------------------------------------------------------------------------------------------------------


def test_a_run_counts_when_both_evaluations_are_there(tmp_path):
    folder = tmp_path / "bingo" / "seed0"
    folder.mkdir(parents=True)
    for job, result in (
        ("knn", {"knn": 30.0, "few_shot": 20.0, "purity": 25.0, "bag_gap": 0.5, "knn10": 0.0}),
        ("linear", {"linear_last": 40.0, "linear": 41.0}),
    ):
        assert arms.read(folder) is None
        file = folder.with_name(f"seed0-{job}") / "result.json"
        file.parent.mkdir()
        file.write_text(json.dumps(result))
    metrics = {"few_shot": 20.0, "knn": 30.0, "linear_last": 40.0, "purity": 25.0, "bag_gap": 0.5}
    assert arms.read(folder) == metrics
    assert "| BINGO, release's loss | 1 | 20.00 | 30.00 | 40.00 |" in arms.ARMS.table(arms.ARMS.measured(tmp_path))


def test_arms_of_equal_heads_are_held_against_each_other():
    """The table's last column, and the rows."""
    metrics = dict.fromkeys(arms.ARMS.metrics, 0.0)
    level = {"alone": 20.0, "bingo": 30.0, "alone_wide": 40.0, "bingo_wide": 30.0}
    found = {arm: {s: {"metrics": metrics | {"few_shot": x + s}} for s in (0, 1)} for arm, x in level.items()}
    rows = {line.split(" | ")[0]: line.split(" | ")[-1] for line in arms.ARMS.table(found).splitlines()}
    assert rows["| BINGO, release's loss"] == "+10.00 (10.00 to 10.00), p = 0 |"
    wide = "student alone (MoCo v2), BINGO's head, equal epochs"
    assert rows["| BINGO, release's loss, batch-norm shares of 32"] == (
        f"-10.00 (-10.00 to -10.00), p = 0 (against {wide}) |"
    )
    assert rows[f"| {wide}"] == "+20.00 (20.00 to 20.00), p = 0 |"
    assert set(arms.ARMS.against.items()) <= {*arms.ARMS.pairs, ("alone_wide_eq", "alone_wide")}
    assert ("bingo_narrow", "alone") in arms.ARMS.pairs


def test_the_students_head_may_be_bingos(data, tmp_path):
    """--hidden of the student alone; by default MoCo v2's, and a checkpoint keeps loading as a teacher."""
    from bingo.teachers import load_teacher

    flags = "--arch resnet10 --width 4 --stem cifar --batch_size 16 --moco_k 32 --end_epoch 1 --log-every 1".split()
    for name, hidden, more in (("moco", 32, []), ("bingo", 48, ["--hidden", "48"])):
        out = tmp_path / name
        assert main_teacher.main([*DATA, "--data_dir", str(data), *flags, *more, "--output-dir", str(out)]) == 0
        state = checkpoint.load(out / "checkpoint.pth")["state_dict"]
        assert state["module.encoder_q.fc.0.weight"].shape == (hidden, 32) and hidden * 128 == (
            state["module.encoder_k.fc.2.weight"].numel()
        )
        assert load_teacher("resnet10", out / "checkpoint.pth", "moco", 4, "cifar")[1] == 128
