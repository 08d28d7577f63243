"""Two gloo processes against one: batch norm, gathers, shuffle; and the split batch norm."""

import inspect
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from shared_utils import UserError, distributed
from shared_utils.distributed import SplitBatchNorm, convert_norm

ROOT = Path(__file__).resolve().parents[1]

TWO = """
import torch
from torch import nn
from shared_utils import distributed as d
torch.set_num_threads(1)
d.init("cpu")
r = d.rank()
assert d.world() == 2

# synchronised batch norm: output, gradients and running statistics of one process on the whole batch
g = torch.Generator().manual_seed(0)
x, w = torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64).float(), torch.randn(6, 3, 4, 4, generator=g)
whole, mine = nn.BatchNorm2d(3), d.convert_norm(nn.Sequential(nn.BatchNorm2d(3)), "sync")
for p in (whole, mine[0]):
    with torch.no_grad():
        p.weight.copy_(torch.tensor([1.0, 2.0, -1.0])), p.bias.copy_(torch.tensor([0.1, 0.0, 3.0]))
a, b = x.clone().requires_grad_(), x[3 * r : 3 * r + 3].clone().requires_grad_()
ya, yb = whole(a), mine(b)
(ya * w).sum().backward(), (yb * w[3 * r : 3 * r + 3]).sum().backward()
close = dict(rtol=1e-4, atol=1e-5)
torch.testing.assert_close(yb, ya[3 * r : 3 * r + 3], **close)
torch.testing.assert_close(b.grad, a.grad[3 * r : 3 * r + 3], **close)
torch.testing.assert_close(d.all_sum(mine[0].weight.grad), whole.weight.grad, **close)
torch.testing.assert_close(mine[0].running_mean, whole.running_mean, **close)
torch.testing.assert_close(mine[0].running_var, whole.running_var, **close)
assert int(mine[0].num_batches_tracked) == 1
mine.eval(), whole.eval()
torch.testing.assert_close(mine(b), whole(a)[3 * r : 3 * r + 3], **close)

# gathers
assert d.gather(torch.tensor([r, 10 + r])).tolist() == [0, 10, 1, 11]
z = torch.tensor([1.0 + r], requires_grad=True)
(d.gather_with_grad(z) * torch.tensor([2.0, 3.0])).sum().backward()
assert z.grad.item() == [4.0, 6.0][r]  # the sum of both processes' gradients

# shuffle and its inverse
x = torch.arange(8.0)[4 * r : 4 * r + 4]
shuffled, order = d.shuffle(x, torch.Generator().manual_seed(1))
assert sorted(d.gather(shuffled).tolist()) == list(range(8)) and not torch.equal(shuffled, x)
assert torch.equal(d.unshuffle(shuffled * 10, order), x * 10)

# what all must have found alike
from shared_utils import UserError
assert d.agreed(True, "alike") is True and d.agreed(False, "alike") is False
try:
    d.agreed(r == 0, "give a folder that all nodes share")
    raise SystemExit("a disagreement passed")
except UserError as error:
    assert str(error) == "give a folder that all nodes share"

# wrapped: no warning, buffers of process 0 at the start in their own layout, each process's own after a step; the
# gradient is the mean of both
import warnings
torch.manual_seed(r)
net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
net.register_buffer("queue", torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
net[1](torch.randn(4, 4, 2, 2) + r)
first = [d.gather(b.flatten()[None]) for b in net.buffers()]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    wrapped = d.wrap(net)
assert isinstance(wrapped, nn.parallel.DistributedDataParallel) and wrapped.module is net
for was, b in zip(first, net.buffers()):
    torch.testing.assert_close(b.flatten(), was[0], rtol=0, atol=0)
assert not torch.equal(first[0][0], first[0][1]) and net.queue.is_contiguous(memory_format=torch.channels_last)
x = torch.randn(2, 3, 2, 2) * (1 + r)
for _ in range(2):
    wrapped(x).square().mul(torch.arange(4.0).view(4, 1, 1)).mean().backward()
grads = d.gather(net[0].weight.grad[None])
means = d.gather(net[1].running_mean[None])
assert torch.equal(grads[0], grads[1]) and grads[0].abs().sum() > 0 and not torch.equal(means[0], means[1])

# a kept last batch: 7 = 4 + (2, 1) and 5 = 4 + (1, 0) samples; gradients and loss are those of one process
from shared_utils.data import EpochSampler
x, y = torch.randn(7, 3, generator=torch.Generator().manual_seed(5)), torch.arange(7) % 2
for size, last in ((7, (2, 1)), (5, (1, 1))):
    mine, lone = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for p in (*mine.parameters(), *lone.parameters()):
            p.fill_(0.5)
    mine = d.wrap(mine)
    sampler = EpochSampler(size, 2, 0, r, 2, least=0)
    order = [i for _, i in sum(EpochSampler(size, 1, 0), [])]
    assert len(sampler) == 2
    for step, batch in enumerate(sampler):
        assert len(batch) == (2 if step == 0 else last[r])
        rows = [i for _, i in batch]
        loss = nn.functional.cross_entropy(mine(x[rows]), y[rows]) * sampler.weight(step)
        loss.backward()
        rows = order[4 * step : 4 * step + 4]
        whole = nn.functional.cross_entropy(lone(x[rows]), y[rows])
        whole.backward()
        torch.testing.assert_close(d.all_sum(loss) / 2, whole.detach())
    for a, b in zip(mine.parameters(), lone.parameters()):
        torch.testing.assert_close(a.grad, b.grad)

# features of five images: three and two of them, in memory and in a file
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from torchvision.transforms.functional import to_tensor
from shared_utils.data import ImageList
from shared_utils.neighbours import features
folder = Path(sys.argv[1])
files = [folder / f"{i}.png" for i in range(5)]
if r == 0:
    for i, file in enumerate(files):
        Image.fromarray(np.full((2, 2, 3), 40 * i + 9, np.uint8) * np.array([1, 1, i % 2], np.uint8)).save(file)
d.barrier()
images = ImageList([(file, 0) for file in files], ["one"], to_tensor)
expected = torch.nn.functional.normalize(torch.stack([images[i][0].flatten() for i in range(5)]), dim=1)
for out in (None, folder / "feats.npy"):
    torch.testing.assert_close(features(lambda x: x.flatten(1), images, torch.device("cpu"), 2, out=out), expected)
print(f"fine{r}", flush=True)
"""


def test_two_processes(tmp_path, python):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fine0" in done.stdout and "fine1" in done.stdout


@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_the_flag_is_the_one_that_this_torch_knows(name, monkeypatch):
    class Wrapper:
        def __init__(self, module, **kwargs):
            pass

    known = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    both = inspect.Parameter("broadcast_buffers", inspect.Parameter.KEYWORD_ONLY)
    Wrapper.__signature__ = inspect.Signature([both, known] if name != "broadcast_buffers" else [both])  # type: ignore[attr-defined]
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapper)
    assert distributed.buffers_apart() == {name: False}


def test_split_batch_norm_is_batch_norm_on_each_share():
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    split, plain = SplitBatchNorm(3, 4), [nn.BatchNorm2d(3) for _ in range(4)]
    expected = torch.cat([bn(part) for bn, part in zip(plain, x.chunk(4), strict=True)])
    torch.testing.assert_close(split(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.running_var, torch.stack([bn.state_dict()["running_var"] for bn in plain]).mean(0))
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4"):
        split(x[:6])
    split.eval()
    assert split(x[:6]).shape == (6, 3, 4, 4)


def test_passes_update_the_running_statistics_one_after_another():
    x = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(2)) + 1
    split, plain = SplitBatchNorm(3, 1, passes=3), nn.BatchNorm2d(3)
    expected = torch.cat([plain(part) for part in x.chunk(3)])
    torch.testing.assert_close(split(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.state_dict(), plain.state_dict())
    both = SplitBatchNorm(3, 2, passes=3)  # two splits a pass: the mean of the splits, then the next pass
    parts = [[nn.BatchNorm2d(3, momentum=1.0) for _ in range(2)] for _ in range(3)]
    mean = torch.zeros(3)
    for bns, view in zip(parts, x.chunk(3), strict=True):
        for bn, part in zip(bns, view.chunk(2), strict=True):
            bn(part)
        mean = 0.9 * mean + 0.1 * torch.stack([bn.state_dict()["running_mean"] for bn in bns]).mean(0)
    both(x)
    torch.testing.assert_close(both.state_dict()["running_mean"], mean)


def test_features_without_pixels_are_split_too_and_the_memory_format_stays():
    head = convert_norm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "split", 2)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    plain, hidden = nn.BatchNorm1d(3), head[0](x)
    expected = torch.cat([plain(part) for part in hidden.chunk(2)])
    torch.testing.assert_close(head(x), expected)
    assert head.eval()(x).shape == (8, 3)
    maps = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    assert SplitBatchNorm(3, 2)(maps).is_contiguous(memory_format=torch.channels_last)


def test_clips_are_split_too():
    net = convert_norm(nn.Sequential(nn.BatchNorm3d(3)), "split", 2)
    x = torch.randn(4, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    plain = nn.BatchNorm3d(3)
    torch.testing.assert_close(net(x), torch.cat([plain(part) for part in x.chunk(2)]))
    assert not torch.allclose(net(x), nn.BatchNorm3d(3)(x), atol=1e-3)


def test_convert_norm_keeps_keys_and_values():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)))
    before = net.state_dict()
    for kind, cls in (("sync", distributed.SyncBatchNorm), ("local", nn.BatchNorm2d)):
        new = convert_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3))), kind)
        assert new.state_dict().keys() == before.keys() and type(new[1][0]) is cls and new[1][0].eps == 1e-3


@pytest.mark.parametrize("kind", ["sync", "split"])
def test_convert_norm_keeps_what_is_frozen(kind):
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4).requires_grad_(False))
    assert [p.requires_grad for p in convert_norm(net, kind).parameters()] == [True, True, False, False]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda"])
def test_a_device_that_is_not_there_is_one_line(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=f"--device {device}: "):
        distributed.init(device)


def test_one_process_is_a_passthrough():
    x = torch.ones(3, requires_grad=True)
    assert distributed.gather(x) is x and distributed.gather_with_grad(x) is x and distributed.all_sum(x) is x
    shuffled, order = distributed.shuffle(x.detach() * torch.arange(3), torch.Generator().manual_seed(0))
    assert torch.equal(distributed.unshuffle(shuffled, order), torch.arange(3.0))
    net = nn.Linear(2, 2)
    assert distributed.wrap(net) is net
