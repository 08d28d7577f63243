"""Heads for frozen features, fitted on the support of many episodes at once by batched linear algebra.

Each takes support features x [E, n, D], their ways y [n] in 0..W-1, the same in each of the E episodes and as many of
each as there are, and queries q [E, m, D]; it gives logits [E, m, W].
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flat.episodes import hashed

HEADS = ("finetune", "finetune_cosine", "proto", "proto_l2", "cosine", "lr", "ridge")


def way_means(x: Tensor, y: Tensor) -> Tensor:
    """Mean feature of each way [E, W, D]."""
    shares = F.one_hot(y).to(x.dtype)  # [n, W]
    return torch.matmul((shares / shares.sum(0)).T, x)


def proto(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """Minus the squared distance to the class mean; nearest: scikit-learn's NearestCentroid."""
    means = way_means(x, y)
    near = torch.baddbmm(-0.5 * means.square().sum(2)[:, None], q, means.transpose(1, 2))
    return 2 * near - q.square().sum(2, keepdim=True)


def cosine(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """Cosine to the mean of the normalised support."""
    means = F.normalize(way_means(F.normalize(x, dim=2), y), dim=2)
    return torch.bmm(F.normalize(q, dim=2), means.transpose(1, 2))


def solve(a: Tensor, b: Tensor) -> Tensor:
    """The x of a x = b: a [E, n, n] symmetric and positive definite, b [E, n, k].

    By Cholesky: on a CPU the LU of a batch, which `torch.linalg.solve` takes, is wrong once `torch.set_num_threads` has
    been called (torch 2.5 to 2.14.1 at least; github.com/pytorch/pytorch, issues 141358 and 142815, open).
    """
    return torch.cholesky_solve(b, torch.linalg.cholesky(a))


def ridge(x: Tensor, y: Tensor, q: Tensor, alpha: float = 1.0) -> Tensor:
    """Least squares onto -1 and 1 with an intercept and alpha |w|^2, solved in the span of the support (float64)."""
    x, q = x.double(), q.double()
    target = 2 * F.one_hot(y).double() - 1  # [n, W]
    middle = x.mean(1, keepdim=True)
    x, q = x - middle, q - middle
    gram = torch.bmm(x, x.transpose(1, 2))  # [E, n, n]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    dual = solve(gram + alpha * eye, (target - target.mean(0)).expand(len(x), -1, -1))  # [E, n, W]
    return torch.bmm(torch.bmm(q, x.transpose(1, 2)), dual) + target.mean(0)


def logistic(x: Tensor, y: Tensor, q: Tensor, c: float = 1.0) -> Tensor:
    """Multinomial logistic regression on L2-normalised features, c = 1, intercept free (rfs), by Newton's method.

    |w|^2 / 2 + c sum of cross-entropies has its minimum in the span of the support, so the features enter through the
    square root of their Gram matrix: n coordinates instead of D, and an exact Newton step for every episode at once.
    """
    x, q = F.normalize(x, dim=2).double(), F.normalize(q, dim=2).double()
    n, target = len(y), F.one_hot(y).double()  # [n, W]
    ways = target.shape[1]
    values, vectors = torch.linalg.eigh(torch.bmm(x, x.transpose(1, 2)))
    keep = values > 1e-10 * values[:, -1:]
    roots = torch.where(keep, values, 1.0).sqrt()
    basis = torch.where(keep[:, None], vectors / roots[:, None], 0.0)  # [E, n, n]
    z = torch.where(keep[:, None], vectors * roots[:, None], 0.0)  # [E, n, n] coordinates of the support
    z = torch.cat([z, torch.ones_like(z[:, :, :1])], 2)  # and the intercept: [E, n, m]
    m = n + 1
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
        gradient = c * torch.bmm((p - target).transpose(1, 2), z) + penalty * w  # [E, W, m]
        gradient[:, :, -1] += w[:, :, -1].sum(1, keepdim=True)
        if float(gradient.abs().max()) < 1e-9:
            break
        curve = torch.diag_embed(p) - p[:, :, :, None] * p[:, :, None]  # [E, n, W, W]
        hessian = c * torch.einsum("enab,eni,enj->eaibj", curve, z, z).flatten(3, 4).flatten(1, 2) + regular
        w = w - solve(hessian, gradient.flatten(1)[:, :, None]).view_as(w)
    else:
        raise RuntimeError("logistic regression did not converge in 50 Newton steps")
    coordinates = torch.bmm(torch.bmm(q, x.transpose(1, 2)), basis)  # [E, WQ, n]
    return torch.bmm(coordinates, w[:, :, :-1].transpose(1, 2)) + w[:, None, :, -1]


def initial_weights(numbers: np.ndarray, ways: int, c: int, seed: int) -> Tensor:
    """torch's initial Linear(c, ways) of each episode: [E, ways, c + 1] uniform in +- 1/sqrt(c), the bias last."""
    draws = hashed(seed, numbers[:, None] + (1 << 40), np.arange(ways * (c + 1)))  # [E, ways (c + 1)]
    unit = torch.from_numpy((draws >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    return ((2 * unit - 1) / math.sqrt(c)).float().view(len(numbers), ways, c + 1)


@torch.no_grad()
def finetune(
    x: Tensor, y: Tensor, q: Tensor, numbers: np.ndarray, seed: int, dist: bool = False, epochs: int = 100
) -> Tensor:
    """CloserLookFewShot's test-time training: a new head per episode, SGD of lr .01, momentum and dampening .9, weight
    decay .001, `epochs` times over the support in mini-batches of 4.

    Every step moves a weight by multiples of itself, of its start and of support features, so that W = c W_0 + A^T X
    throughout: SGD runs on c and A (n numbers a way instead of D), exactly, with inner products taken once.

    Args:
        numbers: [E] of the episodes: weights and orders are drawn by them.
        dist: the cosine head of baseline++ (W = g v / |v|, v as above) instead of a linear layer.
    """
    (e, n, c_in), target = x.shape, F.one_hot(y).double()  # [n, W]
    ways = target.shape[1]
    x, q = x.double(), q.double()
    if dist:
        x, q = (z / (z.norm(dim=2, keepdim=True) + 1e-5) for z in (x, q))
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
                r = 2 * ((2 * (extra / norm)[:, None] * u).softmax(2) - target[chosen]) / chosen.shape[1]
                along = (r * u).sum(1) / norm  # dL/dW . v / |v|
                slope = extra / norm
                grad_a[rows, chosen] = slope[:, None] * r
                grad_a -= (slope * along / norm)[:, None] * a  # the part along v does not turn it
                grad_c -= slope * along / norm * c
                grad_extra = along
            else:
                r = ((u + extra[:, None]).softmax(2) - target[chosen]) / chosen.shape[1]
                grad_a[rows, chosen] = r
                grad_extra = r.sum(1)
            for p, grad, buffer in zip(params, (grad_a, grad_c, grad_extra), buffers):
                grad = grad + 0.001 * p
                buffer.copy_(grad if step == 0 else 0.9 * buffer + 0.1 * grad)
                p -= 0.01 * buffer
            step += 1
    scores = c[:, None] * torch.bmm(q, w0) + torch.bmm(torch.bmm(q, x.transpose(1, 2)), a)  # [E, m, W]
    if dist:
        return 2 * scores * (extra / _norm(a, c, gram, to_start, start_square))[:, None]
    return scores + extra[:, None]


def _norm(a: Tensor, c: Tensor, gram: Tensor, to_start: Tensor, start_square: Tensor) -> Tensor:
    """|v| [E, W] of v = c w_0 + A^T X."""
    square = c.square() * start_square + 2 * c * (a * to_start).sum(1) + (a * torch.bmm(gram, a)).sum(1)
    return square.clamp(min=1e-24).sqrt()


def fit(head: str, x: Tensor, y: Tensor, q: Tensor, numbers: np.ndarray, seed: int) -> Tensor:
    """Logits [E, m, W] of queries q [E, m, D] by a head of `HEADS`, fitted on the support x [E, n, D] of ways y [n]."""
    if head.startswith("finetune"):
        return finetune(x, y, q, numbers, seed, head == "finetune_cosine")
    if head == "proto_l2":
        return proto(F.normalize(x, dim=2), y, F.normalize(q, dim=2))
    plain: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "proto": proto, "cosine": cosine, "ridge": ridge, "lr": logistic,
    }  # fmt: skip
    return plain[head](x, y, q)


def predict(head: str, support: Tensor, query: Tensor, numbers: np.ndarray, seed: int) -> Tensor:
    """Ways [E, W * Q] that a head of `HEADS` predicts, from support [E, W, S, D] of queries [E, W, Q, D]."""
    ways, shots = support.shape[1:3]
    y = torch.arange(ways, device=support.device).repeat_interleave(shots)
    return fit(head, support.flatten(1, 2), y, query.flatten(1, 2), numbers, seed).argmax(2)
