"""What a training step of bingo's scripts feeds to what: every view is of one recognisable colour."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bingo import cutmix, losses, main_moco, main_teacher
from bingo.arch import build, mlp_head
from bingo.builder import BINGO, MoCo, Queue
from bingo.data import VIEWS, Views, load_bags, save_bags
from shared_utils import augment, checkpoint, feed
from shared_utils.data import image_folder

COUNT, SIZE, BATCH = 24, 16, 8
FLAGS = (
    f"--img_size {SIZE} --batch_size {BATCH} --moco_k 16 --end_epoch 2 --workers 0 --threads 1 --log-every 1 "
    "--aug_backend pil"
).split()
DRAWS = {"add_posq": 0, "add_posk": 1, "key": 2, "query": 3}  # the order in which the views of an item are drawn
TEACHER_DRAWS = {"key": 0, "query": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 images, number i of the red value 10 i."""
    root = tmp_path_factory.mktemp("colours")
    for i in range(COUNT):
        path = root / "train" / f"class{i // 8}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(path)
    return root


@pytest.fixture(scope="module")
def corr(data, tmp_path_factory) -> Path:
    """The bag of image i: i + 5."""
    path = tmp_path_factory.mktemp("corr") / "bags.npy"
    save_bags(path, (np.arange(COUNT)[:, None] + 5) % COUNT, image_folder(data / "train"), "knn")
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    net = build("resnet10", 4, "cifar")
    net.fc = mlp_head(net.num_features, 8, 16)
    with torch.no_grad():
        for _ in range(20):  # statistics that tell the colours apart
            net(torch.rand(16, 3, SIZE, SIZE))
    path = tmp_path_factory.mktemp("teacher") / "checkpoint.pth"
    checkpoint.save(path, {"state_dict": {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}})
    return path


class Colours:
    """An augmentation: red tells the image, green which draw of an item it is, of `draws`."""

    def __init__(self, draws: int):
        self.draws, self.calls = draws, 0

    def __call__(self, image: Image.Image) -> Tensor:
        x = torch.zeros(3, SIZE, SIZE)
        x[0], x[1] = float(np.asarray(image)[0, 0, 0]) / 10 / COUNT, (self.calls % self.draws) / self.draws
        self.calls += 1
        return x


def image_of(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * COUNT).round().long().tolist()


class Spy:
    """What happens in the steps of a run, in its order: (name, arguments or inputs, outputs)."""

    def __init__(self, monkeypatch, module: Any, kind: type[Queue], draws: int):
        self.events: list[tuple[str, Any, Any]] = []
        note = self.events.append

        class Spied(kind):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any):
                super().__init__(*args)
                self.encoder_q.register_forward_hook(lambda _, x, z: note(("student", x[0].clone(), z)))

            def embed_keys(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
                out = super().embed_keys(x, generator)
                note(("keys", (x.clone(), None if generator is None else generator.initial_seed()), out))
                return out

            def update_key_encoder(self) -> None:
                before = [p.clone() for e in (self.encoder_k, self.encoder_q) for p in e.parameters()]
                super().update_key_encoder()
                note(("momentum", before, [p.clone() for p in self.encoder_k.parameters()]))

            def enqueue(self, keys: Tensor) -> None:
                before = self.queue.clone(), int(self.queue_ptr)
                super().enqueue(keys)
                note(("enqueue", (keys, *before), self.queue.clone()))

        def spied(name: str, function: Any) -> Any:
            def call(*args: Any) -> Any:
                # The queue is compared as it was at the call, before anything was enqueued.
                seen = [a.clone() if isinstance(a, Tensor) and a.shape == (8, 16) else a for a in args]
                out = function(*args)
                note((name, seen, out))
                return out

            return call

        monkeypatch.setattr(module, kind.__name__, Spied)
        monkeypatch.setattr(module, "moco_v2", lambda size: Colours(draws))
        for name in ("release_groups", "paper_loss"):
            monkeypatch.setattr(losses, name, spied(name, getattr(losses, name)))
        monkeypatch.setattr(cutmix, "mix_shares", spied("mix", cutmix.mix_shares))
        sgd_step = torch.optim.SGD.step
        monkeypatch.setattr(
            torch.optim.SGD, "step", lambda self, *a: (note(("update", None, None)), sgd_step(self, *a))[1]
        )

    def steps(self) -> list[list[tuple[str, Any, Any]]]:
        """The events of each step; a step ends when its keys are enqueued."""
        ends = [i + 1 for i, (name, _, _) in enumerate(self.events) if name == "enqueue"]
        return [self.events[a:b] for a, b in zip([0, *ends], ends)]


def named(step: list[tuple[str, Any, Any]], name: str) -> list[tuple[Any, Any]]:
    return [(seen, out) for event, seen, out in step if event == name]


def is_view(x: Tensor, draw: int, draws: int) -> bool:
    """All pixels of all images come from this draw."""
    return torch.equal(x[:, 1], torch.full_like(x[:, 1], draw / draws))


@pytest.fixture
def steps(data, teacher, corr, tmp_path, monkeypatch):
    """Run main_moco with these flags; the events of its six steps."""
    monkeypatch.setattr(main_moco, "estimated_minutes", lambda *_: "not estimated")

    def run(*extra: str) -> list[list[tuple[str, Any, Any]]]:
        spy = Spy(monkeypatch, main_moco, BINGO, 2 if "intra" in extra else 4)
        flags = "--t_arch resnet10 --t_width 4 --t_stem cifar --s_arch resnet10 --s_width 4 --s_stem cifar --hidden 16"
        paths = ["--data_dir", str(data), "--pretrain_path", str(teacher), "--corr_npy", str(corr)]
        more = "--clus_pos_num 1 --check_teacher 0 --warmup_epochs 1 --init_lr 0.1".split()
        assert main_moco.main([*FLAGS, *flags.split(), *paths, *more, "--output-dir", str(tmp_path), *extra]) == 0
        assert len(spy.steps()) == 6
        return spy.steps()

    return run


def enqueued(step: list[tuple[str, Any, Any]], number: int, key: Tensor) -> None:
    """T_a of this step, and only it, replaces the oldest columns, after the student's update."""
    (((keys, before, pointer), after),) = named(step, "enqueue")
    assert torch.equal(keys, key) and pointer == number * BATCH % 16
    assert torch.equal(after[:, pointer : pointer + BATCH], key.T)
    rest = [c for c in range(16) if not pointer <= c < pointer + BATCH]
    assert torch.equal(after[:, rest], before[:, rest])
    assert [name for name, _, _ in step][-2:] == ["update", "enqueue"]


@pytest.mark.parametrize("flags", ["--teacher_bn eval", "--teacher_bn train --bn_splits 2", "--one_pass"])
def test_release_step(flags, steps):
    """Which view goes to which network, and which output is which argument of the loss."""
    all_mu = []
    for number, step in enumerate(steps(*flags.split())):
        (((x_a, seed_a), t_a), ((x_p, seed_p), t_p)) = named(step, "keys")
        assert is_view(x_a, DRAWS["key"], 4) and is_view(x_p, DRAWS["add_posk"], 4)
        anchors = image_of(x_a)
        members = [(i + 5) % COUNT for i in anchors]
        assert len(set(anchors)) == BATCH and image_of(x_p) == members
        if "train" in flags:  # dealt anew over the splits, and not alike for both
            assert seed_a is not None and seed_a != seed_p
        else:
            assert seed_a is seed_p is None

        # The pasted view is of the member, and mu the share of the pixels that are still the query's.
        ((query, posq, boxes), (mix, mu)) = named(step, "mix")[0]
        assert is_view(query, DRAWS["query"], 4) and is_view(posq, DRAWS["add_posq"], 4)
        assert image_of(query) == anchors and image_of(posq) == members
        own = (mix[:, 1] == DRAWS["query"] / 4).double().mean((1, 2))
        pasted = (mix[:, 1] == DRAWS["add_posq"] / 4).double().mean((1, 2))
        torch.testing.assert_close(mu, own)
        torch.testing.assert_close(own + pasted, torch.ones(BATCH, dtype=torch.float64))
        assert len(boxes) == (2 if "splits" in flags else 1)
        all_mu.append(mu)

        passes = named(step, "student")
        if "one_pass" in flags:
            ((x, z),) = passes
            passes = list(zip(x.chunk(3), z.chunk(3)))
        assert len(passes) == 3 and all(torch.equal(x, view) for (x, _), view in zip(passes, (query, posq, mix)))
        z = [F.normalize(out.float(), dim=1) for _, out in passes]

        ((seen, _),) = named(step, "release_groups")
        for mine, expected in zip(seen[:5], (*z, t_a, t_p)):
            assert torch.equal(mine, expected)
        (((_, before, _), _),) = named(step, "enqueue")
        assert torch.equal(seen[5], before) and seen[6] == 0.2  # against the queue as it was
        assert seen[7] == ((1.0, 0.0) if number < 3 else (0.5, 0.5))  # three steps are an epoch of warm-up
        assert torch.equal(seen[8], mu)
        assert not torch.allclose(t_a, t_p) and not torch.allclose(z[0], z[1])
        enqueued(step, number, t_a)
    assert len(torch.stack(all_mu).unique()) > 3  # boxes are drawn anew


def test_two_groups_without_cutmix(steps):
    for number, step in enumerate(steps("--mix", "none", "--lam", "0.7,0.3")):
        (query, _), (posq, _) = named(step, "student")
        assert is_view(query, DRAWS["query"], 4) and is_view(posq, DRAWS["add_posq"], 4)
        ((seen, _),) = named(step, "release_groups")
        assert not named(step, "mix") and seen[2] is None
        assert seen[7] == ((1.0, 0.0) if number < 3 else (0.7, 0.3))
        ((_, t_a), (_, t_p)) = named(step, "keys")
        assert torch.equal(seen[3], t_a) and torch.equal(seen[4], t_p)
        enqueued(step, number, t_a)


def test_paper_step_has_one_target(steps):
    for number, step in enumerate(steps("--loss", "paper")):
        (((x_a, _), t_a),) = named(step, "keys")
        assert is_view(x_a, DRAWS["key"], 4)
        (query, out_a), (posq, out_p) = named(step, "student")
        assert is_view(query, DRAWS["query"], 4) and is_view(posq, DRAWS["add_posq"], 4)
        assert image_of(query) == image_of(x_a) and image_of(posq) == [(i + 5) % COUNT for i in image_of(x_a)]
        (((z_a, z_p, target, queue, tau), _),) = named(step, "paper_loss")
        assert torch.equal(z_a, F.normalize(out_a, dim=1)) and torch.equal(z_p, F.normalize(out_p, dim=1))
        assert torch.equal(target, t_a) and torch.equal(queue, named(step, "enqueue")[0][0][1]) and tau == 0.2
        enqueued(step, number, t_a)


def test_intra_step_has_no_member(steps, tmp_path):
    log = []
    for number, step in enumerate(steps("--loss", "intra")):
        (((x_a, _), t_a),) = named(step, "keys")
        ((query, out),) = named(step, "student")
        assert is_view(x_a, TEACHER_DRAWS["key"], 2) and is_view(query, TEACHER_DRAWS["query"], 2)
        assert image_of(query) == image_of(x_a)
        before = named(step, "enqueue")[0][0][1]
        logits = torch.cat([(F.normalize(out, dim=1) * t_a).sum(1, True), F.normalize(out, dim=1) @ before], 1) / 0.2
        log.append(float(F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long)).detach()))
        enqueued(step, number, t_a)
    written = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == pytest.approx(log, rel=1e-5)


def test_teacher_step_moves_the_key_encoder_between_query_and_keys(data, tmp_path, monkeypatch):
    """MoCo v2: with the weights of before the step; the key is another view of the query's image."""
    spy = Spy(monkeypatch, main_teacher, MoCo, 2)
    flags = "--arch resnet10 --width 4 --stem cifar --moco_dim 8 --moco_m 0.9 --bn_splits 2 --init_lr 0.1".split()
    assert main_teacher.main([*FLAGS, *flags, "--data_dir", str(data), "--output-dir", str(tmp_path)]) == 0
    steps = spy.steps()
    assert len(steps) == 6
    written = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    last: list[Tensor] = []
    for number, step in enumerate(steps):
        assert [name for name, _, _ in step] == ["student", "momentum", "keys", "update", "enqueue"]
        ((query, out),), (((x_k, seed), k),) = named(step, "student"), named(step, "keys")
        assert is_view(query, TEACHER_DRAWS["query"], 2) and is_view(x_k, TEACHER_DRAWS["key"], 2)
        assert image_of(query) == image_of(x_k) and seed is not None
        ((before, after),) = named(step, "momentum")
        half = len(before) // 2
        for k0, q0, got in zip(before[:half], before[half:], after, strict=True):
            torch.testing.assert_close(got, 0.9 * k0 + 0.1 * q0)
        assert number == 0 or all(torch.equal(a, b) for a, b in zip(last, before))  # nothing else moves it
        last = after
        z, queue = F.normalize(out, dim=1), named(step, "enqueue")[0][0][1]
        logits = torch.cat([(z * k).sum(1, True), z @ queue], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        assert written[number] == pytest.approx(float(loss.detach()), rel=1e-5)
        enqueued(step, number, k)


def test_views_of_a_batch_are_of_the_anchor_and_of_a_member(data, corr):
    images = image_folder(data / "train")
    recipe, rows = augment.plain(SIZE, "batch"), torch.arange(COUNT)  # moves no colour
    for bags, names in ((load_bags(corr, images, 1)[0], VIEWS), (None, VIEWS[:2])):
        views = feed.keyed(Views(images, recipe, bags), 0, "batch").__getitems__([(0, i) for i in range(COUNT)])
        assert len(views) == len(names)
        for name, view in zip(names, views):
            own = (augment.denormalise(view)[:, 0, 2, 2] * 25.5).round().long()
            assert own.equal((rows + 5) % COUNT if "pos" in name else rows), name
