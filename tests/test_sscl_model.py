"""Networks, queue, momentum copy and weights of sscl."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared_utils import UserError, checkpoint
from sscl import arch
from sscl.calibration import Alignment, calibrate, log_similarity, sharpen
from sscl.losses import UNKNOWN, Memory, choose, contrast, masked_ce
from sscl.model import SsCL, deinterleave, interleave
from sscl.weights import initialise, renamed

C, D, K = 3, 8, 20


def build(splits: int = 1, m: float = 0.9, keep_probs: bool = True) -> SsCL:
    torch.manual_seed(0)
    encoder = arch.Encoder(arch.build("resnet10", 4, "cifar_pool"), C, D)
    return SsCL(encoder, Alignment(C), K, m, keep_probs, splits).train()


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "width", "stem", "features"),
    [
        ("resnet10", 4, "cifar_pool", 32), ("resnet18", 4, "cifar", 32), ("resnet50", 4, "imagenet", 128),
        ("wrn28", 4, "imagenet", 16),
    ],
)  # fmt: skip
def test_backbones(name: str, width: int, stem: str, features: int) -> None:
    encoder = arch.Encoder(arch.build(name, width, stem), C, D)
    logits, z = encoder(images(2))
    assert encoder.backbone.num_features == features and logits.shape == (2, C)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    keys = set(encoder.state_dict())
    assert {"backbone.conv1.weight", "fc.weight", "proj.0.weight", "proj.2.bias"} <= keys


def test_resnet50_has_torchvision_s_keys() -> None:
    from torchvision.models import resnet50

    ours, theirs = arch.build("resnet50").state_dict(), resnet50().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}


def test_interleaving() -> None:
    parts = [torch.arange(4), torch.arange(10, 18)]
    mixed = interleave(parts, 2)
    assert mixed.tolist() == [0, 1, 10, 11, 12, 13, 2, 3, 14, 15, 16, 17]
    assert all(torch.equal(a, b) for a, b in zip(deinterleave(mixed, [4, 8], 2), parts))


def memory(n: int, start: int, label: int) -> Memory:
    prob = torch.full((n, C), float(start))
    return Memory(torch.full((n,), label), torch.ones(n, dtype=torch.bool), prob, torch.arange(start, start + n))


def test_queue_is_first_in_first_out_with_everything_together() -> None:
    model, kept = build(), []
    for step in range(7):
        keys = torch.randn(6, D)
        entries = memory(6, 10 * step, step % C)
        model.enqueue(keys, entries, labelled=step % 2 == 1)
        kept += [(keys[i], step % C, 10.0 * step, 10 * step + i, step % 2 == 1) for i in range(6)]
    assert int(model.queue_ptr) == 42 % K
    for age, (key, label, prob, image, labelled) in enumerate(reversed(kept[-K:])):
        place = (42 - 1 - age) % K
        assert torch.equal(model.queue[:, place], key) and int(model.queue_label[place]) == label
        assert float(model.queue_prob[place, 0]) == prob and int(model.queue_index[place]) == image
        assert bool(model.queue_labelled[place]) == labelled and bool(model.queue_conf[place])


def test_a_queue_without_probabilities_and_one_that_is_too_small() -> None:
    model = build(keep_probs=False)
    model.enqueue(torch.randn(6, D), memory(6, 0, 1), labelled=False)
    assert model.queue_prob.shape == (K, 0) and model.queue_label[:6].tolist() == [1] * 6


class Reads(TorchDispatchMode):
    """Counts numbers that are read from the device: on a GPU each is a wait for all that was launched before."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ema", "window", "off"])
def test_what_the_method_adds_to_a_step_reads_nothing_from_the_device(kind: str) -> None:
    model, alignment = build(), Alignment(C, kind)
    p, keys, who = torch.full((6, C), 1 / C), torch.randn(6, D), memory(6, 0, 1)
    with Reads() as reads:
        model.update_key_encoder()
        log_q = log_similarity(keys, model.prototypes, 0.1)
        alignment.update(p, log_q)
        sharpen(calibrate(alignment(p), log_q, "product"), 0.5)
        contrast(keys, keys, model.queue, choose(who, model.memory, 2), 0.2)
        model.enqueue(keys, who, labelled=False)
    assert reads.count == 0
    with Reads() as reads:
        int(model.queue_ptr)
    assert reads.count == 1


@pytest.mark.parametrize("m", [0.0, 0.9, 1.0])
def test_momentum_copy(m: float) -> None:
    model = build(m=m)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn(p.shape))
    model.encoder_q(images(4))  # moves the query's statistics
    before = [copy.deepcopy(list(e.parameters())) for e in (model.encoder_k, model.encoder_q)]
    model.update_key_encoder()
    for own, query, new in zip(*before, model.encoder_k.parameters()):
        torch.testing.assert_close(new, m * own + (1 - m) * query)
        assert not new.requires_grad
    mean = "backbone.bn1.running_mean"
    assert torch.equal(model.encoder_k.state_dict()[mean], torch.zeros(4))
    model.update_key_encoder(statistics=True)
    assert torch.equal(model.encoder_k.state_dict()[mean], model.encoder_q.state_dict()[mean])


def test_keys_are_the_copy_s_and_come_back_in_order() -> None:
    model = build()
    model.encoder_k.eval()
    views = [images(6), images(4, 1)]
    keys = model.embed_keys(views, torch.Generator().manual_seed(3))
    for view, key in zip(views, keys):
        torch.testing.assert_close(key, model.encoder_k.embed(view), atol=1e-6, rtol=1e-5)
        assert not key.requires_grad


def step(model: SsCL, lambda_x: float, lambda_u: float, lambda_c: float) -> None:
    """A step's losses and gradients, with everything on."""
    x, y, u = images(4), torch.tensor([0, 1, 2, 0]), images(8, 1)
    model.queue_label[:] = torch.arange(K) % C
    model.queue_conf[:], model.queue_prob[:], model.queue_index[:] = True, 1 / C, torch.arange(100, 100 + K)
    model.encoder_k.requires_grad_()  # has no gradient although it might have one
    p, (keys,) = model.predict(u), model.embed_keys([u], torch.Generator().manual_seed(0))
    tilde = sharpen(calibrate(p, log_similarity(keys, model.prototypes, 0.1), "product"), 0.5)
    assert not p.requires_grad and not keys.requires_grad and not tilde.requires_grad
    who = Memory(tilde.argmax(1), torch.ones(8, dtype=torch.bool), tilde, torch.arange(8))
    (logits_x, _), (logits_s, v) = model([x, images(8, 2)])
    chosen = choose(who, model.memory, 2)
    assert bool(chosen.valid.all())
    loss_c = contrast(v, keys, model.queue, chosen, 0.2).mean()
    loss_x = torch.nn.functional.cross_entropy(logits_x, y)
    total = lambda_x * loss_x + lambda_u * masked_ce(logits_s, tilde, who.conf) + lambda_c * loss_c
    total.backward()


def gradients(model: SsCL, prefix: str) -> list[bool]:
    return [
        p.grad is not None and bool(p.grad.any()) for n, p in model.encoder_q.named_parameters() if n.startswith(prefix)
    ]


def test_what_gets_a_gradient() -> None:
    for weights, heads in (((1, 1, 0), "fc"), ((0, 0, 1), "proj"), ((0, 1, 0), "fc")):
        model = build(splits=2)
        step(model, *weights)
        assert all(gradients(model, "backbone.conv1")) and all(gradients(model, f"{heads}."))
        assert not any(gradients(model, "proj." if heads == "fc" else "fc."))
        model.update_key_encoder()
        fresh = torch.randn(4, D, requires_grad=True)
        model.enqueue(fresh * 2, memory(4, 0, 1), labelled=False)
        assert not model.queue.requires_grad and all(p.is_leaf for p in model.encoder_k.parameters())
        assert all(p.grad is None for p in model.encoder_k.parameters())


def test_weights_of_moco_and_torchvision_are_taken(tmp_path) -> None:
    source = arch.Encoder(arch.build("resnet10", 4, "cifar_pool"), C, D)
    backbone = {k.removeprefix("backbone."): v for k, v in source.state_dict().items() if k.startswith("backbone.")}
    head = {k.replace("proj", "fc"): v for k, v in source.state_dict().items() if k.startswith("proj.")}
    moco = {f"module.encoder_q.{k}": v for k, v in {**backbone, **head}.items()} | {"module.queue": torch.zeros(D, 4)}
    torchvision = {**backbone, "fc.weight": torch.zeros(7, 32), "fc.bias": torch.zeros(7)}
    own = {f"encoder_q.{k}": v for k, v in source.state_dict().items()}
    for name, state in (("moco", {"state_dict": moco}), ("tv", torchvision), ("own", {"state_dict": own})):
        checkpoint.save(tmp_path / f"{name}.pth", state)
        fresh = arch.Encoder(arch.build("resnet10", 4, "cifar_pool"), C, D)
        before = copy.deepcopy(fresh.state_dict())
        initialise(fresh, str(tmp_path / f"{name}.pth"))
        after = fresh.state_dict()
        theirs = source.state_dict()
        assert torch.equal(after["backbone.layer4.0.conv2.weight"], theirs["backbone.layer4.0.conv2.weight"])
        assert torch.equal(after["proj.2.weight"], theirs["proj.2.weight"]) == (name != "tv")
        assert torch.equal(after["fc.weight"], before["fc.weight"])  # the class head is new
    assert set(renamed({"fc.0.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)})) == {
        "proj.0.weight", "backbone.conv1.weight",
    }  # fmt: skip
    with pytest.raises(UserError, match="--init .*tv.pth: the weights do not fit Encoder: .* missing"):
        initialise(arch.Encoder(arch.build("resnet18", 4, "cifar_pool"), C, D), str(tmp_path / "tv.pth"))


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="unknown --arch vgg"):
        arch.build("vgg")
    with pytest.raises(UserError, match="unknown --stem none"):
        arch.build("resnet10", 4, "none")
    assert UNKNOWN == -1
