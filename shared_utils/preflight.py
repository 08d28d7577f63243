"""What many training scripts check and print before the first step: sizes, the estimated time, cautions."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shared_utils import UserError
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


def check_images(images: int, flag: str, value: int, least: int = 2, each: int = 1) -> None:
    """UserError where the data has fewer images than a batch; it names the flag and the number that fits.

    Args:
        images: of the data. flag: that gives the batch. value: its own. least: the smallest that trains, which larger
            ones are multiples of. each: images a step for 1 of the flag (processes, accumulated steps).
    """
    if value * each <= images:
        return
    fit = least
    while 2 * fit * each <= images:
        fit *= 2
    cure = f"give {flag} {fit} or less" if fit * each <= images else f"{least * each} are the least that train"
    raise UserError(f"{flag} {value}: a step takes {value * each} images, the data has {images}; {cure}")


def queue_caution(size: int, images: int, batch: int) -> dict[str, str]:
    """A line about a queue of negatives that is larger than the data; none where it is not."""
    if size <= images:
        return {}
    fit = images // batch * batch
    return {
        "caution, queue": f"--moco_k {size} is more than the {images} images: earlier keys of an image are among its "
        f"negatives; --moco_k {fit} holds an epoch of keys"
    }
