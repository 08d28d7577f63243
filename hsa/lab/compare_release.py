"""Our functions beside the authors' own, in one process: python -m hsa.lab.compare_release --release PATH [--speed]

PATH is a checkout of https://github.com/haohang96/CSML, which has no licence: none of its code is here, it is imported
from where it lies. It was written for GPUs, an older NumPy and Intel's mkl package, so while it is in use `.cuda()`
does nothing, `numpy.int` exists and `mkl` is an empty module. It also imports absl-py, easydict and faiss-cpu.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hsa import losses
from hsa.arch import build
from hsa.builder import CsMl
from hsa.cutmix import draw_box, paste
from shared_utils import distributed, neighbours
from shared_utils.flags import Parser, positive
from shared_utils.lab import compare
from shared_utils.layout import follow, place
from shared_utils.run import cli

URL = "https://github.com/haohang96/CSML"
FILES = ("main_moco.py", "utils.py", "clustering.py", "moco/builder.py")
PACKAGES = {"absl": "absl-py", "easydict": "easydict", "faiss": "faiss-cpu"}
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
LAM, TAU = (0.5, 0.5), 0.2


# --- the checkout ----------------------------------------------------------------------------------------------------


def loss_statements(source: str) -> types.CodeType:
    """The statements of the release's training loop from `loss = ...` to `loss /= 3`."""
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)]
    body = next(node.body for node in loops if "train_loader" in ast.unparse(node.iter))
    texts = [ast.unparse(statement) for statement in body]
    first = next(i for i, text in enumerate(texts) if text.startswith("loss = "))
    last = next(i for i, text in enumerate(texts) if text.startswith("loss /= "))
    return compile(ast.Module(body[first : last + 1], []), "release", "exec")


@contextmanager
def release(root: Path) -> Iterator[SimpleNamespace]:
    """The release's modules (main, clustering, builder) and `flags`, usable inside."""
    compare.check(root, URL, FILES, PACKAGES)
    sys.modules.setdefault("mkl", types.ModuleType("mkl")).__dict__.setdefault("get_max_threads", lambda: 1)
    code = SimpleNamespace(where=compare.CPU)  # where the release's `.cuda()` puts things
    with ExitStack() as stack:
        for kind in (torch.Tensor, nn.Module):
            stack.enter_context(mock.patch.object(kind, "cuda", lambda x, *args, **kwargs: x.to(code.where)))
        stack.enter_context(mock.patch.object(np, "int", int, create=True))
        stack.enter_context(mock.patch.object(sys, "path", [str(root.resolve()), *sys.path]))
        names = dict(main="main_moco", clustering="clustering", builder="moco.builder")
        vars(code).update({key: importlib.import_module(name) for key, name in names.items()})
        code.flags = code.main.FLAGS
        code.flags(["release", "--nomoxing"])
        code.flags.lam = list(LAM)
        statements = loss_statements((root / "main_moco.py").read_text(encoding="utf-8"))

        def loss(groups: Sequence[Tensor], epoch: int, mu: float) -> Tensor:
            """The release's loss of its three logits [N, 2, 1 + K] in an epoch."""
            names = {"output": groups[:2], "mix_out": groups[2], "epoch": epoch, "mix_lam": [mu, 1 - mu]}
            names["target"] = torch.zeros(len(groups[0]), dtype=torch.long, device=groups[0].device)
            names |= {"criterion": code.main.MulposCrossEntropy()}
            scope = {**vars(code.main), **names}
            exec(statements, scope)
            return scope["loss"]

        code.loss = loss
        yield code


# --- comparisons -----------------------------------------------------------------------------------------------------


def fixed_inputs(n: int, dim: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, p, x, k_q, k_p [n, dim] and queue [dim, size], all of unit norm, the same on every machine."""
    rng = np.random.RandomState(seed)
    arrays = [rng.standard_normal((n, dim)).T for _ in range(5)] + [rng.standard_normal((dim, size))]
    unit = [array / np.linalg.norm(array, axis=0) for array in arrays]
    return [torch.from_numpy(np.ascontiguousarray(array)).to(dtype) for array in [x.T for x in unit[:5]] + unit[5:]]


def compare_networks(code: SimpleNamespace) -> Iterator[compare.Row]:
    """Embeddings by the same weights: the keys are the release's, the pooling of ours is adaptive."""
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    for name in ("resnet18", "resnet50"):
        torch.manual_seed(0)
        theirs, ours = getattr(code.main, name)(), build(name)
        ours.fc = nn.Linear(ours.num_features, 1000)
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            yield compare.row(f"network {name}, two images of 224", ours.eval()(x), theirs.eval()(x), 1e-5)


def our_loss(x: Sequence[Tensor], epoch: int, mu: float, tau: float = TAU) -> Tensor:
    q, p, mix, k_q, k_p, queue = x
    return losses.release_loss(q, p, mix, k_q, k_p, queue, tau, LAM if epoch >= 11 else (1.0, 0.0), mu)


def their_loss(code: SimpleNamespace, x: Sequence[Tensor], epoch: int, mu: float, tau: float = TAU) -> Tensor:
    keys, model = torch.stack(list(x[3:5]), 1), SimpleNamespace(T=tau)
    return code.loss([code.builder.MoCo.logits_q_nk(model, z, keys, x[5]) for z in x[:3]], epoch, mu)


def compare_losses(code: SimpleNamespace) -> Iterator[compare.Row]:
    cases = [(6, 16, 40, 10, 0.7, 0.2), (6, 16, 40, 11, 0.7, 0.2), (6, 16, 40, 11, 0.25, 0.12)]
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)  # the release starts its sum from torch.tensor(0.)
        for n, dim, size, epoch, mu, tau in [*cases, (32, 128, 65536, 11, 0.7, 0.2)]:
            ours, theirs = (fixed_inputs(n, dim, size, dtype) for _ in range(2))
            for z in (*ours[:3], *theirs[:3]):
                z.requires_grad_()
            a, b = our_loss(ours, epoch, mu, tau), their_loss(code, theirs, epoch, mu, tau)
            a.backward()
            b.backward()
            label = f"{n} x {size} x {dim}, epoch {epoch}, tau {tau}, {str(dtype)[6:]}"
            yield compare.row(f"loss, {label}", a, b, LIMIT[dtype])
            grad_a, grad_b = (torch.cat([z.grad for z in x[:3] if z.grad is not None]) for x in (ours, theirs))
            yield compare.row(f"gradient, {label}", grad_a, grad_b, LIMIT[dtype])
    torch.set_default_dtype(torch.float32)


def legacy(seed: int) -> Any:
    """NumPy's legacy generator under the method names of the new one."""
    rng = np.random.RandomState(seed)
    return SimpleNamespace(beta=rng.beta, integers=rng.randint)


def compare_cutmix(code: SimpleNamespace) -> compare.Row:
    ours, theirs = [], []
    for seed in range(200):
        views = torch.zeros(1, 1, 40, 56), torch.ones(1, 1, 40, 56)
        box = draw_box(40, 56, 2.0, legacy(seed))
        ours.append([*paste(*views, box).flatten().tolist(), box[4]])
        np.random.seed(seed)
        image, mu = code.main.cutmix(views[0].clone(), views[1], 2.0)
        theirs.append([*image.flatten().tolist(), mu])
    return compare.row("CutMix, 200 draws at 40 x 56: pixels and mu", ours, theirs, 0.0)


def unit_features(n: int, dim: int) -> Tensor:
    return F.normalize(torch.from_numpy(np.random.RandomState(1).standard_normal((n, dim)).astype(np.float32)), dim=1)


def compare_neighbours(code: SimpleNamespace) -> compare.Row:
    features = unit_features(2000, 64)
    code.flags.dataset_len, code.flags.clus_pos_num = len(features), 5
    theirs = np.array(code.clustering.knn(features.numpy()).imgs_corr)
    ours = neighbours.search(features, features, 5, exclude_self=True)[1]
    return compare.row("neighbours, 5 of 2,000 x 64: indices", ours, theirs, 0.0)


class Tiny(nn.Module):
    """An encoder that both builders accept: the release's looks at `fc` and replaces it."""

    num_features = 8

    def __init__(self, num_classes: int = 128):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc: nn.Module = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

    def levels(self, x: Tensor) -> list[Tensor]:
        return [self(x)]


def compare_steps(code: SimpleNamespace, steps: int = 4, batch: int = 8) -> Iterator[compare.Row]:
    """Training steps of both models from the same weights: momentum, shuffle, queue, warm-up, CutMix."""
    torch.manual_seed(0)
    theirs = code.builder.MoCo(Tiny, 128, 3 * batch, 0.9, TAU, True)
    ours = CsMl(Tiny(), 128, 3 * batch, 0.9)  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    optimisers = [
        torch.optim.SGD(m.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4) for m in (ours, theirs)
    ]
    losses_ours, losses_theirs = [], []
    with compare.one_process():
        for step in range(steps):
            images = torch.from_numpy(np.random.RandomState(step).standard_normal((4, batch, 3, 8, 8))).float()
            query, key, add_posq, add_posk = images
            epoch, generator = 10 + step, torch.Generator().manual_seed(step)
            box = draw_box(8, 8, 2.0, legacy(step))
            views = ours([query, add_posq, paste(query, add_posq, box)])[0]
            ours.update_key_encoder()
            k_q, k_p = (ours.embed_keys(v, generator)[0] for v in (key, add_posk))
            loss = our_loss([*views, k_q, k_p, ours.queue], epoch, box[4])
            np.random.seed(step)
            mix, mu = code.main.cutmix(query.clone(), add_posq.clone(), 2.0)
            output, mix_out, _ = theirs(query, key, add_posq, add_posk, mix, 0, 0, 1, 1, [dist.group.WORLD])
            loss_theirs = code.loss([*output, mix_out], epoch, mu)
            for optimiser, value in zip(optimisers, (loss, loss_theirs)):
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
            ours.enqueue([k_q])
            losses_ours.append(loss.item())
            losses_theirs.append(loss_theirs.item())
    # the same sums in another order: rounding grows with the steps
    yield compare.row(f"{steps} training steps, tiny networks: losses", losses_ours, losses_theirs, 1e-5)
    mine = ours.state_dict()
    for name in ("queue", "queue_ptr", "encoder_q.conv.weight", "encoder_k.conv.weight", "encoder_k.bn.running_var"):
        yield compare.row(f"after {steps} steps: {name}", mine[name], theirs.state_dict()[name], 1e-5)


def compare_all(code: SimpleNamespace) -> Iterator[compare.Row]:
    yield from compare_networks(code)
    yield from compare_losses(code)
    yield compare_cutmix(code)
    yield compare_neighbours(code)
    yield from compare_steps(code)


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(code: SimpleNamespace, images: int, repeats: int) -> bool:
    """Loss with gradients at the paper's sizes, and the search for neighbours; whether all demands are met."""
    x = fixed_inputs(32, 128, 65536, torch.float32)
    for z in x[:3]:
        z.requires_grad_()
    steps = [lambda: our_loss(x, 11, 0.7).backward(), lambda: their_loss(code, x, 11, 0.7).backward()]
    times, peaks = compare.fastest(steps, repeats), [compare.peak_mib(step) for step in steps]
    threads = torch.get_num_threads()
    print(f"loss and gradients, 32 x 65,536 x 128, {threads} threads: {1e3 * times[0]:.1f} ms, release", end=" ")
    print(f"{1e3 * times[1]:.1f} ms, {times[1] / times[0]:.1f} times as fast; ", end="")
    print(f"peak {peaks[0]:.0f} MiB, release {peaks[1]:.0f} MiB")
    faiss: Any = importlib.import_module(list(PACKAGES)[-1])  # the release imports it where it uses it
    faiss.omp_set_num_threads(threads)
    features = unit_features(images, 2048)
    index = faiss.IndexFlatL2(2048)
    index.add(features.numpy())
    found: list[Any] = [None, None]

    def ours() -> None:
        found[0] = neighbours.search(features, features, 5, exclude_self=True)[1].numpy()

    def theirs() -> None:
        found[1] = index.search(features.numpy(), 6)[1][:, 1:]

    seconds = compare.fastest([ours, theirs], 1)
    same = 100 * float((found[0] == found[1]).mean())
    print(
        f"5 neighbours of {images} x 2,048, {threads} threads: {seconds[0]:.1f} s, faiss {seconds[1]:.1f} s, ", end=""
    )
    print(f"{seconds[1] / seconds[0]:.1f} times as fast; {same:.4f} % of the indices equal")
    return times[1] >= 4 * times[0] and not 2 * peaks[0] > peaks[1] and seconds[0] <= seconds[1]


def time_steps(code: SimpleNamespace, device: torch.device, repeats: int, batch: int = 32, size: int = 224) -> None:
    """The whole step at the paper's sizes: ResNet-50, a queue of 65,536, the release's loss with CutMix.

    Ours as it trains (channels_last, bfloat16), the release under the same autocast and as published (float32).
    """
    torch.manual_seed(0)
    code.where = device
    theirs = code.builder.MoCo(code.main.resnet50, 128, 65536, 0.999, TAU, True)
    ours = CsMl(build("resnet50"), 128, 65536, 0.999)
    ours.load_state_dict(theirs.state_dict())
    theirs.to(device)
    place(ours, device).train()
    images = torch.randn(4, batch, 3, size, size, device=device)
    views = [follow(x, ours) for x in images]
    our_update = compare.updater(ours.encoder_q, fused=device.type == "cuda")  # as it trains
    their_update = compare.updater(theirs.encoder_q, fused=False)
    rng = np.random.default_rng(0)

    def our_step() -> None:
        query, key, add_posq, add_posk = views
        box = draw_box(size, size, 2.0, rng)
        with torch.autocast(device.type, torch.bfloat16):
            z = ours([query, add_posq, paste(query, add_posq, box)])[0]
        ours.update_key_encoder()
        with torch.autocast(device.type, torch.bfloat16):
            keys = [ours.embed_keys(v, torch.Generator().manual_seed(0))[0] for v in (key, add_posk)]
        our_update(our_loss([*z, *keys, ours.queue], 11, box[4]))
        ours.enqueue(keys[:1])

    def their_step(half: bool) -> None:
        mix, mu = code.main.cutmix(images[0].clone(), images[2].clone(), 2.0)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output, mix_out, _ = theirs(*images, mix, 0, 0, 1, 1, [dist.group.WORLD])
            loss = code.loss([*output, mix_out], 11, mu)
        their_update(loss)

    compare.time_steps(our_step, their_step, device, batch, repeats)
    code.where = compare.CPU


def get_parser() -> Parser:
    parser = Parser(prog="hsa.lab.compare_release", description=(__doc__ or "").split("\n")[0])
    compare.add_flags(parser, URL, "the loss and the neighbour search")
    compare.add_step_flags(parser)
    parser.add_argument("--images", type=positive, default=50000, help="rows of the timed neighbour search")
    parser.add_argument("--repeats", type=positive, default=7, help="calls of which the fastest counts")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit code 1 when a difference exceeds its tolerance or, with --speed, a demand is missed."""
    args = get_parser().parse_args(argv)
    device = distributed.init(args.step, "--step") if args.step else compare.CPU
    if args.threads:
        torch.set_num_threads(args.threads)
    with release(args.release) as code:
        failed = compare.report(compare_all(code))
        if args.speed:
            failed += not speed(code, args.images, args.repeats)
        if args.step:
            time_steps(code, device, args.repeats)
    return compare.verdict(failed)


if __name__ == "__main__":
    cli(main)
