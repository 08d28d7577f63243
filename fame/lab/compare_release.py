"""Our functions beside the authors' own, in one process: python -m fame.lab.compare_release --release PATH [--speed]

PATH is a checkout of https://github.com/Mark12Ding/FAME (Apache-2.0): none of its code is here, it is imported from
where it lies, and kornia (`pip install kornia`), which it needs, with it. It was written for GPUs and an older
torchvision, so while it is in use `.cuda()` does nothing and the video reader that it names is an empty class.
"""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fame.backbone import build
from fame.fame import make_mask, merge
from fame.moco.builder import MoCo, info_nce, passes
from shared_utils import UserError
from shared_utils.flags import Parser, positive
from shared_utils.lab import compare
from shared_utils.run import cli

URL = "https://github.com/Mark12Ding/FAME"
FILES = {
    "loader": "moco/loader.py", "builder": "moco/builder.py", "i3d": "backbone/i3d.py",
    "r2plus1d": "backbone/r2plus1d.py",
}  # fmt: skip
PACKAGES = {"kornia": "kornia"}
LIMIT = 1e-6


# --- fixed inputs ----------------------------------------------------------------------------------------------------


def moving_squares(size: int, frames: int = 4) -> Tensor:
    """Two clips [2, 3, T, S, S]: a coloured square over a wavy background, moving right and left; by formula."""
    s = size / 32
    y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for _ in "yx"), indexing="ij")
    c, b = torch.arange(3.0).view(1, 3, 1, 1), torch.arange(2.0).view(2, 1, 1, 1)
    still = 0.5 + 0.4 * torch.sin(0.35 * x / s + 0.21 * y / s + 1.3 * c + 2.1 * b)  # [2, 3, S, S]
    clip = still[:, :, None].repeat(1, 1, frames, 1, 1)
    side = int(10 * s)
    for t in range(frames):
        left, right = int((4 + 3 * t) * s), int((18 - 3 * t) * s)
        clip[0, :, t, int(10 * s) :, left:][:, :side, :side] = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1)
        clip[1, :, t, int(6 * s) :, right:][:, :side, :side] = torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1)
    return clip


def waves(count: int, size: int, frames: int = 8) -> Tensor:
    """Clips [N, 3, T, S, S] in [0, 1] whose colours and motion differ everywhere; by formula."""
    n, c, t, y, x = (
        torch.arange(float(k)).view([-1 if i == d else 1 for i in range(5)])
        for d, k in enumerate((count, 3, frames, size, size))
    )
    slow = torch.sin(0.11 * x + 0.07 * y * (1 + 0.3 * n) + 1.7 * c + 0.9 * n)
    fast = torch.sin(0.5 * t * (1 + torch.sin(0.09 * x - 0.05 * y + n)) + 0.13 * y + 0.8 * c)
    return (0.5 + 0.3 * slow + 0.2 * fast).clamp(0, 1)


class Flat(nn.Module):
    """A network of one layer, for the contrast: clips [B, 3, T, H, W] -> [B, num_classes]."""

    def __init__(self, num_classes: int, inputs: int = 96):
        super().__init__()
        self.fc = nn.Linear(inputs, num_classes)
        with torch.no_grad():
            for k, p in enumerate(self.parameters()):
                p.copy_(torch.sin(0.7 * torch.arange(p.numel()) + k).view_as(p) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def contrast_inputs(batch: int = 4, dim: int = 16, k: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Two views [B, 3, 2, 4, 4] and a queue [D, K] of unit columns; by formula."""
    at = torch.arange(batch * 96, dtype=torch.float32)
    queue = torch.cos(0.37 * torch.arange(dim * k, dtype=torch.float32).square() % 6.3).view(dim, k)
    v0, v1 = (torch.sin(w * at + 0.01 * w * at.square()).view(batch, 3, 2, 4, 4) for w in (0.31, 0.57))
    return v0, 0.5 * (v0 + v1), F.normalize(queue, dim=0)


def our_contrast(v0: Tensor, v1: Tensor, queue: Tensor, order: str = "release") -> dict[str, Tensor]:
    """One step of our builder without an optimiser: logits [B, 1 + K] of both passes, loss, gradient, queue, keys'
    weights.
    """
    model = MoCo(Flat(queue.shape[0]), queue.shape[0], queue.shape[1], 0.9, 0.1)
    model.queue.copy_(queue)
    with torch.no_grad():
        for p in model.encoder_k.parameters():
            p.mul_(0.8)  # so that the momentum update shows
    q0, q1 = model([v0, v1])
    model.update_key_encoder()
    k1, k0 = (model.embed_keys(v, torch.Generator().manual_seed(0)) for v in (v1, v0))
    logits = passes(model, q0, q1, k0, k1, order)
    loss = (info_nce(*logits[0]) + info_nce(*logits[1])) / 2
    loss.backward()
    model.enqueue([k1, k0])
    both = [torch.cat([positive[:, None], negatives], 1).detach() for positive, negatives in logits]
    grad = torch.cat([p.grad.flatten() for p in model.encoder_q.parameters() if p.grad is not None])
    weights = torch.cat([p.flatten() for p in model.encoder_k.parameters()])
    return {
        "logits 1": both[0], "logits 2": both[1], "loss": loss.detach(), "gradient": grad, "queue": model.queue,
        "key encoder": weights,
    }  # fmt: skip


# --- the checkout ----------------------------------------------------------------------------------------------------


@contextmanager
def release(root: Path) -> Iterator[SimpleNamespace]:
    """The release's modules (loader, builder, i3d, r2plus1d), usable inside; one process is a process group."""
    compare.check(root, URL, list(FILES.values()), PACKAGES)
    reader = types.ModuleType("torchvision.datasets.video_utils")
    reader.VideoClips = type("VideoClips", (), {})  # type: ignore[attr-defined]
    code = SimpleNamespace()
    alone = not dist.is_initialized()
    if alone:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        with mock.patch.dict(sys.modules, {reader.__name__: reader}):
            with mock.patch.object(torch.Tensor, "cuda", lambda x, *args, **kwargs: x):
                for name, file in FILES.items():
                    spec = importlib.util.spec_from_file_location(f"release_{name}", root / file)
                    assert spec is not None and spec.loader is not None
                    module = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    setattr(code, name, module)
                yield code
    finally:
        if alone:
            dist.destroy_process_group()


def their_contrast(code: SimpleNamespace, v0: Tensor, v1: Tensor, queue: Tensor) -> dict[str, Tensor]:
    """The same step by the release's builder."""
    model = code.builder.MoCo(Flat, queue.shape[0], queue.shape[1], 0.9, 0.1, False)
    with torch.no_grad():
        model.queue.copy_(queue)
        for p in model.encoder_k.parameters():
            p.mul_(0.8)
    logits_1, labels_1, logits_2, labels_2 = model(v0, v1)
    loss = (F.cross_entropy(logits_1, labels_1) + F.cross_entropy(logits_2, labels_2)) / 2
    loss.backward()
    grad = torch.cat([p.grad.flatten() for p in model.encoder_q.parameters()])
    weights = torch.cat([p.flatten() for p in model.encoder_k.parameters()])
    return {
        "logits 1": logits_1.detach(), "logits 2": logits_2.detach(), "loss": loss.detach(), "gradient": grad,
        "queue": model.queue, "key encoder": weights,
    }  # fmt: skip


# --- comparisons -----------------------------------------------------------------------------------------------------


def clips_of(size: int) -> dict[str, Tensor]:
    return {"squares": moving_squares(size), "waves": waves(2, size)}


def compare_masks(code: SimpleNamespace) -> Iterator[compare.Row]:
    for size in (32, 48, 112):
        for name, x in clips_of(size).items():
            for beta in (0.3, 0.5):
                theirs = code.loader.FAME(size, beta).getmask(x.clone())
                mask = make_mask(x, beta=beta)
                yield compare.row(f"mask, {name}, {size} px, beta {beta}", mask.float(), theirs, LIMIT)
            order = torch.arange(len(x)).roll(1)
            with mock.patch.object(torch, "randperm", lambda n, device=None, order=order: order):
                yield compare.row(
                    f"merge, {name}, {size} px", merge(x, mask, order), code.loader.FAME(size, 0.5)(x.clone()), LIMIT
                )


def compare_contrast(code: SimpleNamespace) -> Iterator[compare.Row]:
    inputs = contrast_inputs()
    ours, theirs = our_contrast(*inputs), their_contrast(code, *inputs)
    for name in ours:
        yield compare.row(name, ours[name], theirs[name], LIMIT)


def compare_networks(code: SimpleNamespace) -> Iterator[compare.Row]:
    x = 2 * waves(2, 64, 8) - 1
    for name, theirs, ours in (
        ("I3D", code.i3d.I3D(num_classes=128), build("I3D", 128)),
        ("R(2+1)D-18", code.r2plus1d.r2plus1d_18(num_classes=128), build("r2plus1d_18", classes=128)),
    ):
        ours.load_state_dict(theirs.state_dict())
        yield compare.row(name, ours(x), theirs(x), LIMIT)


def compare_all(code: SimpleNamespace) -> Iterator[compare.Row]:
    yield from compare_masks(code)
    yield from compare_contrast(code)
    yield from compare_networks(code)


def seconds(code: SimpleNamespace, clips: int) -> list[float]:
    """Best times of mask and merge of `clips` x 16 x 112 x 112, theirs and ours, taking turns."""
    x = waves(8, 112, 16).repeat(clips // 8, 1, 1, 1, 1)
    theirs = code.loader.FAME(112, 0.5)
    return compare.fastest([lambda: theirs(x), lambda: merge(x, make_mask(x), torch.randperm(len(x)))], 5)


def packed(mask: Tensor) -> str:
    """A binary mask [N, H, W] as hexadecimal digits, four pixels each."""
    bits = mask.flatten().int().tolist()
    return f"{int(''.join(map(str, bits)), 2):0{len(bits) // 4}x}"


def summary(name: str, x: Tensor) -> list[float]:
    """Logits and loss whole; of the others sum, norm and a projection."""
    x = x.detach().double().flatten()
    if name.startswith("l"):
        return x.tolist()
    return [float(x.sum()), float(x.norm()), float((x * torch.cos(torch.arange(len(x), dtype=x.dtype))).sum())]


def reference(code: SimpleNamespace) -> dict[str, Any]:
    """Numbers of the release on the fixed inputs, for the tests."""
    masks = []
    for size in (32, 48, 112):
        for name, x in clips_of(size).items():
            for beta in (0.3, 0.5):
                fame = code.loader.FAME(size, beta)
                order = torch.arange(len(x)).roll(1)
                with mock.patch.object(torch, "randperm", lambda n, device=None, order=order: order):
                    merged = fame(x.clone()).double()
                w = torch.cos(torch.arange(merged.numel(), dtype=torch.float64)).view_as(merged)
                found = {"merge_sum": float(merged.sum()), "merge_cos": float((merged * w).sum())}
                mask = fame.getmask(x.clone())
                masks.append({"size": size, "clips": name, "beta": beta, "mask": packed(mask), **found})
    contrast = {name: summary(name, value) for name, value in their_contrast(code, *contrast_inputs()).items()}
    source = (
        f"numbers obtained by running Mark12Ding/FAME on a CPU (torch {torch.__version__.split('+')[0]}, kornia 0.9.0)"
    )
    return {"source": source, "masks": masks, "contrast": contrast}


def get_parser() -> Parser:
    p = Parser(prog="fame.lab.compare_release", description=__doc__.splitlines()[0])
    compare.add_flags(p, URL, "mask and merge")
    p.add_argument("--clips", type=positive, default=64, help="clips of --speed, a multiple of 8")
    p.add_argument("--write", type=Path, help="write the release's numbers on the fixed inputs to this json file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit code 1 when a difference exceeds its tolerance."""
    args = get_parser().parse_args(argv)
    if args.clips % 8:
        raise UserError(f"--clips {args.clips}: must be a multiple of 8")
    if args.threads:
        torch.set_num_threads(args.threads)
    with release(args.release) as code:
        if args.write:
            args.write.write_text(json.dumps(reference(code), separators=(",", ":")) + "\n")
        failed = compare.report(compare_all(code))
        if args.speed:
            theirs, ours = seconds(code, args.clips)
            print(
                f"mask and merge of {args.clips} x 16 x 112 x 112, {torch.get_num_threads()} threads: release "
                f"{1e3 * theirs:.0f} ms, ours {1e3 * ours:.0f} ms, {theirs / ours:.1f} times as fast"
            )
    return compare.verdict(failed)


if __name__ == "__main__":
    cli(main)
