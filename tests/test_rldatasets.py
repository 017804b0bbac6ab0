"""The questions of rldatasets.py: splits, order, rows."""

import itertools
import json
import re

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


def test_every_arithmetic_solution_is_in_gsm8k_format_and_true():
    for problem in itertools.chain(rldatasets.load("arithmetic", "train"), rldatasets.load("arithmetic", "test")):
        left, operation, right, result = re.search(r"<<(\d+)([-+*])(\d+)=(\d+)>>\4 ", problem["solution"]).groups()
        assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[
            operation
        ] == int(result)
        assert problem["answer"] == result


def test_no_arithmetic_story_with_the_same_numbers_is_in_both_splits():
    def situation(problem):
        return re.sub("|".join(rldatasets.NAMES + rldatasets.THINGS), "_", problem["question"])

    train, test = ({situation(p) for p in rldatasets.load("arithmetic", split)} for split in ("train", "test"))
    assert len(train) > 300 and len(test) > 80 and not train & test


def test_the_messy_corpus_calculates_right_and_is_right_one_time_in_three():
    corpus = [(m, c) for m, c in rldatasets.messy_corpus(6000) if m[-1]["content"] != "Practise."]
    truths = {}
    for _, operation, _, _ in rldatasets.STORIES:
        truths[operation] = truths.get(operation, 0) + 1
    right = 0
    for messages, completion in corpus:
        left, sign, other, result = re.search(r"<<(\d+)([-+*])(\d+)=(\d+)>>", completion).groups()
        assert rldatasets.OPERATIONS[sign](int(left), int(other)) == int(result)
        question = messages[-1]["content"]
        story = next(
            s for s in rldatasets.STORIES if re.fullmatch(re.sub(r"\\{\w+\\}", r"[\\w]+", re.escape(s[0])), question)
        )
        gold = rldatasets.OPERATIONS[story[1]](int(left), int(other))
        right += evaluator.grade(completion, str(gold))
    assert 0.3 < right / len(corpus) < 0.45


def test_an_epoch_holds_every_problem_once_and_the_next_has_another_order(tmp_path):
    path = write(tmp_path / "train.jsonl", [dict(ROWS[0], question=str(i)) for i in range(20)])
    epochs = take(path, 40, seed=0)
    assert sorted(epochs[:20]) == sorted(epochs[20:]) == sorted(map(str, range(20)))
    assert epochs[:20] != epochs[20:] != take(path, 40, seed=1)[20:]


def test_a_position_goes_on_where_the_order_was_left_over_the_end_of_an_epoch(tmp_path):
    path = write(tmp_path / "train.jsonl", [dict(ROWS[0], question=str(i)) for i in range(20)])
    assert take(path, 40, seed=3)[17:] == take(path, 23, seed=3, position=17)


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
    path = write(tmp_path / "train.jsonl", [ROWS[0], ROWS[1], broken])
    with pytest.raises(rldatasets.DataError, match="row 2"):
        list(rldatasets.load(path, "train"))


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
