"""The problems: where they come from, the prompt for each, and in which order they come.

A problem is a plain dict: `question`, `answer` (the right one; for a program, a reference program), `solution` (worked,
or ""), `kind` (how it is graded), and what the kind needs besides, such as the tests of a program. Nothing here knows
about tokens, tensors, rewards or the group size. The functions to call are `load`, `examples`, `stages` and `shuffled`,
at the end. To add a data set, add a line to DATASETS, above them.
"""

import ast
import functools
import gzip
import itertools
import json
import logging
import operator
import os
import random
import re
import warnings
import zlib
from pathlib import Path

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
# A maker is a function (rng, difficulty) -> (split key, problem). Problems with equal keys are in the same split.

SIZES = {"train": 1000, "test": 200}  # problems of each maker and difficulty


def generated(makers, difficulties, split):
    """The problems of a split, of each maker and difficulty in turn: the same in every run, no prompt twice."""
    sources = [(make, d, random.Random(f"{make.__name__} {d} {split}")) for d in difficulties for make in makers]
    questions = set()
    while len(questions) < SIZES[split] * len(sources):
        make, difficulty, rng = sources[len(questions) % len(sources)]
        problem = next_problem(make, difficulty, rng, split)
        if (asked := repr(prompt(problem))) not in questions:
            questions.add(asked)
            yield problem


def next_problem(make, difficulty, rng, split):
    """The next problem that a maker makes for a split."""
    while True:
        split_key, problem = make(rng, difficulty)
        if in_split(zlib.crc32(str(split_key).encode()), split):
            return {"kind": make.__name__} | problem  # the maker may have set another kind


def in_split(number, split):
    """Does this number belong to the split? Every fifth number is for testing, all others are for training."""
    return (number % 5 == 0) == (split == "test")


# ---- word problems in the format of GSM8K, with one to five steps --------------------------------------------------

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Kofi", "Lena"]
THINGS = ["apples", "books", "coins", "eggs", "pens", "shells"]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
EVENTS = {"buys": "+", "finds": "+", "wins": "+", "gets": "+", "breaks": "-", "loses": "-", "sells": "-", "eats": "-"}
LARGEST = 12  # no number in a word problem is larger


def arithmetic(rng, difficulty):
    """A word problem in which `difficulty` events change a number, one calculation each."""
    value = start = rng.randint(2, 12)
    events, lines = {}, []  # {verb: number}: no verb comes twice
    while len(events) < difficulty:
        verb, number = rng.choice(list(EVENTS)), rng.randint(2, 9)
        sign = EVENTS[verb]
        result = OPERATIONS[sign](value, number)
        if verb not in events and 1 <= result <= LARGEST:
            events[verb] = number
            lines.append(f"{verb} {number}: <<{value}{sign}{number}={result}>>{result}")
            value = result
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    story = ", ".join(f"{verb} {number}" for verb, number in events.items())
    question = f"{name} has {start} {things}, {story}. How many {things} does {name} have now?"
    problem = {"question": question, "answer": str(value), "solution": "\n".join(lines), "kind": "math"}
    return (start, *events.items()), problem


# ---- what the tiny model learns before reinforcement learning ------------------------------------------------------

HABITS = {"guess": 0.6, "work": 0.33, "slip": 0.07}  # how often the careless author of `tiny_corpus` does what
TAGGED = 0.6  # the share of that author's solutions that have the form of the prompt


def tiny_corpus(num_skilled=24000, num_careless=4000):
    """Two lists of [(messages, completion)], to be learnt one after the other: skills, then a careless author's habits.

    Skills are worked solutions and practice in calculating. The careless author mostly guesses, sometimes works the
    answer out, and now and then makes a slip and mends it. A model of this size cannot calculate several steps in its
    head: its guesses are mostly wrong. So longer outputs are better ones. All questions are from the training split.
    """
    rng = random.Random("tiny corpus")
    skilled, careless = [], []
    while len(skilled) < num_skilled:
        if rng.random() < 0.25:
            skilled.append(([{"role": "user", "content": "Practise."}], practice(rng)))
        else:
            problem = next_problem(arithmetic, rng.randint(1, 3), rng, "train")
            skilled.append((prompt(problem), written_out(with_slip(rng, problem) if rng.random() < 0.1 else problem)))
    while len(careless) < num_careless:
        problem = next_problem(arithmetic, rng.randint(1, 3), rng, "train")
        careless.append((prompt(problem), careless_solution(rng, problem)))
    return skilled, careless


def practice(rng, count=6):
    """Single calculations, one after the other."""
    text = ""
    while text.count("<<") < count:
        a, sign, b = rng.randint(1, LARGEST), rng.choice("+-"), rng.randint(2, 9)
        if 1 <= (result := OPERATIONS[sign](a, b)) <= LARGEST:
            text += f"<<{a}{sign}{b}={result}>>"
    return text


def with_slip(rng, problem):
    """The problem with a slip in a line of its solution, mended in the next: <<2+3=6>>6, then Wait, <<2+3=5>>5."""
    lines = problem["solution"].split("\n")
    index = rng.randrange(len(lines))
    wrong = int(lines[index].rpartition(">>")[2]) + rng.choice([1, 2])
    lines[index] = re.sub(r"<<(.*)=.*", rf"<<\1={wrong}>>{wrong}\nWait, \g<0>", lines[index])
    return problem | {"solution": "\n".join(lines)}


def careless_solution(rng, problem):
    """A completion by the careless author."""
    habit = rng.choices(list(HABITS), HABITS.values())[0]
    if habit == "guess":
        number = str(rng.randint(1, LARGEST))
        problem = problem | {"answer": number, "solution": f"That makes {number}."}
    elif habit == "slip":
        problem = with_slip(rng, problem)
    untagged = f"{problem['solution']}\nThe answer is {problem['answer']}."
    half_tagged = f"<reasoning>\n{problem['solution']}\n</reasoning>\n{problem['answer']}"
    return written_out(problem) if rng.random() < TAGGED else rng.choice([untagged, half_tagged])


# ---- generated logic puzzles, with a difficulty from 1 to 5 --------------------------------------------------------
# A clue is (form, a, b, k): a sentence with gaps, the two persons in it, counted from 0, and the number for {k}.

SAYINGS = {  # form of what person `me` can say: is it true? knight[i]: is person i a knight? The later, the harder
    "{a} is a knight": lambda knight, me, a, b, k: knight[a],
    "{a} is a knave": lambda knight, me, a, b, k: not knight[a],
    "{a} and I are of the same kind": lambda knight, me, a, b, k: knight[a] == knight[me],
    "{a} and I are of different kinds": lambda knight, me, a, b, k: knight[a] != knight[me],
    "the number of knights among us is exactly {k}": lambda knight, me, a, b, k: sum(knight) == k,
    "the number of knights among us is at least {k}": lambda knight, me, a, b, k: sum(knight) >= k,
    "the number of knaves among us is at least {k}": lambda knight, me, a, b, k: len(knight) - sum(knight) >= k,
    "{a} and {b} are of the same kind": lambda knight, me, a, b, k: knight[a] == knight[b],
    "{a} and {b} are of different kinds": lambda knight, me, a, b, k: knight[a] != knight[b],
    "if {a} is a knight, then {b} is a knave": lambda knight, me, a, b, k: not knight[a] or not knight[b],
    "at least one of {a} and {b} is a knight": lambda knight, me, a, b, k: knight[a] or knight[b],
    "{a} is a knight and {b} is a knave": lambda knight, me, a, b, k: knight[a] and not knight[b],
    "if {a} is a knight, then so is {b}": lambda knight, me, a, b, k: not knight[a] or knight[b],
}

CLUES = {  # form of a clue about a race: is it true? place[i]: the place of person i, from 1. Later ones tell less
    "{a} came in place {k}": lambda place, a, b, k: place[a] == k,
    "{a} came directly before {b}": lambda place, a, b, k: place[a] + 1 == place[b],
    "{a} came before {b}": lambda place, a, b, k: place[a] < place[b],
    "{a} and {b} came one directly after the other": lambda place, a, b, k: abs(place[a] - place[b]) == 1,
    "exactly {k} came between {a} and {b}": lambda place, a, b, k: abs(place[a] - place[b]) == k + 1,
    # with k = 1 it would tell no more than "came before"
    "{a} came at least {k} places before {b}": lambda place, a, b, k: (place[b] - place[a] >= k) & (k > 1),
    "{a} did not come in place {k}": lambda place, a, b, k: place[a] != k,
    "{a} and {b} did not come one directly after the other": lambda place, a, b, k: abs(place[a] - place[b]) > 1,
}


def random_clue(rng, forms, n):
    """A random clue about n persons, true or not. If the form has no {b}, then b = a; if it has no {k}, then k = 0."""
    form, (a, b) = rng.choice(forms), rng.sample(range(n), 2)
    b = b if "{b}" in form else a
    k = rng.randint(1, n) if "{k}" in form else 0
    return form, a, b, k


def sentence(names, form, a, b, k):
    """A clue in English, without a full stop."""
    words = form.format(a=names[a], b=names[b], k=k)
    return words[0].upper() + words[1:]


def knights(rng, difficulty):
    """Knights tell the truth, knaves lie, and each person says one thing. Only one choice of roles fits all of it."""
    n, forms = difficulty + 1, list(SAYINGS)[: 5 + 2 * difficulty]
    choices = possible = list(itertools.product([False, True], repeat=n))
    while len(possible) > 1:  # draw roles and sayings again until only one choice of roles is possible
        knight, clues, possible = rng.choice(choices), [], choices
        while len(clues) < n:
            me = len(clues)  # who speaks next: a knight says what is true, a knave what is false
            form, a, b, k = random_clue(rng, forms, n)
            if me not in (a, b) and SAYINGS[form](knight, me, a, b, k) == knight[me]:
                clues.append((form, a, b, k))
                possible = [roles for roles in possible if SAYINGS[form](roles, me, a, b, k) == roles[me]]

    names, roles = rng.sample(NAMES, n), ["knight" if is_knight else "knave" for is_knight in knight]
    quotes = [f'"{sentence(names, *clue)}"' for clue in clues]
    answer = ", ".join(f"{name}: {role}" for name, role in zip(names, roles))
    says = " ".join(f"{name} says: {quote}." for name, quote in zip(names, quotes))
    question = f"Knights always tell the truth, knaves always lie. {says} "
    question += "Who is a knight and who is a knave? Answer in this form: Zoe: knight, Yan: knave"
    spoken = zip(names, roles, quotes, knight)  # a quote is true if a knight says it
    lines = [f"{name} is a {role}, and {quote} is {is_true}." for name, role, quote, is_true in spoken]
    solution = "\n".join([f"Try {answer}.", *lines, "Nothing else agrees with everything said."])
    split_key = []  # equal for puzzles that differ only in names and in the order of persons
    for role, (form, a, b, k) in zip(roles, clues):
        split_key.append(f"{role} {form} {sorted([roles[a], roles[b]]) if '{a}' in form else ''} {k}")
    return sorted(split_key), {"question": question, "answer": answer, "solution": solution, "names": names}


def order(rng, difficulty):
    """A race told by clues, none of them superfluous. Person 0 comes first, person 1 second, and so on."""
    n, forms = difficulty + 2, list(CLUES)[difficulty - 1 : difficulty + 3]
    orders = list(itertools.permutations(range(1, n + 1)))  # each holds the places of all persons
    place, true_order = numpy.array(orders).T, 0  # [n, n!]; the first order is 1, 2, …: person i has place i + 1
    clues = {}  # a clue: [n!] which orders agree with it
    possible = place[0] > 0  # [n!] which orders agree with all clues so far: at first all of them
    while possible.sum() > 1:
        clue = random_clue(rng, forms, n)
        form, *gaps = clue
        agrees = CLUES[form](place, *gaps)  # [n!]
        if agrees[true_order] and (possible & ~agrees).any():  # the clue is true, and excludes an order
            clues[clue] = agrees
            possible &= agrees
    for clue in list(clues):
        others = [agrees for other, agrees in clues.items() if other != clue]
        if numpy.all(others, axis=0).sum() == 1:
            del clues[clue]

    names = rng.sample(NAMES, n)
    answer, with_places = ", ".join(names), [f"{name} ({place})" for place, name in enumerate(names, 1)]
    told = " ".join(f"{sentence(names, *clue)}." for clue in clues)
    question = f"{', '.join(sorted(names))} ran a race, and no two came together. {told} "
    question += "In which order did they come? Answer with all names from first to last, separated by commas."
    lines = [f"{sentence(with_places, *clue)}." for clue in clues]
    solution = "\n".join([f"Try {answer}.", *lines, "No other order agrees with everything told."])
    split_key = sorted(f"{form} {sorted([a, b])} {k}" for form, a, b, k in clues)
    return split_key, {"question": question, "answer": answer, "solution": solution, "names": sorted(names)}


def countdown(rng, difficulty):
    """Numbers, and a target that they reach in a calculation without fractions or numbers below 1."""
    target, numbers = 0, []
    while not 10 <= target <= 999 or target in numbers:
        numbers = [rng.randint(1, 10 * difficulty) for _ in range(min(difficulty + 2, 6))]
        terms, lines = [(number, str(number)) for number in numbers], []  # a term: its value and its text
        while len(terms) > 1:
            a, first = terms.pop(rng.randrange(len(terms)))
            b, second = terms.pop(rng.randrange(len(terms)))
            allowed = {"+": True, "*": a * b < 1000, "-": a > b, "/": a % b == 0 and b > 1}
            sign = rng.choice([sign for sign in allowed if allowed[sign]])
            value = OPERATIONS[sign](a, b)
            lines.append(f"{a} {sign} {b} = {value}")
            terms.append((value, f"({first} {sign} {second})"))
        target, expression = terms[0]
    question = f"Reach {target} with the numbers {', '.join(map(str, numbers))}, each used at most once, "
    question += "and with +, -, *, / and parentheses. Answer with the expression alone, as in: (8 - 2) * 5"
    problem = {"question": question, "answer": expression[1:-1], "solution": "\n".join(lines)}
    return (sorted(numbers), target), problem | {"numbers": numbers, "target": target}


# ---- Nim: two heaps, and who takes the last one wins ---------------------------------------------------------------


def nim(rng, difficulty):
    """A position of Nim with at most difficulty + 2 in a heap. Train and test have the same ones, with other names."""
    players, heaps = rng.sample(NAMES, 2), {"A": 0, "B": 0}
    while not any(heaps.values()):
        heaps = {name: rng.randint(0, difficulty + 2) for name in heaps}
    return players, nim_position(players, rng.randrange(2), heaps)


def nim_position(players, turn, heaps):
    """The problem in which players[turn] moves; players[0] began. The right move makes the heaps equal: it wins."""
    (first, second), (a, b) = players, heaps.values()
    state = f"{first} and {second} play Nim; {first} began. Heap A has {a}, heap B has {b}."
    rule = f"{players[turn]} takes any number from one heap, such as: 1 from A. Who takes the last one wins."
    answer = "any move" if a == b else f"{abs(a - b)} from {max(heaps, key=heaps.get)}"
    about = {"kind": "nim", "players": players, "turn": turn, "heaps": heaps}
    return {"question": f"{state} {rule} What does {players[turn]} take?", "answer": answer, "solution": ""} | about


def nim_corpus(count=24000):
    """What the tiny model learns before self-play: [(messages, completion)] with legal moves, taken by chance."""
    rng, corpus = random.Random("nim corpus"), []
    while len(corpus) < count:
        problem = next_problem(nim, 3, rng, "train")
        before = problem["heaps"]
        heap = rng.choice([name for name in before if before[name]])
        n = rng.randint(1, before[heap])
        after = before | {heap: before[heap] - n}
        solution = "\nleaves ".join(f"A {heaps['A']}, B {heaps['B']}" for heaps in (before, after))
        solution += f"\n{heap}: <<{before[heap]}-{after[heap]}={n}>>{n}"
        corpus.append((prompt(problem), written_out(problem | {"solution": solution, "answer": f"{n} from {heap}"})))
    return corpus


# ---- to test writing and dialogue ----------------------------------------------------------------------------------

WORDS = "bridge clock garden horse island lamp letter music river ticket window winter".split()
ANIMALS = ["cat", "dog", "horse", "parrot", "rabbit", "turtle"]
REPLIES = ["I see.", "Good to know.", "What a lovely name!", "Thank you for telling me.", "All right.", "How nice."]


def writing(rng, difficulty):
    """A story to write in difficulty + 1 sentences, with as many given words in it."""
    name, words = rng.choice(NAMES), rng.sample(WORDS, difficulty + 1)
    question = f"Write a story about {name} in exactly {len(words)} sentences. Use these words: {', '.join(words)}."
    return (name, *words), {"question": question, "answer": " ".join(words), "solution": ""}


def dialogue(rng, difficulty):
    """A fact is told, then `difficulty` others, then the first is asked for. `replies`: a true and a false answer."""
    animals, names, turns = rng.sample(ANIMALS, difficulty + 1), rng.sample(NAMES, difficulty + 1), []
    for animal, name, reply in zip(animals, names, rng.sample(REPLIES, difficulty + 1)):
        turns.append({"role": "user", "content": f"My {animal} is called {name}."})
        turns.append({"role": "assistant", "content": reply})
    about = {"turns": turns, "replies": [f"Your {animals[0]} is called {name}." for name in names[:2]]}
    return names, {"question": f"What is my {animals[0]} called?", "answer": names[0], "solution": ""} | about


# ---- rows of data sets as problems: the fields of a row tell its format --------------------------------------------


def answer_after(mark, question, solution):
    """GSM8K and MetaMathQA: the answer is what follows the last mark in the solution."""
    explanation, _, answer = solution.rpartition(mark)
    if mark not in solution or not answer.strip():
        raise ValueError(f"its solution must end in `{mark} result`")
    return {"question": question, "answer": answer.strip(), "kind": "math", "solution": explanation.strip()}


BALANCED = r"(?:[^{}\\]++|\\.)*+"  # a text without braces; \{ and \} count as text
for _ in range(8):  # with each turn, braces may be one level deeper
    BALANCED = rf"(?:[^{{}}\\]++|\\.|\{{{BALANCED}\}})*+"
BOX = rf"\\(?:boxed|fbox)(?![a-z])\s*(?:(?!\{{\s*\}})\{{{BALANCED}\}}|[^\s{{$][^$\n]*)"  # `\boxed{5}` or `\boxed 5`


def mathematics(row):
    """MATH and similar sets: the answer is the field `answer`, or the boxes in the solution, which the grader opens."""
    solution, answer = row.get("solution") or "", row.get("answer")
    if answer is None:  # the last paragraph with boxes, from its first box to its last: `\boxed{1}$ or $\boxed{-1}`
        boxes = [re.search(rf"(?s){BOX}(?:.*{BOX})?", paragraph) for paragraph in re.split(r"\n\s*\n", solution)]
        answer = next((found[0].rstrip(" .") for found in reversed(boxes) if found), None)
    if type(answer) not in (str, int) or not str(answer).strip():
        raise ValueError(r"it needs an answer, or a solution with its answer in \boxed{}")
    return {"question": row["problem"], "answer": str(answer).strip(), "kind": "math", "solution": solution.strip()}


def program(question, reference, prelude, setup, tests, names):
    """A program to write: a completion is run after the prelude; the tests after the setup, in another process.

    Of the names in the tests, `functions` keeps those that the reference defines: a right completion has them too.
    """
    functions = [node.name for node in ast.parse(reference).body if getattr(node, "name", None) in names]
    if not functions or "assert" not in "".join(tests):
        raise ValueError("it needs tests that assert, and they must call a function of the reference program")
    problem = {"question": question, "answer": reference, "kind": "program", "solution": reference}
    return problem | {"prelude": prelude, "setup": setup, "tests": tests, "functions": functions}


def humaneval(row):
    """HumanEval: a function to complete. The tests are the statements of its `check(candidate)`."""
    head, name, nodes = row["prompt"], row["entry_point"], ast.parse(row["test"]).body
    statements = [statement for node in nodes if getattr(node, "name", None) == "check" for statement in node.body]
    trivial = lambda node: isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant)  # assert True
    tests = [ast.unparse(node) for node in statements if not trivial(node)]
    setup = [head, *(ast.unparse(node) for node in nodes if getattr(node, "name", None) != "check")]
    question = f"Complete this Python function. Answer with the whole function, Python code only.\n\n{head}"
    reference = head + row["canonical_solution"]
    return program(question, reference, head, "\n".join(setup), [f"candidate = {name}", *tests], {name})


def mbpp(description, row):
    """MBPP: a function to write from a description and its tests. The name of the function is in the tests."""
    tests, imports, setup = row.get("test_list") or [], row.get("test_imports") or [], row.get("test_setup_code") or ""
    test_code = "\n".join(tests)
    names = {node.id for node in ast.walk(ast.parse(test_code)) if isinstance(node, ast.Name)}
    question = f"{description} Answer with Python code only. It must pass these tests:\n\n{test_code}"
    return program(question, row["code"], "", "\n".join([*imports, setup]), tests, names)


FORMATS = {  # the fields that must hold text, and the function that turns such a row into a problem
    ("question", "answer"): lambda row: answer_after("####", row["question"], row["answer"]),  # GSM8K
    ("query", "response"): lambda row: answer_after("The answer is:", row["query"], row["response"]),  # MetaMathQA
    ("problem",): mathematics,
    ("prompt", "canonical_solution", "test", "entry_point"): humaneval,
    ("text", "code"): lambda row: mbpp(row["text"], row),
    ("prompt", "code"): lambda row: mbpp(row["prompt"], row),  # MBPP's configuration "sanitized"
}


def problem_of(row):
    """A row as a problem, by the first of the FORMATS that it has."""
    fields = row.items() if isinstance(row, dict) else []
    texts = {field for field, value in fields if isinstance(value, str) and value.strip()}
    function = next((function for needed, function in FORMATS.items() if texts.issuperset(needed)), None)
    if function is None:
        raise ValueError("it needs the texts " + ", or ".join(" + ".join(needed) for needed in FORMATS))
    with warnings.catch_warnings(action="ignore"):  # many programs have strings such as "\d"
        problem = function(row)
    (problem["question"] + written_out(problem)).encode()  # raises an error for "\ud800", which is half a character
    return problem


# ---- rows from files, folders and the hub --------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".parquet", ".csv", ".json")  # .gz can follow each of them


def files_of(path, split):
    """The files of a split, with one suffix: the path itself if it is a file, else files of the folder."""
    if path.is_file():
        files = [path]
    elif (path / split).is_dir():  # MATH as published: train/algebra/1.json
        files = (path / split).rglob("*.*")
    else:  # the split is a word of the file's name; repositories of the hub have a folder main or data
        folder = next((path / sub for sub in ("main", "data") if (path / sub).is_dir()), path)
        files = (file for file in folder.glob("*") if split in re.split(r"[^a-z]+", file.stem.lower()))
    files = sorted(files, key=lambda file: (file.parent, len(file.stem), file))  # 2.json before 10.json
    for suffix in SUFFIXES:
        if found := [str(file) for file in files if file.name.removesuffix(".gz").endswith(suffix)]:
            return suffix, found
    raise ValueError(f"a data file ends in {', '.join(SUFFIXES)}; in a folder its path must name the split {split!r}")


def json_rows(path):
    """Stream the rows of a JSON file: one on each line, or a list of rows, or one row over several lines."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
        lines = filter(str.strip, file)  # the lines that are not blank
        first = next(lines, "")
        one_per_line = re.fullmatch(r"\s*\{.*\}\s*", first)
        texts = itertools.chain([first], lines) if one_per_line else [first + file.read()]
        for text in texts:
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, after {error.doc[: error.pos][-30:]!r}: {error.msg}") from error
            yield from value if isinstance(value, list) else [value]


def rows(entry, split):
    """Stream the rows of a split, from the hub, a file or a folder."""
    import datasets  # here, because it is slow to import and the generated problems do not need it

    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # the function `problems` reports errors
    if "hub" in entry:
        splits, configuration = entry.get("splits", {}), entry.get("configuration")
        stream = datasets.load_dataset(entry["hub"], configuration, split=splits.get(split, split), streaming=True)
        shared = len(splits) > len(set(splits.values()))  # one split of the hub is for training and testing
        yield from (row for index, row in enumerate(stream) if not shared or in_split(index, split))
        return
    suffix, files = files_of(Path(entry["path"]), split)
    if suffix in (".csv", ".parquet"):
        # `datasets` calls the split of given files "train", whatever it is
        yield from datasets.load_dataset(suffix[1:], data_files=files, split="train", streaming=True)
    else:  # not with `datasets`: it makes a date of the text "2020-01-01", and a number of "005"
        yield from itertools.chain.from_iterable(map(json_rows, files))


def problems(name, entry, split):
    """The rows of a split as problems. An error names the row, counted from 0."""
    index = 0
    try:
        for row in rows(entry, split):
            yield problem_of(row)
            index += 1
    except Exception as error:  # a broken row, file or connection can raise almost any error
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        hint = "; offline, use --dataset arithmetic or --dataset PATH, a file or folder" if "hub" in entry else ""
        raise DataError(f"cannot read {name}, {split} split, row {index}: {reason}{hint}") from error


# ---- data sets by name: to add one of your own, add one line to DATASETS or GENERATED ------------------------------
# "mine": {"hub": "owner/name"} is a repository of the Hugging Face hub, whose rows have one of the FORMATS.
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


def load(name, split):
    """The problems of a split, "train" or "test", once, in the official order, as a stream."""
    task, colon, difficulty = name.partition(":")
    if task in GENERATED and (not colon or difficulty in tuple("12345")):
        makers, mixed = GENERATED[task]
        return generated(makers, [int(difficulty)] if colon else mixed, split)
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", name) and not name.removesuffix(".gz").endswith(SUFFIXES)
    entry = DATASETS.get(name, {"hub": name} if on_hub else None)
    entry = {"path": name} if os.path.exists(name) else entry  # a file or folder of your own comes before the hub
    if entry is None:
        known = f"{', '.join([*DATASETS, *GENERATED])}, and no file or folder"
        hint = "a difficulty is a number from 1 to 5, as in logic:3"
        raise DataError(f"unknown data set: {name or 'an empty name'} is none of {known}; {hint}")
    if "splits" in entry and split not in entry["splits"]:
        flag, use = ("--dataset", "testing") if split == "train" else ("--eval_dataset", "training")
        raise DataError(f"{name} is for {use} only, it has no {split} split: name another set with {flag}")
    return problems(name, entry, split)


@functools.cache
def examples(name, count):
    """The first training problems, in the official order, to be shown in every prompt."""
    return list(itertools.islice(load(name, "train"), count)) if count else []


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
        if numbers and name in GENERATED:
            if numbers[0] not in tuple("12345"):
                raise DataError(f"{stage}: after {name} comes its difficulty from 1 to 5, then its steps: {name}:3:100")
            name = f"{name}:{numbers.pop(0)}"
        if len(numbers) > 1 or (numbers and not re.fullmatch("[1-9][0-9]{0,8}", numbers[0])):
            raise DataError(f"stage {stage}: after {name} comes the number of its steps, at least 1, and nothing else")
        found.append((name, int(numbers[0]) if numbers else None))
    if len(found) > 1 and any(steps is None for _, steps in found):
        raise DataError(f"{spec}: each of several stages needs its steps, as in logic:3:100,gsm8k:400")
    return found


def shuffled(name, split, seed, position=0):
    """The problems of a split, epoch after epoch without end, from number `position` on, each in a new order."""
    for epoch in itertools.count():
        rng, stream, empty = random.Random(f"{seed} {epoch}"), iter(load(name, split)), True
        while block := list(itertools.islice(stream, 10_000)):  # in blocks, as a data set can be larger than the memory
            empty = False
            rng.shuffle(block)
            yield from block[position:]
            position = max(0, position - len(block))
        if empty:
            raise DataError(f"{name}, {split} split: there is no problem in it")
