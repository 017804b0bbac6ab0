"""The folder of a run, what is said of a step, and the pictures: plots/report.py and plots/plot.py."""

import json
import random
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import evaluator
from plots import plot, report, reproduce

ROOT = Path(__file__).parent.parent
CONSTANTS = {"MU": 1, "BETA": 0.04, "KL": "k3", "TENSORBOARD": False, "REWARDS": {"correctness": 2.0}}


# ---- the settings of a run -----------------------------------------------------------------------------------------


def run_with(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("for_resume", [True, False])
def test_what_a_config_lacks_has_its_default_and_values_have_the_type_of_the_default(tmp_path, for_resume):
    run = run_with(tmp_path, {"MU": 4.0, "BETA": 0, "REWARDS": {"tests": 1}, "commit": "abc", "ranks": 2})
    settings = report.read_settings(run, CONSTANTS, for_resume)
    expected = CONSTANTS | {"MU": 4, "BETA": 0.0, "REWARDS": {"tests": 1.0}}
    assert settings == expected and list(settings) == list(CONSTANTS)
    kinds = {name: type(value) for name, value in settings.items()}
    assert kinds == {"MU": int, "BETA": float, "KL": str, "TENSORBOARD": bool, "REWARDS": dict}
    assert type(settings["REWARDS"]["tests"]) is float


@pytest.mark.parametrize(
    "unknown, named",
    [
        (["BASELINE"], "with BASELINE: start a new run"),
        (["A", "B2", "C_D"], "with A, B2, C_D: start a new run"),
        (["A", "B", "C", "D"], "with A, B, C …: start a new run"),
    ],
)
def test_a_run_of_another_version_is_tested_but_not_resumed(tmp_path, unknown, named):
    run = run_with(tmp_path, {"MU": 2} | dict.fromkeys(unknown, 1))
    assert report.read_settings(run, CONSTANTS, for_resume=False) == CONSTANTS | {"MU": 2}
    with pytest.raises(report.FolderError) as error:
        report.read_settings(run, CONSTANTS, for_resume=True)
    assert str(error.value) == f"{run} was made by another version of this program, {named}"


@pytest.mark.parametrize(
    "damage",
    [
        {"MU": "x"},
        {"MU": None},
        {"MU": float("inf")},
        {"BETA": []},
        {"REWARDS": 1},
        {"REWARDS": {"tests": "much"}},
        {"REWARDS": ["tests"]},
    ],
)
@pytest.mark.parametrize("for_resume", [True, False])
def test_a_damaged_value_is_named_in_one_line(tmp_path, damage, for_resume):
    with pytest.raises(report.FolderError, match=f"config.json is damaged: {next(iter(damage))}: [^\n]*$"):
        report.read_settings(run_with(tmp_path, damage), CONSTANTS, for_resume)


# ---- notes on a step -----------------------------------------------------------------------------------------------

SETTINGS = {
    "COLD_START": 0,
    "WARMUP": 2,
    "STEPS": 50,
    "ALGORITHM": "grpo",
    "MU": 1,
    "DENOMINATOR": "sequence",
    "BETA": 1,
}
HEALTHY = {"step": 20, "skipped_updates": 0.0, "kl": 0.01, "kl_log_ratio_max": 1.0, "entropy": 1.0, "accuracy": 0.5}
HEALTHY |= {"loss": 0.1, "grad_norm": 1.0, "zero_advantage": 0.1, "clip_low": 0.0, "clip_high": 0.0, "ratio_max": 1.0}
HEALTHY |= {"truncated": 0.0, "sampler_gap": 1e-6}


@pytest.mark.parametrize(
    "row, settings, says",
    [
        ({}, {}, ""),
        ({"skipped_updates": 0.5}, {}, "that update was skipped"),
        ({"loss": 0.0}, {}, "loss is about 0 at μ = 1: expected"),
        ({"loss": 0.0}, {"MU": 2, "WARMUP": 30}, ""),
        ({"loss": 0.0}, {"DENOMINATOR": "token"}, ""),
        ({"loss": 0.0, "grad_norm": 0.0}, {}, ""),
        ({"zero_advantage": 0.95}, {}, "Â = 0"),
        ({"kl": 0.02, "step": 1}, {}, "at the first step"),
        ({"kl": 0.0}, {}, "the KL is exactly 0"),
        ({"kl": 0.0}, {"BETA": 0}, ""),
        ({"kl": 0.0, "step": 51}, {}, ""),  # the reference is the policy again
        ({"kl": 0.0, "step": 4}, {}, ""),  # the learning rate still rises
        ({"kl": 1.5}, {}, "above 1 nat"),
        ({"kl_log_ratio_max": 11.0}, {}, "dominates the KL"),
        ({"entropy": 0.01}, {}, "little is explored"),
        ({"entropy": 0.01, "accuracy": 0.95}, {}, ""),
        ({"entropy": 5.0}, {}, "random text"),
        ({"clip_low": 0.15, "clip_high": 0.1}, {}, "over 20 %"),
        ({}, {"MU": 2}, "stays exactly 1"),
        ({"ratio_max": 1.1}, {"MU": 2}, ""),
        ({"truncated": 0.6}, {}, "cut at --max_new_tokens"),
        ({"sampler_gap": 1e-3}, {}, "sampling and scoring differ"),
        ({"entropy": 5.0, "skipped_updates": 1.0}, {"COLD_START": 20}, "that update was skipped"),
    ],
)
def test_what_is_out_of_its_healthy_range_is_said(row, settings, says):
    notes = report.health_notes(HEALTHY | row, SETTINGS | settings, on_gpu=False)
    assert isinstance(notes, list) and len(notes) == bool(says) and says in "".join(notes)


def test_a_row_may_lack_what_was_not_measured(tmp_path):
    row = {
        "stage": "a",
        "reward": 1.0,
        "reward_std": 0.5,
        "approach/guessed": 0.0,
        "zero_std_groups": 0.0,
        "length": 3.0,
    }
    row |= {
        key: value for key, value in HEALTHY.items() if key not in ("kl", "kl_log_ratio_max", "entropy", "sampler_gap")
    }
    assert report.health_notes(row, SETTINGS, on_gpu=False) == []
    assert "| kl    off |" in report.step_line(row | {"seconds": 1.0}) and "| kl 0.5000 |" in report.step_line(
        row | {"seconds": 1.0, "kl": 0.5}
    )
    report.append(tmp_path / "rows", [{"step": 1, "a": None, "b": float("nan"), "c": float("-inf"), "d": 0.0, "e": ""}])
    assert (tmp_path / "rows").read_text() == '{"step": 1, "d": 0.0, "e": ""}\n'
    old = [{"step": 1, "length_right": None, "length_wrong": 3.0}, {"step": 2, "length_right": 2.0}]  # null was written
    assert plot.points(old, "length_right") == {2: 2.0} and plot.points(old, "length_wrong") == {1: 3.0}


def test_the_table_at_the_end_has_a_row_for_what_only_one_test_could_measure(tmp_path):
    tests = [{"eval/length_wrong": 7.0}, {"eval/length_right": 9.0}]
    shared = {"eval/accuracy": 0.5, "eval/n": 10}
    rows = [{"step": step} | shared | test for step, test in enumerate(tests)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "samples.jsonl").write_text("")
    (tmp_path / "config.json").write_text('{"COLD_START": 0}')
    words = [line.split() for line in report.summary(tmp_path).splitlines()]
    assert ["length_wrong", "7.000", "–"] in words and ["length_right", "–", "9.000"] in words


def test_a_gpu_may_differ_more_between_sampling_and_scoring():
    row = HEALTHY | {"sampler_gap": 1e-3}
    assert report.health_notes(row, SETTINGS, on_gpu=True) == []


# ---- lines ---------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_one_line():
    row = {"accuracy": 0.5, "ci95": 0.1, "lenient": 0.6, "format": 0.7, "length": 30.0, "truncated": 0.0, "n": 80}
    row |= {"accuracy/a": 0.25, "lenient/a": 0.75, "copied": 0.125, "num_steps": 2.0, "pass@2": 1.0}
    row |= {"wins/perfect": 0.0, "games": 10}
    line = report.eval_line({f"eval/{name}": value for name, value in row.items()})
    assert line == (
        "accuracy 0.500 [0.393, 0.607] | lenient 0.600 | format 0.700 | len 30.0 | cut 0.000 | a 0.250 | lenient/a 0.750"
        " | copied 0.125 | pass@2 1.000 | wins against perfect 0.000 [0.000, 0.278] (n = 80)"
    )


def test_the_interval_of_none_or_of_all_is_written_without_a_sign():
    texts = [report.share_of(share, n) for n in range(1, 500) for share in (0.0, 1.0)]
    assert all(text.startswith(("0.000 [0.000, 0.", "1.000 [0.")) and "-" not in text for text in texts)


def test_two_texts_stand_beside_each_other_in_two_columns():
    left, right = "one\n\ntwo", "word " * 20
    assert report.side_by_side(left, right).split("\n") == [
        f"  {'one':56} | {('word ' * 11).strip()}",
        f"  {'':56} | {('word ' * 9).strip()}",
        f"  {'two':56} | ",
    ]


# ---- pictures ------------------------------------------------------------------------------------------------------


def rows_of(seed):
    """A run that learns to work its answers out: ten steps, three evaluations."""
    rng = random.Random(seed)
    rows = [{"step": step, "stage": "arithmetic", "tokens": 100 * step, "seconds": 1.0} for step in range(1, 11)]
    for step, accuracy in ((0, 0.1), (5, 0.5), (10, 0.9)):
        row = {"eval/accuracy": accuracy + rng.uniform(-0.05, 0.05), "eval/ci95": 0.07, "eval/length": 10.0 + step}
        row |= {
            "eval/n": 200,
            "eval/approach/guessed": 1 - accuracy,
            "eval/approach/worked": accuracy,
            "eval/approach/checked": 0.0,
        }
        rows.append({"step": step} | row)
    return rows


@pytest.mark.parametrize("x, last", [("step", 10), ("tokens", 1000)])
def test_the_first_picture_shows_accuracy_and_length_and_below_them_the_approaches(x, last):
    figure = plot.result({"run (2 runs)": [rows_of(0), rows_of(1)]}, x)
    accuracy, length, approaches = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 3]
    assert list(length.lines[0].get_ydata()) == [10, 15, 20] and length.get_ylim()[0] == 0
    assert {axes.lines[0].get_xdata()[-1] for axes in figure.axes} == {last}
    assert [text.get_text() for text in length.texts] == ["10", "20"]
    names = [text.get_text() for text in approaches.get_legend().get_texts()]
    assert names == ["guessed", "worked out", "checked"]
    wide, left, right = (axes.get_position() for axes in (approaches, accuracy, length))
    assert (wide.x0, wide.x1) == pytest.approx((left.x0, right.x1)) and wide.y1 < left.y0


def test_the_first_picture_tells_runs_apart_by_colour():
    figure = plot.result({"A": [rows_of(0)], "B": [rows_of(1)]}, "step")
    accuracy, _, approaches = figure.axes
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["A", "B"] and not accuracy.texts
    colors = [curve.get_color() for curve in accuracy.lines]
    assert (
        len(set(colors)) == 2 and [curve.get_color() for curve in approaches.lines] == colors[:1] * 3 + colors[1:] * 3
    )


def test_one_run_has_the_interval_of_its_accuracy():
    axes = Figure().subplots()
    rows = [{"step": 0, "eval/accuracy": 0.0}, {"step": 5, "eval/accuracy": 0.985}]
    for row in rows:
        low, high = evaluator.wilson(row["eval/accuracy"], 200)
        row |= {"eval/n": 200, "eval/ci95": (high - low) / 2}
    plot.line(axes, "eval/accuracy", [rows], False, "step", color="C0")
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({round(abs(y), 3) for y in band[:, 1]}) == [0.0, 0.019, 0.957, 0.995]


def test_a_single_evaluation_has_its_number_written_once():
    figure = plot.result({"run": [rows_of(0)[:11]]}, "step")
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes[:2]] == [["0.134"], ["10"]]


def test_a_run_without_evaluations_is_drawn_too(tmp_path, recwarn):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0, "stage": "a"}\n')
    assert [path.name for path in plot.draw([tmp_path], tmp_path)] == [
        "result.png",
        "train_score.png",
        "eval_score.png",
    ]
    assert not recwarn.list


def test_runs_that_differ_in_their_seed_share_a_label(tmp_path):
    for name, seed, mu in (("a", 0, 1), ("b$", 0, 2), ("c", 1, 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"SEED": seed, "MU": mu, "commit": name}))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0, "memory": 3}\n')
    labels = plot.groups([tmp_path / "a", tmp_path / "b$", tmp_path / "c"])
    row = {"step": 1, "reward": 1.0}
    assert labels == {f"{tmp_path}/a (2 runs)": [[row], [row]], rf"{tmp_path}/b\$": [[row]]}
    assert list(labels) == [f"{tmp_path}/a (2 runs)", rf"{tmp_path}/b\$"]


# ---- the runs behind the paper's figures ---------------------------------------------------------------------------


def test_a_run_is_made_again_only_if_it_was_made_with_other_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(reproduce, "main_py", lambda arguments: calls.append(arguments) or "")
    folder = tmp_path / "runs" / "reproduce-mu-2-0"
    assert reproduce.train(("mu-2", 0)) and calls.pop()[-6:] == ["--mu", "2", "--seed", "0", "--run", folder.name]
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "state.safetensors").touch()
    (folder / "metrics.jsonl").touch()
    (folder / "config.json").write_text("{}")
    assert reproduce.train(("mu-2", 0)) and calls.pop() == ["--resume", "runs/reproduce-mu-2-0"]
    (folder / "model").mkdir()
    assert reproduce.train(("mu-2", 0)) and not calls
    monkeypatch.setitem(reproduce.RUNS, "mu-2", "--steps 20 --mu 3")
    assert reproduce.train(("mu-2", 0)) and "3" in calls.pop() and not folder.exists()


def test_what_fails_says_its_last_line(monkeypatch):
    written = []
    monkeypatch.setattr(reproduce, "HERE", Path("/nowhere/plots"))
    monkeypatch.setattr(reproduce.tqdm, "write", written.append)
    assert reproduce.main_py(["--steps", "2"]) is None
    assert written[0].startswith("--steps 2: ") and "/nowhere/main.py" in written[0]


def test_what_was_made_is_kept_with_its_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "out")
    monkeypatch.setattr(reproduce, "train", lambda job: job != ("mu-4", 1))
    monkeypatch.setattr(reproduce, "evaluate", lambda name: {"pass@1": 0.5})
    monkeypatch.setattr(reproduce, "summary", lambda folder: {"tests": folder})
    assert not reproduce.collect(["grpo", "plain", "pass-k", "mu-4"])
    data = reproduce.read_data()
    assert list(data) == ["figure7", "grpo", "plain", "pass-k"]  # mu-4 has not all seeds
    assert data["figure7"] == {name: {"pass@1": 0.5} for name in reproduce.EVALUATIONS}
    assert [run["tests"] for run in data["grpo"]["runs"]] == [f"runs/reproduce-grpo-{seed}" for seed in range(5)]
    assert reproduce.flags_of("plain", data) == reproduce.PLAIN and reproduce.flags_of("grpo", data) == ""
    assert reproduce.flags_of("pass-k", data, "plain") == reproduce.PASS_K
    assert reproduce.collect(["mu-2"]) and list(reproduce.read_data()) == [*data, "mu-2"]


def test_every_run_of_a_picture_and_of_a_comparison_exists():
    drawn = {run for panels in reproduce.FIGURES.values() for curves in panels.values() for run in curves.values()}
    assert drawn | {*reproduce.VARIANTS, *reproduce.COMPARED, *reproduce.THREE_SEEDS} <= {*reproduce.RUNS}
