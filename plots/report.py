"""The folder of a run, and what a run prints: a line for each step and each evaluation, notes, the table at its end.

A record is a dict about one output: its question, its completion, its length, its rewards by name. A row is a line of
metrics.jsonl.
"""

import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import textwrap
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

from evaluator import MEASURES, mean, wilson
from plots.plot import FolderError, read_config, read_lines

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


# ---- the folder of a run -------------------------------------------------------------------------------------------

WRITERS = {}  # {run: a writer of TensorBoard's files}


def runs_folder():
    """The folder in which runs and the tiny model are."""
    if Path("runs").is_file():
        raise FolderError("runs is a file here, and must be a folder: rename it, or start from another folder")
    return Path("runs")


def new_folder(run, model, dataset, test):
    """The folder of a new run: runs/RUN, or one with the first free number. It does not exist yet."""
    if run:
        folder = runs_folder() / run
        if folder.is_file() or (folder / "config.json").exists():
            raise FolderError(f"{folder} exists already: choose another --run, or go on with --resume {folder}")
        return folder
    data = "curriculum" if "," in dataset else Path(dataset).stem.partition(":")[0]
    stem = "test" if test else f"{Path(model).name}-{data}"
    for number in itertools.count(1):
        folder = runs_folder() / f"{stem}-{number}"
        if not folder.exists():
            return folder


def is_run(folder):
    """Is this the folder of a run?"""
    return (Path(folder) / "metrics.jsonl").exists()


def read_settings(run, constants, for_resume):
    """The constants that a run was made with: {name: value}.

    constants: {name: default}. What config.json lacks has its default, and every value has the type of its default.
    To resume a run, config.json must not have a constant (its name is in capitals) that is unknown here.
    """
    config = read_config(run)
    unknown = [name for name in config if name.isupper() and name not in constants]
    if unknown and for_resume:
        names = ", ".join(unknown[:3]) + (" …" if len(unknown) > 3 else "")
        raise FolderError(f"{run} was made by another version of this program, with {names}: start a new run")
    if not config.keys() & constants.keys():
        raise FolderError(f"{run}/config.json is damaged: it holds no settings")
    settings = {}
    for name, default in constants.items():
        try:
            settings[name] = like(default, config.get(name, default))
        except (ValueError, TypeError, OverflowError) as error:
            raise FolderError(f"{run}/config.json is damaged: {name}: {error}") from None
    return settings


def like(default, value):
    """A value with the type of its default; a dict is one of numbers."""
    if isinstance(default, dict):
        return {name: float(number) for name, number in dict(value).items()}
    return type(default)(value)


def first_day(run, today):
    """The date on which a run began, which its chat template may write; today if config.json does not say."""
    found = read_config(run).get("date", str(today))
    try:
        return date.fromisoformat(found)
    except (ValueError, TypeError) as error:
        raise FolderError(f"{run}/config.json is damaged: date: {error}") from None


@contextmanager
def only_writer(run):
    """A block in which no other process writes to a run's folder. The lock ends when the process ends."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"{run} is being written by another process") from None
        except OSError as error:
            print(f"note: {run} cannot be locked ({error}): let no second process write to it.")
        yield


def begin(run, config, step):
    """Write config.json, and cut the files of a run back to the step of its checkpoint."""
    kept = {}  # {path: the rows up to that step}; all is read before any is replaced
    for path in (run / "metrics.jsonl", run / "samples.jsonl"):
        rows = read_lines(path) if step and path.exists() else []
        kept[path] = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    here = Path(__file__).parent
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, check=False)
    versions = {package: version(package) for package in ("torch", "transformers", "datasets")}
    config = config | {"versions": versions, "commit": git.stdout.decode().strip() or None}
    replace(run / "config.json", json.dumps(config, indent=2) + "\n")
    for path, text in kept.items():
        replace(path, text)


def replace(path, text):
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def append(path, rows):
    """Add rows to a file of JSON lines. What does not exist is left out of its row."""
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            left = {key: value for key, value in row.items() if exists(value)}
            file.write(json.dumps(left) + "\n")


def exists(value):
    """Is it a value, and not None, infinity or nan?"""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is not None


def sync(run):
    """Write the rows of a run to the disk, before the checkpoint that belongs to them."""
    for path in run.glob("*.jsonl"):
        with open(path, "rb+") as file:  # +: Windows asks for it
            os.fsync(file.fileno())


def log(run, row, split, records, tensorboard):
    """Add a row to metrics.jsonl, and records to samples.jsonl; and the row to where TensorBoard reads, if wanted."""
    append(run / "metrics.jsonl", [row])
    append(run / "samples.jsonl", [{"step": row["step"], "split": split} | record for record in records])
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # pip install tensorboard

        if run not in WRITERS:  # what a killed run wrote from this step on is forgotten
            WRITERS[run] = SummaryWriter(run / "tensorboard", purge_step=row["step"])
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                WRITERS[run].add_scalar(key, value, row["step"])
        WRITERS[run].flush()


# ---- what is printed -----------------------------------------------------------------------------------------------


def step_line(row):
    """A training step in fixed columns."""
    line = f"step {row['step']:4d}"
    if row["stage"] == "cold start":
        line += f" | cold start | loss {row['loss']:6.3f}"
    else:
        line += f" | reward {row['reward']:5.2f} ± {row['reward_std']:4.2f}"
        line += f" | right {row['accuracy']:4.2f} | guess {row['approach/guessed']:4.2f}"
        line += f" | kl {row['kl']:6.4f}" if "kl" in row else " | kl    off"
        line += f" | clip {row['clip_low'] + row['clip_high']:4.2f}"
        line += f" | dead {row['zero_std_groups']:4.2f}"
    line += f" | len {row['length']:5.1f} | cut {row['truncated']:4.2f} | {row['seconds']:5.1f} s"
    return line


def completion(record):
    """A completion with its question, answer and reward."""
    answer = textwrap.shorten(record["answer"], 60)
    text = "".join(f"  | {line}" for line in record["completion"].splitlines(keepends=True))
    return f"  {record['question']}  (answer: {answer}; reward {record['reward']:.2f})\n{text}"


def silence(records, tags):
    """What to do about a first step with next to nothing to learn from, with one of its outputs; else None."""
    for name in ("correctness", "soft_format", "tests"):
        if mean(records, name) >= 0.02:
            return None
    shares = []
    for tag in tags:
        count = sum(tag in record["completion"] for record in records)
        shares.append(f"{tag} {count / len(records):.2f}")
    return f"""\
note: hardly an output of this step is right or has the form, so there is little to learn. \
With each tag: {", ".join(shares)}; {mean(records, "truncated"):.2f} are cut. One of them:
{completion(records[0])}
  If the form is missing: --cold_start 50 (if the data set has worked solutions) or --shots 4.
  If outputs are cut: a longer --max_new_tokens. \
If answers are wrong: an easier set: --dataset arithmetic:1."""


def eval_line(metrics):
    """An evaluation in one line."""
    line = f"accuracy {share_of(metrics['eval/accuracy'], metrics['eval/n'])}"
    line += f" | lenient {metrics['eval/lenient']:.3f} | format {metrics['eval/format']:.3f}"
    line += f" | len {metrics['eval/length']:.1f} | cut {metrics['eval/truncated']:.3f}"
    measured = list(itertools.chain(*MEASURES.values()))
    for key, value in metrics.items():
        name = key.removeprefix("eval/")
        if "@" in name or name in measured or name.startswith(("accuracy/", "lenient/")):
            line += f" | {name.removeprefix('accuracy/')} {value:.3f}"
    for key, share in metrics.items():
        if key.startswith("eval/wins/"):
            line += f" | wins against {key.removeprefix('eval/wins/')} {share_of(share, metrics['eval/games'])}"
    return f"{line} (n = {metrics['eval/n']})"


def share_of(p, n):
    """A share p of n with the ends of its 95 % interval: 0.985 [0.957, 0.995]."""
    low, high = wilson(p, n)
    return f"{p:.3f} [{low:.3f}, {high:.3f}]"


def paired_difference(names, right):
    """Two models on the same questions in two lines; right: for each model, 1 or 0 for each question."""
    gains = [a - b for a, b in zip(*right)]
    half = math.nan
    if len(gains) > 1:
        half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
    line = f"difference: {statistics.mean(gains):+.3f} ± {half:.3f} (95 %, paired)\n"
    line += f"right only by {names[0]}: {gains.count(1)}, only by {names[1]}: {gains.count(-1)}"
    return f"{line}, of {len(gains)}"


def verdicts(names, compared):
    """What a judge says of the outputs of two models; compared: for each question (wins, flips) of both outputs."""
    wins = []
    flips = []
    for (win, _), (flip, _) in compared:
        wins.append(win)
        flips.append(flip)
    better = sum(win > 0.5 for win in wins)
    share = (better + wins.count(0.5) / 2) / len(wins)
    line = f"judge: {names[0]} is better than {names[1]} in {share_of(share, len(wins))}"
    line += f" of {len(wins)} questions, both orders averaged;"
    line += f" in {statistics.mean(flips):.3f} it prefers a place, not an output"
    return line


def health_notes(row, settings, on_gpu):
    """Sentences on what is out of its healthy range in the row of a step that was made with these settings."""
    notes = []
    if row["skipped_updates"]:
        notes.append(
            "the loss or the gradient was not finite: that update was skipped, the weights stayed as they were"
        )
    step = row["step"] - settings["COLD_START"]  # of Algorithm 1
    if step <= 0:
        return notes
    kl = row.get("kl", 0.0)
    entropy = row.get("entropy", 1.0)  # unknown where another model has sampled
    past_warmup = step > settings["WARMUP"] + 2
    at_reference = (step - 1) % settings["STEPS"] == 0  # first step of an iteration: π_θ = π_ref
    grpo = settings["ALGORITHM"] == "grpo" and settings["DENOMINATOR"] == "sequence"
    if grpo and settings["MU"] == 1 and abs(row["loss"]) < 1e-3 and row["grad_norm"] > 0:
        notes.append(
            "loss is about 0 at μ = 1: expected. Ratios are 1, a group's advantages sum to 0; its gradient is not 0"
        )
    if row["zero_advantage"] > 0.9:
        notes.append("9 of 10 outputs have Â = 0 and teach nothing: the questions are too easy or too hard")
    if step == 1 and settings["MU"] == 1 and kl > 1e-2:
        notes.append(
            "the KL is above 0.01 at the first step, where policy and reference are the same: their numerics differ"
        )
    moved = past_warmup and not at_reference and row["grad_norm"] > 0
    if settings["BETA"] and row.get("kl") == 0 and moved:
        notes.append("the KL is exactly 0 after updates: is the reference the policy itself?")
    if kl > 1:
        notes.append("the KL is above 1 nat per token: far from the reference (lower --learning_rate or raise --beta)")
    if row.get("kl_log_ratio_max", 0.0) > 10:
        notes.append("some |log(π_ref/π_θ)| is above 10: that one token dominates the KL of eq. (4)")
    if entropy < 0.05 and row["accuracy"] < 0.9:
        notes.append("the entropy is below 0.05 nats while answers are still wrong: little is explored any more")
    if entropy > 4:
        notes.append("the entropy is above 4 nats per token: that is close to random text")
    if row["clip_low"] + row["clip_high"] > 0.2:
        notes.append(
            "over 20 % of the tokens are clipped: the updates of one rollout go too far (--learning_rate, --mu)"
        )
    if settings["MU"] > 1 and past_warmup and row["ratio_max"] == 1:
        notes.append("the ratio stays exactly 1 although μ > 1: is π_θold computed anew between the updates?")
    if row["truncated"] > 0.5:
        notes.append(
            "over half of the outputs are cut at --max_new_tokens: raise it, or the end token is not being learnt"
        )
    if row.get("sampler_gap", 0.0) > (2e-2 if on_gpu else 1e-4):
        notes.append(
            "the log-probabilities of sampling and scoring differ: the policy that samples is not the one that learns"
        )
    return notes


def rate_note(rate):
    """What another number of steps does to the learning rate of a run that is resumed."""
    return (
        f"note: with another --steps the learning rate jumps to {rate:.2g}, since it falls to 0 at the new last step."
    )


def stopped_line(run, step, ranks, local_ranks):
    """Where a run was stopped, and the command that continues it."""
    start = "python" if ranks == 1 else f"torchrun --nproc_per_node {local_ranks} --"
    return f"stopped after step {step} and saved; go on with: {start} main.py --resume {shlex.quote(str(run))}"


def summary(run):
    """The end of a run: its models in a table, three test questions with the first and last completions, the files."""
    run = Path(run)
    files = f"\nthe model is in {run}/model, the curves are in {run}: "
    files += "result.png, train_score.png, eval_score.png"
    evaluations = [row for row in read_lines(run / "metrics.jsonl") if "eval/accuracy" in row]
    if not evaluations or evaluations[0]["step"]:  # --test evaluates once, at its end
        return files
    base = evaluations[0]
    trained = evaluations[-1]
    cold_start = read_config(run)["COLD_START"]  # 0 if there was none
    names = {trained["step"]: "trained", cold_start: "cold start", 0: "base"}
    shown = [row for row in evaluations if row["step"] in names]
    titles = [f"{names[row['step']]} (step {row['step']})" for row in shown]
    lines = ["", table_row(f"test, {base['eval/n']}", titles)]
    for key in base | trained:
        if key not in ("step", "eval/n", "eval/ci95", "eval/games"):
            lines.append(table_row(key.removeprefix("eval/"), [cell(row, key) for row in shown]))
    samples = read_lines(run / "samples.jsonl")
    pairs = zip(tests_at(samples, 0), tests_at(samples, trained["step"]))
    for before, after in itertools.islice(pairs, 3):
        lines.append(f"\n{before['question']}  (answer: {before['answer']})")
        lines.append(side_by_side(judged("base", before), judged("trained", after)))
    lines.append(files)
    return "\n".join(lines)


def tests_at(samples, step):
    """The records of the test that was made after a step."""
    return [row for row in samples if row["split"] == "test" and row["step"] == step]


def table_row(title, cells):
    """A line of a table, with columns of 24 characters."""
    line = f"{title:24}"
    for text in cells:
        line += f"{text:>24}"
    return line


def cell(row, key):
    """A number of an evaluation, with its interval where it is a share of right answers."""
    value = row.get(key)
    if value is None:
        return "–"
    if key in ("eval/accuracy", "eval/lenient"):
        return share_of(value, row["eval/n"])
    return f"{value:.3f}"


def judged(name, record):
    """A model's completion below its name, and whether it is right."""
    verdict = "right" if record["correctness"] else "wrong"
    return f"{name}, {verdict}:\n{record['completion']}"


def side_by_side(left, right):
    """Two texts in two columns of 56 characters."""
    pairs = itertools.zip_longest(wrapped(left), wrapped(right), fillvalue="")
    return "\n".join(f"  {a:56} | {b}" for a, b in pairs)


def wrapped(text):
    """The lines of a text, none of them longer than 56 characters."""
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, 56) or [""]
    return lines
