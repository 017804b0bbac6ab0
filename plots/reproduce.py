"""Redraw the paper's figures, ablate its constants, compare what came after: on the tiny model.

    python plots/reproduce.py            every run that is still missing, then the table and the pictures
    python plots/reproduce.py grpo rft   only these
    python plots/reproduce.py --draw     only the table and the pictures, from the data of the last time

All runs take 80 minutes on two cores. Every run is one of main.py's, with three or five seeds, in
runs/reproduce-NAME-SEED. Interrupted, the command goes on where it stopped. What the pictures show is kept in
plots/reproduce/data.json, so that they can be drawn again without the runs.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from plots import plot  # noqa: E402, the script stands beside the package it draws with

OUT = HERE / "reproduce"
SEEDS = (0, 1, 2, 3, 4)
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile, by the number of seeds
COMMON = "--model tiny --dataset arithmetic:3 --max_new_tokens 80 --steps 40 --learning_rate 1e-4 --schedule constant"
COMMON += " --eval_every 5 --save_every 20 --show_every 0"
NO_ANSWER = "--weight_correctness 0 --weight_integer 0"
NO_FORM = "--weight_strict_format 0 --weight_soft_format 0 --weight_tag_count 0"
PLAIN = "--beta 0 --weight_integer 0 " + NO_FORM  # what the variants are compared on: the answer's reward alone
PLAIN_4 = "--steps 20 --mu 4 " + PLAIN  # where the objectives differ: with μ = 1 all of them have the same gradient
HARD = PLAIN + " --dataset arithmetic:4 --max_new_tokens 112"  # where right outputs are rare
STALE = " --staleness 4 --is_ratio "
CISPO = " --clip weight --epsilon_low 1 --epsilon_high 4 --denominator token"
RUNS = {  # what each changes; a flag given twice takes its last value
    "grpo": "",
    "grpo-ps": "--supervision both",
    "grpo-ps-printed": "--supervision process",
    "2-step-grpo": "--dataset arithmetic:2",
    "2-step-grpo-ps": "--dataset arithmetic:2 --supervision both",
    "2-step-rft": "--dataset arithmetic:2 --algorithm rft",
    "2-step-online-rft": "--dataset arithmetic:2 --algorithm online_rft",
    "4-step-grpo": "--dataset arithmetic:4 --max_new_tokens 112",
    "4-step-grpo-ps": "--dataset arithmetic:4 --max_new_tokens 112 --supervision both",
    "4-step-rft": "--dataset arithmetic:4 --max_new_tokens 112 --algorithm rft",
    "4-step-online-rft": "--dataset arithmetic:4 --max_new_tokens 112 --algorithm online_rft",
    "rft": "--algorithm rft",
    "online-rft": "--algorithm online_rft",
    "sft": "--algorithm sft",
    "ppo": "--algorithm ppo",
    "ppo-sparse": "--algorithm ppo --weight_integer 0 " + NO_FORM,
    "dpo": "--algorithm dpo --learning_rate 3e-5",
    "iterations-2": "--iterations 2 --steps 20",
    "beta-0": "--beta 0",
    "beta-0.4": "--beta 0.4",
    "group-2": "--group_size 2 --questions_per_step 64",
    "group-32": "--group_size 32 --questions_per_step 4",
    "sparse": "--weight_integer 0 " + NO_FORM,
    "no-std": "--scale none",
    "random": f"--weight_random 2 {NO_ANSWER} {NO_FORM}",
    "random-mu-4": f"--weight_random 2 --steps 20 --mu 4 {NO_ANSWER} {NO_FORM}",
    "form": NO_ANSWER,
    "form-mu-4": "--steps 20 --mu 4 " + NO_ANSWER,
    "mu-2": "--steps 20 --mu 2",
    "mu-4": "--steps 20 --mu 4",
    "mu-4-epsilon-0.02": "--steps 20 --mu 4 --epsilon_low 0.02 --epsilon_high 0.02",
    "mu-4-epsilon-10": "--steps 20 --mu 4 --epsilon_low 1 --epsilon_high 10",
    "plain": PLAIN,
    "dr-grpo": PLAIN + " --scale none --denominator constant",
    "rloo": PLAIN + " --scale none --denominator constant --baseline others",
    "lite-ppo": PLAIN + " --scale batch --denominator token",
    "magistral": PLAIN + " --scale batch --denominator token --epsilon_high 0.28 --refill 10",
    "dapo": PLAIN + " --denominator token --epsilon_high 0.28 --refill 10 --weight_overlong 1",
    "maxrl": PLAIN + " --scale mean",
    "pass-k": PLAIN + " --pass_k 4",
    "gdpo": "--beta 0 --normalize each",
    "w-reinforce": PLAIN + " --positive 0.1",
    "two-outputs": PLAIN + " --group_size 2 --questions_per_step 64",
    "k3-plus": "--weight_integer 0 " + NO_FORM + " --kl k3+",
    "tis": PLAIN + STALE + "token",
    "sequence-tis": PLAIN + STALE + "sequence",
    "icepop": PLAIN + STALE + "token --is_outside mask --is_low 0.5",
    "scale-rl": PLAIN + CISPO + " --scale batch --staleness 8 --is_ratio token --is_high 5",
    "distill": "--beta 0 --algorithm distill --denominator token --teacher runs/reproduce-grpo-0/model",
    "4-step-plain": HARD,
    "4-step-dapo": HARD + " --denominator token --epsilon_high 0.28 --refill 10 --weight_overlong 1",
    "4-step-maxrl": HARD + " --scale mean",
    "4-step-pass-k": HARD + " --pass_k 4",
    "plain-mu-4": PLAIN_4,
    "gspo": PLAIN_4 + " --ratio sequence --epsilon_low 3e-4 --epsilon_high 4e-4",
    "luspo": PLAIN_4 + " --ratio sequence --epsilon_low 0.002 --epsilon_high 0.0025 --denominator constant",
    "cispo": PLAIN_4 + CISPO,
    "dual-clip": PLAIN_4 + " --delta 3",
}
THREE_SEEDS = {"dpo", "iterations-2", "beta-0", "group-2", "group-32", "sparse", "no-std", "mu-2", "mu-4"}
THREE_SEEDS |= {"mu-4-epsilon-10"}  # of these no difference to GRPO is claimed
COMPARED = {  # what came after the paper, by the run with the same reward that it is compared with
    "plain": "dr-grpo rloo lite-ppo magistral dapo maxrl pass-k w-reinforce two-outputs tis sequence-tis icepop "
    "scale-rl distill",
    "4-step-plain": "4-step-dapo 4-step-maxrl 4-step-pass-k",
    "plain-mu-4": "gspo luspo cispo dual-clip",
    "beta-0": "gdpo",
    "sparse": "k3-plus",
}
VARIANTS = {name: base for base, names in COMPARED.items() for name in names.split()}
THREE_SEEDS |= {name for name in (*VARIANTS, *COMPARED) if not name.startswith("4-step-")}
FIGURE_7 = {"before": "", "after GRPO": "grpo", "answer's reward alone": "plain", "pass@4 training": "pass-k"}
EVALUATIONS = {"figure7-base": "tiny"}
EVALUATIONS |= {
    f"figure7-{run}-{seed}": f"runs/reproduce-{run}-{seed}" for run in FIGURE_7.values() if run for seed in SEEDS[:3]
}
FIGURE_5 = {"RFT": "rft", "Online RFT": "online-rft", "GRPO+OS": "grpo", "GRPO+PS": "grpo-ps"}
BY_COST = {"GRPO": "plain", "DAPO": "dapo", "Magistral": "magistral", "MaxRL": "maxrl", "pass@4": "pass-k"}
BY_COST |= {"2 outputs": "two-outputs", "distillation": "distill"}
HARDER = {label: f"4-step-{BY_COST[label]}" for label in ("GRPO", "DAPO", "MaxRL", "pass@4")}
MU_4 = {"GRPO": "plain-mu-4", "GSPO": "gspo", "LUSPO": "luspo", "CISPO": "cispo", "dual clip": "dual-clip"}
STALE_4 = {"fresh": "plain", "TIS": "tis", "sequence TIS": "sequence-tis", "IcePop": "icepop", "ScaleRL": "scale-rl"}
FIGURES = {  # file: [(title, {label: run})]; "by tokens" in a title says what its x-axis is
    "figure5": [
        (f"Figure 5, {n} steps", {name: prefix + run for name, run in FIGURE_5.items()})
        for n, prefix in ((2, "2-step-"), (3, ""), (4, "4-step-"))
    ],
    "figure6": [
        ("Figure 6", {"1 iteration": "grpo", "2 iterations": "iterations-2"}),
    ],
    "methods": [
        (
            "SFT, DPO, PPO and GRPO",
            {"SFT": "sft", "DPO": "dpo", "PPO": "ppo", "PPO, answer's reward alone": "ppo-sparse", "GRPO": "grpo"},
        ),
    ],
    "controls": [
        ("μ = 1", {"true reward": "grpo", "form alone": "form", "random": "random"}),
        ("μ = 4", {"true reward": "mu-4", "form alone": "form-mu-4", "random": "random-mu-4"}),
    ],
    "ablations": [
        ("β, weight of the KL", {"0": "beta-0", "0.04 (paper)": "grpo", "0.4": "beta-0.4"}),
        ("G, at 128 outputs a step", {"2": "group-2", "8": "grpo", "32": "group-32"}),
        ("μ, updates per rollout", {"1 (paper)": "grpo", "2": "mu-2", "4": "mu-4"}),
        ("ε, at μ = 4", {"0.02": "mu-4-epsilon-0.02", "0.2": "mu-4", "10: no clip": "mu-4-epsilon-10"}),
        ("rewards", {"all": "grpo", "correctness alone": "sparse"}),
        ("others", {"default": "grpo", "no std": "no-std"}),
    ],
    "variants": [
        ("advantages and data, by steps", BY_COST),
        ("advantages and data, by tokens", BY_COST),
        ("objectives, μ = 4", MU_4),
        ("outputs of 4 or 8 steps before", STALE_4),
        ("4-step problems, by steps", HARDER),
        ("4-step problems, by tokens", HARDER),
    ],
}


def main_py(arguments, bar):
    """Run main.py on one thread, count its steps on the bar, and return what it printed; None if it failed."""
    command = [sys.executable, str(HERE.parent / "main.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        with ThreadPoolExecutor(1) as pool:
            errors = pool.submit(process.stderr.read)
            lines = []
            for line in process.stdout:
                lines.append(line)
                bar.update(line.startswith("step") and "TEST" not in line)
        if process.wait():
            bar.write(f"{' '.join(arguments)}: {(errors.result().strip().splitlines() or ['killed'])[-1]}")
            return None
    return "".join(lines)


def train(name, seed, bar):
    """Make one run, or finish it, or leave it where it is done; is it done?"""
    folder = Path("runs") / f"reproduce-{name}-{seed}"
    flags = [*COMMON.split(), *RUNS[name].split(), "--seed", str(seed), "--run", folder.name]
    if not made_with(folder, flags):
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / "model").is_dir():
        bar.update(steps(name))
        return True
    if (folder / "checkpoint" / "state.safetensors").exists():
        bar.update(sum("reward" in row for row in plot.read(folder)[1]))
        return main_py(["--resume", str(folder)], bar) is not None
    shutil.rmtree(folder, ignore_errors=True)
    return main_py(flags, bar) is not None


def made_with(folder, flags):
    """Is this a run with these settings, not one of an earlier version of this file?"""
    if not (folder / "metrics.jsonl").exists():
        return False
    config, _ = plot.read(folder)
    wanted = {flag[2:].upper(): value for flag, value in zip(flags[::2], flags[1::2])}
    return all(
        float(value) == config[name] if isinstance(config.get(name), float) else value == str(config.get(name)).lower()
        for name, value in wanted.items()
    )


def evaluate(name, bar):
    """Figure 7's maj@K and pass@K of one model: {"maj@1": …}; from the file of the last time where there is one."""
    file = Path("runs") / f"reproduce-{name}.txt"
    if not file.exists():
        flags = "--dataset arithmetic:3 --max_new_tokens 80 --eval_questions 200 --eval_samples 64"
        printed = main_py(["--evaluate", EVALUATIONS[name], *flags.split()], bar)
        if printed is None:
            return None
        file.write_text(printed)
    return {key: float(value) for key, value in re.findall(r"((?:maj|pass)@\d+) ([\d.]+)", file.read_text())}


def seeds(name):
    return SEEDS[:3] if name in THREE_SEEDS else SEEDS


def flag(name, which):
    """The value of a flag of a run."""
    return int(re.findall(rf"--{which} (\d+)", f"--iterations 1 {COMMON} {RUNS[name]}")[-1])


def steps(name):
    return flag(name, "steps") * flag(name, "iterations")


def summary(folder):
    """What the pictures and the table need of a run: its evaluations, and some means over its last ten steps."""
    rows = plot.read(folder)[1]
    tokens = plot.positions(rows, "tokens")
    tests, last = [row for row in rows if "eval/accuracy" in row], [row for row in rows if "reward" in row]
    keys = ("kl", "clip_low", "clip_high", "zero_std_groups")
    values = {key: [row[key] for row in last[-10:] if row.get(key) is not None] for key in keys}
    return {
        "tests": [
            {"tokens": tokens[row["step"]]}
            | {key: row[key] for key in ("step", "eval/accuracy", "eval/ci95", "eval/length")}
            for row in tests
        ],
        "last": {key: sum(of_key) / len(of_key) for key, of_key in values.items() if of_key},
        "minutes": sum(row["seconds"] for row in last) / 60,
    }


def collect(names):
    """Make the runs that are missing, two or more side by side, and keep what they show in data.json."""
    data = json.loads((OUT / "data.json").read_text()) if (OUT / "data.json").exists() else {}
    jobs = [(name, seed) for seed in SEEDS for name in names if seed in seeds(name)]
    with tqdm(total=sum(steps(name) for name, _ in jobs), desc="reproduce", unit="step", smoothing=0.02) as bar:
        evaluate("figure7-base", bar)  # builds the tiny model, once
        if "distill" in names:
            train("grpo", 0, tqdm(disable=True))  # its teacher
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            done = dict(zip(jobs, pool.map(lambda job: train(*job, bar), jobs)))
            if all(done.get((name, seed)) for name in FIGURE_7.values() if name for seed in SEEDS[:3]):
                curves = dict(zip(EVALUATIONS, pool.map(lambda name: evaluate(name, bar), EVALUATIONS)))
                data |= {"figure7": curves} if all(curves.values()) else {}
        finally:  # after Ctrl-C the runs in progress end after their step, and no other begins
            pool.shutdown(cancel_futures=True)
    for name in names:
        if all(done[name, seed] for seed in seeds(name)):
            folders = [f"runs/reproduce-{name}-{seed}" for seed in seeds(name)]
            data[name] = {"flags": f"{COMMON} {RUNS[name]}".strip(), "runs": list(map(summary, folders))}
    OUT.mkdir(exist_ok=True)
    lines = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in data.items())
    (OUT / "data.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return all(done.values())


def mean_and_range(values):
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def accuracies(runs, which=-1):
    return [run["tests"][which]["eval/accuracy"] for run in runs]


def difference(values, others):
    """The mean of values - others, a pair for each seed, with its 95 % interval; * where that excludes 0."""
    gains = [a - b for a, b in zip(values, others)]
    mean = statistics.mean(gains)
    half = STUDENT_T[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}" + " *" * (abs(mean) > half)


def steps_to(goal, runs):
    """At which step the greedy accuracy first reaches a goal, for each run."""
    reached = [[row["step"] for row in run["tests"] if row["eval/accuracy"] >= goal] for run in runs]
    return ", ".join(str(steps[0]) if steps else "–" for steps in reached)


def table(data):
    """Greedy accuracy at the end of each run and on the way there, and means of its last ten steps, as Markdown."""
    columns = "run", "flags", "accuracy", "less its start", "less grpo", "steps to 0.80", "KL", "clipped", "dead"
    columns += "length", "minutes"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in (name for name in RUNS if name in data and name not in VARIANTS and "plain" not in name):
        runs = data[name]["runs"]
        last = {key: sum(run["last"].get(key, 0.0) for run in runs) / len(runs) for key in runs[0]["last"]}
        grpo = "".join(re.findall(r"^\d-step-", name)) + "grpo"  # on the same questions
        cells = [
            mean_and_range(accuracies(runs)),
            difference(accuracies(runs), accuracies(runs, 0)),
            "–" if name == grpo or grpo not in data else difference(accuracies(runs), accuracies(data[grpo]["runs"])),
            steps_to(0.8, runs),
            f"{last['kl']:.3f}" if "kl" in last else "–",
        ]
        cells += [f"{last['clip_low'] + last['clip_high']:.3f}", f"{last['zero_std_groups']:.2f}"]
        cells += [f"{sum(run['tests'][-1]['eval/length'] for run in runs) / len(runs):.1f}"]
        minutes = max(run["minutes"] for run in runs)
        print(f"| {name} | `{RUNS[name] or 'the default'}` | {' | '.join(cells)} | {minutes:.1f} |")


def at_equal_tokens(runs, others):
    """The accuracies of two methods, seed by seed, where the cheaper of the two had spent all its tokens."""
    curve = lambda run: [[row[key] for row in run["tests"]] for key in ("tokens", "eval/accuracy")]
    pairs = [(curve(run), curve(other)) for run, other in zip(runs, others)]
    ends = [min(one[0][-1], other[0][-1]) for one, other in pairs]
    at_end = [[float(numpy.interp(end, *of)) for of in pair] for end, pair in zip(ends, pairs)]
    return zip(*at_end)


def variants_table(data):
    """What came after the paper, against GRPO with the same reward: after as many steps, and after as many tokens."""
    columns = "run", "flags", "accuracy", "compared with", "after as many steps", "after as many tokens"
    columns += "steps to 0.80", "thousand tokens", "length"
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in (name for name in RUNS if name in data and name in (*VARIANTS, *COMPARED)):
        runs, base = data[name]["runs"], VARIANTS.get(name)
        flags, differences = RUNS[name], ["–", "–"]
        if base:
            others, flags = data[base]["runs"], RUNS[name].removeprefix(RUNS[base]).strip()
            differences = [difference(accuracies(runs), accuracies(others)), difference(*at_equal_tokens(runs, others))]
        cells = [f"`{flags}`", mean_and_range(accuracies(runs)), base or "–", *differences]
        cells += [steps_to(0.8, runs)]
        for key, unit in (("tokens", 1000), ("eval/length", 1)):
            cells += [f"{sum(run['tests'][-1][key] for run in runs) / len(runs) / unit:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def draw(data):
    """The pictures, into plots/reproduce/."""
    from matplotlib.figure import Figure

    for file, panels in FIGURES.items():
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(5 * columns, 3.6 * lines) if columns > 1 else (7, 4.2), layout="constrained")
        for axes, (title, curves) in zip(figure.subplots(lines, columns, squeeze=False).flat, panels):
            runs = {
                label: [run["tests"] for run in data[name]["runs"]] for label, name in curves.items() if name in data
            }
            x = "tokens" if "by tokens" in title else "step"
            plot.panel(axes, {"eval/accuracy": ""}, f"{title}: greedy test accuracy", runs, smoothed=False, x=x)
            axes.autoscale(axis="y")
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if runs:
                axes.legend(fontsize=8)
        figure.savefig(OUT / f"{file}.png", dpi=100)
    if "figure7" in data:
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, measure in zip(figure.subplots(1, 2), ("maj", "pass")):
            for label, run in FIGURE_7.items():
                names = [name for name in data["figure7"] if name.startswith(f"figure7-{run or 'base'}")]
                if not names:
                    continue
                ks = sorted(int(key.split("@")[1]) for key in data["figure7"][names[0]] if key.startswith(measure))
                values = [[data["figure7"][name][f"{measure}@{k}"] for name in names] for k in ks]
                axes.plot(ks, [sum(at) / len(at) for at in values], marker="o", markersize=3, label=label)
                axes.fill_between(ks, [min(at) for at in values], [max(at) for at in values], alpha=0.15, linewidth=0)
            axes.set(xscale="log", xlabel="K", title=f"Figure 7: {measure}@K, temperature 0.7", ylim=(-0.02, 1.02))
            axes.set_xticks(ks, ks)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, loc="lower right")
        figure.savefig(OUT / "figure7.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME", help=f"only these: {', '.join(RUNS)}")
    parser.add_argument("--draw", action="store_true", help="make no run")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.runs if name not in RUNS]:
        parser.exit(2, f"reproduce.py: error: no run is called {unknown[0]}; there are {', '.join(RUNS)}\n")
    complete = arguments.draw or collect(arguments.runs or list(RUNS))
    if not (OUT / "data.json").exists():
        parser.exit(2, "reproduce.py: error: there is no data yet: run it without --draw\n")
    data = json.loads((OUT / "data.json").read_text())
    table(data)
    variants_table(data)
    draw(data)
    print(f"\nthe pictures are in {OUT}")
    return 0 if complete else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("reproduce.py: interrupted; the same command goes on from here")
