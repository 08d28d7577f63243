"""A whole video at once: keys of the encoder, the block's attention on sparse key frames, hierarchical clustering."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_utils import UserError, checkpoint
from uvos_dino import clustering
from uvos_dino.clustering import Clusters
from uvos_dino.data import normalise
from uvos_dino.model_cluster import AttEncoder
from uvos_dino.vision_transformer import for_weights


@torch.no_grad()
def encode_frames(
    model: AttEncoder, frames: Tensor, norm: str, device: torch.device, batch: int, bf16: bool = False
) -> Tensor:
    """Frames [T, 3, H, W] in 0..1 -> keys of the encoder [T, N, C] float32, on the device."""
    parts = []
    for some in frames.split(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            k = model.encoder.keys(normalise(some.to(device), norm))  # [b, C, h, w]
        parts.append(k.float().flatten(2).transpose(1, 2))
    return torch.cat(parts)


@torch.no_grad()
def segment(
    model: AttEncoder,
    frames: Tensor,
    device: torch.device,
    norm: str = "release",
    ratio: int = 10,
    tau: float = 1.0,
    batch: int = 16,
    memory: float = 4e9,
    bf16: bool = False,
) -> Clusters:
    """Clusters of a video's T frames [T, 3, H, W] in 0..1; `memory`: bytes of attention rows that may be kept.

    The attention and the clustering are float32 whatever the encoder runs in: half precision underflows to zeros.
    """
    k = encode_frames(model, frames, norm, device, batch, bf16)
    q, key, scale = model.inference_heads(k)  # [T, heads, N, C / heads]
    rows = clustering.Rows(q, key[clustering.key_frames(len(frames), ratio)], scale, memory, device)
    return clustering.cluster(rows, len(frames), tau)


def load_model(path: str | Path, flags: Mapping[str, Any] | None = None) -> tuple[AttEncoder, str, float | None]:
    """The trained model of a checkpoint (a run of ours, or the released one), a line about it, its minutes of training.

    The sizes are read off the weights; the heads of the block are 8 where neither the checkpoint's flags nor `flags`
    say otherwise. UserError for a file that lacks a single tensor.
    """
    saved = checkpoint.load(path)
    state = saved.get("model_state_dict") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: holds no model_state_dict; give a checkpoint of uvos_dino.train_RGB_cluster")
    stored = saved.get("args") if isinstance(saved.get("args"), Mapping) else {}
    state = {key.removeprefix("module."): value for key, value in state.items()}
    encoder = for_weights({k[8:]: v for k, v in state.items() if k.startswith("encoder.")}, str(path))
    num_t = len({key.split(".")[1] for key in state if key.startswith("temporal_transformer.")})
    if not num_t:
        raise UserError(f"{path}: no temporal_transformer in it; these are an encoder's weights alone")
    heads = (flags or {}).get("num_heads") or stored.get("num_heads") or 8
    if heads < 1 or encoder.embed_dim % heads:
        raise UserError(f"--num_heads {heads}: does not divide the {encoder.embed_dim} channels of {path}")
    model = AttEncoder(encoder, num_t, heads, 0.0, 0.0)
    try:
        report = checkpoint.load_strict(model, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    progress = saved.get("progress")
    step, minutes = saved.get("iteration", "?"), None
    if isinstance(progress, Mapping):
        step, minutes = progress["step"], round(progress["seconds"] / 60, 2)
    return model.eval(), f"{path}: iteration {step}, {num_t} block(s) of {heads} heads; {report}", minutes
