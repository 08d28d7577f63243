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


EXTRA = 32  # candidates beyond k that a matrix product hands to the final ranking
WORTH = 2**32  # multiplications from which on a bank in bfloat16 pays for itself


@torch.no_grad()
def search(
    queries: Tensor, bank: Tensor, k: int, exclude_self: bool = False, first: int = 0, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` with the largest inner product, exactly; for normalised rows the nearest in L2 too.

    Candidates come from matrix products, in bfloat16 where that is fast, and are ranked by float32 products. Queries
    whose candidates in bfloat16 are not proven to hold the k best are searched again in float32. Among equal products
    the lower index comes first, unless more than EXTRA are equal.

    Args:
        queries: [Q, D]; bank: [N, D], same device.
        exclude_self: query i is row `first` + i of the bank, and must not find itself (by index: a duplicate stays).

    Returns: inner products [Q, k], falling, and indices [Q, k] int64.
    """
    if k < 1 or k + exclude_self > len(bank):
        raise UserError(f"{k} neighbours need at least {k + exclude_self} images, there are {len(bank)}")
    products = [_Products(bank, torch.float32)]
    if _bfloat16_is_fast(bank.device) and len(queries) * bank.numel() >= WORTH:
        products.insert(0, _Products(bank, torch.bfloat16))
    sim = queries.new_empty(len(queries), k, dtype=torch.float32)
    index = torch.empty(sim.shape, dtype=torch.int64, device=sim.device)
    for todo in torch.arange(len(queries), device=sim.device).split(chunk):
        for product in list(products):
            sim[todo], index[todo], proven = product.best(queries[todo], k, todo + first if exclude_self else None)
            if 2 * int(proven.sum()) < len(todo) and product is not products[-1]:
                products.remove(product)  # features too close to each other: it would not help the next ones either
            todo = todo[~proven]
            if not len(todo):
                break
    return sim, index


def _bfloat16_is_fast(device: torch.device) -> bool:
    """GPUs since 2020 and CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


class _Products:
    """Inner products with a bank in some precision, and how far they can be off.

    With q' = q + e and b' = b + d after rounding, |q.b - q'.b'| <= |e| |b| + |q'| |d| (Cauchy-Schwarz); the D terms are
    summed in float32, and bfloat16 rounds the sum to 8 bits. There the mean of the bank is taken off first: that moves
    all products of a query alike, and what is left is shorter.
    """

    def __init__(self, bank: Tensor, dtype: torch.dtype):
        self.exact, self.low = bank, bank
        self.mean = torch.zeros_like(bank[0])
        self.length = self.centred = float(bank.norm(dim=1).max())  # largest |b|
        self.rounding = 0.0  # largest |d|
        if dtype != torch.float32:
            self.mean, self.centred = bank.mean(0), 0.0
            self.low = torch.empty_like(bank, dtype=dtype)
            for rows, low in zip(bank.split(4096), self.low.split(4096)):
                rows = rows - self.mean
                low.copy_(rows)
                self.centred = max(self.centred, float(rows.norm(dim=1).max()))
                self.rounding = max(self.rounding, float((low.float() - rows).norm(dim=1).max()))

    def best(self, q: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Products [Q, k] and indices [Q, k] of the best rows, `own` [Q] left out, and which are proven [Q]."""
        low = q.to(self.low.dtype)
        s = low @ self.low.T  # [Q, N]
        if own is not None:
            s[torch.arange(len(s), device=s.device), own] = -torch.inf
        others = s.shape[1] - (own is not None)
        count = min(k + EXTRA, others)
        score, index = torch.topk(s, count, dim=1)
        del s
        score, low = score.float(), low.float()
        off = (low - q).norm(dim=1) * self.centred + low.norm(dim=1) * self.rounding
        off += q.shape[1] * 2**-22 * q.norm(dim=1) * self.length  # sums in float32, here and below
        if self.low.dtype == torch.bfloat16:
            off += score.abs().amax(1) / 256

        # Rank in float32 all that rounding may have moved behind the k-th.
        index, order = index.sort(1)
        close = (score >= score[:, k - 1, None] - 2 * off[:, None]).gather(1, order)
        pairs = zip(close.nonzero()[:, 0].split(512), index[close].split(512))
        sim = torch.full_like(score, -torch.inf)
        sim[close] = torch.cat([(q[rows] * self.exact[columns]).sum(1) for rows, columns in pairs])
        sim, order = sim.sort(dim=1, descending=True, stable=True)
        sim, index = sim[:, :k], index.gather(1, order)[:, :k]
        return sim, index, (sim[:, -1] - q @ self.mean > score[:, -1] + off) | (count == others)


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
