"""Every mini command of every folder's README, run as it stands there."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from shared_utils import UserError
from shared_utils.flags import runs_root

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/results.csv"))


def on_mini_data(words: list[str]) -> bool:
    return any(word.startswith("data/mini/") for word in words)


def mini_commands(readme: str, folder: str) -> list[list[str]]:
    """What needs no data in the bash blocks under Run and Evaluate, in their order: `bash <folder>/run_*.sh [mini] ...`
    and `python -m <folder>...` with a path below data/mini/.
    """
    found = []
    for section in re.findall(r"^## (?:Run|Evaluate)$(.*?)(?=^## |\Z)", readme, re.M | re.S):
        for block in re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["bash"] and words[1].startswith(f"{folder}/run_"):
                    if words[2:3] not in (["small"], ["paper"]):
                        found.append(words)
                elif words[:2] == ["python", "-m"] and words[2].startswith(f"{folder}.") and on_mini_data(words):
                    found.append(words)
    return found


def falls(course: list[float]) -> bool:
    """Whether the last quarter of a loss is below its first.

    A loss of 0 at the start is that of an empty memory, and one that climbs at once, within the first quarter, that of
    a memory whose random entries give way to embeddings: both are left out.
    """
    while course and course[0] == 0:
        course = course[1:]
    for _ in range(len(course) // 4):
        if course[0] < course[1]:
            course = course[1:]
    quarter = len(course) // 4
    return quarter > 0 and sum(course[-quarter:]) < sum(course[:quarter])


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        ([0.0, 3.0, 2.5, 2.0, 1.0], True),
        ([3.0, 2.9, 2.0, 2.1, 1.0, 1.2, 0.9, 1.0], True),
        ([1.0, 3.0, 4.0, 3.5, 3.4, 3.3, 3.2, 3.2, 3.1, 3.0, 3.0, 3.0], True),
        ([1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 4.4, 4.4, 4.3, 4.3, 4.2, 4.2], False),
        ([1.0, 3.0, 2.9, 2.9, 3.0, 3.0, 3.1, 3.0], False),
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
python -m mdp.knn data/mini/images --pretrained runs/mdp/a.pth
python -m mdp.knn --pretrained runs/mdp/a.pth --data_dir /data
python -m fame.knn data/mini/video
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
        ["python", "-m", "mdp.knn", "data/mini/images", "--pretrained", "runs/mdp/a.pth"],
        ["bash", "mdp/run_d.sh", "--flag"],
    ]


# A Python that only writes down its arguments, one call after the other.
STUB = '#!/usr/bin/env bash\nprintf \'%s\\037\' "$@" >> "$CALLS"\nprintf \'\\036\' >> "$CALLS"\n'


def recorded_calls(command: str, tmp: Path) -> list[list[str]]:
    """The [module, flags ...] that a command of results.csv would start, by a Python that only records them."""
    stub, calls = tmp / "python", tmp / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls.write_text("")
    environment = {**os.environ, "PYTHON": str(stub), "SKIP_ENV": "1", "CALLS": str(calls), "RUNS": str(tmp / "runs")}
    environment |= {"PATH": f"{tmp}:{os.environ['PATH']}", "DATA_ROOT": "/path/to/data"}
    done = subprocess.run(["bash", "-euc", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    found = [call.split("\037")[:-1] for call in calls.read_text().split("\036")[:-1]]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node"]  # then their number, --standalone, -m
    return [call[6:] if call[:3] == launch else call[1:] for call in found]


def misunderstood(calls: list[list[str]]) -> list[str]:
    """The calls that the parser of their module refuses, a line each."""
    wrong = []
    for module, *words in calls:
        try:
            importlib.import_module(module).get_parser().parse_args(words)
        except UserError as error:
            wrong.append(f"{module} {shlex.join(words)} -> {error}")
    return wrong


# mdp's training needs mmsegmentation, which is not installed everywhere.
@pytest.mark.parametrize("folder", [name for name in FOLDERS if name != "mdp"])
def test_commands_of_the_rows_are_understood(folder: str, tmp_path: Path) -> None:
    """Whatever stands under `command` starts scripts that exist, with flags that they have."""
    with open(ROOT / folder / "results.csv", newline="") as handle:
        commands = sorted({row["command"] for row in csv.DictReader(handle)} - {""})
    assert commands
    calls = {tuple(call) for command in commands for call in recorded_calls(command, tmp_path)}
    assert misunderstood([list(call) for call in sorted(calls)]) == []


def test_a_command_with_an_unknown_flag_is_named(tmp_path: Path) -> None:
    calls = recorded_calls("export GPUS=8 && bash hsa/run_lincls.sh paper --nosuch 1", tmp_path)
    (said,) = misunderstood(calls)
    assert calls[0][0] == "hsa.main_lincls" and "unrecognized arguments: --nosuch 1" in said


@pytest.mark.readme
@pytest.mark.parametrize("folder", FOLDERS)
def test_mini_commands(folder: str, tmp_path: Path, python: str) -> None:
    """They end well, in the order of the README, and leave what a run leaves: a falling loss among it."""
    commands = mini_commands((ROOT / folder / "README.md").read_text(encoding="utf-8"), folder)
    assert commands, f"{folder}/README.md names no mini command"
    environment = {**os.environ, "RUNS": str(tmp_path), "PYTHON": python, "SKIP_ENV": "1"}
    for words in commands:
        if words[0] == "python":
            words = [python, *words[1:]]
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
    tool = importlib.import_module(f"{folder}.lab.strip")
    made = tmp_path / tool.get_parser().get_default("pretrained").relative_to(runs_root())
    threads = torch.get_num_threads()
    tool.main(["--pretrained", str(made), "--out", str(tmp_path / "strip.png")])
    torch.set_num_threads(threads)
    with Image.open(tmp_path / "strip.png") as strip:  # white is what a strip without pictures would be
        assert strip.width <= 900 and len(strip.convert("RGB").getcolors(maxcolors=1 << 20)) > 50
    if (ROOT / "tests" / f"readme_{folder}.py").exists():  # what this paper's mini runs must have shown
        importlib.import_module(f"tests.readme_{folder}").check(tmp_path)
