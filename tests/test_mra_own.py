"""A user's own files: plain folders, few labels, predictions, augmented files, given weights, the printed commands."""

import csv
import json
import os
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from mra import (
    augment,
    data,
    eval_occlusion,
    main_fewshot,
    main_fixmatch,
    main_pretrain,
    main_supervised,
    models_mae,
    nets,
    predict,
    transforms,
    visualize,
)
from mra.models_mae import MAE, Size
from mra.mra import MRA
from shared_utils import UserError, checkpoint
from shared_utils.data import flat_folder, image_folder

ROOT = Path(__file__).resolve().parents[1]
RUN = "--workers 0 --threads 1 --log-every 1".split()
HERE = "--workers 0 --threads 1".split()
PRE = (
    "--model mae_tiny_patch8 --enc_dim 16 --enc_depth 2 --enc_heads 2 --dec_dim 8 --dec_heads 2 --input_size 32".split()
)
PRE += "--batch_size 8 --epochs 1 --warmup_epochs 0 --lr 0.003".split()
NET = "--arch resnet8 --width 4 --lr 0.05".split()
SIZE = 32
CLASSES = ["a cat", "dog", "ibex"]


def photos(root: Path, classes: list[str], count: int, seed: int = 0) -> Path:
    """Files with blanks in their names, upright and lying, of several kinds; class y is reddish, greenish or bluish."""
    rng = np.random.default_rng(seed)
    for y, name in enumerate(classes):
        for i in range(count):
            width, height = [(40, 30), (30, 50), (32, 32), (97, 64)][i % 4]
            pixels = rng.integers(0, 120, (height, width, 3)) + 100 * np.eye(3, dtype=np.int64)[y % 3]
            file = root / name / f"{name[-1]} {i:02d}{['.jpg', '.png', '.JPEG', '.webp', '.bmp'][i % 5]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
        (root / name / "phone.heic").write_bytes(b"not read")
    return root


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def table(file: Path) -> list[list[str]]:
    with open(file, newline="") as handle:
        return list(csv.reader(handle))


def told(said: str, kind: str) -> list[str]:
    """The words after the module's name of the command that a run has printed as `kind:`."""
    line = next(line.strip() for line in said.splitlines() if line.strip().startswith(f"{kind}: python -m "))
    return shlex.split(line.removeprefix(f"{kind}: python -m "))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("my own") / "photo's", CLASSES, 10)


@pytest.fixture(scope="module")
def mae(own: Path) -> Path:
    """A run's folder, of the images that `--holdout 0.2` leaves."""
    run = own.parent / "runs/the mae"
    main_pretrain.main([*RUN, *PRE, "--data_dir", str(own), "--holdout", "0.2", "--output-dir", str(run)])
    return run


def supervised(own: Path, run: Path, *flags: str) -> int:
    return main_supervised.main([*RUN, *NET, "--batch_size", "8", "--epochs", "2", "--data_dir", str(own),
                                 "--output-dir", str(run), *flags])  # fmt: skip


def test_a_plain_folder_without_labels(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What the run prints runs as it stands, with this run's checkpoint, data and size."""
    flat = tmp_path / "no labels"
    for i, file in enumerate(flat_folder(own).paths()):
        target = flat / ("deeper/still" if i % 3 else "") / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (flat / "x.heic").write_bytes(b"")
    run = tmp_path / "a run"
    assert main_pretrain.main([*RUN, *PRE, "--data_dir", str(flat), "--output-dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"data: {flat}: 30 images, labels unread" in said and "not read: 1 .heic" in said and "class" not in said
    module, *words = told(said, "look at it")
    assert module == "mra.visualize"
    assert (
        visualize.main([*words, "--threads", "1", "--count", "4", "--zoom", "1", "--out", str(tmp_path / "a.png")]) == 0
    )
    assert Image.open(tmp_path / "a.png").size == (4 * (SIZE + 2) + 2, 5 * (SIZE + 2) + 2)
    module, *words = told(said, "next")
    assert module == "mra.augment" and augment.main([*words, *HERE, "--out", str(tmp_path / "made")]) == 0
    assert {p.relative_to(tmp_path / "made") for p in flat_folder(tmp_path / "made").paths()} == {
        p.relative_to(flat) for p in flat_folder(flat).paths()
    }
    for words, message in (
        (["--holdout", "0.2"], "lie in no class folders"),
        (["--batch_size", "64"], "--batch_size 64 x --accum_iter 1 x 1 processes: a step takes 64 images, the"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            main_pretrain.main([*RUN, *PRE, "--data_dir", str(flat), "--output-dir", str(tmp_path / "no"), *words])


def test_what_is_held_out_is_seen_by_nobody() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    rows, held = data.held_out(labels, 0.2)
    assert sorted(rows + held) == list(range(14)) and labels[held].tolist() == [0, 0, 1]
    assert data.held_out(labels, 0.2) == (rows, held)
    for share in (1.0, -0.1):
        with pytest.raises(UserError, match="--holdout .*: must lie between 0 and 1"):
            data.held_out(labels, share)


def test_class_folders_of_one_s_own(own: Path, mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "sup run"
    supervised(own, run, "--holdout", "0.2", "--mae_ckpt", str(mae))
    said = capsys.readouterr().out
    assert f"24 training images of 3 classes ({', '.join(CLASSES)}), 8 to 8 each; tests holdout 6" in said
    assert f"trained on {own}, 0.2 of each class held out" in said and "not read: 3 .heic" in said
    assert checkpoint.load(run / "checkpoint.pth")["args"]["input_size"] == SIZE  # the autoencoder's
    values = {"data_path": own, "dataset": "folder", "holdout": 0.2, "cache": False}
    seen = data.open_unlabelled(main_pretrain.get_parser().parse_args([f"--{k}={v}" for k, v in values.items() if v]))
    args = main_supervised.get_parser().parse_args(["--data_dir", str(own), "--holdout", "0.2"])
    train, tests = data.open_sets(args)
    assert seen.paths() == train.paths() and not set(seen.paths()) & set(tests["holdout"].paths())
    # predictions of all: those of the held out ones give the accuracy that was measured
    module, *words = told(said, "next")
    assert module == "mra.predict" and words[:3] == [str(own), "--pretrained", str(run / "checkpoint.pth")]
    capsys.readouterr()
    assert predict.main([*words, *HERE, "--out", str(tmp_path / "all.csv")]) == 0
    assert f"30 images of {SIZE} pixels; not read: 3 .heic" in capsys.readouterr().out
    header, *lines = table(tmp_path / "all.csv")
    assert header == ["file", "class", "confidence"] and len(lines) == 30
    assert [line[0] for line in lines] == [p.relative_to(own).as_posix() for p in flat_folder(own).paths()]
    assert all(1 / 3 <= float(line[2]) <= 1 for line in lines)
    found = {line[0]: line[1] for line in lines}
    right = [found[p.relative_to(own).as_posix()] == p.parent.name for p in tests["holdout"].paths()]
    assert 100 * np.mean(right) == pytest.approx(result(run)["top1"])
    # by hand, in other batches, from the folder of the run
    network, flags = nets.load_run(run, torch.device("cpu"))
    assert flags["classes"] == CLASSES
    with torch.no_grad():
        x = transforms.test_transform(SIZE)(Image.open(own / lines[0][0]).convert("RGB"))
        p = network(x[None]).softmax(1)[0]
    assert lines[0][1:] == [CLASSES[int(p.argmax())], f"{float(p.max()):.4f}"]
    module, *words = told(said, "occlusion")
    assert module == "mra.eval_occlusion" and eval_occlusion.main([*words, "--threads", "1"]) == 0
    assert result(run / "eval/occlusion")["images"] == 6


def test_no_test_images_and_a_folder_of_them(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    supervised(own, tmp_path / "a", "--input_size", "16", "--epochs", "1")
    said = capsys.readouterr().out
    assert "tests none: give --val_dir, or --holdout 0.2" in said and "occlusion" not in said
    assert result(tmp_path / "a")["test"] is None and "top1" not in result(tmp_path / "a")
    with pytest.raises(UserError, match="its run had no test images; give --val_dir"):
        eval_occlusion.main(["--checkpoint", str(tmp_path / "a")])
    val = photos(tmp_path / "other photos", CLASSES, 3, seed=1)
    assert eval_occlusion.main(["--checkpoint", str(tmp_path / "a"), "--val_dir", str(val), "--threads", "1"]) == 0
    assert result(tmp_path / "a/eval/occlusion")["images"] == 9
    supervised(own, tmp_path / "b", "--input_size", "16", "--epochs", "1", "--val_dir", str(val), "--holdout", "0.2")
    said = capsys.readouterr().out
    assert "30 training images" in said and "tests other photos 9" in said and result(tmp_path / "b")["top1"] >= 0
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (9, 9)).save(flat / "x.png")
    for folder, message in ((flat, "images without labels; a classifier needs a folder for each class"),
                            (val.parent / "one", "one class folder, a cat; a classifier needs two")):  # fmt: skip
        photos(tmp_path / "one", CLASSES[:1], 2)
        with pytest.raises(UserError, match=message):
            supervised(folder, tmp_path / "c", "--input_size", "16")
    supervised(
        own, tmp_path / "c", "--input_size", "16", "--batch_size", "64"
    )  # fewer images than a batch: all of them
    assert checkpoint.load(tmp_path / "c/checkpoint.pth")["progress"]["step"] == 2


def test_checkpoints_without_class_names(own: Path, tmp_path: Path) -> None:
    supervised(own, tmp_path / "a", "--input_size", "16", "--epochs", "1")
    saved = checkpoint.load(tmp_path / "a/checkpoint.pth")
    del saved["info"]
    checkpoint.save(tmp_path / "old.pth", saved)
    words = [str(own / "dog"), "--pretrained", str(tmp_path / "old.pth"), *HERE, "--out", str(tmp_path / "p.csv")]
    predict.main(words)
    numbers = [line[1] for line in table(tmp_path / "p.csv")[1:]]
    assert len(numbers) == 10 and set(numbers) <= {"0", "1", "2"}
    (tmp_path / "names.txt").write_text("Felis catus\nCanis, lupus\n\nCapra ibex\n")
    predict.main([*words, "--classes", str(tmp_path / "names.txt")])
    names = ["Felis catus", "Canis, lupus", "Capra ibex"]
    assert [line[1] for line in table(tmp_path / "p.csv")[1:]] == [names[int(y)] for y in numbers]
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"names.txt: 2 names, the checkpoint has 3 classes"):
        predict.main([*words, "--classes", str(tmp_path / "names.txt")])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        predict.main([str(tmp_path / "nowhere"), "--pretrained", str(tmp_path / "a"), *HERE])
    checkpoint.save(tmp_path / "mae.pth", {"model": saved["state_dict"], "args": {}, "progress": {}})
    with pytest.raises(UserError, match="not a checkpoint of mra.main_supervised, main_fixmatch or main_fewshot"):
        predict.main([str(own), "--pretrained", str(tmp_path / "mae.pth"), *HERE])


def test_fixmatch_on_labelled_and_unlabelled_folders(
    own: Path, mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labelled = photos(tmp_path / "my data/40 labels", CLASSES, 4, seed=2)
    crowd = photos(tmp_path / "my data/without labels", ["holiday 1", "x"], 12, seed=3)
    flags = [*RUN, *NET, *"--batch_size 4 --mu 2 --iterations 4 --epoch_steps 2 --ema 0.5 --threshold 0.3".split()]
    flags += ["--labelled", str(labelled), "--unlabelled", str(crowd)]
    run = tmp_path / "fix match"
    assert main_fixmatch.main([*flags, "--mae_ckpt", str(mae), "--output-dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"12 labelled images of 3 classes ({', '.join(CLASSES)}), 24 unlabelled; test none" in said
    assert result(run)["test"] is None and "top1" not in result(run)
    module, *words = told(said, "next")
    assert module == "mra.predict" and words[0] == str(crowd)
    assert predict.main([*words, *HERE, "--out", str(tmp_path / "p.csv")]) == 0
    lines = table(tmp_path / "p.csv")[1:]
    network = nets.build("resnet8", 3, 4).eval()
    checkpoint.load_strict(network, checkpoint.load(run / "checkpoint.pth")["ema"]["shadow"])  # the averaged weights
    images = flat_folder(crowd)
    images.transform = transforms.test_transform(SIZE)
    with torch.no_grad():
        p = network(torch.stack([images[i][0] for i in range(24)])).softmax(1)
    assert [line[1] for line in lines] == [CLASSES[y] for y in p.argmax(1)]
    assert [float(line[2]) for line in lines] == pytest.approx(p.max(1).values.tolist(), abs=2e-4)
    # beside the labelled folder there is a val: it is tested; one of its files is among the unlabelled ones
    val = photos(labelled.parent / "val", CLASSES, 3, seed=4)
    (crowd / "x/again.png").symlink_to(val / "dog/g 01.png")
    assert main_fixmatch.main([*flags, "--input_size", "16", "--output-dir", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "25 unlabelled; test val 9; caution: 1 test images are among the unlabelled ones" in said
    assert result(tmp_path / "b")["test"] == "val" and 0 <= result(tmp_path / "b")["top1_median20"] <= 100
    for words, message in (
        (["--labelled", str(labelled)], "--labelled and --unlabelled go together"),
        ([*flags[-4:], "--dataset", "cifar10"], "leave --dataset and --train_list away"),
        (["--labelled", str(crowd / "nowhere"), "--unlabelled", str(crowd)], "nowhere/train: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            main_fixmatch.main([*flags[:-4], *words, "--output-dir", str(tmp_path / "c")])


def test_few_shot_on_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [f"kind {c}" for c in "abcdefgh"]
    root = photos(tmp_path / "kinds", names, 6)
    parts = data.read_fewshot(root, 2, 0)
    assert [len(parts[split].classes) for split in ("train", "test")] == [6, 2] and "val" not in parts
    assert sorted(parts["train"].classes + parts["test"].classes) == names
    for images in parts.values():
        assert [images.classes[y] for y in images.labels] == [path.parent.name for path in images.paths()]
    assert len({tuple(data.read_fewshot(root, 2, seed)["test"].classes) for seed in range(9)}) > 3
    flags = [*RUN, *NET, *"--batch_size 8 --epochs 1 --decay cos --n_query 1 --episodes 20 --input_size 16".split()]
    flags += ["--data_dir", str(root), "--output-dir", str(tmp_path / "run")]
    assert main_fewshot.main([*flags, "--n_way", "2"]) == 0
    said = capsys.readouterr().out
    assert (
        "36 training images of 6 classes" in said and "test 2 classes" in said and "val" not in result(tmp_path / "run")
    )
    assert 0 <= result(tmp_path / "run")["5shot"] <= 100
    with pytest.raises(UserError, match="--n_way 7: 8 classes are too few for 7 novel ones and two to train on"):
        main_fewshot.main([*flags, "--n_way", "7"])


# --- augmented files --------------------------------------------------------------------------------------------------


def test_augmented_files(own: Path, mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Names and classes stay, any size in, the autoencoder's out; the same whatever the batches and processes."""
    flags = [str(own), "--mae_ckpt", str(mae), "--threads", "1", "--attn_source", "last_attn"]
    assert augment.main([*flags, "--count", "3", "--workers", "0", "--out", str(tmp_path / "a")]) == 0
    assert f"90 images of {SIZE} pixels -> {tmp_path / 'a'}" in capsys.readouterr().out
    made = image_folder(tmp_path / "a")
    assert made.classes == CLASSES and len(made) == 90
    assert {made.image(i).size for i in range(90)} == {(SIZE, SIZE)}
    names = [p.relative_to(own) for p in flat_folder(own).paths()]
    expected = {n.with_name(f"{n.stem}_{v}{n.suffix}") for n in names for v in (1, 2, 3)}
    assert {p.relative_to(tmp_path / "a") for p in made.paths()} == expected
    one, two = (np.asarray(Image.open(tmp_path / "a" / f"dog/g 01_{v}.png")) for v in (1, 2))
    assert not np.array_equal(one, two)
    again = [*flags, "--count", "3", "--workers", "1", "--batch_size", "7", "--out", str(tmp_path / "b")]
    assert augment.main(again) == 0
    other = np.asarray(Image.open(tmp_path / "b/dog/g 01_1.png")).astype(int)
    assert np.abs(other - one).max() <= 1  # batches of another size round otherwise


def test_what_an_augmented_file_holds(own: Path, mae: Path, tmp_path: Path) -> None:
    flags = [str(own / "dog"), "--mae_ckpt", str(mae), *HERE, "--crop", "none"]
    augment.main([*flags, "--out", str(tmp_path / "a")])
    file = own / "dog/g 01.png"
    got = np.asarray(Image.open(tmp_path / "a" / file.name)).astype(int)
    crop = transforms.fit(SIZE)(Image.open(file))
    loaded = models_mae.load(mae, None)
    assert loaded.mae.img_size == SIZE
    x = transforms.tensor()(crop)[None]
    parts = MRA(loaded.mae).parts(x, torch.zeros(1, 16))
    kept = np.kron(parts.mask[0].view(4, 4).numpy() == 0, np.ones((8, 8))) > 0
    assert kept.sum() == 9 * 64  # int(16 * 0.6) patches, to the bit
    assert np.array_equal(got[kept], np.asarray(crop).astype(int)[kept])
    assert np.abs(got[~kept] - np.asarray(crop)[~kept]).mean() > 3
    augment.main([str(own), *flags[1:], "--holdout", "0.2", "--out", str(tmp_path / "held")])
    args = main_supervised.get_parser().parse_args(["--data_dir", str(own), "--holdout", "0.2"])
    left = [p.relative_to(own) for p in data.open_sets(args).train.paths()]
    assert [p.relative_to(tmp_path / "held") for p in flat_folder(tmp_path / "held").paths()] == left
    augment.main([*flags, "--out", str(tmp_path / "b"), "--input_size", "64"])
    assert Image.open(tmp_path / "b" / file.name).size == (64, 64)
    for words, message in (
        (["--out", str(own / "dog/new")], "new: lies in .*dog, so images would be read again"),
        (["--count", "2", "--out", str(tmp_path / "c")], "--count 2: without crop and random mask all are equal"),
        (["--out", "/dev/null/x"], "/dev/null/x/.*: cannot be written"),
        (["--min_scale", "0"], "--min_scale 0.0: must lie above 0"),
        (["--input_size", "30", "--out", str(tmp_path / "c")], "30 pixels do not divide into patches of 8"),
    ):
        with pytest.raises(UserError, match=message):
            augment.main([*flags, *words])
    with pytest.raises(UserError, match="--mae_ckpt is missing"):
        augment.main([str(own)])


# --- weights to start from --------------------------------------------------------------------------------------------


def test_a_classifier_starts_from_given_weights(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = torchvision.models.resnet18()
    checkpoint.save(tmp_path / "resnet18.pth", public.state_dict())
    timms = timm.create_model("resnet18", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: timms)
    network = nets.build("resnet18", 3)
    new = network.fc.weight.clone()
    for weights, source in ((str(tmp_path / "resnet18.pth"), public), ("timm:resnet18", timms)):
        assert nets.start(network, weights).startswith(f"{weights}: loaded 120 tensors")
        assert torch.equal(network.conv1.weight, source.state_dict()["conv1.weight"]) and torch.equal(
            network.fc.weight, new
        )
    supervised(own, tmp_path / "a", "--input_size", "16", "--epochs", "1")
    body = checkpoint.load(tmp_path / "a/checkpoint.pth")["state_dict"]
    capsys.readouterr()
    for flag, spec in (("--init", tmp_path / "a"), ("--pretrained", tmp_path / "a/checkpoint.pth")):
        run = tmp_path / flag
        supervised(own, run, "--input_size", "16", "--epochs", "1", "--lr", "1e-12", flag, str(spec))
        assert f"{spec}: loaded 54 tensors, dropped 2, left new 0" in capsys.readouterr().out
        after = checkpoint.load(run / "checkpoint.pth")["state_dict"]
        torch.testing.assert_close(after["body.0.weight"], body["body.0.weight"], rtol=0, atol=1e-6)
        assert not torch.allclose(after["fc.weight"], body["fc.weight"])  # the linear layer is new
    supervised(own, tmp_path / "--pretrained", "--input_size", "16", "--epochs", "1", "--lr", "1e-12", "--pretrained",
               str(tmp_path / "a/checkpoint.pth"))  # fmt: skip
    assert "complete: 4 steps were done before" in capsys.readouterr().out
    with pytest.raises(UserError, match="--init .*resnet18.pth: .*--arch and its like must name the network"):
        supervised(own, tmp_path / "b", "--input_size", "16", "--init", str(tmp_path / "resnet18.pth"))


def test_an_autoencoder_starts_from_given_weights(
    own: Path, mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release's keys, encoder alone or with decoder, of another grid; timm's; a run's folder."""
    size = Size(8, (16, 2, 2), (8, 1, 2))
    torch.manual_seed(1)
    source, network = MAE(64, size), MAE(SIZE, size)
    encoder = {k: v for k, v in source.state_dict().items() if "decoder" not in k and k != "mask_token"}
    files = {"full.pth": {"model": source.state_dict()}, "encoder.pth": {"model": encoder, "epoch": 3}}
    for name, content in files.items():
        checkpoint.save(tmp_path / name, content)
        fresh = {key: value.clone() for key, value in network.state_dict().items()}
        report = models_mae.start(network, str(tmp_path / name))
        assert ("the decoder" in report) == (name == "encoder.pth") and "CC BY-NC" in report
        for key, value in network.state_dict().items():
            kept = "pos_embed" in key or (name == "encoder.pth" and key not in encoder)
            assert torch.equal(value, fresh[key] if kept else source.state_dict()[key]), key
    vit = timm.models.vision_transformer.VisionTransformer(64, 8, num_classes=0, embed_dim=16, depth=2, num_heads=2)
    vit.pos_embed.data = models_mae.sincos_positions(16, 8)[None]  # as in the public files
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: vit)
    other = MAE(SIZE, size)
    assert "timm:vit.mae: loaded 30 tensors, dropped 0, left new 20, the decoder" in models_mae.start(
        other, "timm:vit.mae"
    )
    assert torch.equal(other.state_dict()["blocks.1.mlp.fc2.weight"], vit.state_dict()["blocks.1.mlp.fc2.weight"])
    vit.pos_embed.data = torch.randn(1, 65, 16)
    with pytest.raises(UserError, match="--init timm:x: pos_embed is not the fixed sin-cos table of 8 x 8"):
        models_mae.start(other, "timm:x")
    checkpoint.save(tmp_path / "r18.pth", torchvision.models.resnet18().state_dict())
    with pytest.raises(UserError, match="r18.pth: no pos_embed, so no vision transformer"):
        models_mae.start(other, str(tmp_path / "r18.pth"))
    with pytest.raises(UserError, match="encoder.pth: the weights do not fit MAE: .*; --model and its like must name"):
        models_mae.start(MAE(SIZE, Size(8, (24, 2, 2), (8, 1, 2))), str(tmp_path / "encoder.pth"))
    words = [
        *RUN,
        *PRE,
        "--data_dir",
        str(own),
        "--output-dir",
        str(tmp_path / "run"),
        "--init",
        str(mae),
        "--lr",
        "1e-12",
    ]
    assert main_pretrain.main(words) == 0
    assert f"start: {mae}: loaded" in capsys.readouterr().out
    before, after = (checkpoint.load(run / "checkpoint.pth")["model"] for run in (mae, tmp_path / "run"))
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6)


# --- the arms ---------------------------------------------------------------------------------------------------------


def test_the_arms_of_one_s_own_photographs(own: Path, tmp_path: Path) -> None:
    """SET=mine: what the cards start runs on class folders without a test split, autoencoder, arms and occlusion."""
    fake, calls = tmp_path / "python", tmp_path / "calls"
    fake.write_text('#!/bin/sh\nprintf \'%s\\037\' "$@" >>"$CALLS"; printf \'\\036\' >>"$CALLS"\n')
    fake.chmod(0o755)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").symlink_to(own)
    env = {**os.environ, "SKIP_ENV": "1", "PYTHON": str(fake), "SET": "mine", "RUNS": str(tmp_path / "runs")}
    env |= {"DATA_ROOT": str(tmp_path / "data"), "ARMS": "base mra", "CALLS": str(calls)}
    subprocess.run(["bash", str(ROOT / "mra/run_arms.sh"), "small"], env=env, capture_output=True, check=True)
    modules = {"mra.main_pretrain": main_pretrain, "mra.main_supervised": main_supervised,
               "mra.eval_occlusion": eval_occlusion}  # fmt: skip
    short = {"mra.main_pretrain": ["--epochs", "1", "--batch_size", "8"], "mra.eval_occlusion": [],
             "mra.main_supervised": ["--epochs", "1", "--width", "4", "--batch_size", "8"]}  # fmt: skip
    started = [call.split("\037")[1:-1] for call in calls.read_text().split("\036")[:-1]]
    runs = list(dict.fromkeys(tuple(words) for words in started if words[0] in modules))
    assert [words[0] for words in runs].count("mra.main_supervised") == 2
    for module, *words in sorted(runs, key=lambda words: list(modules).index(words[0])):
        assert modules[module].main([*words, *short[module]]) == 0
    for arm in ("base", "mra"):
        folder = tmp_path / "runs/mra/arms/small/mine" / arm
        assert result(folder / "seed0")["test"] == "holdout" and "kept_random" not in result(folder / "seed0-test")
        assert set(result(folder / "seed0-test")["curves"]) == {"random", "salient", "nonsalient"}
