"""The rules: what a completion answers, whether that is right, and every reward.

A reward is a function of a completion and its problem, plain strings both, and says nothing of its weight: the weights
are constants in main.py. Whatever a model writes, the rules give a number; they never raise.

    extract_answer(completion)       the answer that a completion gives, or None
    grade(completion, gold)          is it right?
    math_equal(prediction, gold)     do two answers mean the same?
    right(answer, problem)           the same by the kind of the problem: mathematics or a puzzle
    run_tests(code, problem)         what a program passes of its tests, in a sandbox
    step_rewards(completion, ...)    the steps of the reasoning, each judged by rule
    rewards(completion, problem)     {name: number from 0 to 1}
    majority(completions)            the answer that most of them give
"""

import ast
import cmath
import functools
import hashlib
import inspect
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unicodedata
from fractions import Fraction
from typing import NamedTuple

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
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : start + brace.start()]
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


# ---- what does an answer say? --------------------------------------------------------------------------------------
# An answer is read by recursive descent and evaluated as it is read, its variables being random numbers: expressions
# that agree at all points are the same. Nothing of it is ever run as code, and every length, depth and number
# has a bound; what is no mathematics, or is beyond a bound, is compared as text.

LONGEST = 500  # characters of an answer that is read as mathematics
LISTED = 64  # values in a list
BITS = 20_000  # of an exact number
POINTS = 4  # at which expressions with variables are compared

SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/", "’": "'",
    "√": "\\sqrt ", "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∓": "\\mp ",
    "∪": "\\cup ", "∈": "\\in ", "°": " degrees ", "≈": "\\approx ", "∅": "\\emptyset ", "θ": "\\theta ",
    "º": " degrees ", "`": "", "\u200b": "", "€": "", "£": "", "¥": "", "₹": "",
}  # fmt: skip
SIGNS |= {sign: "\\frac{" + unicodedata.normalize("NFKC", sign).replace("⁄", "}{") + "}" for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}


def mixed(match):
    """A mixed number as a sum, 1\\frac12 and 1 1/2 as (1+1/2); 3\\frac52 stays a product."""
    whole, top, bottom = (part for part in match.groups() if part)
    return f"({whole}+{top}/{bottom})" if int(top) < int(bottom) else match[0]


DENIED = r"(?i:\b(?:not|or|wrong|incorrect|thousand|million|billion|negative|squared)\b)"
TEXT = r"text(?:rm|it|bf|normal|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname|boldsymbol|emph|underline|fbox"
MATRIX = r"\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"[₀-₉]+", lambda run: "_{" + unicodedata.normalize("NFKC", run[0]) + "}"),
    (r"[⁰¹²³⁴-⁹⁻]+", lambda run: "^{" + unicodedata.normalize("NFKC", run[0]).replace("−", "-") + "}"),
    (f"[{''.join(SIGNS)}]", lambda sign: SIGNS[sign[0]]),
    (r"(?<![\w)*])(\*\*|__)(?=[^\s*])([^*]+)\1(?![\w(])", r"\2"),  # bold
    (r"\\\\\s*\[[\d.]+ ?[a-z]{2}\]|\\cr(?![a-z])", r"\\\\ "),  # the rows of a matrix
    (r"<\|\w+\|>|</?(?:b|i|em|strong)>|\\\\$", ""),
    (r"<<[^<>]*>>|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])|\\!\s*", ""),  # <<3*4=12>> is GSM8K's
    (r"(?<=\d)(?:\{,\}|\\,|[_'])(?=\d{3})", ","),
    (r"(?<!\\)\\[,;: ()\[\]$]|\\q?quad(?![a-zA-Z])|~|\$", " "),
    (rf"\\(?:{TEXT})\*?\s*\{{([^{{}}]*)\}}", r" \1 "),
    (rf"\\(?:{TEXT})\*?(?=\s*\{{)", " "),  # around braces
    (r"\\(?:large|Large|bf|rm|it|Rightarrow|implies)(?![a-zA-Z])|\\(?:text)?color\s*\{[a-z]*\}", " "),
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degrees?(?![a-z])", " degrees "),
    (r"\\begin" + MATRIX, r"\\matrix "),
    (r"\\end" + MATRIX, r"\\endmatrix "),
    (r"(?i)^\W*(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?:\s+is|\s*[:=])+\s*", ""),
    (r"(?i)(?<=\w)[_ ]*[({]*\s*base\s*\{?(\d+)[\s)}]*$", r"_{\1}"),  # 101 (base 2)
    (r"^\((\d+)\)(?=_)", r"\1"),
    (r"(?i)(\d)(?::00)?\s*([ap])\.?\s?m\b\.?", r"\1 \2m"),
    (rf"^(?!.*{DENIED})[A-Za-z][A-Za-z ]*: ", ""),  # Total: 72
    (rf" \((?!{DENIED})[A-Za-z -]{{3,}}\)$", ""),  # 72 (seventy-two)
    (r"(?i)^(?:minus|negative) (?=[\d.])", "-"),
    (r"(?i)^\s*(?:approximately|about|exactly|\\approx|\\sim|US|USD|EUR|GBP)\s*(?=[-+\d.\\])", ""),
    (r"(?<![\w.^/{}])(\d{1,9})\s*\\frac\s*(?:\{\s*(\d{1,9})\s*\}\s*\{\s*(\d{1,9})\s*\}|(\d)(\d))", mixed),
    (r"(?<![\w.^/{}])(\d{1,9}) +(\d{1,9})/(\d{1,9})(?![\d.])", mixed),
)]  # fmt: skip
BEFORE_NFKC = 3  # the first of them are of signs that it would spoil: 10² would be 102


def tidy(text):
    """One notation for what can be written in several ways, without the markup that means nothing."""
    text = last_boxed(text) or text
    for pattern, new in REWRITES[:BEFORE_NFKC]:
        text = pattern.sub(new, text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in REWRITES[BEFORE_NFKC:]:
        text = pattern.sub(new, text)
    return " ".join(text.split()).lstrip(' ,;:#*_"“”').rstrip(' .,;:*_"“”')


PLAIN = r"\d+\.\d*\\overline\{\d+\}|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
GROUPED = r"[1-9]\d{0,2}(?:(?:,\d{3})+(?![\d,])|(?: \d{3})+(?![ \d]))(?:\.\d+)?"  # 1,080 and 1 080
TOKEN = r"\s*(?:(?P<number>{})|(?P<command>\\(?:[A-Za-z]+|.))|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[<>]=|\S))"
SPELLINGS = {
    "**": "^", "<=": "\\le", ">=": "\\ge", "\\leq": "\\le", "\\geq": "\\ge", "\\lt": "<", "\\gt": ">", ":": "/",
    "\\cdot": "*", "\\times": "*", "\\div": "/", "\\%": "%", "\\percent": "%", "\\pct": "%",
    "\\lbrace": "\\{", "\\rbrace": "\\}",
    "\\langle": "(", "\\rangle": ")", "\\lvert": "|", "\\rvert": "|", "\\varnothing": "\\emptyset", ";": ",",
    "\\and": ",", "\\or": ",", "\\cup": ",", "\\lor": ",", "\\bigcup": ",", "\\leqslant": "\\le", "\\geqslant": "\\ge",
}  # fmt: skip
CONSTANTS = {"\\pi": math.pi, "\\infty": math.inf, "\\infinity": math.inf, "\\inf": math.inf, "e": math.e, "i": 1j}
FUNCTIONS = {
    "\\sin": cmath.sin, "\\cos": cmath.cos, "\\tan": cmath.tan, "\\cot": lambda z: 1 / cmath.tan(z),
    "\\sec": lambda z: 1 / cmath.cos(z), "\\csc": lambda z: 1 / cmath.sin(z), "\\arcsin": cmath.asin,
    "\\arccos": cmath.acos, "\\arctan": cmath.atan, "\\sinh": cmath.sinh, "\\cosh": cmath.cosh, "\\tanh": cmath.tanh,
    "\\exp": cmath.exp, "\\ln": cmath.log, "\\log": cmath.log10,
}  # fmt: skip
BARE = {"sin", "cos", "tan", "cot", "ln", "log", "exp", "sqrt", "pi", "inf", "infinity", "and", "or", "percent", "pct"}
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = {
    "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "ft": "foot", "feet": "foot", "in": "inch",
    "inches": "inch", "yd": "yard", "kg": "kilogram", "mg": "milligram", "ml": "milliliter", "lb": "pound",
    "lbs": "pound", "oz": "ounce", "mph": "mile/hour", "hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute",
    "sec": "second", "secs": "second", "am": "am", "pm": "pm", "sq": "square", "cubed": "cubic", "squared": "square",
    "USD": "dollar", "day": "day", "days": "day", "pts": "point", "mi": "mile", "men": "men", "per": "/", "gm": "gram",
    "m": "meter", "EUR": "euro", "kph": "kilometer/hour", "h": "hour",
}  # fmt: skip
DEFINED = re.compile(  # what an equation may define: x, x_1, f(x), AB, Total; (x,y); |AB|, A/B
    r"(?:[A-Za-z]'?|[A-Z]{2,4}|[A-Za-z]{4,}|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z,]+\))?"
    r"|\([A-Za-z](?:,[A-Za-z])+\)|[A-Z/|]+"
)


WORD = re.compile(r"\s*[A-Za-z]{4,}|\s+(?:m|(?=[a-z]*[aeiou])[a-z]{3})")  # other letters are variables: 2xy


class Undecided(ValueError):
    """The text is not read as mathematics."""


class Group(NamedTuple):
    """Several values: a list or set, a tuple or interval by its brackets, a matrix of rows that are matrices too."""

    kind: str  # "list", "set", "()", "[]", "(]", "[)", "matrix"
    items: list


class Equation(NamedTuple):
    """x = 5, by name and value, and any equation by what its sides differ in."""

    name: str  # of what is defined, or ""
    value: object
    difference: object


class Reading(NamedTuple):
    """What a text says as mathematics."""

    values: list  # at each of the points: a number, a Group or an Equation
    units: set
    percent: bool


def tokenize(text, pattern):
    """A text as pairs (kind, text): a number, letter (variable), word (unit), command, sign, and in the end the end."""
    tokens = []
    for match in re.finditer(pattern, text):
        kind, token = match.lastgroup, match[match.lastgroup]
        if kind == "word" and token.lower() in BARE:
            kind, token = "command", "\\" + token.lower()
        elif kind == "word" and token.isupper() and token not in UNITS:
            kind = "letter"  # ABC is a name
        elif kind == "word" and token not in UNITS and not WORD.fullmatch(match[0]):
            tokens += [("letter", letter) for letter in token]
            continue
        tokens.append((kind, SPELLINGS.get(token, token)))
    return [*tokens, ("end", "")]


def bounded(value):
    """A number; Undecided if it is not one, or has grown beyond its bound."""
    if isinstance(value, Group | Equation) or value != value:
        raise Undecided
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > BITS:
            raise Undecided
        return value
    return value.real if isinstance(value, complex) and value.imag == 0 else value


def whole(value, limit):
    """A whole number from 0 to a limit."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= limit:
        raise Undecided
    return int(value)


def power(base, exponent):
    """Exact where the exponent is whole, but bounded before it is computed: 9**9**9."""
    base, exponent = bounded(base), bounded(exponent)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > BITS:
            raise Undecided
        return base ** int(exponent)
    if exponent in (math.inf, -math.inf):
        raise Undecided
    return bounded(complex(base) ** complex(exponent))


def root(value, index):
    """The real root of a negative number where the index is odd, the principal one otherwise."""
    if index % 2 == 1 and not isinstance(value, complex) and value < 0:
        return -root(-value, index)
    return power(value, 1 / complex(index))


GREEK = {f"\\{name}" for name in "alpha beta gamma delta epsilon theta lambda mu phi omega rho sigma tau".split()}
OPENING = {
    "(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",), "|": ("|",), "\\lfloor": ("\\rfloor",),
    "\\lceil": ("\\rceil",),
}  # fmt: skip
CLOSING = {")", "]", "}", "\\}"}
FACTORS = {*FUNCTIONS, *GREEK, "\\frac", "\\sqrt", "\\binom", "\\pi"}


class Reader:
    """Recursive descent through the tokens of an answer, evaluated at a point; Undecided where it cannot be read."""

    def __init__(self, tokens, point):
        self.tokens, self.point, self.at, self.bars, self.letters = tokens, point, 0, 0, 0
        self.units, self.percent = set(), False

    def take(self, *texts):
        """The next token, if it is one of these."""
        if self.tokens[self.at][1] in texts:
            self.at += 1
            return self.tokens[self.at - 1][1]

    def demand(self, *texts):
        token = self.take(*texts)
        if token is None:
            raise Undecided
        return token

    def answer(self):
        value = self.listing()
        if self.tokens[self.at][0] != "end":
            raise Undecided
        return value

    def listing(self):
        """One value is itself, several with commas between them are a list."""
        items = [self.relation()]
        while self.take(","):
            self.take(",")  # , and
            items.append(self.relation())
        if len(items) > LISTED:
            raise Undecided
        return items[0] if len(items) == 1 else Group("list", items)

    def relation(self):
        """A value, an equation, or an inequality as the interval that it describes."""
        sides, names, signs = [], [], []
        while not signs or signs[-1]:
            start, letters = self.at, self.letters
            sides.append(self.sum())
            written = "".join(text for _, text in self.tokens[start : self.at])
            names.append(written if self.letters > letters else "")  # of a side with variables
            signs.append(self.take("=", "<", ">", "\\le", "\\ge", "\\in", "\\approx"))
        if "\\approx" in signs[1:] or "\\approx" in signs and not DEFINED.fullmatch(names[0]):
            cut = signs.index("\\approx") + 1  # an approximation of what was said before it
            sides, names, signs = sides[:cut], names[:cut], [*signs[: cut - 1], None]
        if set(signs) & {"<", ">", "\\le", "\\ge"}:
            return interval(sides, names, signs[:-1])
        if len(sides) == 1 or not any(names):  # 3 + 4 = 7
            return sides[-1]
        if not names[0] and DEFINED.fullmatch(names[-1]):  # 5 = x
            names, sides = names[::-1], sides[::-1]
        numbers = not any(isinstance(side, Group) for side in sides)
        difference = bounded(sides[0]) - bounded(sides[-1]) if numbers else math.nan
        return Equation(names[0] if DEFINED.fullmatch(names[0]) else "", sides[-1], difference)

    def sum(self):
        value = self.product()
        while sign := self.take("+", "-"):
            right = bounded(self.product())
            value = bounded(bounded(value) + (right if sign == "+" else -right))
        return value

    def product(self):
        value = self.signed()
        while True:
            kind, text = self.tokens[self.at]
            if self.take("*"):
                value = bounded(bounded(value) * bounded(self.signed()))
            elif kind == "word" or text == "/" and self.tokens[self.at + 1][0] in ("word", self.units and "letter"):
                value = bounded(value) * self.unit()
            elif self.take("/"):
                value = bounded(value) / bounded(self.signed())
            elif self.take("%"):
                self.percent = True
            elif kind == "letter" or text in OPENING and (text != "|" or not self.bars) or text in FACTORS:
                value = bounded(bounded(value) * bounded(self.raised()))
            else:
                return value

    def unit(self):
        """Step over a unit and remember it; `thousand` and its like multiply."""
        self.take("/")
        word = self.tokens[self.at][1]
        self.at += 1
        if word in ("squared", "cubed") and not self.units or word.endswith("ths"):
            raise Undecided  # 72 hundredths
        if word.lower() in MULTIPLES:
            return MULTIPLES[word.lower()]
        self.units |= set(UNITS.get(word, word.lower().removesuffix("s")).split("/"))
        if self.take("^"):
            self.units.add({2: "square", 3: "cubic"}.get(self.group()))
        self.units.discard("")  # of per
        return 1

    def signed(self):
        sign = self.take("+", "-")
        if sign is None:
            return self.raised()
        value = bounded(self.signed())
        return value if sign == "+" else -value

    def raised(self):
        base = self.atom()
        while self.take("!"):
            base = bounded(Fraction(math.factorial(whole(base, 2500))))
        return power(base, self.signed()) if self.take("^") else base

    def atom(self):
        kind, text = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            return self.number(text)
        if text in CONSTANTS:
            return CONSTANTS[text]
        if kind in ("letter", "word") or text in GREEK:
            if kind == self.tokens[self.at][0] == "word":
                raise Undecided  # prose
            return self.variable(text)
        if text in OPENING:
            return self.bracket(text)
        if text in FUNCTIONS:
            return self.function(text)
        if text == "\\frac":
            top = bounded(self.group())
            return bounded(top / bounded(self.group()))
        if text == "\\binom":
            n = whole(self.group(), 1000)
            return Fraction(math.comb(n, whole(self.group(), 1000)))
        if text == "\\sqrt":
            index = whole(self.bracket("["), 100) if self.take("[") else 2
            return root(bounded(self.group(whole_number=True)), index)
        if text == "\\matrix":
            return self.matrix()
        if text == "\\emptyset":
            return Group("list", [])
        raise Undecided

    def number(self, text):
        """A number as it is written, exactly: 1,080 and .5 and 0.\\overline{3} and 6e3 and 101_2."""
        text, _, repeated = text.replace(",", "").replace(" ", "").partition("\\overline{")
        if len(text + repeated) > 400 or abs(int(text.lower().partition("e")[2] or 0)) > 300:
            raise Undecided
        value = Fraction(text.removesuffix(".") or "0")
        if repeated := repeated.removesuffix("}"):
            value += Fraction(int(repeated), 10 ** len(text.partition(".")[2]) * (10 ** len(repeated) - 1))
        if self.take("_"):
            value = Fraction(int(text, whole(self.group(), 36)))
        return bounded(value)

    def variable(self, text):
        """A random number that depends on the name, with its subscript, and the point: over the points from 0.1 to 30."""
        if self.take("_"):
            start = self.at
            self.group()
            text += "".join(text for _, text in self.tokens[start : self.at]).strip("{}")
        self.letters += 1
        digest = hashlib.blake2b(f"{text} {self.point}".encode(errors="replace"), digest_size=6).digest()
        return 10 ** (2.5 * (self.point + int.from_bytes(digest) / 2**48) / POINTS - 1)

    def group(self, whole_number=False):
        """What a command takes: {…}, or the next digit or letter alone: \\frac12."""
        kind, text = self.tokens[self.at]
        if kind == "number" and text.isdigit() and not whole_number:
            self.tokens[self.at : self.at + 1] = [("number", digit) for digit in text]
        return self.signed() if text == "-" else self.atom()

    def bracket(self, opening):
        start = self.at
        self.bars += opening == "|"
        value = Group("list", []) if self.tokens[self.at][1] in CLOSING else self.listing()
        closing = self.demand(*OPENING[opening])
        self.bars -= opening == "|"
        if opening in ("(", "[") and any(re.search(r"\d[, ]\d", text) for _, text in self.tokens[start : self.at]):
            raise Undecided  # (12,102) is a pair
        if opening in ("|", "\\lfloor", "\\lceil"):
            value = bounded(value)
            if opening == "|":
                return abs(value)
            return Fraction(math.floor(value) if opening == "\\lfloor" else math.ceil(value))
        if opening in ("(", "[", "\\{") and isinstance(value, Group) and value.kind == "list":
            return Group("set" if opening == "\\{" else opening + closing, value.items)
        return value

    def function(self, name):
        """\\sin x, \\sin^2 x, \\log_2 x, with or without brackets."""
        base = self.group() if self.take("_") else None
        exponent = self.group() if self.take("^") else Fraction(1)
        bracketed = self.tokens[self.at][1] in ("(", "{")
        argument = bounded(self.signed())
        while not bracketed and self.tokens[self.at][0] == "letter":  # \\sin 2x
            argument = bounded(argument * self.raised())
        value = FUNCTIONS[name](argument)
        if base is not None:
            value = cmath.log(argument) / cmath.log(bounded(base))
        return power(bounded(value), exponent)

    def matrix(self):
        rows = [[self.relation()]]
        while sign := self.take("&", "\\\\"):
            if self.tokens[self.at][1] == "\\endmatrix":
                break
            if sign == "\\\\":
                rows.append([])
            rows[-1].append(self.relation())
        self.demand("\\endmatrix")
        return Group("matrix", [Group("matrix", row) for row in rows])


def interval(sides, names, signs):
    """x > 5 as (5, ∞), 1 < x ≤ 2 as (1, 2]."""
    if not {"<", "\\le"} & set(signs):
        flipped = {">": "<", "\\ge": "\\le"}
        sides, names, signs = sides[::-1], names[::-1], [flipped.get(sign) for sign in signs[::-1]]
    unknown = next((at for at, name in enumerate(names) if DEFINED.fullmatch(name)), None)
    if not set(signs) <= {"<", "\\le"} or unknown is None or any(names[:unknown] + names[unknown + 1 :]):
        raise Undecided
    opening = "[" if unknown and signs[0] == "\\le" else "("
    closing = "]" if unknown < len(signs) and signs[-1] == "\\le" else ")"
    return Group(opening + closing, [[-math.inf, *sides][: unknown + 1][-1], [*sides, math.inf][unknown + 1]])


UNITS_IN_WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
TENS_IN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: n for n, word in enumerate(f"{UNITS_IN_WORDS} seventeen eighteen nineteen".split())}
WORDS |= {word: 10 * n for n, word in enumerate(TENS_IN_WORDS.split(), 2)}


def spelled(text):
    """The number that a text begins with in English words, or None: seventy-two clips."""
    total = part = 0
    words = re.findall("[a-z]+", text.lower())
    if not words or words[0] not in WORDS or re.search(r"\d|half|third|quarter|ths?\b|point|minus", text):
        return None
    spoken = [word in WORDS or word in MULTIPLES or word == "and" for word in words]
    end = spoken.index(False) if False in spoken else len(words)
    for word in words[:end]:
        if word in WORDS and part % 100 and (part % 10 or part % 100 < 20 or WORDS[word] > 9):
            return None  # five six
        if word == "hundred":
            part *= 100
        elif word in MULTIPLES:
            total, part = total + part * MULTIPLES[word], 0
        else:
            part += WORDS.get(word, 0)
    return None if any(word in WORDS for word in words[end:]) else Fraction(total + part)  # six or seven


def readings(text):
    """The ways to read a text as mathematics, maybe none: 100,200 is a number or a list, 1 ± 2 is two numbers."""
    if len(text) > LONGEST:
        return []
    if (value := spelled(text)) is not None:
        return [Reading([value] * POINTS, set(), False)]
    if "\\pm" in text:
        other = text.replace("\\pm", "-").replace("\\mp", "+")
        text = text.replace("\\pm", "+").replace("\\mp", "-") + ", " + other
    tokens = [tokenize(text, TOKEN.format(pattern)) for pattern in (f"{GROUPED}|{PLAIN}", PLAIN)]
    found = []
    listed = tokens[0] != tokens[1] and not any(re.match(r"0\d", text) for _, text in tokens[1])  # 10,080 is no list
    for one in tokens[: 1 + listed]:
        try:
            readers = [Reader(one.copy(), point) for point in range(POINTS)]
            values = [readers[0].answer()]
            values += [reader.answer() if readers[0].letters else values[0] for reader in readers[1:]]
            found.append(Reading(values, readers[0].units, readers[0].percent))
        except (ValueError, ArithmeticError, TypeError, RecursionError):
            continue
    return found


# ---- do two answers mean the same? ---------------------------------------------------------------------------------


def close(a, b):
    """The same number: exactly, where both are exact."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        written_out = max(a.denominator, b.denominator) > 10**9  # 0.3333333333 is 1/3
        return a == b or written_out and abs(a - b) * 10**9 < abs(a)
    if max(abs(a), abs(b)) > 1e300:
        return a == b
    return cmath.isclose(complex(a), complex(b), rel_tol=1e-9, abs_tol=1e-12)


def same(a, b):
    """The same value at one point: lists in any order, tuples and intervals in theirs, 5 for x = 5, a column as tuple."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Equation):
            if isinstance(other, Equation):
                return one.name == other.name != "" and same(one.value, other.value)
            return one.name != "" and same(one.value, other)
        if isinstance(one, Group) and one.kind == "matrix" and len(one.items) == 1:
            return same(one.items[0], other)
    if not isinstance(a, Group) or not isinstance(b, Group):
        return not isinstance(a, Group) and not isinstance(b, Group) and close(a, b)
    kinds = {a.kind, b.kind}
    if kinds <= {"list", "set"}:
        return all(any(same(x, y) for y in b.items) for x in a.items) and (
            all(any(same(x, y) for x in a.items) for y in b.items)
        )
    ordered = len(kinds) == 1 or kinds & {"list", "matrix"} and kinds <= {"list", "matrix", "()", "[]"}
    return bool(ordered) and len(a.items) == len(b.items) and all(map(same, a.items, b.items))


def agree(a, b):
    """Do two readings say the same? Units count where both name one; 50% is 50, and 0.5."""
    if (a.units or a.percent) and (b.units or b.percent) and (a.units, a.percent) != (b.units, b.percent):
        return False
    first, second = a.values[0], b.values[0]
    if isinstance(first, Equation) and isinstance(second, Equation) and not first.name == second.name != "":
        # the same line: what the sides differ in is the same at all points, but for a factor
        left, right = ([value.difference for value in reading.values] for reading in (a, b))
        return all(x and y and close(x * right[0], left[0] * y) for x, y in zip(left, right))
    if a.percent != b.percent and not isinstance(first, tuple) and not isinstance(second, tuple):
        percent, number = (first, second) if a.percent else (second, first)
        return close(percent / 100, number) or abs(number) >= 1 and close(percent, number)
    return all(map(same, a.values, b.values))


# a sign (before or after a currency), digits with or without thousands separators, decimals, a denominator: -1,080.50
STATED = re.compile(
    r"(?<![\w.^/*+-])([+-]?)(\d{1,3}(?:,\d{3})++(?![\d,])|\d{1,40}+|(?=\.\d))(\.\d{0,40}+)?+"
    r"(?:\s?/\s?(\d{1,40}+))?+(?![\d^*+]|\s?/\s?\d|[eE][+-]?\d|-\d)"
)
HEDGED = re.compile(  # and what is no sentence: code, LaTeX, a comparison
    r"(?i)\b(?:not?|none|never|wrong|incorrect|except|but|either|or|nor|unless|if|false|than|at (?:least|most)|between"
    r"|below|above|under|over|minus|negative|plus|times|twice|double|triple|hal(?:f|ves)|squared|cubed|\w+ths?"
    r"|maybe|perhaps|possibly|probably|almost|nearly|near)\b|n't|[\\^_]|\w\(|(?:^|\s)[<>]|!="
)


def stated(text):
    """The one number in a sentence, or None: 'It is 72 clips.' Not of 'not 72', '72 or 73', or '72 (of 100)'."""
    text = text.rpartition("=")[2].strip()
    found = STATED.findall(re.sub(r"^([+-])\s+", r"\1", text))
    if HEDGED.search(text):
        return None
    if len(found) != 1 or len(re.findall(r"\d+(?:[.,]\d+)*", text)) != 1 + bool(found[0][3]):
        return None  # a choice of several, or a calculation
    sign, whole, decimals, denominator = found[0]
    if denominator and not int(denominator):
        return None
    value = Fraction((whole.replace(",", "") or "0") + decimals.rstrip(".")) / int(denominator or 1)
    return -value if sign == "-" else value


def value_of(reading):
    """The exact number that a reading states, or None."""
    value = reading.values[0]
    value = value.value if isinstance(value, Equation) and value.name else value
    return value if isinstance(value, Fraction) else None


def number(text):
    """The one number that an answer states, exactly, or None: $1,080  72.  -5 degrees  3 + 4 = 7  seventy-two."""
    text = tidy(text) if len(text) <= LONGEST else ""
    found = readings(text)
    return next((value for value in map(value_of, found) if value is not None), None) if found else stated(text)


BASE = re.compile(r"(?<=[\dA-F])_\s*\{?\s*\d+\s*\}?$")


def as_text(text):
    """A text without case, spaces and the brackets of (C)."""
    return re.sub(r"^\((\w)\)$", r"\1", re.sub(r"(?<!\d)\s|\s(?!\d)", "", text).casefold())


def math_equal(prediction, gold):
    """Do two answers mean the same? By value where both can be read as mathematics, else as text."""
    if max(len(prediction), len(gold)) > LONGEST:
        return prediction.split() == gold.split()
    left, right = tidy(prediction), tidy(gold)
    if bool(BASE.search(left)) != bool(BASE.search(right)):  # the question may have asked for base 2: 101 for 101_2
        left, right = BASE.sub("", left), BASE.sub("", right)
    if as_text(left) == as_text(right):
        return True
    first, second = readings(left), readings(right)
    if len(first) == len(second) == 2:  # groups of three digits on both sides are thousands
        first, second = first[:1], second[:1]
    if any(agree(a, b) for a in first for b in second):
        return True
    if not second or value_of(second[0]) is None or any(value_of(reading) is not None for reading in first):
        return False
    if any(unit not in left for unit in second[0].units):
        return False
    return (not first or bool(re.search("[A-Za-z]{4}", left))) and stated(left) == value_of(second[0])  # a sentence


# ---- logic puzzles: who is what, who came when ---------------------------------------------------------------------

HEDGES = "or|either|may|might|maybe|perhaps|possibly|probably|could|if|unless|not (?:every(?:one|body)|all|both)"
KNIGHTS_WORDS = {
    "hedge": HEDGES,
    "rest": "the rest|the others?|every(?:one|body) else|all others",
    "none": "no ?one|nobody|none|neither",
    "all": "every(?:one|body)|all|both|each",
    "not": "not|no|never",
    "knight": "knights?|truth(?:[ -]?tellers?|ful)?",
    "knave": "knaves?|liars?|lies|lying",
}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
ORDER_WORDS = {
    "hedge": HEDGES + "|not|after|behind|reversed?",
    "heading": "first to last|1st to last",  # says which way the list goes
    "place": r"second[ -](?:to[ -])?last|last|\d{1,9}(?:st|nd|rd|th)?|" + "|".join(ORDINALS),
}


def marks(answer, names, words):
    """The words of an answer that matter, in order: [(kind, word, does it head what follows: `is`, `are`, `:`, `=`)]."""
    answer = answer.replace("?", " or ") if len(answer) <= 10_000 else "or"  # no right answer is that long
    plain = re.sub(r"n['’]t\b", " not", answer)
    plain = re.sub(r"""\\[a-zA-Z]+|[\s*_`"'“”{}()\[\]$]""", " ", plain)  # the dress of LaTeX, markdown and JSON
    plain = " ".join(plain.lower().split())
    kinds = words | {"name": "|".join(map(re.escape, names))}
    pattern = "|".join(rf"(?P<{kind}>\b(?:{choices})\b)" for kind, choices in kinds.items())
    heads = re.compile(r" ?(?:is\b|are\b|[:=])")
    return [(m.lastgroup, m[0], bool(heads.match(plain, m.end()))) for m in re.finditer(pattern, plain)]


def knights_equal(answer, problem):
    """Does an answer call all by their kinds, as in `Ada is a knight`, `Knaves: Ben, Cleo` or `Everyone is a knave`?"""
    gold = {tuple(pair.split(": ")) for pair in problem["answer"].lower().split(", ")}
    names = [name.lower() for name in problem["names"]]
    claims, waiting, heading, said, negated = set(), [], None, None, False
    for kind, word, heads in marks(answer, names, KNIGHTS_WORDS):
        if kind == "hedge":
            return False
        if kind == "none" and heading:
            continue  # Knights: none
        if kind in ("knight", "knave"):
            role = kind if not negated else {"knight": "knave", "knave": "knight"}[kind]
            claims |= {(name, role) for name in waiting}  # Ada and Ben are knights
            if not waiting and (heads or heading or said is None):
                heading = role  # Knights: Ada, Ben
            elif not waiting and role != said:
                return False  # Ada is a knight and a knave
            said, negated, waiting = role, False, []
        negated = negated or kind in ("not", "none")
        if kind == "name":
            heading = None if heads else heading
            waiting = [] if waiting is names else waiting  # both Ada and Ben
            waiting.append(word)
        elif kind == "rest":
            waiting = [name for name in names if name not in dict(claims)]
        elif kind in ("all", "none") and not waiting and (word != "both" or len(names) == 2):
            waiting = names
        if heading:
            claims |= {(name, heading) for name in waiting}
            waiting = []
    return claims == gold


def order_equal(answer, problem):
    """Does an answer have every name once, in the right order as written, or else each with its right place?"""
    gold, names, places, before = problem["answer"].lower().split(", "), [], [], []
    for kind, word, _ in marks(answer, problem["answer"].lower().split(", "), ORDER_WORDS):
        if kind == "hedge":
            return False
        if kind == "name":
            names.append(word)
        elif kind == "place":
            back = len(gold) - word.startswith("second") if word.endswith("last") else 0
            places.append(back or (ORDINALS.index(word) + 1 if word in ORDINALS else int(re.match(r"\d+", word)[0])))
            before.append(len(names))  # the names that stand before it
    if before in (list(range(len(gold))), list(range(1, len(gold) + 1))):  # 2: Ada, 1: Ben, or Ada: 2, Ben: 1
        return len(names) == len(gold) and sorted(zip(places, names)) == list(enumerate(gold, 1))
    return names == gold and all(place in (n, n + 1) and place <= len(gold) for place, n in zip(places, before))


# ---- countdown -----------------------------------------------------------------------------------------------------

ARITHMETIC = re.compile(r"[\d\s+\-*/(){}=]|\\(?:times|cdot|div|d?frac|left|right)")


def countdown_equal(answer, problem):
    """Does a calculation reach the target, with + - * / alone and each of the given numbers at most once?"""
    signs = answer.translate(str.maketrans("×·÷−–", "**/--")) if len(answer) <= LONGEST else ""
    text = tidy(signs)
    sides = [side for side in text.split("=") if re.sub(r"\s", "", side) != str(problem["target"])]
    if len(sides) != 1 or ARITHMETIC.sub("", text) or "**" in signs or re.search(r"\d\s+\d", signs):
        return False  # several calculations, or something else than one
    spare = list(problem["numbers"])
    for used in map(int, re.findall(r"\d+", sides[0])):
        if used not in spare:
            return False
        spare.remove(used)
    return number(sides[0]) == problem["target"]


# ---- programs, graded by tests in a sandbox ------------------------------------------------------------------------

SECONDS = 4.0  # of wall clock, for all tests of one program
REPLY_BYTES = 1 << 20  # the longest result, as text
TMP_BYTES = 16 << 20  # in all of /tmp, the only place where a program can write
LIMITS = {  # of a process, but for NPROC: the processes and threads of a sandbox together
    "RLIMIT_AS": 512 << 20,
    "RLIMIT_NPROC": 8,
    "RLIMIT_FSIZE": TMP_BYTES // 4,
    "RLIMIT_NOFILE": 32,
    "RLIMIT_CORE": 0,
    "RLIMIT_CPU": 10,
}

# What a program can reach it can forge, so two sandboxes share the work, joined by two pipes and nothing else. The
# tester runs the tests, with a proxy in place of each function under test; the program answers the proxies. Only text
# that spells plain values crosses: the program meets no assert, no expected value, no verdict.
#
# The next seven functions run in there, sent as source, where `ast` is only its C half: the rest takes 15 ms to load.


def plain(value):
    """The same value in plain built-in types, so that its repr says all of it: a Counter becomes a dict."""
    if value is None:
        return None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for kind in (bool, int, float, complex, bytes):
        if isinstance(value, kind):
            return kind(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind([plain(item) for item in value])
    raise TypeError(f"a {type(value).__name__} cannot cross")


def literal(node):
    """The value that a syntax tree spells: what ast.literal_eval reads, and inf, nan and frozensets."""
    match node:
        case ast.Constant(value):
            return value
        case ast.Name("inf" | "nan" as name):
            return float(name)
        case ast.UnaryOp(ast.USub(), operand):
            return -literal(operand)
        case ast.BinOp(real, ast.Add() | ast.Sub() as sign, imaginary):
            return literal(real) + literal(imaginary) * (1 if isinstance(sign, ast.Add) else -1)
        case ast.List(items):
            return [literal(item) for item in items]
        case ast.Tuple(items):
            return tuple([literal(item) for item in items])
        case ast.Set(items):
            return {literal(item) for item in items}
        case ast.Dict(keys, items):
            return {literal(key): literal(item) for key, item in zip(keys, items)}
        case ast.Call(ast.Name("set" | "frozenset" as name), items):
            return {"set": set, "frozenset": frozenset}[name](*[literal(item) for item in items])
    raise ValueError("not a plain value")


def send(pipe, value):
    """Write one value, on a line of its own; where nobody reads any more, this process ends."""
    line = repr(plain(value)).encode() + b"\n"
    try:
        pipe.write(line)
        pipe.flush()
    except BrokenPipeError:
        os._exit(0)


def receive(pipe, most=-1):
    """The next value of a pipe; where there is none, or only a line beyond the limit, this process ends."""
    line = pipe.readline(most)
    if not line.endswith(b"\n"):
        os._exit(0)
    return literal(compile(line.decode(), "<pipe>", "eval", ast.PyCF_ONLY_AST).body)


def confine(uid, limits):
    """Give up root for good, if there is a uid to become, and take on the limits."""
    import resource

    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


def program():
    """Say whether the code compiles without a warning, run it, and answer calls."""
    import warnings

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


def tester(requests, replies, most):
    """Write 1 or 0 for `it compiles`, then for each counted test as soon as it has run."""
    verdict, requests, replies = os.dup(1), open(requests, "wb"), open(replies, "rb")
    os.dup2(2, 1)  # what the tests print is no verdict
    source, setup, functions, tests = receive(sys.stdin.buffer)

    def proxy(name):
        def call(*args, **kwargs):
            send(requests, (name, args, kwargs))
            answered, result = receive(replies, most)
            if not answered:
                raise RuntimeError(f"{name} raised an exception")
            return result

        return call

    send(requests, source)
    os.write(verdict, b"1" if receive(replies, most) is True else b"0")
    namespace = {}
    exec(setup, namespace)
    namespace |= {name: proxy(name) for name in functions}
    for test, counted in tests:
        try:
            exec(test, namespace)
            passed = b"1"
        except Exception:
            passed = b"0"
        if counted:
            os.write(verdict, passed)


INSIDE = "import os, sys, _ast as ast\n" + "\n".join(
    inspect.getsource(part) for part in (plain, literal, send, receive, confine, program, tester)
)


def sandboxed(entry):
    """The command that runs an entry point in a sandbox: no network, no environment, no files but Python and /usr.

    A limit on processes does not bind root, nor root's user namespaces. So root does without one and becomes a nobody
    inside, another one in each sandbox; anyone else gets a user namespace.
    """
    if os.geteuid() == 0:
        uid = 2**30 + int.from_bytes(os.urandom(3), "big")
        options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --cap-drop ALL"
        options += " --cap-add CAP_SETUID --cap-add CAP_SETGID"
    else:
        uid = 0
        options = "--unshare-all --unshare-user --disable-userns --cap-drop ALL"
    command = [shutil.which("bwrap"), "--die-with-parent", "--new-session", *options.split()]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in filter(os.path.exists, ("/lib", "/lib64")):
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    python = sys.base_prefix  # --dir, or the folders above it would be root's alone
    command += ["--dir", os.path.dirname(python), "--ro-bind", python, python, "--proc", "/proc", "--dev", "/dev"]
    command += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    command += [f"{python}/bin/python3.{sys.version_info.minor}", "-I", "-S", "-c"]
    return [*command, f"{INSIDE}\nconfine({uid}, {LIMITS})\n{entry}"]


@functools.cache
def sandbox_problem():
    """Why programs cannot run here, in a sentence, or None."""
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed: sudo apt-get install bubblewrap"
    trial = subprocess.run(sandboxed("pass"), env={}, capture_output=True, text=True, check=False)
    return trial.stderr.strip().rpartition("\n")[2] if trial.returncode else None


def run_tests(code, problem):
    """The share of the counted tests, those that assert, that a program passes, and whether it compiles cleanly."""
    asserts = [any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(test))) for test in problem["tests"]]
    tests = list(zip(problem["tests"], asserts))
    # /proc/1/environ would show the environment; a Ctrl-C is for us, and not for the sandboxes
    start = functools.partial(subprocess.Popen, env={}, stderr=subprocess.DEVNULL, start_new_session=True)
    requests, replies = os.pipe(), os.pipe()  # each a reading and a writing end
    with tempfile.TemporaryFile() as task:
        send(task, (problem["prelude"] + code, problem["setup"], problem["functions"], tests))
        task.seek(0)
        try:
            ends = requests[1], replies[0]
            entry = f"tester({requests[1]}, {replies[0]}, {REPLY_BYTES})"
            processes = [
                start(sandboxed(entry), stdin=task, stdout=subprocess.PIPE, pass_fds=ends),
                start(sandboxed("program()"), stdin=requests[0], stdout=replies[1]),
            ]
        finally:
            for end in (*requests, *replies):
                os.close(end)
    deadline = threading.Timer(SECONDS, lambda: [process.kill() for process in processes])
    deadline.start()
    verdict = processes[0].stdout.read(1 + sum(asserts))
    deadline.cancel()
    for process in processes:
        process.kill()  # and with it all that is in its sandbox
        process.communicate()
    return verdict[1:].count(b"1") / sum(asserts), verdict[:1] == b"1"


# ---- is it right? --------------------------------------------------------------------------------------------------


def right(answer, problem):
    """Is an answer right, as the kind of its problem has it?"""
    if answer is None:
        return False
    kind = problem.get("kind", "math")
    if kind == "math":
        return math_equal(answer, problem["answer"].rpartition("####")[2].strip())
    return {"knights": knights_equal, "order": order_equal, "countdown": countdown_equal}[kind](answer, problem)


def grade(completion, gold):
    """Is a completion's answer right? The gold is a plain answer or a GSM8K answer field: what follows `####`."""
    return right(extract_answer(completion), {"answer": gold})


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


# ---- steps ---------------------------------------------------------------------------------------------------------

STEP = re.compile(r"[^\n]*?(?:[.!?](?=\s)|\n|$)")  # a line, or a sentence of it
CALCULATION = "0123456789.,+-−*/×÷()$% "


def calculations(step):
    """What a step calculates: (left side's value, right side's value, as it is written) of each `48 / 2 = 24` in it."""
    annotated = re.findall(r"<<([^<>]*)>>", step)[:9]
    for text in annotated or [step]:
        parts = text.split("=")[:9]
        for left, right in zip(parts, parts[1:]):
            left, right = left[-80:], right[:80]
            left = left[len(left.rstrip(CALCULATION)) :]
            written = re.match(r"[\s$]*(-?\d[\d,]*(?:\.\d+)?)(?!\s*[-+*/×÷]\s*[\d(])", right)
            if written and re.search(r"\d[\s%)]*[-+−*/×÷]\s*[$(]*\s*\d", left):
                value = number(left.replace("%", "/100"))
                if value is not None:
                    yield value, Fraction(written[1].replace(",", "")), written[1]


def step_rewards(completion, problem):
    """The steps of the reasoning that calculate, each judged by rule: [(end, reward)], for process supervision (§4.1.3).

    The end is the position of the character behind the step. A step earns nothing if a calculation in it does not hold,
    else a half, and the other half if a result of it stands in the worked solution too, as a result there.
    """
    lines = problem.get("solution", "").split("\n")
    known = {result for line in lines for _, result, _ in calculations(line)}
    start = max(0, completion.find("<reasoning>"))
    end = completion.find("</reasoning>", start)
    end = end if end >= 0 else len(completion)
    steps = []
    for match in itertools.islice(STEP.finditer(completion, start, end), 100):  # more lines than a worked solution has
        found = list(calculations(match[0]))
        if found:
            holds = all(holds_as_written(*calculation) for calculation in found)
            steps.append((match.end(), holds * (0.5 + 0.5 * any(result in known for _, result, _ in found))))
    return steps


def holds_as_written(value, result, written):
    """Is the result the value, or the value rounded to the decimals that are written?"""
    decimals = len(written.partition(".")[2])
    return value == result or decimals > 0 and abs(value - result) * 2 * 10**decimals <= 1


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


def program_of(completion):
    """The source text of an answer, its indentation kept, without the fence of a code block."""
    text = outside_reasoning(completion).rpartition("<answer>")[2].partition("</answer>")[0]
    fenced = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fenced[1] if fenced else text).strip("\n") + "\n"


UNSAFE = re.compile(
    r"(?i)\b(?:kill|hurt|shoot|poison) (?:your|him|her|them)sel(?:f|ves)\b|\b(?:build|make) an? (?:\w+ )?bomb\b"
    r"|\bi hate you\b|\byou(?: are|'re) (?:worthless|stupid|an idiot)\b|\bshut up\b"
)
REFLECTION = re.compile(
    r"(?i)\b(?:wait|hmm|mistake|on second thought|let me (?:re-?)?check|double[- ]check|re-?check)\b"
)


def safety(completion):
    """Does it say nothing of a short list of threats, insults and dangers? A list, and no more than that."""
    return not UNSAFE.search(completion)


def reflection(completion):
    """How often an output stops to think again: wait, hmm, mistake, let me check. A metric, and no reward."""
    return len(REFLECTION.findall(completion))


def overlong(length, limit, buffer):
    """DAPO's soft penalty of length (arXiv 2503.14476, eq. 13): 0 up to limit - buffer, then down to -1 at the limit."""
    return min(0.0, (limit - buffer - length) / buffer)


def rewards(completion, problem):
    """Every rule-based reward of a completion, by name and unweighted, each from 0 to 1.

    correctness    the answer is right; for a program: it passes all tests
    integer        the answer is a whole number, where the right one is (mathematics)
    tests          the share of the tests that it passes (programs)
    compiles       it compiles without an error and without a warning (programs)
    strict_format  exactly the asked form, save spaces around the whole
    soft_format    reasoning and then answer, on any lines, whatever follows
    tag_count      the share of the four tags that stand there exactly once
    safety         it says nothing of the list above
    """
    answer = extract_answer(completion)
    kind = problem.get("kind", "math")
    if kind == "program":
        source = program_of(completion)
        passed, compiles = run_tests(source, problem) if source.strip() else (0.0, False)
        named = {"correctness": float(passed == 1), "tests": passed, "compiles": float(compiles)}
    else:
        named = {"correctness": float(right(answer, problem))}
    if kind == "math":
        named["integer"] = float(answer is not None and is_integer(answer) and is_integer(problem["answer"]))
    return named | {
        "strict_format": float(strict_format(completion)),
        "soft_format": float(soft_format(completion)),
        "tag_count": sum(completion.count(tag) == 1 for tag in TAGS) / len(TAGS),
        "safety": float(safety(completion)),
    }
