"""The networks of SaGe: ResNet with its four stages, projector and predictor of BYOL, decoder (names of the release).

Sizes in comments are those of the paper: ResNet-50, 224 pixels.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError
from shared_utils.resnet import BasicBlock, Bottleneck

DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
STEMS = ("imagenet", "cifar_pool", "cifar")
HALVINGS = {"imagenet": 5, "cifar_pool": 4, "cifar": 3}  # how often the side of an image is halved up to stage 4


def init_weights(module: nn.Module) -> nn.Module:
    """Kaiming-normal, fan_in, for every convolution and linear layer, biases 0, batch norms 1 and 0; in place."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(m.weight, mode="fan_in", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    return module


class Backbone(nn.Module):
    """f_E, a ResNet without a classifier; keys as torchvision's. Attribute `num_features`: channels of stage 4."""

    def __init__(self, name: str = "resnet50", width: int = 64, stem: str = "imagenet"):
        """Args: width, channels of the first stage; stem, `imagenet` 7x7/2 and max pooling, `cifar_pool` 3x3/1 and max
        pooling, `cifar` 3x3/1."""
        super().__init__()
        if name not in DEPTHS or stem not in STEMS:
            raise UserError(f"unknown network {name}, stem {stem}; choose from {', '.join(DEPTHS)}; {', '.join(STEMS)}")
        block, depths = DEPTHS[name]
        self.conv1 = nn.Conv2d(3, width, *((7, 2, 3) if stem == "imagenet" else (3, 1, 1)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        inplanes = width
        for i, depth in enumerate(depths):
            planes, stride = width << i, 1 if i == 0 else 2
            out, down = planes * block.expansion, None
            if stride != 1 or inplanes != out:
                down = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            blocks = [block(inplanes, planes, stride, down), *(block(out, planes) for _ in range(1, depth))]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inplanes = out
        self.num_features = inplanes
        init_weights(self)

    def forward(self, x: Tensor, stages: int = 4) -> list[Tensor]:
        """Images [B, 3, 224, 224] -> the maps of the first `stages` stages: [B, 256, 56, 56] ... [B, 2048, 7, 7]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        out = []
        for i in range(stages):
            x = getattr(self, f"layer{i + 1}")(x)
            out.append(x)
        return out

    def pooled(self, x: Tensor) -> Tensor:
        """Images -> globally averaged stage 4 [B, 2048], what every evaluation takes."""
        return self(x)[-1].mean((2, 3))


class Neck(nn.Module):
    """Linear, batch norm, ReLU, Linear: the projector (of pooled maps) and the predictor (of vectors)."""

    def __init__(self, in_channels: int, hid_channels: int = 4096, out_channels: int = 256, std: float | None = None):
        """Args: std, of normal weights; None: Kaiming-normal, as the projector's."""
        super().__init__()
        self.fc0 = nn.Linear(in_channels, hid_channels)
        self.bn0 = nn.BatchNorm1d(hid_channels)
        self.fc1 = nn.Linear(hid_channels, out_channels)
        init_weights(self)
        if std is not None:
            nn.init.normal_(self.fc0.weight, 0, std)
            nn.init.normal_(self.fc1.weight, 0, std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] (averaged first) or [B, C] -> [B, out_channels]."""
        x = x.mean((2, 3)) if x.dim() == 4 else x
        return self.fc1(F.relu(self.bn0(self.fc0(x))))


class UpBlock(nn.Module):
    """Transposed convolution that doubles the side, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class Decoder(nn.Module):
    """f_D: the last map through a 1 x 1 bottleneck to an image in -1..1 (release models/decoder.py, live layers only).

    For another network or image size the kernels of `conv7` and `stem` are the side of the map, and there are as many
    doublings as the network has halvings. An image size that is not side x 2^doublings is met by bilinear scaling
    before the last layer.
    """

    def __init__(self, in_channels: int = 2048, side: int = 7, ups: int = 5, img_size: int = 224, width: int = 512):
        """Args: side, of the map; ups, doublings; width, channels of the bottleneck."""
        super().__init__()
        if width % 16:
            raise UserError(f"--decoder_width {width}: must be a multiple of 16")
        self.img_size = img_size
        self.conv7 = nn.Conv2d(in_channels, width, side)
        self.stem = nn.Sequential(nn.ConvTranspose2d(width, width // 2, side), nn.BatchNorm2d(width // 2), nn.ReLU())
        channels = [width // 2, width, width // 2, width // 4, width // 8, width // 16][: ups + 1]
        self.ups = ups
        for i in range(ups):
            setattr(self, f"layer{i}", UpBlock(channels[i], channels[i + 1]))
        self.final = nn.Conv2d(channels[-1], 3, 1)
        init_weights(self)

    def forward(self, e: Tensor) -> Tensor:
        """Map [B, 2048, 7, 7] -> image [B, 3, 224, 224] in -1..1, float32."""
        x = self.conv7(e)  # [B, 512, 1, 1], no norm and no activation: the bottleneck
        x = self.stem(x)  # [B, 256, 7, 7]
        for i in range(self.ups):
            x = getattr(self, f"layer{i}")(x)  # 14, 28, 56, 112, 224
        if x.shape[-1] != self.img_size:
            x = F.interpolate(x, size=self.img_size, mode="bilinear", align_corners=False)
        return self.final(x).float().tanh()


def decoder_for(name: str, width: int, stem: str, img_size: int, decoder_width: int = 0) -> Decoder:
    """The decoder that fits a backbone and an image size; `decoder_width` 0: 8 times the backbone's, as in the release.

    UserError for images too small to halve.
    """
    ups = HALVINGS[stem]
    if img_size < 2**ups:
        raise UserError(
            f"--img_size {img_size}: {name} with stem {stem} halves the side {ups} times, give {2**ups} or more"
        )
    block = DEPTHS[name][0]
    return Decoder(8 * width * block.expansion, math.ceil(img_size / 2**ups), ups, img_size, decoder_width or 8 * width)


def build(name: str, width: int = 64, stem: str = "imagenet") -> Backbone:
    """Backbone `name`, as `shared_utils.evaluation.load_backbone` wants it."""
    return Backbone(name, width, stem)
