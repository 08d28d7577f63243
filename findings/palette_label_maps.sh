#!/usr/bin/env bash
# What: torchvision 0.29.1, torchcodec 0.17.0 (torch 2.14.1, Pillow 13.0.0), Linux x86_64. A label map as DAVIS, VOC and
#   annotation programs store it: a PNG with a palette, read with mode UNCHANGED. About 3 GB are installed for the run.
# Expected (written down before the run): one channel with the stored numbers, as Pillow gives them, in both libraries.
# Seen: torchvision gives the numbers where the file has 8 bits a pixel. Pillow writes 4 bits or fewer where the palette has
#   16 colours or fewer; then torchvision's one channel begins each row with bytes that hold several pixels each. torchcodec,
#   which has taken over these decoders, gives three channels of colours for the same mode name, at every depth; no mode of
#   it gives the numbers. GRAY and RGB are colours in both. None of this raises an error.
# Upstream: meta-pytorch/torchcodec pull request 1543 made it colours on purpose; no report on torchvision was found.
# Here: label maps are read by Pillow without a conversion (shared_utils/data.py, mdp/datasets.py, uvos_dino/data.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 torchcodec==0.17.0 pillow==13.0.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import io

import numpy as np
import torch
from PIL import Image
from torchcodec.decoders import decode_png
from torchvision.io import ImageReadMode, decode_image

kinds = {}
for bits in (2, 4, 8):
    labels = (np.arange(16)[None].repeat(8, 0) % 2**bits).astype(np.uint8)
    image = Image.fromarray(labels, "P")
    image.putpalette([value for i in range(2**bits) for value in (i * 9 % 256, i * 5 % 256, i)])
    file = io.BytesIO()
    image.save(file, "PNG", bits=bits)
    assert (np.asarray(Image.open(file)) == labels).all()
    vision = decode_image(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    codec = decode_png(file.getvalue(), mode="UNCHANGED")
    packed = np.packbits(np.unpackbits(labels[0][:, None], axis=1)[:, 8 - bits :].ravel())
    kinds[bits] = (
        "numbers" if vision.shape == (1, 8, 16) and (vision[0].numpy() == labels).all()
        else "packed" if vision.shape == (1, 8, 16) and (vision[0, 0, : len(packed)].numpy() == packed).all()
        else "other",
        "colours" if codec.shape == (3, 8, 16) else "numbers",
    )
    print(f"{bits} bits a pixel: torchvision {kinds[bits][0]}, torchcodec {kinds[bits][1]}")
raise SystemExit(kinds != {2: ("packed", "colours"), 4: ("packed", "colours"), 8: ("numbers", "colours")})
PY
