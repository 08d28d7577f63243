"""Image files to arrays of bytes by the fastest decoder that gives what Pillow gives.

A JPEG of RGB or grey is for OpenCV, equal to Pillow bit by bit (both build on libjpeg-turbo) and without Pillow's copy
to an array (`python tests/bench.py loader` has the times; torchvision's decoder is as fast, its import costs seconds).
Everything else goes through Pillow (`shared_utils.data.load_image`), whose rules for palettes, CMYK, 16 bits and
transparency hold.
"""

import io
import os

import numpy as np
from PIL import Image

from shared_utils.data import load_image


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, 3] as EXIF's orientation (1 to 8; others count as 1) wants it shown."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


class Encoded:
    """A file whose header is read: `height`, `width` as shown; `pixels()` decodes it. UserError names a broken file."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.data, self.simple = path, b"", False
        try:
            with open(path, "rb") as handle:
                self.data = handle.read()
            with Image.open(io.BytesIO(self.data)) as image:
                self.width, self.height = image.size
                self.orientation = image.getexif().get(0x0112, 1) if image.info.get("exif") else 1
                if self.orientation in (5, 6, 7, 8):
                    self.width, self.height = self.height, self.width
                whole = self.data.rstrip(b"\0")[-2:] == b"\xff\xd9"  # one cut short is for Pillow to judge
                self.simple = image.format == "JPEG" and image.mode in ("RGB", "L") and whole
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            load_image(path)  # its UserError
            raise

    def pixels(self, reduced: int = 1) -> np.ndarray:
        """uint8 [H, W, 3]; `reduced` 2, 4, 8: of a `simple` file about that part of the sides, rounded up, much faster.

        Turned as the EXIF entry says.
        """
        if self.simple:
            import cv2

            flags = cv2.IMREAD_IGNORE_ORIENTATION | {
                1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4,
                8: cv2.IMREAD_REDUCED_COLOR_8,
            }[reduced]  # fmt: skip
            out = cv2.imdecode(np.frombuffer(self.data, np.uint8), flags)
            if out is not None:
                return turned(out if reduced == 1 else cv2.cvtColor(out, cv2.COLOR_BGR2RGB), self.orientation)
        if reduced != 1:
            raise ValueError(f"{self.path}: only a JPEG decodes at a part of its size")
        return np.asarray(load_image(self.path, turn=True))
