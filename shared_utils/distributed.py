"""One code path for one process and for N (torchrun): start, gather, reduce, and batch norm over several processes."""

import atexit
import inspect
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import UserError


def init(device: str = "auto", flag: str = "--device") -> torch.device:
    """Join the processes that torchrun started (gloo on CPU, nccl on GPU); return this process's device.

    UserError: a device that this machine or PyTorch does not have, named by the flag that gave it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"{flag} {device}: no such device; give auto, cpu, cuda or cuda:N") from None
    gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if chosen.type == "cuda" and (chosen.index or int(os.environ.get("LOCAL_RANK", 0))) >= gpus:
        raise UserError(
            f"{flag} {device}: {gpus} GPUs are visible to this process; give cpu, another GPU, or fewer processes"
        )
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(leave)
    return chosen


def leave() -> None:
    """Before the exit: processes that leave one after another without a word make gloo abort the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def agreed(value: bool, what: str) -> bool:
    """`value`, which all processes must have found alike; UserError where they did not (`what` says what to do)."""
    if world() > 1:
        found: list[bool | None] = [None] * world()
        dist.all_gather_object(found, value)
        if len(set(found)) > 1:
            raise UserError(what)
    return value


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes, no gradient; `x` itself is left as it is."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[N, ...] on each process -> [world * N, ...] in rank order, no gradient; shapes must agree."""
    if world() == 1:
        return x
    x = x.contiguous()  # first: empty_like would keep another memory format than what is sent
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


@torch.no_grad()
def same_buffers(network: nn.Module) -> None:
    """Buffers of process 0 on every process: the batch-norm statistics of the checkpoint and of the releases' wrappers.

    After training without synchronised batch norm each process has those of its own batches.
    """
    if world() > 1:
        for buffer in network.buffers():
            sent = buffer.contiguous()
            dist.broadcast(sent, 0)
            buffer.copy_(sent)


def buffers_apart() -> dict[str, Any]:
    """The flag of DistributedDataParallel by which a forward pass leaves each process its own buffers.

    torch 2.14 deprecates the older name.
    """
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def wrap(network: nn.Module) -> nn.Module:
    """DistributedDataParallel around `network`, or with one process `network` itself.

    Parameters and buffers start as those of process 0. From there on batch-norm statistics are each process's own; see
    `same_buffers` for an evaluation.
    """
    if world() == 1:
        return network
    same_buffers(network)
    return nn.parallel.DistributedDataParallel(network, **buffers_apart())


class _SumGrad(torch.autograd.Function):
    """All-reduced sum whose gradient is the all-reduced sum of gradients."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _GatherGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.size = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad[rank() * ctx.size : (rank() + 1) * ctx.size]


def gather_with_grad(x: Tensor) -> Tensor:
    """As `gather`; the gradient of every process's loss reaches this process's rows (summed)."""
    return x if world() == 1 else _GatherGrad.apply(x)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with statistics over all processes, on CPU (gloo) as on GPU; equal to one process on the whole batch.

    torch.nn.SyncBatchNorm runs on GPUs only, and a reproduction whose two-process test cannot run is not tested.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Features [N, C] as well as maps [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        axes = [0] + list(range(2, x.dim()))
        y = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        total = _SumGrad.apply(torch.cat([y.sum(axes), count]))  # [C + 1]
        mean = total[:-1] / total[-1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = y - mean.view(shape)  # two passes: E[x^2] - E[x]^2 loses digits
        var = _SumGrad.apply(centred.square().sum(axes)) / total[-1].detach()
        if self.track_running_stats:
            with torch.no_grad():
                n = total[-1]
                assert self.running_mean is not None and self.running_var is not None  # for the type checker
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.detach(), momentum)
                self.running_var.lerp_(var.detach() * n / (n - 1), momentum)
        out = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm over contiguous shares of the batch: one process behaves as `splits` processes without sync.

    With `passes` > 1 the batch holds so many forward passes one after another (views that would otherwise go through
    the network separately), each cut into `splits` shares. Running statistics take the mean over the shares of a
    pass, and the passes one after another. The batch must divide by passes * splits.
    """

    def __init__(self, num_features: int, splits: int = 8, passes: int = 1, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(num_features, **kwargs)
        self.splits, self.passes = splits, passes

    def _check_input_dim(self, input: Tensor) -> None:
        """Features [N, C] as well as maps [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        shares = self.splits * self.passes
        if not self.training or shares == 1:
            return super().forward(x)
        if len(x) % shares:
            raise ValueError(f"a batch of {len(x)} does not divide into {shares} batch-norm splits")
        # A share is contiguous memory in every layout; momentum 1 leaves its own statistics in `mean` and `var`.
        track = self.track_running_stats and self.running_mean is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        stats = x.new_zeros(shares, 2, self.num_features, dtype=wide)
        out = []
        for part, (mean, var) in zip(x.chunk(shares), stats):
            own = (mean, var) if track else (None, None)
            out.append(F.batch_norm(part, own[0], own[1], self.weight, self.bias, True, 1.0, self.eps))
        if track:
            assert self.running_mean is not None and self.running_var is not None  # for the type checker
            assert self.num_batches_tracked is not None
            for mean, var in stats.view(self.passes, self.splits, 2, -1).mean(1):
                self.num_batches_tracked.add_(1)
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(var.to(self.running_var.dtype), momentum)
        return torch.cat(out)


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def convert_norm(module: nn.Module, kind: str, splits: int = 8, passes: int = 1) -> nn.Module:
    """Replace every BatchNorm1d, 2d and 3d below `module`; kind: `sync`, `split` or `local` (unchanged).

    Keys stay the same. UserError: a batch norm of another class, which may do more than normalise.
    """
    if kind == "local":
        return module
    for name, child in module.named_children():
        if isinstance(child, NORMS) and type(child) in NORMS:
            new: nn.BatchNorm2d
            new = (
                SyncBatchNorm(child.num_features)
                if kind == "sync"
                else SplitBatchNorm(child.num_features, splits, passes)
            )
            new.eps, new.momentum = child.eps, child.momentum
            new.load_state_dict(child.state_dict())
            for fresh, old in zip(new.parameters(), child.parameters()):
                fresh.requires_grad_(old.requires_grad)  # DDP waits for the gradients of what it takes for trained
            setattr(module, name, new.train(child.training))
        elif isinstance(child, NORMS) and not isinstance(child, SyncBatchNorm | SplitBatchNorm):  # timm's, with its own
            raise UserError(
                f"batch norm {name} is a {type(child).__name__}, which cannot be split; take --bn_splits 1 and leave "
                "--one_pass away, or choose another --arch"
            )
        else:
            convert_norm(child, kind, splits, passes)
    return module


@torch.no_grad()
def shuffle(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shuffle-BN: deal the samples of all processes anew. `generator` must be in the same state everywhere (CPU).

    Returns: this process's share of the shuffled batch [N, ...] and the permutation [world * N] for `unshuffle`.
    """
    everything = gather(x)
    order = torch.randperm(len(everything), generator=generator).to(x.device)
    return everything[order.view(world(), -1)[rank()]], order


@torch.no_grad()
def unshuffle(x: Tensor, order: Tensor) -> Tensor:
    """Undo `shuffle` on the outputs [N, ...] of the shuffled batch."""
    everything = gather(x)
    return everything[torch.argsort(order).view(world(), -1)[rank()]]
