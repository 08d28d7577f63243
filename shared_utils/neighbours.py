"""Exact nearest neighbours in feature space: extraction, search, and what is read off the neighbours."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_utils import UserError, distributed
from shared_utils.data import ImageList
from shared_utils.feed import in_order
from shared_utils.run import plain_errors, stop_between


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
    UserError: `out` cannot be written.
    """
    world, rank = distributed.world(), distributed.rank()
    share = -(-len(images) // world)
    first = min(rank * share, len(images))
    loader = in_order(images, first, min(first + share, len(images)), batch_size, workers, device)

    def blocks() -> Iterator[Tensor]:
        for x, _, _ in plain_errors(loader):
            stop_between()
            # The network's first convolution brings them into its own format.
            x = x.to(device, memory_format=torch.contiguous_format, non_blocking=True)
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
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(out, "w+", np.float32, (len(images), int(dim))).flush()
            except OSError as error:
                raise UserError(f"{out}: features cannot be written there ({error.strerror})") from None
        distributed.barrier()
        distributed.agreed(out.is_file(), f"{out} is not seen by all processes; give a folder that all nodes share")
        mapped = torch.from_numpy(np.lib.format.open_memmap(out, "r+"))
        rows = mapped[first : first + share]
    done = 0
    while block is not None:
        rows[done : done + len(block)] = block
        done += len(block)
        block = next(coming, None)
    if out is not None:
        with open(out, "rb+") as handle:  # before other nodes read the rows
            os.fsync(handle.fileno())
    distributed.barrier()
    if out is not None:
        return mapped
    if world == 1:
        return rows
    everything = torch.empty(world, share, int(dim))
    for at in range(0, share, 65536):  # in pieces: the device need not hold the features of all images
        piece = rows[at : at + 65536].to(device)
        everything[:, at : at + len(piece)] = distributed.gather(piece).view(world, len(piece), -1).cpu()
    return everything.flatten(0, 1)[: len(images)]


EXTRA = 32  # candidates beyond k that a matrix product hands to the final ranking
SCORES = 2**28  # products of queries and bank in memory at a time: 1 GB in float32
PAIRS = 2**26  # numbers of the candidates' vectors in memory at a time


@torch.no_grad()
def search(
    queries: Tensor,
    bank: Tensor,
    k: int,
    exclude_self: bool = False,
    first: int = 0,
    chunk: int = 2048,
    block: int | None = None,
    device: torch.device | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` with the largest inner product, exactly; for normalised rows the nearest in L2 too.

    A matrix product in float32 (never TF32) hands k + EXTRA candidates to a ranking by products that are summed in one
    order, whatever the chunk. Among equal products the lower index comes first, unless more than EXTRA are equal.

    Args:
        queries: [Q, D]; bank: [N, D].
        exclude_self: query i is row `first` + i of the bank, and must not find itself (by index: a duplicate stays).
        chunk: queries at a time, fewer where their products with a block are more than SCORES.
        block: rows of the bank at a time, with the best so far kept; no result depends on it. Default: as many
            as half of the device's free memory holds.
        device: where to search, by default where the bank is; chunks and blocks are brought there.
        own: [Q] row of the bank that a query must not find, -1: none. Where that leaves fewer than k, the product of
            the last is -inf.

    Returns: inner products [Q, k], falling, and indices [Q, k] int64, on the queries' device.
    """
    if k < 1 or k + exclude_self > len(bank):
        raise UserError(f"{k} neighbours need at least {k + exclude_self} images, there are {len(bank)}")
    device = device or bank.device
    if exclude_self:
        own = torch.arange(first, first + len(queries))
    block = min(len(bank), block or _rows_that_fit(bank, device))
    chunk = min(chunk, max(1, SCORES // block))
    sim = torch.full((len(queries), k), -torch.inf, device=queries.device)
    index = torch.zeros(sim.shape, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), block):
        part = bank[start : start + block].to(device)
        for at in range(0, len(queries), chunk):
            stop_between()
            rows = slice(at, at + chunk)
            q = queries[rows].to(device)
            best, where = _candidates(q, part, k, None if own is None else own[rows].to(device) - start)
            # Of equals the earlier stays first: the blocks come in the order of the bank.
            both = torch.cat([sim[rows].to(device), best], 1).sort(dim=1, descending=True, stable=True)
            found = torch.cat([index[rows].to(device), where + start], 1)
            sim[rows], index[rows] = both.values[:, :k], found.gather(1, both.indices[:, :k])
        del part  # before the next block comes
    return sim, index


def _rows_that_fit(bank: Tensor, device: torch.device) -> int:
    """Rows in float32 for half of a GPU's free memory; all of a bank that is where it is needed."""
    if bank.device.type == device.type or device.type != "cuda":
        return len(bank)
    return max(1, torch.cuda.mem_get_info(device)[0] // 2 // (4 * bank.shape[1]))


def _candidates(q: Tensor, part: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products [Q, c] and rising indices [Q, c] of the rows of `part` that may be among the k best, c = k + EXTRA.

    Row `own` [Q] is left out, if it is one: its product is -inf.
    """
    with _no_tf32():
        s = q @ part.T  # [Q, N]
    if own is not None:
        inside = torch.nonzero((own >= 0) & (own < len(part))).flatten()
        s[inside, own[inside]] = -torch.inf
    score, index = s.topk(min(k + EXTRA, len(part)), dim=1)
    del s
    index, order = index.sort(1)
    few = max(1, PAIRS // (index.shape[1] * q.shape[1]))
    best = torch.cat([(part[i] * v[:, None]).sum(2) for v, i in zip(q.split(few), index.split(few))])
    return best.masked_fill(score.gather(1, order) == -torch.inf, -torch.inf), index


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """GPUs take float32 factors as they are."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        yield
    finally:
        matmul.allow_tf32 = before


def neighbours(bank: Tensor, k: int, device: torch.device, block: int | None = None) -> Tensor:
    """Indices [N, k] of each row's nearest others, searched on `device`; the processes share the rows among them.

    The bank stays where it is (in memory, or mapped from a file); `block` rows at a time go to the device (`search`).
    """
    world, rank = distributed.world(), distributed.rank()
    share = -(-len(bank) // world)
    first = min(rank * share, len(bank))
    mine = torch.zeros(share, k, dtype=torch.int64, device=device)
    if first < len(bank):
        rows = bank[first : first + share]
        found = search(rows, bank, k, exclude_self=True, first=first, block=block, device=device)[1]
        mine[: len(found)] = found
    return distributed.gather(mine)[: len(bank)].cpu()


def vote(index: Tensor, sim: Tensor, labels: Tensor, tau: float | None = 0.07) -> Tensor:
    """Predicted labels [Q] from neighbours [Q, k]: weights exp(sim / tau), or one vote each for `tau` None.

    Ties of the majority vote go to the class of the nearest neighbour among the tied. A similarity of -inf is no vote.
    """
    classes = int(labels.max()) + 1
    votes = labels[index]  # [Q, k]
    if tau is None:  # a weight that can only break ties
        weight = 1 + torch.linspace(1e-3, 0, index.shape[1]).expand_as(sim) / index.shape[1]
    else:
        weight = ((sim - sim[:, :1]) / tau).exp()
    weight = weight.masked_fill(sim == -torch.inf, 0)
    return torch.zeros(len(index), classes).scatter_add_(1, votes, weight.float()).argmax(1)


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    tau: float | None = 0.07,
    device: torch.device | None = None,
    own: Tensor | None = None,
) -> float:
    """Top-1 of the (weighted) k-nearest-neighbour classifier, in per cent; features [N, D] normalised.

    Every process has to call it: each classifies its share of the test images on `device` (default: where `train` is).

    Args:
        own: for leave-one-out, the row of `train` that each test image is itself, -1: none; it has no vote.
    """
    device = device or train.device
    share = -(-len(test) // distributed.world())
    rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    mine = None if own is None else own[rows]
    sim, index = search(test[rows], train, min(k, len(train)), device=device, own=mine)
    right = (vote(index, sim, train_labels, tau) == test_labels[rows]).sum().double()
    return 100 * float(distributed.all_sum(right.to(device))) / len(test)


def draw_shots(labels: Tensor, shots: int, draw: int) -> Tensor:
    """Rows of `shots` images of each class (all of a smaller one), class by class; `draw` is the seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    by_class, place = labels[order].sort(stable=True)
    counts = torch.unique_consecutive(by_class, return_counts=True)[1]
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[place[within < shots]]


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    shots: int = 10,
    draws: int = 20,
    device: torch.device | None = None,
    own: Tensor | None = None,
) -> float:
    """Weighted kNN top-1 (k = `shots`) with `shots` labelled images a class, mean over `draws` fixed random choices.

    `own`: as in `knn_accuracy`; an image that is among the chosen is classified by the others of them.
    """
    total = 0.0
    for draw in range(draws):
        chosen = draw_shots(train_labels, shots, draw)
        place = torch.full((len(train) + 1,), -1).index_copy_(0, chosen, torch.arange(len(chosen)))  # the last: of none
        among = None if own is None else place[own]
        total += knn_accuracy(train[chosen], train_labels[chosen], test, test_labels, shots, device=device, own=among)
    return total / draws


def purity(index: Tensor, labels: Tensor) -> float:
    """Share of neighbours [N, k] that have their image's own label, in per cent."""
    return 100 * float((labels[index] == labels[:, None]).double().mean())
