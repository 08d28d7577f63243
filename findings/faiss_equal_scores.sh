#!/usr/bin/env bash
# What: faiss-cpu 1.15.1 (numpy 2.4.6), Linux x86_64. IndexFlatIP and IndexFlatL2 on unit vectors, 50 of which are there
#   twice.
# Expected (written down before the run): both indexes return the same neighbours; of two equal scores the lower number
#   comes first, as the stored order suggests.
# Seen: IndexFlatL2 puts the lower number first, IndexFlatIP the higher one, in all 50 cases. So a query that is itself in
#   the bank is not its own first hit under IndexFlatIP when a copy of it was added later. Code that drops column 0 to
#   leave the query out drops the copy and keeps the query as its own neighbour. Sets of images with duplicates
#   (CIFAR-10, web data) meet this in neighbour graphs, kNN accuracy and purity.
# Upstream: the order of equal scores is not documented; no report was found.
# Here: the neighbour search masks the query's own row by its number (shared_utils/neighbours.py), never by its place.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import faiss
import numpy as np

rng = np.random.default_rng(0)
x = rng.standard_normal((2000, 64)).astype("float32")
x /= np.linalg.norm(x, axis=1, keepdims=True)
x[1000:1050] = x[:50]  # row 1000 + i is a copy of row i
rows = np.arange(50)
own = {}
for kind in ("IP", "L2"):
    index = getattr(faiss, f"IndexFlat{kind}")(64)
    index.add(x)
    score, found = index.search(x[:50], 2)
    assert (score[:, 0] == score[:, 1]).all(), "the two scores are no longer equal"
    assert (np.sort(found, 1) == np.stack([rows, rows + 1000], 1)).all(), "other neighbours than the two copies"
    own[kind] = int((found[:, 0] == rows).sum())
print(f"faiss {faiss.__version__}: the query's own row comes first in {own['IP']} (IP) and {own['L2']} (L2) of 50 cases")
raise SystemExit(own != {"IP": 0, "L2": 50})
PY
