"""Faults, for real: python tests/faults.py [NAME …]

Each fault is done to real processes of main.py, with real files, signals and mounts, two faults at a time. The first
line of its function says what is promised. Where that is `nothing is lost`, the run, resumed where it ended, has the
same metrics (but for the seconds), samples and weights, to the last bit, as one that nothing happened to.
"""

import argparse
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
os.environ["OMP_NUM_THREADS"] = "1"  # two faults at a time share two cores
sys.path.insert(0, str(ROOT))

import safetensors.torch
import torch
import transformers

import llms
import rldatasets

SMALL = "--questions_per_step 2 --group_size 4 --max_new_tokens 8 --learning_rate 1e-3 --steps 12 --save_every 2"
SMALL += " --eval_every 12 --eval_questions 4 --show_every 3"
SMALL += " --rewards correctness=2,integer=0.5,strict_format=0.5,soft_format=0.5,tag_count=0.5,overlong=1"
ALWAYS = {
    "reward",
    "reward_std",
    "accuracy",
    "zero_std_groups",
    "loss",
    "entropy",
    "ratio_max",
    "clip_low",
    "clip_high",
}
ALWAYS |= {"length", "length_max", "truncated", "grad_norm", "lr", "tokens"}  # keys of a training row
NUMBERS = itertools.count()  # of the programs that are started


class NotHere(Exception):
    """Why a fault cannot be done on this machine."""


# ---- a checkpoint, programs, and what they leave behind ------------------------------------------------------------


def build(folder, more_tokens=0, ends=range(20, 60), **of_tokenizer):
    """A small random model with many end tokens, so that outputs have all lengths, and a real tokenizer."""
    torch.manual_seed(0)
    corpus = rldatasets.tiny_corpus(0, 200)[1]
    tokenizer = llms.tiny_tokenizer([message["content"] for messages, _ in corpus for message in messages])
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 512}
    shape |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.Qwen2Config(**shape, vocab_size=len(tokenizer) + more_tokens)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # a fresh model is almost uniform
        for weight in model.parameters():
            weight.mul_(3.0 if weight.dim() == 2 else 1.0)
    model.generation_config.eos_token_id = list(ends)
    for name, value in of_tokenizer.items():
        setattr(tokenizer, name, value)
    llms.save(model, tokenizer, folder)


class Program:
    """A process of main.py in a folder, its output in files; `first` is Python that it runs before: the fault."""

    def __init__(self, folder, *arguments, first="", **environment):
        number = next(NUMBERS)
        self.out, self.err = folder / f"{number}.out", folder / f"{number}.err"
        command = ["-c", f"{first}\nimport sys, main\nsys.exit(main.main())"] if first else [str(ROOT / "main.py")]
        with open(self.out, "w") as out, open(self.err, "w") as err:
            how = {"cwd": folder, "env": os.environ | environment, "stdout": out, "stderr": err}
            self.process = subprocess.Popen([sys.executable, *command, *arguments], **how)
        self.send = self.process.send_signal

    def wait_until(self, happened, what):
        """Wait until something has happened."""
        deadline = time.monotonic() + 300
        while not happened():
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running or happened(), f"it ended before {what}: {last_line(self.err.read_text())}"
            time.sleep(0.001)

    def begins(self):
        """Wait until the imports are over, and it says something."""
        self.wait_until(lambda: self.out.stat().st_size, "it said anything")

    def after(self, steps, run):
        """Wait until a run has logged so many steps."""
        self.wait_until(lambda: trained(run) >= steps, f"step {steps}")
        return self

    def kill(self):
        """SIGKILL; False if it had ended before."""
        self.send(signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def end(self, seconds=300):
        """Wait for the end: status, stdout, stderr."""
        return self.process.wait(seconds), self.out.read_text(), self.err.read_text()


def new(work, name, *more, folder=None, **how):
    """A new run with the small settings."""
    flags = ["--model", str(work / "model"), "--dataset", "arithmetic", *SMALL.split(), "--run", name]
    return Program(folder or work, *flags, *more, **how)


def succeeds(program):
    """The output of a program that must end well."""
    status, out, err = program.end()
    assert status == 0, f"status {status}: {last_line(err)}"
    return out


def refuses(program, *words, status=2):
    """What a program says that must end with a status and one line in which these words stand."""
    ended, _, err = program.end()
    one_line = err.count("\n") == 1 and err.startswith("main.py: error: ")
    assert one_line and ended == status, f"status {ended}, {len(err.splitlines())} lines: {last_line(err)}"
    assert all(word in err for word in words), f"{words} not in: {last_line(err)}"
    return last_line(err)


def last_line(text):
    return (text.strip().splitlines() or ["nothing"])[-1].removeprefix("main.py: error: ")[:170]


def rows(path):
    """The whole lines of a file of JSON lines, times left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    same = lambda key: not key.startswith("seconds") and key != "memory"  # whatever happened to the run
    return [{key: x for key, x in json.loads(line).items() if same(key)} for line in lines]


def trained(run):
    """How many steps a run has logged."""
    return sum("reward" in row for row in rows(run / "metrics.jsonl"))


def saved_step(run):
    tensors = safetensors.torch.load((run / "checkpoint" / "state.safetensors").read_bytes())  # it may be replaced now
    return json.loads(tensors["about"].numpy().tobytes())["counters"]["step"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(run, whole):
    """A run ended as another one did: metrics, samples and weights."""
    assert rows(run / "metrics.jsonl") == rows(whole / "metrics.jsonl"), "metrics.jsonl differs"
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


def nothing_is_lost(run, whole, **how):
    """Resumed, a run ends as another one that nothing happened to."""
    finite_weights(run)
    step = saved_step(run)
    succeeds(Program(run.parent.parent, "--resume", f"runs/{run.name}", **how))
    same(run, whole)
    return f"resumed from step {step}, the same"


def finite_weights(run):
    for path in run.rglob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(path).items():
            assert tensor.isfinite().all(), f"{path.name}: {name} is not finite"


def finite(run):
    """Nothing in a run's metrics or weights is nan or infinite, and no update was left out."""
    for row in rows(run / "metrics.jsonl"):
        null = {key for key, value in row.items() if value is None}
        missing = set() if "eval/accuracy" in row else ALWAYS - row.keys()
        assert not null | missing and not row.get("skipped_updates"), (
            f"step {row['step']}: {null | missing or 'skipped'}"
        )
    finite_weights(run)


# ---- signals -------------------------------------------------------------------------------------------------------


def sigkill_at_random_moments(work):
    """A run that is killed at 20 random moments, and resumed each time: nothing is lost."""
    kills = number = 0
    while kills < 20:
        number += 1
        run = work / "runs" / f"killed-{number}"
        program = new(work, run.name)
        while kills < 20:
            program.begins()
            time.sleep(random.uniform(0, 6))
            if not program.kill():
                break
            kills += 1
            if (run / "config.json").exists():
                program = Program(work, "--resume", f"runs/{run.name}")
            else:  # it had not begun
                shutil.rmtree(run, ignore_errors=True)
                program = new(work, run.name)
        succeeds(program)
        same(run, work / "runs" / "whole")
    return f"{kills} kills in {number} runs, all the same"


def sigkill_in_and_after_a_cold_start(work):
    """A run that is killed in its cold start, right after it, and later, and resumed each time: nothing is lost."""
    return killed_after(work, "cold", (2, 5, 6, 7, 11), "--cold_start", "6")


def sigkill_with_outputs_that_wait(work):
    """A run that trains on outputs of two steps before, killed and resumed: those that wait are not lost."""
    return killed_after(work, "stale", (1, 4, 9, 10), "--staleness", "2", "--correction", "tis")


def killed_after(work, name, steps, *flags):
    """A run that is killed after each of some steps, and resumed, is the same as a whole one."""
    flags, run = (*flags, "--save_every", "1"), work / "runs" / name
    succeeds(new(work, f"{name}-whole", *flags))
    program = new(work, name, *flags)
    for step in steps:
        saved = lambda step=step: (run / "checkpoint" / "state.safetensors").exists() and saved_step(run) >= step
        program.wait_until(saved, f"step {step}")
        assert program.kill(), "it had ended before"
        program = Program(work, "--resume", f"runs/{name}")
    succeeds(program)
    same(run, work / "runs" / f"{name}-whole")
    return f"{len(steps)} kills, the same"


KILLED_BEFORE_RENAMING = """
import os, signal
replace = os.replace
def replace_or_die(old, new):
    return os.kill(os.getpid(), signal.SIGKILL) if old.name == "NAME" else replace(old, new)
os.replace = replace_or_die
"""


def sigkill_while_saving(work):
    """A run that is killed while it writes a checkpoint, or its metrics anew: nothing is lost."""
    run, left = work / "runs" / "saving", 0
    unfinished = run / "checkpoint" / "unfinished"
    for steps in (0, 3, 5):
        program = Program(work, "--resume", "runs/saving") if steps else new(work, "saving")
        program.begins()
        program.after(steps, run)
        before = written_at(unfinished)
        while program.process.poll() is None and written_at(unfinished) in (None, before):
            pass  # without a pause: it is there for a few milliseconds
        program.kill()
        left += unfinished.exists()
    for name in ("config.unfinished", "metrics.unfinished", "samples.unfinished"):  # too short to be aimed at
        fault = KILLED_BEFORE_RENAMING.replace("NAME", name)
        status = Program(work, "--resume", "runs/saving", first=fault).end()[0]
        assert status == -signal.SIGKILL and (run / name).exists(), f"{name}: status {status}"
    return f"3 kills left {left} unfinished checkpoints, 3 all else; {nothing_is_lost(run, work / 'runs' / 'whole')}"


def written_at(path):
    """When a file was last written to, or None."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def sigterm(work):
    """SIGTERM ends a run within seconds, with a checkpoint of the step that it was in: nothing is lost."""
    run = work / "runs" / "terminated"
    program = new(work, run.name).after(3, run)
    program.send(signal.SIGTERM)
    status, out, _ = program.end(seconds=20)
    assert status == 128 + signal.SIGTERM and f"--resume runs/{run.name}" in out, f"status {status}"
    assert saved_step(run) == trained(run), "the checkpoint is not of the last step"
    return nothing_is_lost(run, work / "runs" / "whole")


def ctrl_c_twice(work):
    """A second Ctrl-C ends a run at once: nothing is lost."""
    run = work / "runs" / "interrupted"
    program = new(work, run.name).after(3, run)
    program.send(signal.SIGINT)
    program.wait_until(lambda: "finishing the step" in program.out.read_text(), "it heard the first")
    program.send(signal.SIGINT)
    status, _, err = program.end(seconds=20)
    assert status == 130 and err.count("\n") <= 1, f"status {status}: {last_line(err)}"
    return nothing_is_lost(run, work / "runs" / "whole")


# ---- disks ---------------------------------------------------------------------------------------------------------


@contextmanager
def disk(folder, size):
    """A small disk at a folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise NotHere("mounting is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder, options):
    """Change a disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def disk_full_while_saving(work):
    """Where there is no room for a checkpoint the run ends in one line, the old one stays, and nothing is lost."""
    run = work / "small-disk" / "runs" / "full"
    with disk(run.parent, "1000k"):  # room for one checkpoint and the plots, not for two
        program = new(work, run.name, folder=run.parent.parent)
        program.end()
        remount(run.parent, "size=20m")
        resumed = nothing_is_lost(run, work / "runs" / "whole")
        return f"{refuses(program, 'No space left')}; {resumed}"


def disk_full_while_logging(work):
    """Where there is no room for a line of metrics the run ends in one line, and nothing is lost."""
    run = work / "filled-disk" / "runs" / "full"
    with disk(run.parent, "3m"):
        program = new(work, run.name, "--save_every", "100", folder=run.parent.parent).after(1, run)
        program.send(signal.SIGSTOP)
        fill(run.parent / "ballast")
        program.send(signal.SIGCONT)
        program.end()
        remount(run.parent, "size=20m")
        resumed = nothing_is_lost(run, work / "runs" / "whole")
        return f"{refuses(program, 'No space left')}; {resumed}"


def fill(path):
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextmanager
def read_only(folder):
    """A folder laid over itself, in which nothing can be opened to be written."""
    for options in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only_folder(work):
    """A run folder that can only be read, from the beginning or from some step on, is one line; nothing is lost."""
    run = work / "read-only-disk" / "runs" / "read"
    with disk(run.parent, "20m"):
        with read_only(run.parent):
            refuses(new(work, run.name, folder=run.parent.parent), "Read-only")
        program = new(work, run.name, folder=run.parent.parent).after(3, run)
        with read_only(run.parent):
            refuses(program, "Read-only")
            says = refuses(Program(run.parent.parent, "--resume", "runs/read"), "Read-only")
        return f"{says}; {nothing_is_lost(run, work / 'runs' / 'whole')}"


# ---- damaged files -------------------------------------------------------------------------------------------------


def damaged_checkpoint(work):
    """A checkpoint that is damaged, cut or something else is refused in one line, and nothing is changed."""
    run, broken = work / "runs" / "damaged", []
    shutil.copytree(work / "runs" / "whole", run)
    path = run / "checkpoint" / "state.safetensors"
    good = path.read_bytes()
    for name, content in bad_checkpoints(good, work).items():
        path.write_bytes(content)
        before = contents(run)
        try:
            refuses(Program(work, "--resume", "runs/damaged"), "checkpoint")
            assert contents(run) == before, "files were changed"
        except AssertionError as error:
            broken.append(f"{name}: {error}")
    assert not broken, "; ".join(broken)
    path.write_bytes(good)
    return f"{', '.join(bad_checkpoints(good, work))} were refused; {nothing_is_lost(run, work / 'runs' / 'whole')}"


def bad_checkpoints(good, work):
    """What may stand in the place of a checkpoint: {name: bytes}."""
    header = 8 + int.from_bytes(good[:8], "little")
    places = {"header": header // 2, "tensors": len(good) - 100}
    bad = {f"a byte of the {place}": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for place, at in places.items()}
    bad |= {f"{size} bytes": good[:size] for size in (0, 5, header, len(good) - 1)}
    bad |= {"text": b"weights\n" * 1000, "a model": (work / "model" / "model.safetensors").read_bytes()}
    others = {"a wider model": ("model.norm.weight", 64), "a deeper model": ("model.layers.2.mlp.bias", 32)}
    for name, (weight, size) in others.items():  # each whole in itself, as if the folder MODEL had been changed
        tensors = safetensors.torch.load(good) | {f"policy/{weight}": torch.ones(size)}
        bad[name] = safetensors.torch.save(tensors, {"checksum": llms.checksum(tensors)})
    return bad


def half_a_line(work):
    """A crash that cuts a line of metrics and one of samples in half: nothing is lost."""
    run, whole = work / "runs" / "half", work / "runs" / "whole"
    new(work, run.name).after(5, run).kill()
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (whole / name).read_text().splitlines()
        written = len(rows(run / name))
        rest = lines[written]
        kept = (run / name).read_text().split("\n")[:written]
        (run / name).write_text("\n".join([*kept, rest[: len(rest) // 2]]))
    return nothing_is_lost(run, whole)


# ---- numbers that are none -----------------------------------------------------------------------------------------

BAD_REWARD = """
import itertools, evaluator
judge, calls = evaluator.rewards, itertools.count()
def rewards(completion, problem):  # 4 calls are of the evaluation of step 0, then 8 of each step: call 22 is in step 3
    return judge(completion, problem) | ({"tag_count": WRONG} if next(calls) == 22 else {})
evaluator.rewards = rewards
"""
BAD_LOSS = """
import itertools, main
backward, steps = main.backward, itertools.count(1)
def bad_backward(state, rollout, advantages, logp_old, logp_ref, loss, *others):
    bad_loss = lambda *inputs: loss(*inputs) * (float("nan") if next(steps) in WRONG else 1.0)
    return backward(state, rollout, advantages, logp_old, logp_ref, bad_loss, *others)
main.backward = bad_backward
"""
BAD_GRADIENT = """
import itertools, llms
load, steps = llms.load, itertools.count(1)
def load_and_hook(name):
    policy, tokenizer = load(name)
    policy.model.norm.weight.register_hook(lambda grad: grad * (float("nan") if next(steps) in WRONG else 1.0))
    return policy, tokenizer
llms.load = load_and_hook
"""


def nan_reward(work):
    """A reward that is nan counts 0 and is reported by its name, and spoils no weight; the run goes on."""
    return bad_reward(work, "nan-reward", 'float("nan")', "'tag_count': nan")


def exception_in_a_reward(work):
    """A rule that raises an error gives its output 0 and is reported with the question; the run goes on."""
    return bad_reward(work, "failing-reward", "1 / 0", "division by zero", "question: ")


def bad_reward(work, name, wrong, *words):
    """A run with a fault in one reward of its third step says so once, and goes on."""
    run, whole = work / "runs" / name, work / "runs" / "whole"
    program = new(work, name, first=BAD_REWARD.replace("WRONG", wrong))
    succeeds(program)
    finite(run)
    said = [line for line in program.err.read_text().splitlines() if line.startswith("note: 1 × a reward failed")]
    assert len(said) == 1 and all(word in said[0] for word in words), f"it said {said}"
    assert rows(run / "metrics.jsonl")[:3] == rows(whole / "metrics.jsonl")[:3], "steps before the fault differ"
    return said[0]


def nan_once(work):
    """A loss or gradient that is nan in one step leaves out that update, and says so; the run goes on."""
    for name, fault in {"loss": BAD_LOSS, "gradient": BAD_GRADIENT}.items():
        run = work / "runs" / f"nan-{name}"
        out = succeeds(new(work, run.name, first=fault.replace("WRONG", "[3]")))
        measured, undisturbed = (rows(one / "metrics.jsonl") for one in (run, work / "runs" / "whole"))
        skipped = [row["step"] for row in measured if row.get("skipped_updates")]
        assert skipped == [3] and "was not finite" in out, f"{name}: left out were {skipped}"
        assert measured[:3] == undisturbed[:3], f"{name}: steps before the fault differ"
        finite_weights(run)
    return "loss, gradient: the update of step 3 was left out, 12 steps were made"


def nan_for_ever(work):
    """A loss or gradient that stays nan ends the run in one line; without the fault nothing is lost."""
    for name, fault in {"loss": BAD_LOSS, "gradient": BAD_GRADIENT}.items():
        run = work / "runs" / f"always-nan-{name}"
        says = refuses(new(work, run.name, first=fault.replace("WRONG", "range(4, 100)")), "not finite", status=1)
        resumed = nothing_is_lost(run, work / "runs" / "whole")
    return f"loss, gradient: {says}; {resumed}"


# ---- the hub -------------------------------------------------------------------------------------------------------

FIVE_ROWS = [{"question": f"What is {i} + {i}?", "answer": f"<<{i}+{i}={2 * i}>>\n#### {2 * i}"} for i in range(5)]
FILE = "".join(json.dumps(row) + "\n" for row in FIVE_ROWS).encode()
ONE_FILE = ["--eval_dataset", "arithmetic", "--dataset"]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a data set of one file needs; its server's `trouble` says what is wrong."""

    def do_GET(self):
        trouble, path, commit = self.server.trouble, self.path.partition("?")[0], "0" * 40
        self.server.asked[trouble] += 1
        if trouble == "gone":
            return  # without an answer
        if trouble == "busy":
            self.answer(503)
        elif path.endswith("/train.jsonl"):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
            part = FILE[int(first) : int(last) + 1 if last else None]
            self.answer(200 if part == FILE else 206 if part else 416, part, cut=trouble == "cut")
        elif path == f"/api/datasets/some/data/tree/{commit}":
            tree = [{"type": "file", "path": "train.jsonl", "size": len(FILE), "oid": commit}]
            self.answer(200, json.dumps(tree).encode())
        elif path in ("/api/datasets/some/data", f"/api/datasets/some/data/revision/{commit}"):
            about = {"id": "some/data", "sha": commit, "siblings": [{"rfilename": "train.jsonl"}]}
            self.answer(200, json.dumps(about).encode())
        else:
            self.answer(404)

    do_HEAD = do_GET

    def answer(self, status, body=b"", cut=False):
        self.send_response(status)
        headers = {"Content-Length": len(body), "ETag": '"x"', "X-Repo-Commit": "0" * 40}
        for name, value in (headers | ({"X-Error-Code": "EntryNotFound"} if status == 404 else {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def hub(work):
    """A hub on this machine, and the environment of a program that uses it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.trouble, server.asked = None, Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield server, {"HF_ENDPOINT": address, "HF_HOME": tempfile.mkdtemp(dir=work), "HF_HUB_OFFLINE": "0"}
    server.shutdown()


def hub_unreachable_at_the_start(work):
    """A model and a data set by name, where the hub cannot be reached, are one line each, within a minute or so."""
    home = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": tempfile.mkdtemp(dir=work), "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    programs = [new(work, "never", "--model", "some/model", **home), new(work, "never", *ONE_FILE, "some/data", **home)]
    says = "; ".join(refuses(program, "reach")[:75] for program in programs)
    seconds = time.monotonic() - began
    assert seconds < 90 and not (work / "runs" / "never").exists(), f"it took {seconds:.0f} seconds"
    return f"{says} … after {seconds:.0f} s"


def hub_in_trouble(work):
    """A hub that is busy, cuts answers or is gone, for 8 s or for good, holds up a run or ends it: nothing is lost."""
    whole, came, broken = work / "runs" / "hub", [], []
    with hub(work) as (server, online):
        succeeds(new(work, whole.name, *ONE_FILE, "some/data", **online))
        for trouble, seconds in (("busy", 8), ("cut", 8), ("gone", 8), ("gone", 200)):
            run = work / "runs" / f"hub-{trouble}-{seconds}"
            program = new(work, run.name, *ONE_FILE, "some/data", **online)
            program.after(1, run)  # the data are read anew in every epoch: two or three steps
            server.trouble = trouble
            with suppress(subprocess.TimeoutExpired):
                program.process.wait(seconds)
            server.trouble = None
            status = program.end()[0]
            assert server.asked[trouble], f"while it was {trouble}, nothing was asked of it"
            if status:
                nothing_is_lost(run, whole, **online)
            same(run, whole)
            try:
                came.append(f"{trouble} {seconds} s: {refuses(program, 'some/data') if status else 'held up'}")
            except AssertionError as error:
                broken.append(f"{trouble} {seconds} s: {error}")
    assert not broken, "; ".join(came + broken)
    return "; ".join(came)


# ---- data, outputs, tokenizers, clocks -----------------------------------------------------------------------------


def data_that_ends_mid_epoch(work):
    """5 rows at 2 questions a step go round, each time in a new order; killed in an epoch, nothing is lost."""
    path, whole, run = work / "five.jsonl", work / "runs" / "five", work / "runs" / "five-killed"
    path.write_bytes(FILE)
    succeeds(new(work, whole.name, *ONE_FILE, str(path)))
    stream = [problem["question"] for problem in itertools.islice(rldatasets.shuffled(str(path), "train", 0), 25)]
    epochs = [stream[start : start + 5] for start in range(0, 25, 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs) and len(set(map(tuple, epochs))) > 3, "no new orders"
    asked = [row["question"] for row in rows(whole / "samples.jsonl") if row["split"] == "train"]
    assert asked[::4] == stream[:24:2], "the questions come in another order"
    new(work, run.name, *ONE_FILE, str(path)).after(7, run).kill()
    return nothing_is_lost(run, whole)


def empty_and_truncated_outputs(work):
    """Outputs of nothing but the end, outputs that are all cut, and these left out of the loss: all numbers finite."""
    build(work / "silent", ends=range(501))
    succeeds(new(work, "silent", "--model", str(work / "silent"), "--steps", "3"))
    build(work / "endless", ends=[500])
    for name, *flags in (["cut"], ["left-out", "--mask_truncated"]):
        succeeds(new(work, name, "--model", str(work / "endless"), "--max_new_tokens", "2", "--steps", "3", *flags))
    silent, cut, left_out = (work / "runs" / name for name in ("silent", "cut", "left-out"))
    for run in (silent, cut, left_out):
        finite(run)
    assert all(row["completion"] == "" for row in rows(silent / "samples.jsonl")), "an output is not empty"
    shares = [row["truncated"] for run in (cut, left_out) for row in rows(run / "metrics.jsonl") if "reward" in row]
    assert min(shares) == 1, f"shares that are truncated: {shares}"
    return "3 runs of 3 steps"


def groups_without_spread(work):
    """Where no group has spread, and nothing else to learn from, the weights stay as they are to the last bit."""
    run = work / "runs" / "no-spread"
    succeeds(new(work, run.name, "--rewards", "safety=1", "--beta", "0", "--steps", "20"))
    finite(run)
    base, now = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (work / "model", run / "model")
    )
    assert base.keys() == now.keys() and all(torch.equal(base[name], now[name]) for name in base), "weights moved"
    return "20 steps"


def peculiar_tokenizers(work):
    """Without a pad token, without a template, with pad = eos, with fewer tokens than the model: all run and resume."""
    models = {"neither pad nor template": {"pad_token": None, "chat_template": None}}
    models |= {"pad is eos": {"pad_token": "<|im_end|>"}, "more tokens": {"more_tokens": 500}}
    for name, change in models.items():
        build(work / name, **change)
        tokenizer = transformers.AutoTokenizer.from_pretrained(work / name)
        assert all(getattr(tokenizer, key, value) == value for key, value in change.items()), f"{name}: not so"
        succeeds(new(work, name, "--model", str(work / name), "--steps", "2"))
        succeeds(Program(work, "--resume", f"runs/{name}", "--steps", "4"))
        assert trained(work / "runs" / name) == 4, f"{name}: {trained(work / 'runs' / name)} steps"
        finite(work / "runs" / name)
    return f"{', '.join(models)}: 2 steps and 2 more, with 40 end tokens"


JUMPING_CLOCK = """
import os, random, time
clock, jump = time.time, random.Random(0)
time.time = lambda: clock() + 86400 * jump.randint(-9, 9)
del os.environ["TQDM_DISABLE"]  # its bars read the clock
"""


def jumping_clock(work):
    """A clock that jumps by days, forwards and backwards, changes nothing."""
    run = work / "runs" / "clock"
    succeeds(new(work, run.name, first=JUMPING_CLOCK))
    same(run, work / "runs" / "whole")
    timed = [row["seconds"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "seconds" in row]
    assert 0 < min(timed) <= max(timed) < 1000, f"seconds of the steps: {timed}"
    return "up to 9 days at every look; the same"


FAULTS = [
    sigkill_at_random_moments, sigkill_in_and_after_a_cold_start, sigkill_with_outputs_that_wait, hub_in_trouble,
    damaged_checkpoint,
    sigkill_while_saving,
    peculiar_tokenizers, sigterm, ctrl_c_twice, disk_full_while_saving, disk_full_while_logging, read_only_folder,
    half_a_line, nan_reward, exception_in_a_reward, nan_once, nan_for_ever, hub_unreachable_at_the_start,
    data_that_ends_mid_epoch, empty_and_truncated_outputs, groups_without_spread, jumping_clock,
]  # fmt: skip


def attempt(fault, work):
    """Do a fault and say in a line what came of it; False if a promise was broken."""
    try:
        kept, came = "ok", fault(work)
    except NotHere as reason:
        kept, came = "not run here", reason
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        kept, came = "FAILED", f"{error!s:.600} -- promised: {fault.__doc__}"
    print(f"{kept:7} {fault.__name__}: {came}", flush=True)
    return kept != "FAILED"


def run_faults():
    names = {fault.__name__: fault for fault in FAULTS}
    promises = "\n".join(f"{name:30}{fault.__doc__}" for name, fault in names.items())
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "usage": "python tests/faults.py [NAME …]"}
    parser = argparse.ArgumentParser(description=__doc__, epilog=promises, **how)
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of those below; none: all of them")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments of SIGKILL")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in names]:
        parser.error(f"no such fault: {', '.join(unknown)}")
    random.seed(arguments.seed)
    print(f"--seed {arguments.seed}", flush=True)
    chosen, began = [names[name] for name in arguments.names] or FAULTS, time.monotonic()
    temporary = tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True)
    with temporary as folder, ThreadPoolExecutor(2) as pool:
        work = Path(folder)
        build(work / "model")
        succeeds(new(work, "whole"))
        kept = list(pool.map(attempt, chosen, itertools.repeat(work)))
    print(f"{sum(kept)} of {len(kept)} promises were kept, in {time.monotonic() - began:.0f} seconds")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(run_faults())
