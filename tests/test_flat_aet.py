"""The regulariser of flat: sampler, targets, warp, decoders, losses; against properties and the releases' numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from flat import aet
from flat.aet import Decoder, Family

FROZEN = json.loads((Path(__file__).parent / "reference" / "flat.json").read_text())
CIFAR, MINI, IMAGENET = (
    Family("projective", s, shift, 0.8, 1.2) for s, shift in ((32, 4), (84, 10), (224, 28))
)  # fmt: skip
SPOTS = [(0, 0), (5, 9), (16, 16), (20, 3), (11, 27), (31, 31), (8, 24), (25, 25)]  # x, y at 32 pixels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(s: int) -> Tensor:
    """The smooth image [3, s, s] that the releases' samplers were given."""
    y, x = np.mgrid[0:s, 0:s].astype(np.float64)
    channels = [127.5 + 100 * np.sin(x * (0.11 + 0.03 * c) + 0.5 * c) * np.cos(y * (0.07 + 0.02 * c)) for c in range(3)]
    return torch.from_numpy(np.stack(channels).astype(np.uint8))


def pillow(image: Tensor, theta: Tensor) -> Tensor:
    """Pillow's own PERSPECTIVE transform with grey outside."""
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    out = pil.transform(
        pil.size, Image.Transform.PERSPECTIVE, theta.tolist(), Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )
    return torch.from_numpy(np.array(out)).permute(2, 0, 1)


# --- the releases' numbers -------------------------------------------------------------------------------------------


def release_theta(case: dict[str, Any], direction: str = "output to input") -> Tensor:
    scale, k = torch.tensor([case["scale"]], dtype=torch.float64), torch.tensor([case["k"]])
    shift = torch.tensor(case["shift"], dtype=torch.float64).view(1, 4, 2)
    p, corners = aet.place_corners(case["s"], scale, k, shift), aet.image_corners(case["s"])[None]
    return (aet.homography(p, corners) if direction == "output to input" else aet.homography(corners, p))[0]


@pytest.mark.parametrize("release", ["AET", "AVT", "EnAET"])
def test_projective_coefficients_are_the_releases(release: str) -> None:
    cases = [case for case in FROZEN["projective"] if case["release"] == release]
    assert len(cases) >= 3
    for case in cases:
        frozen = torch.tensor(case["theta"], dtype=torch.float64)
        torch.testing.assert_close(release_theta(case), frozen, rtol=1e-6, atol=1e-9)
        wrong = release_theta(case, "input to output")  # trains fine, decodes another vector
        assert not torch.allclose(wrong, frozen, rtol=1e-3)


def test_affine_matrices_and_targets_are_the_release_s() -> None:
    for case in FROZEN["affine"]:
        one = {
            name: torch.tensor([case[name]], dtype=torch.float64) for name in ("angle", "translate", "scale", "shear")
        }
        theta = aet.affine_matrix(case["s"], one["angle"], one["translate"], one["scale"], one["shear"])[0]
        torch.testing.assert_close(theta[:6], torch.tensor(case["theta"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
        assert theta[6:].tolist() == [0, 0]


def test_affine_targets_follow_their_draw() -> None:
    fam = Family("affine", 32, 4, 0.7, 1.3)
    draw = aet.sample(500, fam, generator())
    assert draw.target.shape == (500, 6) and draw.target.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(draw.target[:, :2].square().sum(1), torch.ones(500, dtype=torch.float64))
    shift = 6.4 * draw.target[:, 2:4]
    assert torch.allclose(shift, shift.round(), atol=1e-9) and shift.abs().max() == 6  # whole pixels
    angle = torch.rad2deg(torch.atan2(draw.target[:, 1], draw.target[:, 0]))
    again = aet.affine_matrix(32, angle, shift, 1 + 0.3 * draw.target[:, 4], 30 * draw.target[:, 5])
    torch.testing.assert_close(again, draw.theta, rtol=1e-9, atol=1e-9)
    for case in FROZEN["affine"]:  # the target's formula, at the releases' draws
        far, half = 0.2 * case["s"], (case["enlarge"] - case["shrink"]) / 2
        a = math.radians(case["angle"])
        mine = [math.cos(a), math.sin(a), *(x / far for x in case["translate"]), (case["scale"] - 1) / half]
        assert case["target"] == pytest.approx([*mine, case["shear"] / 30], abs=1e-6)


@pytest.mark.parametrize("kind", ["projective", "affine"])
def test_warp_is_what_the_releases_made_with_pillow(kind: str) -> None:
    for case in FROZEN[kind]:
        s, theta = case["s"], torch.tensor(case["theta"] + [0.0] * (8 - len(case["theta"])), dtype=torch.float64)
        out = aet.warp(picture(s)[None], theta[None])[0]
        assert abs(int(out.sum()) - case["sum"]) <= 0.001 * case["sum"]
        assert abs(int((out == 128).all(0).sum()) - case["grey"]) <= 0.002 * s * s
        at = torch.stack([out[:, int(y * s / 32), int(x * s / 32)] for x, y in SPOTS])
        torch.testing.assert_close(at, torch.tensor(case["pixels"], dtype=torch.float32), rtol=0, atol=1)


@pytest.mark.parametrize("case", FROZEN["losses"], ids=lambda case: case["dtype"])
def test_losses_and_gradients_are_the_releases(case: dict[str, Any]) -> None:
    n = np.arange(case["B"] * 8, dtype=np.float64).reshape(-1, 8)
    dtype = getattr(torch, case["dtype"])
    arrays = (np.sin(1.3 * n) * 1.5, 800 * np.cos(0.7 * n), np.sin(0.4 * n + 1))
    mu, raw, target = (torch.tensor(a, dtype=dtype) for a in arrays)
    mu.requires_grad_()
    raw.requires_grad_()

    def numbers(z: Tensor) -> list[float]:
        return [float(x) for x in (z.double().sum(), z.double().norm(), z[0, 0], z[-1, -1])]

    plain, variational = aet.aet_loss(mu, target), aet.avt_loss(mu, raw, target)
    assert plain.item() == pytest.approx(case["aet"], rel=1e-6)
    assert variational.item() == pytest.approx(case["avt"], rel=1e-6)
    assert aet.avt_loss(mu, raw, target, divide=500).item() != pytest.approx(case["avt"], rel=1e-3)
    assert numbers(torch.autograd.grad(plain, mu)[0]) == pytest.approx(case["aet_mu"], rel=1e-6, abs=1e-6)
    for grad, name in zip(torch.autograd.grad(variational, (mu, raw)), ("avt_mu", "avt_raw")):
        assert numbers(grad) == pytest.approx(case[name], rel=1e-6, abs=1e-6)


# --- properties of the sampler (8a-8e) -------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [32, 84])
def test_identity_and_quarter_turns(s: int) -> None:  # 8a
    image = picture(s)[None]
    k = torch.arange(4)
    p = aet.place_corners(s, torch.ones(4, dtype=torch.float64), k, torch.zeros(4, 4, 2, dtype=torch.float64))
    theta = aet.homography(p, aet.image_corners(s).expand(4, -1, -1))
    expected = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(theta[0], expected, rtol=0, atol=1e-12)
    out = aet.warp(image.expand(4, -1, -1, -1), theta)
    assert torch.equal(out[0], image[0].float())
    for turns in (1, 2, 3):  # clockwise
        assert (out[turns] - torch.rot90(image[0].float(), -turns, (1, 2))).abs().max() <= 1
    assert torch.equal(aet.nearest_turn(theta, s), k)


def test_theta_sends_corners_to_the_image_s() -> None:  # 8b
    draw = aet.sample(10_000, MINI, generator(1))
    a, b, c, d, e, f, g, h = draw.theta[:, :, None].unbind(1)
    x, y = draw.corners.unbind(-1)
    w = g * x + h * y + 1
    back = torch.stack([(a * x + b * y + c) / w, (d * x + e * y + f) / w], -1)
    assert (back - aet.image_corners(84)).abs().max() < 1e-9


def test_a_marked_corner_appears_at_its_place() -> None:  # 8b
    fam = Family("projective", 84, 3, 0.85, 0.9)  # every corner is in the frame
    draw = aet.sample(12, fam, generator(2))
    for corner, (x, y) in enumerate([(0, 0), (80, 0), (80, 80), (0, 80)]):
        image = torch.zeros(12, 3, 84, 84)
        image[:, :, y : y + 4, x : x + 4] = 255
        white = (aet.warp(image, draw.theta) > 160).all(1)  # the fill is 128
        for i in range(12):
            rows, columns = torch.nonzero(white[i]).double().unbind(1)
            away = (torch.stack([columns, rows], 1) + 0.5 - draw.corners[i, corner]).abs().amax(1)
            assert away.min() <= 1 and away.max() < 6  # no white anywhere else


def matrices(theta: Tensor) -> Tensor:
    return torch.cat([theta, torch.ones(len(theta), 1, dtype=theta.dtype)], 1).view(-1, 3, 3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**30), s=st.sampled_from([28, 32, 84]))
def test_turns_compose_and_inverse_points_give_the_inverse(seed: int, s: int) -> None:  # 8c
    p = aet.place_corners(s, torch.ones(1, dtype=torch.float64), torch.tensor([1]), torch.zeros(1, 4, 2).double())
    turn = matrices(aet.homography(p, aet.image_corners(s)[None]))[0]
    four = torch.linalg.matrix_power(turn, 4)
    torch.testing.assert_close(four / four[2, 2], torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    draw = aet.sample(4, Family("projective", s, s // 8, 0.8, 1.2), generator(seed))
    there = matrices(draw.theta)
    back = matrices(aet.homography(aet.image_corners(s).expand(4, -1, -1), draw.corners))
    product = there @ back
    eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    torch.testing.assert_close(product / product[:, 2:, 2:], eye, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("s", "shift"), [(84, 10), (84, 11), (28, 3), (224, 28)])
def test_sampled_normalisation_is_the_table(s: int, shift: int) -> None:  # 8d
    fam = Family("projective", s, shift, 0.8, 1.2)
    mean, std = aet.estimate(fam)
    tabulated = aet.normalisation(fam)
    torch.testing.assert_close(std, tabulated[1], rtol=0.03 if s == 224 else 0.02, atol=0)  # 224: rounded to 2 digits
    assert ((mean - tabulated[0]).abs() <= 0.02 * std).all()
    assert aet.normalisation(fam, "estimate")[1] is std


def test_denominators_stay_away_from_the_horizon() -> None:  # 8d
    theta = aet.sample(100_000, MINI, generator(3)).theta
    edges = torch.tensor([0.5, 83.5], dtype=torch.float64)  # linear in x and y: its minimum is at a corner
    w = theta[:, 6, None, None] * edges[:, None] + theta[:, 7, None, None] * edges + 1
    low = w.flatten(1).min(1).values
    assert low.min() > 0.2
    assert float(low.quantile(0.01)) == pytest.approx(0.54, abs=0.03)


@pytest.mark.parametrize(
    ("fam", "constant", "oracle"), [(MINI, 1.0, 0.29), (CIFAR, 0.515, 0.072), (IMAGENET, 1.0, 0.29)]
)  # fmt: skip
def test_what_a_constant_and_the_quarter_turns_reach(fam: Family, constant: float, oracle: float) -> None:  # 8e
    theta = aet.sample(100_000, fam, generator(4)).theta
    mean, std = aet.normalisation(fam)
    target = (theta - mean) / std
    assert aet.chance(target) == pytest.approx(constant, rel=0.03)
    k = aet.nearest_turn(theta, fam.s)
    left = [target[k == turn] - target[k == turn].mean(0) for turn in range(4)]
    assert float(torch.cat(left).square().mean()) == pytest.approx(oracle, rel=0.04)


def test_draws_are_integer_inclusive_and_of_their_own_stream() -> None:
    p = aet.sample_projective(4000, Family("projective", 32, 4, 1.0, 1.0), generator(5)).corners
    order = torch.arange(4)
    deltas = torch.stack([(p - aet.image_corners(32)[(order + k) % 4]).abs().amax((1, 2)) for k in range(4)]).min(0)
    assert deltas.values.max() == 4 and set(deltas.values.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    scaled = aet.place_corners(32, torch.tensor([0.5]).double(), torch.tensor([0]), torch.zeros(1, 4, 2).double())
    assert scaled[0, 0].tolist() == [8.25, 8.25]  # about 16.5, not 16
    state = torch.get_rng_state()
    one, two = (aet.sample(3, CIFAR, generator(6)).theta for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.get_rng_state())
    rotation_only = Family("projective", 32, 0, 1.0, 1.0)
    assert aet.normalisation(rotation_only)[1][6:].tolist() == [1, 1]  # never varies: no division by 0


# --- the warp (8i) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fam", [CIFAR, MINI, Family("affine", 32, 4, 0.7, 1.3)], ids=["32", "84", "affine"])
def test_warp_equals_pillow(fam: Family) -> None:
    draw = aet.sample(40, fam, generator(7))
    image = picture(fam.s)
    ours = aet.warp(image.expand(40, -1, -1, -1), draw.theta)
    theirs = torch.stack([pillow(image, theta) for theta in draw.theta]).float()
    u, v = aet.source_positions(draw.theta, fam.s)
    edge = torch.stack([u, v, fam.s - u, fam.s - v]).abs().min(0).values < 1e-3  # float32 or float64 may differ
    worst = (ours - theirs).abs().amax(1)
    assert float(worst[~edge].max()) <= 1 and edge.float().mean() < 0.001
    assert float((worst > 0).float().mean()) < 0.01


def test_padding_and_the_order_of_normalisation() -> None:
    theta = torch.tensor([[2.0, 0, -16, 0, 2.0, -16, 0, 0]], dtype=torch.float64)  # half the size, a wide border
    image = torch.full((1, 3, 32, 32), 255.0)
    grey, reflected = (aet.warp(image, theta, pad) for pad in ("grey", "reflect"))
    assert (grey == 128).float().mean() == pytest.approx(0.75) and bool((reflected == 255).all())
    centred = aet.warp(image - 128, theta)
    assert not torch.equal(centred + 128, grey)  # after a normalisation the fill would be something else


# --- losses and decoders (8h) ----------------------------------------------------------------------------------------


def test_variational_loss_without_variance_and_its_minimum() -> None:  # 8h
    mu, target = torch.randn(6, 8, generator=generator()).double(), torch.randn(6, 8, generator=generator(1)).double()
    value = aet.avt_loss(mu, torch.zeros_like(mu), target)
    assert float(value) == pytest.approx(float((mu - target).square().sum() / 6 / (1 + 1e-4)))
    e = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    v = torch.linspace(-6, 4, 20001, dtype=torch.float64)[:, None]
    best = v[(v + e.square() / (v.exp() + 1e-4)).argmin(0)].squeeze(1)
    torch.testing.assert_close(best, (e.square()).log(), rtol=0, atol=5e-3)
    raw = (1000 * best).expand(1, 3)
    moved = [aet.avt_loss(e[None], raw + 1000 * by, torch.zeros(1, 3).double()) for by in (-0.1, 0, 0.1)]
    assert moved[1] < moved[0] and moved[1] < moved[2]
    # sums over coefficients, where the squared error averages
    assert float(value) == pytest.approx(8 * float(aet.aet_loss(mu, target)) / (1 + 1e-4))
    assert float(aet.aet_loss(10 * mu, target, smooth=True)) < float(aet.aet_loss(10 * mu, target))


def test_a_linear_decoder_is_an_affine_map_of_both_features() -> None:
    linear, mlp = Decoder("linear", 5, 8), Decoder("mlp", 5, 8, variational=True)
    f, f_t = torch.randn(2, 3, 5, generator=generator())
    weight = linear.fc.weight
    torch.testing.assert_close(linear(f, f_t)[0], f @ weight[:, :5].T + f_t @ weight[:, 5:].T)
    assert linear(f, f_t)[1] is None and linear.fc.bias.abs().sum() == 0
    mu, raw = mlp(f, f_t)
    assert mu.shape == raw.shape == (3, 8) and mlp.hidden[0].weight.shape == (5, 10)
    stage = nn.Conv2d(4, 6, 3, padding=1)
    block = Decoder("block", 6, 8, stage=stage)
    assert block(*torch.randn(2, 3, 4, 5, 5))[0].shape == (3, 8)


def test_weight_of_the_regulariser_over_time() -> None:
    assert aet.warm(0.3, 0.0, 0) == 0.3 and aet.warm(1.0, 0.0, 10) == 0
    assert aet.warm(2.0, 0.05, 10) == pytest.approx(1.0) and aet.warm(2.0, 0.5, 10) == 2.0
    assert [aet.side_shift(s) for s in (32, 84, 224)] == [4, 10, 28]


def test_telemetry_of_a_perfect_and_of_a_blind_decoder() -> None:
    mean, std = aet.normalisation(CIFAR)
    target = ((aet.sample(400, CIFAR, generator(8)).theta - mean) / std).float()
    perfect = aet.telemetry(target, target, mean, std, CIFAR)
    assert perfect["acc/rotation"] == 100 and perfect["at/abde"] == 0
    blind = aet.telemetry(torch.zeros_like(target), target, mean, std, CIFAR)
    assert blind["at/gh"] > 0 and float(blind["acc/rotation"]) < 40 and blind["at/clipped"] <= 1
    assert set(blind) == {"at/clipped", "at/abde", "at/cf", "at/gh", "acc/rotation"}
