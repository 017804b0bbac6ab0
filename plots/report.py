"""What a run counts, writes and says: metrics of outputs, its folder, lines on the console, the table at its end.

Everything here is made of plain numbers and texts: a record is a dict about one output (its question, completion,
length and rewards by name), a row is a line of metrics.jsonl. How a run trains is not known here.
"""

import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import textwrap
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy

from plots.plot import FolderError, read_config, read_lines

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


# ---- metrics of outputs --------------------------------------------------------------------------------------------


def records(problems, texts, columns):
    """A record for each text: the same number of texts for each problem, and columns {name: a value per text}."""
    group, made = len(texts) // len(problems), []
    for i, text in enumerate(texts):
        about = {key: problems[i // group].get(key) for key in ("question", "answer", "kind", "task")}
        made.append(about | {"completion": text} | {name: values[i] for name, values in columns.items()})
    return made


def mean(records, name):
    """The mean of a number over some records; a record without it counts 0."""
    return statistics.mean(record.get(name, 0.0) for record in records)


def step_metrics(records, group_size, names):
    """The part of a training row that is about the sampled outputs; names are those of their rewards."""
    rewards = numpy.array([record["reward"] for record in records]).reshape(-1, group_size)  # [Q, G]
    tokens = sum(record["length"] for record in records)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(1, ddof=min(1, group_size - 1)).mean()),
        "zero_std_groups": float((rewards.max(1) == rewards.min(1)).mean()),
        **{f"rewards/{name}": mean(records, name) for name in names},
        "accuracy": mean(records, "correctness"),
        "entropy": sum(record["entropy"] for record in records) / tokens,
        "length_max": max(record["length"] for record in records),
        **{name: mean(records, name) for name in ("length", "truncated", "zero_advantage")},
        **behaviour(records),
    }


MEASURES = {  # {kind of problem: what its outputs have, by the keys of their records}
    "writing": ("words_used", "sentences", "distinct_2", "repeated_3", "compression", "copied", "fluency"),
    "dialogue": ("prefers_true",),
}


def behaviour(records):
    """How outputs come to their answers: shares of the approaches, steps, doubts, lengths of right and wrong ones."""
    lengths = {"right": [], "wrong": []}
    for record in records:
        lengths["right" if record.get("correctness") else "wrong"].append(record["length"])
    approaches = [record["approach"] for record in records]
    return {
        **{f"approach/{name}": approaches.count(name) / len(records) for name in ("guessed", "worked", "checked")},
        **{name: mean(records, name) for name in ("num_steps", "reflection")},
        **{f"length_{name}": statistics.mean(of) if of else None for name, of in lengths.items()},
    }


def mean_of_updates(updates):
    """The part of a training row that is about its μ updates: means of their diagnostics, of maxima the largest."""
    means = dict.fromkeys(("loss", "ratio_max", "clip_low", "clip_high", "grad_norm", "lr", "skipped_updates"), 0.0)
    means |= dict.fromkeys(("sampler_gap", "sampler_gap_max", "kl", "kl_log_ratio_max"))
    for name in updates[0] if updates else ():
        values = [update[name] for update in updates]
        means[name] = max(values) if name.endswith("max") else sum(values) / len(values)
    return means


def eval_metrics(records):
    """The row of an evaluation, from one greedy output per question."""
    accuracy, tasks = mean(records, "correctness"), dict.fromkeys(record["task"] for record in records)
    metrics = {
        "eval/accuracy": accuracy,
        "eval/ci95": wilson(accuracy, len(records)),
        "eval/lenient": mean(records, "lenient"),
        "eval/format": mean(records, "strict_format"),
        "eval/length": mean(records, "length"),
        "eval/truncated": mean(records, "truncated"),
        "eval/n": len(records),
        **{f"eval/{name}": value for name, value in behaviour(records).items()},
    }
    for kind, names in MEASURES.items():
        of_kind = [record for record in records if record["kind"] == kind]
        metrics |= {f"eval/{name}": mean(of_kind, name) for name in names if of_kind and name in of_kind[0]}
    for task in tasks if len(tasks) > 1 else ():
        of_task = [record for record in records if record["task"] == task]
        metrics[f"eval/accuracy/{task}"] = mean(of_task, "correctness")
        metrics[f"eval/lenient/{task}"] = mean(of_task, "lenient")
    return metrics


def pass_at_k(n, c, k):
    """The unbiased estimate, from n samples of which c are right, that one of k is right (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson(p, n):
    """Half the width of Wilson's 95 % interval for a share p of n; it is not 0 when all n are right, or none."""
    z = 1.96
    return z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))


def paired_difference(names, right):
    """Two models on the same questions in two lines; right: for each model, 1 or 0 for each question."""
    gains = [a - b for a, b in zip(*right)]
    half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return (
        f"difference: {statistics.mean(gains):+.3f} ± {half:.3f} (95 %, paired)\n"
        f"right only by {names[0]}: {gains.count(1)}, only by {names[1]}: {gains.count(-1)}, of {len(gains)}"
    )


def verdicts(names, compared):
    """What a judge says of the outputs of two models; compared: for each question (wins, flips) of both outputs."""
    wins = [(a > 0.5) + 0.5 * (a == 0.5) for (a, _), _ in compared]
    share, flipped = statistics.mean(wins), statistics.mean(flips[0] for _, flips in compared)
    return (
        f"judge: {names[0]} is better than {names[1]} in {share:.3f} ± {wilson(share, len(wins)):.3f} of {len(wins)}"
        f" questions, both orders averaged; in {flipped:.3f} it prefers a place, not an output"
    )


# ---- the folder of a run -------------------------------------------------------------------------------------------

WRITERS = {}  # {run: a writer of TensorBoard's files}


def runs_folder():
    """The folder in which runs and the tiny model are."""
    if Path("runs").is_file():
        raise FolderError("runs is a file here, and must be a folder: rename it, or start from another folder")
    return Path("runs")


def new_folder(run, model, dataset, test):
    """The folder of a new run, which is not made yet: runs/RUN, or one with the first free number."""
    named = runs_folder() / run
    if run and (named.is_file() or (named / "config.json").exists()):
        raise FolderError(f"{named} exists already: choose another --run, or go on with --resume {named}")
    data = "curriculum" if "," in dataset else Path(dataset).stem.partition(":")[0]
    stem = "test" if test else f"{Path(model).name}-{data}"
    numbered = (runs_folder() / f"{stem}-{number}" for number in itertools.count(1))
    return named if run else next(path for path in numbered if not path.exists())


def is_run(folder):
    return (Path(folder) / "metrics.jsonl").exists()


def read_settings(run, defaults):
    """The constants that a run was made with, of the types of the defaults."""
    config = read_config(run)
    if lacking := [name for name in defaults if name not in config]:
        other = "it was made by another program or version of this one; start a new run"
        raise FolderError(f"{run}/config.json lacks {', '.join(lacking[:3])}: {other}")
    try:
        return {name: type(default)(config[name]) for name, default in defaults.items()}
    except (ValueError, TypeError, OverflowError) as error:
        raise FolderError(f"{run}/config.json is damaged: {error}") from None


@contextmanager
def only_writer(run):
    """A block in which no other process writes to a run's folder; the system forgets its lock with the process."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
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
    paths = run / "metrics.jsonl", run / "samples.jsonl"
    rows = [read_lines(path) if step and path.exists() else [] for path in paths]  # all is read before any is replaced
    git = subprocess.run(
        "git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    versions = {package: version(package) for package in ("torch", "transformers", "datasets")}
    config = config | {"versions": versions, "commit": git.stdout.strip() or None}
    replace(run / "config.json", json.dumps(config, indent=2) + "\n")
    for path, of_file in zip(paths, rows):  # the run will write the rows after that step again
        replace(path, "".join(json.dumps(row) + "\n" for row in of_file if row["step"] <= step))


def replace(path, text):
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def append(path, rows):
    """Add rows to a file of JSON lines; a number that is not finite becomes null."""
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    with open(path, "a") as file:
        file.writelines(json.dumps({key: finite(value) for key, value in row.items()}) + "\n" for row in rows)


def sync(run):
    """Have the rows of a run on the disk, before the checkpoint that belongs to them."""
    for path in run.glob("*.jsonl"):
        with open(path, "rb") as file:
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
    if row["stage"] == "cold start":
        return (
            f"step {row['step']:4d} | cold start | loss {row['loss']:6.3f} | len {row['length']:5.1f}"
            f" | cut {row['truncated']:4.2f} | {row['seconds']:5.1f} s"
        )
    kl = "   off" if row["kl"] is None else f"{row['kl']:6.4f}"
    return (
        f"step {row['step']:4d} | reward {row['reward']:5.2f} ± {row['reward_std']:4.2f} | right {row['accuracy']:4.2f}"
        f" | guess {row['approach/guessed']:4.2f}"
        f" | kl {kl} | clip {row['clip_low'] + row['clip_high']:4.2f} | dead {row['zero_std_groups']:4.2f}"
        f" | len {row['length']:5.1f} | cut {row['truncated']:4.2f} | {row['seconds']:5.1f} s"
    )


def completion(record):
    """A completion with its question, answer and reward."""
    answer = textwrap.shorten(record["answer"], 60)
    text = textwrap.indent(record["completion"], "  | ", lambda line: True)
    return f"  {record['question']}  (answer: {answer}; reward {record['reward']:.2f})\n{text}"


def silence(records, tags):
    """What to do about a first step with next to nothing to learn from, with one of its outputs; else None."""
    if any(mean(records, name) >= 0.02 for name in ("correctness", "soft_format", "tests")):
        return None
    shares = [f"{tag} {sum(tag in record['completion'] for record in records) / len(records):.2f}" for tag in tags]
    return (
        "note: hardly an output of this step is right or has the form, so there is little to learn. With each tag:"
        f" {', '.join(shares)}; {mean(records, 'truncated'):.2f} are cut. One of them:\n{completion(records[0])}\n"
        "  If the form is missing: --cold_start 50 (if the data set has worked solutions) or --shots 4.\n"
        "  If outputs are cut: a longer --max_new_tokens. If answers are wrong: an easier set: --dataset arithmetic:1."
    )


def eval_line(metrics):
    """An evaluation in one line."""
    measured = {f"eval/{name}" for names in MEASURES.values() for name in names}
    shown = [key for key in metrics if "@" in key or re.match("eval/(accuracy|lenient)/", key) or key in measured]
    more = {re.sub("^eval/(accuracy/)?", "", key): metrics[key] for key in shown}
    more = "".join(f" | {name} {value:.3f}" for name, value in more.items())
    won = {key.removeprefix("eval/wins/"): value for key, value in metrics.items() if "wins/" in key}
    for name, share in won.items():
        more += f" | wins against {name} {share:.3f} ± {wilson(share, metrics['eval/games']):.3f}"
    return (
        f"accuracy {metrics['eval/accuracy']:.3f} ± {metrics['eval/ci95']:.3f} | lenient {metrics['eval/lenient']:.3f}"
        f" | format {metrics['eval/format']:.3f} | len {metrics['eval/length']:.1f}"
        f" | cut {metrics['eval/truncated']:.3f}{more} (n = {metrics['eval/n']})"
    )


def health_notes(row, settings, on_gpu):
    """Sentences on what is out of its healthy range in the row of a step that was made with these settings."""
    if row["skipped_updates"]:
        yield "the loss or the gradient was not finite: that update was skipped, the weights stayed as they were"
    step = row["step"] - settings["COLD_START"]  # of Algorithm 1
    if step <= 0:
        return
    kl, entropy, past_warmup = row["kl"] or 0.0, row["entropy"], step > settings["WARMUP"] + 2
    at_reference = (step - 1) % settings["STEPS"] == 0  # the first step of an iteration: π_θ = π_ref
    grpo, mu, sequence = settings["ALGORITHM"] == "grpo", settings["MU"], settings["DENOMINATOR"] == "sequence"
    if grpo and mu == 1 and sequence and abs(row["loss"]) < 1e-3 and row["grad_norm"] > 0:
        yield "loss is about 0 at μ = 1: expected. Ratios are 1, a group's advantages sum to 0; its gradient is not 0"
    if row["zero_advantage"] > 0.9:
        yield "9 of 10 outputs have Â = 0 and teach nothing: the questions are too easy or too hard"
    if step == 1 and kl > 1e-2:
        yield "the KL is above 0.01 at the first step, where policy and reference are the same: their numerics differ"
    if settings["BETA"] and past_warmup and row["kl"] == 0 and row["grad_norm"] > 0 and not at_reference:
        yield "the KL is exactly 0 after updates: is the reference the policy itself?"
    if kl > 1:
        yield "the KL is above 1 nat per token: far from the reference (lower --learning_rate or raise --beta)"
    if (row["kl_log_ratio_max"] or 0.0) > 10:
        yield "some |log(π_ref/π_θ)| is above 10: that one token dominates the KL of eq. (4)"
    if entropy < 0.05 and row["accuracy"] < 0.9:
        yield "the entropy is below 0.05 nats while answers are still wrong: little is explored any more"
    if entropy > 4:
        yield "the entropy is above 4 nats per token: that is close to random text"
    if row["clip_low"] + row["clip_high"] > 0.2:
        yield "over 20 % of the tokens are clipped: the updates of one rollout go too far (--learning_rate, --mu)"
    if mu > 1 and past_warmup and row["ratio_max"] == 1:
        yield "the ratio stays exactly 1 although μ > 1: is π_θold computed anew between the updates?"
    if row["truncated"] > 0.5:
        yield "over half of the outputs are cut at --max_new_tokens: raise it, or the end token is not being learnt"
    if (row["sampler_gap"] or 0.0) > (2e-2 if on_gpu else 1e-4):
        yield "the log-probabilities of sampling and scoring differ: the policy that samples is not the one that learns"


def stopped_line(run, step, ranks, local_ranks):
    """Where a run was stopped, and the command that continues it."""
    start = "python" if ranks == 1 else f"torchrun --nproc_per_node {local_ranks}"
    return f"stopped after step {step} and saved; go on with: {start} main.py --resume {shlex.quote(str(run))}"


def summary(run):
    """The end of a run: its models in a table, three test questions with the first and last completions, the files."""
    metrics, samples = (read_lines(Path(run) / f"{name}.jsonl") for name in ("metrics", "samples"))
    files = f"\nthe model is in {run}/model, the curves in {run}/train_score.png and {run}/eval_score.png"
    evaluations = [row for row in metrics if "eval/accuracy" in row]
    if not evaluations or evaluations[0]["step"]:  # --test evaluates once, at its end
        return files
    base, trained, cold_start = evaluations[0], evaluations[-1], read_config(run)["COLD_START"]
    names = {0: "base", trained["step"]: "trained"} | ({cold_start: "cold start"} if cold_start else {})
    shown = [row for row in evaluations if row["step"] in names]
    heads = [f"{names[row['step']]} (step {row['step']})" for row in shown]
    lines = [f"\n{'test, ' + str(base['eval/n']):24}" + "".join(f"{head:>24}" for head in heads)]
    for key in (key for key in trained if key not in ("step", "eval/n", "eval/ci95", "eval/games")):
        cells = ["–" if row.get(key) is None else f"{row[key]:.3f}" for row in shown]
        if key in ("eval/accuracy", "eval/lenient"):
            cells = [f"{cell} ± {wilson(row[key], row['eval/n']):.3f}" for cell, row in zip(cells, shown)]
        lines.append(f"{key.removeprefix('eval/'):24}" + "".join(f"{cell:>24}" for cell in cells))
    tests = [row for row in samples if row["split"] == "test"]
    pairs = zip(*([row for row in tests if row["step"] == one["step"]] for one in (base, trained)))
    for before, after in itertools.islice(pairs, 3):
        left, right = ("right" if row["correctness"] else "wrong" for row in (before, after))
        columns = f"base, {left}:\n{before['completion']}", f"trained, {right}:\n{after['completion']}"
        lines += [f"\n{before['question']}  (answer: {before['answer']})", side_by_side(*columns)]
    return "\n".join([*lines, files])


def side_by_side(left, right, width=56):
    """Two texts in two columns."""
    wrapped = ([textwrap.wrap(line, width) or [""] for line in text.split("\n")] for text in (left, right))
    columns = (itertools.chain.from_iterable(lines) for lines in wrapped)
    return "\n".join(f"  {a:{width}} | {b}" for a, b in itertools.zip_longest(*columns, fillvalue=""))
