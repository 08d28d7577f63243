"""Our residual blocks and picture grids against torchvision's."""

import pytest
import torch
from torchvision.models import resnet as theirs
from torchvision.utils import make_grid as their_grid

from shared_utils import resnet as ours
from shared_utils.pictures import make_grid


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_are_torchvisions(name: str, stride: int) -> None:
    """One seed gives the same weights and names; outputs, gradients and running statistics are equal to the bit."""
    made = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        block = getattr(module, name)
        outputs = 8 * block.expansion
        shortcut = torch.nn.Sequential(
            torch.nn.Conv2d(16, outputs, 1, stride, bias=False), torch.nn.BatchNorm2d(outputs)
        )
        made.append(block(16, 8, stride, shortcut))
    x, results = torch.randn(4, 16, 9, 9), []
    for block in made:
        z = x.clone().requires_grad_()
        out = block(z)
        out.square().sum().backward()
        results.append([out, z.grad, *(p.grad for p in block.parameters()), *block.state_dict().values()])
    assert list(made[0].state_dict()) == list(made[1].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("count", "nrow", "padding"), [(1, 1, 2), (5, 3, 2), (8, 4, 2), (6, 8, 0), (7, 2, 1)])
def test_grids_are_torchvisions(count: int, nrow: int, padding: int) -> None:
    images = torch.rand(count, 3, 5, 4)
    expected = their_grid(images, nrow=nrow, padding=padding)
    if count == 1:  # torchvision leaves one image without a frame
        expected = torch.nn.functional.pad(images[0], (padding,) * 4)
    assert torch.equal(make_grid(images, nrow, padding), expected)
