"""The questions: where they come from, how they are put to the model, in which order.

A problem is a plain dict: `question`, `answer` (what grading compares with), `solution` (a worked one), `kind` (how it
is graded: math, program, knights, order or countdown) and what that kind needs besides, such as the tests of a program.
Nothing here knows about tokens, tensors, rewards or the group size.

    load(name, split)                      problems of an official split, once, in the official order
    shuffled(name, split, seed, position)  the same without end, every epoch in a new order, from any position on
    stages(spec)                           the data sets of a curriculum, and for how many steps each
    prompt(problem)                        the chat messages that ask the question
    written_out(problem)                   its worked solution in the form that the prompt asks for
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

SYSTEM_PROMPT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


class DataError(ValueError):
    """What is wrong with a data set, in one line for the person who named it."""


def prompt(problem):
    """The chat messages that put a problem to the model."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": problem["question"]}]


def written_out(problem):
    """A problem's worked solution as the system prompt asks for it: the right completion, to the letter."""
    return f"<reasoning>\n{problem['solution']}\n</reasoning>\n<answer>\n{problem['answer']}\n</answer>"


# ---- arithmetic: word problems in GSM8K's own format, generated ----------------------------------------------------

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Kofi", "Lena"]
THINGS = ["apples", "books", "coins", "eggs", "pens", "shells"]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}  # only where exact
SIZES = {"train": 5000, "test": 1000}

STORIES = [  # the question, the operation it asks for, the one that a careless reader takes, and how often they do
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+", "-", 0.2),
    ("{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} is that in all?", "+", "-", 0.2),
    ("{name} has {a} {things} and loses {b}. How many {things} are left?", "-", "+", 0.2),
    ("{name} picks {a} {things} and gives {b} to a friend. How many {things} does {name} keep?", "-", "+", 0.2),
    ("{name} puts {a} {things} into each of {b} boxes. How many {things} are in the boxes?", "*", "+", 0.2),
    ("{name} sells {a} {things} a day for {b} days. How many {things} is that?", "*", "+", 0.2),
    ("{name} spends {a} {things}, and then another {b}. How many {things} are gone?", "+", "-", 0.6),
    ("{name} has {a} {things}, {b} fewer than Omar. How many {things} does Omar have?", "+", "-", 0.6),
    ("{name} counts {a} {things}, but {b} of them are broken. How many {things} are whole?", "-", "+", 0.6),
    ("{name} has {a} {things} after finding {b} more. How many {things} were there before?", "-", "+", 0.6),
    ("{name} lays {a} {things} on each table, and there are {b}. How many {things} is that?", "*", "+", 0.6),
    ("{name} gets {a} {things} from each guest, and {b} come. How many {things} is that?", "*", "+", 0.6),
]


def situation(rng):
    """A story's number in STORIES and its two numbers: a > b for sums and differences, both up to 6 for products."""
    story = rng.randrange(len(STORIES))
    if STORIES[story][1] == "*":
        return story, rng.randint(2, 6), rng.randint(2, 6)
    a = rng.randint(3, 12)
    return story, a, rng.randint(2, a - 1)


def calculation(a, b, operation):
    """GSM8K's annotation of a calculation, and its result: `<<12+7=19>>`, `19`."""
    result = str(OPERATIONS[operation](a, b))
    return f"<<{a}{operation}{b}={result}>>", result


def tell(story, a, b, operation, rng):
    """A problem around a situation, worked with an operation: the right one gives the right solution and answer."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    annotation, result = calculation(a, b, operation)
    return {
        "question": STORIES[story][0].format(name=name, things=things, a=a, b=b),
        "answer": result,
        "kind": "math",
        "solution": f"So {a}{operation}{b} = {annotation}{result} {things}.",
    }


def arithmetic(split):
    """The generated problems of a split, always the same. A story with the same two numbers is never in both splits."""
    rng = random.Random(f"arithmetic {split}")
    count = 0
    while count < SIZES[split]:
        story, a, b = situation(rng)
        held_out = zlib.crc32(f"{story} {a} {b}".encode()) % 5 == 0  # a fifth of all situations is kept for the test
        if held_out == (split == "test"):
            yield tell(story, a, b, STORIES[story][1], rng)
            count += 1


def messy_corpus(count=14000):
    """What the tiny model reads before it meets rewards, [(messages, completion)]: a careless author's solutions.

    Its arithmetic is always right. Its operation often is not, and it writes the tags only part of the time: an output
    drawn from this is right about one time in three, so that reinforcement learning has something true to find.
    A third of the corpus is plain practice in calculating.
    """
    rng = random.Random("messy corpus")
    corpus = []
    while len(corpus) < count:
        story, a, b = situation(rng)
        _, right, careless, habit = STORIES[story]
        problem = tell(story, a, b, careless if rng.random() < habit else right, rng)
        solution, answer, tidy = problem["solution"], problem["answer"], written_out(problem)
        untidy = [
            tidy.replace("\n", " "),
            f"{solution}\n<answer>\n{answer}\n</answer>",
            f"{solution} The answer is {answer}.",
            f"<reasoning>\n{solution}\n</reasoning>\n{answer}",
        ]
        corpus.append((prompt(problem), rng.choices([tidy, *untidy], weights=[42, 8, 8, 21, 21])[0]))
        if rng.random() < 0.5:
            practice = [(a, b, rng.choice(STORIES[story][1:3])) for story, a, b in (situation(rng) for _ in range(12))]
            corpus.append(
                ([{"role": "user", "content": "Practise."}], "".join(calculation(*fact)[0] for fact in practice))
            )
    return corpus


# ---- logic puzzles: generated, with a difficulty from 1 to 5 -------------------------------------------------------
# A clue is (words, (a, b, k)): a sentence about persons number a and b and a number k, as far as it names them.

PUZZLES = {"train": 1000, "test": 200}  # of each kind and difficulty

SAYINGS = {  # what `me` may say, and when it is true; knight[i]: is number i one? The last ones are for the hardest
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

CLUES = {  # what may be told of a race, and when it is true; place[i]: that of number i, from 1. The last say least
    "{a} came in place {k}": lambda place, a, b, k: place[a] == k,
    "{a} came directly before {b}": lambda place, a, b, k: place[a] + 1 == place[b],
    "{a} came before {b}": lambda place, a, b, k: place[a] < place[b],
    "{a} and {b} came one directly after the other": lambda place, a, b, k: abs(place[a] - place[b]) == 1,
    "exactly {k} came between {a} and {b}": lambda place, a, b, k: abs(place[a] - place[b]) == k + 1,
    "{a} came at least {k} places before {b}": lambda place, a, b, k: place[b] - place[a] >= k > 1,
    "{a} did not come in place {k}": lambda place, a, b, k: place[a] != k,
    "{a} and {b} did not come one directly after the other": lambda place, a, b, k: abs(place[a] - place[b]) > 1,
}


def drawn(rng, forms, n):
    """A clue about n persons, true or not. What its words do not name is always the same."""
    words, (a, b) = rng.choice(forms), rng.sample(range(n), 2)
    return words, (a, b if "{b}" in words else a, rng.randint(1, n) if "{k}" in words else 0)


def told(words, about, names):
    """A clue as a sentence."""
    a, b, k = about
    sentence = words.format(a=names[a], b=names[b], k=k)
    return sentence[0].upper() + sentence[1:]


def knights(rng, difficulty):
    """Knights tell the truth, knaves lie, everybody says one thing, and only one assignment agrees with all of it."""
    n, forms = difficulty + 1, list(SAYINGS)[: 5 + 2 * difficulty]
    worlds, possible = list(itertools.product([False, True], repeat=n)), []
    while len(possible) != 1:
        knight, sayings, possible = rng.choice(worlds), [], worlds
        while len(sayings) < n:
            me, (words, about) = len(sayings), drawn(rng, forms, n)
            if me not in about[:2] and SAYINGS[words](knight, me, *about) == knight[me]:
                sayings.append((words, about))
                possible = [world for world in possible if SAYINGS[words](world, me, *about) == world[me]]

    names, kinds = rng.sample(NAMES, n), ["knight" if is_knight else "knave" for is_knight in knight]
    quotes = [f'"{told(*saying, names)}"' for saying in sayings]
    answer = ", ".join(map("{}: {}".format, names, kinds))
    question = (
        f"Knights always tell the truth, knaves always lie. {' '.join(map('{} says: {}.'.format, names, quotes))} "
        "Who is a knight and who is a knave? Answer in this form: Zoe: knight, Yan: knave"
    )
    steps = map("{} is a {}, and {} is {}.".format, names, kinds, quotes, knight)
    solution = "\n".join([f"Try {answer}.", *steps, "Nothing else agrees with everything said."])
    # the same for puzzles that differ in names and seats alone, so that they are in the same split
    content = sorted(f"{kinds[me]} {w} {sorted([kinds[a], kinds[b]])} {k}" for me, (w, (a, b, k)) in enumerate(sayings))
    return content, {"question": question, "answer": answer, "solution": solution, "names": names}


@functools.cache
def allowed(words, about, n):
    """The orders of n persons that a clue allows, as bits of a number: bit i stands for the i-th permutation."""
    places = itertools.permutations(range(1, n + 1))
    return sum(1 << i for i, place in enumerate(places) if CLUES[words](place, *about))


def order(rng, difficulty):
    """A race told in clues, none to spare, that only one order agrees with: the first permutation, bit 0."""
    n, forms = difficulty + 2, list(CLUES)[difficulty - 1 : difficulty + 3]
    clues, possible = [], -1
    while possible != 1:
        words, about = drawn(rng, forms, n)
        if CLUES[words](range(1, n + 1), *about) and possible & ~allowed(words, about, n):
            clues.append((words, about))
            possible &= allowed(words, about, n)
    for clue in clues.copy():
        others = [other for other in clues if other != clue]
        if functools.reduce(operator.and_, (allowed(*other, n) for other in others), -1) == 1:
            clues = others

    names = rng.sample(NAMES, n)
    answer, numbered = ", ".join(names), [f"{name} ({place})" for place, name in enumerate(names, 1)]
    question = (
        f"{', '.join(sorted(names))} ran a race, and no two came together. "
        f"{' '.join(told(*clue, names) + '.' for clue in clues)} "
        "In which order did they come? Answer with all names from first to last, separated by commas."
    )
    steps = [f"{told(*clue, numbered)}." for clue in clues]
    solution = "\n".join([f"Try {answer}.", *steps, "No other order agrees with everything told."])
    content = sorted(f"{words} {sorted([a, b])} {k}" for words, (a, b, k) in clues)
    return content, {"question": question, "answer": answer, "solution": solution, "names": sorted(names)}


def countdown(rng, difficulty):
    """Numbers and a target that a calculation with all of them reaches, without fractions or anything below 1."""
    target, numbers = 0, []
    while not 10 <= target <= 999 or target in numbers:
        numbers = [rng.randint(1, 10 * difficulty) for _ in range(min(difficulty + 2, 6))]
        left, steps = [(number, str(number)) for number in numbers], []
        while len(left) > 1:
            (a, first), (b, second) = (left.pop(rng.randrange(len(left))) for _ in range(2))
            sign = rng.choice("+" + "*" * (a * b < 1000) + "-" * (a > b) + "/" * (a % b == 0 and b > 1))
            target = OPERATIONS[sign](a, b)
            steps.append(f"{a} {sign} {b} = {target}")
            first, second = (part if part.isdecimal() else f"({part})" for part in (first, second))
            left.append((target, f"{first} {sign} {second}"))
    question = (
        f"Reach {target} with the numbers {', '.join(map(str, numbers))}, each used at most once, and with +, -, *, / "
        "and parentheses. Answer with the expression alone, as in: (8 - 2) * 5"
    )
    problem = {"question": question, "answer": left[0][1], "solution": "\n".join(steps)}
    return (sorted(numbers), target), problem | {"numbers": numbers, "target": target}


KINDS = {"knights": [knights], "order": [order], "countdown": [countdown], "logic": [knights, order, countdown]}


def puzzles(make, difficulty, split):
    """The puzzles of a split, always the same. No puzzle is in both splits, under whatever names."""
    kind, asked = make.__name__, set()
    rng = random.Random(f"{kind} {difficulty} {split}")
    while len(asked) < PUZZLES[split]:
        content, problem = make(rng, difficulty)
        held_out = zlib.crc32(str(content).encode()) % 5 == 0  # a fifth of all puzzles is kept for the test
        if held_out == (split == "test") and problem["question"] not in asked:
            asked.add(problem["question"])
            yield problem | {"kind": kind}


# ---- rows as problems, by the fields they have ---------------------------------------------------------------------


def text(row, field):
    """What a field holds, which must be a text."""
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"its {field} must be a text, and not empty")
    row[field].encode()  # half a character, which JSON can name, is refused here
    return row[field]


def worked(question, field, mark):
    """What makes problems of rows with a question, and a worked solution in a field that ends in `mark` and answer."""

    def convert(row):
        solution, found, answer = text(row, field).rpartition(mark)
        if not found or not answer.strip():
            raise ValueError(f"its {field} must end in `{mark} result`")
        return {"question": text(row, question), "answer": answer.strip(), "kind": "math", "solution": solution.strip()}

    return convert


def boxed(solution):
    r"""What the last `\boxed{…}` or `\fbox{…}` holds, braces balanced, or the 5 of `\boxed 5`; empty without any."""
    box = re.search(r".*\\(?:boxed|fbox)(?![a-z])\s*(.*)", solution, re.DOTALL)
    content, depth = box[1] if box else "", 0
    if not content.startswith("{"):
        return re.split(r"[$\n]", content)[0].strip(" .")
    for mark in re.finditer(r"\\.|[{}]", content, re.DOTALL):  # an escaped brace is part of the answer
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return content[1 : mark.start()].strip()
    return ""  # it is never closed


def mathematics(row):
    r"""MATH and its kin: the answer has a field of its own, or is boxed in the solution."""
    question, solution, answer = text(row, "problem"), row.get("solution") or "", row.get("answer")
    if answer is None:
        answer = boxed(text(row, "solution"))
    elif type(answer) is not int:  # as AIME's may be
        answer = text(row, "answer").strip()
    if answer == "" or not isinstance(solution, str):
        raise ValueError(r"it needs an answer, or a solution with its answer in \boxed{}")
    return {"question": question, "answer": str(answer), "kind": "math", "solution": solution.strip()}


def statements(code):
    """The top-level statements of Python code."""
    with warnings.catch_warnings(action="ignore"):  # of the "\d" that many a row has
        return ast.parse(code).body


def program(question, reference, prelude, setup, tests, named):
    """A program to write, as prelude and completion; it is right if its functions, after the setup, pass the tests."""
    functions = [node.name for node in statements(reference) if getattr(node, "name", None) in named]
    parts = [node for test in tests for statement in statements(test) for node in ast.walk(statement)]
    if not functions or not any(isinstance(node, ast.Assert) for node in parts):
        raise ValueError("it needs tests that assert, and they must call a function of the reference program")
    problem = {"question": question, "answer": reference, "kind": "program", "solution": reference}
    return problem | {"prelude": prelude, "setup": setup, "tests": tests, "functions": functions}


def humaneval(row):
    """The head of a function to complete. Its tests are the statements of `check(candidate)`."""
    head, name, setup, tests = text(row, "prompt"), text(row, "entry_point"), [], []
    for node in statements(text(row, "test")):
        if getattr(node, "name", None) == "check":
            # `assert True` stands in many a check, and is no test
            real = [test for test in node.body if not isinstance(getattr(test, "test", None), ast.Constant)]
            tests = [f"candidate = {name}", *map(ast.unparse, real)]
        else:
            setup.append(ast.unparse(node))
    question = f"Complete this Python function. Answer with the whole function, Python code only.\n\n{head}"
    reference = head + text(row, "canonical_solution")
    return program(question, reference, head, "\n".join([head, *setup]), tests, {name})


def mbpp(row):
    """A function to write from a description and its tests, which tell its name."""
    tests, imports, setup = row["test_list"], row.get("test_imports") or [], row.get("test_setup_code") or ""
    lists = isinstance(tests, list) and isinstance(imports, list)
    if not lists or not all(isinstance(code, str) for code in [*tests, *imports, setup]):
        raise ValueError("its test_list must be a list of texts")
    shown = "\n".join(tests)
    named = {node.id for test in statements(shown) for node in ast.walk(test) if isinstance(node, ast.Name)}
    description = text(row, "prompt" if "prompt" in row else "text")
    question = f"{description} Answer with Python code only. It must pass these tests:\n\n{shown}"
    return program(question, text(row, "code"), "", "\n".join([*imports, setup]), tests, named)


FORMATS = {  # the fields that tell a format, and what makes a problem of such a row
    ("question", "answer"): worked("question", "answer", "####"),  # GSM8K
    ("query", "response"): worked("query", "response", "The answer is:"),  # MetaMathQA
    ("problem", "solution"): mathematics,
    ("problem", "answer"): mathematics,
    ("prompt", "canonical_solution", "test", "entry_point"): humaneval,
    ("text", "code", "test_list"): mbpp,
    ("prompt", "code", "test_list"): mbpp,  # its sanitized configuration
}


def problems(name, split):
    """The rows of a split as problems."""
    for index, row in enumerate(rows(name, split)):
        present = {field for field, value in row.items() if value is not None} if isinstance(row, dict) else set()
        convert = next((convert for fields, convert in FORMATS.items() if present.issuperset(fields)), None)
        try:
            if convert is None:
                raise ValueError("its fields must be " + ", or ".join(" + ".join(fields) for fields in FORMATS))
            problem = convert(row)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            reason = str(error) or "its program is nested too deeply"
            raise DataError(f"{name}, {split} split, row {index}: {reason}") from error
        yield problem


# ---- where rows come from: files, folders, the hub -----------------------------------------------------------------

READERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".json": "json"}  # each may end in .gz as well
HUB = {  # repository, configuration, and what its splits are to us
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math": ("nlile/hendrycks-MATH-benchmark", None, {"train": "train", "test": "test"}),  # tests on MATH-500
    "metamath": ("meta-math/MetaMathQA", None, {"train": "train"}),
    "math500": ("HuggingFaceH4/MATH-500", None, {"test": "test"}),
    "aime": ("HuggingFaceH4/aime_2024", None, {"test": "train"}),
    "humaneval": ("openai/openai_humaneval", None, {"train": "test", "test": "test"}),  # shared out by `rows`
    "mbpp": ("google-research-datasets/mbpp", "full", {"train": "train", "test": "test"}),
}
OFFLINE = "; offline, give a file or folder in its place (--dataset PATH), or use --dataset arithmetic"


def files_of(path, split):
    """The files of a split: the path if it is one, the folder's with the split as a word of their names, or MATH's."""
    if path.is_file():
        files = [path]
    elif (path / split).is_dir():  # MATH as published: train/algebra/1.json
        files = (path / split).rglob("*.json")
    else:
        folder = next((path / sub for sub in ("main", "data") if (path / sub).is_dir()), path)  # clones of the hub's
        files = (file for file in folder.glob("*") if split in re.split(r"[^a-z]+", file.stem.lower()))
    files = sorted(files, key=lambda file: (file.parent, len(file.stem), file))  # 2.json before 10.json
    for suffix in READERS:
        if found := [file for file in files if file.name.removesuffix(".gz").endswith(suffix)]:
            return found
    endings = ", ".join(READERS)
    raise DataError(f"{path}: a data file must end in {endings}, and in a folder have {split!r} in its name")


def json_rows(path):
    """Stream the rows of a JSON file: one on each line, or a list of rows, or one row over several lines."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        first = file.readline()
        try:
            value = json.loads(first)
        except json.JSONDecodeError:
            value = json.loads(first + file.read())
        yield from value if isinstance(value, list) else [value]
        yield from map(json.loads, filter(str.strip, file))


def rows(name, split):
    """Stream the raw rows of a split, from one file (any split), a folder, or the hub.

    HumanEval on the hub has one split: every fifth row is for the test here, and the others are for training.
    """
    import datasets  # here, for it is slow to import and the generated problems do not need it

    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what goes wrong is said below, in one line
    path = Path(name)
    try:
        if path.exists():
            files = files_of(path, split)
            reader = READERS[Path(files[0].name.removesuffix(".gz")).suffix]
            if reader == "json":
                yield from itertools.chain.from_iterable(map(json_rows, files))
            else:
                files = list(map(str, files))
                yield from datasets.load_dataset(reader, data_files=files, split="train", streaming=True)
        else:
            repository, configuration, splits = HUB.get(name, (name, None, {split: split}))
            stream = datasets.load_dataset(repository, configuration, split=splits[split], streaming=True)
            shared = name == "humaneval"
            yield from (row for i, row in enumerate(stream) if not shared or (i % 5 == 0) == (split == "test"))
    except DataError:
        raise
    except Exception as error:  # whatever a broken file or connection makes five libraries raise is the same news
        reason = (str(error).strip() or "it is empty").splitlines()[0]
        raise DataError(f"cannot read {name}, {split} split: {reason}{OFFLINE * (not path.exists())}") from error


# ---- by name -------------------------------------------------------------------------------------------------------


def parsed(name):
    """A data set's name as (task, difficulty), or a DataError: `logic:3` is ("logic", 3), `gsm8k` is ("gsm8k", 1)."""
    task, mark, difficulty = name.partition(":")
    if task in KINDS and mark and difficulty not in tuple("12345"):
        raise DataError(f"{name}: the difficulty of {task} is a number from 1 to 5, as in {task}:3")
    if task in KINDS:
        return task, int(difficulty or 1)
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", name) and not name.endswith(tuple(READERS))
    if name != "arithmetic" and name not in HUB and not os.path.exists(name) and not on_hub:
        known = ", ".join(["arithmetic", *KINDS, *HUB])
        raise DataError(f"unknown data set: {name} is none of {known}, and no file or folder")
    return name, 1


def load(name, split):
    """The problems of a split, "train" or "test", once in the official order; lazily, so that they can stream."""
    task, difficulty = parsed(name)
    if task == "arithmetic":
        return arithmetic(split)
    if task in KINDS:  # one kind, or several in turn
        kinds = [puzzles(make, difficulty, split) for make in KINDS[task]]
        return itertools.chain.from_iterable(zip(*kinds))
    if name in HUB and split not in HUB[name][2] and not os.path.exists(name):
        flag, use = ("--dataset", "testing") if split == "train" else ("--eval_dataset", "training")
        raise DataError(f"{name} is for {use} only, it has no {split} split: name another set with {flag}")
    return problems(name, split)


def stages(spec):
    """The stages of a curriculum: `logic:3:100,gsm8k:400` is [("logic:3", 100), ("gsm8k", 400)], name and steps.

    A data set alone is one stage, and its steps may be left out: they are None.
    """
    if os.path.exists(spec):
        return [(spec, None)]
    found = []
    for stage in spec.split(","):
        if not stage.strip():
            raise DataError(f"{spec!r}: an empty name")
        name, *steps = stage.strip().split(":")
        if steps and name in KINDS:
            name = f"{name}:{steps.pop(0)}"
        parsed(name)
        if len(steps) > 1 or steps and not re.fullmatch("[1-9][0-9]{0,8}", steps[0]):
            raise DataError(f"stage {stage}: after {name} comes the number of its steps, at least 1, and nothing else")
        found.append((name, int(steps[0]) if steps else None))
    if len(found) > 1 and any(steps is None for _, steps in found):
        raise DataError(f"{spec}: each of several stages needs its steps, as in logic:3:100,gsm8k:400")
    return found


def shuffled(name, split, seed, position=0):
    """The problems of a split without end, each epoch in a new order, beginning with the position-th (counted from 0).

    The order depends on the seed and the epoch alone. Problems are shuffled in blocks of 10,000 as they stream in: that
    is all of GSM8K.
    """

    def endless():
        for epoch in itertools.count():
            rng, problems = random.Random(f"{seed} {epoch}"), iter(load(name, split))
            empty = True
            while block := list(itertools.islice(problems, 10_000)):
                empty = False
                rng.shuffle(block)
                yield from block
            if empty:
                raise DataError(f"{name}, {split} split: there is no problem in it")

    return itertools.islice(endless(), position, None)
