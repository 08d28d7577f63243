"""Where results go, how a run's end is noted, what compares runs, and runs that start from another's flags."""

import csv
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kscl.arch
import kscl.main_knn
from shared_utils import UserError, checkpoint, compare_runs
from shared_utils.data import EpochSampler, Keyed
from shared_utils.evaluation import write_result
from shared_utils.flags import Parser, add_output_flag, add_run_flags, floats, positive
from shared_utils.provenance import config_of
from shared_utils.run import Run, cli


def run_of(folder: Path, width: int = 4) -> Path:
    """A folder as a finished run leaves it, with a small network in its checkpoint."""
    state = {"encoder_q." + k: v for k, v in kscl.arch.build("resnet18", width, "cifar").state_dict().items()}
    flags = {"arch": "resnet18", "width": width, "stem": "cifar", "img_size": 8}
    checkpoint.save(folder / "checkpoint.pth", {"state_dict": state, "args": flags})
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    (folder / "log.jsonl").write_text("")
    return folder


def photographs(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("red fox", "owl"):
            (root / split / name).mkdir(parents=True)
            for i, size in enumerate([(9, 12), (12, 9), (10, 10)]):
                Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(
                    root / split / name / f"a {i}.png"
                )
    return root


def test_an_evaluation_writes_beside_its_weights_and_overwrites_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    run, data = run_of(tmp_path / "my run"), photographs(tmp_path / "my photographs")
    flags = ["--data_dir", str(data), "--workers", "0", "--device", "cpu", "--aug_backend", "pil"]

    def knn(weights: str | Path, *more: str) -> None:
        kscl.main_knn.main(["--pretrained", str(weights), *flags, *more])

    def told(folder: Path) -> Any:
        assert "knn" in json.loads((folder / "result.json").read_text())
        return json.loads((folder / "config.json").read_text())["flags"]["per_class"]

    knn(run / "checkpoint.pth")
    knn("my run/checkpoint.pth")  # the same again, from here
    assert [p.name for p in (run / "eval").iterdir()] == ["knn"] and told(run / "eval/knn") == 0
    knn(run / "checkpoint.pth", "--per_class", "2")
    knn(run / "checkpoint.pth", "--per_class", "2")
    assert told(run / "eval/knn-per_class=2") == 2 and told(run / "eval/knn") == 0
    assert f"-> {run}/eval/knn-per_class=2/result.json" in capsys.readouterr().out
    run_of(run)  # trained anew: other weights in the same file
    knn(run / "checkpoint.pth")
    assert len(list((run / "eval").iterdir())) == 3 and list(run.glob("eval/knn-backbone_sha256=*/result.json"))

    out = ["--output-dir", str(tmp_path / "seed0-knn")]  # as run_arms.sh does
    knn(run / "checkpoint.pth", *out)
    knn(run / "checkpoint.pth", *out)
    assert sorted(p.name for p in (tmp_path / "seed0-knn").iterdir()) == ["config.json", "result.json"]
    for count in (1, 2):
        knn(run / "checkpoint.pth", *out, "--per_class", str(count))
    assert "is of other flags, kept as result-2.json" in capsys.readouterr().out
    kept = [json.loads((tmp_path / "seed0-knn" / f"config{n}.json").read_text()) for n in ("-1", "-2", "")]
    assert [config["flags"]["per_class"] for config in kept] == [0, 1, 2]
    assert len(list((tmp_path / "seed0-knn").glob("result*.json"))) == 3

    config = (run / "config.json").read_bytes()
    knn(run / "checkpoint.pth", "--output-dir", str(run))
    assert told(run / "eval/main_knn") == 0 and (run / "config.json").read_bytes() == config

    shutil.copy(run / "checkpoint.pth", tmp_path / "public.pth")  # a file that is no run's
    knn(tmp_path / "public.pth")
    assert told(tmp_path / "runs/kscl/knn/public") == 0
    knn("none", "--arch", "resnet18", "--width", "4", "--stem", "cifar", "--img_size", "8")
    assert told(tmp_path / "runs/kscl/knn/none") == 0


EVALUATIONS = {
    "bingo.main_knn": "knn", "bingo.main_lincls": "lincls", "bingo.main_semi": "semi", "fame.eval": "finetune",
    "fame.main_probe": "probe", "fame.main_retrieve": "retrieve", "flat.test": "episodes", "hsa.main_knn": "knn",
    "hsa.main_lincls": "lincls", "hsa.main_semi": "semi", "kscl.main_lincls": "lincls", "mra.eval_occlusion":
    "occlusion", "sage.main_knn": "knn", "sage.main_lincls": "lincls", "sage.main_semi": "semi",
    "sage.main_finegrained": "finegrained", "sage.main_attributes": "attributes", "sscl.eval_cls": "cls",
    "sscl.eval_features": "features", "sscl.finetune": "finetune", "uvos_dino.eval_oneshot": "segment",
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_folder_of_every_evaluation(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    run = run_of(tmp_path / "run")
    parser = importlib.import_module(name).get_parser()
    weights = {"flat.test": "--features"}.get(name, "--pretrained")
    more = ["DATA"] if name.startswith("fame") else ["--basepath", "DATA"] if name.startswith("uvos") else []
    args = parser.parse_args([weights, str(run / "checkpoint.pth"), *more])
    dest = "save_path" if name.startswith("uvos") else "output_dir"
    assert getattr(args, dest) == run / "eval" / EVALUATIONS[name] and dest not in args.given
    again(name, args, tmp_path / "config.json")
    args = parser.parse_args([weights, str(tmp_path / "other.pth"), *more])
    assert getattr(args, dest) == tmp_path / "runs" / name.partition(".")[0] / EVALUATIONS[name] / "other"
    args = parser.parse_args([weights, str(run / "checkpoint.pth"), *more, f"--{dest}", "mine"])
    assert getattr(args, dest) == Path("mine") and dest in args.given


def again(name: str, args: Any, file: Path) -> None:
    """The flags of a run of `name` are those of one that starts from its config.json."""
    file.write_text(json.dumps(config_of(args)))
    found = importlib.import_module(name).get_parser().parse_args(["--config", str(file)])
    other = {k for k, v in vars(args).items() if getattr(found, k) != v}
    assert vars(found).keys() == vars(args).keys() and other <= {"output_dir", "save_path"}, other


TRAININGS = {
    "bingo.main_moco": "", "bingo.main_teacher": "", "fame.train": "DATA", "flat.train": "", "hsa.main_moco": "",
    "kscl.main_kscl": "", "mdp.main_pretrain": "", "mra.main_pretrain": "", "mra.main_supervised": "",
    "mra.main_fixmatch": "", "mra.main_fewshot": "", "sage.train": "--mode byol", "sscl.main": "",
    "uvos_dino.main_dino": "", "uvos_dino.train_RGB_cluster": "",
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_starts_from_its_own_flags(name, tmp_path):
    args = importlib.import_module(name).get_parser().parse_args([*TRAININGS[name].split(), "--seed", "5"])
    again(name, args, tmp_path / "config.json")


def job_parser(prog: str = "x.train") -> Parser:
    p = Parser(prog=prog)
    p.add_argument("--lr", type=float, default=0.1)
    p.add_argument("--drops", type=floats, default=[0.5, 1.0])
    p.add_argument("--size", type=positive, nargs=2, default=[4, 4])
    p.add_argument("--kind", choices=["a", "b"], default="a")
    p.add_argument("--cut", action="store_true")
    p.add_argument("--data_dir", type=Path, required=True)
    p.set_defaults(data_sha256="")
    add_run_flags(p, "x/train")
    return p


def job(*argv: str, spread: float = 0.8, stop: int = -1, fail: int = -1) -> Run:
    """Six steps in two epochs whose losses are lr times 1 to 6; step `stop` is told to end, step `fail` fails."""
    words = ["--device", "cpu", "--workers", "0", "--threads", "1", "--log-every", "2"]
    args = job_parser().parse_args([*argv, *words])
    args.data_sha256 = "of the data"
    run = Run(args, "x", "train")
    sampler = EpochSampler(6, 2, 0)
    loader = run.loader(Keyed(torch.utils.data.TensorDataset(torch.zeros(6)), 0), sampler)
    run.preflight({})
    for _ in run.batches(loader, sampler, 2):
        if run.step == fail:
            raise UserError("the disk has\ngone")
        if run.step == stop:
            run.signalled = signal.SIGTERM
        run.log(args.lr * (run.step + 1), **{"feat/std": spread, "loss_part": 2.0})
    write_result(run.dir, {"acc1": 50 + args.lr, "pretrained": "none"})
    run.finish()
    return run


def hparams_page(root: Path) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """{run: (flags, numbers)}, as tensorboard's HPARAMS page lists the runs below `root`."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    events = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(root)).Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(root))
    page = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(root)))
    status = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
    ask = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=99, allowed_statuses=status)
    groups = list_session_groups.Handler(context.RequestContext(), page, "", ask).run().session_groups
    assert len({group.name for group in groups}) == len(groups)
    return {
        group.name: (
            {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in group.hparams.items()},
            {value.name.tag: value.value for value in group.metric_values},
        )
        for group in groups
    }


def test_ends_are_noted_and_runs_compared(tmp_path, capsys, monkeypatch):
    runs, data = tmp_path / "my runs", ["--data_dir", str(tmp_path)]
    job("--output-dir", str(runs / "one"), *data)
    assert "collapsed" not in capsys.readouterr().out
    job("--output-dir", str(runs / "two"), *data, "--lr", "0.5", "--cut", spread=0.006)
    assert "collapsed: feat/std is 0.006" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        job("--output-dir", str(runs / "three"), *data, stop=3)
    assert stopped.value.code == 143
    end = json.loads((runs / "three/end.json").read_text())
    assert (end["state"], end["step"], end["steps"], end["loss"]) == ("stopped by SIGTERM", 4, 6, pytest.approx(0.2))
    monkeypatch.setattr(os, "_exit", sys.exit)  # which cli calls where other tests have left data workers
    with pytest.raises(SystemExit):
        cli(lambda _: job("--output-dir", str(runs / "four"), *data, fail=4).step)
    job("--output-dir", str(runs / "five"), *data)
    (runs / "five/end.json").unlink()  # as a killed process leaves it
    job("--output-dir", str(runs / "six"), *data)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys\nfile = open(sys.argv[1], 'a+')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
         "print('held', flush=True)\nsys.stdin.read()", str(runs / "six/.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout and holder.stdout.readline() == b"held\n"

    for place, number in (("one/eval/knn", 30.5), ("one-linear", 41.0)):  # beside RUN, and as run_arms.sh does
        (runs / place).mkdir(parents=True)
        (runs / place / "result.json").write_text(json.dumps({"top1": number, "data_dir": "d", "ok": True}))
    (runs / "one/eval/knn/result-1.json").write_text(json.dumps({"top1": 29.5, "of": {"owl": 1.0}}))
    monkeypatch.setenv("COLUMNS", "100")
    capsys.readouterr()
    assert compare_runs.main([str(runs), "--csv", str(tmp_path / "all.csv")]) == 0
    holder.communicate()
    out = capsys.readouterr().out
    assert out.startswith("x.train: 6 runs\nrun ") and max(map(len, out.splitlines())) <= 100
    with open(tmp_path / "all.csv", newline="") as handle:
        rows = {row["run"]: row for row in csv.DictReader(handle)}
    assert list(rows) == sorted(["one", "two", "three", "four", "five", "six"])
    assert {name: row["state"] for name, row in rows.items()} == {
        "one": "done", "two": "done", "three": "stopped by SIGTERM at step 4 of 6",
        "four": "failed: the disk has at step 4 of 6", "five": "crashed or killed after step 6",
        "six": "running, step 6",
    }  # fmt: skip
    one, two = rows["one"], rows["two"]
    assert float(one["loss"]) == pytest.approx(0.5) and float(two["loss"]) == pytest.approx(2.5)  # of epoch 2: 4, 5, 6
    assert (one["--lr"], two["--lr"], one["--cut"], two["--cut"]) == ("0.1", "0.5", "False", "True")
    assert "--kind" not in one and "--output_dir" not in one and one["loss_part"] == "2.0" and one["commit"]
    assert (one["knn/top1"], one["knn-1/top1"], one["knn-1/of/owl"], one["linear/top1"]) == (
        "30.5",
        "29.5",
        "1.0",
        "41.0",
    )
    assert two["acc1"] == "50.5" and two["knn/top1"] == "" and float(one["minutes"]) >= 0
    with pytest.raises(UserError, match="no run below this folder"):
        compare_runs.main([str(tmp_path / "my runs/one-linear")])
    assert [run.name for run in compare_runs.merged([runs / "one"])] == ["one"]
    several = compare_runs.merged([runs / "two", runs / "one", runs / "two"])  # each once, and where it lies
    assert [run.name for run in several] == [(runs / name).as_posix() for name in ("one", "two")]
    assert compare_runs.main([str(runs / "two"), str(runs / "one"), "--csv", str(tmp_path / "all.csv")]) == 0
    with pytest.raises(UserError, match="nowhere: no such folder"):
        compare_runs.main([str(runs), str(tmp_path / "nowhere")])

    job("--output-dir", str(runs / "three"), *data)  # goes on, and is then complete
    job("--output-dir", str(runs / "three"), *data)
    end = json.loads((runs / "three/end.json").read_text())
    assert (end["state"], end["step"], end["loss"]) == ("done", 6, pytest.approx(0.5))
    page = hparams_page(runs)
    assert set(page) == {"one", "two", "three", "five", "six"}
    for name, lr in (("one", 0.1), ("two", 0.5), ("three", 0.1)):
        flags, found = page[name]
        assert (flags["lr"], flags["cut"], flags["drops"], flags["job"]) == (lr, lr == 0.5, "[0.5, 1.0]", "x.train")
        assert found["loss/epoch"] == pytest.approx(5 * lr) and found["result/acc1"] == pytest.approx(50 + lr)
        assert "output_dir" not in flags and math.isfinite(found["feat/std"])
    assert not [path for path in (runs / "one").iterdir() if path.is_dir() and path.name != "eval"]


def test_starting_anew_keeps_the_result_of_other_flags(tmp_path):
    flags = ["--output-dir", str(tmp_path), "--data_dir", str(tmp_path), "--overwrite"]
    job(*flags)
    job(*flags)
    assert not (tmp_path / "result-1.json").exists()
    job(*flags, "--lr", "0.2")
    was, now = (json.loads((tmp_path / f"result{n}.json").read_text())["acc1"] for n in ("-1", ""))
    assert (was, now) == (50.1, 50.2)
    assert json.loads((tmp_path / "config-1.json").read_text())["flags"]["lr"] == 0.1


def test_a_run_starts_from_the_flags_of_another(tmp_path, capsys):
    first = tmp_path / "first run"
    given = ["--data_dir", str(tmp_path / "a b"), "--lr", "0.25", "--drops", "1,2.5", "--size", "3", "5", "--cut"]
    job(*given, "--kind", "b", "--output-dir", str(first), "--overwrite", "--seed", "3")
    config = first / "config.json"
    args = job_parser().parse_args(["--config", str(config), "--seed", "4"])
    assert (args.data_dir, args.lr, args.drops, args.size) == (tmp_path / "a b", 0.25, [1.0, 2.5], [3, 5])
    assert (args.cut, args.kind, args.seed, args.log_every) == (True, "b", 4, 2)
    assert not args.overwrite and args.output_dir == Path("runs/x/train") and args.data_sha256 == ""
    assert not hasattr(args, "config") and {"lr", "seed", "cut"} <= args.given and args.defaults["lr"] == 0.1
    assert job_parser().parse_args([f"--config={first}", "--lr", "1"]).lr == 1  # its folder serves too
    second = tmp_path / "second"
    job("--config", str(config), "--output-dir", str(second))
    flags = [json.loads((folder / "config.json").read_text())["flags"] for folder in (first, second)]
    assert [k for k in flags[0] if flags[0][k] != flags[1][k]] == ["output_dir", "overwrite"]
    job("--config", str(config), "--output-dir", str(second))  # a resume does not mind where the flags come from
    job(*given, "--kind", "b", "--seed", "3", "--output-dir", str(second))
    assert "--config" in job_parser().format_help() or job_parser().parse_args(given)

    def refused(change: dict[str, Any], *more: str) -> str:
        stored = json.loads(config.read_text())
        stored["asked"] |= change
        file = tmp_path / "other.json"
        file.write_text(json.dumps(stored | ({"job": change["job"]} if "job" in change else {})))
        with pytest.raises(UserError) as error:
            job_parser().parse_args(["--config", str(file), *more])
        assert "\n" not in str(error.value) and str(error.value).startswith(f"--config {file}: ")
        return str(error.value)

    assert "--learning_rate, --momentum are no flags of x.train" in refused({"learning_rate": 1, "momentum": 2})
    assert "--kind: invalid choice: 'c'" in refused({"kind": "c"})
    assert "--lr: inf: must be a number" in refused({"lr": math.inf})
    assert "--size: 0: must be at least 1" in refused({"size": [0, 3]})
    assert "of y.train, not of x.train" in refused({"job": "y.train"})
    for text in ("", "[]", "{}"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="bad.json: not the config.json of a run"):
            job_parser().parse_args(["--config", str(tmp_path / "bad.json")])
    with pytest.raises(UserError, match="--data_dir"):  # still required without the file
        job_parser().parse_args([])
    with pytest.raises(UserError, match="--config: expected one argument"):
        job_parser().parse_args(["--config"])


def test_a_positional_flag_comes_from_the_file_too(tmp_path):
    def parser() -> Parser:
        p = Parser(prog="x.positional")
        p.add_argument("data", type=Path)
        add_output_flag(p, "x/positional")
        return p

    file = tmp_path / "config.json"
    file.write_text(json.dumps({"flags": {"data": "my videos", "output_dir": "elsewhere"}}))  # as older runs have it
    args = parser().parse_args(["--config", str(file)])
    assert args.data == Path("my videos") and args.output_dir == Path("runs/x/positional")
    assert parser().parse_args(["mine", "--config", str(file)]).data == Path("mine")


def test_numbers_of_a_result_and_of_what_lies_directly_in_it():
    result = {"a": 1, "b": {"c": 2.5, "d": {"e": 3}, "ok": True}, "name": "x"}
    assert list(compare_runs.numbers(result)) == [("a", 1), ("b/c", 2.5)]
