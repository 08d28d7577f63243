"""Heads for frozen features, fitted on the support of many episodes at once by batched linear algebra.

Each takes support [E, W, S, D] and queries [E, W, Q, D] and gives predicted ways [E, W * Q]; E episodes, W ways.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flat.episodes import hashed

HEADS = ("finetune", "finetune_cosine", "proto", "proto_l2", "cosine", "lr", "ridge")


def proto(support: Tensor, query: Tensor) -> Tensor:
    """Nearest class mean by Euclidean distance (equal to scikit-learn's NearestCentroid)."""
    means = support.mean(2)  # [E, W, D]
    q = query.flatten(1, 2)  # [E, WQ, D]
    scores = torch.baddbmm(-0.5 * means.square().sum(2)[:, None], q, means.transpose(1, 2))  # |q|^2 is common
    return scores.argmax(2)


def cosine(support: Tensor, query: Tensor) -> Tensor:
    """Largest cosine to the mean of the normalised support."""
    means = F.normalize(F.normalize(support, dim=3).mean(2), dim=2)
    return torch.bmm(F.normalize(query, dim=3).flatten(1, 2), means.transpose(1, 2)).argmax(2)


def one_hot(ways: int, shots: int, like: Tensor) -> Tensor:
    """[W * S, W]."""
    return torch.eye(ways, dtype=like.dtype, device=like.device).repeat_interleave(shots, 0)


def ridge(support: Tensor, query: Tensor, alpha: float = 1.0) -> Tensor:
    """Least squares onto -1 and 1 with an intercept and alpha |w|^2, solved in the span of the support (float64)."""
    ways, shots = support.shape[1:3]
    x, q = support.flatten(1, 2).double(), query.flatten(1, 2).double()
    y = 2 * one_hot(ways, shots, x) - 1  # [WS, W]
    middle = x.mean(1, keepdim=True)
    x, q = x - middle, q - middle
    gram = torch.bmm(x, x.transpose(1, 2))  # [E, WS, WS]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    dual = torch.linalg.solve(gram + alpha * eye, (y - y.mean(0)).expand(len(x), -1, -1))  # [E, WS, W]
    return (torch.bmm(torch.bmm(q, x.transpose(1, 2)), dual) + y.mean(0)).argmax(2)


def logistic(support: Tensor, query: Tensor, c: float = 1.0) -> Tensor:
    """Multinomial logistic regression on L2-normalised features, c = 1, intercept free (rfs), by Newton's method.

    |w|^2 / 2 + c sum of cross-entropies has its minimum in the span of the support, so the features enter through the
    square root of their Gram matrix: WS coordinates instead of D, and an exact Newton step for every episode at once.
    """
    ways, shots = support.shape[1:3]
    x = F.normalize(support, dim=3).flatten(1, 2).double()  # [E, n, D]
    q = F.normalize(query, dim=3).flatten(1, 2).double()
    n = x.shape[1]
    values, vectors = torch.linalg.eigh(torch.bmm(x, x.transpose(1, 2)))
    keep = values > 1e-10 * values[:, -1:]
    roots = torch.where(keep, values, 1.0).sqrt()
    basis = torch.where(keep[:, None], vectors / roots[:, None], 0.0)  # [E, n, n]
    z = torch.where(keep[:, None], vectors * roots[:, None], 0.0)  # [E, n, n] coordinates of the support
    z = torch.cat([z, torch.ones_like(z[:, :, :1])], 2)  # and the intercept: [E, n, m]
    m = n + 1
    y = one_hot(ways, shots, x)  # [n, W]
    penalty = torch.ones(m, dtype=x.dtype, device=x.device)
    penalty[-1] = 0
    # The mean of the intercepts moves no probability; holding it at 0 makes the Hessian regular.
    hold = torch.zeros(m, m, dtype=x.dtype, device=x.device)
    hold[-1, -1] = 1
    regular = torch.kron(torch.eye(ways, dtype=x.dtype, device=x.device), torch.diag(penalty))
    regular = regular + torch.kron(torch.ones(ways, ways, dtype=x.dtype, device=x.device), hold)  # [Wm, Wm]
    w = torch.zeros(len(x), ways, m, dtype=x.dtype, device=x.device)
    for _ in range(50):
        p = torch.bmm(z, w.transpose(1, 2)).softmax(2)  # [E, n, W]
        gradient = c * torch.bmm((p - y).transpose(1, 2), z) + penalty * w  # [E, W, m]
        gradient[:, :, -1] += w[:, :, -1].sum(1, keepdim=True)
        if float(gradient.abs().max()) < 1e-9:
            break
        curve = torch.diag_embed(p) - p[:, :, :, None] * p[:, :, None]  # [E, n, W, W]
        hessian = c * torch.einsum("enab,eni,enj->eaibj", curve, z, z).flatten(3, 4).flatten(1, 2) + regular
        w = w - torch.linalg.solve(hessian, gradient.flatten(1)).view_as(w)
    else:
        raise RuntimeError("logistic regression did not converge in 50 Newton steps")
    coordinates = torch.bmm(torch.bmm(q, x.transpose(1, 2)), basis)  # [E, WQ, n]
    return (torch.bmm(coordinates, w[:, :, :-1].transpose(1, 2)) + w[:, None, :, -1]).argmax(2)


def initial_weights(numbers: np.ndarray, ways: int, c: int, seed: int) -> Tensor:
    """torch's initial Linear(c, ways) of each episode: [E, ways, c + 1] uniform in +- 1/sqrt(c), the bias last."""
    draws = hashed(seed, numbers[:, None] + (1 << 40), np.arange(ways * (c + 1)))  # [E, ways (c + 1)]
    unit = torch.from_numpy((draws >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    return ((2 * unit - 1) / math.sqrt(c)).float().view(len(numbers), ways, c + 1)


@torch.no_grad()
def finetune(
    support: Tensor, query: Tensor, numbers: np.ndarray, seed: int, dist: bool = False, epochs: int = 100
) -> Tensor:
    """CloserLookFewShot's test-time training: a new head per episode, SGD of lr .01, momentum and dampening .9, weight
    decay .001, `epochs` times over the support in mini-batches of 4.

    Every step moves a weight by multiples of itself, of its start and of support features, so that W = c W_0 + A^T X
    throughout: SGD runs on c and A (WS numbers a way instead of D), exactly, with inner products taken once.

    Args:
        numbers: [E] of the episodes: weights and orders are drawn by them.
        dist: the cosine head of baseline++ (W = g v / |v|, v as above) instead of a linear layer.
    """
    e, ways, shots, c_in = support.shape
    x, q = support.flatten(1, 2).double(), query.flatten(1, 2).double()  # [E, n, D], [E, WQ, D]
    if dist:
        x, q = (z / (z.norm(dim=2, keepdim=True) + 1e-5) for z in (x, q))
    n = x.shape[1]
    y = one_hot(ways, shots, x)  # [n, W]
    start = initial_weights(numbers, ways, c_in, seed).double().to(x.device)
    w0 = start[:, :, :-1].transpose(1, 2)  # [E, D, W]
    gram, to_start = torch.bmm(x, x.transpose(1, 2)), torch.bmm(x, w0)  # [E, n, n], [E, n, W]
    start_square = w0.square().sum(1)  # [E, W]
    a, c = torch.zeros_like(to_start), torch.ones_like(start_square)  # A [E, n, W], c [E, W]
    extra = start_square.sqrt() if dist else start[:, :, -1].clone()  # norms g or biases [E, W]
    params, buffers = [a, c, extra], [torch.zeros_like(p) for p in (a, c, extra)]
    rows, step = torch.arange(e, device=x.device)[:, None], 0
    for epoch in range(epochs):
        ranks = hashed(seed, numbers[:, None] + (1 << 41), np.array(epoch), np.arange(n))
        order = torch.from_numpy(np.argsort(ranks, 1)).to(x.device)  # [E, n]
        for chosen in order.split(4, 1):
            u = c[:, None] * to_start[rows, chosen] + torch.bmm(gram[rows, chosen], a)  # x . v: [E, k, W]
            grad_a, grad_c = torch.zeros_like(a), torch.zeros_like(c)
            if dist:
                norm = _norm(a, c, gram, to_start, start_square)
                r = 2 * ((2 * (extra / norm)[:, None] * u).softmax(2) - y[chosen]) / chosen.shape[1]
                along = (r * u).sum(1) / norm  # dL/dW . v / |v|
                slope = extra / norm
                grad_a[rows, chosen] = slope[:, None] * r
                grad_a -= (slope * along / norm)[:, None] * a  # the part along v does not turn it
                grad_c -= slope * along / norm * c
                grad_extra = along
            else:
                r = ((u + extra[:, None]).softmax(2) - y[chosen]) / chosen.shape[1]
                grad_a[rows, chosen] = r
                grad_extra = r.sum(1)
            for p, grad, buffer in zip(params, (grad_a, grad_c, grad_extra), buffers):
                grad = grad + 0.001 * p
                buffer.copy_(grad if step == 0 else 0.9 * buffer + 0.1 * grad)
                p -= 0.01 * buffer
            step += 1
    scores = c[:, None] * torch.bmm(q, w0) + torch.bmm(torch.bmm(q, x.transpose(1, 2)), a)  # [E, WQ, W]
    if dist:
        return (scores * (extra / _norm(a, c, gram, to_start, start_square))[:, None]).argmax(2)
    return (scores + extra[:, None]).argmax(2)


def _norm(a: Tensor, c: Tensor, gram: Tensor, to_start: Tensor, start_square: Tensor) -> Tensor:
    """|v| [E, W] of v = c w_0 + A^T X."""
    square = c.square() * start_square + 2 * c * (a * to_start).sum(1) + (a * torch.bmm(gram, a)).sum(1)
    return square.clamp(min=1e-24).sqrt()


def predict(head: str, support: Tensor, query: Tensor, numbers: np.ndarray, seed: int) -> Tensor:
    """Ways [E, W * Q] that a head of `HEADS` predicts."""
    if head.startswith("finetune"):
        return finetune(support, query, numbers, seed, head == "finetune_cosine")
    if head == "proto_l2":
        return proto(F.normalize(support, dim=3), F.normalize(query, dim=3))
    plain: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "proto": proto, "cosine": cosine, "ridge": ridge, "lr": logistic,
    }  # fmt: skip
    return plain[head](support, query)
