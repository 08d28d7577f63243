"""Evaluations of sscl: class head, pseudo-labels, frozen features, few-shot, fine-tuning."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shared_utils import UserError, checkpoint, evaluation
from shared_utils.lab import mini
from sscl import eval_cls, eval_features, finetune
from sscl.arch import Encoder, build
from sscl.data import label_split, training_images
from sscl.eval_cls import pseudo_scores
from sscl.fewshot import episodes, k_shot, logistic, nearest_mean
from sscl.lab import export
from tests.sscl_images import train, write_images

LOADING = ["--workers", "0", "--threads", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run of four epochs."""
    out = tmp_path_factory.mktemp("run")
    train(data, out, "--epochs", "4")
    return out / "checkpoint.pth"


def evaluated(module, out: Path, *flags: str) -> dict:
    assert module.main([*flags, *LOADING, "--output-dir", str(out)]) == 0
    return json.loads((out / "result.json").read_text())


def by_hand(run: Path, data: Path, copy: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, embeddings and labels of all training images by one copy of the encoder."""
    from shared_utils.augment import plain

    encoder = Encoder(build("resnet10", 4, "cifar_pool"), 3, 8)
    state = checkpoint.load(run)["state_dict"]
    encoder.load_state_dict({k.removeprefix(f"{copy}."): v for k, v in state.items() if k.startswith(f"{copy}.")})
    images = training_images(data)
    x = torch.stack([plain(16)(images.image(i)) for i in range(len(images))])
    with torch.no_grad():
        logits, z = encoder.eval()(x)
    return logits, z, images.labels


def test_class_head_and_pseudo_labels(run, data, tmp_path):
    flags = ["--pretrained", str(run), "--data_dir", str(data), "--val_dir", str(data / "train"), "--batch_size", "7"]
    result = evaluated(eval_cls, tmp_path, *flags, "--pseudo", "--eval_calibrated")
    logits, _, truth = by_hand(run, data, "encoder_q")
    ema, z, _ = by_hand(run, data, "encoder_k")
    for name, out in (("top1", logits), ("ema_top1", ema)):
        assert result[name] == pytest.approx(100 * float((out.argmax(1) == truth).double().mean()))
    assert result["top5"] == 100 and result["unlabelled"] == 36 and result["minutes"] >= 0
    # pseudo-labels of the 36 images without labels: p, p / pbar, p / pbar * q
    state = checkpoint.load(run)["state_dict"]
    rest = [i for i in range(48) if i not in label_split(truth, 4, 0)]
    p = logits.softmax(1)
    aligned = p / state["alignment.pbar"]
    q = (z @ state["prototypes"].T / 0.1).softmax(1)
    for name, d in (("raw", p), ("aligned", aligned), ("calib", aligned * q)):
        d = (d / d.sum(1, keepdim=True))[rest]
        right = d.argmax(1) == truth[rest]
        most = d.max(1).values.argsort(descending=True)[:18]
        assert result[f"{name}@100"] == pytest.approx(100 * float(right.double().mean()), abs=1e-4)
        assert result[f"{name}@50"] == pytest.approx(100 * float(right[most].double().mean()), abs=1e-4)
    right = (p * q).argmax(1) == truth
    assert result["calibrated_top1"] == pytest.approx(100 * float(right.double().mean()), abs=1e-4)


def test_a_prior_is_evaluated_as_one(data, tmp_path):
    train(data, tmp_path / "run", "--calib", "prior", "--epochs", "1")
    saved = checkpoint.load(tmp_path / "run/checkpoint.pth")
    saved["state_dict"]["alignment.qbar"] = torch.tensor([1e-30, 1.0, 1e-30])
    checkpoint.save(tmp_path / "run/checkpoint.pth", saved)
    flags = ["--pretrained", str(tmp_path / "run/checkpoint.pth"), "--data_dir", str(data), "--pseudo"]
    result = evaluated(eval_cls, tmp_path / "cls", *flags, "--eval_calibrated")
    for name in ("calib@100", "calibrated_top1"):
        assert result[name] == pytest.approx(100 / 3, rel=1e-4)  # all of them class 1


def no_passes(monkeypatch) -> None:
    """What is refused is refused before any image goes through the networks."""
    monkeypatch.setattr(eval_cls.Predictor, "__call__", lambda *_: pytest.fail("images were evaluated"))


def test_other_labelled_images_than_in_training_are_refused(run, data, tmp_path, monkeypatch):
    no_passes(monkeypatch)
    saved = checkpoint.load(run)
    saved["args"]["split"] = 1
    checkpoint.save(tmp_path / "other.pth", saved)
    flags = ["--pretrained", str(tmp_path / "other.pth"), "--data_dir", str(data), "--pseudo"]
    with pytest.raises(UserError, match="choose other labelled images here"):
        evaluated(eval_cls, tmp_path / "cls", *flags)


def test_a_list_of_labelled_images_that_has_moved(data, tmp_path, monkeypatch):
    """It is named, and may be given; another list is refused by its hash."""
    names = [f"class{c}/{18 * c + i:02d}.png" for c in range(3) for i in (1, 5)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    train(
        data, tmp_path / "run", "--labels_per_class", "0", "--split_file", str(tmp_path / "list.txt"), "--epochs", "1"
    )
    (tmp_path / "list.txt").rename(tmp_path / "moved.txt")
    flags = ["--pretrained", str(tmp_path / "run/checkpoint.pth"), "--data_dir", str(data), "--pseudo"]
    result = evaluated(eval_cls, tmp_path / "cls", *flags, "--split_file", str(tmp_path / "moved.txt"))
    assert result["unlabelled"] == 42
    no_passes(monkeypatch)
    with pytest.raises(
        UserError, match="list.txt: the run's list of labelled images is not there; give it as --split_f"
    ):
        evaluated(eval_cls, tmp_path / "cls", *flags)
    (tmp_path / "other.txt").write_text("\n".join([*names[:-1], "class2/38.png"]))
    with pytest.raises(UserError, match="choose other labelled images here"):
        evaluated(eval_cls, tmp_path / "cls", *flags, "--split_file", str(tmp_path / "other.txt"))
    drawn = ["--pretrained", str(tmp_path / "drawn/checkpoint.pth"), *flags[2:]]
    train(data, tmp_path / "drawn", "--epochs", "1")
    with pytest.raises(UserError, match="--split_file: the run had no list"):
        evaluated(eval_cls, tmp_path / "cls", *drawn, "--split_file", str(tmp_path / "moved.txt"))


def test_logits_that_do_not_fit_into_memory_are_refused(run, data, tmp_path, monkeypatch):
    no_passes(monkeypatch)
    flags = ["--pretrained", str(run), "--data_dir", str(data), "--pseudo"]
    monkeypatch.setattr(evaluation, "available_memory", lambda: 4 * 2 * (6 * 14 + 48 * 26) - 1)
    with pytest.raises(UserError, match="features of 48 images, 26 values each, .*; leave --pseudo out"):
        evaluated(eval_cls, tmp_path / "cls", *flags)


def test_a_run_without_labels_has_no_calibration(data, tmp_path, monkeypatch):
    train(data, tmp_path / "moco", "--no_labels", "--lambda_u", "0", "--calib", "none", "--epochs", "1")
    flags = ["--pretrained", str(tmp_path / "moco/checkpoint.pth"), "--data_dir", str(data)]
    result = evaluated(eval_cls, tmp_path / "cls", *flags, "--pseudo")
    assert result["unlabelled"] == 48 and "raw@50" in result and "calib@50" not in result
    no_passes(monkeypatch)
    with pytest.raises(UserError, match="--eval_calibrated: .* was trained without prototypes"):
        evaluated(eval_cls, tmp_path / "extra", *flags, "--eval_calibrated")


def test_scores_at_equal_coverage():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
    scores = pseudo_scores({"raw": p, "calib": p.flip(1)}, torch.tensor([0, 1, 1, 0, 0]))
    assert (scores["raw@20"], scores["raw@100"], scores["calib@20"]) == pytest.approx((100, 80, 0))


def test_features(run, data, tmp_path):
    novel = data / "val"
    flags = ["--pretrained", str(run), "--data_dir", str(data), "--img_size", "16"]
    result = evaluated(
        eval_features, tmp_path / "a", *flags, "--shots", "1,5", "--draws", "2", "--copy", "momentum"
    )  # fmt: skip
    assert {"knn", "purity", "linear", "1shot_lr", "5shot_ncm", "5shot_lr_std"} <= set(result)
    # noisy images of three colours: a linear probe and nearest neighbours tell them apart
    assert result["linear"] > 60 and result["knn"] > 60 and result["purity"] > 50
    with pytest.raises(UserError, match="5-way 1-shot episodes with 15 queries: there are 3 classes"):
        evaluated(eval_features, tmp_path / "b", *flags, "--protocols", "episodes", "--novel_dir", str(novel))
    with pytest.raises(UserError, match="--protocols episodes needs --novel_dir"):
        evaluated(eval_features, tmp_path / "b", *flags, "--protocols", "episodes")


def test_episodes_on_the_mini_classes(run, tmp_path, monkeypatch):
    novel = mini.ensure("fewshot") / "test"
    flags = ["--pretrained", str(run), "--data_dir", str(mini.ensure("images")), "--img_size", "16", "--per_class", "2"]
    flags += ["--episodes", "20", "--protocols", "episodes", "--novel_dir", str(novel)]
    result = evaluated(eval_features, tmp_path, *flags)
    assert 0 < result["5way_1shot"] < 100 and result["5way_5shot_ci"] > 0 and "knn" not in result


def blobs(n: int, classes: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.eye(classes, 8)
    y = torch.arange(classes).repeat_interleave(n)
    return F.normalize(centres[y] + spread * torch.randn(len(y), 8, generator=g), dim=1), y


def test_logistic_regression_is_at_its_minimum():
    x, y = blobs(10, 4, 0.5)
    weight, bias = logistic(x.double(), y, 4, 1e-2)
    weight.requires_grad_()
    bias.requires_grad_()
    (F.cross_entropy(x.double() @ weight.T + bias, y) + 0.5e-2 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-4 and float(bias.grad.abs().max()) < 1e-4
    from sklearn.linear_model import LogisticRegression

    other = LogisticRegression(C=1 / (1e-2 * len(y)), tol=1e-8, max_iter=1000).fit(x.double().numpy(), y.numpy())
    torch.testing.assert_close(
        (weight - weight.mean(0)).detach(), torch.from_numpy(other.coef_ - other.coef_.mean(0)), atol=1e-3, rtol=1e-3
    )


def test_few_shot_classifiers():
    x, y = blobs(20, 5, 0.05)
    test, truth = blobs(10, 5, 0.05, seed=1)
    assert torch.equal(nearest_mean(x, y, test, 5), truth)
    scores = k_shot(x, y, test, truth, 1, draws=3)
    assert scores["lr"][0] == scores["ncm"][0] == 100 and scores["lr"][1] == 0
    noisy, _ = blobs(20, 5, 0.6)
    hard, _ = blobs(10, 5, 0.6, seed=1)
    one, ten = (k_shot(noisy, y, hard, truth, k) for k in (1, 10))
    assert ten["lr"][0] > one["lr"][0] + 5 and ten["ncm"][0] > one["ncm"][0] + 5 and one["ncm"][1] > 0


def test_episodes_of_separable_and_of_random_features():
    x, y = blobs(20, 6, 0.02)
    assert episodes(x, y, 5, 1, count=20) == (100.0, 0.0)
    y = torch.arange(6).repeat_interleave(200)
    noise = F.normalize(torch.randn(1200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    mean, half = episodes(noise, y, 5, 5, count=200)
    assert abs(mean - 20) < 3 and 0.3 < half < 2
    assert episodes(noise, y, 5, 5, count=200) == (mean, half) != episodes(noise, y, 5, 5, count=200, seed=1)
    assert math.isclose(episodes(noise, y, 5, 1, count=1)[1], 0)


def test_finetuning(run, data, tmp_path):
    flags = ["--pretrained", str(run), "--data_dir", str(data), "--img_size", "16", "--labels_per_class", "4"]
    flags += ["--weak", "shift", "--epochs", "12", "--drops", "8,10", "--log-every", "1", "--lr", "0.01"]
    result = evaluated(finetune, tmp_path, *flags)
    assert result["labelled"] == 12 and result["top1"] > 33
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.2 and log[0]["loss"] == pytest.approx(math.log(3), abs=0.1)
    assert [round(row["lr"], 6) for row in log[7:]] == [0.1, 0.01, 0.01, 0.001, 0.001]
    frozen = evaluated(finetune, tmp_path / "frozen", *flags, "--epochs", "1", "--lr", "0")
    state = checkpoint.load(tmp_path / "frozen/checkpoint.pth")["state_dict"]
    source = checkpoint.load(run)["state_dict"]
    assert torch.equal(state["0.conv1.weight"], source["encoder_q.backbone.conv1.weight"]) and frozen["top5"] == 100


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (eval_cls, "--batch_size 0", "--batch_size 0: must be at least 1"),
        (eval_cls, "--arch resnet18", "taken as resnet18, width 4, stem cifar_pool: the weights do not fit"),
        (eval_cls, "--pretrained none", "none: no such checkpoint file"),
        (eval_features, "--protocols magic", "--protocols magic: unknown; choose from knn, linear"),
        (eval_features, "--shots one", "--shots one: must be whole numbers"),
        (eval_features, "--draws 0", "must be at least 1"),
        (eval_features, "--l2 -1", "--l2 -1: must not be negative"),
        (finetune, "--drops x", "--drops x: must be epochs such as 30,40"),
        (finetune, "--epochs 0", "--epochs 0: must be at least 1"),
        (finetune, "--labels_per_class -1", "--labels_per_class -1: must not be negative"),
        (finetune, "--wd -1", "--wd -1: must not be negative"),
        (finetune, "--momentum -1", "--momentum -1: must not be negative"),
        (finetune, "--min_scale -1", "--min_scale -1.0: must lie above 0"),
        (finetune, "--split_file some.txt", "--labels_per_class and --split_file exclude each other"),
        (finetune, "--lr_head 0", "--lr_head must be above 0"),
        (finetune, "--batch_size 1", "fewer than two of the 12 labelled images"),
        (finetune, "--labels_per_class 17", "--labels_per_class 17: class number 0 has 16 images"),
    ],
)
def test_bad_flags_are_one_line(module, flags, message, run, data, tmp_path):
    words = ["--pretrained", str(run), "--data_dir", str(data), "--img_size", "16"]
    if module is finetune:
        words += ["--labels_per_class", "4"]
    with pytest.raises(UserError, match=message) as error:
        evaluated(module, tmp_path, *words, *flags.split())
    assert "\n" not in str(error.value) and not (tmp_path / "result.json").exists()


def test_a_checkpoint_without_a_momentum_copy_is_refused(data, tmp_path):
    encoder = Encoder(build("resnet10", 4, "cifar_pool"), 3, 8)
    state = {f"encoder_q.{k}": v for k, v in encoder.state_dict().items()}
    flags = {"arch": "resnet10", "width": 4, "stem": "cifar_pool", "dim": 8, "img_size": 16}
    checkpoint.save(tmp_path / "other.pth", {"state_dict": state, "args": flags})
    with pytest.raises(UserError, match="holds no momentum copy with a class head"):
        evaluated(eval_cls, tmp_path / "a", "--pretrained", str(tmp_path / "other.pth"), "--data_dir", str(data))


@pytest.mark.parametrize("copy", ["query", "momentum"])
def test_export(copy, run, tmp_path):
    from safetensors.torch import load_file

    flags = ["--pretrained", str(run), "--copy", copy]
    assert export.main([*flags, "--out", str(tmp_path / "a.safetensors")]) == 0
    assert export.main([*flags, "--format", "torchvision", "--out", str(tmp_path / "a.pth")]) == 0
    source = checkpoint.load(run)["state_dict"]
    for state in (load_file(tmp_path / "a.safetensors"), checkpoint.load(tmp_path / "a.pth")):
        network = build("resnet10", 4, "cifar_pool")
        network.load_state_dict(state)
        assert torch.equal(state["conv1.weight"], source[f"encoder_{copy[0].replace('m', 'k')}.backbone.conv1.weight"])
    card = (tmp_path / "a.md").read_text()
    assert "sscl.arch.build('resnet10', 4, 'cifar_pool')" in card and "`--labels-per-class 4`" in card
    with pytest.raises(UserError, match="there is nothing to export"):
        export.main(["--pretrained", "none", "--out", str(tmp_path / "b.safetensors")])
