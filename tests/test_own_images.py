"""One's own photographs in hsa, bingo, kscl and sage: without labels, leave-one-out, --init, sets below a batch."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import bingo.arch
import hsa.arch
import kscl.arch
import sage.arch
from shared_utils import UserError, checkpoint
from shared_utils.init import initialise
from shared_utils.neighbours import draw_shots, few_shot, knn_accuracy
from tests.test_readme import recorded_calls

NET = "--arch resnet10 --width 4 --stem cifar_pool".split()
MACHINE = "--img_size 16 --workers 0 --threads 1".split()
MOCO = [*NET, *MACHINE, *"--moco_dim 16 --moco_k 32 --batch_size 8 --bn_splits 2 --log-every 1".split()]
# Scripts that pretrain, with the prefixes of the two networks that have to start equal.
PRETRAIN = {
    "hsa.main_moco": ([*MOCO, "--clus_pos_num", "3"], ["module.encoder_q.", "module.encoder_k."]),
    "kscl.main_kscl": ([*MOCO, "--shots", "2"], ["module.encoder_q.", "module.encoder_k."]),
    "bingo.main_teacher": (MOCO, ["module.encoder_q.", "module.encoder_k."]),
    "sage.train": (
        [*NET, *MACHINE, *"--mode byol --hid_channels 16 --out_channels 8 --imgs_per_gpu 4 --log-every 1".split()],
        ["online_net.0.", "target_net.0."],
    ),
}


def photographs(root: Path, classes: int = 0, count: int = 18) -> Path:
    """Images of several sizes and endings, portraits too, names with spaces; in class folders, or without labels."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / f"class {i % classes}" if classes else root / ("holiday 2025" if i % 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (20 + i % 5, 30 - i, 3)) + 60 * np.eye(3, dtype=np.int64)[i % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"photo no {i}.{('png', 'JPG', 'jpeg', 'webp')[i % 4]}")
    return root


def call(module: str, data: Path, out: Path, *flags: str) -> None:
    assert importlib.import_module(module).main(["--data_dir", str(data), "--output-dir", str(out), *flags]) == 0


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def run_printed(hint: str) -> None:
    """What a run says to do next."""
    module, *flags = shlex.split(hint.split("python -m ", 1)[1])
    assert importlib.import_module(module).main(flags) == 0


# --- without labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["hsa.main_moco", "kscl.main_kscl", "sage.train"])
def test_photographs_without_labels(module, tmp_path, capsys):
    data, flags = photographs(tmp_path / "my photos"), PRETRAIN[module][0]
    call(module, data, tmp_path / "out dir", *flags, "--epochs", "1")
    said = capsys.readouterr().out
    assert f"{data}: 18 images, without labels" in said and "classes" not in said and "label;" not in said
    assert "image's label" not in said and all("neighbours/purity" not in row for row in log(tmp_path / "out dir"))
    (hint,) = [line for line in said.splitlines() if "backbone: python" in line]
    run_printed(hint.split("; or ")[0])
    assert (tmp_path / "out dir/backbone.pth").is_file()
    with pytest.raises(UserError, match="--per_class 2: the images of .* lie in no class folders; leave it away"):
        call(module, data, tmp_path / "none", *flags, "--per_class", "2")


def test_all_stages_of_bingo_without_labels(tmp_path, capsys):
    data = photographs(tmp_path / "my photos")
    call("bingo.main_teacher", data, tmp_path / "teacher", *MOCO, "--epochs", "1")
    weights, bags = str(tmp_path / "teacher/checkpoint.pth"), ["--corr_dir", str(tmp_path), "--corr_name", "bags.npy"]
    knn = importlib.import_module("bingo.compute_knn").main
    of = ["--data_dir", str(data), *MACHINE, *"--arch resnet10 --t_width 4 --t_stem cifar_pool".split(), *bags]
    assert knn([*of, "--ckpt_name", weights]) == 0
    with pytest.raises(UserError, match="--bags label: .*my photos has no two class folders"):
        knn([*of, "--bags", "label"])
    with pytest.raises(UserError, match="--clus_pos_num 18 needs more than so many images, there are 18"):
        knn([*of, "--ckpt_name", weights, "--clus_pos_num", "18"])
    student = "--s_arch resnet10 --s_width 4 --s_stem cifar_pool --t_arch resnet10 --t_width 4 --t_stem cifar_pool"
    student += " --hidden 16 --batch_size 8 --moco_k 32 --log-every 1 --epochs 1"
    student += f" --pretrain_path {shlex.quote(weights)} --corr_npy {shlex.quote(str(tmp_path / 'bags.npy'))}"
    moved = data.rename(tmp_path / "moved photos")  # bags are of files, wherever they lie
    call("bingo.main_moco", moved, tmp_path / "student", *MACHINE, *shlex.split(student))
    said = capsys.readouterr().out
    assert said.count("18 images, without labels") == 2 and "without labels the purity of its neighbours" in said
    assert "classes" not in said and "chance" not in said and "anchor's label" not in said
    assert said.count("caution, queue: --moco_k 32 is more than the 18 images") == 2 and "--moco_k 16 holds" in said
    for hint in (line for line in said.splitlines() if "backbone: python" in line):
        run_printed(hint)
    assert (tmp_path / "teacher/backbone.pth").is_file() and (tmp_path / "student/backbone.pth").is_file()
    (moved / "photo no 0.png").unlink()
    with pytest.raises(UserError, match="bags.npy: holds int64 .18, 5., expected integers .17, K."):
        call("bingo.main_moco", moved, tmp_path / "fewer", *MACHINE, *shlex.split(student))


def test_neighbours_of_photographs_are_resumed_where_they_have_moved(tmp_path):
    data, flags = photographs(tmp_path / "photos"), [*PRETRAIN["hsa.main_moco"][0], "--epochs", "2"]
    call("hsa.main_moco", data, tmp_path / "out", *flags)
    strip = ["--pretrained", str(tmp_path / "out/checkpoint.pth"), "--anchors", "1", "9", "--out"]
    assert importlib.import_module("hsa.lab.strip").main([*strip, str(tmp_path / "strip.png")]) == 0  # labels or not
    call("hsa.main_moco", data.rename(tmp_path / "elsewhere"), tmp_path / "out", *flags)
    with pytest.raises(UserError, match="--neighbours label needs class folders"):
        call("hsa.main_moco", tmp_path / "elsewhere", tmp_path / "label", *flags, "--neighbours", "label")
    assert not (tmp_path / "label").exists()


@pytest.mark.parametrize("module", PRETRAIN)
def test_fewer_images_than_a_batch(module, tmp_path):
    data = photographs(tmp_path / "photos", count=5)
    flag, fits = ("--imgs_per_gpu", 2) if module == "sage.train" else ("--batch_size", 4)
    step = 8  # of sage: 4 images x 2 accumulated
    with pytest.raises(
        UserError, match=rf"^{flag} \d: a step takes {step} images, the data has 5; give {flag} {fits} "
    ):
        call(module, data, tmp_path / "out", *PRETRAIN[module][0], "--epochs", "1")
    few = ["--clus_pos_num", "1"] if module == "hsa.main_moco" else []
    with pytest.raises(UserError, match=r"4 are the least that train$"):
        call(module, photographs(tmp_path / "two", count=2), tmp_path / "out", *PRETRAIN[module][0], *few)


# --- leave-one-out ---------------------------------------------------------------------------------------------------


def left_out(feats: torch.Tensor, labels: list[int], k: int, tau: float | None) -> float:
    """Top-1 in per cent of each image by the k nearest of the others: a loop over pairs, in float64."""
    rows, right = feats.double().tolist(), 0
    for i, row in enumerate(rows):
        near = sorted(((sum(a * b for a, b in zip(row, other)), -j) for j, other in enumerate(rows) if j != i))[::-1][
            :k
        ]
        votes: dict[int, float] = {}
        for place, (sim, minus) in enumerate(near):
            weight = 1 - 1e-6 * place if tau is None else np.exp(sim / tau)
            votes[labels[-minus]] = votes.get(labels[-minus], 0) + weight
        right += max(votes, key=lambda y: votes[y]) == labels[i]
    return 100 * right / len(rows)


KNN: dict[str, dict[str, tuple[int, float | None]]] = {
    "hsa.main_knn": {"knn": (20, 0.07), "knn10": (10, None)},
    "bingo.main_knn": {"knn": (20, 0.07), "knn10": (10, None)},
    "kscl.main_knn": {"knn": (20, 0.07), "knn200": (200, 0.1)},
    "sage.main_knn": {"knn1": (1, 0.07), "knn20": (20, 0.07), "knn200": (200, 0.07)},
}


@pytest.mark.parametrize("name", KNN)
@pytest.mark.parametrize("below", ["", "train"])
def test_nearest_neighbours_leave_one_out(name, below, tmp_path, capsys, monkeypatch):
    module, root = importlib.import_module(name), tmp_path / "my photos"
    photographs(root / below, classes=3, count=25)
    taken, features = [], module.features

    def noted(*args: Any) -> torch.Tensor:
        taken.append(features(*args))
        return taken[-1]

    monkeypatch.setattr(module, "features", noted)
    call(name, root, tmp_path / "out", "--pretrained", "none", *NET, *MACHINE)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert "leave-one-out, each of the 25 images by all the others" in capsys.readouterr().out
    assert result["protocol"].startswith("leave-one-out") and len(taken) == 1
    labels = [0] * 9 + [1] * 8 + [2] * 8
    expected = {metric: left_out(taken[0], labels, *how) for metric, how in KNN[name].items()}
    assert {metric: result[metric] for metric in expected} == pytest.approx(expected)
    assert "few_shot" not in result or result["few_shot"] < 100  # with its own label each would be right


def test_few_shots_leave_the_own_row_out():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 4
    x = torch.nn.functional.normalize(torch.randn(30, 6, generator=rng) + torch.eye(6)[labels], dim=1)
    right = []
    for draw in range(3):
        chosen = draw_shots(labels, 5, draw).tolist()
        for i in range(30):
            near = sorted((-float(x[i].double() @ x[j].double()), j) for j in chosen if j != i)[:5]
            votes = np.zeros(4)
            for minus, j in near:
                votes[labels[j]] += np.exp(-minus / 0.07)
            right.append(votes.argmax() == labels[i])
    found = few_shot(x, labels, x, labels, 5, 3, own=torch.arange(30))
    assert found == pytest.approx(100 * np.mean(right)) and found < few_shot(x, labels, x, labels, 5, 3)
    one_each = few_shot(x[:3], labels[:3], x[:3], labels[:3], 5, 1, own=torch.arange(3))  # none of one's own class
    assert one_each == 0 == knn_accuracy(x[:3], labels[:3], x[:3], labels[:3], 3, None, own=torch.arange(3))


@pytest.mark.parametrize("name", KNN)
def test_what_cannot_be_evaluated(name, tmp_path):
    flags = ["--pretrained", "none", *NET, *MACHINE]
    with pytest.raises(UserError, match="plain: images in no class folders have no labels to be evaluated by"):
        call(name, photographs(tmp_path / "plain"), tmp_path / "out", *flags)
    with pytest.raises(UserError, match="one: one class folder, class 0; an evaluation needs two"):
        call(name, photographs(tmp_path / "one", classes=1), tmp_path / "out", *flags)
    linear = name.replace("knn", "lincls")
    with pytest.raises(UserError, match="two/val: no such folder; expected val/CLASS.* or --val_dir: what learns from"):
        call(linear, photographs(tmp_path / "two", classes=2), tmp_path / "out", *flags)
    photographs(tmp_path / "held out", classes=2)  # beside class folders without train/
    held_out = ["--val_dir", str(tmp_path / "held out"), "--epochs", "1", "--cached_train"]
    call(linear, tmp_path / "two", tmp_path / "linear", *flags, *held_out)


# --- --init ----------------------------------------------------------------------------------------------------------


def weights(seed: int = 1) -> dict[str, torch.Tensor]:
    """Of the network in NET, batch-norm statistics of a trained one, and a classifier on top."""
    torch.manual_seed(seed)
    state = bingo.arch.build("resnet10", 4, "cifar_pool").state_dict()
    state = {key: torch.rand(v.shape) + 0.5 if v.is_floating_point() else v + 7 for key, v in state.items()}
    return state | {"fc.weight": torch.rand(5, 32), "fc.bias": torch.rand(5)}


def check_start(out: Path, state: dict[str, torch.Tensor], prefixes: list[str]) -> None:
    saved = checkpoint.load(out / "checkpoint.pth")["state_dict"]
    body = [key for key in state if not key.startswith("fc.")]
    assert len(body) > 50
    for prefix in prefixes:
        wrong = [key for key in body if not torch.equal(saved[prefix + key], state[key])]
        assert not wrong, f"{prefix}: {wrong}"
    both = [{k.removeprefix(p): v for k, v in saved.items() if k.startswith(p)} for p in prefixes]  # heads too
    assert all(torch.equal(value, both[-1][key]) for key, value in both[0].items())


@pytest.mark.parametrize("module", PRETRAIN)
def test_both_networks_start_from_the_file(module, tmp_path, capsys):
    data, (flags, prefixes), state = photographs(tmp_path / "photos"), PRETRAIN[module], weights()
    checkpoint.save(tmp_path / "my file.pth", state)
    call(module, data, tmp_path / "first", *flags, "--epochs", "0", "--init", str(tmp_path / "my file.pth"))
    assert f"init: {tmp_path}/my file.pth: loaded {len(state) - 2} tensors, dropped 2" in capsys.readouterr().out
    check_start(tmp_path / "first", state, prefixes)
    more = [*flags, "--mode", "paper", "--crops", "0"] if module == "hsa.main_moco" else flags  # with a second head
    call(module, data, tmp_path / "own", *more, "--epochs", "1", "--init", str(tmp_path / "first"))  # a run's folder
    with pytest.raises(UserError, match=r"-epochs? was 1, is 2.*to train longer, .*--init '?.*own/checkpoint.pth"):
        call(module, data, tmp_path / "own", *more, "--epochs", "2", "--init", str(tmp_path / "first"))
    longer = checkpoint.read_weights(tmp_path / "own/checkpoint.pth")
    call(module, data, tmp_path / "longer", *flags, "--epochs", "0", "--init", str(tmp_path / "own/checkpoint.pth"))
    check_start(tmp_path / "longer", {k: v for k, v in longer.items() if not k.startswith(("fc", "stage3"))}, prefixes)
    with pytest.raises(UserError, match=r"--init .*my file.pth: .*--arch and its like must name the network"):
        call(module, data, tmp_path / "no", *flags, "--width", "8", "--init", str(tmp_path / "my file.pth"))
    assert not (tmp_path / "no").exists()


def test_the_student_of_bingo_starts_from_the_file(tmp_path, capsys):
    data, state = photographs(tmp_path / "photos"), weights()
    checkpoint.save(tmp_path / "file.pth", state)
    call("bingo.main_teacher", data, tmp_path / "teacher", *MOCO, "--epochs", "0")
    student = "--s_arch resnet10 --s_width 4 --s_stem cifar_pool --t_arch resnet10 --t_width 4 --t_stem cifar_pool"
    student += " --loss intra --hidden 16 --batch_size 8 --moco_k 16 --epochs 0 --pretrain_path"
    flags = [*MACHINE, *student.split(), str(tmp_path / "teacher/checkpoint.pth"), "--init", str(tmp_path / "file.pth")]
    call("bingo.main_moco", data, tmp_path / "out", *flags)
    check_start(tmp_path / "out", state, ["module.encoder_q."])
    assert f"init: student, {tmp_path}/file.pth: loaded" in capsys.readouterr().out


@pytest.mark.parametrize("arch", [hsa.arch, bingo.arch, kscl.arch, sage.arch])
def test_timms_resnet18_fits(arch, monkeypatch):
    theirs, create = timm.create_model("resnet18", num_classes=0), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: theirs if pretrained else create)
    network = arch.build("resnet18")
    assert "left new 0" in initialise(network, "timm:resnet18")
    assert torch.equal(network.layer4[1].bn2.weight, theirs.layer4[1].bn2.weight)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = network.eval().pooled(x) if arch is sage.arch else network.eval()(x, pre_out=True)
        assert torch.allclose(ours, theirs.eval()(x), atol=1e-4)


def test_kscl_takes_one_start(tmp_path):
    with pytest.raises(UserError, match="--pretrained starts encoders, heads and queue, --init the backbone alone"):
        call("kscl.main_kscl", photographs(tmp_path / "p"), tmp_path / "o", *MOCO, "--pretrained", "a", "--init", "b")


# --- run_arms.sh -----------------------------------------------------------------------------------------------------

ARMS = {"hsa": "moco full", "kscl": "moco k5", "bingo": "alone_wide bingo_wide", "sage": "byol sage"}


@pytest.mark.parametrize("folder", ARMS)
def test_arms_on_photographs(folder, tmp_path):
    """What the scripts start, by a Python that only records it, and what they refuse before."""
    mine = photographs(tmp_path / "root dir" / "mine", classes=3)
    command = f"export DATA_ROOT={shlex.quote(str(mine.parent))} SET=mine ARMS='{ARMS[folder]}'; "
    command += f"bash {folder}/run_arms.sh small --img_size 64 --workers 3"
    calls = recorded_calls(command, tmp_path)
    for module, *flags in calls:
        args = importlib.import_module(module).get_parser().parse_args(flags)
        assert not getattr(args, "per_class", 0) and not getattr(args, "cache", False)
        assert getattr(args, "data_dir", mine) == mine
        if getattr(args, "seed", None) is not None and module != "bingo.compute_knn":  # of training
            assert (args.img_size, args.workers, args.aug_backend) == (64, 3, "batch")
        elif module == f"{folder}.main_knn":
            assert (args.img_size, args.aug_backend) == (None, "batch")
    names = [call[0] for call in calls]
    assert names.count(f"{folder}.main_knn") == 2 and f"{folder}.main_lincls" not in names
    assert names[-1] == f"{folder}.lab.arms"
    (mine / "val").mkdir()
    names = [call[0] for call in recorded_calls(command, tmp_path)]
    assert names.count(f"{folder}.main_lincls") == 2 == names.count(f"{folder}.main_knn")
    (mine / "stray.jpg").touch()  # by the rule of `training_folder` these are no class folders
    with pytest.raises(AssertionError, match="mine: arms are compared by labels; expected two class folders"):
        recorded_calls(command, tmp_path)
    with pytest.raises(AssertionError, match="root dir/nothing: no such folder; DATA_ROOT names the folder"):
        recorded_calls(command.replace("SET=mine", "SET=nothing"), tmp_path)


@pytest.mark.parametrize("folder", ARMS)
def test_the_table_of_arms_without_a_linear_probe(folder, tmp_path, capsys):
    arms = importlib.import_module(f"{folder}.lab.arms")
    for n, arm in enumerate(ARMS[folder].split()):
        (tmp_path / "mine" / arm / "seed0").mkdir(parents=True)
        (tmp_path / "mine" / arm / "seed0-knn").mkdir()
        result: dict[str, Any] = dict.fromkeys(
            ("knn", "knn10", "few_shot", "purity", "knn1", "knn20", "knn200", "bag_gap"), 30.0 + n
        )
        result = {**result, "protocol": "leave-one-out, each of the 60 images by all the others"}
        (tmp_path / "mine" / arm / "seed0-knn/result.json").write_text(json.dumps(result | {"overlap": 1.0}))
    (tmp_path / "mine" / arm / "seed1").mkdir()
    (tmp_path / "mine" / arm / "seed1-knn").mkdir()  # its probe is to come
    (tmp_path / "mine" / arm / "seed1-knn/result.json").write_text(json.dumps(result | {"protocol": "18 train"}))
    arms.main([str(tmp_path / "mine")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "30.00" in line or "31.00" in line]
    assert len(lines) == 2 and all("| 1 |" in line for line in lines)
