"""Network of MDP: a plain dilated ResNet, a DeepLabV3 head and a projection head.

Every parameter is named as in mmsegmentation (whose ``ResNet`` is named as torchvision's), so that a pretrained
``backbone`` and ``decode_head`` load into mmsegmentation's DeepLabV3 key by key. The shape comments use B images of
H x W pixels; h = H/8 and w = W/8 at output stride 8.

Sources: plain ResNet-50 instead of V1c and no auxiliary head, authors' rebuttal draft (not in the paper); dilations
and ASPP head, mmsegmentation; projection head, [inferred] from the MoCo-v2 conventions of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared_utils import UserError

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101")
HEADS = ("aspp", "sep_aspp", "none")


def _kaiming(module: nn.Module) -> None:
    """He initialisation, normal, fan-out: mmsegmentation's default for the convolutions of backbone and heads."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


# ---------------------------------------------------------------------------------------------------------- backbone
class BasicBlock(nn.Module):
    """Two 3x3 convolutions; only the first one is dilated, as in mmsegmentation."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; the 3x3 carries stride and dilation ("pytorch" style)."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


STAGES: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """Plain ResNet (7x7 stem) at output stride 8, the backbone of mmsegmentation's ``r50-d8`` models.

    Strides (1, 2, 1, 1), dilations (1, 1, 2, 4), contracted: the first block of a dilated stage uses half of its
    dilation. ``base_channels`` below 64 gives a narrow network for small data.
    """

    def __init__(
        self, depth: int = 50, base_channels: int = 64, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), zero_init=True
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise UserError(f"ResNet depth {depth} is not known; choose one of {sorted(STAGES)}")
        block, counts = STAGES[depth]
        self.conv1 = nn.Conv2d(3, base_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        c = [base_channels * 2**i * block.expansion for i in range(4)]
        self.layer1 = self._stage(block, base_channels, c[0], counts[0], strides[0], dilations[0])
        self.layer2 = self._stage(block, c[0], c[1], counts[1], strides[1], dilations[1])
        self.layer3 = self._stage(block, c[1], c[2], counts[2], strides[2], dilations[2])
        self.layer4 = self._stage(block, c[2], c[3], counts[3], strides[3], dilations[3])
        self.channels, self.out_channels = c, c[3]
        _kaiming(self)
        if zero_init:  # each residual branch starts at zero, mmsegmentation's default
            for m in self.modules():
                if isinstance(m, (BasicBlock, Bottleneck)):
                    nn.init.zeros_((m.bn3 if isinstance(m, Bottleneck) else m.bn2).weight)

    @staticmethod
    def _stage(
        block: type[BasicBlock | Bottleneck], inplanes: int, outplanes: int, count: int, stride: int, dilation: int
    ) -> nn.Sequential:
        planes = outplanes // block.expansion
        downsample = None
        if stride != 1 or inplanes != outplanes:
            downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
            )
        first = dilation // 2 if dilation > 1 else dilation
        blocks = [block(inplanes, planes, stride, first, downsample)]
        blocks += [block(outplanes, planes, 1, dilation, None) for _ in range(1, count)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> the four stage outputs: [B, c1, H/4, W/4], then three of [B, c, H/8, W/8]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        c1 = self.layer1(x)
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        c4 = self.layer4(c3)
        return c1, c2, c3, c4


# ------------------------------------------------------------------------------------------------------------- heads
class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU; parameters named ``conv`` and ``bn`` as in mmcv's ConvModule."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class SepConvBNReLU(nn.Module):
    """Depthwise 3x3, then pointwise 1x1, each with batch norm and ReLU (mmcv's DepthwiseSeparableConvModule)."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = ConvBNReLU(in_channels, in_channels, 3, dilation, groups=in_channels)
        self.pointwise_conv = ConvBNReLU(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class ASPPHead(nn.Module):
    """Head of DeepLabV3 without its classifier: parallel dilated branches and image pooling, fused by a 3x3.

    The image pooling normalises one value a channel and image: training needs at least two images a process.
    """

    def __init__(self, in_channels: int, channels: int = 512, dilations: tuple[int, ...] = (1, 12, 24, 36)) -> None:
        super().__init__()
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvBNReLU(in_channels, channels, 1))
        self.aspp_modules = nn.ModuleList(self._branch(in_channels, channels, d) for d in dilations)
        self.bottleneck = ConvBNReLU((len(dilations) + 1) * channels, channels, 3)
        self.out_channels = channels
        _kaiming(self)

    def _branch(self, in_channels: int, channels: int, dilation: int) -> nn.Module:
        return ConvBNReLU(in_channels, channels, 1 if dilation == 1 else 3, dilation)

    def pyramid(self, x: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, channels, h, w]."""
        # Bilinear resizing of a 1 x 1 map is its repetition.
        outs = [self.image_pool(x).expand(-1, -1, *x.shape[2:])]
        outs += [branch(x) for branch in self.aspp_modules]
        return self.bottleneck(torch.cat(outs, dim=1))

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.pyramid(features[-1])


class SepASPPHead(ASPPHead):
    """Head of DeepLabV3+ without its classifier: separable branches and a decoder that adds the first stage.

    Its output has stride 4, that of the first stage. ``c1_channels`` is 48 in mmsegmentation for ResNet-50.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        dilations: tuple[int, ...] = (1, 12, 24, 36),
        c1_in_channels: int = 256,
        c1_channels: int = 48,
    ) -> None:
        super().__init__(in_channels, channels, dilations)
        self.c1_bottleneck = ConvBNReLU(c1_in_channels, c1_channels, 1)
        self.sep_bottleneck = nn.Sequential(
            SepConvBNReLU(channels + c1_channels, channels), SepConvBNReLU(channels, channels)
        )
        _kaiming(self)

    def _branch(self, in_channels: int, channels: int, dilation: int) -> nn.Module:
        if dilation == 1:
            return ConvBNReLU(in_channels, channels, 1)
        return SepConvBNReLU(in_channels, channels, dilation)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        c1 = self.c1_bottleneck(features[0])  # [B, c1_channels, H/4, W/4]
        out = F.interpolate(self.pyramid(features[-1]), size=c1.shape[2:], mode="bilinear", align_corners=False)
        return self.sep_bottleneck(torch.cat([out, c1], dim=1))


class IdentityHead(nn.Module):
    """No decode head: the last stage of the backbone goes to the projector as it is."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.out_channels = in_channels

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return features[-1]


class Projector(nn.Sequential):
    """1x1 convolution in -> in, ReLU, 1x1 convolution in -> dim. The caller normalises each pixel's embedding."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__(nn.Conv2d(in_channels, in_channels, 1), nn.ReLU(inplace=True), nn.Conv2d(in_channels, dim, 1))
        _kaiming(self)


# ----------------------------------------------------------------------------------------------------------- network
class Encoder(nn.Module):
    """Backbone, decode head, and either the projector (embeddings) or a linear classifier (cross-entropy arms).

    Args:
        arch: one of ``ARCHS``.
        head: ``aspp`` (DeepLabV3), ``sep_aspp`` (DeepLabV3+, output stride 4) or ``none``.
        dim: D, the length of a pixel's embedding.
        num_classes: above 0, logits of that many classes replace the embeddings (dropout 0.1 before the classifier).
    Raises:
        UserError: unknown ``arch`` or ``head``.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        head: str = "aspp",
        dim: int = 128,
        base_channels: int = 64,
        head_channels: int = 512,
        dilations: tuple[int, ...] = (1, 12, 24, 36),
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if arch not in ARCHS:
            raise UserError(f"architecture '{arch}' is not known; choose one of {', '.join(ARCHS)}")
        self.backbone = ResNet(int(arch.removeprefix("resnet")), base_channels)
        in_channels, dilations = self.backbone.out_channels, tuple(dilations)
        if head == "aspp":
            self.decode_head: ASPPHead | IdentityHead = ASPPHead(in_channels, head_channels, dilations)
        elif head == "sep_aspp":
            c1 = self.backbone.channels[0]
            # 48 of 512, mmsegmentation's ratio, kept for narrow heads.
            c1_channels = max(1, 48 * head_channels // 512)
            self.decode_head = SepASPPHead(in_channels, head_channels, dilations, c1, c1_channels)
        elif head == "none":
            self.decode_head = IdentityHead(in_channels)
        else:
            raise UserError(f"head '{head}' is not known; choose one of {', '.join(HEADS)}")
        channels = self.decode_head.out_channels
        self.num_classes = num_classes
        if num_classes > 0:
            conv = nn.Conv2d(channels, num_classes, 1)
            self.classifier = nn.Sequential(nn.Dropout2d(0.1), conv)
            _kaiming(self.classifier)
            nn.init.normal_(conv.weight, std=0.01)  # as mmsegmentation's conv_seg
        else:
            self.projector = Projector(channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> embeddings [B, D, h, w], not normalised; logits [B, num_classes, h, w] with a classifier."""
        features = self.decode_head(self.backbone(x))  # [B, head_channels, h, w]
        return self.classifier(features) if self.num_classes > 0 else self.projector(features)
