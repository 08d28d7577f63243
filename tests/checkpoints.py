"""What two runs' checkpoints hold, tensor by tensor: for the tests of killed and resumed runs, and of two processes."""

from pathlib import Path

import torch

from shared_utils import checkpoint


def flat(thing: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples, by its path."""
    if isinstance(thing, torch.Tensor):
        return {name: thing}
    pairs = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list | tuple) else ()
    return {k: v for key, value in pairs for k, v in flat(value, f"{name}/{key}").items()}


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint in `out`."""
    return flat(checkpoint.load(out / "checkpoint.pth"))


def differing(a: Path, b: Path, least: int = 50) -> list[str]:
    """Names of the tensors that differ; both hold the same ones, more than `least`, or the comparison says nothing."""
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys() and len(x) > least
    return [key for key in x if not torch.equal(x[key], y[key])]
