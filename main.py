"""GRPO by hand: Algorithm 1 of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), on rewards that a rule can check.

    python main.py                                        a tiny model learns arithmetic: any laptop, no download
    python main.py --model Qwen/Qwen2.5-1.5B-Instruct     GSM8K on one GPU
    torchrun --nproc_per_node 8 main.py --model …         the same on 8 GPUs
    python main.py --resume runs/NAME                     go on from the newest checkpoint
    python main.py --evaluate A [--against B]             test one model, or two on the same questions

Read downwards. First the paper: constants, advantages, objective, Algorithm 1, one update, Table 10. Then what came
after it, which is off. Then a line of #, and the rest: questions and samples, rewards, evaluation, records,
checkpoints, command line. The names are the paper's:

    paper             code                              shape
    q                 problem["question"]               Q questions per step
    o_i, |o_i|        rollout.ids, mask.sum(1)          [N, P + T], [N]
    r_i               rewards                           [Q, G]
    Â_{i,t}           advantages                        [N] where all t share one (§4.1.2), [N, T] by steps (§4.1.3)
    log π_θ, π_θold   logp, logp_old                    [N, T]  of the sampled tokens
    log π_ref         logp_ref                          [N, T]
    G, μ, ε, β        GROUP_SIZE, MU, EPSILON_*, BETA   N = Q·G; P, T: tokens of the longest prompt, output

Departures: where the code leaves the paper or decides what the paper leaves open, and where to change that:
 1. The reward is a rule, or a model that stays frozen (REWARD_MODEL): Algorithm 1, line 12, trains nothing. No setting.
 2. std(r) is unbiased (correction=0 for biased) and has 1e-4 added; equal rewards give exactly 0: `group_advantages`.
 3. π_θ, π_θold and π_ref are read at the sampling temperature: TEMPERATURE = 1.0 gives the formulas as printed.
 4. With μ = 1, π_θold is π_θ: log π_θold is logp.detach() in `backward`, which is exact. `if MU > 1` in `take_step`.
 5. SUPERVISION = "process" is §4.1.3 as printed, with rewards of ours: a rule rewards the steps, and the answer is
    one more step at the end, with reward r_i. "both": outcome supervision plus WEIGHT_STEPS × advantages of the steps.
 6. An output that is cut at MAX_NEW_TOKENS stays in the loss: MASK_TRUNCATED = True leaves its tokens out.
 7. With β = 0 and no critic, an output with Â = 0 has no gradient and is skipped; it counts in N, Σ|o_i|: `backward`.
 8. RFT and DPO sample anew from the reference (π_sft) at every step; the paper samples once, before. No setting.
 9. DPO's coefficient is the derivative of (12); (14) as printed lacks its factor β: drop it where `preference` sets GC.
10. PPO's value function is a network of its own (Figure 4), its advantages are not whitened. No setting.
11. The data are GSM8K; the paper adds MATH, 144K questions in all: DATASET. It does not give ε, the warm-up, AdamW's
    betas, gradient clipping or the order of the questions: EPSILON_*, WARMUP, ADAM_*, MAX_GRAD_NORM, SEED.
12. π_θinit is any model; the paper's has been through SFT. COLD_START > 0 begins with SFT, for a model that needs it.
"""

import argparse
import ast
import difflib
import importlib.util
import itertools
import math
import os
import random
import re
import signal
import sys
import time
from collections import defaultdict
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

# ==== Constants =====================================================================================================
# Each is also a flag of the same name (--group_size 8); its comment is the flag's help. These values are for
# Qwen2.5-1.5B-Instruct on GSM8K with an 80 GB GPU, the paper's (§4.2) where it gives one. TINY, below, replaces some.

# -- Model and data
MODEL = "tiny"  # π_θinit: a hub name, a folder, or tiny: a small model built here, with the settings of TINY below
DATASET = "gsm8k"  # D: a name, a file or a folder; or stages, each with its steps: logic:1:100,gsm8k:400
SHOTS = 0  # worked training problems in every prompt, before its question: for base models (try 4)
EVAL_DATASET = ""  # the questions to test on, several with commas; empty: the test split of DATASET
RUN = ""  # name of the run's folder under runs/; empty: model, data set and a number
SEED = 0  # random seed of the question order and of all sampling
LORA_RANK = 0  # LoRA rank r; 0 trains all weights
LORA_ALPHA = 64.0  # LoRA α: the adapter is scaled by α/r; use a learning rate of 1e-5 or more
GRADIENT_CHECKPOINTING = False  # recompute activations in the backward pass: a third slower, far less memory
# -- Cold start
COLD_START = 0  # SFT steps on worked solutions before Algorithm 1, for a model that does not write the form (try 50)
COLD_START_LEARNING_RATE = 1e-5  # learning rate of the cold start; with LoRA about ten times as much
# -- Algorithm 1
ALGORITHM = "grpo"  # a row of Table 10: sft, rft, dpo, online_rft, ppo or grpo; or distill, on-policy distillation
ITERATIONS = 1  # I, outer iterations, each begins with π_ref ← π_θ (paper: 1; Figure 6: up to 2)
STEPS = 467  # M, steps per iteration (467 × 16 questions: one pass over GSM8K)
QUESTIONS_PER_STEP = 16  # Q: 16 × 64 outputs are the paper's batch of 1024
GROUP_SIZE = 64  # G, outputs per question (paper: 64): fewer are cheaper and noisier
MU = 1  # μ, updates per rollout (paper: 1): with more, samples are used again and the clip matters
REFILL = 0  # draw until Q groups have right and wrong outputs, at most so many times (DAPO: 10); 0: train on all groups
STALENESS = 0  # k: train on outputs that were sampled k steps before; with IS_RATIO
# -- Sampling
TEMPERATURE = 1.0  # divides the logits, in sampling and in log π alike: lower explores less
MAX_NEW_TOKENS = 1024  # tokens of the longest output (paper: 1024)
MAX_PROMPT_TOKENS = 512  # a training question with a longer prompt (SHOTS aside) is skipped and counted, never cut
CACHE_TOKENS = 524288  # tokens in the KV cache at once while sampling: lower it when sampling runs out of memory
# -- Objective, eq. (3) and (4)
BASELINE = "group"  # compare an output with the mean of its group (paper), or of the others in the group (RLOO)
SCALE = "group"  # Â is divided by the std of its group (paper), of the batch, by the group's mean (MaxRL), or none
PASS_K = 1  # k > 1: an output is worth the best of k outputs (pass@k training); use the reward correctness alone
NORMALIZE = "sum"  # the sum of the rewards is normalised (paper), or each reward by itself before the sum (GDPO)
POSITIVE = 1.0  # multiplies advantages above 0
NEGATIVE = 1.0  # multiplies advantages below 0: with 0 only better outputs are learnt from
RATIO = "token"  # a ratio π_θ/π_θold per token (paper), or one per sequence (GSPO)
EPSILON_LOW = 0.2  # ε below: the ratio is clipped at 1 - ε (paper: not stated; PPO: 0.2)
EPSILON_HIGH = 0.2  # ε above: the ratio is clipped at 1 + ε (DAPO raises it to 0.28)
CLIP = "objective"  # the clip ends the gradient (paper); weight: it only limits the token's weight (CISPO)
DELTA = 0.0  # δ: where Â < 0 the ratio counts at most δ (dual clip: 3); 0: no limit (paper)
BETA = 0.04  # β, weight of the KL (paper: 0.04): for grpo and ppo; 0 needs no reference and lets the policy go further
KL = "k3"  # estimator of the KL: k3 is eq. (4); k2 and k3+ have the gradient of the reverse KL; k1's is 0 on average
DENOMINATOR = "sequence"  # divides a token: sequence |o_i| (paper); token Σ|o_i| (DAPO); constant: limit (Dr. GRPO)
IS_RATIO = "none"  # weigh by π_θold/π_sampled, the scored and the sampling policy: of the token, or of the sequence
IS_LOW = 0.0  # lowest such weight
IS_HIGH = 2.0  # highest such weight
IS_OUTSIDE = "truncate"  # a weight beyond them is truncated to the limit (TIS), or masked: set to 0 (IcePop, MIS)
MASK_TRUNCATED = False  # leave the tokens of outputs that were cut at MAX_NEW_TOKENS out of the loss (DAPO)
DROP_ZERO_ADVANTAGE = False  # skip outputs with Â = 0, and so their KL, even with β > 0
# -- Rewards: r_i is the sum of weight × reward; WEIGHT_X belongs to the rule x of evaluator.py
SUPERVISION = "outcome"  # reward outputs (outcome, §4.1.2), steps (process, §4.1.3), or both (departure 5)
WEIGHT_CORRECTNESS = 2.0  # the answer is right
WEIGHT_INTEGER = 0.5  # the answer is a whole number
WEIGHT_STRICT_FORMAT = 0.5  # exactly the form that the prompt asks for
WEIGHT_SOFT_FORMAT = 0.5  # reasoning, then answer, on any lines
WEIGHT_TAG_COUNT = 0.5  # share of the four tags that appear exactly once
WEIGHT_TESTS = 1.0  # share of its tests that a program passes
WEIGHT_COMPILES = 0.5  # the program compiles without a warning
WEIGHT_SAFETY = 0.0  # the output contains none of a short list of threats and insults
WEIGHT_OVERLONG = 0.0  # DAPO's penalty of length, from 0 down to -1 at MAX_NEW_TOKENS
OVERLONG_SHARE = 0.2  # the last part of MAX_NEW_TOKENS, over which that penalty falls (DAPO: 4096 of 20480 tokens)
WEIGHT_RANDOM = 0.0  # a control that teaches nothing: a coin toss, 1 or 0
REWARD_MODEL = ""  # a sequence classifier, hub name or folder, that scores every output; empty: rules only
WEIGHT_REWARD_MODEL = 1.0  # its score, standardised over the outputs of a step
JUDGE = ""  # a causal model, hub name or folder, that compares the outputs of a question, each with each (keep G small)
WEIGHT_JUDGE = 1.0  # how likely an output is the better one, by the judge, on average over the others of its group
WEIGHT_STEPS = 0.5  # weight of the advantages of the steps, where SUPERVISION is both
# -- Optimisation
LEARNING_RATE = 1e-6  # of AdamW (paper: 1e-6)
WARMUP = 10  # updates over which the learning rate rises from 0
SCHEDULE = "constant"  # of the learning rate after the warm-up: constant, linear or cosine; the last two fall to 0
ADAM_BETA1 = 0.9  # decay of AdamW's mean of the gradient
ADAM_BETA2 = 0.99  # decay of AdamW's mean of the squared gradient: 0.999 remembers longer than most runs last
WEIGHT_DECAY = 0.0  # of AdamW
MAX_GRAD_NORM = 1.0  # the global norm of the gradient is clipped here
TOKEN_BUDGET = 4096  # maximum tokens per micro-batch, padding included: changes memory, not the gradient
# -- The other methods of Table 10
TEACHER = ""  # model of distill, hub name or folder: it scores every token of the outputs; with the same tokenizer
BETA_DPO = 2.0  # β of DPO, eq. (12): larger than BETA because eq. (12) averages log-ratios over tokens
GAMMA = 1.0  # γ of PPO's advantages: below 1, later rewards count less
LAMBDA = 1.0  # λ of PPO's advantages (GAE): below 1 they rely more on the value function and vary less
EPSILON_VALUE = 0.2  # PPO's values are clipped at ± this around those before the update
# -- Evaluation
EVAL_EVERY = 50  # steps between evaluations; also before the first step and after the last
EVAL_QUESTIONS = 0  # how many test questions; 0: all of the split
EVAL_SAMPLES = 0  # k: also draw k outputs per test question, for pass@k and maj@k; 0: greedy only
EVAL_TEMPERATURE = 0.7  # of those k outputs (paper, Figure 7: 0.7)
# -- Bookkeeping
SAVE_EVERY = 25  # steps between checkpoints
SHOW_EVERY = 10  # steps between completions printed in full; 0: none
TENSORBOARD = False  # also write the metrics where TensorBoard reads them (pip install tensorboard)
# -- End of the constants

# What differs for --model tiny. Flags win over these, and these win over the block above.
TINY = {"DATASET": "arithmetic", "STEPS": 50, "GROUP_SIZE": 8, "MAX_NEW_TOKENS": 64, "LEARNING_RATE": 2e-4}
TINY |= {"SCHEDULE": "linear", "TOKEN_BUDGET": 16384, "EVAL_EVERY": 5, "EVAL_QUESTIONS": 200, "SHOW_EVERY": 20}

# ==== The advantages, §4.1.2 and §4.1.3 =============================================================================


def group_advantages(rewards):
    """Group-relative advantages, outcome supervision: Â_i = (r_i - mean(r)) / std(r) (§4.1.2).

    rewards [Q, G] -> [Q, G], fp32 or wider. Each question by itself: rewards 1, 0, 0, 0 give 1.5, -0.5, -0.5, -0.5.
    """
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    r, std = rewards, rewards.std(1, keepdim=True)  # [Q, G], [Q, 1]
    if PASS_K > 1:
        r, std = best_of_k(rewards)
    mean = r.mean(1, keepdim=True)  # [Q, 1]
    advantages = r - mean  # [Q, G]
    if BASELINE == "others":  # RLOO: r_i - mean of the others = G/(G - 1) (r_i - mean(r)), arXiv 2402.14740
        advantages = advantages * r.shape[1] / (r.shape[1] - 1)  # [Q, G]
    if SCALE == "group":
        advantages = advantages / (std + 1e-4)  # [Q, G]
    elif SCALE == "batch":  # of all outputs, each compared with its own group's mean: arXiv 2506.10910
        advantages = advantages / (over_ranks(advantages).std() + 1e-4)
    elif SCALE == "mean":  # MaxRL, arXiv 2602.02710: for rewards that are never negative
        advantages = torch.where(mean > 0, advantages / mean, 0.0)
    # where all rewards are equal (with PASS_K: the best of every k), what is left is a rounding error, divided by 1e-4
    all_equal = rewards.kthvalue(PASS_K, 1, keepdim=True).values == rewards.amax(1, keepdim=True)  # [Q, 1]
    advantages = advantages.masked_fill(all_equal, 0.0).to(rewards)
    return torch.where(advantages > 0, POSITIVE * advantages, NEGATIVE * advantages)


def process_advantages(step_rewards, step_ends):
    """Process supervision: Â_{i,t} = Σ_{index(j) ≥ t} r̃_i^{index(j)}, over steps that end at t or later (§4.1.3).

    step_rewards, step_ends [Q, G, T] -> [Q, G, T]. step_ends is True on the last token of each step, step_rewards holds
    the step's reward there. r̃ is the reward normalised over all steps of the group. After the last step Â is 0.
    """
    advantages = torch.zeros(step_rewards.shape, dtype=torch.promote_types(step_rewards.dtype, torch.float32))
    for question, ends in enumerate(step_ends):
        R = step_rewards[question][ends]  # [K_1 + … + K_G]  the rewards of all steps of the group
        if len(R) > 1:  # a single step has none to be compared with
            advantages[question][ends] = group_advantages(R[None])[0]
    return advantages.flip(-1).cumsum(-1).flip(-1)  # [Q, G, T]


# ==== The objective, eq. (3) and (4) ================================================================================


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, num_sequences=None, num_tokens=None, logp_sampled=None):
    """Minus the objective of eq. (3), with the KL estimate of eq. (4): a scalar to minimise.

    logp, logp_old, logp_ref  [N, T]         log π_θ, log π_θold, log π_ref of each token; logp_ref None: no KL
    advantages                [N] or [N, T]  Â_i, shared by all tokens of output i, or Â_{i,t}
    mask                      [N, T]         1 on the |o_i| tokens of output i, the end token included
    num_sequences, num_tokens                N and Σ|o_i| of the whole update, if these rows are a micro-batch of it
    logp_sampled              [N, T]         log π as it was recorded while sampling, for IS_RATIO
    """
    mask = mask.bool()
    num_sequences, num_tokens = num_sequences or len(mask), num_tokens or mask.sum().clamp(min=1)
    A = advantages[:, None] if advantages.dim() == 1 else advantages  # [N, 1] or [N, T]
    # padding may hold anything, even nan, and 0 · nan is nan
    logp, logp_old, A = (torch.where(mask, x, 0.0) for x in (logp, logp_old, A))  # [N, T]

    # min( ρ Â, clip(ρ, 1 - ε, 1 + ε) Â ) with ρ = π_θ / π_θold
    ratio = importance_ratio(logp, logp_old, mask, DELTA or math.inf)  # [N, T]
    clipped = ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)  # [N, T]
    objective = torch.minimum(ratio * A, clipped * A)  # [N, T]
    if CLIP == "weight":  # CISPO, arXiv 2506.13585: no token loses its gradient
        objective = clipped.detach() * A * logp  # [N, T]
    if IS_RATIO != "none":
        objective = objective * within_limits(sampling_weight(logp_old, logp_sampled, mask))  # [N, T]

    # - β D_KL, eq. (4): D_KL = π_ref/π_θ - log(π_ref/π_θ) - 1, which is never negative
    if BETA and logp_ref is not None:
        log_r = torch.where(mask, logp_ref, 0.0) - logp  # [N, T]  log(π_ref/π_θ)
        kl = torch.expm1(log_r) - log_r  # [N, T]  expm1(x) is exp(x) - 1, exact for small x
        if KL == "k1":  # or instead one of Schulman's other two estimators
            kl = -log_r
        elif KL == "k2":
            kl = log_r.square() / 2
        elif KL == "k3+":  # DeepSeek-V3.2, arXiv 2512.02556: × π_θ/π_θold, with its gradient
            kl = (logp - logp_old).exp() * kl
        objective = objective - BETA * kl  # [N, T]

    # 1/G Σ_i 1/|o_i| Σ_t, and the mean over the Q questions
    return -mean_over_outputs(objective, mask, num_sequences, num_tokens)


def importance_ratio(logp, logp_old, mask, highest=math.inf):
    """ρ = π_θ/π_θold of each token [N, T]; with RATIO = "sequence" their geometric mean over each output (GSPO).

    highest: δ of the dual clip (arXiv 1912.09729). Where Â > 0 the clip at 1 + ε, which is lower, makes it idle.
    """
    log_ratio = logp - logp_old  # [N, T]
    if RATIO == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    return log_ratio.clamp(max=math.log(highest)).exp()  # before exp: the gradient of exp(inf) is nan


def mean_over_outputs(x, mask, num_sequences, num_tokens):
    """1/N Σ_i 1/|o_i| Σ_t x_{i,t}, a scalar; or with another DENOMINATOR in the place of N |o_i|."""
    divisor = num_sequences * mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]  N |o_i|
    if DENOMINATOR == "token":  # DAPO
        divisor = num_tokens
    elif DENOMINATOR == "constant":  # Dr. GRPO
        divisor = num_sequences * MAX_NEW_TOKENS
    return (x * mask / divisor).sum()


# ==== Algorithm 1 ===================================================================================================


def draw(state, source):
    """Lines 5 to 8: a batch of questions, G outputs of the source for each, and their rewards."""
    problems, prompts = next_questions(state)  # 5: a batch D_b
    # 6: π_θold ← π_θ needs no copy of the network: logp_old, below
    # 7: {o_i} ~ π_θold(·|q), G for each q; for SFT, which has no source, the worked solutions of the data set
    rollout = sample(state, source, prompts) if source else worked_solutions(state, problems, prompts)
    by_name = score_outputs(rollout, problems, state)  # 8: {name: [Q, G]}
    if state.step >= COLD_START:
        state.tokens += llms.sums_over_ranks(int(rollout.mask.sum()))[0]
    return Batch(problems, rollout, by_name)


def take_step(state):
    """Lines 5 to 11 for one batch of questions; with several ranks each has its share. Returns the step's metrics."""
    batch = next_batch(state, state.policy)  # 5 to 8: a draw
    rollout, by_name = batch.rollout, batch.by_name
    rewards = weighted_sum(by_name)  # r_i, [Q, G]
    logp_old = log_probs(state, state.policy, rollout) if MU > 1 else None  # 6: log π_θold, [N, T]
    logp_ref = log_probs(state, state.reference, rollout) if BETA else None  # [N, T]
    if SUPERVISION == "outcome" and NORMALIZE == "sum":
        advantages = group_advantages(rewards).flatten()  # 9: Â_i, [N]
    elif SUPERVISION == "outcome":
        advantages = normalized_each(by_name).flatten()  # [N]
    else:
        advantages, by_name["steps"] = supervise_steps(state, rollout, batch.problems, rewards)  # 9: Â_{i,t}, [N, T]
    with llms.timed("update"):
        updates = [update(state, rollout, advantages, logp_old, logp_ref) for _ in range(MU * batch.learns)]  # 10, 11
    return record_step(state, batch, advantages, updates)


def train(state, after_step):
    """Algorithm 1, iterative GRPO, from wherever the state stands.

    after_step(state, metrics) evaluates and saves. Where it returns a signal to stop for, so does this function.
    """
    while state.step < COLD_START:  # 1: π_θinit is the model as loaded, after this SFT
        if stopped := after_step(state, TABLE_10["sft"](state)):
            return stopped
    if state.step == COLD_START:
        state.optimizer.state.clear()  # AdamW begins anew
        if state.critic:
            state.critic.trunk.load_state_dict(state.policy.base_model.state_dict())
    one_step = take_step if ALGORITHM == "grpo" else TABLE_10[ALGORITHM]  # the other methods: see Table 10, below
    for iteration in range(ITERATIONS):  # 2
        first = COLD_START + iteration * STEPS
        if state.step == first and needs_reference():  # otherwise it came with the checkpoint
            state.reference = None  # frees its memory first
            state.reference = llms.frozen_copy(state.policy, adapter=first > 0)  # 3: π_ref ← π_θ
        while state.step < first + STEPS:  # 4
            metrics = one_step(state)  # 5 to 11
            # 12: the reward is a rule or a frozen model, there is nothing to train
            if stopped := after_step(state, metrics):
                return stopped


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
    queue: list = field(default_factory=list)  # batches that wait for their step (STALENESS)
    stream: object = None  # iterator over the training problems
    memory: llms.Memory = field(default_factory=lambda: llms.Memory(TOKEN_BUDGET, CACHE_TOKENS))  # fit: see llms
    prompt_limit: int = 0  # MAX_PROMPT_TOKENS, or less for a model with a short context
    step: int = 0  # over all iterations, as the counters below
    updates: int = 0  # optimizer steps, skipped ones included
    stage: int = 0  # finished stages of the curriculum
    position: int = 0  # problems read in this stage; 0 again at the next
    questions: int = 0  # drawn
    prompts_skipped: int = 0  # too long
    tokens: int = 0  # of sampled outputs
    failures: int = 0  # steps in a row whose update was not finite
    began: float = 0.0  # when this step began
    stop_signal: int = 0  # Ctrl-C or SIGTERM, which ask for an end after the step

    def networks(self):
        networks = {"policy": self.policy, "reference": self.reference, "critic": self.critic}
        return {name: network for name, network in networks.items() if network is not None}


class Batch(NamedTuple):
    """What a step trains on, this rank's share: Q questions, N = Q·G outputs, their rewards {name: [Q, G]}."""

    problems: list
    rollout: llms.Rollout
    by_name: dict
    learns: bool = True  # False: no update is made of it
    dropped: tuple = ()  # records of outputs, of all ranks, that were drawn in vain (REFILL)
    extra: tuple | dict = ()  # metrics of how it was drawn


# ==== One update: line 11 ===========================================================================================
# Line 11 says "by maximising the GRPO objective (Equation 21)". Equation (21) is the gradient coefficient of the
# objective, Â + β (π_ref/π_θ - 1), where π_θold = π_θ. What is maximised is eq. (3); its gradient there is (20).


def update(state, rollout, advantages, logp_old, logp_ref, loss_function=grpo_loss, targets=None):
    """One optimizer step on the whole rollout, unless the loss or the gradient is not finite; returns diagnostics.

    advantages [N] or [N, T], or another method's GC; logp_old None if π_θold is π_θ; targets: PPO's V_old and R.
    """
    inputs = (state, rollout, advantages, logp_old, logp_ref, loss_function, targets)
    diagnostics = state.memory.fit("token_budget", lambda token_budget: backward(*inputs, token_budget))
    lr = learning_rate(state.updates)
    state.optimizer.param_groups[0]["lr"] = lr
    trained = [network.parameters() for network in (state.policy, state.critic) if network is not None]
    norms = [torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM) for weights in trained]  # each by itself
    norms = [llms.full_tensor(norm).item() for norm in norms]  # as they were before the clipping
    finite = all(map(math.isfinite, [diagnostics["loss"], *norms]))
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad()
    state.updates += 1
    return {**diagnostics, "grad_norm": norms[0], "lr": lr, "skipped_updates": int(not finite)}


def backward(state, rollout, advantages, logp_old, logp_ref, loss_function, targets, token_budget):
    """Leave the gradient of the whole rollout in .grad; returns diagnostics.

    Every loss is divided by the counts of the whole update, over all micro-batches and ranks: the micro-batch gradients
    sum to the full-batch gradient, up to rounding.
    """
    for weight in (weight for group in state.optimizer.param_groups for weight in group["params"]):
        weight.grad = torch.zeros_like(weight)  # AdamW skips weights whose grad is None
    N, lengths = len(rollout.mask), rollout.mask.sum(1)  # [N]
    A = advantages.view(N, -1).to(lengths.device)  # [N, 1] or [N, T]
    rows = [row for row, truncated in enumerate(rollout.truncated.tolist()) if not (MASK_TRUNCATED and truncated)]
    local_tokens = int(lengths[rows].sum())  # Σ|o_i| of this rank, outputs with Â = 0 included
    if DROP_ZERO_ADVANTAGE or (logp_ref is None and targets is None):  # without KL and critic, Â = 0 has no gradient
        has_advantage = A.any(1).tolist()
        rows = [row for row in rows if has_advantage[row]]
    num_sequences, num_tokens, learned_tokens = llms.sums_over_ranks(N, local_tokens, int(lengths[rows].sum()))
    parts = []
    for batch, is_real in llms.lockstep(rollout.micro_batches(rows, GROUP_SIZE, token_budget)):
        ids, attention, mask = rollout.rows(batch)
        T = mask.shape[1]
        old, ref, sampled = (None if x is None else x[batch, :T] for x in (logp_old, logp_ref, rollout.logp))  # [n, T]
        logp = llms.token_logprobs(state.policy, ids, attention, mask, TEMPERATURE)  # [n, T]
        old = logp.detach() if old is None else old
        loss = loss_function(logp, old, ref, A[batch, :T], mask, num_sequences, num_tokens, sampled)
        (loss * is_real).backward()  # adds 0 for a dummy batch, by which a rank that has finished waits for the others
        if is_real:
            parts.append({"loss": loss.item(), **diagnose(logp, old, ref, sampled, A[batch, :T], mask, learned_tokens)})
        if targets:
            V = state.critic.token_values(ids, attention, mask)  # [n, T]
            loss = value_loss(V, *(target[batch, :T] for target in targets), mask, num_sequences, num_tokens)
            (loss * is_real).backward()
            parts.append({"value_loss": is_real * loss.item()})
    totals = defaultdict(float)
    for name, value in (item for part in llms.gather(parts) for item in part.items()):
        totals[name] = max(totals[name], value) if name.endswith("max") else totals[name] + value
    return totals


@torch.no_grad()
def diagnose(logp, logp_old, logp_ref, logp_sampled, A, mask, learned_tokens):
    """Is the update healthy? What this micro-batch adds to each mean over the update, and its own maxima."""
    ratio = importance_ratio(logp, logp_old, mask)  # [n, T]
    sums = {"clip_low": (ratio < 1 - EPSILON_LOW) & ((A < 0) | (CLIP == "weight")) & mask}
    sums["clip_high"] = (ratio > 1 + EPSILON_HIGH) & ((A > 0) | (CLIP == "weight")) & mask
    maxima = {"ratio_max": ratio * mask}
    if logp_sampled is not None:
        gap = "staleness_gap" if STALENESS else "sampler_gap"
        sums[gap] = maxima[f"{gap}_max"] = (logp_old - logp_sampled).abs() * mask
    if logp_sampled is not None and IS_RATIO != "none":
        weight = sampling_weight(logp_old, logp_sampled, mask)  # [n, T] or [n, 1]
        sums["is_weight"] = maxima["is_weight_max"] = torch.where(mask, weight, 0.0)
        sums["is_outside"] = (within_limits(weight) != weight) & mask
    if logp_ref is not None:
        log_r = logp_ref - logp  # [n, T]  log(π_ref/π_θ)
        sums["kl"] = (torch.expm1(log_r) - log_r) * mask  # eq. (4)
        maxima["kl_log_ratio_max"] = log_r.abs() * mask
    sums = {name: x.sum().item() / learned_tokens for name, x in sums.items()}
    return sums | {name: x.max().item() for name, x in maxima.items()}


def learning_rate(number):
    """The learning rate of update `number`, from 0 on: the cold start and Algorithm 1 each warm up, then SCHEDULE."""
    highest, total = COLD_START_LEARNING_RATE, COLD_START
    if number >= COLD_START:
        highest, total, number = LEARNING_RATE, ITERATIONS * STEPS * MU, number - COLD_START
    if number < WARMUP:
        return highest * (number + 1) / (WARMUP + 1)
    left = (total - number) / max(1, total - WARMUP)  # falls from 1 to 0
    return highest * {"constant": 1.0, "linear": left, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2}[SCHEDULE]


# ==== Table 10 (§5.2.1): the other methods ==========================================================================
# All use ∇J = E[(q, o) ~ D] 1/|o| Σ_t GC(q, o, t) ∇log π_θ(o_t | q, o_<t), eq. (5). They differ in the data source D,
# the reward function and the gradient coefficient GC.


def other_step(state, source, coefficients, loss_function):
    """A step of the other methods, in the place of `take_step`.

    source: the model that samples, or None for q, o ~ P_sft(Q, O), the worked solutions of the data set.
    coefficients(...) returns GC, [N] or [N, T]; the critic's targets or None; a dict of metrics.
    """
    batch = next_batch(state, source)
    rollout, by_name = batch.rollout, batch.by_name  # {name: [Q, G]}
    on_policy = source is state.policy  # ratios and the KL can be estimated only from outputs of π_θ
    logp_old = log_probs(state, state.policy, rollout) if on_policy and MU > 1 else None  # [N, T]
    logp_ref = log_probs(state, state.reference, rollout) if on_policy and needs_reference() else None  # [N, T]
    GC, targets, extra = coefficients(state, rollout, by_name, logp_old, logp_ref)
    num_updates = MU if source else 1  # given texts are imitated once a step, whatever μ
    with llms.timed("update"):
        updates = [update(state, rollout, GC, logp_old, logp_ref, loss_function, targets) for _ in range(num_updates)]
    return record_step(state, batch, GC, updates, extra)


def likelihood_loss(logp, logp_old, logp_ref, GC, mask, num_sequences, num_tokens, logp_sampled=None):
    """- 1/N Σ_i 1/|o_i| Σ_t GC_i log π_θ: minus eq. (6), (8); with DPO's GC its gradient is that of minus eq. (12)."""
    return -mean_over_outputs(GC * logp, mask, num_sequences, num_tokens)


def ones(state, rollout, by_name, logp_old, logp_ref):
    """SFT: 1, eq. (7)."""
    return torch.ones(len(rollout.mask)), None, {}


def is_right(state, rollout, by_name, logp_old, logp_ref):
    """RFT and Online RFT: 𝕀(o), 1 if the answer is right, else 0, eq. (10)."""
    return by_name["correctness"].flatten(), None, {}


def preference(state, rollout, by_name, logp_old, logp_ref):
    """DPO: β σ(-Δ) for o⁺ and - β σ(-Δ) for o⁻, eq. (14), in pairs of a right and a wrong output of the same group.

    Δ = β (1/|o⁺| Σ_t log π_θ/π_ref(o⁺_t) - 1/|o⁻| Σ_t log π_θ/π_ref(o⁻_t)). Eq. (12) is the mean of log σ(Δ) over all
    pairs. As printed, (13) and (14) lack the factor β and have one Δ per token; this is the derivative of (12).
    """
    right = by_name["correctness"] > 0  # [Q, G]
    usable = ~rollout.truncated.cpu().view(right.shape) | (not MASK_TRUNCATED)  # [Q, G]
    pairs = []  # (row of o⁺, row of o⁻)
    rows = torch.arange(right.numel()).view(right.shape)  # [Q, G]
    for group, good, bad in zip(rows, right & usable, ~right & usable):
        pairs += zip(group[good].tolist(), group[bad].tolist())
    num_pairs, num_outputs = llms.sums_over_ranks(len(pairs), right.numel())
    GC, extra = torch.zeros(right.numel()), {"dpo/pairs": num_pairs}  # [N]
    if num_pairs:
        plus, minus = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T  # 2 × [pairs]
        log_ratio = log_probs(state, state.policy, rollout) - log_probs(state, state.reference, rollout)  # [N, T]
        log_ratio = log_ratio.sum(1) / rollout.mask.sum(1).clamp(min=1)  # [N]
        delta = BETA_DPO * (log_ratio[plus] - log_ratio[minus])  # [pairs]
        for name, x in (("dpo/loss", -torch.nn.functional.logsigmoid(delta)), ("dpo/margin", delta)):
            extra[name] = sum(llms.gather(x.tolist())) / num_pairs
        GC[plus] = (BETA_DPO * torch.sigmoid(-delta) * num_outputs / num_pairs).to(GC)  # the loss divides by N
        GC[minus] = -GC[plus]
    return GC, None, extra


def from_teacher(state, rollout, by_name, logp_old, logp_ref):
    """On-policy distillation: log π_T - log π_θ of each token, π_T being the TEACHER; no group, no baseline.

    At π_θ = π_θold its gradient is that of minus the KL estimate k2 to the teacher, token by token.
    """
    logp = log_probs(state, state.policy, rollout) if logp_old is None else logp_old  # [N, T]
    GC = (log_probs(state, state.teacher, rollout) - logp) * rollout.mask  # [N, T]
    total, tokens = llms.sums_over_ranks(GC.sum().item(), int(rollout.mask.sum()))
    return GC, None, {"distill/kl": -total / tokens, "distill/max": max(llms.gather([GC.abs().max().item()]))}


def ppo_advantages(state, rollout, by_name, logp_old, logp_ref):
    """PPO: A_t, eq. (18), by GAE on the rewards of eq. (2): r_i on the end token, - β log(π_θ/π_ref) on every token."""
    values = per_token(state, llms.Critic.token_values, state.critic, rollout)  # [N, T]
    rewards = torch.zeros_like(values)  # [N, T]
    end_token = rollout.mask.sum(1, keepdim=True) - 1  # [N, 1]
    rewards.scatter_(1, end_token, weighted_sum(by_name).view(-1, 1).to(rewards))  # r_i
    if BETA:  # with μ = 1, log π_θ is what was recorded while sampling
        rewards -= BETA * ((rollout.logp if logp_old is None else logp_old) - logp_ref)
    advantages = gae(rewards, values, rollout.mask)  # [N, T]
    return advantages, (values, advantages + values), {}


def gae(rewards, values, mask):
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, and V = 0 after the end (arXiv 1506.02438).

    rewards, values, mask [N, T] -> [N, T]. With V = 0, γ = λ = 1 and one reward at the end, A_t is that reward.
    """
    advantages, A, V_next = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * V_next - values[:, t]  # [N]
        A = (delta + GAMMA * LAMBDA * A) * mask[:, t]  # [N]
        V_next = values[:, t] * mask[:, t]  # [N]
        advantages[:, t] = A
    return advantages


def ppo_loss(logp, logp_old, logp_ref, advantages, mask, num_sequences, num_tokens, logp_sampled=None):
    """Minus eq. (1), which is eq. (3) without the KL: PPO has it in the reward."""
    return grpo_loss(logp, logp_old, None, advantages, mask, num_sequences, num_tokens, logp_sampled)


def value_loss(values, values_old, returns, mask, num_sequences, num_tokens):
    """½ max( (V - R)², (clip(V, V_old ± ε) - R)² ): no gradient beyond a change by ε (arXiv 1707.06347)."""
    clipped = values.clamp(values_old - EPSILON_VALUE, values_old + EPSILON_VALUE)  # [N, T]
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)  # [N, T]
    return mean_over_outputs(error / 2, mask, num_sequences, num_tokens)


TABLE_10 = {  # data source (the reference is π_sft), gradient coefficient, loss. A new method: one function, one line
    "sft": lambda state: other_step(state, None, ones, likelihood_loss),
    "rft": lambda state: other_step(state, state.reference, is_right, likelihood_loss),
    "dpo": lambda state: other_step(state, state.reference, preference, likelihood_loss),
    "online_rft": lambda state: other_step(state, state.policy, is_right, likelihood_loss),
    "ppo": lambda state: other_step(state, state.policy, ppo_advantages, ppo_loss),
    "distill": lambda state: other_step(state, state.policy, from_teacher, ppo_loss),
    "grpo": take_step,  # π_θ; Â_{i,t} + β (π_ref/π_θ - 1), eq. (21)
}


def last_step():
    """The number of steps of the cold start and of all iterations."""
    return COLD_START + ITERATIONS * STEPS


def needs_reference():
    """Is π_ref the source of the outputs, or used for a KL (which Online RFT only records)?"""
    return ALGORITHM in ("rft", "dpo") or (ALGORITHM not in ("sft", "distill") and BETA > 0)


# ==== What came after the paper =====================================================================================
# Each is off as the constants stand: PASS_K, NORMALIZE, SCALE = "batch"; IS_RATIO; REFILL, STALENESS.


def best_of_k(rewards):
    """Pass@k training (arXiv 2508.10751): a set of k = PASS_K outputs has the reward of the best of them.

    rewards [Q, G] -> [Q, G], the mean over all sets that hold the output; [Q, 1], the std over all sets of the group.
    """
    G, k = rewards.shape[1], PASS_K
    r, order = rewards.double().sort(1)  # [Q, G]  ascending: the best of a set is its last
    sets = math.comb(G - 1, k - 1)  # that hold a given output
    own = [math.comb(j, k - 1) / sets for j in range(G)]  # of those with output j, the share in which it is the best
    later = [math.comb(max(j - 1, 0), k - 2) / sets for j in range(G)]  # of those with an earlier one, in which j is
    own, later = torch.tensor([own, later], dtype=r.dtype, device=r.device)  # 2 × [G]
    best = r @ (own.diag() + later.expand(G, G).triu(1)).T  # [Q, G]
    share = own * k / G  # [G]  of all sets of the group, those in which output j is the best
    std = ((r - r @ share[:, None]) ** 2 @ share[:, None]).sqrt()  # [Q, 1]
    return torch.empty_like(r).scatter(1, order, best), std


def normalized_each(by_name):
    """GDPO (arXiv 2601.05242): each reward is normalised in its group, and their weighted sum in the batch."""
    advantages = weighted_sum({name: group_advantages(rewards) for name, rewards in by_name.items()})  # [Q, G]
    return advantages / (over_ranks(advantages).std() + 1e-4)  # their mean is 0


def over_ranks(x):
    """The numbers of all ranks: [N]."""
    return torch.tensor(llms.gather(x.flatten().tolist()), dtype=x.dtype)


def sampling_weight(logp_old, logp_sampled, mask):
    """π_θold/π_sampled of each token [N, T], or of each output [N, 1], without gradient."""
    log_weight = torch.where(mask, logp_old - logp_sampled, 0.0).detach()  # [N, T]
    return (log_weight.sum(1, keepdim=True) if IS_RATIO == "sequence" else log_weight).exp()


def within_limits(weight):
    """Weights truncated to IS_LOW and IS_HIGH; or 0 where they are beyond them."""
    limited = weight.clamp(IS_LOW, IS_HIGH)
    return limited if IS_OUTSIDE == "truncate" else torch.where(limited == weight, weight, 0.0)


def refill(state):
    """DAPO (arXiv 2503.14476): draw until Q groups hold right and wrong outputs, but at most REFILL times.

    They are trained on in the order in which they were drawn; all others are only recorded and counted. If there is not
    one for each rank, the last draw is recorded and no update is made.
    """
    drawn, records, mixed = [], [], []  # groups, the records of their outputs, which groups hold right and wrong ones
    while len(mixed) < QUESTIONS_PER_STEP and len(drawn) < REFILL * QUESTIONS_PER_STEP:
        batch = draw(state, state.policy)
        drawn += groups_of(batch)
        records += batch_records(batch, torch.zeros(len(batch.rollout.texts)))
        right = [rewards["correctness"] for *_, rewards in drawn]
        mixed = [i for i, of_q in enumerate(right) if min(of_q) < max(of_q)]
    learns = len(mixed) >= llms.WORLD
    kept = mixed[:QUESTIONS_PER_STEP] if learns else range(len(drawn) - QUESTIONS_PER_STEP, len(drawn))
    dropped = [record for i, record in enumerate(records) if i // GROUP_SIZE not in kept]
    draws, share = len(drawn) // QUESTIONS_PER_STEP, len(mixed) / len(drawn)
    return batch_of(state, [drawn[i] for i in kept], learns, dropped, {"refill/draws": draws, "refill/mixed": share})


def groups_of(batch):
    """The groups of all ranks in plain numbers and texts: [(problem, its outputs, {reward: its G values})]."""
    outputs, G = batch.rollout.outputs(), len(batch.rollout.texts) // len(batch.problems)
    rewards = [dict(zip(batch.by_name, of_q)) for of_q in zip(*(x.tolist() for x in batch.by_name.values()))]
    return llms.gather(list(zip(batch.problems, zip(*[iter(outputs)] * G), rewards)))


def batch_of(state, groups, *about):
    """This rank's share of such groups, as a batch again."""
    names = dict.fromkeys(name for *_, rewards in groups for name in rewards)
    problems, outputs, rewards = zip(*llms.share(groups))
    rollout = llms.from_outputs([output for of_q in outputs for output in of_q], state.policy.device)
    by_name = {name: torch.tensor([of_q.get(name, [0.0] * GROUP_SIZE) for of_q in rewards]) for name in names}
    return Batch(list(problems), rollout, by_name, *about)


# ########################################## Here the paper ends #####################################################
# The rest serves it: questions and samples, rewards, evaluation, records, checkpoints, command line.


class SettingsError(ValueError):
    """What is wrong with the settings, in one line."""


class RunError(RuntimeError):
    """Why a run ended early, in one line."""


# ==== What a step needs, what it records ============================================================================

COUNTERS = ("step", "updates", "stage", "position", "questions", "prompts_skipped", "tokens")  # in checkpoints
say, log, begin = map(llms.on_rank_0, (tqdm.write, report.log, report.begin))  # only rank 0 prints and writes
redraw, summary = map(llms.on_rank_0, (plot.draw, report.summary))


def stage_of(step):
    """(number, data set) of the curriculum's stage at a step; each iteration goes through all stages."""
    stages = rldatasets.stages(DATASET)
    if len(stages) == 1:  # its questions continue through all iterations
        return 0, stages[0][0]
    step = max(0, step - COLD_START)  # of Algorithm 1; the cold start has the questions of the first stage
    ends = itertools.accumulate(steps for _, steps in stages)
    index = next((index for index, end in enumerate(ends) if step % STEPS < end), len(stages) - 1)
    return step // STEPS * len(stages) + index, stages[index][0]


def next_batch(state, source):
    """What a step trains on: a draw; with STALENESS the oldest of those in the queue, which begins with k of them."""
    llms.SECONDS.clear()
    state.began = time.perf_counter()
    waiting = min(STALENESS, last_step() - 1 - state.step) if source is state.policy else 0
    while len(state.queue) <= waiting:
        state.queue.append(refill(state) if REFILL and source is state.policy else draw(state, source))
    return state.queue.pop(0)


def next_questions(state):
    """Line 5: QUESTIONS_PER_STEP problems whose prompts are short enough. Returns this rank's problems and prompts."""
    stage, dataset = stage_of(state.step + len(state.queue))  # of the step that these are for
    if stage != state.stage:
        state.stage, state.position, state.stream = stage, 0, None
    if state.stream is None:
        state.stream = rldatasets.shuffled(dataset, "train", f"{SEED} {stage}" if stage else SEED, state.position)
    batch = []
    while len(batch) < QUESTIONS_PER_STEP:
        problem = next(state.stream)
        prompt = prompt_ids(state.tokenizer, problem)
        state.position += 1
        if len(prompt) <= state.prompt_limit:
            batch.append((problem, prompt))
        else:
            state.prompts_skipped += 1
    state.questions += len(batch)
    return map(list, zip(*llms.share(batch)))


def prompt_ids(tokenizer, problem):
    """The prompt of a problem, with SHOTS worked examples in it that are the same for all problems."""
    examples = rldatasets.examples(stage_of(0)[1], SHOTS)
    return llms.encode(tokenizer, rldatasets.prompt(problem, examples))


def worked_solutions(state, problems, prompts):
    """A rollout of the solutions that the data set has."""
    if not all(problem.get("solution") for problem in problems):
        raise RunError("a question has no worked solution to imitate")
    texts = [rldatasets.written_out(problem) for problem in problems]
    return llms.rollout_of(state.policy, state.tokenizer, prompts, texts, MAX_NEW_TOKENS)


@llms.timed("sample")
def sample(state, model, prompts, group_size=None, temperature=None, generator=None):
    """o ~ π(O|q): a rollout of group_size outputs for each prompt. Without the last three arguments: as in training."""
    if group_size is None:
        group_size, temperature, generator = GROUP_SIZE, TEMPERATURE, state.generator
    inputs = model, state.tokenizer, prompts, group_size, MAX_NEW_TOKENS, temperature, generator
    rollout = state.memory.fit("cache_tokens", lambda cache_tokens: llms.sample(*inputs, cache_tokens))
    return rollout if model is state.policy else rollout._replace(logp=None, entropy=None)  # those are not π_θ's


def log_probs(state, model, rollout):
    """log π of every token of a rollout under a model, without gradient: [N, T]."""
    return per_token(state, lambda model, *batch: llms.token_logprobs(model, *batch, TEMPERATURE), model, rollout)


@llms.timed("logprobs")
def per_token(state, read, model, rollout):
    """read(model, ids, attention, mask) of all rows of a rollout, in micro-batches, without gradient: [N, T]."""
    return state.memory.fit("token_budget", lambda n: llms.in_micro_batches(read, model, rollout, GROUP_SIZE, n))


@llms.timed("reward")
def score_outputs(rollout, problems, state=None):
    """Every reward of every output, unweighted: {name: [Q, G]}; without a state, as in a test, those of rules alone."""
    group, threads = len(rollout.texts) // len(problems), max(1, os.cpu_count() // llms.LOCAL_WORLD)
    groups = [rollout.texts[start : start + group] for start in range(0, len(rollout.texts), group)]  # [Q], of G texts
    asked, problems = problems, [problem for problem in problems for _ in range(group)]  # [Q], [N]
    by_name, failures = evaluator.score(rollout.texts, problems, threads)  # {name: N numbers}, [why a rule failed]
    failed, outputs = llms.sums_over_ranks(len(failures), len(problems))
    if failed == outputs:
        raise RunError(f"the rewards fail on every output: {failures[0]}")
    if state and group > 1:
        of_groups, more = evaluator.compare(groups, asked)
        by_name, failures = by_name | of_groups, failures + more
    if failures:
        tqdm.write(f"note: {len(failures)} × a reward failed and counts 0, first: {failures[0]}", file=sys.stderr)
    if state and problems[0].get("kind") == "nim":  # self-play: a move is right if it wins
        by_name["optimal"], by_name["correctness"] = by_name["correctness"], self_play(state, rollout.texts, problems)
    overlong = lambda length: evaluator.overlong(length, MAX_NEW_TOKENS, OVERLONG_SHARE * MAX_NEW_TOKENS)
    by_name["overlong"] = list(map(overlong, rollout.mask.sum(1).tolist()))
    if state and state.reward_model:
        questions = [problem["question"] for problem in problems]
        by_name["reward_model"] = llms.standardised(llms.reward_scores(*state.reward_model, questions, rollout.texts))
    if state and state.judge and group > 1:
        judged = [judge_group(state.judge, problem["question"], texts) for problem, texts in zip(asked, groups)]
        by_name["judge"], by_name["judge_flips"] = map(list, zip(*judged))  # 2 × [Q], of G numbers
    if state and WEIGHT_RANDOM:
        coin = random.Random(f"{SEED} {state.questions}")  # of its own: sampling draws the same numbers without it
        tosses = [[coin.randrange(2) for _ in range(group)] for _ in range(outputs // group)]  # [Q, G], of all ranks
        by_name["random"] = torch.tensor(llms.share(tosses)).float()
    return {name: torch.as_tensor(values).view(-1, group) for name, values in by_name.items()}


def judge_group(judge, question, texts):
    """How each of G outputs fares against the others, by the judge, each pair shown in both orders: 2 × G numbers.

    The first is the mean probability of being the better one, a soft reward. The second is the share of its pairs in
    which the verdict goes to the place, first or second, and not to an output.
    """
    pairs = list(itertools.permutations(range(len(texts)), 2))
    said = llms.first_is_better(*judge, question, [(texts[i], texts[j]) for i, j in pairs], TOKEN_BUDGET)
    first = torch.full((len(texts), len(texts)), 0.5, dtype=torch.float64)  # [G, G]: i, shown first, is better than j
    first[tuple(zip(*pairs))] = said.double()  # [G (G - 1)]
    wins = (first + 1 - first.T) / 2  # [G, G]
    flips = ((first > 0.5) == (first.T > 0.5)).fill_diagonal_(False)  # [G, G]
    return [((x.sum(1) - own) / (len(texts) - 1)).tolist() for x, own in ((wins, 0.5), (flips, 0))]


def model_player(state, model, temperature, generator=None):
    """A model as a player of Nim: a function from positions to completions, each with a move."""
    prompts = lambda positions: [prompt_ids(state.tokenizer, position) for position in positions]
    return lambda positions: sample(state, model, prompts(positions), 1, temperature, generator).texts


def self_play(state, texts, problems):
    """Which of the moves in these texts win, if the policy then plays on for both sides: 1 or 0 for each."""
    generator = torch.Generator().manual_seed(SEED + state.questions)
    return play(problems, [model_player(state, state.policy, TEMPERATURE, generator)] * 2, texts)


def play(problems, players, texts=None):
    """Games of Nim, one from each position, to their end: does players[0] win, who makes the first move? 1 or 0.

    texts: completions with the first moves, if known. All ranks follow all games; each asks about its share of them.
    """
    counts, positions, texts = llms.gather([len(problems)]), llms.gather(problems), texts and llms.gather(texts)
    won, live = [0.0] * len(positions), list(range(len(positions)))
    for turn in itertools.count():
        if turn or not texts:
            asked = live + live[:1] * (llms.WORLD - len(live))  # one or more for each rank
            texts = llms.gather(players[turn % 2](llms.share([positions[game] for game in asked])))
        for game, text in zip(live, texts):
            now = positions[game]
            heaps, mover_wins = evaluator.after_move(text, now)
            if mover_wins is None:
                positions[game] = rldatasets.nim_position(now["players"], 1 - now["turn"], heaps)
            else:
                positions[game], won[game] = None, float(mover_wins == (turn % 2 == 0))
        live = [game for game in live if positions[game]]
        if not live:
            first = sum(counts[: llms.RANK])
            return won[first : first + len(problems)]


def matches(state, problems):
    """Two games from each position, one in each seat, models play greedily: {opponent: share of games won}."""
    policy, metrics = model_player(state, state.policy, 0.0), {}
    opponents = {"random": evaluator.random_player, "perfect": evaluator.perfect_player}
    opponents |= {"reference": model_player(state, state.reference, 0.0)} if state.reference else {}
    for name, opponent in opponents.items():
        first, second = play(problems, [policy, opponent]), play(problems, [opponent, policy])
        won = llms.gather(first + [1 - lost for lost in second])
        metrics |= {f"eval/wins/{name}": sum(won) / len(won), "eval/games": len(won)}
    return metrics


def weighted_sum(by_name):
    """r_i = Σ weight × reward: [Q, G]. A reward without a WEIGHT_ constant is only logged."""
    return sum(settings().get(f"WEIGHT_{name.upper()}", 0.0) * values for name, values in by_name.items())


def supervise_steps(state, rollout, problems, rewards):
    """Process supervision by a rule: Â_{i,t} [N, T]; and to record, each output's mean step reward [Q, G]."""
    steps = [evaluator.step_rewards(text, problems[i // GROUP_SIZE]) for i, text in enumerate(rollout.texts)]
    step_rewards, step_ends = llms.at_tokens(state.tokenizer, rollout, steps)  # [N, T]
    means = (step_rewards.sum(1) / step_ends.sum(1).clamp(min=1)).view(rewards.shape)
    if SUPERVISION == "process":  # as printed: the answer is the last step, ends with the output and is rewarded r_i
        end_tokens = torch.arange(len(step_ends)), rollout.mask.sum(1).cpu() - 1
        step_rewards[end_tokens], step_ends[end_tokens] = rewards.flatten(), True
    advantages = process_advantages(*(x.view(*rewards.shape, -1) for x in (step_rewards, step_ends))).flatten(0, 1)
    if SUPERVISION == "both":
        advantages = group_advantages(rewards).flatten()[:, None] + WEIGHT_STEPS * advantages
    return advantages, means


def mean_log_prob(state, model, rollout):
    """The mean log π of the tokens of each output under a model, at temperature 1: [N]."""
    read = lambda model, *batch: llms.token_logprobs(model, *batch, 1.0)
    return per_token(state, read, model, rollout).sum(1) / rollout.mask.sum(1)


def prefers_true(state, problems, prompts):
    """Is the true next turn of a dialogue likelier, per token, than the false one? 1 or 0 for each: [Q]."""
    texts = [reply for problem in problems for reply in problem.get("replies", ("", ""))]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    replies = llms.rollout_of(state.policy, state.tokenizer, prompts, texts, TOKEN_BUDGET)
    true, false = mean_log_prob(state, state.policy, replies).view(-1, 2).T  # 2 × [Q]
    return (true > false).float()


def evaluate(state, problems):
    """Metrics, and a record per problem: greedy outputs, games of Nim, pass@k and maj@k from EVAL_SAMPLES samples."""
    kinds = {problem.get("kind") for problem in problems}
    openings = [problem for problem in problems if min(problem.get("heaps", {"": 0}).values()) > 1]  # of Nim only
    problems, n = llms.share(problems), EVAL_SAMPLES
    prompts = [prompt_ids(state.tokenizer, problem) for problem in problems]
    rollout = sample(state, state.policy, prompts, 1, 0.0)
    columns = score_outputs(rollout, problems)
    if "dialogue" in kinds:
        columns["prefers_true"] = prefers_true(state, problems, prompts)
    if "writing" in kinds and state.reference:
        columns["fluency"] = mean_log_prob(state, state.reference, rollout)
    records = output_records(rollout, problems, columns)
    metrics = report.eval_metrics(records) | (matches(state, llms.share(openings)) if openings else {})
    if not n:
        return metrics, records
    rollout = sample(state, state.policy, prompts, n, EVAL_TEMPERATURE, torch.Generator().manual_seed(SEED))
    right = llms.gather(score_outputs(rollout, problems)["correctness"].sum(1).int().tolist())  # of n, for each problem
    for k in sorted({2**power for power in range(n.bit_length())} | {n}):  # paper, Figure 7
        metrics[f"eval/pass@{k}"] = sum(report.pass_at_k(n, c, k) for c in right) / len(right)
        groups = [(rollout.texts[i * n : i * n + k], problem) for i, problem in enumerate(problems)]
        if not kinds & {"program", "writing"}:  # they have no answer to vote for
            votes = llms.gather([evaluator.right(evaluator.majority(group), problem) for group, problem in groups])
            metrics[f"eval/maj@{k}"] = sum(votes) / len(votes)
    return metrics, records


def output_records(rollout, problems, columns):
    """A dict for each output of all ranks: its problem, text, length, and its value of each column, [Q, G] or [N]."""
    lengths = rollout.mask.sum(1)  # [N]
    entropy = lengths * math.nan if rollout.entropy is None else rollout.entropy.sum(1)  # [N], over the tokens
    columns = columns | {"length": lengths, "truncated": rollout.truncated.float(), "entropy": entropy}
    columns = {name: x.flatten().tolist() for name, x in columns.items()}
    for metric in (evaluator.reflection, evaluator.num_steps, evaluator.approach):
        columns[metric.__name__] = list(map(metric, rollout.texts))
    return llms.gather(report.records(problems, rollout.texts, columns))


def batch_records(batch, advantages):
    """A record for each output of a batch, of all ranks."""
    A = advantages.view(len(batch.rollout.texts), -1)  # [N, 1] or [N, T]
    columns = {"reward": weighted_sum(batch.by_name), "advantage": A[:, 0], "zero_advantage": (A == 0).all(1).float()}
    return output_records(batch.rollout, batch.problems, batch.by_name | columns)


def record_step(state, batch, advantages, updates, extra=None):
    """Count the step; write its metrics over all ranks, averaged over the μ updates except maxima; return them."""
    records = [*batch_records(batch, advantages), *batch.dropped]
    group = len(batch.rollout.texts) // len(batch.problems)
    names = dict.fromkeys(llms.gather(list(batch.by_name)))  # the rewards of all ranks: one rank may lack some
    outputs = report.step_metrics(records, group, names)
    stage, state.step = stage_of(state.step)[1], state.step + 1
    if state.step <= COLD_START:  # nothing was sampled: the records are of worked solutions
        stage, outputs = "cold start", {name: outputs[name] for name in ("length", "length_max", "truncated")}
    if state.step == COLD_START + 1 and (note := report.silence(records, evaluator.TAGS)):
        say(note)
    row = {"step": state.step, "stage": stage} | outputs | report.mean_of_updates(updates)
    row |= dict(batch.extra) | (extra or {})
    row |= {name: getattr(state, name) for name in ("questions", "prompts_skipped", "tokens", "updates")}
    row |= state.memory.limits | {"memory": llms.peak_memory(), "seconds": time.perf_counter() - state.began}
    row |= llms.SECONDS
    log(state.run, row, "train", records[:group], TENSORBOARD)
    say(report.step_line(row))
    if SHOW_EVERY and state.step % SHOW_EVERY == 0:
        say(report.completion(records[0]))
    return row


def save_checkpoint(state):
    """Replace the run's checkpoint by the state as it is, for any number of ranks to go on from."""
    about = {"counters": {name: getattr(state, name) for name in COUNTERS}, "settings": settings()}
    about["queue"] = [[groups_of(batch), batch.learns, batch.dropped, batch.extra] for batch in state.queue]
    report.sync(state.run)
    llms.save_checkpoint(state.run / "checkpoint", state.networks(), state.optimizer, state.generator, about)


def load_checkpoint(state):
    """Bring a fresh state to where its run's checkpoint was written."""
    about, tensors = llms.read_checkpoint(state.run / "checkpoint")
    now, then = settings(), about["settings"]
    if differ := [name for name in now if name not in MAY_CHANGE and then.get(name) != now[name]]:
        raise SettingsError(f"the checkpoint of {state.run} belongs to other settings: {', '.join(differ)} differ")
    vars(state).update(about["counters"])
    fewest = min((len(groups) for groups, *_ in about["queue"]), default=llms.WORLD)
    if fewest < llms.WORLD:
        raise SettingsError(f"too many ranks: a step that {state.run} has prepared has only {fewest} of its questions")
    state.queue = [batch_of(state, *parts) for parts in about["queue"]]
    if needs_reference() and state.step > COLD_START:
        state.reference = llms.frozen_copy(state.policy, adapter=COLD_START > 0 or state.step > STEPS)
    llms.load_checkpoint(tensors, state.networks(), state.optimizer, state.generator)


# ==== The command line ==============================================================================================


def constant_block():
    """The constants as they stand in this file: {NAME: (section, default, comment)}."""
    block, section = {}, None
    for line in Path(__file__).read_text(encoding="utf-8").split("# -- End of the constants")[0].splitlines():
        if title := re.fullmatch(r"# -- (.+)", line):
            section = title[1]
        elif section and (constant := re.fullmatch(r"([A-Z][A-Z0-9_]*) = (.+?)  # (.+)", line)):
            block[constant[1]] = (section, ast.literal_eval(constant[2]), constant[3])
    return block


CONSTANTS = constant_block()
MAY_CHANGE = {"STEPS", "RUN", "EVAL_EVERY", "SAVE_EVERY", "SHOW_EVERY", "TENSORBOARD"}  # in a resumed run;
MAY_CHANGE |= {"TOKEN_BUDGET", "CACHE_TOKENS", "GRADIENT_CHECKPOINTING"}  # these change only memory
CHOICES = {"ALGORITHM": list(TABLE_10), "SCHEDULE": ["constant", "linear", "cosine"], "BASELINE": ["group", "others"]}
CHOICES |= {"KL": ["k1", "k2", "k3", "k3+"], "RATIO": ["token", "sequence"], "CLIP": ["objective", "weight"]}
CHOICES |= {"SUPERVISION": ["outcome", "process", "both"], "DENOMINATOR": ["sequence", "token", "constant"]}
CHOICES |= {"SCALE": ["group", "batch", "mean", "none"], "NORMALIZE": ["sum", "each"]}
CHOICES |= {"IS_RATIO": ["none", "token", "sequence"], "IS_OUTSIDE": ["truncate", "mask"]}
MISTAKES = SettingsError, argparse.ArgumentError, report.FolderError, llms.ModelError, rldatasets.DataError, OSError


def settings():
    """The constants in force, by name."""
    return {name: globals()[name] for name in CONSTANTS}


def parse(argv):
    """The actions of a command line, and the constants that it gives as flags."""
    about, layout = __doc__.split("\n\nRead downwards")[0], argparse.RawDescriptionHelpFormatter
    options = {"formatter_class": layout, "allow_abbrev": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(usage="python main.py [--flag value …]", description=about, **options)
    parser.add_argument("--against", metavar="MODEL", help="with --evaluate: test this one too, on the same questions")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    one_of.add_argument("--evaluate", metavar="MODEL", help="only test a model: hub name, folder, or run folder")
    one_of.add_argument("--test", action="store_true", help="two steps and one small evaluation, all else as given")
    titles = dict.fromkeys(section for section, _, _ in CONSTANTS.values())
    sections = {title: parser.add_argument_group(title) for title in titles}
    for name, (section, default, comment) in CONSTANTS.items():
        flag = {"type": type(default), "metavar": type(default).__name__.upper(), "default": argparse.SUPPRESS}
        if isinstance(default, bool):  # --tensorboard alone is --tensorboard true
            true_or_false = lambda text: {"true": True, "false": False}.get(text.lower(), text)
            flag |= {"type": true_or_false, "choices": [True, False], "nargs": "?", "const": True}
        flag["help"] = f"{comment.replace('%', '%%')} (default: {default!r})"
        sections[section].add_argument(f"--{name.lower()}", **flag)
    argv = [re.sub(r"(?<=^--)[\w-]+", lambda word: word[0].replace("-", "_"), flag) for flag in argv]  # --a-b is --a_b
    actions, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [f"--{name.lower()}" for name in ("help", *vars(actions), *CONSTANTS)]
        close = difflib.get_close_matches(unknown[0], known, 1)
        raise SettingsError(f"unknown flag {unknown[0]}; " + (f"did you mean {close[0]}?" if close else "see --help"))
    if "" in (actions.resume, actions.evaluate, actions.against) or (actions.against and not actions.evaluate):
        raise SettingsError("--resume, --evaluate and --against need a name, and --against goes with --evaluate")
    return actions, {name: value for name in CONSTANTS if (value := vars(actions).get(name.lower())) is not None}


def choose_settings(actions, flags):
    """Write the constants, here and nowhere else. The later wins: defaults; TINY or the run's settings; flags."""
    run, defaults = actions.resume or actions.evaluate, {name: CONSTANTS[name][1] for name in CONSTANTS}
    known = report.read_settings(run, defaults) if run and (actions.resume or report.is_run(run)) else {}
    for name, value in flags.items() if actions.resume else ():
        may_change = name in MAY_CHANGE and (name != "STEPS" or known["ITERATIONS"] == 1)
        if value != known[name] and not may_change:
            raise SettingsError(f"{run} was made with --{name.lower()} {known[name]}: a resumed run keeps its settings")
    model = actions.evaluate or (defaults | known | flags)["MODEL"]
    values = defaults | (known or (TINY if model == "tiny" else {})) | flags | {"MODEL": model}
    counts = [steps for _, steps in rldatasets.stages(values["DATASET"])]
    if any(counts) and not known:  # a curriculum determines its number of steps
        if flags.get("STEPS", sum(counts)) != sum(counts):
            raise SettingsError(f"--steps {flags['STEPS']}: the stages of --dataset have {sum(counts)} steps")
        values["STEPS"] = sum(counts)
    if actions.test:
        values |= {"STEPS": 2, "ITERATIONS": 1, "COLD_START": min(values["COLD_START"], 2)}
        values |= {"EVAL_QUESTIONS": min(values["EVAL_QUESTIONS"] or 8, 8)}
    globals().update(values)
    check_settings()


def check_settings():
    """Refuse what cannot be meant, before anything is loaded."""
    now, longest, dpo = settings(), MAX_PROMPT_TOKENS + MAX_NEW_TOKENS, ALGORITHM == "dpo"
    weights = {name for name in now if name.startswith("WEIGHT_")} - {"WEIGHT_DECAY"}
    numbers = {name: x for name, x in now.items() if isinstance(x, (int, float)) and name not in weights}
    from_1 = ("ITERATIONS", "STEPS", "GROUP_SIZE", "MU", "MAX_NEW_TOKENS", "CACHE_TOKENS", "EVAL_EVERY", "SAVE_EVERY")
    least = dict.fromkeys(numbers, 0) | dict.fromkeys(from_1, 1) | {"TEMPERATURE": 0.01, "EVAL_TEMPERATURE": 0.01}
    above_0 = ("LORA_ALPHA", "BETA_DPO", "EPSILON_VALUE", "MAX_GRAD_NORM", "OVERLONG_SHARE")
    outcome, grpo = SUPERVISION == "outcome", ALGORITHM == "grpo"
    rewards = {*evaluator.REWARDS, *evaluator.GROUP_REWARDS, "overlong", "random", "reward_model", "judge", "steps"}
    rewards |= {*report.MEASURES["writing"]} - {"fluency"}  # the counts of a story
    rules = [
        *((name, now[name] in names, f"one of {', '.join(names)}") for name, names in CHOICES.items()),
        *((name, name[7:].lower() in rewards, "the weight of a reward of evaluator.py") for name in weights),
        *((name, abs(x) < 2**63, "below 2 to the 63") for name, x in now.items() if not isinstance(x, str)),
        *((name, x >= least[name], f"at least {least[name]}") for name, x in numbers.items()),
        *((name, now[name] > 0, "above 0") for name in above_0),
        *((name, now[name] < 1, "below 1") for name in ("ADAM_BETA1", "ADAM_BETA2")),
        *((name, now[name] <= 1, "from 0 to 1") for name in ("GAMMA", "LAMBDA", "OVERLONG_SHARE", "EPSILON_LOW")),
        *((name, x.isprintable(), "printable") for name, x in now.items() if isinstance(x, str)),
        ("RUN", RUN == Path(RUN).name != ".." and len(os.fsencode(RUN)) < 256, "a name without folders"),
        ("TOKEN_BUDGET", TOKEN_BUDGET >= longest, f"at least max_prompt_tokens + max_new_tokens = {longest}"),
        ("QUESTIONS_PER_STEP", QUESTIONS_PER_STEP >= llms.WORLD, f"at least {llms.WORLD}, one for each rank"),
        ("GROUP_SIZE", GROUP_SIZE > 1 or ALGORITHM not in ("grpo", "dpo"), f"at least 2: {ALGORITHM} compares outputs"),
        ("JUDGE", not JUDGE or GROUP_SIZE > 1, "empty with --group_size 1: it compares outputs"),
        ("SUPERVISION", outcome or grpo, f"outcome for {ALGORITHM}"),
        ("REWARD_MODEL", not REWARD_MODEL or grpo or ALGORITHM == "ppo", f"empty for {ALGORITHM}: it uses no rewards"),
        ("RATIO", RATIO == "token" or (outcome and ALGORITHM not in ("ppo", "distill")), "token if Â differs by token"),
        ("MU", MU == 1 or ALGORITHM not in ("sft", "dpo"), f"1 for {ALGORITHM}: it makes one update a step"),
        ("DENOMINATOR", DENOMINATOR == "sequence" or not dpo, "sequence for dpo: it compares means per output"),
        ("TENSORBOARD", not TENSORBOARD or importlib.util.find_spec("tensorboard"), "off, or pip install tensorboard"),
        *variant_rules(now, weights),
    ]
    for name, holds, demand in rules:
        if not holds:
            raise SettingsError(f"--{name.lower()} must be {demand}, not {now[name]!r}")


def variant_rules(now, weights):
    """Which settings of what came after the paper contradict others: [(name, does it hold?, what is demanded)]."""
    grpo, distill, ratio = ALGORITHM == "grpo", ALGORITHM == "distill", ALGORITHM in ("grpo", "ppo", "distill")
    outcome, summed = SUPERVISION == "outcome", NORMALIZE == "sum"
    of_grpo = ("SCALE", "PASS_K", "NORMALIZE", "POSITIVE", "NEGATIVE", "REFILL", "STALENESS")
    of_ratios = ("CLIP", "DELTA", "IS_RATIO")
    below_0 = WEIGHT_OVERLONG or REWARD_MODEL or any(now[name] < 0 for name in weights)
    return [
        *((name, now[name] == CONSTANTS[name][1] or grpo, f"as it is for {ALGORITHM}") for name in of_grpo),
        *((name, now[name] == CONSTANTS[name][1] or ratio, f"as it is for {ALGORITHM}") for name in of_ratios),
        ("PASS_K", PASS_K == 1 or PASS_K < GROUP_SIZE, f"below --group_size {GROUP_SIZE}"),
        ("PASS_K", PASS_K == 1 or (outcome and SCALE != "mean"), "1 with --supervision or --scale mean"),
        ("SCALE", outcome or SCALE in ("group", "none"), f"group or none with --supervision {SUPERVISION}"),
        ("SCALE", SCALE != "mean" or not below_0, "another than mean: a reward can be negative"),
        ("NORMALIZE", summed or outcome, f"sum with --supervision {SUPERVISION}"),
        ("NORMALIZE", summed or SCALE == "group", f"sum with --scale {SCALE}"),
        ("NORMALIZE", summed or PASS_K == POSITIVE == NEGATIVE == 1, "sum with --pass_k, --positive or --negative"),
        ("POSITIVE", POSITIVE == 1 or outcome, f"1 with --supervision {SUPERVISION}"),
        ("NEGATIVE", NEGATIVE == 1 or outcome, f"1 with --supervision {SUPERVISION}"),
        ("DELTA", DELTA == 0 or DELTA > 1 + EPSILON_HIGH, f"0, or above 1 + epsilon_high = {1 + EPSILON_HIGH}"),
        ("DELTA", DELTA == 0 or CLIP == "objective", "0 with --clip weight"),
        ("IS_LOW", IS_LOW < IS_HIGH, f"below --is_high {IS_HIGH}"),
        ("IS_RATIO", IS_RATIO != "none" or not STALENESS, "token or sequence with --staleness"),
        ("REFILL", REFILL == 0 or outcome, f"0 with --supervision {SUPERVISION}"),
        ("TEACHER", bool(TEACHER) == distill, "a model" if distill else f"empty for {ALGORITHM}"),
    ]


def check_data(training=True):
    """Check the data; return the test questions: the first of each task, EVAL_QUESTIONS in all."""
    stages = rldatasets.stages(DATASET)
    tasks, samples = [name.strip() for name in EVAL_DATASET.split(",")], []
    if not EVAL_DATASET:
        tasks = list(dict.fromkeys(name for name, _ in stages))
    elif Path(EVAL_DATASET).exists():  # a path can have commas in it
        tasks = [EVAL_DATASET]
    for name, _ in stages if training else stages[:1] if SHOTS else ():
        if Path(name).is_file() and Path(name).resolve() in [Path(task).resolve() for task in tasks]:
            raise SettingsError(f"{name} is a single file: give --eval_dataset too, with other rows than it has")
        problems = list(itertools.islice(rldatasets.shuffled(name, "train", SEED), 50))
        samples += problems
        solutions = [problem.get("solution", "") for problem in problems]
        if training and (ALGORITHM == "sft" or (COLD_START and name == stages[0][0])) and not all(solutions):
            setting = "--algorithm sft" if ALGORITHM == "sft" else "--cold_start"
            raise SettingsError(f"{setting} imitates worked solutions, and {name} has none")
        if training and SUPERVISION != "outcome" and not any(map(evaluator.step_rewards, solutions, problems)):
            raise SettingsError(f"--supervision {SUPERVISION} rewards calculations: the solutions of {name} have none")
    examples = rldatasets.examples(stages[0][0], SHOTS)
    if len([example for example in examples if example.get("solution")]) < SHOTS:
        raise SettingsError(f"--shots {SHOTS}: {stages[0][0]} does not begin with {SHOTS} worked solutions")
    tested, each = [], max(1, EVAL_QUESTIONS // len(tasks)) if EVAL_QUESTIONS else None
    for task in tasks:
        tested += [problem | {"task": task} for problem in itertools.islice(rldatasets.load(task, "test"), each)]
    if len(tested) < llms.WORLD:
        raise SettingsError(f"no test questions in {EVAL_DATASET or DATASET} for each of {llms.WORLD} ranks")
    if any(problem["kind"] == "program" for problem in samples + tested) and (reason := evaluator.sandbox_problem()):
        raise SettingsError(f"programs are run in a sandbox only: {reason}")
    return tested


def model_folder(name):
    """The model to load; tiny is built when it is first asked for."""
    if name != "tiny":
        return name
    plays = rldatasets.stages(DATASET)[0][0].partition(":")[0] == "nim"  # of a curriculum, its first stage
    corpora = [rldatasets.nim_corpus()] if plays else rldatasets.tiny_corpus()
    return llms.tiny_folder(report.runs_folder(), corpora)


def new_state(policy, tokenizer, run=None):
    """A policy at the beginning of its training, with the critic, optimizer and reward model of the settings."""
    if LORA_RANK:
        llms.add_lora(policy, LORA_RANK, LORA_ALPHA, SEED)
    if GRADIENT_CHECKPOINTING:
        llms.enable_gradient_checkpointing(policy)
    state = State(policy, tokenizer, run)
    state.critic = llms.Critic(policy) if ALGORITHM == "ppo" else None
    networks = [llms.shard(network) for network in state.networks().values()]
    trained = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
    options = {"weight_decay": WEIGHT_DECAY, "fused": torch.cuda.is_available() or None}
    state.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, (ADAM_BETA1, ADAM_BETA2), **options)
    state.generator = torch.Generator().manual_seed(SEED)
    context, empty = getattr(policy.config, "max_position_embeddings", math.inf), {"question": ""}
    shots = len(prompt_ids(tokenizer, empty)) - len(llms.encode(tokenizer, rldatasets.prompt(empty))) if SHOTS else 0
    state.prompt_limit = min(MAX_PROMPT_TOKENS + shots, context - MAX_NEW_TOKENS)
    state.reward_model = llms.reward_model(REWARD_MODEL) if REWARD_MODEL else None
    state.judge = llms.load_judge(model_folder(JUDGE)) if JUDGE else None
    if TEACHER:
        teacher, its_tokenizer = llms.load(model_folder(TEACHER))
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise SettingsError(f"--teacher {TEACHER} has other tokens than {MODEL}, and cannot score its outputs")
        state.teacher = llms.frozen_copy(teacher.requires_grad_(False))
    return state


def check_prompts(state, tests, training=()):
    """Refuse a test question that leaves no room for an output, and a training set that has only too long ones."""
    length = lambda problem: len(prompt_ids(state.tokenizer, problem))
    context, limit = getattr(state.policy.config, "max_position_embeddings", math.inf), state.prompt_limit
    longest = max(map(length, tests))
    if longest + MAX_NEW_TOKENS > context:
        advice = "lower --max_new_tokens" if longest < context else "name other questions with --eval_dataset"
        advice = "lower --shots" if SHOTS else advice
        raise SettingsError(f"a test question of {longest} tokens, the model reads {context} with the output: {advice}")
    for name, _ in training:
        some = itertools.islice(rldatasets.shuffled(name, "train", SEED), 1000)
        if all(length(problem) > limit for problem in some):
            advice = "lower --max_new_tokens" if limit + MAX_NEW_TOKENS == context else "raise --max_prompt_tokens"
            raise SettingsError(f"every prompt of {name} is longer than {limit} tokens: {advice}")


def ask_to_stop(state, number):
    """The first signal asks for an end after the step; a second Ctrl-C ends without finishing it."""
    if state.stop_signal == signal.SIGINT:  # after a first Ctrl-C; torchrun passes a second on as SIGTERM
        raise KeyboardInterrupt
    state.stop_signal = number
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say("finishing the step; Ctrl-C again loses it")


def check_and_save(state, metrics, problems, evaluates_at, notes, bar):
    """Print what is not healthy; evaluate, draw and save when it is time; returns the signal to stop for, or 0."""
    bar.update()
    llms.check_written()
    for note in set(report.health_notes(metrics, settings(), torch.cuda.is_available())) - notes:
        say(f"note: {note}.")
        notes.add(note)
    state.failures = state.failures + 1 if metrics["skipped_updates"] else 0
    if state.failures == 3:
        raise RunError("three steps in a row were not finite; the last checkpoint was saved before them")
    if evaluates_at(state.step):
        record_evaluation(state, problems)
    stopped = max(llms.gather([state.stop_signal or (signal.SIGTERM if llms.orphaned() else 0)]))
    if stopped or state.step == last_step() or (state.step % SAVE_EVERY == 0 and not state.failures):
        redraw([state.run], state.run)
        save_checkpoint(state)
    return stopped


def record_evaluation(state, problems):
    """Evaluate; write the metrics and all completions."""
    metrics, records = evaluate(state, problems)
    log(state.run, {"step": state.step, **metrics}, "test", records, TENSORBOARD)
    say(f"step {state.step:4d} | TEST {report.eval_line(metrics)}")


def run_training(actions):
    """A new run, or a resumed one, to its end; what can be refused is refused before anything is written."""
    run = Path(actions.resume) if actions.resume else report.new_folder(RUN, MODEL, DATASET, actions.test)
    problems, last = check_data(), last_step()
    policy, tokenizer = llms.load(model_folder(MODEL))  # 1: π_θ ← π_θinit
    state = new_state(policy, tokenizer, run)
    check_prompts(state, problems, rldatasets.stages(DATASET))
    if actions.resume and (run / "checkpoint" / "state.safetensors").exists():
        load_checkpoint(state)
    if state.step > last:
        raise SettingsError(f"{run} is at step {state.step} already, beyond its last, {last}: raise --steps")
    evaluates_at = lambda step: step == last or (not actions.test and (step == COLD_START or step % EVAL_EVERY == 0))
    with report.only_writer(run) if llms.RANK == 0 else nullcontext():
        about = {"device": llms.device_name(), "ranks": llms.WORLD, "prompt_limit": state.prompt_limit}
        begin(run, settings() | about, state.step)
        total, trained = policy.num_parameters() / 1e6, policy.num_parameters(only_trainable=True) / 1e6
        size = f"{total:.1f} M parameters, {trained:.1f} M of them trained"
        say(f"{ALGORITHM} on {DATASET}; {MODEL}: {size}; {llms.WORLD} × {policy.device}; all goes to {run}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: ask_to_stop(state, number))
        if state.step == 0:
            if evaluates_at(0):
                record_evaluation(state, problems)
            save_checkpoint(state)
            llms.check_written(wait=True)  # a disk that is full is noticed before the training
        notes = set()
        bar = tqdm(total=last, initial=state.step, desc=run.name, unit="step", disable=llms.RANK > 0 or None)
        with bar, llms.writing():
            stopped = train(state, lambda state, row: check_and_save(state, row, problems, evaluates_at, notes, bar))
        if stopped:
            say(report.stopped_line(run, state.step, llms.WORLD, llms.LOCAL_WORLD))
            return 128 + stopped
        llms.save(policy, tokenizer, run / "model")
        say(summary(run))
        return 0


def run_evaluation(actions):
    """Test one model, or two on the same questions with their paired difference."""
    problems, outputs = check_data(training=False), []
    names = [name for name in (actions.evaluate, actions.against) if name]
    states = [State(*llms.load(model_folder(name))) for name in names]
    judge = llms.load_judge(model_folder(JUDGE)) if JUDGE and actions.against else None
    for state in states:  # both, before either is tested
        check_prompts(state, problems)
        llms.shard(state.policy)
    for name, state in zip(names, states):
        same_tokens = state.tokenizer.get_vocab() == states[-1].tokenizer.get_vocab()
        state.reference = states[-1].policy if actions.against and same_tokens else None
        metrics, records = evaluate(state, problems)
        outputs.append(records)
        say(f"{name}: {report.eval_line(metrics)}")
    if actions.against:
        say(report.paired_difference(names, [[record["correctness"] for record in records] for records in outputs]))
    if judge:
        texts = [(a["question"], [a["completion"], b["completion"]]) for a, b in llms.share(list(zip(*outputs)))]
        say(report.verdicts(names, llms.gather([judge_group(judge, question, pair) for question, pair in texts])))
    return 0


def main(argv=None):
    try:
        actions, flags = parse(sys.argv[1:] if argv is None else argv)
        with llms.distributed():
            choose_settings(actions, flags)
            return run_evaluation(actions) if actions.evaluate else run_training(actions)
    except MISTAKES as error:
        status, reason = 2, str(error) or repr(error)
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        lost = llms.lost_another_rank(error)
        if not lost and not isinstance(error, (RunError, torch.OutOfMemoryError)):
            raise
        status, reason = 1, "lost the other ranks, see their output; --resume goes on: " * lost + str(error).strip()
    if llms.RANK:  # rank 0's error appears first, and torchrun ends the others
        time.sleep(3)
    rank = f" on rank {llms.RANK}" if llms.WORLD > 1 else ""
    print(f"main.py: error{rank}: {reason.splitlines()[0]}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where it is ASCII only, π is printed as ?
    sys.exit(main())
