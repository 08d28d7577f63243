"""C3D with batch norm, and a small network of the same kind for the mini and small tiers (neither in the release)."""

from torch import nn


def _layer(channels: int, out: int, stride: tuple[int, int, int] = (1, 1, 1)) -> list[nn.Module]:
    conv = nn.Conv3d(channels, out, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm3d(out), nn.ReLU(inplace=True)]


class C3D(nn.Sequential):
    """Eight convolutions of 3 x 3 x 3, five pools; batch norm takes the place of the original's wide fc layers."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for out, pool in ((64, (1, 2, 2)), (128, 2), (256, 0), (256, 2), (512, 0), (512, 2), (512, 0), (512, 0)):
            layers += _layer(channels, out)
            if pool:
                layers.append(nn.MaxPool3d(pool, pool))
            channels = out
        super().__init__(*layers)


class Tiny(nn.Sequential):
    """Four strided convolutions of 3 x 3 x 3, `width` to 8 `width` channels: 8 x 48 x 48 -> 8 width x 2 x 3 x 3."""

    def __init__(self, width: int = 16):
        layers = _layer(3, width, (1, 2, 2))
        layers += _layer(width, 2 * width, (2, 2, 2))
        layers += _layer(2 * width, 4 * width, (1, 2, 2))
        layers += _layer(4 * width, 8 * width, (2, 2, 2))
        super().__init__(*layers)
