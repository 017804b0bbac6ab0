"""The rules of evaluator.py: what is the answer, is it right, what is it worth."""

import subprocess
import sys

import pytest

import evaluator
import main
import rldatasets

TIDY = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>"


def reward(completion, answer="72"):
    """The weighted sum, as main.py makes it."""
    return main.score_completions([completion], [{"answer": answer}])[0].item()


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<reasoning>\n70 + 2\n</reasoning>\n<answer>\n72\n</answer>", "72"),
        ("<answer>71</answer> no, <answer>72</answer>", "72"),  # the last answer tag counts
        ("\\boxed{71} and <answer>72</answer> and #### 73", "72"),  # a tag goes before a box, a box before ####
        ("so \\boxed{71}, no, \\boxed{72}\n#### 73", "72"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),  # braces are balanced
        ("it is\n#### 72\nthanks", "72"),
        ("<reasoning><answer>71</answer></reasoning>", None),  # only inside the reasoning
        ("<reasoning>\\boxed{71} #### 71</reasoning>", None),
        ("<reasoning>\nthinking, \\boxed{71}", None),  # never left the reasoning
        ("<reasoning>\nthinking <answer>72</answer>", "72"),  # the answer tag ends an unclosed reasoning
        ("<answer>\n72", "72"),
        ("<answer></answer>", None),
        ("\\boxed{72", None),
        ("the answer is 72", None),
        ("", None),
    ],
)
def test_the_answer_of_a_completion_is(completion, answer):
    assert evaluator.extract_answer(completion) == answer


@pytest.mark.parametrize(
    "said, gold",
    [
        ("1,080", "1080"), ("-5", "-5"), ("$72.00", "72"), ("72.", "72"), ("72", "72.0"), ("$-5", "-5"), ("-$5", "-5"),
        ("− 5", "-5"), ("\\$72", "72"), ("72 apples", "72"), ("**72**", "72"), ("12 + 7 = 19", "19"), ("0.5", "1/2"),
        ("1,450,000", "1,450,000"), ("50%", "50"), ("72kg", "72"), ("72/hour", "72"), (".5", "0.5"), ("Total - $72", "72"), ("-€5", "-5"), ("x = 5", "5"), ("Monday", "monday"),
        ("72", "48+24 = <<48+24=72>>72 clips.\n#### 72"),
    ],
)  # fmt: skip
def test_a_right_answer_is_right_however_it_is_written(said, gold):
    assert evaluator.grade(TIDY.format("so", said), gold)


@pytest.mark.parametrize(
    "said, gold",
    [
        ("72 or 73", "72"), ("7 2", "72"), ("1,08", "108"), ("5", "-5"), ("720", "72"), ("7.2", "72"), ("1e3", "1"),
        ("1/0", "1"), ("", "72"), ("seventy", "72"), ("72", "48+24 = <<48+24=72>>72 clips.\n#### 73"), ("9**9**9", "9"),
        ("7*2", "72"), ("6*12", "612"), ("72.5e3", "72"), ("72." + "3" * 41, "72"), ("9^72", "72"), ("1E+72", "72"),
        ("1/2/3", "2/3"), ("USD-5", "5"), ("–5", "5"), ("72 + 3", "72"), ("5-3", "5"),
    ],
)  # fmt: skip
def test_a_wrong_or_undecided_answer_is_wrong(said, gold):
    assert not evaluator.grade(TIDY.format("so", said), gold)


def test_the_full_reward_is_four_whatever_lines_the_reasoning_has():
    for reasoning in ("one line", "two\nlines", "an empty\n\nline", "x" * 5000):
        assert reward(TIDY.format(reasoning, "72")) == 4.0
        assert reward(TIDY.format(reasoning, "72") + "\n") == 4.0


def test_wrong_but_tidy_stays_well_below_right_but_untidy():
    wrong_but_tidy = reward(TIDY.format("so", "71"))
    assert wrong_but_tidy == 2.0
    for untidy in ("#### 72", "\\boxed{72}", "<answer>72</answer>", "72? <answer>$72.00</answer> I think"):
        assert reward(untidy) >= wrong_but_tidy + 0.5
    # and where the right answer is no whole number, a tidy wrong whole number gets nothing for being whole
    assert reward("\\boxed{0.5}", "0.5") >= reward(TIDY.format("so", "3"), "0.5") + 0.5


def test_text_after_the_answer_costs_only_the_strict_format():
    names = evaluator.rewards(TIDY.format("so", "72") + " thanks" * 1000, {"answer": "72"})
    assert names == {"correctness": 1, "integer": 1, "strict_format": 0, "soft_format": 1, "tag_count": 1}


@pytest.mark.parametrize(
    "completion, strict, soft, tags",
    [
        (TIDY.format("so", "72"), 1, 1, 1.0),
        ("\n" + TIDY.format("so", "72") + "\n\n", 1, 1, 1.0),
        (TIDY.format("so", "72").replace("\n", " "), 0, 1, 1.0),
        (TIDY.format("", "72"), 0, 1, 1.0),
        ("Sure! " + TIDY.format("so", "72"), 0, 0, 1.0),
        ("<answer>72</answer><reasoning>so</reasoning>", 0, 0, 1.0),
        ("<reasoning>so<answer>72</answer>", 0, 0, 0.75),
        (TIDY.format("so", "72") * 2, 0, 1, 0.0),
        ("72", 0, 0, 0.0),
    ],
)
def test_the_format_rewards(completion, strict, soft, tags):
    names = evaluator.rewards(completion, {"answer": "72"})
    assert (names["strict_format"], names["soft_format"], names["tag_count"]) == (strict, soft, tags)


def test_the_form_that_the_prompt_asks_for_earns_everything():
    for problem in rldatasets.load("arithmetic", "test"):
        assert set(evaluator.rewards(rldatasets.written_out(problem), problem).values()) == {1.0}


def test_the_majority_counts_equal_values_together_and_prefers_the_earliest():
    answers = ["<answer>7</answer>", "<answer>72</answer>", "#### 72.00", "no answer"]
    assert evaluator.majority(answers) == "72"
    assert evaluator.majority(answers[:2]) == "7"
    assert evaluator.majority(["nothing"]) is None


@pytest.mark.parametrize(
    "text",
    [
        "<reasoning>",
        "<reasoning></reasoning>",
        "</reasoning><answer>",
        "\\boxed{",
        "1,",
        "9" * 50,
        "####",
        "{",
        "-",
        "=",
    ],
)
def test_no_text_of_100_kilobytes_is_slow_or_raises(text):
    import time

    completion = text * (100_000 // len(text))
    start = time.perf_counter()
    evaluator.rewards(completion, {"answer": "72"})
    evaluator.rewards(f"<answer>{completion}</answer>", {"answer": "72"})
    assert time.perf_counter() - start < 1  # milliseconds, unless something is quadratic


@pytest.mark.parametrize("script", ["evaluator", "rldatasets"])
def test_the_rules_and_the_questions_do_not_load_torch(script):
    code = f"import sys, {script}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
