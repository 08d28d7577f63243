"""Backbones (ResNets with torchvision's key names, WRN-28), and the encoder: backbone f, heads h and g."""

import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, timm_nets
from shared_utils.resnet import BasicBlock, Bottleneck

DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
ARCHS = timm_nets.Archs((*DEPTHS, "wrn28"))
STEMS = ("imagenet", "cifar", "cifar_pool")


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inplanes: int, planes: int, n: int, stride: int
) -> nn.Sequential:
    out, down = planes * block.expansion, None
    if stride != 1 or inplanes != out:
        down = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    first = block(inplanes, planes, stride, down)
    return nn.Sequential(first, *(block(out, planes) for _ in range(1, n)))


def _init(module: nn.Module) -> None:
    """Convolutions by He (fan out), batch norms 1 and 0, as in torchvision."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


def set_norm_momentum(module: nn.Module, momentum: float) -> None:
    """Of the running statistics of every batch norm."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = momentum


class ResNet(nn.Module):
    """Images [B, 3, H, W] -> pooled features [B, num_features].

    Args:
        width: channels of the first stage, 64 in the paper. stem: `imagenet` 7x7/2 and max pooling, `cifar` 3x3/1,
            `cifar_pool` 3x3/1 and max pooling.
    """

    def __init__(self, name: str, width: int = 64, stem: str = "imagenet"):
        super().__init__()
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
        self.num_features = inplanes
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return x.mean((2, 3))


class _Wide(nn.Module):
    """Pre-activation block of two 3x3 convolutions with leaky ReLU, as in FixMatch's wide ResNet."""

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inplanes), nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.down = nn.Conv2d(inplanes, planes, 1, stride, bias=False) if inplanes != planes or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.bn1(x), 0.1)
        skip = x if self.down is None else self.down(y)
        return skip + self.conv2(F.leaky_relu(self.bn2(self.conv1(y)), 0.1))


class WideResNet(nn.Module):
    """WRN-28 for small images; `width` 32 is WRN-28-2. Images [B, 3, H, W] -> [B, 4 width]."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        inplanes = 16
        for i in range(3):
            planes = width << i
            blocks = [_Wide(inplanes if j == 0 else planes, planes, 2 if i and not j else 1) for j in range(4)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inplanes = planes
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.num_features = inplanes
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for i in range(1, 4):
            x = self.get_submodule(f"layer{i}")(x)
        return F.leaky_relu(self.bn1(x), 0.1).mean((2, 3))


class Encoder(nn.Module):
    """`backbone` f, `fc` the class head h (linear), `proj` the projection head g (Linear, ReLU, Linear; keys 0, 2)."""

    def __init__(self, backbone: ResNet | WideResNet, classes: int, dim: int = 128):
        super().__init__()
        features, self.classes, self.dim = backbone.num_features, classes, dim
        self.backbone = backbone
        self.fc = nn.Linear(features, classes)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)
        self.proj = nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> logits [B, C] and unit embeddings [B, D], float32."""
        h = self.backbone(x)  # [B, F]
        return self.fc(h).float(), F.normalize(self.proj(h).float(), dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C], float32."""
        return self.fc(self.backbone(x)).float()

    def embed(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> unit embeddings [B, D], float32."""
        return F.normalize(self.proj(self.backbone(x)).float(), dim=1)


def build(name: str, width: int = 64, stem: str = "imagenet") -> ResNet | WideResNet:
    """Backbone `name`: resnet10 (one block a stage, for small tiers), 18, 50, wrn28 (takes no stem), or timm:NAME."""
    if name.startswith(timm_nets.PREFIX):
        return timm_nets.build(name, width, stem)
    if name not in ARCHS:
        raise UserError(f"unknown --arch {name}; choose from {', '.join(ARCHS)}")
    if stem not in STEMS:
        raise UserError(f"unknown --stem {stem}; choose from {', '.join(STEMS)}")
    return WideResNet(width) if name == "wrn28" else ResNet(name, width, stem)
