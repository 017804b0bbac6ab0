"""Rewards of a group: outputs that are compared with each other, by a rule or by a judge."""

import pytest
import torch
from conftest import PROBLEMS, train
from test_table10 import SOLVED
from torch import tensor
from torch.testing import assert_close

import evaluator
import llms
import main
from plots import report


def judge_by(monkeypatch, says):
    """A judge that says of a pair of texts how likely the first is the better one."""
    asked = []

    def first_is_better(judge, question, pairs):
        asked.extend(pairs)
        return tensor([says(first, second) for first, second in pairs])

    monkeypatch.setattr(llms, "first_is_better", first_is_better)
    return asked


def test_an_output_is_worth_how_often_it_beats_the_others_in_both_orders(monkeypatch):
    strength = {"a": 0.9, "b": 0.5, "c": 0.1}
    asked = judge_by(monkeypatch, lambda first, second: 0.5 + (strength[first] - strength[second]) / 2 + 0.05)
    wins, flips = llms.judge_group("a judge", "?", ["a", "b", "c"])
    assert sorted(asked) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
    assert_close(wins, [0.8, 0.5, 0.2])  # the 0.05 for the first place is gone: (0.7 + 0.9) / 2, (0.3 + 0.7) / 2, …
    assert flips == [0.0, 0.0, 0.0]


def test_a_judge_that_always_says_first_gives_groups_without_spread(monkeypatch):
    judge_by(monkeypatch, lambda first, second: 0.83)
    wins, flips = llms.judge_group("a judge", "?", ["a", "b", "c", "d"])
    assert wins == [0.5] * 4 and flips == [1.0] * 4
    assert (main.group_advantages(tensor([wins])) == 0).all()


def test_a_judge_that_prefers_the_shorter_shortens_the_outputs(setup, monkeypatch):
    judge_by(monkeypatch, lambda first, second: float(len(first) < len(second)) + 0.5 * (len(first) == len(second)))
    state, _ = setup(STEPS=20, GROUP_SIZE=8, BETA=0.0, LEARNING_RATE=1e-2, REWARDS={"judge": 1.0})
    state.judge = ("model", "tokenizer")
    rows = train(state, PROBLEMS * 7)
    early, late = (sum(row["length"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert late < 0.7 * early
    assert rows[0]["rewards/judge"] == pytest.approx(0.5) and rows[0]["reward_std"] > 0.1


def test_in_a_cold_start_there_is_nothing_to_compare(setup, monkeypatch):
    asked = judge_by(monkeypatch, lambda first, second: 0.6)
    state, _ = setup(COLD_START=1, STEPS=1)
    state.judge = ("model", "tokenizer")
    cold, first = train(state, SOLVED * 9)
    assert "rewards/judge" not in cold and first["rewards/judge"] == pytest.approx(0.5)
    assert len(asked) == 3 * 4 * 3  # of 3 groups of 4, each with each, in both orders


def test_a_judge_reads_the_chances_of_two_replies_to_the_same_prompt(checkpoint):
    judge = llms.load_judge(checkpoint("qwen2"))
    model, tokenizer = judge
    question, pairs = "Which?", [("yes", "no"), ("no", "yes"), ("a longer answer, of several words", "no")]
    found = llms.first_is_better(judge, question, pairs)
    for pair, chance in zip(pairs, found):
        prompt = llms.encode(tokenizer, [{"role": "user", "content": llms.COMPARE.format(question, *pair)}])
        model.set_attn_implementation("sdpa")  # the plain way: one forward pass of the library's own attention
        logits = model(torch.tensor([prompt])).logits[0, -1]
        llms.use_packed_attention(model, "the judge")
        one, two = (tokenizer(number, add_special_tokens=False)["input_ids"][-1] for number in "12")
        assert chance.item() == pytest.approx(logits[[one, two]].softmax(0)[0].item(), abs=1e-5)
    assert (found[0] - found[1]).abs() > 1e-6 and not any(weight.requires_grad for weight in model.parameters())
    llms.LIMITS["token_budget"] = 1
    few = llms.first_is_better(judge, question, pairs)
    assert_close(few, found, atol=1e-6, rtol=0)
    with pytest.raises(llms.ModelError, match="longer than the judge reads"):
        llms.first_is_better(judge, question, [("word " * 300, "word " * 300)])


def test_a_judge_that_cannot_tell_1_from_2_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(llms, "last_token", lambda tokenizer, text: 7)
    with pytest.raises(llms.ModelError, match="1 and 2 are the same token"):
        llms.load_judge(checkpoint("qwen2"))


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(evaluator, "GROUP_REWARDS", {})


def test_a_reward_of_a_group_sees_all_outputs_of_a_question(setup, table, monkeypatch):
    @evaluator.group_reward
    def shortest(completions, problem):
        """1 for the shortest of a group."""
        seen.append((completions, problem))
        return [len(completion) == min(map(len, completions)) for completion in completions]

    seen, (state, rollout) = [], setup()
    by_name = main.score(state, PROBLEMS[:3], rollout)
    assert seen == [(rollout.texts[4 * i : 4 * i + 4], PROBLEMS[i]) for i in range(3)]
    assert by_name["shortest"].shape == (3, 4) and (by_name["shortest"].amax(1) == 1).all()
    assert "shortest" not in main.rule_rewards(PROBLEMS[:3], rollout)  # a test compares nothing


@pytest.mark.parametrize("wrong", [lambda c, p: [1.0], lambda c, p: [float("nan")] * len(c), lambda c, p: c[99]])
def test_a_reward_of_a_group_that_fails_counts_0_and_is_told(table, wrong):
    wrong.__name__ = "wrong"
    evaluator.group_reward(wrong)
    by_name, failures = evaluator.compare([["a", "b"], ["c", "d"]], PROBLEMS[:1] * 2)
    assert by_name["wrong"] == [[0.0, 0.0]] * 2 and len(failures) == 2 and "What is 0 and 0?" in failures[0]


def test_two_models_are_compared_with_an_interval():
    compared = [([0.9, 0.1], [0.0, 0.0])] * 6 + [([0.4, 0.6], [1.0, 1.0])] * 2 + [([0.5, 0.5], [1.0, 1.0])] * 2
    told = report.verdicts(["A", "B"], compared)
    assert told.startswith("judge: A is better than B in 0.700 [0.397, 0.892] of 10") and "of 10 questions" in told
    assert told.endswith("in 0.400 it prefers a place, not an output")


def test_a_judge_needs_a_group():
    with pytest.raises(main.SettingsError, match="--judge must be empty with --group_size 1"):
        main.choose_settings(*main.parse("--judge tiny --algorithm ppo --group_size 1".split()))
