#!/usr/bin/env bash
# What: PyAV 18.1.0 (numpy 2.4.6), Linux x86_64. `codec_context.copy_opaque` carries the number of a packet, `packet.opaque`,
#   to the pictures that are decoded from it.
# Expected (written down before the run, as code that relied on it): a picture carries its packet's number, whatever other
#   files the process reads.
# Seen: what is carried is kept in one table of the process under the object's id(). Python has one object for each small
#   integer, so the packets 3 of two files share an entry. It goes with the first picture that is dropped: the pictures of
#   the other file that are still in its decoder (B-frames) then carry None. One file alone is right, and so are two in
#   step; a file that is read between two pictures of the other, or in another thread, takes its numbers away. No error.
# Upstream: PyAV pull request 1965 made the table one by id; no report of shared entries was found.
# Here: fame/video.py gives each packet a list of its own, which no other file can hold.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check av==18.1.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import io
from itertools import islice

import av
import numpy as np

file = io.BytesIO()
with av.open(file, "w", format="mp4") as out:
    stream = out.add_stream("libx264", rate=10)
    stream.width, stream.height, stream.pix_fmt, stream.options = 64, 64, "yuv420p", {"bf": "2"}
    for i in range(12):
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), format="rgb24")
        out.mux(stream.encode(picture))
    out.mux(stream.encode())


def numbers(own):
    """What each picture carries: its packet's number, in a list of its own or as it is."""
    with av.open(io.BytesIO(file.getvalue())) as container:
        stream = container.streams.video[0]
        stream.codec_context.copy_opaque = True
        for number, packet in enumerate(container.demux(stream)):
            packet.opaque = [number] if own else number
            for picture in packet.decode():
                carried = picture.opaque
                yield carried[0] if own and carried else carried


alone = list(numbers(False))
lost = {}
for own in (False, True):
    reader = numbers(own)
    found = list(islice(reader, 3))  # the decoder holds pictures now
    assert list(numbers(own)) == alone, "the other file, read whole"
    found += reader
    assert all(a in (b, None) for a, b in zip(found, alone, strict=True))
    lost[own] = found.count(None)
print(f"PyAV {av.__version__}: of 12 pictures {lost[False]} carry nothing; with an object for each packet {lost[True]}")
raise SystemExit(not (None not in alone and lost[False] > 0 and lost[True] == 0))
PY
