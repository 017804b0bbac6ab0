"""The rules: what a completion answers, whether that is right, and every reward.

A reward is a function of a completion and its problem, plain strings both, and says nothing of its weight: the weights
are constants in main.py. Whatever a model writes, the rules give a number; they never raise.

    extract_answer(completion)       the answer that a completion gives, or None
    grade(completion, gold)          is it right?
    math_equal(prediction, gold)     do two answers mean the same?
    rewards(completion, problem)     {name: number from 0 to 1}
    majority(completions)            the answer that most of them give
"""

import re
from fractions import Fraction

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


# ---- what is the answer? -------------------------------------------------------------------------------------------


def outside_reasoning(completion):
    """The completion without its reasoning: an unclosed <reasoning> lasts until an answer tag opens, or to the end."""
    kept, position = [], 0
    while (start := completion.find("<reasoning>", position)) >= 0:
        kept.append(completion[position:start])
        end = completion.find("</reasoning>", start)
        if end < 0:
            answer = completion.find("<answer>", start)
            position = answer if answer >= 0 else len(completion)
            break
        position = end + len("</reasoning>")
    return "".join(kept) + completion[position:]


def last_boxed(text):
    r"""What the last `\boxed{…}` holds, braces balanced, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end]
    return None  # cut off before the box was closed


def extract_answer(completion):
    r"""The answer that a completion gives, or None: its last answer tag, else its last `\boxed{…}`, else what follows
    its last `####`. What stands only inside the reasoning is no answer."""
    text = outside_reasoning(completion)
    if "<answer>" in text:
        answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    elif "\\boxed{" in text:
        answer = last_boxed(text)
    elif "####" in text:
        answer = text.rpartition("####")[2].strip().partition("\n")[0]
    else:
        answer = None
    return answer.strip() or None if answer else None


# ---- do two answers mean the same? ---------------------------------------------------------------------------------

# a sign (before or after a currency), digits with or without thousands separators, decimals, a denominator: -1,080.50
NUMBER = re.compile(
    r"(?<![\w.^/*+-])([+-]?)[€£]?([+-]?)(\d{1,3}(?:,\d{3})++(?![\d,])|\d{1,40}+|(?=\.\d))(\.\d{0,40}+)?+"
    r"(?:\s?/\s?(\d{1,40}+))?+(?![\d^*+]|\s?/\s?\d|[eE][+-]?\d|-\d)"
)
CLUTTER = str.maketrans({"−": "-", "–": "-", "\\": None, "$": None, "`": None, "\u00a0": " ", "\u202f": " "})


def number(text):
    """The one number that a short text states, exactly, or None: `$1,080`, `72.`, `-5 degrees`, `3 + 4 = 7`."""
    if len(text) > 300:
        return None
    text = text.translate(CLUTTER).replace("**", "").rpartition("=")[2].strip()
    stated = NUMBER.findall(re.sub(r"^([+-])\s+", r"\1", text))
    if len(stated) != 1 or len(re.findall(r"\d+(?:[.,]\d+)*", text)) != 1 + bool(stated[0][4]):
        return None  # none, or a choice of several, or a calculation
    sign, inner_sign, whole, decimals, denominator = stated[0]
    if denominator and not int(denominator):
        return None
    value = Fraction((whole.replace(",", "") or "0") + decimals.rstrip(".")) / int(denominator or 1)
    return -value if "-" in (sign, inner_sign) else value


def math_equal(prediction, gold):
    """Do two answers mean the same? By value where both state one number, else as text, case and spaces aside."""
    left, right = number(prediction), number(gold)
    if left is not None and right is not None:
        return left == right
    return " ".join(prediction.split()).casefold() == " ".join(gold.split()).casefold()


def grade(completion, gold):
    """Is a completion's answer right? The gold is a plain answer or a GSM8K answer field: what follows `####`."""
    answer = extract_answer(completion)
    return answer is not None and math_equal(answer, gold.rpartition("####")[2].strip())


def majority(completions):
    """The answer that most completions give, the earliest of equals, or None: the vote of maj@k (self-consistency)."""
    votes = []  # [answer, how many completions gave it]
    for answer in filter(None, map(extract_answer, completions)):
        same = next((vote for vote in votes if math_equal(answer, vote[0])), None)
        if same:
            same[1] += 1
        else:
            votes.append([answer, 1])
    return max(votes, key=lambda vote: vote[1])[0] if votes else None


# ---- the rewards ---------------------------------------------------------------------------------------------------


def is_integer(text):
    value = number(text)
    return value is not None and value.denominator == 1


def soft_format(completion):
    """Does it begin with the reasoning, closed, and go on with the answer, closed? Anything may follow."""
    reasoning, closed, rest = completion.strip().partition("</reasoning>")
    return (
        reasoning.startswith("<reasoning>")
        and bool(closed)
        and rest.strip().startswith("<answer>")
        and "</answer>" in rest
    )


def strict_format(completion):
    """Is it the asked form to the letter: each tag once, in order, on a line of its own, neither part empty?"""
    lines = completion.strip().split("\n")
    if any(completion.count(tag) != 1 for tag in TAGS) or any(tag not in lines for tag in TAGS):
        return False
    start, end, answer, last = (lines.index(tag) for tag in TAGS)
    parts = "".join(lines[1:end]).strip(), "".join(lines[answer + 1 : last]).strip()
    return start == 0 < end == answer - 1 < last == len(lines) - 1 and all(parts)


def rewards(completion, problem):
    """Every rule-based reward of a completion, by name and unweighted, each from 0 to 1.

    correctness    the answer is right
    integer        the answer is a whole number, where the right one is
    strict_format  exactly the asked form, save spaces around the whole
    soft_format    reasoning and then answer, on any lines, whatever follows
    tag_count      the share of the four tags that stand there exactly once
    """
    answer, gold = extract_answer(completion), problem["answer"]
    return {
        "correctness": float(grade(completion, gold)),
        "integer": float(answer is not None and is_integer(answer) and is_integer(gold)),
        "strict_format": float(strict_format(completion)),
        "soft_format": float(soft_format(completion)),
        "tag_count": sum(completion.count(tag) == 1 for tag in TAGS) / len(TAGS),
    }
