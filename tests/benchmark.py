"""What tests/README.md says of speed and memory: python tests/benchmark.py [SECTION ...]

Everything is measured beside what a user of the library would write, on the same random weights, questions and lengths,
in turns, and given as medians and ratios. Peaks of memory are those of processes of their own, above the imports.
With a GPU the model has the shape of Qwen2.5-1.5B, and shares of the GPU's measured limits are given too.
"""

import argparse
import copy
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import reference
import torch
import transformers

import llms
import main

main.put_in_force(main.of_the_block(model="another than the tiny one"))
SHAPES = {  # hidden size, layers, inner size, heads, key heads, vocabulary
    "small": (384, 8, 1024, 6, 2, 32_000),
    "smaller": (256, 4, 688, 4, 2, 32_000),
    "large vocabulary": (256, 4, 688, 4, 2, 128_000),
    "200 M": (1024, 15, 2816, 16, 4, 32_000),
    "Qwen2.5-0.5B": (896, 24, 4864, 14, 2, 151_936),
    "Qwen2.5-1.5B": (1536, 28, 8960, 12, 2, 151_936),
    "Qwen2.5-3B": (2048, 36, 11008, 16, 2, 151_936),
    "Qwen2.5-7B": (3584, 28, 18944, 28, 4, 152_064),
}
LORA = {
    "full": {},
    "full, checkpointing": {"GRADIENT_CHECKPOINTING": True},
    "LoRA, rank 32": {"LORA_RANK": 32},
    "LoRA, checkpointing": {"LORA_RANK": 32, "GRADIENT_CHECKPOINTING": True},
}
ANSWER_ONLY = "--rewards correctness=2"
RACES = {  # what a reader may try: flags
    "the default": "",
    "no warm-up": "--warmup 0",
    "no warm-up, μ = 4": "--warmup 0 --mu 4",
    "no warm-up, the answer's reward alone": f"--warmup 0 {ANSWER_ONLY}",
    "no warm-up, 4 × learning rate": "--warmup 0 --learning_rate 8e-4",
    "no warm-up, 4 × learning rate, the answer's reward alone": f"--warmup 0 --learning_rate 8e-4 {ANSWER_ONLY}",
    "no warm-up, 2 × learning rate, half the questions": "--warmup 0 --learning_rate 4e-4 --questions_per_step 8",
}
PROMPT = 100  # tokens in each prompt, about GSM8K's with its instruction


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def configuration(hidden, layers, inner, heads, key_heads, vocabulary, tied=True):
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary}
    ends = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": None}
    return transformers.Qwen2Config(**shape, **ends, tie_word_embeddings=tied, max_position_embeddings=4096)


def random_model(hidden, layers, inner, heads, key_heads, vocabulary):
    torch.manual_seed(0)
    config = configuration(hidden, layers, inner, heads, key_heads, vocabulary)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model.cuda() if torch.cuda.is_available() else model


class Words:
    """A tokenizer that has nothing to say."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids, skip_special_tokens):
        return ""


def end_tokens(model, longest, ragged):
    """Ids that end an output: enough for a fifth of `longest` on average; or only one, so that hardly any ends."""
    return list(range(1, 1 + (5 * model.config.vocab_size // longest if ragged else 1)))


def questions(count, vocabulary):
    return torch.randint(2, vocabulary, (count, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def generate(model, prompts, group_size, longest):
    """What the library offers: every row of every group, until the last has ended."""
    ids = torch.tensor(prompts, device=model.device).repeat_interleave(group_size, 0)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": longest}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
    is_end = torch.isin(out[:, PROMPT:], torch.tensor(model.generation_config.eos_token_id, device=out.device))
    return out, (is_end.cumsum(1) - is_end.long()) == 0  # [N, P + T], [N, T]


def library_model(shape):
    """The model as the library runs it fastest: on a GPU in bf16."""
    model = random_model(*SHAPES[shape])
    if torch.cuda.is_available():
        for weight in model.parameters():  # not the buffers, in which RoPE needs fp32
            weight.data = weight.to(torch.bfloat16)
    return model


def ours(shape):
    model = random_model(*SHAPES[shape])
    llms.use_packed_attention(model, shape)
    return model


def rollout(shape, count, group_size, longest, repeats=3):
    """Tokens per second of llms.sample and of generate, in turns."""
    mine, theirs, prompts = ours(shape), library_model(shape), questions(count, SHAPES[shape][-1])
    generator = torch.Generator().manual_seed(0)
    how = (group_size, longest, 1.0, generator)
    print(f"\nrollouts: {count} prompts of {PROMPT} tokens, {group_size} outputs each, up to {longest} tokens")
    print(f"{'lengths':12}{'this program':>18}{'generate':>18}{'ratio':>8}")
    for name in ("equal", "ragged"):
        for model in (mine, theirs):
            model.generation_config.eos_token_id = end_tokens(model, longest, name == "ragged")
        speeds = []
        for turn in range(repeats + 1):  # the first is a warm-up
            began = clock()
            tokens = int(llms.sample(mine, Words(), prompts, *how).mask.sum())
            between = clock()
            others = int(generate(theirs, prompts, group_size, longest)[1].sum())
            speeds.append((tokens / (between - began), others / (clock() - between)))
        a, b = (statistics.median(column) for column in zip(*speeds[1:]))
        print(f"{name:12}{a:14.0f} t/s{b:14.0f} t/s{a / b:8.2f}", flush=True)
        if torch.cuda.is_available() and name == "equal":
            print(f"  {100 * bandwidth_share(mine, count * group_size, longest, a):.0f} % of the bandwidth limit")


def bandwidth_share(model, rows, longest, tokens_per_second):
    """Bytes that decoding must read, weights once a step and the cache of every row, over those that could be read."""
    config, block = model.config, torch.empty(2**31, dtype=torch.uint8, device="cuda")
    copies, began = 20, clock()
    for _ in range(copies):
        block[: 2**30].copy_(block[2**30 :])
    limit = copies * 2**31 / (clock() - began)  # bytes per second, read and written
    weights = 2 * sum(weight.numel() for weight in model.parameters())
    per_token = 2 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.hidden_size
    cache = rows * per_token // config.num_attention_heads * (PROMPT + longest / 2)
    return (weights + cache) * tokens_per_second / rows / limit


def precisions(shape, count=4, group_size=8, longest=64):
    """Seconds of sampling and of an update in fp32 and in bf16, in turns, the sampler's gap and shares of the limit."""
    main.__dict__.update(TOKEN_BUDGET=2048, BETA=0.0, GROUP_SIZE=group_size, MAX_NEW_TOKENS=longest)
    model = ours(shape)
    state = main.new_state(model, Words())
    prompts = questions(count, SHAPES[shape][-1])
    found = {"fp32": [], "bf16": []}
    for _ in range(4):  # the first is a warm-up
        for precision, rows in found.items():
            llms.PRECISION = precision
            began = clock()
            rollout = sample(state, prompts)
            sampled = clock()
            logp = llms.log_probs(model, rollout, main.TEMPERATURE)
            gap = (logp - rollout.logp).abs()[rollout.mask].mean().item()
            scored = clock()
            main.update(state, rollout, torch.randn(len(rollout.mask)), None, None)
            rows.append((sampled - began, clock() - scored, gap))
    llms.PRECISION = "auto"
    print(f"\n{count} × {group_size} outputs of {longest} tokens, fp32 and bf16 in turns")
    print(f"{'':6}{'sampling':>12}{'update':>12}{'sampler_gap':>14}{'of the limit':>14}")
    computed = count * PROMPT + count * group_size * longest
    for name, rows in found.items():
        medians = [statistics.median(column) for column in zip(*rows[1:])]
        sampling, updating, gap = medians
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        weights = sum(weight.numel() for weight in model.parameters())
        share = 6 * weights * computed / updating / matrix_limit(dtype, 2048)
        print(f"{name:6}{sampling:10.2f} s{updating:10.2f} s{gap:14.6f}{100 * share:12.0f} %", flush=True)


def matrix_limit(dtype, size, device="cpu", repeats=20):
    """Operations per second of plain products of square matrices."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    a @ a
    began = clock()
    for _ in range(repeats):
        a @ a
    return repeats * 2 * size**3 / (clock() - began)


def update_share(shape, rows=128, tokens=700):
    """The arithmetic of an update, forward and backward, over that of plain bf16 matrix products in the same time."""
    main.__dict__.update(TOKEN_BUDGET=16_384, BETA=0.0, MAX_PROMPT_TOKENS=PROMPT)
    state = main.new_state(ours(shape), None)
    prompts = [prompt for prompt in questions(rows // 16, SHAPES[shape][-1]) for _ in range(16)]
    rollout = given(prompts, torch.randint(2, 9999, (rows, tokens - PROMPT)).tolist(), state.policy, 16)
    seconds = []
    for _ in range(3):
        began = clock()
        main.update(state, rollout, torch.randn(rows).cuda(), None, None)
        seconds.append(clock() - began)
    limit = matrix_limit(torch.bfloat16, 8192, "cuda")
    weights = sum(weight.numel() for weight in state.policy.parameters())
    computed = rows // 16 * PROMPT + rows * (tokens - PROMPT)  # every prompt once
    share = 6 * weights * computed / statistics.median(seconds) / limit
    print(f"update of {rows} × {tokens} tokens: {statistics.median(seconds):.2f} s, {100 * share:.0f} % of the limit")


def padded_logprobs(model, ids, attention, mask, temperature):
    """llms.token_logprobs on padded rows, each with its own prompt, by the library's attention."""
    T, head = mask.shape[1], model.get_output_embeddings().weight
    with llms.autocast(model):
        hidden = model.base_model(**reference.padded_inputs(ids, attention)).last_hidden_state[:, -T - 1 : -1][mask]
    dtype = llms.compute_dtype(model)
    logp = llms.HeadLogprobs.apply(hidden, head, None, ids[:, -T:][mask], temperature, dtype)
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


def packing(shape, group_sizes=(8, 16), count=4, repeats=3):
    """Seconds of an update on prompts read once, without padding, and on padded rows, in turns; the same weights."""
    print(f"\nupdates: {count} prompts of {PROMPT} tokens, outputs of 120 tokens on average")
    print(f"{'G':>4}{'without padding':>18}{'padded rows':>16}{'ratio':>8}")
    main.__dict__.update(BETA=0.0, TOKEN_BUDGET=8192)
    states = [main.new_state(model, None) for model in (ours(shape), random_model(*SHAPES[shape]))]
    ways = (llms.token_logprobs, padded_logprobs)
    for group_size in group_sizes:
        torch.manual_seed(0)
        lengths = (102 * (0.6 * torch.randn(count * group_size)).exp()).clamp(1, 512).long().tolist()
        prompts = [prompt for prompt in questions(count, SHAPES[shape][-1]) for _ in range(group_size)]
        rollout = given(
            prompts, [torch.randint(2, 9999, (length,)).tolist() for length in lengths], states[0].policy, group_size
        )
        advantages, seconds = torch.randn(len(prompts)).to(rollout.ids.device), []
        for _ in range(repeats + 1):  # the first is a warm-up
            times = [clock()]
            for state, llms.token_logprobs in zip(states, ways):
                main.update(state, rollout, advantages, None, None)
                times.append(clock())
            seconds.append((times[1] - times[0], times[2] - times[1]))
        llms.token_logprobs = ways[0]
        a, b = (statistics.median(column) for column in zip(*seconds[1:]))
        print(f"{group_size:4}{a:16.2f} s{b:14.2f} s{b / a:8.2f}", flush=True)


def given(prompts, completions, model, group_size=1):
    """A rollout of given tokens that nobody sampled."""
    rows = len(prompts)
    truncated = torch.zeros(rows, dtype=torch.bool, device=model.device)
    tensors = llms.batch(prompts, completions, model.device)
    return llms.Rollout(*tensors, truncated=truncated, texts=[""] * rows, group_size=group_size)


def sample(state, prompts):
    """A rollout as in training."""
    shape = main.GROUP_SIZE, main.MAX_NEW_TOKENS, main.TEMPERATURE
    return llms.sample(state.policy, state.tokenizer, prompts, *shape, state.generator)


def our_step(model, prompts, group_size, longest, cache):
    """A whole GRPO step of this program but for the rules, as main.py makes it: a function to be called."""
    main.__dict__.update(TOKEN_BUDGET=2048, CACHE_TOKENS=cache, GROUP_SIZE=group_size, MAX_NEW_TOKENS=longest)
    state = main.new_state(model, Words())
    state.reference = llms.frozen_copy(model)

    def step():
        rollout = sample(state, prompts)
        logp_ref = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
        main.update(state, rollout, torch.randn(len(rollout.mask)).to(model.device), None, logp_ref)
        return int(rollout.mask.sum())

    return step


def plain_step(model, prompts, group_size, longest, rows=8):
    """The same as it is usually written: generate, full logits, micro-batches of so many rows."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def log_probabilities(model, ids, attention):
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, PROMPT - 1 : -1].float()
        return torch.log_softmax(logits, -1).gather(2, ids[:, PROMPT:, None]).squeeze(2)

    def step():
        ids, mask = generate(model, prompts, group_size, longest)
        attention = torch.cat([torch.ones_like(ids[:, :PROMPT]), mask.long()], 1)
        advantages = torch.randn(len(ids), 1, device=ids.device)
        for start in range(0, len(ids), rows):
            part, real = slice(start, start + rows), mask[start : start + rows]
            with torch.no_grad():
                ref = log_probabilities(frozen, ids[part], attention[part])
            logp = log_probabilities(model, ids[part], attention[part])
            ratio, d = (logp - logp.detach()).exp(), ref - logp
            objective = torch.minimum(ratio * advantages[part], ratio.clamp(0.8, 1.2) * advantages[part])
            objective = objective - 0.04 * (d.exp() - d - 1)
            (-(objective * real).sum(1) / real.sum(1) / len(ids)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(mask.sum())

    return step


def step(how, shape, count, group_size, longest, cache):
    """Seconds and tokens per second of a step, and the peak above the imports: in this process."""
    main.__dict__.update(BETA=0.04, LEARNING_RATE=1e-6)
    before = llms.peak_memory()
    model = ours(shape) if how == "ours" else random_model(*SHAPES[shape])
    model.generation_config.eos_token_id = end_tokens(model, longest, True)
    prompts = questions(count, SHAPES[shape][-1])
    one = our_step(model, prompts, group_size, longest, cache) if how == "ours" else None
    one = one or plain_step(model, prompts, group_size, longest)
    torch.manual_seed(0)
    seconds, speeds = [], []
    for _ in range(3):
        began = clock()
        tokens = one()
        seconds.append(clock() - began)
        speeds.append(tokens / seconds[-1])
    return {"seconds": seconds[1:], "speed": statistics.median(speeds[1:]), "peak": llms.peak_memory() - before}


def compare_steps(title, cases, cache):
    print(f"\n{title}")
    print(
        f"{'Q':>4}{'G':>4}{'longest':>9}{'vocabulary':>12}{'this program':>24}{'usual':>24}{'faster':>9}{'memory':>9}"
    )
    for shape, *sizes in cases:
        a, b = (child("step", how, shape, *map(str, [*sizes, cache])) for how in ("ours", "usual"))
        cells = [f"{one['speed']:10.0f} t/s{one['peak']:7.2f} GB" for one in (a, b)]
        about = "".join(f"{size:{width}}" for size, width in zip(sizes, (4, 4, 9))) + f"{SHAPES[shape][-1]:12,}"
        ratios = f"{a['speed'] / b['speed']:9.2f}{a['peak'] / b['peak']:9.2f}"
        print(f"{about}{cells[0]:>24}{cells[1]:>24}{ratios}", flush=True)


def score(how, hidden, rows=8, tokens=1024, vocabulary=151_936):
    """Score 8 × 1,024 tokens forward and backward; the process's peak memory."""
    before, model = llms.peak_memory(), random_model(hidden, 2, 2 * hidden, 4, 2, vocabulary)
    if how == "chunks":
        llms.use_packed_attention(model, "random")
    lines = torch.randint(0, vocabulary, (rows, 32 + tokens)).tolist()
    ids, attention, mask = llms.batch([row[:32] for row in lines], [row[32:] for row in lines], "cpu")
    model.get_output_embeddings().weight.grad = torch.zeros(vocabulary, hidden)  # the weights' gradient counts for all
    model.get_output_embeddings().weight.grad += 1e-9  # touched, so that it is resident
    if how == "trunk":  # the model without its head: weights, gradients and the trunk's activations
        loss = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state.sum()
    elif how == "chunks":
        loss = llms.token_logprobs(model, ids, attention, mask, 1.0).sum()
    else:  # what a straightforward implementation does
        log_pi = torch.log_softmax(model(input_ids=ids, attention_mask=attention, use_cache=False).logits, -1)
        loss = log_pi[:, :-1].gather(2, ids[:, 1:, None]).sum()
    loss.backward()
    return {"peak": llms.peak_memory() - before}


def lora(how):
    """Two updates with a reference, as main.py makes them, and what main.py estimates."""
    main.__dict__.update(LORA[how] | {"TOKEN_BUDGET": 768, "LEARNING_RATE": 1e-4, "BETA": 0.04})
    before, model = llms.peak_memory(), ours("200 M")
    numbers = sum(weight.numel() for weight in model.parameters())
    state = main.new_state(model, None)
    state.reference = llms.frozen_copy(model)
    tokens = torch.randint(0, 32_000, (8, 96)).tolist()
    rollout = given([row[:32] for row in tokens], [row[32:] for row in tokens], model)
    for _ in range(2):
        main.update(state, rollout, torch.randn(8), None, llms.log_probs(state.reference, rollout, main.TEMPERATURE))
    copies = (not main.LORA_RANK, False)
    estimate = memory(model, copies, 0, main.TOKEN_BUDGET, main.GRADIENT_CHECKPOINTING, False)
    return {"peak": llms.peak_memory() - before, "estimate": estimate, "numbers": numbers}


def child(*what):
    """The result of a measurement in a process of its own.

    Under "lora" every tensor of more than 64 kB is given back as soon as it is freed, which is slow, but then what is
    measured is what is alive: malloc keeps the gaps between tensors of different ages.
    """
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if what[0] == "lora" else {})
    command = [sys.executable, __file__, "--measure", *what]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def measure_memory():
    print("\nscoring 8 × 1,024 tokens, vocabulary 151,936, forward and backward, fp32: peak memory")
    head = ("hidden size", "without head", "by chunks adds", "all at once adds", "of it", "in all")
    print("".join(f"{title:>{width}}" for title, width in zip(head, (12, 16, 18, 20, 8, 8))))
    for hidden in (64, 896):
        trunk, chunks, at_once = (child("score", how, str(hidden))["peak"] for how in ("trunk", "chunks", "at once"))
        adds = f"{chunks - trunk:15.2f} GB{at_once - trunk:17.2f} GB{(chunks - trunk) / (at_once - trunk):8.2f}"
        print(f"{hidden:12}{trunk:13.2f} GB{adds}{chunks / at_once:8.2f}", flush=True)


def measure_lora():
    found = {how: child("lora", how) for how in LORA}
    millions = found["full"]["numbers"] / 1e6
    print(f"\nan update of a model of {millions:.0f} M parameters, 8 outputs of 64 tokens, fp32: peak memory")
    print(f"{'':22}{'measured':>12}{'share of full':>16}{'estimated':>12}")
    for how, one in found.items():
        share = one["peak"] / found["full"]["peak"]
        print(f"{how:22}{one['peak']:9.2f} GB{share:16.2f}{one['estimate']:9.2f} GB")


def memory(model, copies, cache_tokens, token_budget, checkpointing, on_gpu, ranks=1):
    """An estimate of the memory that a run needs at its peak, in GB; of several ranks, what each needs.

    model   as it is trained, with its adapters where it has any
    copies  (bool, bool): is there a reference with weights of its own, and a critic?
    """
    config = model.config
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    heads, layers, light = config.num_attention_heads, config.num_hidden_layers, trained < total
    head_size = config.hidden_size // heads
    key_value = 2 * head_size * config.num_key_value_heads  # numbers a token and layer
    size = 2 if on_gpu else 4  # bytes of what is computed; weights, gradients and AdamW are in fp32
    layer = 10 * config.hidden_size + 2 * head_size * heads + key_value + 5 * config.intermediate_size
    activations = layer + layers * config.hidden_size if checkpointing else layers * layer  # a token's, for backward
    per_layer = sum(weight.numel() for weight in model.base_model.layers.parameters()) / layers
    outside = total - layers * per_layer  # embeddings and head
    # the weights, and gradients, in fp32, of the parts that are gathered at one time
    gathered = (4 if light else 8) * (outside + 2 * per_layer) if ranks > 1 else 0
    cast = 2 * (outside + per_layer if checkpointing else total) if on_gpu else 0  # weights in bf16, for backward
    reference_copy = 4 * total if light else size * trained + (2 * outside if on_gpu else 0)
    critic = 16 * trained + (4 * (total - trained) if ranks > 1 else 0)
    sampling = size * cache_tokens * layers * key_value
    updating = 4 * trained / ranks + gathered + size * token_budget * activations + cast
    weights_and_adam = (4 * total + 8 * trained + reference_copy * copies[0] + critic * copies[1]) / ranks
    sampled_from = size * total if on_gpu or ranks > 1 else 0
    logits = 3 * 4 * llms.LOGITS_AT_ONCE["cuda" if on_gpu else "cpu"]
    work = sampling + updating if on_gpu else max(sampling, updating)
    return (weights_and_adam + sampled_from + work + logits) / 1e9


def fits():
    """An estimate of what each GPU needs."""
    groups = {"defaults": {}, "light": {"GROUP_SIZE": 16, "CACHE_TOKENS": 131072}}
    ways = {"all weights": 0, "LoRA, rank 32": 32}
    defaults = main.of_the_block(model="another than the tiny one")
    print("\nGB on each of 1, 8 and 16 GPUs, with --gradient_checkpointing; light: " + ", ".join(
        f"--{name.lower()} {value}" for name, value in groups["light"].items()
    ))  # fmt: skip
    print(f"{'':14}" + "".join(f"{f'{way}, {group}':>28}" for group in groups for way in ways))
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B"):
        cells = []
        for changes, rank in ((changes, rank) for changes in groups.values() for rank in ways.values()):
            settings = defaults | changes
            with torch.device("meta"):
                config = configuration(*SHAPES[name], tied=name != "Qwen2.5-7B")
                model = transformers.AutoModelForCausalLM.from_config(config)
            if rank:
                llms.add_lora(model, rank, settings["LORA_ALPHA"])
            budgets = settings["CACHE_TOKENS"], settings["TOKEN_BUDGET"]  # an evaluation fills the cache
            needed = [memory(model, (not (rank and n == 1), False), *budgets, True, True, n) for n in (1, 8, 16)]
            cells.append(" / ".join(f"{size:.0f}" for size in needed))
        print(f"{name:14}" + "".join(f"{cell:>28}" for cell in cells))


def race(goal=0.9, seeds=(0, 1, 2)):
    """Seconds of training until the greedy accuracy of the default task reaches the goal; tests are not counted."""
    print(f"seconds of training, steps and sampled tokens until the greedy accuracy is {goal}, seeds {seeds}")
    script = [sys.executable, str(Path(__file__).parent.parent / "main.py")]
    subprocess.run(
        [*script, "--evaluate", "tiny", "--eval_questions", "1"], check=True, capture_output=True
    )  # build it
    for name, flags in RACES.items():
        results = []
        for seed in seeds:
            folder = Path("runs") / "race"
            command = f"--run race --seed {seed} --eval_every 2 --show_every 0 {flags}".split()
            with subprocess.Popen([*script, *command], stdout=subprocess.PIPE, text=True) as process:
                accuracies = (float(line.split("accuracy")[1].split()[0]) for line in process.stdout if "TEST" in line)
                reached = any(accuracy >= goal for accuracy in accuracies)
                process.kill()
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
            shutil.rmtree(folder)
            last = min(row["step"] for row in rows if row.get("eval/accuracy", 0) >= goal) if reached else math.inf
            steps = [row for row in rows if "reward" in row and row["step"] <= last]
            results.append((sum(row["seconds"] for row in steps), len(steps), steps[-1]["tokens"], reached))
        cells = [f"{s:.1f} s, {n} steps, {t / 1000:.0f} k tokens" if ok else "never" for s, n, t, ok in results]
        print(f"{name:58}" + "".join(f"{cell:>32}" for cell in cells), flush=True)


def run():
    sections = ("rollout", "update", "precision", "step", "growth", "memory", "lora", "fits", "race")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("section", nargs="*", choices=[[], *sections], help="what to measure; all of it by default")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)  # the child process
    arguments = parser.parse_args()
    if arguments.measure:
        what, how, *sizes = arguments.measure
        if what == "step":
            print(json.dumps(step(how, sizes[0], *map(int, sizes[1:]))))
        else:
            print(json.dumps(lora(how) if what == "lora" else score(how, int(sizes[0]))))
        return
    chosen = arguments.section or sections
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    shape = "Qwen2.5-1.5B" if on_gpu else "small"
    if "rollout" in chosen:
        rollout(shape, *((8, 16, 512) if on_gpu else (4, 16, 128)))
    if "update" in chosen:
        packing(shape)
        if on_gpu:
            update_share(shape)
    if "precision" in chosen and not on_gpu:
        precisions(shape)
    if "step" in chosen:
        compare_steps(
            "a GRPO step, ragged lengths",
            [(shape, 8, 16, 512) if on_gpu else (shape, 4, 16, 128)],
            2**17 if on_gpu else 2**14,
        )
    if "growth" in chosen:
        grown = [(4, 8, 64), (16, 8, 64), (4, 32, 64), (4, 8, 256)]
        cases = [("smaller", *sizes) for sizes in grown] + [("large vocabulary", *grown[0])]
        compare_steps("growth: a smaller model, then more questions, outputs, tokens, vocabulary", cases, 2048)
    if "memory" in chosen and not on_gpu:
        measure_memory()
    if "lora" in chosen and not on_gpu:
        measure_lora()
    if "fits" in chosen:
        fits()
    if "race" in chosen and not on_gpu:
        race()


if __name__ == "__main__":
    run()
