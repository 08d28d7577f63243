"""ResNets with torchvision's key names and MoCo's initialisation, any width, ImageNet or CIFAR stem.

Block ids, as the linear evaluation of the authors' MoCo code counts them: conv1 is 0, the first ReLU 1, then one for
each residual block in order (ResNet-50: layer1 = 2..4, layer2 = 5..8, layer3 = 9..14, layer4 = 15..17).
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from shared_utils import UserError, timm_nets
from shared_utils.resnet import BasicBlock, Bottleneck

DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
ARCHS = timm_nets.Archs(DEPTHS)
STEMS = ("imagenet", "cifar", "cifar_pool")
DROP = ("fc.*", "projection_head.*", "prototypes.*")  # heads, of other methods too


def mlp_head(in_features: int, dim: int = 128, hidden: int | None = None) -> nn.Sequential:
    """Linear, ReLU, Linear (keys 0 and 2); `hidden` None: as wide as its input, as in MoCo v2."""
    hidden = hidden or in_features
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inplanes: int, planes: int, n: int, stride: int
) -> nn.Sequential:
    out, down = planes * block.expansion, None
    if stride != 1 or inplanes != out:
        down = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    first = block(inplanes, planes, stride, down)
    return nn.Sequential(first, *(block(out, planes) for _ in range(1, n)))


def _init(module: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (k k C_out))), batch norms 1 and 0 (the authors' MoCo code)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
            nn.init.normal_(m.weight, 0, math.sqrt(2 / fan))
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


class Encoder(nn.Module):
    """A ResNet. `fc` is its head; `num_features` is the width of the pooled vector before it."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, name: str, width: int = 64, stem: str = "imagenet"):
        super().__init__()
        if name not in DEPTHS:
            raise UserError(f"unknown --arch {name}; choose from {', '.join(DEPTHS)}")
        if stem not in STEMS:
            raise UserError(f"unknown --stem {stem}; choose from {', '.join(STEMS)}")
        block, depths = DEPTHS[name]
        self.conv1 = nn.Conv2d(3, width, *((7, 2, 3) if stem == "imagenet" else (3, 1, 1)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        inplanes = width
        for i, depth in enumerate(depths):
            planes = width << i
            setattr(self, f"layer{i + 1}", _stage(block, inplanes, planes, depth, 1 if i == 0 else 2))
            inplanes = planes * block.expansion
        # The authors' MoCo code pools 7 x 7, which takes 224-pixel images only; this is the same there.
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = inplanes
        self.fc: nn.Module = nn.Identity()
        _init(self)

    def _pool(self, x: Tensor) -> Tensor:
        return self.avgpool(x).flatten(1)

    def _layer3(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor, pre_out: bool = False) -> Tensor:
        """Images [B, 3, H, W] -> pooled features [B, num_features] if `pre_out`, else the output of `fc` [B, dim]."""
        h = self._pool(self.layer4(self._layer3(x)))
        return h if pre_out else self.fc(h)

    def maps(self, x: Tensor, ids: Sequence[int]) -> dict[int, Tensor]:
        """Feature maps [B, C, h, w] of the blocks asked for; nothing after the last of them is computed.

        Raises:
            UserError: no such block.
        """
        steps: list[nn.Module] = [self.conv1, nn.Sequential(self.bn1, self.relu)]
        blocks = [b for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for b in stage]
        steps += [nn.Sequential(self.maxpool, blocks[0]), *blocks[1:]]
        wrong = [i for i in ids if not 0 <= i < len(steps)]
        if wrong or not ids:
            raise UserError(f"block ids {list(ids)}: this network has the blocks 0..{len(steps) - 1}")
        out: dict[int, Tensor] = {}
        for i, step in enumerate(steps[: max(ids) + 1]):
            x = step(x)
            if i in ids:
                out[i] = x
        return out


def build(name: str, width: int = 64, stem: str = "imagenet") -> Encoder:
    """Encoder `name` (resnet10, one block a stage, for small tiers; resnet18 34 50 101 152; timm:NAME), no head.

    Args:
        width: channels of the first stage, 64 in the paper. stem: `imagenet` 7x7/2 and max pooling, `cifar` 3x3/1,
            `cifar_pool` 3x3/1 and max pooling.
    """
    if name.startswith(timm_nets.PREFIX):
        return timm_nets.build(name, width, stem)
    return Encoder(name, width, stem)
