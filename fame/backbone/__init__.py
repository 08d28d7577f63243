"""Networks by name: the release's I3D and R(2+1)D-18, three more of torchvision's, and a small one for small tiers."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import video

from fame.backbone.i3d import I3D
from fame.backbone.small import C3D, Tiny
from shared_utils import UserError

__all__ = ["ARCHS", "I3D", "build"]

RELEASE = ("I3D", "r2plus1d_18")
OTHERS = ("r3d_18", "s3d", "c3d", "tiny")  # not in the release
ARCHS = (*RELEASE, *OTHERS)


class VideoNet(nn.Module):
    """A trunk whose last map is pooled, and a head `fc`; torchvision's names, as in the release.

    Head: `dim` given, the two layers of MoCo's MLP; `classes`, dropout and one layer; else the pooled feature. The
    release starts the last layer at N(0, 0.01), where small networks of a short run collapse: others keep PyTorch's.
    """

    def __init__(
        self, parts: dict[str, nn.Module], features: int, dim: int | None, classes: int | None, dropout: float,
        normalise: bool, release: bool,
    ):  # fmt: skip
        super().__init__()
        self.parts = list(parts)
        for name, part in parts.items():
            self.add_module(name, part)
        self.num_features, self.normalise = features, normalise
        self.dropout = nn.Dropout(dropout)
        if dim is not None:
            self.fc: nn.Module | None = nn.Sequential(
                nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim)
            )
        else:
            self.fc = None if classes is None else nn.Linear(features, classes)
        last = self.fc[-1] if isinstance(self.fc, nn.Sequential) else self.fc
        if isinstance(last, nn.Linear) and (release or classes is not None):
            nn.init.normal_(last.weight, 0, 0.01)
            nn.init.zeros_(last.bias)

    def maps(self, x: Tensor) -> Tensor:
        """The last feature map [B, C, T', H', W']."""
        for name in self.parts:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x).mean((2, 3, 4))  # [B, C]
        if self.fc is None:
            return x
        if self.normalise:
            x = F.normalize(x, dim=1)
        return self.fc(self.dropout(x))


def _resnet(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    net = make()
    return {name: getattr(net, name) for name in ("stem", "layer1", "layer2", "layer3", "layer4")}


def build(
    arch: str,
    dim: int | None = None,
    classes: int | None = None,
    dropout: float = 0.0,
    width: int = 16,
    normalise: bool = False,
) -> nn.Module:
    """A network with a `dim`-number pretraining head, a classifier of `classes`, or (neither) its pooled feature.

    Args:
        width: channels of the first layer of `tiny`; normalise: unit features before the classifier.
    """
    if arch == "I3D":
        return I3D(dim, classes, dropout)
    if arch == "r2plus1d_18":
        parts, features = _resnet(lambda: video.r2plus1d_18(weights=None)), 512
    elif arch == "r3d_18":
        parts, features = _resnet(lambda: video.r3d_18(weights=None)), 512
    elif arch == "s3d":
        parts, features = {"features": video.s3d(weights=None).features}, 1024
    elif arch == "c3d":
        parts, features = {"features": C3D()}, 512
    elif arch == "tiny":
        parts, features = {"features": Tiny(width)}, 8 * width
    else:
        raise UserError(f"--arch {arch}: choose from {', '.join(ARCHS)}")
    return VideoNet(parts, features, dim, classes, dropout, normalise, arch in RELEASE)
