"""The method of sage: networks, loss, gradient paths, LARS, schedules, augmentation, loading of evaluators."""

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from sage import arch
from sage.builder import Evaluator, SaGe, calibrate, evaluator_weights, load_evaluator
from sage.data import Solarize, denormalise, linear_train, normalise, pipeline, plain
from sage.lars import LARS, parameter_groups
from sage.losses import LEVELS, TERMS, WEIGHTS, distance, latent_loss
from sage.schedule import learning_rate, target_momentum
from shared_utils import UserError, checkpoint
from shared_utils.data import sample_rng

SIZE = 32


def make_evaluator(seed: int = 7) -> Evaluator:
    torch.manual_seed(seed)
    net = arch.build("resnet10", 4, "cifar_pool")
    evaluator = Evaluator(net, arch.Neck(net.num_features, 16, 8))
    calibrate(evaluator, [torch.randn(16, 3, SIZE, SIZE) for _ in range(2)])
    return evaluator


def make(bn: str = "frozen", weights: dict[str, float] | None = None) -> Any:
    """A small SaGe, with the release's weights unless others are given."""
    torch.manual_seed(0)
    model = SaGe(arch.build("resnet10", 4, "cifar_pool"), 16, 8)
    decoder = arch.decoder_for("resnet10", 4, "cifar_pool", SIZE)
    evaluator = make_evaluator()
    return model.add_generation(decoder, evaluator, {**WEIGHTS, **(weights or {})}, bn).train()


def views(seed: int = 1, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.rand(count, 3, SIZE, SIZE) * 2 - 1, torch.rand(count, 3, SIZE, SIZE) * 2 - 1


def byol() -> Any:
    torch.manual_seed(0)
    return SaGe(arch.build("resnet10", 4, "cifar_pool"), 16, 8).train()


# --- networks --------------------------------------------------------------------------------------------------------


def test_decoder_of_the_paper():
    decoder = arch.decoder_for("resnet50", 64, "imagenet", 224)
    assert sum(p.numel() for p in decoder.parameters()) == 62_688_547
    seen: dict[str, torch.Tensor] = {}
    decoder.conv7.register_forward_hook(lambda _, __, out: seen.update(bottleneck=out))
    decoder.stem.register_forward_hook(lambda _, __, out: seen.update(stem=out))
    with torch.no_grad():
        out = decoder(5 * torch.randn(2, 2048, 7, 7))
    assert out.shape == (2, 3, 224, 224) and out.abs().max() <= 1 and out.std() > 0.1
    assert seen["bottleneck"].shape == (2, 512, 1, 1) and seen["bottleneck"].min() < 0  # no activation
    assert seen["stem"].shape == (2, 256, 7, 7)
    names = {"conv7.weight", "stem.0.bias", "stem.1.weight", "layer4.conv1.weight", "layer0.bn1.bias", "final.weight"}
    assert names <= set(decoder.state_dict()) and decoder.layer0.conv1.bias is None


@pytest.mark.parametrize(
    ("stem", "size", "side"),
    [("imagenet", 64, 2), ("imagenet", 96, 3), ("imagenet", 100, 4), ("cifar_pool", 32, 2), ("cifar", 32, 4)],
)
def test_decoder_meets_any_image_size(stem, size, side):
    net = arch.build("resnet10", 4, stem)
    decoder = arch.decoder_for("resnet10", 4, stem, size)
    e = net(torch.randn(2, 3, size, size))[-1]
    assert e.shape[-1] == side and decoder.conv7.kernel_size == decoder.stem[0].kernel_size == (side, side)
    assert decoder.conv7(e).shape[2:] == (1, 1) and decoder(e).shape == (2, 3, size, size)
    with pytest.raises(UserError, match="halves the side 5 times, give 32 or more"):
        arch.decoder_for("resnet10", 4, "imagenet", 31)


def test_evaluator_levels():
    backbone = arch.build("resnet50")
    evaluator = Evaluator(backbone, arch.Neck(2048, 16, 256)).eval()
    levels = list(LEVELS.values())
    for size in (224, 64):
        with torch.no_grad():
            shapes = [tuple(f.shape[1:]) for f in evaluator(torch.randn(1, 3, size, size), levels)]
        assert shapes == [
            (512, size // 8, size // 8),
            (1024, size // 16, size // 16),
            (2048, size // 32, size // 32),
            (256,),
        ]
    assert set(backbone.state_dict()) | {"fc.weight", "fc.bias"} == set(torchvision.models.resnet50().state_dict())


def test_initialisation_of_the_release():
    torch.manual_seed(0)
    model = SaGe(arch.build("resnet18"), 512, 128).requires_grad_(False)
    conv = model.online_net[0].layer3[0].conv2.weight
    assert conv.std() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))  # the last one too
    assert model.online_net[1].fc0.weight.std() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    assert model.predictor.fc0.weight.std() == pytest.approx(0.01, rel=0.02)
    assert all(torch.equal(a, b) for a, b in zip(model.online_net.parameters(), model.target_net.parameters()))
    assert not any(p.requires_grad for p in byol().target_net.parameters())


# --- loss ------------------------------------------------------------------------------------------------------------


def test_perfect_recovery_costs_nothing():
    for bn in ("frozen", "batch"):
        model = make(bn)
        x = list(views())
        terms = model.generation(x, [v.clone() for v in x])
        assert set(terms) == set(TERMS)
        assert all(float(value.detach()) == 0 for value in terms.values())
        assert all(float(v.detach()) > 0 for v in model.generation(x, [v.flip(0) for v in x]).values())


def test_the_total_is_what_the_spec_says():
    model, (x1, x2) = make(), views()
    reference = copy.deepcopy(model)
    losses, z = model(x1, x2)
    online, target, predictor = reference.online_net, reference.target_net, reference.predictor
    e = [online[0](x) for x in (x1, x2)]
    zs = [online[1](v[3]) for v in e]
    t = [target[1](target[0](x)[3]) for x in (x1, x2)]
    p = [predictor(v) for v in zs]

    def cos(a, b):
        return (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)

    expected = (2 - 2 * cos(p[0], t[1])).mean() + (2 - 2 * cos(p[1], t[0])).mean()
    torch.testing.assert_close(losses["loss1"], expected)
    torch.testing.assert_close(z, zs[0])
    h = reference.r_function
    for x, maps in ((x1, e[0]), (x2, e[1])):
        made = reference.decoder(maps[3])
        real, fake = h[0](x), h[0](made)
        expected = expected + (x - made).pow(2).mean() / 10
        expected = expected + (h[1](real[3]) - h[1](fake[3])).pow(2).mean() / 10
        for stage in (1, 2, 3):
            expected = expected + (real[stage] - fake[stage]).pow(2).mean() / 30
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), expected)


def test_without_weights_it_is_byol_to_the_bit():
    x1, x2 = views()
    plain_byol = byol()
    without = make(weights=dict.fromkeys(WEIGHTS, 0.0))
    assert without.decoder is None and without.r_function is None
    grads = []
    for model in (plain_byol, without):
        losses, _ = model(x1, x2)
        assert list(losses) == ["loss1"]
        losses["loss1"].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_range_and_symmetry_of_the_latent_loss():
    q, z = torch.randn(2, 50, 8)
    assert 0 <= float(latent_loss(q, z)) <= 4
    assert float(latent_loss(q, 3 * q)) == pytest.approx(0, abs=1e-6)
    assert float(latent_loss(q, -q)) == pytest.approx(4, abs=1e-6)
    model, (x1, x2) = byol().eval(), views()
    torch.testing.assert_close(model(x1, x2)[0]["loss1"], model(x2, x1)[0]["loss1"])
    assert latent_loss(q.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_distances_are_means_in_float32():
    u, v = torch.randn(2, 2, 3, 4, 5)
    expected = (u[0] - v[0]).square().mean() + (u[1] - v[1]).square().mean()
    torch.testing.assert_close(distance(list(u), list(v)), expected)
    huge = torch.full((2, 8), 300.0, dtype=torch.float16)  # the square overflows half precision
    assert float(distance([huge], [-huge])) == 360_000


def test_targets_of_the_ablation():
    model, (x1, x2) = make(), views()
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    own = one(x1, x2)[0]
    crossed = other(x1, x2, [x2, x1])[0]
    made = [copy.deepcopy(model).decoder(copy.deepcopy(model).online_net[0](x)[3]) for x in (x1, x2)]
    made = [m.detach() for m in made]
    torch.testing.assert_close(own["loss1"], crossed["loss1"])
    assert float(crossed["loss_mse"].detach()) != float(own["loss_mse"].detach())
    assert float(distance([x2, x1], made).detach()) / 10 == pytest.approx(float(crossed["loss_mse"].detach()), rel=0.2)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, float]:
    """Largest gradient of every top-level part, None counts as 0."""
    parts: dict[str, float] = {}
    for name, p in model.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith(("online_net", "target_net")) else name.split(".")[0]
        parts[part] = max(parts.get(part, 0.0), 0.0 if p.grad is None else float(p.grad.abs().max()))
    return parts


@pytest.mark.parametrize("bn", ["frozen", "batch"])
@pytest.mark.parametrize("term", list(TERMS))
def test_gradient_map_of_each_term(term, bn):
    model, (x1, x2) = make(bn), views()
    model(x1, x2)[0][term].backward()
    got = gradients(model)
    assert got["online_net.0"] > 0 and got["decoder"] > 0
    assert {k: v for k, v in got.items() if v} == {k: got[k] for k in ("online_net.0", "decoder")}
    assert all(p.grad is None for p in [*model.r_function.parameters(), *model.target_net.parameters()])


def test_gradient_map_of_the_latent_loss():
    model, (x1, x2) = make(), views()
    model(x1, x2)[0]["loss1"].backward()
    assert {k for k, v in gradients(model).items() if v} == {"online_net.0", "online_net.1", "head"}


def test_the_evaluator_is_differentiable_in_what_was_recovered_alone():  # no graph on real views
    model, x = make(weights={"w_pix": 0.0}), list(views())
    made = [v.flip(0).requires_grad_() for v in x]
    seen: list[tuple[bool, bool]] = []
    features = model.features

    def watched(images):
        out = features(images)
        seen.append((torch.is_grad_enabled(), any(f.requires_grad for view in out for f in view)))
        return out

    model.features = watched  # type: ignore[method-assign]
    saved: list[int] = []

    def kept(tensor):
        saved.append(len(seen))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        terms = model.generation(x, made)
    assert seen == [(False, False), (True, True)]
    assert saved and min(saved) >= 1  # nothing was kept for a backward pass while the real views went through
    for term in LEVELS:
        (grad,) = torch.autograd.grad(terms[term], [made[0]], retain_graph=True)
        assert grad.abs().max() > 0, term


def test_pixels_alone_never_call_the_evaluator():
    torch.manual_seed(0)
    model = SaGe(arch.build("resnet10", 4, "cifar_pool"), 16, 8)
    model.add_generation(arch.decoder_for("resnet10", 4, "cifar_pool", SIZE), None, {"w_pix": 0.1})
    assert set(model(*views())[0]) == {"loss1", "loss_mse"} and model.r_function is None
    with pytest.raises(ValueError, match="evaluator"):
        SaGe(arch.build("resnet10", 4), 16, 8).add_generation(None, None, WEIGHTS)


def test_frozen_or_drifting_evaluator():
    for bn in ("frozen", "batch"):
        model = make(bn).eval().train()  # train() would switch it on again
        assert model.r_function.training == (bn == "batch")
        before = {k: v.clone() for k, v in model.r_function.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(2):
            loss = torch.stack(list(model(*views(step))[0].values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.momentum_update(0.9)
        changed = {k for k, v in model.r_function.state_dict().items() if not torch.equal(v, before[k])}
        assert bool(changed) == (bn == "batch")
        assert all("running" in k or "num_batches" in k for k in changed)


# --- target network --------------------------------------------------------------------------------------------------


def test_momentum_of_the_target():
    curve = [target_momentum(0.99, k, 100) for k in range(101)]
    assert curve[0] == pytest.approx(0.99) and curve[100] == 1 and curve == sorted(curve)
    model = byol()
    with torch.no_grad():
        for p in model.online_net.parameters():
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(model.target_net)
    buffers = [b.clone() for b in model.target_net.buffers()]
    model.momentum_update(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.target_net.parameters()))
    model.momentum_update(0.75)
    for old, new, online in zip(before.parameters(), model.target_net.parameters(), model.online_net.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
    model.momentum_update(0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.online_net.parameters(), model.target_net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.target_net.buffers()))


def test_views_have_batch_statistics_of_their_own():
    model, (x1, x2) = byol(), views()
    twin = copy.deepcopy(model)
    model(x1, x2)
    for x in (x1, x2):
        twin.online_net[1](twin.online_net[0](x)[3])
    assert torch.equal(model.online_net[0].bn1.running_mean, twin.online_net[0].bn1.running_mean)
    assert int(model.online_net[0].bn1.num_batches_tracked) == int(model.target_net[0].bn1.num_batches_tracked) == 2


# --- optimisers ------------------------------------------------------------------------------------------------------


def test_lars_by_hand():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    b = nn.Parameter(torch.tensor([1.0]))
    zero = nn.Parameter(torch.tensor([1.0, 1.0]))
    groups = [{"params": [w, zero], "weight_decay": 0.1}, {"params": [b], "lars_exclude": True}]
    optimizer = LARS(groups, lr=2.0, momentum=0.9, eta=0.01)
    w.grad, b.grad, zero.grad = torch.tensor([0.6, 0.8]), torch.tensor([0.5]), torch.zeros(2)
    optimizer.step()
    # |w| = 5, |g| = 1: local = .01 * 5 / (1 + .1 * 5); d = (g + .1 w) local lr
    local = 0.01 * 5 / 1.5
    buffer = (np.array([0.6, 0.8]) + 0.1 * np.array([3, 4])) * local * 2
    now = np.array([3, 4]) - buffer
    np.testing.assert_allclose(w.detach().numpy(), now, rtol=1e-6)
    np.testing.assert_allclose(b.detach().numpy(), [1 - 2 * 0.5], rtol=1e-6)  # plain momentum
    # zero gradient: local = eta / wd, the decay alone
    np.testing.assert_allclose(zero.detach().numpy(), 1 - 0.1 * (0.01 / 0.1) * 2, rtol=1e-6)
    for group in optimizer.param_groups:  # a new rate acts on new gradients only: it is inside the buffer
        group["lr"] = 1.0
    optimizer.step()
    length = np.linalg.norm(now)
    d = (np.array([0.6, 0.8]) + 0.1 * now) * (0.01 * length / (1 + 0.1 * length))
    np.testing.assert_allclose(w.detach().numpy(), now - (0.9 * buffer + d), rtol=1e-6)
    np.testing.assert_allclose(b.detach().numpy(), [1 - 1.0 - (0.9 * 1.0 + 0.5)], rtol=1e-6)


def test_lars_guards_a_zero_denominator():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w], lr=1.0)
    w.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(w.detach(), torch.ones(2, 2))


def test_excluded_parameters_equal_torch_s_momentum():
    torch.manual_seed(0)
    start = torch.randn(5)
    a, b = (nn.Parameter(start.clone()) for _ in range(2))
    ours = LARS([{"params": [a], "lars_exclude": True}], lr=0.1)
    theirs = torch.optim.SGD([b], 0.1, 0.9)
    for _ in range(4):
        a.grad = torch.randn(5)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b)


def test_groups_of_parameters():
    model = byol()
    trained = nn.ModuleDict({"online_net": model.online_net, "head": model.head})
    names = {id(p): name for name, p in trained.named_parameters()}
    default, release = parameter_groups(trained, 1e-6), parameter_groups(trained, 1e-6, release=True)
    for groups in (default, release):
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(names) and len(ids) == len(set(ids))
        assert [g["weight_decay"] for g in groups] == [1e-6, 0.0] and [g["lars_exclude"] for g in groups] == [
            False,
            True,
        ]
    assert all(p.dim() > 1 for p in default[0]["params"])
    scaled = {names[id(p)] for p in release[0]["params"]} - {names[id(p)] for p in default[0]["params"]}
    assert scaled and all("downsample.1.weight" in name for name in scaled)  # the release's pattern misses these


def test_warm_up_and_cosine():
    per_epoch, epochs = 20, 100
    lr = [learning_rate(4.8, k, per_epoch, epochs, 10) for k in range(per_epoch * epochs)]
    assert lr[0] == pytest.approx(4.8e-4)
    for epoch in (10, 50, 99):
        assert lr[epoch * per_epoch] == pytest.approx(4.8 * (1 + math.cos(math.pi * epoch / epochs)) / 2)
    assert len(set(lr[50 * per_epoch : 51 * per_epoch])) == 1  # a whole epoch's
    half = 5 * per_epoch  # on the value of the current epoch
    assert lr[half] == pytest.approx(4.8 * (1 + math.cos(math.pi * 5 / 100)) / 2 * (1 - 0.5 * (1 - 1e-4)))
    decoder = [learning_rate(0.048, k, per_epoch, epochs, 10, policy="const") for k in range(per_epoch * epochs)]
    assert decoder[0] == pytest.approx(4.8e-6) and set(decoder[200:]) == {0.048}


# --- evaluators from files -------------------------------------------------------------------------------------------


def moco_file(path, evaluator: Evaluator) -> dict[str, torch.Tensor]:
    """A file with MoCo's names for these weights."""
    head = {"1.fc0.": "fc.fc1.", "1.bn0.": "fc.bn1.", "1.fc1.": "fc.fc2."}
    state = {}
    for key, value in evaluator.state_dict().items():
        new = next((head[h] + key.removeprefix(h) for h in head if key.startswith(h)), key.removeprefix("0."))
        state[f"module.encoder_q.{new}"] = value
    state |= {"module.encoder_q.predictor.fc1.weight": torch.ones(2), "module.encoder_k.conv1.weight": torch.ones(1)}
    checkpoint.save(path, {"state_dict": state})
    return state


def test_both_namings_fill_the_evaluator_exactly(tmp_path):
    source = make_evaluator(3)
    moco_file(tmp_path / "moco.pth", source)
    state = {f"online_net.{k}": v for k, v in source.state_dict().items()}
    target = {f"target_net.{k}": v + 1 for k, v in source.state_dict().items()}  # the release's loader takes these
    checkpoint.save(
        tmp_path / "byol.pth", {"state_dict": {**state, **target, "head.predictor.fc0.bias": torch.ones(1)}}
    )
    for name in ("moco", "byol"):
        evaluator = make_evaluator(4)
        assert "loaded" in load_evaluator(evaluator, str(tmp_path / f"{name}.pth"))
        for key, value in source.state_dict().items():
            assert torch.equal(evaluator.state_dict()[key], value), key
        assert not any(p.requires_grad for p in evaluator.parameters())


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    state = moco_file(tmp_path / "good.pth", make_evaluator(3))
    evaluator = make_evaluator(4)
    before = {k: v.clone() for k, v in evaluator.state_dict().items()}
    for lost in ("module.encoder_q.layer3.0.conv1.weight", "module.encoder_q.fc.fc2.bias"):
        checkpoint.save(tmp_path / "bad.pth", {"state_dict": {k: v for k, v in state.items() if k != lost}})
        with pytest.raises(UserError, match=r"bad.pth: the weights do not fit Evaluator: 1 missing"):
            load_evaluator(evaluator, str(tmp_path / "bad.pth"))
    extra = {**state, "module.encoder_q.layer5.weight": torch.ones(1)}
    checkpoint.save(tmp_path / "bad.pth", {"state_dict": extra})
    with pytest.raises(UserError, match="1 unexpected"):
        load_evaluator(evaluator, str(tmp_path / "bad.pth"))
    checkpoint.save(tmp_path / "bad.pth", {"state_dict": {"conv1.weight": torch.ones(1)}})
    with pytest.raises(UserError, match=r"no projector of BYOL's form.* --w_f1 0"):
        load_evaluator(evaluator, str(tmp_path / "bad.pth"))
    checkpoint.save(tmp_path / "bad.pth", {"weights": 3})
    with pytest.raises(UserError, match="no state_dict found"):
        evaluator_weights(str(tmp_path / "bad.pth"))
    assert all(torch.equal(v, before[k]) for k, v in evaluator.state_dict().items())


def test_evaluator_with_imagenet_s_input():
    evaluator, x = make_evaluator(), views()[0]
    half = evaluator(x, [2])[0]
    evaluator.norm = "imagenet"
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = evaluator[0]((((x + 1) / 2) - mean.view(3, 1, 1)) / std.view(3, 1, 1))[1]
    torch.testing.assert_close(evaluator(x, [2])[0], expected)
    assert not torch.allclose(half, expected)


def test_a_random_evaluator_has_statistics_of_the_data():
    evaluator = make_evaluator()
    x = 3 + torch.randn(64, 3, SIZE, SIZE)
    momentum = evaluator[0].bn1.momentum
    calibrate(evaluator, [x[:32], x[32:]])
    out = evaluator[0].conv1(x)
    torch.testing.assert_close(evaluator[0].bn1.running_mean, out.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert evaluator[0].bn1.momentum == momentum and not evaluator.training


# --- data ------------------------------------------------------------------------------------------------------------


def test_blur_and_solarisation_of_the_two_views(monkeypatch):
    counts: dict[str, int] = {}
    from shared_utils.augment import GaussianBlur

    blur, solarize = GaussianBlur.__call__, Solarize.__call__
    monkeypatch.setattr(GaussianBlur, "__call__", lambda s, x: counts.update(b=counts["b"] + 1) or blur(s, x))
    monkeypatch.setattr(Solarize, "__call__", lambda s, x: counts.update(s=counts["s"] + 1) or solarize(s, x))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    for pair, (blurred, solarized) in (((1.0, 0.0), (2000, 0)), ((0.1, 0.2), (200, 400))):
        counts.update(b=0, s=0)
        view = pipeline(8, *pair)
        with sample_rng(0):
            for _ in range(2000):
                out = view(image)
        assert out.shape == (3, 8, 8) and out.dtype == torch.uint8
        assert counts["b"] == pytest.approx(blurred, abs=45) and counts["s"] == pytest.approx(solarized, abs=60)
        assert counts["b"] == 2000 or blurred == 200
        assert solarized or counts["s"] == 0


def test_solarisation_and_ranges():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    out = np.asarray(Solarize()(ramp))[..., 0].ravel()
    expected = np.arange(256)
    expected[128:] = 255 - expected[128:]
    assert (out == expected).all()
    x = normalise(torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1))
    assert x.flatten().tolist() == [-1, 1] and denormalise(x).flatten().tolist() == [0, 1]
    white = Image.new("RGB", (40, 40), "white")
    assert plain(32)(white).unique().tolist() == [1.0]  # 0.5 / 0.5 in evaluation too
    random.seed(0)
    assert linear_train(32)(Image.new("RGB", (40, 40))).unique().tolist() == [-1.0]


# --- it learns -------------------------------------------------------------------------------------------------------


def test_sixteen_images_are_learned_by_heart():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (16, 3, 3, 3)).astype(np.float32))
    x = F.interpolate(coarse, size=16, mode="bilinear")
    net, decoder = arch.build("resnet10", 8, "cifar_pool"), arch.decoder_for("resnet10", 8, "cifar_pool", 16)
    optimizer = torch.optim.Adam([*net.parameters(), *decoder.parameters()], 3e-3)
    blank = float((x - x.mean(0)).square().mean())
    for _ in range(120):
        loss = F.mse_loss(decoder(net(x)[3]), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < blank / 2
