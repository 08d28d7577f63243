"""Datasets that mmsegmentation lacks; importing this module registers them with it.

CamVid, LabelMeFacade and Clothing Co-Parsing hold photos ``*.jpg`` and 8-bit id maps ``*.png`` of the same stem.
ADE20K, Cityscapes and COCO-Stuff come from mmsegmentation itself, and so does VOC, but for the place of a label map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset, PascalVOCDataset
from mmseg.registry import DATASETS

from mdp.datasets import class_table


def _meta(name: str) -> dict[str, Any]:
    classes, palette = class_table(name)
    return {"classes": classes, "palette": [list(colour) for colour in palette]}


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """11 classes; id 11 is "unlabelled" in the files and ignored here."""

    METAINFO = _meta("camvid")

    @classmethod
    def get_label_map(cls, new_classes: Sequence | None = None) -> dict[int, int]:
        return {11: 255}


@DATASETS.register_module()
class LabelMeFacadeDataset(BaseSegDataset):
    """8 classes; 255 is "various" and ignored."""

    METAINFO = _meta("labelmefacade")


@DATASETS.register_module()
class ClothingCoParsingDataset(BaseSegDataset):
    """59 classes; 0 is the background."""

    METAINFO = _meta("ccp")


@DATASETS.register_module()
class PascalVOCAugDataset(PascalVOCDataset):
    """VOC 2012 with SBD: the map of ``SegmentationClass`` where there is one, else that of ``SegmentationClassAug``.

    mmsegmentation reaches the same by concatenating two datasets; this one reads the single list ``trainaug.txt``.
    """

    def load_data_list(self) -> list[dict]:
        infos = super().load_data_list()
        for info in infos:
            path = Path(info["seg_map_path"])
            if not path.is_file():
                info["seg_map_path"] = str(path.parents[1] / "SegmentationClassAug" / path.name)
        return infos
