"""Image augmentation that several papers share: recipes, the draws of a whole batch, and two ways to apply them.

    recipe = moco_v2(224)                                  # a description: sizes, strengths, probabilities, order
    recipe(image)                                          # backend pil: the releases' pipeline on one PIL image
    draws = recipe.draw(keys, heights, widths)             # backend batch: all parameters of a batch at once
    bytes = apply(recipe, pixels, draws)                   # on a CPU, ragged images, uint8 [N, S, S, 3]
    views = apply_tensor(recipe, array, rows, draws)       # on any device, images of one size in one array

Backend `pil` is torchvision's pipeline and draws from the global generators (`shared_utils.data.Keyed` seeds them for
each sample). Backend `batch` draws the same distributions from a counter-based generator, so that a view depends on
(seed, epoch, index, view) alone. `shared_utils.feed` decodes and makes batches with it.

Given the same parameters, the largest differences from PIL, in levels of 0..255 (tests/test_shared_augment.py):
    crop and antialiased resize   1; bicubic, and on devices, 2 in one of 10,000 values, by two roundings; the resize of
          `plain` is equal on a CPU but for one value in 300 at usual sizes, one in 25 at odd ones
    brightness, contrast, saturation, grey, solarise   1 (every step clamps, and truncates to whole levels as PIL does)
    hue   12, on average 1, on a CPU (OpenCV's bytes of hue are rounded and have 256 steps a turn, PIL's are truncated
          and have 255, of 6 levels each); the same but for rounding errors on other devices, which do as PIL does
    blur  a true Gaussian cut at 3 sigma, edges replicated: within 1 of scipy's. PIL approximates it by three box
          filters, from which it differs by a few levels
Sources: torchvision.transforms for the distributions; Pillow's Resample.c, Convert.c and Blend.c for the arithmetic.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from shared_utils import UserError
from shared_utils.flags import AUG_BACKENDS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of ColorJitter's steps

Pair = tuple[float, float]


# -------------------------------------------------------------------------------------------------------------- recipes
@dataclass(frozen=True)
class Recipe:
    """What is done to an image; a callable PIL image -> tensor [3, size, size] by backend `pil`.

    Views are normalised float32, or bytes where `levels` is set.

    Args:
        size: pixels of a view.
        scale: random resized crop of this share of the area; None: the shorter side to `resize`, then the centre.
        pad: then shifted by up to so many pixels each way, mirrored at the edges.
        ratio: width over height of a random crop, drawn by its logarithm.
        jitter: strengths of brightness, contrast, saturation and hue, in drawn order; `jitter_p`: how often at all.
        sigma: pixels of the blur, drawn uniformly.
        threshold: levels from which on solarisation inverts.
        order: of the steps after the crop.
        mean, std: normalisation.
        levels: views stay uint8; a method that works on pixels, or normalises on the device, takes a quarter of the
            memory.
        backend: which of the two those who read whole data sets use for this recipe.
    """

    size: int
    scale: Pair | None = None
    ratio: Pair = (3 / 4, 4 / 3)
    resize: int = 0
    pad: int = 0
    interpolation: str = "bilinear"
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    sigma: Pair = (0.1, 2.0)
    solarise_p: float = 0.0
    threshold: int = 128
    flip_p: float = 0.0
    order: tuple[str, ...] = ("jitter", "grey", "blur", "solarise", "flip")
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    levels: bool = False
    backend: str = "pil"

    def __post_init__(self) -> None:
        if self.backend not in AUG_BACKENDS or self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"--aug_backend {self.backend}, interpolation {self.interpolation}: no such one")

    def by(self, backend: str) -> "Recipe":
        """The same recipe for another backend."""
        return replace(self, backend=backend)

    # -- backend pil
    @cached_property
    def pil(self) -> Any:
        """The releases' pipeline: a torchvision Compose of PIL image -> normalised tensor."""
        from torchvision import transforms as T  # its import costs seconds, and the other backend needs none of it

        how = T.InterpolationMode(self.interpolation)
        steps: list[Any]
        if self.scale is None:
            steps = [T.Resize(self.resize, how), T.CenterCrop(self.size)]
        else:
            steps = [T.RandomResizedCrop(self.size, self.scale, self.ratio, how)]
        if self.pad:
            steps.append(T.RandomCrop(self.size, self.pad, padding_mode="reflect"))
        jitter = T.ColorJitter(*self.jitter)
        made = {
            "jitter": jitter if self.jitter_p == 1 else T.RandomApply([jitter], self.jitter_p),
            "grey": T.RandomGrayscale(self.grey_p),
            "blur": T.RandomApply([GaussianBlur(*self.sigma)], self.blur_p),
            "solarise": T.RandomSolarize(self.threshold, self.solarise_p),
            "flip": T.RandomHorizontalFlip(self.flip_p),
        }
        steps += [made[name] for name in self.order if getattr(self, f"{name}_p")]
        last = [T.PILToTensor()] if self.levels else [T.ToTensor(), T.Normalize(self.mean, self.std)]
        return T.Compose([*steps, *last])

    @property
    def transforms(self) -> list[Any]:
        """Steps of backend `pil`."""
        return self.pil.transforms

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pil(image)

    # -- backend batch
    def draw(self, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> "Draws":
        """Parameters of N views: keys uint64 [N] (`mix_keys`), sizes of their images [N]."""
        u = uniforms(keys, SLOTS)
        heights, widths = (np.broadcast_to(np.asarray(v, np.int64), keys.shape) for v in (heights, widths))
        if self.scale is None:
            box, target = _whole(heights, widths, self.resize, self.size)
        else:
            box = _crops(u, heights, widths, self.scale, self.ratio)
            target = np.broadcast_to(np.array([self.size, self.size, 0, 0]), box.shape)
        least = np.array([max(0.0, 1 - s) for s in self.jitter[:3]] + [-self.jitter[3]])
        most = np.array([1 + s for s in self.jitter[:3]] + [self.jitter[3]])
        on = u[:, 22:27] < np.array([self.jitter_p, self.grey_p, self.blur_p, self.solarise_p, self.flip_p])
        return Draws(
            box,
            target,
            on[:, 0],
            np.argsort(u[:, 27:31], 1),
            least + (most - least) * u[:, 31:35],
            on[:, 1],
            np.where(on[:, 2], self.sigma[0] + (self.sigma[1] - self.sigma[0]) * u[:, 35], 0.0),
            on[:, 3],
            on[:, 4],
            (u[:, 36:38] * (2 * self.pad + 1)).astype(np.int64) - self.pad,
        )


ATTEMPTS = 10  # torchvision's, at a crop that fits
SLOTS = (
    38  # numbers of a view: 10 areas, 10 ratios, 2 places, 5 switches, 4 for the order, 4 strengths, sigma, 2 shifts
)


@dataclass(frozen=True)
class Draws:
    """Parameters of N views.

    box: [N, 4] top, left, height, width of the crop; target: [N, 4] height and width it is resized to, top and left of
    the view in that; jitter, grey, solarise, flip: [N] whether; order: [N, 4] of BRIGHTNESS, CONTRAST, SATURATION, HUE;
    factors: [N, 4] of each of these (hue: in turns); sigma: [N] pixels of the blur, 0: none; shift: [N, 2] pixels
    down and right that a view is moved in the image.
    """

    box: np.ndarray
    target: np.ndarray
    jitter: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray
    solarise: np.ndarray
    flip: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, rows: Any) -> "Draws":
        return Draws(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def moco_v2(size: int = 224, min_scale: float = 0.2) -> Recipe:
    """MoCo v2: crop, colour jitter, grey, blur, flip."""
    jitter = (0.4, 0.4, 0.4, 0.1)
    return Recipe(size, (min_scale, 1.0), jitter=jitter, jitter_p=0.8, grey_p=0.2, blur_p=0.5, flip_p=0.5)


def moco_v1(size: int = 224, min_scale: float = 0.2) -> Recipe:
    """MoCo v1, that is InstDisc: crop, grey, colour jitter, flip."""
    order = ("grey", "jitter", "flip")
    jitter = (0.4, 0.4, 0.4, 0.4)
    return Recipe(size, (min_scale, 1.0), jitter=jitter, jitter_p=1.0, grey_p=0.2, flip_p=0.5, order=order)


def simclr(size: int = 224, min_scale: float = 0.08, strength: float = 1.0) -> Recipe:
    """SimCLR: crop, flip, colour jitter of this strength, grey, blur."""
    jitter = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    order = ("flip", "jitter", "grey", "blur")
    return Recipe(size, (min_scale, 1.0), jitter=jitter, jitter_p=0.8, grey_p=0.2, blur_p=0.5, flip_p=0.5, order=order)


def byol(size: int = 224, view: int = 0, min_scale: float = 0.08) -> Recipe:
    """BYOL's first view (0: always blurred) and second one (1: seldom blurred, solarised in a fifth), bicubic."""
    return Recipe(
        size,
        (min_scale, 1.0),
        interpolation="bicubic",
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        grey_p=0.2,
        blur_p=(1.0, 0.1)[view],
        solarise_p=(0.0, 0.2)[view],
        flip_p=0.5,
        order=("flip", "jitter", "grey", "blur", "solarise"),
    )


def swav(size: int = 224, scale: Pair = (0.14, 1.0)) -> Recipe:
    """A crop of SwAV's multi-crop: 224 pixels of 14 to 100 % of the area, 96 of 5 to 14 %."""
    return replace(simclr(size), scale=scale)


def plain(size: int = 224, backend: str = "pil") -> Recipe:
    """Evaluation: shorter side to size * 256 / 224, centre crop."""
    return Recipe(size, resize=round(size * 256 / 224), backend=backend)


def linear_train(size: int = 224, backend: str = "pil") -> Recipe:
    """Training of a linear probe, and fine-tuning: random resized crop (8 to 100% of the area) and flip."""
    return Recipe(size, (0.08, 1.0), flip_p=0.5, backend=backend)


class GaussianBlur:
    """Blur of radius ~ U(low, high) pixels, as in SimCLR and MoCo v2, of a PIL image."""

    def __init__(self, low: float = 0.1, high: float = 2.0):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def denormalise(x: Tensor) -> Tensor:
    """[..., 3, H, W] back to 0..1, for pictures."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x.float() * std + mean).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------- draws
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalise(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, in place; uint64."""
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


def mix_keys(*keys: Any) -> np.ndarray:
    """`shared_utils.data.mix_key` of integers and arrays of them, which broadcast: uint64, at least [1]."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _finalise(state + _wrapped(key) + GOLDEN)
    return state


def _wrapped(key: Any) -> np.ndarray:
    """Modulo 2^64, negative integers too."""
    if isinstance(key, int):
        return np.array([key & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return np.atleast_1d(np.asarray(key)).astype(np.uint64)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers in 0..1 of each key's SplitMix64 stream: uint64 [N] -> float64 [N, count]."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (_finalise(keys[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _crops(u: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale: Pair, ratio: Pair) -> np.ndarray:
    """Boxes [N, 4] as `RandomResizedCrop.get_params` draws them: the first of ten that fits, else a centre crop."""
    h, w = heights[:, None], widths[:, None]
    area = h * w * (scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    wide = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tall = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (0 < wide) & (wide <= w) & (0 < tall) & (tall <= h)
    first, some = np.argmax(fits, 1), fits.any(1)
    rows = np.arange(len(u))
    wide, tall = wide[rows, first], tall[rows, first]
    top = np.minimum((u[:, 20] * (heights - tall + 1)).astype(np.int64), heights - tall)
    left = np.minimum((u[:, 21] * (widths - wide + 1)).astype(np.int64), widths - wide)
    if not some.all():
        own = widths / heights
        narrow, broad = own < ratio[0], own > ratio[1]
        wide = np.where(some, wide, np.where(broad, np.rint(heights * ratio[1]), widths).astype(np.int64))
        tall = np.where(some, tall, np.where(narrow, np.rint(widths / ratio[0]), heights).astype(np.int64))
        top = np.where(some, top, (heights - tall) // 2)
        left = np.where(some, left, (widths - wide) // 2)
    return np.stack([top, left, tall, wide], 1)


def _whole(heights: np.ndarray, widths: np.ndarray, resize: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and targets of `Resize(resize)` and `CenterCrop(size)`."""
    short = np.minimum(heights, widths)
    tall, wide = (np.where(side == short, resize, resize * side // short) for side in (heights, widths))
    zero = np.zeros_like(heights)
    top, left = (np.rint((side - size) / 2).astype(np.int64) for side in (tall, wide))
    return np.stack([zero, zero, heights, widths], 1), np.stack([tall, wide, top, left], 1)


# ----------------------------------------------------------------------------------------------------- applied on a CPU
JUST_BELOW = -0.4999  # rounding to the nearest after it truncates, as PIL's blend does


class Painter:
    """Makes views of one recipe on a CPU, image by image with OpenCV, in buffers that it keeps.

    `paint(pixels, i, out)` writes view i of `draws` of an image uint8 [H, W, 3] to `out` uint8 [S, S, 3].
    """

    def __init__(self, recipe: Recipe, draws: Draws):
        import cv2

        cv2.setNumThreads(1)  # the loader's processes are the parallelism
        self.cv2, self.recipe, size = cv2, recipe, recipe.size
        self.buffers = [np.empty((size, size, 3), np.uint8) for _ in range(2)]
        self.grey = np.empty((size, size), np.uint8)
        self.colourless = np.empty((size, size, 3), np.uint8)
        self.random = recipe.scale is not None
        self.steps = [name for name in recipe.order if name != "flip"]  # a flip changes places with all of them
        # Lists, an element of an array costs more than a small image's step; and flat ones: thousands of small lists
        # would call the garbage collector.
        self.box, self.target = draws.box.ravel().tolist(), draws.target.ravel().tolist()
        self.order, self.factors = draws.order.ravel().tolist(), draws.factors.ravel().tolist()
        self.jitter, self.whether_grey = draws.jitter.tolist(), draws.grey.tolist()
        self.sigma, self.solarise, self.flip = draws.sigma.tolist(), draws.solarise.tolist(), draws.flip.tolist()
        self.turned, self.pad, self.shift = np.zeros((size, 3), np.uint8), recipe.pad, draws.shift.tolist()
        self.kernels = [] if recipe.blur_p == 0 else _kernels(draws.sigma)

    def paint(self, pixels: np.ndarray, i: int, out: np.ndarray, reduced: int = 1) -> None:
        """`reduced`: the image was decoded at one half, quarter or eighth of its size."""
        cv2 = self.cv2
        x, spare = self.buffers
        self._cropped(pixels, i, x, reduced)
        if self.pad:
            down, right = (self.pad + step for step in self.shift[i])
            wide = cv2.copyMakeBorder(x, self.pad, self.pad, self.pad, self.pad, cv2.BORDER_REFLECT_101)
            x[...] = wide[down : down + len(x), right : right + len(x)]
        for step in self.steps:
            if step == "jitter":
                if self.jitter[i]:
                    for which in self.order[4 * i : 4 * i + 4]:
                        self._jitter(which, self.factors[4 * i + which], x, spare)
            elif step == "grey":
                if self.whether_grey[i]:
                    cv2.cvtColor(x, cv2.COLOR_RGB2GRAY, dst=self.grey)
                    cv2.cvtColor(self.grey, cv2.COLOR_GRAY2RGB, dst=x)
            elif step == "blur":
                if self.sigma[i]:
                    kernel = self.kernels[i]
                    cv2.sepFilter2D(x, -1, kernel, kernel, dst=spare, borderType=cv2.BORDER_REPLICATE)
                    x, spare = spare, x
            elif self.solarise[i]:
                np.subtract(255, x, out=x, where=x >= self.recipe.threshold)
        if self.flip[i]:
            cv2.flip(x, 1, dst=out)
        else:
            out[...] = x

    def _cropped(self, pixels: np.ndarray, i: int, x: np.ndarray, reduced: int) -> None:
        """Resized with antialiasing as PIL does, by torch's kernel; a random crop that grows by OpenCV's."""
        cv2 = self.cv2
        top, left, height, width = self.box[4 * i : 4 * i + 4]
        tall, wide, first, start = self.target[4 * i : 4 * i + 4]
        size = self.recipe.size
        if reduced > 1:  # a crop's edges may lie inside a pixel now, which Pillow alone can do
            box = [edge / reduced for edge in (left, top, left + width, top + height)]
            how = Image.Resampling[self.recipe.interpolation.upper()]
            whole = np.asarray(Image.fromarray(pixels).resize((wide, tall), how, tuple(box)))
            x[...] = whole[first : first + size, start : start + size]
            return
        part = pixels[top : top + height, left : left + width]
        if (height, width) == (tall, wide):
            x[...] = part[first : first + size, start : start + size]
        elif tall >= height and wide >= width and self.random and self.recipe.interpolation == "bilinear":
            cv2.resize(part, (size, size), dst=x, interpolation=cv2.INTER_LINEAR)
        else:
            # The strides of channels-last memory, of the batch of one too: else torch is half as fast.
            strides = (3 * height * width, 1, 3 * width, 3)
            grid = torch.from_numpy(np.array(part)).as_strided((1, 3, height, width), strides)
            grown = F.interpolate(grid, (tall, wide), mode=self.recipe.interpolation, antialias=True)
            whole = grown[0].permute(1, 2, 0).numpy()
            x[...] = whole[first : first + size, start : start + size]

    def _jitter(self, which: int, factor: float, x: np.ndarray, spare: np.ndarray) -> None:
        cv2 = self.cv2
        if which == HUE:
            cv2.cvtColor(x, cv2.COLOR_RGB2HSV_FULL, dst=spare)
            self.turned[:, 0] = int(factor * 255) & 255
            rows = spare.reshape(len(spare), -1)
            np.add(rows, self.turned.reshape(-1), out=rows)  # modulo 256, a whole turn
            cv2.cvtColor(spare, cv2.COLOR_HSV2RGB_FULL, dst=x)
        elif which == BRIGHTNESS:
            cv2.addWeighted(x, factor, x, 0, JUST_BELOW, dst=x)
        else:
            cv2.cvtColor(x, cv2.COLOR_RGB2GRAY, dst=self.grey)
            if which == CONTRAST:
                middle = int(cv2.mean(self.grey)[0] + 0.5)
                cv2.addWeighted(x, factor, x, 0, (1 - factor) * middle + JUST_BELOW, dst=x)
            else:
                cv2.cvtColor(self.grey, cv2.COLOR_GRAY2RGB, dst=self.colourless)
                cv2.addWeighted(x, factor, self.colourless, 1 - factor, JUST_BELOW, dst=x)


def _kernels(sigma: np.ndarray) -> list[np.ndarray]:
    """Gaussian taps, 2 * ceil(3 sigma) + 1 of them, float32, of each sigma [N]; one tap for 0."""
    radius = np.ceil(3 * sigma).astype(np.int64)
    widest = int(radius.max(initial=0))
    offsets = np.arange(-widest, widest + 1)
    taps = np.exp(-0.5 * (offsets / np.maximum(sigma, 1e-6)[:, None]) ** 2) * (np.abs(offsets) <= radius[:, None])
    taps = (taps / taps.sum(1, keepdims=True)).astype(np.float32)
    return [row[widest - r : widest + r + 1] for row, r in zip(taps, radius.tolist())]


def apply(recipe: Recipe, pixels: Sequence[np.ndarray], draws: Draws) -> np.ndarray:
    """Views uint8 [N, S, S, 3] of N images uint8 [H, W, 3] of any sizes, on a CPU."""
    out = np.empty((len(draws), recipe.size, recipe.size, 3), np.uint8)
    painter = Painter(recipe, draws)
    for i, image in enumerate(pixels):
        painter.paint(image, i, out[i])
    return out


BLOCK = 1 << 18  # bytes that are normalised at a time: they and four times as many floats stay in a core's cache


def normalise(images: Tensor, recipe: Recipe, out: Tensor | None = None) -> Tensor:
    """Bytes [..., S, S, 3] -> float32 [..., 3, S, S] of mean 0 and deviation 1, a view of channels-last memory.

    `out`: float32 of the shape of `images`, to be filled.
    """
    scale, shift = _affine(recipe, images.shape[-2], images.device)
    out = torch.empty(images.shape, device=images.device) if out is None else out
    rows = images.reshape(-1, len(scale))
    each = max(1, BLOCK // len(scale)) if images.device.type == "cpu" else len(rows)
    for source, target in zip(rows.split(each), out.view(-1, len(scale)).split(each)):
        target.copy_(source)
        torch.addcmul(shift, target, scale, out=target)
    return out.movedim(-1, -3)


@cache
def _affine(recipe: Recipe, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(scale, shift) that take a row of `width` pixels from bytes to normalised values, float32 [width * 3] each."""
    mean, std = (np.array(v, np.float64) for v in (recipe.mean, recipe.std))
    scale, shift = (torch.tensor(v, dtype=torch.float32).repeat(width) for v in (1 / (255 * std), -mean / std))
    return scale.to(device), shift.to(device)


# ------------------------------------------------------------------------------------------------ applied on any device
def apply_tensor(recipe: Recipe, array: Tensor, rows: np.ndarray, draws: Draws) -> Tensor:
    """Views [N, 3, S, S], as the recipe says, of images `rows` [N] of `array` uint8 [M, H, W, 3], on its device.

    Nothing waits for the device; a step is computed for the views alone that have drawn it.
    """
    device, size = array.device, recipe.size
    x = array[_index(rows, device)].permute(0, 3, 1, 2).float()  # [N, 3, H, W], whole levels from here on
    across, down = (
        _weights(draws.box[:, side], draws.box[:, 2 + side], draws.target[:, side], draws.target[:, 2 + side],
                 size, array.shape[1 + side], recipe.interpolation, device)
        for side in (1, 0)
    )  # fmt: skip
    x = (x @ across.transpose(1, 2)[:, None]).add_(0.5).floor_().clamp_(0, 255)  # across first, halves up, as PIL
    x = (down[:, None] @ x).add_(0.5).floor_().clamp_(0, 255)
    if recipe.pad:
        x = _shifted(x, _index(draws.shift, device))
    for step in recipe.order:
        if step == "jitter":
            for place in range(4):
                for which in range(4):
                    chosen = np.flatnonzero(draws.jitter & (draws.order[:, place] == which))
                    _on(x, chosen, _jittered, which, draws.factors[chosen, which])
        elif step == "grey":
            _on(x, np.flatnonzero(draws.grey), _grey)
        elif step == "blur":
            chosen = np.flatnonzero(draws.sigma)
            spread = _blur_weights(draws.sigma[chosen], size, device)[:, None]
            _on(x, chosen, _blurred, spread)
        elif step == "solarise":
            _on(x, np.flatnonzero(draws.solarise), _solarised, recipe.threshold)
        else:
            _on(x, np.flatnonzero(draws.flip), torch.flip, (3,))
    if recipe.levels:
        return x.to(torch.uint8, memory_format=torch.channels_last)
    scale, shift = (v.view(3, 1, 1) for v in _affine(recipe, 1, device))
    return torch.addcmul(shift, x, scale).contiguous(memory_format=torch.channels_last)


def _index(rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64)).to(device, non_blocking=True)


def _on(x: Tensor, chosen: np.ndarray, function: Callable[..., Tensor], *more: Any) -> None:
    """Replace the chosen rows of `x` by `function(rows, *more)`."""
    if len(chosen):
        index = _index(chosen, x.device)
        part = x.index_select(0, index)
        x.index_copy_(0, index, function(part, *more).expand_as(part))


def _weights(
    start: np.ndarray, length: np.ndarray, target: np.ndarray, first: np.ndarray, size: int, total: int, kind: str,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Resampling matrices [N, size, total]: `length` pixels from `start` on become `target`, of which `size` from
    `first` on are wanted. Pillow's filters: a triangle, or the cubic of a = -1/2, as wide as the reduction."""
    start_, length_, target_, first_ = (
        torch.from_numpy(np.ascontiguousarray(v, np.float32)).to(device).view(-1, 1, 1)
        for v in (start, length, target, first)
    )
    scale = length_ / target_
    place = torch.arange(total, device=device, dtype=torch.float32) - start_  # [N, 1, total], inside the crop
    centre = (torch.arange(size, device=device, dtype=torch.float32)[:, None] + first_ + 0.5) * scale  # [N, size, 1]
    t = ((place + 0.5 - centre) / scale.clamp(min=1)).abs()
    if kind == "bilinear":
        weight = (1 - t).clamp_(min=0)
    else:
        near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        weight = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    weight = weight * ((place >= 0) & (place < length_))
    return weight / weight.sum(2, keepdim=True)


def _blur_weights(sigma: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Matrices [N, size, size] of a Gaussian cut at ceil(3 sigma), edges replicated."""
    radius = np.ceil(3 * sigma).astype(np.int64)
    widest = int(radius.max(initial=0))
    s, r = (torch.from_numpy(np.asarray(v, np.float32)).to(device)[:, None] for v in (sigma, radius))
    offsets = torch.arange(-widest, widest + 1, device=device, dtype=torch.float32)
    taps = torch.exp(-0.5 * (offsets / s) ** 2) * (offsets.abs() <= r)
    taps = taps / taps.sum(1, keepdim=True)  # [N, T]
    source = (torch.arange(size, device=device)[:, None] + offsets.long()).clamp(0, size - 1)  # [size, T]
    out = torch.zeros(len(sigma), size, size, device=device)
    return out.scatter_add_(2, source.expand(len(sigma), -1, -1), taps[:, None].expand(-1, size, -1))


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    """[N, C, S, S] moved by pixels [N, 2], mirrored at the edges without repeating them."""
    size = x.shape[-1]
    place = (torch.arange(size, device=x.device) + shift[:, :, None]).abs()  # [N, 2, S]
    down, right = torch.where(place >= size, 2 * (size - 1) - place, place).unbind(1)
    rows = x.gather(2, down[:, None, :, None].expand_as(x))
    return rows.gather(3, right[:, None, None, :].expand_as(x))


def _blurred(x: Tensor, spread: Tensor) -> Tensor:
    return (spread @ x @ spread.transpose(2, 3)).round_()


def _solarised(x: Tensor, threshold: int) -> Tensor:
    return torch.where(x >= threshold, 255 - x, x)


def _grey(x: Tensor) -> Tensor:
    """Luma of whole levels, [N, 1, H, W]: Pillow's 16-bit weights."""
    weights = torch.tensor([19595, 38470, 7471], device=x.device, dtype=torch.float32).view(3, 1, 1) / 65536
    return ((x * weights).sum(1, keepdim=True) + 0.5).floor_()


def _jittered(x: Tensor, which: int, factors: np.ndarray) -> Tensor:
    """One step of ColorJitter on whole levels [N, 3, H, W]; factors [N]. Truncated as Pillow does."""
    given = np.trunc(factors * 255) if which == HUE else factors
    factor = torch.from_numpy(given.astype(np.float32)).to(x.device).view(-1, 1, 1, 1)
    if which == HUE:
        return _turned(x, factor)
    if which == BRIGHTNESS:
        return (x * factor).clamp_(0, 255).floor_()
    base = _grey(x)
    if which == CONTRAST:
        base = (base.mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    return (base + factor * (x - base)).clamp_(0, 255).floor_()


def _bytes(x: Tensor) -> Tensor:
    """0..1 to whole levels: Pillow truncates the product of a float with a double."""
    return (x.float().double() * 255).floor_().float()


def _turned(x: Tensor, shift: Tensor) -> Tensor:
    """Hue shifted by this much [N, 1, 1, 1] of its bytes, through Pillow's HSV of bytes."""
    red, green, blue = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    chroma = (value - least).clamp(min=1e-6)
    r, g, b = ((value - part) / chroma for part in (red, green, blue))
    hue = torch.where(red == value, b - g, torch.where(green == value, 2 + r - b, 4 + g - r))
    hue = _bytes((hue.double() / 6 + 1) % 1)
    hue = torch.where(value == least, torch.zeros_like(hue), hue)
    saturation = _bytes((value - least) / value.clamp(min=1)) / 255
    sixth = (hue + shift[:, 0]) % 256 * (6 / 255)
    part, out = sixth.floor(), []
    f = sixth - part
    p, q, t = (value * (1 - saturation * k) for k in (torch.ones_like(f), f, 1 - f))
    for choices in ((value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q)):
        channel = choices[5]
        for sector in range(5):
            channel = torch.where(part % 6 == sector, choices[sector], channel)
        out.append(channel)
    return torch.stack(out, 1).round_()
