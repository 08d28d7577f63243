"""Class prototypes mu_c, eq. (3), and their refresh from labelled images mixed with unlabelled ones (2.6)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils.data import ImageList
from shared_utils.evaluation import subset
from shared_utils.neighbours import features
from sscl.calibration import log_similarity
from sscl.data import Mixed

KINDS = ("labelled", "mixture", "ema")


def class_means(z: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    """normalize(mean of the rows of each class); a class without rows keeps its old vector.

    Args:
        z: [N, D]; labels: [N] in 0..C-1; old: [C, D].

    Returns: [C, D] unit vectors, float32. Sums in float64, so the order of the rows does not matter.
    """
    sums = torch.zeros(old.shape, dtype=torch.float64, device=z.device).index_add_(0, labels, z.double())
    counts = torch.bincount(labels, minlength=len(old))
    means = F.normalize(sums / counts.clamp_min(1)[:, None], dim=1).float()
    return torch.where(counts[:, None] > 0, means, old)


def ema_step(mu: Tensor, z: Tensor, labels: Tensor, mask: Tensor, m: float = 0.99) -> Tensor:
    """`ema`: mu_c <- normalize(m mu_c + (1 - m) mean of the confident class-c keys of a batch).

    Args:
        mu: [C, D]; z: [N, D]; labels: [N]; mask: [N] bool, the confident rows. A class without any stays as it is.
    """
    z, labels = z[mask], labels[mask]
    sums = torch.zeros_like(mu).index_add_(0, labels, z.float())
    counts = torch.bincount(labels, minlength=len(mu))[:, None]
    moved = F.normalize(m * mu + (1 - m) * sums / counts.clamp_min(1), dim=1)
    return torch.where(counts > 0, moved, mu)


def nearest_to_classes(z: Tensor, mu: Tensor, tau_s: float, labelled: Tensor, count: int, chunk: int = 65536) -> Tensor:
    """For each class the `count` unlabelled images with the largest q(c) (fewer where there are fewer).

    `chunk` rows at a time go to the device of mu, with the best so far kept: q of ImageNet at once would be 5 GB.

    Args:
        z: unit embeddings [N, D] of all images; mu: [C, D]; labelled: [L] numbers of the images to leave out.

    Returns: image numbers [C, count], int64 on the CPU.
    """
    hidden = torch.zeros(len(z), dtype=torch.bool)
    hidden[labelled] = True
    count = min(count, len(z) - int(hidden.sum()))
    best = torch.full((len(mu), count), -torch.inf, device=mu.device)
    where = torch.zeros(best.shape, dtype=torch.long, device=mu.device)
    for start in range(0, len(z), chunk):
        log_q = log_similarity(z[start : start + chunk].to(mu.device), mu, tau_s).T  # [C, n]
        log_q = log_q.masked_fill(hidden[start : start + chunk].to(mu.device), -torch.inf)
        numbers = torch.arange(start, start + log_q.shape[1], device=mu.device).expand_as(log_q)
        best, order = torch.cat([best, log_q], 1).topk(count, dim=1)
        where = torch.cat([where, numbers], 1).gather(1, order)
    return where.cpu()


def refresh(
    embed: Callable[[Tensor], Tensor], images: ImageList, transform: Callable, labelled: Tensor, labels: Tensor,
    mu: Tensor, kind: str, num_nn: int, tau_s: float, key: tuple[int, ...], **loading: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    """mu_c of the labelled images alone, or for `mixture` of them and of their mixtures with the `num_nn` unlabelled
    images that lie nearest to mu_c.

    Args:
        embed: [B, 3, H, W] -> [B, D], the momentum encoder in eval mode. images: all of them, without labels; their own
            transform is deterministic. transform: of what is mixed. labelled: numbers [L], of the classes `labels` [L].
        loading: device, batch_size, workers and amp for `shared_utils.neighbours.features`.

    Returns: [C, D] on the device of `mu`, equal on every process, and the images of the smallest class's mean.
    """
    device = mu.device
    if kind == "mixture":
        z = features(embed, images, **loading)  # [N, D]
        own = z[labelled]
    else:
        few = subset(images, labelled.tolist())
        few.transform = images.transform
        own = features(embed, few, **loading)  # [L, D]
    mu = class_means(own.to(device), labels.to(device), mu)
    if kind == "mixture":
        chosen = nearest_to_classes(z, mu, tau_s, labelled, num_nn)  # [C, num_nn]
        if not chosen.shape[1]:  # every image is labelled: nothing to mix with
            return mu, int(torch.bincount(labels, minlength=len(mu)).min())
        mixed = Mixed(images, transform, chosen, labelled, labels, *key)
        blends = features(embed, mixed, **loading)  # [J, D]
        labels = torch.cat([labels, mixed.classes_of])
        mu = class_means(torch.cat([own, blends]).to(device), labels.to(device), mu)
    return mu, int(torch.bincount(labels, minlength=len(mu)).min())


def spread(mu: Tensor) -> float:
    """Mean cosine of different prototypes [C, D]: near 1 they have collapsed."""
    c = len(mu)
    return float(((mu @ mu.T).sum() - mu.square().sum()) / max(1, c * (c - 1)))
