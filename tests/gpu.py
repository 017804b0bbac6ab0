"""What only a GPU can show, with random weights of the shape of Qwen2.5-1.5B: python tests/gpu.py [NUMBER …]

Each check prints a line: its number and name, the figures that show it, its seconds. All of them are meant to take ten
minutes on an H100 or H200; nothing is downloaded.
"""

import argparse
import contextlib
import gc
import io
import logging
import re
import sys
import tempfile
import time
from pathlib import Path

import benchmark
import faults
import reference
import torch
import transformers

import llms
import main
import rldatasets

SHAPE, GPU = "Qwen2.5-1.5B", torch.device("cuda")
VOCABULARY = benchmark.SHAPES[SHAPE][-1]
ENDS = list(range(1000, 1560))  # so many end tokens that a random model's outputs have about 270 tokens
MORE_ENDS = list(range(1000, 3000))  # about 75 tokens
WORDS, DEFAULTS, LIMITS = benchmark.Words(), main.settings(), dict(llms.LIMITS)
LORA = "--lora_rank 32 --gradient_checkpointing --learning_rate 2e-5 --group_size 16 --cache_tokens 131072"  # README
TINY = "--model model --dataset arithmetic --questions_per_step 8 --group_size 8 --max_new_tokens 64 --eval_questions 8"

# ---- what the checks share -----------------------------------------------------------------------------------------


def random_model(*shape, on_cpu=benchmark.random_model):
    """The benchmark's random model, but its weights are drawn on the GPU: a CPU takes half a minute."""
    with GPU:
        return on_cpu(*shape)


def policy(ends=ENDS):
    model = benchmark.ours(SHAPE)
    model.generation_config.eos_token_id = ends
    return model


def settings(**values):
    """Write the constants of main.py: its defaults, which are for models of this size, but for some values."""
    main.__dict__.update(DEFAULTS | values)


def new_state(folder=None):
    """A state of main.py; its tokenizer has a text for the first few tokens, and none for the others."""
    prompts = [messages for messages, _ in rldatasets.tiny_corpus(0, 200)[1]]
    tokenizer = llms.tiny_tokenizer([message["content"] for messages in prompts for message in messages])
    return main.new_state(policy(), tokenizer, folder and Path(folder))


def trained(steps, **values):
    """A state after some steps as main.py makes them, on arithmetic, and their metrics."""
    settings(DATASET="arithmetic", STEPS=steps, **values)
    memory = lambda: {"reserved": torch.cuda.memory_reserved() / 1e9, "free": torch.cuda.mem_get_info()[0] / 1e9}
    with tempfile.TemporaryDirectory() as folder:
        state, rows = new_state(folder), []
        main.train(state, lambda state, row: rows.append(row | memory()))
    budgets = {"token_budget": main.TOKEN_BUDGET, "cache_tokens": main.CACHE_TOKENS, "copies_kept": 1}
    assert llms.LIMITS == budgets, f"out of memory: the limits are {llms.LIMITS}"
    return state, rows


def sampled(model, temperature=1.0):
    """192 outputs in 64 slots of the cache: where some end, others begin."""
    llms.LIMITS["cache_tokens"] = 64 * 512
    generator = torch.Generator().manual_seed(0)
    return llms.sample(model, WORDS, benchmark.questions(24, VOCABULARY), 8, 200, temperature, generator)


def same_tokens(found, expected):
    """The largest difference between the log π of two rollouts, which must have the same tokens."""
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.mask, expected.mask), "the tokens differ"
    return (found.logp - expected.logp).abs().max().item()


def difference(found, expected):
    """The largest difference between two tensors, as a share of the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def ready_to_decode():
    """64 outputs of two tokens, of which any number can follow."""
    decoding = llms.decoding_batch(policy(), llms.Size(64, 64, 256, 64), ENDS)
    decoding.reset(1.0, torch.rand(64, 64))
    decoding.prefill(benchmark.questions(8, VOCABULARY), 8)
    decoding.decode_step(64, 256)
    return decoding


def cap(size):
    """Let this process have so many bytes of the GPU's memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)


def put_back():
    """Undo what a check may have changed, and free its memory."""
    llms.PRECISION = "auto"
    llms.LIMITS.update(LIMITS)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    llms.free_copies()


# ---- the checks ----------------------------------------------------------------------------------------------------


def setting():
    """bf16, memory in segments that can grow, no attention by cuDNN."""
    block = torch.empty(2**26, device=GPU)
    segments = [part for part in torch.cuda.memory_snapshot() if part["total_size"] >= block.nbytes]
    assert all(part["is_expandable"] for part in segments), "segments of memory cannot grow"
    assert llms.in_bf16(GPU) and not torch.backends.cuda.cudnn_sdp_enabled(), "no bf16, or cuDNN"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}"
    return f"{llms.device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB, {versions}"


@torch.no_grad()
def no_waiting():
    """The CPU does not wait for the GPU within a decode step, which can be recorded only so."""
    decoding = ready_to_decode()
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.suppress(RuntimeError):
        decoding.length.max().item()
        raise AssertionError("waiting is not noticed")
    for decoding.temperature in (0.0, 1.0):
        decoding.decode_step(64, 256)
    return "no synchronisation at T = 0 and 1"


def kernels(work):
    """What work() returns, and the names of its attention kernels: none may be cuDNN's or a softmax by itself."""
    with torch.profiler.profile() as profiler:
        result = work()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    others = [name[:150] for name in names if "cudnn" in name or "softmax" in name.lower()]
    assert not others, f"not a fused attention: {others[0]}"
    return result, sorted(set(re.findall(r"flash_fwd|flash_bwd|fmha_cutlass[FB]", " ".join(names))))


def packed(device, dtype):
    """The attention of a packed batch of random numbers, and the gradients of queries, keys and values."""
    groups = [([0] * 100, [[0] * 50, [0] * 7, [0] * 129]), ([0] * 61, [[0] * 33, [0] * 2])]
    layout, generator = llms.PackedBatch(groups, device), torch.Generator().manual_seed(0)
    shapes = [(1, heads, layout.ids.shape[1], 128) for heads in (12, 2, 2)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().to(device, dtype) for shape in shapes]
    out = layout.attention(0, *(x.requires_grad_() for x in inputs), None)
    out.float().square().sum().backward()
    return [x.detach().float().cpu() for x in (out, *(x.grad for x in inputs))]


def attention():
    """Attention is a fused kernel, forward and backward, and close to fp32."""
    found, of_packed = kernels(lambda: packed(GPU, torch.bfloat16))
    error = max(map(difference, found, packed("cpu", torch.float32)))
    decoding, seen, attend = ready_to_decode(), [], llms.KVCache.attention
    cache = decoding.cache
    cache.attention = lambda *inputs: seen.append(inputs) or attend(cache, *inputs)
    with torch.no_grad():
        decoding.decode_step(64, 256)
        (layer, query, _, _, scaling), (slots, _, _, width) = seen[0], cache.bias.shape
        found, of_decoding = kernels(lambda: attend(cache, *seen[0]))
        keys, values = (x[:slots, :, :width].float() for x in cache.layers[layer])  # with those of the newest tokens
        scores = query.float().unflatten(1, (2, 6)).squeeze(3) @ keys.mT * scaling + cache.bias.float()
        error = max(error, difference(found.float(), (scores.softmax(-1) @ values).flatten(1, 2)[:, None]))
    figures = f"packed: {', '.join(of_packed)}; decoding: {', '.join(of_decoding)}; error {error:.4f}"
    assert len(of_packed) >= 2 and of_decoding and error < 2e-2, figures
    return figures


def recording():
    """Replayed steps sample what eager steps sample, while outputs end and begin."""
    model, figures = policy(MORE_ENDS), []
    for temperature in (0.0, 1.0):
        replayed, decoding = sampled(model, temperature), llms.DECODING[model]
        count, decoding.graphs = len(decoding.graphs), {}
        decoding.recordable = False
        error = same_tokens(sampled(model, temperature), replayed)
        decoding.recordable = True
        longest = replayed.mask.shape[1]
        figures.append(f"T = {temperature:.0f}: {count} graphs, {longest} tokens, log π within {error:.1g}")
        assert count and longest >= 64 and error < 1e-3, figures[-1]
    return "; ".join(figures)


def renewal():
    """Graphs recorded before an update sample from the weights after it."""
    model = policy(MORE_ENDS)
    before, decoding = sampled(model), llms.DECODING[model]
    graphs = decoding.graphs.copy()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    renewed = sampled(model)
    again = llms.DECODING[model] is decoding
    again = again and all(decoding.graphs[kind] is graph for kind, graph in graphs.items())
    assert graphs and again, "the graphs were not used again"
    llms.free_copies()
    error = same_tokens(renewed, sampled(model))
    assert error < 1e-3 and not torch.equal(renewed.ids, before.ids), f"{error:.1g}, or the tokens are those of before"
    return f"{len(graphs)} graphs used again, log π within {error:.1g} of a fresh copy, other tokens than before"


def full_precision():
    """In fp32 sampling is the plain loop, and log π and its gradient are those of all logits."""
    llms.PRECISION = "fp32"
    model, seed, results = policy(MORE_ENDS), torch.Generator().manual_seed, []
    with torch.no_grad():
        model.model.norm.weight.mul_(3)  # a random model is almost uniform: sharpen it, so that mistakes show
    plain, prompts = reference.plain(model), benchmark.questions(2, VOCABULARY)
    rollout = llms.sample(model, WORDS, prompts, 4, 48, 1.0, seed(0))
    ids, attention, mask, T = *rollout[:3], rollout.mask.shape[1]
    with torch.no_grad():  # the random number of each token lies where the cumulative sum passes it
        pi = plain(**reference.padded_inputs(ids, attention)).logits[:, -T - 1 : -1].double().softmax(2)  # [N, T, V]
        upper, chosen = (x.gather(2, ids[:, -T:, None]).squeeze(2) for x in (pi.cumsum(2), pi))
        uniform = torch.rand(8, 48, generator=seed(0))[:, :T].to(pi)
        miss = torch.maximum(upper - chosen - uniform, uniform - upper)[mask].max().item()
    weights = torch.randn(mask.shape, generator=seed(1)).to(GPU)
    for network, read in ((model, llms.token_logprobs), (plain, reference.token_logprobs)):
        results.append(read(network, ids, attention, mask, 1.0))
        (results[-1] * weights).sum().backward()
    logs = max((x - results[1]).abs().max().item() for x in (rollout.logp, results[0]))
    gradients = max(difference(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()))
    figures = f"from the plain loop: tokens {max(0, miss):.1g}, log π {logs:.1g}, gradients {gradients:.1g}"
    assert miss < 2e-5 and logs < 1e-4 and gradients < 1e-4, figures
    return figures


def first_step():
    """At the first step π_θ is π_ref to the last bit, and what was sampled is what is scored, nearly."""
    settings(GROUP_SIZE=16, MAX_NEW_TOKENS=512)
    state = new_state()
    state.reference = llms.frozen_copy(state.policy)
    rollout = benchmark.sample(state, benchmark.questions(4, VOCABULARY))
    logp_ref = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
    row = main.update(state, rollout, torch.randn(64), None, logp_ref)
    figures = f"KL {row['kl']:g}, sampler_gap {row['sampler_gap']:.4f}, at most {row['sampler_gap_max']:.3f}"
    assert row["kl"] == row["kl_log_ratio_max"] == row["skipped_updates"] == 0 <= row["sampler_gap"] < 0.01, figures
    return figures


def program():
    """main.py from outside, with a model that learnt little: --test; a run killed after 3 of 6 steps and resumed."""
    flags, more = TINY.split(), ("--run", "killed", "--steps", "6", "--save_every", "2")
    with tempfile.TemporaryDirectory() as folder:
        work, run = Path(folder), Path(folder) / "runs" / "killed"
        llms.build_tiny(work / "model", rldatasets.tiny_corpus(200, 100))
        said = faults.succeeds(faults.Program(work, *flags, "--test"))
        killed = faults.Program(work, *flags, *more).after(3, run).kill()
        before = [row for row in faults.rows(run / "metrics.jsonl") if "reward" in row][:3]
        said += faults.succeeds(faults.Program(work, "--resume", "runs/killed"))
        after = [row for row in faults.rows(run / "metrics.jsonl") if "reward" in row]
    assert killed and [row["step"] for row in after] == [1, 2, 3, 4, 5, 6], f"steps {[row['step'] for row in after]}"
    assert "without CUDA graphs" not in said, "steps are not recorded"
    keys = ("reward", "length", "entropy", "kl")  # from forward passes: a backward pass adds up in any order
    other = [key for key in keys if any(a[key] != b[key] for a, b in zip(before, after))]
    assert not other, f"step 3 was done again with another {other[0]}"
    return f"--test succeeds; killed and resumed, step 3 has the same reward {after[2]['reward']:.4f} and KL"


def three_steps():
    """Three steps at the defaults: their time, and memory that neither grows nor lies idle."""
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    _, rows = trained(3)
    retries, last = torch.cuda.memory_stats()["num_alloc_retries"] - retries, rows[-1]
    most = max(row["memory"] for row in rows)
    parts = ", ".join(f"{part} {last[f'seconds/{part}']:.1f}" for part in ("sample", "reward", "logprobs", "update"))
    sizes = f"GB allocated {most:.1f}, reserved {last['reserved']:.1f}, free {rows[1]['free']:.1f}, {last['free']:.1f}"
    figures = f"seconds {last['seconds']:.1f}: {parts}; {last['length']:.0f} tokens each; {sizes}; {retries} retries"
    assert not retries and most <= 70 and last["reserved"] < 1.15 * most, figures
    assert abs(last["free"] - rows[1]["free"]) < 1, figures
    return figures


def speed():
    """Tokens per second beside `generate`, and shares of what the GPU can do."""
    settings()
    mine, library, figures, generator = benchmark.ours(SHAPE), benchmark.library_model(SHAPE), [], torch.Generator()
    benchmark.generate(library, benchmark.questions(4, VOCABULARY), 16, 4)  # a warm-up
    for rows in (64, 384, 1024):
        prompts, times = benchmark.questions(rows // 16, VOCABULARY), []
        for _ in range(2):  # the first is a warm-up
            times.append(benchmark.clock())
            tokens = int(llms.sample(mine, WORDS, prompts, 16, 128, 1.0, generator).mask.sum())
        times.append(benchmark.clock())
        others = int(benchmark.generate(library, prompts, 16, 128)[1].sum()) / (benchmark.clock() - times[2])
        ours = tokens / (times[2] - times[1])
        share = benchmark.bandwidth_share(mine, rows, 128, ours)
        figures.append(f"{rows} rows: {ours:,.0f} t/s, {ours / others:.1f} × generate, {share:.0%} of the bandwidth")
        assert ours > others and (share > 0.1 or rows != 384), figures[-1]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        benchmark.update_share(SHAPE)
    figures.append(said.getvalue().strip())
    assert int(re.search(r"(\d+) % of the limit", figures[-1])[1]) > 10, figures[-1]
    return "; ".join(figures)


def in_parts():
    """The token budget that is left of 8192 with too little memory, and how far the gradient is from the whole."""
    llms.PRECISION = "fp32"  # bf16 would round the gradient of every part
    settings(BETA=0.0, TOKEN_BUDGET=8192)
    state, advantages, gradients = new_state(), torch.randn(16), []
    prompts = [prompt for prompt in benchmark.questions(2, VOCABULARY) for _ in range(8)]
    rollout = benchmark.given(prompts, torch.randint(2, 9999, (16, 300)).tolist(), state.policy, 8)
    inputs = (state, rollout, advantages, None, None, main.grpo_loss, None)
    llms.peak_memory()  # forgets the peak
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        main.backward(*inputs)
        gradients.append([weight.grad for weight in state.policy.parameters()])
        cap(torch.cuda.memory_allocated() + 0.6 * (1e9 * llms.peak_memory() - before))  # the second has less
    return llms.LIMITS["token_budget"], max(map(difference, *gradients))


def little_memory():
    """Short of memory, budgets halve and the gradient stays; the README's LoRA command runs in 24 GB."""
    token_budget, error = in_parts()
    put_back()
    cap(23e9)  # CUDA itself needs some, too
    state, rows = trained(1, **main.parse(LORA.split())[1])
    llms.LIMITS["cache_tokens"], main.MAX_NEW_TOKENS = 2**20, 412
    state.policy.generation_config.eos_token_id = MORE_ENDS
    rollout = benchmark.sample(state, benchmark.questions(16, VOCABULARY))
    cache, outputs = llms.LIMITS["cache_tokens"], len(rollout.texts)
    figures = f"token budget 8192 → {token_budget}, gradient within {error:.1g}; cache tokens 1048576 → {cache}; "
    figures += f"LoRA {rows[0]['memory']:.1f} GB"
    assert token_budget < 8192 and error < 1e-3 and cache < 2**20 and outputs == 1024, figures
    return figures


def checkpoint():
    """Saved and loaded, all weights, Adam's moments and the reference are the same, also after one more step."""
    settings()
    with tempfile.TemporaryDirectory() as folder:
        states = [new_state(folder) for _ in range(2)]
        states[0].reference, states[0].step = llms.frozen_copy(states[0].policy), 1
        made_up_update(states[0])
        times = [benchmark.clock()]
        main.save_checkpoint(states[0])
        times.append(benchmark.clock())
        states[0].writer.wait()
        times.append(benchmark.clock())
        main.load_checkpoint(states[1])
        times.append(benchmark.clock())
        size = (Path(folder) / "checkpoint" / "state.safetensors").stat().st_size / 1e9
    for _ in range(2):
        saved, loaded = (llms.named_tensors(one.networks(), one.optimizer, one.generator) for one in states)
        other = [name for name, x in saved.items() if x.device != loaded[name].device or not x.equal(loaded[name])]
        assert not other, f"{len(other)} of {len(saved)} tensors are not as saved, or not where: {other[0]} …"
        for state in states:
            made_up_update(state)
    seconds = "copied in {:.0f} s, written in {:.0f} s, loaded in {:.0f} s".format(
        *(b - a for a, b in zip(times, times[1:]))
    )
    return f"{len(saved)} tensors, {size:.1f} GB: {seconds}, the same, also after one more update"


def made_up_update(state):
    torch.manual_seed(1)
    for weight in state.policy.parameters():
        weight.grad = torch.randn_like(weight)
    state.optimizer.step()
    state.optimizer.zero_grad()


CHECKS = (setting, no_waiting, attention, recording, renewal, full_precision, first_step, program, three_steps, speed)
CHECKS = dict(enumerate((*CHECKS, little_memory, checkpoint), 1))


def run():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("number", nargs="*", type=int, choices=[[], *CHECKS], help="of a check; none: all of them")
    chosen, failed = parser.parse_args().number or CHECKS, False
    if not torch.cuda.is_available():
        print("no GPU here: nothing to do")
        return 0
    benchmark.random_model = random_model
    for number in chosen:
        began = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what the program says meanwhile
                figures = CHECKS[number]()
        except Exception as error:
            logging.getLogger("gpu").exception("check %d", number)
            failed, figures = True, f"FAILED: {(str(error).strip() or repr(error)).splitlines()[0]}"
        name, seconds = CHECKS[number].__name__.replace("_", " "), time.perf_counter() - began
        print(f"{number:2}  {name:14}  {figures}  ({seconds:.0f} s)", flush=True)
        put_back()
    return int(failed)


if __name__ == "__main__":
    sys.exit(run())
