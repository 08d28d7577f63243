"""Few-shot evaluation of flat: episodes, heads against scikit-learn and against loops, cached features, comparisons."""

import json
import math
import subprocess
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

from flat import data, save_features
from flat import test as flat_test
from flat.backbone import build
from flat.episodes import EpisodeDrawer, EpisodeSampler, hashed
from flat.methods import baselinefinetune as heads
from flat.methods.baselinetrain import DistLinear
from flat.test import accuracies, compare, interval
from shared_utils import UserError, checkpoint

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NAMES = [f"class{i}" for i in range(8)]


def labels(counts: list[int], seed: int = 0) -> Tensor:
    """Labels in a shuffled order, `counts` of each class."""
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]


def features(y: Tensor, d: int = 12, noise: float = 1.0, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(int(y.max()) + 1, d, generator=generator)
    return means[y] + noise * torch.randn(len(y), d, generator=generator)


def drawer(y: Tensor, shots: int = 5, seed: int = 0, ways: int = 5, queries: int = 15) -> EpisodeDrawer:
    return EpisodeDrawer(y, ways, shots, queries, seed, NAMES)


# --- episodes (8j) ---------------------------------------------------------------------------------------------------


def test_an_episode_holds_what_it_must() -> None:
    y = labels([20, 25, 30, 22, 28, 40, 21, 20])
    found = drawer(y).draw(np.arange(300))
    assert found.support.shape == (300, 5, 5) and found.query.shape == (300, 5, 15)
    everything = torch.cat([found.support, found.query], 2)
    for episode, classes in zip(everything, found.classes):
        assert len(set(classes.tolist())) == 5
        assert len(set(episode.flatten().tolist())) == 100  # supports and queries disjoint
    assert torch.equal(y[everything], found.classes[:, :, None].expand(-1, -1, 20))
    # each class, and each image of a class, equally often (chi-square, far tail)
    often = torch.bincount(found.classes.flatten(), minlength=8).double()
    assert float(((often - 187.5).square() / 187.5).sum()) < 25
    used = torch.bincount(found.support.flatten(), minlength=len(y))[y == 5].double()
    assert used.min() > 0 and float(((used - used.mean()).square() / used.mean()).sum()) < 80


def test_an_episode_depends_on_its_number_alone() -> None:
    y = labels([20] * 8)
    together, one = drawer(y).draw(np.arange(50)), drawer(y).draw(np.array([37]))
    assert torch.equal(together.support[37], one.support[0]) and torch.equal(together.query[37], one.query[0])
    chunked = torch.cat([e.support for _, e in drawer(y).chunks(50, 7)])
    assert torch.equal(chunked, together.support)
    other = drawer(y, seed=1).draw(np.arange(50))
    assert not torch.equal(other.support, together.support)
    assert drawer(y).digest(50) == drawer(y).digest(50) != drawer(y, seed=1).digest(50)
    assert hashed(0, np.arange(4)).dtype == np.uint64 and len(set(hashed(0, np.arange(10**5)).tolist())) == 10**5


def test_too_few_images_or_classes_are_one_line() -> None:
    with pytest.raises(UserError, match="class class2 has 19 images, an episode takes 5 shots \\+ 15 queries"):
        drawer(labels([20, 20, 19, 20, 20, 20, 20, 20]))
    with pytest.raises(UserError, match="9-way episodes need as many classes, the split has 8"):
        drawer(labels([20] * 8), ways=9)
    with pytest.raises(UserError, match="0 shots, 15 queries: each must be at least 1"):
        drawer(labels([20] * 8), shots=0)


def test_training_episodes_resume_inside_an_epoch() -> None:
    sampler = EpisodeSampler(drawer(labels([20] * 8)), 6)
    whole = list(sampler.at(2))
    assert len(whole) == 6 and len(whole[0]) == 100 and {e for e, _ in whole[0]} == {2}
    assert list(sampler.at(2, 4)) == whole[4:] and len(sampler) == 2
    assert list(sampler.at(3))[0] != whole[0]


def test_random_and_perfect_features() -> None:  # 8j
    y = labels([40] * 8)
    noise = torch.randn(len(y), 16, generator=torch.Generator().manual_seed(0))
    mean, half = interval(100 * accuracies(noise, drawer(y), "proto", 2000, CPU))
    assert abs(mean - 20) < 1.5 * half + 0.6  # the same images come again: a fixed bias of the draw
    perfect = F.one_hot(y, 8).float()
    for head in heads.HEADS:
        each = accuracies(perfect, drawer(y), head, 30, CPU)
        assert bool((each == 1).all()), head


def test_intervals() -> None:  # 8k
    assert interval(torch.full((50,), 0.4, dtype=torch.float64)) == (pytest.approx(0.4), pytest.approx(0, abs=1e-12))
    x = torch.rand(600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert interval(x) == (pytest.approx(x.mean()), pytest.approx(1.96 * np.std(x.numpy()) / math.sqrt(600)))


# --- heads (8l) ------------------------------------------------------------------------------------------------------


def episode(shots: int, count: int, d: int = 12, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    y = labels([30] * 8)
    x = features(y, d, noise)
    found = drawer(y, shots).draw(np.arange(count))
    return x[found.support], x[found.query]


@pytest.mark.parametrize("d", [12, 200])  # more and fewer dimensions than support images
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("head", ["proto", "lr", "ridge"])
def test_batched_heads_equal_scikit_learn(head: str, shots: int, d: int) -> None:
    support, query = episode(shots, 12, d)
    predicted = heads.predict(head, support, query, np.arange(12), 0)
    truth = np.repeat(np.arange(5), shots)
    different = 0
    for i in range(12):
        x, q = support[i].flatten(0, 1).double(), query[i].flatten(0, 1).double()
        if head == "proto":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its standard deviations, 0/0 for one shot, are not used
                expected = NearestCentroid().fit(x, truth).predict(q)
        elif head == "ridge":
            expected = RidgeClassifier(alpha=1.0).fit(x, truth).predict(q)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000)
                expected = model.fit(F.normalize(x, dim=1), truth).predict(F.normalize(q, dim=1))
        different += int((predicted[i].numpy() != expected).sum())
    assert different == 0


@pytest.mark.parametrize("dist", [False, True])
def test_batched_finetuning_equals_a_loop(dist: bool) -> None:
    """Each episode alone with torch's own layers and optimiser, the same weights and orders."""
    support, query = episode(5, 3, 6)
    numbers = np.array([4, 9, 2])
    y = torch.arange(5).repeat_interleave(5)
    batched = heads.finetune(support.flatten(1, 2), y, query.flatten(1, 2), numbers, 0, dist, epochs=12)
    start = heads.initial_weights(numbers, 5, 6, 0)
    assert start.abs().max() <= 1 / math.sqrt(6) and start.std() == pytest.approx(1 / math.sqrt(18), rel=0.15)
    for i, number in enumerate(numbers):
        x, q = support[i].flatten(0, 1), query[i].flatten(0, 1)
        model: nn.Module
        if dist:
            model = DistLinear(6, 5)
            model.L.weight_v.data = start[i, :, :-1].clone()
            model.L.weight_g.data = start[i, :, :-1].norm(dim=1, keepdim=True)
        else:
            model = nn.Linear(6, 5)
            model.weight.data, model.bias.data = start[i, :, :-1].clone(), start[i, :, -1].clone()
        sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, dampening=0.9, weight_decay=0.001)
        for epoch in range(12):
            order = np.argsort(hashed(0, np.array([number + (1 << 41)]), np.array(epoch), np.arange(25)))
            for first in range(0, 25, 4):
                chosen = torch.from_numpy(order[first : first + 4])
                sgd.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                sgd.step()
        torch.testing.assert_close(model(q).detach().double(), batched[i], rtol=1e-4, atol=1e-5)


def test_cosine_ignores_scale_and_prototypes_ignore_a_shift() -> None:  # 8l
    support, query = episode(5, 20)
    proto, cosine = (partial(heads.predict, head, numbers=np.arange(20), seed=0) for head in ("proto", "cosine"))
    scale = 0.1 + torch.rand(20, 5, 15, 1)
    assert torch.equal(cosine(support, query), cosine(3 * support, scale * query))
    shifted = proto(support + 2.5, query + 2.5)
    assert (proto(support, query) != shifted).float().mean() < 0.002
    assert not torch.equal(proto(support, query), proto(support, query + 2.5))
    assert not torch.equal(cosine(support, query), cosine(support + 2.5, query + 2.5))


@pytest.mark.parametrize("head", ["proto", "lr", "ridge"])
def test_classes_may_have_unequal_numbers_of_images(head: str) -> None:
    """Against scikit-learn, scores included where both have the same."""
    y = torch.tensor([0] * 2 + [1] * 7 + [2] * 4)
    x, q = features(y, 9, 1.5), features(torch.arange(3).repeat_interleave(10), 9, 1.5, seed=2)
    logits = heads.fit(head, x[None], y, q[None], np.zeros(1, np.int64), 0)[0]
    if head == "proto":
        means = torch.stack([x[y == way].mean(0) for way in range(3)])
        torch.testing.assert_close(logits, -torch.cdist(q, means).square(), rtol=1e-4, atol=1e-4)
    elif head == "ridge":
        expected = RidgeClassifier(alpha=1.0).fit(x.double(), y).decision_function(q.double())
        torch.testing.assert_close(logits, torch.from_numpy(expected))
    else:
        model = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(F.normalize(x, dim=1).double(), y)
        expected = torch.from_numpy(model.predict_proba(F.normalize(q, dim=1).double()))
        torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-5, atol=1e-5)


def test_ten_thousand_episodes_take_seconds() -> None:
    """Against a loop over episodes with scikit-learn; the two agree on every episode that the loop does."""
    y = labels([60] * 8)
    x = features(y, 64, 2.0)
    many = drawer(y)
    start = time.process_time()
    each = accuracies(x, many, "proto", 10_000, CPU)
    batched = time.process_time() - start
    truth, y_support = np.repeat(np.arange(5), 15), np.repeat(np.arange(5), 5)
    start = time.process_time()
    for number in range(60):
        found = many.draw(np.array([number]))
        model = NearestCentroid().fit(x[found.support[0].flatten()], y_support)
        right = (model.predict(x[found.query[0].flatten()]) == truth).mean()
        assert right == pytest.approx(float(each[number]), abs=1e-12)
    loop = (time.process_time() - start) * 10_000 / 60
    assert batched < 20 and loop > 2 * batched
    assert torch.equal(accuracies(x, many, "proto", 50, CPU, budget=1), each[:50])  # one episode at a time


# --- cached features and comparisons ---------------------------------------------------------------------------------


def write_features(path: Path, y: Tensor, x: Tensor, method: str = "baseline++") -> Path:
    checkpoint.save(path, {"features": x, "labels": y, "classes": NAMES, "count": len(x), "method": method,
                           "scores": {"novel_decoder_mse": 0.5}, "weights": "0123"})  # fmt: skip
    return path


def run_test(*words: object) -> int:
    return flat_test.main([*map(str, words), "--threads", "1"])


def test_the_evaluation_prints_and_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    y = labels([20] * 8)
    good, bad = features(y, noise=1.0), features(y, noise=3.0)
    one = write_features(tmp_path / "a" / "features.pt", y, good)
    two = write_features(tmp_path / "b" / "features.pt", y, bad)
    assert run_test("--features", two, "--episodes", 40, "--eval_head", "proto,ridge") == 0
    capsys.readouterr()
    words = ["--features", one, "--episodes", 40, "--compare", tmp_path / "b/episodes.pt"]
    assert run_test(*words) == 0
    said = capsys.readouterr().out
    assert "40 Test Acc = " in said and "(5-way 1-shot, finetune_cosine)" in said and "(5-way 5-shot, proto)" in said
    result = json.loads((tmp_path / "a/result.json").read_text())
    a, b = (checkpoint.load(tmp_path / name / "episodes.pt")["accuracies"]["5shot-proto"] for name in "ab")
    assert result["5shot-proto_difference"] == pytest.approx(100 * float((a - b).mean()))
    assert result["5shot-proto_difference_ci"] == pytest.approx(interval(100 * (a - b))[1])
    assert "5shot-ridge_difference" not in result and result["novel_decoder_mse"] == 0.5
    # pairing pays: the interval of the difference is below that of two independent means
    independent = math.hypot(interval(100 * a)[1], interval(100 * b)[1])
    assert result["5shot-proto_difference_ci"] < independent
    with pytest.raises(UserError, match="its episodes are others"):
        run_test("--features", one, "--episodes", 41, "--eval_head", "proto", "--compare", tmp_path / "b/episodes.pt")
    with pytest.raises(UserError, match="no head and number of shots in common"):
        compare({"accuracies": {}, "digests": {}}, {"accuracies": {}, "digests": {}}, "x")


@pytest.mark.parametrize("shots", [1, 5])
def test_augmented_supports_are_those_of_rfs(shots: int) -> None:
    """Every shot enters as its five augmented copies, the image itself does not; scikit-learn on each episode."""
    y = labels([20] * 8)
    x = features(y, 12, noise=2.0)
    copies = x[:, None] + torch.randn(len(x), 5, 12, generator=torch.Generator().manual_seed(3))
    many = EpisodeDrawer(y, 5, shots, 15, 0, NAMES)
    each = accuracies(x, many, "lr", 12, CPU, augmented=copies)
    found = many.draw(np.arange(12))
    for e in range(12):
        support = F.normalize(copies[found.support[e]].reshape(-1, 12), dim=1).numpy()
        truth = np.repeat(np.arange(5), 5 * shots)
        model = LogisticRegression(C=1.0, max_iter=2000, tol=1e-8).fit(support, truth)
        query = F.normalize(x[found.query[e]].reshape(-1, 12), dim=1).numpy()
        right = (model.predict(query) == np.repeat(np.arange(5), 15)).mean()
        assert right == pytest.approx(float(each[e]), abs=1e-12)
    assert not torch.equal(each, accuracies(x, many, "lr", 12, CPU))
    assert torch.equal(accuracies(x, many, "lr", 12, CPU, budget=1, augmented=copies), each)


@pytest.mark.parametrize("head", ["ridge", "lr"])
def test_large_supports_of_several_episodes_are_those_of_one_thread(head: str) -> None:
    """150 and 156 equations an episode, where torch 2.14.1's LU goes wrong after `torch.set_num_threads`."""
    y, shots = labels([60] * 8), 50 if head == "ridge" else 17
    x = features(y, 40, noise=2.0)
    many = EpisodeDrawer(y, 3, shots, 5, 0, NAMES)
    threads = torch.get_num_threads()
    found = {}
    try:
        for several in (1, 2):
            torch.set_num_threads(several)
            found[several] = accuracies(x, many, head, 6, CPU)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[2]) and 1 / 3 < float(found[2].mean()) < 1
    episodes = many.draw(np.arange(6))
    for e in range(6):  # and scikit-learn's
        support, query = (x[part[e]].reshape(-1, 40) for part in (episodes.support, episodes.query))
        truth, asked = np.repeat(np.arange(3), shots), np.repeat(np.arange(3), 5)
        if head == "lr":
            model: Any = LogisticRegression(C=1.0, max_iter=2000, tol=1e-8)
            support, query = F.normalize(support, dim=1), F.normalize(query, dim=1)
        else:
            model = RidgeClassifier(alpha=1.0)
        right = (model.fit(support.numpy(), truth).predict(query.numpy()) == asked).mean()
        assert right == pytest.approx(float(found[2][e]), abs=1e-12)


def test_recipe_rfs_is_tested_with_five_copies_and_logistic_regression(tmp_path: Path) -> None:
    y = labels([20] * 8)
    x = features(y, noise=2.0)
    copies = x[:, None] + torch.randn(len(x), 5, x.shape[1], generator=torch.Generator().manual_seed(3))
    file = write_features(tmp_path / "features.pt", y, x)
    checkpoint.save(file, checkpoint.load(file) | {"recipe": "rfs", "augmented": copies})
    found = []
    for words in ([], ["--aug_support", 2], ["--aug_support", 0]):
        assert run_test("--features", file, "--episodes", 20, *words) == 0
        found.append(json.loads((tmp_path / "result.json").read_text()))
    assert [r.get("aug_support") for r in found] == [5, 2, None]
    assert {k for k in found[0] if k.startswith("1shot") and not k.endswith("_ci")} == {"1shot-lr", "1shot-proto"}
    assert len({r["1shot-lr"] for r in found}) == 3
    with pytest.raises(UserError, match="--aug_support 6: .* holds 5 augmented copies"):
        run_test("--features", file, "--aug_support", 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval_head nosuch", "--eval_head nosuch: unknown; choose from finetune"),
        ("--n_shot 1,x", "--n_shot 1,x: must be whole numbers"),
        ("--episodes 0", "--episodes 0: must be at least 1"),
        ("--n_shot 6", "has 20 images, an episode takes 6 shots \\+ 15 queries"),
        ("--compare {tmp}/features.pt", "features.pt: not a file of flat.test"),
        ("--features {tmp}/none.pt", "none.pt: no such checkpoint file"),
    ],
)
def test_bad_input_is_one_line(words: str, message: str, tmp_path: Path) -> None:
    y = labels([20] * 8)
    file = write_features(tmp_path / "features.pt", y, features(y))
    with pytest.raises(UserError, match=message) as error:
        run_test("--features", file, *words.format(tmp=tmp_path).split())
    assert "\n" not in str(error.value)


def test_default_heads_follow_the_training_method(tmp_path: Path) -> None:
    y = labels([20] * 8)
    expected = {"baseline": "finetune", "baseline++": "finetune_cosine", "cosine": "finetune_cosine", "protonet": ""}
    for method, head in expected.items():
        file = write_features(tmp_path / method / "features.pt", y, features(y), method)
        assert run_test("--features", file, "--episodes", 3, "--n_shot", 1) == 0
        result = json.loads((tmp_path / method / "result.json").read_text())
        assert {k for k in result if k.startswith("1shot") and not k.endswith("_ci")} == {
            f"1shot-{name}" for name in (head, "proto") if name
        }


def test_a_closerlook_checkpoint_gives_features(tmp_path: Path, python: str) -> None:
    """Their Conv4 lists every layer twice (feature.trunk.0.C and feature.trunk.0.trunk.0) and brings a classifier."""
    torch.manual_seed(0)
    encoder = build("Conv4", 32).eval()
    for block in encoder.trunk[:4]:
        block.BN.running_mean.uniform_(-0.1, 0.1)
    state = {f"feature.{k}": v for k, v in encoder.state_dict().items()}
    twice = {k.replace(".C.", ".trunk.0.").replace(".BN.", ".trunk.1."): v for k, v in state.items()}
    state |= twice | {"classifier.weight": torch.zeros(200, 256), "classifier.bias": torch.zeros(200)}
    torch.save({"epoch": 399, "state": state}, tmp_path / "399.tar")
    command = [
        python,
        "-m",
        "flat.save_features",
        "--checkpoint",
        str(tmp_path / "399.tar"),
        "--model",
        "Conv4",
    ]
    command += ["--image_size", "32", "--dataset", "folder", "--data_dir", "data/mini/fewshot", "--workers", "0"]
    command += ["--threads", "1"]
    from shared_utils.lab import mini

    mini.ensure("fewshot", ROOT / "data/mini")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load(tmp_path / "features.pt")
    images = data.as_list(data.read_dataset("folder", ROOT / "data/mini/fewshot")["novel"])
    assert saved["count"] == len(images) == len(saved["features"]) and saved["classes"] == images.classes
    x = data.normalise(data.evaluation_pipeline(32)(images.image(7))[None], "imagenet")
    torch.testing.assert_close(saved["features"][7], encoder(x)[0].detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"399.tar, taken as ResNet18 for 32 pixels: the weights do not fit"):
        save_features.main([*command[3:5], "--model", "ResNet18", *command[7:]])


def test_the_episodes_of_a_seed_stay_the_same() -> None:
    """Recorded accuracies are of these."""
    found = EpisodeDrawer(torch.arange(24) % 4, 2, 1, 2, 0, list("abcd")).draw(np.arange(2))
    shots, queries, classes = (part.tolist() for part in found)
    assert shots == [[[16], [13]], [[0], [13]]] and classes == [[0, 1], [0, 1]]
    assert queries == [[[20, 4], [9, 1]], [[8, 20], [1, 21]]]
