"""I3D, the inflated Inception-v1, with TensorFlow's padding; names of the release (backbone/i3d.py) so that its files
load strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Output channels of a mixed block: branch 0; branch 1, reduced and final; branch 2, the same; branch 3.
MIXED = {
    "mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def same_padding(kernel: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """Zeros before and after each axis, last axis first as F.pad wants them; an odd one goes to the end."""
    out: list[int] = []
    for k, s in reversed(list(zip(kernel, stride))):
        total = max(k - s, 0)
        out += [total // 2, total - total // 2]
    return out


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: tuple[int, int, int] = (1, 1, 1),
        stride: tuple[int, int, int] = (1, 1, 1),
    ):
        super().__init__()
        pad = same_padding(kernel, stride)
        self.uneven = pad if pad[::2] != pad[1::2] else None  # what a convolution's own padding cannot do
        own = (0, 0, 0) if self.uneven else (pad[4], pad[2], pad[0])
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, own, bias=False)
        self.batch3d = nn.BatchNorm3d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.batch3d(self.conv3d(F.pad(x, self.uneven) if self.uneven else x)))


class Pool(nn.Module):
    """Max pool after zero padding (its inputs are not negative), rounding sizes up."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride, self.pad = kernel, stride, same_padding(kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(F.pad(x, self.pad), self.kernel, self.stride, ceil_mode=True)


class Mixed(nn.Module):
    def __init__(self, channels: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3: int):
        super().__init__()
        self.branch_0 = Unit(channels, b0)
        self.branch_1 = nn.Sequential(Unit(channels, b1a), Unit(b1a, b1b, (3, 3, 3)))
        self.branch_2 = nn.Sequential(Unit(channels, b2a), Unit(b2a, b2b, (3, 3, 3)))
        self.branch_3 = nn.Sequential(Pool((3, 3, 3), (1, 1, 1)), Unit(channels, b3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], 1)


class UnitNorm(nn.Module):
    """x / ||x||_2 of each row, without a floor."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt()


class I3D(nn.Module):
    """Clips [B, 3, T, H, W] -> map [B, 1024, T/8, H/32, W/32] -> head.

    The head is `id_head` (two layers, 128 unit numbers) for pretraining, or dropout and `fc` with log-softmax for
    `classes` classes; with neither it is the pooled feature [B, 1024].
    """

    num_features = 1024

    def __init__(self, dim: int | None = None, classes: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.conv3d_1a_7x7 = Unit(3, 64, (7, 7, 7), (2, 2, 2))
        self.conv3d_2b_1x1 = Unit(64, 64)
        self.conv3d_2c_3x3 = Unit(64, 192, (3, 3, 3))
        for name, widths in MIXED.items():
            setattr(self, name, Mixed(*widths))
        self.pool_hw = Pool((1, 3, 3), (1, 2, 2))
        self.pool_4a, self.pool_5a = Pool((3, 3, 3), (2, 2, 2)), Pool((2, 2, 2), (2, 2, 2))
        if dim is not None:
            self.id_head = nn.Sequential(
                nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, dim),
                UnitNorm(),
            )  # fmt: skip
        elif classes is not None:
            self.dropout = nn.Dropout(dropout)
            self.fc = nn.Linear(1024, classes)

    def maps(self, x: Tensor) -> Tensor:
        """The last feature map: (B, 1024, 2, 7, 7) for 16 x 224 x 224."""
        x = self.pool_hw(self.conv3d_1a_7x7(x))
        x = self.pool_hw(self.conv3d_2c_3x3(self.conv3d_2b_1x1(x)))
        for name in MIXED:
            if name == "mixed_4b":
                x = self.pool_4a(x)
            elif name == "mixed_5b":
                x = self.pool_5a(x)
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x)
        if hasattr(self, "id_head"):
            return self.id_head(x)
        x = x.mean((2, 3, 4))  # [B, 1024]
        return F.log_softmax(self.fc(self.dropout(x)), 1) if hasattr(self, "fc") else x
