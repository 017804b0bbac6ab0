"""Several ranks are one: this file is also the program that torchrun starts, in which two compute what one did."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import time

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import evaluator
import llms
import main
import rldatasets
from plots import report

ROOT = Path(__file__).parent.parent
ALONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
OFFLINE = ALONE | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--"]


# ---- what is computed on one rank, and on two -----------------------------------------------------------------------

QUESTIONS = {  # what each question's outputs have for Â: on two ranks the first half is rank 0's
    "equal": [[1.0, -0.5, -0.5, 0.0], [-1.5, 0.5, 0.5, 0.5], [0.3, -0.3, 1.0, -1.0], [0.2, 0.4, -0.1, -0.5]],
    "unequal": [[1.0, -0.5, -0.5, 0.0], [-1.5, 0.5, 0.5, 0.5], [0.3, -0.3, 1.0, -1.0]],
    "rank 0 has nothing to learn from": [[0.0] * 4, [-1.5, 0.5, 0.5, 0.5], [0.3, -0.3, 1.0, -1.0]],
    "nobody has": [[0.0] * 4] * 3,
}
DEFAULTS = {
    "GROUP_SIZE": 4, "MAX_NEW_TOKENS": 12, "STEPS": 10, "WARMUP": 0, "LEARNING_RATE": 1e-3, "TOKEN_BUDGET": 8192,
    "SHOW_EVERY": 0, "DATASET": "arithmetic", "BETA": 0.04, "DENOMINATOR": "sequence", "LORA_RANK": 0,
    "ALGORITHM": "grpo", "REWARDS": {"soft_format": 0.5, "tag_count": 0.5, "overlong": 3.0},
}  # fmt: skip


def fresh_state(checkpoint, dtype=torch.float64, **settings):
    """A policy with all that stands beside it."""
    main.__dict__.update(DEFAULTS | settings)
    policy, tokenizer = llms.load(checkpoint)
    policy.to(dtype).generation_config.eos_token_id = list(range(20, 60))  # so many that outputs are ragged
    state = main.new_state(policy, tokenizer)
    if main.needs_reference():
        state.reference = llms.frozen_copy(state.policy)
        assert not any(weight.requires_grad for weight in state.reference.parameters())
    if main.LORA_RANK:
        with torch.no_grad():
            for layer in llms.lora_layers(state.policy):
                llms.fill(layer.lora_B, torch.linspace(-1, 1, layer.lora_B.numel()).view(layer.lora_B.shape).double())
    return state


def sample(state, prompts):
    """A rollout as in training."""
    shape = main.GROUP_SIZE, main.MAX_NEW_TOKENS, main.TEMPERATURE
    return llms.sample(state.policy, state.tokenizer, prompts, *shape, state.generator)


def step(state):
    """A step of Algorithm 1: its metrics."""
    learnt = main.grpo_step(state)
    state.step += 1
    return main.record_step(state, *learnt)


def gradient(checkpoint, questions, **settings):
    """The gradient of one update, {weight: whole tensor}: ratios other than 1, a reference and a critic where asked."""
    state = fresh_state(checkpoint, QUESTIONS_PER_STEP=len(questions), **settings)
    prompts = [[5 + i] * (3 + i) for i in range(len(questions))]
    rollout = sample(state, llms.share(prompts))
    advantages = torch.tensor(llms.share(questions), dtype=torch.float64).flatten()  # [N]
    old = rollout.logp.double() + 0.3 * (rollout.ids[:, -rollout.mask.shape[1] :] % 5 - 2) * rollout.mask  # [N, T]
    ref = llms.log_probs(state.reference, rollout, main.TEMPERATURE) + 0.1 if state.reference else None
    targets = (torch.zeros_like(old), old) if state.critic else None
    measured = main.backward(state, rollout, advantages, old, ref, main.grpo_loss, targets)
    networks = {"policy": state.policy, "critic": state.critic} if state.critic else {"policy": state.policy}
    gradients = {
        f"{network}.{name}": llms.full_tensor(weight.grad).clone()
        for network, module in networks.items()
        for name, weight in module.named_parameters()
        if weight.grad is not None
    }
    return gradients | {f"measured.{name}": torch.tensor(value).double() for name, value in measured.items()}


def in_bf16(checkpoint):
    """The gradient where everything computes in bf16, as on a GPU: by autocast, with a reference held in bf16."""
    state, questions = fresh_state(checkpoint, torch.float32, QUESTIONS_PER_STEP=3), QUESTIONS["unequal"]
    rollout = sample(state, llms.share([[5] * 3, [6] * 4, [7] * 5]))
    before, llms.PRECISION = llms.PRECISION, "bf16"
    state.reference = llms.frozen_copy(state.policy)
    ref = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
    assert {weight.dtype for weight in state.reference.parameters()} == {torch.float32, torch.bfloat16}
    A = torch.tensor(llms.share(questions)).flatten()
    main.backward(state, rollout, A, None, ref, main.grpo_loss, None)
    llms.PRECISION = before
    return {name: llms.full_tensor(weight.grad).clone() for name, weight in state.policy.named_parameters()}


def dpo(checkpoint):
    """DPO's coefficients where only one rank has pairs: Â_i of all outputs."""
    state = fresh_state(checkpoint, ALGORITHM="dpo", QUESTIONS_PER_STEP=3)
    rollout = sample(state, llms.share([[5] * 3, [6] * 4, [7] * 5]))
    right = llms.share([[0.0] * 4, [1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    right = torch.tensor(right)
    batch = main.Batch([], rollout, {"correctness": right}, right)
    coefficients = main.preference(state, batch, None, None)
    return {
        "coefficients": torch.tensor(llms.gather(coefficients.tolist())),
        "loss": torch.tensor(batch.metrics["dpo/loss"]),
    }


def ten_steps(checkpoint, folder):
    """Ten steps of Algorithm 1: the weights after them, the metrics of each step, and an evaluation."""
    state = fresh_state(checkpoint, QUESTIONS_PER_STEP=3, EVAL_SAMPLES=2)
    state.run = folder
    rows = [step(state) for _ in range(10)]
    names = [name for name in rows[0] if "seconds" not in name and name not in ("stage", "memory")]
    columns = {name: [float(row[name] or 0) for row in rows] for name in names}
    # 11 problems: more outputs than rank 0 has had before, but not more than rank 1
    problems = list(itertools.islice(rldatasets.load("arithmetic", "test"), 11))
    metrics, records = main.evaluate(state, problems)
    weights = {name: llms.full_tensor(weight).detach().clone() for name, weight in state.policy.named_parameters()}
    columns |= {name: value or 0.0 for name, value in metrics.items()}  # None is the mean of no outputs
    tensors = {f"metrics.{name}": torch.tensor(values).double() for name, values in columns.items()}
    asked = torch.tensor([record["question"] == problem["question"] for record, problem in zip(records, problems)])
    return weights | tensors | {"in order": asked}


def variants(checkpoint, folder):
    """Three steps with one std for the batch, refill and outputs of a step before: what was drawn, and the weights."""
    state = fresh_state(
        checkpoint, QUESTIONS_PER_STEP=3, STEPS=4, ADVANTAGE="batch_std", REFILL=3, STALENESS=1, CORRECTION="tis",
        BETA=0.0,
    )  # fmt: skip
    state.run, real = folder, evaluator.rewards
    # a random model is never right: here the outputs with a multiple of 8 letters are
    evaluator.rewards = lambda text, problem: real(text, problem) | {"correctness": float(len(text) % 8 == 0)}
    rows = [step(state) for _ in range(3)]
    (waiting,) = (main.groups_of(batch) for batch in state.queue)
    evaluator.rewards = real
    alike = torch.tensor([0.7, 2.1, 2.95])[:, None].expand(-1, 4)
    rewards = torch.cat([torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]), alike])
    weights = {name: llms.full_tensor(weight).detach().clone() for name, weight in state.policy.named_parameters()}
    names = (
        "refill/draws",
        "refill/mixed",
        "questions",
        "tokens",
        "accuracy",
        "grad_norm",
        "staleness_gap",
        "correction",
    )
    return weights | {
        "metrics": torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64),
        "waiting": torch.tensor([token for group in waiting for output in group["outputs"] for token in output[1]]),
        "batch std": torch.tensor(llms.gather(main.batch_std(torch.stack(llms.share(list(rewards)))).tolist())),
    }


def games(checkpoint):
    """Games of Nim that end at different turns, the last of them alone; a random model's texts are made legal moves."""
    state, asked = fresh_state(checkpoint, QUESTIONS_PER_STEP=3), []
    model = main.model_player(state, state.policy, 1.0, torch.Generator().manual_seed(5))

    def legal(problems):
        moves = [sorted(evaluator.legal_moves(problem)) for problem in problems]
        asked.append(len(llms.gather(problems)))
        return [f"<answer>{of[len(text) % len(of)]}</answer>" for of, text in zip(moves, model(problems))]

    heaps = [{"A": a, "B": b} for a, b in ((5, 5), (1, 0), (3, 4), (0, 2), (6, 6))]
    problems = [rldatasets.nim_position(("Ada", "Ben"), i % 2, of) for i, of in enumerate(heaps)]
    won = main.play(llms.share(problems), [legal, legal])
    found = {"won": torch.tensor(llms.gather(won)), "turns": torch.tensor(len(asked)), "last": torch.tensor(asked[-1])}
    first = [f"<answer>{sorted(evaluator.legal_moves(problem))[-1]}</answer>" for problem in problems]
    known = main.play(llms.share(problems), [legal, legal], llms.share(first))
    tests = [problem | {"task": "nim"} for problem in problems]
    games = main.evaluate(state, tests)[0]["eval/games"]
    return found | {"known": torch.tensor(llms.gather(known)), "games": torch.tensor(games)}


def everything(checkpoint, with_linear_layers, folder):
    """{scenario/name: tensor}"""
    cases = {
        f"{which} {denominator} {budget}": gradient(
            checkpoint, QUESTIONS[which], DENOMINATOR=denominator, TOKEN_BUDGET=budget
        )
        for which, denominator, budget in [
            ("equal", "sequence", 8192),
            ("equal", "token", 40),
            ("unequal", "sequence", 8192),
            ("unequal", "token", 40),
            ("unequal", "constant", 40),
        ]
    }
    for which in ("rank 0 has nothing to learn from", "nobody has"):
        cases[which] = gradient(checkpoint, QUESTIONS[which], BETA=0.0, TOKEN_BUDGET=40)
    cases["ppo"] = gradient(checkpoint, QUESTIONS["unequal"], ALGORITHM="ppo", TOKEN_BUDGET=40)
    cases["lora"] = gradient(with_linear_layers, QUESTIONS["unequal"], LORA_RANK=2, TOKEN_BUDGET=40)
    cases["dpo"] = dpo(checkpoint)
    cases["bf16"] = in_bf16(with_linear_layers)
    cases["ten steps"] = ten_steps(checkpoint, folder)
    cases["variants"] = variants(checkpoint, folder)
    cases["games"] = games(checkpoint)
    return {f"{case}/{name}": tensor for case, found in cases.items() for name, tensor in found.items()}


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(checkpoint, tmp_path_factory):
    """What one rank computes, and what two do: {scenario: {name: (tensor, tensor)}}."""
    folder, before = tmp_path_factory.mktemp("ranks"), main.settings()
    (folder / "one").mkdir()
    models = checkpoint("gpt2"), checkpoint("qwen2")
    command = [*TORCHRUN, __file__, *models, folder]
    process = subprocess.Popen(command, env=OFFLINE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    one = everything(*models, folder / "one")  # meanwhile
    main.__dict__.update(before)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    two, found = load_file(folder / "two.safetensors"), {}
    assert one.keys() == two.keys()
    for key in one:
        case, name = key.split("/", 1)
        found.setdefault(case, {})[name] = one[key], two[key]
    return found


CASES = ["equal sequence 8192", "equal token 40", "unequal sequence 8192", "unequal token 40", "unequal constant 40"]
CASES += ["rank 0 has nothing to learn from", "nobody has", "ppo", "lora", "dpo"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradient_of_one(both, case):  # T33
    for name, (one, two) in both.get(case, {}).items():
        assert (one - two).abs().max() <= 1e-10, name
    moved = [name for name, (one, _) in both.get(case, {}).items() if one.any() and not name.startswith("measured")]
    assert bool(moved) == (case != "nobody has")


def test_two_ranks_in_bf16_have_the_gradient_of_one_but_for_rounding(both):
    for name, (one, two) in both["bf16"].items():
        assert (one - two).norm() <= 0.1 * one.norm() + 1e-3, name


def test_after_ten_steps_two_ranks_have_the_weights_metrics_and_evaluation_of_one(both):
    for name, (one, two) in both["ten steps"].items():
        assert (one.double() - two.double()).abs().max() <= 1e-6, name
    assert both["ten steps"]["in order"][1].all()
    assert both["ten steps"]["metrics.grad_norm"][0].min() > 0


def test_two_ranks_play_the_games_that_one_plays(both):
    for name in ("won", "turns", "known", "games"):
        assert torch.equal(*both["games"][name]), name
    assert both["games"]["turns"][0] > 3 and 0 < both["games"]["won"][0].sum() < 5
    assert [int(last) for last in both["games"]["last"]] == [1, 2]  # a rank without a game is asked about another's


def test_two_ranks_draw_keep_and_scale_as_one_does(both):
    for name, (one, two) in both["variants"].items():
        assert (one.double() - two.double()).abs().max() <= 1e-10, name
    draws, mixed = both["variants"]["metrics"][0][:, :2].T
    assert draws.max() > 1 and mixed.min() > 0 and len(both["variants"]["waiting"][0]) > 0
    first = both["variants"]["batch std"][0][0]
    assert (both["variants"]["batch std"][0][1:] == 0).all() and first[0] > 2 > 0 > first[1]


SMALL = "--dataset arithmetic --questions_per_step 3 --group_size 2 --max_new_tokens 8 --eval_every 2 --show_every 3"
SMALL += " --eval_questions 3 --learning_rate 1e-5 --save_every 2 --rewards correctness=2,tag_count=0.5,overlong=3"


def on_two_ranks(folder, *arguments):
    command = [*TORCHRUN, str(ROOT / "main.py"), *arguments]
    return subprocess.Popen(command, cwd=folder, env=OFFLINE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ranks_of(torchrun):
    """The process ids of the ranks that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], check=True, capture_output=True, text=True)
    return [int(rank) for rank in found.stdout.split()]


def on_one(folder, *arguments):
    """The program in this process, which saves the seconds of a start."""
    before = main.settings()
    with contextlib.chdir(folder):
        assert main.main(arguments) == 0
    main.__dict__.update(before)


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """A folder with a run of six steps on one rank, and the flags it was made with."""
    folder = tmp_path_factory.mktemp("alone")
    flags = ["--model", checkpoint("qwen2"), *SMALL.split()]
    on_one(folder, *flags, "--steps", "6", "--run", "whole")
    return folder, flags


def assert_same_run(one, other):
    """The same weights, completions and metrics, but for what a sum rounds differently in another order."""
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    assert max((weights[name] - others[name]).abs().max() for name in weights) < 1e-6
    samples, other_samples = (report.read_lines(run / "samples.jsonl") for run in (one, other))
    assert [row["completion"] for row in samples] == [row["completion"] for row in other_samples]
    for row, same in zip(
        report.read_lines(one / "metrics.jsonl"), report.read_lines(other / "metrics.jsonl"), strict=True
    ):
        for name in (name for name in row.keys() | same.keys() if not name.startswith("seconds") and name != "memory"):
            assert row[name] == (
                same[name] if isinstance(row[name], str | None) else pytest.approx(same[name], abs=1e-5)
            )


def test_a_rank_that_dies_ends_the_run_and_one_rank_goes_on_from_the_checkpoint_of_two(alone):
    folder, flags = alone
    process = on_two_ranks(folder, *flags, "--steps", "6", "--run", "killed")
    while (line := process.stdout.readline()) and not line.startswith("step    3"):
        assert process.poll() is None
    began = time.monotonic()
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert "lost the other ranks" in err and "SIGKILL" in err
    on_one(folder, "--resume", "runs/killed")
    assert_same_run(folder / "runs" / "whole", folder / "runs" / "killed")


def test_ranks_whose_torchrun_is_killed_end_and_nobody_else_may_write_meanwhile(alone):
    folder, flags = alone
    process = on_two_ranks(folder, *flags, "--steps", "100000", "--run", "orphans", "--eval_every", "100000")
    while (line := process.stdout.readline()) and not line.startswith("step    1"):
        assert process.poll() is None
    ranks = ranks_of(process)
    with contextlib.chdir(folder):
        assert main.main(["--resume", "runs/orphans"]) == 2
    process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.communicate()
    steps = [row["step"] for row in report.read_lines(folder / "runs" / "orphans" / "metrics.jsonl") if "reward" in row]
    assert steps == list(range(1, len(steps) + 1))
    on_one(folder, "--resume", "runs/orphans", "--steps", str(len(steps) + 1))


def test_two_ranks_go_on_from_the_checkpoint_of_one_and_only_one_of_them_speaks(alone):
    folder, flags = alone
    on_one(folder, *flags, "--steps", "3", "--run", "grown")
    shutil.rmtree(folder / "runs" / "grown" / "model")
    process = on_two_ranks(folder, "--resume", "runs/grown", "--steps", "6")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [line[:11] for line in out.splitlines() if line.startswith("step")] == [
        "step    4 |", "step    4 |", "step    5 |", "step    6 |", "step    6 |"
    ]  # fmt: skip
    grown = report.read_lines(folder / "runs" / "grown" / "metrics.jsonl")
    assert [row["step"] for row in grown] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6]  # it was tested after its third step too
    rows = [row for row in grown if not (row["step"] == 3 and "eval/n" in row)]
    (folder / "runs" / "grown" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = [row for row in report.read_lines(folder / "runs" / "grown" / "samples.jsonl")]
    rows = [row for row in tests if not (row["step"] == 3 and row["split"] == "test")]
    (folder / "runs" / "grown" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same_run(folder / "runs" / "whole", folder / "runs" / "grown")


def test_an_error_that_all_ranks_meet_is_told_once(alone):
    folder, flags = alone
    process = on_two_ranks(folder, *flags, "--questions_per_step", "1")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    errors = [line for line in err.splitlines() if line.startswith("main.py: error")]
    assert errors == ["main.py: error on rank 0: --questions_per_step must be at least 2, one for each rank, not 1"]


if __name__ == "__main__":
    with llms.distributed():
        *models, folder = sys.argv[1:]
        tensors = {name: tensor.contiguous() for name, tensor in everything(*models, Path(folder)).items()}
        if llms.RANK == 0:
            safetensors.torch.save_file(tensors, Path(folder) / "two.safetensors")
