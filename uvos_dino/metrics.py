"""J, F, their statistics, the matching of clusters to objects, FG-ARI and mIoU, on label maps.

J and F equal davis2017-evaluation's (BSD-3, davisvideochallenge). A frame's clusters are one map of numbers, so J of
all pairs is one joint histogram, boundaries are found once, and only what lies near an object's boundary is dilated.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from shared_utils import UserError
from shared_utils.pictures import davis_palette

VOID = 255
MAX_PROPOSALS = 300  # of the release; the official package allows 20
BOUND = 0.008  # tolerance of F over the diagonal of the image


class Scores(NamedTuple):
    """J and F of every pair in every frame, [K, O, T]."""

    J: np.ndarray
    F: np.ndarray


def disk(radius: int) -> np.ndarray:
    """Pixels [2 r + 1, 2 r + 1] at most `radius` from the centre, uint8."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def nearest_index(size: int, out: int) -> np.ndarray:
    """Source index of each of `out` pixels in PyTorch's nearest interpolation: floor of a float32 product."""
    scale = np.float32(size) / np.float32(out)
    return np.minimum(np.floor(np.arange(out, dtype=np.float32) * scale).astype(np.int64), size - 1)


def upsample(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Label maps [..., h, w] -> [..., height, width], nearest."""
    rows = np.take(labels, nearest_index(labels.shape[-2], height), -2)
    return np.take(rows, nearest_index(labels.shape[-1], width), -1)


def coloured(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clusters [h, w] in DAVIS' colours, bytes [height, width, 3]; cluster 0 is not black."""
    palette = np.array(davis_palette(), np.uint8).reshape(256, 3)
    return palette[1 + upsample(labels, height, width) % 254]


def boundary_pixels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat pixel index and label of every boundary pixel of every label of a map [H, W].

    A pixel is on the boundary of a label when that label is among the pixel, its right, lower and lower-right
    neighbour, but is not all of them; in the last row and column only the neighbour inside counts, the
    last pixel never does.
    """
    H, W = labels.shape
    across, down = labels[:, :-1] != labels[:, 1:], labels[:-1] != labels[1:]
    mixed = np.zeros((H, W), bool)
    mixed[:, :-1] |= across
    mixed[:-1] |= down
    mixed[:-1, :-1] |= labels[:-1, :-1] != labels[1:, 1:]
    y, x = np.nonzero(mixed)
    right, below = np.minimum(x + 1, W - 1), np.minimum(y + 1, H - 1)
    four = np.stack([labels[y, x], labels[y, right], labels[below, x], labels[below, right]])  # [4, B]
    where = y * W + x
    new = np.ones(four.shape, bool)  # a label that stands twice counts once
    for i in range(1, 4):
        new[i] = (four[i] != four[:i]).all(0)
    return np.broadcast_to(where, four.shape)[new], four[new]


def joint_counts(
    labels: np.ndarray, truth: np.ndarray, K: int, objects: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels [K + 1, objects + 1] that have cluster k (K: none) and object o (0: background), void left out; and
    both maps [H, W] as they count: void is no cluster and no object.
    """
    void = truth == VOID
    gt = np.where(void | (truth > objects), 0, truth).astype(np.int32)
    own = np.where(void | (labels < 0) | (labels >= K), K, labels).astype(np.int32)
    size = (K + 1) * (objects + 1)
    joint = np.bincount(np.where(void, size, own * (objects + 1) + gt).ravel(), minlength=size)[:size]
    return joint.reshape(K + 1, objects + 1), own, gt


def ious(joint: np.ndarray) -> np.ndarray:
    """J [K, O] of a table of `joint_counts`; two empty masks have J 1."""
    inter = joint[:-1, 1:].astype(np.float64)
    union = joint[:-1].sum(1)[:, None] + joint[:, 1:].sum(0) - inter
    return np.divide(inter, union, out=np.ones_like(inter), where=union > 0)


def numbers_of(truth: Iterable[np.ndarray]) -> list[int]:
    """The objects that occur in maps [H, W] of numbers, rising; 0 is background, 255 void."""
    there = np.zeros(256, bool)
    for x in truth:
        there[np.unique(x)] = True
    there[[0, VOID]] = False
    return np.flatnonzero(there).tolist()


def counted(truth: Sequence[np.ndarray], first: np.ndarray, late: str) -> tuple[list[int], list[int]]:
    """The objects that count in maps of numbers, and the place of the map from which each counts.

    Args:
        truth: the annotations that are scored; who occurs in none of them does not count.
        first: the video's first annotation.
        late: what becomes of an object that enters later. `background`: it is none, where its number is above those
            of `first` (davis2017-evaluation); `entered`: it counts from its first annotation; `frames`: in all of them.
    """
    numbers = numbers_of(truth)
    if late == "background":
        numbers = [number for number in numbers if number <= max(numbers_of([first]), default=0)]
    starts = [0] * len(numbers)
    if late == "entered":
        starts = [next(i for i, x in enumerate(truth) if (x == number).any()) for number in numbers]
    return numbers, starts


def renumber(truth: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """A map of numbers, uint8, with `numbers` as 1, 2, ...; void stays, all others become background."""
    table = np.zeros(256, np.uint8)
    table[list(numbers)], table[VOID] = np.arange(1, len(numbers) + 1), VOID
    return table[truth]


def frame_ious(labels: np.ndarray, truth: np.ndarray, clusters: int, objects: int) -> np.ndarray:
    """J [K, O] of a frame alone; K is at least O."""
    return ious(joint_counts(labels, truth, max(clusters, objects), objects)[0])


def best_mean(J: np.ndarray) -> float:
    """Mean J of the objects under the best assignment."""
    return float(J[linear_sum_assignment(-J)].sum() / J.shape[1])


def frame_scores(labels: np.ndarray, truth: np.ndarray, clusters: int, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """J and F [K, O] of a frame: cluster numbers [H, W] (0..K-1; others: none) against objects 1..O, 255: void.

    Numbers above O count as background. `renumber` makes 1..O of the objects that count.
    """
    K, H, W = clusters, *truth.shape
    joint, own, gt = joint_counts(labels, truth, K, objects)
    J = ious(joint)

    radius = math.ceil(BOUND * math.hypot(H, W))
    kernel = disk(radius)
    pixel, label = boundary_pixels(own)
    pixel, label = pixel[label < K], label[label < K]
    n_fg = np.bincount(label, minlength=K).astype(np.float64)
    F = np.zeros((K, objects))
    gt_pixel, gt_label = boundary_pixels(gt)
    for o in range(objects):
        mine = gt_pixel[gt_label == o + 1]
        n_gt = len(mine)
        if not n_gt:  # no boundary: precision 0 and recall 1 where the cluster has one, else both 1
            F[:, o] = n_fg == 0
            continue
        # Everything that matters lies within `radius` of the object's boundary.
        y, x = np.divmod(mine, W)
        y0, x0 = max(0, y.min() - radius), max(0, x.min() - radius)
        y1, x1 = min(H, y.max() + radius + 1), min(W, x.max() + radius + 1)
        edge = np.zeros((y1 - y0, x1 - x0), np.uint8)
        edge[y - y0, x - x0] = 1
        reach = cv2.dilate(edge, kernel)
        by, bx = np.divmod(pixel, W)
        inside = (by >= y0) & (by < y1) & (bx >= x0) & (bx < x1)
        by, bx, bl = by[inside] - y0, bx[inside] - x0, label[inside]
        close = reach[by, bx] > 0
        by, bx, bl = by[close], bx[close], bl[close]
        fg_match = np.bincount(bl, minlength=K)
        gt_match = np.zeros(K)
        order, ends = np.argsort(bl, kind="stable"), np.cumsum(fg_match)
        for c in np.flatnonzero(fg_match):
            at = order[ends[c] - fg_match[c] : ends[c]]
            cy, cx = by[at], bx[at]  # what this cluster reaches: its own pixels' box and `radius` around
            top, left = max(0, cy.min() - radius), max(0, cx.min() - radius)
            around = edge[top : cy.max() + radius + 1, left : cx.max() + radius + 1]
            spot = np.zeros_like(around)
            spot[cy - top, cx - left] = 1
            gt_match[c] = np.count_nonzero(cv2.dilate(spot, kernel) & around)
        precision = np.divide(fg_match, n_fg, out=np.ones(K), where=n_fg > 0)
        recall = gt_match / n_gt
        both = precision + recall
        F[:, o] = np.divide(2 * precision * recall, both, out=np.zeros(K), where=both > 0)
    return J, F


def video_scores(labels: Iterable[np.ndarray], truth: Iterable[np.ndarray], clusters: int, objects: int) -> Scores:
    """All frames; fewer clusters than objects are filled up with empty ones, as in the official package."""
    clusters = max(clusters, objects)
    pairs = [frame_scores(a, b, clusters, objects) for a, b in zip(labels, truth, strict=True)]
    return Scores(np.stack([j for j, _ in pairs], -1), np.stack([f for _, f in pairs], -1))


def matched(scores: Scores, match: str, starts: Sequence[int] = ()) -> Scores:
    """J and F of each object in each frame [O, T], after a Hungarian assignment on J + F.

    Args:
        match: `frame`: a new assignment in every frame (the release); `sequence`: one, on the means (official).
        starts: frame from which each object counts, [O]; before it the object takes no cluster. Default: the first.
    """
    total = scores.J + scores.F  # [K, O, T]
    T = total.shape[-1]
    counts = np.arange(T) >= np.array(starts or [0] * total.shape[1])[:, None]  # [O, T]
    total = total * counts
    if match == "sequence":
        pairs = [linear_sum_assignment(-total.sum(-1) / counts.sum(-1))] * T
    else:
        pairs = [linear_sum_assignment(-total[..., t]) for t in range(T)]
    order = [(row[np.argsort(col)], np.sort(col)) for row, col in pairs]
    return Scores(*(np.stack([x[r, c, t] for t, (r, c) in enumerate(order)], -1) for x in scores))


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall (share of frames above .5) and decay (first quarter minus last) of values [T], as in the official
    package: the quarters are cut at rounded positions and share their ends.
    """
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())


def check_proposals(name: str, clusters: int, limit: int) -> None:
    """UserError when a sequence has more clusters than the evaluator accepts (0: any number)."""
    if limit and clusters > limit:
        raise UserError(
            f"{name}: {clusters} clusters, the evaluation takes {limit}; the count grows with training: take an "
            "earlier checkpoint, raise --tau, or lift --max_proposals (0: any number)"
        )


def rand_index(labels: np.ndarray, truth: np.ndarray) -> float:
    """FG-ARI: adjusted Rand index over the foreground pixels (object above 0, not void) of a whole video [T, H, W].

    1 where both sides have one group.
    """
    inside = (truth > 0) & (truth != VOID)
    if not inside.any():
        return math.nan
    a = np.unique(labels[inside], return_inverse=True)[1]
    b = np.unique(truth[inside], return_inverse=True)[1]
    table = np.bincount(a * (b.max() + 1) + b, minlength=(a.max() + 1) * (b.max() + 1)).reshape(a.max() + 1, -1)
    pairs = lambda n: (n.astype(np.float64) * (n - 1) / 2).sum()  # noqa: E731
    both, rows, cols = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * cols / pairs(np.array([table.sum()])) if table.sum() > 1 else rows
    best = (rows + cols) / 2
    return 1.0 if best == expected else float((both - expected) / (best - expected))


def mean_iou(labels: np.ndarray, truth: np.ndarray, clusters: int) -> float:
    """mIoU: IoU of each object over the whole video [T, H, W] with its cluster (Hungarian), the mean."""
    objects = numbers_of([truth])
    if not objects:
        return math.nan
    gt = renumber(truth, objects)
    return best_mean(ious(joint_counts(labels, gt, max(clusters, len(objects)), len(objects))[0]))
