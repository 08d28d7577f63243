"""The folder's sets inside mmsegmentation: importing this module registers one data set class and two transforms.

Files, pairs, photos and label maps come from `mdp.datasets`, so that pretraining, fine-tuning and evaluation read the
same numbers. mmsegmentation's own transforms turn a photo by its orientation tag and leave its label map, and stretch
label maps of 2 and 4 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS

from mdp.datasets import SegSet
from mdp.own import describe_named, open_named, own_folders
from shared_utils.data import load_image


@DATASETS.register_module()
class MDPDataset(BaseSegDataset):
    """A split of a set of `mdp.datasets`, below `data_root`, or of an own one: NAME=FOLDER. UserError as `open_named`.

    The label maps of an own set are not read here: `mdp.finetune` and `mdp.eval_seg` have done so.
    """

    def __init__(self, name: str, split: str, data_root: str, data: list[str] | None = None, **more: Any) -> None:
        self.name, self.split, self.data = name, split, list(data or [])
        known = describe_named(name, own_folders(self.data))
        meta = {"classes": known.classes, "palette": [list(colour) for colour in known.palette]}
        super().__init__(data_root=data_root, metainfo=meta, **more)

    def load_data_list(self) -> list[dict]:
        common = {"set": self.name, "data": self.data, "label_map": None, "reduce_zero_label": False}
        found = open_named(self.name, own_folders(self.data), str(self.data_root), self.split, check=False)
        return [
            {"img_path": str(photo), "seg_map_path": str(label), "seg_fields": [], **common}
            for photo, label in found.pairs
        ]


@TRANSFORMS.register_module()
class LoadPhoto(BaseTransform):
    """The photo as stored, uint8 [H, W, 3] in BGR, as mmsegmentation's networks expect it."""

    def transform(self, results: dict) -> dict:
        photo = np.asarray(load_image(results["img_path"]))
        results["img"] = np.ascontiguousarray(photo[..., ::-1])
        results["img_shape"] = results["ori_shape"] = photo.shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadLabels(BaseTransform):
    """The label map as stored, in local ids, uint8 [H, W], 255 = ignore."""

    def __init__(self) -> None:
        self.sets: dict[str, SegSet] = {}

    def transform(self, results: dict) -> dict:
        name = results["set"]
        if name not in self.sets:
            self.sets[name] = describe_named(name, own_folders(results["data"]))
        known = self.sets[name]
        results["gt_seg_map"] = known.read_map(results["seg_map_path"])
        results["seg_fields"].append("gt_seg_map")
        return results
