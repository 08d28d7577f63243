"""The two losses on the block's attention: semantic consistency and dynamic motion consistency with entropy weights.

n sampled patch positions P, the same in every frame and clip, are the queries; the attention of a query says what is
near it and what is far. Only these rows are sorted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-10  # inside the logarithms, as released
PATCHES = 24 * 48  # of a frame in the release, which its counts are meant for


class Counts(NamedTuple):
    """How many of the nearest and farthest patches are positives and negatives."""

    sem_pos: int = 30
    sem_neg: int = 200
    mot_pos: int = 10
    mot_neg: int = 50

    def scaled(self, patches: int) -> "Counts":
        """The same shares of a grid of another size, at least one each."""
        return Counts(*(max(1, round(count * patches / PATCHES)) for count in self))


def sample_points(patches: int, n: int, generator: torch.Generator) -> Tensor:
    """P: n of the positions 0..patches-1 without replacement, int64."""
    return torch.randperm(patches, generator=generator)[:n]


def nearest_and_farthest(a: Tensor, pos: int, neg: int) -> tuple[Tensor, Tensor]:
    """Indices of the `pos` largest and `neg` smallest entries of the last axis: the ends of a full sort."""
    return a.topk(pos, -1).indices, a.topk(neg, -1, largest=False).indices


def semantic(
    z: Tensor, A: Tensor, P: Tensor, pos: int = 30, neg: int = 200, near: float = 0.9, far: float = 0.1
) -> Tensor:
    """L_sem: patches that a query attends to, in every frame, look like it (cos > near), the others do not (cos < far).

    Args:
        z: tokens [B, T, N, C]; A: attention [B, T N, T N]; P: positions [n].

    Returns: a scalar; gradients reach queries, positives and negatives, none the attention.
    """
    B, T, N, _ = z.shape
    rows = A.detach().view(B, T, N, T, N)[:, :, P]  # [B, T, n, T, N]
    near_i, far_i = nearest_and_farthest(rows, pos, neg)  # [B, T, n, T, pos], [.., neg]
    unit = F.normalize(z, dim=-1)
    cos = torch.einsum("bsnc,btmc->bsntm", unit[:, :, P], unit)  # [B, T, n, T, N]
    return F.relu(near - cos.gather(-1, near_i)).mean() + F.relu(cos.gather(-1, far_i) - far).mean()


def entropy_weights(query: Tensor) -> Tensor:
    """w: softmax over the points of minus the entropy, for rows [..., n, T N] that sum to 1 -> [..., n].

    A query that is sure of where it belongs weighs more.
    """
    return (query * (query + EPS).log()).sum(-1).softmax(-1)


def motion(
    A: Tensor, P: Tensor, T: int, pos: int = 10, neg: int = 50, margin: float = 1.0, weights: str = "entropy"
) -> Tensor:
    """L_mot: near patches of the same frame spread their attention over all frames as the query does, far ones do not.

    S(q, a) = sum_c q_c log(a_c + 1e-10) is minus the cross-entropy of rows that sum to 1; every pair of a positive j+
    and a negative j- gives max(0, S(q, a_j-) - S(q, a_j+) + margin).

    Args:
        A: attention [B, T N, T N]; P: positions [n].
        weights: `entropy` (w above) or `uniform` (1 / n each).

    Returns: a scalar; gradients reach the rows of positives and negatives, neither the queries nor the weights.
    """
    B, n = len(A), len(P)
    N = A.shape[1] // T
    frames = torch.arange(T, device=A.device)
    same = A.detach().view(B, T, N, T, N)[:, frames, :, frames].transpose(0, 1)  # [B, T, N, N]: within a frame
    index = torch.cat(nearest_and_farthest(same[:, :, P], pos, neg), -1)  # [B, T, n, pos + neg]
    row = index + N * frames.view(1, T, 1, 1)  # rows of A, of the query's own frame
    batch = torch.arange(B, device=A.device).view(B, 1, 1, 1)
    log_a = (F.normalize(A[batch, row], p=1, dim=-1) + EPS).log()  # [B, T, n, pos + neg, T N]
    q = F.normalize(A.detach().view(B, T, N, T * N)[:, :, P], p=1, dim=-1)  # [B, T, n, T N]
    S = torch.einsum("btnkc,btnc->btnk", log_a, q)
    hinge = F.relu(S[..., None, pos:] - S[..., :pos, None] + margin)  # [B, T, n, pos, neg]
    w = entropy_weights(q) if weights == "entropy" else q.new_full((B, T, n), 1 / n)
    return (hinge.mean((-2, -1)) * w).sum(-1).mean()


@torch.no_grad()
def watch(A: Tensor, T: int) -> dict[str, Tensor]:
    """Entropy of the attention over that of a uniform one (1: diffuse), and the share of it that stays in the frame."""
    B, n, _ = A.shape
    rows = F.normalize(A, p=1, dim=-1)
    entropy = -(rows * (rows + EPS).log()).sum(-1).mean() / torch.log(torch.tensor(float(n)))
    own = rows.view(B, T, n // T, T, n // T).diagonal(dim1=1, dim2=3).sum(2).mean()  # [B, N, N, T]
    return {"train/attn_entropy": entropy, "train/attn_frame_share": own}
