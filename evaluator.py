r"""The rules: what a completion answers, whether that is right, its rewards, and what is counted of many outputs.

Completions and problems are plain text and dicts; no model is known here. What to call, in the order of the sections:
    extract_answer(completion)         its answer, or None
    math_equal(prediction, gold)       do two answers mean the same?
    right(answer, problem)             is an answer right? Tables READINGS and CHECKERS, by kind of problem
    step_rewards(completion, problem)  a reward for each reasoning step
    rewards(completion, problem)       {name: number}, table REWARDS; `score` does this for many completions
    compare(groups, problems)          rewards that compare the completions of a problem, table GROUP_REWARDS
    step_metrics, eval_metrics         what a row of metrics.jsonl says about outputs

To add a reward, write a function under `@reward` or `@group_reward`, and give it a weight in main.py.
To add a puzzle, write a maker in rldatasets.py, and here what an answer says (READINGS) or a checker (CHECKERS), and
add an entry to the table beside each.
Which answers are equal and which are not: see the tables SAME and DIFFERENT in tests/test_evaluator.py.
"""
# What the linter warns of is wanted here: programs are run (S102) and may raise anything (BLE001), pipes stay open
# (SIM115), only nan differs from itself (PLR0124), and words are easier to read without quotes (SIM905).
# ruff: noqa: BLE001, PLR0124, S102, SIM115, SIM905

import ast
import builtins
import cmath
import difflib
import functools
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import types
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from fractions import Fraction
from typing import NamedTuple

import numpy

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")  # as the prompt of rldatasets.py asks for them

# In the patterns below, `++` and `*+` never give back what they matched: so no text takes long to search.
# Patterns that begin with (?x) ignore spaces and line ends, and have comments.


# ---- which answer does a completion give? --------------------------------------------------------------------------


def extract_answer(completion):
    r"""The answer that a completion gives, or None: its last answer tag, else its last `\boxed{…}`, else the line
    after its last `####`. Text inside the reasoning does not count."""
    text = outside_reasoning(completion)
    if "<answer>" in text:
        answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    elif BOX.search(text):
        answer = boxed(text)
    elif "####" in text:
        answer = after_hashes(text)
    else:
        return None
    return answer.strip() or None


def after_hashes(text):
    """The line after the last `####` of a text; without one, the text."""
    _, hashes, after = text.rpartition("####")
    return after.strip().partition("\n")[0] if hashes else text


def after_thinking(completion):
    """The completion without its thoughts: up to </think>, and from a <think> that is never closed on."""
    # before the last </think> every <think> is closed, after it none is: so the searches are quick
    before, end_tag, after = completion.rpartition("</think>")
    before = re.sub(r"(?s)\A(?:(?!<think>).)*?</think>|<think>.*?</think>", "", before + end_tag)
    return before + re.sub(r"(?s)\A\s*<think>.*", "", after)


def outside_reasoning(completion):
    """The completion without its thoughts and its reasoning. A <reasoning> that is never closed ends at <answer>, or at
    the end."""
    completion = after_thinking(completion)
    # before the last </reasoning> every <reasoning> is closed, after it none is: so both searches are quick
    before, end_tag, after = completion.rpartition("</reasoning>")
    before = re.sub(r"(?s)<reasoning>.*?</reasoning>", "", before + end_tag)
    return before + re.sub(r"(?s)<reasoning>.*?(?=<answer>|\Z)", "", after, count=1)


BOX = re.compile(r"""(?x)
    \\(?:boxed|fbox)(?![A-Za-z])\s*+
    ( [^\s{$][^\s$]*? (?=[.,]?(?:[\s$]|\Z)) )?  # what stands without braces: \boxed 5
""")
BETWEEN_BOXES = re.compile(r"""(?x)
    [\s$,]*+ (?:and|or|=|\\text\s*\{\s*(?:and|or)\s*\})?  # \boxed{2}$ and $\boxed{5}
    [\s$,]*+ (?:[A-Za-z]\w*\s*=\s*)?                      # x = \boxed{2}, x = \boxed{5}
""")


def boxed(text):
    r"""What the last box holds: `\boxed{…}`, `\fbox{…}`, or `\boxed 5` up to a space or $. If never closed, "".
    Boxes with only `and`, `or`, `x =` or commas between them are one list: `\boxed{2} and \boxed{5}` is `2, 5`."""
    if "box" not in text:
        return ""
    closed_at = closing_braces(text)
    contents = []
    end = 0  # of the box before
    for box in BOX.finditer(text):
        if box.start() < end:
            continue  # it stands inside the box before
        if not BETWEEN_BOXES.fullmatch(text, end, box.start()):
            contents = []
        end = box.end()
        if box[1]:
            contents.append(box[1])
        elif end in closed_at:
            contents.append(text[end + 1 : closed_at[end]].strip())
            end = closed_at[end] + 1
        else:  # never closed
            contents = []
    return ", ".join(contents)


def closing_braces(text):
    r"""Where each brace is closed: {position of a {: position of its }}. \{ and \} are text, not braces."""
    closed_at = {}
    still_open = []
    for match in re.finditer(r"(?s)\\.|[{}]", text):
        if match[0] == "{":
            still_open.append(match.start())
        elif match[0] == "}" and still_open:
            closed_at[still_open.pop()] = match.start()
    return closed_at


# ---- what does an answer mean? -------------------------------------------------------------------------------------
# `tidy` brings an answer into one notation, `tokenize` cuts it into tokens, and `Reader` computes its value. A point
# gives every variable a random number. Two formulas that are equal at all points are taken as the same (the idea of
# Schwartz and Zippel). No text is ever run as code. Lengths, depths and numbers are limited; what cannot be read is
# compared as text.

LONGEST = 500  # characters of an answer that is read as mathematics
LARGEST = 20_000  # bits of an exact number


class Point(NamedTuple):
    """A choice of values for variables: the number of a variable follows from its name, the seed and the sign."""

    seed: int
    sign: str  # of all variables; ± is + for some and - for others


# An answer must have a value at the four points with +. At the others it may have none (√-2): such a point is skipped.
# The others are needed to tell x from |x|.
POINTS = [Point(seed, "+") for seed in range(4)]
POINTS += [Point(-1, "-"), Point(-2, "±"), Point(-3, "±"), Point(-4, "±")]


def by_spelling(table):
    """A table with a name and its other spellings in each line, turned round: {"ft": "foot", "feet": "foot"}."""
    names = {}
    for line in table.strip().splitlines():
        name, *spellings = line.split()
        names.update(dict.fromkeys(spellings, name))
    return names


def any_of(words):
    """A pattern for any of some words."""
    return f"(?:{'|'.join(words.split())})"


SIGNS = str.maketrans(
    by_spelling("""
    -  − – — ⁻
    *  × · ⋅ ∙
    /  ÷ ∕ ⁄
    '  ’
""")
)
COMMANDS = by_spelling(r"""
    \sqrt  √
    \pi  π
    \theta  θ
    \infty  ∞
    \le  ≤
    \ge  ≥
    \ne  ≠
    \pm  ±
    \mp  ∓
    \cup  ∪
    \in  ∈
    \approx  ≈
    \emptyset  ∅
    \degrees  ° º
""")
ONES = "one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMERALS = dict(zip(["zero", *ONES, *TEENS, *TENS], [*range(20), *range(20, 100, 10)]))
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
IN_WORDS = rf"(?:(?:{'|'.join(TENS)})[ -](?:{'|'.join(ONES)})|{'|'.join(NUMERALS)})\b"  # seventy-two
ORDINAL = rf"(?:third|(?:{'|'.join(ONES + TEENS)}|fif|eigh|nin|twelf|[a-z]+tie|hundred|thousand|million)th)s?"
# After a number in words these divide it: seventy-two hundredths are not 72. `8 quarters` and `the third house` divide
# nothing.
FRACTION_WORD = rf"(?:hal(?:f|ves)|quarters?[ ]of|(?<!the[ ]){ORDINAL})\b"
# a number in words stays as it is if one of these follows
OTHER_NUMBER = rf"(?:\d|\b(?:{'|'.join(NUMERALS)}|point|quarters?|{FRACTION_WORD})\b)"
# words that change a number: `Total: 72` is 72 with a label, but `not: 72` is not 72
MEANINGFUL = (
    r"(?i:\b(?:not|or|wrong|incorrect|thousands?|millions?|billions?|negative|squared|plus|below|half|twice)\b)"
)
TEXT = r"\\(?:text(?:rm|it|bf|normal|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname|boldsymbol|emph|underline)\*?\s*"
UNITS = by_spelling("""
    meter  m
    centimeter  cm
    millimeter  mm
    kilometer  km
    foot  ft feet
    inch  in inches
    yard  yd
    mile  mi
    gram  gm
    kilogram  kg
    milligram  mg
    milliliter  ml
    pound  lb lbs
    ounce  oz
    hour  h hr hrs
    minute  min mins
    second  sec secs
    mile/hour  mph
    kilometer/hour  kph
    /  per
    square  sq squared ^2
    cubic  cubed ^3
    dollar  USD
    euro  EUR
    %  percent pct
    point  pts
    day  day
    men  men
    am  am
    pm  pm
""")


def command_sign(match):
    return f"{COMMANDS[match[0]]} "


def plain_signs(match):
    """Other signs as ASCII, where NFKC or the table has one: also full-width digits, and 2 for a raised ²."""
    return unicodedata.normalize("NFKC", match[0].translate(SIGNS))


def mixed_number(match):
    r"""A mixed number as a sum: 1\frac12 and 1 1/2 as (1+1/2). But 3\frac52 stays a product."""
    integer, top, bottom = match.groups()
    return f"({integer}+{top}/{bottom})" if int(top) < int(bottom) else match[0]


def matrix(match):
    """A matrix as a list of lists, and one with a single row or column as a tuple."""
    line_end = r"\\\\(?:\s*\[[\d.]+ ?[a-z]{2}\])?|\\cr(?![a-z])"  # \\ or \\[6pt] or \cr
    lines = re.split(line_end, match[1].strip().removesuffix("\\\\"))
    rows = [line.replace("&", ",") for line in lines]
    if len(rows) == 1 or "&" not in match[1]:
        return f"({','.join(rows)})"
    return f"[{','.join(f'[{row}]' for row in rows)}]"


def meters_or_hours(match):
    return f"{match[1]} {UNITS[match[2]]}"


def in_digits(match):
    words = re.split("[ -]", match[0].lower())
    return str(sum(NUMERALS[word] for word in words))


def multiple(match):
    return f"*{MULTIPLES[match[1]]}"


def both_signs(match):
    r"""3 \pm x as 3 + x, 3 - x."""
    upper = match[1].replace(r"\pm", "+").replace(r"\mp", "-")
    lower = match[1].replace(r"\pm", "-").replace(r"\mp", "+")
    return f"{upper}, {lower}"


MATRIX = r"\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?"
ANSWER_IS = r"""(?xi)
    ^\W* (?:(?:so|thus|hence|therefore),?[ ])? (?:the[ ])? (?:final[ ]|correct[ ])?
    (?:answer|option|choice) (?:\s+is|\s*[:=])+ \s*
"""
SIZE = r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])|\\!\s*|`|\\\\$"
FONT = r"\\(?:large|Large|bf|rm|it|Rightarrow|implies)(?![a-zA-Z])|\\(?:text)?color\s*\{[a-z]*\}"
ABOUT = r"approximately|about|exactly|\\approx|\\sim"
NUMBER_AND_FRAC = r"(?<![\w.^/{}])(\d{1,9})\s*\\frac\s*\{\s*(\d{1,9})\s*\}\s*\{\s*(\d{1,9})\s*\}"
METERS_OR_HOURS = r"""(?x)
    ^\s* ((?:\w+[ ]?=[ ]?)?[-+\d.,/ ]*\d) \s+ ([mh])\b  # 5 m, x = 5 h, but not 2m + 1
    (?= \s*(?:\^[ ]?\{?[23]\}?|/[a-z]+)? [\s.,]*$ )     # 5 m^3, 5 m/s, but not 5 m^2 h
"""
REWRITES = [  # pattern; what a match is replaced by; an example, tested: what this rule alone makes of a text
    # signs and markup
    (r"[₀-₉]+", r"_{\g<0>}", "x₂ → x_{₂}"),  # NFKC would make x2 of it
    (r"[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", "10⁻³ → 10^{⁻³}"),
    (r"[\u200b€£¥₹]", "", "€5 → 5"),
    (r"-\\?\$(?=[\d.])", "-", "has -$18 → has -18"),
    (f"[{''.join(COMMANDS)}]", command_sign, r"√3 → \sqrt 3"),
    (r"[^\x00-\x7f]+", plain_signs, "２ × −5 → 2 * -5"),
    (r"(\d)⁄([2-9])", r"\\frac{\1}{\2}", r"11⁄2 → 1\frac{1}{2}"),  # NFKC made 11⁄2 of 1½
    (rf"(?s)\\begin{MATRIX}(.*?)\\end{MATRIX}", matrix, r"\begin{matrix}1&2\\3&4\end{matrix} → [[1,2],[3,4]]"),
    # <<3*4=12>> is GSM8K's, <|im_end|> ends a chat
    (r"<<[^<>]*>>|<\|\w+\|>|</?(?:s|b|i|em|strong)>", "", "<<3*4=12>><b>12</b><|im_end|> → 12"),
    (SIZE, "", r"\left(1,\!080\\ → (1,080"),
    (r"(?<=\d)(?:\{,\}|\\,|[_'])(?=\d{3})", ",", r"1{,}080\,000 → 1,080,000"),
    (TEXT + r"\{([^{}]*)\}", r" \1 ", r"8\text{cm}. → 8 cm ."),
    (rf"{TEXT}(?=\{{)|{FONT}", " ", r"3\mathbf{\frac{7}{9}} → 3 {\frac{7}{9}}"),
    (r"(?<!\\)\\[,;: ()\[\]$]|\\q?quad(?![a-zA-Z])|\\(?=%)|~|\$", " ", r"(1,\;2) → (1, 2)"),
    (r"\\[dtc]?(frac|binom)(?![a-z])", r"\\\1", r"\dfrac12 → \frac12"),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}", r"\frac12 → \frac{1}{2}"),
    (r"(\\(?:sin|cos|tan|log)\s*[_^])\s*(\d)", r"\1{\2}", r"\log_2 256 → \log_{2} 256"),
    (r"\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degrees?(?![a-z])", " degrees ", r"90^\circ. → 90 degrees ."),
    # words
    (ANSWER_IS, "", "So, the final answer is: 72 → 72"),
    (r"(?i)(?<=\w)[\W_]*(?:in )?\bbase\W*(\d+)\W*$", r"_{\1}", "101 (base 2) → 101_{2}"),
    (r"^\((\d+)\)(?=_)", r"\1", "(101)_2 → 101_2"),
    (rf"^(?!.*{MEANINGFUL})[A-Za-z][A-Za-z ]*: ", "", "Total: 72 → 72"),
    (rf"(?<=\S) \((?!.*{MEANINGFUL})[A-Za-z -]{{3,}}\)$", "", "72 (seventy-two) → 72"),
    (r"(?<=[\w)%]) x +(?=[\d(])", " * ", "12 x 3 → 12 * 3"),
    (r"([\d.]+)%(?= ?(?:of|\*) ?\d)", r"(\1/100)", "50% of 72 → (50/100) of 72"),
    (r"(\d/\d+|\)) of (?=\d)", r"\1 * ", "1/2 of 72 → 1/2 * 72"),
    (r"[=-]>", "=", "12 * 3 => 36 → 12 * 3 = 36"),
    (r"^\s*([A-Za-z]\w*)\s*\\approx", r"\1=", r"x \approx 5 → x= 5"),
    (r"(?<=\S)\s*\\approx.*", "", r"8\sqrt2 \approx 11.3 → 8\sqrt2"),  # we take the exact value
    (rf"(?i)^\s*(?:{ABOUT}|US|USD|EUR|GBP)\s*(?=[-+\d.\\])", "", "about 72 → 72"),
    (r"(?i)(\d)(?::00)?\s*a\.?\s?m\b\.?", r"\1 am", "9:00 a.m. → 9 am"),
    (r"(?i)(\d)(?::00)?\s*p\.?\s?m\b\.?", r"\1 pm", "9PM → 9 pm"),
    (METERS_OR_HOURS, meters_or_hours, "5 m → 5 meter"),
    # numbers
    (rf"(?i)^{IN_WORDS}(?!.*{OTHER_NUMBER})", in_digits, "seventy-two clips → 72 clips"),
    (r"(?i)^(?:minus|negative) (?=[\d.\\])", "-", "negative 50 → -50"),
    # the period of a repeating decimal, 20 times
    (r"(\.\d*)\s*\\(?:overline|bar)\s*\{?(\d+)\}?", r"\1" + 20 * r"\2", r"0.1\bar6 → 0.166666666666666666666"),
    (NUMBER_AND_FRAC, mixed_number, r"1\frac{1}{2} → (1+1/2)"),
    (r"(?<![\w.^/{}])(\d{1,9}) +(\d{1,9})/(\d{1,9})(?![\d.])", mixed_number, "1 1/2 → (1+1/2)"),
    (rf"(?<=\d) ?({'|'.join(MULTIPLES)})s?\b", multiple, "2 million → 2*1000000"),
    (r"(?s)^(.*\\pm.*?)[\s.]*$", both_signs, r"3 \pm x → 3 + x, 3 - x"),
]
COMPILED = [(re.compile(pattern), new) for pattern, new, _ in REWRITES]


def tidy(text):
    """An answer without its box, in one notation, and without markup that means nothing."""
    text = boxed(text) or text
    if len(text) <= LONGEST:
        for pattern, new in COMPILED:
            text = pattern.sub(new, text)
    text = " ".join(text.split())
    return text.lstrip(' ,;:#*_"“”').rstrip(' .,;:*_"“”')  # .5 keeps its point, and 5# its sign


# a word has 4 letters or more, or 3 with a vowel if a space precedes; other letters are variables: 2xy
WORD = r"(?:[A-Za-z]{4,}+|(?<=\s)(?=[a-z]*[aeiou])[a-z]{3}(?![A-Za-z]))"
UNIT_NAMES = "|".join(name for name in (*UNITS, *UNITS.values()) if re.fullmatch("[A-Za-z]{2,}", name))  # not m and h
UNIT = rf"\s?(?:{UNIT_NAMES}|{WORD})(?![A-Za-z])(?:\s?\^\s?\{{?[23]\b\}}?)?"  # cm, feet, cm^2
# what is counted: a word in the plural, one with another plural, or any word after 1; `18 factorial` counts nothing
PLURALS = any_of("""
    people [a-z]*children women feet teeth fish sheep mice geese deer cattle dice money change water candy fruit
    bread profit yen yuan baht won rand staff luggage furniture homework salmon shrimp trout bison offspring
    aircraft old each left apiece
""")
NO_NOUNS = "minus|plus|times(?!\\W*$)|less|halves|\\w*wards"
NOUN = rf"(?:(?!(?:{NO_NOUNS})\b)[A-Za-z][A-Za-z-]+s|{PLURALS}|(?<=\b1[ ])[a-z]+)\b"
COUNTED = re.compile(rf"(?i)(?:.*\W)?(?:{UNIT_NAMES}|{NOUN}|(?:per |/ ?)[a-z]+|[a-z]{{0,2}}|%)(?:\W*\d)?\W*")
TRAILING_UNITS = re.compile(rf"""(?x)
    (?: (?<=[\d)}}.]) | (?<=\\pi) )                        # they directly follow a number
    (?: \s?%
      | \s?/? (?! \s?(?:squared|cubed|{FRACTION_WORD}) ) {UNIT}       # 8 cm^2, 8 square feet, 72/hour
        (?: \s?/\s?[A-Za-z]{{1,2}}(?![A-Za-z]) | \s?/?{UNIT} )*       # 60 km/h, 60 miles per hour
    )
    (?= \s?(?:[,)]|$) )                                    # after them comes `,`, `)` or the end of the answer
""")


def unit_names(text):
    """The words in a text, with its units by their full names."""
    names = set()
    for word in re.findall(r"[A-Za-z]+|\^\d|%", re.sub(r"\^\s?\{", "^", text)):
        name = UNITS.get(word, word.lower().removesuffix("s"))
        names.update(name.split("/"))  # mile/hour are two
    return names - {""}


UNGROUPED = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
# 1,080 and 1 080
GROUPED = r"(?<!\d,)[1-9]\d{0,2}(?:(?:,\d{3})+(?![\d,])|(?:[ ]\d{3})+(?![ \d]))(?:\.\d+)?"
GREEK = r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|omega|rho|sigma|tau)(?![a-z])"
TOKEN = rf"""
    (?P<command> (?!{GREEK}) \\(?:[A-Za-z]+|.)           # \frac, \{{
      | (?<![A-Za-z])(?i:sin|cos|tan|cot|ln|log|exp|sqrt|pi|inf|infinity|and|or)(?![A-Za-z]) )
  | (?P<letter> (?:[A-Za-z]|{GREEK})_(?:\w|\{{\w+\}})    # x_1, a variable
      | {GREEK}
      | (?<![A-Za-z])[A-Z]{{2,}}(?![A-Za-z])             # AB, one variable
      | (?!{WORD})[A-Za-z] )                             # a single letter that begins no word
  | (?P<word> {WORD})
  | (?P<sign> \*\*|[<>]=|\S)
"""
ONE_NUMBER = re.compile(rf"(?x) \s* (?: (?P<number> {GROUPED}|{UNGROUPED}) | {TOKEN} )")
SEVERAL_NUMBERS = re.compile(rf"(?x) \s* (?: (?P<number> {UNGROUPED}) | {TOKEN} )")
SPELLINGS = by_spelling(r"""
    ,  ; and or \cup \bigcup \lor
    ^  **
    *  \cdot \times
    /  : \div
    <  \lt
    >  \gt
    \le  <= \leq \leqslant
    \ge  >= \geq \geqslant
    |  \lvert \rvert
    (  \langle
    )  \rangle
    \{  \lbrace
    \}  \rbrace
    \emptyset  \varnothing
    \infty  inf infinity
    \sin sin
    \cos cos
    \tan tan
    \cot cot
    \ln ln
    \log log
    \exp exp
    \sqrt sqrt
    \pi pi
""")


NAMES = ("letter", "word")  # the kinds of tokens that may be a variable


def tokenize(text):
    """A text as pairs (kind, text). The kinds: number, letter (a variable), word, command, sign, and at last end."""
    pair = re.search(r"(?:[(\[]|\\\{)[^)\]}]*\d[, ]\d{3}", text)  # (12,102): its comma groups no digits
    pattern = SEVERAL_NUMBERS if pair else ONE_NUMBER
    tokens = []
    for match in pattern.finditer(text):
        token = match[match.lastgroup]
        tokens.append((match.lastgroup, SPELLINGS.get(token.lower(), token)))
    return [*tokens, ("end", "")]


class Group(NamedTuple):
    kind: str  # "list" or "set", or for a tuple or an interval its brackets: "(]"
    items: list


class Equation(NamedTuple):
    name: str  # what it defines, or ""
    value: object  # its right side
    difference: object  # left side minus right side


def checked(value):
    """A number, real where it can be. ValueError if it is not a number, or too large."""
    if not is_number(value) or value != value:  # only nan differs from itself
        raise ValueError("not a number")
    if isinstance(value, Fraction) and bits(value) > LARGEST:
        raise ValueError("too large")
    if isinstance(value, complex) and value.imag == 0:
        return value.real
    return value


def is_number(value):
    return not isinstance(value, tuple)  # a Group, an Equation, or a sum of Groups, which Python makes a plain tuple


def bits(fraction):
    return max(abs(fraction.numerator), fraction.denominator).bit_length()


def natural(value, limit):
    """A whole number from 0 to a limit, as an int."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= limit:
        raise ValueError("not a whole number, or too large")
    return int(value)


def power(base, exponent):
    """A power: exact where it can be, and its size is checked before it is computed: 9**9**9."""
    if not isinstance(exponent, Fraction) or exponent.denominator != 1:
        return checked(complex(base) ** complex(exponent))
    if isinstance(base, Fraction) and bits(base) * abs(exponent) > LARGEST:
        raise ValueError("too large")
    return checked(base ** int(exponent))


CONSTANTS = {r"\pi": math.pi, r"\infty": math.inf, "e": math.e, "i": 1j, r"\emptyset": Group("list", [])}
FUNCTIONS = {rf"\{name}": getattr(cmath, name) for name in "sin cos tan sinh cosh tanh exp".split()}
FUNCTIONS |= {rf"\arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")}
FUNCTIONS |= {
    r"\ln": cmath.log,
    r"\log": cmath.log10,
    r"\cot": lambda z: 1 / cmath.tan(z),
    r"\sec": lambda z: 1 / cmath.cos(z),
    r"\csc": lambda z: 1 / cmath.sin(z),
}
ROUNDED = {r"\lfloor": math.floor, r"\lceil": math.ceil, "|": abs}
CLOSING = {"(": ") ]", "[": "] )", "{": "}", r"\{": r"\}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
FACTORS = {*FUNCTIONS, *CLOSING, r"\frac", r"\sqrt", r"\binom", r"\pi"}  # may follow a factor without a times sign
TURNED = {">": "<", r"\ge": r"\le"}
BRACKETS = {"<": "()", r"\le": "[]"}  # of an interval, by the sign at its end
RELATIONS = ("=", r"\in", *TURNED, *BRACKETS)
DEFINED = re.compile(r"""(?x)  # what an equation may define
    (?:[A-Za-z]'?|[A-Z]{2,4}|[A-Za-z]{4,}|\\[a-z]+)  # x, y', AB, Total, \theta
        (?:_\{?\w+\}?)? (?:\([A-Za-z,]+\))?          # x_1, f(x)
  | \([A-Za-z](?:,[A-Za-z])+\)                       # (x,y)
  | [A-Z/|]+                                         # |AB|, A/B
""")


class Side(NamedTuple):
    """One side of an equation or inequality."""

    value: object
    text: str  # "" if it has no variable


class Reader:
    """Recursive descent through the tokens of an answer, evaluated at one point.

    One method for each level: answer (1, 2), relation (x = 1), sum, product, signed (-1), raised (2^3), atom.
    """

    def __init__(self, tokens, point):
        self.tokens = tokens
        self.seed, self.sign = point
        self.position = 0
        self.kind, self.text = tokens[0]  # of the next token
        self.in_bars = False  # is | the innermost open bracket? Then the next | closes it
        self.real = ("letter", "i") not in tokens

    def advance(self):
        self.position += 1
        self.kind, self.text = self.tokens[self.position]

    def take(self, *texts):
        """Advance if the next token is one of these, and return its text; otherwise None."""
        text = self.text
        if text not in texts:
            return None
        self.advance()
        return text

    def answer(self):
        """One value is itself; several values with commas between them are a list."""
        items = [self.relation()]
        while self.take(","):
            self.take(",")  # `, and`: the word is a comma too
            items.append(self.relation())
        return items[0] if len(items) == 1 else Group("list", items)

    def relation(self):
        """A value, an equation, or an inequality (as an interval)."""
        sides = [self.side()]
        signs = []
        while self.text in RELATIONS:
            signs.append(self.take(*RELATIONS))
            sides.append(self.side())
        if set(signs) - {"=", r"\in"}:
            return as_interval(sides, signs)
        if len(sides) == 1 or not any(side.text for side in sides):
            return sides[-1].value  # 3 + 4 = 7 answers 7; whether it is correct does not matter here
        return as_equation(sides[0], sides[-1])

    def side(self):
        """The value of one side of a relation, and its text if it has a variable."""
        start = self.position
        value = self.sum()
        side = self.tokens[start : self.position]
        if any(kind in NAMES and text not in CONSTANTS for kind, text in side):
            return Side(value, "".join(text for _, text in side))
        return Side(value, "")

    def sum(self):
        value = self.product()
        while True:
            if self.take("+"):
                value = checked(value + self.product())
            elif self.take("-"):
                value = checked(value - self.product())
            elif self.take(r"\over"):  # {1 + x \over 2}
                return checked(value / self.sum())
            else:
                return value

    def product(self):
        value = self.signed()
        while True:
            if self.take("*"):
                value = checked(value * self.signed())
            elif self.take("/"):
                value = checked(value / self.signed())
            elif self.text == "|" and self.in_bars:  # it closes |x|
                return value
            elif self.kind == "letter" or self.text in FACTORS:  # 2x
                value = checked(value * self.raised())
            else:
                return value

    def signed(self):
        if self.take("-"):
            return -self.signed()
        if self.take("+"):
            return self.signed()
        return self.raised()

    def raised(self):
        value = self.atom()
        while self.take("!"):
            value = checked(Fraction(math.factorial(natural(value, 2500))))
        if self.take("^"):
            value = power(value, self.signed())
        if self.real and self.sign != "+" and isinstance(value, complex):
            raise ValueError("this point does not count: √x √y is not √(xy) where x and y are negative")
        return value

    def atom(self):
        kind = self.kind
        text = self.text
        self.advance()
        if kind == "number":
            return self.number(text)
        if text in CONSTANTS:
            return CONSTANTS[text]
        if kind == "word" and self.kind == "word":
            raise ValueError("a sentence")
        if kind in NAMES:
            return self.variable(re.sub("[{}]", "", text))
        if text in CLOSING:
            return self.bracket(text)
        if text in FUNCTIONS:
            return self.function(text)
        if text == r"\frac":
            return checked(self.argument() / self.argument())
        if text == r"\sqrt":
            return self.root()
        if text == r"\binom":
            return Fraction(math.comb(natural(self.argument(), 1000), natural(self.argument(), 1000)))
        raise ValueError("not mathematics")

    def number(self, text):
        """Exact, as it is written: 1,080 and .5 and 6e3 and 101_2."""
        digits = re.sub("[, ]", "", text)
        if self.take("_"):
            return Fraction(int(digits, natural(self.argument(), 36)))
        return Fraction(digits)

    def variable(self, name):
        """A random number for a name, of a size from 0.1 to 32."""
        rng = random.Random(f"{name} {self.seed}")
        quarter = self.seed % 4  # four seeds, also -1 to -4, give one small, two middle and one large number
        size = 10 ** (2.5 * (quarter + rng.random()) / 4 - 1)
        if self.sign == "-" or (self.sign == "±" and rng.random() < 0.5):
            return -size
        return size

    def argument(self):
        """What a command takes: {…}, a digit or a letter; maybe with a sign, as in e^-x."""
        return self.signed() if self.text == "-" else self.atom()

    def root(self):
        r"""\sqrt x or \sqrt[3]{x}. The odd root of a negative number is real."""
        index = natural(self.bracket("["), 100) if self.take("[") else 2
        value = checked(self.argument())
        if index % 2 == 1 and not isinstance(value, complex) and value < 0:
            return -power(-value, 1 / index)
        return power(value, 1 / index)

    def bracket(self, opening):
        r"""What stands in brackets: one value, a list in {}, a set in \{\}, a tuple, an interval, |x|, ⌊x⌋."""
        outer_in_bars = self.in_bars
        self.in_bars = opening == "|"
        empty = self.text in (")", "]", "}", r"\}")
        value = Group("list", []) if empty else self.answer()
        closing = self.take(*CLOSING[opening].split())
        self.in_bars = outer_in_bars
        if closing is None:
            raise ValueError("never closed")
        if opening in ROUNDED:
            value = ROUNDED[opening](checked(value))
            return Fraction(value) if isinstance(value, int) else value
        if opening == "{" or not isinstance(value, Group) or value.kind != "list":
            return value
        kind = "set" if opening == r"\{" else opening + closing
        return Group(kind, value.items)

    def function(self, name):
        r"""\sin x, \sin^2 x, \sin^{-1} x (the inverse), \log_2 x, with or without brackets."""
        base = self.argument() if self.take("_") else None
        exponent = self.argument() if self.take("^") else Fraction(1)
        if exponent == -1:
            name = r"\arc" + name[1:]
            exponent = Fraction(1)
        if self.text in ("(", "{"):
            argument = self.atom()  # \cos(x)^2 is (cos x)^2
        else:
            argument = self.signed()
            while self.kind == "letter" or self.text == r"\pi":
                argument = checked(argument * self.raised())  # \sin 2x
        value = FUNCTIONS[name](argument) if base is None else cmath.log(argument) / cmath.log(base)
        return power(checked(value), exponent)


def as_equation(left, right):
    """x = 5 and 5 = x both define x. Of a = b = c, left and right are the first and the last side."""
    if not left.text and DEFINED.fullmatch(right.text):
        left, right = right, left
    name = left.text if DEFINED.fullmatch(left.text) else ""
    if isinstance(left.value, Group) or isinstance(right.value, Group):
        return Equation(name, right.value, math.nan)
    return Equation(name, right.value, checked(left.value - right.value))


def as_interval(sides, signs):
    """x > 5 as (5, ∞), and 1 < x ≤ 2 as (1, 2]. An error if the signs point in two directions."""
    if signs[0] in TURNED:  # 2 ≥ x > 1 as 1 < x ≤ 2
        sides = sides[::-1]
        signs = [TURNED[sign] for sign in signs[::-1]]
    if sides[0].text:  # x < 5 as -∞ < x < 5
        sides = [Side(-math.inf, ""), *sides]
        signs = ["<", *signs]
    if sides[-1].text:  # 5 < x as 5 < x < ∞
        sides = [*sides, Side(math.inf, "")]
        signs = [*signs, "<"]
    if len(sides) != 3 or not DEFINED.fullmatch(sides[1].text):
        raise ValueError("not an interval")
    opening = BRACKETS[signs[0]][0]
    closing = BRACKETS[signs[1]][1]
    return Group(opening + closing, [sides[0].value, sides[2].value])


class Reading(NamedTuple):
    """A text that was read as mathematics."""

    values: list  # at each point: a number, a Group, an Equation, or None. Without a variable, at one point only
    units: set


def reading(text):
    """A text read as mathematics, or None if it cannot be read."""
    is_repeated = re.search(r"\d \([^()]*=", text)  # 36 (= 12*3)
    if len(text) > LONGEST or is_repeated or contradicts(text):
        return None
    units = unit_names(" ".join(TRAILING_UNITS.findall(text)))
    tokens = tokenize(TRAILING_UNITS.sub(unless_counted, text))  # 8 cm^2 is 8
    points = POINTS if any(kind in NAMES for kind, _ in tokens) else POINTS[:1]
    values = []
    for point in points:
        value = value_at(tokens, point)
        if value is None and point.sign == "+":
            return None
        values.append(value)
    return Reading(values, units)


def unless_counted(words):
    """What is left of the words after a number: nothing if they say what is counted, as in `18 red apples`."""
    return "" if COUNTED.fullmatch(words[0]) and not CHANGED.search(words[0].replace("^", "")) else words[0]


def value_at(tokens, point):
    """The value of an answer at a point, or None where it cannot be read."""
    reader = Reader(tokens, point)
    try:
        value = reader.answer()
    except (ValueError, ArithmeticError, TypeError, LookupError, RecursionError):
        return None
    return value if reader.kind == "end" else None


# ---- do two answers mean the same? ---------------------------------------------------------------------------------
# `math_equal` compares two answers, `agree` two readings, `same` two values at one point, and `close` two numbers.


@functools.lru_cache(maxsize=1024)  # outputs of a group often have the same answer
def math_equal(prediction, gold):
    """Do two answers mean the same? By value where both can be read as mathematics, else as text."""
    prediction = tidy(prediction)
    gold = tidy(gold)
    if not (BASE.search(prediction) and BASE.search(gold)):  # the question may name the base: 101 for 101_2
        prediction = BASE.sub("", prediction)
        gold = BASE.sub("", gold)
    prediction = spaced_like(prediction, gold)
    gold = spaced_like(gold, prediction)
    if as_text(prediction) == as_text(gold):
        return True
    predicted = reading(prediction)
    wanted = reading(gold)
    if predicted and wanted and agree(predicted, wanted):
        return True
    # What is left: a sentence that states the gold number. If the gold has units, the sentence names them: It is 8 cm.
    target = exact_number(wanted)
    if target is None or exact_number(predicted) is not None:
        return False
    is_sentence = re.search(r"[A-Za-z]{4}|\b(?:is|are|was|has)\b", prediction)
    if predicted and not is_sentence:  # it is a formula
        return False
    words = re.sub(r"(?<=[A-Za-z] )(?:in|am)\b", "", prediction)  # in: inches after a number, not after a word
    return stated(prediction) == target and wanted.units <= unit_names(words)


BASE = re.compile(r"(?<=[\dA-F])_\s*\{?\s*\d+\s*\}?$")


def spaced_like(text, other):
    """300,200,100 as 300, 200, 100 (three numbers), if the other text is such a list."""
    if re.search(r"\d, -?\d", other) and ", " not in text:
        return re.sub(",(?=[1-9])", ", ", text)
    return text


def as_text(text):
    """A text without spaces, with words in lower case. Single letters stay as they are: R is not r.

    (C), C), option C and answer C become C.
    """
    word = r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|[A-Z][a-z]{2,}|YES|NO|No)(?![A-Za-z])"
    text = re.sub(word, lambda match: match[0].lower(), text)
    text = re.sub(r"(?<!\d)\s|\s(?!\d)", "", text)
    return re.sub(r"^(?:(?i:answer|option|choice|letter))?\(?(\w)\)?$", r"\1", text)


def agree(one, other):
    """Do two readings mean the same? Units must match if both have some. 50% equals 0.5, and also 50 without a unit."""
    if one.units and other.units and one.units != other.units:
        return False
    # at each point where both have a value; only at the first if one has no variable
    pairs = [(x, y) for x, y in zip(one.values, other.values) if x is not None and y is not None]
    a, b = pairs[0]
    if isinstance(a, Equation) and isinstance(b, Equation) and (a.name != b.name or not a.name):
        return all(same_line(pair, pairs[0]) for pair in pairs)
    if ("%" in one.units) != ("%" in other.units) and is_number(a) and is_number(b):
        if "%" in other.units:
            a, b = b, a
        return close(a / 100, b) or abs(b) >= 1 and close(a, b)
    return all(same(x, y) for x, y in pairs)


def same_line(pair, first_pair):
    """x + y = 3 is 2x + 2y = 6: left side minus right side is a multiple of the other one's, the same at all points."""
    x, y = pair
    first_x, first_y = first_pair
    if not x.difference or not y.difference:
        return False
    return close(x.difference * first_y.difference, first_x.difference * y.difference)


def same(a, b):
    """The same value at one point? Lists and sets may be in any order; 5 is x = 5."""
    if isinstance(a, Equation) and isinstance(b, Equation) and a.name != b.name:
        return False
    a = as_group(a)
    b = as_group(b)
    kinds = {a.kind, b.kind}
    if kinds == {"number"}:
        return close(a.items[0], b.items[0])
    if kinds <= {"list", "set", "number"}:  # a number is a list of one: `1/2 or 0.5` is 1/2
        return same_items(a.items, b.items)
    # a list without brackets may be a tuple or a list in brackets; an equation that defines nothing is like no other
    matching = len(kinds) == 1 or kinds in ({"list", "()"}, {"list", "[]"})
    return matching and "" not in kinds and len(a.items) == len(b.items) and all(map(same, a.items, b.items))


def as_group(value):
    """A group itself, a number as a group of one, and of x = 5 the 5. An equation that defines nothing has no kind."""
    value = right_side(value)
    if isinstance(value, Group):
        return value
    return Group("number" if is_number(value) else "", [value])


def same_items(xs, ys):
    """Is each of xs somewhere in ys, and each of ys in xs? The order and how often do not matter."""
    found = set()  # positions of ys
    for x in xs:
        equal = {i for i, y in enumerate(ys) if same(x, y)}
        if not equal:
            return False
        found |= equal
    return len(found) == len(ys)


def close(a, b):
    """The same number? Exact numbers must be equal. But 0.3333333333, with 10 decimals or more, equals 1/3."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        long_decimal = max(a.denominator, b.denominator) > 10**9
        return a == b or (long_decimal and abs(a - b) * 10**9 < abs(a))
    if max(abs(a), abs(b)) > 1e300:
        return a == b
    return cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def number(text):
    """The one number that an answer states, as a Fraction, or None: '-5 degrees' states -5, '3 + 4 = 7' states 7."""
    text = tidy(text)
    found = reading(text)
    return exact_number(found) if found else stated(text)


def exact_number(found):
    """The number of a reading if it is exact, else None; 5 for x = 5."""
    value = right_side(found.values[0]) if found else None
    return value if isinstance(value, Fraction) else None


def right_side(value):
    """Of x = 5 the 5. Any other value is itself."""
    return value.value if isinstance(value, Equation) and value.name else value


DOUBT = "no|not|cannot|none|never|nor|or|either|neither|unless|if|false|wrong|maybe|perhaps|possibly|probably|might"
DOUBT += "|almost|nearly|hardly|barely|doubt|unlikely"
DOUBTFUL = re.compile(rf"(?i)\b(?:{DOUBT}|near|incorrect|except|but)\b|n't|(?:^|\s)[<>]|[<>!]=|\\[gln]e")
CHANGED = re.compile(rf"""(?xi)  # words that change a number, LaTeX and code
    \b(?:minus|negative|plus|times(?!\W*$)|twice|double[sd]?|tripled?|halve[sd]|squared|cubed|power|short|divide[sd]
    |multiplied|inverted|reversed|rounded|thousands|millions|billions|exceeds?|precedes|follows|{FRACTION_WORD})\b
  | \b(?:than|at[ ](?:least|most)|between|below|above|under|over|and|point)\b (?=\W*(?:\d|$|{IN_WORDS}))
  | [\\^_] | \w\(
""")


# Only these words, next to a number, leave it as it is: `a total of 18 clips in all`, but not `a factor of 18`.
BEFORE = any_of("""
    are were be been have had get got make made take took taken sell sold spend spent pay paid buy bought eat ate
    eaten run ran drive drove leave left leaving lose lost win won find found give gave given drink drank catch
    caught see saw seen write wrote hold held teach taught send sent bring brought become became draw drew keep
    kept throw threw lead build built sleep slept grow grew ride rode do go went meet met cost earn receive save
    use read score weigh pick walk collect gain plant travel carry raise produce play contain jump gather charge
    watch bake purchase owe want require hit reach put cut add equal making having needing costing worth just
    think then so therefore hence answer total difference altogether all another additional extra still for with
    at on in about around away off out up down together him her them me you it the their our my your that's profit
    day week month year hour
""")
QUANTITY = any_of("""
    age amount answer area average balance bill change cost distance earnings gain height income length loss mean
    number pay perimeter price profit rate salary savings score speed sum total value volume weight width
""")
SAME = any_of("equals? comes? came amounts? adds?(?:\\sup)? sums? out")
# bakes, baked, finally; gave Tom; one of these; a total of; comes to
LEAD = rf"(?:[a-z']+(?:ed|s|ly)|(?<=\w\s)(?-i:[A-Z][a-z]+)|{BEFORE}|{QUANTITY}\sof|{SAME}\sto)"
AFTER = any_of(r"""
    in for on per a an to from of at after each total by during worth are were when every and long old tall wide
    deep high away left altogether remaining overall now today together daily weekly more fewer less farther
    longer faster cheaper heavier taller older younger that who which with because since so through this last next
    out over the remain before until while as all is\sthe
""")
CLAUSE_END = re.compile(r"[;:()?!]|[,.](?=\s|$)|\s-+\s")
SIDE = r"(?:[\d+\-*/()% ]|[.,](?=\d))*"  # of an equation between numbers
EQUATION = re.compile(rf"(?:(?<![\w.,]){SIDE})?(?:={SIDE})+")
FORMULA = re.compile(r"^(?!.*(?:(?<![\\A-Za-z])[A-Za-z]{4}|,\s).*=).*[\\^_(].*=")  # one that is not read: \angle A = 20
REMARK = re.compile(r"\s\(([^()]*[=A-Za-z][^()]*)\)")  # (12*3=36), but not (3 + 4)
STATED = re.compile(rf"""(?xi)  # what stands around one number in a clause: is (-$1,080.50), 3/4kg of
    (?: \D*\b{LEAD}\s+ )? [^\w.^/*+-]*
    ( [+-]? (?:{GROUPED}|{UNGROUPED}) (?:/\d+)? ) (?![\^*+/\d]) \s?%?
    (?: \s?/?\s? (?:[a-z-]+\s){{0,3}}? (?:{UNIT_NAMES}|{NOUN}|[a-z]+/[a-z]+) (?![a-z]) \D* | \s {AFTER}\b \D* | \W* )
""")


def stated(text):
    """The one number in a sentence, or None: 'It is 72 clips.' None for 'not 72', '72 or 73', 'a factor of 72'.

    A calculation counts as its result: '48 + 24 = 72 clips' states 72, and so does '72 (48 + 24 = 72)'. But '71, as
    48 + 24 = 72' states nothing: its numbers differ.
    """
    if len(text) > LONGEST or DOUBTFUL.search(text) or contradicts(text):
        return None
    text = REMARK.sub(r"; \1;", text)
    text = re.sub(r"(\d.*?)\b(?:because|since|as)\s(?=[^a-z]*\d)", r"\1; ", text)  # 36, as 12*3 = 36
    # 3 cups/day * 2 days = 6 cups
    text = re.sub(rf"(?<=\d) ?(?:{NOUN})?(?:(?: per |/)[a-z]+)?(?= ?(?:[-+*=]|/ ?\d))", "", text)
    text = EQUATION.sub(result_of, FORMULA.sub(": ", text))
    if CHANGED.search(text):
        return None
    text = re.sub(r"(?i)(^|\b(?:is|are|was|be)\s)([+-])\s+", r"\1\2", text)  # - 5 as -5
    text = re.sub(r"\s?/\s?", "/", text)  # 3 / 4 as 3/4
    numbers = set()
    for clause in CLAUSE_END.split(text):
        if re.search(r"\d", clause):
            match = STATED.fullmatch(clause)
            numbers.add(exact_number(reading(match[1])) if match else None)
    return numbers.pop() if len(numbers) == 1 else None


def result_of(equation):
    """Of '48 + 24 = 72' the 72, after a colon where nothing stands left of the =. An equation that is wrong stays."""
    sides = equation[0].split("=")
    value = common_value([side for side in sides if side.strip()])
    if value is None:
        return equation[0]
    return f" {value} " if sides[0].strip() else f": {value} "


def contradicts(text):
    """Are there two different numbers on the sides of a =, as in 41 = 42?"""
    for sides in itertools.pairwise(text.split("=")):
        numbers = [exact_number(reading(side)) for side in sides]
        if None not in numbers and common_value(sides) is None:
            return True
    return False


def common_value(sides):
    """The value of all sides of an equation, or None where they differ: 10/3 = 3.33 is rounded, 1/4 = 25% is equal."""
    factors = (1, 100, Fraction(1, 100)) if "%" in "".join(sides) else (1,)
    value = None
    for side in sides:
        result = exact_number(reading(side))
        if result is None:
            return None
        decimals = len(re.search(r"(?:\.(\d+))?\D*$", side)[1] or "")
        equal = value is None or any(close(value * factor, result) for factor in factors)
        if not equal and not (decimals and round(value, decimals) == result):
            return None
        value = result
    return value


# ---- logic puzzles: who is what, who came when ---------------------------------------------------------------------

ROLES = {
    "doubt": rf"{DOUBT}|may|might|could|\w+n['’]t|\?",
    "knight": "knights?|truth(?:[ -]?tellers?|ful)?",
    "knave": "knaves?|liars?|lies|lying",
}
NOBODY = rf"(?i)\b(?:{ROLES['knight']}|{ROLES['knave']})\W*\bnone\b"  # `Knaves: none`
PLACES = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
NUMBERING = {  # the first that fits counts: `first to last` is neither a doubt nor a number
    "ignored": "first to last|1st to last",
    "doubt": rf"{ROLES['doubt']}|last|after|behind|reversed?",
    "number": rf"\d{{1,9}}(?:st|nd|rd|th)?|{'|'.join(PLACES)}",
}


def words_that_matter(answer, problem, choices):
    """The names and the given words in an answer, in their order: [("name", "ada"), ("knight", "knight"), …].
    Nothing if one of them is a doubt. choices: {kind: its words as a pattern}."""
    names = re.findall(r"[A-Z]\w*", problem["answer"])
    markup = r"""\\[a-zA-Z]+|[\s*_`"“”{}()\[\]$]"""  # of LaTeX, markdown and JSON
    answer = re.sub(markup, " ", answer[:10_000])
    choices = choices | {"name": "|".join(map(re.escape, names)).lower()}
    pattern = "|".join(rf"(?P<{kind}>(?<!\w)(?:{words})(?!\w))" for kind, words in choices.items())
    found = []
    for match in re.finditer(pattern, " ".join(answer.lower().split())):
        if match.lastgroup == "doubt":
            return []
        found.append((match.lastgroup, match[0]))
    return found


def said_roles(answer, problem):
    """Who is what: {("ada", "knight"), …} of `Ada: knight, Ben: knave` or `Knights: Ada. Knaves: Ben`; or None."""
    words = words_that_matter(re.sub(NOBODY, "", answer), problem, ROLES)
    if words and words[0][0] != "name":
        words.reverse()  # `Knights: Ada. Knaves: Ben` backwards is `Ben knaves, Ada knights`: names before their role
    claims = set()
    waiting = []  # names that wait for their role
    last_role = None
    for kind, word in words:
        if kind == "name":
            waiting.append(word)
        elif waiting:
            claims.update((name, kind) for name in waiting)
            waiting = []
            last_role = kind
        elif kind != last_role:
            return None  # Ada is a knight and a knave
    return claims


def said_order(answer, problem):
    """The names in their order: ["ben", "ada"]. They may be numbered: `1. Ben 2. Ada`, `first Ben`. Else None."""
    names = []
    numbers = []
    for kind, word in words_that_matter(answer, problem, NUMBERING):
        if kind == "name":
            names.append(word)
        elif kind == "number":
            numbers.append(PLACES.get(word) or int(re.match(r"\d+", word)[0]))
    return names if numbers in ([], list(range(1, len(names) + 1))) else None


# ---- countdown -----------------------------------------------------------------------------------------------------

ARITHMETIC = r"(?:[\d\s+\-*/(){}=]|\\(?:times|cdot|div|frac))*+"


def said_target(answer, problem):
    """What a calculation reaches with only + - * / and each of the given numbers at most once; else None."""
    text = tidy(answer)
    sides = [side for side in text.split("=") if side.strip() != str(problem["target"])]
    if len(sides) != 1 or not re.fullmatch(ARITHMETIC, text) or re.search(r"\*\*|\d\s+\d", text):
        return None  # not one calculation, or with other signs
    value = number(sides[0])
    if value is None:
        return None
    used = Counter(map(int, re.findall(r"\d+", sides[0])))
    return value if used <= Counter(problem["numbers"]) else None


# ---- Nim -----------------------------------------------------------------------------------------------------------


def legal_moves(problem):
    """The legal moves: {"2 from B": the heaps after it, …}."""
    heaps = problem["heaps"]
    moves = {}
    for name, size in heaps.items():
        for taken in range(1, size + 1):
            moves[f"{taken} from {name}"] = heaps | {name: size - taken}
    return moves


def nim_equal(answer, problem):
    """Is it the move that wins? Where none does, every legal move is right."""
    return answer in legal_moves(problem) and problem["answer"] in (answer, "any move")


def after_move(completion, problem):
    """(heaps, wins) after a move. heaps: None if the move is illegal. wins: True, False, or None: the game goes on."""
    heaps = legal_moves(problem).get(extract_answer(completion))
    if heaps is None:
        return None, False  # an illegal move loses
    if any(heaps.values()):
        return heaps, None
    return heaps, True  # who takes the last one wins


def random_player(problems):
    """Random legal moves as completions; the same question always gets the same move."""
    completions = []
    for problem in problems:
        moves = list(legal_moves(problem)) or [""]
        move = random.Random(problem["question"]).choice(moves)
        completions.append(f"<answer>{move}</answer>")
    return completions


def perfect_player(problems):
    """The moves that win as completions; where none does, a random one."""
    completions = random_player(problems)
    for i, problem in enumerate(problems):
        if problem["answer"] != "any move":
            completions[i] = f"<answer>{problem['answer']}</answer>"
    return completions


# ---- writing and dialogue ------------------------------------------------------------------------------------------


def writing_equal(answer, problem):
    """Does a story have all the words that it should have, and as many sentences? It may be nonsense."""
    counts = story_counts(answer, problem)
    return counts["words_used"] == counts["sentences"] == 1


def story_counts(text, problem):
    """What can be counted of a story: {name: number}. The comments say what each number cannot show."""
    words = words_of(text)
    wanted = problem["answer"].split()
    sentences = re.findall(r"\w[^.!?]*[.!?]+", text)
    pairs = list(itertools.pairwise(words))
    threes = list(zip(words, words[1:], words[2:]))
    matcher = difflib.SequenceMatcher(None, words, words_of(problem["question"]))
    size = len(text.encode())
    return {
        "words_used": [word in words for word in wanted].count(True) / len(wanted),  # not whether they make sense there
        "sentences": len(sentences) == len(wanted),  # not whether they are good
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),  # different pairs of words: random words have 1 too
        "repeated_3": (len(threes) - len(set(threes))) / max(1, len(threes)),  # not the same thought in other words
        "compression": len(zlib.compress(text.encode())) / max(1, size),  # only for texts of equal length
        "copied": matcher.find_longest_match().size / max(1, len(words)),  # from the prompt; not from elsewhere
    }


def words_of(text):
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def said_facts(answer, problem):
    """Which of the facts that were told an answer names."""
    told = set()
    for turn in problem["turns"][::2]:  # each fact ends a sentence
        told.update(re.findall(r"(\w+)\.", turn["content"]))
    return told & set(re.findall(r"\w+", answer))


# ---- programs, graded by tests in a sandbox ------------------------------------------------------------------------
# A program could change anything in its own process: even an `assert`, or the count of passed tests. So one sandbox
# runs the tests, and another the program. If a test calls a function of the program, the arguments go there through a
# pipe, and the result comes back through another. The program sees no test, no expected value and no verdict.
#
#     task --> tests_process <==== requests, replies ====> program_process
#                    '--> verdict

SECONDS = 4.0  # of wall-clock time, for all tests of one program
REPLY_BYTES = 1 << 20  # the longest request or reply, as text
TMP_BYTES = 16 << 20  # the size of /tmp, the only place where a program can write
LIMITS = {  # for each process; NPROC counts all processes and threads of a sandbox
    "RLIMIT_AS": 512 << 20, "RLIMIT_NPROC": 8, "RLIMIT_FSIZE": TMP_BYTES // 4,
    "RLIMIT_NOFILE": 32, "RLIMIT_CORE": 0, "RLIMIT_CPU": 10,
}  # fmt: skip


def run_tests(code, problem):
    """Run a program's tests: (the share of them that pass, does it compile without a warning?). A test without an
    assert, such as `candidate = f`, is run too, but not counted."""
    tests = [(test, has_assert(test)) for test in problem["tests"]]
    counted = [asserts for _, asserts in tests].count(True)
    if not counted:
        raise ValueError("no test has an assert")
    with tempfile.TemporaryFile("w+") as task:
        json.dump((problem["prelude"] + code, problem["setup"], problem["functions"], tests), task)
        task.seek(0)
        program = start("program_process()", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with program.stdin, program.stdout:  # open here until the tester has them
            fds = program.stdin.fileno(), program.stdout.fileno()
            tester = start(f"tests_process{fds}", stdin=task, stdout=subprocess.PIPE, pass_fds=fds)
    with tester, program:
        deadline = threading.Timer(SECONDS, tester.kill)  # with a process, all others in its sandbox end
        deadline.start()
        verdict = tester.stdout.read(1 + counted)  # one character for `it compiles`, then one for each test
        deadline.cancel()
        tester.kill()
        program.kill()
    return verdict[1:].count(b"1") / counted, verdict[:1] == b"1"


def has_assert(test):
    return any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(test)))


def start(entry, **pipes):
    """Start a sandbox. No environment: /proc/1/environ would show it. A new session: Ctrl-C does not reach it."""
    return subprocess.Popen(sandboxed(entry), env={}, stderr=subprocess.DEVNULL, start_new_session=True, **pipes)


@functools.cache
def sandbox_problem():
    """Why programs cannot run on this machine, in one sentence, or None."""
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed: sudo apt-get install bubblewrap"
    trial = subprocess.run(sandboxed("pass"), env={}, capture_output=True, text=True, check=False)
    if not trial.returncode:
        return None
    return trial.stderr.strip().rpartition("\n")[2] or f"bwrap ends with status {trial.returncode}"


def sandboxed(entry):
    """The command that runs one Python statement in a sandbox: no network, no environment, only Python and /usr.

    An ordinary user gets a user namespace. Root gets a new user id without rights instead, because a limit on processes
    does not bind root.
    """
    if os.geteuid():
        uid = None
        rights = "--unshare-all --unshare-user --disable-userns"
    else:
        uid = 2**30 + int.from_bytes(os.urandom(3), "big")  # another in each sandbox: NPROC counts by user
        rights = """--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try
            --cap-add CAP_SETUID --cap-add CAP_SETGID"""
    options = f"""--die-with-parent --new-session --cap-drop ALL {rights}
        --ro-bind /usr /usr --ro-bind-try /lib /lib --ro-bind-try /lib64 /lib64
        --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache"""
    command = [shutil.which("bwrap"), *options.split()]
    python = sys.base_prefix
    # its parent folders are new and empty, and the user may enter them
    command += ["--dir", os.path.dirname(python), "--ro-bind", python, python]
    options = f"""--proc /proc --dev /dev
        --perms 1777 --size {TMP_BYTES} --tmpfs /tmp --chdir /tmp
        --remount-ro /dev --remount-ro /"""  # the last two: nothing else can be written
    command += [*options.split(), f"{python}/bin/python3.{sys.version_info.minor}", "-I", "-S", "-c"]
    return [*command, f"{INSIDE}\nconfine({uid}, {LIMITS})\n{entry}"]


# ==== what runs inside the sandboxes ================================================================================
# The text between this line and the next such line is sent there (INSIDE). It may use itself, REPLY_BYTES, and the
# modules that INSIDE imports, but nothing else of this file.
#
# A plain value is copied. Any other object stays in its process, and the other process gets a handle to it: what is
# done with the handle is asked of the object's process. A handle is equal to no copied value, and it is not a number:
# so no program can say that its object is the expected value. The program can call what a test passes to it, and can
# make a `str` or a `list` of it, but cannot read its attributes.

COPIED = """builtins.bytearray builtins.bytes builtins.complex builtins.dict builtins.frozenset builtins.range
    builtins.set builtins.slice builtins.tuple datetime.date datetime.datetime datetime.time datetime.timedelta
    datetime.timezone decimal.Decimal fractions.Fraction""".split()  # besides lists, and what JSON knows
PIPES = []  # two files: from the other process, and to it
OFFERED = {}  # {name or number: an object that the other process may use}


def tests_process(requests_fd, replies_fd):
    """Run the tests. Write 1 or 0 for `it compiles`, then 1 or 0 after each test that has an assert."""
    verdict = os.dup(1)
    os.dup2(2, 1)  # what the tests print is not a verdict
    source, setup, functions, tests = json.load(sys.stdin)
    PIPES[:] = open(replies_fd), open(requests_fd, "w")
    # the built-in types, but not `type`: it could make a class whose objects are equal to everything
    OFFERED.update(
        {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and kind is not type},
        call=operator.call,
    )
    send(source)
    os.write(verdict, b"1" if receive() else b"0")
    defined = {name: getattr(Handle("program"), name, None) for name in functions}
    namespace = dict(defined)  # the setup may use a class of the program
    exec(setup, namespace)
    namespace.update(defined)  # the setup may have defined the function that was to be completed
    for test, asserts in tests:
        try:
            exec(test, namespace)
            passed = b"1"
        except BaseException:  # sys.exit() too
            passed = b"0"
        if asserts:
            os.write(verdict, passed)


def program_process():
    """Reply whether the program compiles without a warning, run it, and then answer what is asked of it."""
    PIPES[:] = open(os.dup(0)), open(os.dup(1), "w")
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    os.dup2(0, 1)  # what the program prints is not a reply
    source = receive()
    try:
        warnings.simplefilter("error")
        compile(source, "program", "exec")
        send(True)
    except Exception:
        send(False)
    warnings.simplefilter("ignore")
    module = types.ModuleType("program")
    sys.modules["program"] = module
    OFFERED.update(vars(operator) | vars(builtins), program=module)
    exec(source, vars(module))
    receive()  # only requests come, so it never returns


def ask(handle, name, /, *args, **kwargs):
    """Have the other process call its function `name` with the object of the handle, and return the result."""
    send((name, (handle, *args), kwargs))
    returned, result = receive()
    if returned:
        return result
    # only a kind, not an object that the program has made; and a StopIteration could end a loop of the test early
    if isinstance(result, type) and (name == "next" or result is not StopIteration):
        raise result
    raise RuntimeError


def answer(name, args, kwargs):
    """Send [True, the result of a call], or [False, the built-in kind of its exception]."""
    try:
        if name not in OFFERED:
            raise AttributeError
        send([True, OFFERED[name](*args, **kwargs)])
    except BaseException as error:  # sys.exit() too
        send([False, next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")])


def send(value):
    """Write one value as one line of JSON. Where nobody reads any more, this process ends."""
    try:
        print(json.dumps(encoded(value)), file=PIPES[1], flush=True)
    except BrokenPipeError:
        os._exit(0)


def receive():
    """Read the next value, and answer the requests that come before it.

    A request is a tuple. While a test waits for a result, the program may ask for the result of a callback. At the end
    of the pipe, or where a line is longer than the limit, this process ends.
    """
    while True:
        line = PIPES[0].readline(REPLY_BYTES)
        if not line.endswith("\n"):
            os._exit(0)
        message = json.loads(line, object_pairs_hook=decoded)
        if not isinstance(message, tuple):
            return message
        answer(*message)


def encoded(value):
    """A value for JSON. What JSON does not know is {its type: the arguments that make an equal value}.

    Of a derived type the plain one counts: a Counter becomes a dict.
    """
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, list):
        return list(map(encoded, value))
    for kind in type(value).__mro__:
        name = f"{kind.__module__}.{kind.__name__}"
        if name in COPIED:
            if kind is dict:
                value = value.items()
            if kind in (bytes, dict, tuple):
                args = [list(value)]
            elif kind is complex:
                args = [str(value)]
            else:
                args = kind.__reduce__(value)[1]
            return {name: encoded(args)}
    if isinstance(value, Handle):
        return {"yours": vars(value)["#"]}
    name = getattr(value, "__name__", None)
    if vars(builtins).get(name) is value:
        return {"yours": name}
    OFFERED[id(value)] = value
    return {"mine": id(value)}


def decoded(pairs):
    """The value that `encoded` wrote for JSON as {name: key}."""
    [(name, key)] = pairs
    if name == "mine":
        return Handle(key)
    if name == "yours":
        return OFFERED.get(key, Handle(key))
    module, kind = COPIED[COPIED.index(name)].split(".")
    return getattr(__import__(module), kind)(*key)


class Handle:
    """An object of the other process, by its name or number there."""

    def __init__(self, key):
        vars(self)["#"] = key  # no attribute of the object can have this name

    def __eq__(self, other):
        return isinstance(other, Handle) and ask(self, "eq", other)


for name in "getattr setattr getitem setitem call bool len str repr hash iter next".split():
    setattr(Handle, f"__{name}__", functools.partialmethod(ask, name))  # def __len__(self): return ask(self, "len")


def confine(uid, limits):
    """Become the user `uid`, for good, if one is given; then set the limits."""
    import resource

    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


# ==== end of what runs inside ========================================================================================

INSIDE = open(__file__, encoding="utf-8").read().split("# ====")[1]
INSIDE = f"import builtins, functools, json, operator, os, sys, types, warnings\nREPLY_BYTES = {REPLY_BYTES}\n#{INSIDE}"


# ---- is it right? --------------------------------------------------------------------------------------------------


def value_equal(answer, problem):
    """Does an answer mean the same as the right one? Of a GSM8K answer field, the line after `####` counts."""
    return math_equal(answer, after_hashes(problem["answer"]))


READINGS = {  # {kind of problem: what an answer says}; an answer is right if it says what the right one says
    "knights": said_roles,
    "order": said_order,
    "countdown": said_target,
    "dialogue": said_facts,
}
CHECKERS = {  # {kind of problem: a function of an answer and the problem}; programs are graded by test_results
    "math": value_equal,
    "nim": nim_equal,
    "writing": writing_equal,
}


def right(answer, problem):
    """Is an answer right, by the rules of the kind of its problem? None is not."""
    kind = problem.get("kind", "math")
    if answer is None:
        return False
    if kind in CHECKERS:
        return CHECKERS[kind](answer, problem)
    return alike(answer, problem["answer"], problem)


def alike(one, other, problem):
    """Do two answers to a problem say the same?"""
    if problem.get("kind") not in READINGS:
        return math_equal(one, other)
    said = READINGS[problem["kind"]]
    meaning = said(one, problem)
    return bool(meaning) and meaning == said(other, problem)


def grade(completion, gold):
    """Is a completion's answer right? The gold is a plain answer or a GSM8K answer field: the line after `####`."""
    return right(extract_answer(completion), {"answer": gold})


def majority(completions, problem=None):
    """The answer that most completions give, the earliest of equals, or None: the vote of maj@k (self-consistency)."""
    votes = Counter(filter(None, map(extract_answer, completions)))
    best = None
    most = 0
    for answer in votes:
        same = [votes[other] for other in votes if alike(other, answer, problem or {})]
        count = sum(same)
        if count > most:
            best = answer
            most = count
    return best


# ---- steps ---------------------------------------------------------------------------------------------------------

STEP = re.compile(r"[^\n]*?(?:[.!?](?=\s)|\n|$)")  # a line, or a sentence of it
OPERATOR = r"[-+−*/×÷]"
CHARS = r"[\d.,+\-−*/×÷()$% ]"
CALCULATION = re.compile(rf"""(?x)
    (?<!{CHARS}) ({CHARS}*+)             # group 1: left of the =, as in 10 / 3 = 3.33
    (?= =[\s$]*
        (-?\d[\d,]{{0,20}}+              # group 2: the number right of it
            (?:\.(\d{{1,20}}+))?+ )      # group 3: its decimals
        (?! \s*{OPERATOR}\s*[\d($] | \s*% | \d )  # not 10 + 7 = 12 + 5, not 10 + 7 = 17%
    )
""")
MOST = 9  # calculations that are read in a step; a mistake in the tenth is not seen


def step_rewards(completion, problem):
    """The reward of each reasoning step that calculates: [(end, reward)] (process supervision, DeepSeekMath §4.1.3).

    `end` is the position of the character after the step. A step earns 0 if a calculation in it is wrong; else 1
    if one of its results is also in the worked solution; else 0.5.
    """
    solution = problem.get("solution", "").split("\n")
    known = {result for line in solution for result, _ in calculations(line)}
    start = max(0, completion.find("<reasoning>"))
    end = start + len(completion[start:].partition("</reasoning>")[0])
    steps = []
    for match in itertools.islice(STEP.finditer(completion, start, end), 100):  # 100 are enough
        found = calculations(match[0])
        if not found:
            continue
        if not all(correct for _, correct in found):
            value = 0.0
        elif any(result in known for result, _ in found):
            value = 1.0
        else:
            value = 0.5
        steps.append((match.end(), value))
    return steps


def calculations(step):
    """Each `48 / 2 = 24` in a step: [(result, is it correct?)]. A result may be rounded to the decimals it shows.

    If the step has some in GSM8K's marks, <<48/2=24>>, only those are read.
    """
    step = re.sub(r"^\s*[-*+] ", "", step)  # the bullet of a list is not a minus
    found = []
    for text in re.findall(r"<<([^<>]*)>>", step)[:MOST] or [step]:
        for left, written, decimals in CALCULATION.findall(text)[:MOST]:
            if not re.search(rf"\d[\s%)]*{OPERATOR}[\s$(]*\d", left):
                continue  # nothing is calculated: x = 5
            value = number(re.sub(r"(?<![\d.,])([\d.,]++|\([^()]*+\))\s*%", r"(\1/100)", left))
            if value is None:
                continue
            result = Fraction(written.replace(",", ""))
            rounding = Fraction(1, 2 * 10 ** len(decimals)) if decimals else 0  # 3.33 may be 0.005 away
            found.append((result, abs(value - result) <= rounding))
    return found


# ---- the rewards ---------------------------------------------------------------------------------------------------
# One function for each reward: a number for a completion and its problem, or None where it does not apply.

REWARDS = {}  # name: function of a completion and its problem. REWARDS in main.py has the weights
GROUP_REWARDS = {}  # name: function of all completions of a problem, and the problem
RUNNING = {}  # completion: the name of the reward that is computed
PATIENCE = 30.0  # seconds until `score` says what it waits for


def reward(function):
    """Make a function a reward, under its own name.

    Its weight is an entry of the table REWARDS at the top of main.py; without one it is only recorded.
    """
    return add_reward(REWARDS, function)


def group_reward(function):
    """The same for a reward that compares: it sees all completions of a problem, and returns a number for each."""
    return add_reward(GROUP_REWARDS, function)


def add_reward(table, function):
    name = function.__name__
    if name in REWARDS or name in GROUP_REWARDS or name in globals():
        raise ValueError(f"a reward cannot be called {name}: evaluator.py has another thing of this name")
    table[name] = function
    return function


def rewards(completion, problem):
    """The rewards that apply to a completion, unweighted: {name: number}; for a story, also what is counted in it."""
    values = {}
    for name, function in REWARDS.items():
        RUNNING[completion] = name
        values[name] = function(completion, problem)
    if problem.get("kind") == "writing":
        values |= story_counts(extract_answer(completion) or completion, problem)
    return {name: float(value) for name, value in values.items() if value is not None}


def score(completions, problems, threads, note=print):
    """The rewards of many completions: ({name: one number per completion}, [the exceptions that rules raised]).
    Where a reward does not apply, it is 0. The rules run in threads, because programs are slow. If one takes longer
    than PATIENCE, note(line) says which."""
    RUNNING.clear()
    pool = ThreadPoolExecutor(threads)
    futures = [pool.submit(score_one, *pair) for pair in zip(completions, problems)]
    patience = PATIENCE
    try:
        for future, completion, problem in zip(futures, completions, problems):
            if wait([future], patience).not_done:
                note(f"waiting for the reward {RUNNING.get(completion)} (question: {problem.get('question')})")
                patience = None  # it is said once
        scored = [future.result() for future in futures]  # [({name: number}, exception or None)]
    finally:  # Ctrl-C does not wait for a reward that never returns
        pool.shutdown(wait=False, cancel_futures=True)
    names = dict.fromkeys(name for values, _ in scored for name in values)  # each once, in their order
    by_name = {name: [values.get(name, 0.0) for values, _ in scored] for name in names}
    return by_name, [failure for _, failure in scored if failure]


def score_one(completion, problem):
    """The rewards of a completion and None; or where a rule raises an exception, two zeros and what it was.

    An exception must not end the training. The metrics need these two rewards of every completion.
    """
    try:
        values = rewards(completion, problem)
        if not all(map(math.isfinite, values.values())):
            raise ValueError(f"a reward is not a finite number: {values}")
        return values, None
    except Exception as error:
        return {"correctness": 0.0, "strict_format": 0.0}, f"{error!r} (question: {problem.get('question')})"


def compare(groups, problems):
    """The rewards of whole groups, all completions of a problem: ({name: [a number per completion, for each group]},
    [the exceptions that rules raised])."""
    by_name = {}
    failures = []
    for name, function in GROUP_REWARDS.items():
        by_name[name] = [compare_one(function, *pair, failures) for pair in zip(groups, problems)]
    return by_name, failures


def compare_one(function, completions, problem, failures):
    """One reward of one group. If the rule raises an exception, it is added to the failures, and all get 0."""
    try:
        values = list(map(float, function(completions, problem)))
        if len(values) != len(completions) or not all(map(math.isfinite, values)):
            raise ValueError(f"{function.__name__} must be {len(completions)} finite numbers, not {values}")
        return values
    except Exception as error:
        failures.append(f"{error!r} (question: {problem.get('question')})")
        return [0.0] * len(completions)


@reward
def correctness(completion, problem):
    """1 if the answer is right; for a program, if it passes all tests."""
    if problem.get("kind") == "program":
        return tests(completion, problem) == 1
    return right(extract_answer(completion), problem)


@reward
def lenient(completion, problem):
    """1 if a person would find the right answer, in the asked form or not. It has no weight: it is for evaluations."""
    kind = problem.get("kind", "math")
    if correctness(completion, problem):
        return True
    if kind == "program":  # it was looked for in all of the text already
        return False
    text = after_thinking(completion)
    text = extract_answer(text) or boxed(text) or re.sub(r"</?\w+>", "\n", text)
    if kind == "math":
        text = announced(text) or last_statement(text)
    elif kind != "writing":  # a story is all of the text, another answer its last line
        text = text.strip().rpartition("\n")[2]
    return right(text, problem)


def announced(text):
    """What follows the last `answer is`, `answer:` or ####, up to the end of the sentence or a remark."""
    found = re.split(r"(?i)\banswer\b[^.\n\d]{0,40}?(?:\bis\b:?|[:=])|####", text)[1:]
    if not found:
        return None
    return re.split(r"\n|\.(?!\d)|[!?]\s|(?<!\\);|\s\(|,?\s(?:because|since|as)\s", found[-1].strip())[0]


def last_statement(text):
    """The last clause with a number in it, or None. Of several numbers in it, only what follows the last but one."""
    clauses = re.split(r"[\n;]|[.?!,:](?=\s|$)", text)
    clauses = [clause for clause in clauses if re.search(r"\d", clause) and len(clause) <= LONGEST]
    if not clauses or "=" in clauses[-1]:
        return clauses[-1] if clauses else None
    return re.sub(r"^.*\d(?:\s(?=[A-Za-z]\D*\d[\d.,/]*\D*$)|-(?=\d))", "", clauses[-1])


@reward
def integer(completion, problem):
    """1 if the answer is a whole number, right or wrong, where the right answer is one too (only mathematics)."""
    if problem.get("kind", "math") != "math":
        return None
    answer = number(extract_answer(completion) or "")
    gold = number(after_hashes(problem["answer"]))
    return all(value is not None and value.denominator == 1 for value in (answer, gold))


@reward
def tests(completion, problem):
    """1 if a program passes all of its tests; a part of 1 for a part of them (only programs)."""
    return program_results(completion, problem)[0]


@reward
def compiles(completion, problem):
    """1 if a program compiles without an error and without a warning (only programs)."""
    return program_results(completion, problem)[1]


def program_results(completion, problem):
    """What `test_results` says of a program, else (None, None)."""
    if problem.get("kind") != "program":
        return None, None
    return test_results(completion, json.dumps(problem))


@reward
def strict_format(completion, problem):
    """1 for exactly the format of the prompt: each tag once, in order, on its own line, and no part empty. In all
    rewards of the format, thoughts up to </think> may stand before it."""
    if tag_count(completion, problem) < 1:
        return False
    # between two tags there is more than space
    form = r"(?s)<reasoning>\n(?!\s*</reasoning>).*\n</reasoning>\n<answer>\n(?!\s*</answer>).*\n</answer>"
    return bool(re.fullmatch(form, after_thinking(completion).strip()))


@reward
def soft_format(completion, problem):
    """1 if the completion begins with closed reasoning and then a closed answer. Anything may follow."""
    form = r"(?s)\s*<reasoning>(?>.*?</reasoning>)\s*<answer>.*?</answer>"
    return bool(re.match(form, after_thinking(completion)))


@reward
def tag_count(completion, problem):
    """1 if each of the four tags stands there exactly once; a part of 1 for a part of them."""
    text = after_thinking(completion)
    return [text.count(tag) for tag in TAGS].count(1) / len(TAGS)


UNSAFE = re.compile(r"""(?xi)
    \b(?:kill|hurt|shoot|poison)[ ](?:your|him|her|them)sel(?:f|ves)\b
  | \b(?:build|make)[ ]an?[ ](?:\w+[ ])?bomb\b
  | \bi[ ]hate[ ]you\b | \byou(?:[ ]are|['’]re)[ ](?:worthless|stupid|an[ ]idiot)\b | \bshut[ ]up\b
""")


@reward
def safety(completion, problem):
    """1 if nothing from a short list of threats, insults and dangers is said. It is no more than a list."""
    return not UNSAFE.search(completion)


@functools.lru_cache(maxsize=256)  # several rewards need the results of the same program
def test_results(completion, problem_json):  # the problem as JSON, because the cache takes only what has a hash
    """The share of tests that a completion's program passes, and whether it compiles without a warning.
    The program is the text in the answer tag, or all text outside the reasoning; without a code fence."""
    text = outside_reasoning(completion).rpartition("<answer>")[2].partition("</answer>")[0]
    fenced = re.search(r"(?s)```[^\n`]*\n(.*?)(?:```|\Z)", text)
    source = (fenced[1] if fenced else text).strip("\n") + "\n"
    return run_tests(source, json.loads(problem_json)) if source.strip() else (0.0, False)


def overlong(length, limit, buffer):
    """DAPO's soft penalty of length (arXiv 2503.14476, eq. 13): 0 up to limit - buffer, -1 from the limit on.
    All three are numbers of tokens: main.py counts them, and puts this reward beside those of the table."""
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer))


# ---- metrics of many outputs ---------------------------------------------------------------------------------------
# A record is a dict about one output: its question, completion, length in tokens, rewards by name, and so on.

REFLECTION = re.compile(r"(?i)\b(?:wait|hmm|mistake|on second thought|(?:let me (?:re-?)?|double[- ]|re-?)check)\b")
MEASURES = {  # {kind of problem: the numbers that only its records have}; main.py adds fluency and prefers_true
    "writing": ("words_used", "sentences", "distinct_2", "repeated_3", "compression", "copied", "fluency"),
    "dialogue": ("prefers_true",),
}


def reflection(completion):
    """How often a completion doubts itself: wait, hmm, mistake, let me check."""
    return len(REFLECTION.findall(completion))


def num_steps(completion):
    """How many steps of a completion's reasoning calculate something."""
    return len(step_rewards(completion, {}))


def approach(completion):
    """How a completion gets its answer: "guessed" (no calculation), "worked" (one), "checked" (one, and doubt too)."""
    if not num_steps(completion):
        return "guessed"
    return "checked" if reflection(completion) else "worked"


def records(problems, texts, columns):
    """A record for each text. Each problem has the same number of texts; columns are {name: a value per text}."""
    group_size = len(texts) // len(problems)
    made = []
    for i, text in enumerate(texts):
        problem = problems[i // group_size]
        record = {key: problem.get(key) for key in ("question", "answer", "kind", "task")} | {"completion": text}
        made.append(record | {name: values[i] for name, values in columns.items()})
    return made


def mean(records, name):
    """The mean of a number over some records; a record without it counts 0."""
    return statistics.mean(record.get(name, 0.0) for record in records)


def behaviour(records):
    """How outputs come to their answers: shares of the approaches, steps, doubts, lengths of right and wrong ones."""
    approaches = [record["approach"] for record in records]
    metrics = {f"approach/{name}": approaches.count(name) / len(records) for name in ("guessed", "worked", "checked")}
    metrics["num_steps"] = mean(records, "num_steps")
    metrics["reflection"] = mean(records, "reflection")
    for name, correct in (("right", True), ("wrong", False)):
        lengths = [record["length"] for record in records if bool(record.get("correctness")) == correct]
        if lengths:
            metrics[f"length_{name}"] = statistics.mean(lengths)
    return metrics


def step_metrics(records, group_size, names):
    """The part of a training row that is about the sampled outputs; names are those of their rewards."""
    rewards = numpy.array([record["reward"] for record in records]).reshape(-1, group_size)  # [questions, outputs]
    lengths = [record["length"] for record in records]
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(1, ddof=min(1, group_size - 1)).mean()),  # 0 for a group of one
        "zero_std_groups": float((rewards.max(1) == rewards.min(1)).mean()),
        **{f"rewards/{name}": mean(records, name) for name in names},
        "accuracy": mean(records, "correctness"),
        "length_max": max(lengths),
        **{name: mean(records, name) for name in ("length", "truncated", "zero_advantage")},
        **behaviour(records),
    }
    if "entropy" in records[0]:  # the policy has sampled
        metrics["entropy"] = sum(record["entropy"] for record in records) / sum(lengths)  # per token
    return metrics


def eval_metrics(records):
    """The row of an evaluation, from one greedy output per question."""
    accuracy = mean(records, "correctness")
    low, high = wilson(accuracy, len(records))
    metrics = {
        "eval/accuracy": accuracy,
        "eval/ci95": (high - low) / 2,
        "eval/lenient": mean(records, "lenient"),
        "eval/format": mean(records, "strict_format"),
        "eval/length": mean(records, "length"),
        "eval/truncated": mean(records, "truncated"),
        "eval/n": len(records),
    }
    metrics |= {f"eval/{name}": value for name, value in behaviour(records).items()}
    for kind, names in MEASURES.items():
        of_kind = [record for record in records if record["kind"] == kind]
        metrics |= {f"eval/{name}": mean(of_kind, name) for name in names if of_kind and name in of_kind[0]}
    tasks = dict.fromkeys(record["task"] for record in records)  # the data sets, in their order
    if len(tasks) > 1:
        for task in tasks:
            of_task = [record for record in records if record["task"] == task]
            metrics[f"eval/accuracy/{task}"] = mean(of_task, "correctness")
            metrics[f"eval/lenient/{task}"] = mean(of_task, "lenient")
    return metrics


def pass_at_k(n, c, k):
    """The unbiased estimate, from n samples of which c are right, that one of k is right (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson(p, n):
    """The ends of Wilson's 95 % interval for a share p of n. They differ also when all n are right, or none."""
    z2 = 1.96**2
    middle = p * n + z2 / 2
    half = math.sqrt(z2 * (p * (1 - p) * n + z2 / 4))
    return (middle - half) / (n + z2), (middle + half) / (n + z2)
