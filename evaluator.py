"""The rules: what a completion answers, whether that is right, and the rewards that need no model.

Completions and problems are plain text and dicts. `rewards` gives the rewards in the table REWARDS for one completion,
`score` those of many, and `compare` those of groups, unweighted. Not in the tables: `step_rewards` and `overlong`.
To add a reward, write a function under `@reward` or `@group_reward` (last section) and its weight in main.py.
"""
# ruff: noqa: BLE001, PLR0124, S102, SIM115, SIM905

import ast
import cmath
import difflib
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unicodedata
import warnings
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


# ---- which answer does a completion give? --------------------------------------------------------------------------


def extract_answer(completion):
    r"""The answer that a completion gives, or None: its last answer tag, else its last `\boxed{…}`, else what follows
    its last `####`. Text inside the reasoning does not count."""
    text = outside_reasoning(completion)
    if "<answer>" in text:
        answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    elif BOX.search(text):
        answer = boxed(text)
    elif "####" in text:
        answer = text.rpartition("####")[2].strip().partition("\n")[0]
    else:
        return None
    return answer.strip() or None


def outside_reasoning(completion):
    """The completion without its reasoning. A <reasoning> that is never closed ends at <answer>."""
    before, end_tag, after = completion.rpartition("</reasoning>")  # `after` may hold one that is never closed
    before = re.sub(r"<reasoning>.*?</reasoning>", "", before + end_tag, flags=re.DOTALL)
    return before + re.sub(r"<reasoning>.*?(?=<answer>|\Z)", "", after, count=1, flags=re.DOTALL)


BALANCED = r"(?:[^{}\\]++|\\.)*+"  # text without braces; \{ and \} count as text
for _ in range(9):  # each time it may hold one more level of braces
    BALANCED = rf"(?:[^{{}}\\]++|\\.|\{{{BALANCED}\}})*+"
BOX = re.compile(  # group 1: what is in braces; group 2: what stands without braces; no group: a box never closed
    rf"(?s)\\(?:boxed|fbox)(?![A-Za-z])\s*+(?:\{{({BALANCED})\}}|([^\s{{$][^\s$]*?)(?=[.,]?(?:[\s$]|\Z)))?"
)
BETWEEN_BOXES = r"[\s$,]*+(?:and|or|=|\\text\s*\{\s*(?:and|or)\s*\})?[\s$,]*+(?:[A-Za-z]\w*\s*=\s*)?"


def boxed(text):
    r"""What the last box holds: `\boxed{…}`, `\fbox{…}`, or `\boxed 5` up to a space or $. "" if it is never closed.
    Boxes with only `and`, `or`, `x =` or commas between them are one list: `\boxed{2} and \boxed{5}` is `2, 5`."""
    contents, end = [], 0
    for box in BOX.finditer(text):
        if not box.lastindex or not re.fullmatch(BETWEEN_BOXES, text[end : box.start()]):
            contents.clear()
        if box.lastindex:  # it is closed
            contents.append(box[box.lastindex].strip())
        end = box.end()
    return ", ".join(contents)


# ---- what does an answer mean? -------------------------------------------------------------------------------------
# `tidy` brings an answer into one notation, `tokenize` cuts it into tokens, and `Reader` computes its value. At each
# point, every variable gets another random value. Two answers are the same if they are equal at all points.
# No text is ever run as code. Lengths, depths and numbers are limited; what cannot be read is compared as text.

LONGEST = 500  # characters of an answer that is read as mathematics
LARGEST = 20_000  # bits of an exact number
POINTS = (0, 1, 2, 3, -1, -2, -3, -4)  # seeds; all variables are negative at -1, some at -2 to -4: so x is not |x|

nfkc = functools.partial(unicodedata.normalize, "NFKC")  # ½ becomes 1⁄2, and full-width digits plain ones
SIGNS = str.maketrans("−–—⁻×·⋅∙÷∕⁄’", "----****///'", "\u200b€£¥₹")  # the third text is removed
COMMAND_SIGNS = "√sqrt πpi θtheta ∞infty ≤le ≥ge ≠ne ±pm ∓mp ∪cup ∈in ≈approx ∅emptyset °degrees ºdegrees"
SIGNS |= {ord(pair[0]): f"\\{pair[1:]} " for pair in COMMAND_SIGNS.split()}
SIGNS |= {ord(sign): "\\frac{" + nfkc(sign).replace("⁄", "}{") + "}" for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMERALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety""".split()
NUMERAL_VALUES = dict(zip(NUMERALS, [*range(20), *range(20, 100, 10)]))
IN_WORDS = rf"(?:(?:{'|'.join(NUMERALS[20:])})[ -](?:{'|'.join(NUMERALS[1:10])})|{'|'.join(NUMERALS)})\b"  # seventy-two
ORDINAL = rf"(?:third|(?:{'|'.join(NUMERALS[4:20])}|fif|eigh|nin|twelf|[a-z]+tie|hundred|thousand|million)th)s?"
FRACTION_WORD = rf"(?:hal(?:f|ves)|quarters? of|(?<!the ){ORDINAL})\b"  # 72 hundredths are not 72; 8 quarters are 8
OTHER_NUMBER = rf"(?:\d|\b(?:{'|'.join(NUMERALS)}|point|quarters?|{FRACTION_WORD})\b)"
# words that change a number: `Total: 72` is 72 with a label, but `not: 72` is not 72
MEANINGFUL = r"(?i:\b(?:not|or|wrong|incorrect|thousand|million|billion|negative|squared)\b)"
TEXT = r"\\(?:text(?:rm|it|bf|normal|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname|boldsymbol|emph|underline)\*?\s*"
MATRIX = r"\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?"


def mixed_number(match):
    """A mixed number as a sum: 1\\frac12 and 1 1/2 as (1+1/2). But 3\\frac52 stays a product."""
    integer, top, bottom = match.groups()
    return f"({integer}+{top}/{bottom})" if int(top) < int(bottom) else match[0]


def matrix(match):
    """A matrix as a list of lists, and one with a single row or column as a tuple."""
    rows = re.split(r"\\\\(?:\s*\[[\d.]+ ?[a-z]{2}\])?|\\cr(?![a-z])", match[1].strip().removesuffix("\\\\"))
    rows = [row.split("&") for row in rows]
    if len(rows) == 1 or all(len(row) == 1 for row in rows):
        return "(" + ",".join(cell for row in rows for cell in row) + ")"
    return "[" + ",".join(f"[{','.join(row)}]" for row in rows) + "]"


REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # signs and markup
    (r"[₀-₉]+", r"_{\g<0>}"),  # before NFKC, which turns x₂ into x2
    (r"[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}"),
    (r"[^\x00-\x7f]+", lambda run: nfkc(run[0].translate(SIGNS))),
    (rf"(?s)\\begin{MATRIX}(.*?)\\end{MATRIX}", matrix),
    (r"<<[^<>]*>>|<\|\w+\|>|</?(?:s|b|i|em|strong)>", ""),  # <<3*4=12>> is GSM8K's, <|im_end|> ends a chat
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])|\\!\s*|`|\\\\$", ""),
    (r"(?<=\d)(?:\{,\}|\\,|[_'])(?=\d{3})", ","),
    (rf"{TEXT}\{{([^{{}}]*)\}}", r" \1 "),
    (rf"{TEXT}(?=\{{)|\\(?:large|Large|bf|rm|it|Rightarrow|implies)(?![a-zA-Z])|\\(?:text)?color\s*\{{[a-z]*\}}", " "),
    (r"(?<!\\)\\[,;: ()\[\]$]|\\q?quad(?![a-zA-Z])|\\(?=%)|~|\$", " "),
    (r"\\[dtc]?(frac|binom)(?![a-z])", r"\\\1"),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
    (r"(\\(?:sin|cos|tan|log)\s*[_^])\s*(\d)", r"\1{\2}"),  # \log_2 256 is not \log_{2 256}
    (r"\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degrees?(?![a-z])", " degrees "),
    # words
    (r"(?i)^\W*(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?:\s+is|\s*[:=])+\s*", ""),
    (r"(?i)(?<=\w)[\W_]*(?:in )?\bbase\W*(\d+)\W*$", r"_{\1}"),  # 101 (base 2)
    (r"^\((\d+)\)(?=_)", r"\1"),  # (101)_2
    (rf"^(?!.*{MEANINGFUL})[A-Za-z][A-Za-z ]*: ", ""),  # Total: 72
    (rf"(?<=\S) \((?!.*{MEANINGFUL})[A-Za-z -]{{3,}}\)$", ""),  # 72 (seventy-two)
    (r"^\s*([A-Za-z]\w*)\s*\\approx", r"\1="),  # x \approx 5
    (r"(?<=\S)\s*\\approx.*", ""),  # 8\sqrt{2} \approx 11.3: the exact value stands first
    (r"(?i)^\s*(?:approximately|about|exactly|\\approx|\\sim|US|USD|EUR|GBP)\s*(?=[-+\d.\\])", ""),
    (r"(?i)(\d)(?::00)?\s*([ap])\.?\s?m\b\.?", lambda time: f"{time[1]} {time[2].lower()}m"),  # 9:00 a.m.
    (r"^\s*((?:\w+ ?= ?)?[-+\d.,/ ]*\d)\s+([mh])\b(?=\s*(?:\^ ?\{?[23]\}?)?[\s.,]*$)",  # 5 m, but not 2m + 1 or r^2 h
        lambda part: f"{part[1]} {UNITS[part[2]]}"),
    # numbers
    (rf"(?i)^{IN_WORDS}(?!.*{OTHER_NUMBER})",  # seventy-two, but not five sixths
        lambda words: str(sum(NUMERAL_VALUES[word] for word in re.split("[ -]", words[0].lower())))),
    (r"(?i)^(?:minus|negative) (?=[\d.\\])", "-"),
    (r"(\.\d*)\s*\\(?:overline|bar)\s*\{?(\d+)\}?", lambda part: part[1] + 20 * part[2]),  # the period, 20 times
    (r"(?<![\w.^/{}])(\d{1,9})\s*\\frac\s*\{\s*(\d{1,9})\s*\}\s*\{\s*(\d{1,9})\s*\}", mixed_number),
    (r"(?<![\w.^/{}])(\d{1,9}) +(\d{1,9})/(\d{1,9})(?![\d.])", mixed_number),
    (rf"(?<=\d) ?({'|'.join(MULTIPLES)})s?\b", lambda word: f"*{MULTIPLES[word[1]]}"),  # 2 million
    (r"(?s)^(.*\\pm.*?)[\s.]*$", lambda text: text[1].replace("\\pm", "+").replace("\\mp", "-") + ", "
        + text[1].replace("\\pm", "-").replace("\\mp", "+")),
)]  # fmt: skip


def tidy(text):
    """An answer without its box, in one notation, and without markup that means nothing."""
    text = boxed(text) or text
    if len(text) <= LONGEST:
        for pattern, new in REWRITES:
            text = pattern.sub(new, text)
    return " ".join(text.split()).lstrip(' ,;:#*_"“”').rstrip(' .,;:*_"“”')


UNITS = dict(short.split("=") for short in """
    cm=centimeter mm=millimeter km=kilometer ft=foot feet=foot in=inch inches=inch yd=yard mi=mile kg=kilogram gm=gram
    mg=milligram ml=milliliter lb=pound lbs=pound oz=ounce mph=mile/hour kph=kilometer/hour hr=hour hrs=hour min=minute
    mins=minute sec=second secs=second day=day days=day am=am pm=pm sq=square squared=square cubed=cubic ^2=square
    ^3=cubic USD=dollar EUR=euro pts=point men=men percent=% pct=% per=/ m=meter h=hour
""".split())  # fmt: skip
# a word has 4 letters or more, or 3 with a vowel if a space precedes; other letters are variables: 2xy
WORD = r"(?:[A-Za-z]{4,}+|(?<=\s)(?=[a-z]*[aeiou])[a-z]{3}(?![A-Za-z]))"
UNIT_NAMES = "|".join(unit for unit in UNITS if re.fullmatch("[A-Za-z]{2,}", unit))
UNIT = rf"\s?(?:{UNIT_NAMES}|{WORD})(?![A-Za-z])(?:\s?\^\s?\{{?[23]\b\}}?)?"
TRAILING_UNITS = re.compile(  # units directly follow a number; after them comes `,`, `)` or the end of the answer
    rf"(?:(?<=[\d)}}.])|(?<=\\pi))(?:\s?%|\s?/?(?!\s?(?:squared|cubed|{FRACTION_WORD})){UNIT}"
    rf"(?:\s?/\s?[A-Za-z]{{1,2}}(?![A-Za-z])|\s?/?{UNIT})*)(?=\s?(?:[,)]|$))"
)


def unit_names(text):
    """The words in a text, with its units by their full names."""
    words = re.findall(r"[A-Za-z]+|\^\d|%", re.sub(r"\^\s?\{", "^", text))
    return {name for word in words for name in UNITS.get(word, word.lower().removesuffix("s")).split("/")} - {""}


UNGROUPED = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
GROUPED = r"(?<!\d,)[1-9]\d{0,2}(?:(?:,\d{3})+(?![\d,])|(?: \d{3})+(?![ \d]))(?:\.\d+)?"  # 1,080 and 1 080
GREEK = r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|omega|rho|sigma|tau)(?![a-z])"
PLAIN_COMMANDS = "sin cos tan cot ln log exp sqrt pi".split()  # also understood without the backslash
TOKEN = (  # a letter is x_1, a Greek letter, capitals as one name (AB), or a single letter that begins no word
    rf"(?P<command>(?!{GREEK})\\(?:[A-Za-z]+|.)"
    rf"|(?<![A-Za-z])(?i:{'|'.join(PLAIN_COMMANDS)}|inf|infinity|and|or)(?![A-Za-z]))"
    rf"|(?P<letter>(?:[A-Za-z]|{GREEK})_(?:\w|\{{\w+\}})|{GREEK}"
    rf"|(?<![A-Za-z])[A-Z]{{2,}}(?![A-Za-z])|(?!{WORD})[A-Za-z])|(?P<word>{WORD})|(?P<sign>\*\*|[<>]=|\S)"
)
OTHER_SPELLINGS = {f"\\{name}": name for name in PLAIN_COMMANDS} | {
    ",": "; and or \\cup \\bigcup \\lor", "^": "**", "*": "\\cdot \\times", "/": ": \\div", "<": "\\lt", ">": "\\gt",
    "\\le": "<= \\leq \\leqslant", "\\ge": ">= \\geq \\geqslant", "|": "\\lvert \\rvert", "(": "\\langle",
    ")": "\\rangle", "\\{": "\\lbrace", "\\}": "\\rbrace", "\\emptyset": "\\varnothing", "\\infty": "inf infinity",
}  # fmt: skip
SPELLINGS = {other: token for token, others in OTHER_SPELLINGS.items() for other in others.split()}


def tokenize(text, number_pattern):
    """A text as pairs (kind, text). The kinds: number, letter (a variable), word, command, sign, and at last end."""
    matches = re.finditer(rf"\s*(?:(?P<number>{number_pattern})|{TOKEN})", text)
    tokens = [(match.lastgroup, match[match.lastgroup]) for match in matches]
    return [*((kind, SPELLINGS.get(token.lower(), token)) for kind, token in tokens), ("end", "")]


Group = namedtuple("Group", "kind items")  # a "list" or "set", or a tuple or interval named by its brackets: "(]"
Equation = namedtuple("Equation", "name value difference")  # what it defines or "", right side, left minus right side


def bounded(value):
    """A number, real where it can be; ValueError if it is no number or too large."""
    if isinstance(value, tuple) or value != value:  # a Group, an Equation or nan
        raise ValueError("no number")
    if isinstance(value, Fraction) and max(abs(value.numerator), value.denominator).bit_length() > LARGEST:
        raise ValueError("too large")
    return value.real if isinstance(value, complex) and value.imag == 0 else value


def natural(value, limit):
    """A whole number from 0 to a limit, as an int."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= limit:
        raise ValueError("no whole number, or too large")
    return int(value)


def power(base, exponent):
    """A power: exact where it can be, and its size is checked before it is computed: 9**9**9."""
    if not isinstance(exponent, Fraction) or exponent.denominator != 1:
        return bounded(complex(base) ** complex(exponent))
    bits = max(abs(base.numerator), base.denominator).bit_length() if isinstance(base, Fraction) else 0
    if bits * abs(exponent) > LARGEST:
        raise ValueError("too large")
    return bounded(base ** int(exponent))


CONSTANTS = {"\\pi": math.pi, "\\infty": math.inf, "e": math.e, "i": 1j, "\\emptyset": Group("list", [])}
FUNCTIONS = {f"\\{name}": getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")}
FUNCTIONS |= {f"\\arc{name}": getattr(cmath, "a" + name) for name in ("sin", "cos", "tan")}
FUNCTIONS |= {"\\ln": cmath.log, "\\log": cmath.log10, "\\cot": lambda z: 1 / cmath.tan(z)}
FUNCTIONS |= {"\\sec": lambda z: 1 / cmath.cos(z), "\\csc": lambda z: 1 / cmath.sin(z)}
ROUNDED = {"\\lfloor": math.floor, "\\lceil": math.ceil, "|": abs}
CLOSING = {"(": ") ]", "[": "] )", "{": "}", "\\{": "\\}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
FACTORS = {*FUNCTIONS, "\\frac", "\\sqrt", "\\binom", "\\pi"}  # what may follow a factor without a sign
DEFINED = re.compile(  # what an equation may define: x, x_1, f(x), AB, Total; (x,y); |AB|, A/B
    r"(?:[A-Za-z]'?|[A-Z]{2,4}|[A-Za-z]{4,}|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z,]+\))?"
    r"|\([A-Za-z](?:,[A-Za-z])+\)|[A-Z/|]+"
)


class Reader:
    """Recursive descent through the tokens of an answer, evaluated at one point.

    One method for each level: answer (1, 2), relation (x = 1), sum, product, signed (-1), raised (2^3), atom.
    """

    def __init__(self, tokens, point):
        self.tokens, self.point, self.position = tokens, point, 0
        self.in_bars = False  # is | the innermost open bracket? Then the next | closes it

    def take(self, *texts):
        """The next token, if it is one of these; otherwise None."""
        if self.tokens[self.position][1] in texts:
            self.position += 1
            return self.tokens[self.position - 1][1]

    def answer(self):
        """One value is itself; several values with commas between them are a list."""
        items = [self.relation()]
        while self.take(","):
            self.take(",")  # `, and`
            items.append(self.relation())
        return items[0] if len(items) == 1 else Group("list", items)

    def relation(self):
        """A value, an equation, or an inequality (as an interval)."""
        sides, signs = [self.side()], []
        while sign := self.take("=", "<", ">", "\\le", "\\ge", "\\in"):
            signs.append(sign)
            sides.append(self.side())
        if set(signs) - {"=", "\\in"}:
            return as_interval(sides, signs)
        if len(sides) == 1 or not any(name for _, name in sides):
            return sides[-1][0]  # 3 + 4 = 7 answers 7; whether the calculation is correct does not matter here
        if not sides[0][1] and DEFINED.fullmatch(sides[-1][1]):  # 5 = x
            sides.reverse()
        (left, name), (right, _) = sides[0], sides[-1]
        groups = isinstance(left, Group) or isinstance(right, Group)
        difference = math.nan if groups else bounded(left - right)
        return Equation(name if DEFINED.fullmatch(name) else "", right, difference)

    def side(self):
        """The value of one side of a relation, and its text if it has a variable, else ""."""
        start, value = self.position, self.sum()
        side = self.tokens[start : self.position]
        has_variable = any(kind in ("letter", "word") and text not in CONSTANTS for kind, text in side)
        return value, ("".join(text for _, text in side) if has_variable else "")

    def sum(self):
        value = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            value = bounded(value + term if sign == "+" else value - term)
        if self.take("\\over"):  # {1 + x \over 2}
            value = bounded(value / self.sum())
        return value

    def product(self):
        value = self.signed()
        while True:
            kind, text = self.tokens[self.position]
            if self.take("*"):
                value = bounded(value * self.signed())
            elif self.take("/"):
                value = bounded(value / self.signed())
            elif text == "|" and self.in_bars:  # it closes |x|
                return value
            elif kind == "letter" or text in FACTORS or text in CLOSING:  # 2x
                value = bounded(value * self.raised())
            else:
                return value

    def signed(self):
        if self.take("-"):
            return -self.signed()
        return self.signed() if self.take("+") else self.raised()

    def raised(self):
        value = self.atom()
        while self.take("!"):
            value = bounded(Fraction(math.factorial(natural(value, 2500))))
        if self.take("^"):
            value = power(value, self.signed())
        if self.point < 0 and isinstance(value, complex):
            raise ValueError("this point does not count: √x √y is not √(xy) where x and y are negative")
        return value

    def atom(self):
        kind, text = self.tokens[self.position]
        self.position += 1
        if kind == "number":  # exact, as it is written: 1,080 and .5 and 6e3 and 101_2
            digits = text.replace(",", "").replace(" ", "")
            return Fraction(int(digits, natural(self.argument(), 36))) if self.take("_") else Fraction(digits)
        if text in CONSTANTS:
            return CONSTANTS[text]
        if kind in ("letter", "word"):
            if kind == "word" and self.tokens[self.position][0] == "word":
                raise ValueError("a sentence")
            return self.variable(re.sub("[{}]", "", text))
        if text in CLOSING:
            return self.bracket(text)
        if text in FUNCTIONS:
            return self.function(text)
        if text == "\\frac":
            return bounded(self.argument() / self.argument())
        if text == "\\sqrt":
            return self.root()
        if text == "\\binom":
            return Fraction(math.comb(natural(self.argument(), 1000), natural(self.argument(), 1000)))
        raise ValueError("not mathematics")

    def variable(self, name):
        """A random number for a name: 10^u or -10^u. From -1 to 1.5, each of four points has a quarter for its u."""
        rng = random.Random(f"{name} {self.point}")
        size = 10 ** (2.5 * (self.point % 4 + rng.random()) / 4 - 1)
        negative = self.point == -1 or self.point < -1 and rng.random() < 0.5
        return -size if negative else size

    def argument(self):
        """What a command takes: {…}, a digit or a letter; maybe with a sign, as in e^-x."""
        return self.signed() if self.tokens[self.position][1] == "-" else self.atom()

    def root(self):
        """\\sqrt x or \\sqrt[3]{x}. The odd root of a negative number is real."""
        index = natural(self.bracket("["), 100) if self.take("[") else 2
        value = bounded(self.argument())
        negative = index % 2 == 1 and not isinstance(value, complex) and value < 0
        return -power(-value, 1 / complex(index)) if negative else power(value, 1 / complex(index))

    def bracket(self, opening):
        outer_in_bars, self.in_bars = self.in_bars, opening == "|"
        empty = self.tokens[self.position][1] in (")", "]", "}", "\\}")
        value = Group("list", []) if empty else self.answer()
        closing = self.take(*CLOSING[opening].split())
        self.in_bars = outer_in_bars
        if closing is None:
            raise ValueError("never closed")
        if opening in ROUNDED:
            value = ROUNDED[opening](bounded(value))
            return Fraction(value) if isinstance(value, int) else value
        if opening != "{" and isinstance(value, Group) and value.kind == "list":
            return Group("set" if opening == "\\{" else opening + closing, value.items)
        return value

    def function(self, name):
        """\\sin x, \\sin^2 x, \\sin^{-1} x (the inverse), \\log_2 x, with or without brackets."""
        base = self.argument() if self.take("_") else None
        exponent = self.argument() if self.take("^") else Fraction(1)
        if exponent == -1:
            name, exponent = "\\arc" + name[1:], Fraction(1)
        if self.tokens[self.position][1] in ("(", "{"):
            argument = self.atom()  # \\cos(x)^2 is (cos x)^2
        else:
            argument = self.signed()
            while self.tokens[self.position][0] == "letter" or self.tokens[self.position][1] == "\\pi":
                argument = bounded(argument * self.raised())  # \\sin 2x
        value = FUNCTIONS[name](argument) if base is None else cmath.log(argument) / cmath.log(base)
        return power(bounded(value), exponent)


def as_interval(sides, signs):
    """x > 5 as (5, ∞), and 1 < x ≤ 2 as (1, 2]. A side is (its value, its text if it has a variable)."""
    if signs[0] in (">", "\\ge"):  # x > 5 as 5 < x
        sides, signs = sides[::-1], [{">": "<", "\\ge": "\\le"}.get(sign) for sign in signs[::-1]]
    if sides[0][1]:  # x < 5 as -∞ < x < 5
        sides, signs = [(-math.inf, ""), *sides], ["<", *signs]
    if sides[-1][1]:  # 5 < x as 5 < x < ∞
        sides, signs = [*sides, (math.inf, "")], [*signs, "<"]
    (low, _), (_, name), (high, _) = sides  # a ValueError if there are not three
    if not DEFINED.fullmatch(name) or set(signs) - {"<", "\\le"}:
        raise ValueError("no interval")
    opening, closing = ("[" if signs[0] == "\\le" else "("), ("]" if signs[1] == "\\le" else ")")
    return Group(opening + closing, [low, high])


def reading(text):
    """A text read as mathematics: (its value at each of POINTS, its units), or None. A value is a number, a Group, an
    Equation, or None (only at negative points)."""
    if len(text) > LONGEST:
        return None
    units, text = unit_names(" ".join(TRAILING_UNITS.findall(text))), TRAILING_UNITS.sub("", text)  # 8 cm^2 is 8
    pair = re.search(r"(?:[(\[]|\\\{)[^)\]}]*\d[, ]\d{3}", text)  # (12,102) is a pair, no number
    tokens = tokenize(text, UNGROUPED if pair else f"{GROUPED}|{UNGROUPED}")
    points = POINTS if any(kind in ("letter", "word") for kind, _ in tokens) else POINTS[:1]
    values = [value_at(tokens, point) for point in points]
    return None if None in values[:4] else (values, units)


def value_at(tokens, point):
    """The value of an answer at a point, or None where it cannot be read."""
    reader = Reader(tokens, point)
    try:
        value = reader.answer()
        return value if reader.tokens[reader.position][0] == "end" else None
    except (ValueError, ArithmeticError, TypeError, LookupError, RecursionError):
        return None


# ---- do two answers mean the same? ---------------------------------------------------------------------------------
# `math_equal` compares two answers, `agree` two readings, `same` two values at one point, and `close` two numbers.


@functools.lru_cache(maxsize=1024)  # outputs of a group often have the same answer
def math_equal(prediction, gold):
    """Do two answers mean the same? By value where both can be read as mathematics, else as text."""
    prediction, gold = tidy(prediction), tidy(gold)
    if bool(BASE.search(prediction)) != bool(BASE.search(gold)):  # the question may name the base: 101 for 101_2
        prediction, gold = BASE.sub("", prediction), BASE.sub("", gold)
    prediction, gold = spaced_like(gold, prediction), spaced_like(prediction, gold)
    if as_text(prediction) == as_text(gold):
        return True
    first, second = reading(prediction), reading(gold)
    if first and second and agree(first, second):
        return True
    # what is left: a sentence that states the gold number, and names its units if it has some: It is 8 cm.
    target = exact_number(second)
    if target is None or exact_number(first) is not None:
        return False
    if first and not re.search("[A-Za-z]{4}", prediction):  # it is a formula, no sentence
        return False
    words = re.sub(r"(?<=[A-Za-z] )(?:in|am)\b", "", prediction)  # in: inches after a number, not after a word
    return stated(prediction) == target and second[1] <= unit_names(words)


BASE = re.compile(r"(?<=[\dA-F])_\s*\{?\s*\d+\s*\}?$")


def spaced_like(other, text):
    """300,200,100 as 300, 200, 100 (three numbers), if the other text is such a list."""
    is_list = re.search(r"\d, -?\d", other) and ", " not in text
    return re.sub(",(?=[1-9])", ", ", text) if is_list else text


def as_text(text):
    """A text without spaces, with words in lower case. (C) becomes C. Single letters stay as they are: R is not r."""
    text = re.sub(r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|[A-Z][a-z]{2,}|YES|NO|No)(?![A-Za-z])", lambda m: m[0].lower(), text)
    return re.sub(r"^\((\w)\)$", r"\1", re.sub(r"(?<!\d)\s|\s(?!\d)", "", text))


def agree(one, other):
    """Do two readings mean the same? Units must match if both have some. 50% equals 0.5, and also 50 without a unit."""
    (values, units), (other_values, other_units) = one, other
    if units and other_units and units != other_units:
        return False
    a, b = values[0], other_values[0]
    pairs = [(x, y) for x, y in zip(values, other_values) if x is not None and y is not None]
    if isinstance(a, Equation) and isinstance(b, Equation) and (a.name != b.name or not a.name):
        # the same line: left side minus right side of one is a constant times that of the other
        differences = [(x.difference, y.difference) for x, y in pairs]
        return all(x and y and close(x * b.difference, a.difference * y) for x, y in differences)
    if ("%" in units) != ("%" in other_units) and not isinstance(a, tuple) and not isinstance(b, tuple):
        percent, value = (a, b) if "%" in units else (b, a)
        return close(percent / 100, value) or (abs(value) >= 1 and close(percent, value))
    return all(same(x, y) for x, y in pairs)


def same(a, b):
    """The same value at one point? Lists and sets may be in any order; 5 is x = 5."""
    names = {value.name for value in (a, b) if isinstance(value, Equation)}
    if names:
        a, b = (value.value if isinstance(value, Equation) else value for value in (a, b))
        return len(names) == 1 and "" not in names and same(a, b)
    kinds = {value.kind if isinstance(value, Group) else "number" for value in (a, b)}
    if kinds == {"number"}:
        return close(a, b)
    if kinds <= {"list", "set", "number"}:  # a number is a list of one: `1/2 or 0.5` is 1/2
        xs, ys = (value.items if isinstance(value, Group) else [value] for value in (a, b))
        table = [[same(x, y) for y in ys] for x in xs]  # each must be in the other list
        return bool(xs) == bool(ys) and all(map(any, table)) and all(map(any, zip(*table)))
    matching = len(kinds) == 1 or "list" in kinds and kinds <= {"list", "()", "[]"}
    return matching and len(a.items) == len(b.items) and all(map(same, a.items, b.items))


def close(a, b):
    """The same number? Exact numbers must be equal, but those with 10 or more decimals may be rounded."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        long_decimal = max(a.denominator, b.denominator) > 10**9  # 0.3333333333 is 1/3
        return a == b or (long_decimal and abs(a - b) * 10**9 < abs(a))
    if max(abs(a), abs(b)) > 1e300:
        return a == b
    return cmath.isclose(complex(a), complex(b), rel_tol=1e-9, abs_tol=1e-12)


def number(text):
    """The one number that an answer states, as a Fraction, or None: '-5 degrees' states -5, '3 + 4 = 7' states 7."""
    text = tidy(text)
    found = reading(text)
    return exact_number(found) if found else stated(text)


def exact_number(found):
    """The number of a reading if it is exact, else None; 5 for x = 5."""
    value = found[0][0] if found else None
    if isinstance(value, Equation) and value.name:
        value = value.value
    return value if isinstance(value, Fraction) else None


DOUBT = "not?|none|never|nor|or|either|neither|unless|if|false|wrong|maybe|perhaps|possibly|probably|almost|nearly"
DOUBTFUL = re.compile(rf"(?i)\b(?:{DOUBT}|near|incorrect|except|but)\b|n't|(?:^|\s)[<>]|[<>!]=|\\[gln]e")
CHANGED = re.compile(  # words that change a number, LaTeX and code
    r"(?i)\b(?:than|at (?:least|most)|between|below|above|under|over|minus|negative|plus|times|twice|double|triple"
    rf"|squared|cubed|{FRACTION_WORD})\b|[\\^_]|\w\("
)
STATED = re.compile(  # one word with one number, with or without a sign, a denominator and a unit: (-$1,080.50), 3/4kg
    rf"[^\w.^/*+-]*([+-]?(?:{GROUPED}|{UNGROUPED})(?:/\d+)?)(?![\^*+/])\D*"
)


def stated(text):
    """The one number in a sentence, or None: 'It is 72 clips.' None for 'not 72', '72 or 73', '72 (of 100)'."""
    result = text.rpartition("=")[2].strip()
    if len(text) > LONGEST or DOUBTFUL.search(text) or CHANGED.search(result):
        return None
    result = re.sub(r"^([+-])\s+|\s?(/)\s?", r"\1\2", result)  # - 5 as -5, 3 / 4 as 3/4
    words = [word for word in result.split() if re.search(r"\d", word)]
    match = STATED.fullmatch(words[0]) if len(words) == 1 else None
    return exact_number(reading(match[1])) if match else None


# ---- logic puzzles: who is what, who came when ---------------------------------------------------------------------

ROLES = {
    "doubt": rf"{DOUBT}|may|might|could|\w+n['’]t|\?",
    "knight": "knights?|truth(?:[ -]?tellers?|ful)?",
    "knave": "knaves?|liars?|lies|lying",
}
NOBODY = rf"(?i)\b(?:{ROLES['knight']}|{ROLES['knave']})\W*\bnone\b"  # `Knaves: none`
PLACES = dict(zip("first second third fourth fifth sixth seventh".split(), range(1, 8)))
NUMBERING = {
    "ignored": "first to last|1st to last",
    "doubt": rf"{ROLES['doubt']}|last|after|behind|reversed?",
    "number": rf"\d{{1,9}}(?:st|nd|rd|th)?|{'|'.join(PLACES)}",
}


def words_that_matter(answer, names, choices):
    """The names and the given words in an answer, in their order: [(kind, word)]. Nothing if one of them is a doubt."""
    answer = re.sub(r"""\\[a-zA-Z]+|[\s*_`"“”{}()\[\]$]""", " ", answer[:10_000])  # markup of LaTeX, markdown and JSON
    choices = choices | {"name": "|".join(map(re.escape, names))}
    pattern = "|".join(rf"(?P<{kind}>(?<!\w)(?:{words})(?!\w))" for kind, words in choices.items())
    found = [(match.lastgroup, match[0]) for match in re.finditer(pattern, " ".join(answer.lower().split()))]
    return [] if any(kind == "doubt" for kind, _ in found) else found


def knights_equal(answer, problem):
    """Does an answer give each person one role: `Ada: knight, Ben: knave`, or by role `Knights: Ada. Knaves: Ben`?"""
    gold = dict(pair.split(": ") for pair in problem["answer"].lower().split(", "))
    words = words_that_matter(re.sub(NOBODY, "", answer), gold, ROLES)
    if words and words[0][0] != "name":
        words.reverse()  # `Knights: Ada. Knaves: Ben` backwards is `Ben knaves, Ada knights`: names before their role
    claims, waiting, last_role = set(), [], None  # waiting: names that wait for their role
    for kind, word in words:
        if kind == "name":
            waiting.append(word)
        elif not waiting and kind != last_role:
            return False  # Ada is a knight and a knave
        else:
            claims |= {(name, kind) for name in waiting}
            waiting, last_role = [], kind
    return claims == set(gold.items())


def order_equal(answer, problem):
    """Does an answer give every name once, in the right order? They may be numbered: `1. Ben 2. Ada`, `first Ben`."""
    gold = problem["answer"].lower().split(", ")
    words = words_that_matter(answer, gold, NUMBERING)
    names = [word for kind, word in words if kind == "name"]
    numbers = [PLACES.get(word) or int(word.rstrip("stndrh")) for kind, word in words if kind == "number"]
    return names == gold and numbers in ([], list(range(1, len(gold) + 1)))


# ---- countdown -----------------------------------------------------------------------------------------------------

ARITHMETIC = re.compile(r"[\d\s+\-*/(){}=]|\\(?:times|cdot|div|frac)")


def countdown_equal(answer, problem):
    """Does a calculation reach the target, with only + - * / and each of the given numbers at most once?"""
    text = tidy(answer)
    sides = [side for side in text.split("=") if side.strip() != str(problem["target"])]
    if len(sides) != 1 or ARITHMETIC.sub("", text) or re.search(r"\*\*|\d\s+\d", text):
        return False  # not one calculation, or with other signs
    right_value = number(sides[0]) == problem["target"]
    return right_value and Counter(map(int, re.findall(r"\d+", sides[0]))) <= Counter(problem["numbers"])


# ---- Nim -----------------------------------------------------------------------------------------------------------


def legal_moves(problem):
    """The legal moves: {"2 from B": the heaps after it, …}."""
    heaps = problem["heaps"]
    return {f"{n} from {name}": heaps | {name: size - n} for name, size in heaps.items() for n in range(1, size + 1)}


def nim_equal(answer, problem):
    """Is it the move that wins? Where none does, every legal move is right."""
    return answer in legal_moves(problem) and problem["answer"] in (answer, "any move")


def after_move(completion, problem):
    """The heaps after a move; and does it win? None where the game goes on. An illegal move loses."""
    heaps = legal_moves(problem).get(extract_answer(completion))
    return heaps, None if heaps and any(heaps.values()) else heaps is not None


def random_player(problems):
    """Random legal moves as completions; the same question always gets the same move."""
    moves = [random.Random(problem["question"]).choice(list(legal_moves(problem)) or [""]) for problem in problems]
    return [f"<answer>{move}</answer>" for move in moves]


def perfect_player(problems):
    """The moves that win as completions; where none does, a random one."""
    best = [f"<answer>{problem['answer']}</answer>" for problem in problems]
    return [other if "any move" in move else move for move, other in zip(best, random_player(problems))]


# ---- writing and dialogue ------------------------------------------------------------------------------------------


def writing_equal(answer, problem):
    """Does a story have all the words that it should have, and as many sentences? It may be nonsense."""
    counts = story_counts(answer, problem)
    return counts["words_used"] == counts["sentences"] == 1


def story_counts(text, problem):
    """What can be counted of a story: {name: number}. Beside each stands what it does not show."""
    words, asked = (re.findall(r"\w+(?:['’]\w+)*", x.lower()) for x in (text, problem["question"]))
    wanted, pairs = problem["answer"].split(), list(zip(words, words[1:]))
    threes = list(zip(words, words[1:], words[2:]))
    copied = difflib.SequenceMatcher(None, words, asked).find_longest_match().size
    return {
        "words_used": sum(word in words for word in wanted) / len(wanted),  # not whether they make sense there
        "sentences": len(re.findall(r"\w[^.!?]*[.!?]+", text)) == len(wanted),  # not whether they are good
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),  # different pairs of words: random words have 1 too
        "repeated_3": (len(threes) - len(set(threes))) / max(1, len(threes)),  # not the same thought in other words
        "compression": len(zlib.compress(text.encode())) / max(1, len(text.encode())),  # only for texts of equal length
        "copied": copied / max(1, len(words)),  # the longest part from the prompt; not from elsewhere
    }


def dialogue_equal(answer, problem):
    """Does an answer name the fact that was asked for, and none of the others that were told?"""
    told = {word for turn in problem["turns"][::2] for word in re.findall(r"(\w+)\.", turn["content"])}
    return told & set(re.findall(r"\w+", answer)) == {problem["answer"]}


# ---- programs, graded by tests in a sandbox ------------------------------------------------------------------------
# A program could change anything in its own process: even an `assert`, or the count of passed tests. So one sandbox
# runs the tests, and another the program. If a test calls a function of the program, the arguments go there through a
# pipe, and the result comes back through another. The program sees no test, no expected value and no verdict.

SECONDS = 4.0  # of wall-clock time, for all tests of one program
REPLY_BYTES = 1 << 20  # the longest result, as text
TMP_BYTES = 16 << 20  # the size of /tmp, the only place where a program can write
LIMITS = {  # for each process; NPROC counts all processes and threads of a sandbox
    "RLIMIT_AS": 512 << 20, "RLIMIT_NPROC": 8, "RLIMIT_FSIZE": TMP_BYTES // 4,
    "RLIMIT_NOFILE": 32, "RLIMIT_CORE": 0, "RLIMIT_CPU": 10,
}  # fmt: skip


def run_tests(code, problem):
    """Run a program's tests: (the share that pass of those with an assert, does it compile without a warning?)"""
    asserts = [any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(test))) for test in problem["tests"]]
    if not any(asserts):
        raise ValueError("no test has an assert")
    tests = list(zip(problem["tests"], asserts))
    # no environment: /proc/1/environ would show it; a new session: Ctrl-C does not reach the sandboxes
    start = functools.partial(subprocess.Popen, env={}, stderr=subprocess.DEVNULL, start_new_session=True)
    requests, replies = os.pipe(), os.pipe()  # each has a reading end [0] and a writing end [1]
    with tempfile.TemporaryFile() as task:
        send(task, (problem["prelude"] + code, problem["setup"], problem["functions"], tests))
        task.seek(0)
        try:
            entry = f"tests_process({requests[1]}, {replies[0]}, {REPLY_BYTES})"
            processes = [
                start(sandboxed(entry), stdin=task, stdout=subprocess.PIPE, pass_fds=(requests[1], replies[0])),
                start(sandboxed("program_process()"), stdin=requests[0], stdout=replies[1]),
            ]
        finally:
            for end in (*requests, *replies):
                os.close(end)
    deadline = threading.Timer(SECONDS, lambda: [process.kill() for process in processes])
    deadline.start()
    verdict = processes[0].stdout.read(1 + sum(asserts))  # one character for `it compiles`, then one for each test
    deadline.cancel()
    for process in processes:
        process.kill()  # this ends all processes in its sandbox
        process.communicate()
    return verdict[1:].count(b"1") / sum(asserts), verdict[:1] == b"1"


@functools.cache
def sandbox_problem():
    """Why programs cannot run on this machine, in one sentence, or None."""
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed: sudo apt-get install bubblewrap"
    trial = subprocess.run(sandboxed("pass"), env={}, capture_output=True, text=True, check=False)
    return trial.stderr.strip().rpartition("\n")[2] if trial.returncode else None


def sandboxed(entry):
    """The command that runs one Python statement in a sandbox: no network, no environment, only Python and /usr.

    An ordinary user's sandbox is a user namespace. Root's changes to a new user id without rights instead, because a
    limit on processes has no effect on root.
    """
    uid = None if os.geteuid() else 2**30 + int.from_bytes(os.urandom(3), "big")
    options = "--unshare-all --unshare-user --disable-userns"
    if uid:
        options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
        options += " --cap-add CAP_SETUID --cap-add CAP_SETGID"
    command = [shutil.which("bwrap"), "--die-with-parent", "--new-session", "--cap-drop", "ALL", *options.split()]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in filter(os.path.exists, ("/lib", "/lib64")):
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    python = sys.base_prefix  # --dir makes new, empty parent folders for it, which the sandbox's user may enter
    command += ["--dir", os.path.dirname(python), "--ro-bind", python, python, "--proc", "/proc", "--dev", "/dev"]
    command += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    command += [f"{python}/bin/python3.{sys.version_info.minor}", "-I", "-S", "-c"]
    return [*command, f"{INSIDE}\nconfine({uid}, {LIMITS})\n{entry}"]


# The source text of this function and the next six runs in the sandboxes (INSIDE).
def tests_process(requests, replies, limit):
    """Run the tests. Write 1 or 0 for `it compiles`, then 1 or 0 after each test that has an assert."""
    verdict, requests, replies = os.dup(1), open(requests, "wb"), open(replies, "rb")
    os.dup2(2, 1)  # what the tests print is no verdict
    source, setup, functions, tests = receive(sys.stdin.buffer)

    def call(name, /, *args, **kwargs):
        send(requests, (name, args, kwargs))
        returned, result = receive(replies, limit)
        if not returned:
            raise RuntimeError(f"{name} raised an exception")
        return result

    send(requests, source)
    os.write(verdict, b"1" if receive(replies, limit) is True else b"0")
    namespace = {}
    exec(setup, namespace)
    namespace |= {name: functools.partial(call, name) for name in functions}
    for test, has_assert in tests:
        try:
            exec(test, namespace)
            passed = b"1"
        except Exception:
            passed = b"0"
        if has_assert:
            os.write(verdict, passed)


def program_process():
    """Reply whether the program compiles without a warning, run it, and then answer calls of its functions."""
    requests, replies = open(os.dup(0), "rb"), open(os.dup(1), "wb")
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    os.dup2(0, 1)  # what the program prints is no reply
    source = receive(requests)
    try:
        warnings.simplefilter("error")
        compile(source, "<program>", "exec", dont_inherit=True)
        send(replies, True)
    except Exception:
        send(replies, False)
    warnings.simplefilter("ignore")
    module = sys.modules["program"] = type(sys)("program")
    exec(compile(source, "<program>", "exec", dont_inherit=True), vars(module))
    while True:
        name, args, kwargs = receive(requests)
        try:
            send(replies, (True, getattr(module, name)(*args, **kwargs)))
        except BaseException:  # sys.exit() too
            send(replies, (False, None))


def send(pipe, value):
    """Write one value as one line of JSON. Where nobody reads any more, this process ends."""
    line = json.dumps(encoded(value)).encode() + b"\n"
    try:
        pipe.write(line)
        pipe.flush()
    except BrokenPipeError:
        os._exit(0)


def receive(pipe, limit=-1):
    """Read the next value. At the end of the pipe, or where a line is longer than the limit, this process ends."""
    line = pipe.readline(limit)
    if not line.endswith(b"\n"):
        os._exit(0)
    return decoded(json.loads(line))


def encoded(value):
    """A value for JSON. What JSON does not know is a list that begins with the name of its type: ["set", 1, 2]."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    for kind in (dict, list, tuple, set, frozenset, bytes):
        if isinstance(value, kind):
            return [kind.__name__, *map(encoded, value.items() if kind is dict else value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def decoded(value):
    """The value that `encoded` wrote for JSON, in plain built-in types: a Counter has become a dict."""
    if not isinstance(value, list):
        return value
    name, *items = map(decoded, value)
    kinds = {kind.__name__: kind for kind in (dict, list, tuple, set, frozenset, bytes)}
    return complex(*items) if name == "complex" else kinds[name](items)


def confine(uid, limits):
    """Become the user `uid`, for good, if one is given; then set the limits."""
    import resource

    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


INSIDE = "import functools, json, os, sys, warnings\n" + "".join(
    map(inspect.getsource, (tests_process, program_process, send, receive, encoded, decoded, confine))
)


# ---- is it right? --------------------------------------------------------------------------------------------------


def right(answer, problem):
    """Is an answer right, by the rules of the kind of its problem?"""
    if answer is None:
        return False
    kind = problem.get("kind", "math")
    if kind == "math":
        return math_equal(answer, problem["answer"].rpartition("####")[2].strip())
    checkers = {"knights": knights_equal, "order": order_equal, "countdown": countdown_equal, "nim": nim_equal}
    checkers |= {"writing": writing_equal, "dialogue": dialogue_equal}
    return checkers[kind](answer, problem)


def grade(completion, gold):
    """Is a completion's answer right? The gold is a plain answer or a GSM8K answer field: what follows `####`."""
    return right(extract_answer(completion), {"answer": gold})


def majority(completions):
    """The answer that most completions give, the earliest of equals, or None: the vote of maj@k (self-consistency)."""
    votes = Counter(filter(None, map(extract_answer, completions)))
    return max(votes, key=lambda one: sum(votes[other] for other in votes if math_equal(other, one)), default=None)


# ---- steps ---------------------------------------------------------------------------------------------------------

STEP = re.compile(r"[^\n]*?(?:[.!?](?=\s)|\n|$)")  # a line, or a sentence of it
CHARS = r"[\d.,+\-−*/×÷()$% ]"
CALCULATION = re.compile(  # groups: left of the =, the number right of it, its decimals. `10 + 7 = 12 + 5` is none
    rf"(?<!{CHARS})({CHARS}*+)(?==[\s$]*(-?\d[\d,]{{0,20}}+(?:\.(\d{{1,20}}+))?+)(?!\s*[-+−*/×÷]\s*[\d($]|\s*%|\d))"
)


def step_rewards(completion, problem):
    """The reward of each reasoning step that calculates: [(end, reward)] (process supervision, DeepSeekMath §4.1.3).

    `end` is the position of the character after the step. A step earns 0 if a calculation in it is wrong; else 1
    if one of its results is also in the worked solution; else 0.5.
    """
    known = {result for line in problem.get("solution", "").split("\n") for result, _ in calculations(line)}
    start = max(0, completion.find("<reasoning>"))
    end = start + len(completion[start:].partition("</reasoning>")[0])
    steps = []
    for match in itertools.islice(STEP.finditer(completion, start, end), 100):  # 100 are enough, and quick for any text
        if found := list(calculations(match[0])):
            value = 1.0 if any(result in known for result, _ in found) else 0.5
            steps.append((match.end(), value if all(correct for _, correct in found) else 0.0))
    return steps


def calculations(step):
    """Each `48 / 2 = 24` in a step: (its result, is it correct?). A result may be rounded to the decimals it shows."""
    step = re.sub(r"^\s*[-*+] ", "", step)  # the bullet of a list is no minus
    for text in re.findall(r"<<([^<>]*)>>", step)[:9] or [step]:
        for left, written, decimals in CALCULATION.findall(text)[:9]:
            calculated = re.search(r"\d[\s%)]*[-+−*/×÷][\s$(]*\d", left)
            left = re.sub(r"(?<![\d.,])([\d.,]++|\([^()]*+\))\s*%", r"(\1/100)", left)
            value = number(left) if calculated else None
            if value is not None:
                result = Fraction(written.replace(",", ""))
                rounding = Fraction(1, 2 * 10 ** len(decimals)) if decimals else 0  # 3.33 may be 0.005 away
                yield result, abs(value - result) <= rounding


# ---- the rewards ---------------------------------------------------------------------------------------------------
# One function for each reward: a number for a completion and its problem, or None where it does not apply.

REWARDS = {}  # name: function of a completion and its problem
GROUP_REWARDS = {}  # name: function of all completions of a problem, and the problem


def reward(function):
    """Put a reward into the table under its own name. Its weight, if any, is the constant WEIGHT_ + NAME in main.py."""
    REWARDS[function.__name__] = function
    return function


def group_reward(function):
    """The same for a reward that compares: it sees all completions of a problem, and returns a number for each."""
    GROUP_REWARDS[function.__name__] = function
    return function


def rewards(completion, problem):
    """The rewards in the table that apply to a completion's problem, unweighted: {name: number}."""
    values = {name: function(completion, problem) for name, function in REWARDS.items()}
    if problem.get("kind") == "writing":
        values |= story_counts(extract_answer(completion) or completion, problem)
    return {name: float(value) for name, value in values.items() if value is not None}


def score(completions, problems, threads):
    """The rewards of many completions: ({name: one number per completion}, [the exceptions that rules raised]).
    If a rule raises one, its completion counts as wrong. The rules run in threads, because programs are slow."""

    def score_one(completion, problem):
        try:
            values = rewards(completion, problem)
            if not all(map(math.isfinite, values.values())):
                raise ValueError(f"a reward is no finite number: {values}")
            return values, None
        except Exception as error:  # must not end the training, and the metrics need these two of every completion
            return {"correctness": 0.0, "strict_format": 0.0}, f"{error!r} (question: {problem.get('question')})"

    with ThreadPoolExecutor(threads) as pool:
        scored = list(pool.map(score_one, completions, problems))
    names = dict.fromkeys(name for values, _ in scored for name in values)
    by_name = {name: [values.get(name, 0.0) for values, _ in scored] for name in names}  # 0 where it does not apply
    return by_name, [failure for _, failure in scored if failure]


def compare(groups, problems):
    """The rewards of whole groups, all completions of a problem: ({name: [a number per completion, for each group]},
    [the exceptions that rules raised]). A group in which a rule raises one gets 0."""
    by_name, failures = {name: [] for name in GROUP_REWARDS}, []
    for name, function in GROUP_REWARDS.items():
        for completions, problem in zip(groups, problems):
            try:
                values = list(map(float, function(completions, problem)))
                if len(values) != len(completions) or not all(map(math.isfinite, values)):
                    raise ValueError(f"{name} must be {len(completions)} finite numbers, not {values}")
            except Exception as error:  # must not end the training
                values = [0.0] * len(completions)
                failures.append(f"{error!r} (question: {problem.get('question')})")
            by_name[name].append(values)
    return by_name, failures


@reward
def correctness(completion, problem):
    """1 if the answer is right; for a program, if it passes all tests."""
    if problem.get("kind") == "program":
        return test_results(completion, json.dumps(problem))[0] == 1
    return right(extract_answer(completion), problem)


@reward
def lenient(completion, problem):
    """1 if a person would find the right answer, in the asked form or not. It has no weight: it is for evaluations."""
    if correctness(completion, problem):
        return True
    text, kind = extract_answer(completion) or boxed(completion) or completion, problem.get("kind", "math")
    if kind != "math":  # the last line, or a whole story; a program is looked for in all of the text already
        last = text if kind == "writing" else text.strip().rpartition("\n")[2]
        return kind != "program" and right(last, problem)
    numbers = re.findall(r"(?:(?<![\w.)])-)?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?", text.rpartition("####")[2])
    return bool(numbers) and right(numbers[-1], problem)


@reward
def integer(completion, problem):
    """1 if the answer is a whole number, right or wrong, where the right answer is one too (only mathematics)."""
    if problem.get("kind", "math") == "math":
        numbers = number(extract_answer(completion) or ""), number(problem["answer"].rpartition("####")[2])
        return all(value is not None and value.denominator == 1 for value in numbers)


@reward
def tests(completion, problem):
    """1 if a program passes all of its tests; a part of 1 for a part of them (only programs)."""
    if problem.get("kind") == "program":
        return test_results(completion, json.dumps(problem))[0]


@reward
def compiles(completion, problem):
    """1 if a program compiles without an error and without a warning (only programs)."""
    if problem.get("kind") == "program":
        return test_results(completion, json.dumps(problem))[1]


@reward
def strict_format(completion, problem):
    """1 for exactly the format of the prompt: each tag once, in order, on its own line, and no part empty."""
    if tag_count(completion, problem) < 1:
        return False
    match = re.fullmatch(r"(?s)<reasoning>\n(.*?)\n</reasoning>\n<answer>\n(.*?)\n</answer>", completion.strip())
    return match is not None and all(part.strip() for part in match.groups())


@reward
def soft_format(completion, problem):
    """1 if the completion begins with closed reasoning and then a closed answer. Anything may follow."""
    return bool(re.match(r"\s*<reasoning>(?>.*?</reasoning>)\s*<answer>.*?</answer>", completion, re.DOTALL))


@reward
def tag_count(completion, problem):
    """1 if each of the four tags stands there exactly once; a part of 1 for a part of them."""
    return sum(completion.count(tag) == 1 for tag in TAGS) / len(TAGS)


@reward
def safety(completion, problem):
    """1 if nothing from a short list of threats, insults and dangers is said. It is no more than a list."""
    return not UNSAFE.search(completion)


UNSAFE = re.compile(
    r"(?i)\b(?:kill|hurt|shoot|poison) (?:your|him|her|them)sel(?:f|ves)\b|\b(?:build|make) an? (?:\w+ )?bomb\b"
    r"|\bi hate you\b|\byou(?: are|'re) (?:worthless|stupid|an idiot)\b|\bshut up\b"
)
REFLECTION = re.compile(r"(?i)\b(?:wait|hmm|mistake|on second thought|(?:let me (?:re-?)?|double[- ]|re-?)check)\b")


@functools.lru_cache(maxsize=256)  # several rewards need the results of the same program
def test_results(completion, problem):  # the problem as JSON, because the cache takes only what has a hash
    """The share of tests that a completion's program passes, and whether it compiles without a warning."""
    # the text in the answer tag, or all text outside the reasoning if there is no tag; without a code fence
    text = outside_reasoning(completion).rpartition("<answer>")[2].partition("</answer>")[0]
    fenced = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    source = (fenced[1] if fenced else text).strip("\n") + "\n"
    return run_tests(source, json.loads(problem)) if source.strip() else (0.0, False)


def reflection(completion):
    """How often a completion doubts itself: wait, hmm, mistake, let me check. A metric, not a reward."""
    return len(REFLECTION.findall(completion))


def num_steps(completion):
    """How many steps of a completion's reasoning calculate something. A metric, not a reward."""
    return len(step_rewards(completion, {}))


def approach(completion):
    """How a completion gets its answer: "guessed" (no calculation), "worked" (one), "checked" (one, and doubt too)."""
    if not num_steps(completion):
        return "guessed"
    return "checked" if reflection(completion) else "worked"


def overlong(length, limit, buffer):
    """DAPO's soft penalty of length (arXiv 2503.14476, eq. 13): 0 up to limit - buffer, -1 from the limit on."""
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer))
