"""A user's own photos in flat: training on plain class folders, --init, and labels by a few photos a class."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

from flat import data, predict, save_features, test, train
from flat.backbone import build, torchvision_names
from flat.episodes import EpisodeDrawer
from flat.methods.baselinefinetune import fit
from shared_utils import UserError, checkpoint
from shared_utils.data import ImageList

SMALL = (
    "--dataset folder --image_size 16 --width 4 --batch_size 8 --aet none --workers 0 --threads 1 --log-every 1 "
    "--stop_epoch 1"
).split()
COLOURS = {"red fox": (190, 40, 30), "stone": (90, 90, 100), "sea": (30, 60, 190)}
SIZES = ((40, 24), (24, 40), (31, 31), (64, 20))  # landscape, portrait, ...
ENDINGS = (".jpg", ".png", ".JPEG", ".webp", ".bmp", ".tif", ".jfif")


def photo(path: Path, colour: tuple[int, ...], number: int) -> None:
    rng = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    pixels = np.array(colour) + rng.integers(-30, 60, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, format="JPEG" if path.suffix == ".jfif" else None)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7, 9 and 11 photos of three classes, names with blanks, sizes and endings mixed; two files that are no photos."""
    root = tmp_path_factory.mktemp("my photos")
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(7 + 2 * c):
            photo(root / name / f"my photo {i:02d}{ENDINGS[i % len(ENDINGS)]}", colour, 100 * c + i)
    (root / "sea/IMG_1.heic").write_bytes(b"x")
    (root / "stone/notes.txt").write_text("x")
    return root


@pytest.fixture(scope="module")
def run(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the folder itself, which has no splits."""
    out = tmp_path_factory.mktemp("a run") / "out"
    assert train.main([*SMALL, "--data_dir", str(own), "--output-dir", str(out)]) == 0
    return out


def label(run: Path, support: Path, query: Path, out: Path, *extra: str) -> list[dict[str, str]]:
    words = ["--pretrained", str(run), "--support", str(support), "--query", str(query), "--out", str(out), *extra]
    assert predict.main([*words, "--workers", "0", "--threads", "1"]) == 0
    with open(out, newline="") as handle:
        return list(csv.DictReader(handle))


def test_plain_class_folders_train_and_the_next_command_is_quoted(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"
    assert train.main([*SMALL, "--data_dir", str(own), "--output-dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "27 images of 3 base classes" in said and "not read: 1 .heic, 1 .txt" in said
    assert f"python -m flat.predict --pretrained '{out}/checkpoint.pth' --support" in said
    assert "flat.save_features" not in said  # there are no novel classes
    with pytest.raises(UserError, match="has no test/CLASS/.*--split base takes"):
        save_features.main(["--checkpoint", str(out / "checkpoint.pth"), "--workers", "0"])
    with pytest.raises(UserError, match="--select val: .* has no val/CLASS"):
        train.main([*SMALL, "--data_dir", str(own), "--output-dir", str(tmp_path / "b"), "--select", "val"])
    with pytest.raises(UserError, match="--batch_size 64: the data has 27 training images; give --batch_size 27"):
        train.main([*SMALL, "--data_dir", str(own), "--output-dir", str(tmp_path / "b"), "--batch_size", "64"])
    (tmp_path / "half/test/x").mkdir(parents=True)
    with pytest.raises(UserError, match="half/train: no such folder"):  # test is no class
        data.read_dataset("folder", tmp_path / "half")


@pytest.mark.parametrize("head", ["", "lr", "ridge", "proto_l2"])
def test_its_logits_are_those_of_the_evaluation_on_the_same_episode(
    head: str, own: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flat.test draws an episode from the features of flat.save_features; the same photos are laid out as folders."""
    words = ["--checkpoint", str(run / "checkpoint.pth"), "--split", "base", "--out", str(tmp_path / "features.pt")]
    assert save_features.main([*words, "--workers", "0", "--threads", "1"]) == 0
    saved = checkpoint.load(tmp_path / "features.pt")
    drawn = EpisodeDrawer(saved["labels"], 3, 2, 4, 0, saved["classes"]).draw(np.zeros(1, np.int64))
    files = data.as_list(data.read_dataset("folder", own)["base"]).paths()
    ways = [saved["classes"][c] for c in drawn.classes[0].tolist()]
    for w in range(3):
        for k, i in enumerate(drawn.support[0, w].tolist()):  # by name in the order drawn: SGD sees them by place
            (tmp_path / "support" / f"{w} {ways[w]}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "support" / f"{w} {ways[w]}" / f"{k} {files[i].name}").symlink_to(files[i])
        for i in drawn.query[0, w].tolist():
            (tmp_path / "query/new").mkdir(parents=True, exist_ok=True)
            (tmp_path / "query/new" / f"{w} {files[i].name}").symlink_to(files[i])
    seen: list[Tensor] = []

    def spied(*given: object) -> Tensor:
        seen.append(fit(*given))  # type: ignore[arg-type]
        return seen[-1]

    from flat.methods import baselinefinetune

    monkeypatch.setattr(baselinefinetune, "fit", spied)  # what flat.test calls
    drawer = EpisodeDrawer(saved["labels"], 3, 2, 4, 0, saved["classes"])
    evaluated = test.accuracies(saved["features"], drawer, head or "finetune_cosine", 1, torch.device("cpu"))
    classified: list[Tensor] = []
    classify = predict.classify

    def kept(*given: object) -> Tensor:
        classified.append(classify(*given))  # type: ignore[arg-type]
        return classified[-1]

    monkeypatch.setattr(predict, "classify", kept)
    extra = ["--eval_head", head] if head else []
    rows = label(run, tmp_path / "support", tmp_path / "query", tmp_path / "out.csv", *extra)
    names = [Path(row["file"]).name for row in rows]
    order = [names.index(f"{w} {files[i].name}") for w in range(3) for i in drawn.query[0, w].tolist()]
    torch.testing.assert_close(classified[0][order].double(), seen[0][0].double(), rtol=1e-4, atol=1e-5)
    told = [row["class"] == f"{n[0]} {ways[int(n[0])]}" for row, n in zip(rows, names)]
    assert np.mean(told) == pytest.approx(float(evaluated[0]))
    confidence = classified[0].softmax(1).amax(1)
    assert [float(row["confidence"]) for row in rows] == pytest.approx(confidence.tolist(), abs=1e-4)


def test_unequal_numbers_of_photos_and_what_it_prints(
    own: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = tmp_path / "to label"
    for i, colour in enumerate(COLOURS.values()):
        photo(query / "deep/er" / f"{i} x.png", colour, 900 + i)
    rows = label(run, own, query, tmp_path / "new/out.csv")
    said = capsys.readouterr().out
    assert "27 photos of 3 classes, 7 to 11 each, by finetune_cosine on features of Conv4 at 16 pixels" in said
    assert "not read: 1 .heic, 1 .txt in --support" in said
    assert [row["file"] for row in rows] == [f"deep/er/{i} x.png" for i in range(3)] and "went to" not in said
    # one folder is both: the first four of each class support, all others are queries, whose folders tell the truth
    rows = label(run, own, own, tmp_path / "out.csv", "--shots", "4", "--eval_head", "proto_l2")
    said = capsys.readouterr().out
    assert len(rows) == 27 - 12 and "12 photos of 3 classes, 4 each" in said
    right = sum(Path(row["file"]).parent.name == row["class"] for row in rows)
    assert f"{right} of the 15 photos in folders of these names went to the class of theirs" in said
    assert right > 10  # colours are easy
    one = label(run, own, query / "deep/er/0 x.png", tmp_path / "one.csv", "--shots", "2", "--aug_support", "2")
    assert [row["file"] for row in one] == ["0 x.png"] and 1 / 3 <= float(one[0]["confidence"]) <= 1


def test_bad_folders_are_one_line(own: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="holds the photos of --support and no others; --shots K"):
        label(run, own, own, tmp_path / "out.csv")
    photo(tmp_path / "one/only/a.png", (1, 2, 3), 0)
    with pytest.raises(UserError, match="one class folder, only; at least two"):
        label(run, tmp_path / "one", own, tmp_path / "out.csv")
    (tmp_path / "one/empty").mkdir()
    with pytest.raises(UserError, match="empty: no image"):
        label(run, tmp_path / "one", own, tmp_path / "out.csv")
    with pytest.raises(UserError, match="no such folder"):
        label(run, own, tmp_path / "nowhere", tmp_path / "out.csv")
    with pytest.raises(UserError, match="--shots 500: red fox in --support has 7 photos; give at most so many, or 0"):
        label(run, own, own, tmp_path / "out.csv", "--shots", "500")
    monkeypatch.setitem(predict.MOST, "ridge", 11)
    with pytest.raises(UserError, match="12 photos of 3 classes are too many for --eval_head ridge; --shots K"):
        label(run, own, own, tmp_path / "out.csv", "--shots", "4", "--eval_head", "ridge")
    assert not (tmp_path / "out.csv").exists()


# --- --init ----------------------------------------------------------------------------------------------------------


def test_torchvisions_names_are_its_network() -> None:
    torch.manual_seed(0)
    public = resnet18(weights=None).eval()
    encoder = build("ResNet18", 64).eval()
    view = torchvision_names(encoder)
    assert view is not None
    public.fc = nn.Identity()
    assert set(view.state_dict()) == set(public.state_dict())
    view.load_state_dict(public.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(x), public(x))
    assert torchvision_names(build("Conv4", 16)) is None


def test_a_run_starts_from_a_run_or_a_public_file(
    own: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*words: str) -> tuple[dict[str, Tensor], str]:
        out = tmp_path / "-".join(words).replace("/", "")[-60:]
        assert train.main([*SMALL, "--data_dir", str(own), "--output-dir", str(out), "--stop_epoch", "0", *words]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "start: " in line]
        return checkpoint.load(out / "checkpoint.pth")["state"], "".join(lines)

    before = checkpoint.load(run / "checkpoint.pth")["state"]
    state, said = start("--init", str(run))
    assert f"start: {run}: loaded 28 tensors" in said
    assert all(torch.equal(state[k], v) for k, v in before.items() if k.startswith("feature."))
    assert not torch.equal(state["classifier.L.weight_v"], start("--seed", "1")[0]["classifier.L.weight_v"])
    torch.manual_seed(5)
    public = resnet18(weights=None)
    torch.save(public.state_dict(), tmp_path / "resnet18.pth")
    big = ("--model", "ResNet18", "--width", "0")
    state, _ = start(*big, "--init", str(tmp_path / "resnet18.pth"))
    assert torch.equal(state["feature.trunk.0.weight"], public.conv1.weight)
    assert torch.equal(state["feature.trunk.11.C2.weight"], public.layer4[1].conv2.weight)
    for words, message in (
        (("--init", str(tmp_path / "resnet18.pth")), "others have no Conv4; --model ResNet18 takes"),
        (("--init", "timm:resnet18"), "others have no Conv4; --model ResNet18 takes"),
        (("--init", str(run), "--width", "8"), "taken as Conv4 for 16 pixels: .* mis-shaped"),
        (("--init", str(tmp_path / "none.pth")), "none.pth: no such checkpoint file"),
    ):
        with pytest.raises(UserError, match=message):
            start(*words)


def test_augmented_copies_keep_the_class_of_their_photo(
    own: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7, 9 and 11 photos, three copies of each: what a copy shows and the class that the head is told are the same."""
    given: list[tuple[Tensor, Tensor]] = []
    classify = predict.classify

    def named(encoder: nn.Module, images: ImageList, args: object, device: object, copies: int) -> Tensor:
        found = extract_augmented(encoder, images, args, device, copies)  # type: ignore[arg-type]
        assert found.shape[:2] == (27, 3)
        return found + 1000 * images.labels.view(-1, 1, *[1] * (found.dim() - 2))

    def kept(head: str, x: Tensor, y: Tensor, *more: object) -> Tensor:
        given.append((x, y))
        return classify(head, x, y, *more)  # type: ignore[arg-type]

    extract_augmented = predict.extract_augmented
    monkeypatch.setattr(predict, "extract_augmented", named)
    monkeypatch.setattr(predict, "classify", kept)
    photo(tmp_path / "new.png", (1, 2, 3), 0)
    label(run, own, tmp_path / "new.png", tmp_path / "out.csv", "--aug_support", "3", "--eval_head", "proto_l2")
    ((x, y),) = given
    assert len(x) == 81 and torch.equal((x.flatten(1).mean(1) / 1000).round().long(), y)
