"""Self-play on Nim, and what is measured of stories and dialogues."""

import functools
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import train
from reference import plain, token_logprobs
from torch.testing import assert_close

import evaluator
import llms
import main
import rldatasets
from plots import plot, report

HEAPS = [{"A": a, "B": b} for a in range(7) for b in range(7) if a + b]


def position(heaps, turn=0):
    return rldatasets.nim_position(("Ada", "Ben"), turn, heaps)


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
    for messages, completion in corpus:
        asked = messages[-1]["content"].split()
        heaps = {"A": int(asked[asked.index("has") + 1].strip(",")), "B": int(asked[asked.index("has") + 5].strip("."))}
        problem = position(heaps)
        left = evaluator.legal_moves(problem)[evaluator.extract_answer(completion)]
        assert f"A {heaps['A']}, B {heaps['B']}\nleaves A {left['A']}, B {left['B']}\n" in completion
        assert evaluator.strict_format(completion, problem)
        right.append(heaps["A"] != heaps["B"] and evaluator.right(evaluator.extract_answer(completion), problem))
    assert sum(right) / len(right) < 0.4


# ---- games ---------------------------------------------------------------------------------------------------------


def test_games_between_perfect_players_are_won_by_whom_they_must():
    problems = [position(heaps) for heaps in HEAPS]
    won = main.play(problems, [evaluator.perfect_player, evaluator.perfect_player])
    assert won == [float(can_win(*heaps.values())) for heaps in HEAPS]


def test_the_perfect_player_never_loses_a_position_that_can_be_won():
    problems = [position(heaps) for heaps in HEAPS]
    for seat in (0, 1):
        players = [evaluator.random_player, evaluator.random_player]
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
    known = ["no move", "<answer>1 from A</answer>"]  # the first moves
    assert main.play([position(one), position(two)], [None, says("pass")], known) == [0.0, 1.0]


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
    by_name = main.score(state, [position({"A": 2, "B": 0})] * 3, rollout)
    assert_close(
        by_name["correctness"], torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 3)
    )  # the second, as the other then fails
    assert_close(by_name["optimal"], torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3))
    tested = main.rule_rewards([position({"A": 2, "B": 0})] * 3, rollout)  # a test asks for the best move
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
    assert metrics["eval/wins/random"] == metrics["eval/wins/perfect"] == 0.0 and metrics["eval/wins/reference"] == 0.5
    assert metrics["eval/games"] == 2 * openings > 0
    assert f"wins against reference {report.share_of(0.5, 2 * openings)}" in report.eval_line(metrics)
    assert "eval/games" not in main.evaluate(state, list(rldatasets.load("arithmetic:1", "test"))[:2])[0]


def test_the_random_player_wins_as_often_against_itself_in_either_seat_and_loses_to_the_perfect_one():
    problems = [problem for problem in rldatasets.load("nim:5", "test") if min(problem["heaps"].values()) > 1]
    share = lambda players: sum(main.play(problems, players)) / len(problems)
    assert 0.4 < share([evaluator.random_player] * 2) < 0.6
    assert share([evaluator.perfect_player, evaluator.random_player]) > 0.95


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
    counts = evaluator.story_counts("A lamp. A lamp! One dog in exactly 2 sentences?", STORY)
    assert counts["words_used"] == 0.5 and not counts["sentences"]
    assert counts["distinct_2"] == 8 / 9  # of nine pairs of words one comes twice
    assert counts["repeated_3"] == 0.0 and counts["copied"] == 0.4  # "in exactly 2 sentences", of ten words
    assert evaluator.story_counts("a b c a b c", STORY)["repeated_3"] == 0.25  # the last of four


def test_a_model_that_repeats_itself_is_noticed():
    good, again = (evaluator.story_counts(text, STORY) for text in (GOOD, AGAIN))
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


def test_what_is_counted_can_be_rewarded(setup, constants):
    state, rollout = setup()
    by_name = main.score(state, [STORY] * 3, rollout._replace(texts=[GOOD, AGAIN, "", "x"] * 3))
    assert by_name["words_used"].tolist() == [[1.0, 0.5, 0.0, 0.0]] * 3
    assert not {"words_used", "distinct_2"} & set(evaluator.rewards(GOOD, {"answer": "1", "kind": "math"}))
    before = main.weighted_sum(by_name)
    weights = dict.fromkeys(evaluator.story_counts("", STORY), 0.0) | {"words_used": 3.0}
    constants(REWARDS=main.REWARDS | weights)
    main.check_settings()
    assert_close(main.weighted_sum(by_name) - before, torch.tensor([[3.0, 1.5, 0.0, 0.0]] * 3))


def test_fluency_is_the_mean_log_probability_under_the_reference(setup):
    state, _ = setup(EVAL_DATASET="writing", EVAL_QUESTIONS=3, MAX_NEW_TOKENS=12)
    state.reference = llms.load(state.policy.name_or_path)[0].requires_grad_(False)
    with torch.no_grad():
        next(state.reference.parameters()).mul_(1.1)
    problems = main.check_data()
    metrics, records = main.evaluate(state, problems)
    prompts = [main.prompt_ids(state.tokenizer, problem) for problem in problems]
    rollout = llms.sample(state.policy, state.tokenizer, prompts, 1, 12, 0.0)
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
    metrics = evaluator.eval_metrics(records)
    assert metrics["eval/words_used"] == 0.5 and metrics["eval/prefers_true"] == 1.0
    assert "eval/distinct_2" not in metrics
    assert "words_used 0.500 | prefers_true 1.000" in report.eval_line(metrics)
    assert metrics["eval/lenient/d"] == 1.0 and metrics["eval/lenient/w"] == 0.0
    assert "| d 0.000 | lenient/d 1.000" in report.eval_line(metrics)


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


# ---- what a careless change would break -----------------------------------------------------------------------------


def test_questions_end_with_who_moves_and_begin_with_who_began():
    second = position({"A": 3, "B": 5}, 1)["question"]
    assert "; Ada began." in second and second.endswith("What does Ben take?")


def test_the_corpus_has_every_legal_move_of_the_training_positions_and_no_test_question():
    corpus, seen = rldatasets.nim_corpus(5000), set()
    train, test = (list(rldatasets.load("nim", split)) for split in ("train", "test"))
    tested = {tuple(problem["players"]) for problem in test}
    for messages, completion in corpus:
        words = messages[-1]["content"].split()
        assert (words[0], words[2]) not in tested
        [(_, reward)] = evaluator.step_rewards(completion, {})  # one calculation, and it is right
        assert reward == 0.5
        seen.add((words[words.index("has") + 1], words[words.index("has") + 5], evaluator.extract_answer(completion)))
    legal = {(f"{p['heaps']['A']},", f"{p['heaps']['B']}.", move) for p in train for move in evaluator.legal_moves(p)}
    assert seen == legal


def test_the_random_player_answers_the_same_question_in_the_same_way():
    problems = list(rldatasets.load("nim", "test"))
    assert evaluator.random_player(problems) == evaluator.random_player(problems)


def test_the_question_of_a_story_has_its_words_and_as_many_sentences():
    for difficulty in (1, 4):
        problem = next(iter(rldatasets.load(f"writing:{difficulty}", "test")))
        words = problem["answer"].split()
        assert len(set(words)) == len(words) == difficulty + 1
        assert f"in exactly {len(words)} sentences. Use these words: {', '.join(words)}." in problem["question"]


def test_dialogues_with_the_same_last_question_differ_and_both_names_were_told():
    problems = list(itertools.islice(rldatasets.load("dialogue:1", "test"), 20))  # of 6 animals
    for problem in problems:
        told = " ".join(turn["content"] for turn in problem["turns"])
        assert all(reply.split()[-1] in told for reply in problem["replies"])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("Lamp! River?", "words_used", 1.0),
        ("lamps rivers", "words_used", 0.0),
        ("A? B!", "sentences", 1.0),
        ("Yes ... No.", "sentences", 1.0),
        ("... A. B.", "sentences", 1.0),
        ("<reasoning>\nlamp river\n</reasoning>\n<answer>\nNo.\n</answer>", "words_used", 0.0),
        ("Eva lit the lamp.\nThe river froze.", "lenient", 1.0),
    ],
)
def test_what_counts_in_a_story(text, name, value):
    assert evaluator.rewards(text, STORY)[name] == value


def test_self_play_asks_the_policy_as_in_training_for_both_sides(setup, monkeypatch):
    state, _ = setup(SEED=3, TEMPERATURE=0.7)
    state.questions, asked = 5, []

    def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, generator):
        asked.append((model, len(prompts), group_size, max_new_tokens, temperature, generator.initial_seed()))
        return SimpleNamespace(texts=["<answer>1 from A</answer>"] * len(prompts))

    monkeypatch.setattr(llms, "sample", sample)
    problems = [position({"A": 3, "B": 0}), position({"A": 2, "B": 0})]
    rollout = SimpleNamespace(texts=["<answer>1 from A</answer>"] * 2, group_size=1)
    assert main.self_play(state, problems, rollout).tolist() == [[1.0], [0.0]]
    assert asked == [(state.policy, 2, 1, 12, 0.7, 8), (state.policy, 1, 1, 12, 0.7, 8)]


def test_in_a_match_policy_and_reference_play_without_chance(setup, monkeypatch):
    state, _ = setup()
    state.reference, asked = object(), []

    def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, generator=None):
        asked.append((model, temperature))
        return SimpleNamespace(
            texts=[f"<answer>1 from {'A' if model is state.policy else 'B'}</answer>"] * len(prompts)
        )

    monkeypatch.setattr(llms, "sample", sample)
    assert main.matches(state, [position({"A": 2, "B": 3})])["eval/wins/reference"] == 0.0
    assert set(asked) == {(state.policy, 0.0), (state.reference, 0.0)}


def test_a_model_with_other_tokens_is_no_reference(checkpoint, tmp_path, monkeypatch):
    tokenizer = llms.tiny_tokenizer(["quite other texts, with other words in them"])
    folder, (model, _) = tmp_path / "other", llms.load(checkpoint("qwen2"))
    llms.save(model, tokenizer, folder)
    seen, evaluate = [], main.evaluate
    monkeypatch.setattr(main, "evaluate", lambda state, problems: seen.append(state) or evaluate(state, problems))
    arguments = ["--evaluate", checkpoint("qwen2"), "--against", str(folder), "--dataset", "writing:1"]
    assert main.main([*arguments, "--eval_questions", "2", "--max_new_tokens", "4"]) == 0
    assert seen[0].reference is None and seen[1].reference is seen[1].policy


def test_short_texts_repeat_nothing_and_words_in_quotes_count():
    assert evaluator.story_counts("x", STORY)["repeated_3"] == 0
    assert evaluator.story_counts("'lamp' “river”", STORY)["words_used"] == 1


def test_who_must_move_in_a_game_that_is_over_loses():
    over = [position({"A": 0, "B": 0})]
    assert main.play(over, [evaluator.random_player, evaluator.perfect_player]) == [0.0]


def test_fluency_does_not_depend_on_the_temperature(setup, constants):
    state, rollout = setup(TEMPERATURE=0.5)
    cold = main.mean_log_prob(state.policy, rollout)
    constants(TEMPERATURE=1.0)
    assert_close(main.mean_log_prob(state.policy, rollout), cold)


@pytest.mark.parametrize("algorithm", ["online_rft", "ppo"])
def test_other_methods_play_too(setup, algorithm):
    state, _ = setup(DATASET="nim", STEPS=1, ALGORITHM=algorithm, GROUP_SIZE=1)
    assert "rewards/optimal" in train(state)[0]


def test_a_mixed_test_measures_each_kind(setup):
    state, _ = setup(EVAL_DATASET="arithmetic:1,nim:3,writing,dialogue", EVAL_QUESTIONS=16, EVAL_SAMPLES=2)
    problems = main.check_data()
    metrics, records = main.evaluate(state, problems)
    measured = {f"eval/{name}" for name in (*evaluator.story_counts("", STORY), "fluency", "prefers_true")}
    assert measured | {"eval/games", "eval/pass@2"} <= metrics.keys() and "eval/maj@2" not in metrics
    assert all(record["prefers_true"] == 0 for record in records if record["kind"] != "dialogue")
    _, records = main.evaluate(state, problems[:4])  # arithmetic alone
    assert not {"fluency", "prefers_true"} & records[0].keys()


def test_each_reply_is_read_after_its_own_dialogue_by_the_policy(setup, monkeypatch):
    state, _ = setup(EVAL_DATASET="dialogue", EVAL_QUESTIONS=6)
    with torch.no_grad():
        next(state.reference.parameters()).mul_(-1)
    seen, read, expected = [], main.mean_log_prob, []
    monkeypatch.setattr(main, "mean_log_prob", lambda *inputs: seen.append(read(*inputs)) or seen[-1])
    problems = main.check_data()
    prompts = [main.prompt_ids(state.tokenizer, problem) for problem in problems]
    main.prefers_true(state, problems, prompts)
    for problem, prompt in zip(problems, prompts):
        for reply in problem["replies"]:
            tokens = state.tokenizer(reply)["input_ids"] + [state.tokenizer.eos_token_id]
            with torch.no_grad():
                log_pi = plain(state.policy)(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            expected.append(float(log_pi[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).mean()))
    assert seen[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_second_of_two_tested_models_is_the_reference(checkpoint, monkeypatch):
    seen, evaluate = [], main.evaluate
    monkeypatch.setattr(main, "evaluate", lambda state, problems: seen.append(state) or evaluate(state, problems))
    arguments = ["--evaluate", checkpoint("qwen2"), "--against", checkpoint("qwen3"), "--dataset", "writing:1"]
    assert main.main([*arguments, "--eval_questions", "2", "--max_new_tokens", "4"]) == 0
    assert [state.reference is seen[1].policy for state in seen] == [True, True]


def test_the_plot_of_a_run_that_played_shows_its_games(tmp_path, monkeypatch):
    wins = {f"eval/wins/{name}": 0.5 for name in ("random", "reference", "perfect")}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/accuracy": 0.5} | wins) + "\n")
    drawn = {}
    monkeypatch.setattr(plot, "line", lambda axes, key, runs, *rest, **style: drawn.update({key: runs[0]}))
    plot.draw([tmp_path], tmp_path)
    assert wins.keys() <= drawn.keys() and wins.items() <= drawn["eval/wins/reference"][0].items()


def test_the_tiny_model_that_calculates_is_for_all_that_does_not_begin_with_nim(constants, monkeypatch):
    built = []
    monkeypatch.setattr(llms, "tiny_folder", lambda runs, corpora: built.append(len(corpora)) or "folder")
    for dataset in ("arithmetic:1:5,nim:1:5", "nim:1:5,arithmetic:1:5"):
        constants(DATASET=dataset)
        main.model_folder("tiny")
    assert built == [2, 1]
