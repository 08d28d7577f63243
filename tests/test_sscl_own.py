"""sscl on a user's own folders: few labelled images, many without, predictions as CSV, given weights to start from."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils import UserError, checkpoint
from shared_utils.augment import plain
from shared_utils.data import load_image
from shared_utils.run import Run
from sscl import eval_cls, eval_features, finetune, predict, watch
from sscl.arch import Encoder, build
from sscl.calibration import Alignment
from sscl.data import own_folders
from sscl.lab import export
from sscl.main import main
from sscl.model import SsCL
from sscl.weights import initialise
from tests.checkpoints import differing
from tests.sscl_images import SMALL, rows

KINDS = ["Eule ü", "a cat", "dog"]
SIZES = [(40, 20), (20, 40), (24, 24), (17, 33)]
ENDINGS = [".jpg", ".png", ".JPEG", ".webp", ".jfif", ".bmp"]
FLAGS = [word for word in SMALL if word != "--cache"]
at = FLAGS.index("--labels_per_class")
del FLAGS[at : at + 2]
LOADING = ["--workers", "0", "--threads", "1"]


def photo(path: Path, kind: int, number: int) -> None:
    """Noise of a tint of its own a kind; landscape and portrait, grey and with transparency among them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([kind, number])
    width, height = SIZES[number % 4]
    image = Image.fromarray((rng.integers(0, 90, (height, width, 3)) + 80 * np.eye(3)[kind]).astype(np.uint8))
    if path.suffix == ".png":
        image = image.convert("RGBA" if number % 2 else "L")
    image.save(path, "JPEG" if path.suffix == ".jfif" else None)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """12 labelled photographs, 24 without labels in folders of any depth, 6 for a test, and what lies between."""
    root = tmp_path_factory.mktemp("own") / "my photos"
    for kind, name in enumerate(KINDS):
        for i in range(14):
            folder = root / f"labelled/{name}" if i < 4 else root / f"test/{name}" if i >= 12 else root / "all of it"
            deep = folder / "2024/summer" if 6 <= i < 9 else folder
            photo(deep / f"photo {kind} {i}{ENDINGS[i % 6]}", kind, i)
    for name in ("all of it/phone.heic", "all of it/2024/IMG.HEIC", "all of it/notes.txt", "labelled/dog/.DS_Store"):
        (root / name).write_text("x")
    return root


def folders(own: Path) -> list[str]:
    return ["--labelled", str(own / "labelled"), "--unlabelled", str(own / "all of it")]


def train(out: Path, *flags: str) -> list[dict]:
    assert main([*FLAGS, "--output-dir", str(out), *flags]) == 0
    return rows(out)


@pytest.fixture(scope="module")
def run(own, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "my run"
    train(out, *folders(own), "--epochs", "3", "--save-every", "2")
    return out


def table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_few_labelled_and_many_unlabelled_images(own, tmp_path, capsys):
    """The preflight tells what there is; no number that needs a label nobody has; the hint predicts, as it stands."""
    out = tmp_path / "my run"
    log = train(out, *folders(own), "--moco_k", "64", "--theta", "0.34")
    said = capsys.readouterr().out
    assert f"{own}/labelled: 12 images of 3 classes, all with labels; {own}/all of it: 24 more without\n" in said
    assert "not read: 2 .heic, 1 .txt between the images" in said
    assert "caution: --moco_k 64 is more than the 36 images" in said and "start: scratch" in said
    assert len(log) == 2 * (36 // 8) and log[-1]["loss/x"] > 0 and log[-1]["pl/coverage"] > 0
    assert not [name for name in log[-1] if "acc" in name or "purity" in name]
    index = checkpoint.load(out / "checkpoint.pth")["state_dict"]["queue_index"]
    assert set(index.tolist()) - {-1} <= set(range(36))
    (command,) = re.findall("next: python -m sscl.predict (.*)", said)
    assert predict.main([*shlex.split(command), *LOADING]) == 0
    found = table(out / "predictions.csv")
    files = sorted(p for p in (own / "all of it").rglob("*") if p.suffix.lower() in ENDINGS + [".jpeg"])
    assert [row["file"] for row in found] == [path.relative_to(own / "all of it").as_posix() for path in files] and len(
        found
    ) == 24
    assert {row["class"] for row in found} <= set(KINDS)
    encoder = Encoder(build("resnet10", 4, "cifar_pool"), 3, 8)
    state = checkpoint.read_weights(out / "checkpoint.pth")
    encoder.load_state_dict(state)
    for row in (found[0], found[-1]):
        with torch.no_grad():
            p = encoder.eval().logits(plain(16)(load_image(own / "all of it" / row["file"]))[None]).softmax(1)[0]
        assert KINDS[int(p.argmax())] == row["class"] and float(row["confidence"]) == pytest.approx(
            float(p.max()), abs=1e-4
        )


def test_the_unlabelled_folder_may_hold_the_labelled_images(own, tmp_path):
    """Each counts once: by its own name, or as the target of a link."""
    known, rest = own_folders(own / "labelled", own)
    assert (len(known), len(rest)) == (12, 30) and rest.unread[".heic"] == 2
    assert not {str(path) for path in rest.paths()} & {str(path) for path in known.paths()}
    for kind, name in enumerate(KINDS[:2]):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / name / "link.jpg").symlink_to(own / f"labelled/{name}/photo {kind} 0.jpg")
    assert [len(images) for images in own_folders(tmp_path / "few", own / "labelled")] == [2, 10]


def test_killed_and_resumed_on_own_folders_is_bit_identical(own, run, tmp_path, monkeypatch):
    """Inside the pass over all images that renews the prototypes: not even that is waited for."""
    flags = [*folders(own), "--epochs", "3", "--save-every", "2"]
    embed, passes = Encoder.embed, []

    def stopping(encoder, x):
        passes.append(encoder.training)
        if passes.count(False) == 7:  # 2 of the estimate, 2 of labelled images at epoch 0, the third of 5 at epoch 1
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(encoder, x)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "embed", stopping)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, *flags)
    assert stopped.value.code == 143
    assert checkpoint.load(tmp_path / "checkpoint.pth")["progress"]["step_in_epoch"] == 0
    train(tmp_path, *flags)
    assert differing(run, tmp_path) == []


def test_a_resume_on_other_images_is_refused(own, run, tmp_path):
    shutil.copytree(own, tmp_path / "photos")
    shutil.copytree(run, tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run/checkpoint.pth")
    saved["args"] |= {name: str(tmp_path / "photos" / at) for name, at in
                      (("labelled", "labelled"), ("unlabelled", "all of it"))}  # fmt: skip
    checkpoint.save(tmp_path / "run/checkpoint.pth", saved)
    flags = [*folders(tmp_path / "photos"), "--epochs", "3", "--save-every", "2"]
    train(tmp_path / "run", *flags)  # a copy is the same
    moved = "photo 0 0.jpg"
    (tmp_path / "photos/labelled" / KINDS[0] / moved).rename(tmp_path / "photos/labelled/dog" / moved)
    with pytest.raises(UserError, match="saved on other data"):
        train(tmp_path / "run", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--labelled {own}/labelled", "--labelled and --unlabelled go together"),
        ("{both} --labels_per_class 2", "--labelled names the labelled images, all of them: leave --labels_per_class"),
        ("{both} --data {own}", "leave --data out"),
        ("--labelled {own}/nowhere --unlabelled {own}", "nowhere: no such folder"),
        ("--labelled {own}/labelled --unlabelled {own}/labelled", "holds no image that is not among the labelled ones"),
        ("--labelled {own}/labelled/dog --unlabelled {own}", "a file where class folders are"),
        ("--labelled {own}/one --unlabelled {own}", "one class folder, only; give two classes or more"),
        ("{both} --batch_labelled 20", "--batch_labelled 20 x --mu 2: a step takes 40 unlabelled images, there are 36"),
        ("{both} --moco_k 8", "--moco_k 8: a step enqueues 12 keys"),
        ("--data {own}/flat", "flat: images without class folders; give those without labels as --unlabelled"),
    ],
)
def test_bad_input_is_one_line(flags, message, own, tmp_path):
    link = tmp_path / "own"  # without a blank, for the words below
    link.mkdir()
    for path in own.iterdir():
        (link / path.name.replace(" ", "_")).symlink_to(path)
    photo(link / "one/only/a.jpg", 0, 0)
    photo(link / "flat/a.jpg", 0, 0)
    both = f"--labelled {link}/labelled --unlabelled {link}/all_of_it"
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path / "out", *flags.format(own=link, both=both).split())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_plain_folder_of_classes_and_one_without(own, tmp_path, capsys):
    """--data without train/ and val/: labels of a part are taken, or none (MoCo v2); the hints can be run."""
    train(tmp_path / "few", "--data_dir", str(own / "labelled"), "--labels_per_class", "2", "--epochs", "1")
    said = capsys.readouterr().out
    assert f"{own}/labelled: 12 images of 3 classes, 6 with labels" in said
    (command,) = re.findall("next: python -m sscl.predict (.*)", said)
    assert shlex.split(command)[2] == str(own / "labelled")
    moco = "--no_labels --lambda_u 0 --calib none --epochs 1".split()
    log = train(tmp_path / "moco", "--data_dir", str(own / "test"), "--batch_labelled", "2", "--bn_splits", "1", *moco)
    assert log[-1]["loss/c"] > 0 and log[-1]["loss/x"] == 0
    shutil.copytree(own / "all of it", tmp_path / "flat")
    photo(tmp_path / "flat/loose.jpg", 0, 0)
    train(tmp_path / "more", "--data_dir", str(tmp_path / "flat"), *moco)
    said = capsys.readouterr().out
    assert f"{tmp_path}/flat: 25 images of 0 classes, 0 with labels" in said
    command = re.findall("next: python -m sscl.lab.export (.*)", said)[-1]
    assert export.main(shlex.split(command)) == 0 and (tmp_path / "more/backbone.safetensors").is_file()
    with pytest.raises(UserError, match="trained without labels, so its class head has learnt nothing"):
        predict.main(["--pretrained", str(tmp_path / "more"), str(own)])


def test_names_of_classes(run, own, tmp_path, capsys):
    """Those of the checkpoint; of an older one numbers, or those of a file."""
    old = checkpoint.load(run / "checkpoint.pth")
    del old["state_dict"]["class_names"]
    checkpoint.save(tmp_path / "old.pth", old)
    (tmp_path / "names.txt").write_text("one\ntwo\n\nthree\n")
    expected = {name: set(names) for name, names in (("", KINDS), ("old", "012"), ("file", ["one", "two", "three"]))}
    found = {}
    for name, words in (
        ("", [str(run)]),
        ("old", [str(tmp_path / "old.pth")]),
        ("file", [str(tmp_path / "old.pth"), "--classes", str(tmp_path / "names.txt"), "--copy", "momentum"]),
    ):
        out = tmp_path / f"{name}.csv"
        assert predict.main([str(own / "test"), "--out", str(out), *LOADING, "--pretrained", *words]) == 0
        found[name] = table(out)
        assert {row["class"] for row in found[name]} <= expected[name] and len(found[name]) == 6
    assert [KINDS[int(row["class"])] for row in found["old"]] == [row["class"] for row in found[""]]
    assert "6 images of 16 pixels" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="2 names, the checkpoint has 3 classes"):
        predict.main(["--pretrained", str(run), "--classes", str(tmp_path / "names.txt"), str(own)])
    checkpoint.save(tmp_path / "other.pth", {"state_dict": {"conv1.weight": torch.zeros(1)}})
    with pytest.raises(UserError, match="holds no class head"):
        predict.main(["--pretrained", str(tmp_path / "other.pth"), str(own)])
    older = [*folders(own), "--epochs", "3", "--save-every", "2"]
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(tmp_path / "old.pth", tmp_path / "run/checkpoint.pth")
    train(tmp_path / "run", *older)  # it is resumed


def test_evaluation_on_held_out_images(run, own, tmp_path):
    words = ["--pretrained", str(run / "checkpoint.pth"), *LOADING, "--output-dir", str(tmp_path)]
    assert eval_cls.main([*words, "--val_dir", str(own / "test")]) == 0
    assert '"top1"' in (tmp_path / "result.json").read_text()
    assert eval_features.main([*words, "--val_dir", str(own / "test"), "--protocols", "knn,linear"]) == 0
    assert '"knn"' in (tmp_path / "result.json").read_text()
    with pytest.raises(UserError, match="--val_dir: name a folder of test images in class folders"):
        eval_cls.main(words)
    with pytest.raises(UserError, match="--pseudo: nobody has labelled"):
        eval_cls.main([*words, "--val_dir", str(own / "test"), "--pseudo"])
    photo(tmp_path / "test/a cat/a.jpg", 0, 0)
    with pytest.raises(UserError, match="its classes are not those of .*first difference: Eule"):
        eval_cls.main([*words, "--val_dir", str(tmp_path / "test")])


def test_fine_tuning_on_the_labelled_folder_alone(run, own, tmp_path, capsys):
    words = ["--pretrained", str(run), "--labelled", str(own / "labelled"), *LOADING, "--epochs", "2"]
    assert finetune.main([*words, "--val_dir", str(own / "test"), "--output-dir", str(tmp_path / "out")]) == 0
    known = len(own_folders(own / "labelled", own)[0])
    said = f"{own / 'labelled'}: {known} of {known} images labelled"
    assert said in capsys.readouterr().out and known > 5
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["labelled"] == known and 0 <= result["top1"] <= 100
    with pytest.raises(UserError, match="--val_dir: name a folder of test images in class folders"):
        finetune.main([*words, "--output-dir", str(tmp_path / "none")])
    with pytest.raises(UserError, match="--labelled names the labelled images, all of them: leave --fraction out"):
        finetune.main([*words, "--fraction", "0.5", "--output-dir", str(tmp_path / "none")])


def test_both_encoders_start_from_given_weights(run, own, tmp_path, monkeypatch, capsys):
    source = checkpoint.load(run / "checkpoint.pth")["state_dict"]
    seen: list[list[torch.Tensor]] = []
    batches = Run.batches

    def watched(self, *args):
        state = self._tracked["state_dict"].state_dict()
        seen.append([state[f"encoder_{k}.backbone.conv1.weight"].clone() for k in "qk"])
        return batches(self, *args)

    monkeypatch.setattr(Run, "batches", watched)
    train(tmp_path / "run", *folders(own), "--init", str(run), "--epochs", "1")
    assert f"start: {run}: loaded" in capsys.readouterr().out
    ((q, k),) = seen
    assert torch.equal(q, k) and torch.equal(q, source["encoder_q.backbone.conv1.weight"])


def test_weights_to_start_from(run, tmp_path, monkeypatch):
    """A run's g is taken where it has the same shape, else it is new; timm's network; another network is refused."""
    import timm

    same, other = (Encoder(build("resnet10", 4, "cifar_pool"), 5, dim) for dim in (8, 16))
    source = checkpoint.read_weights(run / "checkpoint.pth")
    assert "left new 2" in initialise(same, str(run)) and "left new 6" in initialise(other, str(run))
    assert torch.equal(same.state_dict()["proj.2.weight"], source["proj.2.weight"])
    wide = Encoder(build("resnet18"), 3, 8)
    asked = []

    def create(name: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        asked.append((name, pretrained))
        return made(name, pretrained=False, num_classes=num_classes)

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    assert initialise(wide, "timm:resnet18").startswith("timm:resnet18: loaded") and asked == [("resnet18", True)]
    with pytest.raises(UserError, match=r"--init .*my run: .* --arch, --width and --stem must be those of the file"):
        initialise(wide, str(run))


def test_a_run_that_has_learnt_nothing_says_so():
    torch.manual_seed(0)
    encoder = Encoder(build("resnet10", 4, "cifar_pool"), 3, 8)
    model = SsCL(encoder, Alignment(3), 32)
    args = predict.argparse.Namespace(theta=0.95, pl_start=5)
    assert watch.ending(args, model, True) == []  # an arm without keys
    model.queue_index[:20] = torch.arange(20)
    model.queue_conf[3] = True
    assert watch.ending(args, model, True) == []
    model.queue_labelled[3] = True  # a true label is no pseudo-label
    assert ["no pseudo-label passes --theta 0.95" in line for line in watch.ending(args, model, True)] == [True]
    assert watch.ending(args, model, False) == []
    model.queue[:, :20] = model.queue[:, :1] + 0.01 * torch.randn(8, 20)
    assert "the embeddings have collapsed" in watch.ending(args, model, False)[0]
