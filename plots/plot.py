"""Draw the training and the test curves of one or more runs, from their files alone.

    python plots/plot.py runs/A runs/B ...     runs that differ only in their seed share a curve, with a band
    python plots/plot.py --x tokens ...        what each costs: by tokens sampled (or seconds), not by steps
    python plots/plot.py --out FOLDER ...      where to put train_score.png and eval_score.png

Without --out they go into the run's folder, or for several runs into the folder that the runs are in.
"""

import argparse
import gc
import itertools
import json
import sys
from pathlib import Path

APPROACHES = {"approach/guessed": "guessed", "approach/worked": "worked out", "approach/checked": "checked"}
LENGTHS = {"length_right": "right", "length_wrong": "wrong"}
TRAIN = [  # title, {key in metrics.jsonl: its name in the panel}
    ("right answers, sampled", {"accuracy": ""}),
    ("how the outputs come to their answers", APPROACHES),
    ("length of right and wrong outputs, tokens", LENGTHS),
    ("reward", {"reward": ""}),
    ("steps that calculate, per output", {"num_steps": ""}),
    ("self-reflection, words per output", {"reflection": ""}),
    ("KL to the reference, nats per token", {"kl": ""}),
    ("entropy, nats per token", {"entropy": ""}),
    ("groups without spread", {"zero_std_groups": ""}),
]
TEST = [
    ("right answers, greedy", {"eval/accuracy": ""}),
    ("how the outputs come to their answers", {f"eval/{key}": name for key, name in APPROACHES.items()}),
    ("length of outputs, tokens", {"eval/length": ""}),
    ("outputs in exactly the form of the prompt", {"eval/format": ""}),
    ("steps that calculate, per output", {"eval/num_steps": ""}),
    ("self-reflection, words per output", {"eval/reflection": ""}),
]
GAMES = ("games of Nim won, by opponent", {f"eval/wins/{name}": name for name in ("random", "reference", "perfect")})
X = {"step": "step", "tokens": "tokens sampled", "seconds": "seconds of training"}
SHARES = ("accuracy", "format", "zero_std_groups", "wins/random", *APPROACHES)  # from 0 to 1


class FolderError(ValueError):
    """What is wrong with a run's folder, in one line."""


def read_config(folder):
    """What config.json says of a run: its settings, and what they ran on."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        no_run = f"{folder} is no run: {path} cannot be read ({error.strerror})"
        raise FolderError(f"{no_run}; give the folder of a run, as in runs/NAME") from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from None
    if isinstance(config, dict):
        return config
    raise FolderError(f"{path} is damaged: it holds no settings")


def read_lines(path, only=None):
    """The rows of a file of JSON lines, or only some keys of them, except a last row that a crash cut in half."""
    try:
        with open(path, encoding="utf-8") as file:
            whole = (json.loads(line) for line in file if line.endswith("\n"))
            return [{key: row[key] for key in row if not only or key in only} for row in map(checked, whole)]
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from None


def checked(row):
    """A row that is an object with a step."""
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return row
    raise ValueError(f"a row without a step: {row}")


def read(folder, only=None):
    """A run's settings and the rows of its metrics, or only some keys of them."""
    return read_config(folder), read_lines(Path(folder) / "metrics.jsonl", only)


def curves(rows, key):
    """The steps at which a key was written, and its values."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def groups(folders):
    """Runs by what they have in common: {label: [rows of each run]}; all settings but the seed and the name count."""
    by_settings, drawn = {}, {*X, "stage", "eval/ci95", *(key for _, keys in [*TRAIN, *TEST, GAMES] for key in keys)}
    for folder in folders:
        config, rows = read(folder, drawn)
        same = json.dumps(
            {k: v for k, v in config.items() if k not in ("SEED", "RUN", "commit", "device", "ranks", "versions")},
            sort_keys=True,
        )
        by_settings.setdefault(same, []).append((str(folder), rows))
    labels = (runs[0][0] + f" ({len(runs)} runs)" * (len(runs) > 1) for runs in by_settings.values())
    labels = (label.replace("$", r"\$") for label in labels)  # which is no mathematics
    return dict(zip(labels, ([rows for _, rows in runs] for runs in by_settings.values())))


def positions(rows, x):
    """Where the steps of a run are on the x-axis: {step: steps, or tokens or seconds spent until then}."""
    if x == "step":
        return {row["step"]: row["step"] for row in rows}
    steps, spent = curves(rows, x)
    return {0: 0} | dict(zip(steps, itertools.accumulate(spent) if x == "seconds" else spent))


def stages(rows):
    """The stages of a run's curriculum: [(name, first step, last step)]."""
    steps = [(row["stage"], row["step"]) for row in rows if isinstance(row.get("stage"), str)]
    runs = [(name, [step for _, step in group]) for name, group in itertools.groupby(steps, lambda pair: pair[0])]
    return [(name, group[0], group[-1]) for name, group in runs]


def shade(axes, rows, x):
    """The names of the stages (a cold start is one), and every other one in grey, the first included."""
    found, at = stages(rows), positions(rows, x)
    for number, (name, first, last) in enumerate(found if len(found) > 1 else []):
        first, last = at.get(first - 1, 0), at[last]  # from the end of the step before
        axes.axvspan(first, last, color="black", alpha=0.07 * (number % 2 == 0), linewidth=0)
        where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 7, "color": "0.4"}
        axes.text((first + last) / 2, 0.99, name.replace("$", r"\$"), **where)


def smooth(values, window=5):
    """A running mean over the last few values."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]


def panel(axes, keys, title, runs_by_label, smoothed, x="step"):
    """Some keys of all runs, a line per label and key: the colour tells the labels apart, or a single label's keys."""
    from matplotlib.ticker import EngFormatter  # here, so that a run which draws nothing starts faster

    for number, (label, runs) in enumerate(runs_by_label.items()):
        for index, (key, name) in enumerate(keys.items()):
            color, dash = (index, "-") if len(runs_by_label) == 1 else (number, ("-", "--", ":")[index])
            legend = label if len(keys) == 1 else name if number == 0 else None
            line(axes, key, runs, smoothed, x, color=f"C{color % 10}", linestyle=dash, label=legend)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(X[x], fontsize=8)
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    axes.grid(alpha=0.3)
    if len(keys) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    if next(iter(keys)).removeprefix("eval/") in SHARES:
        axes.set_ylim(-0.02, 1.02)


def line(axes, key, runs, smoothed, x, **style):
    """The mean of one key over some runs, and a band from their lowest to their highest."""
    series = [dict(zip(*curves(rows, key))) for rows in runs]
    steps = sorted(set.intersection(*map(set, series)))
    steps = steps[:: 1 + len(steps) // 1000]  # a panel has not even 500 columns
    if not steps:
        return
    values = [[one[step] for one in series] for step in steps]
    at = [positions(rows, x) for rows in runs]
    places = [sum(of_run[step] for of_run in at) / len(at) for step in steps]
    mean = [sum(at) / len(at) for at in values]
    low, high = [min(at) for at in values], [max(at) for at in values]
    if key == "eval/accuracy" and len(runs) == 1:  # one run: the band is the 95 % interval
        half = dict(zip(*curves(runs[0], "eval/ci95")))
        low = [mean[i] - half[step] for i, step in enumerate(steps)]
        high = [mean[i] + half[step] for i, step in enumerate(steps)]
    if smoothed:
        axes.plot(places, mean, color=style["color"], alpha=0.25, linewidth=0.8)
        mean, low, high = smooth(mean), smooth(low), smooth(high)
    axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(places, mean, marker="" if smoothed else "o", markersize=3, **style)


def draw(folders, out, x="step"):
    """Write train_score.png and eval_score.png of some runs into a folder, which is made; returns their paths."""
    from matplotlib.figure import Figure  # here, so that a run which draws nothing starts faster

    runs_by_label, paths = groups(folders), []
    played = any("eval/wins/random" in row for runs in runs_by_label.values() for rows in runs for row in rows)
    tests = [*TEST[:-1], GAMES] if played else TEST
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, panels, columns in (("train_score", TRAIN, 3), ("eval_score", tests, 3)):
        lines = -(-len(panels) // columns)
        height = 3 * lines + 0.3
        figure = Figure(figsize=(4 * columns, height))
        # room for titles and numbers, in inches: to find it out by drawing twice takes as long again
        figure.subplots_adjust(0.045, 0.5 / height, 0.99, 1 - 0.3 / height, 0.16, 0.36)
        grid = figure.subplots(lines, columns, squeeze=False).flat
        for axes, (title, keys) in zip(grid, panels):
            panel(axes, keys, title, runs_by_label, name == "train_score", x)
            shade(axes, next(iter(runs_by_label.values()))[0], x)
        if grid[0].get_legend_handles_labels()[0]:
            grid[0].legend(fontsize=8)
        path = Path(out) / f"{name}.png"
        figure.savefig(path, dpi=110)
        paths.append(path)
    gc.collect()  # a figure is a web of references, which otherwise waits for a collection that is rare in training
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, with metrics.jsonl and config.json")
    parser.add_argument("--x", choices=X, default="step", help="what the x-axis counts (default: step)")
    parser.add_argument("--out", help="the folder for the pictures")
    arguments = parser.parse_args()
    folders = [Path(run) for run in arguments.runs]
    out = Path(arguments.out or (folders[0] if len(folders) == 1 else folders[0].parent))
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
