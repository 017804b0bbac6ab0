"""The problems: where they come from, the prompt for each, and in which order they come.

A problem is a plain dict:

    question  the text that is asked
    answer    the right answer; for a program, a reference program
    solution  a worked solution, or ""
    kind      how an answer is graded

and what its kind needs besides, such as the tests of a program. Nothing here knows about tokens, tensors, rewards or
the group size. These functions are called from outside:

    prompt, written_out             a problem as chat messages, its solution as a completion
    load, shuffled                  the problems of a data set in the order of its file; or each epoch in a new order
    readable                        such a stream without the rows that cannot be read
    examples, stages                worked examples for the prompt, the stages of a curriculum
    tiny_corpus, nim_corpus         what the tiny model learns before reinforcement learning
    nim_position                    a position of a game of Nim as a problem

To add a data set whose columns are among the FORMATS, add one line to DATASETS.
"""
# Words are easier to read without quotes.
# ruff: noqa: SIM905

import ast
import builtins
import csv
import functools
import gzip
import itertools
import json
import logging
import operator
import os
import random
import re
import symtable
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy

SYSTEM_PROMPT = "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"


class DataError(ValueError):
    """A data set cannot be found or read. The message is one line for the user."""


def prompt(problem, examples=()):
    """The chat messages that ask a question: worked examples come first, then the problem's own earlier turns."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for example in examples:
        messages.append({"role": "user", "content": example["question"]})
        messages.append({"role": "assistant", "content": written_out(example)})
    return [*messages, *problem.get("turns", ()), {"role": "user", "content": problem["question"]}]


def written_out(problem):
    """The worked solution of a problem as a completion, exactly as the system prompt wants it."""
    return f"<reasoning>\n{problem['solution']}\n</reasoning>\n<answer>\n{problem['answer']}\n</answer>"


# ---- generated problems --------------------------------------------------------------------------------------------
# A maker is a function (rng, difficulty) -> (split key, problem). Problems with equal keys are in the same split. The
# key is read as text, which must be the same in every process: do not use a set. The problem has a question, an answer
# and a solution. Its kind is the maker's name, unless the maker gives another.

SIZES = {"train": 1000, "test": 200}  # problems of each maker and difficulty
TRIES = 10_000  # a maker that has found nothing new after so many tries has too few problems


def generated(makers, difficulties, split):
    """The problems of a split, of each maker and difficulty in turn: the same in every run, no prompt twice."""
    sources = list(itertools.product(difficulties, makers))
    generators = [random.Random(f"{make.__name__} {difficulty} {split}") for difficulty, make in sources]
    asked = set()
    for _ in range(SIZES[split]):
        for (difficulty, make), rng in zip(sources, generators):
            problem = next_problem(make, difficulty, rng, split, asked)
            asked.add(repr(prompt(problem)))
            yield problem


def next_problem(make, difficulty, rng, split, asked=()):
    """The next problem that a maker makes for a split; its prompt is not among those that were asked."""
    for _ in range(TRIES):
        split_key, problem = make(rng, difficulty)
        problem = {"kind": make.__name__} | problem
        fits_split = in_split(zlib.crc32(str(split_key).encode()), split)
        if fits_split and repr(prompt(problem)) not in asked:
            return problem
    raise DataError(f"{make.__name__}:{difficulty}, {split} split: no new problem found in {TRIES} tries")


def in_split(number, split):
    """Does this number belong to the split? Every fifth number is for testing, all others are for training."""
    for_testing = number % 5 == 0
    return for_testing == (split == "test")


# ---- word problems in the format of GSM8K, with one to five calculations -------------------------------------------

NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jana Kofi Lena".split()
THINGS = "apples books coins eggs pens shells".split()
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
GAINS = "buys finds wins gets".split()
LOSSES = "breaks loses sells eats".split()
LARGEST = 12  # no number in a word problem is larger


def arithmetic(rng, difficulty):
    """A word problem in which `difficulty` events change a number, one calculation each."""
    start = rng.randint(2, 12)
    value = start
    events = {}  # {verb: number}: no verb comes twice
    lines = []
    while len(events) < difficulty:
        verb = rng.choice(GAINS + LOSSES)
        number = rng.randint(2, 9)
        sign = "+" if verb in GAINS else "-"
        result = OPERATIONS[sign](value, number)
        if verb not in events and 1 <= result <= LARGEST:
            events[verb] = number
            lines.append(f"{verb} {number}: <<{value}{sign}{number}={result}>>{result}")
            value = result
    name = rng.choice(NAMES)
    things = rng.choice(THINGS)
    story = ", ".join(f"{verb} {number}" for verb, number in events.items())
    return (start, *events.items()), {
        "question": f"{name} has {start} {things}, {story}. How many {things} does {name} have now?",
        "answer": str(value),
        "solution": "\n".join(lines),
        "kind": "math",
    }


# ---- what the tiny model learns before reinforcement learning ------------------------------------------------------

# the careless author of `tiny_corpus`: how often each habit, and the share of solutions in the form of the prompt
HABITS = {"guess": 0.6, "work": 0.33, "mistake": 0.07}
TAGGED = 0.6


def tiny_corpus(num_skilled=4800, num_careless=1600):
    """Two lists of [(messages, completion)], to be learnt one after the other: skills, then a careless author's habits.

    Skills are worked solutions and practice in calculating. The careless author mostly guesses, sometimes works the
    answer out, and now and then makes a mistake and corrects it. A model of this size cannot do several calculations
    in its head: its guesses are mostly wrong. So longer outputs are better ones. All questions are from the training
    split.
    """
    rng = random.Random("tiny corpus")
    skilled = []
    for _ in range(num_skilled):
        if rng.random() < 0.25:
            skilled.append(([{"role": "user", "content": "Practise."}], practice(rng)))
            continue
        problem = next_problem(arithmetic, rng.randint(1, 3), rng, "train")
        solved = with_mistake(rng, problem) if rng.random() < 0.1 else problem
        skilled.append((prompt(problem), written_out(solved)))
    careless = []
    for _ in range(num_careless):
        problem = next_problem(arithmetic, rng.randint(1, 3), rng, "train")
        careless.append((prompt(problem), careless_solution(rng, problem)))
    return skilled, careless


def practice(rng):
    """Six single calculations, one after the other."""
    text = ""
    while text.count("<<") < 6:
        a = rng.randint(1, LARGEST)
        sign = rng.choice("+-")
        b = rng.randint(2, 9)
        result = OPERATIONS[sign](a, b)
        if 1 <= result <= LARGEST:
            text += f"<<{a}{sign}{b}={result}>>"
    return text


def with_mistake(rng, problem):
    """The problem with a mistake in a line of its solution, which the next line corrects.

    `buys 3: <<2+3=5>>5` becomes `buys 3: <<2+3=6>>6` and then `Wait, <<2+3=5>>5`.
    """
    lines = problem["solution"].split("\n")
    index = rng.randrange(len(lines))
    start, right = lines[index].split("=")
    wrong = int(right.split(">>")[0]) + rng.choice([1, 2])
    calculation = start[start.index("<<") :]
    lines[index] = f"{start}={wrong}>>{wrong}\nWait, {calculation}={right}"
    return problem | {"solution": "\n".join(lines)}


def careless_solution(rng, problem):
    """A completion by the careless author."""
    habit = rng.choices(list(HABITS), HABITS.values())[0]
    if habit == "guess":
        number = str(rng.randint(1, LARGEST))
        problem = problem | {"answer": number, "solution": f"That makes {number}."}
    elif habit == "mistake":
        problem = with_mistake(rng, problem)
    if rng.random() < TAGGED:
        return written_out(problem)
    untagged = f"{problem['solution']}\nThe answer is {problem['answer']}."
    half_tagged = f"<reasoning>\n{problem['solution']}\n</reasoning>\n{problem['answer']}"
    return rng.choice([untagged, half_tagged])


# ---- generated logic puzzles, with a difficulty from 1 to 5 --------------------------------------------------------


class Clue(NamedTuple):
    """A sentence with gaps, and what stands in the gaps: `{a} came at least {k} places before {b}`."""

    form: str
    a: int  # a person, counted from 0
    b: int  # another person, or a itself if the form has no {b}
    k: int  # a number, or 0 if the form has no {k}


def random_clue(rng, forms, n):
    """A random clue about n persons, true or not."""
    form = rng.choice(forms)
    a, b = rng.sample(range(n), 2)
    if "{b}" not in form:
        b = a
    k = rng.randint(1, n) if "{k}" in form else 0
    return Clue(form, a, b, k)


def sentence(names, clue):
    """A clue in English, without a full stop."""
    words = clue.form.format(a=names[clue.a], b=names[clue.b], k=clue.k)
    return words[0].upper() + words[1:]


def sayings(knight, i_am, a, b, k):
    """What a person can say: {form: is it true?}, the harder ones later.

    knight: for each person, is it a knight? i_am, a, b: are the speaker and the persons a and b knights?
    """
    return {
        "{a} is a knight": a,
        "{a} is a knave": not a,
        "{a} and I are of the same kind": a == i_am,
        "{a} and I are of different kinds": a != i_am,
        "the number of knights among us is exactly {k}": sum(knight) == k,
        "the number of knights among us is at least {k}": sum(knight) >= k,
        "the number of knaves among us is at least {k}": len(knight) - sum(knight) >= k,
        "{a} and {b} are of the same kind": a == b,
        "{a} and {b} are of different kinds": a != b,
        "if {a} is a knight, then {b} is a knave": not a or not b,
        "at least one of {a} and {b} is a knight": a or b,
        "{a} is a knight and {b} is a knave": a and not b,
        "if {a} is a knight, then so is {b}": not a or b,
    }


def fits(clue, me, knight):
    """Can person `me` say this? A knight says what is true, a knave what is false. knight[i]: is person i a knight?"""
    truth = sayings(knight, knight[me], knight[clue.a], knight[clue.b], clue.k)[clue.form]
    return truth == knight[me]


def knights(rng, difficulty):
    """Knights tell the truth, knaves lie, and each person says one thing. Only one choice of roles fits all of it."""
    n = difficulty + 1
    choices = list(itertools.product([False, True], repeat=n))  # of roles: is each person a knight?
    forms = list(sayings((), i_am=True, a=True, b=True, k=0))[: 5 + 2 * difficulty]
    possible = choices
    # draw roles and sayings again until only one choice of roles is possible
    while len(possible) > 1:
        knight = rng.choice(choices)
        clues = []
        possible = choices
        while len(clues) < n:
            me = len(clues)  # who speaks next
            clue = random_clue(rng, forms, n)
            if me not in (clue.a, clue.b) and fits(clue, me, knight):
                clues.append(clue)
                possible = [other for other in possible if fits(clue, me, other)]

    names = rng.sample(NAMES, n)
    roles = ["knight" if is_knight else "knave" for is_knight in knight]
    answer = ", ".join(f"{name}: {role}" for name, role in zip(names, roles))
    question = "Knights always tell the truth, knaves always lie. "
    solution = f"Try {answer}.\n"
    split_key = []  # equal for puzzles that differ only in names and in the order of persons
    for name, role, clue in zip(names, roles, clues):
        quote = f'"{sentence(names, clue)}"'
        question += f"{name} says: {quote}. "
        solution += f"{name} is a {role}, and {quote} is {role == 'knight'}.\n"
        about = sorted([roles[clue.a], roles[clue.b]]) if "{a}" in clue.form else ""
        split_key.append(f"{role} {clue.form} {about} {clue.k}")
    question += "Who is a knight and who is a knave? Answer in this form: Zoe: knight, Yan: knave"
    solution += "Nothing else agrees with everything said."
    return sorted(split_key), {"question": question, "answer": answer, "solution": solution, "names": names}


def race_clues(a, b, k):
    """What can be told about a race: {form: is it true?}; the later ones tell less.

    a, b: the places of persons a and b, from 1; arrays, with an entry for each possible order.
    """
    return {
        "{a} came in place {k}": a == k,
        "{a} came directly before {b}": a + 1 == b,
        "{a} came before {b}": a < b,
        "{a} and {b} came one directly after the other": abs(a - b) == 1,
        "exactly {k} came between {a} and {b}": abs(a - b) == k + 1,
        # never true with k = 1, and so never drawn: it would tell no more than "came before"
        "{a} came at least {k} places before {b}": (b - a >= k) & (k > 1),
        "{a} did not come in place {k}": a != k,
        "{a} and {b} did not come one directly after the other": abs(a - b) > 1,
    }


@functools.cache
def all_places(n):
    """[n, n!]: for each person the places in all possible orders, from 1. In the first order person 0 comes first."""
    return numpy.array(list(itertools.permutations(range(1, n + 1)))).T


def agreement(clue, places):
    """Which orders agree with a clue: [number of orders] of bool."""
    return race_clues(places[clue.a], places[clue.b], clue.k)[clue.form]


def order(rng, difficulty):
    """A race told by clues. Every clue is needed: without it several orders fit. Person 0 comes first, 1 second, …"""
    n = difficulty + 2
    forms = list(race_clues(a=1, b=2, k=0))[difficulty - 1 : difficulty + 3]
    possible = all_places(n)  # [n, m]: the m orders that agree with all clues so far
    clues = []
    while possible.shape[1] > 1:
        clue = random_clue(rng, forms, n)
        agrees = agreement(clue, possible)  # [m]
        if agrees[0] and not agrees.all():  # the clue is true, and excludes an order
            clues.append(clue)
            possible = possible[:, agrees]
    agreeing = {clue: agreement(clue, all_places(n)) for clue in clues}  # [n!] each
    for clue in clues:
        others = [agreeing[other] for other in agreeing if other != clue]
        if numpy.all(others, axis=0).sum() == 1:
            del agreeing[clue]

    names = rng.sample(NAMES, n)
    with_places = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    answer = ", ".join(names)
    question = f"{', '.join(sorted(names))} ran a race, and no two came together. "
    solution = f"Try {answer}.\n"
    split_key = []
    for clue in agreeing:
        question += f"{sentence(names, clue)}. "
        solution += f"{sentence(with_places, clue)}.\n"
        split_key.append(f"{clue.form} {sorted([clue.a, clue.b])} {clue.k}")
    question += "In which order did they come? Answer with all names from first to last, separated by commas."
    solution += "No other order agrees with everything told."
    return sorted(split_key), {"question": question, "answer": answer, "solution": solution, "names": sorted(names)}


def countdown(rng, difficulty):
    """Numbers, and a target that they reach in a calculation without fractions or numbers below 1."""
    while True:
        numbers = [rng.randint(1, 10 * difficulty) for _ in range(min(difficulty + 2, 6))]
        terms = [(number, str(number)) for number in numbers]  # a term: its value and its text
        lines = []
        while len(terms) > 1:
            a, first = terms.pop(rng.randrange(len(terms)))
            b, second = terms.pop(rng.randrange(len(terms)))
            allowed = {"+": True, "*": a * b < 1000, "-": a > b, "/": a % b == 0 and b > 1}
            sign = rng.choice([sign for sign in allowed if allowed[sign]])
            value = OPERATIONS[sign](a, b)
            lines.append(f"{a} {sign} {b} = {value}")
            terms.append((value, f"({first} {sign} {second})"))
        target, expression = terms[0]
        if 10 <= target <= 999 and target not in numbers:
            break
    question = f"Reach {target} with the numbers {', '.join(map(str, numbers))}, each used at most once, "
    question += "and with +, -, *, / and parentheses. Answer with the expression alone, as in: (8 - 2) * 5"
    return (sorted(numbers), target), {
        "question": question,
        "answer": expression[1:-1],  # without the outer parentheses
        "solution": "\n".join(lines),
        "numbers": numbers,
        "target": target,
    }


# ---- Nim: two heaps, and who takes the last one wins ---------------------------------------------------------------


def nim(rng, difficulty):
    """A position of Nim with at most difficulty + 2 in a heap. Both splits have all positions, with other names."""
    players = rng.sample(NAMES, 2)
    heaps = {"A": 0, "B": 0}
    while not any(heaps.values()):
        heaps = {name: rng.randint(0, difficulty + 2) for name in heaps}
    return players, nim_position(players, rng.randrange(2), heaps)


def nim_position(players, turn, heaps):
    """The problem in which players[turn] moves; players[0] began. The right move makes the heaps equal: it wins."""
    first, second = players
    mover = players[turn]
    a, b = heaps.values()
    return {
        "question": f"{first} and {second} play Nim; {first} began. Heap A has {a}, heap B has {b}. "
        f"{mover} takes any number from one heap, such as: 1 from A. Who takes the last one wins. "
        f"What does {mover} take?",
        "answer": "any move" if a == b else f"{abs(a - b)} from {max(heaps, key=heaps.get)}",
        "solution": "",
        "kind": "nim",
        "players": players,
        "turn": turn,
        "heaps": heaps,
    }


def nim_corpus(count=6400):
    """What the tiny model learns before self-play: [(messages, completion)] with legal moves, taken by chance."""
    rng = random.Random("nim corpus")
    corpus = []
    for _ in range(count):
        problem = next_problem(nim, 3, rng, "train")
        heaps = problem["heaps"]
        heap = rng.choice([name for name in heaps if heaps[name]])
        n = rng.randint(1, heaps[heap])
        left = heaps | {heap: heaps[heap] - n}
        solution = f"A {heaps['A']}, B {heaps['B']}\nleaves A {left['A']}, B {left['B']}"
        solution += f"\n{heap}: <<{heaps[heap]}-{left[heap]}={n}>>{n}"
        moved = problem | {"solution": solution, "answer": f"{n} from {heap}"}
        corpus.append((prompt(problem), written_out(moved)))
    return corpus


# ---- to test writing and dialogue ----------------------------------------------------------------------------------

WORDS = "bridge clock garden horse island lamp letter music river ticket window winter".split()
ANIMALS = "cat dog horse parrot rabbit turtle".split()
REPLIES = ["I see.", "Good to know.", "What a lovely name!", "Thank you for telling me.", "All right.", "How nice."]


def writing(rng, difficulty):
    """A story to write in difficulty + 1 sentences, with as many given words in it."""
    name = rng.choice(NAMES)
    words = rng.sample(WORDS, difficulty + 1)
    question = f"Write a story about {name} in exactly {len(words)} sentences. Use these words: {', '.join(words)}."
    return (name, *words), {"question": question, "answer": " ".join(words), "solution": ""}


def dialogue(rng, difficulty):
    """A fact is told, then `difficulty` others, then the first is asked for. `replies`: a true and a false answer."""
    count = difficulty + 1
    animals = rng.sample(ANIMALS, count)
    names = rng.sample(NAMES, count)
    turns = []
    for animal, name, reply in zip(animals, names, rng.sample(REPLIES, count)):
        turns.append({"role": "user", "content": f"My {animal} is called {name}."})
        turns.append({"role": "assistant", "content": reply})
    return names, {
        "question": f"What is my {animals[0]} called?",
        "answer": names[0],
        "solution": "",
        "turns": turns,
        "replies": [f"Your {animals[0]} is called {name}." for name in names[:2]],
    }


# ---- rows of data sets as problems: the columns of a row tell its format -------------------------------------------


def gsm8k(row):
    """GSM8K: the answer is what follows the last #### in the solution."""
    return answer_after("####", row["question"], row["answer"])


def metamath(row):
    """MetaMathQA: the answer is what follows the last "The answer is:"."""
    return answer_after("The answer is:", row["query"], row["response"])


def answer_after(mark, question, solution):
    """A mathematical problem whose solution ends in a mark and the answer."""
    explanation, found, answer = solution.rpartition(mark)
    if not found or not answer.strip():
        raise ValueError(f"its solution must end in `{mark} result` (a plain answer: name the columns problem, answer)")
    answer = answer.strip().partition("\n")[0]  # a remark may follow on the next line
    return {"question": question, "answer": answer, "kind": "math", "solution": explanation.strip()}


def mathematics(row):
    """MATH and similar sets: the answer is the field `answer`, or the boxes in the solution; the grader opens them."""
    solution = row.get("solution") or ""
    answer = row.get("answer")
    if answer is None:
        for paragraph in re.split(r"\n\s*\n", solution):
            answer = boxes(paragraph) or answer  # those of the last paragraph that has some
    if type(answer) not in (str, int, float) or str(answer).strip() in ("", "nan"):
        raise ValueError(r"it needs an answer, or a solution with its answer in \boxed{}")
    return {"question": row["problem"], "answer": str(answer).strip(), "kind": "math", "solution": solution.strip()}


def boxes(text):
    r"""The text from its first box to its last, such as `\boxed{1}$ or $\boxed{-1}`; "" without a box.

    A box is `\boxed{5}` or `\boxed 5`; one that is empty or never closed does not count.
    """
    closing = closing_braces(text)
    starts = []
    ends = []
    for box in re.finditer(r"\\(?:boxed|fbox)(?![a-z])\s*(?!\{\s*\})(\{|[^\s{$][^$\n]*)", text):
        end = box.end()
        if box[1] == "{":
            end = closing.get(box.start(1))
        if end is not None:
            starts.append(box.start())
            ends.append(end)
    return text[min(starts) : max(ends)].rstrip(" .") if starts else ""


def closing_braces(text):
    r"""{where a brace opens: where the part that it opens ends}; \{ and \} are text."""
    closing = {}
    opened = []
    for brace in re.finditer(r"(?s)\\.|[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.end()
    return closing


def humaneval(row):
    """HumanEval: a function to complete. The tests are the statements of its `check(candidate)`."""
    head = row["prompt"]
    setup = [head]
    tests = [f"candidate = {row['entry_point']}"]
    for node in ast.parse(row["test"]).body:
        if getattr(node, "name", None) != "check":
            setup.append(ast.unparse(node))
            continue
        for statement in node.body:
            empty = isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant)
            if not empty:  # `assert True` tests nothing
                tests.append(ast.unparse(statement))
    return program(
        question=f"Complete this Python function. Answer with the whole function, Python code only.\n\n{head}",
        reference=head + row["canonical_solution"],
        prelude=head,
        setup=setup,
        tests=tests,
        names={row["entry_point"]},
    )


def mbpp(row):
    """MBPP: a function to write from a description and its tests. The name of the function is in the tests."""
    tests = row.get("test_list") or []
    shown = "\n".join(tests)
    setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    return program(
        question=f"{row['text']} Answer with Python code only. It must pass these tests:\n\n{shown}",
        reference=row["code"],
        prelude="",
        setup=setup,
        tests=tests,
        names=re.findall(r"\w+", "\n".join(setup + tests)),
    )


def sanitized_mbpp(row):
    """MBPP's configuration "sanitized": the description is the field `prompt`."""
    return mbpp(row | {"text": row["prompt"]})


def program(question, reference, prelude, setup, tests, names):
    """A program to write: a completion is run after the prelude; the tests after the setup, in another process.

    Of the names in the tests, `functions` keeps those that the reference defines: a right completion has them too.
    Of what the reference imports, the tests import what they use: `sys`, for example.
    """
    body = ast.parse(reference).body
    functions = [node.name for node in body if getattr(node, "name", None) in names]
    if not functions or "assert" not in "".join(tests):
        raise ValueError("it needs tests that assert, and they must call a function of the reference program")
    symbols = symtable.symtable("\n".join(setup + tests), "tests", "exec").get_symbols()
    unknown = {symbol.get_name() for symbol in symbols if not symbol.is_local()}.difference(functions, dir(builtins))
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            if imported & unknown:
                setup = [ast.unparse(node), *setup]
                unknown -= imported
    if any("import *" in line for line in setup):  # nobody knows what that defines
        unknown = set()
    if unknown:
        raise ValueError(f"its tests use what nobody defines: {', '.join(sorted(unknown))}")
    return {
        "question": question,
        "answer": reference,
        "kind": "program",
        "solution": reference,
        "prelude": prelude,
        "setup": "\n".join(setup),
        "tests": tests,
        "functions": functions,
    }


# {the columns that must hold text: the function that makes a problem of such a row}. The first that fits is taken. If
# you have plain questions and answers, call the columns `problem` and `answer`.

FORMATS = {
    ("question", "answer"): gsm8k,  # answer: a worked solution, then `#### 72`
    ("query", "response"): metamath,  # response: a worked solution, then `The answer is: 72`
    ("problem",): mathematics,  # with `answer` (text or number), or `solution` with \boxed{72}
    # a function to complete, its body, a test with `def check(candidate)`, its name
    ("prompt", "canonical_solution", "test", "entry_point"): humaneval,
    ("text", "code"): mbpp,  # with `test_list`: ["assert …", …]
    ("prompt", "code"): sanitized_mbpp,  # the same
}


def problem_of(row):
    """A row as a problem, by the first of the FORMATS that it has."""
    fields = row.items() if isinstance(row, dict) else []
    texts = {name for name, value in fields if isinstance(value, str) and value.strip()}
    for columns, make in FORMATS.items():
        if texts.issuperset(columns):
            # many programs have strings such as "\d", which Python warns of
            with warnings.catch_warnings(action="ignore"):
                problem = make(row)
            # an error if there is half a character, such as "\ud800"
            (problem["question"] + written_out(problem)).encode()
            return problem
    raise ValueError("it needs the texts " + ", or ".join(" + ".join(columns) for columns in FORMATS))


# ---- rows from files, folders and the hub --------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".parquet", ".csv", ".json")  # .gz can follow each of them


def files_of(path, split):
    """The files of a split, which have one suffix: the path itself if it is a file, else files of the folder."""
    if path.is_file():
        files = [path]
    elif (path / split).is_dir():  # MATH as published: train/algebra/1.json
        files = list((path / split).rglob("*.*"))
    else:  # the split is a word of the file's name
        folder = path
        for name in ("data", "main"):  # as in repositories of the hub
            if (path / name).is_dir():
                folder = path / name
        files = [file for file in folder.glob("*") if split in re.split(r"[^a-z]+", file.stem.lower())]
    files.sort(key=lambda file: (file.parent, len(file.stem), file))  # 2.json before 10.json
    for suffix in SUFFIXES:
        found = [str(file) for file in files if file.name.removesuffix(".gz").endswith(suffix)]
        if found:
            return suffix, found
    raise ValueError(f"a data file ends in {', '.join(SUFFIXES)}; in a folder its path must name the split {split!r}")


def opened(path):
    """A text file, unpacked if its name ends in .gz."""
    read = gzip.open if path.endswith(".gz") else open
    return read(path, "rt", encoding="utf-8-sig", newline="")


def csv_rows(file, path):
    """Stream the rows of a CSV file; every value is a text."""
    reader = csv.DictReader(file)
    if not reader.fieldnames:
        raise ValueError(f"{path} is empty")
    yield from reader


def json_rows(file, path):
    """Stream the rows of a JSON file: one on each line, or a list of rows, or one row over several lines."""
    lines = filter(str.strip, file)  # the lines that are not blank
    first = next(lines, "")
    if re.fullmatch(r"\s*\{.*\}\s*", first):  # one row on each line
        texts = itertools.chain([first], lines)
    else:
        texts = [first + file.read()]
    for text in texts:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            before = error.doc[: error.pos][-30:]
            raise ValueError(f"{path}, after {before!r}: {error.msg}") from error
        yield from value if isinstance(value, list) else [value]


def rows(entry, split):
    """Stream the rows of a split, from the hub, a file or a folder."""
    import datasets  # here, because it is slow to import and the generated problems do not need it

    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):
        # the function `problems` reports errors
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if "hub" in entry:
        splits = entry.get("splits", {split: split})
        name = splits[split]
        stream = datasets.load_dataset(entry["hub"], entry.get("configuration"), split=name, streaming=True)
        # is this split of the hub for training and for testing?
        shared = list(splits.values()).count(name) > 1
        for index, row in enumerate(stream):
            if not shared or in_split(index, split):
                yield row
        return
    suffix, files = files_of(Path(entry["path"]), split)
    if suffix == ".parquet":
        # `datasets` calls the split of given files "train", whatever it is
        yield from datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        return
    # not with `datasets`: it makes a date of the text "2020-01-01", and a number of "005"
    for file in files:
        with opened(file) as lines:
            yield from csv_rows(lines, file) if suffix == ".csv" else json_rows(lines, file)


def problems(name, entry, split):
    """The rows of a split as problems, and a DataError in the place of each row that cannot be read.

    It is raised if none of the first 50 rows can be read.
    """
    stream = read(name, entry, split)
    first = list(itertools.islice(stream, 50))
    if first and not any(readable(first)):
        raise first[0]
    yield from first
    yield from stream


def read(name, entry, split):
    """What `problems` yields. An error names the row by its number in this split, from 0."""
    where = f"cannot read {name}, {split} split, row"
    index = 0
    try:
        for row in rows(entry, split):
            try:
                problem = problem_of(row)
            except Exception as error:  # noqa: BLE001  a broken row can raise almost any error
                problem = DataError(f"{where} {index}: {first_line(error)}")
            yield problem
            index += 1
    except Exception as error:  # so can a broken file or connection
        hint = "; offline, use --dataset arithmetic or --dataset PATH, a file or folder" if "hub" in entry else ""
        raise DataError(f"{where} {index}: {first_line(error)}{hint}") from error


def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def readable(stream, unreadable=None):
    """The problems of a stream, without the rows that cannot be read; their errors are added to a list, if given."""
    for problem in stream:
        if not isinstance(problem, DataError):
            yield problem
        elif unreadable is not None:
            unreadable.append(problem)


# ---- data sets by name ---------------------------------------------------------------------------------------------
# "mine": {"hub": "owner/name"} is a repository of the Hugging Face hub, "mine": {"path": "…"} a file or folder. The
# columns of its rows are among the FORMATS.
# `splits`: which of our splits it has, and their names on the hub; without it both, with our names. If one split of the
# hub stands for both, every fifth row is for testing.

DATASETS = {
    "gsm8k": {"hub": "openai/gsm8k", "configuration": "main"},
    "math": {"hub": "nlile/hendrycks-MATH-benchmark"},  # its test split is MATH-500
    "metamath": {"hub": "meta-math/MetaMathQA", "splits": {"train": "train"}},
    "math500": {"hub": "HuggingFaceH4/MATH-500", "splits": {"test": "test"}},
    "aime": {"hub": "HuggingFaceH4/aime_2024", "splits": {"test": "train"}},
    "humaneval": {"hub": "openai/openai_humaneval", "splits": {"train": "test", "test": "test"}},
    "mbpp": {"hub": "google-research-datasets/mbpp", "configuration": "full"},
}

# A new kind of generated problem needs a maker, a line here, and in evaluator.py a function that grades its answers, in
# CHECKERS under the name of the maker. With "kind": "math" in its problems it needs none.

GENERATED = {  # name: makers, and the difficulties that are mixed if the name is used without one
    "arithmetic": ([arithmetic], [1, 2, 3]),
    "knights": ([knights], [1]),
    "order": ([order], [1]),
    "countdown": ([countdown], [1]),
    "logic": ([knights, order, countdown], [1]),
    "nim": ([nim], [3]),  # with no other maker: in a step either all questions are played, or none
    "writing": ([writing], [2]),
    "dialogue": ([dialogue], [1, 3, 5]),
}
DIFFICULTIES = list("12345")


def load(name, split):
    """The problems of a split, "train" or "test", once, in the official order, as a stream.

    In the place of a row that cannot be read is a DataError: see `readable`.
    """
    task, colon, difficulty = name.partition(":")
    if task in GENERATED and (not colon or difficulty in DIFFICULTIES):
        makers, mixed = GENERATED[task]
        difficulties = [int(difficulty)] if colon else mixed
        return generated(makers, difficulties, split)
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", name) and not name.removesuffix(".gz").endswith(SUFFIXES)
    if os.path.exists(name):  # a file or folder of your own comes before the hub
        entry = {"path": name}
    elif name in DATASETS:
        entry = DATASETS[name]
    elif on_hub:
        entry = {"hub": name}
    else:
        known = ", ".join([*DATASETS, *GENERATED])
        raise DataError(
            f"unknown data set: {name or 'an empty name'} is none of {known}, and no file or folder; "
            "a difficulty is a number from 1 to 5, as in logic:3"
        )
    if split not in entry.get("splits", [split]):
        use = "testing" if split == "train" else "training"
        flag = "--dataset" if split == "train" else "--eval_dataset"
        raise DataError(f"{name} is for {use} only, it has no {split} split: name another set with {flag}")
    return problems(name, entry, split)


@functools.cache
def examples(name, count):
    """The first training problems, in the official order, to be shown in every prompt."""
    return list(itertools.islice(readable(load(name, "train")), count)) if count else []


def stages(spec):
    """The stages of a curriculum, [(name, steps)]: `logic:3:100,gsm8k:400` is [("logic:3", 100), ("gsm8k", 400)].

    The first number after a generated set is always its difficulty.
    """
    if os.path.exists(spec):  # a path can have commas and colons in it
        return [(spec, None)]
    found = []
    for stage in spec.split(","):
        name, *numbers = stage.strip().split(":")
        if not name:
            raise DataError(f"--dataset {spec!r}: the name of a data set is missing, as in logic:3:100,gsm8k:400")
        if name in GENERATED and numbers:
            name = f"{name}:{numbers.pop(0)}"
            load(name, "train")  # an error if the difficulty is not one
        if len(numbers) > 1 or (numbers and not re.fullmatch("[1-9][0-9]{0,8}", numbers[0])):
            raise DataError(f"stage {stage}: after {name} comes the number of its steps, at least 1, and nothing else")
        found.append((name, int(numbers[0]) if numbers else None))
    if len(found) > 1 and any(steps is None for _, steps in found):
        raise DataError(f"{spec}: each of several stages needs its steps, as in logic:3:100,gsm8k:400")
    return found


def stage_at(spec, step, steps):
    """(number, data set) of a curriculum's stage at a step; an iteration of `steps` steps goes through all stages.

    Each stage of each iteration has a number of its own. A single data set has number 0 for ever: its questions go on.
    If the steps of the stages are fewer than `steps`, the last stage goes on.
    """
    found = stages(spec)
    if len(found) == 1:
        return 0, found[0][0]
    iteration = step // steps
    end = 0
    for index, (name, length) in enumerate(found):
        end += length
        if step % steps < end:
            break
    return iteration * len(found) + index, name


def shuffled(name, split, seed, position=0):
    """The problems of a split, epoch after epoch without end, each epoch in a new order; `position` are left out.

    The order is shuffled in blocks, as a data set can be larger than the memory.
    """
    for epoch in itertools.count():
        rng = random.Random(f"{seed} {epoch}")
        stream = load(name, split)
        block = list(itertools.islice(stream, 10_000))
        if not block:
            raise DataError(f"{name}, {split} split: there is no problem in it")
        while block:
            rng.shuffle(block)
            yield from block[position:]
            position = max(0, position - len(block))
            block = list(itertools.islice(stream, 10_000))
