"""The memory bank and the two-step average: pixels -> region of an image -> prototype of a class.

Paper 2106.04121 and the authors' rebuttal draft for the idea; the ring of image slots is inferred from its sizes.

Symbols: N images, R regions kept per image, D dimension, C classes of all datasets together, M image slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError


def class_totals(k: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the key pixels and number of pixels of each class in each image, without a loop over either.

    Args:
        k: [N, D, h, w]; y: union labels [N, h, w], -1 = ignore.

    Returns: total [N, C, D], area [N, C] int64.
    """
    n, d, h, w = k.shape
    k = k.permute(0, 2, 3, 1).reshape(n * h * w, d)
    y = y.reshape(n, h * w)
    # One row for each (image, class), plus a last class that takes the ignored pixels.
    image = torch.arange(n, device=y.device)[:, None] * (num_classes + 1)
    row = (image + torch.where(y < 0, num_classes, y)).reshape(-1)  # [N*h*w]
    area = torch.bincount(row, minlength=n * (num_classes + 1)).view(n, num_classes + 1)
    total = k.new_zeros(n * (num_classes + 1), d).index_add_(0, row, k).view(n, num_classes + 1, d)
    return total[:, :-1], area[:, :-1]


@torch.no_grad()
def region_means(k: Tensor, y: Tensor, num_classes: int, max_regions: int = 32) -> tuple[Tensor, Tensor]:
    """Step 1: r_{n,c} = normalize(mean of the key pixels of class c in image n), for the R largest classes by area.

    Args:
        k: key embeddings [N, D, h, w], unit norm over D, float32.
        y: union labels [N, h, w], -1 = ignore.

    Returns: r [N, R, D] with zeros where empty, labels [N, R] int64 with -1 where empty.
    """
    total, area = class_totals(k, y, num_classes)
    largest, label = area.topk(min(max_regions, num_classes), dim=1)  # [N, R]
    total = total.gather(1, label[..., None].expand(-1, -1, total.shape[2]))
    empty = largest == 0
    r = F.normalize(total, dim=2).masked_fill(empty[..., None], 0.0)  # the area divides out of the direction
    missing = max_regions - label.shape[1]  # fewer classes than R
    return F.pad(r, (0, 0, 0, missing)), F.pad(label.masked_fill(empty, -1), (0, missing), value=-1)


class PrototypeBank(nn.Module):
    """A FIFO ring of M image slots with running class sums (step 2: p_c = normalize(mean of r_{n,c} over the bank)).

    Buffers (all of them in the checkpoint):
        bank_feat [M, R, D], bank_label [M, R] (-1 = empty), class_sum [C, D], class_count [C],
        proto [C, D] unit norm, proto_valid [C] (seen at least once), ptr, updates.

    A class whose last image left the bank keeps its last prototype; a class never seen is not valid.
    `update="ema"`: p_c <- normalize(m_p p_c + (1 - m_p) mean of the batch's r_{.,c}); the ring then only feeds the
    region arm.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        size: int = 4096,
        max_regions: int = 32,
        update: str = "bank",
        ema_m: float = 0.99,
        recompute_every: int = 1000,
    ):
        super().__init__()
        self.size, self.max_regions, self.update_rule, self.ema_m = size, max_regions, update, ema_m
        self.recompute_every = recompute_every
        self.bank_feat: Tensor
        self.bank_label: Tensor
        self.class_sum: Tensor
        self.class_count: Tensor
        self.proto: Tensor
        self.proto_valid: Tensor
        self.ptr: Tensor
        self.updates: Tensor
        self.register_buffer("bank_feat", torch.zeros(size, max_regions, dim))
        self.register_buffer("bank_label", torch.full((size, max_regions), -1))
        self.register_buffer("class_sum", torch.zeros(num_classes, dim))
        self.register_buffer("class_count", torch.zeros(num_classes))
        self.register_buffer("proto", torch.zeros(num_classes, dim))
        self.register_buffer("proto_valid", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def check_batch(self, batch: int) -> None:
        """UserError unless a global batch of `batch` images divides the ring."""
        if self.size % batch:
            fits = [b for b in range(1, 2 * batch) if self.size % b == 0]
            nearest = min(fits, key=lambda b: abs(b - batch))
            raise UserError(
                f"--bank-size {self.size} does not divide by the global batch of {batch}; "
                f"take --bank-size {max(1, round(self.size / batch)) * batch} or --batch-size {nearest}"
            )

    def _sums(self, r: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count of regions by class: [C, D], [C]. Empty regions are zero vectors with count 0."""
        taken = (label >= 0).reshape(-1)
        index = label.reshape(-1).clamp(min=0)
        weight = taken.to(r.dtype)
        total = torch.zeros_like(self.class_sum).index_add_(0, index, r.reshape(-1, r.shape[-1]) * weight[:, None])
        return total, torch.zeros_like(self.class_count).index_add_(0, index, weight)

    @torch.no_grad()
    def enqueue(self, r: Tensor, label: Tensor) -> None:
        """Put the regions of N images (of all processes, in the same order everywhere) into the ring.

        Args:
            r: [N, R, D] float32 from `region_means`; label: [N, R]. N divides M (`check_batch`).
        """
        n = len(label)
        slots = (self.ptr + torch.arange(n, device=label.device)) % self.size
        old_sum, old_count = self._sums(self.bank_feat[slots], self.bank_label[slots])
        new_sum, new_count = self._sums(r, label)
        self.bank_feat[slots], self.bank_label[slots] = r, label
        self.ptr.add_(n).remainder_(self.size)
        self.updates.add_(1)
        self.class_sum.add_(new_sum - old_sum)
        self.class_count.add_(new_count - old_count)
        if self.recompute_every and self.updates % self.recompute_every == 0:  # undo float drift
            total, count = self._sums(self.bank_feat, self.bank_label)
            self.class_sum.copy_(total)
            self.class_count.copy_(count)
        if self.update_rule == "bank":
            fresh, present = F.normalize(self.class_sum, dim=1), self.class_count > 0.5
        else:
            mean = new_sum / new_count.clamp(min=1)[:, None]
            old = torch.where(self.proto_valid[:, None], self.ema_m * self.proto, 0.0)
            fresh = F.normalize(old + torch.where(self.proto_valid[:, None], 1 - self.ema_m, 1.0) * mean, dim=1)
            present = new_count > 0
        self.proto.copy_(torch.where(present[:, None], fresh, self.proto))
        self.proto_valid.logical_or_(present)

    def mean_offdiag_cos(self) -> Tensor:
        """Mean cosine between different valid prototypes; near 1 for an epoch means that the run is dead."""
        p = self.proto * self.proto_valid[:, None]
        v = self.proto_valid.sum()
        return (p.sum(0).square().sum() - v) / (v * (v - 1)).clamp(min=1)
