"""Checkpoints: atomic files of tensors and plain containers, and strict loading of public weights with a report."""

import argparse
import contextlib
import json
import os
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_utils import UserError


def write(path: str | os.PathLike, writer: Callable[[IO[bytes]], Any], sync: bool = True) -> None:
    """Write a file atomically (temporary file beside it, flush, fsync, replace); a failure leaves the old file.

    Without `sync` nothing waits for the disk: a failing machine may lose the file, a full disk or a kill may not.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            writer(handle)
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if "inline_container" in str(error) and isinstance(error.__context__, (OSError, RuntimeError)):
            error = error.__context__  # torch.save closes its file, and complains that it is not whole, after the cause
        if str(error).startswith("DataLoader worker"):  # killed in the meantime, and told here
            raise error from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be written ({reason}); an older file there is unharmed, free space and retry"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # where the folder is a file, say
            temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike, obj: Any) -> None:
    """Write tensors and plain containers atomically, as `write` does."""
    write(path, lambda handle: torch.save(obj, handle))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically; of file names in it the bytes are kept."""
    write(path, lambda handle: handle.write(text.encode("utf-8", "surrogateescape")))


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write a result or what a run was made of, as JSON, atomically."""
    write_text(path, json.dumps(obj, indent=1) + "\n")


def _damaged(path: Path) -> str:
    """The record of a zip file whose bytes have another checksum than was written with them; "": none.

    `torch.load` does not look. A checksum of 0 says that none was written (`torch.serialization.set_crc32_options`).
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as records:
            for record in records.infolist():
                try:
                    with records.open(record) as handle:
                        while record.CRC and handle.read(1 << 20):
                            pass
                except (zipfile.BadZipFile, EOFError):
                    return record.filename
    return ""


def load(path: str | os.PathLike) -> Any:
    """Read a file of tensors and plain containers. UserError: missing, damaged, or a pickle that would run code."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder without checkpoint.pth; give a file of weights, or the folder of a run")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; train it first (README, Run), or give another path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if name := _damaged(path):
            raise UserError(f"{path}: damaged (the checksum of {name} is another); copy it again")
        # argparse.Namespace is a plain record that the DINO and MAE releases store beside their weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        if type(error).__name__ == "UnpicklingError" and "nsupported" in str(error):
            raise UserError(
                f"{path}: holds python objects besides tensors, and loading them could run code; "
                "re-save its weights as a plain state_dict where you trust the file"
            ) from None
        raise UserError(f"{path}: not a readable checkpoint (truncated or another format); copy it again") from None


def rng_state() -> dict[str, Any]:
    """State of the python, numpy, torch and CUDA generators of this process, as tensors and plain containers."""
    numpy_state = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [numpy_state[0], torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)), *numpy_state[2:]],  # type: ignore[index]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `rng_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_state_dict(obj: Any) -> bool:
    return isinstance(obj, Mapping) and len(obj) > 0 and all(isinstance(value, Tensor) for value in obj.values())


def _select(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def read_weights(path: str | os.PathLike, family: str = "auto") -> dict[str, Tensor]:
    """Flat state dict of the network inside a checkpoint, wrapper prefixes stripped.

    Families, by what their public files look like: `moco` (`state_dict` of `module.encoder_q.*`, also our own runs;
    version 3 `module.base_encoder.*`; OpenSelfSup `encoder_q.0.*`), `byol` (OpenSelfSup's `online_net.0.*`, the
    backbone alone is taken), `dino` (`teacher` of `backbone.*` beside
    `student`), `mae` (`model`), `swav` (`module.*` with `prototypes`), `plain` (torchvision, timm: flat keys or below
    `state_dict`; OpenSelfSup's `backbone.*`, SimSiam's `encoder.*`). `auto` recognises them; another name demands it.

    Raises:
        UserError: not a checkpoint of weights, or of another family than the demanded one.
    """
    obj = load(path)
    found = "plain"
    if isinstance(obj, Mapping) and {"student", "teacher"} <= set(obj):
        found, state = "dino", obj["teacher"]
    elif isinstance(obj, Mapping) and _is_state_dict(obj.get("model")):
        found, state = "mae", obj["model"]
    elif isinstance(obj, Mapping) and _is_state_dict(obj.get("state_dict")):
        state = obj["state_dict"]
    elif _is_state_dict(obj):
        state = obj
    else:
        keys = ", ".join(map(str, list(obj)[:5])) if isinstance(obj, Mapping) else type(obj).__name__
        raise UserError(f"{path}: no state_dict found (holds: {keys}); give a file of network weights")
    if all(key.startswith("module.") for key in state):
        state = _select(state, "module.")
    if any(key.startswith("encoder_q.") for key in state):
        found, state = "moco", _select(state, "encoder_q.")
        if "0.conv1.weight" in state:  # OpenSelfSup: backbone and neck
            state = _select(state, "0.")
    elif any(key.startswith("base_encoder.") for key in state):
        found, state = "moco", _select(state, "base_encoder.")
    elif found == "dino" and any(key.startswith("backbone.") for key in state):
        state = _select(state, "backbone.")
    elif any(key.startswith("online_net.0.") for key in state):
        found, state = "byol", _select(state, "online_net.0.")
    elif any(key.startswith("prototypes.") for key in state):
        found = "swav"
    else:
        inner = next((p for p in ("backbone.", "encoder.") if f"{p}conv1.weight" in state), "")
        state = _select(state, inner) if inner else state
    if family not in ("auto", found):
        raise UserError(
            f"{path}: looks like a {found} checkpoint, expected {family}; its first key is {next(iter(state))}"
        )
    return dict(state)


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], drop: Sequence[str] = (), missing_ok: Sequence[str] = ()
) -> str:
    """Load every key or say which do not fit; nothing is ever left at its initial value in silence.

    Args:
        drop: fnmatch patterns of keys in `state` that the module may lack (a projector, a classifier).
        missing_ok: patterns of keys of the module that `state` may lack (a new classifier).

    Returns: one line saying how many tensors were loaded, dropped and left new.

    Raises:
        UserError: listing missing, unexpected and mis-shaped keys; the module is then unchanged.
    """

    def match(key: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in patterns)

    own = module.state_dict()
    unexpected = [key for key in state if key not in own and not match(key, drop)]
    missing = [key for key in own if key not in state and not match(key, missing_ok)]
    shapes = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} here"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if keys
    ]
    if problems:
        raise UserError(f"the weights do not fit {type(module).__name__}: " + "; ".join(problems))
    with torch.no_grad():
        for key, value in own.items():
            if key in state:
                value.copy_(state[key])
    loaded = sum(key in state for key in own)
    return f"loaded {loaded} tensors, dropped {len(state) - loaded}, left new {len(own) - loaded}"


class ReleaseKeys:
    """A model for `Run.track`: its state dict under the releases' keys, which begin with `module.`."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {f"module.{key}": value for key, value in self.model.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_strict(self.model, {key.removeprefix("module."): value for key, value in state.items()})
