#!/usr/bin/env bash
# What: albumentationsx 2.5.1 (numpy 2.4.6; it wants torch, 3 GB), Linux x86_64. MoCo's colour jitter and blur under the argument names that
#   albumentations 1 and 2.0 have: ColorJitter(brightness=, contrast=, saturation=, hue=), GaussianBlur(sigma_limit=).
# Expected (written down before the run): hue=(-0.1, 0.1) turns the hue by at most 0.1, spread as torchvision's.
# Seen: the names became brightness_range, ..., sigma_range. The old ones only raise a UserWarning; the transform takes its
#   defaults. The default of hue_range is the whole circle, so the hue turns by up to 0.5 (standard deviation 0.29 instead
#   of 0.058), and brightness, contrast and saturation vary by 0.2 instead of 0.4. The blur has sigma 0.5 to 3 instead of
#   0.1 to 2. A recipe copied from an older project trains to its end with other views.
# Upstream: the warning is the documented behaviour for unknown arguments; no report on the hue was found.
# Here: the loader's comparison passes the ranges by place (tests/jobs/loader.py), which fails where they do not fit.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check albumentationsx==2.5.1 numpy==2.4.6 \
  opencv-python-headless==5.0.0.93 torch==2.14.1
NO_ALBUMENTATIONS_UPDATE=1 "$work/venv/bin/python" - <<'PY'
import colorsys
import warnings

import albumentations as A
import numpy as np

image = np.full((8, 8, 3), (200, 80, 60), np.uint8)


def hue(pixels):
    return colorsys.rgb_to_hsv(*(pixels[0, 0] / 255.0))[0]


def turns(jitter):
    apply = A.Compose([jitter], seed=0)
    moved = np.array([hue(apply(image=image)["image"]) for _ in range(2000)]) - hue(image)
    return (moved + 0.5) % 1 - 0.5


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    old = A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1), p=1)
    blur = A.GaussianBlur(sigma_limit=(0.1, 2.0), p=1)
new = A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=1)
spread = {name: turns(jitter).std() for name, jitter in (("old names", old), ("ranges by place", new))}
told = [str(w.message) for w in caught if "not valid" in str(w.message)]
print(f"albumentationsx {A.__version__}: standard deviation of the turn of the hue: "
      + ", ".join(f"{name} {value:.3f}" for name, value in spread.items()))
print(f"no error, {len(told)} warnings; the blur: {blur}")
same = spread["old names"] > 0.25 and 0.05 < spread["ranges by place"] < 0.065 and len(told) == 2
raise SystemExit(not (same and "sigma_range=(0.5, 3.0)" in str(blur)))
PY
