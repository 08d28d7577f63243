"""Our functions beside the authors' own: python -m uvos_dino.lab.compare_release --release PATH [--speed]

PATH is a checkout of https://github.com/shvdiwnkozbw/SSL-UVOS, which has no licence: none of its code is here, it is
imported from where it lies. It needs einops, and its evaluator scikit-image; packages that the functions compared here
never call (kornia, matplotlib, einops' layers) are empty modules while it is in use.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from torch import Tensor

from shared_utils.flags import Parser, positive
from shared_utils.lab import compare
from shared_utils.run import cli
from uvos_dino import clustering, losses, metrics
from uvos_dino.attention import Block
from uvos_dino.model_cluster import AttEncoder
from uvos_dino.vision_transformer import VisionTransformer

URL = "https://github.com/shvdiwnkozbw/SSL-UVOS"
FILES = ("src/eval_oneshot.py", "src/train_RGB_cluster.py", "src/model/attention.py")
PACKAGES = {"einops": "einops", "skimage": "scikit-image"}
UNUSED = {"kornia": {}, "kornia.augmentation": {}, "kornia.augmentation.container": {"VideoSequential": None},
          "matplotlib": {}, "matplotlib.pyplot": {}}  # fmt: skip


def loss_statements(source: str) -> types.CodeType:
    """The statements of the release's training loop from the sorting of the attention to `motion_loss`."""
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)]
    body = next(node.body for node in loops if "trn_loader" in ast.unparse(node.iter))
    texts = [ast.unparse(statement) for statement in body]
    first = next(i for i, text in enumerate(texts) if text.startswith("attention = "))
    last = max(i for i, text in enumerate(texts) if text.startswith("motion_loss = "))
    return compile(ast.Module(body[first : last + 1], []), "release", "exec")


@contextlib.contextmanager
def release(root: Path) -> Iterator[SimpleNamespace]:
    """The release's modules and its losses, usable inside."""
    compare.check(root, URL, FILES, PACKAGES)
    fake = {}
    for name, content in UNUSED.items():
        if importlib.util.find_spec(name.split(".")[0]) is None:
            fake[name] = types.ModuleType(name)
            fake[name].__dict__.update(content)
    paths = [str((root / name).resolve()) for name in ("src", "davis2017-evaluation")]
    with mock.patch.dict(sys.modules, fake), mock.patch.object(sys, "path", [*paths, *sys.path]):
        names = {
            "oneshot": "eval_oneshot", "attention": "model.attention", "model": "model.model_cluster",
            "vit": "model.vision_transformer", "evaluation": "davis2017.evaluation",
        }  # fmt: skip
        code = SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
        statements = loss_statements((root / "src/train_RGB_cluster.py").read_text(encoding="utf-8"))
        einops = importlib.import_module(list(PACKAGES)[0])

        def both(z: Tensor, A: Tensor, P: Tensor, frames: int) -> tuple[Tensor, Tensor]:
            scope: dict[str, Any] = {
                "torch": torch,
                "F": torch.nn.functional,
                "einops": einops,
                "motion_mask": A,
                "slot": z,
            }
            scope |= {"sample": P, "num_points": len(P), "num_frames": frames}
            exec(statements, scope)
            return scope["slot_loss"], scope["motion_loss"]

        code.losses = both
        yield code


# --- comparisons -----------------------------------------------------------------------------------------------------


def fixed_clip(dtype: torch.dtype, B: int = 2, T: int = 3, N: int = 252, C: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens z, attention A and points P, the same on every machine."""
    rng = np.random.RandomState(0)
    z = torch.from_numpy(rng.standard_normal((B, T, N, C)) + rng.standard_normal((B, 1, N, C)))
    A = torch.from_numpy(3 * rng.standard_normal((B, T * N, T * N))).softmax(-1)
    return z.to(dtype), A.to(dtype), torch.from_numpy(rng.permutation(N)[:8])


def compare_losses(code: SimpleNamespace) -> Iterator[compare.Row]:
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = []
        for mine in (True, False):
            z, A, P = fixed_clip(dtype)
            z.requires_grad_(), A.requires_grad_()
            terms = (losses.semantic(z, A, P), losses.motion(A, P, 3)) if mine else code.losses(z, A, P, 3)
            (terms[0] + terms[1]).backward()
            found.append((*terms, z.grad, A.grad))
        for name, ours, theirs in zip(("L_sem", "L_mot", "gradient to z", "gradient to A"), *found):
            yield compare.row(f"{name}, {str(dtype)[6:]}", ours, theirs, limit)


def compare_block(code: SimpleNamespace) -> Iterator[compare.Row]:
    torch.manual_seed(0)
    theirs, ours = code.attention.Block(64, 8, drop=0.1, attn_drop=0.4), Block(64, 8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 30, 64)
    a, b = ours.eval()(x), theirs.eval()(x)
    yield compare.row("block, tokens", a[0], b[0], 1e-6)
    yield compare.row("block, attention", a[1], b[1], 1e-6)
    torch.manual_seed(1)
    a = ours.train()(x)
    torch.manual_seed(1)
    b = theirs.train()(x)
    yield compare.row("block with dropout, tokens", a[0], b[0], 1e-6)
    yield compare.row("block with dropout, attention", a[1], b[1], 1e-6)


def compare_model(code: SimpleNamespace) -> Iterator[compare.Row]:
    """Encoder and whole model, a clip of 48 x 80 pixels, random weights of the release."""
    torch.manual_seed(0)
    theirs = code.model.AttEncoder((48, 80)).eval()
    ours = AttEncoder(VisionTransformer()).eval()
    ours.load_state_dict(theirs.state_dict())
    clip = torch.randn(1, 3, 3, 48, 80)
    with torch.no_grad():
        a, b = ours.encoder(clip[0]), theirs.encoder(clip[0])
        for name, one, other in zip(("tokens", "class token", "attention", "keys"), a, b):
            yield compare.row(f"encoder, {name}", one, other, 1e-5)
        out, (_, _, A, z, _) = ours(clip), theirs(clip, training=True)
        yield compare.row("model, tokens", out.z, z, 1e-5)
        yield compare.row("model, attention", out.A, A, 1e-5)


def regions(frames: list[int], h: int, w: int) -> Tensor:
    """Label maps [t, h w]: a background, two moving rectangles and a band."""
    maps = torch.zeros(len(frames), h, w, dtype=torch.long)
    for label, t in zip(maps, frames):
        label[h // 5 : h * 3 // 5, w // 9 + t % 20 : w // 3 + t % 20] = 1
        label[h // 3 : h * 5 // 6, w * 2 // 3 - t % 9 : w * 4 // 5 - t % 9] = 2
        label[: h // 6] = 3
    return maps.flatten(1)


def queries_and_keys(
    T: int, h: int, w: int, noise: float, seed: int, heads: int = 8, d: int = 48
) -> tuple[Tensor, Tensor]:
    """q [T, heads, N, d] and k of every 10th frame, from prototypes of the regions and noise."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = 1.3 * torch.randn(4, heads, d, generator=generator)
    times = list(range(T)), (torch.arange(max(1, T // 10)) * 10).tolist()
    out = [prototypes[regions(frames, h, w)].transpose(1, 2) for frames in times]
    q, k = (x + noise * torch.randn(x.shape, generator=generator) for x in out)
    return q, k


def their_labels(code: SimpleNamespace, q: Tensor, k: Tensor, tau: float) -> Tensor:
    with contextlib.redirect_stdout(io.StringIO()):
        masks = code.oneshot.mem_efficient_hierarchical_cluster(q, k, q.shape[-1] ** -0.5, tau, 10000, "cpu")
    return masks.argmax(0)


def our_labels(q: Tensor, k: Tensor, tau: float, memory: float = 4e9) -> Tensor:
    rows = clustering.Rows(q, k, q.shape[-1] ** -0.5, memory, torch.device("cpu"))
    return clustering.cluster(rows, len(q), tau).labels.flatten()


def compare_clusters(code: SimpleNamespace) -> Iterator[compare.Row]:
    for noise, tau in ((0.6, 1.0), (0.9, 1.0), (1.2, 1.0), (1.2, 0.5), (1.5, 2.0)):
        q, k = queries_and_keys(11, 6, 10, noise, seed=int(10 * noise))
        ours, theirs = our_labels(q, k, tau), their_labels(code, q, k, tau)
        yield compare.row(f"labels, noise {noise}, tau {tau}: {int(theirs.max()) + 1} clusters", ours, theirs, 0.0)


def fixed_masks(T: int, H: int, W: int, K: int, objects: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cluster maps [T, H, W] in blocks of 8 pixels and annotations with a void stripe."""
    rng = np.random.RandomState(seed)
    grid = np.stack([cv2.GaussianBlur(rng.standard_normal((H // 8, W // 8)), (0, 0), 2) for _ in range(T * K)])
    labels = metrics.upsample(grid.reshape(T, K, H // 8, W // 8).argmax(1), H, W)
    smooth = [cv2.GaussianBlur(rng.standard_normal((H, W)), (0, 0), 20) for _ in range(T * (objects + 1))]
    truth = np.stack(smooth).reshape(T, objects + 1, H, W).argmax(1).astype(np.uint8)
    truth[:, H // 3 : H // 3 + 6, : W // 2] = metrics.VOID
    truth[0, 0, :objects] = np.arange(1, objects + 1)
    return labels, truth


def moving_masks(T: int, H: int, W: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Two ellipses that move, and clusters in blocks of 8 pixels: both objects' and K - 2 parts of the background."""
    truth = np.zeros((T, H, W), np.uint8)
    for t, mask in enumerate(truth):
        cv2.ellipse(mask, (W // 4 + 4 * t, H // 2), (W // 9, H // 6), 10, 0, 360, 1, -1)
        cv2.ellipse(mask, (W * 3 // 4 - 3 * t, H // 2 + t), (W // 14, H // 4), 0, 0, 360, 2, -1)
    rng = np.random.RandomState(0)
    parts = np.stack([cv2.GaussianBlur(rng.standard_normal((H // 8, W // 8)), (0, 0), 5) for _ in range(K - 2)])
    grid = truth[:, 4::8, 4::8].astype(np.int64)
    return metrics.upsample(np.where(grid > 0, grid - 1, 2 + parts.argmax(0)), H, W), truth


def their_scores(code: SimpleNamespace, labels: np.ndarray, truth: np.ndarray, K: int, objects: int) -> tuple[Any, Any]:
    gt = np.stack([truth == o + 1 for o in range(objects)])
    own = np.stack([labels == k for k in range(K)])
    return code.evaluation.DAVISEvaluation._evaluate_unsupervised(gt, own, truth == metrics.VOID, ("J", "F"))


def compare_scores(code: SimpleNamespace) -> Iterator[compare.Row]:
    """The release gives a frame's objects in the order of their clusters, so that they are sorted here."""
    for T, H, W, K, objects in ((3, 96, 128, 5, 2), (2, 96, 128, 1, 3), (4, 240, 432, 12, 3)):
        labels, truth = fixed_masks(T, H, W, K, objects)
        ours = metrics.matched(metrics.video_scores(labels, truth, K, objects), "frame")
        theirs = their_scores(code, labels, truth, K, objects)
        for name, a, b in zip("JF", ours, theirs):
            label = f"{name}, {T} frames of {H} x {W}, {K} clusters, {objects} objects"
            yield compare.row(label, np.sort(a, 0), np.sort(b, 0), 1e-6)


def compare_all(code: SimpleNamespace) -> Iterator[compare.Row]:
    yield from compare_losses(code)
    yield from compare_block(code)
    yield from compare_model(code)
    yield from compare_clusters(code)
    yield from compare_scores(code)


# --- speed -----------------------------------------------------------------------------------------------------------


def timed(function: Any) -> tuple[float, Any]:
    """CPU seconds, all threads together: other work on the machine does not count."""
    start = time.process_time()
    out = function()
    return time.process_time() - start, out


def speed(code: SimpleNamespace, frames: int, memory: float = 4e9) -> bool:
    """Clustering of a video at 24 x 48 patches with 8 key frames, losses, and J&F at 480p; whether demands are met."""
    q, _ = queries_and_keys(frames, 24, 48, 0.7, seed=0)
    k = queries_and_keys(80, 24, 48, 0.7, seed=0)[1]
    mine, ours = timed(lambda: our_labels(q, k, 1.0, memory))
    theirs, other = timed(lambda: their_labels(code, q, k, 1.0))
    same = bool((ours == other).all())
    print(
        f"clustering, {frames} frames of 24 x 48, 8 key frames, {torch.get_num_threads()} threads: {mine:.1f} CPU s, ",
        end="",
    )
    print(f"release {theirs:.1f} s, {theirs / mine:.1f} times as fast, labels {'equal' if same else 'DIFFER'}")

    labels, truth = moving_masks(20, 480, 856, 10)
    fast, score = timed(lambda: metrics.matched(metrics.video_scores(labels, truth, 10, 2), "frame"))
    slow, official = timed(lambda: their_scores(code, labels, truth, 10, 2))
    equal = all(np.allclose(np.sort(a, 0), np.sort(b, 0), atol=1e-6) for a, b in zip(score, official))
    print(f"J&F, 20 frames of 480 x 856, 10 clusters, 2 objects: {fast:.2f} s, official package {slow:.2f} s, ", end="")
    print(f"{slow / fast:.1f} times as fast, {'equal' if equal else 'DIFFERENT'}")

    z, A, P = fixed_clip(torch.float32, 1, 3, 24 * 48, 384)
    z.requires_grad_(), A.requires_grad_()
    ours_s, _ = timed(lambda: (losses.semantic(z, A, P) + losses.motion(A, P, 3)).backward())
    theirs_s, _ = timed(lambda: torch.stack(code.losses(z, A, P, 3)).sum().backward())
    print(f"both losses with gradients, 3 frames of 24 x 48: {ours_s:.2f} s, release {theirs_s:.2f} s, ", end="")
    print(f"{theirs_s / ours_s:.1f} times as fast")
    return same and equal and theirs >= 5 * mine and slow >= 5 * fast and theirs_s > ours_s


def get_parser() -> Parser:
    parser = Parser(prog="uvos_dino.lab.compare_release", description=(__doc__ or "").split("\n")[0])
    compare.add_flags(parser, URL, "clustering, losses and J&F")
    parser.add_argument(
        "--frames", type=positive, default=80, help="of the timed clustering (a minute per 10 on one thread)"
    )
    parser.add_argument(
        "--memory_gb", type=float, default=4.0, help="attention rows that ours keeps; the release: none"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit code 1 when a difference exceeds its tolerance or, with --speed, a demand is missed."""
    args = get_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
        cv2.setNumThreads(args.threads)
    with release(args.release) as code:
        failed = compare.report(compare_all(code))
        if args.speed:
            failed += not speed(code, args.frames, 1e9 * args.memory_gb)
    return compare.verdict(failed)


if __name__ == "__main__":
    cli(main)
