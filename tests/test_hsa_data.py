"""What hsa sees of an image: neighbours, their controls, and the views."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from hsa.data import Neighbours, Views, order_hash
from shared_utils import UserError
from shared_utils.data import ImageList, Keyed
from shared_utils.run import worker_init


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit vectors along the last axis."""
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    ).to(dtype)


@pytest.fixture
def images(tmp_path) -> ImageList:
    """Twelve images of one grey each, 20 i, in three classes of four."""
    samples = []
    for i in range(12):
        path = tmp_path / f"class{i // 4}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (20 * i,) * 3).save(path)
        samples.append((path, i // 4))
    return ImageList(samples, ["class0", "class1", "class2"])


def grey(image: Image.Image) -> Tensor:
    """Which image it is."""
    return torch.tensor(np.asarray(image)[0, 0, 0] // 20).long()


def test_planted_clusters_are_found_without_the_image_itself(images):
    nearby = Neighbours(images, 3, 0)
    centres = torch.eye(3).repeat_interleave(4, 0)
    feats = F.normalize(centres + 0.05 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    nearby.set(nearby.nearest(feats, torch.device("cpu")), 0)
    assert nearby.purity == 100
    duplicates = torch.eye(3).repeat_interleave(4, 0)  # all four of a class are equal
    index = nearby.nearest(duplicates, torch.device("cpu"))
    for i, row in enumerate(index.tolist()):
        assert i not in row and sorted(row) == [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]


def test_controls_draw_other_images(images):
    nearby = Neighbours(images, 5, 3)
    own = torch.arange(12)[:, None]
    a, b = nearby.random(0), nearby.random(5)
    assert (a != own).all() and not torch.equal(a, b) and torch.equal(a, nearby.random(0))
    assert a.min() >= 0 and a.max() == 11 and not torch.equal(a, Neighbours(images, 5, 4).random(0))
    many = torch.cat([nearby.random(e)[0] for e in range(400)])  # uniform over the other eleven
    assert torch.bincount(many, minlength=12)[1:].min() > 120 and (many != 0).all()
    label = nearby.same_label(0)
    assert (label != own).all() and (label // 4 == own // 4).all()
    lonely = images.take(slice(5))
    with pytest.raises(UserError, match="two images a class, class number 1 has one"):
        Neighbours(lonely, 2, 0).same_label(0)
    with pytest.raises(UserError, match="--clus_pos_num 5 needs more than 5 images, the data has 5"):
        Neighbours(lonely, 5, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_see_a_refresh(images, workers):
    nearby = Neighbours(images, 2, 0)
    loader = DataLoader(
        Keyed(Views(images, grey, nearby), 0), batch_sampler=[[(0, i) for i in range(12)]], num_workers=workers,
        persistent_workers=workers > 0, worker_init_fn=worker_init,
    )  # fmt: skip
    for epoch, shift in itertools.product((0, 1), (1, 5)):
        nearby.set(((torch.arange(12) + shift) % 12)[:, None].repeat(1, 2), epoch)
        (batch,) = list(loader)
        assert batch["query"].tolist() == batch["key"].tolist() == list(range(12))
        assert batch["add_posq"].tolist() == batch["add_posk"].tolist() == [(i + shift) % 12 for i in range(12)]


def test_views_are_drawn_in_the_order_of_the_release(images):
    nearby, calls = Neighbours(images, 2, 0), []
    nearby.set(torch.full((12, 2), 7), 0)

    def spy(image: Image.Image) -> Tensor:
        calls.append(int(grey(image)))
        return torch.tensor(len(calls))

    item = Views(images, spy, nearby, 2, spy)[3]
    assert calls == [7, 7, 3, 3, 3, 3]
    assert {k: v.tolist() for k, v in item.items()} == {
        "add_posq": 1, "add_posk": 2, "key": 3, "query": 4, "small": [5, 6],
    }  # fmt: skip
    assert set(Views(images, spy)[3]) == {"query", "key"}


def test_without_a_search_there_are_no_views(images):
    """Rather than views of the last image, which is what the index -1 would give."""
    nearby = Neighbours(images, 2, 0)
    with pytest.raises(RuntimeError, match="before the neighbours were searched"):
        Views(images, grey, nearby)[3]
    nearby.set(nearby.random(0), 0)
    assert set(Views(images, grey, nearby)[3]) == {"add_posq", "add_posk", "key", "query"}


def test_a_neighbour_is_drawn_at_each_access_uniformly(images):
    nearby = Neighbours(images, 3, 0)
    nearby.set(torch.tensor([[1, 5, 9]] * 12), 0)
    keyed = Keyed(Views(images, grey, nearby), 0)
    drawn = [int(keyed[(epoch, 0)]["add_posq"]) for epoch in range(300)]
    assert {drawn.count(j) > 70 for j in (1, 5, 9)} == {True} and set(drawn) == {1, 5, 9}
    assert drawn[:20] == [int(keyed[(epoch, 0)]["add_posq"]) for epoch in range(20)]


def test_neighbours_of_other_images_are_refused(images):
    nearby = Neighbours(images, 2, 0)
    nearby.set(nearby.random(4), 4)
    state = nearby.state_dict()
    fresh = Neighbours(images, 2, 0)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.index, nearby.index) and fresh.epoch == 4 and fresh.purity == nearby.purity
    reversed_ = images.take(range(len(images))[::-1])
    assert order_hash(reversed_) != order_hash(images)
    with pytest.raises(UserError, match="of other images, or of another order"):
        Neighbours(reversed_, 2, 0).load_state_dict(state)
