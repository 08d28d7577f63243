"""Bags of instances, and the views of an anchor and its bag member (paper 2107.01691, release moco/folder.py)."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from shared_utils import UserError, feed
from shared_utils.data import ImageList


def order_hash(images: ImageList) -> str:
    """Hash of the relative paths in their order: bags are row numbers and mean nothing under another order."""
    if not images.classes:
        return images.fingerprint()[1]
    names = "\n".join("/".join(path.parts[-2:]) for path in images.paths())
    return hashlib.sha256(os.fsencode(names)).hexdigest()  # as they are on disk, in UTF-8 or not


class Bags:
    """For each image the indices of its bag.

    Args:
        array: [N, K] neighbour indices (kNN, random), or [N] group numbers (labels, k-means clusters): the bag is
            then everything else in the group, or the image itself where it is alone.
        teacher: what the file says of the network whose features they are of (None: nothing).
    """

    def __init__(self, array: np.ndarray, teacher: Mapping[str, Any] | None = None):
        self.array, self.teacher = array, teacher
        if array.ndim == 1:
            order = np.argsort(array, kind="stable")
            bounds = np.flatnonzero(np.diff(array[order])) + 1
            self._groups = np.split(order, bounds)
            self._order, self._first = order, np.concatenate([[0], bounds])
            self._sizes = np.diff([*self._first, len(order)])
            self._group_of = np.empty(len(array), np.int64)
            self._place = np.empty(len(array), np.int64)
            for number, members in enumerate(self._groups):
                self._group_of[members] = number
                self._place[members] = np.arange(len(members))

    def __len__(self) -> int:
        return len(self.array)

    def draw(self, index: int) -> int:
        """A member of the bag of `index`, uniformly, from numpy's global generator."""
        if self.array.ndim == 2:
            return int(np.random.choice(self.array[index]))
        members = self._groups[self._group_of[index]]
        if len(members) == 1:
            return index
        place = np.random.randint(len(members) - 1)  # skip the anchor itself
        return int(members[place + (place >= self._place[index])])

    def draw_all(self, indices: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Members of the bags of `indices` [B], uniformly, by numbers `u` [B] in 0..1."""
        if self.array.ndim == 2:
            return self.array[indices, (u * self.array.shape[1]).astype(np.int64)]
        groups = self._group_of[indices]
        sizes, place = self._sizes[groups], self._place[indices]
        other = (u * (sizes - 1)).astype(np.int64)
        return self._order[self._first[groups] + np.where(sizes == 1, 0, other + (other >= place))]


def sha256(array: np.ndarray) -> str:
    """Of an array's shape and numbers, 16 digits; a run that is resumed must have the bags that it began with."""
    array = np.ascontiguousarray(array, np.int64)
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]


def check_writable(path: Path) -> None:
    """UserError unless a file can be written beside `path`: to be known before the features are computed."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --corr_dir") from None


def save_bags(
    path: Path, array: np.ndarray, images: ImageList, kind: str, teacher: Mapping[str, Any] | None = None
) -> None:
    """The release's file (int64 .npy), and beside it a .json: the kind, the teacher, hashes of array and image order.

    Both are written beside their names and then moved there. UserError: the folder cannot be written, or is full.
    """
    array = array.astype(np.int64)
    facts = {"kind": kind, "images": len(images), "order_sha256": order_hash(images), "sha256": sha256(array)}
    facts |= {"k": array.shape[1] if array.ndim == 2 else 0, "teacher": teacher}
    names = [path, path.with_suffix(".json")]
    parts = [name.with_name(f".{name.name}.{os.getpid()}.tmp") for name in names]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(parts[0], "wb") as handle:
            np.save(handle, array)
        parts[1].write_text(json.dumps(facts) + "\n")
        for part, name in zip(parts, names):
            os.replace(part, name)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or give another folder") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def load_bags(path: Path, images: ImageList, clus_pos_num: int) -> tuple[Bags, str]:
    """Bags of a correlation file for these images, and a line that says what they are.

    Only the first `clus_pos_num` columns are used. A file without its .json (the release's own) is checked by shape
    and range alone. UserError: unreadable, of other images, in another order, or not the array of its .json.
    """
    if not path.is_file() and (Path("imgs_corr") / path).is_file():  # where the release looks
        path = Path("imgs_corr") / path
    if not path.is_file():
        raise UserError(f"{path}: no such correlation file; make it with bingo/run_knn.sh or bingo.compute_knn")
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # of many kinds
        raise UserError(f"{path}: not a readable .npy array ({' '.join(str(error).split())[:80]})") from None
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer) or len(array) != len(images):
        raise UserError(
            f"{path}: holds {array.dtype} {list(array.shape)}, expected integers [{len(images)}, K] for these images; "
            "make it anew with bingo/run_knn.sh"
        )
    kind, note, teacher = "bags", "without its .json: order of the images and teacher not checked", None
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        try:
            facts = json.loads(sidecar.read_text())
            kind, order, own, teacher = facts["kind"], facts["order_sha256"], facts.get("sha256"), facts.get("teacher")
            if teacher is not None:
                teacher = {"sha256": str(teacher["sha256"]), "name": str(teacher["name"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{sidecar}: not readable as what compute_knn writes; make the bags anew") from None
        note = "order of the images checked"
        if order != order_hash(images):
            raise UserError(f"{path}: made for other images, or another order of them; make it anew")
        if own is not None and own != sha256(array):
            raise UserError(f"{path}: not the array that {sidecar.name} describes; remove the .json, or make both anew")
    if array.ndim == 2:
        if array.shape[1] < clus_pos_num:
            raise UserError(f"{path}: {array.shape[1]} neighbours an image, --clus_pos_num asks for {clus_pos_num}")
        array = array[:, :clus_pos_num]
        if array.min() < 0 or array.max() >= len(images):
            raise UserError(f"{path}: indices {array.min()}..{array.max()} for {len(images)} images; make it anew")
    size = f"{array.shape[1]} an image" if array.ndim == 2 else f"{len(np.unique(array))} groups"
    return Bags(array.astype(np.int64), teacher), f"{path} ({kind}, {size}; {note})"


VIEWS = ("query", "key", "add_posq", "add_posk")  # of the anchor, of a member of its bag


class Views(Dataset):
    """(query, key) of an anchor, and all of VIEWS where there are bags; each [3, S, S].

    The draws come in the release's order: the member, add_posq, add_posk, key, query. Both positive views are of one
    member.
    """

    def __init__(self, images: ImageList, transform: Callable[..., Tensor], bags: Bags | None = None):
        self.images, self.transform, self.bags = images, transform, bags

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        extra: tuple[Tensor, ...] = ()
        if self.bags is not None:
            member = self.images.image(self.bags.draw(index))
            extra = (self.transform(member), self.transform(member))
        anchor = self.images.image(index)
        key, query = self.transform(anchor), self.transform(anchor)
        return query, key, *extra

    def batch(self, batch: feed.Batch) -> list[Tensor]:
        """The same of a whole batch, [B, 3, S, S] each, draws keyed (see `shared_utils.feed`)."""
        asks = [feed.Ask(batch.indices, self.transform, (0, 1))]
        if self.bags is not None:
            members = self.bags.draw_all(batch.indices, batch.uniform(1)[:, 0])
            asks.append(feed.Ask(members, self.transform, (2, 3)))
        return [view for made in batch.render(*asks) for view in made]
