"""The log-sum-exp over a queue of negatives that never forms the logits."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _NegativesLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, queue: Tensor, tau: float, chunk: int) -> Tensor:  # type: ignore[no-untyped-def]
        m, d = z.shape
        top = z.new_full((m, 1), -torch.inf)  # largest logit so far
        total = z.new_zeros(m, 1)  # sum_j exp(logit_j - top)
        pull = z.new_zeros(m, d) if ctx.needs_input_grad[0] else None  # sum_j exp(logit_j - top) n_j
        scaled = z / tau
        for start in range(0, queue.shape[1], chunk):
            n = queue[:, start : start + chunk]  # [D, c]
            logits = scaled @ n  # [M, c], the only tensor of this width
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            shrink = (top - new_top).exp()
            weight = logits.sub_(new_top).exp_()
            total = total * shrink + weight.sum(1, keepdim=True)
            if pull is not None:
                pull = torch.addmm(pull * shrink, weight, n.T)
            top = new_top
        if pull is not None:
            ctx.save_for_backward(pull / (total * tau))  # sum_j softmax_j n_j / tau
        return (top + total.log()).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        (direction,) = ctx.saved_tensors
        return grad[:, None] * direction, None, None, None


def wide(x: Tensor) -> Tensor:
    """At least float32: a log-sum-exp over 65,536 terms needs it under bf16 autocast; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def negatives_lse(z: Tensor, queue: Tensor, tau: float, chunk: int = 4096) -> Tensor:
    """log sum_j exp(z.n_j / tau), with its gradient found in the same pass over the queue.

    The queue is read `chunk` columns at a time, so the logits [M, K] never exist; it gets no gradient.

    Args:
        z: queries [M, D]; queue: [D, K].

    Returns: [M], float32 (float64 for float64 queries).
    """
    with torch.autocast(z.device.type, enabled=False):
        z = wide(z)
        return _NegativesLse.apply(z, queue.detach().to(z.dtype), tau, chunk)
