"""Every mini command of every folder's README, run as it stands there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/results.csv"))


def mini_commands(readme: str, folder: str) -> list[list[str]]:
    """The commands `bash <folder>/run_*.sh [mini] ...` of the bash blocks under Run and Evaluate, in their order."""
    found = []
    for section in re.findall(r"^## (?:Run|Evaluate)$(.*?)(?=^## |\Z)", readme, re.M | re.S):
        for block in re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if (
                    words[:1] == ["bash"]
                    and words[1].startswith(f"{folder}/run_")
                    and words[2:3]
                    not in (
                        ["small"],
                        ["paper"],
                    )
                ):
                    found.append(words)
    return found


def falls(course: list[float]) -> bool:
    """Whether the last quarter of a loss is below its first; a loss of 0 at the start is that of an empty memory."""
    while course and course[0] == 0:
        course = course[1:]
    quarter = len(course) // 4
    return quarter > 0 and sum(course[-quarter:]) < sum(course[:quarter])


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        ([0.0, 3.0, 2.5, 2.0, 1.0], True),
        ([3.0, 2.9, 2.0, 2.1, 1.0, 1.2, 0.9, 1.0], True),
        ([0.0, 1.0, 1.1, 1.2, 1.3], False),
        ([2.0, 2.0, 2.0, 2.0], False),
        ([2.0, 1.0], False),
        ([0.0, 0.0, 0.0, 0.0], False),
        ([3.0, 2.0, 1.0, float("nan")], False),
    ],
)
def test_a_falling_loss_is_told_from_others(course: list[float], expected: bool) -> None:
    assert falls(course) is expected


def test_mini_commands_are_found_and_no_others() -> None:
    readme = """# X
```bash
bash mdp/run_before.sh
```
## Run
```bash
bash mdp/run_a.sh           # three minutes
DATA_ROOT=/data bash mdp/run_a.sh small
bash mdp/run_a.sh paper --lr 1
bash mdp/run_b.sh mini --name \\
  "two words"
bash fame/run_c.sh
```
```
bash mdp/run_output.sh
```
## Evaluate
```bash
bash mdp/run_d.sh --flag
```
## Results
```bash
bash mdp/run_after.sh
```
"""
    assert mini_commands(readme, "mdp") == [
        ["bash", "mdp/run_a.sh"],
        ["bash", "mdp/run_b.sh", "mini", "--name", "two words"],
        ["bash", "mdp/run_d.sh", "--flag"],
    ]


@pytest.mark.readme
@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize("folder", FOLDERS)
def test_mini_commands(folder: str, tmp_path: Path) -> None:
    """They end well, in the order of the README, and leave what a run leaves: a falling loss among it."""
    if importlib.util.find_spec("mmseg") is None:
        pytest.skip("mmsegmentation is not installed")
    commands = mini_commands((ROOT / folder / "README.md").read_text(encoding="utf-8"), folder)
    assert commands, f"{folder}/README.md names no mini command"
    environment = {**os.environ, "RUNS": str(tmp_path), "PYTHON": sys.executable, "SKIP_ENV": "1"}
    for words in commands:
        here = [re.sub(r"(^|=)runs/", rf"\g<1>{tmp_path}/", word) for word in words]
        done = subprocess.run(here, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    runs = [path.parent for path in tmp_path.rglob("config.json")]
    complete = [run for run in runs if (run / "checkpoint.pth").exists() and list(run.glob("events.*"))]
    assert complete, f"no run with config.json, checkpoint.pth and a tensorboard log under {runs}"
    for run in complete:
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        course = [row["loss"] for row in rows if "loss" in row]
        assert falls(course), f"the loss of {run} does not fall: {course}"
    if (ROOT / "tests" / f"readme_{folder}.py").exists():  # what this paper's mini runs must have shown
        importlib.import_module(f"tests.readme_{folder}").check(tmp_path)
