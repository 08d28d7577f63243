"""Networks that other programs have trained: every weight of theirs, and the input that they were trained on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.models.resnet import BasicBlock, ResNet

from sage import main_attributes, main_finegrained, main_knn, main_lincls, main_semi, train
from sage.arch import build
from sage.finetune import Classifier
from sage.lab import export
from sage.lab.finegrained_mini import write_mini
from sage.options import backbone, normalisation
from sage.weights import guess_network, input_norm
from shared_utils import UserError, checkpoint
from shared_utils.data import image_folder
from shared_utils.lab import mini

SMALL = "--img_size 32 --workers 0 --threads 1".split()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    """torchvision's network of our smallest depth, with statistics of its own."""
    torch.manual_seed(5)
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    for name, value in net.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(torch.randn_like(value) / 10)
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand_like(value))
    return net.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of coloured noise, in which a colour means a class."""
    root = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 3)):
        for y in range(5):
            folder = root / split / f"c{y}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 120, (36, 36, 3), generator=generator) + torch.tensor(
                    [25 * y, 10, 100 - 20 * y]
                )
                Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{split}{y}_{i}.jpg", quality=98)
    return root


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def mlp(*sizes: int) -> dict[str, Tensor]:
    """Keys `0.weight`, `2.weight`, ... of linear layers with activations between them."""
    return nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU()))).state_dict()


def body(net: ResNet) -> dict[str, Tensor]:
    return {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}


def moco_v1(net: ResNet) -> object:
    q = below("module.encoder_q.", body(net) | {"fc.weight": torch.ones(128, 512), "fc.bias": torch.ones(128)})
    return {"epoch": 200, "arch": "resnet50", "state_dict": {**q, "module.queue": torch.ones(128, 9)}, "optimizer": {}}


def moco_v2(net: ResNet) -> object:
    q = below("module.encoder_q.", body(net) | below("fc.", mlp(512, 512, 128)))
    k = below("module.encoder_k.", {key: value + 1 for key, value in body(net).items()})
    return {"epoch": 800, "arch": "resnet50", "state_dict": q | k | {"module.queue_ptr": torch.zeros(1)}}


def moco_v3(net: ResNet) -> object:
    q = below("module.base_encoder.", body(net) | below("fc.", mlp(512, 512, 256)))
    k = below("module.momentum_encoder.", {key: value + 1 for key, value in body(net).items()})
    return {"state_dict": {**q, **k, **below("module.predictor.", mlp(256, 512, 256))}}


def dino(net: ResNet) -> object:
    teacher = below("backbone.", body(net)) | below("head.", mlp(512, 512, 64))
    student = below("module.backbone.", {key: value + 1 for key, value in body(net).items()})
    return {"student": student, "teacher": teacher, "epoch": 800}


def swav(net: ResNet) -> object:
    heads = below("projection_head.", mlp(512, 512, 128)) | {"prototypes.weight": torch.ones(30, 128)}
    return below("module.", body(net) | heads)


def simsiam(net: ResNet) -> object:
    return {"state_dict": below("module.encoder.", body(net)) | below("module.predictor.", mlp(512, 128, 512))}


def openselfsup_moco(net: ResNet) -> object:
    """The whole training file: `backbone.*` is another name of `encoder_q.0.*`."""
    k = below("encoder_k.0.", {key: value + 1 for key, value in body(net).items()})
    neck = below("encoder_q.1.mlp.", mlp(512, 512, 128))
    return {
        "meta": {},
        "state_dict": {**below("backbone.", body(net)), **below("encoder_q.0.", body(net)), **neck, **k},
    }


FILES: dict[str, tuple[Callable[[ResNet], object], str | None]] = {
    "torchvision": (lambda net: net.state_dict(), "imagenet"),
    "timm": (lambda net: {"arch": "resnet10", "state_dict": net.state_dict()}, "imagenet"),
    "moco_v1": (moco_v1, "imagenet"),
    "moco_v2": (moco_v2, "imagenet"),
    "moco_v3": (moco_v3, "imagenet"),
    "dino": (dino, "imagenet"),
    "dino_backbone": (body, None),
    "swav": (swav, "imagenet"),
    "simsiam": (simsiam, None),
    "openselfsup_extracted": (lambda net: {"state_dict": body(net), "author": "OpenSelfSup"}, None),
    "openselfsup_moco": (openselfsup_moco, "imagenet"),
    "openselfsup_simclr": (lambda net: {"state_dict": below("backbone.", body(net))}, None),
}


@pytest.mark.parametrize("name", list(FILES))
def test_public_backbones_load_to_the_last_weight(name: str, resnet: ResNet, data: Path, tmp_path: Path) -> None:
    make, norm = FILES[name]
    file = tmp_path / f"{name}.pth"
    checkpoint.save(file, make(resnet))
    assert input_norm(str(file)) == norm
    # the evaluator of pretraining, of another size than the student, without any projector
    flags = ["--data_dir", str(data), "--evaluator", str(file), "--w_f1", "0", "--arch", "resnet18", "--width", "4"]
    args = train.get_parser().parse_args([*flags, "--evaluator_norm", norm or "imagenet", *SMALL])
    train.resolve(args)
    train.check_flags(args, 1)
    evaluator, said = train.make_evaluator(args)
    assert "resnet10, width 64, stem imagenet" in said and len(args.evaluator_sha256) == 16
    own = evaluator.state_dict()
    assert own.keys() == below("0.", body(resnet)).keys()
    assert all(torch.equal(own[f"0.{key}"], value) for key, value in body(resnet).items())
    x = torch.rand(2, 3, 32, 32)
    wanted = resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(T.Normalize(MEAN, STD)(x))))))
    found = evaluator.eval()(2 * x - 1, [2, 3, 4])
    assert torch.allclose(found[0], resnet.layer2(wanted), atol=1e-5)
    # what is missing or too much is named
    for change, message in (("lose", r"1 missing \(0.layer3.0.bn2.weight\)"), ("add", "1 unexpected")):
        broken = checkpoint.load(file)
        state = broken["teacher"] if "teacher" in broken else broken.get("state_dict", broken)
        for key in [key for key in state if key.endswith("layer3.0.bn2.weight")]:
            if change == "lose":
                del state[key]
            else:
                state[key.replace("layer3", "layer7")] = torch.ones(1)
        checkpoint.save(tmp_path / "broken.pth", broken)
        args.evaluator = str(tmp_path / "broken.pth")
        with pytest.raises(UserError, match=message):
            train.make_evaluator(args)
    if norm is None:
        args = train.get_parser().parse_args([*flags, *SMALL])
        train.resolve(args)
        with pytest.raises(UserError, match=rf"{name}.pth: does not say which mean .* --evaluator_norm imagenet"):
            train.make_evaluator(args)


def test_a_projector_is_asked_for_where_a_term_needs_it(resnet: ResNet, data: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "moco.pth", moco_v2(resnet))
    flags = [
        *SMALL,
        "--data_dir",
        str(data),
        "--evaluator",
        str(tmp_path / "moco.pth"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    flags += "--arch resnet10 --width 4 --stem cifar_pool --hid_channels 16 --out_channels 8 --imgs_per_gpu 10".split()
    flags += "--update_interval 1 --total_epochs 1 --lr 0.1 --decoder_lr 1e-3 --warmup_iters 0 --gallery 2".split()
    with pytest.raises(UserError, match=r"moco.pth: holds no projector of BYOL's form.*give --w_f1 0"):
        train.main(flags)
    assert train.main([*flags, "--w_f1", "0"]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())["flags"]
    assert config["evaluator_norm"] == "imagenet" and config["evaluator"].endswith("moco.pth")
    saved = checkpoint.load(tmp_path / "out/checkpoint.pth")["state_dict"]
    frozen = {key: value for key, value in saved.items() if key.startswith("r_function.")}
    assert all(torch.equal(frozen[f"r_function.0.{key}"], value) for key, value in body(resnet).items())
    assert len(frozen) == len(body(resnet))


def features(net: ResNet, data: Path, split: str, norm: str) -> Tensor:
    """torchvision's own pooled features under its own transforms, for either normalisation."""
    mean, std = (MEAN, STD) if norm == "imagenet" else ((0.5,) * 3, (0.5,) * 3)
    transform = T.Compose([T.Resize(37), T.CenterCrop(32), T.ToTensor(), T.Normalize(mean, std)])
    images = image_folder(data / split, transform)
    head, net.fc = net.fc, nn.Identity()
    with torch.no_grad():
        out = net(torch.stack([images[i][0] for i in range(len(images))]))
    net.fc = head
    return out


@pytest.fixture()
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What backbones got as input."""
    inputs: list[Tensor] = []
    forward = type(build("resnet10", 4)).forward

    def spy(self, x: Tensor, stages: int = 4) -> list[Tensor]:
        if x.shape[-1] == 32 and x.any():
            inputs.append(x.detach().clone())
        return forward(self, x, stages)

    monkeypatch.setattr(type(build("resnet10", 4)), "forward", spy)
    return inputs


def run(module, data: Path, file: Path, out: Path, *extra: str) -> dict:
    flags = [*SMALL, "--data_dir", str(data), "--pretrained", str(file), "--arch", "resnet10", "--output-dir", str(out)]
    assert module.main([*flags, *extra]) == 0
    return json.loads((out / "result.json").read_text())


def test_neighbours_of_a_public_network_are_those_of_torchvision(resnet: ResNet, data: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "tv.pth", resnet.state_dict())
    for flags, norm in (([], "imagenet"), (["--normalise", "half"], "half")):
        stored = tmp_path / norm
        found = run(
            main_knn,
            data,
            tmp_path / "tv.pth",
            tmp_path / f"{norm}-out",
            "--feature_dir",
            str(stored),
            "--aug_backend",
            "pil",
            *flags,
        )
        assert found["normalise"] == norm
        import numpy as np

        mine = torch.from_numpy(np.load(stored / "train.npy").astype(np.float32))
        assert torch.allclose(mine, F.normalize(features(resnet, data, "train", norm), dim=1), atol=1e-4)


EXTRA = {
    main_lincls: "--batch_size 10 --total_epochs 1 --lr 0.1",
    main_semi: "--fraction 0.5 --batch_size 10 --total_epochs 1 --lr 0.01 --head_lr_mult 1",
    main_finegrained: "--dataset aircraft --batch_size 10 --total_epochs 1",
    main_attributes: "--no_attributes --recon_updates 2 --recon_batch 4",
    main_knn: "",
}


@pytest.mark.parametrize("module", list(EXTRA), ids=lambda module: module.__name__.split("_")[-1])
def test_every_evaluation_feeds_what_the_network_was_trained_on(
    module, resnet: ResNet, data: Path, tmp_path: Path, seen: list[Tensor]
) -> None:
    """The means of all inputs tell the normalisation: 0.5 in 0..1 is 0 under one and 0.1 to 0.4 under the other."""
    root = data
    if module is main_finegrained:
        (tmp_path / "images").symlink_to(data)
        (root := tmp_path / "sets").mkdir()
        stamp = data / mini.STAMP
        stamp.write_text("1")
        write_mini("aircraft", data, root)
        stamp.unlink()
    checkpoint.save(tmp_path / "moco.pth", moco_v2(resnet))
    checkpoint.save(tmp_path / "bare.pth", body(resnet))
    extra = EXTRA[module].split()
    known = run(module, root, tmp_path / "moco.pth", tmp_path / "known", *extra)
    imagenet = torch.cat([x.flatten(2) for x in seen]).clone()
    seen.clear()
    given = run(module, root, tmp_path / "bare.pth", tmp_path / "given", *extra, "--normalise", "half")
    half = torch.cat([x.flatten(2) for x in seen])
    assert (known["normalise"], given["normalise"]) == ("imagenet", "half")
    mean, std = torch.tensor(MEAN).view(1, 3, 1), torch.tensor(STD).view(1, 3, 1)
    assert torch.allclose(imagenet, ((half + 1) / 2 - mean) / std, atol=1e-4)
    with pytest.raises(UserError, match=r"bare.pth: does not say which mean .*--normalise imagenet .*half"):
        run(module, root, tmp_path / "bare.pth", tmp_path / "none", *extra)
    assert not (tmp_path / "none").exists()


def test_what_a_decoder_recovers_is_the_same_whatever_the_backbone_sees(
    resnet: ResNet, data: Path, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "tv.pth", resnet.state_dict())
    found = [
        run(main_attributes, data, tmp_path / "tv.pth", tmp_path / norm, *EXTRA[main_attributes].split(),
            "--normalise", norm)["recon_mean_image"] for norm in ("half", "imagenet")
    ]  # fmt: skip
    assert found[0] == found[1] > 0


def test_files_that_name_their_own_training(tmp_path: Path, resnet: ResNet) -> None:
    named = below("online_net.0.", body(resnet))
    for name, held, norm in (
        ("own", {"state_dict": named, "args": {"evaluator_norm": "imagenet"}}, "half"),  # that is its evaluator's
        ("release", {"state_dict": named | {"decoder.final.bias": torch.ones(3)}}, "half"),
        ("openselfsup", {"state_dict": named}, None),
        ("bingo", {"state_dict": below("encoder_q.", body(resnet)), "args": {"arch": "resnet10"}}, "imagenet"),
        ("byol", {"state_dict": {"encoder_q.fc.fc1.weight": torch.ones(1)}}, None),
    ):
        checkpoint.save(tmp_path / f"{name}.pth", held)
        assert input_norm(str(tmp_path / f"{name}.pth")) == norm, name


def test_size_of_a_network_from_its_weights() -> None:
    for name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        assert guess_network(torchvision.models.get_model(name).state_dict()) == (name, 64, True)
    assert guess_network(build("resnet10", 8, "cifar").state_dict()) == ("resnet10", 8, False)
    assert guess_network(ResNet(BasicBlock, [2, 2, 2, 1]).state_dict()) is None
    assert guess_network({"patch_embed.proj.weight": torch.ones(1)}) is None


def test_the_export_says_what_the_input_was(tmp_path: Path, resnet: ResNet, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state, message in (
        ("tv", resnet.state_dict(), "ImageNet's mean and standard deviation"),
        ("bare", body(resnet), "which the file does not tell"),
    ):
        checkpoint.save(tmp_path / f"{name}.pth", state)
        flags = [
            "--pretrained",
            str(tmp_path / f"{name}.pth"),
            "--arch",
            "resnet10",
            "--out",
            str(tmp_path / "out.pth"),
        ]
        assert export.main(flags) == 0
        assert message in capsys.readouterr().out
    assert export.main([*flags, "--normalise", "half"]) == 0
    assert "bytes: 127.5" in capsys.readouterr().out


def test_files_of_timm_and_torchvision_as_they_are_written(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    net = timm.create_model("resnet18")
    for name in ("timm.safetensors", "timm.pth"):
        (save_file if name.endswith("safetensors") else torch.save)(net.state_dict(), tmp_path / name)
        args = main_knn.get_parser().parse_args(["--pretrained", str(tmp_path / name), "--arch", "resnet18"])
        encoder, report = backbone(args)
        assert report.endswith("input imagenet") and normalisation(args) == "imagenet"
        x = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(
                encoder.eval().pooled(x), net.eval().forward_head(net.forward_features(x), True), atol=1e-5
            )
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "timm.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut.safetensors: not a readable checkpoint"):
        checkpoint.read_weights(tmp_path / "cut.safetensors")


def test_a_fine_tuned_network_of_ours_gives_its_backbone(tmp_path: Path) -> None:
    encoder = build("resnet10", 4)
    checkpoint.save(tmp_path / "tuned.pth", {"state_dict": Classifier(encoder, 5).state_dict()})
    assert checkpoint.read_weights(tmp_path / "tuned.pth").keys() == encoder.state_dict().keys()
