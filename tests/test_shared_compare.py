"""What the scripts that hold our functions against a release's share: the timing of whole steps."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shared_utils import UserError, distributed
from shared_utils.lab import compare


def test_steps_are_timed_in_a_process_group_of_one(capsys):
    network = nn.Linear(3, 1)
    seen: list[str | bool] = []
    update = compare.updater(network, fused=False)
    before = network.weight.detach().clone()

    def ours() -> None:
        seen.append("ours")
        update(network(torch.ones(2, 3)).sum())

    def theirs(half: bool) -> None:
        seen.append(half)
        assert dist.get_world_size() == 1

    compare.time_steps(ours, theirs, compare.CPU, images=2, repeats=3)
    assert not dist.is_initialized() and not torch.equal(before, network.weight)
    assert seen[:6] == ["ours", "ours", True, True, False, False] and seen[6:] == 4 * ["ours", True, False]
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("whole step, 2 images") and [row.split("  ")[1] for row in rows] == [
        "ours, bfloat16", "release, bfloat16 autocast", "release, float32",
    ]  # fmt: skip
    assert all("images/s" in row and "MiB" in row for row in rows)


def test_a_device_that_is_not_there_is_named_by_its_flag():
    with pytest.raises(UserError, match="--step gpu: no such device"):
        distributed.init("gpu", "--step")
