"""--init and predictions as CSV."""

import csv

import pytest
import timm
import torch
import torchvision

from shared_utils import UserError, checkpoint, predictions
from shared_utils.init import initialise


def same(a, b):
    return all(torch.equal(value, b[key]) for key, value in a.items() if key in b and not key.startswith("fc"))


def test_a_network_starts_from_a_file_a_run_and_moco(tmp_path):
    source = torchvision.models.resnet18(num_classes=7)
    moco = {f"module.encoder_q.{key}": value for key, value in source.state_dict().items()}
    files = {
        "plain.pth": source.state_dict(),
        "my run/checkpoint.pth": {"state_dict": moco | {"module.queue": torch.zeros(3, 4)}, "args": {"epochs": 3}},
        "old.pth": {k: v for k, v in source.state_dict().items() if "num_batches" not in k},
    }
    for name, content in files.items():
        checkpoint.save(tmp_path / name, content)
    for spec in ("plain.pth", "my run", "old.pth"):
        network = torchvision.models.resnet18(num_classes=3)
        network.fc = torch.nn.Identity()
        report = initialise(network, str(tmp_path / spec))
        assert report.startswith(f"{tmp_path / spec}: loaded {100 if spec == 'old.pth' else 120} tensors")
        assert same(network.state_dict(), source.state_dict())


def test_another_network_is_refused_and_nothing_changed(tmp_path):
    checkpoint.save(tmp_path / "r18.pth", torchvision.models.resnet18().state_dict())
    network = torchvision.models.resnet50()
    network.fc = torch.nn.Identity()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=r"--init .*r18.pth: .*missing.*--arch"):
        initialise(network, str(tmp_path / "r18.pth"))
    assert same(before, network.state_dict())


def test_timm_gives_its_weights_by_name(monkeypatch):
    timms = timm.create_model("resnet18", num_classes=0)

    def create(name, pretrained, num_classes):
        assert (name, pretrained, num_classes) == ("resnet18", True, 0)
        return timms

    monkeypatch.setattr(timm, "create_model", create)
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    assert "left new 0" in initialise(network, "timm:resnet18")
    assert same(network.state_dict(), timms.state_dict())


def test_an_unknown_name_of_timm_is_one_line():
    with pytest.raises(UserError, match="--init timm:resnet5: timm cannot give it .*list_models"):
        initialise(torchvision.models.resnet18(), "timm:resnet5")


def test_predictions_keep_order_names_and_confidence(tmp_path):
    files = ["a, b.jpg", 'in "quotes".png', "ü/x y.png"]
    paths = [tmp_path / "my photos" / name for name in files]
    (tmp_path / "my photos").mkdir()
    said = predictions.write_csv(
        tmp_path / "out" / "p.csv",
        tmp_path / "my photos",
        paths,
        ["cat", "dog"],
        torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.4, 0.6]]),
    )
    with open(tmp_path / "out" / "p.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    assert rows == [["file", "class", "confidence"], [files[0], "dog", "0.7500"], [files[1], "cat", "0.9000"],
                    [files[2], "dog", "0.6000"]]  # fmt: skip
    assert "3 files" in said and "dog 2, cat 1" in said
