"""The loss: an image's own subspace against the queue of stored ones, streamed.

L = -log exp(s(q, U) / tau) / (exp(s(q, U) / tau) + sum_m exp(s(q, U_m) / tau))
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kscl.subspace import Subspaces, match, own_match, slope

PRODUCTS = 2**22  # coordinates of the queries in stored bases that exist at a time: 16 MB in float32


def columns(queue: Tensor, rows: int) -> int:
    """Stored subspaces at a time, for so many queries."""
    return max(1, min(4096, PRODUCTS // (len(queue) * rows)))


class _NegativesLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, queue: Tensor, sim: str, tau: float, chunk: int) -> Tensor:  # type: ignore[no-untyped-def]
        n, d = q.shape
        top = q.new_full((n, 1), -torch.inf)  # largest logit so far
        total = q.new_zeros(n, 1)  # sum_m exp(logit_m - top)
        pull = q.new_zeros(n, d) if ctx.needs_input_grad[0] else None  # sum_m exp(logit_m - top) tau d logit_m / d q
        # Lengths of projections grow with the query, so tau divides the queries once, not every logit. A square needs
        # it back.
        scaled, factor = q / tau, tau if sim == "proj_len_sq" else 1.0
        for start in range(0, queue.shape[2], chunk):
            U = queue[:, :, start : start + chunk]  # [P, D, c]
            x = scaled @ U  # [P, N, c], the largest tensor there is
            s = match(x, sim)
            logits = s * factor if factor != 1 else s  # [N, c]
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            shrink = (top - new_top).exp()
            weight = (logits - new_top).exp_()
            total = total * shrink + weight.sum(1, keepdim=True)
            if pull is not None:
                pull = pull * shrink
                for bend, basis in zip(slope(x, s, sim), U):  # [N, c], [D, c] for each p
                    pull = torch.addmm(pull, weight * bend, basis.T)
            top = new_top
        if pull is not None:
            ctx.save_for_backward(pull * factor / (total * tau))
        return (top + total.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        (direction,) = ctx.saved_tensors
        return grad[:, None] * direction, None, None, None, None


def negatives_lse(q: Tensor, queue: Tensor, sim: str, tau: float, chunk: int | None = None) -> Tensor:
    """log sum_m exp(s(q, U_m) / tau), with its gradient found in the same pass over the queue.

    The queue is read some columns at a time: neither coordinates [N, P, M] nor logits [N, M] ever exist, and the
    backward pass needs the [N, D] that the forward pass has left. The queue gets no gradient.

    Args:
        q: queries [N, D]; queue: stored bases [P, D, M]; tau: a number, no gradient reaches it.

    Returns: [N], float32 (float64 for float64 queries).
    """
    return _NegativesLse.apply(q, queue.detach().to(q.dtype), sim, tau, chunk or columns(queue, len(q)))


def kscl_loss(
    q: Tensor, own: Subspaces, queue: Tensor, sim: str, tau: float, Z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of each query, and its similarity with its own subspace.

    Args:
        q: unit queries [N, D]; own: subspaces of their images; queue: [P, D, M]; Z: see `own_match`.

    Returns: loss [N], similarity [N]; float32 (float64 for float64 queries) under autocast too.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = q if q.dtype == torch.float64 else q.float()
        s = own_match(q, own, sim, Z)
        pos = s / tau
        return torch.logaddexp(pos, negatives_lse(q, queue, sim, tau)) - pos, s


@torch.no_grad()
def against_queue(q: Tensor, s: Tensor, queue: Tensor, sim: str) -> tuple[Tensor, Tensor]:
    """For people to watch: how many stored subspaces are closer than the query's own, and the mean similarity.

    Args:
        q: [N, D]; s: similarity with the own subspace [N]; queue: [P, D, M].

    Returns: [N] int64 (0: contrast accuracy at 1 counts it right), [N].
    """
    closer, total = torch.zeros_like(s, dtype=torch.int64), torch.zeros_like(s)
    for U in queue.split(columns(queue, len(q)), 2):
        other = match(q @ U, sim)  # [N, c]
        closer += (other > s[:, None]).sum(1)
        total += other.sum(1)
    return closer, total / queue.shape[2]
