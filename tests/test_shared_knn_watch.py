"""--knn_every: the test in the middle of a training is that of the evaluation, and leaves the training alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import bingo.main_knn
import bingo.main_teacher
import hsa.main_knn
import hsa.main_moco
import kscl.main_knn
import kscl.main_kscl
import sage.main_knn
import sage.train
from shared_utils import UserError
from tests.checkpoints import differing

SMALL = "--arch resnet10 --width 4 --stem cifar_pool --img_size 16 --workers 0 --threads 1 --device cpu --log-every 1"
MOCO = f"{SMALL} --moco_dim 16 --moco_k 48 --bn_splits 2 --batch_size 16 --end_epoch 3 --init_lr 0.03"
SCRIPTS = {
    "hsa": (hsa.main_moco.main, hsa.main_knn.main, f"{MOCO} --mode moco --mix none", "knn"),
    "bingo": (bingo.main_teacher.main, bingo.main_knn.main, MOCO, "knn"),
    "kscl": (kscl.main_kscl.main, kscl.main_knn.main, f"{MOCO} --shots 2", "knn"),
    "sage": (sage.train.main, sage.main_knn.main, f"{SMALL} --mode byol --imgs_per_gpu 16 --total_epochs 3", "knn20"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of 60 images, without a test set."""
    root = tmp_path_factory.mktemp("my photos")
    rng = np.random.default_rng(0)
    for label in range(4):
        (root / f"class {label}").mkdir()
        for i in range(15):
            pixels = (40 * label + rng.integers(0, 90, (20 + i, 24, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class {label}" / f"no. {i}.png")
    return root


@pytest.mark.parametrize("name", SCRIPTS)
def test_tests_are_the_evaluations_and_change_nothing(name, photos, tmp_path, capsys):
    train, evaluate, words, key = SCRIPTS[name]
    flags = [*words.split(), "--data_dir", str(photos)]
    torch.manual_seed(0)
    assert train([*flags, "--output-dir", str(tmp_path / "with"), "--knn_every", "2"]) == 0
    said = capsys.readouterr().out
    assert train([*flags, "--output-dir", str(tmp_path / "without")]) == 0
    assert differing(tmp_path / "with", tmp_path / "without") == []
    assert [f"epoch {e}: knn/top1" in said for e in (1, 2, 3)] == [False, True, True]
    assert "knn/top1" not in capsys.readouterr().out

    told = json.loads((tmp_path / "with/end.json").read_text())["tests"]["knn/top1"]
    given = ["--pretrained", str(tmp_path / "with/checkpoint.pth"), "--data_dir", str(photos), "--workers", "0"]
    assert evaluate([*given, "--threads", "1", "--device", "cpu", "--output-dir", str(tmp_path / "knn")]) == 0
    if name == "sage":  # -1..1, which the others' scripts do not know
        with pytest.raises(
            UserError, match="input normalised otherwise .half. than this script does; take the scripts of"
        ):
            hsa.main_knn.main([*given, "--threads", "1", "--device", "cpu", "--output-dir", str(tmp_path / "wrong")])
    assert told == pytest.approx(json.loads((tmp_path / "knn/result.json").read_text())[key], abs=1e-9)


def test_images_without_labels_are_refused_before_training(photos, tmp_path):
    (tmp_path / "loose").mkdir()
    for file in list(photos.rglob("*.*"))[:40]:
        (tmp_path / "loose" / f"{file.parent.name} {file.name}").write_bytes(file.read_bytes())
    train, _, flags, _ = SCRIPTS["hsa"]
    with pytest.raises(UserError, match="--knn_every 1: the images have no labels"):
        train(
            [
                *flags.split(),
                "--data_dir",
                str(tmp_path / "loose"),
                "--output-dir",
                str(tmp_path / "o"),
                "--knn_every",
                "1",
            ]
        )
    assert not (tmp_path / "o/log.jsonl").exists()
