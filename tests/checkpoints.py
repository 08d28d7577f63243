"""What two runs' checkpoints hold, tensor by tensor: for the tests of killed and resumed runs, and of two processes."""

from pathlib import Path

import torch

from shared_utils import checkpoint


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, flat."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, thing: object) -> None:
        if isinstance(thing, torch.Tensor):
            found[name] = thing
        elif isinstance(thing, dict):
            for key, value in thing.items():
                walk(f"{name}/{key}", value)
        elif isinstance(thing, list | tuple):
            for i, value in enumerate(thing):
                walk(f"{name}/{i}", value)

    walk("", checkpoint.load(out / "checkpoint.pth"))
    return found


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors that differ; both hold the same ones, more than 50, or the comparison says nothing."""
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys() and len(x) > 50
    return [key for key in x if not torch.equal(x[key], y[key])]
