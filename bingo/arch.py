"""The networks of students and teachers, under the parameter names of the release and of torchvision.

ResNet-18 to 152 (release bingo/arch/resnet.py), SwAV's ResNet-50x2 (release bingo/arch/wide_resnet.py), EfficientNet-B0
(release bingo/arch/efficientnet_pytorch) and MobileNet-v3-Large, which the paper reports and the release lacks. Average
pooling is adaptive everywhere: the release's AvgPool2d(7) takes 224 pixels alone and gives the same there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError, timm_nets

STEMS = ("imagenet", "cifar", "cifar_pool")
# Residual blocks in each of the four stages; whether they are bottlenecks.
RESNETS: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet10": ((1, 1, 1, 1), False),
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
    "resnet50w2": ((3, 4, 6, 3), True),
}
ARCHS = (*RESNETS, "efficientnet-b0", "mobilenetv3")
CHOICES = timm_nets.Archs(ARCHS)


class Encoder(nn.Module, ABC):
    """A backbone and its head `fc` (nn.Identity until one is set).

    Attributes: `num_features`, the width of the pooled vector; `last_id`, the id of the map that is pooled.
    """

    num_features: int
    last_id: int
    fc: nn.Module
    report: str = ""  # what was loaded from a file

    @abstractmethod
    def steps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(block id, feature map [B, C, h, w]) from the first convolution to the map that is pooled."""

    def head_input(self, pooled: Tensor) -> Tensor:
        """What `fc` receives: the pooled vector, after dropout where the network has it."""
        return pooled

    def maps(self, x: Tensor, ids: Iterable[int]) -> dict[int, Tensor]:
        """Feature maps of the block ids asked for; blocks after the last one are not computed.

        Ids as in the release's resnet_cls.py: 0 the first convolution, 1 its activation, then one id a block.
        """
        wanted = set(ids)
        if not wanted or min(wanted) < 0 or max(wanted) > self.last_id:
            raise UserError(f"block ids {sorted(wanted)}: this network has 0 to {self.last_id}")
        found = {}
        for number, value in self.steps(x):
            if number in wanted:
                found[number] = value
            if number == max(wanted):
                break
        return found

    def forward(self, x: Tensor, pre_out: bool = False) -> Tensor:
        """Images [B, 3, H, W] -> `fc` of the pooled vector, or with `pre_out` the pooled vector [B, num_features]."""
        last = self.maps(x, [self.last_id])[self.last_id]
        pooled = F.adaptive_avg_pool2d(last, 1).flatten(1)
        return pooled if pre_out else self.fc(self.head_input(pooled))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample = _shortcut(inputs, planes * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class ResNet(Encoder):
    """torchvision's ResNet with a choice of width and stem.

    Args:
        layers: residual blocks in each stage.
        width: channels of the first stage; the others double it.
        stem: `imagenet` 7x7/2 and max-pool, `cifar` 3x3/1, `cifar_pool` 3x3/1 and max-pool.
        pad_first: SwAV's geometry, an explicit pad of 1 before a convolution that pads by 2 instead of 3.
    """

    def __init__(self, layers: Iterable[int], bottleneck: bool, width: int, stem: str, pad_first: bool = False):
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.padding = nn.ConstantPad2d(1, 0.0) if pad_first else nn.Identity()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, 2, 2 if pad_first else 3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, 1, 0 if pad_first else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        channels, self.last_id = width, 1
        for stage, blocks in enumerate(layers):
            planes, stage_blocks = width * 2**stage, []
            for index in range(blocks):
                stage_blocks.append(block(channels, planes, 2 if stage > 0 and index == 0 else 1))
                channels = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stage_blocks))
            self.last_id += blocks
        self.num_features = channels
        self.fc = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # release bingo/arch/resnet.py
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))

    def steps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self.conv1(self.padding(x))
        yield 0, x
        x = F.relu(self.bn1(x), inplace=True)
        yield 1, x
        x, number = self.maxpool(x), 1
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for block in getattr(self, stage):
                x, number = block(x), number + 1
                yield number, x


class SameConv2d(nn.Conv2d):
    """TensorFlow's "same" padding: the output has ceil(size / stride) pixels, the odd pixel is padded at the end.

    The release computes the padding once for 224 pixels; here it follows the input and is equal at 224.
    """

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


# EfficientNet-B0: (repeats, kernel, stride, expansion, outputs) of each group of blocks.
B0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# TensorFlow's momentum .99 is PyTorch's .01 (release bingo/arch/efficientnet_pytorch/utils.py).
_TfNorm = partial(nn.BatchNorm2d, momentum=0.01, eps=1e-3)


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation (a quarter of the block's inputs) and drop-connect."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, drop: float):
        super().__init__()
        inner, squeezed = inputs * expansion, max(1, inputs // 4)
        self.expand, self.drop = expansion != 1, drop
        if self.expand:
            self._expand_conv = SameConv2d(inputs, inner, 1, bias=False)
            self._bn0 = _TfNorm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _TfNorm(inner)
        self._se_reduce = SameConv2d(inner, squeezed, 1)
        self._se_expand = SameConv2d(squeezed, inner, 1)
        self._project_conv = SameConv2d(inner, outputs, 1, bias=False)
        self._bn2 = _TfNorm(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.silu(self._bn1(self._depthwise_conv(y)))
        gate = self._se_expand(F.silu(self._se_reduce(F.adaptive_avg_pool2d(y, 1))))
        y = self._bn2(self._project_conv(torch.sigmoid(gate) * y))
        if not self.residual:
            return y
        if self.training and self.drop > 0:  # a sample's branch is dropped, or scaled up to keep the mean
            keep = 1 - self.drop
            y = y / keep * torch.floor(keep + torch.rand(len(y), 1, 1, 1, device=y.device)).to(y.dtype)
        return y + x


class EfficientNet(Encoder):
    """EfficientNet-B0 with the release's settings: drop-connect .2 * block / blocks, dropout .2 before `fc`.

    Both are active while the student is distilled, as in the release. Convolutions keep PyTorch's default init.
    """

    num_features = 1280

    def __init__(self, dropout: float = 0.2, drop_connect: float = 0.2):
        super().__init__()
        self.dropout = dropout
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _TfNorm(32)
        total, inputs = sum(row[0] for row in B0), 32
        blocks: list[MBConv] = []
        for repeats, kernel, stride, expansion, outputs in B0:
            for index in range(repeats):
                drop = drop_connect * len(blocks) / total
                blocks.append(MBConv(inputs, outputs, kernel, stride if index == 0 else 1, expansion, drop))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(inputs, self.num_features, 1, bias=False)
        self._bn1 = _TfNorm(self.num_features)
        self.fc = nn.Identity()
        self.last_id = 2 + total

    def steps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        x = self._conv_stem(x)
        yield 0, x
        x = F.silu(self._bn0(x))
        yield 1, x
        for number, block in enumerate(self._blocks, 2):
            x = block(x)
            yield number, x
        yield self.last_id, F.silu(self._bn1(self._conv_head(x)))

    def head_input(self, pooled: Tensor) -> Tensor:
        return F.dropout(pooled, self.dropout, self.training)


class MobileNetV3(Encoder):
    """torchvision's MobileNet-v3-Large (its batch norm has momentum .01, eps 1e-3 already) up to the 1280-d layer.

    Not in the release. [inferred]: features are the 1280 hidden units before the classifier, no dropout.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v3_large

        net = mobilenet_v3_large(weights=None)
        self.features = net.features
        self.classifier = nn.Sequential(net.classifier[0])  # key classifier.0, as in torchvision
        self.fc = nn.Identity()
        self.last_id = len(self.features)

    def steps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        for number, block in enumerate(self.features):
            x = block(x)
            yield number, x
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        yield self.last_id, F.hardswish(self.classifier(pooled))[:, :, None, None]


def build(name: str, width: int = 64, stem: str = "imagenet") -> Encoder:
    """A new network without a head.

    Args:
        name: one of ARCHS, or timm:NAME. `resnet10` has one block a stage (small experiments), `resnet50w2` is SwAV's.
        width: channels of the first stage of a ResNet (`resnet50w2` doubles it); all stages scale with it.
        stem: `imagenet`, or for small images `cifar` (no reduction) and `cifar_pool` (reduction by 2).

    Raises:
        UserError: an unknown name or stem, or a width or stem that the network does not have.
    """
    if name.startswith(timm_nets.PREFIX):
        return timm_nets.build(name, width, stem)
    if stem not in STEMS:
        raise UserError(f"stem {stem!r} is unknown; choose from {', '.join(STEMS)}")
    if name in RESNETS:
        if width < 1:
            raise UserError(f"width {width}: the first stage needs at least one channel")
        layers, bottleneck = RESNETS[name]
        wide = name.endswith("w2")
        return ResNet(layers, bottleneck, width * 2 if wide else width, stem, pad_first=wide)
    if name not in ARCHS:
        raise UserError(f"architecture {name!r} is unknown; choose from {', '.join(ARCHS)}")
    if width != 64 or stem != "imagenet":
        raise UserError(f"{name} has one width and stem only; leave --width and --stem out, or choose a ResNet")
    return EfficientNet() if name == "efficientnet-b0" else MobileNetV3()


def mlp_head(in_features: int, dim: int = 128, hidden: int = 2048, norm: bool = False) -> nn.Sequential:
    """Projection head [B, in_features] -> [B, dim]: MoCo v2's two layers, or with `norm` SwAV's (BN after the first).

    The hidden width is 2048 for every student in the release (bingo/moco/builder.py), whatever its features.
    """
    middle: list[nn.Module] = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(in_features, hidden), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, dim))
