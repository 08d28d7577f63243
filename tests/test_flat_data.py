"""The data sets of flat in their public layouts, the frozen splits, the pipelines; and the backbones."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flat import data
from flat.backbone import MODELS, ResNet12Block, build, drop_block, ramp_drop_block
from flat.methods.baselinetrain import CosineHead, DistLinear, make_head
from flat.methods.protonet import ProtoNet
from shared_utils import UserError


def image(path: Path, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(path)


def frozen(monkeypatch: pytest.MonkeyPatch, name: str, classes: dict[str, list[str]]) -> None:
    """Let the split that a test writes be the published one."""
    sizes = tuple(len(classes[split]) for split in data.SPLITS)
    monkeypatch.setitem(data.FROZEN, name, (data.split_hash(classes), sizes))


MINI = {"base": ["n01", "n02"], "val": ["n03"], "novel": ["n04"]}


def write_mini(root: Path) -> Path:
    for split, name in data.SPLITS.items():
        (root / "miniImagenet").mkdir(parents=True, exist_ok=True)
        with open(root / "miniImagenet" / f"{name}.csv", "w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["filename", "label"])
            for label in MINI[split]:
                for i in range(3):
                    writer.writerow([f"{label}{i:08d}.jpg", label])
                    image(root / "miniImagenet/images" / f"{label}{i:08d}.jpg")
    return root


def write_cub(root: Path) -> Path:
    for i in range(8):
        for j in range(2):
            image(root / "CUB_200_2011/images" / f"{i + 1:03d}.Bird{i}" / f"{j}.jpg")
    return root


CUB = {
    "base": ["001.Bird0", "003.Bird2", "005.Bird4", "007.Bird6"],
    "val": ["002.Bird1", "006.Bird5"],
    "novel": ["004.Bird3", "008.Bird7"],
}


def test_mini_imagenet_by_its_csv_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen(monkeypatch, "miniImagenet", MINI)
    found = data.read_dataset("miniImagenet", write_mini(tmp_path))
    assert {split: sorted(classes) for split, classes in found.items()} == MINI
    assert [path.name for path in found["val"]["n03"]] == [f"n03{i:08d}.jpg" for i in range(3)]
    assert data.read_dataset("miniImagenet", tmp_path / "miniImagenet").keys() == found.keys()  # or the folder itself
    file = tmp_path / "miniImagenet/val.csv"
    text = file.read_bytes()
    file.write_bytes(text.replace(b"n0300", b"./n0300").replace(b"\r\n", b" \r\n"))  # as other programs write it
    assert data.read_dataset("miniImagenet", tmp_path)["val"] == found["val"]
    file.write_bytes(text + b"n0300000000.jpg,n09\r\n")
    with pytest.raises(UserError, match=r"val.csv, line 5: n0300000000.jpg is listed in val.csv, line 2 already"):
        data.read_dataset("miniImagenet", tmp_path)
    file.write_bytes(text)
    missing = tmp_path / "miniImagenet/images/n0300000001.jpg"
    missing.unlink()
    with pytest.raises(UserError, match=rf"val.csv, line 3: {missing} does not exist") as error:
        data.read_dataset("miniImagenet", tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "miniImagenet/val.csv").write_text("name,class\n")
    with pytest.raises(UserError, match="val.csv: its first line must be filename,label"):
        data.read_dataset("miniImagenet", tmp_path)
    (tmp_path / "miniImagenet/val.csv").unlink()
    with pytest.raises(UserError, match="val.csv: no such file; expected the lists of Ravi"):
        data.read_dataset("miniImagenet", tmp_path)


def test_cub_by_the_order_of_its_folders_and_cross(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen(monkeypatch, "CUB", CUB)
    found = data.read_dataset("CUB", write_cub(tmp_path))
    assert {split: sorted(classes) for split, classes in found.items()} == CUB
    frozen(monkeypatch, "miniImagenet", MINI)
    cross = data.read_dataset("cross", write_mini(tmp_path))
    assert sorted(cross["base"]) == ["n01", "n02", "n03", "n04"]  # all of mini-ImageNet
    assert sorted(cross["val"]) == CUB["val"] and sorted(cross["novel"]) == CUB["novel"]
    with pytest.raises(UserError, match="no such folder; expected CUB_200_2011 with images/001.Name"):
        data.read_dataset("CUB", tmp_path / "nowhere")


def write_folders(root: Path, classes: dict[str, list[str]]) -> Path:
    for split, names in classes.items():
        for name in names:
            image(root / data.SPLITS[split] / name / "0.png")
    return root


@pytest.mark.parametrize("name", ["tiered", "cifarfs", "fc100"])
def test_class_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"base": ["a", "b"], "val": ["c"], "novel": ["d", "e"]}
    write_folders(tmp_path / data.FOLDERS[name], classes)
    with pytest.raises(UserError, match=r"not the published class split of .* found 2/1/2, .*--dataset folder"):
        data.read_dataset(name, tmp_path)
    frozen(monkeypatch, name, classes)
    found = data.read_dataset(name, tmp_path)
    assert {split: sorted(c) for split, c in found.items()} == classes
    assert data.read_dataset("folder", tmp_path / data.FOLDERS[name]).keys() == found.keys()


def test_cifarfs_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"base": ["a", "b"], "val": ["c"], "novel": ["d of two words"]}
    root = tmp_path / "cifarfs"
    for split, names in classes.items():
        (root / "splits/bertinetto").mkdir(parents=True, exist_ok=True)
        text = b" \r\n".join(name.encode() for name in [*names, ""])
        (root / "splits/bertinetto" / f"{data.SPLITS[split]}.txt").write_bytes(text)
        for name in names:
            image(root / "data" / name / "0.png")
    frozen(monkeypatch, "cifarfs", classes)
    assert {k: sorted(v) for k, v in data.read_dataset("cifarfs", tmp_path).items()} == classes
    (root / "splits/bertinetto/val.txt").unlink()
    with pytest.raises(UserError, match="val.txt: no such file; expected a list of classes"):
        data.read_dataset("cifarfs", tmp_path)


def test_lists_that_other_programs_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRLF, a byte-order mark, blanks behind commas and at the line's end, quotes, empty lines, hidden files: the same
    images; one image in two lines, classes or splits is no list of theirs."""
    frozen(monkeypatch, "miniImagenet", MINI)
    root = write_mini(tmp_path) / "miniImagenet"
    wanted = data.read_dataset("miniImagenet", tmp_path)
    for name in (".DS_Store", "._n0100000000.jpg", "Thumbs.db"):
        (root / "images" / name).write_bytes(b"x")
    plain = {name: (root / f"{name}.csv").read_text() for name in ("train", "val", "test")}
    lines = plain["train"].splitlines()
    for text in (
        "\r\n".join(lines) + "\r\n",
        "\ufeff" + plain["train"],
        "\n".join(line.replace(",", ", ") + "  " for line in lines) + "\n\n",
        "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in lines) + "\n,\n",
        "\n".join(["index," + lines[0], *(f"{i},{line}" for i, line in enumerate(lines[1:]))]),  # as pandas does
    ):
        (root / "train.csv").write_bytes(text.encode())
        assert data.read_dataset("miniImagenet", tmp_path) == wanted
    first = lines[1].split(",")[0]
    for name, more in (("train", lines[1]), ("train", f"{first},n02"), ("val", f"{first},n03")):
        (root / "train.csv").write_text(plain["train"])
        (root / f"{name}.csv").write_text(f"{plain[name].rstrip()}\n{more}\n")
        with pytest.raises(UserError, match=rf"{name}.csv, line \d+: {first} is listed in train.csv, line 2 already"):
            data.read_dataset("miniImagenet", tmp_path)
        (root / f"{name}.csv").write_text(plain[name])
    (root / "val.csv").write_text(plain["val"].replace("\n", "X", 2).replace("X", "\n", 1))  # a line's end is lost
    with pytest.raises(UserError, match="val.csv, line 2: 3 cells, expected filename,label; restore"):
        data.read_dataset("miniImagenet", tmp_path)


def test_lists_of_classes_that_other_programs_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"base": ["maple tree", "b"], "val": ["c"], "novel": ["d"]}
    frozen(monkeypatch, "cifarfs", classes)
    root = tmp_path / "cifarfs"
    for split, names in classes.items():
        (root / "splits/bertinetto").mkdir(parents=True, exist_ok=True)
        text = "\ufeff" + "\r\n".join(f"{name} " for name in names) + "\r\n\r\n"
        (root / "splits/bertinetto" / f"{data.SPLITS[split]}.txt").write_bytes(text.encode())
        for name in names:
            image(root / "data" / name / "0.png")
    image(root / "data" / "in no list" / "0.png")
    assert {k: sorted(v) for k, v in data.read_dataset("cifarfs", tmp_path).items()} == {
        k: sorted(v) for k, v in classes.items()
    }
    (root / "splits/bertinetto/val.txt").write_text("c\nc\n")
    with pytest.raises(UserError, match="val.txt: class c is listed twice"):
        data.read_dataset("cifarfs", tmp_path)
    (root / "splits/bertinetto/val.txt").write_text("cc\n")
    with pytest.raises(UserError, match="val.txt: .*data/cc does not exist; restore it, or the list"):
        data.read_dataset("cifarfs", tmp_path)


def test_overlapping_splits_are_refused(tmp_path: Path) -> None:
    root = write_folders(tmp_path, {"base": ["a", "b"], "val": ["c"], "novel": ["b"]})
    with pytest.raises(UserError, match="class b is in train and in test; splits of classes must not overlap"):
        data.read_dataset("folder", root)
    with pytest.raises(UserError, match="--dataset imagenet: unknown; choose from miniImagenet, tiered, cifarfs"):
        data.read_dataset("imagenet", root)


def test_the_published_splits_are_frozen() -> None:
    assert {name: sizes for name, (_, sizes) in data.FROZEN.items()} == {
        "miniImagenet": (64, 16, 20), "tiered": (351, 97, 160), "cifarfs": (64, 16, 20), "fc100": (60, 20, 20),
        "CUB": (100, 50, 50),
    }  # fmt: skip
    one = {"base": ["a", "b"], "val": ["c"], "novel": ["d"]}
    moved = {"base": ["a"], "val": ["b", "c"], "novel": ["d"]}
    assert data.split_hash(one) == data.split_hash({**one, "base": ["b", "a"]}) != data.split_hash(moved)


def test_subsets_of_classes_and_images(tmp_path: Path) -> None:
    names = [f"c{i:02d}" for i in range(20)]
    picked = data.pick_classes(names, 5, 0)
    assert picked == data.pick_classes(names, 5, 0) == sorted(picked) != data.pick_classes(names, 5, 1)
    assert data.pick_classes(names, 0, 3) == names
    with pytest.raises(UserError, match="--base_classes 21: the data has 20 base classes"):
        data.pick_classes(names, 21, 0)
    files = {"x": [tmp_path / f"x{i}" for i in range(5)], "y": [tmp_path / f"y{i}" for i in range(3)]}
    held, rest = data.as_list(files, 0, 2), data.as_list(files, 2)
    assert not {*held.paths()} & {*rest.paths()} and len(held) + len(rest) == 8
    with pytest.raises(UserError, match="class y has no image left of 3"):
        data.as_list(files, 3)


def test_the_crop_of_rfs() -> None:
    """RandomCrop by 8 pixels (CIFAR 4), torchvision's jitter in any order, flip."""
    image = Image.fromarray(np.full((84, 84, 3), 200, np.uint8))
    for size, padding in ((84, 8), (32, 4)):
        steps = data.training_pipeline(size, True, "rfs").transforms  # type: ignore[attr-defined]
        assert steps[1].padding == padding and steps[1].size == (size, size)
        assert steps[2].brightness == steps[2].contrast == steps[2].saturation == (0.6, 1.4) and steps[2].hue is None
        assert data.training_pipeline(size, True, "rfs")(image).shape == (3, size, size)


def test_pipelines() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8))
    out = data.evaluation_pipeline(32)(picture)
    assert out.shape == (3, 32, 32) and out.dtype == torch.uint8
    resized = np.array(picture.resize((36, 36), Image.Resampling.BILINEAR))[2:34, 2:34]
    assert torch.equal(out, torch.from_numpy(resized).permute(2, 0, 1))  # int(1.15 x 32) = 36, centre
    small = Image.fromarray(np.array(picture)[:32, :32])
    assert torch.equal(data.evaluation_pipeline(32)(small), data.pixels(small))
    for crop in ("resized", "padded"):
        pipeline = data.training_pipeline(32, True, crop)
        one, two = pipeline(small), pipeline(small)
        assert one.shape == (3, 32, 32) and not torch.equal(one, two)
    assert torch.equal(data.training_pipeline(32, False, "resized")(small), data.pixels(small))
    jittered = data.ImageJitter(0.4)(Image.new("RGB", (4, 4), (100, 100, 100)))
    assert 0.6 * 100 - 1 <= jittered.getpixel((0, 0))[0] <= 1.4 * 100 + 1
    x = data.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), "imagenet")
    torch.testing.assert_close(
        x[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


# --- backbones -------------------------------------------------------------------------------------------------------

SHAPES = {  # width 0: the published one; parameters in millions
    "Conv4": (84, 1600, 0.113), "ResNet10": (84, 512, 4.90), "ResNet12": (84, 640, 12.42),
    "ResNet18": (84, 512, 11.17), "WRN28": (32, 640, 36.48),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_backbones(model: str) -> None:
    size, features, millions = SHAPES[model]
    encoder = build(model, size)
    assert encoder.num_features == features
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    narrow = build(model, 32, 8).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = narrow.penultimate(x)
    final, f = narrow.finish(maps)
    torch.testing.assert_close(narrow(x), f)
    assert f.shape == (2, narrow.num_features) and final.shape[1] == narrow.channels
    torch.testing.assert_close(narrow.trunk(x), f)  # the parts are the trunk
    stage = narrow.new_last_stage()
    assert stage(maps).shape == final.shape and not torch.equal(stage.eval()(maps), final)
    keys = narrow.state_dict()
    assert all(key.startswith("trunk.") for key in keys)
    if model == "Conv4":
        assert {"trunk.0.C.weight", "trunk.3.BN.running_var"} <= set(keys)
    if model == "ResNet18":
        assert {"trunk.0.weight", "trunk.1.weight", "trunk.4.C1.weight", "trunk.6.BNshortcut.weight"} <= set(keys)
        assert "trunk.5.shortcut.weight" not in keys
        first = build("ResNet18", 224).trunk[0].weight.detach()
        assert float(first.std()) == pytest.approx((2 / (7 * 7 * 64)) ** 0.5, rel=0.05)


def test_stochastic_representation_is_off_at_test_time_unless_asked() -> None:
    torch.manual_seed(0)
    encoder, x = build("Conv4", 32, 8), torch.randn(4, 3, 32, 32)
    plain = encoder.eval()(x)
    encoder.add_noise(in_eval=False)
    assert torch.equal(encoder.eval()(x), plain)
    encoder.noise_in_eval = True
    once, twice = encoder(x), encoder(x)
    assert not torch.equal(once, twice) and (once - plain).abs().max() < 0.05
    assert "noise.0.weight" in encoder.state_dict()


def test_unknown_sizes_are_one_line() -> None:
    for words, message in (
        (("Conv7", 84), "--model Conv7: unknown backbone; choose from Conv4"),
        (("Conv4", 12), "--image_size 12: Conv4 halves its maps down to nothing below 16"),
        (("ResNet18", 84, -1), "--width -1: must be 0"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build(*words)
        assert "\n" not in str(error.value)


def test_drop_block_drops_squares_and_keeps_the_scale() -> None:
    torch.manual_seed(0)
    out = drop_block(torch.ones(64, 8, 12, 12), 0.1, 5)
    share = float((out == 0).float().mean())
    assert 0.05 < share < 0.15 and float(out.mean()) == pytest.approx(1, abs=1e-5)
    assert out[out > 0].unique().numel() == 1
    gone = (out == 0).float()
    square = torch.nn.functional.avg_pool2d(gone, 5, 1) == 1  # every hole is made of whole squares
    filled = torch.nn.functional.max_pool2d(torch.nn.functional.pad(square.float(), (4,) * 4), 5, 1)
    interior = slice(4, 8)
    assert torch.equal(filled[..., interior, interior], gone[..., interior, interior])


def test_drop_block_ramps_up_as_metaoptnet_s() -> None:
    """Its keep rate max(1 - rate / 40000 n, 1 - rate) at forward pass n, counted from 1, and its gamma."""
    net = build("ResNet12", 84, 4, drop=0.1)
    blocks = [m for m in net.trunk if isinstance(m, ResNet12Block)]
    assert [m.block_size for m in blocks] == [1, 1, 5, 5]
    assert [m.block_size for m in build("ResNet12", 32, 4).trunk[:4]] == [1, 1, 2, 2]  # for CIFAR
    assert [m.block_size for m in build("ResNet12", 32, 4, block_size=3).trunk[:4]] == [1, 1, 3, 3]
    for n in (1, 20_000, 40_000, 90_000):
        ramp_drop_block(net, n - 1, 40_000)
        keep = max(1 - 0.1 / (20 * 2000) * n, 1 - 0.1)
        assert [m.ramp * m.drop for m in blocks] == pytest.approx([1 - keep] * 4)
    ramp_drop_block(net, 0, 0)
    assert [m.ramp for m in blocks] == [1.0] * 4
    # what is dropped follows; plain dropout of the first blocks does not ramp
    torch.manual_seed(0)
    x = torch.randn(64, 3, 40, 40)
    shares = []
    for step in (0, 19_999, 39_999):
        ramp_drop_block(net, step, 40_000)
        first, third = blocks[0].train(), blocks[2].train()
        shares.append(
            [float((m(y) == 0).float().mean()) for m, y in ((first, x), (third, torch.randn(64, 10, 20, 20)))]
        )
    assert [share[0] for share in shares] == pytest.approx([0.1] * 3, abs=0.01)
    assert [share[1] for share in shares] == pytest.approx([0, 0.05, 0.1], abs=0.015) and shares[0][1] < 0.001


def test_gamma_of_drop_block_is_metaoptnet_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - keep) / size^2 * side^2 / (side - size + 1)^2: a draw below it seeds a square, one above does not."""
    for side, size, rate in ((10, 5, 0.1), (5, 5, 0.05), (4, 2, 0.1)):
        gamma = rate / size**2 * side**2 / (side - size + 1) ** 2
        for draw, dropped in ((gamma * 0.999, True), (gamma * 1.001, False)):
            monkeypatch.setattr(torch, "rand", lambda *shape, device=None, draw=draw: torch.full(shape, draw))
            assert bool((drop_block(torch.ones(1, 1, side, side), rate, size) == 0).all()) == dropped


def test_heads() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7)
    linear = make_head("baseline", 7, 3)
    assert linear.bias.abs().sum() == 0
    dist = DistLinear(7, 3)
    assert dist.scale == 2 and DistLinear(7, 201).scale == 10
    torch.testing.assert_close(dist(x), dist(5 * x), rtol=1e-4, atol=1e-5)  # cosine: no scale of the features
    expected = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(7, 3, bias=False))
    expected.weight = dist.L.weight_v.detach()
    torch.testing.assert_close(dist(x), 2 * expected(x / x.norm(dim=1, keepdim=True)), rtol=1e-4, atol=1e-5)
    cosine = CosineHead(7, 3)
    assert cosine(x).abs().max() <= 10 + 1e-4 and cosine.scale.requires_grad
    torch.testing.assert_close(cosine(x), cosine(0.1 * x))


def test_protonet_logits_are_distances_to_the_means() -> None:
    torch.manual_seed(0)
    model = ProtoNet(build("Conv4", 16, 4), None, "concat", "flat", n_way=3, n_shot=2).eval()
    x = torch.randn(3 * 5, 3, 16, 16)
    logits = model(x)[0]
    f = model.feature(x).detach().view(3, 5, -1)
    slow = [[-(f[i, 2 + j] - f[k, :2].mean(0)).square().sum() for k in range(3)] for i in range(3) for j in range(3)]
    torch.testing.assert_close(logits, torch.tensor(slow), rtol=1e-4, atol=1e-4)
    assert model.targets(15).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
