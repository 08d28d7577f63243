"""A small DINO (arXiv 2104.14294): head, loss and multi-crop views of a batch at once, so nothing is downloaded."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import distributed
from shared_utils.augment import MEAN, STD
from uvos_dino.vision_transformer import VisionTransformer


class Head(nn.Module):
    """Three-layer MLP, unit bottleneck, and prototypes of unit norm -> logits [B, K]."""

    def __init__(self, dim: int, out: int, hidden: int, bottleneck: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.randn(out, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class Network(nn.Module):
    """Backbone and head under DINO's names, so that a run's checkpoint reads like DINO's full one."""

    def __init__(self, backbone: VisionTransformer, out: int, hidden: int, bottleneck: int):
        super().__init__()
        self.backbone, self.head = backbone, Head(backbone.embed_dim, out, hidden, bottleneck)

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Groups of crops [n_g, 3, S_g, S_g], each of one size -> logits [sum n_g, K]."""
        return self.head(torch.cat([self.backbone.embed(group) for group in crops]))


class DinoLoss(nn.Module):
    """Cross-entropy between the teacher's centred, sharpened output of a global crop and the student's of another."""

    center: Tensor

    def __init__(self, out: int, student_temp: float, teacher_temp: float, momentum: float = 0.9):
        super().__init__()
        self.student_temp, self.teacher_temp, self.momentum = student_temp, teacher_temp, momentum
        self.register_buffer("center", torch.zeros(out))

    def forward(self, student: Tensor, teacher: Tensor, crops: int) -> Tensor:
        """Logits [crops B, K] of the student, the two global crops first, and [2 B, K] of the teacher."""
        target = ((teacher.float() - self.center) / self.teacher_temp).softmax(-1).unflatten(0, (2, -1))  # [2, B, K]
        log_p = (student.float() / self.student_temp).log_softmax(-1).unflatten(0, (crops, -1))  # [crops, B, K]
        table = -torch.einsum("tbk,sbk->ts", target, log_p) / target.shape[1]  # [2, crops]
        own = torch.eye(2, crops, dtype=torch.bool, device=table.device)
        return table.masked_fill(own, 0.0).sum() / (2 * crops - 2)

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Moving mean of the teacher's logits over all processes."""
        mean = distributed.all_sum(teacher.float().mean(0)) / distributed.world()
        self.center.lerp_(mean, 1 - self.momentum)


def uniform(generator: torch.Generator, n: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def crop_grid(n: int, ratio: float, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """n random crops with horizontal flips as affine maps [n, 2, 3] from the crop's to the image's [-1, 1] square.

    Args:
        ratio: width over height of the image; a crop shows a square of it.
        scale: range of the crop's area over the image's.
    """
    area, stretch = uniform(generator, n, *scale), torch.exp(uniform(generator, n, -0.288, 0.288))  # 3/4 .. 4/3
    w = (area * stretch / ratio).sqrt().clamp(max=1.0)
    h = (area / stretch * ratio).sqrt().clamp(max=1.0)
    x, y = uniform(generator, n, -1, 1) * (1 - w), uniform(generator, n, -1, 1) * (1 - h)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = w * flip, x, h, y
    return theta


def colours(n: int, generator: torch.Generator) -> Tensor:
    """Colour jitter with probability .8 and grey with .2, as affine maps of RGB [n, 3, 4] (the last column is added).

    Brightness and contrast within .4, saturation within .2; hue, blur and solarisation of DINO are left out.
    """
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    jitter = torch.rand(n, generator=generator) < 0.8
    grey = torch.rand(n, generator=generator) < 0.2
    bright, contrast = uniform(generator, n, 0.6, 1.4), uniform(generator, n, 0.6, 1.4)
    saturation = uniform(generator, n, 0.8, 1.2)
    one = torch.ones(n)
    bright, contrast, saturation = (torch.where(jitter, v, one) for v in (bright, contrast, saturation))
    saturation = torch.where(grey, 0.0, saturation).view(n, 1, 1)
    mix = saturation * torch.eye(3) + (1 - saturation) * luma  # [n, 3, 3]
    out = torch.zeros(n, 3, 4)
    out[:, :, :3] = mix * (bright * contrast).view(n, 1, 1)
    out[:, :, 3] = (0.5 * (1 - contrast)).view(n, 1)  # contrast around mid grey
    return out


def views(
    images: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator, rank: int = 0, world: int = 1
) -> Tensor:
    """One random view of each image [B, 3, H, W] in 0..1 -> normalised [B, 3, size, size], on the images' device.

    The draws are made for the whole batch of all processes, of which this one takes its share.
    """
    B = len(images)
    mine = slice(rank * B, (rank + 1) * B)
    theta = crop_grid(B * world, images.shape[3] / images.shape[2], scale, generator)[mine].to(images.device)
    colour = colours(B * world, generator)[mine].to(images.device)
    grid = F.affine_grid(theta, [B, 3, size, size], align_corners=False)
    crops = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    crops = torch.einsum("bij,bjhw->bihw", colour[:, :, :3], crops) + colour[:, :, 3, None, None]
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (crops.clamp(0, 1) - mean) / std
