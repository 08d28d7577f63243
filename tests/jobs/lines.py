"""Lines that a reader of each paper meets: python tests/jobs/lines.py [--record]

README, method files and training script of each folder, as the table in docs/contributing.md names them. `--record`
writes today's counts into it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs") / "contributing.md"
MOST = 900  # lines of a paper
ROW = re.compile(r"^\| (\w+) \| (`[^|]+`) \| (\d+) \| (\d+) \| (\d+) \|$", re.M)  # folder, files, README, code, both


def count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def table(root: Path) -> str:
    """The table's rows in the page of `root`."""
    return re.split(r"<!-- lines:(?:begin|end) -->\n", (root / PAGE).read_text(encoding="utf-8"))[1]


def counted(root: Path) -> dict[str, tuple[list[Path], int, int]]:
    """{folder: (its files, lines of its README, lines of its code)} for every row of the table."""
    found = {}
    for folder, names, *_ in ROW.findall(table(root)):
        files = [root / folder / name for name in re.findall(r"`([^`]+)`", names)]
        found[folder] = files, count(root / folder / "README.md"), sum(map(count, files))
    return found


def render(root: Path) -> str:
    """The table with today's counts."""
    now = counted(root)

    def fresh(row: re.Match[str]) -> str:
        _, readme, code = now[row[1]]
        return f"| {row[1]} | {row[2]} | {readme} | {code} | {readme + code} |"

    return ROW.sub(fresh, table(root))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write the counts into {PAGE}")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    old, new = table(ROOT), render(ROOT)
    print(new)
    if args.record:
        page = ROOT / PAGE
        page.write_text(page.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


if __name__ == "__main__":
    main()
