"""The model of flat: what every arm starts from, who learns from which loss, batch norm of pairs, recipes."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from flat import aet, data
from flat.backbone import build
from flat.methods.baselinetrain import BaselineTrain, make_head
from flat.methods.pair import PairModel
from flat.options import build_model, build_optimizer, default_epochs, get_parser, learning_rate, resolve

SMALL = "--dataset folder --image_size 16 --model Conv4 --width 4 --method cosine --num_classes 4"


def flags(text: str) -> argparse.Namespace:
    args = get_parser().parse_args(text.split())
    resolve(args)
    return args


def test_the_same_start_in_every_arm() -> None:
    def start(text: str) -> dict[str, torch.Tensor]:
        args = flags(f"{SMALL} {text}")
        torch.manual_seed(3)
        return build_model(args).state_dict()

    plain = start("--aet none")
    for arm in ("--aet aet", "--aet avt", "--decoder block", "--bn split"):
        other = start(arm)
        assert len(other) > len(plain) and all(torch.equal(other[key], value) for key, value in plain.items())


def model_and_batch(decoder: str = "linear", variational: bool = False) -> tuple[BaselineTrain, list[torch.Tensor]]:
    torch.manual_seed(0)
    encoder = build("Conv4", 16, 4)
    head = make_head("cosine", encoder.num_features, 4)
    stage = encoder.new_last_stage() if decoder == "block" else None
    d = aet.Decoder(decoder, encoder.num_features, 8, variational, stage)
    return BaselineTrain(encoder, head, d, "concat", "flat"), list(torch.randn(2, 8, 3, 16, 16))


def gradients(model: PairModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("decoder", ["linear", "block"])
def test_who_learns_from_which_loss(decoder: str) -> None:  # 8g
    model, (x, x_t) = model_and_batch(decoder)
    target, y = torch.randn(8, 8), torch.arange(8) % 4
    logits, mu, _ = model(x, x_t)
    from_classes = gradients(model, F.cross_entropy(logits, y))
    assert all(g.abs().sum() == 0 for k, g in from_classes.items() if k.startswith("decoder."))
    logits, mu, _ = model(x, x_t)
    from_pairs = gradients(model, aet.aet_loss(mu, target))
    assert all(g.abs().sum() == 0 for k, g in from_pairs.items() if k.startswith("classifier."))
    assert from_pairs["feature.trunk.0.C.weight"].abs().sum() > 0 and from_pairs["decoder.fc.weight"].abs().sum() > 0
    shared = from_pairs["feature.trunk.3.C.weight"].abs().sum()
    assert (shared == 0) == (decoder == "block")  # the classifier's last stage is free of the task there
    x.requires_grad_()
    x_t.requires_grad_()
    aet.aet_loss(model(x, x_t)[1], target).backward()
    assert x.grad.abs().sum() > 0 and x_t.grad.abs().sum() > 0  # through both images


@pytest.mark.parametrize("bn", ["concat", "two_pass", "split"])
def test_batch_norm_of_pairs(bn: str) -> None:
    torch.manual_seed(0)
    encoder = build("Conv4", 16, 4)
    model = PairModel(encoder, aet.Decoder("linear", encoder.num_features, 8), bn).train()
    x, x_t = torch.randn(8, 3, 16, 16), 5 + torch.randn(8, 3, 16, 16)
    norm = encoder.trunk[0].BN
    h, h_t = encoder.trunk[0].C(x), encoder.trunk[0].C(x_t)
    f, f_t, *_ = model.encode(x, x_t)
    if bn == "concat":
        expected = 0.1 * torch.cat([h, h_t]).mean((0, 2, 3))
    elif bn == "two_pass":
        expected = 0.9 * 0.1 * h.mean((0, 2, 3)) + 0.1 * h_t.mean((0, 2, 3))
    else:
        expected = 0.1 * h.mean((0, 2, 3))
        torch.testing.assert_close(model.other.running_mean_0, 0.1 * h_t.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked.item() == (2 if bn == "two_pass" else 1)
    alone = encoder(x)
    assert torch.allclose(alone, f, atol=1e-5) == (bn != "concat")
    model.eval()
    plain = model.encode(x, None)[0]
    torch.testing.assert_close(model.encode(x, x_t)[0], plain)  # at test time nothing depends on the copies
    copies = model.encode(x, x_t)[1]
    assert copies is not None
    apart = torch.allclose(copies, encoder(x_t), atol=1e-5)
    assert apart == (bn != "split")


def test_it_learns_more_than_the_quarter_turns() -> None:  # 8m
    """64 smooth images under fresh transformations, the decoder's loss alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fam = aet.Family("projective", 16, 2, 0.8, 1.2)
    mean, std = aet.normalisation(fam)
    ramp = torch.linspace(0, 1, 16)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    pictures = 255 * torch.stack([x, y, (x + 2 * y) / 3]).expand(64, -1, -1, -1) * (0.7 + 0.3 * torch.rand(64, 3, 1, 1))
    encoder = build("Conv4", 16, 16)
    model = PairModel(encoder, aet.Decoder("mlp", encoder.num_features, 8)).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(200):
        draw = aet.sample(64, fam, generator)
        x_t = data.normalise(aet.warp(pictures, draw.theta), "imagenet")
        _, _, read, read_t = model.encode(data.normalise(pictures, "imagenet"), x_t)
        assert read_t is not None
        error = aet.aet_loss(model.decode(read, read_t)[0], ((draw.target - mean) / std).float())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[0] > 0.7 and sum(errors[-20:]) / 20 < 0.25  # 0.29: the quarter turn alone


def test_recipes_and_groups() -> None:
    closer = flags("")
    assert (closer.lr, closer.batch_size, closer.stop_epoch, closer.image_size) == (1e-3, 16, 400, 84)
    assert (closer.aet, closer.aet_lambda, closer.aet_shift, closer.decoder) == ("aet", 1.0, 10, "linear")
    assert (closer.shrink, closer.enlarge, closer.num_classes, closer.bn) == (0.8, 1.2, 200, "concat")
    assert learning_rate(closer, 300) == 1e-3
    assert flags("--dataset CUB --model ResNet18").stop_epoch == 200 and flags("--model ResNet18").image_size == 224
    assert [default_epochs(flags(f"--method protonet --n_shot {n}")) for n in (1, 5)] == [600, 400]
    assert flags("--method protonet").epoch_steps == 100
    rfs = flags("--recipe rfs --dataset cifarfs")
    assert (rfs.image_size, rfs.aet_shift, rfs.batch_size, rfs.stop_epoch) == (32, 4, 64, 100)
    assert [learning_rate(rfs, e) for e in (59, 60, 80)] == pytest.approx([0.05, 0.005, 0.0005])
    bf3s = flags("--recipe bf3s --model WRN28")
    assert (bf3s.image_size, bf3s.stop_epoch, bf3s.epoch_steps) == (80, 26, 1000)
    cifar = flags("--recipe bf3s --dataset cifarfs")
    assert cifar.stop_epoch == 21 and learning_rate(cifar, 20) == pytest.approx(0.01)
    cosine = flags("--recipe cosine")
    assert learning_rate(cosine, 0) == 0.05 and learning_rate(cosine, 50) == pytest.approx(0.025)
    args = flags(f"{SMALL} --aet avt")
    optimizer = build_optimizer(args, build_model(args), torch.device("cpu"))
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 10.0]
    assert [p.shape for p in optimizer.param_groups[1]["params"]] == [(8, 8), (8,)]
    model = build_model(args)
    count = sum(len(g["params"]) for g in build_optimizer(args, model, torch.device("cpu")).param_groups)
    assert count == len(list(model.parameters()))  # the decoder's too
