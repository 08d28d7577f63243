"""Memory format of a network and its inputs: channels-last, but where a CPU's kernels are wrong in it."""

from typing import TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)
BLOCK = 16  # input channels that AVX-512's kernel takes at once; AVX2's takes 8


def narrow(network: nn.Module) -> bool:
    """Whether a strided 1x1 convolution with fewer input channels than a CPU's kernel takes at once is in `network`.

    Laid out channels-last, the backward pass of such a layer writes past its workspace in oneDNN 3.12, the one of torch
    2.13 and 2.14 (github.com/uxlfoundation/oneDNN, issue 6035): the process aborts, or its gradients are wrong.
    """
    return any(
        set(m.kernel_size) == {1} and max(m.stride) > 1 and m.in_channels // m.groups < BLOCK
        for m in network.modules()
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )


def memory_format(network: nn.Module, device: torch.device, dims: int = 2) -> torch.memory_format:
    """The format of `network` on `device`, which its inputs [N, C, H, W] (`dims` 3: [N, C, T, H, W]) take too.

    A channels-last input makes a contiguous network compute channels-last, hence the same rule for both. On a CPU clips
    are contiguous whatever the network.
    """
    if device.type == "cpu" and (dims == 3 or narrow(network)):
        return torch.contiguous_format
    return torch.channels_last if dims == 2 else torch.channels_last_3d


def place(network: N, device: torch.device, dims: int = 2) -> N:
    """`network` on `device` in its memory format."""
    return network.to(device).to(memory_format=memory_format(network, device, dims))


def follow(x: Tensor, network: nn.Module, dims: int = 2) -> Tensor:
    """Images (`dims` 3: clips) on the device and in the memory format of `network`."""
    weight = next(network.parameters(), x)  # a network without weights works where its images are
    device = weight.device
    return x.to(device, memory_format=memory_format(network, device, dims), non_blocking=True)
