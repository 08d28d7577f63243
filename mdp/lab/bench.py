"""What MDP adds to its backbone at the paper's sizes, for `python tests/bench.py mdp`.

64 crops of 224, ResNet-50 at output stride 8 with the ASPP head (28 x 28 pixels of 128 dimensions), 342 classes
(VOC + ADE20K + COCO-Stuff), a bank of 10,560 images. The floor is what the paper demands anyway: query forward and
backward, key forward. The method is everything else of a step: momentum update, mixing at full resolution, regions,
loss forward and backward, enqueue.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mdp import losses
from mdp.builder import MDP, downsample_labels
from mdp.main_pretrain import pixels
from mdp.mixing import apply_plan, draw_plan
from mdp.models import Encoder
from mdp.prototypes import PrototypeBank, region_means
from shared_utils.layout import follow, place

B, S, D, C, M = 64, 224, 128, 342, 10560


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the floor runs on 2 crops and is scaled to 64."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    few = B if cuda else 2
    bank = PrototypeBank(C, D, M).to(device)
    model = place(MDP(Encoder("resnet50", "aspp", D), bank), device)
    x = follow(torch.randn(B, 3, S, S, device=device), model)
    # Label maps of 8 x 8 px blocks: about ten classes an image, a tenth of the pixels ignored.
    few_classes = torch.randint(0, C, (B, 10), device=device)
    cells = few_classes.gather(1, torch.randint(0, 10, (B, 49), device=device)).view(B, 1, 7, 7)
    y = F.interpolate(cells.float(), scale_factor=S // 7, mode="nearest")[:, 0].long()
    y[torch.rand(B, S, S, device=device) < 0.1] = -1
    dataset = torch.randint(0, 3, (B,), device=device)
    h = S // 8
    raw = torch.randn(B, D, h, h, device=device)
    k = F.normalize(torch.randn(B, D, h, h, device=device), dim=1)
    y_k = downsample_labels(y, (h, h))
    for _ in range(4):
        bank.enqueue(*region_means(k, y_k, C))

    def floor() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            model.embed_keys(x[:few])
            out = model.encoder_q(x[:few])
        out.float().square().mean().backward()

    def method(
        mix: str, loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]
    ) -> Callable[[], None]:
        def run() -> None:
            model.update_key_encoder()
            mixed = apply_plan(x, y, draw_plan(dataset, mix, 0.5, 1.0))
            y_a, y_b = (downsample_labels(z, (h, h)) for z in (mixed.y_a, mixed.y_b))
            leaf = raw.detach().requires_grad_()
            v = F.normalize(leaf, dim=1)
            per_pixel = loss(v, y_a, y_b, mixed.lam[:, None].expand(-1, h * h).flatten())
            losses.average(per_pixel, 0.1, per_pixel.counted.sum(), 1, v).backward()
            bank.enqueue(*region_means(k, downsample_labels(y, (h, h)), C))

        return run

    def prototypes(csc: str) -> Callable[..., Any]:
        return lambda v, a, b, lam: losses.pixel_to_prototype(pixels(v), a.flatten(), b.flatten(), lam, bank, 0.07, csc)

    def to_pixels(v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lam: torch.Tensor) -> Any:
        return losses.pixel_to_pixel(v.flatten(2).transpose(1, 2), a.flatten(1), k, y_k, C)

    def to_regions(v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lam: torch.Tensor) -> Any:
        return losses.pixel_to_region(
            v.flatten(2).transpose(1, 2)[:, :64].flatten(0, 1), a.flatten(1)[:, :64].flatten(), bank
        )

    note = f"{B} crops of {S}, {C} classes, bank {M}" + ("" if cuda else f"; floor: {few} crops x {B // few}")
    arms = [
        ("prototypes + mixing + sparse coding", method("both", prototypes("pull"))),
        ("prototypes", method("none", prototypes("none"))),
        ("pixel to pixel", method("none", to_pixels)),
        ("region bank, 64 anchors an image", method("none", to_regions)),
    ]
    common = {"floor": floor, "floor_scale": B / few, "items": B, "note": note}
    return [{"name": name, "method": method, **common} for name, method in arms]
