"""Draw the training and the test curves of one or more runs, from their files alone.

    python plots/plot.py runs/A runs/B ...     runs that differ only in their seed share a curve, with a band
    python plots/plot.py --x tokens ...        what each costs: by tokens sampled (or seconds), not by steps
    python plots/plot.py --out FOLDER ...      where to put result.png, train_score.png and eval_score.png

Without --out they go into the run's folder, or for several runs into the folder that the runs are in.
"""

import argparse
import gc
import itertools
import json
import sys
from pathlib import Path

import numpy

APPROACHES = {
    "approach/guessed": "guessed",
    "approach/worked": "worked out",
    "approach/checked": "checked",
}
TEST_APPROACHES = {f"eval/{key}": name for key, name in APPROACHES.items()}
OPPONENTS = {f"eval/wins/{name}": name for name in ("random", "reference", "perfect")}
TRAIN = {  # {title of a panel: {key in metrics.jsonl: its name in the panel}}
    "right answers, sampled": {"accuracy": ""},
    "how the outputs come to their answers": APPROACHES,
    "length of right and wrong outputs, tokens": {"length_right": "right", "length_wrong": "wrong"},
    "reward": {"reward": ""},
    "steps that calculate, per output": {"num_steps": ""},
    "self-reflection, words per output": {"reflection": ""},
    "KL to the reference, nats per token": {"kl": ""},
    "entropy, nats per token": {"entropy": ""},
    "groups without spread": {"zero_std_groups": ""},
}
TEST = {  # the first three are also those of result.png
    "right answers, greedy": {"eval/accuracy": ""},
    "how the outputs come to their answers": TEST_APPROACHES,
    "length of outputs, tokens": {"eval/length": ""},
    "outputs in exactly the form of the prompt": {"eval/format": ""},
    "steps that calculate, per output": {"eval/num_steps": ""},
}
REFLECTION = {"self-reflection, words per output": {"eval/reflection": ""}}  # the last panel of TEST,
GAMES = {"games of Nim won, by opponent": OPPONENTS}  # or this one, if games were played
SHARES = ("accuracy", "format", "zero_std_groups", "wins/random", *APPROACHES)  # from 0 to 1
X = {"step": "step", "tokens": "tokens sampled", "seconds": "seconds of training"}
MAY_DIFFER = ("SEED", "RUN", "commit", "date", "device", "ranks", "versions")  # between runs that share a curve


# ---- the files of a run --------------------------------------------------------------------------------------------


class FolderError(ValueError):
    """What is wrong with a run's folder, in one line."""


def read_config(folder):
    """What config.json says of a run: its settings, and what they ran on."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FolderError(
            f"{folder} is no run: {path} cannot be read ({error.strerror}); give the folder of a run, as in runs/NAME"
        ) from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise FolderError(f"{path} is damaged: it holds no settings")
    return config


def read_lines(path, only=None):
    """The rows of a file of JSON lines, or only some keys of them; without a last row that a crash cut in half."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    rows.append(read_row(line, only))
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from None
    return rows


def read_row(line, only):
    """A row, which is an object with a step."""
    row = json.loads(line)
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return {key: value for key, value in row.items() if only is None or key in only}
    raise ValueError(f"a row without a step: {row}")


def points(rows, key):
    """{step: number} for the rows that have the key."""
    return {row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float))}


def groups(folders):
    """Runs by what they have in common: {label: [rows of each run]}; all settings but the seed and the name count."""
    drawn = {"step", "stage", "tokens", "seconds", "eval/ci95", "eval/n"}
    for panels in (TRAIN, TEST, REFLECTION, GAMES):
        drawn.update(*panels.values())
    labels = {}  # {settings: label}
    runs = {}  # {label: rows of each run}
    for folder in folders:
        config = read_config(folder)
        rows = read_lines(Path(folder) / "metrics.jsonl", drawn)
        same = {name: value for name, value in config.items() if name not in MAY_DIFFER}
        label = labels.setdefault(json.dumps(same, sort_keys=True), as_text(folder))
        runs.setdefault(label, []).append(rows)
    for label in list(runs):
        count = len(runs[label])
        runs[label if count == 1 else f"{label} ({count} runs)"] = runs.pop(label)
    return runs


def as_text(name):
    """A name in which $ does not begin mathematics."""
    return str(name).replace("$", r"\$")


def positions(rows, x):
    """Where the steps of a run are on the x-axis: {step: steps, or tokens or seconds spent until then}."""
    if x == "step":
        return {row["step"]: row["step"] for row in rows}
    places = {0: 0}
    spent = 0
    for step, value in points(rows, x).items():
        spent = value if x == "tokens" else spent + value  # the tokens are those since the start
        places[step] = spent
    return places


def stages(rows):
    """The rows of each stage of a run's curriculum, in their order; a cold start is a stage too."""
    trained = [row for row in rows if isinstance(row.get("stage"), str)]
    return [list(of_stage) for _, of_stage in itertools.groupby(trained, lambda row: row["stage"])]


# ---- the pictures --------------------------------------------------------------------------------------------------


def panel(axes, keys, title, runs_by_label, smoothed, x="step"):
    """Some keys of all runs, a line per label and key: the colour tells the labels apart, or a single label's keys."""
    # here, and not at the top: so a run that draws nothing starts faster
    from matplotlib.ticker import EngFormatter

    for number, (label, runs) in enumerate(runs_by_label.items()):
        for index, (key, name) in enumerate(keys.items()):
            style = {"color": f"C{index}"}
            if len(runs_by_label) > 1:
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[index]}
            if len(keys) == 1:
                style["label"] = label
            elif number == 0:
                style["label"] = name
            line(axes, key, runs, smoothed, x, **style)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(X[x], fontsize=8)
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    axes.grid(alpha=0.3)
    if len(keys) > 1:
        add_legend(axes)
    if next(iter(keys)).removeprefix("eval/") in SHARES:
        axes.set_ylim(-0.02, 1.02)
    if runs_by_label:
        shade(axes, next(iter(runs_by_label.values()))[0], x)


def add_legend(axes, size=8, place="best"):
    """The names of the lines, if there is a line."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=size, loc=place)


def line(axes, key, runs, smoothed, x, **style):
    """The mean of one key over some runs, and a band from their lowest to their highest."""
    series = [points(rows, key) for rows in runs]
    steps = sorted(set.intersection(*map(set, series)))
    steps = steps[:: 1 + len(steps) // 1000]  # a panel has not even 500 columns
    if not steps:
        return
    places = at_steps([positions(rows, x) for rows in runs], steps).mean(0)
    values = at_steps(series, steps)
    middle = values.mean(0)
    low = values.min(0)
    high = values.max(0)
    if key == "eval/accuracy" and len(runs) == 1:  # one run: the band is Wilson's 95 % interval
        half, n = at_steps([points(runs[0], "eval/ci95"), points(runs[0], "eval/n")], steps)
        centre = (n * middle + 1.92) / (n + 3.84)  # of the interval: a little nearer to 0.5
        low = centre - half
        high = centre + half
    if smoothed:
        axes.plot(places, middle, color=style["color"], alpha=0.25, linewidth=0.8)
        middle = smooth(middle)
        low = smooth(low)
        high = smooth(high)
    axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(places, middle, marker="" if smoothed else "o", markersize=3, **style)


def at_steps(series, steps):
    """The numbers of several runs at some steps: [runs, steps]."""
    return numpy.array([[of_run[step] for step in steps] for of_run in series])


def smooth(values):
    """A running mean over the last five values."""
    return [values[max(0, end - 5) : end].mean() for end in range(1, len(values) + 1)]


def shade(axes, rows, x):
    """The names of the stages, if there are several, and every other one in grey, the first included."""
    found = stages(rows)
    if len(found) < 2:
        return
    at = positions(rows, x)
    where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
    for number, stage in enumerate(found):
        left = at.get(stage[0]["step"] - 1, 0)  # where the step before ended
        right = at[stage[-1]["step"]]
        if number % 2 == 0:
            axes.axvspan(left, right, color="black", alpha=0.07, linewidth=0)
        name = as_text(stage[0]["stage"])
        axes.text((left + right) / 2, 0.99, name, fontsize=7, color="0.4", **where)


def grid(panels, runs_by_label, smoothed, x):
    """A picture of many panels, three in a row."""
    from matplotlib.figure import Figure

    height = len(panels) + 0.3  # inches
    figure = Figure(figsize=(12, height))
    # room for titles and numbers, in inches: to find it out by drawing twice takes as long again
    figure.subplots_adjust(0.045, 0.5 / height, 0.99, 1 - 0.3 / height, 0.16, 0.36)
    all_axes = figure.subplots(len(panels) // 3, 3).flat
    for axes, (title, keys) in zip(all_axes, panels.items()):
        panel(axes, keys, title, runs_by_label, smoothed, x)
    add_legend(all_axes[0])
    return figure


def result(runs_by_label, x):
    """The picture to look at first: accuracy and length of the test outputs, and how they come to their answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7))
    figure.subplots_adjust(0.055, 0.075, 0.98, 0.95, 0.14, 0.34)
    accuracy = figure.add_subplot(2, 2, 1)
    length = figure.add_subplot(2, 2, 2)
    approaches = figure.add_subplot(2, 1, 2)
    for axes, (title, keys) in zip([accuracy, approaches, length], TEST.items()):
        panel(axes, keys, title, runs_by_label, False, x)
        axes.title.set_size(14)
        axes.xaxis.label.set_size(11)
        axes.tick_params(labelsize=11)
        for curve in axes.lines:
            curve.set(linewidth=2.5, markersize=6)
    length.set_ylim(0, 1.1 * length.get_ylim()[1])
    add_legend(approaches, 12, "center right")
    if len(runs_by_label) > 1:
        add_legend(accuracy, 10)
    else:
        write_ends(accuracy)
        write_ends(length)
    return figure


def write_ends(axes):
    """The first number of a curve on its right, and the last one, if it is another, below it."""
    for curve in axes.lines:
        xs, ys = curve.get_data()
        style = {"textcoords": "offset points", "size": 12}
        axes.annotate(f"{ys[0]:.3g}", (xs[0], ys[0]), (9, -4), **style)
        if len(ys) > 1:
            axes.annotate(f"{ys[-1]:.3g}", (xs[-1], ys[-1]), (-22, -20), **style)


def draw(folders, out, x="step"):
    """Write the three pictures of some runs into a folder, which is made; returns their paths."""
    runs_by_label = groups(folders)
    all_rows = itertools.chain(*itertools.chain(*runs_by_label.values()))
    played = any("eval/wins/random" in row for row in all_rows)
    pictures = {
        "result": result(runs_by_label, x),
        "train_score": grid(TRAIN, runs_by_label, True, x),
        "eval_score": grid(TEST | (GAMES if played else REFLECTION), runs_by_label, False, x),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    paths = [Path(out) / f"{name}.png" for name in pictures]
    for path in paths:
        pictures.pop(path.stem).savefig(path, dpi=110)
    gc.collect()  # a figure is a web of references, which otherwise waits for a collection that is rare in training
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, with metrics.jsonl and config.json")
    parser.add_argument("--x", choices=X, default="step", help="what the x-axis counts (default: step)")
    parser.add_argument("--out", help="the folder for the pictures")
    arguments = parser.parse_args()
    folders = [Path(run) for run in arguments.runs]
    out = folders[0] if len(folders) == 1 else folders[0].parent
    if arguments.out:
        out = Path(arguments.out)
    try:
        print(*draw(folders, out, arguments.x), sep="\n")
    except (FolderError, OSError) as error:
        reason = f"cannot write to {out}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"plot.py: error: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where it is ASCII only, a name that is not is printed with ?
    sys.exit(main())
