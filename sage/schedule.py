"""Learning rates and the target's momentum, by iteration (a forward pass of one micro-batch), as in the release."""

import math


def learning_rate(
    base: float, iteration: int, per_epoch: int, epochs: int, warmup: float, ratio: float = 1e-4, policy: str = "cosine"
) -> float:
    """Cosine of the whole epoch to 0 (or constant), times a linear warm-up by iteration.

    Args:
        per_epoch: iterations of an epoch; warmup: epochs that it takes from ratio x the rate to the rate; policy:
            `cosine` or `const`.
    """
    lr = base
    if policy == "cosine":
        lr = base * (1 + math.cos(math.pi * (iteration // per_epoch) / epochs)) / 2
    total = warmup * per_epoch
    if iteration < total:
        lr *= 1 - (1 - iteration / total) * (1 - ratio)
    return lr


def target_momentum(base: float, iteration: int, total: int) -> float:
    """m = 1 - (1 - base) (cos(pi k / K) + 1) / 2, from `base` at k = 0 to 1 at k = K iterations."""
    return 1 - (1 - base) * (math.cos(math.pi * iteration / total) + 1) / 2
