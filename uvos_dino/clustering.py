"""Hierarchical clustering of attention rows under the symmetric (Jeffreys) divergence, for a whole video at once.

Labels equal the release's (src/eval_oneshot.py). What is fast here: distances take one product instead of two, tokens
with the same neighbourhood are smoothed once, and the greedy pass compares leaders alone with the rest instead of
everybody with everybody.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared_utils import UserError

TINY = 1e-30  # a probability of exactly 0 would make every distance to it NaN
WINDOW = 3  # frames that are clustered together first
STEP = 256  # rows that are compared with the others at once
COARSE = 64  # sums of columns in which most pairs of rows are told apart
BLOCK = 512  # rows of a product of whole rows
SPARSE = 12  # a scattered sum costs so many times what a dense product does, by the entry


class Clusters(NamedTuple):
    labels: Tensor  # [T, N] int64 on the CPU, 0..K-1; a cluster may be empty
    centroids: Tensor  # [K, D] float32, mean rows

    @property
    def number(self) -> int:
        return len(self.centroids)


def key_frames(frames: int, ratio: int) -> Tensor:
    """Frames whose tokens are keys: 0, r, 2 r, ..., floor(T / r) of them, at least one (the release stops at none)."""
    return torch.arange(max(1, frames // ratio)) * ratio


def entropies(p: Tensor, log_p: Tensor) -> Tensor:
    """H of rows [n, D] -> [n]."""
    return -torch.linalg.vecdot(p, log_p)


def jeffreys(p: Tensor, q: Tensor) -> Tensor:
    """d(p, q) = KL(p||q) + KL(q||p) of rows [n, D], [m, D] -> [n, m], as cross-entropies minus entropies."""
    log_p, log_q = p.log(), q.log()
    cross = -(p @ log_q.T) - log_p @ q.T
    return cross - entropies(p, log_p)[:, None] - entropies(q, log_q)


def attention(q: Tensor, k: Tensor, scale: float, chunk: int = 0) -> Tensor:
    """Mean over the heads of the softmax over all key tokens.

    Args:
        q: queries [t, heads, N, d]; k: keys [K, heads, N, d], both float32.
        chunk: entries of the largest temporary; 0: a million on a CPU (its cache), 64 times that on a GPU.

    Returns: [t N, K N], rows sum to 1 and have no entry below 1e-30.
    """
    heads = q.shape[1]
    queries = q.transpose(0, 1).flatten(1, 2)  # [heads, t N, d]
    keys = k.transpose(0, 1).flatten(1, 2).transpose(1, 2)  # [heads, d, K N]
    out = q.new_empty(queries.shape[1], keys.shape[2])
    chunk = chunk or (2**26 if q.is_cuda else 2**20)
    step = max(1, chunk // keys.shape[2])
    for first in range(0, len(out), step):
        part = out[first : first + step]
        part.zero_()
        for head in range(heads):
            part += (queries[head, first : first + step] @ keys[head]).mul_(scale).softmax(-1)
    return out.div_(heads).clamp_min_(TINY)


def neighbourhoods(p: Tensor, tau: float) -> Tensor:
    """W: which rows of p [n, D] lie within tau of each other, [n, n] bool; a row is its own neighbour.

    Distances never grow when columns are added up (log-sum inequality), so pairs that are too far apart in COARSE sums
    need no product of whole rows; the rows are put in an order in which the other pairs lie together.
    """
    sums = torch.stack([part.sum(1) for part in p.split(-(-p.shape[1] // COARSE), 1)], 1)
    near = jeffreys(sums, sums) <= tau + 1e-3 * (1 + tau)  # more than the rounding of either distance
    order = near.byte().argmax(1).argsort(stable=True)  # by the first row nearby
    near = near[order][:, order]
    last = len(p) - 1 - near.flip(1).byte().argmax(1)
    p = p[order]
    log_p = p.log()
    h = entropies(p, log_p)
    W = torch.zeros(len(p), len(p), dtype=torch.bool, device=p.device)
    for i, end in zip(range(0, len(p), BLOCK), [int(part.max()) + 1 for part in last.split(BLOCK)]):
        block, rest = slice(i, i + BLOCK), slice(i + BLOCK, end)
        cross = p[block] @ log_p[i:end].T  # minus the cross-entropies in one direction, and in the other:
        back = torch.cat([cross[:, :BLOCK], p[rest] @ log_p[block].T]) if end > i + BLOCK else cross[:, :BLOCK]
        within = -(cross + back.T) - (h[block, None] + h[i:end]) <= tau  # within the block symmetric to the bit
        W[block, i:end] = within
        W[i:end, block] = within.T
    inverse = order.argsort()
    return W[inverse][:, inverse].fill_diagonal_(True)


def distinct(W: Tensor) -> tuple[Tensor, Tensor]:
    """Different rows of a boolean matrix [n, n]: which row shows each first, in this order, and whose each row is."""
    packed = np.ascontiguousarray(np.packbits(W.cpu().numpy(), axis=1))
    whole = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return torch.from_numpy(first[order]).to(W.device), torch.from_numpy(rank[inverse.ravel()]).to(W.device)


def smoothed(W: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """W p with rows that sum to 1, for symmetric boolean W [n, n] and p [n, D]: the different rows [U, D], in the order
    in which they first occur, and how many tokens have each [U].

    Tokens with equal rows of W have equal columns too, so their rows of p are added up first. Nothing is ever
    subtracted: the tiny entries, whose logarithms count, keep their precision.
    """
    first, whose = distinct(W)
    count = torch.bincount(whose, minlength=len(first)).to(p)
    total = p.new_zeros(len(first), p.shape[1]).index_add_(0, whose, p)
    M = W[first][:, first]  # [U, U]
    if SPARSE * int(M.sum()) < M.numel():
        out = torch.sparse.mm(M.to(p).to_sparse(), total)
    else:
        out = M.to(p) @ total
    return out / out.sum(1, keepdim=True), count


def greedy(
    p: Tensor, tau: float, weight: Tensor | None = None, moved: np.ndarray | None = None
) -> tuple[Tensor, np.ndarray]:
    """One pass of greedy leaders over rows [n, D] in their order -> centroids [K, D], and which have several rows [K].

    The first row that is not taken leads; it takes all rows not taken within tau (itself always) and gives their mean.

    Args:
        weight: how many equal rows each stands for [n].
        moved: which rows are new since the pass before [n]; all others are known to be further apart than tau.
    """
    n, log_p = len(p), p.log()
    h = entropies(p, log_p)

    def within(rows: np.ndarray, start: int) -> np.ndarray:
        """Which rows from `start` on are near the given ones [rows, n - start]."""
        i = torch.from_numpy(rows).to(p.device)
        cross = p[i] @ log_p[start:].T + log_p[i] @ p[start:].T
        return ((-cross - h[i, None] - h[start:]) <= tau).cpu().numpy()

    new = np.flatnonzero(moved) if moved is not None else np.arange(n)
    few = 2 * len(new) < n
    if few:  # compare the new rows alone with the rest, at once
        table = np.concatenate([within(part, 0) for part in np.split(new, range(STEP, len(new), STEP))])
        rank = np.full(n, -1)
        rank[new] = np.arange(len(new))

    whose, leaders = np.full(n, -1), 0
    step, start = 1, 0
    while len(lead := start + np.flatnonzero(whose[start:] < 0)[:step]):
        # The next candidates at once: some may be taken by one before them, so the step grows as long as none is.
        start = int(lead[0])  # all before are taken
        if few:
            old, later = rank[lead] < 0, new >= start
            near = np.zeros((len(lead), n - start), bool)
            near[~old] = table[rank[lead[~old]], start:]
            near[np.ix_(old, new[later] - start)] = table[np.ix_(later, lead[old])].T
        else:
            near = within(lead, start)
        used = 0
        for row, i in enumerate(lead):
            if whose[i] >= 0:
                continue
            near[row, i - start] = True
            whose[start:][near[row] & (whose[start:] < 0)] = leaders
            leaders, used = leaders + 1, used + 1
        start = int(lead[-1]) + 1
        step = min(STEP, 2 * step) if 2 * used > step else max(1, step // 2)

    members = torch.from_numpy(whose).to(p.device)
    weight = p.new_ones(n) if weight is None else weight.to(p)
    total = p.new_zeros(leaders, p.shape[1]).index_add_(0, members, p * weight[:, None])
    return total / p.new_zeros(leaders).index_add_(0, members, weight)[:, None], np.bincount(whose) > 1


def window_centroids(p: Tensor, tau: float) -> Tensor:
    """Stage A for the rows [n, D] of a window: smooth each over its neighbourhood, then greedy leaders."""
    rows, count = smoothed(neighbourhoods(p, tau), p)
    return greedy(rows, tau, count)[0]


def merge(centroids: Tensor, tau: float, passes: int = 10000) -> Tensor:
    """Stage B: greedy passes over the centroids, sizes not carried along, until their number stays."""
    moved = None
    for _ in range(passes):
        fewer, moved = greedy(centroids, tau, moved=moved)
        if len(fewer) == len(centroids):
            break
        centroids = fewer
    return fewer


def assign(p: Tensor, centroids: Tensor, log_c: Tensor) -> Tensor:
    """Stage C: nearest centroid of each row [n, D] -> [n]; the row's own entropy does not matter to the argmin."""
    d = -(p.log() @ centroids.T) - p @ log_c.T - entropies(centroids, log_c)
    return d.argmin(1)


class Rows:
    """Attention rows of a video, window by window: kept where they fit in `memory` bytes, else computed again.

    Args:
        q: queries [T, heads, N, d]; k: keys [K, heads, N, d].
        device: where a window is computed (the whole stays where q is).
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float, memory: float, device: torch.device):
        self.q, self.k, self.scale, self.device = q, k.to(device), scale, device
        self.kept: dict[int, Tensor] = {}
        self.room = memory

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.q), WINDOW):
            rows = self.kept.get(first)
            if rows is None:
                rows = attention(self.q[first : first + WINDOW].to(self.device), self.k, self.scale)
                size = rows.numel() * rows.element_size()
                if size <= self.room:
                    self.kept[first], self.room = rows, self.room - size
            yield rows


class Given:
    """The same for rows [T, N, D] that are there already, L1-normalised as the release does."""

    def __init__(self, rows: Tensor):
        self.rows = (rows.float() / rows.float().sum(-1, keepdim=True)).clamp_min(TINY)

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.rows.split(WINDOW):
            yield part.flatten(0, 1)


@torch.no_grad()
def cluster(rows: "Rows | Given", frames: int, tau: float = 1.0, only: Collection[int] | None = None) -> Clusters:
    """All three stages; with `only`, clusters come from the windows of these numbers alone (stage A), the rest is
    assigned. UserError where a row is not finite (weights that have diverged).
    """
    found = []
    for window, p in enumerate(rows):
        if not bool(torch.isfinite(p.sum())):
            raise UserError(
                "the attention is not finite: the block's weights have diverged; take an earlier checkpoint"
            )
        if only is None or window in only:
            found.append(window_centroids(p, tau))
    centroids = merge(torch.cat(found), tau)
    log_c = centroids.log()
    labels = torch.cat([assign(p, centroids, log_c).cpu() for p in rows])
    return Clusters(labels.view(frames, -1), centroids)
