"""A whole video at once: keys of the encoder, the block's attention on sparse key frames, hierarchical clustering."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class Heads(NamedTuple):
    """What the attention of T frames is made of."""

    q: Tensor  # [T, heads, N, C / heads]
    k: Tensor  # [K, heads, N, C / heads] of the key frames
    scale: float


@torch.no_grad()
def project(
    model: AttEncoder, frames: Tensor, device: torch.device, norm: str, ratio: int, batch: int = 16, bf16: bool = False
) -> Heads:
    """Queries of the frames [T, 3, H, W] in 0..1 and keys of every `ratio`-th, by encoder and block."""
    q, key, scale = model.inference_heads(encode_frames(model, frames, norm, device, batch, bf16))
    return Heads(q, key[clustering.key_frames(len(frames), ratio)], scale)


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
    heads = project(model, frames, device, norm, ratio, batch, bf16)
    return clustering.cluster(clustering.Rows(*heads, memory, device), len(frames), tau)


class Numbers:
    """Clusters of window after window of a long video under numbers that last.

    Windows have key frames of their own, so their attention rows are of different spaces. Of every number the queries
    of at most `PATCHES` of its patches are kept, spread evenly over the last window that shows it. They attend to the
    new window's keys; their mean row is the older cluster's centroid there. Then the rule is the paper's for the
    windows inside a video (stage B, greedy leaders, the older ones first): a new cluster within tau of older centroids
    is the nearest of them; any other gets a number of its own. So memory is flat, and what was away comes back under
    its number.

    Args:
        most: numbers at once, 1..most. Beyond them, what has been away longest loses its number to what is new.
    """

    PATCHES = 32

    def __init__(self, tau: float, most: int):
        self.tau, self.most = tau, most
        self.queries: dict[int, Tensor] = {}  # number: [heads, P, d]
        self.seen: dict[int, int] = {}  # number: the last window that shows it
        self.window = self.lost = 0  # windows so far; numbers that were given anew

    def __call__(self, found: Clusters, heads: Heads) -> Tensor:
        """Numbers [T, N] of the patches of the next window, from its clusters. UserError for more than `most`."""
        if found.number > self.most:
            raise UserError(
                f"{found.number} clusters in one window, {self.most} numbers; raise --tau, or take an earlier "
                "checkpoint: with long training clusters become many"
            )
        present = found.labels.flatten().bincount(minlength=found.number) > 0
        table = self._known(found, heads)
        if not self.queries:  # as an evaluation numbers them, empty clusters too
            table = torch.arange(1, found.number + 1)
        for cluster in (present & (table == 0)).nonzero()[:, 0].tolist():
            table[cluster] = self._free(set(table[present].tolist()))
        numbers = table[found.labels]
        self._keep(numbers, heads.q)
        return numbers

    def _known(self, found: Clusters, heads: Heads) -> Tensor:
        """The number of the older cluster that each of K clusters is [K]; 0: of none."""
        table = torch.zeros(found.number, dtype=torch.int64)
        if self.queries:
            older = list(self.queries)
            owner = torch.repeat_interleave(torch.tensor([self.queries[n].shape[1] for n in older]))
            q = torch.cat([self.queries[n] for n in older], 1)  # [heads, M, d]
            rows = clustering.attention(q[None], heads.k, heads.scale)  # [M, D]
            owner = owner.to(rows.device)
            means = rows.new_zeros(len(older), rows.shape[1]).index_add_(0, owner, rows)
            means /= owner.bincount(minlength=len(older))[:, None]
            d, nearest = clustering.jeffreys(means, found.centroids).min(0)  # [K]
            table = torch.where(d <= self.tau, torch.tensor(older, device=d.device)[nearest], 0).cpu()
        return table

    def _free(self, taken: set[int]) -> int:
        """A number that nothing has, or that of what has been away longest."""
        number = next((n for n in range(1, self.most + 1) if n not in self.seen and n not in taken), 0)
        if not number:
            number = min((n for n in self.seen if n not in taken), key=lambda n: (self.seen[n], n))
            self.lost += 1
        return number

    def _keep(self, numbers: Tensor, q: Tensor) -> None:
        """Queries of the patches [T, heads, N, d] by their numbers [T, N]."""
        for number in numbers.unique().tolist():
            t, n = (numbers == number).nonzero(as_tuple=True)
            some = torch.linspace(0, len(t) - 1, min(self.PATCHES, len(t))).round().long()
            self.queries[number] = q[t[some].to(q.device), :, n[some].to(q.device)].transpose(0, 1).clone()
            self.seen[number] = self.window
        self.window += 1


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
