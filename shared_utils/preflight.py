"""Lines of the preflight that many scripts print: the estimated time, and a caution of contrastive training."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shared_utils.run import Run

ONE_NORM = "one batch norm over query and key batches lets MoCo cheat: --bn_splits 8, or several processes"


@torch.no_grad()
def seconds(run: Run, network: nn.Module, forward: Callable[[], Tensor]) -> float:
    """Of a forward pass in eval mode, the second of two: the first pays for warm-up. The network's mode comes back."""
    training, took = network.training, 0.0
    network.eval()
    for _ in range(2):
        started = time.perf_counter()
        with run.autocast():
            forward().sum().item()
        took = time.perf_counter() - started
    network.train(training)
    return took


def about(minutes: float, steps: int) -> str:
    """The estimate as it is printed."""
    return f"about {max(1, round(minutes))} min for {steps} steps if data loading keeps up"
