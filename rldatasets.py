"""The questions: where they come from, how they are put to the model, in which order.

A problem is a plain dict of strings: `question`, `answer` (what grading compares with), `kind` (how it is graded) and
`solution` (a worked one). Nothing here knows about tokens, tensors, rewards or the group size.

    load(name, split)                      problems of an official split, once, in the official order
    shuffled(name, split, seed, position)  the same without end, every epoch in a new order, from any position on
    prompt(problem)                        the chat messages that ask the question
    written_out(problem)                   its worked solution in the form that the prompt asks for
"""

import itertools
import logging
import operator
import random
import re
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
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
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


# ---- GSM8K: streamed from the hub, or from files -------------------------------------------------------------------


def gsm8k(name, split):
    """GSM8K's rows as problems: from the hub (openai/gsm8k), or from a file or folder of rows in the same format."""
    for index, row in enumerate(rows(name, split)):
        question, written = row.get("question"), row.get("answer")
        solution, mark, answer = written.rpartition("####") if isinstance(written, str) else ("", "", "")
        if not isinstance(question, str) or not question.strip() or not mark or not answer.strip():
            raise DataError(
                f"{name}, {split} split, row {index}: a question and an answer that ends in `#### result` are needed"
            )
        yield {"question": question, "answer": answer.strip(), "kind": "math", "solution": solution.strip()}


def files_of(folder, split, suffix):
    """The files of a split: with its name as a word in theirs, `train.jsonl` or `train-00000-of-00001.parquet`."""
    return (file for file in folder.glob(f"*{suffix}") if split in re.split(r"[^a-z]+", file.stem.lower()))


def rows(name, split):
    """Stream the raw rows of a split, from the hub, a folder with files named by split, or one file (any split)."""
    import datasets  # here, for it is slow to import and the generated problems do not need it

    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what goes wrong is said below, in one line
    path = Path(name)
    try:
        if path.is_file():
            kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}.get(path.suffix)
            if kind is None:
                raise DataError(f"{name}: a data file must end in .jsonl, .json, .parquet or .csv")
            yield from datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        elif path.is_dir():
            folder = path / "main" if (path / "main").is_dir() else path  # a clone of the hub's repository
            kinds = {"json": ".jsonl", "parquet": ".parquet"}
            found = {kind: sorted(map(str, files_of(folder, split, suffix))) for kind, suffix in kinds.items()}
            kind = next((kind for kind, files in found.items() if files), None)
            if kind is None:
                raise DataError(f"{name}: no .jsonl or .parquet file with {split!r} in its name")
            yield from datasets.load_dataset(kind, data_files=found[kind], split="train", streaming=True)
        else:
            yield from datasets.load_dataset("openai/gsm8k", "main", split=split, streaming=True)
    except (OSError, datasets.exceptions.DatasetsError, ValueError, RuntimeError, StopIteration) as error:
        if isinstance(error, DataError):
            raise
        reason = (str(error).strip() or "it is empty").splitlines()[0]
        raise DataError(f"cannot read {name}, {split} split: {reason}{OFFLINE * (not path.exists())}") from error


OFFLINE = "; offline, give a file or folder in its place (--dataset PATH), or use --dataset arithmetic"


# ---- by name -------------------------------------------------------------------------------------------------------


def load(name, split):
    """The problems of a split, "train" or "test", once in the official order; lazily, so that they can stream."""
    if name == "arithmetic":
        return arithmetic(split)
    if name == "gsm8k" or Path(name).exists():
        return gsm8k(name, split)
    raise DataError(f"unknown data set: {name} is none of arithmetic, gsm8k, and no file or folder")


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
