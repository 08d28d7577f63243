"""Evaluation of sage: neighbours, linear, attributes and recovery, few labels, fine-grained sets, export."""

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from sage import main_attributes, main_finegrained, main_knn, main_lincls, main_semi
from sage.arch import build
from sage.builder import SaGe
from sage.data import attribute_labels, plain
from sage.finegrained import READERS
from sage.finetune import Classifier, learning_rate
from sage.lab import export
from sage.lab.finegrained_mini import write_mini
from shared_utils import UserError, checkpoint
from shared_utils.data import ImageList, image_folder
from shared_utils.lab import mini
from shared_utils.run import Run

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--img_size 16 --workers 0 --threads 1".split()
SMALL_TRAIN = [*SMALL, *"--batch_size 16 --log-every 1".split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The mini images, fewer of them, with their attributes."""
    root, full = tmp_path_factory.mktemp("images"), mini.ensure("images")
    for split, count in (("train", 12), ("val", 6)):
        for folder in sorted((full / split).iterdir())[:5]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    for name in ("attributes.csv", mini.STAMP):
        shutil.copy(full / name, root)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A checkpoint as `sage.train` writes it."""
    torch.manual_seed(3)
    model = SaGe(build("resnet10", 8, "cifar_pool"), 16, 8).train()
    with torch.no_grad():
        for _ in range(30):
            model(*torch.randn(2, 16, 3, 16, 16))
        for value in model.target_net.parameters():
            value.add_(1)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth"
    flags = {"arch": "resnet10", "width": 8, "stem": "cifar_pool", "img_size": 16, "evaluator_norm": "half"}
    checkpoint.save(path, {"state_dict": model.state_dict(), "args": flags})
    return path


def network(weights: Path):
    """The online backbone of the checkpoint, in eval mode."""
    net = build("resnet10", 8, "cifar_pool")
    checkpoint.load_strict(net, checkpoint.read_weights(weights, "byol"))
    return net.eval()


def call(module, data: Path, weights: object, out: Path, *extra: str) -> dict:
    common = SMALL_TRAIN if hasattr(module, "Run") or module in (main_semi, main_finegrained) else SMALL
    flags = [*common, "--data_dir", str(data), "--pretrained", str(weights), "--output-dir", str(out), *extra]
    assert module.main(flags) == 0
    return json.loads((out / "result.json").read_text())


def stacked(images: ImageList) -> torch.Tensor:
    return torch.stack([images[i][0] for i in range(len(images))])


def stop_at(step: int, monkeypatch, folder: str = "") -> None:
    log = Run.log

    def patched(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step and folder in str(self.dir):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", patched)


def pooled(weights: Path, images: ImageList) -> torch.Tensor:
    with torch.no_grad():
        return network(weights)(stacked(images))[-1].mean((2, 3))


# ------------------------------------------------------------------------------------------------- neighbours, linear
def test_neighbours_of_the_online_backbone(data, weights, tmp_path):
    found = call(main_knn, data, weights, tmp_path, "--feature_dir", str(tmp_path / "features"))
    train, val = (image_folder(data / split, plain(16)) for split in ("train", "val"))
    bank, queries = (F.normalize(pooled(weights, x), dim=1) for x in (train, val))
    s = queries @ bank.T
    for k in (1, 20):
        sim, index = s.topk(k, dim=1)
        votes = torch.zeros(len(val), 5).scatter_add_(1, train.labels[index], (sim / 0.07).exp())
        assert found[f"knn{k}"] == pytest.approx(100 * float((votes.argmax(1) == val.labels).double().mean()))
    assert {"knn200", "backbone_sha256"} <= set(found) and (tmp_path / "features/train.npy").is_file()
    assert call(main_knn, data, "none", tmp_path / "b", *"--arch resnet10 --width 4 --stem cifar".split())["knn1"] >= 0


def test_linear_protocol_of_the_release():
    args = main_lincls.get_parser().parse_args(["--pretrained", "x"])
    assert (args.lr, args.total_epochs, args.batch_size, args.weight_decay, args.momentum) == (0.2, 80, 256, 0, 0.9)
    assert [main_lincls.learning_rate(args, e) for e in (0, 40)] == pytest.approx([0.2, 0.1])
    args = main_lincls.get_parser().parse_args("--pretrained x --lr 30 --lr_policy step --total_epochs 100".split())
    assert [main_lincls.learning_rate(args, e) for e in (0, 59, 60, 80)] == pytest.approx([30, 30, 3, 0.3])


def test_the_last_smaller_batch_is_kept_or_left_out(data, weights, tmp_path):
    images = len([x for x in (data / "train").rglob("*") if x.is_file()])
    assert images % 16
    for name, extra, steps in (("kept", [], images // 16 + 1), ("dropped", ["--drop_last"], images // 16)):
        call(
            main_lincls,
            data,
            weights,
            tmp_path / name,
            "--total_epochs",
            "1",
            "--batch_size",
            "16",
            "--cached_train",
            *extra,
        )
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == steps


@pytest.mark.parametrize("cached", [["--cached_train"], []])
def test_linear_stopped_and_resumed_is_bit_identical(cached, data, weights, tmp_path, monkeypatch):
    flags = ["--total_epochs", "3", "--lr", "1", *cached]
    whole = call(main_lincls, data, weights, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(SystemExit):
            call(main_lincls, data, weights, tmp_path / "cut", *flags)
    assert call(main_lincls, data, weights, tmp_path / "cut", *flags) == whole
    a, b = (checkpoint.load(tmp_path / x / "checkpoint.pth")["state_dict"] for x in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    val = image_folder(data / "val", plain(16))
    right = (pooled(weights, val) @ a["weight"].T + a["bias"]).argmax(1) == val.labels
    assert whole["linear"] == pytest.approx(100 * float(right.double().mean()))


# ------------------------------------------------------------------------------------------------ attributes, recovery
def test_attributes_are_those_of_the_images(data):
    train = image_folder(data / "train")
    labels = attribute_labels(data, train)
    assert list(labels) == ["class", "hue", "texture", "background"]
    assert torch.equal(labels["class"][0], train.labels)
    assert [len(values) for _, values in labels.values()] == [10, 8, 4, 6]
    listed = dict(line.split(",", 1) for line in (data / "attributes.csv").read_text().splitlines())
    for i in (0, 17, 40):
        path = train.path(i).relative_to(data).as_posix()
        got = [values[int(y[i])] for y, values in labels.values()]
        assert ",".join(got) == listed[path]


def test_bad_attribute_files(data, tmp_path):
    train = image_folder(data / "train")
    with pytest.raises(UserError, match="attributes.csv: no such file"):
        attribute_labels(tmp_path, train)
    shutil.copytree(data, tmp_path / "copy")
    copy = image_folder(tmp_path / "copy/train")
    lines = (data / "attributes.csv").read_text().splitlines()
    file = tmp_path / "copy/attributes.csv"
    first, rest = lines[1].split(",", 1)
    file.write_bytes(b" \r\n".join(line.encode() for line in [lines[0], f"./{first},{rest}", *lines[2:], *lines[2:4]]))
    expected, found = attribute_labels(data, train), attribute_labels(tmp_path / "copy", copy)
    assert all(torch.equal(found[k][0], expected[k][0]) and found[k][1] == expected[k][1] for k in expected)
    file.write_text("\n".join([*lines, f"{first},other,{rest.split(',', 1)[1]}"]))
    with pytest.raises(UserError, match=rf"line {len(lines) + 1}: {first} has other values than in a line above"):
        attribute_labels(tmp_path / "copy", copy)
    file.write_text("\n".join(lines[:1] + lines[2:]))
    with pytest.raises(UserError, match="does not name .*must have a row for every image"):
        attribute_labels(tmp_path / "copy", copy)
    file.write_text("path\n")
    with pytest.raises(UserError, match="at least one attribute"):
        attribute_labels(tmp_path / "copy", copy)


def test_attribute_files_that_other_programs_wrote(data, tmp_path):
    """Windows' paths and line ends, a byte-order mark, blanks, quotes: the same labels; gaps and contradictions not."""
    shutil.copytree(data, tmp_path / "copy")
    root = tmp_path / "copy"
    images, file = image_folder(root / "train"), root / "attributes.csv"
    wanted, lines = attribute_labels(root, images), file.read_text().splitlines()
    for text in (
        "\ufeff" + "\r\n".join(line.replace("/", "\\") for line in lines) + "\r\n",
        "\n".join([lines[0].replace(",", ", "), *(f"./{line} " for line in lines[1:]), "", ",,,,"]),
        "\n".join([*lines, lines[1]]),  # a line twice says nothing new
        "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in lines),
    ):
        file.write_bytes(text.encode())
        found = attribute_labels(root, images)
        assert all(torch.equal(found[k][0], y) and found[k][1] == values for k, (y, values) in wanted.items())
    cells = lines[1].split(",")
    for line, message in (
        (",".join([*cells[:-1], ""]), "line 2: needs a value for each of path, class, hue"),
        (",".join(cells[:-1]), "line 2: needs a value"),
        (lines[1] + ",x", "line 2: needs a value"),
        ("\n".join([lines[1], ",".join([*cells[:-1], "other"])]), "line 3: .* has other values than in a line above"),
    ):
        file.write_text("\n".join([lines[0], line, *lines[2:]]))
        with pytest.raises(UserError, match=message):
            attribute_labels(root, images)


def test_linear_accuracy_is_that_of_the_minimum():
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    train = torch.randn(300, 5) + F.one_hot(y, 3).float() @ torch.randn(3, 5) * 4
    assert main_attributes.linear_accuracy(train, y, train, y, 1e-3) > 90
    # scale and shift of a feature play no part, and another start would end the same
    moved = train * torch.tensor([1, 10, 0.1, 1, 1]) + 3
    first = main_attributes.linear_accuracy(train, y, train[::2], y[::2], 1e-2)
    assert main_attributes.linear_accuracy(moved, y, moved[::2], y[::2], 1e-2) == pytest.approx(first, abs=1)
    from sklearn.linear_model import LogisticRegression

    standard = (train - train.mean(0)) / train.std(0)
    other = LogisticRegression(C=1 / (300 * 1e-2), max_iter=1000).fit(standard.numpy(), y.numpy())
    assert first == pytest.approx(100 * other.score(standard[::2].numpy(), y[::2].numpy()), abs=1)


def test_attribute_evaluation(data, weights, tmp_path):
    found = call(main_attributes, data, weights, tmp_path, "--recon_updates", "40", "--recon_lr", "0.003")
    for kind in ("knn20", "linear"):
        parts = [found[f"{kind}_{name}"] for name in ("class", "hue", "texture", "background")]
        assert found[f"{kind}_mean"] == pytest.approx(sum(parts) / 4)
    train, val = (image_folder(data / split, plain(16)) for split in ("train", "val"))
    x, y = stacked(train), stacked(val)
    assert found["recon_mean_image"] == pytest.approx(float((y - x.mean(0)).square().mean()), rel=1e-3)
    assert 0 < found["recon"] < 2 * found["recon_mean_image"]
    again = call(main_attributes, data, weights, tmp_path / "b", "--recon_updates", "40", "--recon_lr", "0.003")
    assert again["recon"] == found["recon"]
    only = call(main_attributes, data, weights, tmp_path / "c", "--no_attributes", "--recon_updates", "2")
    assert set(only) & {"linear_mean", "knn20_hue"} == set() and only["recon"] > found["recon"]


# ------------------------------------------------------------------------------------- few labels, fine-grained sets
def test_grid_of_the_semi_supervised_protocol(data, weights, tmp_path):
    args = main_semi.get_parser().parse_args(["--pretrained", "x"])
    assert (args.lr, args.head_lr_mult) == ([0.001, 0.01, 0.1], [1, 10, 100])
    assert (args.batch_size, args.weight_decay, args.total_epochs, args.momentum) == (256, 5e-4, 20, 0.9)
    assert [learning_rate(args, 1.0, step, 10) for step in (0, 119, 120, 160)] == pytest.approx([1, 1, 0.2, 0.04])
    flags = "--fraction 0.34 --total_epochs 3 --lr 0.001,0.05 --head_lr_mult 10".split()
    found = call(main_semi, data, weights, tmp_path, *flags)
    assert found["labelled"] == 20 and found["of"] == 60 and len(found["cells"]) == 2
    assert found["top1"] == max(cell["top1"] for cell in found["cells"]) == found["best"]["top1"]
    net = Classifier(build("resnet10", 8, "cifar_pool"), 5)
    val = image_folder(data / "val", plain(16))
    for cell in found["cells"]:
        saved = checkpoint.load(tmp_path / f"lr{cell['lr']:g}-head10" / "checkpoint.pth")["state_dict"]
        checkpoint.load_strict(net, saved)
        with torch.no_grad():
            right = net.eval()(stacked(val)).argmax(1) == val.labels
        assert cell["top1"] == pytest.approx(100 * float(right.double().mean()))
    assert not torch.equal(saved["backbone.conv1.weight"], network(weights).conv1.weight)  # all of it is trained


def test_a_grid_stopped_and_resumed_is_bit_identical(data, weights, tmp_path, monkeypatch):
    flags = "--fraction 0.34 --total_epochs 3 --lr 0.001,0.05 --head_lr_mult 1".split()
    whole = call(main_semi, data, weights, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(1, patch, "lr0.05")
        with pytest.raises(SystemExit):
            call(main_semi, data, weights, tmp_path / "cut", *flags)
    assert not (tmp_path / "cut/result.json").exists()
    assert call(main_semi, data, weights, tmp_path / "cut", *flags) == whole


@pytest.mark.parametrize("kind", list(READERS))
def test_layouts_of_the_fine_grained_sets(kind, data, tmp_path):
    write_mini(kind, data, tmp_path)
    train, val = READERS[kind](tmp_path)
    source = {split: image_folder(data / split) for split in ("train", "val")}
    for found, wanted in ((train, source["train"]), (val, source["val"])):
        assert len(found) == len(wanted) and len(found.classes) == 5
        named = [sorted(zip((p.name for p in part.paths()), part.labels.tolist())) for part in (found, wanted)]
        assert named[0] == named[1]
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg"))
    write_mini(kind, data, tmp_path)
    assert before == sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg"))
    missing = train.path(3)
    missing.unlink()
    with pytest.raises(UserError, match=f"{missing.name}: no such image, but .* names it"):
        READERS[kind](tmp_path)
    with pytest.raises(UserError, match="no such file; expected one of the layouts"):
        READERS[kind](tmp_path / "nowhere")


def test_wrong_labels_of_the_fine_grained_sets(data, tmp_path):
    write_mini("cub", data, tmp_path)
    labels = tmp_path / "CUB_200_2011/image_class_labels.txt"
    text = labels.read_text()
    labels.write_text(text.replace("1 1\n", "1 9\n", 1))
    with pytest.raises(UserError, match="images.txt: a label 9 for 5 classes"):
        READERS["cub"](tmp_path)
    labels.write_text(text.split("\n", 1)[1])
    with pytest.raises(UserError, match="image 1 has no label or no split"):
        READERS["cub"](tmp_path)
    write_mini("aircraft", data, tmp_path)
    variants = tmp_path / "fgvc-aircraft-2013b/data/variants.txt"
    variants.write_text(variants.read_text().replace("digit_0\n", ""))
    with pytest.raises(UserError, match="digit_0 is not among the variants"):
        READERS["aircraft"](tmp_path)


def test_fine_grained_lists_that_other_programs_wrote(data, tmp_path):
    write_mini("cub", data, tmp_path)
    root = tmp_path / "CUB_200_2011"
    wanted = [list(zip(part.paths(), part.labels.tolist())) for part in READERS["cub"](tmp_path)]
    (root / ".DS_Store").write_bytes(b"x")
    (root / "images/.ipynb_checkpoints").mkdir()
    for file in root.glob("*.txt"):
        file.write_bytes(("\ufeff" + file.read_text().replace("\n", " \r\n") + "\r\n").encode())
    assert [list(zip(part.paths(), part.labels.tolist())) for part in READERS["cub"](tmp_path)] == wanted
    moved = wanted[0][0][0].rename(wanted[0][0][0].with_name("a b.jpg"))  # a blank in a name
    images = root / "images.txt"
    images.write_text(images.read_text().replace(wanted[0][0][0].name, "a b.jpg", 1))
    assert READERS["cub"](tmp_path)[0].path(0) == moved
    splits, labels = root / "train_test_split.txt", root / "image_class_labels.txt"
    for file, old, new, message in (
        (splits, "1 1", "1 2", r"train_test_split.txt: image 1 has 2, expected 1 \(training\) or 0"),
        (labels, "2 1", "1 1", "image_class_labels.txt: number 1 is there twice"),
        (images, "2 ", "3 ", "images.txt: number 3 is there twice"),
        (images, images.read_text().splitlines()[1], "", "images.txt does not name image 2"),
        (images, images.read_text().splitlines()[1][2:], images.read_text().splitlines()[0].split(None, 1)[1].strip(),
         "listed twice, for training or for the test"),
    ):  # fmt: skip
        text = file.read_text()
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            READERS["cub"](tmp_path)
        file.write_text(text)
    write_mini("aircraft", data, tmp_path)
    folder = tmp_path / "fgvc-aircraft-2013b/data"
    (folder / "images_variant_test.txt").write_text((folder / "images_variant_trainval.txt").read_text())
    with pytest.raises(UserError, match="listed twice, for training or for the test"):
        READERS["aircraft"](tmp_path)


def test_fine_tuning_and_linear_of_a_fine_grained_set(data, weights, tmp_path):
    write_mini("aircraft", data, tmp_path)
    args = main_finegrained.get_parser().parse_args(["--pretrained", "x"])
    assert (args.lr, args.batch_size, args.weight_decay, args.total_epochs) == ([0.01], 64, 1e-4, 100)
    assert (args.dataset, args.lr_policy) == ("cub", "cosine")
    flags = ["--dataset", "aircraft", "--total_epochs", "1"]
    found = call(main_finegrained, tmp_path, weights, tmp_path / "a", *flags)
    assert found["dataset"] == "aircraft" and 0 <= found["top1"] <= found["top5"] <= 100
    assert call(main_lincls, tmp_path, weights, tmp_path / "b", *flags, "--cached_train")["linear_top5"] <= 100
    with pytest.raises(UserError, match="--dataset cifar10: choose from cub, cars, aircraft"):
        call(main_finegrained, tmp_path, weights, tmp_path / "c", "--dataset", "cifar10")


def test_lists_of_fine_grained_sets_that_were_damaged(data, tmp_path):
    write_mini("cub", data, tmp_path)
    file = tmp_path / "CUB_200_2011/classes.txt"
    lines = file.read_text().splitlines(keepends=True)
    wanted = READERS["cub"](tmp_path)[0].classes
    file.write_text("".join(lines[::-1]))  # the numbers say which is which
    assert READERS["cub"](tmp_path)[0].classes == wanted != wanted[::-1]
    file.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="classes.txt: does not number its classes from 1 to"):
        READERS["cub"](tmp_path)
    write_mini("aircraft", data, tmp_path / "a")
    file = tmp_path / "a/fgvc-aircraft-2013b/data/variants.txt"
    first = file.read_text().splitlines()[0]
    file.write_text(file.read_text() + f"{first}\n")
    with pytest.raises(UserError, match=f"variants.txt: {first} is there twice; restore it"):
        READERS["aircraft"](tmp_path / "a")


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (main_lincls, "--data_dir {tmp}/nowhere", "nowhere/train: no such folder"),
        (main_knn, "--pretrained {tmp}/none.pth", "none.pth: no such checkpoint"),
        (main_lincls, "--pretrained {tmp}/foreign.pth", "foreign.pth: does not say which mean and standard deviation"),
        (
            main_lincls,
            "--pretrained {tmp}/foreign.pth --normalise half",
            "foreign.pth, taken as resnet50, width 64.*missing",
        ),
        (main_semi, "--arch resnet18 --fraction 0.5", "taken as resnet18, width 8.*missing"),
        (main_lincls, "--total_epochs 0", "--total_epochs 0: must be at least 1"),
        (main_attributes, "--penalty -1", "--penalty -1: must not be negative"),
        (main_semi, "--lr 0 --fraction 0.5", "--lr and --head_lr_mult must be above 0"),
        (main_semi, "--fraction 0", "--fraction 0.0: must lie above 0"),
    ],
)
def test_bad_input(module, flags, message, data, weights, tmp_path):
    torch.save({"state_dict": {"patch_embed.proj.weight": torch.zeros(2)}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=message):
        call(module, data, weights, tmp_path / "out", *flags.format(tmp=tmp_path).split())
    assert not (tmp_path / "out").exists()


def test_command_line_error_is_one_line_and_exit_code_2(tmp_path, python):
    flags = ["--pretrained", str(tmp_path / "no.pth"), "--data_dir", "data/mini/images", "--device", "cpu", *SMALL]
    command = [python, "-m", "sage.main_semi", *flags, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path}/no.pth: no such checkpoint file; train it first (README, Run), or give another path"
    ]


# -------------------------------------------------------------------------------------------------------------- export
def test_export_for_detection_and_segmentation(tmp_path, capsys):
    model = SaGe(build("resnet50"), 16, 8)
    path = tmp_path / "w.pth"
    flags = {"arch": "resnet50", "width": 64, "stem": "imagenet", "evaluator_norm": "half"}
    checkpoint.save(path, {"state_dict": model.state_dict(), "args": flags})
    source = model.online_net[0].state_dict()
    for kind in ("torchvision", "detectron2", "release"):
        assert export.main(["--pretrained", str(path), "--format", kind, "--out", str(tmp_path / f"{kind}.pth")]) == 0
    said = capsys.readouterr().out
    assert "MODEL.RESNETS.DEPTH 50" in said and "MODEL.PIXEL_MEAN [127.5,127.5,127.5]" in said and "RGB" in said
    state = checkpoint.load(tmp_path / "torchvision.pth")
    assert state.keys() == source.keys() and all(torch.equal(state[k], source[k]) for k in source)
    net = torchvision.models.resnet50()
    net.load_state_dict(state | {k: v for k, v in net.state_dict().items() if k.startswith("fc.")})
    d2 = checkpoint.load(tmp_path / "detectron2.pth")
    assert d2["matching_heuristics"] is True and len(d2["model"]) == len(source)
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.bias": "bn1.bias",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res4.5.conv3.norm.running_var": "layer3.5.bn3.running_var",
    }
    assert all(torch.equal(d2["model"][a], source[b]) for a, b in pairs.items())
    named = checkpoint.load(tmp_path / "release.pth")["state_dict"]
    assert all(torch.equal(named[f"backbone.{k}"], v) for k, v in source.items())
    assert set(model.state_dict()) <= set(named)


def test_export_refuses_what_is_not_there(weights, tmp_path):
    with pytest.raises(UserError, match="detectron2 has no resnet10 of width 8"):
        export.main(["--pretrained", str(weights), "--format", "detectron2", "--out", str(tmp_path / "a.pth")])
    checkpoint.save(tmp_path / "plain.pth", network(weights).state_dict())
    with pytest.raises(UserError, match="--format release takes a checkpoint of sage.train"):
        export.main(
            ["--pretrained", str(tmp_path / "plain.pth"), "--format", "release", "--out", str(tmp_path / "a.pth")]
        )
    with pytest.raises(UserError, match="must end in .pth"):
        export.main(["--pretrained", str(weights), "--out", str(tmp_path / "a.pkl")])
    assert not list(tmp_path.glob("a.*"))


def test_average_pooling_is_what_the_evaluations_take(weights):
    net, x = network(weights), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net.pooled(x), nn.AdaptiveAvgPool2d(1)(net(x)[-1]).flatten(1))
    assert math.isclose(float(net.pooled(x).detach().std()), float(net(x)[-1].detach().mean((2, 3)).std()))
