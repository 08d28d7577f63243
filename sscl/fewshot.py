"""Classifiers on frozen features: logistic regression, nearest class mean, and few-shot episodes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError
from shared_utils.data import mix_key
from shared_utils.neighbours import draw_shots


def logistic(x: Tensor, y: Tensor, classes: int, l2: float = 1e-3, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS, from zero: weight [C, F] and bias [C].

    Minimises the mean cross entropy + l2 / 2 |weight|^2, in the dtype of x. Args: x: features [N, F]; y: classes [N].
    """
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def nearest_mean(x: Tensor, y: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Class [Q] whose mean of the rows of x [N, F] is nearest (Euclidean) to each query [Q, F]."""
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, y, x)
    means = sums / torch.bincount(y, minlength=classes).clamp_min(1)[:, None].to(x.dtype)
    return torch.cdist(queries, means).argmin(1)


def k_shot(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, shots: int, draws: int = 5, l2: float = 1e-2
) -> dict[str, tuple[float, float]]:
    """Protocol (a): `shots` labelled images of each class, mean and standard deviation over `draws` random subsets.

    Args: train [N, F], test [M, F]: unit features; labels [N], truth [M]. Returns {"lr", "ncm"}: top-1 in per cent.
    """
    classes = int(labels.max()) + 1
    scores: dict[str, list[float]] = {"lr": [], "ncm": []}
    for draw in range(draws):
        rows = draw_shots(labels, shots, draw)
        x, y = train[rows], labels[rows]
        weight, bias = logistic(x.double(), y, classes, l2)
        for name, guess in (
            ("lr", (test.double() @ weight.T + bias).argmax(1)),
            ("ncm", nearest_mean(x, y, test, classes)),
        ):
            scores[name].append(100 * float((guess == truth).double().mean()))
    return {name: (float(np.mean(v)), float(np.std(v, ddof=1)) if draws > 1 else 0.0) for name, v in scores.items()}


def episodes(
    feats: Tensor, labels: Tensor, way: int, shots: int, queries: int = 15, count: int = 600, seed: int = 0
) -> tuple[float, float]:
    """Protocol (b): nearest centroid in `count` episodes of held-out classes; mean and 95 % half interval, per cent.

    Args: feats: unit features [N, F]; labels: [N]. UserError: too few classes or images.
    """
    members = [torch.nonzero(labels == c).flatten() for c in labels.unique().tolist()]
    smallest = min(len(rows) for rows in members)
    if len(members) < way or smallest < shots + queries:
        raise UserError(
            f"{way}-way {shots}-shot episodes with {queries} queries: there are {len(members)} classes, the smallest "
            f"of {smallest} images"
        )
    rng = np.random.Generator(np.random.PCG64(mix_key(seed, way, shots)))
    scores = np.empty(count)
    for e in range(count):
        classes = rng.choice(len(members), way, replace=False)
        rows = torch.stack([members[c][rng.choice(len(members[c]), shots + queries, replace=False)] for c in classes])
        x = feats[rows]  # [way, shots + queries, F]
        centroids = F.normalize(x[:, :shots].mean(1), dim=1)
        guess = (x[:, shots:] @ centroids.T).argmax(2)  # [way, queries]
        scores[e] = float((guess == torch.arange(way)[:, None]).double().mean())
    return 100 * float(scores.mean()), 100 * 1.96 * float(scores.std()) / math.sqrt(count)
