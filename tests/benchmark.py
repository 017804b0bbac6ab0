"""Measure what the README claims of memory: python tests/benchmark.py

Each figure is the peak of the resident memory of a process of its own, less that of the one it is compared with.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
ROWS, PROMPT, TOKENS, VOCABULARY = 4, 32, 512, 151_936


def measure(how, hidden):
    """Score 4 × 512 tokens forward and backward, and print the process's peak memory in MB and the scores' sum."""
    import torch
    import transformers

    import llms

    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_hidden_layers": 2, "intermediate_size": 2 * hidden, "num_attention_heads": 4}
    config = transformers.Qwen2Config(**shape, num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
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
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, loss.item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # the child process
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure[0], int(arguments.measure[1]))
    print(f"scoring {ROWS} × {TOKENS} tokens, vocabulary {VOCABULARY:,}, forward and backward, fp32: peak memory")
    print(f"{'hidden size':>12}{'without head':>16}{'in chunks adds':>18}{'all at once adds':>20}{'share':>8}")
    for hidden in (64, 256, 896):
        peak = {}
        for how in ("trunk", "chunks", "whole"):
            child = [sys.executable, __file__, "--measure", how, str(hidden)]
            out = subprocess.run(child, capture_output=True, text=True, check=True).stdout
            peak[how] = float(out.split()[0])
        chunks, whole = peak["chunks"] - peak["trunk"], peak["whole"] - peak["trunk"]
        print(f"{hidden:12}{peak['trunk']:13.0f} MB{chunks:15.0f} MB{whole:17.0f} MB{chunks / whole:8.2f}")


if __name__ == "__main__":
    main()
