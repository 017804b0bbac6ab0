"""GRPO by hand: Algorithm 1 of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), on rewards that a rule can check.

    python main.py                                        a tiny model learns arithmetic: any laptop, no download
    python main.py --model Qwen/Qwen2.5-1.5B-Instruct     GSM8K on one GPU
    torchrun --nproc_per_node 8 -- main.py --model …      the same on 8 GPUs
    python main.py --resume runs/NAME                     go on from the newest checkpoint
    python main.py --evaluate A [--against B]             test one model, or two on the same questions

Read downwards. First comes the paper: constants, advantages, objective, Algorithm 1, one update, Table 10. Below a line
of # comes what was published after it, which is off by default. Then comes the rest: evaluation, games, records,
checkpoints, command line. The names are the paper's:

    paper             code                              shape
    q                 problem["question"]               Q questions per step
    q and o_i, |o_i|  rollout.ids, mask.sum(1)          [N, P + T], [N]
    r_i               rewards                           [Q, G]
    Â_{i,t}           advantages                        [N] where all t share one (§4.1.2), [N, T] by steps (§4.1.3)
    log π_θ, π_θold   logp, logp_old                    [N, T]  of the sampled tokens
    log π_ref         logp_ref                          [N, T]
    G, μ, ε, β        GROUP_SIZE, MU, EPSILON_*, BETA   N = Q·G; P, T: tokens of the longest prompt, output

With several GPUs each process (a "rank") has its share of the questions, and in shapes Q and N are this rank's.

Departures: where the code leaves the paper, or decides what the paper leaves open, and where to change that:
 1. The reward is a weighted sum of rules for the answer and its form (REWARDS), and of a model that stays frozen
    (REWARD_MODEL). Algorithm 1, line 12, trains nothing. No setting.
 2. std(r) divides by G - 1 (the paper does not say; correction=0 divides by G), and 1e-4 is added to it, so that
    nothing is divided by 0: `group_advantages`.
 3. π_θ, π_θold and π_ref are read at the sampling temperature: TEMPERATURE = 1.0 gives the formulas as printed.
 4. π_θold is the policy before the μ updates of a step. With μ = 1, log π_θold is logp.detach() in `backward`, and ρ
    is 1. Where the outputs are older (STALENESS), CORRECTION weighs them.
 5. SUPERVISION = "process" is §4.1.3, with two choices of ours: a rule rewards the reasoning steps, and the answer is
    one more step at the end, with reward r_i. "both" is not in the paper: Â of the output, plus REWARDS["steps"] × Â
    of the steps.
 6. An output that is cut at MAX_NEW_TOKENS stays in the loss: MASK_TRUNCATED = True leaves its tokens out.
 7. Without a KL and without a critic, an output with Â = 0 has no gradient. It is not computed: `backward`.
 8. RFT and DPO sample again from the reference (π_sft, in the first iteration) at every step; the paper samples once,
    before. No setting.
 9. DPO's coefficient is the derivative of (12): unlike (14) as printed, it has a factor β, and one Δ for all tokens of
    a pair: `preference`.
10. PPO's value function is a network of its own (Figure 4), its loss is clipped, its advantages are not whitened. No
    setting.
11. The data are GSM8K (DATASET); the paper adds MATH, 144K questions in all. The paper does not give ε (EPSILON_*), the
    warm-up (WARMUP), AdamW's betas (`new_optimizer`), the clipping of the gradient (MAX_GRAD_NORM), or the order of
    the questions (SEED).
12. π_θinit is any model; the paper's has been through SFT. COLD_START > 0 begins with SFT, for a model that needs it.
    The learning rate of that is in `learning_rate`.
"""
# Words are easier to read without quotes.
# ruff: noqa: SIM905

import argparse
import ast
import difflib
import importlib.util
import itertools
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import evaluator
import llms
import rldatasets
from plots import plot, report


class of_model(NamedTuple):
    """The two values of a constant: for --model tiny, and for any other."""

    tiny: object
    other: object


# ==== Constants =====================================================================================================
# What stands here is in force. Each constant is also a flag of the same name (--group_size 8), and its comment is the
# flag's help. of_model(a, b) becomes a for the tiny model and b for any other, before anything runs: b is meant for
# Qwen2.5-1.5B-Instruct on GSM8K with an 80 GB GPU, and is the paper's value (§4.2) where it gives one. "a | b: …" names
# the values to choose from.

# -- Model and data
MODEL = "tiny"  # π_θinit: a hub name, a folder, or tiny: a small model that is built here
DATASET = of_model("arithmetic", "gsm8k")  # D: a name, a file, a folder; or stages, name:steps,name:steps
TEMPLATE_OPTIONS = ""  # options of the model's chat template, as in enable_thinking=false; several with commas
SHOTS = 0  # worked training problems in every prompt, before its question: for base models (try 4)
EVAL_DATASET = ""  # the questions to test on, several with commas; empty: the test split of DATASET
RUN = ""  # name of the run's folder under runs/; empty: model, data set and a number
SEED = 0  # random seed of the question order and of all sampling
THREADS = of_model(1, 0)  # threads of the CPU; 0: as torch chooses. Beside other programs one is best for tiny
LORA_RANK = 0  # LoRA rank r; 0 trains all weights
LORA_ALPHA = 64.0  # LoRA α: the adapter is scaled by α/r; use a learning rate of 1e-5 or more
PRECISION = "auto"  # auto | fp32 | bf16: of matrix products; auto: bf16 on a GPU that has it. Weights stay in fp32
GRADIENT_CHECKPOINTING = False  # compute activations again in the backward pass: slower, far less memory
COLD_START = 0  # SFT steps on worked solutions before Algorithm 1, if the model does not write the tags (try 50)
# -- Algorithm 1
ALGORITHM = "grpo"  # sft | rft | dpo | online_rft | ppo | grpo | distill: a row of Table 10, or distillation
ITERATIONS = 1  # I, outer iterations, each begins with π_ref ← π_θ (paper: 1; Figure 6: up to 2)
STEPS = of_model(50, 467)  # M, steps per iteration (467 × 16 questions: one pass over GSM8K)
QUESTIONS_PER_STEP = 16  # Q: 16 × 64 outputs are the paper's batch of 1024
GROUP_SIZE = of_model(8, 64)  # G, outputs per question (paper: 64): fewer are cheaper and noisier
MU = 1  # μ, updates per rollout (paper: 1): with more, outputs are used again and the clip matters
REFILL = 0  # most draws in a step, until Q groups have right and wrong outputs (DAPO: 10); 0: use all groups
STALENESS = 0  # train on outputs that were sampled so many steps before; with CORRECTION
# -- Sampling
TEMPERATURE = 1.0  # divides the logits, in sampling and in log π alike: lower explores less
MAX_NEW_TOKENS = of_model(64, 1024)  # tokens of the longest output (paper: 1024)
MAX_PROMPT_TOKENS = 512  # a training question with a longer prompt (SHOTS aside) is skipped and counted
CACHE_TOKENS = 524288  # tokens in the KV cache at once: lower it when sampling runs out of memory
# -- Objective, eq. (3) and (4)
SUPERVISION = "outcome"  # outcome | process | both: rewards for outputs (§4.1.2), reasoning steps (§4.1.3)
ADVANTAGE = "grpo"  # grpo | rloo | dr_grpo | batch_std | maxrl | pass_at_k | gdpo | w_reinforce: Â_i
PASS_K = 4  # k of pass_at_k
OBJECTIVE = "grpo"  # grpo | gspo | cispo | dual_clip: the clipped term of eq. (3), or another in its place
EPSILON_LOW = 0.2  # ε below: the ratio is clipped at 1 - ε (paper: not stated; PPO: 0.2)
EPSILON_HIGH = 0.2  # ε above: the ratio is clipped at 1 + ε (DAPO raises it to 0.28)
DELTA = 3.0  # δ of dual_clip: where Â < 0 the ratio counts at most δ
BETA = 0.04  # β, weight of the KL (paper: 0.04), for grpo and ppo; 0: no KL, the policy moves freely
KL = "k3"  # k1 | k2 | k3 | k3+: estimator of the KL; k3 is eq. (4); the gradient of k1 is 0 on average
DENOMINATOR = "sequence"  # sequence | token | group | constant: |o_i|, all tokens, those of a group, the limit
CORRECTION = "none"  # none | tis | sequence_tis | icepop: for outputs of an older policy (STALENESS)
CORRECTION_MAX = 2.0  # highest weight of tis and sequence_tis
MASK_TRUNCATED = False  # leave the tokens of outputs that were cut at MAX_NEW_TOKENS out of the loss (DAPO)
# -- Rewards
REWARDS = {
    "correctness": 2.0,  # the answer is right
    "integer": 0.5,  # the answer is a whole number
    "strict_format": 0.5,  # exactly the form that the prompt asks for
    "soft_format": 0.5,  # reasoning, then answer, on any lines
    "tag_count": 0.5,  # share of the four tags that appear exactly once
    "tests": 1.0,  # share of its tests that a program passes
    "compiles": 0.5,  # the program compiles without a warning
    "reward_model": 1.0,  # the score of REWARD_MODEL, standardised over the outputs of a step
    "judge": 1.0,  # how likely an output is better than the others of its group, by JUDGE
    "steps": 0.5,  # not in r_i: the weight of the advantages of reasoning steps, if SUPERVISION is both
}  # r_i = Σ weight × reward; --rewards replaces the whole table; also: safety, overlong, lenient, random
REWARD_MODEL = ""  # a sequence classifier, hub name or folder, that scores every output; empty: rules only
JUDGE = ""  # a causal model, hub name or folder, that compares the outputs of a group in pairs (keep G small)
# -- Optimisation
LEARNING_RATE = of_model(2e-4, 1e-6)  # of AdamW (paper: 1e-6)
WARMUP = 10  # updates over which the learning rate rises from 0
SCHEDULE = of_model("linear", "constant")  # constant | linear | cosine: after the warm-up; not constant: to 0
MAX_GRAD_NORM = 1.0  # the global norm of the gradient is clipped here
TOKEN_BUDGET = of_model(16384, 4096)  # most tokens of a micro-batch: changes memory, not the gradient
# -- The other methods of Table 10
BETA_DPO = 2.0  # β of DPO, eq. (12): larger than BETA, as eq. (12) averages log-ratios over tokens
GAMMA = 1.0  # γ of PPO's advantages: below 1, later rewards count less
LAMBDA = 1.0  # λ of PPO's advantages (GAE): below 1 they follow the value function and vary less
TEACHER = ""  # model of distill, hub name or folder: it scores every token; with the same tokenizer
# -- Evaluation
EVAL_EVERY = of_model(5, 50)  # steps between evaluations; also before the first step and after the last
EVAL_QUESTIONS = of_model(200, 0)  # how many test questions; 0: all of the split
EVAL_SAMPLES = 0  # k: also draw k outputs per test question, for pass@k and maj@k; 0: greedy only
EVAL_TEMPERATURE = 0.7  # of those k outputs (paper, Figure 7: 0.7)
# -- Bookkeeping
SAVE_EVERY = 25  # steps between checkpoints
SHOW_EVERY = of_model(20, 10)  # steps between completions printed in full; 0: none
TENSORBOARD = False  # also write the metrics where TensorBoard reads them (pip install tensorboard)
# -- End of the constants

# ==== The advantages, §4.1.2 and §4.1.3 =============================================================================


def group_advantages(rewards):
    """Outcome supervision, §4.1.2: Â_i = (r_i - mean(r)) / std(r). rewards [Q, G] -> [Q, G].

    Each question by itself: rewards 1, 0, 0, 0 give (about) 1.5, -0.5, -0.5, -0.5.
    """
    r = rewards.double() - rewards[:, :1]  # [Q, G]  minus the first: Â is the same, and equal rewards give exactly 0
    mean = r.mean(1, keepdim=True)  # [Q, 1]
    std = r.std(1, keepdim=True)  # [Q, 1]
    return (r - mean) / (std + 1e-4)


def process_advantages(step_rewards, step_ends):
    """Process supervision, §4.1.3: Â_{i,t} = Σ_{index(j) ≥ t} r̃_i^{index(j)}, over the steps that end at t or later.

    step_rewards, step_ends [Q, G, T] -> [Q, G, T]. step_ends is True on the last token of each reasoning step, and
    step_rewards holds its reward there. r̃ is that reward, normalised over all steps of the group. After the last
    step, Â is 0.
    """
    normalised = torch.zeros(step_rewards.shape, dtype=torch.float64)  # [Q, G, T]  r̃
    for question, ends in enumerate(step_ends):
        R = step_rewards[question][ends]  # [K_1 + … + K_G]  the rewards of all steps of the group
        if len(R) > 1:  # a single step has nothing to be compared with
            normalised[question][ends] = group_advantages(R[None])[0]
    return normalised.flip(-1).cumsum(-1).flip(-1)  # [Q, G, T]


# ==== The objective, eq. (3) and (4) ================================================================================


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, denominator=None, logp_sampled=None):
    """Minus the objective of eq. (3), with the KL estimate of eq. (4): a scalar to minimise.

    logp, logp_old, logp_ref  [N, T]         log π_θ, log π_θold, log π_ref of each token; logp_ref None: no KL
    advantages                [N] or [N, T]  Â_i, shared by all tokens of output i, or Â_{i,t}
    mask                      [N, T]         1 on the |o_i| tokens of output i, the end token included
    denominator               [N, 1]         what divides each output; None: these rows are the whole update
    logp_sampled              [N, T]         log π as it was recorded while sampling, for CORRECTION
    """
    mask = mask.bool()
    if denominator is None:
        denominator = denominators(mask.sum(1), GROUP_SIZE)  # [N, 1]
    A = advantages.reshape(len(mask), -1)  # [N, 1] or [N, T]
    # padding may hold anything, even nan, and 0 · nan is nan
    logp = torch.where(mask, logp, 0.0)  # [N, T]
    logp_old = torch.where(mask, logp_old, 0.0)  # [N, T]
    A = torch.where(mask, A.to(logp.dtype), 0.0)  # [N, T]

    objective = OBJECTIVES[OBJECTIVE](logp, logp_old, A, mask)  # [N, T]  "grpo" is `clipped`, below
    if CORRECTION != "none":
        objective = objective * CORRECTIONS[CORRECTION](logp_old, logp_sampled, mask)  # [N, T]
    if BETA and logp_ref is not None:
        logp_ref = torch.where(mask, logp_ref, 0.0)  # [N, T]
        objective = objective - BETA * KLS[KL](logp, logp_old, logp_ref)  # [N, T]  "k3": below
    # 1/G Σ_i 1/|o_i| Σ_t, and the mean over the Q questions
    return -sum_over_tokens(objective, mask, denominator)


def clipped(logp, logp_old, A, mask):
    """The first part of eq. (3): min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â) with ρ = π_θ/π_θold. [N, T]; mask is for `gspo`."""
    ratio = token_ratio(logp, logp_old)  # [N, T]  ρ
    limited = ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)  # [N, T]
    return torch.minimum(ratio * A, limited * A)


def token_ratio(logp, logp_old):
    """ρ_{i,t} = π_θ/π_θold of each token: [N, T]."""
    log_ratio = (logp - logp_old).clamp(max=80)  # fp32 has no number for e^89
    return log_ratio.exp()


def k3(logp, logp_old, logp_ref):
    """Eq. (4): D_KL = π_ref/π_θ - log(π_ref/π_θ) - 1, which is never negative. [N, T]; logp_old is for `k3_plus`."""
    log_ratio = logp_ref - logp  # [N, T]  log(π_ref/π_θ)
    return torch.expm1(log_ratio) - log_ratio  # expm1(x) is exp(x) - 1, exact for small x


def sum_over_tokens(x, mask, denominator):
    """Σ_i Σ_t x_{i,t} / denominator_i, over the tokens of the outputs: a scalar."""
    return (x * mask / denominator).sum()


def denominators(lengths, group_size):
    """What divides the tokens of each output: [N, 1]. The counts in it are those of the whole update, over all ranks.

    lengths [N]: |o_i|. "sequence" is the 1/(Q·G) Σ_i 1/|o_i| Σ_t of eq. (3).
    """
    outputs, tokens = llms.sums_over_ranks(len(lengths), int(lengths.sum()))  # N and Σ|o| of all ranks
    lengths = lengths[:, None]  # [N, 1]
    if DENOMINATOR == "sequence":
        denominator = outputs * lengths
    elif DENOMINATOR == "constant":  # Dr. GRPO, arXiv 2503.20783
        denominator = outputs * torch.full_like(lengths, MAX_NEW_TOKENS)
    elif DENOMINATOR == "token":  # Σ|o| of the whole update: what TRL and verl compute for DAPO
        denominator = torch.full_like(lengths, tokens)
    elif DENOMINATOR == "group":  # DAPO, arXiv 2503.14476: Σ|o| of each group, then the mean over the Q questions
        of_group = lengths.view(-1, group_size).sum(1)  # [Q]
        questions = outputs // group_size
        denominator = questions * of_group.repeat_interleave(group_size)[:, None]
    return denominator.clamp(min=1)  # MASK_TRUNCATED makes lengths 0


# ==== Algorithm 1 ===================================================================================================


def train(state, after_step):
    """Algorithm 1, iterative GRPO, from wherever the state stands.

    after_step(state, metrics) evaluates and saves. It returns 0, or the number of a signal to stop for, such as that of
    Ctrl-C; then this function ends and returns it too.
    """
    # 1: π_θ ← π_θinit, the model as it was loaded
    if state.step <= COLD_START:  # also after its last step: a run that is resumed there has yet to reset AdamW
        stopped = cold_start(state, after_step)
        if stopped:
            return stopped
    for iteration in range(ITERATIONS):  # 2
        first = COLD_START + iteration * STEPS  # steps that are done before this iteration
        if state.step == first and needs_reference():
            state.reference = None  # frees its memory
            state.reference = llms.frozen_copy(state.policy)  # 3: π_ref ← π_θ
        while state.step < first + STEPS:  # 4
            llms.start_clock()
            if ALGORITHM == "grpo":
                learnt = grpo_step(state)  # 5 to 11
            else:
                learnt = other_step(state, TABLE_10[ALGORITHM])
            # 12: the reward is a rule or a frozen model, there is nothing to train
            state.step += 1
            stopped = after_step(state, record_step(state, *learnt))
            if stopped:
                return stopped
    return 0


def cold_start(state, after_step):
    """Before Algorithm 1: COLD_START steps of SFT (Table 10), whose result is π_θinit. Returns what `train` returns."""
    while state.step < COLD_START:
        llms.start_clock()
        learnt = other_step(state, TABLE_10["sft"])
        state.step += 1
        stopped = after_step(state, record_step(state, *learnt))
        if stopped:
            return stopped
    llms.reset_adam(state.optimizer)
    if state.critic:  # V_ψ starts from π_θinit too
        state.critic.trunk.load_state_dict(state.policy.base_model.state_dict())
    return 0


def needs_reference():
    """Is π_ref needed? RFT and DPO sample from it. If BETA > 0, GRPO and PPO have a KL, and Online RFT records one."""
    if ALGORITHM in ("rft", "dpo"):
        return True
    if ALGORITHM in ("sft", "distill"):
        return False
    return BETA > 0


def grpo_step(state):
    """Lines 5 to 11 for one batch of questions; with several ranks, each has its share.

    Returns the batch, Â, and what each `update` has returned.
    """
    if REFILL or STALENESS:
        batch = other_batch(state)  # published later
    else:
        batch = draw(state, state.policy)  # 5 to 8
    logp_old = None  # with μ = 1 it is log π_θ itself
    if MU > 1:
        logp_old = llms.log_probs(state.policy, batch.rollout, TEMPERATURE)  # [N, T]
    logp_ref = None
    if BETA:
        logp_ref = llms.log_probs(state.reference, batch.rollout, TEMPERATURE)  # [N, T]
    if SUPERVISION == "outcome":
        advantages = outcome_advantages(batch).flatten()  # 9: Â_i, [N]
    else:
        advantages = step_advantages(state, batch)  # 9: Â_{i,t}, [N, T]
    updates = []
    if batch.learns:
        for _ in range(MU):  # 10
            updates.append(update(state, batch.rollout, advantages, logp_old, logp_ref))  # 11
    return batch, advantages, updates


def outcome_advantages(batch):
    """Line 9 with outcome supervision: [Q, G], by the function of ADVANTAGE; "grpo" is `group_advantages`."""
    if ADVANTAGE == "gdpo":  # the only one that looks at each reward by itself
        return gdpo(batch.by_name)
    return ADVANTAGES[ADVANTAGE](batch.rewards)


def step_advantages(state, batch):
    """Â_{i,t} [N, T]; the mean reward of each output's reasoning steps is recorded as the reward "steps"."""
    rollout = batch.rollout
    Q, G = batch.rewards.shape
    asked = llms.repeated(batch.problems, G)  # [N]
    # for each output [(end of a reasoning step in the text, its reward)]
    marks = list(map(evaluator.step_rewards, rollout.texts, asked))
    step_rewards, step_ends = llms.at_tokens(state.tokenizer, rollout, marks)  # [N, T]
    means = step_rewards.sum(1) / step_ends.sum(1).clamp(min=1)  # [N]
    batch.by_name["steps"] = means.view(Q, G)  # without the answer, which comes now
    if SUPERVISION == "process":  # the answer is one more step: r_i on the last token
        row = torch.arange(Q * G)
        end_token = rollout.mask.sum(1).cpu() - 1  # [N]
        step_rewards[row, end_token] = batch.rewards.flatten()
        step_ends[row, end_token] = True
    advantages = process_advantages(step_rewards.view(Q, G, -1), step_ends.view(Q, G, -1))  # [Q, G, T]
    if SUPERVISION == "both":
        outcome = group_advantages(batch.rewards)[:, :, None]  # [Q, G, 1]
        advantages = outcome + REWARDS["steps"] * advantages
    return advantages.flatten(0, 1)


def draw(state, source):
    """Lines 5 to 8: questions, G outputs of the source for each, and their rewards."""
    problems, prompts = next_questions(state)  # 5: a batch D_b
    # 6: π_θold ← π_θ needs no copy of the network: logp_old holds all that eq. (3) asks of π_θold
    rollout = llms.sample(  # 7: {o_i} ~ π_θold(·|q), G for each q
        source, state.tokenizer, prompts, GROUP_SIZE, MAX_NEW_TOKENS, TEMPERATURE, state.generator
    )
    if source is not state.policy:
        rollout = rollout._replace(logp=None, entropy=None)  # they are not π_θ's
    state.tokens += llms.total_over_ranks(int(rollout.mask.sum()))
    by_name = score(state, problems, rollout)  # 8: {name of a reward: [Q, G]}
    return Batch(problems, rollout, by_name, weighted_sum(by_name))


# ---- line 5: the questions -----------------------------------------------------------------------------------------


def next_questions(state):
    """All ranks draw the same QUESTIONS_PER_STEP problems with short enough prompts; each keeps its share of both."""
    open_stream(state)
    problems = []
    prompts = []
    while len(problems) < QUESTIONS_PER_STEP:
        problem = next(state.stream)
        state.position += 1
        if isinstance(problem, rldatasets.DataError):
            skip_row(state, problem)
            continue
        prompt = prompt_ids(state.tokenizer, problem)
        if len(prompt) <= state.prompt_limit:
            problems.append(problem)
            prompts.append(prompt)
        else:
            state.prompts_skipped += 1
    state.questions += len(problems)
    return llms.share(problems), llms.share(prompts)


def open_stream(state):
    """Open state.stream at state.position, in the data set of the step that the next questions are for."""
    stage, dataset = stage_of(state.step + len(state.queue))  # each batch in the queue is for an earlier step
    if stage != state.stage:
        state.stage = stage
        state.position = 0
        state.stream = None
    if state.stream is None:
        seed = f"{SEED} {stage}" if stage else SEED
        state.stream = rldatasets.shuffled(dataset, "train", seed, state.position)


def first_dataset():
    """The data set of the first stage."""
    return stage_of(0)[1]


def stage_of(step):
    """(number, data set) of the curriculum's stage at a step; the cold start has the questions of the first stage."""
    return rldatasets.stage_at(DATASET, max(0, step - COLD_START), STEPS)


def prompt_ids(tokenizer, problem):
    """The prompt of a problem, with SHOTS worked examples in it that are the same for all problems."""
    examples = rldatasets.examples(first_dataset(), SHOTS)
    return llms.encode(tokenizer, rldatasets.prompt(problem, examples))


# ---- line 8: the rewards -------------------------------------------------------------------------------------------


@llms.timed("reward")
def score(state, problems, rollout):
    """Every reward of every output, unweighted: {name: [Q, G]}."""
    by_name = rule_rewards(problems, rollout)
    if rollout.group_size > 1:
        by_name |= rewards_of_groups(problems, rollout)
    if problems[0]["kind"] == "nim":  # a game, far below
        by_name["optimal"] = by_name["correctness"]  # only recorded: is it the move of perfect play?
        by_name["correctness"] = self_play(state, problems, rollout)  # a move is right if it wins
    by_name["overlong"] = overlong(rollout)
    if state.reward_model:
        by_name["reward_model"] = model_rewards(state.reward_model, problems, rollout)
    if state.judge and rollout.group_size > 1:
        by_name |= judge_rewards(state.judge, problems, rollout)
    if REWARDS.get("random"):
        by_name["random"] = coin_tosses(state, problems, rollout)
    return by_name


def rule_rewards(problems, rollout):
    """The rewards of evaluator.py that look at one output: {name: [Q, G]}."""
    G = rollout.group_size
    asked = llms.repeated(problems, G)  # [N]
    threads = max(1, os.cpu_count() // llms.LOCAL_WORLD)
    by_name, failures = evaluator.score(rollout.texts, asked, threads, note)  # failures: errors of a reward's code
    failed, outputs = llms.sums_over_ranks(len(failures), len(asked))
    if failed == outputs:
        raise RunError(f"the rewards fail on every output: {failures[0]}")
    note_failures(failures)
    return {name: torch.tensor(values).view(-1, G) for name, values in by_name.items()}


def weighted_sum(by_name):
    """r_i = Σ weight × reward: [Q, G]. A reward that is not in REWARDS is only recorded."""
    return sum(REWARDS.get(name, 0.0) * values for name, values in by_name.items())


# ==== One update: line 11 ===========================================================================================
# Line 11 says "by maximising the GRPO objective (Equation 21)". Equation (21) is the gradient coefficient of the
# objective, Â + β (π_ref/π_θ - 1), where π_θold = π_θ. What is maximised is eq. (3); its gradient there is (20).


@llms.timed("update")
def update(state, rollout, advantages, logp_old, logp_ref, loss_function=grpo_loss, targets=None):
    """One optimizer step on the whole rollout, unless the loss or the gradient is not finite.

    advantages [N] or [N, T], or the gradient coefficient of another method (Table 10, below). logp_old is None where
    π_θold is π_θ. targets: those of the batch. Returns what is recorded: {name: number}.
    """
    measured = backward(state, rollout, advantages, logp_old, logp_ref, loss_function, targets)
    norms = []  # of the gradient, as they were before the clipping
    for network in (state.policy, state.critic):
        if network is not None:
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
            norms.append(llms.full_tensor(norm).item())
    lr = learning_rate(state.updates)
    state.optimizer.param_groups[0]["lr"] = lr
    finite = all(math.isfinite(number) for number in (measured["loss"], *norms))
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad()
    measured["grad_norm"] = norms[0]
    measured["lr"] = lr
    measured["skipped_updates"] = 0 if finite else 1
    state.updates += 1
    return measured


@llms.retry_with_less_memory("token_budget")
def backward(state, rollout, advantages, logp_old, logp_ref, loss_function, targets):
    """Leave the gradient of the whole rollout in .grad; returns the losses and diagnostics, {name: number}.

    The denominators are those of the whole update, over all micro-batches and ranks. So the gradients of micro-batches
    add up to the gradient of the full batch, but for rounding.
    """
    for trained in state.optimizer.param_groups:
        for weight in trained["params"]:
            weight.grad = torch.zeros_like(weight)  # where it is None, AdamW would not even apply its momentum
    lengths = rollout.mask.sum(1)  # [N]  |o_i|
    A = advantages.view(len(lengths), -1).to(lengths.device)  # [N, 1] or [N, T]
    counted = in_loss(rollout)  # [N]
    denominator = denominators(lengths * counted, rollout.group_size)  # [N, 1]
    has_gradient = counted  # [N]
    if logp_ref is None and targets is None:
        has_gradient = counted & A.any(1)
    learnt_tokens = llms.total_over_ranks(int(lengths[has_gradient].sum()))
    learnt_rows = has_gradient.nonzero().flatten().tolist()
    sums = Counter(loss=0.0)
    maxima = Counter()
    for rows, factor in llms.micro_batches(rollout, learnt_rows):  # factor 1; 0 where only other ranks have rows left
        ids, attention, mask = rollout.rows(rows)
        T = mask.shape[1]
        logp = llms.token_logprobs(state.policy, ids, attention, mask, TEMPERATURE)  # [n, T]
        old = part(logp_old, rows, T)  # [n, T]
        if old is None:
            old = logp.detach()
        ref = part(logp_ref, rows, T)
        sampled = part(rollout.logp, rows, T)
        loss = loss_function(logp, old, ref, A[rows, :T], mask, denominator[rows], sampled)
        (factor * loss).backward()
        sums["loss"] += factor * loss.item()
        if factor:
            for name, x in diagnostics(logp, old, ref, sampled, A[rows, :T], mask).items():
                x = torch.where(mask, x, 0)  # [n, T]
                if name.endswith("_max"):
                    maxima[name] = max(maxima[name], x.max().item())
                else:
                    sums[name] += x.sum().item() / learnt_tokens
        if targets:
            V = state.critic.token_values(ids, attention, mask)  # [n, T]
            values, returns = targets
            loss = value_loss(V, values[rows, :T], returns[rows, :T], mask, denominator[rows])
            (factor * loss).backward()
            sums["value_loss"] += factor * loss.item()
    return llms.merged_over_ranks(sums, sum) | llms.merged_over_ranks(maxima, max)


def in_loss(rollout):
    """Which outputs count in the loss: [N]. All, or with MASK_TRUNCATED those that were not cut."""
    if MASK_TRUNCATED:
        return ~rollout.truncated
    return torch.ones_like(rollout.truncated)


def part(x, rows, T):
    """Some rows of a tensor [N, …], and its first T columns; None stays None."""
    return None if x is None else x[rows, :T]


@torch.no_grad()
def diagnostics(logp, logp_old, logp_ref, logp_sampled, A, mask):
    """Is the update healthy? {name: a number of each token}.

    Recorded is the mean, or the maximum where the name ends in _max.
    """
    ratio = token_ratio(logp, logp_old)  # [n, T]
    if OBJECTIVE == "gspo":
        ratio = sequence_ratio(logp, logp_old, mask)  # [n, 1]
    below = ratio < 1 - EPSILON_LOW
    above = ratio > 1 + EPSILON_HIGH
    if OBJECTIVE != "cispo":  # in a min(), the clip acts above only if Â > 0, and below only if Â < 0
        below = below & (A < 0)
        above = above & (A > 0)
    measured = {"clip_low": below, "clip_high": above, "ratio_max": ratio}
    if logp_sampled is not None:
        gap = (logp_old - logp_sampled).abs()
        name = "staleness_gap" if STALENESS else "sampler_gap"
        measured[name] = gap
        measured[f"{name}_max"] = gap
        if CORRECTION != "none":
            weight = token_weight(logp_old, logp_sampled, mask)  # [n, T]
            if CORRECTION == "sequence_tis":
                weight = sequence_weight(logp_old, logp_sampled, mask)  # [n, 1]
            measured["correction"] = weight
            limited = CORRECTIONS[CORRECTION](logp_old, logp_sampled, mask)
            measured["correction_limited"] = limited != weight
            measured["correction_max"] = weight
    if logp_ref is not None:
        measured["kl"] = k3(logp, logp_old, logp_ref)
        measured["kl_log_ratio_max"] = (logp_ref - logp).abs()
    return measured


def learning_rate(number):
    """The learning rate of update `number`, from 0 on: it warms up, then follows SCHEDULE. So does the cold start's."""
    highest = LEARNING_RATE
    total = ITERATIONS * STEPS * MU
    if number < COLD_START:
        highest = 2e-4 if LORA_RANK else 2e-5  # a usual rate of SFT; adapters need about ten times as much
        total = COLD_START
    else:
        number -= COLD_START
    if number < WARMUP:
        return highest * (number + 1) / (WARMUP + 1)
    left = (total - number) / max(1, total - WARMUP)  # falls from 1 to 0
    if SCHEDULE == "linear":
        return highest * left
    if SCHEDULE == "cosine":
        return highest * (1 + math.cos(math.pi * (1 - left))) / 2
    return highest


# ==== What a step and a run carry ===================================================================================


@dataclass
class Batch:
    """What a step trains on, this rank's share: Q questions, N = Q·G outputs, their rewards."""

    problems: list
    rollout: llms.Rollout  # the outputs: ids [N, P + T], mask [N, T], logp [N, T] as sampled, texts, …
    by_name: dict  # {name of a reward: [Q, G]}, unweighted
    rewards: torch.Tensor  # [Q, G]  r_i
    learns: bool = True  # False: too few groups are left, and no update is made
    dropped: list = field(default_factory=list)  # records of outputs that were drawn in vain (REFILL)
    metrics: dict = field(default_factory=dict)  # of how it was drawn, and of the method
    targets: tuple = None  # V before the updates and the returns, both [N, T]: what PPO's critic learns from


@dataclass
class State:
    """All that training carries from one step to the next."""

    policy: torch.nn.Module  # π_θ
    tokenizer: object
    run: Path = None  # the run's folder
    optimizer: torch.optim.Optimizer = None
    generator: torch.Generator = None  # the random numbers of sampling
    reference: torch.nn.Module = None  # π_ref, where something needs it
    critic: torch.nn.Module = None  # V_ψ of PPO
    reward_model: tuple = None  # REWARD_MODEL and its tokenizer
    judge: tuple = None  # JUDGE and its tokenizer
    teacher: torch.nn.Module = None  # TEACHER
    stream: object = None  # iterator over the training problems
    queue: list = field(default_factory=list)  # batches that wait for their step (STALENESS)
    prompt_limit: int = 0  # MAX_PROMPT_TOKENS and the SHOTS; less for a model with a short context
    step: int = 0  # of the cold start and of all iterations, as the counters below
    updates: int = 0  # optimizer steps, skipped ones included
    stage: int = 0  # finished stages of the curriculum
    position: int = 0  # problems read in this stage; 0 again at the next
    questions: int = 0  # drawn
    prompts_skipped: int = 0  # too long
    rows_skipped: int = 0  # of the data, that cannot be read
    tokens: int = 0  # of outputs, those of the cold start left out
    not_finite: int = 0  # steps in a row whose update was not finite
    stop_signal: int = 0  # Ctrl-C or SIGTERM, which ask for an end after the step

    def networks(self):
        """The networks that a checkpoint holds, by name."""
        named = {"policy": self.policy, "reference": self.reference, "critic": self.critic}
        return {name: network for name, network in named.items() if network is not None}


# ==== Table 10 (§5.2.1): the other methods ==========================================================================
# All use ∇J = E[(q, o) ~ D] 1/|o| Σ_t GC(q, o, t) ∇log π_θ(o_t | q, o_<t), eq. (5). They differ in the data source D,
# the reward function and the gradient coefficient GC.


def other_step(state, method):
    """A step of one of the other methods, a row of TABLE_10, in the place of `grpo_step`."""
    source, coefficient, loss = method
    if source == "solutions":
        batch = worked_solutions(state)
    else:
        batch = draw(state, state.networks()[source])
    logp_old = None
    logp_ref = None
    if source == "policy":  # a ratio and a KL can be estimated only from outputs of π_θ
        if MU > 1:
            logp_old = llms.log_probs(state.policy, batch.rollout, TEMPERATURE)  # [N, T]
        if needs_reference():
            logp_ref = llms.log_probs(state.reference, batch.rollout, TEMPERATURE)  # [N, T]
    GC = coefficient(state, batch, logp_old, logp_ref)
    updates = []
    num_updates = 1 if source == "solutions" else MU
    for _ in range(num_updates):
        updates.append(update(state, batch.rollout, GC, logp_old, logp_ref, loss, batch.targets))
    return batch, GC, updates


def likelihood_loss(logp, logp_old, logp_ref, GC, mask, denominator, logp_sampled=None):
    """Minus 1/N Σ_i 1/|o_i| Σ_t GC_i log π_θ, eq. (6), (8). With DPO's GC it has the gradient of (12) only."""
    return -sum_over_tokens(GC * logp, mask, denominator)


def worked_solutions(state):
    """SFT's batch: questions with the worked solutions that the data set has, as outputs with an end token."""
    problems, prompts = next_questions(state)
    if not all(problem["solution"] for problem in problems):
        raise RunError("a question has no worked solution to imitate")
    texts = [rldatasets.written_out(problem) for problem in problems]
    rollout = llms.rollout_from_texts(state.policy, state.tokenizer, prompts, texts, MAX_NEW_TOKENS)
    if state.step >= COLD_START:
        state.tokens += llms.total_over_ranks(int(rollout.mask.sum()))
    by_name = score(state, problems, rollout)
    return Batch(problems, rollout, by_name, weighted_sum(by_name))


def ones(state, batch, logp_old, logp_ref):
    """SFT: 1, eq. (7)."""
    return torch.ones(len(batch.rollout.mask))


def is_right(state, batch, logp_old, logp_ref):
    """RFT and Online RFT: 𝕀(o), 1 if the answer is right, else 0, eq. (10)."""
    return batch.by_name["correctness"].flatten()


def preference(state, batch, logp_old, logp_ref):
    """DPO: β σ(-Δ) for o⁺ and - β σ(-Δ) for o⁻, eq. (14), in pairs of a right and a wrong output of the same group.

    Δ = β (1/|o⁺| Σ_t log π_θ/π_ref(o⁺_t) - 1/|o⁻| Σ_t log π_θ/π_ref(o⁻_t)). Eq. (12) is the mean of log σ(Δ) over all
    pairs. As printed, (13) and (14) lack the factor β and have one Δ per token; this is the derivative of (12).
    """
    rollout = batch.rollout
    plus, minus = right_and_wrong(batch)  # rows, [pairs] each
    N = len(rollout.mask)
    num_pairs, num_outputs = llms.sums_over_ranks(len(plus), N)
    batch.metrics["dpo/pairs"] = num_pairs
    GC = torch.zeros(N)  # [N]
    if num_pairs == 0:
        return GC
    logp = llms.log_probs(state.policy, rollout, TEMPERATURE)  # [N, T]
    logp_ref = llms.log_probs(state.reference, rollout, TEMPERATURE)  # [N, T]
    log_ratio = (logp - logp_ref).sum(1) / rollout.mask.sum(1).clamp(min=1)  # [N]
    delta = BETA_DPO * (log_ratio[plus] - log_ratio[minus])  # [pairs]
    loss = -torch.nn.functional.logsigmoid(delta)  # [pairs]
    coefficient = BETA_DPO * torch.sigmoid(-delta)  # [pairs]  β σ(-Δ)
    GC[plus] = (coefficient * num_outputs / num_pairs).to(GC)  # the loss divides by N, and (12) by the pairs
    GC[minus] = -GC[plus]
    batch.metrics["dpo/loss"] = llms.mean_over_ranks(loss.tolist())
    batch.metrics["dpo/margin"] = llms.mean_over_ranks(delta.tolist())
    return GC


def right_and_wrong(batch):
    """Pairs of a right and a wrong output of the same group, each output at most once: rows [pairs], rows [pairs]."""
    usable = in_loss(batch.rollout).cpu().view(batch.rewards.shape)  # [Q, G]
    right = batch.by_name["correctness"] > 0  # [Q, G]
    rows = torch.arange(right.numel()).view(right.shape)  # [Q, G]
    plus = []
    minus = []
    for group, good, bad in zip(rows, right & usable, ~right & usable):  # [G] each
        pairs = min(good.sum(), bad.sum())
        plus += group[good][:pairs].tolist()
        minus += group[bad][:pairs].tolist()
    return torch.tensor(plus, dtype=torch.long), torch.tensor(minus, dtype=torch.long)


def ppo_advantages(state, batch, logp_old, logp_ref):
    """PPO: A_t, eq. (18), by GAE on the rewards of eq. (2): r_i on the end token, - β log(π_θ/π_ref) on every token."""
    rollout = batch.rollout
    values = llms.values(state.critic, rollout)  # [N, T]
    rewards = torch.zeros_like(values)  # [N, T]
    end_token = rollout.mask.sum(1, keepdim=True) - 1  # [N, 1]
    rewards.scatter_(1, end_token, batch.rewards.view(-1, 1).to(rewards))  # r_i
    if BETA:
        logp = logp_old
        if logp is None:
            logp = rollout.logp  # what was recorded while sampling
        rewards -= BETA * (logp - logp_ref)
    advantages = gae(rewards, values, rollout.mask)  # [N, T]
    batch.targets = values, advantages + values
    return advantages


def gae(rewards, values, mask):
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, and V = 0 after the end (arXiv 1506.02438).

    rewards, values, mask [N, T] -> [N, T]. With V = 0, γ = λ = 1 and one reward at the end, A_t is that reward.
    """
    advantages = torch.zeros_like(values)
    A = 0.0
    V_next = 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * V_next - values[:, t]  # [N]
        A = (delta + GAMMA * LAMBDA * A) * mask[:, t]  # [N]
        V_next = values[:, t] * mask[:, t]  # [N]
        advantages[:, t] = A
    return advantages


def ppo_loss(logp, logp_old, logp_ref, advantages, mask, denominator, logp_sampled=None):
    """Minus eq. (1), which is eq. (3) without the KL: PPO has it in the reward."""
    return grpo_loss(logp, logp_old, None, advantages, mask, denominator, logp_sampled)


def value_loss(values, values_old, returns, mask, denominator):
    """½ max( (V - R)², (clip(V, V_old ± 0.2) - R)² ), as in OpenAI's baselines: no gradient once V is nearer by 0.2."""
    limited = values.clamp(values_old - 0.2, values_old + 0.2)  # [N, T]
    error = torch.maximum((values - returns) ** 2, (limited - returns) ** 2)  # [N, T]
    return sum_over_tokens(error / 2, mask, denominator)


# D: the outputs of π_θ ("policy") or π_sft ("reference"), or P_sft(Q, O) of the data set ("solutions"). GC: a function
# (state, batch, logp_old, logp_ref) -> [N] or [N, T], which may add to batch.metrics. A new method is a function and a
# line; distill, which is not in the paper, is added below.
TABLE_10 = {  # D, GC, loss
    "sft": ("solutions", ones, likelihood_loss),
    "rft": ("reference", is_right, likelihood_loss),
    "dpo": ("reference", preference, likelihood_loss),
    "online_rft": ("policy", is_right, likelihood_loss),
    "ppo": ("policy", ppo_advantages, ppo_loss),
}


# ########################################## Here the paper ends #####################################################

# ==== What came after the paper =====================================================================================
# Each is off as the constants stand. A method is a function and a line in a table, and a constant chooses it.

# ---- ADVANTAGE: rewards [Q, G] -> Â [Q, G] -------------------------------------------------------------------------


def dr_grpo(rewards):
    """Dr. GRPO (arXiv 2503.20783): r_i - mean(r), without the std. The paper has DENOMINATOR = "constant" with it."""
    r = rewards.double() - rewards[:, :1]  # [Q, G]  equal rewards give exactly 0
    return r - r.mean(1, keepdim=True)


def rloo(rewards):
    """RLOO (arXiv 2402.14740): r_i minus the mean of the other outputs of its group."""
    G = rewards.shape[1]
    r = rewards.double() - rewards[:, :1]  # [Q, G]
    others = (r.sum(1, keepdim=True) - r) / (G - 1)  # [Q, G]
    return r - others


def batch_std(rewards):
    """Magistral (arXiv 2506.10910), ScaleRL (arXiv 2510.13786): one std, that of r_i - mean(r) over all questions."""
    return over_their_std(dr_grpo(rewards))


def maxrl(rewards):
    """MaxRL (arXiv 2602.02710): (r_i - mean(r)) / mean(r), for rewards that are never negative; 0 if none is earned."""
    mean = rewards.double().mean(1, keepdim=True)  # [Q, 1]
    return torch.where(mean > 0, dr_grpo(rewards) / mean, 0.0)


def pass_at_k(rewards):
    """Pass@k training (arXiv 2508.10751): a set of k = PASS_K outputs earns 1 if one of them is right, else 0.

    Â_i is the mean of (reward of the set - mean) / std over all sets that hold output i, the mean and the std being
    those of all sets of the group.
    """
    G = rewards.shape[1]
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)  # [Q, G]
    for question, right in enumerate(rewards > 0):
        wrong = G - int(right.sum())
        failed = math.comb(wrong, PASS_K) / math.comb(G, PASS_K)  # share of the sets without a right output
        std = math.sqrt(failed * (1 - failed))
        if std > 0:
            failed_with_i = math.comb(wrong - 1, PASS_K - 1) / math.comb(G - 1, PASS_K - 1)  # i: a wrong output
            advantages[question, right] = failed / std
            advantages[question, ~right] = (failed - failed_with_i) / std
    return advantages


def w_reinforce(rewards):
    """W-REINFORCE (arXiv 2506.01347): 0.1 for a right output, -1 for a wrong one, whatever the group."""
    return torch.where(rewards > 0, 0.1, -1.0)


def gdpo(by_name):
    """GDPO (arXiv 2601.05242): each reward is normalised in its group, and their weighted sum in the batch."""
    normalised = {name: group_advantages(rewards) for name, rewards in by_name.items()}
    return over_their_std(weighted_sum(normalised))  # the mean of the sum is 0


def over_their_std(advantages):
    """Advantages [Q, G], divided by one std, that of all ranks."""
    everyones = torch.tensor(llms.gather(advantages.flatten().tolist()), dtype=advantages.dtype)  # [N]
    return advantages / (everyones.std() + 1e-4)


ADVANTAGES = {
    "grpo": group_advantages,
    "rloo": rloo,
    "dr_grpo": dr_grpo,
    "batch_std": batch_std,
    "maxrl": maxrl,
    "pass_at_k": pass_at_k,
    "gdpo": gdpo,  # of each reward by its name: see `outcome_advantages`
    "w_reinforce": w_reinforce,
}


# ---- OBJECTIVE: log π_θ, log π_θold, Â, mask -> what a token adds to the objective, [N, T] ---------------------------


def gspo(logp, logp_old, A, mask):
    """GSPO (arXiv 2507.18071): as `clipped`, with one ratio for the whole output."""
    ratio = sequence_ratio(logp, logp_old, mask)  # [N, 1]
    limited = ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)  # [N, 1]
    return torch.minimum(ratio * A, limited * A)


def sequence_ratio(logp, logp_old, mask):
    """(π_θ(o)/π_θold(o))^(1/|o|), the geometric mean of the ratios of an output's tokens: [N, 1]."""
    log_ratio = torch.where(mask, logp - logp_old, 0.0).sum(1, keepdim=True)  # [N, 1]
    return (log_ratio / mask.sum(1, keepdim=True).clamp(min=1)).clamp(max=80).exp()


def cispo(logp, logp_old, A, mask):
    """CISPO (arXiv 2506.13585): the clip only limits the weight of a token, so that none loses its gradient."""
    weight = token_ratio(logp, logp_old).clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)  # [N, T]
    return weight.detach() * A * logp


def dual_clip(logp, logp_old, A, mask):
    """Dual clip (arXiv 1912.09729): where Â < 0, a token counts at least δ Â, however likely it has become."""
    objective = clipped(logp, logp_old, A, mask)  # [N, T]
    return torch.where(A < 0, torch.maximum(objective, DELTA * A), objective)


OBJECTIVES = {"grpo": clipped, "gspo": gspo, "cispo": cispo, "dual_clip": dual_clip}


# ---- KL: log π_θ, log π_θold, log π_ref -> an estimate of D_KL for each token, [N, T] -------------------------------


def k1(logp, logp_old, logp_ref):
    """Schulman's k1: log(π_θ/π_ref). As a loss it teaches nothing: its gradient is 0 on average."""
    return logp - logp_ref


def k2(logp, logp_old, logp_ref):
    """Schulman's k2: ½ log²(π_ref/π_θ). Its gradient is that of the reverse KL, on average."""
    return (logp_ref - logp) ** 2 / 2


def k3_plus(logp, logp_old, logp_ref):
    """DeepSeek-V3.2 (arXiv 2512.02556): π_θ/π_θold × k3, with the gradient of both: the reverse KL, off policy too."""
    return token_ratio(logp, logp_old) * k3(logp, logp_old, logp_ref)


KLS = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus}


# ---- CORRECTION: log π_θold, log π_sampled, mask -> the weight of a token in the objective, [N, T] or [N, 1] --------
# π_sampled is the policy as it was when it sampled: STALENESS steps older, or rounded in another way. π_θold is the
# policy before the updates of this step.


def tis(logp_old, logp_sampled, mask):
    """TIS (Yao et al. 2025): π_θold/π_sampled of each token, at most CORRECTION_MAX."""
    return token_weight(logp_old, logp_sampled, mask).clamp(max=CORRECTION_MAX)


def sequence_tis(logp_old, logp_sampled, mask):
    """The same of each output, at most CORRECTION_MAX. Without that limit it would be unbiased; it is noisier."""
    return sequence_weight(logp_old, logp_sampled, mask).clamp(max=CORRECTION_MAX)


def icepop(logp_old, logp_sampled, mask):
    """IcePop (arXiv 2510.18855): a token whose weight is below 0.5 or above 5 is left out."""
    weight = token_weight(logp_old, logp_sampled, mask)  # [N, T]
    return torch.where((weight >= 0.5) & (weight <= 5.0), weight, 0.0)


def token_weight(logp_old, logp_sampled, mask):
    """π_θold/π_sampled of each token, without gradient: [N, T]."""
    return torch.where(mask, logp_old - logp_sampled, 0.0).detach().exp()


def sequence_weight(logp_old, logp_sampled, mask):
    """π_θold/π_sampled of each output, the product over its tokens, without gradient: [N, 1]."""
    return torch.where(mask, logp_old - logp_sampled, 0.0).detach().sum(1, keepdim=True).exp()


CORRECTIONS = {"none": None, "tis": tis, "sequence_tis": sequence_tis, "icepop": icepop}


# ---- REFILL and STALENESS: which outputs a step trains on ----------------------------------------------------------


def other_batch(state):
    """Lines 5 to 8 with REFILL or STALENESS: with the latter, the oldest batch of a queue that holds k of them."""
    waiting = min(STALENESS, last_step() - 1 - state.step)  # batches to keep for later steps; fewer near the end
    while len(state.queue) <= waiting:
        batch = refill(state) if REFILL else draw(state, state.policy)
        state.queue.append(batch)
    return state.queue.pop(0)


def refill(state):
    """DAPO (arXiv 2503.14476): draw until Q groups hold right and wrong outputs, but at most REFILL times.

    The step trains on them in the order in which they were drawn; all others are only recorded and counted. If these
    groups are fewer than the ranks, the last draw is recorded and no update is made.
    """
    drawn = []  # groups of all ranks
    records = []  # of their outputs
    mixed = []  # which groups hold right and wrong outputs
    draws = 0
    while len(mixed) < QUESTIONS_PER_STEP and draws < REFILL:
        batch = draw(state, state.policy)
        draws += 1
        records += batch_records(batch, torch.zeros(len(batch.rollout.texts)))
        for group in groups_of(batch):
            right = group["rewards"]["correctness"]
            if min(right) < max(right):
                mixed.append(len(drawn))
            drawn.append(group)
    learns = len(mixed) >= llms.WORLD
    kept = mixed[:QUESTIONS_PER_STEP]
    if not learns:
        kept = range(len(drawn) - QUESTIONS_PER_STEP, len(drawn))
    dropped = [record for i, record in enumerate(records) if i // GROUP_SIZE not in kept]
    metrics = {"refill/draws": draws, "refill/mixed": len(mixed) / len(drawn)}
    return batch_of(state, [drawn[i] for i in kept], learns, dropped, metrics)


def groups_of(batch):
    """The groups of all ranks in plain numbers and texts: [{"problem", "outputs", "rewards": {name: its G values}}]."""
    G = batch.rollout.group_size
    outputs = batch.rollout.saved()
    groups = []
    for i, problem in enumerate(batch.problems):
        rewards = {name: values[i].tolist() for name, values in batch.by_name.items()}
        of_problem = outputs[i * G : (i + 1) * G]
        groups.append({"problem": problem, "outputs": of_problem, "rewards": rewards})
    return llms.gather(groups)


def batch_of(state, groups, learns, dropped, metrics):
    """This rank's share of such groups, as a batch again."""
    names = dict.fromkeys(name for group in groups for name in group["rewards"])
    groups = llms.share(groups)
    outputs = [output for group in groups for output in group["outputs"]]
    rollout = llms.rollout_from_saved(outputs, GROUP_SIZE, state.policy.device)
    by_name = {}
    for name in names:  # a reward that does not apply to a group counts 0 there
        nothing = [0.0] * GROUP_SIZE
        by_name[name] = torch.tensor([group["rewards"].get(name, nothing) for group in groups])
    problems = [group["problem"] for group in groups]
    return Batch(problems, rollout, by_name, weighted_sum(by_name), learns, dropped, metrics)


# ---- on-policy distillation ----------------------------------------------------------------------------------------


def from_teacher(state, batch, logp_old, logp_ref):
    """On-policy distillation: log π_T - log π_θ of each token, π_T being the TEACHER; no group, no baseline.

    At π_θ = π_θold its gradient is that of minus the KL estimate k2 to the teacher, token by token.
    """
    rollout = batch.rollout
    logp = logp_old
    if logp is None:
        logp = llms.log_probs(state.policy, rollout, TEMPERATURE)  # [N, T]
    GC = (llms.log_probs(state.teacher, rollout, TEMPERATURE) - logp) * rollout.mask  # [N, T]
    total, tokens = llms.sums_over_ranks(GC.sum().item(), int(rollout.mask.sum()))
    batch.metrics["distill/kl"] = -total / tokens
    batch.metrics["distill/max"] = max(llms.gather([GC.abs().max().item()]))
    return GC


TABLE_10["distill"] = ("policy", from_teacher, ppo_loss)  # not in the paper, but a row of the same kind


# ==== Errors, and lines on the console ==============================================================================


class SettingsError(ValueError):
    """What is wrong with the settings, in one line."""


class RunError(RuntimeError):
    """Why a run ended early, in one line."""


def say(line):
    """Print a line beside the progress bar, on rank 0."""
    if llms.RANK == 0:
        tqdm.write(line)


def note(line):
    """Print a note beside the progress bar, from any rank."""
    tqdm.write(f"note: {line}", file=sys.stderr)


def skip_row(state, error):
    """Count a row of the data that cannot be read. The first one is named."""
    if state.rows_skipped == 0:
        say(f"note: {error}. Such rows are skipped and counted.")
    state.rows_skipped += 1


# ==== Rewards that compare outputs, or come from a model ============================================================


def rewards_of_groups(problems, rollout):
    """The rewards of evaluator.py that compare the outputs of a question: {name: [Q, G]}."""
    by_name, failures = evaluator.compare(groups_of_texts(rollout), problems)
    note_failures(failures)
    return {name: torch.tensor(values) for name, values in by_name.items()}


def groups_of_texts(rollout):
    """The texts of a rollout, question by question: Q lists of G texts."""
    G = rollout.group_size
    return [rollout.texts[start : start + G] for start in range(0, len(rollout.texts), G)]


def note_failures(failures):
    if failures:
        note(f"{len(failures)} × a reward failed and counts 0, first: {failures[0]}")


def overlong(rollout):
    """DAPO's penalty of length (arXiv 2503.14476, eq. 13), from 0 down to -1 at MAX_NEW_TOKENS: [Q, G]."""
    buffer = 0.2 * MAX_NEW_TOKENS  # the last part, over which it falls; DAPO: 4096 of 20480 tokens
    lengths = rollout.mask.sum(1).tolist()
    penalties = [evaluator.overlong(length, MAX_NEW_TOKENS, buffer) for length in lengths]
    return torch.tensor(penalties).view(-1, rollout.group_size)


def model_rewards(reward_model, problems, rollout):
    """The scores of a learned reward model, standardised over the outputs of the step: [Q, G]."""
    questions = [problem["question"] for problem in llms.repeated(problems, rollout.group_size)]  # [N]
    scores = llms.reward_scores(reward_model, questions, rollout.texts)
    return llms.standardised(scores).view(-1, rollout.group_size)


def judge_rewards(judge, problems, rollout):
    """How each output fares against the others of its group, by a judge: {"judge": [Q, G], "judge_flips": [Q, G]}."""
    judged = []
    for problem, texts in zip(problems, groups_of_texts(rollout)):
        judged.append(llms.judge_group(judge, problem["question"], texts))
    wins, flips = torch.tensor(judged).unbind(1)  # [Q, 2, G] -> 2 × [Q, G]
    return {"judge": wins, "judge_flips": flips}


def coin_tosses(state, problems, rollout):
    """A control that teaches nothing: 1 or 0 by chance, [Q, G]."""
    coin = random.Random(f"{SEED} {state.questions}")  # not the sampler's generator, which goes on as without it
    tosses = []  # of all ranks
    for _ in range(llms.total_over_ranks(len(problems))):
        tosses.append([float(coin.randrange(2)) for _ in range(rollout.group_size)])
    return torch.tensor(llms.share(tosses))


# ==== Nim: the policy plays against itself ==========================================================================


def model_player(state, model, temperature, generator=None):
    """A model as a player of Nim: a function from positions to completions, each with a move."""

    def player(positions):
        prompts = [prompt_ids(state.tokenizer, position) for position in positions]
        rollout = llms.sample(model, state.tokenizer, prompts, 1, MAX_NEW_TOKENS, temperature, generator)
        return rollout.texts

    return player


def self_play(state, problems, rollout):
    """Which moves of a rollout win, if the policy then plays on for both sides: 1 or 0, [Q, G]."""
    G = rollout.group_size
    generator = torch.Generator().manual_seed(SEED + state.questions)
    player = model_player(state, state.policy, TEMPERATURE, generator)
    positions = llms.repeated(problems, G)  # [N]
    return torch.tensor(play(positions, [player, player], rollout.texts)).view(-1, G)


def play(problems, players, texts=None):
    """Games of Nim, one from each position, to their end: does players[0] win, who makes the first move? 1 or 0.

    texts: completions with the first moves, if they are known. All ranks follow the games of all ranks.
    """
    counts = llms.gather([len(problems)])
    positions = llms.gather(problems)  # of all games; None where a game has ended
    moves = llms.gather(texts) if texts else moves_of(players[0], positions)
    won = [0.0] * len(positions)
    live = range(len(positions))  # games that go on
    turn = 0
    while live:
        for game, move in zip(live, moves):
            now = positions[game]
            heaps, mover_wins = evaluator.after_move(move, now)
            if mover_wins is None:
                positions[game] = rldatasets.nim_position(now["players"], 1 - now["turn"], heaps)
            else:
                positions[game] = None
                won[game] = float(mover_wins == (turn % 2 == 0))
        live = [game for game in live if positions[game]]
        turn += 1
        if live:
            moves = moves_of(players[turn % 2], [positions[game] for game in live])
    first = sum(counts[: llms.RANK])
    return won[first : first + len(problems)]


def moves_of(player, positions):
    """A player's moves at positions that all ranks know, each rank asking about its share of them."""
    missing = max(0, llms.WORLD - len(positions))
    asked = positions + positions[:1] * missing  # one or more for each rank
    return llms.gather(player(llms.share(asked)))[: len(positions)]


def matches(state, problems):
    """Two games from each position, one in each seat, models play greedily: {metric: share of games won}."""
    opponents = {"random": evaluator.random_player, "perfect": evaluator.perfect_player}
    if state.reference:
        opponents["reference"] = model_player(state, state.reference, 0.0)
    player = model_player(state, state.policy, 0.0)
    metrics = {}
    for name, opponent in opponents.items():
        won = play(problems, [player, opponent])
        lost = play(problems, [opponent, player])
        results = won + [1 - result for result in lost]
        metrics[f"eval/wins/{name}"] = llms.mean_over_ranks(results)
    metrics["eval/games"] = llms.total_over_ranks(len(results))
    return metrics


# ==== Evaluation ====================================================================================================


def evaluate(state, problems):
    """Test the policy: metrics, and a record for each problem."""
    kinds = {problem["kind"] for problem in problems}
    of_nim = [problem for problem in problems if problem["kind"] == "nim"]
    openings = [problem for problem in of_nim if min(problem["heaps"].values()) > 1]
    problems = llms.share(problems)
    prompts = [prompt_ids(state.tokenizer, problem) for problem in problems]
    rollout = llms.sample(state.policy, state.tokenizer, prompts, 1, MAX_NEW_TOKENS, 0.0)  # greedy
    by_name = rule_rewards(problems, rollout)
    by_name["overlong"] = overlong(rollout)
    if "dialogue" in kinds:
        by_name["prefers_true"] = prefers_true(state, problems, prompts)
    if "writing" in kinds and state.reference:
        by_name["fluency"] = mean_log_prob(state.reference, rollout)
    records = output_records(rollout, problems, by_name)
    metrics = evaluator.eval_metrics(records)
    if openings:
        metrics |= matches(state, llms.share(openings))
    if EVAL_SAMPLES:
        votes = not kinds & {"program", "writing"}  # which have no answer to vote for
        metrics |= sampled_metrics(state, problems, prompts, votes)
    return metrics, records


def sampled_metrics(state, problems, prompts, votes):
    """pass@k, and maj@k where answers can be voted for, from EVAL_SAMPLES outputs of each question (Figure 7)."""
    n = EVAL_SAMPLES
    generator = torch.Generator().manual_seed(SEED)
    rollout = llms.sample(state.policy, state.tokenizer, prompts, n, MAX_NEW_TOKENS, EVAL_TEMPERATURE, generator)
    correctness = rule_rewards(problems, rollout)["correctness"]  # [Q, n]
    right = correctness.sum(1).int().tolist()  # how many of the n, for each question
    metrics = {}
    for k in powers_of_two(n):
        passed = [evaluator.pass_at_k(n, c, k) for c in right]
        metrics[f"eval/pass@{k}"] = llms.mean_over_ranks(passed)
        if votes:
            elected = []
            for problem, texts in zip(problems, groups_of_texts(rollout)):
                elected.append(evaluator.right(evaluator.majority(texts[:k], problem), problem))
            metrics[f"eval/maj@{k}"] = llms.mean_over_ranks(elected)
    return metrics


def powers_of_two(n):
    """1, 2, 4, … below n, and n."""
    numbers = []
    k = 1
    while k < n:
        numbers.append(k)
        k *= 2
    return [*numbers, n]


def mean_log_prob(model, rollout):
    """The mean log π of the tokens of each output under a model, at temperature 1: [N]."""
    return llms.log_probs(model, rollout, 1.0).sum(1) / rollout.mask.sum(1)


def prefers_true(state, problems, prompts):
    """Is the true next turn of a dialogue likelier, per token, than the false one? 1 or 0 for each problem: [Q]."""
    texts = [reply for problem in problems for reply in problem.get("replies", ("", ""))]
    twice = llms.repeated(prompts, 2)
    replies = llms.rollout_from_texts(state.policy, state.tokenizer, twice, texts, TOKEN_BUDGET)
    pairs = mean_log_prob(state.policy, replies).view(-1, 2)  # [Q, 2]
    return (pairs[:, 0] > pairs[:, 1]).float()


# ==== What is recorded ==============================================================================================


def output_records(rollout, problems, by_name):
    """A dict for each output of all ranks: its problem, text, length, and its number of each of by_name, [Q, G]."""
    lengths = rollout.mask.sum(1)  # [N]
    columns = {name: values.flatten().tolist() for name, values in by_name.items()}
    columns["length"] = lengths.tolist()
    columns["truncated"] = rollout.truncated.float().tolist()
    if rollout.entropy is not None:
        columns["entropy"] = rollout.entropy.sum(1).tolist()  # over the tokens of each output
    for metric in (evaluator.reflection, evaluator.num_steps, evaluator.approach):
        columns[metric.__name__] = [metric(text) for text in rollout.texts]
    return llms.gather(evaluator.records(problems, rollout.texts, columns))


def batch_records(batch, advantages):
    """A record for each output of a batch, of all ranks."""
    A = advantages.view(len(batch.rollout.texts), -1)  # [N, 1] or [N, T]
    about = {"reward": batch.rewards, "advantage": A[:, 0]}
    about["zero_advantage"] = (A == 0).all(1).float()
    return output_records(batch.rollout, batch.problems, batch.by_name | about)


def record_step(state, batch, advantages, updates):
    """Write the metrics of the step that has ended, over all ranks; return them. It takes what the step returned."""
    records = batch_records(batch, advantages) + batch.dropped
    row = {"step": state.step, "stage": stage_of(state.step - 1)[1]}
    row |= output_metrics(state, batch, records)
    row |= update_metrics(updates) | batch.metrics
    for name in "questions prompts_skipped rows_skipped tokens updates".split():
        row[name] = getattr(state, name)
    for name in ("token_budget", "cache_tokens"):
        row[name] = llms.LIMITS[name]
    row["memory"] = llms.peak_memory()
    row["seconds"] = time.perf_counter() - llms.CLOCK["start"]
    row |= {"seconds/update": 0.0} | llms.SECONDS
    write(state.run, row, "train", records[: batch.rollout.group_size])
    say(report.step_line(row))
    if SHOW_EVERY and state.step % SHOW_EVERY == 0:
        say(report.completion(records[0]))
    return row


def output_metrics(state, batch, records):
    """The part of a step's metrics that is about its outputs; says so where there is next to nothing to learn from."""
    names = dict.fromkeys(llms.gather(list(batch.by_name)))  # one rank may lack a reward
    metrics = evaluator.step_metrics(records, batch.rollout.group_size, names)
    if state.step <= COLD_START:  # nothing was sampled: the records are of worked solutions
        kept = {name: metrics[name] for name in ("length", "length_max", "truncated")}
        return {"stage": "cold start"} | kept
    if state.step == COLD_START + 1:
        advice = report.silence(records, evaluator.TAGS)
        if advice:
            say(advice)
    return metrics


def update_metrics(updates):
    """The part of a step's metrics that is about its μ updates: means, and the largest of maxima."""
    always = "loss ratio_max clip_low clip_high grad_norm lr skipped_updates"
    metrics = dict.fromkeys(always.split(), 0.0)
    if updates:
        for name in updates[0]:
            numbers = [update[name] for update in updates]
            metrics[name] = max(numbers) if name.endswith("_max") else sum(numbers) / len(numbers)
    return metrics


def write(run, row, split, records):
    """Add a row to the metrics of a run, and records of outputs to its samples, on rank 0."""
    if llms.RANK == 0:
        report.log(run, row, split, records, TENSORBOARD)


# ==== Checkpoints ===================================================================================================

COUNTERS = "step updates stage position questions prompts_skipped rows_skipped tokens".split()


def save_checkpoint(state, writer):
    """Replace the run's checkpoint by the state as it is, for any number of ranks to go on from."""
    queue = []
    for batch in state.queue:
        saved = {"groups": groups_of(batch), "learns": batch.learns}
        queue.append(saved | {"dropped": batch.dropped, "metrics": batch.metrics})
    counters = {name: getattr(state, name) for name in COUNTERS}
    about = {"counters": counters, "settings": settings(), "limits": llms.LIMITS, "queue": queue}
    report.sync(state.run)
    writer.save(state.run / "checkpoint", state.networks(), state.optimizer, state.generator, about)


def load_checkpoint(state):
    """Bring a fresh state to where its run's checkpoint was written."""
    about, tensors = llms.read_checkpoint(state.run / "checkpoint")
    changed = [name for name, value in settings().items() if about["settings"].get(name, value) != value]
    differ = [name for name in changed if name not in MAY_CHANGE]
    if differ:
        raise SettingsError(f"the checkpoint of {state.run} belongs to other settings: {', '.join(differ)} differ")
    for name, value in about["counters"].items():
        setattr(state, name, value)
    for name, limit in about.get("limits", {}).items():  # found where memory ran out
        if name.upper() not in changed:
            llms.LIMITS[name] = limit
    for saved in about["queue"]:
        fewest = len(saved["groups"])
        if fewest < llms.WORLD:
            raise SettingsError(f"too many ranks: a step that {state.run} prepared has only {fewest} of its questions")
        state.queue.append(batch_of(state, **saved))
    if needs_reference() and state.step > COLD_START:
        state.reference = llms.frozen_copy(state.policy)  # to be filled
    llms.load_checkpoint(tensors, state.networks(), state.optimizer, state.generator)
    if "STEPS" in changed and SCHEDULE != "constant" and state.updates:
        say(report.rate_note(learning_rate(state.updates)))


# ==== The constants as settings =====================================================================================


class Constant(NamedTuple):
    """A constant of the block at the top of this file."""

    section: str
    value: object  # as it stands there: maybe an of_model
    comment: str

    def of(self, model):
        """The value for a model."""
        if not isinstance(self.value, of_model):
            return self.value
        return self.value.tiny if model == "tiny" else self.value.other

    def choices(self):
        """The values that one can choose from, where the comment begins with them: k1 | k2 | k3."""
        head = self.comment.partition(":")[0]
        return head.split(" | ") if isinstance(self.of(MODEL), str) and " | " in head else []


def read_constants():
    """The constants as they stand in this file, by name. A line that is not one ends the program with its number."""
    source = Path(__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    first = lines.index("# -- Model and data")
    last = lines.index("# -- End of the constants")
    constants = {}
    for node in ast.parse(source).body:
        if first < node.lineno <= last:
            above = reversed(lines[: node.lineno])
            section = next(line for line in above if line.startswith("# -- "))
            last_line = lines[node.end_lineno - 1].encode()  # ast counts the columns in bytes
            after = last_line[node.end_col_offset :].decode()  # the comment
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
            value = globals().get(name)
            mistake = what_is_wrong(name, value, after)
            if mistake:
                sys.exit(f"main.py: error: line {node.lineno}: {mistake}")
            constants[name] = Constant(section.removeprefix("# -- "), value, after.removeprefix("  # "))
    for name in TYPES:
        if name not in constants:
            sys.exit(f"main.py: error: {name} is missing from the constants; 0 or an empty text turns most of them off")
    return constants


def what_is_wrong(name, value, after):
    """Why a line of the block is not a constant, or None. after: what follows the value in its line."""
    named = name.isidentifier() and name.isupper() and name.isascii()
    if not (named and after.startswith("  # ")):
        return "a constant stands as NAME = value  # what it is for (two blanks before the #)"
    for one in value if isinstance(value, of_model) else [value]:
        kind = TYPES.get(name, type(one))
        if kind not in KINDS or not is_a(one, kind):
            return f"{name} must be {KINDS.get(kind, 'a number, a text or a table')}, not {one!r}"
    return None


def is_a(value, kind):
    """Has a value the type of its constant? A whole number is a decimal number too; True is not a number."""
    if kind is float:
        return type(value) in (int, float)
    if kind is dict:
        return type(value) is dict and all(is_a(weight, float) for weight in value.values())
    return type(value) is kind


def of_the_block(model):
    """The constants as they stand in the block, {name: value}, for a model."""
    values = {}
    for name, constant in CONSTANTS.items():
        values[name] = constant.of(model)
        if TYPES.get(name) is float:
            values[name] = float(values[name])  # where it stands there as BETA = 0
    return values


def put_in_force(values):
    """Write constants, {name: value}, here and nowhere else."""
    globals().update(values)


KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a table {name: number}",
}
OF_TYPE = {  # a constant of yours that is not here may have any of these types
    bool: "GRADIENT_CHECKPOINTING MASK_TRUNCATED TENSORBOARD",
    int: "SHOTS SEED THREADS LORA_RANK COLD_START ITERATIONS STEPS QUESTIONS_PER_STEP GROUP_SIZE MU REFILL STALENESS "
    "MAX_NEW_TOKENS MAX_PROMPT_TOKENS CACHE_TOKENS PASS_K WARMUP TOKEN_BUDGET EVAL_EVERY EVAL_QUESTIONS EVAL_SAMPLES "
    "SAVE_EVERY SHOW_EVERY",
    float: "LORA_ALPHA TEMPERATURE EPSILON_LOW EPSILON_HIGH DELTA BETA CORRECTION_MAX LEARNING_RATE MAX_GRAD_NORM "
    "BETA_DPO GAMMA LAMBDA EVAL_TEMPERATURE",
    str: "MODEL PRECISION TEMPLATE_OPTIONS DATASET EVAL_DATASET RUN ALGORITHM SUPERVISION ADVANTAGE OBJECTIVE KL "
    "DENOMINATOR CORRECTION REWARD_MODEL JUDGE SCHEDULE TEACHER",
    dict: "REWARDS",
}
TYPES = {name: kind for kind, names in OF_TYPE.items() for name in names.split()}
CONSTANTS = read_constants()
put_in_force(of_the_block(MODEL))
# what a resumed run may change; of these only STEPS changes an update, as it moves the end of SCHEDULE
MAY_CHANGE = """
    STEPS EVAL_EVERY SAVE_EVERY SHOW_EVERY TENSORBOARD TOKEN_BUDGET CACHE_TOKENS GRADIENT_CHECKPOINTING THREADS
""".split()
# a method that is added to one of these tables can be chosen at once
TABLES = {
    "ALGORITHM": ["grpo", *TABLE_10],
    "ADVANTAGE": ADVANTAGES,
    "OBJECTIVE": OBJECTIVES,
    "KL": KLS,
    "CORRECTION": CORRECTIONS,
}


def settings():
    """The constants in force, by name."""
    return {name: globals()[name] for name in CONSTANTS}


def parse(argv):
    """The actions of a command line, and the constants that it gives as flags."""
    parser = new_parser()
    flags = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):  # --group-size is --group_size
            word = "--" + name[2:].replace("-", "_") + equals + value
        flags.append(word)
    actions, unknown = parser.parse_known_args(flags)
    if unknown:
        typed = unknown[0].partition("=")[0].lstrip("-")
        names = sorted({"help", *vars(actions), *map(str.lower, CONSTANTS)})
        close = [name for name in names if typed == "".join(word[0] for word in name.split("_"))]  # initials, as lr
        close = close or difflib.get_close_matches(typed, names, 1)
        advice = f"did you mean --{' or --'.join(close)}?" if close else "see --help"
        raise SettingsError(f"unknown flag {unknown[0]}; {advice}")
    empty = "" in (actions.resume, actions.evaluate, actions.against)
    if empty or (actions.against and not actions.evaluate):
        raise SettingsError("--resume, --evaluate and --against need a name, and --against goes with --evaluate")
    given = {}
    for name in CONSTANTS:
        value = getattr(actions, name.lower(), None)
        if value is not None:
            given[name] = value
    if actions.evaluate and "MODEL" in given:
        raise SettingsError("--evaluate names the model to test: leave --model out")
    return actions, given


def new_parser():
    """A parser with the actions, and a flag for each constant."""
    parser = argparse.ArgumentParser(
        usage="python main.py [--flag value …]",
        description=__doc__.split("\n\nRead downwards")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--against", metavar="MODEL", help="with --evaluate: test this one too, on the same questions")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    one_of.add_argument("--evaluate", metavar="MODEL", help="only test a model: hub name, folder, or run folder")
    one_of.add_argument("--test", action="store_true", help="two steps and one small evaluation, all else as given")
    groups = {}
    for name, constant in CONSTANTS.items():
        if constant.section not in groups:
            groups[constant.section] = parser.add_argument_group(constant.section)
        groups[constant.section].add_argument(f"--{name.lower()}", **flag_options(name, constant))
    return parser


def flag_options(name, constant):
    """How argparse reads and explains the flag of a constant."""
    default = constant.of("tiny")
    kind = TYPES.get(name, type(default))
    shown = f"default: {as_flag(default)}"
    if isinstance(constant.value, of_model):
        shown += f" for the tiny model, {as_flag(constant.value.other)} for others"
    options = {"default": argparse.SUPPRESS, "help": f"{constant.comment} ({shown})".replace("%", "%%")}
    if kind is bool:  # --tensorboard alone is --tensorboard true
        return options | {"type": true_or_false, "nargs": "?", "const": True, "metavar": "BOOL"}
    if kind is dict:
        return options | {"type": weights, "metavar": "NAME=WEIGHT,…"}
    return options | {"type": kind, "metavar": kind.__name__.upper()}


def as_flag(value):
    """The value of a constant as one would write it behind its flag."""
    if isinstance(value, dict):
        return ",".join(f"{name}={weight:g}" for name, weight in value.items())
    return repr(value)


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def weights(text):
    """The weights of rewards: correctness=2,integer=0.5."""
    table = {}
    for pair in text.split(","):
        name, _, weight = pair.partition("=")
        name = name.strip()
        if name in table:
            raise argparse.ArgumentTypeError(f"{name} has two weights")
        try:
            table[name] = float(weight)
        except ValueError:
            reason = f"name=weight pairs, as in correctness=2,integer=0.5, not {text!r}"
            raise argparse.ArgumentTypeError(reason) from None
    return table


def choose_settings(actions, flags):
    """Put the constants in force. A flag wins over a run's settings, and these over what stands in the block."""
    run = actions.resume or actions.evaluate
    model = actions.evaluate or flags.get("MODEL", MODEL)
    if actions.resume or (run and report.is_run(run)):
        values = of_the_block(report.read_config(run).get("MODEL", model))
        values = report.read_settings(run, values, for_resume=bool(actions.resume))
    else:
        values = of_the_block(model)
        values["STEPS"] = steps_of_curriculum(values | flags, flags)
    if actions.resume:
        refuse_changes(run, values, flags)
    values |= flags
    if actions.evaluate:
        values["MODEL"] = model
    if actions.test:
        values |= {"STEPS": 2, "ITERATIONS": 1}
        values["COLD_START"] = min(values["COLD_START"], 2)
        values["EVAL_QUESTIONS"] = min(values["EVAL_QUESTIONS"] or 8, 8)
    put_in_force(values)
    check_settings(training=not actions.evaluate)
    llms.TEMPLATE_OPTIONS = template_options()
    if THREADS:
        torch.set_num_threads(THREADS)
    llms.PRECISION = PRECISION
    if PRECISION == "bf16":
        llms.check_bf16()


def template_options():
    """The options of TEMPLATE_OPTIONS: {name: True, False, or a text}."""
    options = {}
    for pair in filter(None, TEMPLATE_OPTIONS.split(",")):
        name, _, value = pair.partition("=")
        require(name.isidentifier() and value, "TEMPLATE_OPTIONS", "name=value pairs, as in enable_thinking=false")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def refuse_changes(run, known, flags):
    """Refuse flags that would change what a resumed run has begun."""
    for name, value in flags.items():
        may_change = name in MAY_CHANGE and (name != "STEPS" or known["ITERATIONS"] == 1)
        if value != known[name] and not may_change:
            flag = f"--{name.lower()} {as_flag(known[name])}"
            raise SettingsError(f"{run} was made with {flag}, not {as_flag(value)}: a resumed run keeps its settings")


def steps_of_curriculum(values, flags):
    """STEPS: a curriculum determines its number of steps."""
    counts = [steps for _, steps in rldatasets.stages(values["DATASET"])]
    if not any(counts):
        return values["STEPS"]
    total = sum(counts)
    if flags.get("STEPS", total) != total:
        raise SettingsError(f"--steps {flags['STEPS']}: the stages of --dataset have {total} steps")
    return total


def require(holds, name, demand):
    """Refuse the value of a constant in one line."""
    if not holds:
        raise SettingsError(f"--{name.lower()} must be {demand}, not {as_flag(settings()[name])}")


AT_LEAST_1 = "ITERATIONS STEPS GROUP_SIZE MU PASS_K MAX_NEW_TOKENS CACHE_TOKENS EVAL_EVERY SAVE_EVERY".split()
LEAST = dict.fromkeys(AT_LEAST_1, 1) | {"TEMPERATURE": 0.01, "EVAL_TEMPERATURE": 0.01}  # of all others 0
ABOVE_0 = "LORA_ALPHA BETA_DPO MAX_GRAD_NORM CORRECTION_MAX".split()


def check_settings(training=True):
    """Refuse what cannot be meant, before anything is loaded. A test needs no method."""
    for name, value in settings().items():
        check_value(name, value)
    check_rewards()
    for name in ("GAMMA", "LAMBDA", "EPSILON_LOW"):
        require(settings()[name] <= 1, name, "from 0 to 1")
    a_name = RUN == Path(RUN).name and RUN != ".." and len(os.fsencode(RUN)) < 256
    require(a_name, "RUN", "a name without folders")
    require(THREADS <= os.cpu_count(), "THREADS", f"at most {os.cpu_count()}, the number of cores")
    longest = MAX_PROMPT_TOKENS + MAX_NEW_TOKENS
    require(TOKEN_BUDGET >= longest, "TOKEN_BUDGET", f"at least max_prompt_tokens + max_new_tokens = {longest}")
    require(QUESTIONS_PER_STEP >= llms.WORLD, "QUESTIONS_PER_STEP", f"at least {llms.WORLD}, one for each rank")
    installed = importlib.util.find_spec("tensorboard")
    require(not TENSORBOARD or installed, "TENSORBOARD", "off, or pip install tensorboard")
    if training:
        check_methods()


def check_value(name, value):
    """Is this one constant, by itself, in its range?"""
    choices = list(TABLES.get(name, CONSTANTS[name].choices()))
    if choices:
        require(value in choices, name, f"one of {', '.join(choices)}")
    if isinstance(value, str):
        require(value.isprintable(), name, "printable")
    elif not isinstance(value, dict):
        require(abs(value) < 2**63, name, "below 2 to the 63")
        require(value > 0 or name not in ABOVE_0, name, "above 0")
        least = LEAST.get(name, 0)
        require(value >= least, name, f"at least {least}")


def check_rewards():
    """Is each name of REWARDS a reward, and each weight a number that fp32 can hold?"""
    known = [*evaluator.REWARDS, *evaluator.GROUP_REWARDS, "overlong", "random", "reward_model", "judge", "steps"]
    known += [name for name in evaluator.MEASURES["writing"] if name != "fluency"]  # the counts of a story
    for name, weight in REWARDS.items():
        if name not in known:
            raise SettingsError(f"--rewards: {name!r} is not a reward; there are {', '.join(known)}")
        if not abs(weight) < 2**63:
            raise SettingsError(f"--rewards: the weight of {name} must be below 2 to the 63, not {weight}")


def check_methods():
    """Which settings of the methods contradict each other?"""
    now = settings()
    fixed = {}  # {constant: its only value for this algorithm}
    if ALGORITHM != "grpo":
        fixed |= {"SUPERVISION": "outcome", "ADVANTAGE": "grpo", "REFILL": 0, "STALENESS": 0}
    if ALGORITHM in ("sft", "rft", "dpo", "online_rft"):  # they have no ratio
        fixed |= {"OBJECTIVE": "grpo", "CORRECTION": "none"}
    for name, value in fixed.items():
        require(now[name] == value, name, f"{value} for {ALGORITHM}")
    compares = ALGORITHM in ("grpo", "dpo")
    require(GROUP_SIZE > 1 or not compares, "GROUP_SIZE", f"at least 2: {ALGORITHM} compares outputs")
    require(GROUP_SIZE > 1 or not JUDGE, "JUDGE", "empty with --group_size 1: it compares outputs")
    earned = {name for name, weight in REWARDS.items() if weight} - {"steps"}
    for name in ("REWARD_MODEL", "JUDGE"):
        if now[name]:
            rewarded = ALGORITHM not in ("sft", "rft", "dpo", "online_rft", "distill")
            require(rewarded, name, f"empty for {ALGORITHM}: it uses no rewards")
            require(REWARDS.get(name.lower()), "REWARDS", f"given a weight for {name.lower()}")
        else:
            earned -= {name.lower()}
    require(earned or ALGORITHM not in ("grpo", "ppo"), "REWARDS", "a table with a weight that can be earned")
    require(MU == 1 or ALGORITHM not in ("sft", "dpo"), "MU", f"1 for {ALGORITHM}: it makes one update a step")
    of_dpo = DENOMINATOR == "sequence" or ALGORITHM != "dpo"
    require(of_dpo, "DENOMINATOR", "sequence for dpo: it compares means per output")
    if ALGORITHM == "distill":
        require(TEACHER, "TEACHER", "a model")
    else:
        require(not TEACHER, "TEACHER", f"empty for {ALGORITHM}")
    check_variants(earned)


def check_variants(earned):
    """Which settings of what came after the paper contradict each other? earned: the rewards that count in r_i."""
    outcome = SUPERVISION == "outcome"
    require(outcome or ADVANTAGE == "grpo", "ADVANTAGE", f"grpo with --supervision {SUPERVISION}")
    require(outcome or REFILL == 0, "REFILL", f"0 with --supervision {SUPERVISION}")
    per_token = not outcome or ALGORITHM in ("ppo", "distill")
    require(OBJECTIVE != "gspo" or not per_token, "OBJECTIVE", "another than gspo if Â differs by token")
    if ADVANTAGE == "pass_at_k":
        require(PASS_K < GROUP_SIZE, "PASS_K", f"below --group_size {GROUP_SIZE}")
    if ADVANTAGE in ("pass_at_k", "w_reinforce"):
        alone = earned in ({"correctness"}, {"random"}) and min(REWARDS.values()) >= 0
        require(alone, "REWARDS", f"correctness=1 with --advantage {ADVANTAGE}: an output is right or wrong")
    if ADVANTAGE == "maxrl":
        negative = REWARDS.get("overlong") or REWARD_MODEL or min(REWARDS.values()) < 0
        require(not negative, "ADVANTAGE", "another than maxrl: a reward can be negative")
    if SUPERVISION == "both":
        require(REWARDS.get("steps"), "REWARDS", "given a weight for steps with --supervision both")
    if OBJECTIVE == "dual_clip":
        require(DELTA > 1 + EPSILON_HIGH, "DELTA", f"above 1 + epsilon_high = {1 + EPSILON_HIGH}")
    require(CORRECTION != "none" or not STALENESS, "CORRECTION", "tis, sequence_tis or icepop with --staleness")


# ==== What is checked before a run ==================================================================================


def check_data(training=True):
    """Check the data; return the test questions: the first of each task, EVAL_QUESTIONS in all."""
    names = [name for name, _ in rldatasets.stages(DATASET)]
    tasks = test_tasks(names)
    samples = []
    if not training:  # a test reads only the one that SHOTS come from
        names = names[:1] if SHOTS else []
    for name in names:
        same = [task for task in tasks if Path(task).resolve() == Path(name).resolve()]
        if same and Path(name).is_file():
            raise SettingsError(f"{name} is a single file: give --eval_dataset too, with other rows than it has")
        problems = first_problems(name, 50)
        samples += problems
        if training:
            check_solutions(name, problems)
    check_shots()
    tests = test_questions(tasks)
    if any(problem["kind"] == "program" for problem in samples + tests):
        reason = evaluator.sandbox_problem()
        if reason:
            raise SettingsError(f"programs are run in a sandbox only: {reason}")
    return tests


def test_tasks(names):
    """The names of the data sets to test on; names: those of DATASET."""
    if not EVAL_DATASET:
        return list(dict.fromkeys(names))
    if Path(EVAL_DATASET).exists():  # a path can have commas in it
        return [EVAL_DATASET]
    return list(dict.fromkeys(name.strip() for name in EVAL_DATASET.split(",")))


def first_problems(name, count):
    """The problems that a run on one data set asks first."""
    return list(itertools.islice(rldatasets.readable(rldatasets.shuffled(name, "train", SEED)), count))


def check_solutions(name, problems):
    """Has a data set the worked solutions that the settings need?"""
    solutions = [problem["solution"] for problem in problems]
    imitated = COLD_START and name == first_dataset()
    if (ALGORITHM == "sft" or imitated) and not all(solutions):
        setting = "--algorithm sft" if ALGORITHM == "sft" else "--cold_start"
        raise SettingsError(f"{setting} imitates worked solutions, and {name} has none")
    if SUPERVISION != "outcome" and not any(map(evaluator.step_rewards, solutions, problems)):
        raise SettingsError(f"--supervision {SUPERVISION} rewards calculations: the solutions of {name} have none")


def check_shots():
    first = first_dataset()
    worked = [example for example in rldatasets.examples(first, SHOTS) if example["solution"]]
    if len(worked) < SHOTS:
        raise SettingsError(f"--shots {SHOTS}: {first} does not begin with {SHOTS} worked solutions")


def test_questions(tasks):
    """The first test questions of each task, EVAL_QUESTIONS in all."""
    each = None
    if EVAL_QUESTIONS:
        each = max(1, EVAL_QUESTIONS // len(tasks))
    questions = []
    for task in tasks:
        unreadable = []
        for problem in itertools.islice(rldatasets.readable(rldatasets.load(task, "test"), unreadable), each):
            questions.append(problem | {"task": task})
        if unreadable:
            say(f"note: test questions that are left out: {len(unreadable)}, first: {unreadable[0]}")
    if len(questions) < llms.WORLD:
        raise SettingsError(f"no test questions in {EVAL_DATASET or DATASET} for each of {llms.WORLD} ranks")
    return questions


def check_prompts(state, tests, training=()):
    """Refuse a test question that leaves no room for an output, and a training set that has only too long ones."""
    context = llms.context_length(state.policy)
    longest = max(len(prompt_ids(state.tokenizer, problem)) for problem in tests)
    if longest + MAX_NEW_TOKENS > context:
        advice = "lower --max_new_tokens"
        if longest >= context:
            advice = "name other questions with --eval_dataset"
        if SHOTS:
            advice = "lower --shots"
        raise SettingsError(f"a test question of {longest} tokens, the model reads {context} with the output: {advice}")
    limit = state.prompt_limit
    for name, _ in training:
        if all(len(prompt_ids(state.tokenizer, problem)) > limit for problem in first_problems(name, 1000)):
            advice = "raise --max_prompt_tokens"
            if limit + MAX_NEW_TOKENS == context:
                advice = "lower --max_new_tokens"
            raise SettingsError(f"every prompt of {name} is longer than {limit} tokens: {advice}")


def note_lost_rewards(state):
    """Say which rewards a worked solution of the training questions loses as an output: as tokens, and read again."""
    problem = first_problems(first_dataset(), 1)[0]
    text = rldatasets.written_out(problem)
    prompt = prompt_ids(state.tokenizer, problem)
    rollout = llms.rollout_from_texts(state.policy, state.tokenizer, [prompt], [text], MAX_NEW_TOKENS)
    output = rollout.texts[0]
    by_name, _ = evaluator.score([text, output], [problem, problem], 1, note)
    lost = [name for name, (worth, earned) in by_name.items() if REWARDS.get(name) and earned < worth]
    if not lost:
        return
    reason = f"it is longer than --max_new_tokens {MAX_NEW_TOKENS}"
    if not rollout.truncated[0]:
        written = evaluator.after_thinking(output).lstrip()
        same = len(os.path.commonprefix([text, written]))
        before = text[:same][-20:]
        reason = f"after {before!r} its tokens go on with {written[same:][:20]!r}, not with {text[same:][:20]!r}"
    say(f"note: out of reach for the first worked solution: {', '.join(lost)}; {reason}.")


# ==== A run =========================================================================================================


def model_folder(name):
    """The model to load; tiny is built when it is first asked for."""
    if name != "tiny":
        return name
    corpora = rldatasets.tiny_corpus()
    if first_dataset().partition(":")[0] == "nim":
        corpora = [rldatasets.nim_corpus()]
    return llms.tiny_folder(report.runs_folder(), corpora)


def new_state(policy, tokenizer, run=None):
    """A policy at the beginning of its training, with what the settings need beside it."""
    llms.limit_memory(TOKEN_BUDGET, CACHE_TOKENS)
    if LORA_RANK:
        llms.add_lora(policy, LORA_RANK, LORA_ALPHA, SEED)
    if GRADIENT_CHECKPOINTING:
        llms.enable_gradient_checkpointing(policy)
    state = State(policy, tokenizer, run)
    if ALGORITHM == "ppo":
        state.critic = llms.Critic(policy)
    state.optimizer = new_optimizer(state.networks().values())
    state.generator = torch.Generator().manual_seed(SEED)
    state.prompt_limit = prompt_limit(policy, tokenizer)
    if REWARD_MODEL:
        state.reward_model = llms.load_reward_model(REWARD_MODEL)
    if JUDGE:
        state.judge = llms.load_judge(model_folder(JUDGE))
    if TEACHER:
        state.teacher = load_teacher(tokenizer)
    return state


def new_optimizer(networks):
    """AdamW over the trained weights of some networks, split over the ranks."""
    trained = []
    for network in networks:
        llms.shard(network)
        trained += [weight for weight in network.parameters() if weight.requires_grad]
    betas = (0.9, 0.99)  # 0.999, the usual one, would remember longer than most runs last
    fused = torch.cuda.is_available() or None
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, betas, weight_decay=0.0, fused=fused)
    llms.reset_adam(optimizer)
    return optimizer


def prompt_limit(policy, tokenizer):
    """How long a training prompt may be: MAX_PROMPT_TOKENS and the SHOTS, or less for a model with a short context."""
    limit = MAX_PROMPT_TOKENS
    if SHOTS:
        empty = {"question": ""}
        without_shots = llms.encode(tokenizer, rldatasets.prompt(empty))
        limit += len(prompt_ids(tokenizer, empty)) - len(without_shots)
    return min(limit, llms.context_length(policy) - MAX_NEW_TOKENS)


def load_teacher(tokenizer):
    """The TEACHER, frozen; it must have the policy's tokens."""
    teacher, its_tokenizer = llms.load(model_folder(TEACHER))
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise SettingsError(f"--teacher {TEACHER} has other tokens than {MODEL}, and cannot score its outputs")
    return llms.frozen_copy(teacher.requires_grad_(False))


def last_step():
    """The number of steps of the cold start and of all iterations."""
    return COLD_START + ITERATIONS * STEPS


class Training:
    """A run: what happens around Algorithm 1. It tests, saves, draws, says what is wrong, and stops when asked to."""

    def __init__(self, state, tests, only_try):
        self.state = state
        self.tests = tests  # the test questions
        self.only_try = only_try  # --test: tested only at the end
        self.writer = llms.CheckpointWriter()
        self.notes = set()  # what has been said already
        self.bar = None

    def ask_to_stop(self, number, frame):
        """The first signal asks for an end after the step; a second Ctrl-C ends without finishing it."""
        if self.state.stop_signal == signal.SIGINT:  # torchrun passes a second Ctrl-C on as SIGTERM
            raise KeyboardInterrupt
        self.state.stop_signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("finishing the step; Ctrl-C again loses it")

    def is_tested_at(self, step):
        if step == last_step():
            return True
        return not self.only_try and (step == COLD_START or step % EVAL_EVERY == 0)

    def evaluate(self):
        """Test; write the metrics and all completions."""
        metrics, records = evaluate(self.state, self.tests)
        write(self.state.run, {"step": self.state.step, **metrics}, "test", records)
        say(f"step {self.state.step:4d} | TEST {report.eval_line(metrics)}")

    def after_step(self, state, metrics):
        """Say what is not healthy; test, draw and save when it is time; return the signal to stop for, or 0."""
        self.bar.update()
        self.writer.check()
        for note in report.health_notes(metrics, settings(), torch.cuda.is_available()):
            if note not in self.notes:
                say(f"note: {note}.")
                self.notes.add(note)
        state.not_finite = state.not_finite + 1 if metrics["skipped_updates"] else 0
        if state.not_finite == 3:
            raise RunError("three steps in a row were not finite: --resume goes on from the last checkpoint")
        if self.is_tested_at(state.step):
            self.evaluate()
        stopped = stop_signal(state)
        is_saved = state.step % SAVE_EVERY == 0 and not state.not_finite
        if stopped or is_saved or state.step == last_step():
            if llms.RANK == 0:
                plot.draw([state.run], state.run)
            save_checkpoint(state, self.writer)
        return stopped

    def before_first_step(self):
        """Before a new run's first step: test the model as it is, and notice a full disk before the training."""
        if self.is_tested_at(0):
            self.evaluate()
        save_checkpoint(self.state, self.writer)
        self.writer.wait()


def stop_signal(state):
    """The signal to stop for that any rank has got, or 0."""
    number = state.stop_signal
    if not number and llms.orphaned():
        number = signal.SIGTERM
    return max(llms.gather([number]))


def run_training(actions):
    """A new run, or a resumed one, to its end; what can be refused is refused before anything is written."""
    if actions.resume:
        run = Path(actions.resume)
        llms.TODAY = report.first_day(run, llms.TODAY)
    else:
        run = report.new_folder(RUN, MODEL, DATASET, actions.test)
    tests = check_data()
    policy, tokenizer = llms.load(model_folder(MODEL))  # Algorithm 1, line 1: π_θ ← π_θinit
    state = new_state(policy, tokenizer, run)
    check_prompts(state, tests, rldatasets.stages(DATASET))
    if actions.resume and (run / "checkpoint" / "state.safetensors").exists():
        load_checkpoint(state)
    if state.step > last_step():
        raise SettingsError(f"{run} is at step {state.step} already, beyond its last, {last_step()}: raise --steps")
    training = Training(state, tests, only_try=actions.test)
    with report.only_writer(run) if llms.RANK == 0 else nullcontext():
        begin(state)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, training.ask_to_stop)
        if state.step == 0:
            if llms.RANK == 0:
                note_lost_rewards(state)
            training.before_first_step()
        training.bar = tqdm(total=last_step(), initial=state.step, desc=run.name, unit="step", disable=llms.NO_BAR)
        with training.bar, training.writer:
            try:
                stopped = train(state, training.after_step)
            except llms.ModelError as error:  # it has diverged, or a judge meets a text that is too long
                raise RunError(error) from error
        if stopped:
            say(report.stopped_line(run, state.step, llms.WORLD, llms.LOCAL_WORLD))
            return 128 + stopped
        llms.save(policy, tokenizer, run / "model")
        if llms.RANK == 0:
            say(report.summary(run))
        return 0


def begin(state):
    """Write config.json, and say what begins."""
    if llms.RANK:
        return
    about = {"device": llms.device_name(), "ranks": llms.WORLD, "date": str(llms.TODAY)}
    about["prompt_limit"] = state.prompt_limit
    report.begin(state.run, settings() | about, state.step)
    total = state.policy.num_parameters() / 1e6
    trained = state.policy.num_parameters(only_trainable=True) / 1e6
    size = f"{total:.1f} M parameters, {trained:.1f} M of them trained"
    say(f"{ALGORITHM} on {DATASET}; {MODEL}: {size}; {llms.WORLD} × {state.policy.device}; all goes to {state.run}")


def run_evaluation(actions):
    """Test one model, or two on the same questions with their paired difference."""
    tests = check_data(training=False)
    names = [actions.evaluate]
    if report.is_run(actions.evaluate):
        llms.TODAY = report.first_day(actions.evaluate, llms.TODAY)
    if actions.against:
        names.append(actions.against)
    llms.limit_memory(TOKEN_BUDGET, CACHE_TOKENS)
    states = [State(*llms.load(model_folder(name))) for name in names]
    judge = llms.load_judge(model_folder(JUDGE)) if JUDGE and actions.against else None
    for state in states:  # both, before either is tested
        check_prompts(state, tests)
        llms.shard(state.policy)
    outputs = []  # the records of each model
    for name, state in zip(names, states):
        same_tokens = state.tokenizer.get_vocab() == states[-1].tokenizer.get_vocab()
        if actions.against and same_tokens:
            state.reference = states[-1].policy
        metrics, records = evaluate(state, tests)
        outputs.append(records)
        say(f"{name}: {report.eval_line(metrics)}")
    if actions.against:
        right = [[record["correctness"] for record in records] for records in outputs]
        say(report.paired_difference(names, right))
    if judge:
        judged = []
        for a, b in llms.share(list(zip(*outputs))):
            texts = [a["completion"], b["completion"]]
            judged.append(llms.judge_group(judge, a["question"], texts))
        say(report.verdicts(names, llms.gather(judged)))
    return 0


MISTAKES = (SettingsError, report.FolderError, llms.ModelError, rldatasets.DataError, argparse.ArgumentError, OSError)


def main(argv=None):
    """Run a command line; returns its exit status: 0, 1 (failed), 2 (refused), or 128 + the signal that ended it."""
    try:
        actions, flags = parse(sys.argv[1:] if argv is None else argv)
        with llms.distributed():
            choose_settings(actions, flags)
            if actions.evaluate:
                return run_evaluation(actions)
            return run_training(actions)
    except MISTAKES as error:
        return report_error(2, str(error) or repr(error))
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        smaller = "a smaller model, --token_budget or --cache_tokens, --lora_rank 32 or --gradient_checkpointing"
        return report_error(1, f"out of memory: {smaller} may help")
    except RuntimeError as error:
        reason = str(error).strip()
        if llms.lost_another_rank(error):
            return report_error(1, f"lost the other ranks, see their output; --resume goes on: {reason}")
        if isinstance(error, RunError):
            return report_error(1, reason)
        raise


def report_error(status, reason):
    """Print the first line of a reason; return the exit status."""
    if llms.RANK:  # rank 0's error appears first, and torchrun ends the others
        time.sleep(3)
    rank = f" on rank {llms.RANK}" if llms.WORLD > 1 else ""
    print(f"main.py: error{rank}: {reason.splitlines()[0]}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where it is ASCII only, π is printed as ?
    status = main()
    if status == 130:  # Ctrl-C; a reward that never returns would hold up an ordinary end
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
