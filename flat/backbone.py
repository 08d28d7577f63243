"""Encoders: Conv4, ResNet10/18 (names of the weights as in CloserLookFewShot), ResNet12 (MetaOptNet), WRN-28-10 (BF3S).

An encoder is one `trunk`; its last stage and its pooling are known, so that a decoder can branch off before them.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError

MODELS = ("Conv4", "ResNet10", "ResNet12", "ResNet18", "WRN28")
WIDTHS = {"Conv4": 64, "ResNet10": 64, "ResNet12": 64, "ResNet18": 64, "WRN28": 160}  # channels of the first stage
SMALLEST = {"Conv4": 16, "ResNet10": 16, "ResNet12": 16, "ResNet18": 16, "WRN28": 8}  # pixels


def init(module: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (k * k * out))), batch norm 1 and 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


class ConvBlock(nn.Module):
    """Convolution (with bias), batch norm, ReLU, max pooling: [B, c, h, w] -> [B, c', h/2, w/2]."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.C = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.BN = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.BN(self.C(x))), 2)


class SimpleBlock(nn.Module):
    """Basic residual block; a 1x1 convolution in the shortcut only where the number of channels changes."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.C1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.BN1 = nn.BatchNorm2d(c_out)
        self.C2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.BN2 = nn.BatchNorm2d(c_out)
        if c_in != c_out:
            self.shortcut: nn.Conv2d | None = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.BNshortcut = nn.BatchNorm2d(c_out)
        else:
            self.shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.BN2(self.C2(F.relu(self.BN1(self.C1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.BNshortcut(self.shortcut(x))))


def drop_block(x: Tensor, rate: float, size: int) -> Tensor:
    """DropBlock: squares of `size` are dropped from each map, `rate` of the area, the rest is scaled up."""
    size = min(size, x.shape[-1])
    gamma = rate / size**2 * x.shape[-1] ** 2 / (x.shape[-1] - size + 1) ** 2
    seeds = (torch.rand(*x.shape[:2], *(side - size + 1 for side in x.shape[2:]), device=x.device) < gamma).float()
    dropped = F.max_pool2d(F.pad(seeds, (size - 1,) * 4), size, 1)  # [B, C, h, w]
    kept = 1 - dropped
    return x * kept * (kept.numel() / kept.sum().clamp(min=1))


class ResNet12Block(nn.Module):
    """Three convolutions and a 1x1 shortcut, LeakyReLU(0.1), max pooling; in training DropBlock where `block_size` is
    above 1 (of `ramp` times the rate), else dropout of single values at the whole rate (MetaOptNet)."""

    def __init__(self, c_in: int, c_out: int, drop: float, block_size: int):
        super().__init__()
        self.drop, self.block_size, self.ramp = drop, block_size, 1.0
        sizes = (c_in, c_out, c_out)
        self.convs = nn.ModuleList(nn.Conv2d(c, c_out, 3, padding=1, bias=False) for c in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c_out) for _ in sizes)
        self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            out = norm(conv(out))
            out = F.leaky_relu(out, 0.1) if i < 2 else F.leaky_relu(out + self.shortcut(x), 0.1)
        out = F.max_pool2d(out, 2)
        if self.training and self.drop:
            blocks = self.block_size > 1
            out = drop_block(out, self.ramp * self.drop, self.block_size) if blocks else F.dropout(out, self.drop)
        return out


def ramp_drop_block(network: nn.Module, step: int, over: int) -> None:
    """MetaOptNet's schedule: at `step`, from 0, DropBlock drops min(1, (step + 1) / over) of its rate; over 0: all."""
    for module in network.modules():
        if isinstance(module, ResNet12Block):
            module.ramp = min(1.0, (step + 1) / over) if over else 1.0


class WideBlock(nn.Module):
    """Pre-activation block of a wide ResNet."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.BN1, self.C1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.BN2, self.C2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        pre = F.relu(self.BN1(x))
        out = self.C2(F.relu(self.BN2(self.C1(pre))))
        return out + (x if self.shortcut is None else self.shortcut(pre))


class Encoder(nn.Module):
    """E: images [B, 3, s, s] -> features [B, num_features].

    Attributes: `last`, index in the trunk of the first module of the last stage; `tail`, of the pooling; `middle`,
    where the first half ends, with `middle_channels`; `channels` of the last map.
    `add_noise` makes the representation stochastic (AVT): h' = h + 0.001 exp(logvar / 2) eps after the first half.
    """

    def __init__(self, trunk: list[nn.Module], last: int, tail: int, middle: int, channels: int, inner: int):
        super().__init__()
        self.trunk = nn.Sequential(*trunk)
        self.last, self.tail, self.middle, self.channels, self.middle_channels = last, tail, middle, channels, inner
        self.num_features = channels
        self.noise: nn.Module | None = None
        self.noise_in_eval = False
        init(self)

    def add_noise(self, in_eval: bool) -> None:
        """A 1x1 convolution and batch norm predict the log-variance from the map itself, which is the mean."""
        c = self.middle_channels
        self.noise = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.noise_in_eval = in_eval
        init(self.noise)

    def new_last_stage(self) -> nn.Sequential:
        """A stage shaped as the last one, with weights of its own, newly drawn."""
        stage = copy.deepcopy(self.trunk[self.last : self.tail])
        init(stage)
        return stage

    def penultimate(self, x: Tensor) -> Tensor:
        """Images [B, 3, s, s] -> maps [B, C', h, w] that enter the last stage."""
        h = self.trunk[: self.middle](x)
        if self.noise is not None and (self.training or self.noise_in_eval):
            h = h + 0.001 * (0.5 * self.noise(h)).exp() * torch.randn_like(h)
        return self.trunk[self.middle : self.last](h)

    def finish(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps before the last stage -> last map [B, channels, h, w] and features [B, num_features]."""
        final = self.trunk[self.last : self.tail](maps)
        return final, self.trunk[self.tail :](final)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.penultimate(x))[1]


def _resnet(depths: list[int], width: int) -> Encoder:
    trunk: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    trunk.append(nn.MaxPool2d(3, 2, 1))
    c, starts = width, []
    for stage, depth in enumerate(depths):
        starts.append(len(trunk))
        for block in range(depth):
            trunk.append(SimpleBlock(c, width << stage, 2 if stage and not block else 1))
            c = width << stage
    tail = len(trunk)
    # CloserLookFewShot has a fixed average over 7 x 7; this one is equal at 224 pixels and takes other sizes.
    trunk += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Encoder(trunk, starts[-1], tail, starts[2], c, c // 4)


def torchvision_names(encoder: Encoder) -> nn.Module | None:
    """The very weights of a ResNet10 or ResNet18 under torchvision's names; None for other backbones."""
    blocks = [module for module in encoder.trunk if isinstance(module, SimpleBlock)]
    if not blocks:
        return None
    net, depth = nn.Module(), len(blocks) // 4
    net.conv1, net.bn1 = encoder.trunk[0], encoder.trunk[1]
    for i, block in enumerate(blocks):
        if i % depth == 0:
            net.add_module(f"layer{i // depth + 1}", nn.Sequential())
        own = nn.Module()
        own.conv1, own.bn1, own.conv2, own.bn2 = block.C1, block.BN1, block.C2, block.BN2
        if block.shortcut is not None:
            own.downsample = nn.Sequential(block.shortcut, block.BNshortcut)
        getattr(net, f"layer{i // depth + 1}").append(own)
    return net


def build(model: str, image_size: int, width: int = 0, drop: float = 0.1, block_size: int = 0) -> Encoder:
    """A backbone by name; UserError names what exists.

    Args:
        width: channels of the first stage, 0: the published one.
        drop: rate of ResNet12's dropout and, in its last two blocks, DropBlock.
        block_size: side of DropBlock's squares, 0: MetaOptNet's, 5, or 2 for images of CIFAR's size.
    """
    if model not in MODELS:
        raise UserError(f"--model {model}: unknown backbone; choose from {', '.join(MODELS)}")
    if width < 0:
        raise UserError(f"--width {width}: must be 0 (the published width, {WIDTHS[model]}) or more")
    if image_size < SMALLEST[model]:
        raise UserError(f"--image_size {image_size}: {model} halves its maps down to nothing below {SMALLEST[model]}")
    width = width or WIDTHS[model]
    if model == "Conv4":
        blocks: list[nn.Module] = [ConvBlock(3 if i == 0 else width, width) for i in range(4)]
        encoder = Encoder([*blocks, nn.Flatten()], 3, 4, 2, width, width)
        encoder.num_features = width * (image_size // 16) ** 2  # 1600 at 84 pixels
        return encoder
    if model in ("ResNet10", "ResNet18"):
        return _resnet([1] * 4 if model == "ResNet10" else [2] * 4, width)
    if model == "ResNet12":
        sizes = [width, width * 5 // 2, width * 5, width * 10]  # 64, 160, 320, 640
        side = block_size or (2 if image_size <= 40 else 5)
        blocks = [
            ResNet12Block(3 if i == 0 else sizes[i - 1], c, drop, side if i > 1 else 1) for i, c in enumerate(sizes)
        ]
        return Encoder([*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()], 3, 4, 2, sizes[-1], sizes[1])
    strides = (1, 2, 2) if image_size <= 40 else (2, 2, 2)
    trunk: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    c, starts = 16, []
    for stage, stride in enumerate(strides):
        starts.append(len(trunk))
        for block in range(4):
            trunk.append(WideBlock(c, width << stage, 1 if block else stride))
            c = width << stage
    trunk += [nn.BatchNorm2d(c), nn.ReLU()]
    tail = len(trunk)
    return Encoder([*trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten()], starts[-1], tail, starts[2], c, c // 2)
