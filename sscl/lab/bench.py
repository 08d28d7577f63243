"""What SsCL adds to its networks at the paper's sizes, for `python tests/bench.py sscl`.

8 labelled and 40 unlabelled images of 224 (the share of a GPU), ResNet-50, 1,000 classes, queue of 65,536 x 128 with
probabilities. The floor is what the step demands anyway: forward and backward of the query encoder on the labelled and
the strong views, forward of it on the weak views, forward of the momentum copy on the keys and the labelled images. The
method is everything else: momentum update, dealing and restoring the key images, similarity, alignment, calibration,
choice of neighbours, both losses forward and backward, enqueue. The refresh of the prototypes is not part of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from shared_utils import distributed
from shared_utils.layout import memory_format, place
from sscl import losses
from sscl.arch import Encoder, build
from sscl.calibration import Alignment, calibrate, log_similarity, sharpen
from sscl.model import SsCL, interleave

B, U, S, C, D, K = 8, 40, 224, 1000, 128, 65536


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Cases for tests/bench.py; on a CPU the floor runs on a quarter of the images and is scaled by 4."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    form = memory_format(build("resnet50"), device)
    part = 1 if cuda else 4
    x, weak, strong, key = (torch.randn(n, 3, S, S, device=device).contiguous(memory_format=form) for n in (B, U, U, U))
    model = SsCL(Encoder(build("resnet50"), C, D), Alignment(C), K)
    place(model, device).train()
    model.queue_label.random_(C)
    model.queue_conf.fill_(True)
    model.queue_prob.uniform_().div_(C / 2)
    labels, index = torch.randint(C, (B,), device=device), torch.arange(B + U, device=device)
    raw, raw_v = torch.randn(B + U, C, device=device), torch.randn(U, D, device=device)
    p = torch.randn(U, C, device=device).mul(8).softmax(1)
    keys = F.normalize(torch.randn(B + U, D, device=device), dim=1)

    def floor() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            with torch.no_grad():
                model.encoder_q.logits(weak[: U // part])
                model.encoder_k.embed(torch.cat([key[: U // part], x[: B // part]]))
            logits, z = model.encoder_q(torch.cat([x[: B // part], strong[: U // part]]))
        (logits.square().mean() + z.square().mean()).backward()

    def method(form: str, neighbours: bool) -> Callable[[], None]:
        def run() -> None:
            model.update_key_encoder()
            _, order = distributed.shuffle(interleave([key, x], 1), torch.Generator().manual_seed(0))
            z = distributed.unshuffle(keys, order)
            log_q = log_similarity(z[:U], model.prototypes, 0.1)
            model.alignment.update(p, log_q)
            tilde = sharpen(calibrate(model.alignment(p), log_q, "product"), 0.5)
            who = losses.Memory(tilde.argmax(1), tilde.max(1).values >= 0.1, tilde, index[:U])
            logits = raw.detach().requires_grad_()
            v = F.normalize(raw_v.detach().requires_grad_(), dim=1)
            chosen = losses.choose(who, model.memory, 5) if neighbours else losses.all_negatives(who, model.memory)
            loss = F.cross_entropy(logits[:B], labels) + 10 * losses.masked_ce(logits[B:], who.label, who.conf)
            (loss + losses.contrast(v, z[:U], model.queue, chosen, 0.2, form).mean()).backward()
            model.enqueue(z[:U], who, labelled=False)
            known = losses.Memory(labels, torch.ones_like(labels).bool(), raw[:B].softmax(1), index[U:])
            model.enqueue(z[U:], known, labelled=True)

        return run

    note = f"{B} + {U} images of {S}, {C} classes, queue {K} x {D}" + ("" if cuda else f"; floor: a quarter x {part}")
    more = {"floor": floor, "floor_scale": float(part), "items": B + U, "note": note}
    return [
        {"name": "both exchanges, 8a", "method": method("unified", True), **more},
        {"name": "both exchanges, 8b", "method": method("per_positive", True), **more},
        {"name": "without neighbours", "method": method("unified", False), **more},
    ]
