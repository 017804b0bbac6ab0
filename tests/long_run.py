"""Does a run grow? python tests/long_run.py [steps, default 10000]

The real loop trains a tiny random model for so many steps, and what the process holds is noted after each fifth of
them. What counts are ratios within the one run, the first fifth being the warm-up. The exit status is 1 if in the last
fifth the memory is more than 2 % and 10 MB above that of the first, if a step takes more than 10 % longer, if files,
threads or processes stay open, or if the run's folder grows by more than 4 MB per 1,000 steps.
"""

import contextlib
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}  # before anything reads them
sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import transformers

import llms
import main
import rldatasets

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
SMALL = "--dataset arithmetic --questions_per_step 1 --group_size 2 --max_new_tokens 4 --eval_questions 4"
SMALL += " --eval_every 1000 --save_every 500 --show_every 100 --learning_rate 1e-4 --model model --run long --steps"
MB = 1e6


def build(folder):
    """A random model in Hugging Face format, as small as one can be that reads the questions."""
    torch.manual_seed(0)
    texts = [message["content"] for messages, _ in rldatasets.tiny_corpus(0, 200)[1] for message in messages]
    tokenizer = llms.tiny_tokenizer(texts)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = transformers.Qwen2Config(**SHAPE, **ids, num_key_value_heads=1, max_position_embeddings=1024)
    llms.save(transformers.AutoModelForCausalLM.from_config(config), tokenizer, folder)


def numbers(path):
    """The lines `name: number` of a file in /proc, kB as bytes."""
    rows = re.findall(r"^(\w+):\s*(\d+)( kB)?$", Path(path).read_text(), re.MULTILINE)
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in rows}


def held(run):
    """What this process holds now, and what it has written so far."""
    status, written = numbers("/proc/self/status"), numbers("/proc/self/io")
    return {
        "memory, MB": status["VmRSS"] / MB,
        "peak, MB": status["VmHWM"] / MB,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": status["Threads"],
        "processes": sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children")),
        "folder, MB": sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / MB,
        "written, MB": written["wchar"] / MB,
        "to the disk, MB": written["write_bytes"] / MB,
    }


def yardstick():
    """The seconds that a fixed piece of work takes just now: whoever shares the machine slows it down like a step."""
    start = time.process_time()
    sum(range(20_000))
    return time.process_time() - start


def watch(steps):
    """Run the loop. Returns for every step when it ended, by both clocks, and the yardstick; and what was held after
    each fifth of the steps."""
    record_step, ends, notes = main.record_step, [], []
    torch.set_num_threads(1)  # so small a model gains nothing by more

    def watched(state, *learnt):
        row = record_step(state, *learnt)
        ends.append((time.perf_counter(), time.process_time(), yardstick()))
        if state.step % (steps // 5) == 0:
            notes.append(held(state.run))
        return row

    main.record_step = watched
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = main.main([*SMALL.split(), str(steps)])
    if status:
        sys.exit(f"the run ended with {status}")
    return ends, notes


def by_fifths(ends, notes):
    """The notes as {name: a number for each fifth}: what is written per 1,000 steps, and the median time of a step."""
    table, each = {name: [note[name] for note in notes] for name in notes[0]}, len(ends) // 5
    for name in ("folder, MB", "written, MB", "to the disk, MB"):
        table[f"{name} per 1,000 steps"] = [
            (now - before) * 1000 / each for before, now in zip([0, *table[name]], table.pop(name))
        ]
    clock, computing, sticks = zip(*ends)
    for name, times in (("a step, ms", clock), ("of it computing, ms", computing)):
        steps = [1000 * (end - start) for start, end in itertools.pairwise(times)]
        table[name] = [statistics.median(steps[fifth * each : (fifth + 1) * each]) for fifth in range(5)]
    sticks = [1000 * statistics.median(sticks[fifth * each : (fifth + 1) * each]) for fifth in range(5)]
    table["a step, in yardsticks"] = [step / stick for step, stick in zip(table["of it computing, ms"], sticks)]
    return table


def complaints(table):
    """What grew from the first fifth to the last."""
    first, last = ({name: row[fifth] for name, row in table.items()} for fifth in (0, 4))
    if last["memory, MB"] > first["memory, MB"] + max(10, 0.02 * first["memory, MB"]):
        yield "the memory grows"
    if last["a step, in yardsticks"] > 1.1 * first["a step, in yardsticks"]:
        yield "a step takes longer and longer"
    if max(table["folder, MB per 1,000 steps"][1:]) > 4:
        yield "the folder grows by more than 4 MB per 1,000 steps"
    for name in ("open files", "threads", "processes"):
        if last[name] > first[name]:
            yield f"{name} are left behind"


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        build("model")
        ends, notes = watch(steps)
    print(f"{'':32}" + "".join(f"{20 * fifth:>9} %" for fifth in range(1, 6)) + "   last / first")
    for name, row in (table := by_fifths(ends, notes)).items():
        ratio = f"{row[-1] / row[0]:.3f}" if row[0] else "–"
        print(f"{name:32}" + "".join(f"{number:11.1f}" for number in row) + f"{ratio:>15}")
    grows = list(complaints(table))
    print(*grows or ["nothing grows"], sep="\n")
    sys.exit(bool(grows))
