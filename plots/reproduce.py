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
sys.path.insert(0, str(HERE.parent))  # this script stands beside the package it draws with
from plots import plot

OUT = HERE / "reproduce"
SEEDS = (0, 1, 2, 3, 4)
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile, by the number of seeds
COMMON = "--model tiny --dataset arithmetic:3 --max_new_tokens 80 --steps 40"
COMMON += " --learning_rate 1e-4 --schedule constant --eval_every 5 --save_every 20 --show_every 0"
FORM = "--rewards strict_format=0.5,soft_format=0.5,tag_count=0.5"  # a reward for the form alone
ANSWER = "--rewards correctness=2"  # for the answer alone
PLAIN = f"--beta 0 {ANSWER}"  # what the variants are compared on
PLAIN_4 = f"--steps 20 --mu 4 {PLAIN}"  # where the objectives differ: with μ = 1 all of them have the same gradient
LONG = "--dataset arithmetic:4 --max_new_tokens 112"
HARD = f"{PLAIN} {LONG}"  # where right outputs are rare
DAPO = "--denominator group --epsilon_high 0.28 --refill 10 --mask_truncated true"
DAPO += " --rewards correctness=2,overlong=1"
MAGISTRAL = "--advantage batch_std --denominator group --epsilon_high 0.28 --refill 10"
MAGISTRAL += " --rewards correctness=0.9,overlong=0.1"
MAXRL = "--advantage maxrl --denominator constant --rewards correctness=1"
PASS_K = "--advantage pass_at_k --pass_k 4 --rewards correctness=1"
CISPO = "--objective cispo --epsilon_low 1 --epsilon_high 4 --denominator group"
SCALE_RL = f"{CISPO} --advantage batch_std --staleness 8 --correction tis --correction_max 5"
RUNS = {  # what each changes; a flag given twice takes its last value
    "grpo": "",
    "grpo-ps": "--supervision both",
    "grpo-ps-printed": "--supervision process",
    "2-step-grpo": "--dataset arithmetic:2",
    "2-step-grpo-ps": "--dataset arithmetic:2 --supervision both",
    "2-step-rft": "--dataset arithmetic:2 --algorithm rft",
    "2-step-online-rft": "--dataset arithmetic:2 --algorithm online_rft",
    "4-step-grpo": LONG,
    "4-step-grpo-ps": f"{LONG} --supervision both",
    "4-step-rft": f"{LONG} --algorithm rft",
    "4-step-online-rft": f"{LONG} --algorithm online_rft",
    "rft": "--algorithm rft",
    "online-rft": "--algorithm online_rft",
    "sft": "--algorithm sft",
    "ppo": "--algorithm ppo",
    "ppo-sparse": f"--algorithm ppo {ANSWER}",
    "dpo": "--algorithm dpo --learning_rate 3e-5",
    "iterations-2": "--iterations 2 --steps 20",
    "beta-0": "--beta 0",
    "beta-0.4": "--beta 0.4",
    "group-2": "--group_size 2 --questions_per_step 64",
    "group-32": "--group_size 32 --questions_per_step 4",
    "sparse": ANSWER,
    "no-std": "--advantage dr_grpo",
    "random": "--rewards random=2",
    "random-mu-4": "--rewards random=2 --steps 20 --mu 4",
    "form": FORM,
    "form-mu-4": f"--steps 20 --mu 4 {FORM}",
    "mu-2": "--steps 20 --mu 2",
    "mu-4": "--steps 20 --mu 4",
    "mu-4-epsilon-0.02": "--steps 20 --mu 4 --epsilon_low 0.02 --epsilon_high 0.02",
    "mu-4-epsilon-10": "--steps 20 --mu 4 --epsilon_low 1 --epsilon_high 10",
    "plain": PLAIN,
    "dr-grpo": f"{PLAIN} --advantage dr_grpo --denominator constant",
    "rloo": f"{PLAIN} --advantage rloo --denominator constant",
    "lite-ppo": f"{PLAIN} --advantage batch_std --denominator token",
    "magistral": f"{PLAIN} {MAGISTRAL}",
    "dapo": f"{PLAIN} {DAPO}",
    "maxrl": f"{PLAIN} {MAXRL}",
    "pass-k": f"{PLAIN} {PASS_K}",
    "gdpo": "--beta 0 --advantage gdpo",
    "w-reinforce": f"{PLAIN} --advantage w_reinforce --denominator constant --rewards correctness=1",
    "two-outputs": f"{PLAIN} --group_size 2 --questions_per_step 64",
    "k3-plus": f"{ANSWER} --kl k3+",
    "tis": f"{PLAIN} --staleness 4 --correction tis",
    "sequence-tis": f"{PLAIN} --staleness 4 --correction sequence_tis",
    "icepop": f"{PLAIN} --staleness 4 --correction icepop",
    "scale-rl": f"{PLAIN} {SCALE_RL}",
    "distill": "--beta 0 --algorithm distill --denominator token --teacher runs/reproduce-grpo-0/model",
    "4-step-plain": HARD,
    "4-step-dapo": f"{HARD} {DAPO}",
    "4-step-maxrl": f"{HARD} {MAXRL}",
    "4-step-pass-k": f"{HARD} {PASS_K}",
    "plain-mu-4": PLAIN_4,
    "gspo": f"{PLAIN_4} --objective gspo --epsilon_low 3e-4 --epsilon_high 4e-4",
    "luspo": f"{PLAIN_4} --objective gspo --epsilon_low 0.002 --epsilon_high 0.0025 --denominator constant",
    "cispo": f"{PLAIN_4} {CISPO}",
    "dual-clip": f"{PLAIN_4} --objective dual_clip --delta 3",
}
THREE_SEEDS = {"dpo", "iterations-2", "beta-0", "group-2", "group-32", "sparse", "no-std", "mu-2", "mu-4"}
THREE_SEEDS |= {"mu-4-epsilon-10"}  # of these no difference to GRPO is claimed
COMPARED = {  # what came after the paper, by the run with the same reward that it is compared with
    "plain": "dr-grpo rloo lite-ppo magistral dapo maxrl pass-k w-reinforce two-outputs"
    " tis sequence-tis icepop scale-rl distill",
    "4-step-plain": "4-step-dapo 4-step-maxrl 4-step-pass-k",
    "plain-mu-4": "gspo luspo cispo dual-clip",
    "beta-0": "gdpo",
    "sparse": "k3-plus",
}
VARIANTS = {name: base for base, names in COMPARED.items() for name in names.split()}
THREE_SEEDS |= {name for name in (*VARIANTS, *COMPARED) if not name.startswith("4-step-")}
FIGURE_7 = {"before": "base", "after GRPO": "grpo", "answer's reward alone": "plain", "pass@4 training": "pass-k"}
EVALUATED = [(run, seed) for run in ("grpo", "plain", "pass-k") for seed in SEEDS[:3]]  # for Figure 7
EVALUATIONS = {"figure7-base": "tiny"}  # {name: model}
EVALUATIONS |= {f"figure7-{run}-{seed}": f"runs/reproduce-{run}-{seed}" for run, seed in EVALUATED}
FIGURE_5 = {"RFT": "rft", "Online RFT": "online-rft", "GRPO+OS": "grpo", "GRPO+PS": "grpo-ps"}
BY_COST = {"GRPO": "plain", "DAPO": "dapo", "Magistral": "magistral", "MaxRL": "maxrl", "pass@4": "pass-k"}
BY_COST |= {"2 outputs": "two-outputs", "distillation": "distill"}
HARDER = {"GRPO": "4-step-plain", "DAPO": "4-step-dapo", "MaxRL": "4-step-maxrl", "pass@4": "4-step-pass-k"}
MU_4 = {"GRPO": "plain-mu-4", "GSPO": "gspo", "LUSPO": "luspo", "CISPO": "cispo", "dual clip": "dual-clip"}
STALE_4 = {"fresh": "plain", "TIS": "tis", "sequence TIS": "sequence-tis", "IcePop": "icepop", "ScaleRL": "scale-rl"}
FIGURES = {  # {file: {title: {label: run}}}; "by tokens" in a title says what its x-axis is
    "figure5": {
        "Figure 5, 2 steps": {name: f"2-step-{run}" for name, run in FIGURE_5.items()},
        "Figure 5, 3 steps": FIGURE_5,
        "Figure 5, 4 steps": {name: f"4-step-{run}" for name, run in FIGURE_5.items()},
    },
    "figure6": {
        "Figure 6": {"1 iteration": "grpo", "2 iterations": "iterations-2"},
    },
    "methods": {
        "SFT, DPO, PPO and GRPO": {
            "SFT": "sft",
            "DPO": "dpo",
            "PPO": "ppo",
            "PPO, answer's reward alone": "ppo-sparse",
            "GRPO": "grpo",
        },
    },
    "controls": {
        "μ = 1": {"true reward": "grpo", "form alone": "form", "random": "random"},
        "μ = 4": {"true reward": "mu-4", "form alone": "form-mu-4", "random": "random-mu-4"},
    },
    "ablations": {
        "β, weight of the KL": {"0": "beta-0", "0.04 (paper)": "grpo", "0.4": "beta-0.4"},
        "G, at 128 outputs a step": {"2": "group-2", "8": "grpo", "32": "group-32"},
        "μ, updates per rollout": {"1 (paper)": "grpo", "2": "mu-2", "4": "mu-4"},
        "ε, at μ = 4": {"0.02": "mu-4-epsilon-0.02", "0.2": "mu-4", "10: no clip": "mu-4-epsilon-10"},
        "rewards": {"all": "grpo", "correctness alone": "sparse"},
        "others": {"default": "grpo", "no std": "no-std"},
    },
    "variants": {
        "advantages and data, by steps": BY_COST,
        "advantages and data, by tokens": BY_COST,
        "objectives, μ = 4": MU_4,
        "outputs of 4 or 8 steps before": STALE_4,
        "4-step problems, by steps": HARDER,
        "4-step problems, by tokens": HARDER,
    },
}


# ---- the runs ------------------------------------------------------------------------------------------------------


def main_py(arguments):
    """Run main.py on one thread, and return what it printed; None if it failed."""
    command = [sys.executable, str(HERE.parent / "main.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if ended.returncode == 0:
        return ended.stdout
    reasons = ended.stderr.strip().splitlines() or ["killed"]
    tqdm.write(f"{' '.join(arguments)}: {reasons[-1]}")
    return None


def train(job):
    """Make the run of a name and a seed, or finish it, or leave it where it is done; is it done?"""
    name, seed = job
    folder = Path("runs") / f"reproduce-{name}-{seed}"
    flags = f"{COMMON} {RUNS[name]} --seed {seed} --run {folder.name}"
    made_with = Path(f"{folder}.flags")
    if not made_with.exists() or made_with.read_text(encoding="utf-8") != flags:  # by an earlier version of this file
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        made_with.write_text(flags, encoding="utf-8")
    if (folder / "model").is_dir():
        return True
    if (folder / "checkpoint" / "state.safetensors").exists():
        return main_py(["--resume", str(folder)]) is not None
    shutil.rmtree(folder, ignore_errors=True)
    return main_py(flags.split()) is not None


def evaluate(name):
    """Figure 7's maj@K and pass@K of one model: {"maj@1": …}; from the file of the last time where there is one."""
    file = Path("runs") / f"reproduce-{name}.txt"
    if not file.exists():
        flags = "--dataset arithmetic:3 --max_new_tokens 80 --eval_questions 200 --eval_samples 64"
        printed = main_py(["--evaluate", EVALUATIONS[name], *flags.split()])
        if printed is None:
            return None
        file.write_text(printed, encoding="utf-8")
    found = re.findall(r"((?:maj|pass)@\d+) ([\d.]+)", file.read_text(encoding="utf-8"))
    return {key: float(value) for key, value in found}


def seeds(name):
    """The seeds of a run."""
    return SEEDS[:3] if name in THREE_SEEDS else SEEDS


def summary(folder):
    """What the pictures and the table need of a run: its evaluations, and some means over its last ten steps."""
    rows = plot.read_lines(Path(folder) / "metrics.jsonl")
    tokens = plot.positions(rows, "tokens")
    tests = []
    for row in rows:
        if "eval/accuracy" in row:
            test = {key: row[key] for key in ("step", "eval/accuracy", "eval/ci95", "eval/length")}
            tests.append({"tokens": tokens[row["step"]]} | test)
    trained = [row for row in rows if "reward" in row]
    last = {}
    for key in ("kl", "clip_low", "clip_high", "zero_std_groups"):
        values = [row[key] for row in trained[-10:] if row.get(key) is not None]
        if values:
            last[key] = mean(values)
    return {"tests": tests, "last": last, "minutes": sum(row["seconds"] for row in trained) / 60}


def collect(names):
    """Make the runs that are missing, two or more side by side, and keep what they show in data.json."""
    data = read_data()
    jobs = [(name, seed) for seed in SEEDS for name in names if seed in seeds(name)]
    evaluate("figure7-base")  # builds the tiny model, once
    if "distill" in names:
        train(("grpo", 0))  # its teacher
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        made = tqdm(pool.map(train, jobs), desc="reproduce", total=len(jobs), unit="run")
        done = dict(zip(jobs, made))
        if all(done.get(job) for job in EVALUATED):
            curves = dict(zip(EVALUATIONS, pool.map(evaluate, EVALUATIONS)))
            if all(curves.values()):
                data["figure7"] = curves
    finally:  # after Ctrl-C the runs in progress end after their step, and no other begins
        pool.shutdown(cancel_futures=True)
    for name in names:
        if all(done[name, seed] for seed in seeds(name)):
            runs = [summary(f"runs/reproduce-{name}-{seed}") for seed in seeds(name)]
            data[name] = {"flags": f"{COMMON} {RUNS[name]}".strip(), "runs": runs}
    OUT.mkdir(exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in data.items()]
    (OUT / "data.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return all(done.values())


def read_data():
    """What data.json holds: {run: {"flags": …, "runs": [summary of each seed]}, "figure7": …}."""
    file = OUT / "data.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ---- the tables ----------------------------------------------------------------------------------------------------


def mean(values):
    return sum(values) / len(values)


def mean_and_range(values):
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def at_test(runs, key, which=-1):
    """A number of one evaluation, the last or another, of each run."""
    return [run["tests"][which][key] for run in runs]


def difference(values, others):
    """The mean of values - others, a pair for each seed, with its 95 % interval; * where that excludes 0."""
    gains = [a - b for a, b in zip(values, others)]
    gain = statistics.mean(gains)
    half = STUDENT_T[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
    star = " *" if abs(gain) > half else ""
    return f"{gain:+.3f} ± {half:.3f}{star}"


def steps_to(goal, runs):
    """At which step the greedy accuracy first reaches a goal, for each run."""
    reached = []
    for run in runs:
        steps = [test["step"] for test in run["tests"] if test["eval/accuracy"] >= goal]
        reached.append(str(steps[0]) if steps else "–")
    return ", ".join(reached)


def print_row(*cells):
    print(f"| {' | '.join(cells)} |")


def flags_of(name, data, base=None):
    """The flags that a run was made with, without those of all runs or of the run that it is compared with."""
    flags = data[name]["flags"]
    if base:
        flags = flags.removeprefix(data[base]["flags"])
    return flags.removeprefix(COMMON).strip()


def table(data):
    """Greedy accuracy at the end of each run and on the way there, and means of its last ten steps, as Markdown."""
    print("| run | flags | accuracy | less its start | less grpo | steps to 0.80 | KL | clipped", end="")
    print(" | dead | length | minutes |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for name in RUNS:
        if name not in data or name in VARIANTS or "plain" in name:
            continue
        runs = data[name]["runs"]
        accuracy = at_test(runs, "eval/accuracy")
        grpo = "".join(re.findall(r"^\d-step-", name)) + "grpo"  # on the same questions
        less_grpo = "–"
        if name != grpo and grpo in data:
            less_grpo = difference(accuracy, at_test(data[grpo]["runs"], "eval/accuracy"))
        last = {key: mean([run["last"].get(key, 0.0) for run in runs]) for key in runs[0]["last"]}
        print_row(
            name,
            f"`{flags_of(name, data) or 'the default'}`",
            mean_and_range(accuracy),
            difference(accuracy, at_test(runs, "eval/accuracy", 0)),
            less_grpo,
            steps_to(0.8, runs),
            f"{last['kl']:.3f}" if "kl" in last else "–",
            f"{last['clip_low'] + last['clip_high']:.3f}",
            f"{last['zero_std_groups']:.2f}",
            f"{mean(at_test(runs, 'eval/length')):.1f}",
            f"{max(run['minutes'] for run in runs):.1f}",
        )


def variants_table(data):
    """What came after the paper, against GRPO with the same reward: after as many steps, and after as many tokens."""
    print("\n| run | flags | accuracy | compared with | after as many steps | after as many tokens", end="")
    print(" | steps to 0.80 | thousand tokens | length |\n|---|---|---|---|---|---|---|---|---|")
    for name in RUNS:
        if name not in data or name not in (*VARIANTS, *COMPARED):
            continue
        runs = data[name]["runs"]
        accuracy = at_test(runs, "eval/accuracy")
        base = VARIANTS.get(name)
        differences = ["–", "–", "–"]
        if base:
            others = data[base]["runs"]
            by_steps = difference(accuracy, at_test(others, "eval/accuracy"))
            differences = [base, by_steps, difference(*at_equal_tokens(runs, others))]
        print_row(
            name,
            f"`{flags_of(name, data, base)}`",
            mean_and_range(accuracy),
            *differences,
            steps_to(0.8, runs),
            f"{mean(at_test(runs, 'tokens')) / 1000:.1f}",
            f"{mean(at_test(runs, 'eval/length')):.1f}",
        )


def at_equal_tokens(runs, others):
    """The accuracies of two methods, seed by seed, where the cheaper of the two had spent all its tokens."""
    ours = []
    theirs = []
    for run, other in zip(runs, others):
        end = min(at_test([run, other], "tokens"))
        ours.append(accuracy_after(end, run))
        theirs.append(accuracy_after(end, other))
    return ours, theirs


def accuracy_after(tokens, run):
    """The greedy accuracy of a run after so many tokens, on a straight line between two evaluations."""
    spent = [test["tokens"] for test in run["tests"]]
    accuracy = [test["eval/accuracy"] for test in run["tests"]]
    return float(numpy.interp(tokens, spent, accuracy))


# ---- the pictures --------------------------------------------------------------------------------------------------


def draw(data):
    """The pictures, into plots/reproduce/."""
    from matplotlib.figure import Figure

    for file, panels in FIGURES.items():
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)  # rounded up
        figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
        if columns == 1:
            figure.set_size_inches(7, 4.2)
        all_axes = figure.subplots(lines, columns, squeeze=False).flat
        for axes, (title, curves) in zip(all_axes, panels.items()):
            draw_curves(axes, title, curves, data)
        figure.savefig(OUT / f"{file}.png", dpi=100)
    if "figure7" in data:
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, measure in zip(figure.subplots(1, 2), ("maj", "pass")):
            draw_figure_7(axes, measure, data["figure7"])
        figure.savefig(OUT / "figure7.png", dpi=100)


def draw_curves(axes, title, curves, data):
    """The greedy accuracy of some runs, {label: run}; those without data are left out."""
    runs = {}
    for label, name in curves.items():
        if name in data:
            runs[label] = [run["tests"] for run in data[name]["runs"]]
    x = "tokens" if "by tokens" in title else "step"
    title = f"{title}: greedy test accuracy"
    plot.panel(axes, {"eval/accuracy": ""}, title, runs, smoothed=False, x=x)
    axes.autoscale(axis="y")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    plot.add_legend(axes)


def draw_figure_7(axes, measure, evaluations):
    """maj@K or pass@K over K, before and after training."""
    for label, run in FIGURE_7.items():
        models = [evaluations[name] for name in evaluations if name.startswith(f"figure7-{run}")]
        ks = sorted(int(key.split("@")[1]) for key in models[0] if key.startswith(measure))
        values = numpy.array([[model[f"{measure}@{k}"] for k in ks] for model in models])
        axes.plot(ks, values.mean(0), marker="o", markersize=3, label=label)
        axes.fill_between(ks, values.min(0), values.max(0), alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="K", title=f"Figure 7: {measure}@K, temperature 0.7", ylim=(-0.02, 1.02))
    axes.set_xticks(ks, ks)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME", help=f"only these: {', '.join(RUNS)}")
    parser.add_argument("--draw", action="store_true", help="make no run")
    arguments = parser.parse_args()
    for name in arguments.runs:
        if name not in RUNS:
            parser.exit(2, f"reproduce.py: error: no run is called {name}; there are {', '.join(RUNS)}\n")
    complete = arguments.draw or collect(arguments.runs or list(RUNS))
    data = read_data()
    if not data:
        parser.exit(2, "reproduce.py: error: there is no data yet: run it without --draw\n")
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
