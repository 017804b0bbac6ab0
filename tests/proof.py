"""Long proofs of the rules on real data: python tests/proof.py FOLDER

FOLDER holds gsm8k/train.jsonl, gsm8k/test.jsonl, math/*.jsonl and HumanEval.jsonl.gz; what is missing is left out.
Every worked solution, written out as the prompt asks, must be right for its own question and wrong for the next one,
unless the two answers are equal; every reference program must pass its tests, and one that returns None must not.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluator
import rldatasets


def worked_solutions(path):
    problems = list(rldatasets.load(str(path), "train"))
    wrong, mixed_up, slowest = 0, [], 0.0
    for problem, other in zip(tqdm(problems, desc=path.name, leave=False), problems[1:] + problems[:1]):
        text, start = rldatasets.written_out(problem), time.perf_counter()
        wrong += evaluator.rewards(text, problem)["correctness"] != 1
        slowest = max(slowest, time.perf_counter() - start)
        if evaluator.grade(text, other["answer"]) and problem["answer"] != other["answer"]:
            mixed_up.append(f"{problem['answer']} for {other['answer']}")
    print(f"{path}: {len(problems)} worked solutions, {wrong} graded wrong, slowest {1000 * slowest:.1f} ms")
    print(f"  right for the next question too, though written differently: {', '.join(mixed_up) or 'none'}")


def reference_programs(path):
    problems = list(rldatasets.load(str(path), "test"))
    good = [rldatasets.written_out(problem) for problem in problems]
    stub = "<answer>\ndef {}(*args, **kwargs):\n    return None\n</answer>"
    broken = [stub.format(problem["functions"][0]) for problem in problems]
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = sum(one["correctness"] for one in pool.map(evaluator.rewards, good, problems))
        seconds = time.perf_counter() - start
        fooled = sum(one["correctness"] for one in pool.map(evaluator.rewards, broken, problems))
    print(
        f"{path}: {passed:.0f} of {len(problems)} references pass, in {seconds:.1f} s; {fooled:.0f} of the broken ones"
    )


def trivial_program():
    problem = {"prelude": "", "setup": "", "tests": ["assert f(1) == 2"], "functions": ["f"]}
    costs = []
    for _ in range(30):
        start = time.perf_counter()
        assert evaluator.run_tests("def f(x): return x + 1", problem) == (1.0, True)
        costs.append(1000 * (time.perf_counter() - start))
    print(f"a trivial program: median {sorted(costs)[15]:.0f} ms, worst of 30 {max(costs):.0f} ms")


def hostile_texts():
    pieces = "( [ { \\frac{ \\sqrt{ ^ 2^ - 1+ x+ 9 1, | \\{ \\boxed{ <reasoning> <answer> #### 1= ! \\pm ** ½ << 1+1=2 9**9** $ a"
    worst = (0.0, "")
    for piece in pieces.split():
        text = piece * (100_000 // len(piece))
        for completion in (
            text,
            f"<answer>{text}",
            f"<answer>{text[:490]}</answer>",
            f"#### {text}",
            f"\\boxed{{{text}}}",
        ):
            start = time.perf_counter()
            evaluator.grade(completion, "72")
            worst = max(worst, (1000 * (time.perf_counter() - start), piece))
    print(f"texts of 100 kB: the slowest is graded in {worst[0]:.1f} ms ({worst[1]} again and again)")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    for path in sorted([*folder.glob("gsm8k/*.jsonl"), *folder.glob("math/*.jsonl")]):
        worked_solutions(path)
    hostile_texts()
    if evaluator.sandbox_problem():
        sys.exit(f"no programs: {evaluator.sandbox_problem()}")
    trivial_program()
    if (folder / "HumanEval.jsonl.gz").exists():
        reference_programs(folder / "HumanEval.jsonl.gz")
