"""Programs are graded by tests, in a sandbox that holds whatever a model may write: tests/test_sandbox.py"""

import ast
import builtins
import os
import pathlib
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import evaluator

pytestmark = pytest.mark.skipif(evaluator.sandbox_problem() is not None, reason=str(evaluator.sandbox_problem()))
MARK = uuid.uuid4().hex  # stands in the command line of every process in this run's sandboxes


@pytest.fixture(autouse=True)
def marked_sandboxes(monkeypatch):
    """Every test leaves no process, no open file and no thread behind."""
    monkeypatch.setattr(evaluator, "INSIDE", evaluator.INSIDE + "\n# " + MARK)
    before, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    wait_until(lambda: not alive() and threading.active_count() <= threads)
    assert sorted(os.listdir("/proc/self/fd")) == before


def alive():
    """The processes of this run's sandboxes, and the sleep that some hostile programs start."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if MARK.encode() in (command := path.read_bytes()) or b"31415.9" in command:
                found.append(path.parent.name)
        except OSError:
            continue  # it ended meanwhile
    return found


def wait_until(condition, seconds=1.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def problem(*tests, prelude="", setup="", functions=("f",)):
    return {"prelude": prelude, "setup": setup, "tests": list(tests), "functions": list(functions)}


def passes(code, *tests):
    """The share of tests that a program passes."""
    return evaluator.run_tests(code, problem(*tests))[0]


def named(text):
    """Programs by the comments before them."""
    return dict(part.split("\n", 1) for part in text.strip("\n# ").split("\n\n# "))


# ---- honest programs -----------------------------------------------------------------------------------------------

STUB = """
from typing import List

def shift(x):
    return x + 10

def f(xs: List[int]) -> int:
    '''The sum,
    shifted.'''
"""
STUB_TESTS = [
    "candidate = f",
    "for k in range(3):\n    assert candidate([k, 1]) == shift(k + 1)",
    "assert candidate([]) == 10",
]
COMPLETIONS = named(r"""
# only the body
    return shift(sum(xs))

# the whole function
def f(xs):
    return shift(sum(xs))

# the stub again
from typing import List

def shift(x):
    return x + 10

def f(xs: List[int]) -> int:
    return shift(sum(xs))

# a helper besides
    return helper(xs)

def helper(xs):
    return shift(sum(xs))

# an example that only a script would run
def f(xs):
    return shift(sum(xs))

if __name__ == "__main__":
    import sys
    sys.exit(f(input()))

# prints
print("11")
def f(xs):
    print("1" * 99999, flush=True)
    return shift(sum(xs))

# reading from no input
import sys
def f(xs):
    assert sys.stdin.read() == ""
    return shift(sum(xs))

# a global
calls = []
def f(xs):
    calls.append(xs)
    return shift(sum(calls[-1]))

# a dataclass
import dataclasses
@dataclasses.dataclass
class A:
    x: "int"
def f(xs):
    return A(shift(sum(xs))).x

# a file in its own folder
def f(xs):
    with open("x", "w") as file:
        file.write(str(sum(xs)))
    return shift(int(open("/tmp/x").read()))

# two threads
import threading
def f(xs):
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()
    return shift(sum(xs))

# much memory, yet within the limit
def f(xs):
    bytearray(200 << 20)
    return shift(sum(xs))
""")


@pytest.mark.parametrize("code", COMPLETIONS.values(), ids=COMPLETIONS)
def test_a_right_program_passes_however_it_is_written(code):
    assert evaluator.run_tests(code, problem(*STUB_TESTS, prelude=STUB, setup=STUB)) == (1, True)


@pytest.mark.parametrize(
    "code", ["", "    return None\n", "    return 10\n", "def g(xs):\n    return 10\n", "pass", "x = 1\n"]
)
def test_a_wrong_program_does_not_pass_fully(code):
    assert evaluator.run_tests(code, problem(*STUB_TESTS, prelude=STUB, setup=STUB))[0] < 1


def test_the_share_of_tests_counts_only_those_that_assert():
    tests = ["assert f(0) == 0", "a = 1", "assert f(a) == 1", "assert f(2) == 4", "if a:\n    assert f(3) == 9", "f(9)"]
    assert passes("def f(x): return x", *tests) == 0.5


def test_tests_without_an_assert_are_refused_in_words():
    with pytest.raises(ValueError, match="no test has an assert"):
        passes("def f(x): return x", "f(1)", "a = 'assert'")


def test_a_program_that_stops_halfway_keeps_what_it_passed(monkeypatch):
    monkeypatch.setattr(evaluator, "SECONDS", 1.0)
    tests = [f"assert f({x}) == {x}" for x in range(4)]
    for stop in ("import time; time.sleep(9)", "while True: pass", "import os; os._exit(0)", "import os; os.abort()"):
        assert passes(f"def f(x):\n    if x == 3:\n        {stop}\n    return x", *tests) == 0.75


LITERAL = "return type('A', (), {'__repr__': lambda self: '1'})()"


def test_a_call_that_raises_or_exits_fails_its_own_test_alone():
    for stop in (
        "1 / 0",
        "raise ValueError",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "f(x)",
        "return object()",
        LITERAL,
    ):
        code = f"def f(x):\n    if x == 1:\n        {stop}\n    return x"
        assert passes(code, "assert f(0) == 0", "assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3") == 0.75


def test_once_a_program_is_gone_the_rest_fails_at_once():
    start = time.monotonic()
    assert passes("def f(x):\n    import os\n    os._exit(0)", *["assert f(0) == 0"] * 1000) == 0
    assert time.monotonic() - start < 2


def test_a_program_that_is_gone_has_not_raised_the_exception_that_a_test_wants():
    test = "try:\n    f(0)\n    assert False\nexcept Exception:\n    pass"
    assert passes("def f(x): raise ValueError", test, test) == 1
    for code in ("import os\ndef f(x): os._exit(0)", "import os\nos._exit(0)", "import os\nos.closerange(0, 99)"):
        assert passes(code, *[test] * 20) == 0


VALUES = ["None", "True", "-7", "10**100", "0.1", "-0.0", "float('inf')", "-float('inf')", "1e-320", "2j", "1 - 2.5j"]
VALUES += [
    r"'a\n\'\"\\ é \u2028 \ud800 \0'",
    r"b'\x00\xff'",
    "()",
    "(1,)",
    "[]",
    "[[1], (2, [3])]",
    "{(1, 2): [3]}",
    "{}",
]
VALUES += ["set()", "{1, 2}", "frozenset()", "{frozenset({1}), frozenset()}", "[True, None, {'a': {1.5}}]"]
VALUES += ["'x' * 100000", "list(range(10000))"]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:30])
def test_a_plain_value_goes_there_and_back(value):
    tests = [
        f"assert f({value}) == {value}",
        f"assert type(f(x={value})) is type({value})",
        f"assert repr(f({value})) == repr({value})",
    ]
    assert passes("def f(x): return x", *tests) == 1


def test_a_result_crosses_up_to_its_longest_length():
    for length, share in ((evaluator.REPLY_BYTES - 100, 1), (evaluator.REPLY_BYTES, 0)):
        assert passes(f"def f(): return 'x' * {length}", f"assert f() == 'x' * {length}") == share


def test_nan_comes_back_as_nan():
    assert passes("def f(x): return [x, -x]", "assert all(x != x and type(x) is float for x in f(float('nan')))") == 1


def test_a_result_of_a_derived_type_counts_as_the_plain_one():
    code = """
import collections, enum
class Text(str):
    def __repr__(self): return "'no'"
Point = collections.namedtuple("Point", "x y")
class Color(enum.IntEnum):
    RED = 1
def f():
    counts = collections.defaultdict(int, a=1)
    return [collections.Counter("aab"), counts, collections.OrderedDict(a=1), Point(1, 2), Text("yes"), Color.RED]
"""
    assert passes(code, "assert f() == [{'a': 2, 'b': 1}, {'a': 1}, {'a': 1}, (1, 2), 'yes', 1]") == 1


def test_several_functions_call_each_other_and_take_keywords():
    code = "def f(x, *, y=1): return g(x) + y\ndef g(x): return x * 2"
    tests = ["assert f(1) == 3", "assert f(x=1, y=5) == 7", "assert g(f(1)) == 6"]
    assert evaluator.run_tests(code, problem(*tests, functions=["f", "g"])) == (1, True)


def test_what_the_tests_print_is_no_verdict():
    assert (
        passes("def f(): return 1", "print('111', flush=True)", "import os; os.write(1, b'111')", "assert f() == 2")
        == 0
    )


COMPILES = [  # what compiles, with what score
    ("def f(): return 1", 1, True),
    ("def f(): return 1 if 1 is 1 else 2", 1, False),  # SyntaxWarning: "is" with a literal
    ("def f(): return len('\\d') - 1", 1, False),  # an invalid escape
    ("import warnings\nwarnings.warn('x')\ndef f(): return 1", 1, True),  # warns when it runs
    ("def f(): return 2", 0, True),
    ("def f(): return 1\n1 / 0", 0, True),
    ("def f(): return 1\nraise SystemExit(0)", 0, True),
    ("while True: pass", 0, True),
    ("import os\nos._exit(0)", 0, True),
    ("def f(: return 1", 0, False),
    ("def f():\nreturn 1", 0, False),
    ("def f(): return 1\n\0", 0, False),
    ("def f(): return 1 # \ud800", 0, False),
    ("(" * 100_000, 0, False),
    ("-" * 100_000 + "1", 0, False),
    ("def f(): return 1\n" + "x = 1\n" * 10_000, 1, True),
    ("def f(): return " + "+".join("1" * 100_000), 0, False),
]


@pytest.mark.parametrize("code, share, clean", COMPILES, ids=[code[:30] for code, _, _ in COMPILES])
def test_it_compiles_if_python_neither_refuses_nor_warns(monkeypatch, code, share, clean):
    monkeypatch.setattr(evaluator, "SECONDS", 2.0)
    assert evaluator.run_tests(code, problem("assert f() == 1")) == (share, clean)


def test_many_threads_grade_at_once():
    with ThreadPoolExecutor(8) as pool:
        shares = pool.map(
            lambda k: passes(f"def f(x): return x + {k}", "assert f(1) == 2", "assert f(1) == 1"), [0, 1, 2] * 8
        )
        assert list(shares) == [0.5, 0.5, 0] * 8


def test_the_time_that_tests_take_counts_as_well(monkeypatch):
    monkeypatch.setattr(evaluator, "SECONDS", 0.5)
    assert passes("def f(x): return x", "assert f(1) == 1", "while True: f(1)", "assert f(1) == 1") == 0.5


# ---- what crosses between a program and its tests --------------------------------------------------------------------

CLASSES = """import dataclasses
@dataclasses.dataclass(order=True, unsafe_hash=True)
class Point:
    x: int
    y: int
    def moved(self, by): return Point(self.x + by, self.y + by)
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item)
    def __len__(self): return len(self.items)
    def __getitem__(self, index): return self.items[index]
    def __setitem__(self, index, item): self.items[index] = item
    def __iter__(self): return iter(self.items)
    def __str__(self): return f"a stack of {len(self)}"
    def __repr__(self): return f"Stack({self.items})"
"""
# a program, and a test after the arrow
CROSSING = named(r"""
# an object that the test makes
def f(p): return p.x + p.y
->
assert f(Point(1, y=2)) == 3

# a list of objects
def f(ps): return [p.x for p in ps]
->
assert f([Point(1, 2), Point(3, 4)]) == [1, 3]

# an object as a key
def f(d): return max(d, key=d.get)
->
assert f({Point(1, 2): 3, Point(2, 2): 5}).x == 2

# attributes
def f(): return Point(1, 2)
->
p = f()
assert (p.x, p.y) == (1, 2) and not hasattr(p, 'z')

# an attribute that is set
def f(p): return p.x
->
p = Point(1, 2)
p.x = 7
assert f(p) == 7

# a method
def f(): return Point(1, 2)
->
assert f().moved(by=3).y == 5

# equal objects
def f(p): return p.moved(1)
->
assert f(Point(1, 2)) == Point(2, 3) != Point(2, 4)

# objects in a set
def f(): return [Point(1, 2)] * 3
->
assert set(f()) == {Point(1, 2)}

# the same object
def f(p): return p
->
p = Point(1, 2)
assert f(p) == p and p in [f(p)]

# a length, items and a text
def f(): return Stack('ab')
->
s = f()
s.push('c')
s[0] = 'd'
assert len(s) == 3 and s[-1] == 'c' and list(s) == ['d', 'b', 'c'] and f'{s}!' == 'a stack of 3!'

# a repr
def f(): return Stack('ab')
->
assert repr(f()) == "Stack(['a', 'b'])"

# an empty object is false
def f(s): return bool(s)
->
assert not f(Stack()) and not Stack() and f(Stack([1]))

# a chain
class Node:
    def __init__(self, value, next=None):
        self.value = value
        self.next = next
def f(values):
    node = None
    for value in reversed(values):
        node = Node(value, node)
    return node
def g(node):
    return 0 if node is None else node.value + g(node.next)
->
node = f([1, 2, 3])
total = 0
while node:
    total += node.value
    node = node.next
assert total == 6 == g(f([1, 2, 3])) and g(None) == 0

# a type
def f(xs, t): return [x for x in xs if isinstance(x, t)]
->
assert f([1, 'a', 2.5, [3]], (int, list)) == [1, [3]]

# a type that comes back
def f(x): return type(x)
->
assert f(1) is int and f('a') == str

# the type of an exception
def f(kind): return issubclass(kind, ArithmeticError)
->
assert f(ZeroDivisionError) and not f(KeyError)

# a class of the program
def f(t): return t(1, 2).y
->
assert f(Point) == 2

# a lambda
def f(g, xs): return [g(x) for x in xs if g]
->
assert f(lambda x: x * x, [1, 2, 3]) == [1, 4, 9]

# a function of the test
def f(g): return g(1, b=g(2))
->
def g(a, b=5):
    return a * 10 + b
assert f(g) == 35

# a built-in function
def f(g, xs): return g(xs) + g(xs)
->
assert f(len, [1, 2]) == 4 and f(sum, [1, 2]) == 6

# a function of a module
def f(g, x): return g(x)
->
import math
assert f(math.sqrt, 9) == 3

# a method of the test
def f(tell):
    for x in 'abc': tell(x)
->
told = []
f(told.append)
assert told == ['a', 'b', 'c']

# a key
def f(ps, key): return min(ps, key=key).x
->
assert f([Point(1, 9), Point(2, 3)], lambda p: p.y) == 2

# a function that comes back
def f(n): return lambda x: x + n
->
assert f(2)(3) == 5 and [*map(f(1), [1, 2])] == [2, 3]

# a wrapped function
import functools
def f(g):
    @functools.wraps(g)
    def h(x): return g(g(x))
    return h
->
assert f(lambda x: x * 2)(3) == 12 and f(f(lambda x: x + 1))(0) == 4

# a callback that calls the program
def f(g, n): return g(n) if n else 0
->
def g(n):
    return n + f(g, n - 1)
assert f(g, 20) == 210

# an object of the test that returns
def f(g, x): return g(x)
->
class A: pass
a = A()
a.n = 5
assert f(lambda x: x.n, a) == 5 and f(lambda x: x, a) is a

# a name for a built-in function
f = sorted
->
assert f([2, 1]) == [1, 2]

# fractions
from fractions import Fraction
def f(x): return x + Fraction(1, 6)
->
from fractions import Fraction as F
assert f(F(1, 3)) == F(1, 2) and type(f(F(1, 3))) is F

# decimals
def f(x): return x * 2
->
from decimal import Decimal as D
assert repr(f(D('0.10'))) == "Decimal('0.20')"

# dates
import datetime
def f(x): return x + datetime.timedelta(days=1)
->
from datetime import date, datetime, timedelta
assert f(date(2024, 2, 28)) == date(2024, 2, 29)
assert f(datetime(2024, 2, 28, 5, 6, 7, 8)) == datetime(2024, 2, 29, 5, 6, 7, 8)
assert f(timedelta(seconds=1.5)) == timedelta(1, 1, 500000)

# a time zone, a time and a slice
def f(x): return [x]
->
from datetime import datetime, time, timezone
for x in (datetime(2024, 2, 28, tzinfo=timezone.utc), time(1, 2), slice(1, 2)):
    assert f(x) == [x]

# a range
def f(x): return x[::-1] if isinstance(x, range) else 0
->
assert f(range(3)) == range(2, -1, -1)

# a bytearray
def f(x): return x + bytearray(b'\0')
->
assert f(bytearray(b'a\xff')) == bytearray(b'a\xff\0')

# a generator
def f(n):
    for k in range(n): yield k * k
->
assert list(f(4)) == [0, 1, 4, 9] and sum(f(3)) == 5

# an endless generator
def f():
    k = 0
    while True:
        yield k
        k += 1
->
k = f()
assert [next(k), next(k), next(k)] == [0, 1, 2] and [x for _, x in zip('ab', k)] == [3, 4]

# iterators
def f(xs): return map(str, xs)
->
assert ''.join(f([1, 2])) == '12' and next(f([]), 'none') == 'none'

# views of a dict
def f(): return {1: 2}.items()
->
assert list(f()) == [(1, 2)] and len(f()) == 1

# the kind of an exception
def f(x):
    if x < 0: raise ValueError(x)
    return [x][x]
->
for x, kind in ((-1, ValueError), (2, IndexError), ('', TypeError)):
    try:
        f(x)
        assert False
    except kind as error:
        assert type(error) is kind

# the base of an exception
class Mine(KeyError): pass
def f(): raise Mine
->
try:
    f()
    assert 0
except KeyError:
    pass

# an exception of a callback
def f(g):
    try: g(0)
    except ZeroDivisionError: return 'caught'
->
assert f(lambda x: 1 / x) == 'caught'
""")


@pytest.mark.parametrize("case", CROSSING.values(), ids=CROSSING)
def test_a_right_program_passes_whatever_crosses(case):
    code, test = case.split("->\n")
    names = [node.name for node in ast.parse(CLASSES + code).body if hasattr(node, "name")]
    wanted = problem(test, prelude=CLASSES, functions=dict.fromkeys([*names, "f"]))
    assert evaluator.run_tests(code, wanted) == (1, True)


# ---- hostile programs ----------------------------------------------------------------------------------------------

# Each defines f, or tries to. The tests want f(2) == 4 and f(3) == 9, which none of these says when it is asked.
HOSTILE = r"""
# an endless loop
def f(x):
    while True: pass

# an endless import
while True: pass

# an endless sleep
import time
time.sleep(1e6)

# stopping itself
import os, signal
def f(x): os.kill(os.getpid(), signal.SIGSTOP)

# a fork bomb
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass

# a fork bomb that executes
import os
while True:
    try:
        if os.fork() == 0: os.execl("/usr/bin/sleep", "sleep", "31415.9")
    except OSError: pass

# a bomb of threads
import threading, time
def f(x):
    while True:
        try: threading.Thread(target=time.sleep, args=(99,)).start()
        except RuntimeError: pass

# 10 GB of memory
def f(x): return len(bytearray(10 << 30)) and 0

# memory bit by bit
def f(x):
    kept = []
    while True: kept.append('x' * 1000000 + str(len(kept)))

# memory in many processes
import os
for _ in range(20):
    try: os.fork()
    except OSError: break
x = bytearray(200 << 20)
while True: pass

# 1 GB of output
import sys, os
def f(x):
    for _ in range(1000): os.write(1, b'1' * 1000000), os.write(2, b'1' * 1000000), print('1' * 1000)

# a huge file
def f(x):
    with open('/tmp/x', 'wb') as file:
        while True: file.write(b'x' * 1000000)

# many files
def f(x):
    k = 0
    while True:
        open(f'/tmp/{k}', 'wb').write(b'x' * 1000000)
        k += 1

# a reply of 100 MB
def f(x): return 'x' * (100 << 20)

# an endless generator
def f(x):
    while True: yield 4

# a cycle
def f(x):
    x = []
    x.append(x)
    return x

# a deep list
def f(x):
    x = []
    for _ in range(900): x = [x]
    return x

# a deep recursion
import sys
sys.setrecursionlimit(10**9)
def f(x): return f(x)

# a crash
import ctypes
def f(x): ctypes.string_at(0)

# a crash when collected
import ctypes, gc
class A:
    def __del__(self): ctypes.string_at(0)
A()
gc.collect()

# a huge number
def f(x): return 10 ** 10 ** 10

# a number too long to print
def f(x): return 10 ** 100000

# a slow pattern
import re
def f(x): return re.match('(a|a)*b', 'a' * 60)

# a compressed bomb
import zlib
def f(x):
    d = zlib.compress(bytes(100 << 20))
    return len(b''.join(zlib.decompress(d) for _ in range(100)))

# exiting before the tests
import sys
sys.exit(0)

# exiting hard before the tests
import os
os._exit(0)

# exiting in the call
import sys
def f(x): sys.exit(0)

# exiting hard in the call
import os
def f(x): os._exit(0)

# exiting at the end
import atexit, os
atexit.register(lambda: os._exit(0))
def f(x): raise SystemExit

# killing its parent
import os, signal
os.kill(os.getppid(), signal.SIGKILL)

# killing process 1
import os, signal
def f(x): os.kill(1, signal.SIGKILL)

# killing everything
import os, signal
def f(x): os.kill(-1, signal.SIGKILL)

# killing its group
import os, signal
os.killpg(0, signal.SIGTERM)

# an alarm
import signal, os
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
def f(x):
    while True: pass

# deaf to signals
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: pass

# raising its limits
import resource
def f(x):
    for r in range(16):
        try: resource.setrlimit(r, (-1, -1))
        except (OSError, ValueError): pass
    return len(bytearray(1 << 30)) and 0

# closing every file
import os
os.closerange(0, 1000)

# closing every file in the call
import os
def f(x): os.closerange(0, 1000)

# an object that equals all
class A:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x): return A()

# a number that equals all
class A(int):
    def __eq__(self, other): return True
    def __repr__(self): return str(x * x)
    __hash__ = None
def f(x): return A(0)

# a list that equals all
class A(list):
    def __eq__(self, other): return True
    def __getattribute__(self, name): return lambda *_: True
def f(x): return A()

# a patched AssertionError
import builtins
builtins.AssertionError = type('A', (), {})
AssertionError.__init__ = None
def f(x): return 0

# patched builtins
import builtins
for name in ("exec", "repr", "compile", "isinstance", "open", "len", "type", "bool"):
    setattr(builtins, name, lambda *_, **__: True)
def f(x): return 0

# patched machinery
import sys
main = sys.modules['__main__']
main.encoded = main.send = main.receive = main.decoded = lambda *_: [True, 4]
def f(x): return 0

# replaced modules
import sys
class A:
    __eq__ = lambda *_: True
    __getattr__ = lambda *_: A()
for name in list(sys.modules): sys.modules[name] = A()
def f(x): return 0

# meddling with its callers
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals.update(tests=[], passed=1, counted=0)
        frame = frame.f_back
    return 0

# tracing
import sys
sys.settrace(lambda *_: sys.exit(0))
sys.setprofile(lambda *_: sys.exit(0))
def f(x): return 0

# an object that lies whatever it is asked
class A:
    __eq__ = __contains__ = __bool__ = __lt__ = __gt__ = lambda *_: True
    __hash__ = __len__ = __int__ = __index__ = lambda self: 4
    __getattr__ = __getitem__ = __add__ = __radd__ = __round__ = __call__ = lambda *_: 4
    __sub__ = lambda *_: 0
    __str__ = __repr__ = lambda self: "4"
    __ne__ = lambda *_: False
    __iter__ = lambda self: iter(range(99))
    __float__ = lambda self: 4.0
def f(x): return A()

# an object that says it is a number
class A:
    __class__ = int
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
def f(x): return A()

# a class that equals all
class A(type):
    __eq__ = __instancecheck__ = __subclasscheck__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = None
def f(x): return A("int", (), {"__module__": "builtins"})

# an exception that equals all
class A(Exception):
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
A.__module__ = "builtins"
def f(x): raise A

# an error that ends loops
def f(x): raise StopIteration

# requests that the tests do not serve
import __main__ as main
def f(x):
    for name in ("eval", "exec", "type", "getattr", "setattr", "vars", "open", "globals", "__import__", 0, None):
        for args in (("(x := 4)",), ("A", (), {"__eq__": lambda *_: True}), (f, "__globals__"), ()):
            main.send((name, args, {}))
            returned, found = main.receive()
            if returned: return found

# a type that is made in the tests' process
import __main__ as main
class A: __module__, __name__ = "builtins", "type"
def f(x):
    main.send(("call", (type, "A", (), {"__eq__": lambda *_: True, "__ne__": lambda *_: False}), {}))
    return main.receive()[1]()

# handles to what was never given
import __main__ as main
def f(x):
    main.encoded = lambda value: value
    for key in (0, 1, -1, None, True, "f", "tests", "namespace", "verdict", id(f), [], {}, 1e300):
        main.send([True, {"yours": key}])

# values that are no values
import __main__ as main
def f(x):
    main.encoded = lambda value: value
    for pair in ({"builtins.eval": [str(x * x)]}, {}, {"": 1}, {"os.system": ["x"]}, {"mine": {}}, {"yours": []}):
        main.send([True, pair])

# patched handles
import __main__ as main
main.Handle.__eq__ = lambda *_: True
main.answer = lambda *_: main.send([True, 4])
main.encoded = main.decoded = main.ask = lambda *_, **__: {"mine": 4}
def f(x): return main.Handle(4)

# printing ok
import sys
print('ok\n1\n1\n111')
sys.stderr.write('OK\n1 passed')
def f(x): return 0

# all protocols on all files
import os
def f(x):
    for fd in range(100):
        for text in (b"111", b"1\n1\n1\n", b"True\n", b"ok\n", b"(True, 'ok')\n"):
            try: os.write(fd, text)
            except OSError: pass
    return 0

# forged replies
import os
for fd in range(3, 32):
    try: os.write(fd, b"True\n(True, None)\n(True, 1, 2)\n('a', 'b')\n(True, __import__('os').getpid())\n" * 100)
    except OSError: pass
os._exit(0)

# replies that are no values
import os
LINES = [
    b"exec('import os; [os.write(fd, b\"111\") for fd in range(1, 4)]')",
    b"__import__('os').write(3, b'111')",
    b"[passed := 1]",
    b"[x for x in y]",
    b"(True, (lambda: 4)())",
    b"# coding: hex",
    b"\xff\0",
    b"()",
    b"1",
    b"",
]
def f(x):
    for fd in range(3, 32):
        try: os.write(fd, b"\n".join(LINES) + b"\n")
        except OSError: pass

# a flood of replies
import os
while True:
    for fd in range(3, 6):
        try: os.write(fd, b"(" * 65536)
        except OSError: pass

# a flood of lines
import os
while True:
    for fd in range(3, 6):
        try: os.write(fd, b"[" + b"0," * 500000 + b"]\n")
        except OSError: pass

# links in its folder
import os
def f(x):
    for link in (os.symlink, os.link):
        for target in ('/etc/passwd', '/proc/1/root', '/proc/self/fd/3', '/'):
            try: link(target, '/tmp/' + link.__name__ + str(hash(target)))
            except OSError: pass
    os.symlink('/tmp/a', '/tmp/b'); os.symlink('/tmp/b', '/tmp/a')
    return 0

# a deep tree of folders
import os
while True: os.mkdir('x'), os.chdir('x')

# a namespace of its own
import ctypes
libc = ctypes.CDLL(None)
libc.unshare(0x10000000 | 0x20000 | 0x20000000)
libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)
def f(x): return 0

# unmounting
import ctypes
libc = ctypes.CDLL(None)
libc.umount2(b'/tmp', 2), libc.umount2(b'/usr', 2), libc.umount2(b'/', 2)
def f(x): return 0

# becoming root
import os
def f(x):
    for call in (os.setuid, os.setgid, os.seteuid):
        try: call(0); return 4
        except OSError: pass

# a daemon
import os
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os.execl('/usr/bin/sleep', 'sleep', '31415.9')
        os._exit(0)
    return 0

# a daemon left by a dying program
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(1e6)
os._exit(0)
"""
HOSTILE = dict(part.split("\n", 1) for part in HOSTILE.strip("\n# ").split("\n\n# "))


@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_program_gains_nothing(monkeypatch, code):
    monkeypatch.setattr(evaluator, "SECONDS", 1.0)
    start = time.monotonic()
    assert evaluator.run_tests(code, problem("assert f(2) == 4", "assert not f(3) != 9")) == (0, True)
    assert time.monotonic() - start < 2


# a program, and a test that it must not pass, after the arrow; A tells lies
LIES = named(r"""
# a number near it
def f(): return A()
->
assert abs(f() - 4) < 1

# a number not larger
def f(): return A()
->
assert f() < 5

# a number not smaller
def f(): return A()
->
assert 5 > f()

# close enough
def f(): return A()
->
import math
assert math.isclose(f(), 4)

# rounded
def f(): return A()
->
assert round(f()) == 4

# one of two
def f(): return A()
->
assert f() in [4, 5]

# one of a set
def f(): return A()
->
assert f() in {4, 5}

# a member
def f(): return A()
->
assert 100 in f()

# part of a list
def f(): return [A()]
->
assert f() == [4]

# part of a dict
def f(): return {"a": (A(), 1)}
->
assert f() == {"a": (4, 1)}

# a key
def f(): return {A(): 1}
->
assert f() == {4: 1}

# an element
def f(): return {A()}
->
assert f() == {4}

# an integer
def f(): return A()
->
assert isinstance(f(), int)

# none at all
def f(): return A()
->
assert f() is None

# asked by its own name
def f(): return A()
->
assert f().__eq__(4) is True

# a date
def f(): return A()
->
import datetime
assert f() == datetime.date(2024, 1, 1) or f() == range(4)

# a subclass of a plain class
class B(__import__("fractions").Fraction):
    __eq__ = lambda *_: True
def f(): return B(1)
->
assert f() == 4

# the end of a loop
def f(x): raise StopIteration
->
assert all(map(lambda x: f(x) == x * x, [2, 3]))

# a class made by a callback
def f(g): return g(type, "B", (), {"__eq__": lambda *_: True})()
->
assert f(lambda h, *args: h(*args)) == 4

# a class made by `type`
def f(g): return g("B", (), {"__eq__": lambda *_: True})()
->
assert f(type) == 4

# code for a callback
def f(g): return g(eval, "secret")
->
secret = 4
assert f(lambda h, *args: h(*args)) == 4

# code for `eval`
def f(g): return g("secret")
->
secret = 4
assert f(eval) == 4

# attributes by `getattr`
def f(g, h): return g(h, "__globals__")["secret"]
->
secret = 4
assert f(getattr, lambda: 5) == 4

# an attribute of a callback
def f(g): return g.__globals__["secret"]
->
secret = 4
assert f(lambda: 5) == 4

# an attribute of the object that a method of the test has
def f(g): return g.__self__[0]
->
assert f([4].append) == 4

# what a callback holds
def f(g):
    found = []
    for name in ("__globals__", "__closure__", "__code__", "__defaults__", "__dict__", "__self__", "__func__"):
        try: found.append(getattr(g, name) != {"#": vars(g)["#"]})
        except AttributeError: continue
    return any(found)
->
def g(secret=4): return secret
assert f(g)

# an attribute of a callback that is set
def f(g):
    g.__code__ = f.__code__
    return g(4)
->
assert f(lambda x: 5) == 4
""")


@pytest.mark.parametrize("case", LIES.values(), ids=LIES)
def test_a_lie_passes_no_test(case):
    code, test = case.split("->\n")
    lies = HOSTILE["an object that lies whatever it is asked"]
    assert evaluator.run_tests(f"{lies}\n{code}", problem(test, "assert f")) == (0.5, True)


@pytest.mark.parametrize(
    "test", ["assert all(map(lambda x: f(x) == 9, [1, 2]))", "for x in map(f, [1, 2]):\n    assert x == 9"]
)
def test_an_exception_that_the_program_has_made_ends_no_loop_of_a_test(test):
    code = """
import __main__ as m
def f(x):
    handle = m.ask("x", "StopIteration")
    m.send([False, handle])
    m.receive()
"""
    assert evaluator.run_tests(code, problem(test))[0] == 0


def test_a_mutated_argument_is_only_the_programs_own_copy():
    code = "def f(xs):\n    xs.clear()\n    return xs"
    assert passes(code, "xs = [2, 1]", "assert f(xs) == sorted(xs)", "assert len(xs) == 0") == 0


def test_a_program_finds_no_secret_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "in the environment")
    (tmp_path / "secret").write_text("in a file")
    (tmp_path / "secret").chmod(0o644)
    code = f"""
import glob, os
def f(what):
    if what == "environment":
        found = [open(path).read() for path in glob.glob("/proc/*/environ") if os.access(path, os.R_OK)]
        return any("SECRET" in text for text in [*found, *os.environ])
    if what == "file":
        return open({str(tmp_path / "secret")!r}).read()
    if what == "processes":
        return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    if what == "folders":
        return [path for path in ("/home", "/work", "/var", "/sys", "/run", "/etc/passwd") if os.path.exists(path)]
"""
    tests = ["assert f('environment')", "assert f('file')", "assert len(f('processes')) > 2", "assert f('folders')"]
    assert passes(code, *tests) == 0
    assert passes(code, "assert f('environment') is False", "assert len(f('processes')) == 2") == 1


def test_a_program_sees_neither_the_tests_nor_the_verdict():
    code = """
import os, glob
def f():
    return sum(b"hidden" in open(path, "rb").read() for path in glob.glob("/proc/[0-9]*/cmdline"))
def g():
    files = {fd: os.path.realpath(f"/proc/self/fd/{fd}") for fd in range(32) if os.path.exists(f"/dev/fd/{fd}")}
    return [fd for fd, path in files.items() if path != "/dev/null"]
"""
    tests = ["hidden = 1", "assert f() == 0", "assert len(g()) == 2"]  # the two ends of its pipes
    assert evaluator.run_tests(code, problem(*tests, functions=["f", "g"])) == (1, True)


def test_a_program_reaches_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        code = (
            f"import socket\ndef f(): return socket.create_connection(('127.0.0.1', {server.getsockname()[1]})) and 1"
        )
        assert passes(code, "assert f() == 1") == 0
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_program_writes_in_its_tmp_alone_and_little(tmp_path):
    tmp_path.chmod(0o777)
    code = f"""
import os
def f():
    found = []
    for folder, folders, _ in os.walk("/"):
        if folder.count("/") > 2 or folder == "/proc":
            folders.clear()
        try:
            open(folder + "/x", "w").close()
            found.append(folder)
        except OSError:
            pass
    return found
def g():
    size = 0
    for k in range(100):
        try:
            with open("/tmp/" + str(k), "wb") as file:
                while True: size += file.write(bytes(1 << 16))
        except OSError:
            pass
    return size
def h():
    os.makedirs({str(tmp_path)!r}, exist_ok=True)
    open({str(tmp_path / "x")!r}, "w").write("x")
"""
    tests = ["assert f() == ['/tmp']", f"assert g() <= {evaluator.TMP_BYTES}", "h()"]
    assert evaluator.run_tests(code, problem(*tests, functions=["f", "g", "h"])) == (1, True)
    assert not list(tmp_path.iterdir())


def test_a_program_is_held_by_its_limits_and_has_no_privilege():
    code = """
import os, resource
def limits(): return {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name}
def status(): return dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines())
def forks():
    k = 0
    try:
        while True:
            if os.fork() == 0:
                os.read(os.pipe()[0], 1)
            k += 1
    except OSError:
        return k
"""
    tests = [f"assert limits()[{name!r}] == ({most}, {most})" for name, most in evaluator.LIMITS.items()]
    tests += [f"assert int(status()['{name}'], 16) == 0" for name in ("CapPrm", "CapEff", "CapAmb")]
    tests += ["assert status()['NoNewPrivs'] == '1'", "assert '0' not in status()['Uid'].split('\\t')"]
    tests += [f"assert 0 < forks() < {evaluator.LIMITS['RLIMIT_NPROC']}"]
    assert evaluator.run_tests(code, problem(*tests, functions=["limits", "status", "forks"])) == (1, True)


def test_what_runs_inside_knows_nothing_else_of_the_file():
    tree = ast.parse(evaluator.INSIDE)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    made |= {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))
    }
    made |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= made | set(dir(builtins))


def test_two_sandboxes_of_root_are_two_users():
    code = "import os\ndef f(): return os.getuid()"
    assert passes(code, f"assert (f() >= 2**30) == {os.geteuid() == 0}") == 1
    assert passes(code, "import os", f"assert (f() != os.getuid()) == {os.geteuid() == 0}") == 1


def test_a_missing_bubblewrap_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert evaluator.sandbox_problem.__wrapped__() == "bubblewrap is not installed: sudo apt-get install bubblewrap"


def test_a_bubblewrap_that_cannot_start_is_said_in_its_own_words(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: No permissions to create a namespace >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert evaluator.sandbox_problem.__wrapped__() == "bwrap: No permissions to create a namespace"
