"""GRPO by hand: DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), Algorithm 1, on verifiable rewards.

    python main.py                                        a tiny model learns arithmetic, any laptop, no download
    python main.py --model Qwen/Qwen2.5-1.5B-Instruct     GSM8K on one 80 GB GPU
    python main.py --algorithm ppo                        or another row of Table 10: sft, rft, dpo, online_rft
    torchrun --nproc_per_node 8 main.py --model …         the same on 8 GPUs
    python main.py --resume runs/NAME                     go on from the newest checkpoint
    python main.py --evaluate A [--against B]             test one model, or two on the same questions

Read downwards: the constants, the advantages, the objective, one update, rewards, evaluation, what is written to disk,
Algorithm 1 with its line numbers, and last the other methods of Table 10. The names are the paper's:

    paper             code                              shape
    q                 problems[i]["question"]           Q questions per step
    o_i, |o_i|        rollout.ids, mask.sum(1)          [N, P + T], [N]; N = Q·G outputs, T tokens the longest
    r_i               rewards                           [Q, G]
    Â_{i,t}           advantages                        [N] where all t share one (§4.1.2), [N, T] by steps (§4.1.3)
    log π_θ, π_θold   logp, logp_old                    [N, T], of the sampled tokens
    log π_ref         logp_ref                          [N, T]
    G, μ, ε, β        GROUP_SIZE, MU, EPSILON_*, BETA

Where this leaves the paper, and the edit that goes back:
1. the reward is a rule, or a network that stays as it is, so line 12 of Algorithm 1 has nothing to train;
2. std(r) is unbiased and has 1e-4 added; a group of equal rewards gets exactly 0. The paper says neither way;
3. π_θ, π_θold and π_ref are all read at the sampling temperature (TEMPERATURE = 1.0 makes no difference);
4. the order of the questions, the warm-up, AdamW's betas and the clipping of the gradient are ours; it is silent.
"""

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import evaluator
import llms
import rldatasets
from plots import plot

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# ==== Constants =====================================================================================================
# Each is also a flag of the same name (--group_size 8) with its comment as help. The values are for
# Qwen2.5-1.5B-Instruct on GSM8K on one 80 GB GPU, the paper's (§4.2) wherever it gives one.

# -- Model and data
MODEL = "tiny"  # π_θinit: a hub name, a folder, or tiny (built here, with the settings of TINY below)
DATASET = "gsm8k"  # D: a name, file or folder, or stages task[:difficulty]:steps with commas (logic:1:100,gsm8k:400)
EVAL_DATASET = ""  # the questions to test on, or several with commas; empty: the test split of DATASET
RUN = ""  # name of the run's folder under runs/; empty: model, data set and a number
SEED = 0  # of the order of the questions and of all sampling
LORA_RANK = 0  # r of an adapter beside every linear layer of the trunk, which alone is trained; 0: all weights are
LORA_ALPHA = 64.0  # α, the adapter counts α/r: higher is a higher learning rate, which LoRA bears (1e-5 and above)
GRADIENT_CHECKPOINTING = False  # keep one hidden state per layer for the way back: a third slower, far less memory
# -- Algorithm 1
ALGORITHM = "grpo"  # the row of Table 10: sft, rft, dpo, online_rft, ppo or grpo
ITERATIONS = 1  # I, outer iterations, each beginning with π_ref ← π_θ (paper: 1, in Figure 6 up to 2)
STEPS = 467  # M, steps per iteration (467 × 16 questions: one pass over GSM8K)
QUESTIONS_PER_STEP = 16  # questions per step; 16 × 64 outputs are the paper's batch of 1024
GROUP_SIZE = 64  # G, outputs per question (paper: 64): fewer are cheaper and noisier; sft has the one solution
MU = 1  # μ, updates per rollout (paper: 1): more reuse the samples and rely on the clip
# -- Sampling
TEMPERATURE = 1.0  # T, divides the logits in sampling and scoring alike: lower explores less
MAX_NEW_TOKENS = 1024  # the longest output (paper: 1024); also the L of the constant denominator
MAX_PROMPT_TOKENS = 512  # a training question with a longer prompt is skipped and counted, never cut
CACHE_TOKENS = 524288  # tokens in the key-value cache at once while sampling: lower it when sampling runs out of memory
# -- Objective, eq. (3) and (4)
BASELINE = "group"  # what an output is compared with: the mean of its group (paper), or of the others in it (RLOO)
EPSILON_LOW = 0.2  # ε below: the ratio is clipped at 1 - ε (paper: not stated; PPO 0.2)
EPSILON_HIGH = 0.2  # ε above: the ratio is clipped at 1 + ε (DAPO raises it to 0.28)
BETA = 0.04  # β, weight of the KL (paper: 0.04): 0 frees the policy; only grpo and ppo use it
KL = "k3"  # estimator of the KL: k3 is eq. (4); k1 has no gradient on average; k2 has that of the reverse KL
DENOMINATOR = "sequence"  # of a token: sequence |o_i| (paper), token Σ|o_i| (DAPO), constant L (Dr. GRPO)
SCALE_BY_STD = True  # divide the advantage by the group's std (paper: true; Dr. GRPO: false)
RATIO = "token"  # π_θ/π_θold per token (paper), or one per sequence (GSPO)
MASK_TRUNCATED = False  # leave outputs that hit the length limit out of the loss (DAPO's filter)
DROP_ZERO_ADVANTAGE = False  # leave out outputs with Â = 0 for β > 0 too, and their KL with them; at β = 0 always done
# -- Rewards: the weight of each in r_i
SUPERVISION = "outcome"  # a reward for the whole output (outcome, §4.1.2), or also one for each step (process, §4.1.3)
WEIGHT_STEPS = 0.5  # of the steps' advantages beside the output's own, under process supervision
WEIGHT_CORRECTNESS = 2.0  # the answer is right
WEIGHT_INTEGER = 0.5  # the answer is a whole number
WEIGHT_STRICT_FORMAT = 0.5  # the asked form to the letter
WEIGHT_SOFT_FORMAT = 0.5  # reasoning, then answer, on any lines
WEIGHT_TAG_COUNT = 0.5  # the share of the four tags that stand there once
WEIGHT_TESTS = 1.0  # the share of its tests that a program passes
WEIGHT_COMPILES = 0.5  # the program compiles, without a warning
WEIGHT_OVERLONG = 0.0  # DAPO's soft penalty of length, from 0 down to -1 at the limit
OVERLONG_SHARE = 0.2  # the last part of MAX_NEW_TOKENS, over which that penalty falls (DAPO: 4096 of 20480 tokens)
WEIGHT_SAFETY = 0.0  # nothing of a short list of threats and insults is said
REWARD_MODEL = ""  # a sequence classifier, hub name or folder, that scores every output; empty: the rules alone
WEIGHT_REWARD_MODEL = 1.0  # its score, standardised over the outputs of a step
# -- Optimisation
LEARNING_RATE = 1e-6  # of AdamW (paper: 1e-6)
WARMUP = 10  # updates over which the learning rate rises from 0
SCHEDULE = "constant"  # after the warm-up: constant, linear or cosine (the last two fall to 0)
ADAM_BETA1 = 0.9  # decay of AdamW's mean of the gradient
ADAM_BETA2 = 0.99  # decay of AdamW's mean of its square: 0.999 remembers longer than most runs last
WEIGHT_DECAY = 0.0  # of AdamW
MAX_GRAD_NORM = 1.0  # the gradient's global norm is clipped here
TOKEN_BUDGET = 8192  # tokens per micro-batch, as if padded: memory only, the gradient is the same for any split
# -- The other methods of Table 10
BETA_DPO = 2.0  # β of DPO, eq. (12): larger than the KL's, for it weighs log-ratios that are means over an output
GAMMA = 1.0  # γ of PPO's advantages: below 1, what comes late counts less
LAMBDA = 1.0  # λ of PPO's advantages (GAE): below 1 they rely more on the value function, and vary less
EPSILON_VALUE = 0.2  # PPO's values are clipped at ± this around those the step began with
# -- Evaluation
EVAL_EVERY = 50  # steps between evaluations; there is always one before the first step and one after the last
EVAL_QUESTIONS = 0  # how many test questions; 0: all of the split
EVAL_SAMPLES = 0  # k: also draw k outputs per test question for pass@k and maj@k; 0: greedy only
EVAL_TEMPERATURE = 0.7  # of those k outputs (paper, Figure 7: 0.7)
# -- Bookkeeping
SAVE_EVERY = 25  # steps between checkpoints
SHOW_EVERY = 10  # steps between completions printed in full; 0: none
TENSORBOARD = False  # also write the metrics where TensorBoard reads them (pip install tensorboard)
# -- End of the constants

# What differs for --model tiny; flags win over these, these over the block above.
TINY = {
    "DATASET": "arithmetic",
    "STEPS": 150,
    "GROUP_SIZE": 8,
    "MAX_NEW_TOKENS": 64,
    "LEARNING_RATE": 4e-4,
    "SCHEDULE": "linear",
    "TOKEN_BUDGET": 16384,
    "EVAL_EVERY": 20,
    "EVAL_QUESTIONS": 200,
    "SHOW_EVERY": 20,
}


class SettingsError(ValueError):
    """What is wrong with the settings or the run folder, in one line."""


class RunError(RuntimeError):
    """Why a run ended before its time, in one line."""


# ==== The advantages, §4.1.2 and §4.1.3 =============================================================================


def group_advantages(rewards):
    """Group-relative advantages: Â_i = (r_i - mean(r)) / std(r) over the G outputs of each question (§4.1.2).

    rewards [Q, G] -> [Q, G], fp32 at least. Rewards 1, 0, 0, 0 give 1.5, -0.5, -0.5, -0.5. The std is unbiased, 1e-4
    is added; where all rewards of a group are equal the result is exactly 0, not the rounding error over 1e-4. With
    BASELINE = "others" an output is not part of the mean that it is compared with (RLOO).
    """
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    advantages = rewards - rewards.mean(1, keepdim=True)  # [Q, G]
    if BASELINE == "others":  # r_i less the mean of the G - 1 others, arXiv 2402.14740
        advantages = advantages * rewards.shape[1] / (rewards.shape[1] - 1)  # [Q, G]
    if SCALE_BY_STD:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)  # [Q, G]
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # [Q, 1]
    return advantages.masked_fill(all_equal, 0.0)


def process_advantages(step_rewards, step_ends):
    """Advantages of process supervision: Â_{i,t} = Σ_{index(j) ≥ t} r̃_i^{index(j)}, the steps that end at t or later.

    step_rewards [Q, G, T] -> [Q, G, T], with the reward of a step where step_ends is True, on its last token. r̃ is
    normalised like the rewards above, over all steps of the group together; tokens behind the last step get 0 (§4.1.3).
    """
    advantages = torch.zeros(step_rewards.shape, dtype=torch.promote_types(step_rewards.dtype, torch.float32))
    for question, ends in enumerate(step_ends):
        if ends.sum() > 1:  # one step has none to be compared with
            advantages[question][ends] = group_advantages(step_rewards[question][ends][None])[0]  # [K_1 + … + K_G]
    return advantages.flip(-1).cumsum(-1).flip(-1)  # [Q, G, T]


# ==== The objective, eq. (3) and (4) ================================================================================


def importance_ratio(logp, logp_old, mask):
    """π_θ/π_θold: of each token, [N, T], or with RATIO = "sequence" their geometric mean (GSPO), [N, 1]."""
    log_ratio = logp - logp_old  # [N, T]
    if RATIO == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    return log_ratio.exp()


def clipped_objective(logp, logp_old, A, mask):
    """min( ρ Â, clip(ρ, 1 - ε, 1 + ε) Â ) with ρ = π_θ / π_θold, of eq. (1) and (3), for each token: [N, T]."""
    ratio = importance_ratio(logp, logp_old, mask)  # [N, T]
    clipped = ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)  # [N, T]
    return torch.minimum(ratio * A, clipped * A)  # [N, T]


def kl_estimate(logp, logp_ref):
    """D_KL[π_θ ‖ π_ref] of each sampled token, [N, T]: eq. (4), or one of Schulman's other two estimators (KL).

    As a loss they differ: ∇k3 is on average the gradient of the forward KL[π_ref ‖ π_θ], ∇k2 that of the reverse KL,
    and ∇k1 is on average zero.
    """
    d = logp_ref - logp  # log(π_ref / π_θ)
    if KL == "k1":
        return -d
    if KL == "k2":
        return d.square() / 2
    return torch.expm1(d) - d  # π_ref/π_θ - log(π_ref/π_θ) - 1, never negative: expm1 is exact where exp(d) - 1 is not


def mean_over_outputs(x, mask, num_sequences, num_tokens):
    """1/G Σ_i 1/|o_i| Σ_t x_{i,t} of eq. (3), over the outputs of all Q questions, or as DENOMINATOR says: a scalar."""
    if DENOMINATOR == "sequence":
        divisor = num_sequences * mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]  N |o_i|
    elif DENOMINATOR == "token":
        divisor = num_tokens
    else:  # "constant"
        divisor = num_sequences * MAX_NEW_TOKENS
    return (x * mask / divisor).sum()


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, num_sequences=None, num_tokens=None):
    """Minus the objective of eq. (3), with the KL of eq. (4): a scalar that is to go down.

    logp, logp_old, logp_ref  [N, T]         log π_θ, log π_θold, log π_ref of each token; logp_ref unread if β = 0
    advantages                [N] or [N, T]  Â_i for all tokens of output i, or Â_{i,t}
    mask                      [N, T]         1 on the |o_i| tokens of output i, the end token included
    num_sequences, num_tokens                N = Q·G and Σ|o_i| of the whole update, where these rows are one part of
                                             it: the losses of all its parts then add up to the loss of the whole
    """
    mask = mask.bool()
    num_sequences = len(mask) if num_sequences is None else num_sequences
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
    # whatever stands in padded cells, even nan, must not matter: 0 · nan would be nan
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    logp, logp_old, A = (torch.where(mask, x, 0.0) for x in (logp, logp_old, advantages))  # [N, T]

    objective = clipped_objective(logp, logp_old, A, mask)  # [N, T]
    if BETA:  # - β D_KL, outside the min, D_KL by eq. (4)
        objective = objective - BETA * kl_estimate(logp, torch.where(mask, logp_ref, 0.0))  # [N, T]
    return -mean_over_outputs(objective, mask, num_sequences, num_tokens)


# ==== One update: line 11 ===========================================================================================
# Line 11 says "by maximising the GRPO objective (Equation 21)". Equation (21) is the objective's gradient coefficient,
# Â + β (π_ref/π_θ - 1), and holds where π_θold = π_θ; what is maximised is eq. (3), whose gradient there is (21).


def repeats(ids, attention, mask):
    P = ids.shape[1] - mask.shape[1]
    prompts = torch.where(attention[:, :P] > 0, ids[:, :P], -1)
    return [False, *((prompts[1:] == prompts[:-1]).all(1) & (mask.shape[1] > 0)).tolist()]


def micro_batches(rollout, rows):
    """Split row numbers into lists, none of which takes more than TOKEN_BUDGET if it were padded.

    The outputs of a question stay together, longest first: they share the computation of their prompt.
    """
    completions = rollout.mask.sum(1).tolist()
    prompts = (rollout.attention.sum(1) - rollout.mask.sum(1)).tolist()
    question = list(itertools.accumulate(not again for again in repeats(*rollout[:3])))
    longest = defaultdict(int)  # tokens in the longest row of a question
    for row in rows:
        longest[question[row]] = max(longest[question[row]], prompts[row] + completions[row])
    batches = []
    for row in sorted(rows, key=lambda row: (-longest[question[row]], question[row], -completions[row])):
        bigger = [*batches[-1], row] if batches else [row]
        width = max(prompts[i] for i in bigger) + max(completions[i] for i in bigger)
        if batches and len(bigger) * width <= TOKEN_BUDGET:
            batches[-1] = bigger
        else:
            batches.append([row])
    return batches


def log_policy(model, ids, attention, mask):
    """log π of every completion token under a model, at the sampling temperature: [N, T]."""
    return llms.token_logprobs(model, ids, attention, mask, TEMPERATURE)


@torch.no_grad()
def score(model, rollout, read=log_policy):
    """log π, or what else to `read`, of every token of a rollout under a model, without gradient: [N, T]."""

    def in_parts():
        batches = micro_batches(rollout, range(len(rollout.mask)))
        return batches, [read(model, *rollout.rows(rows)) for rows, _ in llms.lockstep(batches)]

    batches, parts = within_memory("TOKEN_BUDGET", in_parts)
    scores = parts[0].new_zeros(rollout.mask.shape)  # [N, T]
    for rows, part in zip(batches, parts):
        scores[rows, : part.shape[1]] = part
    return scores


def learning_rate(update):
    """The learning rate of the update-th optimizer step (counted from 0): a linear warm-up, then SCHEDULE."""
    total = ITERATIONS * STEPS * MU
    if update < WARMUP:
        return LEARNING_RATE * (update + 1) / (WARMUP + 1)
    left = (total - update) / max(1, total - WARMUP)  # 1 -> 0
    factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[SCHEDULE]
    return LEARNING_RATE * factor


@torch.no_grad()
def diagnose(logp, logp_old, logp_ref, logp_sampled, advantages, mask, num_tokens):
    """What shows whether the update is healthy: the part of some rows in means over all tokens, and maxima."""
    ratio, A = importance_ratio(logp, logp_old, mask), advantages
    means = {
        "clip_low": (ratio < 1 - EPSILON_LOW) & (A < 0) & mask,
        "clip_high": (ratio > 1 + EPSILON_HIGH) & (A > 0) & mask,
    }
    maxima = {"ratio_max": ratio * mask}
    if logp_sampled is not None:
        means["sampler_gap"] = maxima["sampler_gap_max"] = (logp_old - logp_sampled).abs() * mask
    if logp_ref is not None:
        means["kl"] = kl_estimate(logp, logp_ref) * mask
        maxima["kl_log_ratio_max"] = (logp_ref - logp).abs() * mask
    means = {name: x.sum().item() / num_tokens for name, x in means.items()}
    return means | {name: x.max().item() for name, x in maxima.items()}


def add_up(parts):
    """The diagnostics of several micro-batches or ranks as one: sums, but of what ends in max the largest."""
    totals = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            totals[name] = max(totals[name], value) if name.endswith("max") else totals[name] + value
    return totals


def accumulate(state, rollout, advantages, logp_old, logp_ref, loss_function, targets):
    """The gradient of the loss of a whole rollout, left in .grad, in micro-batches. Returns its diagnostics.

    Every micro-batch is divided by the counts of the whole update, taken over all ranks before the first backward pass:
    the sum is the gradient of the whole, to the last bit but rounding.
    """
    state.optimizer.zero_grad()
    mask = rollout.mask & ~rollout.truncated[:, None] if MASK_TRUNCATED else rollout.mask  # [N, T]
    advantages = advantages[:, None].expand_as(mask) if advantages.dim() == 1 else advantages  # [N, T]
    only_A = targets is None and logp_ref is None  # then an output with Â = 0 teaches nothing, and is left out
    learning = [row for row, A in enumerate(advantages.any(1).tolist()) if A or not (only_A or DROP_ZERO_ADVANTAGE)]
    counts = llms.gather([(len(mask), int(mask.sum()), int(mask[learning].sum()))])
    # N, Σ|o_i|, and the number of tokens that the diagnostics are means over
    num_sequences, num_tokens, measured = (max(1, sum(of_ranks)) for of_ranks in zip(*counts))
    parts = []
    for rows, counted in llms.lockstep(micro_batches(rollout, learning)):
        ids, attention, real = rollout.rows(rows)
        T = real.shape[1]
        kept, A = mask[rows, :T] & counted, advantages[rows, :T]  # [n, T]
        logp = log_policy(state.policy, ids, attention, real)  # [n, T]
        old = logp.detach() if logp_old is None else logp_old[rows, :T]  # [n, T]
        ref = None if logp_ref is None else logp_ref[rows, :T]  # [n, T]
        sampled = None if rollout.logp is None else rollout.logp[rows, :T]  # [n, T]
        loss = loss_function(logp, old, ref, A, kept, num_sequences, num_tokens)
        loss.backward()
        parts.append({"loss": loss.item(), **diagnose(logp, old, ref, sampled, A, kept, measured)})
        if targets:
            V = state.critic.token_values(ids, attention, real)  # [n, T]
            loss = value_loss(V, *(target[rows, :T] for target in targets), kept, num_sequences, num_tokens)
            loss.backward()
            parts[-1]["value_loss"] = loss.item()
    return add_up(llms.gather(parts))


def update(state, rollout, advantages, logp_old, logp_ref, loss_function=grpo_loss, targets=None):
    """One optimizer step on the whole rollout; advantages [N] or [N, T]. Returns its diagnostics.

    If loss or gradient is not finite the weights stay as they are. The targets are what PPO's critic learns beside the
    policy: its values before the first update, and the returns.
    """
    what = (state, rollout, advantages, logp_old, logp_ref, loss_function, targets)
    totals = within_memory("TOKEN_BUDGET", lambda: accumulate(*what))
    for parameter in state.trained():  # AdamW moves on by its momentum where the gradient is 0, not where there is none
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    lr = learning_rate(state.updates)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    networks = [network for network in (state.policy, state.critic) if network]  # each is clipped by itself
    norms = [torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM) for network in networks]
    norms = [llms.whole(norm).item() for norm in norms]  # before they are clipped
    finite = all(map(math.isfinite, [totals["loss"], *norms]))
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad()
    state.updates += 1
    return {**totals, "grad_norm": norms[0], "lr": lr, "finite": finite}


def within_memory(budget, work, rows=1):
    """What work() returns. Where the GPU has no memory for it, TOKEN_BUDGET or CACHE_TOKENS is halved, and it begins
    again; a budget of fewer than so many of the longest rows makes no difference to it. One of several ranks cannot
    begin again alone."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            had, least = globals()[budget], rows * (MAX_PROMPT_TOKENS + MAX_NEW_TOKENS)
        if llms.WORLD > 1:
            raise RunError(f"out of memory with --{budget.lower()} {had}: --resume with a smaller one")
        if had <= least:
            raise RunError(f"out of memory, and less than --{budget.lower()} {had} would not help")
        globals()[budget] = max(had // 2, least)
        llms.free_copies()
        torch.cuda.empty_cache()
        tqdm.write(f"note: out of memory with --{budget.lower()} {had}; trying again with {globals()[budget]}.")


# ==== Rewards: line 8 ===============================================================================================


def score_completions(texts, problems, **others):
    """r_i = Σ weight · reward: [Q, G], and each reward by name and unweighted: {name: [N]}. G texts a problem.

    The rules are asked here, side by side, for programs take their time; others are rewards [N] known already. An
    output on which a rule fails, or gives no finite number, gets 0 for it, and that is said.
    """
    asked = [problem for problem in problems for _ in range(len(texts) // len(problems))]
    failures = {}  # of an output: why

    def ask(i):
        try:
            return evaluator.rewards(texts[i], asked[i])
        except Exception as error:  # rules are there to be edited, and outputs hold surprises
            failures[i] = f"{error!r} (question: {asked[i]['question']})"
            return {"correctness": 0.0, "strict_format": 0.0}

    with ThreadPoolExecutor(max(1, os.cpu_count() // llms.LOCAL_WORLD)) as pool:
        rows = list(pool.map(ask, range(len(texts))))
    names = dict.fromkeys(name for row in rows for name in row)  # a program has other rewards than a number
    by_name = {name: [row.get(name, 0.0) for row in rows] for name in names} | others
    for name, values in by_name.items():
        for i, value in enumerate(values):
            if not math.isfinite(value):
                failures[i] = f"{name} is {value} (question: {asked[i]['question']})"
        by_name[name] = [value if math.isfinite(value) else 0.0 for value in values]
    if failures:
        first = failures[min(failures)]
        tqdm.write(f"note: {len(failures)} × a reward failed and counts 0, first: {first}", file=sys.stderr)
    failed, outputs = (sum(of_ranks) for of_ranks in zip(*llms.gather([(len(failures), len(texts))])))
    if failed == outputs:
        raise RunError(f"the rewards fail on every output: {first}")
    weighted = [globals()[f"WEIGHT_{name.upper()}"] * torch.tensor(values) for name, values in by_name.items()]  # [N]
    return sum(weighted).view(len(problems), -1), by_name


def other_rewards(state, rollout, problems):
    """The rewards [N] that take more than a text and its problem: the length's, and the reward model's."""
    lengths, buffer = rollout.mask.sum(1).tolist(), OVERLONG_SHARE * MAX_NEW_TOKENS
    others = {"overlong": [evaluator.overlong(length, MAX_NEW_TOKENS, buffer) for length in lengths]}
    if state.reward_model:
        group = len(rollout.texts) // len(problems)
        questions = [problem["question"] for problem in problems for _ in range(group)]
        scores = torch.tensor(llms.reward_scores(*state.reward_model, questions, rollout.texts))  # [N]
        of_all = torch.tensor(llms.gather(scores.tolist()))  # of every rank's outputs
        of_all = of_all[of_all.isfinite()]
        spread = of_all.std(correction=min(1, len(of_all) - 1))
        others["reward_model"] = ((scores - of_all.mean()) / (spread + 1e-4)).tolist()
    return others


def reward_steps(tokenizer, rollout, problems):
    """Put the reward of each step of the reasoning on the token that ends it.

    Returns step_rewards [Q, G, T], step_ends [Q, G, T], True on those tokens, and the mean of each output's steps [N].
    """
    step_rewards, step_ends, means = torch.zeros(rollout.mask.shape), torch.zeros(rollout.mask.shape).bool(), []
    for i, text in enumerate(rollout.texts):
        steps = evaluator.step_rewards(text, problems[i // GROUP_SIZE])
        for at, (_, reward) in zip(llms.tokens_at(tokenizer, rollout, i, [end for end, _ in steps]), steps):
            step_rewards[i, at], step_ends[i, at] = reward, True
        means.append(statistics.mean(reward for _, reward in steps) if steps else 0.0)
    shape = (len(problems), GROUP_SIZE, -1)
    return step_rewards.view(shape), step_ends.view(shape), means


# ==== Evaluation ====================================================================================================


def interval(successes, n):
    """Half the width of Wilson's 95 % interval for a share of successes: not 0 when all n are right, or none."""
    z, p = 1.96, successes / n
    return z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))


def pass_at_k(n, c, k):
    """The unbiased estimate, from n samples of which c are right, that one of k is right (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def draw(model, tokenizer, prompts, group_size, temperature, generator):
    """o ~ π(O|q): some outputs for each prompt; each of several ranks draws those of its share."""

    def sample():
        how = (group_size, MAX_NEW_TOKENS, temperature, generator, CACHE_TOKENS)
        return llms.sample(model, tokenizer, llms.share(prompts), *how)

    return within_memory("CACHE_TOKENS", sample, group_size)


def evaluate(policy, tokenizer, problems):
    """Greedy on every problem, and from EVAL_SAMPLES samples each where asked: metrics, and a record per problem."""
    prompts = [llms.encode(tokenizer, rldatasets.prompt(problem)) for problem in problems]
    greedy, mine = draw(policy, tokenizer, prompts, 1, 0.0, None), llms.share(problems)
    by_name = score_completions(greedy.texts, mine)[1]
    records = [
        {"question": problem["question"], "answer": problem["answer"], "completion": text}
        | {name: values[i] for name, values in by_name.items()}
        for i, (problem, text) in enumerate(zip(mine, greedy.texts))
    ]
    records = llms.gather(records)
    lengths = llms.gather(greedy.mask.sum(1).tolist())
    n, right = len(records), sum(record["correctness"] for record in records)
    metrics = {
        "eval/accuracy": right / n,
        "eval/ci95": interval(right, n),
        "eval/format": statistics.mean(record["strict_format"] for record in records),
        "eval/length": statistics.mean(lengths),
        "eval/truncated": statistics.mean(llms.gather(greedy.truncated.float().tolist())),
        "eval/n": n,
    }
    tasks = dict.fromkeys(problem.get("task") for problem in problems)
    for task in tasks if len(tasks) > 1 else ():
        of_task = [record for record, problem in zip(records, problems) if problem.get("task") == task]
        metrics[f"eval/accuracy/{task}"] = statistics.mean(record["correctness"] for record in of_task)
    if EVAL_SAMPLES:
        metrics |= evaluate_samples(policy, tokenizer, problems, prompts)
    return metrics, records


def evaluate_samples(policy, tokenizer, problems, prompts):
    """pass@k and maj@k for k = 1, 2, 4 … n = EVAL_SAMPLES, from n outputs of every problem (paper, Figure 7)."""
    n, mine = EVAL_SAMPLES, llms.share(problems)
    texts = draw(policy, tokenizer, prompts, n, EVAL_TEMPERATURE, torch.Generator().manual_seed(SEED)).texts
    groups = [texts[i * n : (i + 1) * n] for i in range(len(mine))]
    graded = score_completions(texts, mine)[1]["correctness"]
    right = llms.gather([int(sum(graded[i * n : (i + 1) * n])) for i in range(len(mine))])
    voting = all(problem.get("kind") != "program" for problem in problems)  # programs have no answer to vote for
    metrics = {}
    for k in sorted({2**power for power in range(n.bit_length())} | {n}):
        metrics[f"eval/pass@{k}"] = statistics.mean(pass_at_k(n, c, k) for c in right)
        if voting:
            votes = [evaluator.right(evaluator.majority(group[:k]), problem) for group, problem in zip(groups, mine)]
            metrics[f"eval/maj@{k}"] = statistics.mean(llms.gather(votes))
    return metrics


# ==== What is written to disk =======================================================================================


@dataclasses.dataclass
class State:
    """All that training carries from one step to the next: what a checkpoint holds."""

    policy: torch.nn.Module  # π_θ
    tokenizer: object
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # the random stream of the sampler
    reward_model: tuple = None  # (model, tokenizer) of REWARD_MODEL; never trained, not in the checkpoint
    reference: torch.nn.Module = None  # π_ref; None where nobody asks for it
    critic: torch.nn.Module = None  # V_ψ of PPO
    tensorboard: object = None  # a writer, or None
    step: int = 0  # steps done, over all iterations
    updates: int = 0  # optimizer steps done
    stage: int = 0  # stages of the curriculum that are over, over all iterations
    position: int = 0  # questions drawn from the data set of this stage
    questions: int = 0  # questions trained on, over all stages
    skipped: int = 0  # questions too long to ask
    tokens: int = 0  # completion tokens sampled

    COUNTERS = ("step", "updates", "stage", "position", "questions", "skipped", "tokens")

    def trained(self):
        """The weights that the optimizer moves."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def tensors(self):
        """Every tensor by name, without a copy; weights that are tied or shared once."""
        names = {}  # weight -> name
        for network in ("policy", "reference", "critic"):
            if getattr(self, network) is not None:
                for name, weight in getattr(self, network).named_parameters():
                    names.setdefault(weight, f"{network}/{name}")
        # with LoRA the weights beside the adapters stay those of MODEL, and need not be written again and again
        saved = lambda name: name.startswith("reference/") and (".lora_" in name or not LORA_RANK)
        named = {name: w for w, name in names.items() if w.requires_grad or saved(name)}
        for weight in self.trained():
            named |= {f"adam/{key}/{names[weight]}": value for key, value in self.optimizer.state[weight].items()}
        return {name: tensor.detach() for name, tensor in named.items()} | {"generator": self.generator.get_state()}


def checksum(read, names, *texts):
    """One number over all bytes of the tensors read(name) and of some texts, so that a damaged file is noticed."""
    total = zlib.crc32("".join(texts).encode())
    for name in sorted(names):
        total = zlib.crc32(read(name).contiguous().view(-1).view(torch.uint8).numpy(), total)
    return str(total)


def settings():
    """The constants in force, by name."""
    return {name: globals()[name] for name in CONSTANTS}


def save_checkpoint(state, run):
    """Replace the run's checkpoint by one of the state as it is, for any number of ranks to go on from."""
    tensors = {}
    for name, tensor in state.tensors().items():
        tensor = llms.whole(tensor)
        if llms.RANK == 0:
            tensors[name] = tensor.cpu()
    counters = {name: getattr(state, name) for name in State.COUNTERS}
    write_checkpoint(run / "checkpoint", tensors, json.dumps(counters), json.dumps(fixed_settings()))


@llms.on_rank_0
def write_checkpoint(folder, tensors, counters, settings):
    """Write a checkpoint whole or not at all; one file, nothing pickled."""
    folder.mkdir(exist_ok=True)
    about = {"counters": counters, "settings": settings}
    about["checksum"] = checksum(tensors.get, tensors, counters, settings)
    safetensors.torch.save_file(tensors, folder / "unfinished", about)
    for path in (folder / "unfinished", *folder.parent.glob("*.jsonl")):  # on the disk, should the power go
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(folder / "unfinished", folder / "state.safetensors")


def load_checkpoint(state, run):
    """Bring a fresh state to where the run's checkpoint was written."""
    path = run / "checkpoint" / "state.safetensors"
    try:
        file = safe_open(path, "pt")
        about, names = file.metadata() or {}, list(file.keys())
        intact = about["checksum"] == checksum(file.get_tensor, names, about["counters"], about["settings"])
    except (SafetensorError, OSError, KeyError) as error:
        raise SettingsError(f"{path} is damaged or no checkpoint of this program: {error}") from None
    if not intact:
        raise SettingsError(f"{path} is damaged: its bytes are not those that were written")
    saved, now = with_defaults(json.loads(about["settings"])), with_defaults(fixed_settings())
    if saved != now:
        names = ", ".join(sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)))
        raise SettingsError(f"{path} belongs to other settings than {run / 'config.json'}: {names} differ")

    for name, value in json.loads(about["counters"]).items():
        setattr(state, name, value)
    of_reference = [name for name in names if name.startswith("reference/")]
    if of_reference or (LORA_RANK and needs_reference()):
        state.reference = llms.frozen_copy(state.policy, adapter=any(".lora_" in name for name in of_reference))
    if any(name.startswith("adam/") for name in names):
        for weight in state.trained():  # AdamW's state as it stands after its first step, to be filled
            moments = {"exp_avg": torch.empty_like(weight), "exp_avg_sq": torch.empty_like(weight)}
            state.optimizer.state[weight] = {"step": torch.zeros(())} | moments
    try:
        state.generator.set_state(file.get_tensor("generator"))
        for name, tensor in state.tensors().items():
            llms.fill(tensor, file.get_tensor(name))
        if extra := set(names) - state.tensors().keys():
            raise RuntimeError(f"there is no {min(extra)} here")
    except (SafetensorError, RuntimeError) as error:
        raise SettingsError(f"{path} was made with another model: {error!r}") from None


def with_defaults(known):
    """Settings in which those that an older version did not have yet stand at their defaults."""
    return {name: default for name, (_, default, _) in CONSTANTS.items() if name != "MODEL"} | known


def fixed_settings():
    """The settings that a checkpoint belongs to: all but those that say how long, how often and in what portions."""
    return {name: value for name, value in settings().items() if name not in RESUMABLE}


RESUMABLE = """RUN STEPS TOKEN_BUDGET CACHE_TOKENS GRADIENT_CHECKPOINTING EVAL_EVERY SAVE_EVERY SHOW_EVERY
TENSORBOARD""".split()


def clean(value):
    """A number for JSON: what is not finite becomes null, floats keep their bits."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@llms.on_rank_0
def append(path, rows):
    """Add rows to a file of JSON lines."""
    with open(path, "a") as file:
        file.writelines(json.dumps({key: clean(value) for key, value in row.items()}) + "\n" for row in rows)


def log(state, run, row):
    """A row of metrics, to metrics.jsonl and where TensorBoard reads them."""
    append(run / "metrics.jsonl", [row])
    for key, value in row.items() if state.tensorboard else ():
        if isinstance(value, (int, float)) and key != "step":
            state.tensorboard.add_scalar(key, value, row["step"])


def read_lines(path):
    """The rows of a file of JSON lines, but for a last one that a crash cut in half."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path} is damaged: {error}") from None


@llms.on_rank_0
def forget_after(path, step):
    """Drop the rows that a killed run wrote after its last checkpoint: the resumed run writes them again."""
    rows = [row for row in read_lines(path) if row["step"] <= step]
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    append(unfinished, rows)
    os.replace(unfinished, path)


@llms.on_rank_0
def write_config(run):
    """config.json: every constant in force, and what it ran on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"] if shutil.which("git") else ["true"]
    config = settings() | {
        "versions": {package: version(package) for package in ("torch", "transformers", "datasets")},
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "ranks": llms.WORLD,
    }
    (run / "config.unfinished").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(run / "config.unfinished", run / "config.json")


# ==== What is shown while it runs ===================================================================================


def complaints(row):
    """Sentences on what is out of its healthy range in a row of training metrics."""
    kl, first = row["kl"] or 0.0, row["step"] == 1
    if ALGORITHM == "grpo" and MU == 1 and DENOMINATOR == "sequence" and abs(row["loss"]) < 1e-3:
        yield "loss is about 0 at μ = 1: expected. Ratios are 1, a group's advantages sum to 0; its gradient is not 0"
    if row["zero_advantage"] > 0.9:
        yield "9 of 10 outputs have Â = 0 and teach nothing: too easy, too hard, or one sample G times"
    if first and kl > 1e-2:
        yield "the KL is above 0.01 at the first step, where policy and reference are the same: their numerics differ"
    refreshed = (row["step"] - 1) % STEPS == 0  # the first step of an iteration: π_θ = π_ref
    if BETA and row["step"] > WARMUP + 2 and kl == 0 and row["grad_norm"] > 0 and not refreshed:
        yield "the KL is exactly 0 after updates: is the reference the policy itself?"
    if kl > 1:
        yield "the KL is above 1 nat per token: far from the reference (lower --learning_rate or raise --beta)"
    if (row["kl_log_ratio_max"] or 0.0) > 10:
        yield "some |log(π_ref/π_θ)| is above 10: that one token dominates the KL of eq. (4)"
    entropy = math.nan if row["entropy"] is None else row["entropy"]
    if entropy < 0.05 and row["accuracy"] < 0.9:
        yield "the entropy is below 0.05 nats while answers are still wrong: little is explored any more"
    if entropy > 4:
        yield "the entropy is above 4 nats per token: that is close to random text"
    if row["clip_low"] + row["clip_high"] > 0.2:
        yield "over 20 % of the tokens are clipped: the updates of one rollout go too far (--learning_rate, --mu)"
    if MU > 1 and row["step"] > WARMUP and row["ratio_max"] == 1:
        yield "the ratio stays exactly 1 although μ > 1: is π_θold computed anew between the updates?"
    if row["truncated"] > 0.5:
        yield "over half of the outputs have no end within --max_new_tokens: raise it, or the end is not being learnt"
    if (row["sampler_gap"] or 0.0) > (2e-2 if torch.cuda.is_available() else 1e-4):
        yield "the log-probabilities of sampling and scoring differ: the policy that samples is not the one that learns"
    if row["skipped_updates"]:
        yield "the loss or the gradient was not finite: that update was left out, the weights stayed as they were"


def console_line(row):
    """One step in fixed columns."""
    kl = "   off" if row["kl"] is None else f"{row['kl']:6.4f}"
    return (
        f"step {row['step']:4d} | reward {row['reward']:5.2f} ± {row['reward_std']:4.2f} | right {row['accuracy']:4.2f}"
        f" | kl {kl} | clip {row['clip_low'] + row['clip_high']:4.2f} | dead {row['zero_std_groups']:4.2f}"
        f" | len {row['length']:5.1f} | cut {row['truncated']:4.2f} | grad {row['grad_norm']:5.2f}"
        f" | {row['seconds']:5.1f} s"
    )


def scores(metrics):
    """An evaluation in one line."""
    more = [key for key in metrics if "@" in key or key.startswith("eval/accuracy/")]
    more = "".join(f" | {re.sub('eval/(accuracy/)?', '', key)} {metrics[key]:.3f}" for key in more)
    return (
        f"accuracy {metrics['eval/accuracy']:.3f} ± {metrics['eval/ci95']:.3f} | format {metrics['eval/format']:.3f}"
        f" | len {metrics['eval/length']:.1f} | cut {metrics['eval/truncated']:.3f}{more} (n = {metrics['eval/n']})"
    )


def side_by_side(left, right, width=56):
    """Two texts in two columns."""
    wrapped = ([textwrap.wrap(line, width) or [""] for line in text.split("\n")] for text in (left, right))
    columns = (itertools.chain.from_iterable(lines) for lines in wrapped)
    return "\n".join(f"  {a:{width}} | {b}" for a, b in itertools.zip_longest(*columns, fillvalue=""))


@llms.on_rank_0
def summary(run):
    """The end of a run: base → trained in a table, and three test questions with both completions side by side."""
    evaluations = [row for row in read_lines(run / "metrics.jsonl") if "eval/accuracy" in row]
    if not evaluations:
        return
    base, trained = evaluations[0], evaluations[-1]
    first, last = f"base (step {base['step']})", f"trained (step {trained['step']})"
    print(f"\n{'test, ' + str(base['eval/n']):24}{first:>18}{last:>22}")
    for key in (key for key in base if key not in ("step", "eval/n", "eval/ci95")):
        cells = [f"{row[key]:.3f}" + f" ± {row['eval/ci95']:.3f}" * (key == "eval/accuracy") for row in (base, trained)]
        print(f"{key.removeprefix('eval/'):24}{cells[0]:>18}{cells[1]:>22}")
    tested = [row for row in read_lines(run / "samples.jsonl") if row["split"] == "test"]
    before, after = ([row for row in tested if row["step"] == one["step"]][:3] for one in (base, trained))
    for row, other in zip(before, after):
        left, right = (f"{'right' if one['correctness'] else 'wrong'}:\n{one['completion']}" for one in (row, other))
        print(f"\n{row['question']}  (answer: {row['answer']})")
        print(side_by_side(f"base, {left}", f"trained, {right}"))


# ==== Algorithm 1 ===================================================================================================


class Interrupt:
    """Ctrl-C and SIGTERM ask for an end after the step; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.signal == signal.SIGINT:  # torchrun passes a second Ctrl-C on as SIGTERM
            raise KeyboardInterrupt
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("finishing the step; Ctrl-C again ends at once and loses it")


@contextmanager
def timed(seconds, name):
    """Add the wall-clock seconds of a block to seconds[name]."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[f"seconds/{name}"] = seconds.get(f"seconds/{name}", 0.0) + time.perf_counter() - start


def stage_at(step):
    """How many stages of the curriculum come before that of a step; every iteration goes through all of them anew."""
    stages = rldatasets.stages(DATASET)
    if len(stages) == 1:
        return 0  # its questions go on through all iterations
    ends = itertools.accumulate(steps for _, steps in stages)
    return step // STEPS * len(stages) + next(stage for stage, end in enumerate(ends) if step % STEPS < end)


def stage_name(stage):
    stages = rldatasets.stages(DATASET)
    return stages[stage % len(stages)][0]


def questions_of(state):
    """The endless stream of training questions of the stage where the state stands, from its position on."""
    seed = f"{SEED} {state.stage}" if state.stage else SEED
    return rldatasets.shuffled(stage_name(state.stage), "train", seed, state.position)


def draw_questions(state, stream):
    """Line 5: the next QUESTIONS_PER_STEP problems whose prompts are short enough, and their prompts' token ids."""
    problems, prompts, too_long = [], [], 0
    while len(problems) < QUESTIONS_PER_STEP:
        problem = next(stream)
        prompt = llms.encode(state.tokenizer, rldatasets.prompt(problem))
        state.position += 1
        if len(prompt) <= MAX_PROMPT_TOKENS:
            problems.append(problem)
            prompts.append(prompt)
        else:
            too_long += 1
        if too_long == 1000:
            raise SettingsError(
                f"1000 questions in one step are over {MAX_PROMPT_TOKENS} tokens: raise --max_prompt_tokens"
            )
    check_sandbox(problems)
    state.skipped += too_long
    state.questions += len(problems)
    return problems, prompts


@dataclasses.dataclass
class Outputs:
    """The outputs of one step and what is known of them; the last two are noted by line 9 of PPO and DPO."""

    problems: list  # Q of them, or this rank's share
    rollout: llms.Rollout  # N = Q·G outputs
    rewards: torch.Tensor = None  # [Q, G]  r_i
    by_name: dict = None  # {name: [N]}  each reward, unweighted
    logp_old: torch.Tensor = None  # [N, T]  log π_θold; None where it is the update's own log π_θ
    logp_ref: torch.Tensor = None  # [N, T]  log π_ref; None at β = 0, and where the outputs are not π_θ's
    targets: tuple = None  # ([N, T], [N, T])  of PPO's critic: the values before the update, and the returns
    measured: dict = dataclasses.field(default_factory=dict)  # what else there is to log


def policy_outputs(state, problems, prompts):
    """o ~ π_θ(O|q): G outputs for each question."""
    return draw(state.policy, state.tokenizer, prompts, GROUP_SIZE, TEMPERATURE, state.generator)


def group_relative(state, outputs):
    """Â_i of outcome supervision, [N], or Â_{i,t} of process supervision, [N, T]."""
    advantages = group_advantages(outputs.rewards).flatten()  # [N]
    if SUPERVISION == "outcome":
        return advantages
    step_rewards, step_ends, outputs.by_name["steps"] = reward_steps(state.tokenizer, outputs.rollout, outputs.problems)
    return advantages[:, None] + WEIGHT_STEPS * process_advantages(step_rewards, step_ends).flatten(0, 1)


def take_step(state, stream, run):
    """Lines 5 to 12 of Algorithm 1; returns the step's metrics."""
    # GRPO's: policy_outputs, group_relative and grpo_loss, above; the other methods' are under Table 10, below
    draw_outputs, coefficients, loss_function = TABLE_10[ALGORITHM]
    seconds, began = {}, time.perf_counter()
    problems, prompts = draw_questions(state, stream)  # 5: a batch D_b of questions, on all ranks the same
    # 6: π_θold ← π_θ needs no second network, only its log-probabilities of the outputs: logp_old, below
    with timed(seconds, "sample"):  # 7: G outputs for each question
        rollout = draw_outputs(state, problems, prompts)
    problems = llms.share(problems)  # from here on those of this rank
    outputs = Outputs(problems, rollout)
    with timed(seconds, "reward"):  # 8: their rewards
        others = other_rewards(state, rollout, problems)
        outputs.rewards, outputs.by_name = score_completions(rollout.texts, problems, **others)  # [Q, G]
    with timed(seconds, "logprobs"):
        outputs.logp_old = score(state.policy, rollout) if MU > 1 else None  # [N, T]
        of_policy = rollout.logp is not None  # elsewhere a KL[π_θ ‖ π_ref] cannot be estimated
        outputs.logp_ref = score(state.reference, rollout) if BETA and of_policy else None  # [N, T]
    with timed(seconds, "advantages"):  # 9
        advantages = coefficients(state, outputs).to(rollout.ids.device)  # [N] or [N, T]
    with timed(seconds, "update"):  # 10, 11: μ times up the objective, J_GRPO
        how = (advantages, outputs.logp_old, outputs.logp_ref, loss_function, outputs.targets)
        updates = [update(state, rollout, *how) for _ in range(MU)]
    # 12: the reward is a rule, or a model that stays as it is
    state.step += 1
    state.tokens += sum(llms.gather(rollout.mask.sum(1).tolist()))
    row = step_metrics(state, outputs, advantages, updates) | seconds | {"seconds": time.perf_counter() - began}
    record_step(state, run, row, outputs, advantages)
    return row


def step_metrics(state, outputs, advantages, updates):
    """A training line of metrics.jsonl, of all ranks' outputs; what the μ updates of a step measured is averaged,
    maxima stay maxima."""
    rollout, lengths = outputs.rollout, outputs.rollout.mask.sum(1)
    entropy = lengths if rollout.entropy is None else rollout.entropy.sum(1)
    no_advantage = (advantages.view(len(lengths), -1) == 0).all(1)
    columns = [x.tolist() for x in (lengths, entropy, no_advantage, rollout.truncated)]
    columns = llms.gather(list(zip(*columns, map(evaluator.reflection, rollout.texts))))
    lengths, entropy, no_advantage, truncated, reflection = zip(*columns)
    rewards = torch.tensor(llms.gather(outputs.rewards.tolist()))  # [Q, G]
    by_name = defaultdict(list)
    for mine in llms.gather([outputs.by_name]):
        for name, values in mine.items():
            by_name[name] += values
    measured = dict.fromkeys(("loss", "ratio_max", "clip_low", "clip_high"), 0.0)
    measured |= dict.fromkeys(("sampler_gap", "sampler_gap_max", "kl", "kl_log_ratio_max"))
    for name in updates[0].keys() - {"finite"}:
        values = [one[name] for one in updates]
        measured[name] = max(values) if name.endswith("max") else statistics.mean(values)
    return {
        "step": state.step,
        "stage": stage_name(state.stage),
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1, correction=min(1, rewards.shape[1] - 1)).mean().item(),
        **{f"rewards/{name}": sum(values) / len(lengths) for name, values in by_name.items()},
        "accuracy": statistics.mean(by_name["correctness"]),
        "zero_std_groups": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "zero_advantage": statistics.mean(no_advantage),
        **measured,
        **outputs.measured,
        "entropy": None if rollout.entropy is None else sum(entropy) / sum(lengths),
        "length": statistics.mean(lengths),
        "length_max": max(lengths),
        "truncated": statistics.mean(truncated),
        "reflection": statistics.mean(reflection),
        "skipped_updates": sum(not one["finite"] for one in updates),
        "questions": state.questions,
        "prompts_skipped": state.skipped,
        "tokens": state.tokens,
        "updates": state.updates,
    }


@llms.on_rank_0
def record_step(state, run, row, outputs, advantages):
    """Write a step's metrics and the group of its first question, and show a completion now and then."""
    log(state, run, row)
    problem, texts, rewards = outputs.problems[0], outputs.rollout.texts, outputs.rewards[0].tolist()
    about = {"step": row["step"], "split": "train", "question": problem["question"], "answer": problem["answer"]}
    group = [
        about
        | {"completion": texts[i], "reward": reward, "advantage": advantages[i].flatten()[0].item()}
        | {name: values[i] for name, values in outputs.by_name.items()}
        for i, reward in enumerate(rewards)
    ]
    append(run / "samples.jsonl", group)
    tqdm.write(console_line(row))
    if SHOW_EVERY and row["step"] % SHOW_EVERY == 0:
        completion = textwrap.indent(texts[0], "  | ", lambda line: True)
        answer = textwrap.shorten(problem["answer"], 60)
        tqdm.write(f"  {problem['question']}  (answer: {answer}; reward {rewards[0]:.2f})\n{completion}")


@llms.on_rank_0
def record_evaluation(state, run, metrics, records):
    """Write the metrics of an evaluation and all completions, and draw the plots."""
    log(state, run, {"step": state.step, **metrics})
    append(run / "samples.jsonl", [{"step": state.step, "split": "test", **record} for record in records])
    tqdm.write(f"step {state.step:4d} | TEST {scores(metrics)}")
    plot.draw([run], run)


def train(state, stream, test_problems, run, evaluate_at):
    """Algorithm 1 (iterative GRPO) from wherever the state stands. Returns the signal that ended it early, or None."""
    interrupt, said, failures, last = Interrupt(), set(), 0, ITERATIONS * STEPS
    if state.step == 0:
        if 0 in evaluate_at:
            record_evaluation(state, run, *evaluate(state.policy, state.tokenizer, test_problems))
        save_checkpoint(state, run)
    bar = tqdm(total=last, initial=state.step, desc=run.name, unit="step")
    for iteration in range(ITERATIONS):  # 2
        if state.step == iteration * STEPS and needs_reference():  # resumed within an iteration it has one already
            # 3: π_ref ← π_θ, a copy that stays as it is; with LoRA it is at first the model with the adapter off
            state.reference = None  # whose memory is free before the next takes some
            state.reference = llms.frozen_copy(state.policy, adapter=iteration > 0)
        while state.step < (iteration + 1) * STEPS:  # 4
            if stage_at(state.step) != state.stage:
                state.stage, state.position = stage_at(state.step), 0
                stream = questions_of(state)
            row = take_step(state, stream, run)  # 5 to 12
            bar.update()
            for sentence in [sentence for sentence in complaints(row) if sentence not in said]:
                tqdm.write(f"note: {sentence}.")
                said.add(sentence)
            failures = failures + 1 if row["skipped_updates"] else 0
            if failures == 3:
                raise RunError(
                    "three steps in a row were not finite; the last checkpoint is intact, and older than they are"
                )
            if state.step in evaluate_at:
                record_evaluation(state, run, *evaluate(state.policy, state.tokenizer, test_problems))
            asked_to_end = max(llms.gather([interrupt.signal or signal.SIGTERM * llms.orphaned()]))
            if asked_to_end or state.step == last or (state.step % SAVE_EVERY == 0 and not failures):
                save_checkpoint(state, run)
            if asked_to_end:
                return asked_to_end


# ==== Table 10 (§5.2.1): the other methods ==========================================================================
# All of them climb ∇J = E[(q, o) ~ D] 1/|o| Σ_t GC(q, o, t) ∇log π_θ(o_t | q, o_<t), eq. (5). They differ in the data
# source D, the reward function, and the gradient coefficient GC that is made of it. PPO and GRPO clip: theirs is that
# of (1) and (3), which at π_θ = π_θold is A_t, and Â + β (π_ref/π_θ - 1), whose second part comes from grpo_loss.


def dataset_outputs(state, problems, prompts):
    """q, o ~ P_sft(Q, O): the worked solution of each question, in the form that the prompt asks for."""
    if not all(problem.get("solution") for problem in problems):
        raise RunError(f"a question of {stage_name(state.stage)} has no worked solution to imitate")
    texts = [rldatasets.written_out(problem) for problem in llms.share(problems)]
    return llms.rollout_of(state.policy, state.tokenizer, llms.share(prompts), texts, MAX_NEW_TOKENS)


def reference_outputs(state, problems, prompts):
    """o ~ π_sft(O|q): G outputs for each question of the policy that the iteration began with, which is π_ref."""
    outputs = draw(state.reference, state.tokenizer, prompts, GROUP_SIZE, TEMPERATURE, state.generator)
    return outputs._replace(logp=None, entropy=None)  # they are not π_θ's


def ones(state, outputs):
    """SFT: 1 for every token, eq. (7)."""
    return torch.ones(len(outputs.rollout.texts))  # [N]


def is_right(state, outputs):
    """RFT and Online RFT, eq. (10): 𝕀(o), 1 if the answer is right, else 0."""
    return torch.tensor(outputs.by_name["correctness"])  # [N]


def dpo_objective(logp, logp_ref, mask, pairs):
    """DPO, eq. (12): log σ(Δ) and Δ of pairs [P, 2] of rows (o⁺, o⁻): 2 × [P]. The objective is the mean of the first.

    Δ = β (1/|o⁺| Σ_t log π_θ/π_ref(o⁺_t) - 1/|o⁻| Σ_t log π_θ/π_ref(o⁻_t)).
    """
    log_ratio = ((logp - logp_ref) * mask).sum(1) / mask.sum(1).clamp(min=1)  # [N]
    margin = BETA_DPO * (log_ratio[pairs[:, 0]] - log_ratio[pairs[:, 1]])  # [P]
    return torch.nn.functional.logsigmoid(margin), margin


def preference(state, outputs):
    """DPO, eq. (14): + β σ(-Δ) for o⁺ and - for o⁻, pairs of a right and a wrong output of the same group.

    As printed, (13) and (14) lack the factor β and write Δ token by token; this is the derivative of (12), in which Δ
    is one number for all tokens of a pair. (12) is a mean over P pairs, the loss one over N outputs: hence N/P.
    """
    right = is_right(state, outputs).view(outputs.rewards.shape) > 0  # [Q, G]
    kept = ~outputs.rollout.truncated.cpu().view(right.shape) | (not MASK_TRUNCATED)  # [Q, G]
    number = torch.arange(right.numel()).view(right.shape)  # [Q, G]
    sides = [(number[q][right[q] & kept[q]], number[q][~right[q] & kept[q]]) for q in range(len(right))]
    pairs = [pair for o_right, o_wrong in sides for pair in zip(o_right.tolist(), o_wrong.tolist())]
    P, N = (sum(of_ranks) for of_ranks in zip(*llms.gather([(len(pairs), right.numel())])))
    coefficients, outputs.measured["dpo/pairs"] = torch.zeros(right.numel()), P  # [N]
    if P:
        pairs = torch.tensor(pairs, dtype=torch.long).view(-1, 2)  # [P, 2]
        logp, logp_ref = score(state.policy, outputs.rollout), score(state.reference, outputs.rollout)  # [N, T]
        objective, margin = dpo_objective(logp, logp_ref, outputs.rollout.mask, pairs)  # 2 × [P]
        for name, x in (("dpo/loss", -objective), ("dpo/margin", margin)):
            outputs.measured[name] = statistics.mean(llms.gather(x.tolist()))
        weight = (BETA_DPO * torch.sigmoid(-margin) * N / P).to(coefficients)  # [P]
        coefficients[pairs] = torch.stack([weight, -weight], 1)  # [P, 2]
    return coefficients


def likelihood_loss(logp, logp_old, logp_ref, coefficients, mask, num_sequences, num_tokens):
    """- 1/N Σ_i 1/|o_i| Σ_t GC_{i,t} log π_θ: eq. (6), (8), and with the GC of eq. (14) a loss of (12)'s gradient."""
    return -mean_over_outputs(coefficients * logp, mask, num_sequences, num_tokens)


def gae(rewards, values, mask):
    """PPO's advantages A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} - V_t, V = 0 behind the end (arXiv 1506.02438).

    rewards, values, mask [N, T] -> [N, T]. With V = 0, γ = λ = 1 and one reward at the end, A_t is that reward.
    """
    advantages, A, V_next = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * V_next - values[:, t]  # [N]
        A = (delta + GAMMA * LAMBDA * A) * mask[:, t]  # [N]
        V_next = values[:, t] * mask[:, t]  # [N]
        advantages[:, t] = A
    return advantages


def ppo_advantages(state, outputs):
    """PPO, eq. (18): A_t, by GAE from the rewards of eq. (2), r_i at the end token and - β log(π_θ/π_ref) at each."""
    rollout, ends = outputs.rollout, outputs.rollout.mask.sum(1) - 1  # [N]
    values = score(state.critic, rollout, llms.Critic.token_values)  # [N, T]
    rewards = torch.zeros_like(values)  # [N, T]
    rewards[torch.arange(len(ends), device=ends.device), ends] = outputs.rewards.flatten().to(values)
    if BETA:
        logp = rollout.logp if outputs.logp_old is None else outputs.logp_old  # [N, T], of the policy that drew them
        rewards -= BETA * (logp - outputs.logp_ref)
    advantages = gae(rewards, values, rollout.mask)  # [N, T]
    outputs.targets = values, advantages + values
    return advantages


def ppo_loss(logp, logp_old, logp_ref, advantages, mask, num_sequences, num_tokens):
    """Minus PPO's objective, eq. (1); the KL is in the reward."""
    objective = clipped_objective(logp, logp_old, advantages, mask)  # [N, T]
    return -mean_over_outputs(objective, mask, num_sequences, num_tokens)


def value_loss(values, values_old, returns, mask, num_sequences, num_tokens):
    """½ max( (V - R)², (clip(V, V_old ± ε) - R)² ): nothing pulls a value further than ε from where it began."""
    clipped = values.clamp(values_old - EPSILON_VALUE, values_old + EPSILON_VALUE)  # [N, T]
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)  # [N, T]
    return mean_over_outputs(error / 2, mask, num_sequences, num_tokens)


# fmt: off
TABLE_10 = {
    # method      data source        gradient coefficient       loss                reward function (paper)
    "sft":        (dataset_outputs,   ones,                     likelihood_loss),  # none
    "rft":        (reference_outputs, is_right,                 likelihood_loss),  # rule
    "dpo":        (reference_outputs, preference,               likelihood_loss),  # rule
    "online_rft": (policy_outputs,    is_right,                 likelihood_loss),  # rule
    "ppo":        (policy_outputs,    ppo_advantages,           ppo_loss),         # rules, or a model (model)
    "grpo":       (policy_outputs,    group_relative,           grpo_loss),        # rules, or a model (model)
}
# fmt: on


def needs_reference():
    source = TABLE_10[ALGORITHM][0]
    return source is reference_outputs or source is policy_outputs and BETA > 0


# ==== The command line ==============================================================================================


def constant_block():
    """The constants as they stand in this file: {NAME: (section, default, comment)}."""
    source = Path(__file__).read_text(encoding="utf-8")
    section, block = None, {}
    for line in source[: source.index("# -- End of the constants")].splitlines():
        if title := re.fullmatch(r"# -- (.+)", line):
            section = title[1]
        elif section and (constant := re.fullmatch(r"([A-Z][A-Z0-9_]*) = (.+?)  # (.+)", line)):
            block[constant[1]] = (section, ast.literal_eval(constant[2]), constant[3])
    return block


CONSTANTS = constant_block()


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message = f"unknown flag {unknown[1]}" + (f"; did you mean {close[0]}?" if close else "; see --help")
        complain(message)
        self.exit(2)


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def parse(argv):
    """The command line: the actions, and the constants that were given as flags."""
    about, layout = __doc__.split("\n\nRead downwards")[0], argparse.RawDescriptionHelpFormatter
    parser = Parser(
        usage="python main.py [--flag value …]", description=about, formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, with its own settings")
    parser.add_argument("--evaluate", metavar="MODEL", help="only test a model: hub name, folder, or run folder")
    parser.add_argument("--against", metavar="MODEL", help="with --evaluate: test this one too, on the same questions")
    parser.add_argument("--test", action="store_true", help="two steps and one small evaluation, all else as given")
    sections = defaultdict(lambda: parser.add_argument_group(section))
    for name, (section, default, comment) in CONSTANTS.items():
        kind = true_or_false if isinstance(default, bool) else type(default)
        text = f"{comment.replace('%', '%%')} (default: {default!r})"
        flag = {"type": kind, "metavar": type(default).__name__.upper(), "help": text, "default": argparse.SUPPRESS}
        if isinstance(default, bool):  # --tensorboard is --tensorboard true
            flag |= {"nargs": "?", "const": True}
        sections[section].add_argument(f"--{name.lower()}", **flag)
    # --group-size is --group_size
    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument) for argument in argv]
    flags = vars(parser.parse_args(argv))
    actions = argparse.Namespace(**{name: flags.pop(name) for name in ("resume", "evaluate", "against", "test")})
    return actions, {name.upper(): value for name, value in flags.items()}


def apply_settings(flags, inherited=None):
    """Set the constants: the block, over it the settings of a run or of the tiny model, over those the flags."""
    values = settings() | (inherited or {}) | flags
    if not inherited and values["MODEL"] == "tiny":
        values |= TINY | flags
    counts = [steps for _, steps in rldatasets.stages(values["DATASET"])]
    if any(counts):  # a curriculum says itself how long it is
        if flags.get("STEPS", sum(counts)) != sum(counts):
            raise SettingsError(f"--steps {flags['STEPS']}: the stages of --dataset have {sum(counts)} steps")
        values["STEPS"] = inherited["STEPS"] if inherited else sum(counts)
    globals().update(values)


CHOICES = {
    "ALGORITHM": tuple(TABLE_10),
    "BASELINE": ("group", "others"),
    "KL": ("k1", "k2", "k3"),
    "DENOMINATOR": ("sequence", "token", "constant"),
    "RATIO": ("token", "sequence"),
    "SCHEDULE": ("constant", "linear", "cosine"),
    "SUPERVISION": ("outcome", "process"),
}
AT_LEAST_1 = "ITERATIONS STEPS QUESTIONS_PER_STEP GROUP_SIZE MU MAX_NEW_TOKENS MAX_PROMPT_TOKENS CACHE_TOKENS"
AT_LEAST_1 += " EVAL_EVERY SAVE_EVERY"
AT_LEAST_0 = "SEED LORA_RANK EPSILON_LOW EPSILON_HIGH BETA LEARNING_RATE WARMUP WEIGHT_DECAY"
AT_LEAST_0 += " EVAL_QUESTIONS EVAL_SAMPLES SHOW_EVERY"


def check_settings():
    """Refuse what cannot be meant, before anything is loaded."""
    now = settings()
    rules = [(name, now[name] in allowed, f"one of {', '.join(allowed)}") for name, allowed in CHOICES.items()]
    rules += [(name, math.isfinite(value), "finite") for name, value in now.items() if isinstance(value, float)]
    rules += [(name, now[name] >= 1, "at least 1") for name in AT_LEAST_1.split()]
    rules += [(name, now[name] >= 0, "at least 0") for name in AT_LEAST_0.split()]
    rules += [(name, now[name] >= 0.01, "at least 0.01") for name in ("TEMPERATURE", "EVAL_TEMPERATURE")]
    rules += [(name, 0 <= now[name] < 1, "at least 0 and below 1") for name in ("ADAM_BETA1", "ADAM_BETA2")]
    rules += [(name, 0 <= now[name] <= 1, "from 0 to 1") for name in ("GAMMA", "LAMBDA")]
    rules += [(name, now[name] > 0, "above 0") for name in ("LORA_ALPHA", "BETA_DPO", "EPSILON_VALUE", "MAX_GRAD_NORM")]
    longest, dpo = MAX_PROMPT_TOKENS + MAX_NEW_TOKENS, ALGORITHM == "dpo"
    by_tokens, by_rule = ALGORITHM == "ppo" or SUPERVISION == "process", ALGORITHM not in ("ppo", "grpo")
    compared = f"at least 2: {ALGORITHM} compares an output with others of its group"
    rules += [
        ("GROUP_SIZE", GROUP_SIZE >= 2 or ALGORITHM not in ("grpo", "dpo"), compared),
        (
            "DENOMINATOR",
            DENOMINATOR == "sequence" or not dpo,
            "sequence for dpo: its pairs compare means over an output",
        ),
        ("RATIO", RATIO == "token" or not by_tokens, "token where advantages differ from token to token"),
        ("REWARD_MODEL", not (REWARD_MODEL and by_rule), f"empty for {ALGORITHM}, which goes by the rule alone"),
        ("MU", MU == 1 or not dpo, "1 for dpo: the coefficient of its pairs changes with every update"),
        ("SUPERVISION", SUPERVISION == "outcome" or ALGORITHM == "grpo", f"outcome for {ALGORITHM}"),
        ("TOKEN_BUDGET", TOKEN_BUDGET >= longest, f"at least max_prompt_tokens + max_new_tokens = {longest}"),
        ("RUN", RUN == Path(RUN).name != ".." and len(RUN.encode()) < 256, "a name without folders"),
        ("SEED", SEED < 2**63, "below 2 to the 63"),
        ("OVERLONG_SHARE", 0 < OVERLONG_SHARE <= 1, "above 0 and at most 1"),
    ]
    for name, kept, demand in rules:
        if not kept:
            raise SettingsError(f"--{name.lower()} must be {demand}, not {now[name]!r}")
    if TENSORBOARD and not importlib.util.find_spec("tensorboard"):
        raise SettingsError("--tensorboard needs TensorBoard: pip install tensorboard")


def model_folder(name):
    """Where a model is: a run's folder stands for the model in it, and tiny is built the first time it is asked for."""
    if name == "tiny":
        corpus = rldatasets.messy_corpus()
        folder = Path("runs") / f"tiny-base-{zlib.crc32(repr((corpus, llms.TINY)).encode()):08x}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            llms.build_tiny(folder, corpus)
        return str(folder)
    if (Path(name) / "config.json").is_file() and (Path(name) / "metrics.jsonl").is_file():
        if not (Path(name) / "model").is_dir():
            raise SettingsError(
                f"{name} is a run that has not ended: it has no model yet (python main.py --resume {name})"
            )
        return f"{name}/model"
    return name


def tested_tasks():
    """The names of the data sets that are tested on."""
    if EVAL_DATASET:
        return [EVAL_DATASET] if Path(EVAL_DATASET).exists() else [name.strip() for name in EVAL_DATASET.split(",")]
    return list(dict.fromkeys(name for name, _ in rldatasets.stages(DATASET)))


def test_set():
    """The first questions of the test split in the official order, EVAL_QUESTIONS over all tasks that are tested."""
    tasks = tested_tasks()
    each = max(1, EVAL_QUESTIONS // len(tasks)) if EVAL_QUESTIONS else None
    problems = [
        problem | {"task": task} for task in tasks for problem in itertools.islice(rldatasets.load(task, "test"), each)
    ]
    if len(problems) < llms.WORLD:
        raise SettingsError(
            f"no test questions in {EVAL_DATASET or DATASET}" + f" for each of {llms.WORLD} ranks" * (llms.WORLD > 1)
        )
    return problems


def check_data():
    """Refuse to train on what is for testing only, or on the very rows that are tested."""
    tested = [Path(name).resolve() for name in tested_tasks()]
    for name, _ in rldatasets.stages(DATASET):
        rldatasets.load(name, "train")  # refuses what is for testing only
        if Path(name).is_file() and Path(name).resolve() in tested:
            raise SettingsError(
                f"{name} is a single file: give --eval_dataset too, and not the rows that are trained on"
            )


def check_solutions(problems, name):
    """Refuse a method that needs of the solutions what those of a data set do not have."""
    solutions = [problem.get("solution", "") for problem in problems]
    if ALGORITHM == "sft" and not all(solutions):
        raise SettingsError(f"--algorithm sft imitates worked solutions, and {name} has none")
    if SUPERVISION == "process" and not any(map(evaluator.step_rewards, solutions, problems)):
        raise SettingsError(
            f"--supervision process rewards steps that calculate, and the solutions of {name} have none"
        )


def check_sandbox(problems):
    """Refuse programs where there is no sandbox to run them in."""
    if any(problem["kind"] == "program" for problem in problems) and (reason := evaluator.sandbox_problem()):
        raise SettingsError(f"programs are run in a sandbox only: {reason}")


def run_settings(run):
    """The constants that a run was made with."""
    try:
        config = with_defaults(json.loads((run / "config.json").read_text()))
        return {name: type(CONSTANTS[name][1])(config[name]) for name in CONSTANTS}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise SettingsError(f"{run} is no run that can be read: {error!r}") from None


def new_run_folder(stem):
    """runs/NAME, not made yet; without --run the first free number behind a stem."""
    if RUN:
        run = Path("runs") / RUN
        if (run / "config.json").exists():
            raise SettingsError(f"{run} exists already: choose another --run, or go on with --resume {run}")
        return run
    names = (f"{stem}-{number}" for number in itertools.count(1))
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())


def run_folder(actions, flags):
    """Set the constants for a new run or a resumed one, and say which folder is its."""
    if actions.resume is None:
        apply_settings(flags)
        if actions.test:
            globals().update(STEPS=2, ITERATIONS=1, EVAL_QUESTIONS=min(EVAL_QUESTIONS or 8, 8))
        check_settings()
        data = "curriculum" if "," in DATASET else Path(DATASET).stem.partition(":")[0]
        return new_run_folder("test" if actions.test else f"{Path(MODEL).name}-{data}")
    run = Path(actions.resume)
    inherited = run_settings(run)
    free = [name for name in RESUMABLE if name != "STEPS" or inherited["ITERATIONS"] == 1]
    for name, value in flags.items():
        if value != inherited[name] and name not in free:
            raise SettingsError(
                f"{run} was made with --{name.lower()} {inherited[name]}: a resumed run keeps its settings"
            )
    apply_settings(flags, inherited)
    check_settings()
    return run


def needs():
    return MODEL


def tensorboard(run, step):
    """A writer of TensorBoard's files that forgets what a killed run wrote from a step on, or None."""
    if not TENSORBOARD:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run / "tensorboard", purge_step=step)


def longest_prompt(policy, tokenizer, test_problems):
    """MAX_PROMPT_TOKENS, or what the model's context leaves for a prompt; refuses test questions that are longer."""
    left = getattr(policy.config, "max_position_embeddings", math.inf) - MAX_NEW_TOKENS
    lengths = [len(llms.encode(tokenizer, rldatasets.prompt(problem))) for problem in test_problems]
    if max(lengths) > left:
        raise SettingsError(
            f"prompts of {max(lengths)} tokens leave {MODEL} no room for an output: lower --max_new_tokens"
        )
    if min(lengths) > MAX_PROMPT_TOKENS:
        raise SettingsError(f"all test questions are longer than --max_prompt_tokens {MAX_PROMPT_TOKENS}")
    return min(MAX_PROMPT_TOKENS, left)


def reward_model():
    """REWARD_MODEL and its tokenizer, or None where a rank cannot have it: then the rules judge alone."""
    if not REWARD_MODEL:
        return None
    loaded, reasons = None, []
    with llms.one_first():
        try:
            loaded = llms.load_reward_model(REWARD_MODEL)
        except llms.ModelError as error:
            reasons = [str(error)]
    reasons = llms.gather(reasons)
    if reasons:
        print(f"note: {reasons[0]}; the rules judge alone.")
    return None if reasons else loaded


def new_state(policy, tokenizer):
    """A policy at the beginning of its training, with all that the settings put beside it."""
    if LORA_RANK:
        torch.manual_seed(SEED)
        llms.add_lora(policy, LORA_RANK, LORA_ALPHA)
    if GRADIENT_CHECKPOINTING:
        llms.checkpoint_layers(policy)
    critic = llms.Critic(policy) if ALGORITHM == "ppo" else None
    for network in (policy, critic) if critic else (policy,):
        llms.shard(network)
    trained = [w for network in (policy, critic) if network for w in network.parameters() if w.requires_grad]
    adam = {"lr": LEARNING_RATE, "betas": (ADAM_BETA1, ADAM_BETA2), "weight_decay": WEIGHT_DECAY}
    generator = torch.Generator().manual_seed(SEED)
    return State(policy, tokenizer, torch.optim.AdamW(trained, **adam), generator, reward_model(), critic=critic)


@contextmanager
def only_writer(run):
    """A block in which no other process may write to a run; the system forgets its lock with the process."""
    if llms.RANK or not fcntl:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"{run} is being written by another process") from None
        except OSError as error:
            print(f"note: {run} cannot be locked ({error}): let no second process write to it.")
        yield


@llms.on_rank_0
def open_run(state, run):
    """Bring the files of a run's folder to where the state stands."""
    run.mkdir(parents=True, exist_ok=True)
    write_config(run)
    for name in ("metrics.jsonl", "samples.jsonl"):
        forget_after(run / name, state.step or -1)  # the base evaluation of step 0 is made again, and is the same
    state.tensorboard = tensorboard(run, state.step + 1)


def run_training(actions, flags):
    """A new run or a resumed one, to its end: what can be refused is refused before anything is written."""
    run, last = run_folder(actions, flags), ITERATIONS * STEPS
    if QUESTIONS_PER_STEP < llms.WORLD:
        raise SettingsError(
            f"--questions_per_step {QUESTIONS_PER_STEP} is less than one for each of {llms.WORLD} ranks"
        )
    check_data()
    problems = test_set()
    for name, _ in rldatasets.stages(DATASET):  # a data set that cannot be read is refused here, whatever its stage
        some = list(itertools.islice(rldatasets.shuffled(name, "train", SEED), 50))
        check_sandbox([*problems, *some])
        check_solutions(some, name)
    print(needs())
    with llms.one_first():
        folder = model_folder(MODEL)
    policy, tokenizer = llms.load(folder)  # 1: π_θ ← π_θinit
    globals()["MAX_PROMPT_TOKENS"] = longest_prompt(policy, tokenizer, problems)
    state = new_state(policy, tokenizer)
    if actions.resume is not None and (run / "checkpoint" / "state.safetensors").exists():
        load_checkpoint(state, run)
    if state.step > last:
        raise SettingsError(f"{run} is at step {state.step} already, beyond --steps {STEPS}")
    stream = questions_of(state)

    with only_writer(run):
        open_run(state, run)
        ranks = f"{llms.WORLD} ranks, " if llms.WORLD > 1 else ""
        print(f"{ALGORITHM} on {DATASET}; {ranks}{policy.device}; everything goes to {run}")
        evaluate_at = {last} if actions.test else {0, last, *range(0, last, EVAL_EVERY)}
        if torch.cuda.is_available() and llms.precision(policy.device) is torch.float32:
            print("note: this GPU does not compute in bf16: fp32 takes twice the memory and more time.")
        if LORA_RANK and LEARNING_RATE < 1e-5:
            print(f"note: an adapter learns little at --learning_rate {LEARNING_RATE}: 1e-5 to 1e-4 is usual.")
        stopped = train(state, stream, problems, run, evaluate_at)
        if state.tensorboard:
            state.tensorboard.close()
        if stopped:
            start = "python" if llms.WORLD == 1 else f"torchrun --nproc_per_node {llms.LOCAL_WORLD}"
            print(f"stopped after step {state.step} and saved; go on with: {start} main.py --resume {run}")
            return 128 + stopped
        llms.save(policy, tokenizer, run / "model")
        summary(run)
        print(
            f"\nthe model is in {run / 'model'}, the curves in {run / 'train_score.png'} and {run / 'eval_score.png'}"
        )
        return 0


def run_evaluation(actions, flags):
    """Test one model, or two on the same questions with the paired difference."""
    names = [name for name in (actions.evaluate, actions.against) if name]
    runs = [Path(name) for name in names if (Path(name) / "metrics.jsonl").exists()]
    apply_settings({"MODEL": actions.evaluate} | flags, run_settings(runs[0]) if runs else None)
    check_settings()
    problems, right = test_set(), []
    check_sandbox(problems)
    for name in names:
        with llms.one_first():
            folder = model_folder(name)
        policy, tokenizer = llms.load(folder)
        metrics, records = evaluate(llms.shard(policy), tokenizer, problems)
        right.append([record["correctness"] for record in records])
        print(f"{name}: {scores(metrics)}")
    if actions.against:
        gains = [a - b for a, b in zip(*right)]
        half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        print(f"difference: {statistics.mean(gains):+.3f} ± {half:.3f} (95 %, paired)")
        print(f"right only by {names[0]}: {gains.count(1)}, only by {names[1]}: {gains.count(-1)}, of {len(gains)}")
    return 0


def complain(text):
    """An error in one line; of one that all ranks meet only rank 0's is seen, after which torchrun ends the others."""
    if llms.RANK:
        time.sleep(3)
    rank = f" on rank {llms.RANK}" if llms.WORLD > 1 else ""
    print(f"main.py: error{rank}: {text}", file=sys.stderr, flush=True)


def main(argv=None):
    actions, flags = parse(sys.argv[1:] if argv is None else argv)
    try:
        if actions.against is not None and not actions.evaluate:
            raise SettingsError("--against goes with --evaluate")
        if "" in (actions.resume, actions.evaluate, actions.against):
            raise SettingsError("--resume, --evaluate and --against need a name")
        if sum(map(bool, (actions.resume, actions.evaluate, actions.test))) > 1:
            raise SettingsError("--resume, --evaluate and --test exclude each other")
        if llms.RANK:
            sys.stdout = open(os.devnull, "w")
        with llms.distributed():
            return run_evaluation(actions, flags) if actions.evaluate else run_training(actions, flags)
    except (SettingsError, RunError, llms.ModelError, rldatasets.DataError, OSError, SafetensorError) as error:
        complain(error)
        return 1 if isinstance(error, RunError) else 2
    except torch.OutOfMemoryError as error:
        help = "try --lora_rank 32, --gradient_checkpointing, or less of --token_budget and --cache_tokens"
        complain(f"{str(error).splitlines()[0]} ({help})")
        return 1
    except RuntimeError as error:
        if not llms.lost_another_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        complain(f"lost the other ranks, one of which or torchrun may say why; --resume goes on ({reason})")
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
