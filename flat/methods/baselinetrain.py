"""Training on base classes with a classifier (names of the weights as in CloserLookFewShot)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flat.aet import Decoder
from flat.backbone import Encoder
from flat.methods.pair import PairModel


class WeightNormLinear(nn.Module):
    """x -> x W^T with W = g v / |v| row by row."""

    def __init__(self, c: int, classes: int):
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(c, classes, bias=False).weight.detach().clone())
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DistLinear(nn.Module):
    """baseline++: cosine to a weight of each class, times a learnt norm of the class, times a fixed scale."""

    def __init__(self, c: int, classes: int):
        super().__init__()
        self.L = WeightNormLinear(c, classes)
        self.scale = 2.0 if classes <= 200 else 10.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.L(x / (x.norm(dim=1, keepdim=True) + 1e-5))


class CosineHead(nn.Module):
    """Cosine to a weight of each class, times one learnt scale that starts at 10 (BF3S)."""

    def __init__(self, c: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, c))
        nn.init.normal_(self.weight, 0, (2 / c) ** 0.5)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def make_head(method: str, c: int, classes: int) -> nn.Module:
    """Classifier [B, c] -> [B, classes] of `baseline`, `baseline++` or `cosine`."""
    if method == "baseline++":
        return DistLinear(c, classes)
    if method == "cosine":
        return CosineHead(c, classes)
    linear = nn.Linear(c, classes)
    nn.init.zeros_(linear.bias)
    return linear


class BaselineTrain(PairModel):
    """Encoder and classifier; the decoder comes last, so that the rest starts equal with and without it."""

    def __init__(
        self, encoder: Encoder, head: nn.Module, decoder: Decoder | None, bn: str, pool: str, both: bool = False
    ):
        """Args: both, classify the transformed copies too (the augmentation control)."""
        super().__init__(encoder, decoder, bn, pool)
        self.classifier, self.both = head, both

    def forward(self, x: Tensor, x_t: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits [B, classes] ([2B, classes], copies last, with `both`), decoded target and raw log-variance."""
        f, f_t, read, read_t = self.encode(x, x_t)
        with torch.autocast(x.device.type, enabled=False):
            seen = torch.cat([f, f_t]) if self.both and f_t is not None else f
            logits = self.classifier(seen.float())
        if self.decoder is None or read_t is None:
            return logits, None, None
        return logits, *self.decode(read, read_t)
