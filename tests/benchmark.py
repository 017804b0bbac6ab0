"""Measure what the README claims of memory: python tests/benchmark.py

Each figure is the peak of the resident memory of a process of its own, less that of the one it is compared with.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
ROWS, PROMPT, TOKENS, VOCABULARY = 4, 32, 512, 151_936
STEP = {  # one GRPO step of a model of 200 M parameters, on 8 outputs of 64 tokens behind prompts of 32
    "full": {},
    "full, checkpointing": {"GRADIENT_CHECKPOINTING": True},
    "LoRA, rank 32": {"LORA_RANK": 32},
    "LoRA, checkpointing": {"LORA_RANK": 32, "GRADIENT_CHECKPOINTING": True},
}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_model(**shape):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def score(how, hidden):
    """Score 4 × 512 tokens forward and backward; the process's peak memory in bytes."""
    import torch

    import llms

    shape = {"hidden_size": hidden, "num_hidden_layers": 2, "intermediate_size": 2 * hidden, "num_attention_heads": 4}
    model = random_model(**shape, num_key_value_heads=2, vocab_size=VOCABULARY)
    said = torch.randint(0, VOCABULARY, (ROWS, PROMPT + TOKENS)).tolist()
    ids, attention, mask = llms.batch([row[:PROMPT] for row in said], [row[PROMPT:] for row in said], "cpu")
    model.get_output_embeddings().weight.grad = torch.zeros(VOCABULARY, hidden)  # the weights' gradient counts for all
    model.get_output_embeddings().weight.grad += 1e-9  # touched, so that it is resident
    if how == "trunk":  # the model without its head: weights, gradients and the trunk's activations
        loss = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state.sum()
    elif how == "chunks":
        loss = llms.token_logprobs(model, ids, attention, mask, 1.0).sum()
    else:  # what a straightforward implementation does
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, PROMPT - 1 : -1].float()
        loss = torch.log_softmax(logits, -1).gather(-1, ids[:, PROMPT:, None]).sum()
    loss.backward()
    return {"peak": peak()}


def step(how):
    """Two updates with a reference, as main.py makes them: the peak above the imports, and what main.py estimates."""
    import torch

    import llms
    import main

    shape = {"hidden_size": 1024, "num_hidden_layers": 15, "intermediate_size": 2816, "num_attention_heads": 16}
    main.__dict__.update(STEP[how] | {"TOKEN_BUDGET": 768, "LEARNING_RATE": 1e-4, "BETA": 0.04})
    before = peak()
    model = random_model(**shape, num_key_value_heads=4, vocab_size=32_000)
    numbers = sum(weight.numel() for weight in model.parameters())
    state = main.new_state(model, None)
    state.reference = llms.frozen_copy(model)
    said = torch.randint(0, 32_000, (8, 96)).tolist()
    layout = llms.batch([row[:32] for row in said], [row[32:] for row in said], "cpu")
    rollout = llms.Rollout(*layout, None, None, torch.zeros(8).bool(), [""] * 8)
    for _ in range(2):
        main.update(state, rollout, torch.randn(8), None, main.score(state.reference, rollout))
    copies = (not main.LORA_RANK, False)
    parts = llms.memory(model, copies, 0, main.TOKEN_BUDGET, main.GRADIENT_CHECKPOINTING, False)
    return {"peak": peak() - before, "estimate": sum(parts.values()), "numbers": numbers}


def child(*what):
    """The result of a measurement in a process of its own.

    In a step tensors of all ages lie side by side, and malloc keeps the gaps: there every tensor of more than 64 kB is
    given back as soon as it is freed, so that what is measured is what is alive.
    """
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if what[0] == "step" else {})
    command = [sys.executable, __file__, "--measure", *what]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)  # the child process
    arguments = parser.parse_args()
    if arguments.measure:
        what, *how = arguments.measure
        print(json.dumps(step(*how) if what == "step" else score(how[0], int(how[1]))))
        return
    print(f"scoring {ROWS} × {TOKENS} tokens, vocabulary {VOCABULARY:,}, forward and backward, fp32: peak memory")
    print(f"{'hidden size':>12}{'without head':>16}{'in chunks adds':>18}{'all at once adds':>20}{'share':>8}")
    for hidden in (64, 256, 896):
        trunk, chunks, whole = (
            child("score", how, str(hidden))["peak"] / 2**20 for how in ("trunk", "chunks", "whole")
        )
        share = (chunks - trunk) / (whole - trunk)
        print(f"{hidden:12}{trunk:13.0f} MB{chunks - trunk:15.0f} MB{whole - trunk:17.0f} MB{share:8.2f}")
    found = {how: child("step", how) for how in STEP}
    millions = found["full"]["numbers"] / 1e6
    print(f"\na GRPO step of a model of {millions:.0f} M parameters, 8 outputs of 64 tokens, fp32: peak memory")
    print(f"{'':22}{'measured':>12}{'share of full':>16}{'estimated':>12}")
    for how, one in found.items():
        share = one["peak"] / found["full"]["peak"]
        print(f"{how:22}{one['peak'] / 1e9:9.2f} GB{share:16.2f}{one['estimate'] / 1e9:9.2f} GB")


if __name__ == "__main__":
    main()
