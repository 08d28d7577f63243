"""Memory format of networks: channels-last where that is safe, and gradients that agree with float64's."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bingo.arch import build
from shared_utils.layout import follow, memory_format, narrow, place

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(8, 16, 1, 2), True),
        (nn.Conv2d(15, 16, 1, (1, 2)), True),
        (nn.Conv2d(16, 16, 1, 2), False),
        (nn.Conv2d(8, 16, 1), False),
        (nn.Conv2d(8, 16, 3, 2), False),
        (nn.Conv2d(8, 16, (1, 3), 2), False),
        (nn.Conv2d(32, 32, 1, 2, groups=4), True),
        (nn.Conv3d(4, 8, 1, (1, 2, 2)), True),
        (nn.Linear(4, 4), False),
    ],
)
def test_what_is_narrow(layer: nn.Module, expected: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(layer))
    assert narrow(network) is expected
    assert memory_format(network, CPU) == (torch.contiguous_format if expected else torch.channels_last)
    assert memory_format(network, GPU) == torch.channels_last  # the fault is a CPU's
    assert memory_format(network, GPU, dims=3) == torch.channels_last_3d
    assert memory_format(network, CPU, dims=3) == torch.contiguous_format


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_float64(width: int, given: torch.memory_format) -> None:
    """Images that come in either layout; no map of a narrow network is channels-last, or its kernel would be the bad
    one."""
    torch.manual_seed(0)
    network = build("resnet10", width, "cifar")
    exact = build("resnet10", width, "cifar").double()
    exact.load_state_dict(network.state_dict())
    network = place(network.to(memory_format=torch.channels_last), CPU)
    assert narrow(network) is (width < 16)
    seen = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):
            layer.register_forward_pre_hook(
                lambda _, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last))
            )
    x = torch.randn(4, 3, 32, 32)
    for net, images in ((network, follow(x.to(memory_format=given), network)), (exact, x.double())):
        net(images).square().mean().backward()
    assert seen == [width >= 16] * len(seen) and len(seen) >= 6
    for (name, one), two in zip(network.named_parameters(), exact.parameters(), strict=True):
        scale = two.grad.abs().max()
        torch.testing.assert_close(one.grad.double().div(scale), two.grad.div(scale), rtol=0, atol=2e-4, msg=name)


def test_contiguous_images_give_a_channels_last_network_the_same_bits() -> None:
    """What `shared_utils.evaluation.stream` and `shared_utils.neighbours.features` rely on."""
    torch.manual_seed(0)
    network = place(build("resnet10", 16, "cifar_pool"), CPU).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), network(follow(x, network)))


def test_nothing_else_decides() -> None:
    """No other file of the workspace names the format but the augmentation, whose pixels are stored that way."""
    named = re.compile(r"torch\.(channels_last|preserve_format)")
    files = [f for f in ROOT.glob("*/*.py") if f.parent.name not in ("tests", ".venv")]
    files += ROOT.glob("fame/*/*.py")
    found = sorted(str(f.relative_to(ROOT)) for f in files if named.search(f.read_text()))
    assert len(files) > 100 and found == ["shared_utils/augment.py", "shared_utils/layout.py"]
