"""Pixel losses against constants: class prototypes, bank regions, the pixels of the other view; and the CE controls.

Every contrastive form here is  L_i = w_i * logsumexp_c(v_i . key_c / tau) - v_i . target_i / tau  with constant keys
and a constant target (a weighted sum of keys), so only the log-sum-exp needs the pixels x keys matrix, in chunks.

Symbols: N pixels, D dimension, C classes of all datasets, V valid classes, tau temperature.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdp.prototypes import PrototypeBank, class_totals

CHUNK = 1 << 24  # logits held at a time


class _LogSumExp(torch.autograd.Function):
    """log sum_c exp(v_i . key_c / tau); its gradient, softmax @ keys / tau, is made in the same pass over chunks."""

    @staticmethod
    def forward(ctx, v, keys, allowed, tau, dropped):  # type: ignore[no-untyped-def]
        """v [G, P, D], keys [G, K, D], allowed [G, K] bool, dropped [G, P, k] indices or None -> [G, P]."""
        lse, grad = v.new_empty(v.shape[:2]), torch.empty_like(v)
        scaled, refused = keys / tau, ~allowed[:, None, :]
        step = max(1, CHUNK // (keys.shape[0] * keys.shape[1]))
        for a in range(0, v.shape[1], step):
            s = (v[:, a : a + step] @ scaled.transpose(1, 2)).masked_fill_(refused, -torch.inf)  # [G, step, K]
            if dropped is not None:
                s.scatter_(2, dropped[:, a : a + step], -torch.inf)
            lse[:, a : a + step] = s.logsumexp(2)
            torch.bmm(s.sub_(lse[:, a : a + step, None]).exp_(), scaled, out=grad[:, a : a + step])
        ctx.save_for_backward(grad)
        return lse

    @staticmethod
    def backward(ctx, grad_lse):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad_lse[..., None] * grad, None, None, None, None


def log_sum_exp(v: Tensor, keys: Tensor, allowed: Tensor, tau: float, dropped: Tensor | None = None) -> Tensor:
    """Log-sum-exp over constant keys with gradient to v only: v [P, D], keys [K, D], allowed [K] bool -> [P].

    A leading group dimension may be given on all of them. `dropped` [P, k]: keys left out of a pixel's denominator.
    """
    if v.dim() == 3:
        return _LogSumExp.apply(v, keys, allowed, tau, dropped)
    dropped = None if dropped is None else dropped[None]
    return _LogSumExp.apply(v[None], keys[None], allowed[None], tau, dropped)[0]


class PixelLoss(NamedTuple):
    """Losses of N pixels, already weighted, and which of them count in the average."""

    p2c: Tensor
    csc: Tensor
    counted: Tensor


def label_weights(
    y_a: Tensor, y_b: Tensor, lam: Tensor, usable: Tensor, mix_ignore: str = "keep"
) -> tuple[Tensor, Tensor]:
    """Weights of the two labels of each pixel: lambda and 1 - lambda, zero where ignored or without a prototype.

    Args:
        y_a, y_b: [N] union labels, -1 = none; lam: [N]; usable: [C] bool; mix_ignore: `renorm` lifts a lone label to 1.
    """
    w_a = torch.where((y_a >= 0) & usable[y_a.clamp(min=0)], lam, 0.0)
    w_b = torch.where((y_b >= 0) & usable[y_b.clamp(min=0)], 1 - lam, 0.0)
    if mix_ignore == "renorm":
        total = (w_a + w_b).clamp(min=torch.finfo(w_a.dtype).tiny)
        w_a, w_b = w_a / total, w_b / total
    return w_a, w_b


@torch.no_grad()
def sparse_code(
    v: Tensor, proto: Tensor, y_a: Tensor, y_b: Tensor, usable: Tensor, tau: float, k: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T_i, the k prototypes nearest to pixel i among the other classes, and a_i = softmax over T_i of v_i . p_c / tau.

    Args:
        groups: dataset of each class [C]; given, only classes of other datasets than the labels' are candidates.

    Returns: indices of T_i [N, k], a [N, k] (0 where there is no candidate left), sum_c a_ic p_c [N, D], sum of a [N].
    """
    k = min(k, len(proto))
    index, code = v.new_empty(len(v), k, dtype=torch.long), v.new_empty(len(v), k)
    target = torch.empty_like(v)
    classes = torch.arange(len(proto), device=v.device)
    step = max(1, CHUNK // len(proto))
    for i in range(0, len(v), step):
        part = slice(i, i + step)
        s = v[part] @ proto.T / tau  # [step, C]
        refused = ~usable | (classes == y_a[part, None]) | (classes == y_b[part, None])
        if groups is not None:
            for y in (y_a[part], y_b[part]):
                refused |= (groups == groups[y.clamp(min=0), None]) & (y >= 0)[:, None]
        top, index[part] = s.masked_fill_(refused, -torch.inf).topk(k, dim=1)
        code[part] = top.softmax(1).nan_to_num(0.0)  # no candidate at all: nothing to pull to
        target[part] = torch.zeros_like(s).scatter_(1, index[part], code[part]) @ proto
    return index, code, target, code.sum(1)


def pixel_to_prototype(
    v: Tensor,
    y_a: Tensor,
    y_b: Tensor,
    lam: Tensor,
    bank: PrototypeBank,
    tau: float = 0.07,
    csc: str = "none",
    csc_k: int = 5,
    groups: Tensor | None = None,
    mix_ignore: str = "keep",
) -> PixelLoss:
    """Eq. (1), -log exp(v.p_y / tau) / sum_{c in V} exp(v.p_c / tau), and pixel-to-class sparse coding (form inferred).

    Args:
        v: query pixels [N, D], unit norm; y_a, y_b: union labels [N] (y_b = -1 without pixel mixing); lam: [N].
        csc: `none`; `pull` adds - sum_{c in T_i} a_ic log softmax_c; `nopush` takes T_i out of the denominator instead.
        groups: see `sparse_code` (scope `cross`).

    Prototypes are constants. Pixels whose labels are ignored, or of classes without a prototype, do not count.
    """
    proto, usable = bank.proto.to(v.dtype), bank.proto_valid
    w_a, w_b = label_weights(y_a, y_b, lam, usable, mix_ignore)
    weight = w_a + w_b
    dropped = None
    if csc != "none":
        index, code, pull, has_pull = sparse_code(v.detach(), proto, y_a, y_b, usable, tau, csc_k, groups)
        if (
            csc == "nopush"
        ):  # an index without candidate (code 0) points at a class that stays out anyway: the first of T_i
            dropped = torch.where(code > 0, index, index[:, :1])
            alone = has_pull == 0
    if csc == "nopush":
        lse = torch.where(alone, log_sum_exp(v, proto, usable, tau), log_sum_exp(v, proto, usable, tau, dropped))
    else:
        lse = log_sum_exp(v, proto, usable, tau)
    target = w_a[:, None] * proto[y_a.clamp(min=0)] + w_b[:, None] * proto[y_b.clamp(min=0)]
    p2c = weight * lse - (v * target).sum(1) / tau
    pulled = weight * (has_pull * lse - (v * pull).sum(1) / tau) if csc == "pull" else torch.zeros_like(p2c)
    return PixelLoss(p2c, pulled, weight > 0)


def pixel_to_region(v: Tensor, y: Tensor, bank: PrototypeBank, tau: float = 0.07) -> PixelLoss:
    """The region-bank arm: positives are all bank regions of label y (mean of the log-terms), denominator all regions.

    The mean over positives of v.r / tau is v . (class_sum / class_count) / tau: the positives are never enumerated.
    """
    taken = bank.bank_label >= 0
    regions = bank.bank_feat[taken].to(v.dtype)  # [K, D]
    mean = (bank.class_sum / bank.class_count.clamp(min=1)[:, None]).to(v.dtype)
    counted = (y >= 0) & (bank.class_count > 0.5)[y.clamp(min=0)]
    lse = log_sum_exp(v, regions, taken[taken], tau)
    loss = lse - (v * mean[y.clamp(min=0)]).sum(1) / tau
    return PixelLoss(torch.where(counted, loss, 0.0), torch.zeros_like(loss), counted)


def pixel_to_pixel(v: Tensor, y: Tensor, k: Tensor, y_k: Tensor, num_classes: int, tau: float = 0.07) -> PixelLoss:
    """The pixel-to-pixel arm (Eq. 2 of the paper, form inferred): positives are the other view's pixels of the class.

    Args:
        v: [B, P, D] query pixels and y: [B, P] their labels; k: [B, D, h, w] key pixels and y_k: [B, h, w], of the same
           images (across images it collapsed for the authors). The denominator holds the labelled key pixels.
    """
    total, area = class_totals(k, y_k, num_classes)  # [B, C, D], [B, C]
    index = y.clamp(min=0)
    number = area.gather(1, index)  # [B, P] positives of each pixel
    counted = (y >= 0) & (number > 0)
    target = total.gather(1, index[..., None].expand(-1, -1, v.shape[2])) / number.clamp(min=1)[..., None]
    keys = k.flatten(2).transpose(1, 2)  # [B, h*w, D]
    allowed = y_k.flatten(1) >= 0
    # an image without labelled keys has no finite denominator: let all its keys in, none of its pixels counts
    lse = log_sum_exp(v, keys, allowed | ~allowed.any(1, keepdim=True), tau)
    loss = torch.where(counted, lse - (v * target).sum(2) / tau, 0.0)
    return PixelLoss(loss.flatten(), torch.zeros_like(loss).flatten(), counted.flatten())


def classifier_ce(logits: Tensor, y: Tensor, groups: Tensor, dataset: Tensor, multi_head: bool) -> PixelLoss:
    """The cross-entropy controls on one concatenated classifier.

    Args:
        logits: [B, C, h, w]; y: [B, h, w]; groups: dataset of each class [C]; dataset: of each image [B].
        multi_head: each image's softmax runs over its own dataset's classes (as one head a dataset); else over all C.
    """
    if multi_head:
        own = groups[None] == dataset[:, None]  # [B, C]
        logits = logits.masked_fill(~own[:, :, None, None], -torch.inf)
    loss = F.cross_entropy(logits, y, ignore_index=-1, reduction="none").flatten()
    return PixelLoss(loss, torch.zeros_like(loss), (y >= 0).flatten())


def average(loss: PixelLoss, csc_weight: float, total_count: Tensor, world: int, v: Tensor) -> Tensor:
    """L = mean(p2c) + beta mean(csc) over the counted pixels of all processes; 0 * v.sum() when there is none.

    DDP averages gradients over processes, so each process's sum is scaled by world / total_count.
    """
    value = (loss.p2c + csc_weight * loss.csc).sum() * (world / total_count.clamp(min=1))
    return value + 0.0 * v.sum()
