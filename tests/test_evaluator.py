"""The rules of evaluator.py: what is the answer, is it right, what is it worth."""

import itertools
import math
import random
import re
import subprocess
import sys
import time
from fractions import Fraction  # noqa: F401 (of the text that is evaluated below)

import pytest

import evaluator
import main
import rldatasets

TIDY = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>"


def reward(completion, answer="72"):
    """The weighted sum, as main.py makes it."""
    return main.weighted_sum(evaluator.rewards(completion, {"answer": answer}))


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
        ("so \\boxed{(2,2)} and \\boxed{(6,2)}", "(2,2), (6,2)"),  # boxes of one list
        ("$x = \\boxed{3}$ or $x = \\boxed{4}$.", "3, 4"),
        ("\\boxed{3}. Then \\boxed{4}", "4"),  # another sentence
        ("\\boxed{3}\n\nAlso, \\boxed{4}", "4"),
        ("\\boxed 5$, yes", "5"),
        ("\\boxed 2 and \\boxed 5", "2, 5"),  # boxes without braces are a list too
        ("$\\boxed 2$, $x = \\boxed{5}$ or $\\boxed (1,2)$ again", "2, 5, (1,2)"),
        ("\\boxed 2. Then \\boxed 5", "5"),
        ("\\fbox{5}", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),  # escaped braces are part of the answer
        ("\\boxed{x \\} 1}", "x \\} 1"),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("\\boxed{5} and \\boxed{6", None),
        ("<answer>\n72", "72"),
        ("<answer></answer>", None),
        ("\\boxed{72", None),
        ("\\boxed{6 and then \\boxed{5}", "5"),  # only the last box must be closed
        ("the answer is 72", None),
        ("", None),
    ],
)
def test_the_answer_of_a_completion_is(completion, answer):
    assert evaluator.extract_answer(completion) == answer


def last_box(text):
    """What the last box holds, "" if it is never closed: character by character, slow on long texts."""
    content, i = "", 0
    while i < len(text):
        if text.startswith("\\boxed{", i):
            content, depth, start = "", 0, i + len("\\boxed")
            for j in range(start, len(text)):
                if text[j - 1] != "\\":
                    depth += {"{": 1, "}": -1}.get(text[j], 0)
                if depth == 0:
                    content, i = text[start + 1 : j], j
                    break
        i += 1
    return content


def test_braces_are_read_to_any_depth_however_they_are_nested():
    rng, pieces = random.Random(0), ["\\boxed{", "{", "}", "\\{", "\\}", "a"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, [2, 2, 3, 1, 1, 2], k=rng.randint(1, 25)))
        assert evaluator.boxed(text).split(", ")[-1] == last_box(text), text
    for depth in (1, 10, 1000):
        inside = "{" * depth + "5" + "}" * depth
        assert evaluator.extract_answer(f"so \\boxed{{{inside}}}.") == inside
        assert evaluator.extract_answer(f"so \\boxed{{{inside}") is None


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{}", "\\boxed{{", "{}", "}{", "\\boxed{\\{", "\\boxed 5", "{" * 1000]
)
def test_time_grows_with_the_length_of_a_text_whatever_its_braces(piece):
    seconds = []
    for size in (20_000, 160_000):
        text = piece * (size // len(piece)) + "}" * (size // 4)
        start = time.perf_counter()
        evaluator.extract_answer(text)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 24 * seconds[0] + 0.1  # 8 times the text; 64 times the time if it were quadratic


@pytest.mark.parametrize(
    "completion, found",
    [
        ("<answer>72</answer>", True),
        ("the answer is 72", True),  # without any form: the last number
        ("the answer is 72.", True),
        ("She sold 48 + 24 = 72 clips, a total of $1,072.", False),
        ("so 71 and then 72 or 73", False),  # only the last
        ("<reasoning>\\boxed{72}, as 70 + 2 = 72 and 3 > 1", True),  # a box that stands in the reasoning
        ("<answer>72 clips in 1 week</answer>", False),
        ("<answer>in all it must be 72</answer>", True),
        ("<answer>71</answer> or rather 72", False),  # the asked form comes first
        ("The range is 70-72", True),  # a hyphen is no minus
        ("It is -72", False),
        ("<reasoning>\n#### 72", True),
        ("no number", False),
        ("", False),
    ],
)
def test_the_answer_that_a_person_would_find_is_lenient_and_counts_for_no_reward(completion, found):
    assert evaluator.lenient(completion, {"answer": "72"}) == found
    assert "lenient" not in main.REWARDS


def test_whatever_is_right_is_leniently_right_too_and_puzzles_are_read_from_their_last_line():
    puzzle = {"kind": "countdown", "answer": "(8 - 2) * 5", "numbers": [8, 2, 5], "target": 30}
    assert evaluator.lenient("<answer>(8 - 2) * 5</answer>", puzzle)
    assert evaluator.lenient("I try.\n(8 - 2) * 5", puzzle) and not evaluator.correctness("I try.\n(8 - 2) * 5", puzzle)
    assert not evaluator.lenient("I try.\n8 * 5", puzzle)


@pytest.mark.parametrize(
    "said, gold",
    [
        ("1,080", "1080"), ("-5", "-5"), ("$72.00", "72"), ("72.", "72"), ("72", "72.0"), ("$-5", "-5"), ("-$5", "-5"),
        ("− 5", "-5"), ("\\$72", "72"), ("72 apples", "72"), ("**72**", "72"), ("12 + 7 = 19", "19"), ("0.5", "1/2"),
        ("1,450,000", "1,450,000"), ("50%", "50"), ("72kg", "72"), ("72/hour", "72"), (".5", "0.5"), ("Total - $72", "72"), ("-€5", "-5"), ("x = 5", "5"), ("Monday", "monday"),
        ("She ends up with 72 clips", "72"), ("5 teeth", "5"), ("both have 72", "72"), ("a length of 72", "72"),
        ("The third house needs 72 cases", "72"), ("On the fifth day she has 72", "72"),
        ("She has 8 quarters", "8"), ("It is 8 cm.", "8 cm"), ("It is 50 percent", "50%"), ("It is 50%", "50%"),
        ("It is 16 sq cm", "16 cm^2"), ("She needs 8 inches of rope", "8 in"),
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
        ("72 hundredths", "72"), ("72 thirds", "72"), ("a third of 72", "72"), ("a quarter of 72", "72"), ("72 halves", "72"),
        ("72 twentieths", "72"), ("It is 72 sixty-fourths", "72"), ("a twelfth of 72", "72"),
        ("It is 5 feet in all", "5 inches"), ("It is 5 kg", "5 cm"), ("It is 5", "5 cm"),
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
    assert names.pop("lenient") == 1
    assert names == {"correctness": 1, "integer": 1, "strict_format": 0, "soft_format": 1, "tag_count": 1, "safety": 1}


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


@pytest.mark.parametrize(
    "completion, answer, soft",
    [
        ("<think>Maybe \\boxed{5}?", None, 0),  # cut
        ("Maybe \\boxed{5}? <answer>5</answer> No.</think>\n" + TIDY.format("so", "6"), "6", 1),  # the prompt began it
        ("<think>5?</think>\n\n" + TIDY.format("so", "6"), "6", 1),
        ("<think>5?</think>\\boxed{6}", "6", 0),
        ("<think>5?</think> <think>\\boxed{7}", None, 0),
        ("<think>" + TIDY.format("so", "6"), None, 0),
        (TIDY.format("so", "6") + "\n<think>5?</think>", "6", 1),
        ("<answer><think>5</think>6</answer>", "6", 0),
        (" \n<think>5?</think>\n\n<think>7?</think><answer>6</answer>", "6", 0),
        ("<reasoning>I <think> so</reasoning><answer>6</answer>", "6", 1),
    ],
)
def test_thoughts_stand_before_the_form_and_are_no_answer(completion, answer, soft):
    assert evaluator.extract_answer(completion) == answer
    found = evaluator.rewards(completion, {"answer": "6"})
    assert found["soft_format"] == soft and found["lenient"] == (answer is not None)
    assert found["strict_format"] == (soft and TIDY.format("so", "6") in completion)


def test_the_form_that_the_prompt_asks_for_earns_everything():
    for problem in rldatasets.load("arithmetic", "test"):
        assert set(evaluator.rewards(rldatasets.written_out(problem), problem).values()) == {1.0}


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("\\boxed{72}", "72"), ("\\fbox{\\frac{144}{2}}", "72"), ("\\boxed 5", "5"),
        ("\\boxed{\\{1,2\\}}", "\\{2,1\\}"),
        ("\\boxed{(2,2)}$ and $\\boxed{(6,2)}", "(6,2), (2,2)"), ("\\boxed{x+11}$ or $\\boxed{11+x}", "x+11"),
        ("\\boxed{\\frac{25}{13}} = \\boxed{1\\frac{12}{13}}", "25/13"), ("\\boxed{3} apples, \\boxed{4}", "4"),
        ("\\boxed{7}$." + " It is so." * 100 + " $\\boxed{72}", "72"),
    ],
)  # fmt: skip
def test_a_gold_that_is_still_boxed_is_opened(gold, answer):
    assert evaluator.grade(TIDY.format("so", answer), gold) and evaluator.math_equal(gold, answer)
    assert not evaluator.grade(TIDY.format("so", "-1"), gold)


def test_whole_numbers_are_recognised_in_a_boxed_gold_and_after_four_signs():
    assert evaluator.rewards("#### 71", {"answer": "\\boxed{72}"})["integer"] == 1
    assert evaluator.rewards("#### 71", {"answer": "\\boxed{\\frac{1}{2}}"})["integer"] == 0
    assert evaluator.rewards("#### 0.5", {"answer": "\\boxed 5"})["integer"] == 0
    assert evaluator.rewards("#### 71", {"answer": "48+24 = 71.5 or so.\n#### 72"})["integer"] == 1


def test_a_new_reward_is_one_function_in_the_table(monkeypatch):
    monkeypatch.setattr(evaluator, "REWARDS", dict(evaluator.REWARDS))

    @evaluator.reward
    def short(completion, problem):
        return len(completion) < 5

    @evaluator.reward
    def only_for_puzzles(completion, problem):
        return 1 if problem.get("kind") == "order" else None

    assert evaluator.rewards("72", {"answer": "72"}).keys() - {"short"} == evaluator.rewards(
        "x" * 9, {"answer": "72"}
    ).keys() - {"short"}
    assert (
        evaluator.rewards("72", {"answer": "72"})["short"] == 1
        and evaluator.rewards("x" * 9, {"answer": "72"})["short"] == 0
    )
    assert "only_for_puzzles" not in evaluator.rewards("72", {"answer": "72"})


@pytest.mark.parametrize("put", [evaluator.reward, evaluator.group_reward])
@pytest.mark.parametrize("name", ["number", "same", "math", "correctness", "safety", "brief"])
def test_a_reward_cannot_take_a_name_that_is_taken(monkeypatch, put, name):
    monkeypatch.setattr(evaluator, "REWARDS", dict(evaluator.REWARDS))
    monkeypatch.setattr(evaluator, "GROUP_REWARDS", {"brief": len})
    before = {**evaluator.REWARDS, **evaluator.GROUP_REWARDS}, getattr(evaluator, name, None)

    def rule(completion, problem):
        return 1

    rule.__name__ = name
    with pytest.raises(ValueError, match=f"a reward cannot be called {name}"):
        put(rule)
    assert before == ({**evaluator.REWARDS, **evaluator.GROUP_REWARDS}, getattr(evaluator, name, None))
    rule.__name__ = "long_enough"
    assert put(rule) is rule
    with pytest.raises(ValueError, match="long_enough"):
        put(rule)


def test_every_reward_says_what_earns_1():
    assert all(function.__doc__.startswith("1 ") for function in evaluator.REWARDS.values())
    assert list(evaluator.REWARDS) == [
        "correctness", "lenient", "integer", "tests", "compiles", "strict_format", "soft_format", "tag_count", "safety",
    ]  # fmt: skip


def test_a_program_is_run_once_for_all_of_its_rewards(monkeypatch):
    runs = []
    monkeypatch.setattr(evaluator, "run_tests", lambda code, problem: runs.append(code) or (0.5, True))
    evaluator.test_results.cache_clear()
    problem = {"kind": "program", "prelude": "", "setup": "", "tests": ["assert f() == 1"], "functions": ["f"]}
    for source in ("x = 1", "x = 2"):
        names = evaluator.rewards(TIDY.format("so", source), problem)
        assert (names["correctness"], names["tests"], names["compiles"]) == (0, 0.5, 1) and "integer" not in names
    assert runs == ["x = 1\n", "x = 2\n"]
    evaluator.rewards(TIDY.format("so", "x = 1"), problem | {"tests": ["assert f() == 2"]})
    assert len(runs) == 3  # other tests are another run
    assert evaluator.rewards(TIDY.format("so", ""), problem)["tests"] == 0 and len(runs) == 3
    evaluator.rewards("x = 3", problem)
    assert runs[3] == "x = 3\n"  # without an answer tag, the whole text is the program
    evaluator.test_results.cache_clear()


def test_many_completions_are_scored_in_order_with_a_text_for_each_failure(monkeypatch):
    found = {
        "right": {"correctness": 1.0, "strict_format": 0.5},
        "program": {"correctness": 1.0, "strict_format": 1.0, "tests": 0.5},
        "odd": {"correctness": 1.0, "strict_format": math.inf, "tests": math.nan},
    }
    monkeypatch.setattr(evaluator, "rewards", lambda completion, problem: dict(found[completion]))  # else a KeyError
    completions = ["right", "boom", "program", "odd"]
    values, failures = evaluator.score(completions, [{"question": f"about {one}"} for one in completions], threads=2)
    assert values == {"correctness": [1, 0, 1, 0], "strict_format": [0.5, 0, 1, 0], "tests": [0, 0, 0.5, 0]}
    assert failures[0] == "KeyError('boom') (question: about boom)"
    assert "'strict_format': inf, 'tests': nan" in failures[1] and "about odd" in failures[1] and len(failures) == 2
    assert evaluator.score(["right"], [{}], threads=2) == ({"correctness": [1], "strict_format": [0.5]}, [])
    assert evaluator.score(["boom"], [{}], threads=2)[1] == ["KeyError('boom') (question: None)"]


def test_a_reward_that_takes_long_is_named_once_with_its_question(monkeypatch):
    monkeypatch.setattr(evaluator, "PATIENCE", 0.05)
    monkeypatch.setitem(evaluator.REWARDS, "slow", lambda completion, problem: time.sleep(0.15) or 1.0)
    monkeypatch.setitem(evaluator.REWARDS, "quick", lambda completion, problem: 1.0)
    noted = []
    problems = [{"question": f"about {one}", "answer": "1"} for one in "abc"]
    values, failures = evaluator.score(["x", "y", "z"], problems, 1, noted.append)
    assert values["slow"] == [1.0, 1.0, 1.0] == values["quick"] and not failures
    assert noted == ["waiting for the reward slow (question: about a)"]
    evaluator.score(["x"], problems[:1], 1, noted.append)
    assert len(noted) == 2  # once for each step


def test_very_small_numbers_keep_their_sign():
    assert not evaluator.math_equal("-\\frac{1}{2004!}", "\\frac{1}{2004!}")


def test_each_generated_kind_has_a_checker():
    for name in rldatasets.GENERATED:
        for problem in itertools.islice(rldatasets.load(name, "test"), 20):
            assert evaluator.right(problem["answer"], problem) or problem["answer"] == "any move" or name == "writing"
            assert not evaluator.right(None, problem) and not evaluator.right("?", problem)


def test_the_majority_counts_equal_values_together_and_prefers_the_earliest():
    answers = ["<answer>7</answer>", "<answer>72</answer>", "#### 72.00", "no answer"]
    assert evaluator.majority(answers) == "72"
    assert evaluator.majority(answers[:2]) == "7"
    assert evaluator.majority(["nothing"]) is None


def test_votes_are_counted_by_the_rule_of_the_kind_of_the_problem():
    order = {"kind": "order", "answer": "Ada, Ben, Cleo"}
    votes = ["Cleo, Ben, Ada", "Ada, Ben, Cleo", "1. Ada 2. Ben 3. Cleo", "who knows", "nobody", "no idea"]
    assert evaluator.majority([f"<answer>{vote}</answer>" for vote in votes], order) == "Ada, Ben, Cleo"
    assert evaluator.majority([f"<answer>{vote}</answer>" for vote in votes[:2]], order) == "Cleo, Ben, Ada"
    roles = {"kind": "knights", "answer": "Ada: knight, Ben: knave"}
    votes = ["Ada: knave, Ben: knight", "Knights: Ada. Knaves: Ben", "Ben: knave, Ada: knight"]
    assert evaluator.majority([f"<answer>{vote}</answer>" for vote in votes], roles) == "Knights: Ada. Knaves: Ben"
    assert evaluator.majority([f"#### {vote}" for vote in ("41", "42", "41 (since 6*7=42)")]) == "41"


@pytest.mark.parametrize("answer", ["(E)", "E)", "E", "E.", "Option E", "choice (E)", "option E)", "**E**"])
def test_a_choice_is_its_letter(answer):
    assert evaluator.math_equal(answer, "E") and evaluator.math_equal("E", answer)
    assert not evaluator.math_equal(answer, "D") and not evaluator.math_equal(answer, "e")


@pytest.mark.parametrize(
    "said",
    [
        "41 (since 6*7=42)", "41, because 6*7 = 42", "It is 41. Check: 6*7 = 42", "The total is 41 = 42", "41 = 42",
        "6*7 = 41 = 42", "41; 6*7 = 42", "41 6*7 = 42", "41 (= 42)", "6*7 = 42, so 41", "41 or rather 42", "41 apples = 42",
        "41, 6 × 7 = 42", "41.5 = 42", r"\frac{84}{2} = 41", r"6 \cdot 7 = 41", "2^3 + 34 = 41", r"41, since $6 \cdot 7 = 42$",
    ],
)  # fmt: skip
def test_a_number_that_is_not_the_result_contradicts_it(said):
    assert not evaluator.math_equal(said, "42") and not evaluator.math_equal(said, "41")


@pytest.mark.parametrize(
    "said, gold",
    [
        ("36 (12*3=36)", "36"), ("36 (since 12*3=36)", "36"), ("36, because 12*3 = 36", "36"), ("36, as 12*3 = 36", "36"),
        ("120 pages / 30 pages = 4 days", "4"), ("20 - 19 = 1 rose", "1"), ("36 = 12 x 3", "36"), ("36 (= 12 x 3)", "36"), ("36 = 12 × 3", "36"),
        ("It is 36. Check: 12*3 = 36", "36"), ("12 x 3 = 36 apples", "36"), ("5 cups + 3 cups = 8 cups", "8"),
        ("10/3 = 3.33", "3.33"), ("1/4 = 25%", "25%"), ("1/4 = 25%", "1/4"), ("36 * 50% = 18", "18"), ("(12/48) * 100 = 25%", "25"),
        (r"\angle A = 60^\circ - 40^\circ = 20^\circ", "20"), ("f(1,0) = 1", "1"), ("the value is x=5", "x=5"),
    ],
)  # fmt: skip
def test_a_calculation_says_its_result_and_may_repeat_it(said, gold):
    assert evaluator.math_equal(said, gold)


@pytest.mark.parametrize(
    "said",
    [
        "the reciprocal of 18", "18 factorial", "a factor of 18", "18 squared", "the square of 18", "18 choose 2", "18 modulo",
        "a multiple of 18", "the opposite of 18", "18 halved", "18 doubled", "18 reversed", "log 18", "18 prime", "up to 18",
        "exceeds 18", "18 short", "18 hours and thirty minutes", "18 point five", "18 apples doubled", "18 dollars halved",
        "18 apples divided by two", "more than 18", "18 and over", "rounded 18", "18 (in thousands)", "18 (plus two)",
        "It cannot be 18", "I doubt it is 18", "It is unlikely to be 18", "It has -$18", "divisible by 18", "18 to the power of two", "It is - 18", "18 backwards", "18 inverted",
    ],
)  # fmt: skip
def test_words_that_are_not_known_to_leave_a_number_as_it_is_make_it_another(said):
    assert not evaluator.math_equal(said, "18")
    assert not evaluator.lenient(f"I think it is {said}", {"answer": "18"})


@pytest.mark.parametrize(
    "said",
    [
        "18 apples", "a total of 18", "18 red apples", "18 in total", "18 apples in all", "She has 18 left", "18 people",
        "He earned 18 dollars last week", "It took them 18 hours to build", "18 more", "Total: 18", "They sold 18 tickets each",
        "Wendy polished 18 glasses", "Tom is currently 18 years old", "18 more than Bob", "18 apples over the summer",
        "He runs 18 m/s", "$18 profit", "18 yen", "I think 18", "18 m/s", "18 hours/month", "18 pages/person", "18 times", "18 T-shirts", "18 deer", "18 is the answer",
        "Therefore, the total cost is $18", "18 years old", "It costs $18 per day", "18 eggs for breakfast", "1/2 * 36 = 18", "18 miles per hour", "18 hours a day",
    ],
)  # fmt: skip
def test_words_that_say_what_is_counted_leave_a_number_as_it_is(said):
    assert evaluator.math_equal(said, "18") and not evaluator.math_equal(said, "19")


@pytest.mark.parametrize(
    "completion, answer, found",
    [
        ("The answer is 18. Note that this assumes 7 days a week.", "18", True),
        ("The answer is 18 (see step 3)", "18", True),
        ("The answer is 18. (see step 3)", "3", False),
        ("The answer is not 18", "18", False),
        ("The answer is 3.5.", "3.5", True),
        ("Answer: 17\nNo, the answer: 18\nStep 4 was hard.", "18", True),
        ("It is −5 degrees", "5", False),
        ("It is − 5 degrees", "5", False),
        ("It is − 5 degrees", "-5", True),
        ("–5 degrees", "5", False),
        ("It is 1 1/2", "1/2", False),
        ("It is 5 kg", "5 cm", False),
        ("It is 3 × 10^5", "5", False),
        ("The answer is 3 × 10^5", "300000", True),
        ("It is 2 million", "2", False),
        ("The answer is \\frac{1}{2}", "2", False),
        ("It is half of 18", "18", False),
        ("In 3 days she has 72 clips", "72", True),
        ("She sold 48 + 24 = 72 clips", "72", True),
        ("The answer is $3(x+1)$. See above.", "3x+3", True),
        ("The answer is 18 because each of the 3 kids gets 6.", "18", True),
        ("<reasoning>so 18</reasoning>", "18", True),
        ("Step 3: 3*6 = 18", "18", True),
        ("So 18 is the answer.", "18", True),
        ("$5k", "5", False),
    ],
)
def test_lenient_reads_a_number_whole_where_the_answer_is_announced_or_last(completion, answer, found):
    assert evaluator.lenient(completion, {"answer": answer}) == found


@pytest.mark.parametrize(
    "said, gold",
    [("1 apple", "1"), ("It is -5", "-5"), ("It is −5.", "-5"), ("She has -$18", "-18"), ("25% of the total", "25%")],
)
def test_one_thing_a_debt_and_a_share_are_read(said, gold):
    assert evaluator.math_equal(said, gold)


def test_a_vote_for_a_calculation_that_is_not_allowed_counts_for_nothing():
    problem = {"kind": "countdown", "answer": "(8 - 2) * 5", "numbers": [8, 2, 5], "target": 30}
    votes = ["8*5 - 2*5", "30", "(8-2) * 5", "5 * (8 - 2)", "8 * 2"]
    assert evaluator.majority([f"<answer>{vote}</answer>" for vote in votes], problem) == "(8-2) * 5"


@pytest.mark.parametrize("gold", ["6*7 = 42\n#### 42\nThis assumes 7 days.", "#### 42", "42"])
def test_a_remark_after_the_line_of_the_gold_is_not_a_part_of_it(gold):
    assert (
        evaluator.grade("#### 42\nAs said above.", gold)
        and evaluator.rewards("#### 7", {"answer": gold})["integer"] == 1
    )


# ---- mathematics ---------------------------------------------------------------------------------------------------

SAME = r"""
fractions        1/2 == \frac12 == \dfrac{1}{2} == 0.5 == .5 == ½ == \frac{2}{4} == \tfrac 12
negative         -\frac{1}{2} == \frac{-1}{2} == \frac{1}{-2} == -0.5 == −½
mixed            1\frac{1}{2} == 3/2 == 1 1/2 == 1½ == 1.5
not mixed        3\frac{4}{3} == 4
thousands        1,080 == 1080 == 1{,}080 == 1\,080 == 1,\!080 == 1 080 == 1080.00 == １，０８０
currency         \$1,080 == $1080$ == €1080 == 1080 dollars == USD 1080 == US$1,080.00
percent          10\% == 10% == 10 percent
percent as said  10\% == 10
percent as is    10\% == 0.1
degrees          90^\circ == 90^{\circ} == 90° == 90 degrees == 90
units            8\text{ cm} == 8 == 8 cm == 8 \mathrm{cm} == 8 centimeters
square units     16 \text{ cm}^2 == 16 square centimeters == 16 == 16 cm²
rates            60 km/h == 60 == 60 \text{ km/h}
words            \text{Monday} == monday == \textbf{Monday} == Monday.
choices          \text{(C)} == C == (C) == \textbf{(C)}
spacing          \left( 3, \frac{\pi}{2} \right) == (3,\pi/2) == \bigl(3,\;\tfrac\pi2\bigr) == (3, π/2)
sets             \{1,2,3\} == {3, 2, 1} == 1, 2, 3 == 1,2 \text{ and } 3 == \left\{3,1,2\right\}
lists            1,2,345 == 345, 2, 1
big sets         100,200,300 == 300, 200, 100 == 200, 100, 300
sets in braces   \{100,200,300\} == 300, 200, 100 == \{300, 200, 100\}
intervals        [1, 2) == \left[1,2\right) == 1 \le x < 2 == x \in [1,2) == 2 > x \geq 1
unions           (-\infty,3)\cup(5,\infty) == x < 3 \text{ or } x > 5 == (5,+\infty) \cup (-\infty, 3)
matrices         \begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix} == [[1,2],[3,4]]
columns          \begin{pmatrix} 1 \\ -2 \end{pmatrix} == (1,-2) == \left[\begin{array}{c}1\\-2\end{array}\right]
roots            \frac{\sqrt{3}}{3} == \frac{1}{\sqrt{3}} == \sqrt3/3 == 3^{-1/2} == √3/3
logarithm base   \log_3 729 == 6 == \log_{3}729 == \log_3(729)
more roots       2\sqrt{2} == \sqrt{8} == \sqrt[3]{16\sqrt{2}}
pi               \frac{1}{2}\pi == \frac{\pi}{2} == 0.5π == pi/2
scientific       3.2\times 10^5 == 320000 == 3.2e5 == 3.2 × 10⁵ == 32 \cdot 10^{4}
small            1.5 \times 10^{-3} == 0.0015 == 1.5e-3
definitions      x = 5 == 5 == 5 = x == x=5.0
plus or minus    3 \pm \sqrt{2} == 3-\sqrt{2}, 3+\sqrt{2} == \{3+\sqrt2, 3-\sqrt2\} == x = 3 ± √2
polynomials      x^2+2x+1 == (x+1)^2 == 1 + 2x + x^2 == y = x^{2} + 2x + 1
names            f(x) = 2x+3 == 3+2x
lines            x+y=3 == 2x+2y=6 == y = 3-x == -x-y+3=0
complex          2+3i == 3i+2 == i(3-2i)
repeating        0.\overline{3} == 1/3 == 0.333333333333 == 0.\bar{3} == .\overline{3}
repeating later  0.1\overline{6} == 1/6 == 0.1\bar6
functions        \log_2 8 == 3 == \binom31 == \lfloor \pi \rfloor == |-3| == \binom{3}{1} == 3!/2 == \sin^2 x + \cos^2 x + 2
bases            1101_2 == 1101_{2} == 1101
spelled          seventy-two == 72 == seventy two clips == 72 (seventy-two)
comments         \frac{3}{8} == \frac{3}{8} (three eighths) == 3/8 (of the cake)
large            2 million == 2,000,000 == 2 \times 10^6 == two million
sentences        72 == **72** == The answer is $72. == So the final answer is: \(72\) == about 72
calculated       48 + 24 = 72 == 72 == 6 \cdot 12 == <<48+24=72>>72 clips == \boxed{72} == Total: 72
chains           8\sqrt{2} \approx 11.3 == 8\sqrt2
nearly equal     x \approx 5.25 == 5.25 == x ≈ 5.25 == x = 5.25
inverse          \sin^{-1}(x/9) == \arcsin(x/9) == \arcsin\frac{x}{9}
powers outside   \cos(x)^2 == \cos^2 x == (\cos x)^2 == 1 - \sin(x)^2
squared roots    \sqrt{x^2} == |x| == \left|-x\right|
bars in bars     \left|\frac{3|x|}{2}\right| == 3|x|/2 == |-3x/2|
positive only    \sqrt{x}\sqrt{y} == \sqrt{xy} == (xy)^{1/2}
logarithms       \ln(x^2) == 2\ln x == 2 \ln(x)
cube roots       \sqrt[3]{x^3} == x == \sqrt[3]{x}^3
metres           144 \text{ m}^3 == 144 == 144 m^3 == 144 cubic meters
hours            7 h == 7 == 7\text{ hours} == x = 7 h
months           12 months == 12
degree lists     45^\circ, 135^\circ == 45, 135 == (45^\circ, 135^\circ)
capital words    \text{Yes} == yes == YES
bold             \frac{7}{9} == \mathbf{\frac{7}{9}} == \boldsymbol{\dfrac79} == {7 \over 9} == 7 \over 9
over             \frac{1+\sqrt5}{2} == {1 + \sqrt{5} \over 2} == 1+\sqrt5 \over 2
base in words    2516_8 == 2516_{8} == 2516 \text{ (base }8) == (2516)_8 == 2516₈ == 2516 in base 8
matrix rows      \begin{pmatrix} 5 \\[6pt] 6 \end{pmatrix} == \begin{bmatrix}5\\6\end{bmatrix}
per hour         45 mph == 45 miles per hour == 45
times of day     9\text{ a.m.} == 9 AM == 9:00 a.m.
minus in words   -50 == negative 50 == minus 50
ends of chats    $\large 1234$ == 1234<|im_end|> == 1234<|endoftext|> == 1234</s> == 1,234\\ == <b>1'234</b>
"""
SAME = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in SAME.strip().split("\n"))

DIFFERENT = r"""
1/2 != 1/3          0.33 != 1/3          3.14 != \pi           \sqrt{2} != 1.414      5 != -5
(1,2) != (2,1)      [1,2] != (1,2)       (1,2] != [1,2]        1,2 != 1,3              \{1,2\} != \{1,2,3\}
x=5 != y=6          x=5 != x=6           2x+3 != 3x+2          x^2 != x^3              x > 5 != x \ge 5
x<5 != x>5          y=2x+3 != y=2x-3     x+y=3 != 3            7=11a+c != 11a+c        3\pm2 != 3+2
10\% != 0.01        0.5\% != 0.5         5\text{ cm} != 5\text{ m}                     2 cm != 2 inches
75\% != 75^\circ    1101_2 != 1101_3     443_5 != 123          1,080 != 1,08           1,2 != 1.2
even != odd         John Smith != John Doe                     C != D                  \text{yes} != \text{no}
2+3i != 2-3i        \frac{3}{4} != \frac{4}{3}                 1:2 != 2:1              \infty != -\infty
12345678901234567890 != 12345678901234567891                  100000001 != 100000002   9**9**9 != 9
72 or 73 != 72      not 72 != 72         less than 72 != 72    72, maybe 73 != 72      7 2 != 72
1 2 3 != 6          3abc != 3            print(72) != 72       \sqrt{72} != 72         x/72 != 72
1,001,000 != 1,000,000                   10,80 != 10,080        100,200 != 200,100     \$15,\!00 != \$15,\!000
x \in [-2,7] != y=2x+3                   (x,y)=(1,2) != k=15   (-36,104] != [-36,104]   (100,200) != 100200
half of 72 != 72    72 and a half != 72   > 72 != 72            Wrong: 72 != 72         72 (not correct) != 72
maybe 72 != 72      72 hundredths != 72   52₈ != 528            |n-1| != n-1            |3-n| != 3-n
It is 1. != \frac{x^2}{16}-\frac{y^2}{9}=1                     It is 5 feet != 5 \text{ inches}
\{1,2\} != (1,2)    ACF != AFC           two and three != 5    five six != 11          \{1,2\} != [1,2]
six or seven != 6   one third != 1       1/0 != 1              1e999999 != 1           2^{10} != 2^{11}
\pi r^2 h != \pi r^2    2m+1 != 3    2m != 2     n + 2m != n + 2   h + 2 != 2   x^2 m != x^2       r != R
\frac{R}{r} != \frac{r}{R}    Ab != aB    x != |x|     x != \sqrt{x^2}    x^3 != |x|^3     xy != |xy|
\cos(x)^2 != \cos(x^2)    \sin^{-1} x != \frac{1}{\sin x}    72 squared != 72
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix}          |x-1| != x-1    \emptyset != \{1,2\}
101 (base 2) != 101 (base 3)    0.\overline{3} != 0.3    0.\overline{3} != 0.33    two and three != 2     two, three != 2
one half != 1       one and a half != 1   two point five != 2   five sixths != 5        negative of 50 != 50
1,080 != 1, 80      1,200, 3,400 != 3,200, 1,400             \frac12 (or not) != \frac12
"""
DIFFERENT = [pair.split(" != ") for pair in re.findall(r"\S.*? != .*?(?=\s{3}|\n|$)", DIFFERENT)]


@pytest.mark.parametrize("kind", SAME)
def test_the_same_in_every_notation(kind):
    written = SAME[kind].split(" == ")
    for left, right in itertools.permutations(written, 2):
        assert evaluator.math_equal(left, right), (left, right)


def test_a_matrix_may_stand_on_several_lines():
    matrix = "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}"
    assert evaluator.math_equal(matrix, "[[1,2],[3,4]]") and not evaluator.math_equal(matrix, "[[1,3],[2,4]]")


@pytest.mark.parametrize("left, right", DIFFERENT)
def test_what_is_not_the_same(left, right):
    assert not evaluator.math_equal(left, right) and not evaluator.math_equal(right, left)
    assert evaluator.math_equal(left, left) and evaluator.math_equal(right, right)


@pytest.mark.parametrize("sentence", ["It is 72 clips.", "Therefore, 72", "She sold 48 + 24 = 72 clips in all.", "72?"])
def test_a_sentence_with_one_number_in_it_says_that_number(sentence):
    assert evaluator.math_equal(sentence, "72") and not evaluator.math_equal(sentence, "73")
    assert evaluator.math_equal(sentence.replace("72", "1,272").replace("48", "1,248"), "1,272")


@pytest.mark.parametrize(
    "sentence",
    [
        "x != 5", "x \\ne 5", "x ≠ 5", "It is not true that x = 5", "It is false that the total = 5",
        "The total isn't = 5",
        "The total >= 5", "Maybe the total = 5", "Either the total = 5 or more",
    ],
)  # fmt: skip
def test_a_doubt_anywhere_in_a_sentence_takes_its_number_back(sentence):
    assert not evaluator.math_equal(sentence, "5") and evaluator.number(sentence) != 5


def test_answers_of_different_kinds_are_never_the_same():
    kinds = {kind: text.split(" == ")[0] for kind, text in SAME.items() if "percent" not in kind}
    equal = {frozenset((a, b)) for a, b in itertools.permutations(kinds, 2) if evaluator.math_equal(kinds[a], kinds[b])}
    assert equal == {
        frozenset(pair)
        for pair in [
            ("thousands", "currency"),
            ("spelled", "sentences"),
            ("spelled", "calculated"),
            ("sentences", "calculated"),
        ]
    }


@pytest.mark.parametrize("pattern, new, example", evaluator.REWRITES)
def test_each_rewriting_rule_does_what_its_example_says(pattern, new, example):
    before, after = example.split(" → ")
    assert re.sub(pattern, new, before) == after != before


def test_each_spelling_is_turned_into_its_name():
    assert evaluator.by_spelling("\n foot ft feet\n %  percent\n") == {"ft": "foot", "feet": "foot", "percent": "%"}
    assert evaluator.COMMANDS["√"] == "\\sqrt" and evaluator.UNITS["mph"] == "mile/hour"


def test_random_calculations_are_read_as_python_reads_them():
    rng = random.Random(0)

    def grow(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(1, 20))
        left, right = grow(depth - 1), grow(depth - 1)
        return f"({left} {rng.choice('+-*/')} {right})"

    for text in (grow(4) for _ in range(500)):
        try:
            value = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))  # our own text
        except ZeroDivisionError:
            continue
        assert evaluator.number(text) == value
        latex = text.replace("*", r"\cdot ").replace("(", r"\left(").replace(")", r"\right)")
        assert evaluator.math_equal(latex, str(value)) and not evaluator.math_equal(latex, str(value + 1))


PIECES = (  # noqa: SIM905
    "( [ { \\frac{ \\sqrt{ ^ 2^ - + 1+ x+ x 9 1, 1,000, | \\{ \\boxed{ \\text{a} <think> x<think> </think> <reasoning> </reasoning> <answer> </answer> #### = 1= % ! 5! \\pm "
    "\\begin{pmatrix} & \\\\ ** __ \\sin \\log_ _{ \\left( / 1/ 1\\frac12 . e9 1e9 9**9** 0.\\overline{3} ² ½ × << <<1+1=2>> 1+1=2 wait kill \\ $ \0 one "
    "hundred and or x< \\in 5cm/ ```python \ud800 ١ knight 1e999999 9!"
).split(" ")


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_of_100_kilobytes_is_slow_or_raises(piece):
    problems = [
        {"kind": "math", "answer": "72", "solution": "48+24=72"},
        {"kind": "countdown", "answer": "8*9", "numbers": [8, 9], "target": 72},
        {"kind": "order", "answer": "Ada, Ben", "names": ["Ada", "Ben"]},
        {"kind": "knights", "answer": "Ada: knight, Ben: knave", "names": ["Ada", "Ben"]},
    ]
    for size in (100_000, 480):  # the second is short enough to be read as mathematics
        text = piece * (size // len(piece))
        for completion in (text, f"<answer>{text}</answer>", f"<reasoning>{text}</reasoning>\n<answer>1</answer>"):
            start = time.perf_counter()
            for problem in problems:
                evaluator.rewards(completion, problem)
                evaluator.step_rewards(completion, problem)
            evaluator.math_equal(text, text)
            assert time.perf_counter() - start < 2  # a few hundredths, unless something backtracks


def test_sets_in_sets_are_compared_in_time():
    nested = "\\{" * 20 + "1" + ", 1\\}" * 20
    start = time.perf_counter()
    assert evaluator.math_equal(nested, "1") and not evaluator.math_equal(nested, "2")
    assert time.perf_counter() - start < 1  # a few milliseconds, unless each level is compared twice


# ---- countdown -----------------------------------------------------------------------------------------------------

COUNTDOWN = {"kind": "countdown", "numbers": [25, 5, 3, 7], "target": 60, "answer": "(25 - 5) * 3"}


@pytest.mark.parametrize(
    "answer",
    ["(25 - 5) * 3", "(25-5)×3 = 60", "60 = 3(25-5)", "$$(25 - 5) \\cdot 3$$", "(25 − 5) × 3", "7 * 5 + 25"],
)
def test_any_calculation_that_reaches_the_target_counts(answer):
    assert evaluator.right(answer, COUNTDOWN)


@pytest.mark.parametrize(
    "answer",
    ["60", "25 - 5 * 3", "3 * 25 - 3 * 5", "(25-5)*3*1", "(20)*3", "25 * 3 - 15", "(25-5)*3 = 61", "2**5 + 28", "3!*10", "", "x", "(" * 99, "25-5"],
)  # fmt: skip
def test_other_numbers_other_results_and_no_calculation_do_not(answer):
    assert not evaluator.right(answer, COUNTDOWN)


# ---- steps ---------------------------------------------------------------------------------------------------------

NATALIA = {
    "kind": "math",
    "answer": "72",
    "solution": "She sold 48/2 = <<48/2=24>>24 clips in May.\nTogether 48+24 = <<48+24=72>>72.",
}


def steps(reasoning, problem=NATALIA):
    """Each step's text and reward."""
    completion = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n72\n</answer>"
    found, start = [], len("<reasoning>\n")
    for end, reward in evaluator.step_rewards(completion, problem):
        found.append((completion[start:end].strip(), reward))
        start = end
    return found


def test_steps_are_lines_and_sentences_and_right_ones_earn_more_than_true_ones_and_those_more_than_false_ones():
    told = "In May she sold half. That is 48 / 2 = 24 clips.\nOf them 24 / 2 = 12 were red.\n48 + 24 = 73"
    assert steps(told) == [
        ("In May she sold half. That is 48 / 2 = 24 clips.", 1.0),  # a sentence without a calculation joins the next
        ("Of them 24 / 2 = 12 were red.", 0.5),  # holds, but the worked solution has no 12
        ("48 + 24 = 73", 0.0),
    ]


@pytest.mark.parametrize(
    "line, reward",
    [
        ("<<48/2=24>>24", 1.0), ("$48 ÷ 2 = $24.00", 1.0), ("48 - 24 = 24 and 24 + 24 = 49", 0.0), ("50 * 20% = 10", 0.5),
        ("10 / 3 = 3.33", 0.5), ("10 / 3 = 3", 0.0), ("2 * 3 = 6 = 3 + 3", 0.5), ("6 * 4 = 12 + 12 = 24", 1.0),
        ("1,000 * 2 = 1,000 + 1,000 = 2,000", 0.5), ("1,000 + 80 = 1,080", 0.5),
        ("- 48 / 2 = 24", 1.0), ("* 48 / 2 = 24", 1.0), ("- 48 / 2 = 23", 0.0), ("-48 / 2 = -24", 0.5), ("So - 48 / 2 = -24", 0.5),
        ("100 / 50% = 200", 0.5), ("12 / (20 + 30)% = 24", 1.0), ("100 / 50% = 2", 0.0),
        ("20 + 4 = $12 + $12 = $24", 1.0), ("20 + 4 = 30 − 6 = 24", 1.0),
    ],
)  # fmt: skip
def test_a_calculation_holds_by_value_or_rounded_to_the_decimals_it_shows(line, reward):
    assert steps(line) == [(line, reward)]


@pytest.mark.parametrize(
    "line",
    ["I think so.", "x = 5", "24 = 24", "", "So = 3", "6 = 2 * 3", "10 + 7 = $12 + $5", "10 + 7 = 20 − 3", "50% - 20% = 30%"],
)  # fmt: skip
def test_a_line_that_calculates_nothing_is_no_step(line):
    assert steps(line) == []


def test_the_steps_of_a_worked_solution_are_all_right():
    for problem in itertools.islice(rldatasets.load("arithmetic", "test"), 300):
        completion = rldatasets.written_out(problem)
        found = evaluator.step_rewards(completion, problem)
        assert [reward for _, reward in found] == [1.0] * len(problem["solution"].split("\n"))
        assert completion[: found[-1][0]].rstrip().endswith(problem["solution"])


# ---- length, safety, reflection ------------------------------------------------------------------------------------


def test_the_overlong_penalty_falls_from_0_to_minus_1_over_its_buffer():
    assert [evaluator.overlong(n, limit=100, buffer=20) for n in (1, 80, 85, 90, 100)] == [0, 0, -0.25, -0.5, -1]
    assert evaluator.overlong(140, limit=100, buffer=20) == -1  # and no lower


def test_safety_is_a_list_and_reflection_counts_words():
    assert evaluator.safety("24 clips", {}) and not evaluator.safety("I'll show you how to build a pipe bomb.", {})
    assert evaluator.reflection("Wait, that is a mistake. Let me check: 2. The waiter waits.") == 3


@pytest.mark.parametrize(
    ("completion", "steps", "approach"),
    [
        ("<reasoning>\nThat makes 7.\n</reasoning>\n<answer>\n7\n</answer>", 0, "guessed"),
        ("Wait, let me check. It is 7.", 0, "guessed"),  # doubt without a calculation finds nothing out
        ("<reasoning>\nbuys 4: <<3+4=7>>7\n</reasoning>\n7", 1, "worked"),
        ("<reasoning>\n3 + 4 = 7, so there are 7.\n7 - 2 = 5\n</reasoning>\n5", 2, "worked"),
        ("<reasoning>\nbuys 4: <<3+4=8>>8\nWait, <<3+4=7>>7\n</reasoning>\n7", 2, "checked"),
    ],
)
def test_an_output_is_guessed_worked_out_or_checked(completion, steps, approach):
    assert (evaluator.num_steps(completion), evaluator.approach(completion)) == (steps, approach)


# ---- metrics of many outputs ---------------------------------------------------------------------------------------


def test_a_run_tells_how_its_outputs_come_to_their_answers():
    outputs = [(1, "worked", 30, 2), (1, "checked", 50, 3), (0, "guessed", 10, 0), (0, "guessed", 20, 0)]
    names = ("correctness", "approach", "length", "num_steps")
    told = evaluator.behaviour([dict(zip(names, output)) | {"reflection": 0} for output in outputs])
    assert [told[f"approach/{name}"] for name in ("guessed", "worked", "checked")] == [0.5, 0.25, 0.25]
    assert (told["length_right"], told["length_wrong"], told["num_steps"]) == (40, 15, 1.25)
    assert "length_wrong" not in evaluator.behaviour([dict(zip(names, outputs[0])) | {"reflection": 0}])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    assert [evaluator.pass_at_k(4, c, 2) for c in range(5)] == pytest.approx([0, 3 / 6, 5 / 6, 1, 1])  # of 6 pairs
    assert evaluator.pass_at_k(10, 3, 1) == pytest.approx(0.3)


def test_the_interval_is_wilsons():
    assert evaluator.wilson(0.0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert evaluator.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert evaluator.wilson(0.985, 200) == pytest.approx((0.9568, 0.9949), abs=1e-4)


# ---- what a script may not know ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["evaluator", "rldatasets"])
def test_the_rules_and_the_questions_do_not_load_torch(script):
    code = f"import sys, {script}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
