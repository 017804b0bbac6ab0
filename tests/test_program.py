"""The program from outside: real processes, real files, real signals."""

import http.server
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers
from matplotlib.figure import Figure

import evaluator
import llms
import main
from plots import plot, report, reproduce

ROOT = Path(__file__).parent.parent
SMALL = "--dataset arithmetic --questions_per_step 2 --group_size 2 --max_new_tokens 8"
SMALL += " --steps 6 --eval_every 3 --eval_questions 4"
SMALL += " --learning_rate 1e-3 --save_every 2 --show_every 3"
# nothing of these tests may reach the network, nor a cache of the user's
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.Popen(command, cwd=folder, env=OFFLINE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(folder, *arguments):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def lines(path):
    """The rows of a metrics file without times and memory."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in row if not key.startswith("seconds") and key != "memory"} for row in rows]


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """The program in this process and an empty folder, which saves the seconds of a start: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = main.main(arguments)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A folder in which a small run has ended: its model, flags and output."""
    folder = tmp_path_factory.mktemp("work")
    flags = ["--model", checkpoint("qwen2"), *SMALL.split()]
    code, out, err = run(folder, *flags, "--run", "whole", "--save_every", "2")
    assert code == 0, err
    return folder, flags, out


def test_a_run_leaves_what_it_promises(finished):
    folder, _, out = finished
    left = folder / "runs" / "whole"
    config = json.loads((left / "config.json").read_text())
    assert config["GROUP_SIZE"] == 2 and config["BETA"] == 0.04 and config["versions"]["torch"] and config["device"]
    assert (
        config["MAX_PROMPT_TOKENS"] == 512 and config["prompt_limit"] == 504
    )  # the model reads 512, 8 are for outputs
    rows = lines(left / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 3, 6]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4, 5, 6]
    samples = lines(left / "samples.jsonl")
    assert {"completion", "reward", "advantage", "correctness", "tag_count"} <= samples[-5].keys() | samples[4].keys()
    assert (left / "train_score.png").stat().st_size > 10_000 and (left / "eval_score.png").stat().st_size > 10_000
    assert (left / "result.png").stat().st_size > 10_000
    assert transformers.AutoModelForCausalLM.from_pretrained(left / "model").config.model_type == "qwen2"
    for promised in ("step    1 | reward", "TEST accuracy", "expected", "base, wrong", "trained, wrong", "answer:"):
        assert promised in out


def test_a_run_that_is_killed_and_resumed_is_bit_for_bit_the_uninterrupted_one(finished):
    folder, flags, _ = finished
    killed, whole = folder / "runs" / "killed", folder / "runs" / "whole"
    process, kills = start(folder, *flags, "--run", "killed"), 0
    while process.poll() is None:
        if (killed / "config.json").exists() and kills < 2:  # tests/faults.py does it twenty times
            time.sleep(random.uniform(0.0, 0.8))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            process = start(folder, "--resume", "runs/killed")
            time.sleep(4 if kills < 2 else 0)  # past the imports
        time.sleep(0.05)
    _, err = process.communicate()
    assert process.returncode == 0 and kills == 2, err
    assert lines(killed / "metrics.jsonl") == lines(whole / "metrics.jsonl")
    assert lines(killed / "samples.jsonl") == lines(whole / "samples.jsonl")
    weights = "model/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()


def test_ctrl_c_and_sigterm_finish_the_step_save_and_say_how_to_resume(finished, inside, monkeypatch):
    folder, flags, _ = finished
    endless = ["--steps", "100000", "--eval_every", "100000", "--save_every", "100000"]
    numbers = (signal.SIGINT, signal.SIGTERM)
    processes = [start(folder, *flags, *endless, "--run", f"stopped-{number}") for number in numbers]
    for number, process in zip(numbers, processes):
        metrics = folder / "runs" / f"stopped-{number}" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number and f"--resume runs/stopped-{number}" in out
        done = lines(metrics)[-1]["step"]
        monkeypatch.chdir(folder)
        code, _, err = inside("--resume", f"runs/stopped-{number}", "--steps", str(done + 1))
        assert code == 0, err
        assert [row["step"] for row in lines(metrics) if "reward" in row] == list(range(1, done + 2))


STUCK = f"""
import runpy, subprocess, sys, time, evaluator
evaluator.PATIENCE = 0.5
@evaluator.reward
def stuck(completion, problem):
    if evaluator.sandbox_problem() is None:
        child = subprocess.Popen(evaluator.sandboxed("import time; time.sleep(600)"), env={{}}, start_new_session=True)
        print("child", child.pid, file=sys.stderr, flush=True)
    time.sleep(600)
sys.argv[0] = "main.py"
runpy.run_path({str(ROOT / "main.py")!r}, run_name="__main__")
"""


def test_a_reward_that_never_returns_is_named_and_a_second_ctrl_c_ends_the_run(finished, tmp_path):
    _, flags, _ = finished
    command = [sys.executable, "-c", STUCK, *flags, "--test"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=OFFLINE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    heard = []
    try:
        for line in process.stderr:
            heard.append(line)
            if line.startswith("note: "):
                break
        assert heard[-1].startswith("note: waiting for the reward stuck (question: "), heard
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() and "Ctrl-C again" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130 and err == "main.py: interrupted\n"
    children = [int(line.split()[1]) for line in heard if line.startswith("child")]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a sandbox was left behind"


LIKE_WINDOWS = f"""
import builtins, errno, fcntl, os, runpy, signal, sys
import datasets, matplotlib.figure, torch, transformers  # they go by the name of the system
from transformers import Qwen2ForCausalLM
flags, fsync, replace = fcntl.fcntl, os.fsync, os.replace

def import_what_windows_has(name, known=None, *others, **named):
    if name in ("fcntl", "grp", "pwd", "resource", "termios") and (known or {{}}).get("__file__", "").startswith({str(ROOT)!r}):
        raise ModuleNotFoundError(name)
    return import_as_usual(name, known, *others, **named)

def fsync_of_a_file_that_can_be_written(fd):
    if flags(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    fsync(fd)

def replace_what_nobody_holds(old, new):
    held = [os.path.realpath("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps") as maps:
        held += [line.split()[-1] for line in maps]
    if {{os.path.realpath(old), os.path.realpath(new)}} & {{*held}}:
        raise PermissionError(errno.EACCES, "Access is denied")
    replace(old, new)

import_as_usual, builtins.__import__ = builtins.__import__, import_what_windows_has
for name in ("fork", "geteuid", "getuid", "killpg", "sched_getaffinity", "setsid", "sysconf"):
    delattr(os, name)
del signal.SIGKILL, signal.SIGALRM
os.fsync, os.replace = fsync_of_a_file_that_can_be_written, replace_what_nobody_holds
assert open(os.devnull).encoding.lower() not in ("utf-8", "utf8")
for arguments in ARGUMENTS:
    sys.argv = ["main.py", *arguments]
    try:
        runpy.run_path({str(ROOT / "main.py")!r}, run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
"""


def test_a_run_needs_nothing_that_windows_lacks_and_programs_are_refused_there(finished, tmp_path):
    _, flags, _ = finished
    row = {"text": "Write f() that gives 1.", "code": "def f():\n    return 1\n", "test_list": ["assert f() == 1"]}
    (tmp_path / "programs.jsonl").write_text(json.dumps(row) + "\n")
    asked = [{"question": f"π₁ × {i}?", "answer": f"#### {i}"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked), encoding="utf-8"
    )
    arguments = [
        [
            *flags,
            "--dataset",
            "train.jsonl",
            "--eval_dataset",
            "arithmetic",
            "--steps",
            "2",
            "--run",
            "w",
            "--show_every",
            "1",
        ],
        ["--resume", "runs/w", "--steps", "3"],
        [*flags, "--dataset", "programs.jsonl", "--eval_dataset", "arithmetic"],
    ]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": str(tmp_path)}
    command = [sys.executable, "-c", LIKE_WINDOWS.replace("ARGUMENTS", repr(arguments))]
    ended = subprocess.run(command, cwd=tmp_path, env=OFFLINE | ascii_only, capture_output=True, text=True, check=False)
    assert [line for line in ended.stdout.splitlines() if line.startswith("status")] == [
        "status 0",
        "status 0",
        "status 2",
    ], ended.stderr
    errors = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "programs are run in a sandbox only: bubblewrap is not installed" in errors[0]
    rows = [row for row in lines(tmp_path / "runs" / "w" / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "π₁ ×" in lines(tmp_path / "runs" / "w" / "samples.jsonl")[4]["question"]


def test_the_command_that_continues_a_run_is_quoted_for_the_shell():
    assert report.stopped_line(Path("runs/a b"), 5, 1, 1).endswith("with: python main.py --resume 'runs/a b'")
    line = report.stopped_line(Path("runs/a"), 5, 4, 2)
    assert line == "stopped after step 5 and saved; go on with: torchrun --nproc_per_node 2 -- main.py --resume runs/a"


def test_test_runs_two_steps_and_one_evaluation_any_number_of_times(finished, inside):
    _, flags, _ = finished
    for number in (1, 2):
        code, _, err = inside(*flags, "--test")
        assert code == 0, err
        rows = lines(Path("runs") / f"test-{number}" / "metrics.jsonl")
        assert [row["step"] for row in rows if "reward" in row] == [1, 2]
        assert [row["step"] for row in rows if "eval/accuracy" in row] == [2]


def test_two_models_are_tested_on_the_same_questions(finished, inside, monkeypatch):
    folder, flags, _ = finished
    monkeypatch.chdir(folder)
    code, out, err = inside(
        "--evaluate", "runs/whole", "--against", flags[1], "--eval_questions", "3", "--eval_samples", "2"
    )
    assert code == 0, err
    assert out.count("accuracy 0.000 [0.000, 0.") == 2 and "pass@2" in out and "difference: +0.000" in out


def test_a_run_that_is_resumed_on_another_day_has_the_prompts_of_the_first(finished, inside, tmp_path, monkeypatch):
    _, flags, _ = finished
    shutil.copytree(flags[1], tmp_path / "dated")
    template = (tmp_path / "dated" / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "dated" / "chat_template.jinja").write_text('{{ strftime_now("%d %b %Y") }}\n' + template)
    flags = ["--model", "dated", *flags[2:], "--save_every", "1"]
    monkeypatch.setattr(llms, "TODAY", date(2024, 7, 26))
    for run in ("whole", "resumed"):
        code, _, err = inside(*flags, "--run", run, "--steps", "4" if run == "whole" else "2")
        assert code == 0, err
    monkeypatch.setattr(llms, "TODAY", date(2025, 12, 31))
    code, _, err = inside("--resume", "runs/resumed", "--steps", "4")
    assert code == 0, err
    assert json.loads((tmp_path / "runs/resumed/config.json").read_text())["date"] == "2024-07-26"
    weights = [(tmp_path / "runs" / run / "model/model.safetensors").read_bytes() for run in ("whole", "resumed")]
    assert weights[0] == weights[1]
    monkeypatch.setattr(llms, "TODAY", date(2025, 12, 31))  # does another date matter at all?
    inside(*flags, "--run", "other", "--steps", "4")
    assert (tmp_path / "runs/other/model/model.safetensors").read_bytes() != weights[0]
    config = json.loads((tmp_path / "runs/other/config.json").read_text()) | {"date": "today"}
    (tmp_path / "runs/other/config.json").write_text(json.dumps(config))
    code, _, err = inside("--resume", "runs/other", "--steps", "5")
    assert code == 2 and err.count("\n") == 1 and "config.json is damaged: date" in err


def test_plots_overlay_runs_from_their_files_alone(finished):
    folder, _, _ = finished
    (folder / "runs" / "again").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (folder / "runs" / "again" / name).write_text((folder / "runs" / "whole" / name).read_text())
    command = [sys.executable, str(ROOT / "plots" / "plot.py"), "runs/whole", "runs/again", "--out", "drawn"]
    drawn = subprocess.run(command, cwd=folder, check=False)
    assert drawn.returncode == 0 and sorted(p.name for p in (folder / "drawn").iterdir()) == [
        "eval_score.png",
        "result.png",
        "train_score.png",
    ]


def test_curves_can_be_drawn_by_what_was_spent(finished, monkeypatch, tmp_path):
    rows = [{"step": 0, "eval/accuracy": 0.2}, {"step": 1, "tokens": 100, "seconds": 2.0}]
    rows += [{"step": 2, "tokens": 250, "seconds": 3.0}, {"step": 2, "eval/accuracy": 0.8}]
    assert plot.positions(rows, "tokens") == {0: 0, 1: 100, 2: 250}
    assert plot.positions(rows, "seconds") == {0: 0, 1: 2.0, 2: 5.0}
    axes = Figure().subplots()
    twice = [row | {key: 2 * row[key] for key in ("tokens", "seconds") if key in row} for row in rows]
    plot.panel(axes, {"eval/accuracy": ""}, "title", {"a": [rows, twice]}, smoothed=False, x="tokens")
    assert list(axes.lines[0].get_xdata()) == [0, 375] and axes.get_xlabel() == "tokens sampled"
    seen, parts, run = [], (plot.panel, plot.shade), finished[0] / "runs" / "whole"
    monkeypatch.setattr(plot, "panel", lambda *inputs: seen.append(inputs[-1]) or parts[0](*inputs))
    monkeypatch.setattr(plot, "shade", lambda *inputs: seen.append(inputs[-1]) or parts[1](*inputs))
    monkeypatch.setattr(sys, "argv", ["plot.py", "--x", "tokens", str(run), "--out", str(tmp_path)])
    assert plot.main() == 0 and set(seen) == {"tokens"}
    assert (tmp_path / "eval_score.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, file, text, says",
    [
        ("nowhere", None, "", "nowhere is no run"),
        ("run --out rows.txt", "../rows.txt", "", "cannot write to rows.txt: File exists"),
        ("run --out /proc/x", None, "", "cannot write to /proc/x"),
        ("run", "metrics.jsonl", "3\n", "run/metrics.jsonl is damaged: a row without a step: 3"),
        ("run", "metrics.jsonl", '{"accuracy": 1}\n', "run/metrics.jsonl is damaged: a row without a step"),
        ("run", "metrics.jsonl", "\udcff\n", "run/metrics.jsonl is damaged"),
        ("run", "config.json", "[]", "run/config.json is damaged: it holds no settings"),
    ],
)
def test_what_cannot_be_drawn_is_answered_in_one_line(
    finished, tmp_path, monkeypatch, capsys, arguments, file, text, says
):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(finished[0] / "runs" / "whole" / name, tmp_path / "run")
    if file:
        (tmp_path / "run" / file).write_text(text, errors="surrogateescape")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments.split()])
    assert plot.main() == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("plot.py: error: ") and says in err


def test_bands_faint_lines_and_stages_are_where_the_curve_is():
    rows = [{"step": step, "stage": "ab"[step > 2], "tokens": 100 * step, "reward": 1.0} for step in (1, 2, 3, 4)]
    axes = Figure().subplots()
    plot.line(axes, "reward", [rows], True, "tokens", color="C0")
    assert all(list(line.get_xdata()) == [100, 200, 300, 400] for line in axes.lines)
    band = axes.collections[0].get_paths()[0].vertices[:, 0]
    assert (band.min(), band.max()) == (100, 400)
    axes = Figure().subplots()
    plot.shade(axes, rows, "tokens")
    assert [text.get_position()[0] for text in axes.texts] == [100, 300]  # in the middle of 0 to 200, and 200 to 400


def test_what_the_papers_figures_need_of_a_run_is_in_its_metrics(finished):
    found = reproduce.summary(finished[0] / "runs" / "whole")
    assert [test["step"] for test in found["tests"]] == [0, 3, 6]
    assert found["last"].keys() == {"kl", "clip_low", "clip_high", "zero_std_groups"} and found["minutes"] > 0


def test_the_papers_figures_are_drawn_from_the_data_beside_them(tmp_path):
    shutil.copytree(ROOT / "plots", tmp_path / "plots", ignore=shutil.ignore_patterns("*.png"))
    command = [sys.executable, str(tmp_path / "plots" / "reproduce.py")]
    drawn = subprocess.run([*command, "--draw"], check=False, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    pictures = sorted(path.stem for path in (tmp_path / "plots" / "reproduce").glob("*.png"))
    assert pictures == ["ablations", "controls", "figure5", "figure6", "figure7", "methods", "variants"]
    assert "| grpo |" in drawn.stdout and "| mu-4-epsilon-10 |" in drawn.stdout
    wrong = subprocess.run([*command, "a2c"], check=False, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "online-rft" in wrong.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--group_sise 8", "did you mean --group_size"),
        ("--lr=1e-5", "did you mean --learning_rate or --lora_rank?"),
        ("--qps 8", "did you mean --questions_per_step?"),
        ("--evaluate runs/typo --dataset arithmetic", "unknown model: runs/typo: no such model folder\n"),
        ("--resmue runs/x", "did you mean --resume"),
        ("--group_size eight", "invalid int value"),
        ("--mask_truncated maybe", "true or false, not 'maybe'"),
        ("--group_size 1", "at least 2"),
        ("--epsilon_low nan", "epsilon_low"),
        ("--kl k4", "one of k1, k2, k3"),
        ("--temperature 0", "at least 0.01"),
        ("--resume=", "need a name"),
        ("--run ../x", "a name without folders"),
        ("--test --resume runs/x", "not allowed with"),
        ("--token_budget 10", "token_budget"),
        ("--learning-rate nan", "learning_rate"),
        ("--dataset nowhere --model tiny", "unknown data set: nowhere"),
        ("--dataset gsm8k --model tiny", "--dataset PATH"),
        ("--model ./nowhere --dataset arithmetic", "no such model folder"),
        ("--model Qwen/Qwen2.5-1.5B-Instruct --dataset arithmetic", "cannot be reached"),
        ("--against tiny", "--evaluate"),
        ("--resume runs/nowhere", "runs/nowhere is no run: runs/nowhere/config.json cannot be read (No such file"),
        ("--learning_rate 1e300", "--learning_rate must be below 2 to the 63"),
        ("--rewards correctness=-1e39", "the weight of correctness must be below 2 to the 63"),
        ("--rewards correctness=nan", "the weight of correctness must be below 2 to the 63, not nan"),
        ("--rewards correctness", "name=weight pairs, as in correctness=2,integer=0.5, not 'correctness'"),
        ("--rewards correctness=2,brevity=1", "'brevity' is not a reward; there are correctness, "),
        ("--rewards=", "name=weight pairs"),
        ("--reward_model x --rewards correctness=2", "must be given a weight for reward_model"),
        ("--epsilon_high 1e300", "below 2 to the 63"),
        ("--lora_alpha inf", "below 2 to the 63"),
        ("--eval_questions 99999999999999999999", "--eval_questions must be below 2 to the 63"),
        ("--seed 9223372036854775808", "--seed must be below 2 to the 63"),
        ("--epsilon_low 1.5", "--epsilon_low must be from 0 to 1"),
        ("--algorithm ppo --epsilon_low 2", "--epsilon_low must be from 0 to 1"),
        ("--run a\x07b", r"--run must be printable, not 'a\x07b'"),
        ("--run \udcff\udcfe", r"--run must be printable, not '\udcff\udcfe'"),
    ],
)
def test_a_mistake_is_answered_in_one_line_and_writes_nothing(inside, tmp_path, arguments, says):
    code, out, err = inside(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("main.py: error: ") and says in err
    assert not any(tmp_path.iterdir())


def test_training_prompts_that_are_all_too_long_are_refused_before_anything_is_written(finished, inside, tmp_path):
    _, flags, _ = finished
    row = json.dumps({"question": "why? " * 300, "answer": "#### 2"}) + "\n"
    (tmp_path / "long.jsonl").write_text(row * 3)
    for arguments, says in (
        (["--dataset", "long.jsonl", "--eval_dataset", "arithmetic"], "every prompt of long.jsonl is longer than 504"),
        (["--eval_dataset", "long.jsonl"], "name other questions with --eval_dataset"),
        (["--evaluate", flags[1], "--eval_dataset", "long.jsonl"], "name other questions with --eval_dataset"),
    ):
        code, out, err = inside(*(flags[2:] if "--evaluate" in arguments else flags), *arguments)
        assert code == 2 and err.count("\n") == 1 and says in err and not out and not (tmp_path / "runs").exists()


def test_both_models_are_looked_at_before_either_is_tested(finished, inside):
    _, flags, _ = finished
    code, out, err = inside("--evaluate", flags[1], "--against", "./nowhere", *flags[2:])
    assert code == 2 and err.count("\n") == 1 and "unknown model: ./nowhere" in err and not out


def test_a_file_that_is_called_runs_is_named(finished, inside, tmp_path):
    _, flags, _ = finished
    (tmp_path / "runs").write_text("")
    for arguments in ([*flags, "--run", "x"], flags, ["--evaluate", "tiny", "--dataset", "arithmetic"]):
        code, out, err = inside(*arguments)
        assert code == 2 and err.count("\n") == 1 and "runs is a file here" in err and not out


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("config.json", "[]", "config.json is damaged: it holds no settings"),
        (
            "config.json",
            '{"NAME": "another program"}',
            "was made by another version of this program, with NAME",
        ),
        ("metrics.jsonl", "3\n", "metrics.jsonl is damaged: a row without a step: 3"),
        ("metrics.jsonl", '{"loss": 0}\n', "metrics.jsonl is damaged: a row without a step"),
        ("samples.jsonl", "\udcff\n", "samples.jsonl is damaged"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line_and_left_as_it_is(finished, inside, tmp_path, file, text, says):
    run = tmp_path / "runs" / "damaged"
    shutil.copytree(finished[0] / "runs" / "whole", run)
    (run / file).write_text(text, errors="surrogateescape")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    code, out, err = inside("--resume", "runs/damaged", "--steps", "7")
    assert code == 2 and err.count("\n") == 1 and says in err and not out
    assert before == {path: path.read_bytes() for path in before}


def test_a_stdout_of_ascii_only_is_enough_and_a_stderr_that_is_a_file_gets_no_progress_bar(
    finished, tmp_path, monkeypatch
):
    _, flags, _ = finished
    monkeypatch.setitem(OFFLINE, "PYTHONIOENCODING", "ascii")
    code, out, err = run(tmp_path, *flags, "--test")
    assert code == 0 and "reward  0" in out and "\u00d7" not in out and not err


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that answers as Hugging Face's does for a gated repository and for one that is not there."""

    def do_GET(self):
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        """Say nothing."""


def test_a_gated_model_and_an_unknown_one_are_told_apart(tmp_path, monkeypatch):
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setitem(OFFLINE, "HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(OFFLINE, "HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setitem(OFFLINE, "HF_HOME", str(tmp_path / "hf"))
    cases = {"some/gated": "HF_TOKEN", "some/other": "unknown model: some/other"}
    processes = [start(tmp_path, "--model", model, "--dataset", "arithmetic") for model in cases]
    for process, says in zip(processes, cases.values()):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.count("\n") == 1 and says in err
    hub.shutdown()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file, says", [("m.gguf", "is a GGUF model"), ("pytorch_model.bin", "its weights as pickle")])
def test_a_model_in_another_format_is_named_with_what_to_give_instead(inside, tmp_path, file, says):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / file).write_bytes(b"GGUF")
    code, _, err = inside("--model", "model", "--dataset", "arithmetic")
    assert code == 2 and err.count("\n") == 1 and says in err and "safetensors" in err


def test_a_run_folder_is_neither_overwritten_nor_resumed_with_other_settings(finished, inside, monkeypatch):
    folder, flags, _ = finished
    monkeypatch.chdir(folder)
    before = (folder / "runs" / "whole" / "metrics.jsonl").read_text()
    for arguments, says in (
        ([*flags, "--run", "whole"], "exists already"),
        (["--resume", "runs/whole", "--beta", "0.5"], "--beta 0.04"),
    ):
        code, _, err = inside(*arguments)
        assert code == 2 and err.count("\n") == 1 and says in err
    assert (folder / "runs" / "whole" / "metrics.jsonl").read_text() == before


def test_data_rows_without_an_answer_are_counted_and_one_is_named(finished, inside, tmp_path):
    _, flags, _ = finished
    good, bad = '{"question": "1 + 1?", "answer": "#### 2"}\n', '{"question": "2 + 2?", "answer": "four"}\n'
    (tmp_path / "train.jsonl").write_text(bad * 51 + good)
    (tmp_path / "test.jsonl").write_text(bad * 2 + good * 4 + bad)
    data = ["--dataset", "train.jsonl", "--eval_dataset", "test.jsonl", "--save_every", "1"]
    code, out, err = inside(*flags, *data)
    assert code == 2 and "train split, row 0: its solution must end" in err and err.count("\n") == 1
    assert not out and not (tmp_path / "runs").exists()
    (tmp_path / "train.jsonl").write_text((good + bad) * 2)
    code, out, err = inside(*flags, *data, "--run", "whole")
    assert code == 0, err
    assert out.count("row 1: its solution must end") + out.count("train split, row 3: its") == 1, out
    assert "left out: 2, first: cannot read test.jsonl, test split, row 0: its solution" in out and "(n = 4)" in out
    assert lines(tmp_path / "runs" / "whole" / "metrics.jsonl")[-2]["rows_skipped"] >= 11
    inside(*flags, *data, "--run", "resumed", "--steps", "3")
    code, out, err = inside("--resume", "runs/resumed", "--steps", "6")
    assert code == 0 and "train split, row" not in out, err
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole, resumed = (lines(tmp_path / "runs" / run / name) for run in ("whole", "resumed"))
        assert [row for row in whole if row["step"] > 3] == [row for row in resumed if row["step"] > 3]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--dataset logic:6:10", "from 1 to 5"),
        ("--dataset chess:10", "unknown data set: chess"),
        ("--dataset logic:1:10,countdown", "countdown"),
        ("--dataset gsm8k:0", "steps, at least 1"),
        ("--dataset logic:1:10,knights:2:5 --steps 7", "have 15 steps"),
        ("--dataset math500", "for testing only"),
        ("--supervision steps", "outcome, process, both"),
    ],
)
def test_a_curriculum_that_cannot_be_meant_is_one_line(inside, tmp_path, arguments, says):
    code, _, err = inside(*arguments.split())
    assert code == 2 and err.count("\n") == 1 and says in err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--algorithm a2c", "one of grpo, sft, rft, dpo, online_rft, ppo, distill"),
        ("--algorithm dpo --group_size 1", "at least 2: dpo compares outputs"),
        ("--algorithm ppo --group_size 0", "--group_size must be at least 1, not 0"),
        ("--algorithm dpo --mu 2", "1 for dpo"),
        ("--algorithm sft --mu 2", "1 for sft"),
        ("--cold_start 5 --dataset bare.jsonl --eval_dataset arithmetic", "--cold_start imitates worked solutions"),
        ("--cold_start -1", "--cold_start must be at least 0"),
        ("--cold_start 5 --dataset math500", "math500 is for testing only, it has no train split"),
        ("--shots 2 --dataset math500", "math500 is for testing only, it has no train split"),
        ("--shots 1 --dataset bare.jsonl --eval_dataset arithmetic", "does not begin with 1 worked"),
        ("--shots 2000 --dataset arithmetic:1", "does not begin with 2000"),
        ("--algorithm dpo --beta_dpo 0", "above 0"),
        ("--algorithm ppo --beta -0.1", "--beta must be at least 0"),
        ("--algorithm ppo --lambda 1.5", "from 0 to 1"),
        ("--algorithm ppo --supervision process", "--supervision must be outcome for ppo"),
        ("--algorithm sft --dataset bare.jsonl --eval_dataset arithmetic", "bare.jsonl has none"),
        ("--algorithm sft --dataset arithmetic:1:2,bare.jsonl:2 --eval_dataset arithmetic", "bare.jsonl has none"),
        ("--supervision process --dataset order:1", "order:1 have none"),
        ("--algorithm dpo --denominator token", "sequence for dpo"),
        ("--algorithm ppo --objective gspo", "another than gspo if Â differs"),
        ("--supervision both --objective gspo", "another than gspo if Â differs"),
        ("--algorithm rft --reward_model x/y", "empty for rft"),
        ("--lora_rank -1", "at least 0"),
        ("--lora_alpha 0", "above 0"),
        ("--advantage median", "one of grpo, rloo"),
    ],
)
def test_what_makes_no_sense_together_is_refused_before_anything_is_loaded(
    inside, tmp_path, monkeypatch, arguments, says
):
    for loads in ("load", "build_tiny"):
        monkeypatch.setattr(llms, loads, lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "bare.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    code, out, err = inside(*arguments.split())
    assert code == 2 and err.count("\n") == 1 and says in err and not (tmp_path / "runs").exists()
    assert not out


@pytest.mark.parametrize("algorithm", ["sft", "rft", "dpo", "online_rft", "ppo"])
def test_every_row_of_table_10_is_a_flag_and_its_run_can_be_gone_on_with(finished, inside, algorithm):
    _, flags, _ = finished
    how = ["--algorithm", algorithm, "--lora_rank", "2", "--gradient_checkpointing", "true", "--steps", "2"]
    code, out, err = inside(*flags, *how, "--run", "x", "--show_every", "0")
    assert code == 0, err
    assert f"{algorithm} on arithmetic" in out and "of them trained" in out
    code, _, err = inside("--resume", "runs/x", "--steps", "3")
    assert code == 0, err
    rows = [row for row in lines(Path("runs/x/metrics.jsonl")) if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3] and not rows[0].get("kl") and rows[0]["skipped_updates"] == 0
    assert transformers.AutoModelForCausalLM.from_pretrained("runs/x/model").config.model_type == "qwen2"


def test_without_tensorboard_its_flag_is_refused_in_one_line(inside, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    code, _, err = inside("--tensorboard", "true")
    assert code == 2 and err.count("\n") == 1 and "pip install tensorboard" in err and not (tmp_path / "runs").exists()


def test_tensorboard_gets_the_same_keys(finished, inside):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, flags, _ = finished
    code, _, err = inside(*flags, "--tensorboard", "--steps", "2", "--run", "board")
    assert code == 0, err
    board = accumulator.EventAccumulator("runs/board/tensorboard").Reload()
    rows = lines(Path("runs/board/metrics.jsonl"))
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, (int, float))} - {"step"}
    assert numbers <= set(board.Tags()["scalars"])
    written = [(event.step, event.value) for event in board.Scalars("reward")]
    assert written == [(row["step"], pytest.approx(row["reward"])) for row in rows if "reward" in row]


def test_programs_are_refused_without_bubblewrap(finished, inside, tmp_path, monkeypatch):
    _, flags, _ = finished
    prompt = "def f():\n    '''One.'''\n"
    row = {"task_id": "1", "prompt": prompt, "entry_point": "f", "canonical_solution": "    return 1\n"}
    row["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    (tmp_path / "programs.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    evaluator.sandbox_problem.cache_clear()
    code, _, err = inside(*flags, "--dataset", "programs.jsonl", "--eval_dataset", "arithmetic")
    evaluator.sandbox_problem.cache_clear()
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "runs").exists()
    assert "apt-get install bubblewrap" in err


def test_a_model_with_another_attention_and_an_adapter_that_is_too_large_are_refused(checkpoint, inside, tmp_path):
    _, tokenizer = llms.load(checkpoint("llama"))
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "sliding_window": 16, "vocab_size": len(tokenizer)}
    config = transformers.MistralConfig(**shape, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    llms.save(transformers.AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "windowed")
    for flags, says in (
        (["--model", "windowed"], "Qwen2"),
        (["--model", checkpoint("llama"), "--lora_rank", "65"], "smallest linear layer"),
    ):
        code, _, err = inside(*flags, *SMALL.split(), "--test")
        assert code == 2 and err.count("\n") == 1 and says in err and not (tmp_path / "runs").exists()


def test_a_run_with_every_kind_of_reward_writes_each_by_name(finished, inside, reward_model):
    _, flags, _ = finished
    more = "--steps 2 --supervision both --rewards correctness=2,steps=0.5,overlong=1,safety=1,reward_model=1 --run all"
    code, _, err = inside(*flags, *more.split(), "--reward_model", reward_model)
    assert code == 0, err
    row = next(row for row in lines(Path("runs/all/metrics.jsonl")) if "reward" in row)
    assert {"rewards/steps", "rewards/overlong", "rewards/safety", "rewards/reward_model", "reflection"} <= row.keys()
    assert {"steps", "overlong", "safety", "reward_model"} <= lines(Path("runs/all/samples.jsonl"))[4].keys()


def test_a_reward_model_that_cannot_be_loaded_is_refused_in_one_line(finished, inside, tmp_path):
    _, flags, _ = finished
    code, out, err = inside(*flags, "--reward_model", "nobody/nothing")
    assert code == 2 and err.count("\n") == 1 and "nobody/nothing" in err
    assert not out and not (tmp_path / "runs").exists()


@pytest.mark.skipif(evaluator.sandbox_problem() is not None, reason=str(evaluator.sandbox_problem()))
def test_a_curriculum_of_puzzles_and_programs_runs_on_a_small_checkpoint(finished, inside, tmp_path):
    _, flags, _ = finished
    row = {"text": "Write f() that gives 1.", "code": "def f():\n    return 1\n", "test_list": ["assert f() == 1"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    stages = ["--dataset", "countdown:1:1,knights:2:1,train.jsonl:1", "--eval_dataset", "order:1,countdown:1"]
    code, _, err = inside(*flags[:2], *flags[4:10], *stages, "--eval_questions", "4", "--run", "stages")
    assert code == 0, err
    rows = lines(Path("runs/stages/metrics.jsonl"))
    assert [row["stage"] for row in rows if "stage" in row] == ["countdown:1", "knights:2", "train.jsonl"]
    assert {"eval/accuracy/order:1", "eval/accuracy/countdown:1"} <= rows[0].keys()
    assert {"rewards/tests", "rewards/compiles"} <= rows[-2].keys()


def test_help_lists_every_constant_with_its_comment(inside):
    code, out, _ = inside("--help")
    out = " ".join(out.split())
    assert code == 0 and "--group_size INT" in out and "weight of the KL (paper: 0.04)" in out
    assert "(default: 0.04)" in out and "(default: 8 for the tiny model, 64 for others)" in out
    assert "--rewards NAME=WEIGHT,…" in out and "default: correctness=2,integer=0.5" in out


def test_a_finished_run_is_a_model_to_train_on(finished, inside, monkeypatch):
    folder, flags, _ = finished
    monkeypatch.chdir(folder)
    (folder / "runs" / "second").mkdir()  # a folder that a kill left empty can be taken
    code, _, err = inside("--model", "runs/whole", *flags[2:], "--steps", "1", "--run", "second")
    assert code == 0, err
    config = json.loads((folder / "runs/second/config.json").read_text())
    del config["LORA_RANK"]
    (folder / "runs/second/config.json").write_text(json.dumps(config))
    code, _, err = inside("--resume", "runs/second", "--steps", "2")
    assert code == 0, err  # what was no constant yet has its default
    config = json.loads((folder / "runs/second/config.json").read_text()) | {"SCALE": "group"}
    (folder / "runs/second/config.json").write_text(json.dumps(config))
    code, _, err = inside("--resume", "runs/second", "--steps", "3")
    assert code == 2 and err.count("\n") == 1 and "another version of this program, with SCALE" in err
    code, out, err = inside("--evaluate", "runs/second")
    assert code == 0 and "runs/second: accuracy" in out, err


def test_a_teacher_scores_the_outputs_and_one_with_other_tokens_is_refused_first(finished, inside, tmp_path):
    folder, flags, _ = finished
    distill = [*flags, "--algorithm", "distill", "--steps", "2", "--teacher"]
    code, _, err = inside(*distill, str(folder / "runs" / "whole"), "--run", "taught")
    assert code == 0, err
    first, last = [row for row in lines(tmp_path / "runs" / "taught" / "metrics.jsonl") if "reward" in row]
    assert first["distill/kl"] != 0 and "kl" not in first and last["grad_norm"] > 0
    shutil.copytree(flags[1], tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {one: words[other] for one, other in zip(list(words)[-2:], reversed(list(words)[-2:]))}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = inside(*distill, "other")
    assert code == 2 and err.count("\n") == 1 and "has other tokens than" in err
    (tmp_path / "other" / "tokenizer.json").write_text("[1]")
    code, _, err = inside(*distill, "other")
    assert (
        code == 2 and err.count("\n") == 1 and sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["taught"]
    )


def test_a_judge_compares_two_models_or_is_refused_before_they_are_tested(finished, inside):
    folder, flags, _ = finished
    whole = str(folder / "runs" / "whole")
    test = ["--evaluate", whole, "--against", whole, "--eval_questions", "3", "--judge"]
    code, out, err = inside(*test, flags[1])
    assert code == 0, err
    assert f"judge: {whole} is better than {whole} in 0.500 [0." in out and "of 3 questions" in out
    code, out, err = inside(*test, "nobody/here")
    assert code == 2 and err.count("\n") == 1 and "nobody/here" in err and not out


def test_a_run_that_is_lengthened_says_what_becomes_of_a_falling_learning_rate(finished, inside):
    _, flags, _ = finished
    falling = [*flags, "--steps", "2", "--warmup", "0", "--schedule", "linear", "--run", "falling"]
    assert inside(*falling)[0] == 0
    assert "learning rate jumps" not in inside("--resume", "runs/falling")[1]
    code, out, err = inside("--resume", "runs/falling", "--steps", "8")
    assert code == 0, err
    note = "note: with another --steps the learning rate jumps to 0.00075, since it falls to 0 at the new last step.\n"
    assert out.count(note) == 1
    rates = [row["lr"] for row in lines(Path("runs/falling/metrics.jsonl")) if "lr" in row]
    assert rates[1:3] == pytest.approx([0.0005, 0.00075])


def test_a_run_that_diverges_has_failed_and_a_model_that_is_broken_is_refused(finished, inside, monkeypatch):
    _, flags, _ = finished
    real, calls = llms.sample, []

    def sample(*inputs):
        calls.append(inputs)
        if len(calls) == bad:
            raise llms.ModelError("the model's logits are not finite")
        return real(*inputs)

    monkeypatch.setattr(llms, "sample", sample)
    for bad, status in ((1, 2), (3, 1)):  # the first is the test of the base model
        calls.clear()
        code, _, err = inside(*flags, "--run", f"bad-{bad}")
        assert (code, err) == (status, "main.py: error: the model's logits are not finite\n")


def test_every_command_and_every_flag_of_the_readmes_exists():
    known = {name.lower() for name in main.CONSTANTS} | {"resume", "evaluate", "against", "test", "draw"}
    commands = []
    for readme in (ROOT / "README.md", ROOT / "plots" / "README.md", ROOT / "tests" / "README.md"):
        text = readme.read_text()
        commands += re.findall(r"python main\.py ([^`#\n|]*[^`#\s|])", text)
        assert set(re.findall(r"`--([a-z_]+)", text)) <= known | {"out", "help", "x"}
        for script in re.findall(r"python ((?:plots|tests)/\w+\.py)", text):
            assert (ROOT / script).exists()
    assert len(commands) >= 10
    launches = re.findall(r"torchrun --[^`\n]*", (ROOT / "README.md").read_text(encoding="utf-8") + main.__doc__)
    assert launches and all(re.match(r"torchrun --nproc_per_node \d+ -- main\.py --", one) for one in launches)
    for command in commands:
        if command != "--help":
            main.parse(shlex.split(command))  # raises an error for a flag that is not there


def test_the_line_numbers_in_the_readme_are_those_of_the_functions_they_name():
    text = (ROOT / "README.md").read_text()
    scripts = {name: (ROOT / name).read_text().splitlines() for name in re.findall(r"\[(\w+\.py)\]\(\1\)", text)}
    assert len(scripts) == 4
    for name, lines in scripts.items():
        assert f"[{name}]({name}) | {len(lines)} |" in text
    links = re.findall(r"`(\w+)` \| \[(\w+\.py):(\d+)\]\(\2#L\3\)", text)
    assert len(links) > 10
    for function, name, number in links:
        assert scripts[name][int(number) - 1].startswith(f"def {function}(")
    assert len(text.split()) <= 3000


@pytest.mark.parametrize("where", ["load", "sample", "backward", "new_state", "frozen_copy"])
def test_running_out_of_memory_ends_in_one_line_wherever_it_happens(finished, inside, monkeypatch, where):
    _, flags, _ = finished

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    owner = llms if hasattr(llms, where) else main
    monkeypatch.setattr(owner, where, out_of_memory)
    code, _, err = inside(*flags, "--steps", "1", "--run", "small")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("main.py: error: out of memory: a smaller model, --token_budget")


def test_a_run_in_bf16_on_a_cpu_begins_with_a_kl_of_0_and_keeps_its_precision(finished, inside):
    _, flags, _ = finished
    code, _, err = inside(*flags, "--precision", "bf16", "--steps", "2", "--run", "b")
    assert code == 0, err
    rows = [row for row in lines(Path("runs/b/metrics.jsonl")) if "reward" in row]
    assert llms.PRECISION == "bf16" and rows[0]["kl"] == 0 and all(0 < row["sampler_gap"] < 0.01 for row in rows)
    code, _, err = inside("--resume", "runs/b", "--precision", "fp32", "--steps", "3")
    assert code == 2 and "--precision 'bf16', not 'fp32'" in err
    code, _, err = inside("--resume", "runs/b", "--steps", "3")
    assert code == 0, err
