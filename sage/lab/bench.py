"""What SaGe adds to its networks at the paper's sizes, for `python tests/bench.py sage`.

ResNet-50, 224 pixels, 64 images a process in the paper (2 here on a CPU, scaled). The floor is what the paper demands
anyway: online forward and backward passes and target forward passes of two views; decoder forward and backward passes;
evaluator forward passes of two real views, and forward and backward passes of two recovered ones. The method is
everything else of a step: scaling of the bytes, losses, LARS, Adam, the target's update. The cases after it are the
generation loss alone: as it is, with real views without a graph, and as it would be with a graph on them, for time and
peak memory; their floor is the evaluator's passes without losses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sage import arch
from sage.builder import Evaluator, SaGe
from sage.data import normalise
from sage.lars import LARS, parameter_groups
from sage.losses import LEVELS, WEIGHTS, distance, latent_loss
from shared_utils.layout import follow, place

B, S = 64, 224


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the passes run on 2 images and are scaled to 64."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    few = B if cuda else 2
    model = SaGe(arch.build("resnet50"))
    evaluator = Evaluator(arch.build("resnet50"), arch.Neck(2048))
    model.add_generation(arch.decoder_for("resnet50", 64, "imagenet", S), evaluator, WEIGHTS)
    place(model, device).train()
    assert model.decoder is not None
    decoder: nn.Module = model.decoder
    images = torch.randint(256, (2, B, 3, S, S), dtype=torch.uint8, device=device)
    x = [follow(normalise(v[:few]), model) for v in images]
    levels = list(LEVELS.values())
    q, t = torch.randn(2, 2, B, 256, device=device)
    feats = [
        torch.randn(2, few, *shape, device=device) for shape in ((512, 28, 28), (1024, 14, 14), (2048, 7, 7), (256,))
    ]
    trained = nn.ModuleDict({"online_net": model.online_net, "head": model.head})
    lars = LARS(parameter_groups(trained, 1e-6), 4.8)
    adam = torch.optim.Adam(decoder.parameters(), 0.048)
    gradients = {p: torch.randn_like(p) for p in [*trained.parameters(), *decoder.parameters()]}

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=cuda)

    def floor() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            maps = [model.online_net[0](v)[-1] for v in x]
            z = [model.predictor(model.online_net[1](m)) for m in maps]
            with torch.no_grad():
                for v in x:
                    model.target_net[1](model.target_net[0](v)[-1])
                model.features(x)
            made = [decoder(m) for m in maps]
            out = model.features(made)
        total = [v.float().mean() for v in z] + [f.float().mean() for view in out for f in view]
        torch.stack(total).sum().backward()

    def method() -> None:
        """Of a whole batch of 64: the parts that grow with it are repeated on a CPU."""
        for v in images:
            normalise(v)
        loss = latent_loss(q[0].requires_grad_(), t[0]) + latent_loss(q[1].requires_grad_(), t[1])
        for _ in range(B // few):
            made = [v.detach().requires_grad_() for v in x]
            loss = loss + distance(x, [2 * v for v in made]) / 10
            for f in feats:
                loss = loss + distance(list(f), [2 * v.detach().requires_grad_() for v in f])
        loss.backward()
        for p, g in gradients.items():
            p.grad = g
        lars.step()
        adam.step()
        model.momentum_update(0.99)

    def passes() -> None:
        with autocast():
            with torch.no_grad():
                model.features(x)
            made = [v.detach().clone().requires_grad_() for v in x]
            out = model.features(made)
        torch.stack([f.float().mean() for view in out for f in view]).sum().backward()

    def generation(graph: bool) -> Callable[[], None]:
        def run() -> None:
            made = [v.detach().flip(0).requires_grad_() for v in x]
            with autocast():
                if graph:
                    real = model.features([v.detach().requires_grad_() for v in x])
                    fake: list[list[Tensor]] = model.features(made)
                    terms = [distance([f[i] for f in real], [f[i] for f in fake]) for i in range(len(levels))]
                    loss = torch.stack(terms).sum() + distance(x, made)
                else:
                    loss = torch.stack(list(model.generation(x, made).values())).sum()
            loss.backward()

        return run

    scaled = "" if cuda else f"; passes: {few} x {B // few}"
    note = f"ResNet-50, {B} images of {S}{scaled}"
    pair = {"items": few, "note": f"evaluator alone, {few} images of {S}"}
    return [
        {"name": "SaGe", "floor": floor, "method": method, "floor_scale": B / few, "items": B, "note": note},
        {"name": "L_G, real views without a graph", "floor": passes, "step": generation(False), **pair},
        {"name": "L_G, real views with a graph", "floor": passes, "step": generation(True), **pair},
    ]
