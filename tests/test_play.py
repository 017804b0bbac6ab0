"""Self-play on Nim, and what is measured of stories and dialogues."""

import functools
import itertools

import pytest
import torch
from conftest import train
from reference import plain, token_logprobs
from torch.testing import assert_close

import evaluator
import llms
import main
import rldatasets
from plots import report

HEAPS = [{"A": a, "B": b} for a in range(7) for b in range(7) if a + b]


def position(heaps, turn=0):
    return rldatasets.position(("Ada", "Ben"), turn, heaps)


def says(move):
    """A player who always gives the same answer."""
    return lambda problems: [f"<answer>{move}</answer>"] * len(problems)


@functools.cache
def can_win(a, b):
    """Can the player to move win? By trying every move, and every reply to it."""
    return any(not can_win(left, b) for left in range(a)) or any(not can_win(a, left) for left in range(b))


# ---- the rules of Nim ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heaps", HEAPS, ids=str)
def test_a_move_is_right_where_trying_everything_says_so(heaps):
    problem, moves = position(heaps), evaluator.legal_moves(position(heaps))
    assert len(moves) == sum(heaps.values()) and list(moves) == sorted(moves, key=lambda move: (move[-1], move))
    for move, left in moves.items():
        keeps = not can_win(*left.values()) or not can_win(*heaps.values())
        assert evaluator.right(move, problem) == keeps, move


@pytest.mark.parametrize(
    "answer", ["0 from A", "4 from A", "1 from C", "-1 from A", "A", "1", "1 from a", "", None, "2"]
)
def test_a_move_that_is_not_legal_is_wrong(answer):
    for heaps in ({"A": 3, "B": 5}, {"A": 3, "B": 3}):
        assert not evaluator.right(answer, position(heaps))


def test_the_question_says_the_heaps_the_rule_and_who_moves():
    first, second = position({"A": 3, "B": 5}), position({"A": 3, "B": 5}, 1)
    assert "Ada and Ben play Nim; Ada began. Heap A has 3, heap B has 5." in first["question"]
    assert "Ada takes any number" in first["question"] and "Ben takes any number" in second["question"]
    assert "Who takes the last one wins" in first["question"] and first["answer"] == "2 from B"


@pytest.mark.parametrize("difficulty", [1, 3, 5])
def test_all_positions_are_asked_and_test_questions_have_other_players(difficulty):
    train, test = (list(rldatasets.load(f"nim:{difficulty}", split)) for split in ("train", "test"))
    largest = difficulty + 2
    assert {tuple(problem["heaps"].values()) for problem in train} == set(
        itertools.product(range(largest + 1), repeat=2)
    ) - {(0, 0)}
    assert not {tuple(p["players"]) for p in train} & {tuple(p["players"]) for p in test}


def test_the_corpus_of_the_base_has_legal_moves_by_chance_in_the_form_of_the_prompt():
    corpus, right = rldatasets.nim_corpus(500), []
    problems = {problem["question"]: problem for problem in (position(h, t) for h in HEAPS for t in (0, 1))}
    for messages, completion in corpus:
        asked = messages[-1]["content"].split()
        heaps = {"A": int(asked[asked.index("has") + 1].strip(",")), "B": int(asked[asked.index("has") + 5].strip("."))}
        problem = position(heaps)
        left = evaluator.legal_moves(problem)[evaluator.extract_answer(completion)]
        assert f"A {heaps['A']}, B {heaps['B']}\nleaves A {left['A']}, B {left['B']}\n" in completion
        assert evaluator.strict_format(completion, problem)
        right.append(heaps["A"] != heaps["B"] and evaluator.right(evaluator.extract_answer(completion), problem))
    assert problems and sum(right) / len(right) < 0.4


# ---- games ---------------------------------------------------------------------------------------------------------


def test_games_between_perfect_players_are_won_by_whom_they_must():
    problems = [position(heaps) for heaps in HEAPS]
    won = main.play(problems, [evaluator.perfect_player, evaluator.perfect_player])
    assert won == [float(can_win(*heaps.values())) for heaps in HEAPS]


def test_the_perfect_player_never_loses_a_position_that_can_be_won():
    problems = [position(heaps) for heaps in HEAPS]
    for seat in (0, 1):
        players = [evaluator.chance_player, evaluator.chance_player]
        players[seat] = evaluator.perfect_player
        won = main.play(problems, players)  # by who moves first
        safe = [can_win(*heaps.values()) == (seat == 0) for heaps in HEAPS]
        assert all(game == (seat == 0) for game, is_safe in zip(won, safe) if is_safe)


def test_a_game_counts_whose_move_it_is_and_an_illegal_move_loses():
    one, two = {"A": 1, "B": 0}, {"A": 1, "B": 1}
    games = lambda *players: main.play([position(one), position(two)], list(players))
    assert games(says("1 from A"), says("1 from B")) == [1.0, 0.0]  # the last one is taken; the other takes the last
    assert games(says("1 from B"), says("1 from A")) == [0.0, 0.0]  # illegal; then the other takes the last
    assert games(says("1 from A"), says("1 from A")) == [1.0, 1.0]  # in the second game the other's move is illegal
    assert games(says("pass"), says("pass")) == [0.0, 0.0]
    assert main.play(
        [position(one), position(two)], [None, says("pass")], ["no move", "<answer>1 from A</answer>"]
    ) == [
        0.0,
        1.0,
    ]


def test_each_turn_asks_the_player_whose_turn_it_is_about_the_games_that_go_on():
    asked = []

    def player(name, move, problems):
        asked.append((name, [(problem["players"][problem["turn"]], problem["heaps"]) for problem in problems]))
        return [f"<answer>{move}</answer>"] * len(problems)

    problems = [position({"A": 3, "B": 0}), position({"A": 1, "B": 0}, 1)]
    main.play(
        problems, [functools.partial(player, "first", "1 from A"), functools.partial(player, "second", "1 from A")]
    )
    assert asked == [
        ("first", [("Ada", {"A": 3, "B": 0}), ("Ben", {"A": 1, "B": 0})]),
        ("second", [("Ben", {"A": 2, "B": 0})]),
        ("first", [("Ada", {"A": 1, "B": 0})]),
    ]
    assert problems == [position({"A": 3, "B": 0}), position({"A": 1, "B": 0}, 1)]


def test_in_training_a_move_is_right_if_the_game_is_won_when_the_policy_plays_on(setup):
    state, rollout = setup(GROUP_SIZE=4)  # a random model, whose moves are all illegal
    texts = ["2 from A", "1 from A", "3 from A", "1 from B"]
    rollout = rollout._replace(texts=[f"<answer>{move}</answer>" for move in texts] * 3)
    by_name = main.score_outputs(rollout, [position({"A": 2, "B": 0})] * 3, state)
    assert_close(
        by_name["correctness"], torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 3)
    )  # the second, as the other then fails
    assert_close(by_name["optimal"], torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3))
    tested = main.score_outputs(rollout, [position({"A": 2, "B": 0})] * 3)  # a test asks for the best move
    assert_close(tested["correctness"], by_name["optimal"])


def test_a_step_of_self_play_learns_from_the_games_and_draws_from_its_own_random_numbers(setup):
    state, _ = setup(DATASET="nim", STEPS=2)
    rows, numbers = train(state), state.generator.get_state()
    assert all({"rewards/optimal", "rewards/correctness"} <= set(row) for row in rows)
    state, _ = setup(DATASET="arithmetic", STEPS=2)
    train(state)
    assert torch.equal(numbers, state.generator.get_state())


def test_an_evaluation_plays_in_both_seats_against_all_opponents(setup):
    state, _ = setup(DATASET="nim", EVAL_QUESTIONS=12)  # a random model loses by its first move, whoever begins
    problems = main.check_data()
    state.reference = llms.frozen_copy(state.policy)
    metrics, _ = main.evaluate(state, problems)
    openings = sum(min(problem["heaps"].values()) > 1 for problem in problems)
    assert metrics["eval/wins/random"] == metrics["eval/wins/perfect"] == 0.0 and metrics["eval/wins/base"] == 0.5
    assert metrics["eval/games"] == 2 * openings > 0
    assert f"wins against base 0.500 ± {report.wilson(0.5, 2 * openings):.3f}" in report.eval_line(metrics)
    assert "eval/games" not in main.evaluate(state, list(rldatasets.load("arithmetic:1", "test"))[:2])[0]


def test_the_random_player_wins_as_often_against_itself_in_either_seat_and_loses_to_the_perfect_one():
    problems = [problem for problem in rldatasets.load("nim:5", "test") if min(problem["heaps"].values()) > 1]
    share = lambda players: sum(main.play(problems, players)) / len(problems)
    assert 0.4 < share([evaluator.chance_player] * 2) < 0.6
    assert share([evaluator.perfect_player, evaluator.chance_player]) > 0.95


def test_the_tiny_model_that_plays_nim_is_another_than_the_one_that_calculates(constants, monkeypatch):
    built = []
    monkeypatch.setattr(llms, "tiny_folder", lambda runs, corpora: built.append(corpora) or "folder")
    for dataset in ("arithmetic", "nim:2"):
        constants(DATASET=dataset)
        assert main.model_folder("tiny") == "folder"
    assert [len(corpora) for corpora in built] == [2, 1] and "play Nim" in built[1][0][0][0][-1]["content"]


# ---- stories -------------------------------------------------------------------------------------------------------

STORY = {
    "kind": "writing", "question": "Write a story about Eva in exactly 2 sentences. Use these words: lamp, river.",
    "answer": "lamp river",
}  # fmt: skip
GOOD = "Eva lit the lamp before dark. Down by the river her brother saw it, and came home."
AGAIN = "Eva lit the lamp. " * 12


def test_what_is_counted_of_a_story():
    counts = evaluator.of_writing("A lamp. A lamp! One dog in exactly 2 sentences?", STORY)
    assert counts["words_used"] == 0.5 and not counts["sentences"]
    assert counts["distinct_2"] == 8 / 9  # of nine pairs of words one comes twice
    assert counts["repeated_3"] == 0.0 and counts["copied"] == 0.4  # "in exactly 2 sentences", of ten words
    assert evaluator.of_writing("a b c a b c", STORY)["repeated_3"] == 0.25  # the last of four


def test_a_model_that_repeats_itself_is_noticed():
    good, again = (evaluator.of_writing(text, STORY) for text in (GOOD, AGAIN))
    assert good["distinct_2"] > 0.95 and again["distinct_2"] < 0.1
    assert good["repeated_3"] == 0 and again["repeated_3"] > 0.9
    assert again["compression"] < 0.2 < good["compression"]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (GOOD, True),
        (GOOD.replace("lamp", "light"), False),
        (GOOD + " The end.", False),
        ("lamp river", False),
        ("", False),
    ],
)
def test_a_story_is_right_with_all_words_and_as_many_sentences(text, right):
    assert (
        evaluator.rewards(f"<reasoning>\nx\n</reasoning>\n<answer>\n{text}\n</answer>", STORY)["correctness"] == right
    )
    assert evaluator.rewards(text, STORY)["lenient"] == right  # a story without the tags is still a story


def test_what_is_counted_can_be_rewarded_and_stands_in_the_records(setup, constants):
    state, rollout = setup()
    by_name = main.score_outputs(rollout._replace(texts=[GOOD, AGAIN, "", "x"] * 3), [STORY] * 3, state)
    assert by_name["words_used"].tolist() == [[1.0, 0.5, 0.0, 0.0]] * 3
    assert not {"words_used", "distinct_2"} & set(evaluator.rewards(GOOD, {"answer": "1", "kind": "math"}))


def test_fluency_is_the_mean_log_probability_under_the_reference(setup):
    state, _ = setup(EVAL_DATASET="writing", EVAL_QUESTIONS=3, MAX_NEW_TOKENS=12)
    state.reference = llms.load(state.policy.name_or_path)[0].requires_grad_(False)
    with torch.no_grad():
        next(state.reference.parameters()).mul_(1.1)
    problems = main.check_data()
    metrics, records = main.evaluate(state, problems)
    rollout = main.sample(state, state.policy, [main.prompt_ids(state.tokenizer, p) for p in problems], 1, 0.0)
    logp = token_logprobs(plain(state.reference), *rollout[:3], 1.0)  # [3, T]
    expected = [float(logp[i, : int(n)].mean()) for i, n in enumerate(rollout.mask.sum(1))]
    assert [record["fluency"] for record in records] == pytest.approx(expected, abs=1e-4)
    assert metrics["eval/fluency"] == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert "eval/fluency" not in main.evaluate(main.State(state.policy, state.tokenizer), problems)[0]


def test_in_a_mixed_test_each_measure_is_the_mean_over_its_own_kind():
    record = {"correctness": 0.0, "lenient": 0.0, "strict_format": 0.0, "length": 9, "truncated": 0.0}
    record |= {"approach": "guessed", "num_steps": 0, "reflection": 0}
    records = [
        record | {"task": "a", "kind": "math", "words_used": 0.0, "prefers_true": 0.0},
        record | {"task": "w", "kind": "writing", "words_used": 0.5, "prefers_true": 0.0},
        record | {"task": "d", "kind": "dialogue", "words_used": 0.0, "prefers_true": 1.0, "lenient": 1.0},
    ]
    metrics = report.eval_metrics(records)
    assert metrics["eval/words_used"] == 0.5 and metrics["eval/prefers_true"] == 1.0
    assert "eval/distinct_2" not in metrics
    assert "words_used 0.500 | prefers_true 1.000" in report.eval_line(metrics)
    assert metrics["eval/lenient/d"] == 1.0 and metrics["eval/lenient/w"] == 0.0
    assert "| d 0.000 | lenient d 1.000" in report.eval_line(metrics)


# ---- dialogues -----------------------------------------------------------------------------------------------------


def test_a_fact_is_told_and_asked_back_after_as_many_turns_as_the_difficulty_says():
    for difficulty in (1, 4):
        problem = next(iter(rldatasets.load(f"dialogue:{difficulty}", "test")))
        system, *turns, question = rldatasets.prompt(problem)
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (difficulty + 1)
        animal = question["content"].removeprefix("What is my ").removesuffix(" called?")
        assert turns[0]["content"] == f"My {animal} is called {problem['answer']}."
        assert question["role"] == "user" and system["role"] == "system"
        true, false = problem["replies"]
        assert problem["answer"] in true and problem["answer"] not in false and animal in true and animal in false


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Rex", True),
        ("Your dog is called Rex.", True),
        ("It is Milo.", False),
        ("Rex or Milo", False),
        ("a dog", False),
    ],
)
def test_a_dialogue_is_remembered_if_the_fact_is_named_and_no_other(answer, right):
    turns = [{"role": "user", "content": f"My {pet}."} for pet in ("dog is called Rex", "cat is called Milo")]
    problem = {"kind": "dialogue", "question": "?", "answer": "Rex", "turns": [turns[0], {}, turns[1], {}]}
    assert evaluator.right(answer, problem) == right


def test_a_model_prefers_the_reply_that_is_likelier_per_token(setup):
    state, _ = setup(EVAL_DATASET="dialogue", EVAL_QUESTIONS=6)
    problems = main.check_data()
    _, records = main.evaluate(state, problems)
    model, expected = plain(state.policy), []
    for problem in problems:
        prompt, means = main.prompt_ids(state.tokenizer, problem), []
        for reply in problem["replies"]:
            tokens = state.tokenizer(reply)["input_ids"] + [state.tokenizer.eos_token_id]
            with torch.no_grad():
                log_pi = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            means.append(float(log_pi.gather(1, torch.tensor(tokens)[:, None]).mean()))
        expected.append(float(means[0] > means[1]))
    assert 0 < sum(expected) < 6 and [record["prefers_true"] for record in records] == expected
