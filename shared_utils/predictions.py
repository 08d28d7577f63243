"""Predictions for a user's own files, as CSV: file, class, confidence."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shared_utils import UserError, checkpoint
from shared_utils.data import read_text


def read_names(file: Path, count: int) -> list[str]:
    """The names of `count` classes, one a line, empty lines apart. UserError: another number of them."""
    names = [line.strip() for line in read_text(file, "the name of a class a line").splitlines() if line.strip()]
    if len(names) != count:
        raise UserError(f"--classes {file}: {len(names)} names, the checkpoint has {count} classes")
    return names


def write_csv(
    path: str | os.PathLike, folder: Path, files: Sequence[Path], classes: Sequence[str], probabilities: Tensor
) -> str:
    """Write one line a file, in the order given: its most probable class and that probability; atomically.

    Args:
        folder: the images' folder, below which they are named, or one image; files: their N paths.
        probabilities: [N, C], rows sum to 1; classes: C names.

    Returns: a line that says how many went to which class, for the user to look at.
    """
    confidence, chosen = probabilities.float().cpu().max(1)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "class", "confidence"])
    folder = folder if folder.is_dir() else folder.parent
    names = [file.relative_to(folder).as_posix() for file in files]
    rows.writerows([f, classes[y], f"{c:.4f}"] for f, y, c in zip(names, chosen.tolist(), confidence.tolist()))
    checkpoint.write_text(path, text.getvalue())
    counts = chosen.bincount(minlength=len(classes)).tolist()
    most = sorted(zip(counts, classes), key=lambda pair: -pair[0])[:8]
    shown = ", ".join(f"{name} {count}" for count, name in most if count)
    return f"{len(files)} files -> {Path(path)} ({shown}{', ...' if sum(c > 0 for c in counts) > 8 else ''})"
