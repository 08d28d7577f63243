"""Exact nearest neighbours in feature space: extraction, search, and what is read off the neighbours."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from shared_utils import UserError, distributed
from shared_utils.data import ImageList
from shared_utils.run import plain_errors, worker_init


@torch.no_grad()
def features(
    embed: Callable[[Tensor], Tensor],
    images: ImageList,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    amp: bool = False,
    out: Path | None = None,
) -> Tensor:
    """L2-normalised features of all images, in the order of the data set, complete on every process.

    Args:
        embed: a batch [B, 3, H, W] -> features [B, D]; in eval mode, or rows depend on their batch.
        images: its transform must be deterministic.
        out: an .npy file that the rows are written to, each process its own, instead of memory and an exchange.

    Returns: [N, D] float32 on the CPU (mapped from `out` if given). Each process computes a share of the rows.
    """
    world, rank = distributed.world(), distributed.rank()
    share = -(-len(images) // world)
    first = min(rank * share, len(images))
    loader = DataLoader(
        Subset(images, range(first, min(first + share, len(images)))),
        batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init,
        generator=torch.Generator(),
    )

    def blocks() -> Iterator[Tensor]:
        for x, _, _ in plain_errors(loader):
            x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                z = embed(x)
            yield F.normalize(z.float().flatten(1), dim=1).cpu()

    coming = blocks()
    block = next(coming, None)  # None: more processes than images
    dim = torch.tensor([0 if block is None else block.shape[1]], device=device)
    if world > 1:
        torch.distributed.all_reduce(dim, torch.distributed.ReduceOp.MAX)
    if out is None:
        rows = torch.zeros(share, int(dim))
    else:
        if rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(out, "w+", np.float32, (len(images), int(dim)))
        distributed.barrier()
        mapped = torch.from_numpy(np.lib.format.open_memmap(out, "r+"))
        rows = mapped[first : first + share]
    done = 0
    while block is not None:
        rows[done : done + len(block)] = block
        done += len(block)
        block = next(coming, None)
    distributed.barrier()
    if out is not None:
        return mapped
    return rows if world == 1 else distributed.gather(rows.to(device)).cpu()[: len(images)]


@torch.no_grad()
def search(
    queries: Tensor, bank: Tensor, k: int, exclude_self: bool = False, first: int = 0, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` with the largest inner product, exactly; for normalised rows the nearest in L2 too.

    Args:
        queries: [Q, D]; bank: [N, D], same device.
        exclude_self: query i is row `first` + i of the bank, and must not find itself (by index: a duplicate stays).

    Returns: inner products [Q, k], falling, and indices [Q, k] int64.
    """
    if k < 1 or k + exclude_self > len(bank):
        raise UserError(f"{k} neighbours need at least {k + exclude_self} images, there are {len(bank)}")
    sims, indices = [], []
    for start in range(0, len(queries), chunk):
        s = queries[start : start + chunk] @ bank.T  # [chunk, N]
        if exclude_self:
            rows = torch.arange(len(s), device=s.device)
            s[rows, rows + first + start] = -torch.inf
        sim, index = s.topk(k, dim=1)
        sims.append(sim)
        indices.append(index)
    return torch.cat(sims), torch.cat(indices)


def neighbours(bank: Tensor, k: int, device: torch.device) -> Tensor:
    """Indices [N, k] of each row's nearest others; the processes share the rows among them."""
    world, rank = distributed.world(), distributed.rank()
    share = -(-len(bank) // world)
    first = min(rank * share, len(bank))
    on_device = bank.to(device)
    mine = on_device.new_zeros(share, k, dtype=torch.int64)
    if first < len(bank):
        found = search(on_device[first : first + share], on_device, k, exclude_self=True, first=first)[1]
        mine[: len(found)] = found
    return distributed.gather(mine)[: len(bank)].cpu()


def vote(index: Tensor, sim: Tensor, labels: Tensor, tau: float | None = 0.07) -> Tensor:
    """Predicted labels [Q] from neighbours [Q, k]: weights exp(sim / tau), or one vote each for `tau` None.

    Ties of the majority vote go to the class of the nearest neighbour among the tied.
    """
    classes = int(labels.max()) + 1
    votes = labels[index]  # [Q, k]
    if tau is None:  # a weight that can only break ties
        weight = 1 + torch.linspace(1e-3, 0, index.shape[1]).expand_as(sim) / index.shape[1]
    else:
        weight = ((sim - sim[:, :1]) / tau).exp()
    return torch.zeros(len(index), classes).scatter_add_(1, votes, weight.float()).argmax(1)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, tau: float | None = 0.07
) -> float:
    """Top-1 of the (weighted) k-nearest-neighbour classifier, in per cent; features [N, D] normalised."""
    sim, index = search(test, train, min(k, len(train)))
    return 100 * float((vote(index, sim, train_labels, tau) == test_labels).double().mean())


def few_shot(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, shots: int = 10, draws: int = 20
) -> float:
    """Weighted kNN top-1 (k = `shots`) with `shots` labelled images a class, mean over `draws` fixed random choices."""
    total = 0.0
    for draw in range(draws):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))
        chosen = torch.cat([order[train_labels[order] == y][:shots] for y in train_labels.unique()])
        total += knn_accuracy(train[chosen], train_labels[chosen], test, test_labels, shots)
    return total / draws


def purity(index: Tensor, labels: Tensor) -> float:
    """Share of neighbours [N, k] that have their image's own label, in per cent."""
    return 100 * float((labels[index] == labels[:, None]).double().mean())
