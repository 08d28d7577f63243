"""The architecture: every rule is a function that names what breaks it, tried on this tree and on small bad trees."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from shared_utils import UserError
from shared_utils.flags import Parser, at_least, boolean, ints, not_negative, positive, spellings
from shared_utils.lab.results import BEGIN, CELL, END, papers
from tests.jobs import lines

ROOT = Path(__file__).resolve().parent.parent
NAMES = [paper.folder for paper in papers(ROOT)]
HEADINGS = ["Idea", "Run", "Evaluate", "Results", "Differences", "Layout", "Citation"]
# import name of each requirement whose name differs; pydensecrf (CRF) and onnx (weights) are optional and not installed
IMPORTS = {
    "onedl-mmengine": "mmengine",
    "onedl-mmcv": "mmcv",
    "onedl-mmsegmentation": "mmseg",
    "scikit-learn": "sklearn",
    "opencv-python": "cv2",
    "pillow": "PIL",
}
OPTIONAL = {"pydensecrf", "onnx"}


def requirements(path: Path) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def folders(root: Path) -> list[str]:
    return [name for name in NAMES if (root / name).is_dir()]


def tree(root: Path, *suffixes: str) -> Iterator[Path]:
    """The files of the repository (git's list where there is git), with one of the suffixes if any are given."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [root / name for name in listed if name]
    else:
        ignored = {".venv", "runs", "data", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
        paths = [path for path in root.rglob("*") if not ignored & set(path.relative_to(root).parts)]
    for path in sorted(paths):
        if path.is_file() and (not suffixes or path.suffix in suffixes):
            yield path


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def imported(path: Path, root: Path, strings: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, relative ones resolved, what importlib gets, `strings` of that form."""
    found = path.stat()
    yield from (name for name, text in _imported(path, root, found.st_mtime_ns, found.st_size) if strings or not text)


@cache
def _imported(path: Path, root: Path, *changed: int) -> list[tuple[str, bool]]:
    """(name, whether it is a string only); several rules ask for the same files."""
    package, names = path.relative_to(root).with_suffix("").parts[:-1], []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            # `from .. import x`, `from a import b`: x and a.b may be modules
            names += [(".".join([*base, alias.name]), False) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"({'|'.join([*NAMES, 'tests'])})(\.[A-Za-z_]\w*)+", node.value):
                names.append((node.value, True))
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            handed = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            names += [(name, False) for name in handed if isinstance(name, str)]
    return names


def import_problems(root: Path) -> list[str]:
    """A paper folder imports itself, shared_utils and declared requirements; shared_utils imports no paper folder."""
    declared = {r.name for r in requirements(root / "requirements.txt")}
    wrong = []
    for folder in [*folders(root), "shared_utils"]:
        extra = root / folder / "requirements.txt"
        names = declared | ({r.name for r in requirements(extra)} if extra.exists() else set())
        allowed = {IMPORTS.get(name, name.replace("-", "_")) for name in names} | OPTIONAL | sys.stdlib_module_names
        allowed |= {folder, "shared_utils"}
        for path in sorted((root / folder).rglob("*.py")):
            tops = {name.split(".")[0] for name in imported(path, root)}
            wrong += [f"{path.relative_to(root)} imports {top}" for top in sorted(tops - allowed)]
        for path in sorted((root / folder).rglob("*.sh")):
            for top in re.findall(r"-m\s+([A-Za-z_]\w*)", path.read_text(encoding="utf-8")):
                if top not in allowed | {"torch", "pip", "venv"}:
                    wrong.append(f"{path.relative_to(root)} runs -m {top}")
    return wrong


def folder_problems(root: Path) -> list[str]:
    """What each paper folder must hold, and the fixed headings of its README."""
    wrong = []
    for folder in folders(root):
        here = root / folder
        wrong += [
            f"{folder}/{name} is missing"
            for name in ("README.md", "RESULTS.md", "results.csv", "paper.json")
            if not (here / name).is_file()
        ]
        if not list(here.glob("run_*.sh")):
            wrong.append(f"{folder}/run_*.sh is missing")
        if not list((root / "tests").glob(f"test_{folder}*.py")):
            wrong.append(f"tests/test_{folder}*.py is missing")
        if (here / "README.md").is_file():
            text = (here / "README.md").read_text(encoding="utf-8")
            outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
            if re.findall(r"^## (.+?)\s*$", outside, re.M) != HEADINGS:
                wrong.append(f"{folder}/README.md: its second-level headings must be {', '.join(HEADINGS)}")
            if not text.startswith("# ") or len(re.findall(r"^# ", outside, re.M)) != 1:
                wrong.append(f"{folder}/README.md: must start with its only first-level heading")
            if BEGIN not in text or END not in text:
                wrong.append(f"{folder}/README.md: has no results markers")
    known = {*NAMES, "shared_utils", "tests", "findings"}
    strange = {path.parent.name for path in tree(root, ".py") if path.parent.parent == root} - known
    return wrong + [f"{name}/ is neither one of the ten papers nor shared_utils nor tests" for name in sorted(strange)]


def code_problems(root: Path) -> list[str]:
    """Calls that hide a wrong checkpoint, run untrusted data or tie the code to one device."""
    wrong = []
    for path in tree(root, ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            label = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = called(node)
                false = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is False}
                # a test may write a bad checkpoint to show that it is refused, code may not read one
                if name == "load_state_dict" and "strict" in false or name == "load" and "weights_only" in false:
                    wrong.append(f"{label}: {name} without its check")
                if isinstance(node.func, ast.Attribute) and name == "cuda" and "torch" not in ast.unparse(node.func):
                    wrong.append(f"{label}: .cuda() instead of .to(device)")
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "pickle" in names and path.parent.name != "tests":
                wrong.append(f"{label}: imports pickle")
    return wrong


MACHINE = re.compile(r"(?<![\w.$}>/-])/(?:home|root|work|Users|mnt/data)/\w|\.\./shared\b")
HOSTS = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|conda\.anaconda\.org|pytorch\.org/whl|npmjs\.org|debian\.org)\b")


def text_problems(root: Path) -> list[str]:
    """Addresses of package registries and absolute paths of one machine."""
    wrong = []
    for path in tree(root, ".py", ".sh", ".md", ".txt", ".yml", ".toml", ".cff", ".csv", ".json", ".jsonl", ""):
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if found := MACHINE.search(line) or HOSTS.search(line):
                wrong.append(f"{path.relative_to(root)}:{number}: {found[0]}")
    return wrong


def conda_problems(root: Path) -> list[str]:
    """environment.yml takes its packages from requirements.txt, whose every line is one exact pin."""
    wrong = []
    conda = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    pip = [part["pip"] for part in conda["dependencies"] if isinstance(part, dict)]
    if pip != [["-r requirements.txt"]]:
        wrong.append(f"environment.yml: its pip part must be -r requirements.txt, not {pip}")
    if conda["channels"] != ["conda-forge", "nodefaults"]:
        wrong.append("environment.yml: the channels must be conda-forge and nodefaults")
    for path in (root / "requirements.txt", root / "tests" / "requirements.txt"):
        for need in requirements(path):
            if [s.operator for s in need.specifier] != ["=="] or need.url:
                wrong.append(f"{path.relative_to(root)}: {need} is not one exact pin")
        for minor in ("3.10", "3.11", "3.12", "3.13"):
            active = [
                r.name for r in requirements(path) if not r.marker or r.marker.evaluate({"python_version": minor})
            ]
            every = {r.name for r in requirements(path)}
            wrong += [f"{path.name}: {name} has no single pin on {minor}" for name in every if active.count(name) != 1]
    return wrong


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the paper folders, shared_utils and tests."""
    files = [path for name in (*folders(root), "shared_utils", "tests") for path in sorted((root / name).rglob("*.py"))]
    names = (".".join(path.relative_to(root).with_suffix("").parts) for path in files)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files)}


def lab_problems(root: Path) -> list[str]:
    """What lies outside a lab/ imports nothing from one: training runs without what measures and draws."""
    wrong = []
    for path in modules(root).values():
        inside = path.relative_to(root).parts
        names = {name for name in imported(path, root) if "lab" in name.split(".")[1:]}
        if names and "lab" not in inside[:-1] and inside[0] != "tests":
            wrong.append(f"{path.relative_to(root)}: {len(names)} imports from a lab/: {', '.join(sorted(names))}")
    return wrong


def circle_problems(root: Path) -> list[str]:
    """Modules that import one another, also inside functions."""
    known = modules(root)
    after: dict[str, set[str]] = {}
    for name, path in known.items():
        found = (known.keys() & {full, full.rpartition(".")[0]} for full in imported(path, root, strings=False))
        after[name] = {max(names, key=len) for names in found if names} - {name}
    while leaves := [name for name, names in after.items() if not names & after.keys()]:
        for name in leaves:
            del after[name]
    back = {name: {other for other in after if name in after[other]} for name in after}
    while roots := [name for name, names in back.items() if not names & back.keys()]:  # they lead to circles only
        for name in roots:
            del back[name]
    wrong = []
    while back:  # one circle, or several that touch, at a time
        group, grown = set(), {min(back)}
        while grown:
            group |= grown
            grown = {
                name for name in back if name not in group and (back[name] & group or name in touched(back, group))
            }
        wrong.append(f"{min(group)}: {len(group)} modules import one another: {', '.join(sorted(group))}")
        back = {name: names for name, names in back.items() if name not in group}
    return wrong


def touched(graph: Mapping[str, set[str]], names: set[str]) -> set[str]:
    return set().union(*(graph[name] for name in names))


MOST = {"README.md": 110}  # lines; of every folder's README: 120


def length_problems(root: Path) -> list[str]:
    """READMEs longer than a reader's patience."""
    wrong = []
    for path in tree(root, ".md"):
        name = path.relative_to(root).as_posix()
        over = len(path.read_text(encoding="utf-8").splitlines()) - MOST.get(name, 120)
        if path.name == "README.md" and over > 0:
            wrong.append(f"{name}: {over} lines more than {MOST.get(name, 120)}")
    return wrong


def prose(text: str) -> str:
    """A Markdown text without its blocks and pieces of code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    titles = re.findall(r"^#+ (.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def link_problems(root: Path) -> list[str]:
    """Links and pictures of the documents that lead nowhere in the tree."""
    wrong = []
    for path in tree(root, ".md"):
        text, name = prose(path.read_text(encoding="utf-8")), path.relative_to(root)
        for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"\b(?:src|href)=\"([^\"]+)\"", text):
            file, _, anchor = target.partition("#")
            page = path.parent / file if file else path
            if re.match(r"[a-z]+:", target):
                continue
            if not page.exists():
                wrong.append(f"{name}: no {target}")
            elif anchor and page.suffix == ".md" and anchor not in anchors(page.read_text(encoding="utf-8")):
                wrong.append(f"{name}: no heading {target}")
    return wrong


def cell_problems(root: Path) -> list[str]:
    """Cells of the front page's tables that hold a paragraph; pictures aside."""
    front = root / "README.md"
    rows = re.findall(r"^\|(.+)\|$", front.read_text(encoding="utf-8"), re.M) if front.is_file() else []
    cells = [cell.strip() for row in rows for cell in row.split("|")]
    return [f"README.md: cell of {len(c)} characters: {c}" for c in cells if len(c) > CELL and not c.startswith("<img")]


UNSEEN = re.compile(r"\b(?:traps?|propert(?:y|ies))\s+\d+|\bsection\s+[\d.]+\s+of\s+the\s+spec", re.I)


def reference_problems(root: Path) -> list[str]:
    """References to lists that no reader has: what they mean should stand there instead of a number."""
    wrong = []
    for path in tree(root, ".py", ".sh", ".md", ".txt", ".yml", ".toml", ".json", ".csv"):
        found = [" ".join(text.split()) for text in UNSEEN.findall(path.read_text(encoding="utf-8", errors="replace"))]
        if found:
            listed = ", ".join(sorted(set(found)))
            wrong.append(f"{path.relative_to(root)}: {len(found)} references to an unknown document: {listed}")
    return wrong


CHECKS = [
    import_problems, folder_problems, code_problems, text_problems, conda_problems, lab_problems, circle_problems,
    length_problems, link_problems, cell_problems, reference_problems,
]  # fmt: skip

# What is not mended yet: the rule, the file (or module), and how many of it are there; none may be added.
PENDING: dict[str, dict[str, int]] = {}


def amounts(problems: list[str]) -> dict[str, int]:
    """{file: how many} of problems that begin with both."""
    found = [re.match(r"(\S+): (\d+) ", line) for line in problems]
    return {one[1]: int(one[2]) for one in found if one}


def new_problems(problems: list[str], pending: Mapping[str, int]) -> list[str]:
    """Those that `pending` does not list, or lists with less."""
    there = amounts(problems)
    return [line for line in problems if not there.get(name := line.split(": ")[0], 1) <= pending.get(name, 0)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_this_tree(check: Callable[[Path], list[str]]) -> None:
    assert new_problems(check(ROOT), PENDING.get(check.__name__, {})) == []


def test_what_was_mended_is_not_pending() -> None:
    checks = {check.__name__: check for check in [*CHECKS, line_problems]}
    there = {name: amounts(checks[name](ROOT)) for name in PENDING}
    mended = [f"{name}: {file}" for name, files in PENDING.items() for file in files if file not in there[name]]
    if mended:
        pytest.skip(f"mended, take it out of PENDING: {'; '.join(mended)}")


def test_pending_problems_may_not_grow() -> None:
    problems = ["a/x.py: 2 imports from a lab/: b, c", "a/README.md: 70 lines more than 120", "d.md: no e.md"]
    assert new_problems(problems, {}) == problems
    assert new_problems(problems, {"a/x.py": 2, "a/README.md": 69}) == problems[1:]
    assert new_problems(problems, {"a/x.py": 1, "a/README.md": 80}) == [problems[0], problems[2]]


def line_problems(root: Path) -> list[str]:
    """The table of what a reader reads: all papers, files that exist, today's counts but for 5 %, at most 900 lines."""
    wrong, rows = [], lines.ROW.findall(lines.table(root))
    if sorted(row[0] for row in rows) != sorted(folders(root)):
        wrong.append(f"{lines.PAGE}: rows of {', '.join(row[0] for row in rows)}, not of each paper folder")
    for (folder, _, *said), (files, *now) in zip(rows, lines.counted(root).values()):
        wrong += [f"{lines.PAGE}: no {folder}/{file.name}" for file in files if not file.is_file()]
        if any(abs(int(a) - b) > max(10, b // 20) for a, b in zip(said, [*now, sum(now)])):
            wrong.append(f"{lines.PAGE}: {folder} has {now[0]} + {now[1]} lines; python tests/jobs/lines.py --record")
        if sum(now) > lines.MOST:
            wrong.append(f"{folder}: {sum(now) - lines.MOST} lines more than {lines.MOST}")
    return wrong


def test_what_a_reader_reads_is_counted_and_short() -> None:
    assert new_problems(line_problems(ROOT), PENDING.get("line_problems", {})) == []


def test_a_wrong_count_of_lines_is_told(tmp_path: Path) -> None:
    page = "<!-- lines:begin -->\n| mdp | `builder.py` | 20 | 5 | 25 |\n<!-- lines:end -->\n"
    root = small_tree(tmp_path, {"docs/contributing.md": page})
    assert line_problems(root) == []
    (root / "mdp" / "builder.py").write_text("x = 1\n" * 400)
    (wrong,) = line_problems(root)
    assert "mdp has " in wrong and "+ 400 lines" in wrong
    (root / lines.PAGE).write_text(
        page.replace("| 20 | 5 | 25 |", lines.render(root).split("`")[-1].strip()[:-1] + "|")
    )
    assert line_problems(root) == []
    (root / "mdp" / "builder.py").write_text("x = 1\n" * 1000)
    assert any(line.startswith("mdp: ") for line in line_problems(root))
    (root / lines.PAGE).write_text(page.replace("builder.py", "gone.py"))
    assert f"{lines.PAGE}: no mdp/gone.py" in line_problems(root)
    (root / lines.PAGE).write_text(page.replace("| mdp |", "| hsa |"))
    assert any("not of each paper folder" in line for line in line_problems(root))


GOOD = {
    "README.md": "# Front\n\n[mdp](mdp/README.md#idea), ![b](docs/b.png)\n\n| a | b |\n",
    "docs/b.png": "",
    "requirements.txt": 'torch==2.14.1\nav==18.1.0; python_version >= "3.11"\nav==17.1.0; python_version < "3.11"\n',
    "tests/requirements.txt": "pytest==9.2.0\n",
    "environment.yml": "channels: [conda-forge, nodefaults]\ndependencies: [pip, {pip: [-r requirements.txt]}]\n",
    "shared_utils/run.py": "import torch\n",
    "mdp/__init__.py": "",
    "mdp/builder.py": "import os\nimport torch.nn as nn\nfrom . import losses\nfrom shared_utils import run\n",
    "mdp/README.md": "# T\n"
    + "".join(f"## {h}\n" for h in HEADINGS)
    + f"{BEGIN}\n{END}\n```bash\n# not a heading\n```\n",
    "mdp/results.csv": "id\n",
    "mdp/RESULTS.md": "# MDP: results\n",
    "mdp/paper.json": "{}\n",
    "mdp/run_a.sh": "$PYTHON -m mdp.builder\n$PYTHON -m torch.distributed.run -m mdp.builder\n",
    "tests/test_mdp.py": "",
}
BAD = [
    (import_problems, "mdp/builder.py", "import hsa.builder\n", "imports hsa"),
    (import_problems, "mdp/builder.py", "from hsa import builder\n", "imports hsa"),
    (import_problems, "mdp/builder.py", "def f():\n    from tests.bench import main\n", "imports tests"),
    (import_problems, "mdp/builder.py", "from ..hsa import builder\n", "imports hsa"),
    (import_problems, "mdp/builder.py", "import importlib\nimportlib.import_module('hsa')\n", "imports hsa"),
    (import_problems, "mdp/builder.py", "custom_imports = ['hsa.builder']\n", "imports hsa"),
    (import_problems, "mdp/builder.py", "import pandas\n", "imports pandas"),
    (import_problems, "mdp/run_a.sh", "$PYTHON -m hsa.builder\n", "runs -m hsa"),
    (import_problems, "shared_utils/run.py", "import mdp.builder\n", "imports mdp"),
    (folder_problems, "mdp/README.md", "# T\n## Idea\n## Run\n", "second-level headings"),
    (folder_problems, "mdp/README.md", GOOD["mdp/README.md"].replace(BEGIN, ""), "no results markers"),
    (folder_problems, "mdp/README.md", "text\n" + GOOD["mdp/README.md"], "first-level heading"),
    (folder_problems, "mdp/results.csv", None, "mdp/results.csv is missing"),
    (folder_problems, "mdp/run_a.sh", None, "run_*.sh is missing"),
    (folder_problems, "tests/test_mdp.py", None, "test_mdp*.py is missing"),
    (folder_problems, "helpers/__init__.py", "", "helpers/ is neither"),
    (code_problems, "mdp/builder.py", "m.load_state_dict(s, strict=False)\n", "load_state_dict without its check"),
    (code_problems, "mdp/builder.py", "torch.load(p, weights_only=False)\n", "load without its check"),
    (code_problems, "mdp/builder.py", "model.cuda()\n", ".cuda()"),
    (code_problems, "mdp/builder.py", "import pickle\n", "imports pickle"),
    (
        lab_problems,
        "mdp/builder.py",
        "from shared_utils.lab import mini\n",
        "1 imports from a lab/: shared_utils.lab.mini",
    ),
    (lab_problems, "mdp/builder.py", "def f():\n    import mdp.lab.arms\n", "mdp.lab.arms"),
    (lab_problems, "mdp/builder.py", "from .lab import strip\n", "mdp.lab.strip"),
    (lab_problems, "shared_utils/run.py", "from shared_utils.lab.mini import make\n", "shared_utils.lab.mini.make"),
    (circle_problems, "mdp/losses.py", "def f():\n    from mdp import builder\n", "mdp.builder, mdp.losses"),
    (circle_problems, "mdp/losses.py", "from mdp.builder import x\n", "mdp.builder: 2 modules"),
    (length_problems, "README.md", "x\n" * 111, "README.md: 1 lines more than 110"),
    (length_problems, "mdp/README.md", "x\n" * 130, "mdp/README.md: 10 lines more than 120"),
    (link_problems, "docs/a.md", "[x](../mdp/nosuch.md)\n", "docs/a.md: no ../mdp/nosuch.md"),
    (link_problems, "docs/a.md", "[x](../mdp/README.md#ideas)\n", "no heading ../mdp/README.md#ideas"),
    (link_problems, "docs/a.md", '<img src="c.png">\n', "no c.png"),
    (link_problems, "docs/a.md", "## A, b\n[x](#a--b)\n", "no heading #a--b"),
    (cell_problems, "README.md", f"| a | {'b' * 61} |\n", "cell of 61 characters"),
    (reference_problems, "mdp/builder.py", "# property" + " 7\n", "mdp/builder.py: 1 references"),
    (
        reference_problems,
        "mdp/README.md",
        "as trap\n" + "4 and tr" + "aps 5 say\n",
        "2 references to an unknown document",
    ),
    (text_problems, "mdp/README.md", "see /" + "home/ann/data\n", "README.md:1"),
    (text_problems, "requirements.txt", "--index-url https://" + "pypi" + ".org/simple\n", "requirements.txt:1"),
    (conda_problems, "environment.yml", GOOD["environment.yml"].replace("-r req", "torch, -r req"), "pip part"),
    (conda_problems, "environment.yml", GOOD["environment.yml"].replace("nodefaults", "defaults"), "channels"),
    (conda_problems, "requirements.txt", "torch>=2.11\n", "not one exact pin"),
    (conda_problems, "requirements.txt", 'numpy==2.4.6; python_version >= "3.11"\n', "no single pin on 3.10"),
]


def small_tree(root: Path, changes: dict[str, str | None]) -> Path:
    for name, text in {**GOOD, **changes}.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_good_small_tree_passes(check: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert check(small_tree(tmp_path, {})) == []


@pytest.mark.parametrize(("check", "name", "text", "expected"), BAD)
def test_each_rule_fails_on_what_breaks_it(
    check: Callable[[Path], list[str]], name: str, text: str | None, expected: str, tmp_path: Path
) -> None:
    problems = check(small_tree(tmp_path, {name: text}))
    assert any(expected in line for line in problems), problems


def test_installed_versions_are_the_pins() -> None:
    if not (Path(sys.prefix) / ".state").exists():
        pytest.skip("not in the environment that shared_utils/env.sh makes: another one may serve with other versions")
    pins = requirements(ROOT / "requirements.txt") + requirements(ROOT / "tests" / "requirements.txt")
    active = [need for need in pins if not need.marker or need.marker.evaluate()]
    assert {need.name: version(need.name) for need in active} == {need.name: str(need.specifier)[2:] for need in active}


# --- run scripts -----------------------------------------------------------------------------------------------------

STUB = '#!/usr/bin/env bash\nprintf \'%s\\037\' "$@" >> "$CALLS"\nprintf \'\\036\' >> "$CALLS"\n'


def run_script(script: Path, *words: str, tmp: Path, **extra: str) -> tuple[int, str, list[list[str]]]:
    """Run a run_*.sh with a Python that only records its arguments; exit code, stderr, the recorded calls."""
    tmp.mkdir(parents=True, exist_ok=True)
    stub, calls = tmp / "python", tmp / "calls"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    calls.write_text("")
    environment = {**os.environ, "PYTHON": str(stub), "SKIP_ENV": "1", "CALLS": str(calls), "RUNS": str(tmp), **extra}
    environment = {k: v for k, v in environment.items() if v or k not in ("GPUS", "DATA_ROOT")}
    # from another folder: a script finds the root by itself
    command = ["bash", str(script), *words]
    done = subprocess.run(command, cwd=tmp, env=environment, capture_output=True, text=True, timeout=60)
    recorded = [call.split("\037")[:-1] for call in calls.read_text().split("\036")[:-1]]
    return done.returncode, done.stderr, recorded


def script_problems(script: Path, tmp: Path) -> list[str]:
    """What a run_*.sh does otherwise than all of them; `tmp` is a folder to work in."""
    text, wrong = script.read_text(encoding="utf-8"), []
    if subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode:
        return ["is not valid bash"]
    if not re.search(r"^set -euo pipefail$", text, re.M):
        wrong.append("has no set -euo pipefail")
    if not re.search(r"^source shared_utils/env\.sh$", text, re.M):
        wrong.append("does not source shared_utils/env.sh")
    if re.search(r'(?<!")\$[@*](?!")', text):
        wrong.append("has $@ without quotes, or $*")
    drives = re.search(r"^\s*bash \S+/run_\w+\.sh", text, re.M) is not None
    code, said, calls = run_script(script, "nosuchtier", tmp=tmp / "tier")
    if code != 2 or calls or len(said.strip().splitlines()) != 1:
        wrong.append(f"unknown tier: exit {code}, {len(calls)} calls, stderr {said!r}; must be 2, none, one line")
    for words in ([], ["mini"], ["small"], ["paper"]):
        name = words[0] if words else "without a tier"
        extra = ["--flag", "two words", "--last"]
        # without a tier, flags may follow directly
        code, said, calls = run_script(script, *words, *extra, tmp=tmp / name, DATA_ROOT=str(tmp), GPUS="1")
        # a script that runs other run scripts adds what tells its arms apart after the extra flags
        last = [call[-3:] == extra or (drives and "\0".join(extra) in "\0".join(call)) for call in calls]
        if code or not any(last):
            wrong.append(f"{name}: exit {code}, extra flags do not come last in {calls}; {said[-300:]}")
        if words and not re.search(rf"^\s*(\w+\|)*{name}(\|\w+)*\)", text, re.M):
            wrong.append(f"{name}: has no card")
    if "GPUS" in text or "launch" in text:
        calls = run_script(script, "paper", tmp=tmp / "gpus", DATA_ROOT=str(tmp), GPUS="3")[2]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone", "-m"]
        if not any(call[:6] == launch for call in calls):
            wrong.append(f"GPUS=3 does not start three processes: {calls}")
        calls = run_script(script, "paper", tmp=tmp / "nodes", DATA_ROOT=str(tmp), GPUS="3", PET_NNODES="2")[2]
        if not any(call[:5] == [*launch[:4], "-m"] for call in calls):
            wrong.append(f"PET_NNODES=2 does not start one node of two: {calls}")
    return wrong


SCRIPTS = sorted(path for name in NAMES for path in (ROOT / name).glob("run_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_run_scripts(script: Path, tmp_path: Path) -> None:
    assert script_problems(script, tmp_path) == []


GOOD_SCRIPT = """#!/usr/bin/env bash
# GPUS is the number of processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source shared_utils/env.sh
tier=mini
case ${1:-} in
  mini | small | paper) tier=$1; shift ;;
  -* | "") ;;
  *) echo "error: unknown tier $1: mini, small or paper" >&2; exit 2 ;;
esac
case $tier in
  mini) flags=(--epochs 1) ;;
  small) flags=(--epochs 2) ;;
  paper) flags=(--epochs 3) ;;
esac
"${launch[@]}" -m mdp.main "${flags[@]}" "$@"
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", None),
        ('esac\n"${launch', 'if\n"${launch', "valid bash"),
        ("set -euo pipefail", "set -e", "set -euo"),
        ("source shared_utils/env.sh", ". shared_utils/env.sh", "does not source"),
        ('"$@"', "$@", "without quotes"),
        ("exit 2", "exit 1", "unknown tier: exit 1"),
        ("exit 2", "tier=mini; shift", "unknown tier: exit 0"),
        ('"${flags[@]}" "$@"', '"$@" "${flags[@]}"', "do not come last"),
        ("mini | small | paper)", "mini | small)", "paper: exit 2"),
        ('"${launch[@]}"', '"$PYTHON"', "GPUS=3 does not"),
        ('"${launch[@]}"', 'unset PET_NNODES; source shared_utils/env.sh; "${launch[@]}"', "PET_NNODES=2 does not"),
        ("  paper) flags=(--epochs 3) ;;\n", "  *) flags=() ;;\n", "paper: has no card"),
    ],
)
def test_script_rules_fail_on_what_breaks_them(old: str, new: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "mdp").mkdir()
    (tmp_path / "shared_utils").mkdir()
    shutil.copy(ROOT / "shared_utils" / "env.sh", tmp_path / "shared_utils" / "env.sh")
    (tmp_path / "requirements.txt").write_text("")
    script = tmp_path / "mdp" / "run_a.sh"
    script.write_text(GOOD_SCRIPT.replace(old, new) if old else GOOD_SCRIPT)
    problems = script_problems(script, tmp_path / "work")
    assert problems == [] if expected is None else any(expected in line for line in problems), problems


# --- entry points and continuous integration -------------------------------------------------------------------------


def without_help(root: Path, modules: list[str], python: str) -> list[str]:
    """The modules that do not answer --help with a usage text and exit code 0."""
    wrong = []
    for name in modules:
        done = subprocess.run([python, "-m", name, "--help"], cwd=root, capture_output=True, text=True, timeout=300)
        wrong += [] if done.returncode == 0 and "usage:" in done.stdout else [name]
    return wrong


def entry_points(root: Path) -> list[str]:
    found = [path.relative_to(root) for path in tree(root, ".py") if path.name != "conftest.py"]
    named = [
        path for path in found if re.search(r'^if __name__ == "__main__":', (root / path).read_text("utf-8"), re.M)
    ]
    return [".".join(path.with_suffix("").parts) for path in named]


def test_every_entry_point_answers_help(python: str) -> None:
    modules = entry_points(ROOT)
    assert "shared_utils.lab.results" in modules
    assert without_help(ROOT, modules, python) == []


def test_a_module_without_help_is_named(tmp_path: Path, python: str) -> None:
    (tmp_path / "silent.py").write_text('if __name__ == "__main__":\n    print("ran")\n')
    (tmp_path / "broken.py").write_text('import nosuch\nif __name__ == "__main__":\n    pass\n')
    good = 'import argparse\nif __name__ == "__main__":\n    argparse.ArgumentParser().parse_args()\n'
    (tmp_path / "good.py").write_text(good)
    assert entry_points(tmp_path) == ["broken", "good", "silent"]
    assert without_help(tmp_path, ["broken", "good", "silent"], python) == ["broken", "silent"]


# Only the standard library serves shared_utils.lab.results, so that it runs before anything is installed.
PARSERS = [name for name in entry_points(ROOT) if name != "shared_utils.lab.results" and not name.startswith("tests.")]


# What releases call otherwise: both names are understood.
COMMON = {
    "--end_epoch": "--epochs", "--total_epochs": "--epochs", "--stop_epoch": "--epochs", "--init_lr": "--lr",
    "--wd": "--weight_decay", "--data-root": "--data_dir", "--data": "--data_dir", "--data_path": "--data_dir",
    "--basepath": "--data_dir", "--print_freq": "--log-every", "--num_workers": "--workers",
}  # fmt: skip


def flag_problems(parser: argparse.ArgumentParser) -> list[str]:
    """Flags of an entry point that take any whole number, also one that makes no sense."""
    if not isinstance(parser, Parser):
        return [f"{type(parser).__name__} is not the Parser of shared_utils.flags"]
    bare = [action.dest for action in parser._actions if action.type is int and not action.choices]
    return [f"--{name} is of type int; give it a range: positive, natural, at_least(n)" for name in bare]


@pytest.mark.parametrize("module", PARSERS)
def test_every_parser_refuses_numbers_out_of_range_and_knows_the_common_names(module: str) -> None:
    parser = importlib.import_module(module).get_parser()
    assert flag_problems(parser) == []
    flags = {name: action for action in parser._actions for name in action.option_strings}
    for name in set(COMMON) & set(flags):
        assert flags.get(COMMON[name]) is flags[name], f"{name} is not understood as {COMMON[name]}"
    for name, value in (("--workers", "-1"), ("--threads", "-1"), ("--log-every", "0"), ("--seed", "1.5")):
        if name in flags:
            with pytest.raises(UserError, match=f"^{name} {value}: must "):
                parser.parse_args([name, value])


def test_parsers_without_ranges_are_found() -> None:
    parser = Parser()
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--bit", type=int, choices=[0, 1])
    parser.add_argument("--batch_size", type=at_least(2))
    assert flag_problems(parser) == ["--epochs is of type int; give it a range: positive, natural, at_least(n)"]
    assert flag_problems(argparse.ArgumentParser()) == ["ArgumentParser is not the Parser of shared_utils.flags"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch-size 0", "--batch_size 0: must be at least 1"),
        ("-b x", "--batch_size x: must be a whole number"),
        ("-b 2.0", "--batch_size 2.0: must be a whole number"),
        ("--wd -1", "--wd -1: must not be negative"),
        ("--wd nan", "--wd nan: must be a number"),
        ("--tau nan", "--tau nan: must be a number"),
        ("--share inf", "--share inf: must be a number"),
        ("-b 9223372036854775808", "--batch_size 9223372036854775808: must be below 2.63"),
        ("--schedule 60;80", "--schedule 60;80: must be whole numbers with commas"),
        ("--flip maybe", "--flip maybe: must be true or false"),
        ("--mode c", "--mode: invalid choice: 'c' .choose from '?a'?, '?b'?."),
        ("--nosuch 1", "unrecognized arguments: --nosuch 1; --help lists the flags"),
    ],
)
def test_a_mistaken_flag_is_one_line(words: str, said: str) -> None:
    parser = Parser()
    parser.add_argument("-b", "--batch_size", type=positive)
    parser.add_argument("--wd", type=not_negative)
    parser.add_argument("--mode", choices=["a", "b"])
    more = parser.add_argument_group("more")
    more.add_argument("--flip", type=boolean)
    more.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--tau", type=float, default="-1e-3")
    parser.add_argument("--schedule", type=ints, default="1,2")
    assert vars(parser.parse_args(["-b", "6e4", "--wd", "1"])) == {
        "batch_size": 60000, "wd": 1.0, "mode": None, "flip": None, "schedule": [1, 2], "share": 0.5, "tau": -1e-3
    }  # fmt: skip
    with pytest.raises(UserError, match=f"^{said}$"):
        parser.parse_args(words.split())


def test_flags_are_understood_in_both_spellings() -> None:
    assert spellings(["-p", "--log-every", "--print_freq"]) == [
        "-p", "--log-every", "--print_freq", "--log_every", "--print-freq"
    ]  # fmt: skip
    parser = Parser()
    parser.add_argument_group("run").add_argument("--save-every", type=positive)
    assert parser.parse_args(["--save_every", "3"]).save_every == 3


def test_help_tells_the_defaults() -> None:
    parser = Parser()
    parser.add_argument("--momentum", default=0.9)
    parser.add_argument("--cache", action="store_true", help="decode once")
    group = parser.add_argument_group("run")
    group.add_argument("--save-every", default=0, help="in steps")
    group.add_argument("--arch", default="a", help="default: the checkpoint's")
    text = " ".join(parser.format_help().split())
    told = ["MOMENTUM default: 0.9", "decode once run:", "in steps (default: 0)", "ARCH default: the checkpoint's"]
    assert [part for part in told if part not in text] == []


def listed_by_workflow(root: Path, output: Path) -> list[str]:
    """The smoke jobs that the workflow makes for a tree: its own listing step, executed."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert "fromJSON(needs.folders.outputs.folders)" in workflow["jobs"]["smoke"]["strategy"]["matrix"]["folder"]
    (step,) = [step for step in workflow["jobs"]["folders"]["steps"] if step.get("id") == "list"]
    environment = {**os.environ, "GITHUB_OUTPUT": str(output)}
    subprocess.run(["bash", "-e", "-c", step["run"]], cwd=root, env=environment, check=True)
    name, _, value = output.read_text().strip().partition("=")
    assert name == "folders"
    return yaml.safe_load(value)


def test_workflow_forgets_no_folder(tmp_path: Path) -> None:
    assert listed_by_workflow(ROOT, tmp_path / "here") == sorted(folders(ROOT))
    small = small_tree(tmp_path / "small", {"fame/README.md": "", "fame/results.csv": "", "hsa/README.md": ""})
    assert listed_by_workflow(small, tmp_path / "there") == ["fame", "mdp"]


@pytest.mark.parametrize("job", ["smoke", "workspace"])
def test_workflow_stands_for_both_kinds_of_cpu(job: str, tmp_path: Path) -> None:
    """A job each on the runner's CPU and on one without AVX-512."""
    found = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"][job]
    matrix = found["strategy"]["matrix"]
    assert {*matrix["cpu"], *(entry["cpu"] for entry in matrix.get("include", ()))} == {"native", "avx2"}
    (step,) = [step for step in found["steps"] if step.get("if") == "matrix.cpu == 'avx2'"]
    subprocess.run(
        ["bash", "-e", "-c", step["run"]], env={**os.environ, "GITHUB_ENV": str(tmp_path / "env")}, check=True
    )
    assert (tmp_path / "env").read_text().split() == ["ONEDNN_MAX_CPU_ISA=AVX2", "ATEN_CPU_CAPABILITY=avx2"]


@pytest.mark.parametrize("finished", [0, 150])
@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("*/run_arms.sh")))
def test_an_arm_that_fails_is_not_lost(folder: str, finished: int, tmp_path: Path) -> None:
    """Where the script waits for it, and where it fails while 150 seeds that are finished are looked through, so that
    no job is left to wait for.
    """
    seeds = range(1 + finished)
    for seed in seeds[1:]:
        for job in ("linear", "test", "attributes"):  # the last evaluation of an arm, by folder
            result = tmp_path / folder / "arms" / "mini" / "nonsense" / f"seed{seed}-{job}" / "result.json"
            result.parent.mkdir(parents=True)
            result.touch()
    env = {**os.environ, "SKIP_ENV": "1", "PYTHON": "true", "RUNS": str(tmp_path), "JOBS": "2", "ARMS": "nonsense"}
    env["SEEDS"] = " ".join(map(str, seeds))
    done = subprocess.run(["bash", f"{folder}/run_arms.sh", "mini"], cwd=ROOT, env=env, capture_output=True, text=True)
    # mdp looks through no finished seeds: all fail there, in any order
    assert done.returncode != 0 and re.search(
        r"did not finish: (.*;)?nonsense, seed 0 \(error: unknown arm 'nonsense'", done.stderr
    )
    logs = [file.read_text() for file in tmp_path.rglob("nonsense-seed0.log")]
    assert len(logs) == 1 and "unknown arm 'nonsense'" in logs[0]
