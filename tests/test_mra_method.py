"""MRA's method: patches, positions, masks, the autoencoder, the operator; an independent loop in float64 beside it."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mra import models_mae
from mra.models_mae import MAE, Size, len_keep, mask_from_scores, patchify, sincos_positions, unpatchify
from mra.mra import COMPOSE, MRA, STRATEGIES, add_mra_flags, attention_scores, build, pixel_mask, score_entropy
from shared_utils import UserError, checkpoint
from shared_utils.flags import Parser

TINY = Size(4, (16, 2, 2), (8, 1, 2))
P, S = 4, 16  # 4 x 4 patches of 4 pixels


def tiny(seed: int = 0, norm_pix: bool = False, size: int = S) -> MAE:
    torch.manual_seed(seed)
    mae = MAE(size, TINY, norm_pix).eval()
    with torch.no_grad():  # biases and tokens of a trained network are not 0
        for p in mae.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return mae


def images(n: int = 3, seed: int = 1, size: int = S) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def run(mae: MAE, x: Tensor, **flags) -> tuple[Tensor, Tensor]:
    """x_hat and the mask."""
    operator = MRA(mae, **flags)
    noise, use = operator.draw(len(x), torch.Generator().manual_seed(3))
    return operator(x, noise, use), operator.parts(x, noise).mask


# --- an independent loop: one image, one patch, one head, one row after the other, in float64 ------------------------


def loop_attention(q: list, k: list, v: list) -> list:
    out = []
    for a in q:
        weights = np.array([math.exp(float(a @ b) / math.sqrt(len(a))) for b in k])
        out.append(sum(w * c for w, c in zip(weights / weights.sum(), v)))
    return out


def loop_norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    mean = x.mean()
    std = math.sqrt(((x - mean) ** 2).mean() + 1e-6)
    return (x - mean) / std * w[f"{name}.weight"] + w[f"{name}.bias"]


def loop_block(tokens: list, w: dict, name: str, heads: int) -> list:
    d = len(tokens[0]) // heads
    normed = [loop_norm(t, w, f"{name}.norm1") for t in tokens]
    qkv = [w[f"{name}.attn.qkv.weight"] @ t + w[f"{name}.attn.qkv.bias"] for t in normed]
    joined: list = [[] for _ in tokens]
    for h in range(heads):
        cut = [[row[part * d * heads + h * d : part * d * heads + (h + 1) * d] for row in qkv] for part in range(3)]
        for place, value in zip(joined, loop_attention(*cut)):
            place.append(value)
    tokens = [
        t + w[f"{name}.attn.proj.weight"] @ np.concatenate(j) + w[f"{name}.attn.proj.bias"]
        for t, j in zip(tokens, joined)
    ]
    out = []
    for t in tokens:
        hidden = w[f"{name}.mlp.fc1.weight"] @ loop_norm(t, w, f"{name}.norm2") + w[f"{name}.mlp.fc1.bias"]
        gelu = np.array([u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in hidden])
        out.append(t + w[f"{name}.mlp.fc2.weight"] @ gelu + w[f"{name}.mlp.fc2.bias"])
    return out


def loop_position(dim: int, row: int, column: int) -> np.ndarray:
    out = []
    for q in (column, row):
        omegas = [10000 ** (-j / (dim / 4)) for j in range(dim // 4)]
        out += [math.sin(q * o) for o in omegas] + [math.cos(q * o) for o in omegas]
    return np.array(out)


def loop_mra(mae: MAE, x: Tensor, ratio: float) -> tuple[np.ndarray, list]:
    """x_hat of one image [3, S, S] and its erased patches."""
    w = {k: v.double().numpy() for k, v in mae.state_dict().items()}
    (de, depth, heads), (dd, dec_depth, dec_heads), p = mae.size.enc, mae.size.dec, mae.p
    img, g = x.double().numpy(), S // mae.p
    tokens = []
    for i in range(g * g):
        r, c = divmod(i, g)
        block = img[:, r * p : (r + 1) * p, c * p : (c + 1) * p]
        values = [float((w["patch_embed.proj.weight"][o] * block).sum()) for o in range(de)]
        tokens.append(np.array(values) + w["patch_embed.proj.bias"] + loop_position(de, r, c))

    def encode(some: list) -> list:
        seq = [w["cls_token"][0, 0], *some]
        for n in range(depth):
            seq = loop_block(seq, w, f"blocks.{n}", heads)
        return [loop_norm(t, w, "norm") for t in seq]

    z = encode(tokens)
    a = [float(z[0] @ t) for t in z[1:]]
    keep = sorted(range(g * g), key=lambda i: -a[i])[: int(g * g * (1 - ratio))]
    latent = encode([tokens[i] for i in keep])
    embedded = [w["decoder_embed.weight"] @ t + w["decoder_embed.bias"] for t in latent]
    seq = [embedded[0]]
    for i in range(g * g):
        t = embedded[1 + keep.index(i)] if i in keep else w["mask_token"][0, 0]
        seq.append(t + loop_position(dd, *divmod(i, g)))
    for n in range(dec_depth):
        seq = loop_block(seq, w, f"decoder_blocks.{n}", dec_heads)
    out = img.copy()
    erased = [i for i in range(g * g) if i not in keep]
    for i in erased:
        y = w["decoder_pred.weight"] @ loop_norm(seq[1 + i], w, "decoder_norm") + w["decoder_pred.bias"]
        r, c = divmod(i, g)
        for row in range(p):
            for col in range(p):
                out[:, r * p + row, c * p + col] = y[(row * p + col) * 3 : (row * p + col) * 3 + 3]
    return out, erased


def test_the_operator_is_the_loop() -> None:
    mae, x = tiny(), images(2)
    want = [loop_mra(mae, image, 0.4) for image in x]
    operator = MRA(mae.double(), 0.4, clamp=False)
    parts = operator.parts(x.double(), operator.draw(2, torch.Generator())[0])
    assert parts.out.dtype == torch.float64
    for b, (out, erased) in enumerate(want):
        assert parts.mask[b].nonzero().flatten().tolist() == erased
        np.testing.assert_allclose(parts.out[b].numpy(), out, rtol=0, atol=1e-7)  # the tables are float32


# --- the operator -----------------------------------------------------------------------------------------------------


def test_patches_and_back() -> None:
    x = images()
    t = patchify(x, P)
    assert t.shape == (3, 16, 48) and torch.equal(unpatchify(t, P), x)
    assert torch.equal(t[:, 0], x[:, :, :P, :P].permute(0, 2, 3, 1).reshape(3, -1))
    assert torch.equal(t[:, 5], x[:, :, P : 2 * P, P : 2 * P].permute(0, 2, 3, 1).reshape(3, -1))


def test_positions_by_hand() -> None:
    s1, c1, s2, c2 = math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)
    zero, one = [0, 0, 1, 1], [s1, s2, c1, c2]
    want = torch.tensor([[0.0] * 8, zero + zero, one + zero, zero + one, one + one])
    table = sincos_positions(8, 2)
    assert table.shape == (5, 8) and table.dtype == torch.float32
    torch.testing.assert_close(table, want)
    big = sincos_positions(16, 5)[1:].view(5, 5, 16)
    assert torch.equal(big[:1, :, :8].expand(5, 5, 8), big[:, :, :8])  # by column
    assert torch.equal(big[:, :1, 8:].expand(5, 5, 8), big[:, :, 8:])  # by row
    with pytest.raises(UserError, match="width 10"):
        sincos_positions(10, 2)


def names(depth: int, dec_depth: int) -> set[str]:
    inner = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    blocks = [f"blocks.{i}.{n}" for i in range(depth) for n in inner]
    blocks += [f"decoder_blocks.{i}.{n}" for i in range(dec_depth) for n in inner]
    layers = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred", *blocks]
    return {f"{n}.{k}" for n in layers for k in ("weight", "bias")} | {
        "cls_token", "pos_embed", "mask_token", "decoder_pos_embed"
    }  # fmt: skip


def test_names_and_shapes_are_those_of_public_files() -> None:
    mae = MAE(224, models_mae.SIZES["mae_base_patch16"])
    state = {k: tuple(v.shape) for k, v in mae.state_dict().items()}
    assert set(state) == names(12, 8)
    expected = {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "decoder_pos_embed": (1, 197, 512),
        "mask_token": (1, 1, 512), "patch_embed.proj.weight": (768, 3, 16, 16), "blocks.3.attn.qkv.weight": (2304, 768),
        "blocks.11.mlp.fc1.weight": (3072, 768), "decoder_embed.weight": (512, 768),
        "decoder_blocks.7.attn.proj.bias": (512,), "decoder_pred.weight": (768, 512),
    }  # fmt: skip
    assert {k: state[k] for k in expected} == expected
    for where, d, blocks in (("blocks", 768, 12), ("decoder_blocks", 512, 8)):
        inner = {"norm1": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d), "norm2": (d,), "mlp.fc1": (4 * d, d),
                 "mlp.fc2": (d, 4 * d)}  # fmt: skip
        for i in range(blocks):
            for name, shape in inner.items():
                assert state[f"{where}.{i}.{name}.weight"] == shape and state[f"{where}.{i}.{name}.bias"] == shape[:1]
    assert [k for k, p in mae.named_parameters() if not p.requires_grad] == ["pos_embed", "decoder_pos_embed"]
    sizes = {name: sum(p.numel() for p in MAE(96, s).parameters()) / 1e6
             for name, s in models_mae.SIZES.items() if "mini" in name or "tiny_patch8" in name}  # fmt: skip
    assert sizes["mae_mini_patch16"] == pytest.approx(6.1, abs=0.2)
    assert sizes["mae_tiny_patch8"] == pytest.approx(0.6, abs=0.05)


def test_initialisation() -> None:
    torch.manual_seed(0)
    mae = MAE(32, Size(8, (64, 2, 2), (32, 1, 2)))
    for name, p in mae.named_parameters():
        if name.endswith("norm1.weight") or name == "norm.weight":
            assert bool((p == 1).all())
        elif name.endswith(("fc1.bias", "qkv.bias", "norm2.bias", "decoder_pred.bias")):
            assert bool((p == 0).all())
    bound = math.sqrt(6 / (64 + 192))
    assert mae.patch_embed.proj.weight.abs().max() <= bound and mae.patch_embed.proj.weight.std() > 0.5 * bound
    assert 0.01 < mae.cls_token.std() < 0.03 and float(mae.patch_embed.proj.bias.abs().sum()) > 0


# --- masks ------------------------------------------------------------------------------------------------------------


def test_mae_s_own_rule_for_the_count() -> None:
    assert [len_keep(100, 0.9), len_keep(196, 0.75), len_keep(196, 0.4), len_keep(16, 0), len_keep(16, 1)] == [
        9, 49, 117, 16, 0,
    ]  # fmt: skip


def test_the_largest_scores_are_kept_and_restored() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    x = torch.arange(8.0).view(2, 4, 1)
    visible, mask, restore = mask_from_scores(x, scores, 0.5)
    assert visible[0].flatten().tolist() == [1, 3] and visible[1].flatten().tolist() == [4, 5]
    assert mask.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    full = torch.cat([visible, torch.full((2, 2, 1), -1.0)], 1).gather(1, restore[:, :, None])
    assert full[0].flatten().tolist() == [-1, 1, -1, 3]
    ties = mask_from_scores(x, torch.zeros(2, 4), 0.5)[1]
    assert ties.tolist() == [[0, 0, 1, 1]] * 2  # the first ones win, always


def test_random_masks_are_fair_and_differ() -> None:
    noise = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0))
    _, mask, _ = mask_from_scores(torch.zeros(4000, 16, 1), -noise, 0.75)
    assert (mask.sum(1) == 12).all() and len(mask.unique(dim=0)) > 1000
    expected = 3000.0
    statistic = float(((mask.sum(0).double() - expected) ** 2 / (4000 * 0.75 * 0.25)).sum()) * 15 / 16
    assert statistic < chi2.ppf(0.999, 15)


# --- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("compose", ["paste", "erase"])
def test_without_erasing_the_image_stays_to_the_bit(strategy: str, compose: str) -> None:
    x = images()
    out, mask = run(tiny(), x, mask_ratio=0.0, strategy=strategy, compose=compose)
    assert torch.equal(out, x) and not mask.any()


def test_probability_0_does_not_call_the_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    mae, x = tiny(), images()
    monkeypatch.setattr(MAE, "embed", lambda *_: pytest.fail("called"))
    operator = MRA(mae, prob=0.0)
    assert operator(x, *operator.draw(3, torch.Generator().manual_seed(0))) is x


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.9])
@pytest.mark.parametrize("amp", [False, True])
def test_erased_patches_change_and_no_others(strategy: str, ratio: float, amp: bool) -> None:
    x = images(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out, mask = run(tiny(), x, mask_ratio=ratio, strategy=strategy)
    changed = (patchify(out, P) != patchify(x, P)).any(2)
    assert torch.equal(changed, mask > 0) and out.dtype == x.dtype
    assert changed.sum(1).tolist() == [16 - int(16 * (1 - ratio))] * 5


def test_attention_keeps_the_top_and_its_inverse_the_bottom() -> None:
    mae, x = tiny(), images(6)
    a = attention_scores(mae, mae.embed(x))
    for strategy, sign in (("attn", 1), ("attn_inverse", -1)):
        _, mask = run(mae, x, strategy=strategy)
        for scores, m in zip(sign * a, mask):
            assert scores[m == 0].min() >= scores[m == 1].max()
        assert torch.equal(run(mae, x, strategy=strategy)[0], run(mae, x, strategy=strategy)[0])
    drawn = MRA(mae, strategy="random")
    one, two = (drawn.draw(6, torch.Generator().manual_seed(s))[0] for s in (0, 1))
    assert not torch.equal(drawn.parts(x, one).mask, drawn.parts(x, two).mask)


def test_a_softmax_selects_the_same() -> None:
    mae, x = tiny(), images(6)
    a = attention_scores(mae, mae.embed(x))
    soft = F.softmax(a.double() / math.sqrt(16), 1)
    one, two = (mask_from_scores(torch.zeros(6, 16, 1), scores, 0.4)[1] for scores in (a, soft))
    assert torch.equal(one, two)


def test_last_block_s_attention_is_that_of_the_class_token() -> None:
    mae, x = tiny(), images(2)
    tokens = mae.embed(x)
    a = attention_scores(mae, tokens, "last_attn")
    seq = mae.blocks[0](mae.with_class(tokens))
    q, k, _ = mae.blocks[1].attn.qkv(mae.blocks[1].norm1(seq)).view(2, 17, 3, 2, 8).unbind(2)
    want = torch.zeros(2, 16)
    for b in range(2):
        for h in range(2):
            logits = torch.stack([q[b, 0, h] @ k[b, t, h] for t in range(17)]) / math.sqrt(8)
            want[b] += logits.softmax(0)[1:]
    torch.testing.assert_close(a, want / want.sum(1, keepdim=True))
    uniform = torch.full((1, 16), 1 / 16)
    assert float(score_entropy(uniform, "last_attn", 16)) == pytest.approx(1)
    assert float(score_entropy(torch.zeros(1, 16), "out_dot", 16)) == pytest.approx(1)
    assert float(score_entropy(torch.tensor([[1e4] + [0.0] * 15]), "out_dot", 16)) == pytest.approx(0, abs=1e-5)


class Casts(TorchDispatchMode):
    """Counts changes of dtype."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_frozen_weights_are_cast_once_under_autocast() -> None:
    """Autocast itself would cast each of them at every call: more launches than there are layers."""
    mae, x = tiny(), images(4)
    operator = MRA(mae, strategy="random")
    noise, use = operator.draw(4, torch.Generator().manual_seed(0))
    exact = operator(x, noise, use)
    with torch.autocast("cpu", torch.bfloat16):
        first = operator(x, noise, use)
        with Casts() as casts:
            again = operator(x, noise, use)
    assert casts.count <= 3  # the images on their way in, the pixels on their way out, the mask
    assert torch.equal(first, again) and mae.pos_embed.dtype == torch.float32
    assert 0 < float((first - exact).abs().max()) < 0.05 and first.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the operator there, without a wait for it")
@pytest.mark.parametrize(
    "flags", [{}, {"strategy": "random", "prob": 0.5}, {"source": "last_attn", "compose": "erase"}]
)
def test_on_a_gpu(flags: dict) -> None:
    """No step of the operator waits for the GPU, and its masks and pixels are those of the CPU up to rounding."""
    x, here, there = images(64), MRA(tiny(), **flags), MRA(tiny().to("cuda"), **flags)
    noise, use = here.draw(64, torch.Generator().manual_seed(0))
    on_gpu = x.to("cuda")
    outs = []
    for amp in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            there(on_gpu, noise, use)
            torch.cuda.set_sync_debug_mode("error")
            try:
                outs.append(there(on_gpu, noise, use))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for out, share in zip(outs, (0.97, 0.9)):  # of the pixels; a mask may differ where two scores are all but equal
        near = (out.cpu() - here(x, noise, use)).abs() < 0.05
        assert float(near.float().mean()) > share


@pytest.mark.parametrize("source", ["out_dot", "last_attn"])
def test_scores_are_wide_under_autocast(source: str) -> None:
    """In bfloat16 nearby scores would be equal, and which patches are kept a matter of their position."""
    mae, x = tiny(size=64), images(2, size=64)
    with torch.autocast("cpu", torch.bfloat16):
        a = attention_scores(mae, mae.embed(x), source)
    assert a.dtype == torch.float32 and all(len(row.unique()) > 250 for row in a)  # of 256


def test_the_probe_sees_every_patch() -> None:
    mae, x = tiny(), images(1)
    mask = run(mae, x)[1]
    other = x.clone()
    erased = int(mask[0].nonzero()[0])
    r, c = divmod(erased, 4)
    other[:, :, r * P : (r + 1) * P, c * P : (c + 1) * P] += 5
    assert not torch.equal(attention_scores(mae, mae.embed(x)), attention_scores(mae, mae.embed(other)))


def test_the_order_of_kept_patches_does_not_matter() -> None:
    mae, x = tiny(), images(2)
    tokens = mae.embed(x)
    visible, _, restore = mask_from_scores(tokens, torch.rand(2, 16, generator=torch.Generator().manual_seed(0)), 0.5)
    order = torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])
    places = torch.cat([torch.argsort(order), torch.arange(8, 16)])
    a = mae.decode(mae.encode(visible), restore)
    b = mae.decode(mae.encode(visible[:, order]), places[restore])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(a, mae.decode(mae.encode(visible[:, order]), restore), atol=1e-3)


def test_all_erased_gives_one_image() -> None:
    out, mask = run(tiny(), images(4), mask_ratio=1.0, clamp=False)
    assert mask.all() and torch.allclose(out, out[:1].expand_as(out), atol=1e-6)


def pixels_of(mae: MAE, x: Tensor, true_stats: bool) -> tuple[Tensor, Tensor]:
    """Reconstructions of x and of x with other pixels where the (fixed, random) mask erases."""
    operator = MRA(mae, strategy="random", clamp=False, true_stats=true_stats)
    noise = operator.draw(len(x), torch.Generator().manual_seed(0))[0]
    first = operator.parts(x, noise)
    other = torch.where(pixel_mask(first.mask, P) > 0, 3 * images(len(x), 9), x)
    return first.reconstruction, operator.parts(other, noise).reconstruction


def test_erased_pixels_do_not_leak() -> None:
    a, b = pixels_of(tiny(), images(), False)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    a, b = pixels_of(tiny(norm_pix=True), images(), True)
    assert (a - b).abs().max() > 0.1  # true statistics do, by design
    mae, x = tiny(norm_pix=True), images()
    perfect = MRA(mae, clamp=False, true_stats=True).pixels(mae.target(x), x)
    torch.testing.assert_close(perfect, x, rtol=0, atol=1e-5)


def test_the_loss_looks_at_erased_patches_alone() -> None:
    mae, x = tiny(), images()
    mask = (torch.arange(16) % 3 == 0).float().expand(3, 16)
    target = mae.target(x)
    noise = torch.randn_like(target)
    assert float(mae.loss(x, target, mask)) == 0
    visible = target + noise * (1 - mask)[:, :, None]
    assert float(mae.loss(x, visible, mask)) == 0
    want = noise.square().mean(2)[mask > 0].mean()
    torch.testing.assert_close(mae.loss(x, target + noise, mask), want)
    normed = tiny(norm_pix=True)
    flat = normed.target(torch.full((1, 3, S, S), 0.7))
    assert float(flat.abs().max()) < 1e-3
    t = patchify(x, P)
    torch.testing.assert_close(normed.target(x), (t - t.mean(2, True)) / (t.std(2, keepdim=True) ** 2 + 1e-6).sqrt())


def test_no_gradient_and_an_untouched_autoencoder() -> None:
    mae, x = tiny(), images()
    before = {k: v.clone() for k, v in mae.state_dict().items()}
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * S * S, 4))
    out, _ = run(mae, x)
    assert not out.requires_grad
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    F.cross_entropy(net(out), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    assert net[1].weight.grad is not None and all(p.grad is None and not p.requires_grad for p in mae.parameters())
    assert all(torch.equal(v, before[k]) for k, v in mae.state_dict().items()) and not mae.training


def test_probability_is_drawn_for_each_image() -> None:
    operator = MRA(tiny(), prob=0.5)
    _, use = operator.draw(4000, torch.Generator().manual_seed(0))
    assert 0.47 < float(use.float().mean()) < 0.53
    x = images(6)
    chosen = torch.tensor([True, False, True, False, False, True])
    out = operator(x, operator.draw(6, torch.Generator())[0], chosen)
    whole = operator.parts(x, operator.draw(6, torch.Generator())[0]).out
    assert torch.equal(out[~chosen], x[~chosen]) and torch.allclose(out[chosen], whole[chosen], atol=1e-6)
    assert (out[chosen] != x[chosen]).flatten(1).any(1).all()


def test_other_statistics_give_the_same_picture() -> None:
    mae = tiny()
    pixels = torch.rand(3, 3, S, S, generator=torch.Generator().manual_seed(0))
    results = []
    for mean, std in ((models_mean(), models_std()), ((0.5,) * 3, (0.5,) * 3)):
        m, s = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        out, mask = run(mae, (pixels - m) / s, stats=(mean, std))
        results.append((out * s + m, mask))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert results[0][0].min() >= -1e-6 and results[0][0].max() <= 1 + 1e-6  # clamped


def models_mean() -> tuple[float, ...]:
    return (0.485, 0.456, 0.406)


def models_std() -> tuple[float, ...]:
    return (0.229, 0.224, 0.225)


def test_full_and_erase() -> None:
    mae, x = tiny(), images()
    parts = MRA(mae, compose="full").parts(x, torch.rand(3, 16))
    assert torch.equal(parts.out, parts.reconstruction)
    out, mask = run(mae, x, compose="erase")
    assert torch.equal(out, x * (1 - pixel_mask(mask, P))) and COMPOSE == ("paste", "full", "erase")


def test_overfit() -> None:
    torch.manual_seed(0)
    mae = MAE(S, Size(4, (32, 2, 2), (32, 1, 2)))
    x = torch.randn(8, 3, 1, 1).expand(8, 3, S, S).contiguous()
    optimizer = torch.optim.AdamW(mae.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 400)
        loss, _, _ = mae(x, torch.rand(8, 16), 0.75)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3


# --- files ------------------------------------------------------------------------------------------------------------


def save(path: Path, mae: MAE, drop: str = "", **extra) -> Path:
    state = {k: v for k, v in mae.state_dict().items() if not (drop and k.startswith(drop))}
    checkpoint.save(path, {"model": state, **extra})
    return path


FLAGS = {"enc_heads": 2, "dec_heads": 2, "norm_pix_loss": False, "data_path": "somewhere"}


def test_round_trip_and_another_grid(tmp_path: Path) -> None:
    mae = tiny()
    file = save(tmp_path / "a.pth", mae, args=FLAGS)
    loaded = models_mae.load(file, S)
    x, noise = images(), torch.rand(3, 16)
    assert torch.equal(loaded.mae(x, noise)[1], mae(x, noise)[1]) and "somewhere" in loaded.report
    assert len(loaded.md5) == 32 and "CC BY-NC" in loaded.report  # no run of ours: the licence is named
    ours = save(tmp_path / "b.pth", mae, args=FLAGS, progress={})
    assert "CC BY-NC" not in models_mae.load(ours, S).report
    wide = models_mae.load(file, 24).mae
    assert torch.equal(wide.pos_embed[0], sincos_positions(16, 6)) and wide.patches == 36
    assert wide.decoder_pos_embed.shape == (1, 37, 8)


def test_heads_are_those_of_the_run(tmp_path: Path) -> None:
    """Shapes do not tell them: with others the weights fit and the images are noise."""
    own = {"model": "mae_tiny_patch4", "enc_heads": None, "dec_heads": None, "norm_pix_loss": False}
    for flags, size in (
        (own, Size(4, (96, 4, 3), (96, 1, 3))),
        (own | {"enc_heads": 6}, Size(4, (96, 4, 6), (96, 1, 3))),
        (own | {"dec_heads": 2}, Size(4, (96, 4, 3), (96, 1, 2))),
        (own, Size(4, (96, 2, 3), (48, 1, 3))),  # of no registered size, its heads are --model's
    ):
        torch.manual_seed(0)
        loaded = models_mae.load(save(tmp_path / "a.pth", MAE(S, size), args=flags), S)
        assert loaded.mae.size == size and "CC BY-NC" not in loaded.report  # weights of a run of ours


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("decoder_blocks.0", "is not in the registry|missing"),
        ("decoder", "encoder-only file"),
        ("mask_token", "no mask_token"),
        ("decoder_pred.bias", r"1 missing \(decoder_pred.bias\)"),
        ("blocks.1.norm2.bias", r"1 missing \(blocks.1.norm2.bias\)"),
    ],
)
def test_an_incomplete_file_is_refused(drop: str, message: str, tmp_path: Path) -> None:
    flags = {} if "0" in drop else FLAGS
    with pytest.raises(UserError, match=message) as error:
        models_mae.load(save(tmp_path / "a.pth", tiny(), drop, args=flags), S)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_network_is_called_that(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(4, 3, 7, 7)}}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="weights of another network, no masked autoencoder: take .*mra.main_pretrain"):
        models_mae.load(tmp_path / "resnet.pth", S)


def test_learned_positions_and_unknown_heads_are_refused(tmp_path: Path) -> None:
    mae = tiny()
    with pytest.raises(UserError, match="give --mae_heads"):
        models_mae.load(save(tmp_path / "a.pth", mae), S)
    models_mae.load(tmp_path / "a.pth", S, (2, 2))
    with torch.no_grad():
        mae.pos_embed.add_(0.1)
    with pytest.raises(UserError, match="pos_embed is not the fixed sin-cos table of 4 x 4"):
        models_mae.load(save(tmp_path / "a.pth", mae, args=FLAGS), S)


PAINTER = Size(4, (32, 1, 2), (32, 1, 2))


def painter(norm_pix: bool) -> MAE:
    """An autoencoder that was trained a little on bent ramps of colour, towards either kind of target."""
    torch.manual_seed(0)
    mae, steps = MAE(16, PAINTER, norm_pix), 150
    optimizer = torch.optim.AdamW(mae.parameters(), 6e-3, betas=(0.9, 0.95))
    generator, t = torch.Generator().manual_seed(7), torch.linspace(-1, 1, 16)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min((step + 1) / 10, 1 - step / steps)
        c = torch.randn(32, 5, 3, 1, 1, generator=generator)
        x = c[:, 0] + c[:, 1] * t + c[:, 2] * t[:, None] + c[:, 3] * t**2 + c[:, 4] * t[:, None] ** 2
        loss, _, _ = mae(x, torch.rand(32, 16, generator=generator), 0.6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mae


def test_targets_are_told_by_what_is_painted_whatever_the_file_s_name(tmp_path: Path) -> None:
    pixels, normed, nothing = painter(False), painter(True), MAE(16, PAINTER)
    for mae, name, expected in (
        (normed, "mae_visualize_vit_base.pth", True), (normed, "weights.pth", True),
        (pixels, "mae_pretrain_vit_base_full.pth", False), (pixels, "weights.pth", False), (nothing, "a.pth", None),
    ):  # fmt: skip
        file = save(tmp_path / name, mae)
        for size in (16, 24):  # asked on the grid of the file, whichever is wanted
            loaded = models_mae.load(file, size, (2, 2))
            assert loaded.norm_pix is expected and loaded.mae.norm_pix_loss is expected
        state = {k: v.half() for k, v in torch.load(file)["model"].items()}
        checkpoint.save(file, {"model": state})
        assert models_mae.load(file, 16, (2, 2)).norm_pix is expected
        assert models_mae.load(file, 16, (2, 2), "yes").norm_pix is True
        assert models_mae.load(file, 16, (2, 2), "no").norm_pix is False
    with pytest.raises(
        UserError, match="a.pth: .*fits neither pixels nor normalised patches.*--mae_norm_pix yes or no"
    ):
        build(operator_flags(tmp_path / "a.pth"), 16, torch.device("cpu"))
    MRA(models_mae.load(tmp_path / "a.pth", 16, (2, 2)).mae, compose="erase")  # paints nothing


def operator_flags(file: Path, *more: str) -> argparse.Namespace:
    parser = Parser()
    add_mra_flags(parser)
    return parser.parse_args(["--mae_ckpt", str(file), "--mae_heads", "2,2", *more])


def test_normalised_targets_need_the_true_statistics(tmp_path: Path) -> None:
    mae = tiny()
    other = save(tmp_path / "other.pth", mae)
    for file, norm, expected in (
        (other, "yes", True), (other, "no", False), (other, "auto", None),
        (save(tmp_path / "own.pth", mae, args=FLAGS | {"norm_pix_loss": True}), "auto", True),
        (save(tmp_path / "mae_pretrain_vit_base_full.pth", mae, args=FLAGS), "auto", False),  # the run's flag is known
    ):  # fmt: skip
        loaded = models_mae.load(file, S, (2, 2), norm)
        assert loaded.norm_pix is expected
        if expected:
            with pytest.raises(UserError, match="grey blocks.*--denorm_with_true_stats"):
                MRA(loaded.mae)
            MRA(loaded.mae, true_stats=True)
        elif expected is None:
            for true_stats in (False, True):
                with pytest.raises(UserError, match="--mae_norm_pix yes or no"):
                    MRA(loaded.mae, true_stats=true_stats)
        else:
            MRA(loaded.mae)
            with pytest.raises(UserError, match="leave it away"):
                MRA(loaded.mae, true_stats=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_positions_of_another_precision_are_the_fixed_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    mae = tiny()
    state = {k: v.to(dtype) for k, v in mae.state_dict().items()}
    checkpoint.save(tmp_path / "a.pth", {"model": state, "args": FLAGS})
    loaded = models_mae.load(tmp_path / "a.pth", S).mae
    assert torch.equal(loaded.pos_embed[0], sincos_positions(16, 4)) and loaded.pos_embed.dtype == torch.float32
    assert torch.equal(loaded.norm.weight, mae.norm.weight.to(dtype).float())
    again = {k: v.float() for k, v in state.items()}  # rounded once, stored wide
    checkpoint.save(tmp_path / "b.pth", {"model": again, "args": FLAGS})
    assert torch.equal(models_mae.load(tmp_path / "b.pth", S).mae.decoder_pos_embed, mae.decoder_pos_embed)
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + 0.01
    checkpoint.save(tmp_path / "c.pth", {"model": state, "args": FLAGS})
    with pytest.raises(UserError, match="decoder_pos_embed is not the fixed sin-cos table of 4 x 4"):
        models_mae.load(tmp_path / "c.pth", S)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mask_ratio": 1.5}, "mask_ratio 1.5"),
        ({"prob": -0.1}, "mra_prob -0.1"),
        ({"strategy": "low"}, "low: unknown"),
        ({"compose": "blend"}, "blend: unknown"),
        ({"source": "x"}, "x: unknown"),
    ],
)
def test_bad_flags(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MRA(tiny(), **flags)


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match="16 does not divide over 3 heads"):
        MAE(S, Size(4, (16, 1, 3), (8, 1, 2)))
    with pytest.raises(UserError, match="18 pixels do not divide into patches of 4"):
        MAE(18, TINY)
    with pytest.raises(UserError, match="--model nosuch"):
        models_mae.resolve("nosuch", {})
    own = models_mae.resolve("mae_mini_patch16", {"enc_dim": 96, "dec_depth": 2})
    assert own == Size(16, (96, 12, 3), (192, 2, 3))
