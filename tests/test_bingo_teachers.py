"""Networks and teachers of bingo: names and outputs against independent networks, every published kind of file."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from bingo.arch import ARCHS, B0, build, mlp_head
from bingo.teachers import load_teacher
from shared_utils import UserError, checkpoint

X = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def settle(net: nn.Module) -> nn.Module:
    """Random weights and batch-norm statistics unlike the initial ones; eval mode."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(X)
    return net.eval()


def with_head(net: nn.Module, features: int, head: nn.Module) -> nn.Module:
    net.fc = head
    return settle(net)


def swav_style(layers: list[int], width: int, head: nn.Module) -> nn.Module:
    """torchvision's ResNet with every channel doubled, and SwAV's explicit padding before the stem."""
    net = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, layers, width_per_group=64)
    net.inplanes = width
    block = torchvision.models.resnet.Bottleneck
    net.conv1 = nn.Conv2d(3, width, 7, 2, 2, bias=False)
    net.bn1 = nn.BatchNorm2d(width)
    for i in range(4):
        setattr(net, f"layer{i + 1}", net._make_layer(block, width * 2**i, layers[i], 1 if i == 0 else 2))
    net.fc = head
    return settle(nn.Sequential(nn.ConstantPad2d(1, 0.0), net))


def embed(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(X)


def moco_file(path: Path, net: nn.Module, full: bool) -> Path:
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
    if full:
        state |= {f"module.encoder_k.{k}": torch.randn_like(v.float()) for k, v in net.state_dict().items()}
        state |= {"module.queue": torch.randn(16, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    checkpoint.save(path, {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}})
    return path


@pytest.mark.parametrize("full", [False, True], ids=["q-only", "full"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_moco_teacher_is_its_source(name, full, tmp_path):
    features = {"resnet18": 512, "resnet50": 2048}[name]
    source = with_head(getattr(torchvision.models, name)(), features, mlp_head(features, 16, 40))
    teacher, dim = load_teacher(name, moco_file(tmp_path / "moco.pth.tar", source, full), "moco")
    assert dim == 16 and torch.equal(embed(teacher), embed(source))
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    with torch.no_grad():
        pooled = teacher(X, pre_out=True)
        assert pooled.shape == (4, features) and torch.equal(teacher.fc(pooled), embed(source))


def test_first_moco_has_one_head_layer(tmp_path):
    source = with_head(torchvision.models.resnet18(), 512, nn.Linear(512, 24))
    teacher, dim = load_teacher("resnet18", moco_file(tmp_path / "v1.pth", source, False), "moco")
    assert dim == 24 and torch.equal(embed(teacher), embed(source))


def test_swav_teacher_is_its_source(tmp_path):
    head = nn.Sequential(nn.Linear(4096, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 12))
    source = swav_style([3, 4, 6, 3], 128, head)
    state = {f"module.{k}".replace(".fc.", ".projection_head."): v for k, v in source[1].state_dict().items()}
    checkpoint.save(tmp_path / "swav.pth.tar", state | {"module.prototypes.weight": torch.randn(30, 12)})
    teacher, dim = load_teacher("resnet50w2", tmp_path / "swav.pth.tar", "swav")
    assert dim == 12 and torch.equal(embed(teacher), embed(source))
    with pytest.raises(UserError, match="swav.pth.tar.*resnet50 "):  # the width of another network
        load_teacher("resnet50", tmp_path / "swav.pth.tar", "swav")


def test_swav_geometry_is_a_padding_of_three():
    torch.manual_seed(0)
    wide = build("resnet50w2", width=4).eval()
    plain = build("resnet50", width=8).eval()
    plain.load_state_dict(wide.state_dict())
    torch.testing.assert_close(embed(wide), embed(plain))


def test_torchvision_teacher_is_the_pooled_vector(tmp_path):
    source = settle(torchvision.models.resnet18())
    checkpoint.save(tmp_path / "resnet18.pth", source.state_dict())
    teacher, dim = load_teacher("resnet18", tmp_path / "resnet18.pth", "torchvision")
    with torch.no_grad():
        assert dim == 512 and torch.equal(source.fc(embed(teacher)), source(X))


def test_teacher_of_our_own_run_reads_its_head_from_the_file(tmp_path):
    net = build("resnet18", 8, "cifar_pool")
    net.fc = mlp_head(net.num_features, 20, 36)
    settle(net)
    path = moco_file(tmp_path / "checkpoint.pth", net, True)
    teacher, dim = load_teacher("resnet18", path, "moco", width=8, stem="cifar_pool")
    assert dim == 20 and torch.equal(embed(teacher), embed(net))
    with pytest.raises(UserError, match="mis-shaped"):
        load_teacher("resnet18", path, "moco")
    with pytest.raises(UserError, match="missing"):
        load_teacher("resnet34", path, "moco", width=8, stem="cifar_pool")


def test_wrong_files_are_refused(tmp_path):
    net = with_head(torchvision.models.resnet18(), 512, mlp_head(512, 16, 32))
    good = moco_file(tmp_path / "good.pth", net, False)

    def refused(path: Path, alg: str, match: str, name: str = "resnet18") -> None:
        with pytest.raises(UserError, match=match):
            load_teacher(name, path, alg)

    refused(tmp_path / "absent.pth", "moco", "no such checkpoint")
    refused(good, "swav", "looks like a moco checkpoint, expected swav")
    refused(good, "torchvision", "looks like a moco checkpoint, expected plain")
    refused(good, "moco", "missing", "resnet50")
    refused(good, "dino", "unknown")
    refused(good, "moco", "unknown", "vgg16")
    (tmp_path / "short.pth").write_bytes(good.read_bytes()[:20000])
    refused(tmp_path / "short.pth", "moco", "not a readable checkpoint")
    # keys of the wrong encoder alone, and a file with one tensor too few: both load "successfully" without strictness
    saved = checkpoint.load(good)["state_dict"]
    only_k = {k.replace("encoder_q", "encoder_k"): v for k, v in saved.items()}
    checkpoint.save(tmp_path / "k.pth", {"state_dict": only_k})
    refused(tmp_path / "k.pth", "moco", "expected moco")
    fewer = copy.copy(saved)
    del fewer["module.encoder_q.layer3.0.conv1.weight"]
    checkpoint.save(tmp_path / "fewer.pth", {"state_dict": fewer})
    refused(tmp_path / "fewer.pth", "moco", "fewer.pth.*layer3.0.conv1.weight")
    headless = {k: v for k, v in saved.items() if ".fc." not in k}
    checkpoint.save(tmp_path / "headless.pth", {"state_dict": headless})
    refused(tmp_path / "headless.pth", "moco", "fc.0.weight")


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets_have_torchvisions_names_and_lack_its_classifier_only(name):
    with torch.device("meta"):
        ours, theirs = build(name).state_dict(), getattr(torchvision.models, name)().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}


def test_student_loads_into_torchvision():
    """What a run saves, without `module.encoder_q.`: only the classifier is missing."""
    student = build("resnet18")
    student.fc = mlp_head(512)
    saved = {f"module.encoder_q.{k}": v for k, v in settle(student).state_dict().items()}
    state = {k.removeprefix("module.encoder_q."): v for k, v in saved.items() if ".encoder_q.fc." not in k}
    plain = torchvision.models.resnet18()
    plain.load_state_dict(state | {k: v for k, v in plain.state_dict().items() if k.startswith("fc.")})
    plain.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(plain.eval()(X), student(X, pre_out=True))


def test_resnet_initialisation_is_the_releases():
    torch.manual_seed(0)
    net = build("resnet50")
    for name, std in (("conv1", (2 / (49 * 64)) ** 0.5), ("layer3.0.conv2", (2 / (9 * 256)) ** 0.5)):
        assert abs(net.get_submodule(name).weight.std().item() / std - 1) < 0.02
    assert all(m.weight.eq(1).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def b0_to_timm(state: dict[str, Tensor], groups: list[int]) -> dict[str, Tensor]:
    """The release's names of EfficientNet-B0 -> timm's."""
    flat = [f"blocks.{i}.{j}." for i, n in enumerate(groups) for j in range(n)]
    parts = "_expand_conv _bn0 _depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2".split()
    first = dict(zip(parts[2:], "conv_dw bn1 se.conv_reduce se.conv_expand conv_pw bn2".split()))
    other = dict(zip(parts, "conv_pw bn1 conv_dw bn2 se.conv_reduce se.conv_expand conv_pwl bn3".split()))
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    out = {}
    for key, value in state.items():
        if key.startswith("_blocks."):
            _, number, part, leaf = key.split(".")
            out[f"{flat[int(number)]}{(other if int(number) else first)[part]}.{leaf}"] = value
        else:
            part, leaf = key.split(".")
            out[f"{top[part]}.{leaf}"] = value
    return out


@pytest.mark.parametrize("size", [64, 90])
def test_efficientnet_is_timms_port_of_the_original(size):
    ours = settle(build("efficientnet-b0"))
    theirs = timm.create_model("tf_efficientnet_b0", num_classes=0).eval()
    theirs.load_state_dict(b0_to_timm(ours.state_dict(), [row[0] for row in B0]))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert float(a.std()) > 0.05
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_efficientnet_drops_while_it_trains():
    net = build("efficientnet-b0")
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(0.01, 1e-3)}
    torch.testing.assert_close([b.drop for b in net._blocks], [0.2 * i / 16 for i in range(16)])
    torch.manual_seed(0)
    dropped = (net.train().head_input(torch.ones(64, 1280)) == 0).float().mean()
    assert abs(float(dropped) - 0.2) < 0.01
    block = net._blocks[15 - 1]  # a residual block late in the network
    block.eval()
    x = torch.randn(400, 192, 1, 1)
    with torch.no_grad():
        full = block(x) - x
        block.train()
        for m in block.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        branch = (block(x) - x).flatten(1)
    kept = branch.abs().sum(1) > 0
    assert abs(float(kept.float().mean()) - (1 - block.drop)) < 0.06
    torch.testing.assert_close(branch[kept] * (1 - block.drop), full.flatten(1)[kept], rtol=1e-3, atol=1e-5)


def test_mobilenet_is_torchvisions():
    ours = settle(build("mobilenetv3"))
    assert {(m.momentum, m.eps) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.01, 1e-3)}
    theirs = torchvision.models.mobilenet_v3_large().eval()
    rest = {k: v for k, v in theirs.state_dict().items() if k.startswith("classifier.3")}
    theirs.load_state_dict(ours.state_dict() | rest)
    with torch.no_grad():
        torch.testing.assert_close(theirs.classifier[3](ours(X)), theirs(X))


@pytest.mark.parametrize("name", ARCHS)
def test_maps_end_in_the_pooled_vector(name):
    net = settle(build(name, 4 if name.startswith("resnet") else 64))
    with torch.no_grad():
        found = net.maps(X, [0, 1, net.last_id])
        assert list(found) == [0, 1, net.last_id]
        torch.testing.assert_close(found[net.last_id].mean((2, 3)), net(X, pre_out=True))
        assert net(X).shape == (4, net.num_features)
    with pytest.raises(UserError, match="block ids"):
        net.maps(X, [net.last_id + 1])


def test_block_ids_are_the_releases():
    """layer1 = 2-4, layer2 = 5-8, layer3 = 9-14, layer4 = 15-17 of ResNet-50."""
    net = build("resnet50", 8)
    widths = {k: v.shape[1] for k, v in net.maps(X, range(18)).items()}
    assert widths == {0: 8, 1: 8} | {k: 32 * 2**i for i, (a, b) in enumerate([(2, 5), (5, 9), (9, 15), (15, 18)])
                                    for k in range(a, b)}  # fmt: skip
    assert [build(n, 4).last_id for n in ("resnet10", "resnet18", "resnet34", "resnet152")] == [5, 9, 17, 51]
    first_relu = net.maps(X, [1])[1]
    assert float(first_relu.detach().min()) == 0


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 2), ("cifar_pool", 4), ("cifar", 8)])
def test_stems(stem, size):
    net = build("resnet10", 16, stem)
    assert net.maps(X, [net.last_id])[5].shape == (4, 128, size, size)


def test_bad_requests():
    with pytest.raises(UserError, match="one width"):
        build("efficientnet-b0", 32)
    with pytest.raises(UserError, match="stem"):
        build("resnet18", stem="none")
    with pytest.raises(UserError, match="width"):
        build("resnet18", 0)
