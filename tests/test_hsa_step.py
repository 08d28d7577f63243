"""What a step of hsa's pretraining feeds to what: every view is of one recognisable colour."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hsa import losses, main_moco
from hsa.builder import CsMl
from hsa.data import Neighbours, Views, training_images
from shared_utils import augment, checkpoint, feed
from shared_utils.run import Run

COUNT, SIZE, BATCH = 24, 16, 8
FLAGS = (
    f"--img_size {SIZE} --arch resnet10 --width 4 --stem cifar_pool --moco_dim 8 --moco_k 16 --batch_size {BATCH} "
    "--bn_splits 2 --moco_m 0.9 --init_lr 0.1 --clus_pos_num 2 --cluster_freq 5 --warmup_epochs 1 --end_epoch 2 "
    "--neighbours random --workers 0 --threads 1 --log-every 1 --aug_backend pil"
).split()
CROSS = {"add_posq": 0, "add_posk": 1, "key": 2, "query": 3}  # the order in which the views of an item are drawn
MOCO = {"key": 0, "query": 1}
SMALL_CROP = 0.9  # green of the small crops


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 images, number i of the red value 10 i."""
    root = tmp_path_factory.mktemp("colours")
    for i in range(COUNT):
        path = root / "train" / f"class{i // 8}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(path)
    return root


def red(image: Image.Image, green: float, size: int = SIZE) -> Tensor:
    """[3, size, size]: red tells the image."""
    x = torch.full((3, size, size), green)
    x[0] = float(np.asarray(image)[0, 0, 0]) / 10 / COUNT
    return x


class Colours:
    """An augmentation: red tells the image, green which draw of an item it is, of `draws`."""

    def __init__(self, draws: int):
        self.draws, self.calls = draws, 0

    def __call__(self, image: Image.Image) -> Tensor:
        self.calls += 1
        return red(image, ((self.calls - 1) % self.draws) / self.draws)


def image_of(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * COUNT).round().long().tolist()


def is_view(x: Tensor, green: float) -> bool:
    """All pixels of all images come from this draw."""
    return torch.equal(x[:, 1], torch.full_like(x[:, 1], green))


Event = tuple[str, Any, Any]


@pytest.fixture
def steps(data, tmp_path, monkeypatch):
    """Run main_moco with these flags; of each of its six steps (name, inputs, outputs) in their order."""

    def run(*extra: str) -> list[list[Event]]:
        events: list[Event] = []

        class Spied(CsMl):
            def forward(self, views: list[Tensor]) -> list[Tensor]:
                z = super().forward(views)
                events.append(("query", [x.clone() for x in views], z))
                return z

            def update_key_encoder(self) -> None:
                before = copy.deepcopy([list(e.parameters()) for e in (self.encoder_k, self.encoder_q)])
                super().update_key_encoder()
                events.append(("momentum", before, copy.deepcopy(list(self.encoder_k.parameters()))))

            def embed_keys(self, x: Tensor, generator: torch.Generator) -> list[Tensor]:
                keys = super().embed_keys(x, generator)
                events.append(("keys", (x.clone(), generator.initial_seed()), keys))
                return keys

            def enqueue(self, keys: list[Tensor]) -> None:
                before = [queue.clone() for queue in self.queues], int(self.queue_ptr)
                super().enqueue(keys)
                events.append(("enqueue", (keys, *before), [queue.clone() for queue in self.queues]))

        loss, sgd_step, log = losses.multi_positive, torch.optim.SGD.step, Run.log

        def multi_positive(z: Tensor, keys: Tensor, weights: Tensor, queue: Tensor, tau: float) -> Tensor:
            groups = loss(z, keys, weights, queue, tau)
            events.append(("loss", (z, keys, weights, queue.clone(), tau), groups.detach()))
            return groups

        def sgd(self, *args):
            events.append(("update", None, None))
            return sgd_step(self, *args)

        def logged(self, value, **more):
            events.append(("log", float(value), None))
            log(self, value, **more)

        monkeypatch.setattr(main_moco, "CsMl", Spied)
        monkeypatch.setattr(losses, "multi_positive", multi_positive)
        monkeypatch.setattr(torch.optim.SGD, "step", sgd)
        monkeypatch.setattr(Run, "log", logged)
        monkeypatch.setattr(augment, "moco_v2", lambda size, least: Colours(2 if "moco" in extra else 4))
        monkeypatch.setattr(main_moco, "small_crop", lambda size: lambda image: red(image, SMALL_CROP, size))
        flags = [*FLAGS, "--data_dir", str(data), "--output-dir", str(tmp_path), *extra]
        if "moco" in extra:
            at = flags.index("--neighbours")
            del flags[at : at + 2]
        assert main_moco.main(flags) == 0
        ends = [i + 1 for i, (name, _, _) in enumerate(events) if name == "log"]
        assert len(ends) == 6
        return [events[a:b] for a, b in zip([0, *ends], ends)]

    return run


def named(step: list[Event], name: str) -> list[tuple[Any, Any]]:
    return [(seen, out) for event, seen, out in step if event == name]


def check_frame(steps: list[list[Event]], keys: int, levels: int) -> None:
    """What all arms share: the order of a step, the momentum update, the queues."""
    order = ["query", "momentum", *["keys"] * keys, *["loss"] * levels, "update", "enqueue", "log"]
    last: list[Tensor] = []
    for number, step in enumerate(steps):
        assert [name for name, _, _ in step] == order
        (((k0, q0), after),) = named(step, "momentum")
        for own, query, got in zip(k0, q0, after, strict=True):  # the query's weights of before this step's update
            torch.testing.assert_close(got, 0.9 * own + 0.1 * query)
        assert number == 0 or all(torch.equal(a, b) for a, b in zip(last, k0))  # nothing else moves it
        last = after
        # k_q, the first keys, and they alone replace the oldest columns of each level.
        (((enqueued, before, pointer), queues),) = named(step, "enqueue")
        anchors = named(step, "keys")[0][1]
        assert pointer == number * BATCH % 16 and len(queues) == levels == len(enqueued) == len(anchors)
        rest = [c for c in range(16) if not pointer <= c < pointer + BATCH]
        for own, key, old, new in zip(enqueued, anchors, before, queues):
            assert torch.equal(own, key) and torch.equal(new[:, pointer : pointer + BATCH], key.T)
            assert torch.equal(new[:, rest], old[:, rest])
        # The loss of a level: its query embeddings and keys, against its queue as it was.
        z = named(step, "query")[0][1]
        for level, ((own, positives, _, queue, tau), _) in enumerate(named(step, "loss")):
            assert torch.equal(own, z[level]) and torch.equal(queue, before[level]) and tau == 0.2
            assert positives.shape[1] == keys
            for which, (_, key) in enumerate(named(step, "keys")):
                assert torch.equal(positives[:, which], key[level])


def check_keys(step: list[Event], index: Tensor) -> tuple[list[int], list[int]]:
    """k_q is of the images' own view, k_p of the neighbours' second one; returns who the images and neighbours are."""
    ((x_q, seed_q), k_q), ((x_p, seed_p), k_p) = named(step, "keys")
    assert is_view(x_q, CROSS["key"] / 4) and is_view(x_p, CROSS["add_posk"] / 4)
    anchors, members = image_of(x_q), image_of(x_p)
    assert len(set(anchors)) == BATCH and all(j in index[i].tolist() for i, j in zip(anchors, members))
    assert seed_q != seed_p  # dealt anew for each
    assert not torch.allclose(k_q[0], k_p[0])
    return anchors, members


@pytest.mark.parametrize("flags", ["", "--inter_weight 0.5"])
def test_release_step(flags, steps, tmp_path):
    run = steps(*flags.split())
    index = checkpoint.load(tmp_path / "checkpoint.pth")["neighbours"]["index"]
    check_frame(run, 2, 2 if flags else 1)
    ratios = []
    for number, step in enumerate(run):
        anchors, members = check_keys(step, index)
        query, posq, mix = named(step, "query")[0][0]
        assert is_view(query, CROSS["query"] / 4) and is_view(posq, CROSS["add_posq"] / 4)
        assert image_of(query) == anchors and image_of(posq) == members
        own = mix[:, 1] == CROSS["query"] / 4
        pasted = mix[:, 1] == CROSS["add_posq"] / 4
        assert bool((own | pasted).all())
        mu = own.double().mean((1, 2))  # the share of the query's pixels weighs its own key
        a, b = (1.0, 0.0) if number < 3 else (0.5, 0.5)
        for level, ((_, _, weights, _, _), _) in enumerate(named(step, "loss")):
            assert weights.shape == (3, BATCH, 2), level
            assert torch.equal(weights[0], torch.tensor([a, b], dtype=torch.float64).expand(BATCH, 2))
            assert torch.equal(weights[1], torch.tensor([b, a], dtype=torch.float64).expand(BATCH, 2))
            torch.testing.assert_close(weights[2], torch.stack([mu, 1 - mu], 1))
        groups = [out.mean() for _, out in named(step, "loss")]
        total = groups[0] if not flags else groups[0] + 0.5 * groups[1]
        assert named(step, "log")[0][0] == pytest.approx(float(total), rel=1e-6)
        ratios.append(mu)
    assert len(torch.stack(ratios).unique()) > 6  # a box for each share and step


def test_lam_is_of_the_own_key_and_of_the_other(steps):
    run = steps("--mix", "none", "--lam", "0.7,0.3")
    check_frame(run, 2, 1)
    for number, step in enumerate(run):
        query, posq = named(step, "query")[0][0]
        assert is_view(query, CROSS["query"] / 4) and is_view(posq, CROSS["add_posq"] / 4)
        a, b = (1.0, 0.0) if number < 3 else (0.7, 0.3)
        assert named(step, "loss")[0][0][2][:, 0].tolist() == [[a, b], [b, a]]


def test_small_crops_are_of_the_image_and_weigh_as_its_query(steps):
    run = steps("--mode", "paper", "--crops", "2", "--crop_size", "8")
    check_frame(run, 2, 2)
    for step in run:
        views = named(step, "query")[0][0]
        assert [x.shape[2] for x in views] == [SIZE] * 3 + [8] * 2
        assert image_of(views[3]) == image_of(views[4]) == image_of(views[0])
        assert is_view(views[3], SMALL_CROP) and is_view(views[4], SMALL_CROP)
        weights = named(step, "loss")[0][0][2]
        assert torch.equal(weights[3], weights[0]) and torch.equal(weights[4], weights[0]) and len(weights) == 5


def test_moco_step(steps):
    run = steps("--mode", "moco")
    check_frame(run, 1, 1)
    for step in run:
        (query,) = named(step, "query")[0][0]
        (((x, _), _),) = named(step, "keys")
        assert is_view(query, MOCO["query"] / 2) and is_view(x, MOCO["key"] / 2) and image_of(query) == image_of(x)
        assert named(step, "loss")[0][0][2].tolist() == [[[1.0]]]


def test_views_of_a_batch_are_of_the_image_and_of_one_neighbour(data):
    images = training_images(data)
    nearby = Neighbours(images, 2, 0)
    nearby.set(torch.stack([torch.arange(COUNT) + 5, torch.arange(COUNT) + 9], 1) % COUNT, 0)
    recipe = augment.plain(SIZE, "batch")  # moves no colour
    views = Views(images, recipe, nearby, 3, augment.plain(SIZE // 2, "batch"))
    rows = torch.arange(COUNT)
    x = feed.keyed(views, 0, "batch").__getitems__([(0, i) for i in range(COUNT)])
    found = {name: (augment.denormalise(view)[..., 0, 2, 2] * 25.5).round().long() for name, view in x.items()}
    assert found["query"].equal(rows) and found["key"].equal(rows) and found["small"].equal(rows[:, None].expand(-1, 3))
    gap = (found["add_posq"] - rows) % COUNT
    assert set(gap.tolist()) == {5, 9} and found["add_posk"].equal(found["add_posq"])
