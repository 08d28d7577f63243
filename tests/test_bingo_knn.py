"""Nearest neighbours of bingo's students, and the scores of bags of neighbours; through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bingo import main_knn
from bingo.arch import build, mlp_head
from bingo.data import save_bags
from shared_utils import UserError, checkpoint
from shared_utils.augment import plain
from shared_utils.data import ImageList, image_folder
from shared_utils.lab import mini
from shared_utils.neighbours import neighbours

SMALL = "--img_size 32 --workers 0 --threads 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The mini images, fewer of them."""
    root, full = tmp_path_factory.mktemp("images"), mini.ensure("images")
    for split, count in (("train", 16), ("val", 8)):
        for folder in sorted((full / split).iterdir())[:6]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                (root / split / folder.name / file.name).write_bytes(file.read_bytes())
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A checkpoint as `bingo.main_moco` writes it, with batch-norm statistics of the data's scale."""
    torch.manual_seed(3)
    net = build("resnet10", 8, "cifar_pool")
    net.fc = mlp_head(net.num_features, 16, 32)
    with torch.no_grad():
        for _ in range(30):
            net(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("student") / "checkpoint.pth"
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    args = {"s_arch": "resnet10", "s_width": 8, "s_stem": "cifar_pool", "t_arch": "resnet18", "arch": None}
    checkpoint.save(path, {"state_dict": state, "args": args, "epoch": 1})
    return path


def stacked(images: ImageList) -> torch.Tensor:
    return torch.stack([images[i][0] for i in range(len(images))])


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def knn(data: Path, weights: object, out: Path, *extra: str) -> dict:
    flags = [*SMALL, "--data_dir", str(data), "--pretrained", str(weights), "--output-dir", str(out), *extra]
    assert main_knn.main([*flags, "--cache"]) == 0
    return result(out)


def embeddings(data: Path, weights: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    state = checkpoint.read_weights(weights)
    net = build("resnet10", 8, "cifar_pool")
    checkpoint.load_strict(net, state, drop=("fc.*",))
    images = image_folder(data / split, plain(32))
    with torch.no_grad():
        x = net.eval()(stacked(images), pre_out=True)
    return F.normalize(x, dim=1), images.labels


def test_knn_against_sklearn_and_bags(data, weights, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels = embeddings(data, weights, "train")
    queries, truth = embeddings(data, weights, "val")
    images = image_folder(data / "train")
    nearest = neighbours(bank, 5, torch.device("cpu"))
    save_bags(tmp_path / "own.npy", nearest.numpy(), images, "knn")
    found = knn(data, weights, tmp_path, "--bags", str(tmp_path / "own.npy"))

    def weigh(distance: np.ndarray) -> np.ndarray:  # euclidean of unit vectors -> exp(cosine / .07)
        return np.exp((1 - distance**2 / 2) / 0.07)

    reference = KNeighborsClassifier(20, weights=weigh).fit(bank, labels)
    assert abs(found["knn"] - 100 * reference.score(queries, truth)) < 1e-9
    pure = KNeighborsClassifier(6).fit(bank, labels).kneighbors(bank, return_distance=False)[:, 1:]
    assert abs(found["purity"] - 100 * (labels.numpy()[pure] == labels.numpy()[:, None]).mean()) < 0.5
    assert found["overlap"] == 100 and found["bag_gap"] > 0.01
    chance = 100 / 6
    assert chance < found["knn"] <= 100 and chance < found["few_shot"] <= 100

    rng = np.random.default_rng(0)
    save_bags(tmp_path / "random.npy", rng.integers(len(images), size=(96, 5)), images, "random")
    other = knn(data, weights, tmp_path / "r", "--bags", str(tmp_path / "random.npy"))
    assert abs(other["bag_gap"]) < found["bag_gap"] / 2 and other["overlap"] < 30
    assert {k: other[k] for k in ("knn", "knn10", "few_shot", "purity")} == {
        k: found[k] for k in ("knn", "knn10", "few_shot", "purity")
    }
    with pytest.raises(UserError, match="own.npy: holds int64"):
        knn(data, weights, tmp_path, "--bags", str(tmp_path / "own.npy"), "--per_class", "4")


def test_bag_scores_by_brute_force():
    z = F.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    s = (z @ z.T).double()
    off = ~torch.eye(30, dtype=torch.bool)
    groups = torch.arange(30) % 4
    same = (groups[:, None] == groups) & off
    assert main_knn.mean_cosine(z) == pytest.approx(float(s[off].mean()), abs=1e-6)
    found = main_knn.bag_scores(z, groups, None)
    assert found == {"bag_gap": pytest.approx(float(s[same].mean() - s[off].mean()), abs=1e-6)}
    bags = torch.stack([torch.randperm(30)[:3] for _ in range(30)])
    own = torch.stack([torch.randperm(30)[:3] for _ in range(30)])
    found = main_knn.bag_scores(z, bags, own)
    assert found["bag_gap"] == pytest.approx(float(s.gather(1, bags).mean() - s[off].mean()), abs=1e-6)
    share = np.mean([len(set(a) & set(b)) / 3 for a, b in zip(bags.tolist(), own.tolist())])
    assert found["overlap"] == pytest.approx(100 * share)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.count = max(self.count, out.numel())
        return out


def test_scores_of_bags_do_not_copy_the_features(monkeypatch):
    monkeypatch.setattr(main_knn, "CHUNK", 64)
    z = F.normalize(torch.randn(1000, 24), dim=1)
    with Largest() as largest:
        main_knn.mean_cosine(z)
        main_knn.bag_scores(z, torch.randint(1000, (1000, 3)), None)
        main_knn.bag_scores(z, torch.arange(1000) % 5, None)
    assert 64 * 24 <= largest.count <= 3000  # a chunk; the bags themselves


def test_random_weights_have_a_number_too(data, tmp_path):
    found = knn(data, "none", tmp_path, "--arch", "resnet10", "--width", "4", "--stem", "cifar_pool")
    assert 0 <= found["knn"] <= 100 and found["pretrained"] == "none" and "bag_gap" not in found
