"""Nearest neighbours while a run trains (--knn_every): the training images, each classified by the others."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_utils import UserError, checkpoint, distributed
from shared_utils.data import ImageList
from shared_utils.flags import natural
from shared_utils.neighbours import features, knn_accuracy
from shared_utils.run import Run

MOST = 20_000  # images that are looked at, evenly over the list


def add_knn_flag(parser: argparse.ArgumentParser) -> None:
    """--knn_every, of a pretraining script."""
    text = f"epochs between tests of the backbone by 20 nearest neighbours, each of up to {MOST:,} training images by "
    text += "the others (knn/top1 in tensorboard); 0: none. Training is the same with and without"
    parser.add_argument("--knn_every", type=natural, default=0, help=text)


def watch(
    run: Run,
    network: nn.Module,
    images: ImageList,
    transform: Callable,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Test `network` at the end of every --knn_every-th epoch and of the last; before the first step.

    Nothing of the run changes: batch-norm statistics, modes and generators are put back as they were. On several
    processes the statistics are those of process 0, which the checkpoint holds.

    Args:
        transform: a deterministic one, as the evaluations use.
        embed: a batch [B, 3, H, W] -> pooled features [B, D] of `network`; default: its call with `pre_out`.

    UserError: --knn_every is given and the images have no labels.
    """
    every = run.args.knn_every
    if not every:
        return
    if not images.has_labels:
        raise UserError(f"--knn_every {every}: the images have no labels to test by; leave it away")
    chosen = images.take(np.linspace(0, len(images) - 1, min(MOST, len(images))).astype(int).tolist())
    chosen.transform = transform

    @torch.no_grad()
    def test() -> dict[str, Any]:
        kept = [buffer.clone() for buffer in network.buffers()]
        modes, state = {module: module.training for module in network.modules()}, checkpoint.rng_state()
        try:
            distributed.same_buffers(network)
            network.eval()
            pooled, bf16 = embed or partial(network, pre_out=True), run.args.amp == "bf16"
            z = features(pooled, chosen, run.device, 256, run.args.workers, bf16)
            own = torch.arange(len(chosen))
            return {"knn/top1": knn_accuracy(z, chosen.labels, z, chosen.labels, 20, 0.07, run.device, own)}
        finally:
            for module, training in modes.items():
                module.training = training
            for buffer, before in zip(network.buffers(), kept):
                buffer.copy_(before)
            checkpoint.set_rng_state(state)

    run.after_epoch = (every, test)
