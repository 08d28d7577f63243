"""Recovered images beside their inputs, each with its error, at successive stages (the release's figure)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sage.builder import SaGe
from sage.data import denormalise, normalise


class Gallery:
    """Fixed views, and what the decoder made of them at each stage so far; part of the checkpoint.

    The mark of a recovered image is green where the encoder takes it for its own input: of all inputs shown, that one
    is nearest by the cosine of pooled features. (The release's figure has such marks and does not say what they mean.)
    """

    def __init__(self, views: Mapping[str, Tensor], total: int, stages: int):
        """Args: views, "x1" and "x2" of some images, bytes [N, 3, S, S] each; total, updates of the run; stages, how
        often, the first after the first update and the last after the last."""
        self.inputs = torch.stack([views["x1"], views["x2"]], 1).flatten(0, 1)  # [2 N, 3, S, S]
        self.when = {max(1, round(total * s / max(1, stages - 1))) for s in range(stages)}
        self.stages: list[dict[str, Any]] = []

    def due(self, done: int) -> bool:
        """Whether a stage is due after this number of updates."""
        return done in self.when

    @torch.no_grad()
    def add(self, model: SaGe, device: torch.device, done: int) -> None:
        """Decode the views with the model in eval mode (nothing of it changes)."""
        assert model.decoder is not None
        was = model.training
        model.eval()
        x = normalise(self.inputs.to(device))
        maps = model.online_net[0](x)[-1]
        made = model.decoder(maps)
        error = (made - x).square().mean((1, 2, 3))  # [N]
        own = F.normalize(maps.mean((2, 3)).float(), dim=1)
        again = F.normalize(model.online_net[0](made)[-1].mean((2, 3)).float(), dim=1)
        right = (again @ own.T).argmax(1) == torch.arange(len(x), device=device)
        model.train(was)
        self.stages.append(
            {
                "step": done,
                "images": (denormalise(made) * 255).round().byte().cpu(),
                "error": error.cpu(),
                "right": right.cpu(),
            }
        )

    def picture(self) -> Tensor:
        """[3, H, W] in 0..1: a row a view; its input, then each stage with the mean squared error below it."""
        size = self.inputs.shape[-1]
        zoom = max(1, -(-64 // size))
        side, foot, gap = size * zoom, 14, 4
        canvas = Image.new(
            "RGB", ((len(self.stages) + 1) * (side + gap), len(self.inputs) * (side + foot + gap)), "white"
        )
        draw = ImageDraw.Draw(canvas)
        for row, view in enumerate(self.inputs):
            columns = [(view, "input", "white")]
            for stage in self.stages:
                colour = "green" if stage["right"][row] else "red"
                columns.append((stage["images"][row], f"{float(stage['error'][row]):.3f}", colour))
            for column, (image, text, colour) in enumerate(columns):
                x, y = column * (side + gap), row * (side + foot + gap)
                tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (x, y))
                draw.text((x + 12, y + side), text, fill="black")
                draw.rectangle((x, y + side + 2, x + 8, y + side + 10), fill=colour)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255

    def state_dict(self) -> dict[str, Any]:
        return {"stages": list(self.stages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stages = list(state["stages"])
