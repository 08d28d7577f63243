"""The contrastive losses of BINGO (paper 2107.01691): every positive against a queue of negatives, never materialised.

One positive k of an embedding z costs l(z, k) = -log( exp(z.k/tau) / (exp(z.k/tau) + sum_j exp(z.n_j/tau)) ): positives
do not compete with each other. The sum over the queue is the same for all positives of z, so it is computed once.
"""

import torch
from torch import Tensor

from shared_utils.losses import negatives_lse, wide


def info_nce(z: Tensor, keys: Tensor, queue: Tensor, tau: float) -> Tensor:
    """l(z, k_p) for each embedding and each of its positives.

    Args:
        z: [M, D] normalised; keys: [M, P, D] normalised, constants; queue: [D, K].

    Returns: [M, P]; equal to the cross entropy of [positive, negatives] / tau with the positive as the label.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = wide(z)
        positive = torch.einsum("md,mpd->mp", z, keys.to(z.dtype)) / tau
        gap = negatives_lse(z, queue, tau)[:, None] - positive
        return torch.logaddexp(gap, torch.zeros_like(gap))


def release_groups(
    q: Tensor, p: Tensor, x: Tensor | None, k_q: Tensor, k_p: Tensor, queue: Tensor, tau: float,
    lam: tuple[float, float], mu: float | Tensor,
) -> Tensor:  # fmt: skip
    """The groups of the release's loss (release main_moco.py), each the batch mean, [3], or [2] without a mixed view.

    Args:
        q, p, x: [N, D] student embeddings of the anchor, of the bag member, of their CutMix (or None).
        k_q, k_p: [N, D] teacher embeddings of the anchor and of the bag member.
        lam: (own, cross) = (alpha, beta); mu: share of the anchor's pixels in the mixed view, one or [N].
    """
    own, cross = lam
    views = [q, p] if x is None else [q, p, x]
    pairs = [(own, cross), (cross, own), (mu, 1 - mu)][: len(views)]
    weights = torch.stack(  # [V, N, 2]
        [torch.stack([torch.as_tensor(w, dtype=torch.float64).cpu().expand(len(q)) for w in pair], 1) for pair in pairs]
    )
    keys = torch.stack([k_q, k_p], 1).repeat(len(views), 1, 1)  # [V*N, 2, D]
    per_positive = info_nce(torch.cat(views), keys, queue, tau).view(len(views), -1, 2)  # [V, N, 2]
    return (per_positive * weights.to(per_positive)).sum(2).mean(1)


def release_loss(
    q: Tensor, p: Tensor, x: Tensor | None, k_q: Tensor, k_p: Tensor, queue: Tensor, tau: float,
    lam: tuple[float, float], mu: float | Tensor,
) -> Tensor:  # fmt: skip
    """Mean of `release_groups`, a scalar."""
    return release_groups(q, p, x, k_q, k_p, queue, tau, lam, mu).mean()


def paper_loss(q: Tensor, p: Tensor, k_q: Tensor, queue: Tensor, tau: float) -> Tensor:
    """L_intra + L_inter of the paper: anchor and bag member both against the teacher's embedding of the anchor."""
    return info_nce(torch.cat([q, p]), k_q.repeat(2, 1)[:, None], queue, tau).view(2, -1).mean(1).sum()


def loss_weights(epoch: int, warmup_epochs: int, lam: tuple[float, float]) -> tuple[float, float]:
    """(own, cross) of the first two groups: no cross terms in the first `warmup_epochs` (the release's epoch > 10)."""
    return lam if epoch >= warmup_epochs else (1.0, 0.0)


@torch.no_grad()
def contrast_rank(z: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """How many negatives are nearer to z [N, D] than its key k [N, D], [N]; 0 counts for the release's Acc@1."""
    return (z.float() @ queue > (z.float() * k).sum(1, keepdim=True)).sum(1)
