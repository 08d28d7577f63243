"""Classifiers of the paper's tasks: ResNets (torchvision's), CIFAR ResNets, wide ResNets, ResNet-12.

Each has `features(x)` [B, 3, H, W] -> [B, num_features] and a linear `fc` on it.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mra.models_mae import run_file
from shared_utils import UserError, checkpoint
from shared_utils.init import initialise

IMAGENET: dict[str, tuple[Any, list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
ARCHS = (*IMAGENET, "resnet8", "resnet20", "resnet32", "resnet12", "wrn28-2", "wrn28-8", "wrn28-10", "wrn37-2")
STEMS = ("imagenet", "cifar")


class TorchvisionResNet(ResNet):
    """torchvision's, whose public weights load by name; stem `cifar`: a 3x3 convolution without stride and pooling."""

    def __init__(self, arch: str, classes: int, stem: str):
        block, layers = IMAGENET[arch]
        super().__init__(block, layers, classes)
        self.num_features = self.fc.in_features
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()  # type: ignore[assignment]

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Classifier(nn.Module):
    """A body that ends in maps [B, num_features, h, w], their mean, and a linear layer."""

    def __init__(self, body: nn.Module, num_features: int, classes: int):
        super().__init__()
        self.body, self.num_features = body, num_features
        self.fc = nn.Linear(num_features, classes)
        for module in body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def conv(a: int, b: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, stride, 1, bias=False)


class Wide(nn.Module):
    """Pre-activation block of a wide ResNet; leaky ReLU of slope 0.1, as FixMatch has it.

    The shortcut of a block that changes the shape takes the activated maps, as Zagoruyko and Komodakis have it.
    """

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = (
            nn.BatchNorm2d(a),
            conv(a, b, stride),
            nn.BatchNorm2d(b),
            conv(b, b),
        )
        self.shortcut = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn1(x), 0.1)
        out = self.conv2(F.leaky_relu(self.bn2(self.conv1(h)), 0.1))
        return out + (x if self.shortcut is None else self.shortcut(h))


class Residual(nn.Module):
    """Block of `convs` convolutions, ReLU after the sum; ResNet-12's (three, leaky, pooled) or CIFAR ResNet's (two)."""

    def __init__(self, a: int, b: int, stride: int, convs: int = 2, slope: float = 0.0, pool: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(convs):
            layers += [conv(a if i == 0 else b, b, stride if i == 0 else 1), nn.BatchNorm2d(b)]
            layers += [nn.LeakyReLU(slope)] if i + 1 < convs else []
        self.main = nn.Sequential(*layers)
        same = a == b and stride == 1
        self.shortcut = None if same else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        self.slope, self.pool = slope, pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.main(x) + (x if self.shortcut is None else self.shortcut(x)), self.slope)
        return F.max_pool2d(x, 2) if self.pool else x


def check_size(arch: str, size: int) -> None:
    """UserError: images of `size` pixels are too small for the network."""
    if arch == "resnet12" and size < 16:
        raise UserError(f"--input_size {size}: {arch} halves an image four times; give at least 16, or another --arch")


def build(arch: str, classes: int, width: int = 0, stem: str = "imagenet") -> Any:
    """A classifier; `width`: channels of the first stage (0: 16; 64 for ResNet-12), of all but torchvision's."""
    if arch in IMAGENET:
        if width:
            raise UserError(f"--width {width}: {arch} has its own; leave it away")
        return TorchvisionResNet(arch, classes, stem)
    if arch == "resnet12":
        w = width or 64
        widths = [3, w, w * 5 // 2, w * 5, w * 10]
        blocks = [Residual(a, b, 1, convs=3, slope=0.1, pool=True) for a, b in zip(widths, widths[1:])]
        return Classifier(nn.Sequential(*blocks), widths[-1], classes)
    w = width or 16
    if arch.startswith("wrn"):
        depth, k = (int(v) for v in arch[3:].split("-"))
        stages, first = (4, 2) if arch == "wrn37-2" else (3, 1)  # TorchSSL's for the 96 pixels of STL-10
        layers: list[nn.Module] = [conv(3, w)]
        a = w
        for stage in range(stages):
            b = w * k * 2**stage
            # the depth counts the first convolution, a shortcut for each stage and two convolutions for each block
            for i in range((depth - 1 - stages) // (2 * stages)):
                layers.append(Wide(a, b, (2 if stage else first) if i == 0 else 1))
                a = b
        return Classifier(nn.Sequential(*layers, nn.BatchNorm2d(a), nn.LeakyReLU(0.1)), a, classes)
    per_stage = (int(arch.removeprefix("resnet")) - 2) // 6
    layers = [conv(3, w), nn.BatchNorm2d(w), nn.ReLU()]
    a = w
    for stage in range(3):
        b = w * 2**stage
        for i in range(per_stage):
            layers.append(Residual(a, b, 2 if stage and i == 0 else 1))
            a = b
    return Classifier(nn.Sequential(*layers), a, classes)


def set_bn_momentum(network: nn.Module, momentum: float) -> None:
    """Share of a batch in the running statistics of every batch norm (PyTorch's momentum; TensorFlow's is 1 - it)."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def start(network: Any, spec: str | None) -> str:
    """Weights of --init in the body; the linear layer stays new. Returns a line for the preflight.

    UserError: weights of another network.
    """
    if not spec:
        return "random weights"
    network.fc, head = nn.Identity(), network.fc
    try:
        return initialise(network, spec)
    finally:
        network.fc = head


def load_run(path: str | Path, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The trained classifier of a run (its EMA where it has one), in eval mode; its flags, classes and minutes.

    Args:
        path: the folder of a run, or its checkpoint. One without the names of its classes gives their numbers.
    """
    file = run_file(path)
    saved = checkpoint.load(file)
    weights = saved.get("state_dict") if isinstance(saved, dict) and "progress" in saved else None
    if weights is None or "fc.weight" not in weights:
        raise UserError(f"{file}: not a checkpoint of mra.main_supervised, main_fixmatch or main_fewshot")
    flags = saved["args"]
    classes = saved.get("info", {}).get("classes") or [str(y) for y in range(len(weights["fc.weight"]))]
    network = build(flags["arch"], len(classes), flags["width"], flags["stem"])
    checkpoint.load_strict(network, saved["ema"]["shadow"] if "ema" in saved else weights)
    more = {"classes": classes, "minutes": round(saved["progress"]["seconds"] / 60, 2)}
    return network.to(device).eval(), {**flags, **more}
