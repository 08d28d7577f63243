"""Contrastive branch -> class branch: similarity distribution q, alignment and calibration of the prediction p (2.5).

Everything here is detached: the caller hands over tensors without gradient. Products are sums of logarithms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, distributed

CALIBRATIONS = ("product", "prior", "average", "geomean", "none")
ALIGNMENTS = ("ema", "window", "off")


def log_similarity(z: Tensor, mu: Tensor, tau_s: float) -> Tensor:
    """log q_i(c) = log softmax_c(z_i . mu_c / tau_s), eq. (4).

    Args:
        z: unit embeddings [N, D] of the momentum encoder; mu: unit class prototypes [C, D].

    Returns: [N, C] float32.
    """
    return F.log_softmax(z.float() @ mu.float().T / tau_s, dim=1)


def sharpen(p: Tensor, t: float) -> Tensor:
    """p^(1/T) over the classes, normalised; rows [N, C] of distributions, zeros stay zeros. T = 1: p itself."""
    return p if t == 1 else F.softmax(p.log() / t, dim=1)


def calibrate(p: Tensor, log_q: Tensor, how: str, prior: Tensor | None = None, a: float = 0.5) -> Tensor:
    """The prediction corrected by the similarity, before sharpening: Normalize(p * q) of eq. (5), or another `how`.

    Args:
        p: [N, C] distributions, zeros allowed, after alignment; log_q: [N, C] of `log_similarity`.
        prior: running mean [C] of q, for `prior` (the reading of the third-party attempt).
        a: weight of q in `average` ((1 - a) p + a q) and `geomean` (p^(1 - a) q^a).

    Returns: [N, C]. UserError for an unknown `how`.
    """
    if how == "none":
        return p
    if how == "average":
        return (1 - a) * p + a * log_q.exp()
    if how == "product":
        return F.softmax(p.log() + log_q, dim=1)
    if how == "geomean":
        return F.softmax((1 - a) * p.log() + a * log_q, dim=1)
    if how == "prior" and prior is not None:
        return F.softmax(p.log() + prior.log(), dim=1)
    raise UserError(f"--calib {how}: choose from {', '.join(CALIBRATIONS)}")


class Alignment(nn.Module):
    """Distribution alignment DA: p <- Normalize(p * target / pbar), pbar the running mean of the predictions.

    `ema`: pbar <- m pbar + (1 - m) mean p, from uniform; `window`: the mean of the last `window` batches; `off`.
    The batch's own mean, over all processes, enters first. Also keeps the running mean of q, for `--calib prior`.
    """

    pbar: Tensor
    recent: Tensor
    count: Tensor
    qbar: Tensor
    target: Tensor

    def __init__(self, classes: int, kind: str = "ema", m: float = 0.999, window: int = 32):
        super().__init__()
        if kind not in ALIGNMENTS:
            raise UserError(f"--da {kind}: choose from {', '.join(ALIGNMENTS)}")
        self.kind, self.m = kind, m
        uniform = torch.full((classes,), 1 / classes)
        self.register_buffer("target", uniform.clone())
        self.register_buffer("pbar", uniform.clone())
        self.register_buffer("qbar", uniform.clone())
        self.register_buffer("recent", torch.zeros(window if kind == "window" else 0, classes))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def update(self, p: Tensor, log_q: Tensor | None = None) -> None:
        """Take in a batch: p [N, C], and log_q [N, C] where there is one."""
        mean = distributed.all_sum(p.mean(0)) / distributed.world()
        if self.kind == "window":
            self.recent[self.count % len(self.recent)] = mean
            self.count += 1
            self.pbar.copy_(self.recent.sum(0) / self.count.clamp_max(len(self.recent)))
        elif self.kind == "ema":
            self.pbar.lerp_(mean, 1 - self.m)
        if log_q is not None:
            self.qbar.lerp_(distributed.all_sum(log_q.exp().mean(0)) / distributed.world(), 1 - self.m)

    def forward(self, p: Tensor) -> Tensor:
        """[N, C] -> [N, C]; with `off`, or with pbar equal to the target, nothing changes."""
        if self.kind == "off":
            return p
        aligned = p * (self.target / self.pbar.clamp_min(1e-8))
        return aligned / aligned.sum(1, keepdim=True)


def threshold(theta: float, ramp: bool, progress: float) -> float:
    """theta, or with `ramp` rising linearly from 0.5 to theta over the training (`progress` in 0..1)."""
    return min(0.5, theta) + (theta - min(0.5, theta)) * progress if ramp else theta
