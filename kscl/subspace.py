"""The subspace that the K views of an image span, and how a query matches it.

    G = Z^T Z = V diag(l) V^T,   u_i = Z v_i / sqrt(l_i),   Pi = sum_{i <= r} u_i u_i^T,   s(q) = |Pi q|

Z [D, K] are unit keys. The K x K Gram matrix has the nonzero eigenvalues of the D x D covariance Z Z^T, which is never
formed. The rank r is the number of significant directions. [the paper's abstract gives the idea; which directions are
significant and what measures the match are inferred, and flags]
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RANK_RULES = ("energy", "relative", "fixed")
SIMILARITIES = ("proj_len", "proj_len_sq", "signed")
NULL = 1e-6  # eigenvalues up to this share of the largest are rounding
TINY = 1e-12  # the square root's slope is infinite at 0


@dataclass(frozen=True)
class RankRule:
    """How many directions are significant; see `ranks`."""

    max_rank: int  # P, columns that a basis has room for
    kind: str = "energy"
    energy: float = 0.9  # e: the least r whose eigenvalues hold this share of the trace
    rel_gamma: float = 0.1  # `relative`: eigenvalues of at least this share of the largest
    rank: int = 1  # `fixed`

    def ranks(self, l: Tensor) -> Tensor:  # noqa: E741
        """Ranks [N], 0 to P, of falling eigenvalues [N, K]; directions of the null space never count."""
        if self.kind == "energy":
            share = l.cumsum(1) / l.sum(1, keepdim=True).clamp_min(TINY)
            r = 1 + (share < self.energy - 1e-6).sum(1)  # the tolerance decides exact ties
        elif self.kind == "relative":
            r = (l >= self.rel_gamma * l[:, :1]).sum(1)
        else:
            r = torch.full_like(l[:, 0], self.rank, dtype=torch.int64)
        there = ((l > NULL * l[:, :1]) & (l > TINY)).sum(1)
        return torch.minimum(r, there).clamp_max(self.max_rank)


class Subspaces(NamedTuple):
    """Of N images: what `configure` gives."""

    U: Tensor  # [N, D, P] orthonormal columns, exact zeros beyond the rank, in the dtype of the keys
    rank: Tensor  # [N] int64
    l: Tensor  # [N, K] eigenvalues, falling  # noqa: E741
    V: Tensor  # [N, K, K] eigenvectors of the Gram matrices, in columns


def pad(U: Tensor, P: int) -> Tensor:
    """[N, D, K] -> [N, D, P], with zero columns or without the last ones."""
    return torch.nn.functional.pad(U, (0, P - U.shape[2]))


@torch.no_grad()
def configure(Z: Tensor, rule: RankRule) -> Subspaces:
    """The subspaces of N images.

    One key spans itself: its basis is the key, to the last bit. Otherwise the K x K matrices are decomposed in float64
    on any input, at no cost that counts: in float32 a direction with a small eigenvalue would lose eps l_1 / l_i of its
    length and of its right angles.

    Args:
        Z: keys [N, D, K], unit columns, float32 or float64.
    """
    shots = Z.shape[2]
    if shots == 1:
        l = Z.square().sum(1).double()  # noqa: E741
        return Subspaces(pad(Z, rule.max_rank), rule.ranks(l), l, torch.ones_like(l)[:, :, None])
    with torch.autocast(Z.device.type, enabled=False):
        z = Z.double()
        # Keys that are not numbers pass as such into U, for the loss to show; eigh would raise.
        # In parts: the CUDA library refuses 65,536 matrices at once (CUDA 13.0).
        parts = [torch.linalg.eigh(gram) for gram in (z.mT @ z).nan_to_num().split(32768)]
        l, V = (torch.cat(x) for x in zip(*parts))  # [N, K] rising, [N, K, K]  # noqa: E741
        l, V = l.flip(1).clamp_min(0), V.flip(2)  # noqa: E741
        r = rule.ranks(l)
        kept = torch.arange(shots, device=Z.device) < r[:, None]  # [N, K]
        # The first direction points to the keys, not away from them; the signs of the others stay arbitrary.
        V[:, :, 0] *= torch.where(V[:, :, 0].sum(1, keepdim=True) < 0, -1.0, 1.0)
        U = z @ V * torch.where(kept, l.clamp_min(TINY).rsqrt(), 0.0)[:, None]  # [N, D, K]
    return Subspaces(pad(U.to(Z.dtype), rule.max_rank), r, l, V)


def match(x: Tensor, sim: str) -> Tensor:
    """Similarity [...] of a query with coordinates x [P, ...] in the bases of the subspaces.

    `proj_len`: length of the projection, that is the cosine of the angle between query and subspace; `proj_len_sq`: its
    square; `signed`: the length with the sign of the first coordinate, for one shot the cosine itself.
    """
    if sim == "signed" and len(x) == 1:
        return x[0]
    square = x.square().sum(0)
    if sim == "proj_len_sq":
        return square
    length = square.clamp_min(TINY).sqrt()
    return torch.where(x[0] < 0, -length, length) if sim == "signed" else length


def slope(x: Tensor, s: Tensor, sim: str) -> Tensor:
    """d s / d x, [P, ...], of s = match(x)."""
    if sim == "signed" and len(x) == 1:
        return torch.ones_like(x)
    return 2 * x if sim == "proj_len_sq" else x / s


class _SquaredLength(torch.autograd.Function):
    """q^T Pi q [N] with derivatives with respect to q and to the keys that the truncated projector Pi is made of.

    For C = Z Z^T, kept directions i and dropped ones j:

        dPi = sum_ij (u_i^T dC u_j) / (l_i - l_j) (u_i u_j^T + u_j u_i^T)

    The dropped ones include the D - K null directions, which are summed in closed form through q - Pi q, so that
    nothing is divided by a dropped eigenvalue. Equal kept eigenvalues do no harm: their gap does not occur (it does in
    the derivative of eigh, as 0 / 0).
    """

    @staticmethod
    def forward(ctx, q: Tensor, Z: Tensor, U: Tensor, rank: Tensor, l: Tensor, V: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: E741
        ctx.save_for_backward(q, Z, U, rank, l, V)
        return (q[:, :, None] * U).sum(1).square().sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        saved = ctx.saved_tensors
        q, Z, U, l, V = (x.double() for x in (*saved[:3], *saved[4:]))  # noqa: E741
        shots, rank = Z.shape[2], saved[3]
        kept = torch.arange(shots, device=Z.device) < rank[:, None]  # [N, K]
        U = pad(U, shots)  # [N, D, K], zeros for the dropped
        a = torch.einsum("ndk,nd->nk", U, q)  # coordinates of q along the kept
        away = q - torch.einsum("ndk,nk->nd", U, a)  # q - Pi q
        root = torch.where(kept, l.clamp_min(TINY).rsqrt(), 0.0)
        Y = torch.where(kept[:, None], 0.0, Z @ V)  # [N, D, K]: sqrt(l_j) u_j of the dropped
        # Where a kept and a dropped eigenvalue meet the projector jumps; the floor keeps the gradient finite there.
        gap = (l[:, :, None] - l[:, None, :]).clamp_min(1e-4 * l[:, :1, None].clamp_min(TINY))  # [N, i, j]
        c = a[:, :, None] * torch.einsum("ndk,nd->nk", Y, q)[:, None, :] / gap  # zero but for kept i and dropped j
        # In coordinates of the v_k: columns i get away and the y_j, columns j get the u_i.
        columns = away[:, :, None] * (a * root)[:, None]
        columns = columns + torch.einsum("ndj,nij->ndi", Y, c * root[:, :, None]) + torch.einsum("ndi,nij->ndj", U, c)
        to_Z = 2 * grad.double()[:, None, None] * columns @ V.mT
        to_q = 2 * grad.double()[:, None] * (q - away)
        return to_q.to(saved[0].dtype), to_Z.to(saved[1].dtype), None, None, None, None


def own_match(q: Tensor, own: Subspaces, sim: str, Z: Tensor | None = None) -> Tensor:
    """Similarity [N] of each query with the subspace of its own image.

    Args:
        q: unit queries [N, D]; own: of the same images. Z: the keys [N, D, K] that `own` was configured of, where the
            gradient is to reach them; else the subspaces are constants and the gradient goes to q alone, along the
            projection.
    """
    x = (q[:, :, None] * own.U).sum(1).T  # [P, N]
    if Z is None:
        return match(x, sim)
    square = _SquaredLength.apply(q, Z, *own)
    if sim == "proj_len_sq":
        return square
    length = square.clamp_min(TINY).sqrt()
    return torch.where(x[0] < 0, -length, length) if sim == "signed" else length
