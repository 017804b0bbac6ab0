"""The questions of rldatasets.py: splits, order, rows."""

import ast
import gzip
import itertools
import json
import math
import operator
import random
import re
import subprocess
import sys
import time
import zlib

import pytest

import evaluator
import rldatasets

ROWS = [
    {"question": "A box has 4 rows of 3 pens. How many pens?", "answer": "4*3 = <<4*3=12>>12 pens.\n#### 12"},
    {"question": "It was 5 degrees and fell by 8. Now?", "answer": "5-8 = <<5-8=-3>>-3\n#### -3"},
    {"question": "What is half of 2,250?", "answer": "2250/2 = <<2250/2=1125>>1,125\n#### 1,125"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def take(name, n, **how):
    return [problem["question"] for problem in itertools.islice(rldatasets.shuffled(name, "train", **how), n)]


def calculations(text):
    """[(left, sign, right, result)] of each <<…>>, as texts."""
    return re.findall(r"<<(\d+)([-+])(\d+)=(\d+)>>", text)


def holds(left, sign, right, result):
    return int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4, 5])
def test_a_word_problem_has_as_many_steps_as_its_difficulty_and_each_starts_from_the_last_result(difficulty):
    for problem in itertools.islice(rldatasets.load(f"arithmetic:{difficulty}", "train"), 300):
        steps = calculations(problem["solution"])
        assert len(steps) == problem["solution"].count("\n") + 1 == difficulty and all(itertools.starmap(holds, steps))
        start = re.search(r" has (\d+) ", problem["question"])[1]
        assert [start, *(result for *_, result in steps)] == [*(left for left, *_ in steps), problem["answer"]]
        assert all(1 <= int(number) <= 12 for number in re.findall(r"\d+", problem["question"] + problem["solution"]))
        numbers = re.findall(r"(?:buys|finds|wins|gets|breaks|loses|sells|eats) (\d+)", problem["question"])
        assert numbers == [right for _, _, right, _ in steps]


def test_buying_adds_and_losing_takes_away():
    """By hand, not by the table that the generator reads."""
    taken = {"breaks", "loses", "sells", "eats"}
    for problem in rldatasets.load("arithmetic", "test"):
        total = int(re.search(r" has (\d+) ", problem["question"])[1])
        for verb, number in re.findall(r"(\w+) (\d+)(?:,|\.)", problem["question"].partition(", ")[2]):
            total += -int(number) if verb in taken else int(number)
        assert problem["answer"] == str(total)


def test_arithmetic_alone_mixes_one_two_and_three_steps_evenly():
    steps = [problem["solution"].count("=") for problem in rldatasets.load("arithmetic", "test")]
    assert [steps.count(n) for n in (1, 2, 3)] == [200, 200, 200] and steps[:3] == [1, 2, 3]


def test_no_arithmetic_story_with_the_same_events_is_in_both_splits():
    def situation(problem):
        return re.sub("|".join(rldatasets.NAMES + rldatasets.THINGS), "_", problem["question"])

    train, test = ({situation(p) for p in rldatasets.load("arithmetic", split)} for split in ("train", "test"))
    assert len(train) > 2000 and len(test) > 400 and not train & test


def test_the_tiny_model_learns_from_no_question_that_it_is_tested_on():
    learnt = {messages[-1]["content"] for part in rldatasets.tiny_corpus(3000, 3000) for messages, _ in part}
    assert len(learnt) > 3000 and not learnt & {p["question"] for p in rldatasets.load("arithmetic", "test")}


def test_every_wrong_calculation_of_the_corpus_is_mended_in_the_next_line():
    for _, completion in itertools.chain(*rldatasets.tiny_corpus(2000, 2000)):
        wrong = [step for step in calculations(completion) if not holds(*step)]
        assert len(wrong) == completion.count("Wait, ") <= 1
        if wrong:
            slip, mended = re.search(r"(<<.*>>)\d+\nWait, (<<.*>>)", completion).groups()
            assert [wrong[0]] == calculations(slip) and holds(*calculations(mended)[0])


def test_the_careless_author_guesses_works_and_slips_in_the_given_shares():
    _, careless = rldatasets.tiny_corpus(0, 6000)
    kinds = [evaluator.approach(completion) for _, completion in careless]
    shares = {kind: kinds.count(kind) / 6000 for kind in ("guessed", "worked", "checked")}
    assert shares == pytest.approx({"guessed": 0.6, "worked": 0.33, "checked": 0.07}, abs=0.02)
    assert 0.57 < sum(completion.endswith("</answer>") for _, completion in careless) / 6000 < 0.63


def test_a_guess_is_nearly_always_wrong():
    right = []
    for messages, completion in rldatasets.tiny_corpus(0, 3000)[1]:
        if guess := re.search(r"That makes (\d+)\.", completion):
            start, *events = re.findall(r"(\w+) (\d+)", messages[-1]["content"])
            truth = int(start[1]) + sum(
                int(n) if v in ("buys", "finds", "wins", "gets") else -int(n) for v, n in events
            )
            right.append(int(guess[1]) == truth)
    assert len(right) > 1500 and sum(right) / len(right) < 0.1


@pytest.mark.parametrize("difficulty", [2, 3])
def test_no_knights_puzzle_is_in_both_splits_under_other_names(difficulty):
    def nameless(problem):
        numbers = {name: str(number) for number, name in enumerate(problem["names"])}
        return re.sub("|".join(numbers), lambda name: numbers[name[0]], problem["question"])

    train, test = (set(map(nameless, rldatasets.load(f"knights:{difficulty}", split))) for split in ("train", "test"))
    assert len(test) > 100 and not train & test


def test_an_epoch_holds_every_problem_once_and_the_next_has_another_order(tmp_path):
    path = write(tmp_path / "train.jsonl", [dict(ROWS[0], question=str(i)) for i in range(20)])
    epochs = take(path, 40, seed=0)
    assert sorted(epochs[:20]) == sorted(epochs[20:]) == sorted(map(str, range(20)))
    assert epochs[:20] != epochs[20:] != take(path, 40, seed=1)[20:]


def test_a_position_goes_on_where_the_order_was_left_over_the_end_of_an_epoch(tmp_path):
    path = write(tmp_path / "train.jsonl", [dict(ROWS[0], question=str(i)) for i in range(20)])
    assert take(path, 40, seed=3)[17:] == take(path, 23, seed=3, position=17)
    assert take(path, 60, seed=3)[45:] == take(path, 15, seed=3, position=45)


def test_gsm8k_rows_are_read_from_a_file_and_from_a_folder_of_splits(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:1])
    path = write(tmp_path / "test.jsonl", ROWS[1:])
    problems = list(rldatasets.load(str(tmp_path), "test"))
    assert problems == list(rldatasets.load(path, "test"))
    assert [problem["answer"] for problem in problems] == ["-3", "1,125"]
    assert problems[0]["solution"] == "5-8 = <<5-8=-3>>-3"
    assert all(
        evaluator.grade(rldatasets.written_out(problem), row["answer"]) for problem, row in zip(problems, ROWS[1:])
    )


# Five rows in the manner of MBPP's numbers 367, 533, 596, 601 and 927: objects of a class of the program, also in the
# setup, a type as an argument, and a module that only the program imports.
NODE = "class Node:\n    def __init__(self, data):\n        self.data = data\n        self.left = self.right = None\n"
TREE = (
    "root = Node(1)\nroot.left = Node(2)\nroot.right = Node(3)\nroot.left.left = Node(4)\nroot.left.left.left = Node(5)"
)
OBJECTS = {
    "a tree is the argument": {
        "code": NODE + "def height(root):\n    if root is None:\n        return 0\n"
        "    return max(height(root.left), height(root.right)) + 1\n"
        "def is_tree_balanced(root):\n    if root is None:\n        return True\n"
        "    return abs(height(root.left) - height(root.right)) <= 1 and is_tree_balanced(root.left)",
        "test_list": ["assert is_tree_balanced(root) == False", "assert is_tree_balanced(root.right) == True"],
        "test_setup_code": TREE,
    },
    "a type is the argument": {
        "code": "def remove(values, kind):\n    return [value for value in values if not isinstance(value, kind)]",
        "test_list": ["assert remove((4, 5, 7.7, 1.2), int) == [7.7, 1.2]", "assert remove((7, 'SR'), str) == [7]"],
    },
    "a module is used": {
        "code": "import sys\ndef tuple_size(values):\n    return sys.getsizeof(values)",
        "test_list": ["assert tuple_size(('A', 1, 'B')) == sys.getsizeof(('A', 1, 'B'))"],
    },
    "pairs are the argument": {
        "code": "class Pair(object):\n    def __init__(self, a, b):\n        self.a = a\n        self.b = b\n"
        "def longest(pairs, n):\n    best = [1] * n\n    for i in range(1, n):\n        for j in range(i):\n"
        "            if pairs[i].a > pairs[j].b:\n                best[i] = max(best[i], best[j] + 1)\n"
        "    return max(best)",
        "test_list": ["assert longest([Pair(5, 24), Pair(15, 25), Pair(27, 40), Pair(50, 60)], 4) == 3"],
    },
    "a height": {
        "code": NODE + "def max_height(node):\n    if node is None:\n        return 0\n"
        "    return max(max_height(node.left), max_height(node.right)) + 1",
        "test_list": ["assert max_height(root) == 4", "assert max_height(root.left) == 3"],
        "test_setup_code": TREE,
    },
}


@pytest.mark.skipif(evaluator.sandbox_problem() is not None, reason=str(evaluator.sandbox_problem()))
@pytest.mark.parametrize("row", OBJECTS.values(), ids=OBJECTS)
def test_a_reference_passes_whose_tests_use_its_classes_and_modules(tmp_path, row):
    problem = one(tmp_path, row | {"text": "Write it."})
    assert evaluator.run_tests(problem["answer"], problem) == (1, True)
    broken = problem["answer"].replace("return", "return None #")
    assert evaluator.run_tests(broken, problem)[0] == 0


def test_the_tests_import_what_the_reference_imports(tmp_path):
    row = MBPP | {"code": "import math as m\n" + MBPP["code"], "test_list": ["assert double(Point()) == m.floor(2.5)"]}
    assert one(tmp_path, row)["setup"] == "import math as m\nfrom math import isclose"


@pytest.mark.parametrize(
    "broken",
    [
        {"question": "?", "answer": 72},
        {"question": "?", "answer": "no mark"},
        {"question": "?"},
        {"question": "", "answer": "#### 1"},
    ],
)
def test_a_row_without_an_answer_is_named(tmp_path, broken):
    path = write(tmp_path / "train.jsonl", [ROWS[0], ROWS[1], broken, ROWS[2]])
    found = list(rldatasets.load(path, "train"))
    assert isinstance(found[2], rldatasets.DataError) and f"{path}, train split, row 2: it" in str(found[2])
    unreadable = []
    assert list(rldatasets.readable(found, unreadable)) == found[:2] + found[3:] and unreadable == [found[2]]


def test_a_set_is_refused_if_none_of_its_first_50_rows_can_be_read(tmp_path):
    for bad, good in ((1, 0), (50, 10), (49, 1), (70, 0)):
        path = write(tmp_path / "train.jsonl", [{"question": "?"}] * bad + ROWS[:1] * good)
        if bad == 49:
            assert len(list(rldatasets.readable(rldatasets.load(path, "train")))) == 1
            continue
        for stream in (rldatasets.load(path, "train"), rldatasets.shuffled(path, "train", 0)):
            with pytest.raises(rldatasets.DataError, match="row 0: it needs the texts question"):
                next(stream)


def test_rows_that_cannot_be_read_have_a_place_in_the_order_and_a_position_counts_them(tmp_path):
    rows = [dict(ROWS[0], question=str(i)) for i in range(20)]
    rows[3::5] = [{"question": str(i)} for i in range(3, 20, 5)]
    path = write(tmp_path / "train.jsonl", rows)
    whole = list(map(str, itertools.islice(rldatasets.shuffled(path, "train", 3), 50)))
    assert sum("cannot read" in text for text in whole[:40]) == 8
    assert whole[23:] == list(map(str, itertools.islice(rldatasets.shuffled(path, "train", 3, 23), 27)))


def test_worked_examples_are_of_rows_that_can_be_read(tmp_path):
    path = write(tmp_path / "train.jsonl", [{"question": "?"}, *ROWS])
    assert [problem["answer"] for problem in rldatasets.examples(path, 2)] == ["12", "-3"]


def test_what_cannot_be_read_is_said_in_one_line(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer"')
    (tmp_path / "empty").mkdir()
    for name in ("no-such-set", str(tmp_path / "broken.jsonl"), str(tmp_path / "empty")):
        with pytest.raises(rldatasets.DataError) as error:
            list(rldatasets.load(name, "train"))
        assert "\n" not in str(error.value) and name in str(error.value)


def test_the_prompt_asks_for_the_four_tags():
    system, user = rldatasets.prompt(ROWS[0])
    assert all(tag in system["content"] for tag in evaluator.TAGS) and user["content"] == ROWS[0]["question"]


def test_an_empty_data_set_is_refused_and_not_waited_for(tmp_path):
    for number, text in enumerate(("", "\n\n")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        with pytest.raises(rldatasets.DataError):
            next(rldatasets.shuffled(str(path), "train", 0))


def test_a_file_belongs_to_a_split_only_if_the_splits_name_is_a_word_of_its_name(tmp_path):
    for name in ("latest_train.jsonl", "gsm8k-test.jsonl"):
        write(tmp_path / name, [dict(ROWS[0], question=name)])
    assert [p["question"] for p in rldatasets.load(str(tmp_path), "test")] == ["gsm8k-test.jsonl"]
    assert [p["question"] for p in rldatasets.load(str(tmp_path), "train")] == ["latest_train.jsonl"]


def one(tmp_path, row):
    """The only problem of a file with this row."""
    (problem,) = rldatasets.load(write(tmp_path / "rows.jsonl", [row]), "test")
    return problem


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "1/4 + 1/4?", "solution": r"That is $\boxed{\frac{1}{2}}$."}, r"\boxed{\frac{1}{2}}"),
        ({"problem": "Which?", "solution": r"\boxed{\left\{ 1, 2 \right.} is it."}, r"\boxed{\left\{ 1, 2 \right.}"),
        (
            {"problem": "x²=1?", "solution": r"Thus $\boxed{1}$ or $\boxed{-1}$.", "level": "?"},
            r"\boxed{1}$ or $\boxed{-1}",
        ),
        ({"problem": "2 + 3?", "solution": "Not \\boxed{6}.\n \nSo \\boxed{5}.\n\nIndeed."}, r"\boxed{5}"),
        ({"problem": "2 + 3?", "solution": "So \\boxed{5}.\n\nThat is all."}, r"\boxed{5}"),
        ({"problem": "2 + 3?", "solution": r"So $\boxed{5}$, not $x^{2}$, for all $x^{2}$."}, r"\boxed{5}"),
        ({"problem": "2 + 3?", "solution": "\\boxed{5}.\n\nCheck: $\\frac{5}{1}$ is not $\\boxed{}$."}, r"\boxed{5}"),
        (
            {"problem": "?", "solution": "$\\boxed{\\sqrt{\\frac{1}{x^{2}}}}$.\n$x^{2}$"},
            r"\boxed{\sqrt{\frac{1}{x^{2}}}}",
        ),
        ({"problem": "2 + 3?", "solution": r"We get $\boxed 5$ at last."}, r"\boxed 5"),
        ({"problem": "2 + 3?", "solution": "It is \\boxed 5.\n\nIt is."}, r"\boxed 5"),
        ({"problem": "2 + 3?", "solution": r"We get $\fbox{5}$."}, r"\fbox{5}"),
        ({"problem": "2 + 3?", "solution": r"Not $\boxed{6}$.", "answer": "5", "subject": "Algebra"}, "5"),
        ({"id": 60, "problem": "2 + 3?", "solution": "Add.", "answer": "005", "url": "", "year": "2024"}, "005"),
        ({"problem": "2 + 3?", "answer": 5}, "5"),
        ({"query": "2 + 3?", "response": "2 + 3 = 5\n#### 5\nThe answer is: 5", "type": "GSM_Rephrased"}, "5"),
    ],
)
def test_mathematics_is_known_by_its_fields_and_its_answer_is_found(tmp_path, row, answer):
    problem = one(tmp_path, row)
    assert problem["answer"] == answer and problem["kind"] == "math"
    assert set(problem) == {"question", "answer", "kind", "solution"}
    assert problem["question"] == row.get("problem", row.get("query"))
    assert "The answer is" not in problem["solution"]


HUMANEVAL = {
    "task_id": "Mine/0",
    "prompt": 'def twice(x):\n    """ Twice x, twice(2) is 4. """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "LIMIT = 2\n\ndef check(candidate):\n    assert candidate(1) == 2\n    for x in range(LIMIT):\n        "
    "assert candidate(x) == x + x\n",
    "entry_point": "twice",
}
MBPP = {
    "text": "Write a function to double a point.",
    "code": "from math import tau\r\n\r\nclass Point:\r\n    x = 1\r\n\r\ndef unused():\r\n    pass\r\n\r\n"
    "def double(p):\r\n    return 2 * p.x",
    "test_list": ["assert double(Point()) == 2", "assert isclose(double(Point()), 2)"],
    "test_setup_code": "from math import isclose",
}


def passes(problem):
    """Does the reference pass the tests of its problem?"""
    lines = [problem["setup"], problem["answer"], *problem["tests"], "print('done')"]
    return (
        subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False, capture_output=True).stdout == b"done\n"
    )


def test_a_humaneval_row_becomes_a_program_that_passes_its_tests(tmp_path):
    problem = one(tmp_path, HUMANEVAL)
    assert problem["kind"] == "program" and problem["functions"] == ["twice"]
    assert problem["prelude"] == HUMANEVAL["prompt"] and HUMANEVAL["prompt"] in problem["question"]
    assert problem["setup"].startswith(problem["prelude"]) and "LIMIT = 2" in problem["setup"]
    assert problem["tests"][:2] == ["candidate = twice", "assert candidate(1) == 2"]
    assert len(problem["tests"]) == 3 and passes(problem)
    answer = evaluator.extract_answer(rldatasets.written_out(problem))
    assert answer == (HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]).strip()


def test_a_description_is_the_first_field_that_is_a_text(tmp_path):
    assert one(tmp_path, MBPP | {"prompt": None}) == one(tmp_path, MBPP)
    assert one(tmp_path, MBPP | {"prompt": MBPP["text"], "text": None}) == one(tmp_path, MBPP)


def test_a_program_with_an_invalid_escape_is_read_without_a_warning(tmp_path, recwarn):
    one(tmp_path, MBPP | {"code": MBPP["code"] + "\ntext = '\\d'"})
    assert not recwarn.list


def test_the_tests_import_of_the_reference_only_what_they_use(tmp_path):
    code = "import numpy as np\nimport sys, os.path\ndef double(x): return 2 * x"
    row = MBPP | {"code": code, "test_list": ["assert double(1) == 2 < sys.maxsize"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    setup = next(iter(rldatasets.load(str(tmp_path / "rows.jsonl"), "train")))["setup"]
    assert "import sys, os.path" in setup and "numpy" not in setup
    row = MBPP | {"test_imports": ["from math import *"], "test_list": ["assert double(floor(1.5)) == 2"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert next(iter(rldatasets.load(str(tmp_path / "rows.jsonl"), "train")))["kind"] == "program"


def test_an_mbpp_row_becomes_a_program_whose_question_shows_the_tests(tmp_path):
    problem = one(tmp_path, MBPP)
    assert problem["kind"] == "program" and problem["functions"] == ["Point", "double"] and problem["prelude"] == ""
    assert problem["question"].startswith(MBPP["text"]) and all(
        test in problem["question"] for test in MBPP["test_list"]
    )
    assert passes(problem)
    sanitized = {"prompt" if field == "text" else field: value for field, value in MBPP.items()}
    del sanitized["test_setup_code"]
    again = one(tmp_path, sanitized | {"test_imports": ["from math import isclose"]})
    assert passes(again) and again["question"] == problem["question"]


@pytest.mark.parametrize(
    "broken",
    [
        {"problem": "?", "solution": "no box"},
        {"problem": "?", "solution": r"\boxed{1"},
        {"problem": "?", "solution": r"\boxed{}"},
        {"problem": "", "solution": r"\boxed{1}"},
        {"problem": "?", "solution": 1, "answer": "1"},
        {"problem": "?", "answer": " "},
        {"problem": "?", "answer": math.nan},
        {"problem": "?", "answer": ["1"]},
        {"problem": "?"},
        {"query": "?", "response": "5"},
        {"query": "?", "response": "The answer is: "},
        {},
        ["question", "answer"],
        None,
        HUMANEVAL | {"test": "def check(candidate: pass"},
        HUMANEVAL | {"test": "assert True"},
        HUMANEVAL | {"test": 3},
        HUMANEVAL | {"canonical_solution": ")"},
        HUMANEVAL | {"entry_point": "thrice"},
        MBPP | {"test_list": []},
        MBPP | {"test_list": [3]},
        MBPP | {"test_list": "assert double(1)"},
        MBPP | {"test_list": ["assert undefined(1)"]},
        MBPP | {"test_list": ["assert double(Point()) == undefined"]},
        MBPP | {"test_imports": 3},
        MBPP | {"code": "\0"},
        MBPP | {"code": "-" * 50_000 + "1"},
    ],
)
def test_a_row_without_what_its_kind_needs_is_named_in_one_line(tmp_path, broken):
    path = write(tmp_path / "train.jsonl", [ROWS[0], broken])
    error = list(rldatasets.load(path, "train"))[1]
    assert isinstance(error, rldatasets.DataError) and re.search("train split, row 1: .", str(error))
    assert "\n" not in str(error) and path in str(error)


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=2))
    lines = write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    expected = list(rldatasets.load(lines, "test"))
    assert [problem["answer"] for problem in expected] == ["12", "-3", "1,125"]
    for ending in ("parquet", "csv", "json", "jsonl.gz"):
        assert list(rldatasets.load(str(tmp_path / f"rows.{ending}"), "test")) == expected


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz"])
def test_a_file_can_begin_with_a_byte_order_mark(tmp_path, ending):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    texts = {"json": json.dumps(ROWS, indent=2), "csv": "question,answer\nHow many?,So many. #### 12\n"}
    content = texts.get(ending, text).encode("utf-8-sig")
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert next(iter(rldatasets.load(str(path), "train")))["answer"] == "12"


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_line_that_is_not_json_is_named_by_its_file_and_row(tmp_path, bad):
    lines = [json.dumps(row) for row in ROWS]
    lines[bad] = '{"question": "How many?", "answer" "#### 12"}'
    (tmp_path / "train.jsonl").write_text("\n\n".join(lines))
    for name in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(rldatasets.DataError, match=f'row {bad}: .*train.jsonl.* "answer" \'') as error:
            list(rldatasets.load(str(name), "train"))
        assert "\n" not in str(error.value)


def test_numbers_in_data_files_are_what_stands_there(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"problem": "?", "answer": 2.5}\n{"problem": "?", "answer": -3}\n')
    assert [row["answer"] for row in rldatasets.load(str(tmp_path / "train.jsonl"), "train")] == ["2.5", "-3"]
    (tmp_path / "rows.csv").write_text('problem,answer\n?,2\n?,2.5\n?,07\n"1,\n2?",NA\n?,2020-01-01\n')
    problems = list(rldatasets.load(str(tmp_path / "rows.csv"), "train"))
    assert [row["answer"] for row in problems] == ["2", "2.5", "07", "NA", "2020-01-01"]
    assert problems[3]["question"] == "1,\n2?"


def test_a_remark_after_the_line_of_the_answer_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?", "answer": "6*7=42\n#### 42\nSee step 3."}))
    problem = next(iter(rldatasets.load(str(tmp_path / "rows.jsonl"), "train")))
    assert (problem["answer"], problem["solution"]) == ("42", "6*7=42")


def test_a_list_of_rows_can_be_on_one_line_or_on_several(tmp_path):
    first, second, third = map(json.dumps, ROWS)
    for text in (
        f"[{first}, {second}, {third}]",
        f"[{first},\n{second},\n{third}]",
        f"[{first}\n, {second}, {third}\n]",
    ):
        (tmp_path / "rows.json").write_text(text)
        assert len(list(rldatasets.load(str(tmp_path / "rows.json"), "train"))) == 3


@pytest.mark.parametrize("start", ["\n", " \n\n"])
def test_blank_lines_before_the_first_row_are_left_out(tmp_path, start):
    for name, text in (("rows.jsonl", "\n".join(map(json.dumps, ROWS))), ("rows.json", json.dumps(ROWS, indent=2))):
        (tmp_path / name).write_text(start + text)
        assert len(list(rldatasets.load(str(tmp_path / name), "test"))) == 3


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_the_folder_of_a_split_can_hold_any_kind_of_file(tmp_path, ending):
    import datasets

    (tmp_path / "train" / "part").mkdir(parents=True)
    path = tmp_path / "train" / "part" / f"x.{ending}"
    if ending in ("csv", "parquet"):
        getattr(datasets.Dataset.from_list(ROWS), f"to_{ending}")(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        path.write_bytes(gzip.compress(text.encode()) if ending == "jsonl.gz" else text.encode())
    (tmp_path / "train" / "README.md").write_text("# rows")
    assert [problem["answer"] for problem in rldatasets.load(str(tmp_path), "train")] == ["12", "-3", "1,125"]
    with pytest.raises(rldatasets.DataError, match="its path must name the split 'test'"):
        list(rldatasets.load(str(tmp_path), "test"))


@pytest.mark.parametrize("ending", ["json", "json.gz", "parquet", "csv.gz"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(ending):
    with pytest.raises(rldatasets.DataError, match="unknown data set"):
        rldatasets.load(f"owner/x.{ending}", "train")


def test_maths_own_folder_is_read_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        file = tmp_path / "train" / "algebra" / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"problem": "?", "solution": rf"\boxed{{{number}}}", "level": "?"}, indent=4))
    assert [problem["answer"] for problem in rldatasets.load(str(tmp_path), "train")] == [
        rf"\boxed{{{number}}}" for number in (1, 9, 10)
    ]
    file.write_text("{")
    for split in ("train", "test"):
        with pytest.raises(rldatasets.DataError):
            list(rldatasets.load(str(tmp_path), split))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"question\nnull\n", b"[" * 100_000 + b"\n1\n", gzip.compress(b"{}\n" * 9999, mtime=0)[:-20]],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "jsonl.gz", "txt"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, ending):
    path = tmp_path / f"train.{ending}"
    path.write_bytes(content)
    with pytest.raises(rldatasets.DataError) as error:
        list(rldatasets.load(str(path), "train"))
    assert "\n" not in str(error.value) and path.name in str(error.value)


@pytest.mark.parametrize(
    ("name", "split", "flag"),
    [("math500", "train", " --dataset"), ("aime", "train", " --dataset"), ("metamath", "test", "--eval")],
)
def test_a_set_without_a_split_says_so_at_once(name, split, flag):
    with pytest.raises(rldatasets.DataError, match=f"{name} is for .*{flag}"):
        rldatasets.load(name, split)


def test_splits_that_the_hub_does_not_have_are_made_of_those_it_has(monkeypatch):
    import datasets

    asked = []

    def hub(repository, configuration, split, streaming):
        asked.append((repository, split))
        if "aime" in repository:
            return [{"problem": "?", "answer": "7"}]
        return [HUMANEVAL | {"prompt": f"# {number}\n{HUMANEVAL['prompt']}"} for number in range(10)]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    train, test = ([p["prelude"][:3] for p in rldatasets.load("humaneval", split)] for split in ("train", "test"))
    assert test == ["# 0", "# 5"] and train == [f"# {number}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert len(list(rldatasets.load("aime", "test"))) == 1 and asked[-1] == ("HuggingFaceH4/aime_2024", "train")
    assert list(rldatasets.load("mine/aime", "train")) and asked[-1] == ("mine/aime", "train")


def test_a_data_set_is_added_with_one_line(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **_: calls.append(where) or ROWS)
    counting = itertools.count()
    makes = lambda rng, difficulty: (number := next(counting), {"question": f"{difficulty}: {number}"})
    makes.__name__ = "counts"
    monkeypatch.setitem(rldatasets.GENERATED, "made", ([makes], [4]))
    monkeypatch.setitem(rldatasets.DATASETS, "read", {"hub": "me/mine", "splits": {"train": "train"}})
    assert len(list(rldatasets.load("made", "test"))) == 200 and rldatasets.stages("made:5:6") == [("made:5", 6)]
    assert next(rldatasets.load("made:2", "train")).items() >= {"kind": "counts"}.items()
    assert [p["answer"] for p in rldatasets.load("read", "train")] == ["12", "-3", "1,125"]
    assert calls == [("me/mine", None)]
    with pytest.raises(rldatasets.DataError, match="read is for training only"):
        rldatasets.load("read", "test")
    with pytest.raises(rldatasets.DataError, match="poker is none of .*, read, .*, made"):
        rldatasets.load("poker", "test")


def test_a_maker_that_cannot_fill_its_split_is_named_and_not_waited_for():
    def too_few(rng, difficulty):
        number = rng.randrange(40)
        return number, {"question": str(number)}

    def one_split(rng, difficulty):
        return "a", {"question": str(rng.random())}  # the key "a" is for training

    found = []
    with pytest.raises(rldatasets.DataError, match="^too_few:4, test split: no new problem found in 10000 tries$"):
        for problem in rldatasets.generated([too_few], [4], "test"):
            found.append(int(problem["question"]))
    assert sorted(found) == [number for number in range(40) if zlib.crc32(str(number).encode()) % 5 == 0]
    assert len(list(rldatasets.generated([one_split], [1], "train"))) == 1000
    with pytest.raises(rldatasets.DataError, match="^one_split:1, test split: no new problem"):
        list(rldatasets.generated([one_split], [1], "test"))


@pytest.mark.parametrize(
    "solution",
    [r"\boxed{" * 20_000, "{" * 50_000 + "}" * 50_000, r"\boxed{" * 9999 + "5" + "}" * 9999, r"\boxed " * 20_000],
)
def test_no_solution_takes_long_to_search_for_boxes(tmp_path, solution):
    start = time.process_time()
    for paragraph in (solution, f"{solution}\n\n", rf"{solution}\boxed{{7}}"):
        rldatasets.boxes(paragraph)
    assert time.process_time() - start < 1


def test_boxes_can_be_as_deep_as_they_like():
    deep = "{" * 50 + "7" + "}" * 50
    assert rldatasets.boxes(rf"a \boxed{deep} or \boxed 8.") == rf"\boxed{deep} or \boxed 8"
    assert rldatasets.boxes(r"\boxed{1 or \boxed{2} or \boxed{\}}") == r"\boxed{2} or \boxed{\}}"


# ---- logic puzzles: solved again from their English, by other means than the generator's -----------------------------

SAYINGS = [  # what is said, and what it says of the roles: {name: True for a knight}
    (r"([A-Z]\w+) is a knight", lambda roles, me, a: roles[a]),
    (r"([A-Z]\w+) is a knave", lambda roles, me, a: not roles[a]),
    (r"([A-Z]\w+) and I are of the same kind", lambda roles, me, a: roles[a] is roles[me]),
    (r"([A-Z]\w+) and I are of different kinds", lambda roles, me, a: roles[a] is not roles[me]),
    (
        r"The number of knights among us is exactly (\d)",
        lambda roles, me, k: list(roles.values()).count(True) == int(k),
    ),
    (
        r"The number of knights among us is at least (\d)",
        lambda roles, me, k: list(roles.values()).count(True) >= int(k),
    ),
    (
        r"The number of knaves among us is at least (\d)",
        lambda roles, me, k: list(roles.values()).count(False) >= int(k),
    ),
    (r"([A-Z]\w+) and ([A-Z]\w+) are of the same kind", lambda roles, me, a, b: roles[a] is roles[b]),
    (r"([A-Z]\w+) and ([A-Z]\w+) are of different kinds", lambda roles, me, a, b: roles[a] is not roles[b]),
    (
        r"If ([A-Z]\w+) is a knight, then ([A-Z]\w+) is a knave",
        lambda roles, me, a, b: not roles[b] if roles[a] else True,
    ),
    (r"At least one of ([A-Z]\w+) and ([A-Z]\w+) is a knight", lambda roles, me, a, b: any([roles[a], roles[b]])),
    (
        r"([A-Z]\w+) is a knight and ([A-Z]\w+) is a knave",
        lambda roles, me, a, b: [roles[a], roles[b]] == [True, False],
    ),
    (r"If ([A-Z]\w+) is a knight, then so is ([A-Z]\w+)", lambda roles, me, a, b: roles[b] if roles[a] else True),
]
CLUES = [  # what is told, and what it says of the list of names from first to last
    (r"([A-Z]\w+) came in place (\d)", lambda line, a, k: line[int(k) - 1] == a),
    (r"([A-Z]\w+) did not come in place (\d)", lambda line, a, k: line[int(k) - 1] != a),
    (r"([A-Z]\w+) came directly before ([A-Z]\w+)", lambda line, a, b: (a, b) in itertools.pairwise(line)),
    (r"([A-Z]\w+) came before ([A-Z]\w+)", lambda line, a, b: b in line[line.index(a) :]),
    (
        r"([A-Z]\w+) and ([A-Z]\w+) came one directly after the other",
        lambda line, a, b: {a, b} in map(set, itertools.pairwise(line)),
    ),
    (
        r"([A-Z]\w+) and ([A-Z]\w+) did not come one directly after the other",
        lambda line, a, b: {a, b} not in map(set, itertools.pairwise(line)),
    ),
    (r"Exactly (\d) came between ([A-Z]\w+) and ([A-Z]\w+)", lambda line, k, a, b: len(between(line, a, b)) == int(k)),
    (
        r"([A-Z]\w+) came at least (\d) places before ([A-Z]\w+)",
        lambda line, a, k, b: b in line[line.index(a) + int(k) :],
    ),
]


def between(line, a, b):
    first, last = sorted([line.index(a), line.index(b)])
    return line[first + 1 : last]


def understood(sentence, forms):
    """The meaning of a sentence, as a function of a world."""
    ((mean, words),) = [(mean, m.groups()) for form, mean in forms if (m := re.fullmatch(form, sentence))]
    return lambda world, *me: mean(world, *me, *words)


def knights_solutions(problem):
    """Every assignment that a knights puzzle allows, in the form of its answer."""
    said = re.findall(r'(\w+) says: "([^"]+)"', problem["question"])
    names = [name for name, _ in said]
    assert names == problem["names"] and len(set(names)) == len(names)
    meanings = [(name, understood(sentence, SAYINGS)) for name, sentence in said]
    worlds = [dict(zip(names, world)) for world in itertools.product([True, False], repeat=len(names))]
    found = [roles for roles in worlds if all(mean(roles, me) is roles[me] for me, mean in meanings)]
    return [", ".join(f"{name}: {'knight' if role else 'knave'}" for name, role in roles.items()) for roles in found]


def order_solutions(problem):
    """Every order that an order puzzle allows, in the form of its answer: places filled in turn, clues asked of all."""
    told, middle, _ = problem["question"].partition(" In which order")
    names, _, clues = told.partition(" ran a race, and no two came together. ")
    assert middle and names.split(", ") == problem["names"]
    meanings = [understood(clue, CLUES) for clue in clues.rstrip(".").split(". ")]
    random.Random(0).shuffle(meanings)
    lines = map(list, itertools.permutations(names.split(", ")))
    return [", ".join(line) for line in lines if all(mean(line) for mean in meanings)]


@pytest.mark.parametrize("difficulty", range(1, 6))
def test_a_knights_puzzle_has_its_answer_as_the_only_solution(difficulty):
    for problem in itertools.islice(rldatasets.load(f"knights:{difficulty}", "train"), 300):
        assert knights_solutions(problem) == [problem["answer"]]
        assert len(problem["names"]) == difficulty + 1


@pytest.mark.parametrize("difficulty", range(1, 6))
def test_an_order_puzzle_has_its_answer_as_the_only_solution_and_needs_every_clue(difficulty):
    for number, problem in enumerate(itertools.islice(rldatasets.load(f"order:{difficulty}", "train"), 150)):
        assert order_solutions(problem) == [problem["answer"]]
        assert len(problem["names"]) == difficulty + 2 and len(problem["question"]) < 1100
        if number < 5:
            told, middle, rest = problem["question"].partition(" In which")
            story, _, clues = told.partition("together. ")
            clues = clues.rstrip(".").split(". ")
            for spare in clues:
                left = ". ".join(clue for clue in clues if clue != spare)
                if left:
                    shorter = problem | {"question": f"{story}together. {left}.{middle}{rest}"}
                    assert len(order_solutions(shorter)) > 1


def worth(node, used):
    """The value of a parsed calculation; the numbers in it are added to `used`."""
    if isinstance(node, ast.Constant):
        used.append(node.value)
        return node.value
    left, right = worth(node.left, used), worth(node.right, used)
    if isinstance(node.op, ast.Div):
        assert left % right == 0
        return left // right
    return {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[type(node.op)](left, right)


@pytest.mark.parametrize("difficulty", range(1, 6))
def test_a_countdown_answer_reaches_the_target_with_the_numbers_given(difficulty):
    for problem in itertools.islice(rldatasets.load(f"countdown:{difficulty}", "train"), 500):
        used = []
        assert worth(ast.parse(problem["answer"], mode="eval").body, used) == problem["target"]
        assert sorted(used) == sorted(problem["numbers"]) and problem["target"] not in used
        asked = re.match(r"Reach (\d+) with the numbers ([\d, ]+), each", problem["question"]).groups()
        assert asked == (str(problem["target"]), ", ".join(map(str, problem["numbers"])))
        for step in problem["solution"].splitlines():
            calculation, _, result = step.partition(" = ")
            assert worth(ast.parse(calculation, mode="eval").body, []) == int(result)


def test_the_solution_of_a_puzzle_says_only_what_is_true():
    for problem in rldatasets.load("knights:5", "test"):
        first, *steps, last = problem["solution"].splitlines()
        assert first == f"Try {problem['answer']}." and last.startswith("Nothing else")
        roles = {name: kind == "knight" for name, kind in (pair.split(": ") for pair in problem["answer"].split(", "))}
        for step in steps:
            name, kind, said, truth = re.fullmatch(r'(\w+) is a (\w+), and "(.*)" is (True|False)\.', step).groups()
            assert (kind == "knight") is roles[name] is (truth == "True") is understood(said, SAYINGS)(roles, name)
    for problem in rldatasets.load("order:5", "test"):
        first, *steps, last = problem["solution"].splitlines()
        assert first == f"Try {problem['answer']}." and last.startswith("No other order")
        for step in steps:
            assert re.sub(r" \(\d\)", "", step) in problem["question"]
            for name, place in re.findall(r"(\w+) \((\d)\)", step):
                assert problem["answer"].split(", ")[int(place) - 1] == name


def nameless(problem):
    """A puzzle's question with its people numbered as they appear, and its sentences in a fixed order."""
    numbers = {}
    for name in re.findall("|".join(rldatasets.NAMES), problem["question"]):
        numbers.setdefault(name, f"P{len(numbers)}")
    question = re.sub("|".join(rldatasets.NAMES), lambda found: numbers[found[0]], problem["question"])
    listed = ",".join(sorted(re.findall(r"\d+", question)))
    return listed if problem["kind"] == "countdown" else question


@pytest.mark.parametrize("kind", ["knights", "order", "countdown"])
@pytest.mark.parametrize("difficulty", [1, 3, 5])
def test_no_puzzle_is_in_both_splits_even_under_other_names(kind, difficulty):
    train, test = (list(rldatasets.load(f"{kind}:{difficulty}", split)) for split in ("train", "test"))
    assert len(train) == len({problem["question"] for problem in train}) == 1000
    assert len(test) == len({problem["question"] for problem in test}) == 200
    assert not set(map(nameless, train)) & set(map(nameless, test))


def test_seats_and_the_order_of_clues_do_not_make_another_puzzle_either():
    def orders(split):  # a race is told by the places of those its clues name, so that names and order do not matter
        for problem in rldatasets.load("order:2", split):
            yield tuple(sorted(re.sub(r"[A-Z]\w+ \((\d)\)", r"\1", s) for s in problem["solution"].splitlines()[1:-1]))

    def sayings(split):  # who says what, with kinds in place of names
        for problem in rldatasets.load("knights:1", split):
            kinds = dict(pair.split(": ") for pair in problem["answer"].split(", "))
            said = re.findall(r'(\w+) says: ("[^"]+")', problem["question"])
            pattern = re.compile("|".join(kinds))
            yield tuple(sorted(pattern.sub(lambda m, kinds=kinds: kinds[m[0]], " ".join(pair)) for pair in said))

    for shape in (orders, sayings):
        assert not set(shape("train")) & set(shape("test"))


def test_logic_is_the_three_kinds_in_turn_and_always_the_same():
    problems = list(itertools.islice(rldatasets.load("logic:2", "train"), 9))
    assert [problem["kind"] for problem in problems] == ["knights", "order", "countdown"] * 3
    assert problems[::3] == list(itertools.islice(rldatasets.load("knights:2", "train"), 3))
    assert problems == list(itertools.islice(rldatasets.load("logic:2", "train"), 9))
    assert next(iter(rldatasets.load("logic", "train"))) == next(iter(rldatasets.load("logic:1", "train")))
    assert take("logic:2", 5, seed=4) == take("logic:2", 8, seed=4)[:5] != take("logic:2", 5, seed=5)
    assert "Zoe" not in rldatasets.NAMES and "Yan" not in rldatasets.NAMES  # the example of the question


def load_stages(spec):
    return [rldatasets.load(name, "train") for name, _ in rldatasets.stages(spec)]


@pytest.mark.parametrize("name", ["logic:0", "logic:6", "knights:", "order:x", "countdown:1:1", "logic:٣", "gsm8k:1"])
def test_a_difficulty_from_1_to_5_and_only_for_puzzles(name):
    for ask in (lambda: rldatasets.load(name, "train"), lambda: load_stages(f"{name}:5,gsm8k:5")):
        with pytest.raises(rldatasets.DataError) as error:
            ask()
        assert "\n" not in str(error.value) and name in str(error.value)


# ---- curricula -------------------------------------------------------------------------------------------------------


def test_a_curriculum_is_a_list_of_names_with_their_steps(tmp_path):
    assert rldatasets.stages("logic:1:100,logic:3:100,humaneval:200,gsm8k:400") == [
        ("logic:1", 100),
        ("logic:3", 100),
        ("humaneval", 200),
        ("gsm8k", 400),
    ]
    assert rldatasets.stages("logic:3") == [("logic:3", None)]  # its difficulty
    assert rldatasets.stages("humaneval:200") == [("humaneval", 200)]  # its steps
    assert rldatasets.stages("logic") == [("logic", None)]
    assert rldatasets.stages("arithmetic:5:7, owner/set:6") == [("arithmetic:5", 7), ("owner/set", 6)]
    path = write(tmp_path / "a,b:3.jsonl", ROWS)
    assert rldatasets.stages(path) == [(path, None)]
    assert rldatasets.stages(f"{tmp_path}:7") == [(str(tmp_path), 7)]


def test_the_example_of_stages_is_what_it_returns():
    spec, expected = re.search(r"`(\S+)` is (\[.*\])", rldatasets.stages.__doc__).groups()
    assert rldatasets.stages(spec) == ast.literal_eval(expected)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        ",",
        "poker:3",
        "logic:1:0",
        "logic:1:-1",
        "gsm8k:x",
        "gsm8k:1:2:3",
        "gsm8k,logic:1:5",
        "gsm8k:5,",
        "logic:3,gsm8k",
    ]
    + ["gsm8k,gsm8k:3", "gsm8k:²", "gsm8k:1e3", "gsm8k:" + "9" * 5000, "x" * 5000, "a\0b", "gsm8k:"],
)
def test_a_broken_curriculum_is_refused_in_one_line(spec):
    with pytest.raises(rldatasets.DataError) as error:
        load_stages(spec)
    assert "\n" not in str(error.value)


def test_half_a_character_in_a_row_is_named_like_any_mistake(tmp_path):
    (tmp_path / "rows.jsonl").write_text(r'{"question": "a \ud800 b", "answer": "x #### 2"}' + "\n")
    with pytest.raises(rldatasets.DataError, match="row 0"):
        list(rldatasets.load(str(tmp_path / "rows.jsonl"), "train"))


@pytest.mark.parametrize("spec", ["", ",", " ", "gsm8k:5,", ",gsm8k:5", ":5"])
def test_a_missing_name_is_named_as_what_is_missing(spec):
    with pytest.raises(rldatasets.DataError, match="^[^\n]*the name of a data set is missing[^\n]*$"):
        rldatasets.stages(spec)


def test_a_missing_name_among_the_test_sets_is_named_as_what_is_missing():
    with pytest.raises(rldatasets.DataError, match="^unknown data set: an empty name [^\n]*$"):
        rldatasets.load("", "test")
