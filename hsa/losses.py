"""The loss of one level: every positive competes with the queue alone, never with another positive.

    l(z, k) = -log exp(z.k / tau) / (exp(z.k / tau) + sum_j exp(z.n_j / tau)),   n_j: columns of the queue

Source: release main_moco.py and moco/builder.py; the multi-positive form is the abstract's.
"""

import torch
from torch import Tensor

from shared_utils.losses import negatives_lse, wide


def info_nce(z: Tensor, keys: Tensor, queue: Tensor, tau: float) -> Tensor:
    """l(z, k_p) of every query with each of its positives, each against the queue only.

    Args:
        z: queries [M, D]; keys: [M, P, D], constants; queue: [D, K].

    Returns: [M, P].
    """
    with torch.autocast(z.device.type, enabled=False):
        z = wide(z)
        pos = (z[:, None] * keys.detach().to(z.dtype)).sum(2) / tau  # [M, P]
        return torch.logaddexp(pos, negatives_lse(z, queue, tau)[:, None]) - pos


def multi_positive(z: Tensor, keys: Tensor, weights: Tensor, queue: Tensor, tau: float) -> Tensor:
    """Loss of each group of queries: the batch mean of sum_p w_p l(z, k_p); one pass over the queue for all groups.

    Args:
        z: queries [G, B, D]; keys: [B, P, D], the same positives for every group.
        weights: [G, B, P], or anything that expands to it; they sum to 1 over P.

    Returns: [G].
    """
    groups, batch, _ = z.shape
    each = info_nce(z.flatten(0, 1), keys.repeat(groups, 1, 1), queue, tau).view(groups, batch, -1)  # [G, B, P]
    return (each * weights.to(each)).sum(2).mean(1)


def group_weights(lam: tuple[float, float], mu: float | Tensor | None, batch: int, small: int = 0) -> Tensor:
    """Weights [G, B, 2] of the positives (k_q, k_p) for the groups query, neighbour, CutMix, small crops.

    Args:
        lam: (a, b), weight of a view's own key and of the other image's key.
        mu: share of the query's pixels in the CutMix view, one or [B]; None: there is no such view.
        small: further groups that weigh as the query does.
    """
    a, b = lam
    rows = [torch.tensor(pair, dtype=torch.float64).expand(batch, 2) for pair in ((a, b), (b, a))]
    if mu is not None:
        share = torch.as_tensor(mu, dtype=torch.float64).cpu().expand(batch)
        rows.append(torch.stack([share, 1 - share], 1))
    return torch.stack(rows + rows[:1] * small)


def release_loss(
    q: Tensor,
    p: Tensor,
    x: Tensor | None,
    k_q: Tensor,
    k_p: Tensor,
    queue: Tensor,
    tau: float,
    lam: tuple[float, float] = (0.5, 0.5),
    mu: float | Tensor = 1.0,
) -> Tensor:
    """The three groups of the release: query, neighbour and CutMix view against the keys of query and neighbour.

        1/3 { [a l(q,k_q) + b l(q,k_p)] + [b l(p,k_q) + a l(p,k_p)] + [mu l(x,k_q) + (1-mu) l(x,k_p)] }

    Args:
        q, p, x: unit queries [B, D]; x None leaves the third group out and halves the other two.
        k_q, k_p: unit keys [B, D]; queue: [D, K]; lam: (a, b), (1, 0) in the first epochs; mu: one, or [B].

    Returns: scalar.
    """
    z = torch.stack([q, p] if x is None else [q, p, x])  # [G, B, D]
    weights = group_weights(lam, None if x is None else mu, len(q))
    return multi_positive(z, torch.stack([k_q, k_p], 1), weights, queue, tau).mean()


@torch.no_grad()
def positive_rank(z: Tensor, key: Tensor, queue: Tensor, chunk: int = 8192) -> Tensor:
    """How many negatives are closer to the query than its positive, [B] (0: contrast accuracy at 1 counts it right).

    Args:
        z, key: [B, D]; queue: [D, K].
    """
    pos = (z * key).sum(1, keepdim=True)
    return sum((z @ n > pos).sum(1) for n in queue.split(chunk, 1))  # type: ignore[return-value]
