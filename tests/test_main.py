"""The maths and the loop of main.py."""

import ast
import copy
import importlib.util
import itertools
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROBLEMS, sample, save, tensors, train
from torch import tensor
from torch.testing import assert_close
from tqdm import tqdm

import evaluator
import llms
import main
import rldatasets
from plots import report

SOURCE = Path(main.__file__).read_text(encoding="utf-8")
A2 = 0.8660254037844386  # the advantages of rewards 1, 0, 0, 1 are ± this, without the 1e-4


def ragged(rows, fill=0.0):
    """Rows of different lengths as a padded float64 matrix, and its mask."""
    T = max(map(len, rows))
    mask = tensor([[i < len(row) for i in range(T)] for row in rows])
    return tensor([list(row) + [fill] * (T - len(row)) for row in rows], dtype=torch.float64), mask


def loss_and_gradient(logp, *others):
    logp = logp.clone().requires_grad_()
    loss = main.grpo_loss(logp, *others)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


# ---- the advantages ------------------------------------------------------------------------------------------------


def test_one_right_answer_in_four_is_pushed_three_times_harder():
    advantages = main.group_advantages(tensor([[1.0, 0, 0, 0], [0, 0, 1, 3]], dtype=torch.float64))
    assert_close(advantages[0], tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64), atol=1e-3, rtol=0)
    assert_close(advantages[0, :2].tolist(), [1.4997000599880024, -0.4999000199960008], atol=1e-12, rtol=0)
    expected = [-0.7070567847218314, -0.7070567847218314, 0.0, 1.4141135694436628]
    assert_close(advantages[1].tolist(), expected, atol=1e-12, rtol=0)


def test_a_group_of_equal_rewards_has_advantage_exactly_zero():
    for G in range(2, 65):
        rewards = tensor([0.0, 1.0, -3.3, 2.95] + [0.05 * k for k in range(1, 61)])[:, None].expand(-1, G)
        assert (main.group_advantages(rewards) == 0).all()


def test_advantages_ignore_a_shift_and_the_order_and_stay_below_their_bound():
    rewards = torch.randn(7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = main.group_advantages(rewards)
    assert_close(main.group_advantages(rewards + 5), advantages, atol=1e-12, rtol=0)
    assert_close(main.group_advantages(rewards.flip(1)), advantages.flip(1), atol=1e-12, rtol=0)
    assert advantages.sum(1).abs().max() < 1e-12
    sigma = rewards.std(1, keepdim=True)
    assert_close(main.group_advantages(10 * rewards), advantages * (sigma + 1e-4) / (sigma + 1e-5))
    for G in (2, 4, 8, 16, 64):
        one_hot = torch.eye(G, dtype=torch.float64)[:1] * 1e6  # so large that the 1e-4 does not count
        assert_close(main.group_advantages(one_hot).max().item(), (G - 1) / math.sqrt(G), atol=1e-8, rtol=0)


def test_groups_do_not_see_each_other():
    both = main.group_advantages(tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]]))
    expected = tensor([[1.5, -0.5, -0.5, -0.5], [0.5, 0.5, 0.5, -1.5]], dtype=torch.float64)
    assert_close(both, expected, atol=1e-3, rtol=0)
    assert torch.equal(both[0], main.group_advantages(tensor([[1.0, 0, 0, 0], [9, 2, 3, 1]]))[0])


def test_without_the_std_advantages_are_dr_grpo_and_a_step_from_rloo():
    rewards = tensor([[1.0, 0, 0, 0]])
    assert main.dr_grpo(rewards).tolist() == [[0.75, -0.25, -0.25, -0.25]]
    others = tensor([[1, -1 / 3, -1 / 3, -1 / 3]], dtype=torch.float64)  # each against the mean of the others
    assert_close(main.rloo(rewards), others, atol=1e-12, rtol=0)
    assert_close(main.dr_grpo(rewards) * 4 / 3, others, atol=1e-12, rtol=0)


# process supervision: o_1 has 5 tokens and steps that end at 2, 5; o_2 has 4 and steps that end at 1, 3, 4
STEP_REWARDS = tensor([[[0, 1, 0, 0, 0.0], [0, 0, 1, 1, 0]]], dtype=torch.float64)
STEP_ENDS = tensor([[[0, 1, 0, 0, 1], [1, 0, 1, 1, 0]]]).bool()


def test_a_token_gets_the_normalised_rewards_of_the_steps_that_end_with_it_or_later():
    advantages = main.process_advantages(STEP_REWARDS, STEP_ENDS)
    # rewards 1, 0 and 0, 1, 1 together have mean 0.6 and std √0.3; the 1e-4 shrinks them all by this
    shrunk = 0.3**0.5 / (0.3**0.5 + 1e-4)
    first = [-0.3651483717] * 2 + [-1.095445115] * 3
    second = [0.3651483717, 1.460593487, 1.460593487, 0.7302967433, 0.0]
    assert_close(advantages[0] / shrunk, tensor([first, second], dtype=torch.float64), atol=1e-9, rtol=0)


def test_advantages_by_tokens_are_read_on_the_mask_only(constants):
    constants(BETA=0.0)
    logp, mask = ragged([[-1.0, -2.0, -0.5], [-1.5, -0.7]])
    advantages = main.process_advantages(STEP_REWARDS[:, :, :3], STEP_ENDS[:, :, :3])[0]  # [2, 3]
    clean = loss_and_gradient(logp, logp, None, advantages, mask)
    for garbage in (float("nan"), 1e30, -1e30):
        dirty = torch.where(mask, advantages, garbage)
        assert all(map(torch.equal, loss_and_gradient(logp, logp, None, dirty, mask), clean))
    # on-policy, the gradient of a token is -Â_{i,t} / (N |o_i|)
    assert_close(clean[1][0], -advantages[0] / 6)


def test_one_step_that_ends_with_the_output_is_outcome_supervision():
    rewards, lengths = tensor([[1.0, 0, 0, 0]]), (3, 1, 4, 2)
    step_rewards, step_ends = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).bool()
    for i, length in enumerate(lengths):
        step_rewards[0, i, length - 1], step_ends[0, i, length - 1] = rewards[0, i], True
    advantages = main.process_advantages(step_rewards, step_ends)
    for i, length in enumerate(lengths):
        assert torch.equal(advantages[0, i, :length], main.group_advantages(rewards)[0, i].expand(length))
        assert (advantages[0, i, length:] == 0).all()


def test_steps_are_compared_within_their_question_only():
    other = tensor([[[0, 9, 0, 0, 0.0], [0, 0, 7, 5, 0]]], dtype=torch.float64)
    both = main.process_advantages(torch.cat([STEP_REWARDS, other]), torch.cat([STEP_ENDS, STEP_ENDS]))
    assert torch.equal(both[:1], main.process_advantages(STEP_REWARDS, STEP_ENDS))
    assert (main.process_advantages(torch.full_like(other, 2.95), STEP_ENDS) == 0).all()  # equal steps: exactly 0
    for few in (torch.zeros_like(STEP_ENDS), STEP_ENDS & (torch.arange(5) == 1)):  # no step, one step
        assert (main.process_advantages(STEP_REWARDS, few) == 0).all()


def test_advantages_are_computed_in_fp64():
    for rewards in (tensor([[1, 0, 0, 0]], dtype=torch.bfloat16), tensor([[1, 0, 0, 0]], dtype=torch.float32)):
        assert main.group_advantages(rewards).dtype == torch.float64
    steps = main.process_advantages(STEP_REWARDS.float(), STEP_ENDS)
    assert steps.dtype == torch.float64


# ---- the objective -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, A, J, gradient",
    [
        (1.5, 1, 1.2, 0), (1.5, -1, -1.5, -1.5), (0.5, 1, 0.5, 0.5), (0.5, -1, -0.8, 0),
        (1.1, 1, 1.1, 1.1), (1.1, -1, -1.1, -1.1), (3.5, -1, -3.5, -3.5),
    ],
)  # fmt: skip
def test_the_clip_stops_the_gradient_only_where_the_step_would_go_further(constants, ratio, A, J, gradient):
    constants(BETA=0.0)
    logp = tensor([[math.log(ratio)]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bool)
    loss, grad = loss_and_gradient(logp, torch.zeros_like(logp), None, tensor([float(A)], dtype=torch.float64), one)
    assert_close([-loss.item(), -grad.item()], [J, float(gradient)], atol=1e-12, rtol=0)


@pytest.mark.parametrize("objective", ["grpo", "gspo", "dual_clip"])
def test_a_ratio_beyond_what_fp32_can_hold_has_a_value_and_a_gradient(constants, objective):
    constants(BETA=0.0, OBJECTIVE=objective)
    one, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)
    loss, gradient = loss_and_gradient(tensor([[100.0]]), zero, None, tensor([1.0]), one)  # fp32 has no e^100
    assert -loss.item() == pytest.approx(1.2) and gradient.item() == 0
    loss, gradient = loss_and_gradient(tensor([[100.0]]), zero, None, tensor([-1.0]), one)
    assert loss > 1 and loss.isfinite() and gradient.isfinite()


def test_clip_higher_frees_only_the_upper_side(constants):
    for high, expected in ((0.2, 0.0), (0.28, 1.25)):
        constants(BETA=0.0, EPSILON_HIGH=high)
        logp = tensor([[math.log(1.25)], [math.log(0.79)]], dtype=torch.float64)
        mask, A = torch.ones(2, 1), tensor([1.0, -1.0], dtype=torch.float64)
        _, grad = loss_and_gradient(logp, torch.zeros_like(logp), None, A, mask)
        assert_close((-2 * grad).flatten().tolist(), [expected, 0.0], atol=1e-12, rtol=0)


DENOMINATORS = ("sequence", "token", "group", "constant")
ON_POLICY = [
    ("sequence", 0.0, -0.07216878365),
    ("token", 0.1443375673, -0.07216878365),
    ("constant", 0.05412658774, -0.02706329387),
]


@pytest.mark.parametrize("denominator, value, first", ON_POLICY)
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_where_all_policies_agree_the_gradient_is_reinforce_and_the_kl_adds_nothing(
    constants, denominator, value, first, beta
):
    constants(DENOMINATOR=denominator, MAX_NEW_TOKENS=8, BETA=beta)
    logp, mask = ragged([[-1.0] * n for n in (3, 1, 6, 2)])
    A = tensor([A2, -A2, -A2, A2], dtype=torch.float64)
    loss, grad = loss_and_gradient(logp, logp, logp, A, mask)
    assert_close(loss.item(), value, atol=1e-9, rtol=0)
    assert_close(grad[0].tolist(), [first] * 3 + [0.0] * 3, atol=1e-9, rtol=0)


def test_the_gradient_at_the_old_policy_is_equation_21():
    logp, mask = ragged([[-1.0, -2.0, -0.5]])
    logp_ref = logp + tensor([[math.log(2), -math.log(2), 0.0]])
    A = tensor([A2], dtype=torch.float64)
    _, grad = loss_and_gradient(logp, logp, logp_ref, A, mask)
    assert_close((-3 * grad[0]).tolist(), [0.9060254038, 0.8460254038, 0.8660254038], atol=1e-9, rtol=0)


def kl_of(logp, logp_ref):
    """The KL of one token, as it stands in the loss of an output without advantage."""
    one = torch.ones(1, 1)
    return main.grpo_loss(logp.view(1, 1), logp.detach().view(1, 1), logp_ref.view(1, 1), torch.zeros(1), one)


def test_the_three_estimators_have_the_values_and_gradients_of_their_names(constants):
    z, z_ref, z_old = (tensor(v, dtype=torch.float64) for v in ([0.2, -0.5, 1.1], [0.9, 0.1, -0.3], [-0.4, 0.6, 0.0]))

    def expected(estimator, samples_of):
        """The mean of the KL over samples of a policy, and of its gradient with respect to z."""
        constants(KL=estimator, BETA=1.0)
        z_theta = z.clone().requires_grad_()
        logp, logp_ref = torch.log_softmax(z_theta, 0), torch.log_softmax(z_ref, 0)
        kl = sum(p * kl_of(logp[a], logp_ref[a]) for a, p in enumerate(torch.softmax(samples_of, 0)))
        kl.backward()  # the samples' distribution is not differentiated
        return kl.item(), z_theta.grad.tolist()

    value, gradient = expected("k3", z)
    assert_close(value, 0.5027774185, atol=1e-9, rtol=0)
    assert_close(gradient, [-0.3184892418, -0.1311615248, 0.4496507666], atol=1e-9, rtol=0)
    assert_close(expected("k2", z)[1], [-0.3331852833, -0.1529028005, 0.4860880838], atol=1e-9, rtol=0)
    assert_close(expected("k1", z)[0], 0.5027774185, atol=1e-9, rtol=0)  # the same KL, as the mean of another estimator
    assert_close(expected("k1", z)[1], [0.0, 0.0, 0.0], atol=1e-9, rtol=0)
    assert_close(expected("k3", z_old)[0], 0.4180314514, atol=1e-9, rtol=0)


def test_the_kl_is_exact_near_zero_and_never_negative(constants):
    constants(BETA=1.0)
    assert kl_of(tensor(0.0), tensor(1e-4)).item() == pytest.approx(5.0002e-9, rel=1e-3)
    narrow = torch.linspace(-0.01, 0.01, 20001)
    wide = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 40 - 20
    for d in (narrow, wide):
        zeros = torch.zeros(len(d), 1)
        logp = zeros.clone().requires_grad_()
        loss = main.grpo_loss(logp, zeros, d[:, None], zeros[:, 0], torch.ones_like(zeros))
        assert loss >= 0
        # the gradient of k3 is 1 - exp(d): it points towards the reference
        (gradient,) = torch.autograd.grad(loss * len(d), logp)
        assert (gradient[:, 0] * d <= 0).all()
    assert min(kl_of(tensor(0.0), d).item() for d in narrow[::10]) >= 0


WORKED = (
    ragged([[-1, -2, -0.5], [-1.5, -0.7]]),
    ragged([[-1.3, -2, -0.4], [-1.5, -1.1]])[0],
    ragged([[-1.2, -1.5, -0.5], [-1.4, -0.9]])[0],
    tensor([1.0, -1.0], dtype=torch.float64),
)
WORKED_LOSS = [("sequence", 0.1088716802461337), ("token", -0.11877547018030299), ("constant", -0.07423466886268937)]


@pytest.mark.parametrize("denominator, value", WORKED_LOSS)
def test_a_worked_example_of_equation_3(constants, denominator, value):
    constants(DENOMINATOR=denominator, MAX_NEW_TOKENS=4, BETA=0.1)
    (logp, mask), old, ref, A = WORKED
    loss, grad = loss_and_gradient(logp, old, ref, A, mask)
    assert_close(loss.item(), value, atol=1e-12, rtol=0)
    if denominator == "sequence":
        expected = [[0.003021154115, -0.177478687845, -0.150806236339], [0.247370727048, 0.377487905583, 0]]
        assert_close(grad, tensor(expected, dtype=torch.float64), atol=1e-11, rtol=0)


def test_the_sequence_ratio_is_the_geometric_mean_of_the_token_ratios(constants):
    constants(OBJECTIVE="gspo", BETA=0.0)
    logp, mask = ragged([[math.log(r) for r in (1.1, 0.9, 1.5)]])
    A = tensor([1.0], dtype=torch.float64)
    loss, grad = loss_and_gradient(logp, torch.zeros_like(logp), None, A, mask)
    s = 1.485 ** (1 / 3)  # 1.1 · 0.9 · 1.5 = 1.485; inside the clip, so dJ/dlogp is s/3 for each of the 3 tokens
    assert_close([-loss.item(), *(-grad[0]).tolist()], [s, s / 3, s / 3, s / 3], atol=1e-12, rtol=0)


def test_by_groups_a_token_counts_as_one_of_its_question_and_questions_count_alike(constants):
    # two questions, two outputs each: 1 + 3 = 4 and 2 + 2 = 4 tokens; then Σ|o| of a group is 4, and Q is 2
    constants(DENOMINATOR="group", GROUP_SIZE=2, BETA=0.0)
    assert main.denominators(tensor([1, 3, 2, 2]), 2).tolist() == [[8], [8], [8], [8]]
    assert main.denominators(tensor([1, 3, 2, 5]), 2).tolist() == [[8], [8], [14], [14]]
    logp, mask = ragged([[-1.0] * n for n in (1, 3, 2, 2)])
    A = tensor([1.0, -1.0, 2.0, -1.0], dtype=torch.float64)
    loss, grad = loss_and_gradient(logp, logp, None, A, mask)
    # ½ ((1 - 3)/4 + (4 - 2)/4) = 0, and 1/8, -1/8, 2/8, -1/8 for each token
    assert_close([-loss.item(), *(-grad[:, 0]).tolist()], [0.0, 0.125, -0.125, 0.25, -0.125], atol=1e-12, rtol=0)
    # with 5 tokens the last output takes its question to 7: ½ ((1 - 3)/4 + (4 - 5)/7) = -9/28
    logp, mask = ragged([[-1.0] * n for n in (1, 3, 2, 5)])
    loss, grad = loss_and_gradient(logp, logp, None, A, mask)
    expected = [-9 / 28, 1 / 8, -1 / 8, 1 / 7, -1 / 14]
    assert_close([-loss.item(), *(-grad[:, 0]).tolist()], expected, atol=1e-12, rtol=0)
    # micro-batches that cut through a question change nothing
    divisor = main.denominators(mask.sum(1), 2)
    parts = [loss_and_gradient(logp[r], logp[r], None, A[r], mask[r], divisor[r]) for r in ([0, 2], [3], [1])]
    assert_close(sum(loss for loss, _ in parts), loss, atol=1e-12, rtol=0)
    for rows, (_, part) in zip(([0, 2], [3], [1]), parts):
        assert_close(part, grad[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_two_ranks_divide_by_what_one_would_divide_by(constants, monkeypatch, denominator):
    constants(DENOMINATOR=denominator)
    lengths = tensor([1, 3, 2, 5, 4, 4])  # three questions: one on the first rank, two on the second
    alone = main.denominators(lengths, 2)
    monkeypatch.setattr(llms, "sums_over_ranks", lambda outputs, tokens: [6, 19])
    assert torch.equal(torch.cat([main.denominators(lengths[:2], 2), main.denominators(lengths[2:], 2)]), alone)


def noisy(seed=0, lengths=(6, 4, 1, 7, 2, 5)):
    """Rows with ratios on both sides of the clip, and some KL."""
    random.seed(seed)
    rows = [[random.uniform(-3, -0.1) for _ in range(n)] for n in lengths]
    logp, mask = ragged(rows)
    noise = torch.Generator().manual_seed(seed)
    old = logp + 0.4 * torch.randn(logp.shape, generator=noise, dtype=torch.float64)
    ref = logp + 0.4 * torch.randn(logp.shape, generator=noise, dtype=torch.float64)
    A = torch.randn(len(rows), generator=noise, dtype=torch.float64)
    return logp, old, ref, A, mask


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize(
    "split", [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4, 5]], [[i] for i in range(6)], [[0, 3], [1, 2, 4, 5]]]
)
def test_any_split_into_micro_batches_adds_up_to_the_whole(constants, denominator, split):
    constants(DENOMINATOR=denominator, GROUP_SIZE=2)
    logp, old, ref, A, mask = noisy()
    whole, gradient = loss_and_gradient(logp, old, ref, A, mask)
    divisor = main.denominators(mask.sum(1), 2)
    parts = [loss_and_gradient(logp[r], old[r], ref[r], A[r], mask[r], divisor[r]) for r in split]
    assert_close(sum(loss for loss, _ in parts), whole, atol=1e-12, rtol=0)
    for rows, (_, part) in zip(split, parts):
        assert_close(part, gradient[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("garbage", [float("nan"), 1e30, -1e30, float("inf")])
def test_what_stands_in_padded_cells_does_not_matter(constants, denominator, garbage):
    constants(DENOMINATOR=denominator, GROUP_SIZE=2)
    logp, old, ref, A, mask = noisy()
    A = A[:, None].expand(-1, mask.shape[1])
    expected = loss_and_gradient(logp, old, ref, A, mask)
    spoilt = [torch.where(mask, x, garbage) for x in (logp, old, ref, A)]
    loss, gradient = loss_and_gradient(*spoilt, mask)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_the_order_of_the_rows_does_not_matter(constants, denominator):
    constants(DENOMINATOR=denominator, GROUP_SIZE=2)
    everything = noisy()
    order = [3, 1, 5, 0, 2, 4] if denominator != "group" else [3, 2, 5, 4, 0, 1]  # outputs of a question side by side
    loss, gradient = loss_and_gradient(*everything)
    turned, turned_gradient = loss_and_gradient(*(x[order] for x in everything))
    assert_close(turned, loss, atol=1e-12, rtol=0)
    assert_close(turned_gradient, gradient[order], atol=1e-12, rtol=0)


def test_the_loss_is_linear_in_the_advantages_and_affine_in_beta(constants):
    logp, old, ref, A, mask = noisy()
    constants(BETA=0.0)
    loss = main.grpo_loss(logp, old, ref, A, mask)
    assert_close(main.grpo_loss(logp, old, ref, 3 * A, mask), 3 * loss)
    ratio = (logp - old).exp()
    clipped_off = (ratio - ratio.clamp(0.8, 1.2)).abs() * A.abs()[:, None] * mask / mask.sum(1, keepdim=True) / 6
    both = loss + main.grpo_loss(logp, old, ref, -A, mask)  # 0 if and only if nothing is clipped
    assert_close(both, clipped_off.sum())
    assert both > 0.01
    losses = []
    for beta in (0.0, 1.0, 2.0):
        constants(BETA=beta)
        losses.append(main.grpo_loss(logp, old, ref, A, mask))
    assert_close(losses[2] - losses[1], losses[1] - losses[0])
    assert losses[1] > losses[0]  # the KL is a cost


def test_a_row_without_tokens_counts_as_a_sequence_and_not_in_tokens(constants):
    logp, old, ref, A, mask = noisy()
    emptied = mask.clone()
    emptied[2] = False
    rest = [0, 1, 3, 4, 5]
    for denominator, factor in (("sequence", 5 / 6), ("token", 1.0)):
        constants(DENOMINATOR=denominator)
        loss, gradient = loss_and_gradient(logp, old, ref, A, emptied)
        assert (gradient[2] == 0).all()
        assert_close(loss, factor * main.grpo_loss(*(x[rest] for x in (logp, old, ref, A, mask))))
        loss, gradient = loss_and_gradient(logp, old, ref, A, torch.zeros_like(mask))
        assert loss == 0 and (gradient == 0).all()


def test_autograd_equals_central_differences_through_a_transformer(constants):
    constants(EPSILON_HIGH=0.28)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    trunk = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    table, ids = torch.randn(11, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 11, (6, 8))
    _, old, ref, A, mask = noisy()
    causal = torch.nn.Transformer.generate_square_subsequent_mask(8, dtype=torch.float64)

    def loss():
        hidden = trunk(table[ids], mask=causal, is_causal=True)[:, :-1]
        logp = torch.log_softmax(hidden @ table.T, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return main.grpo_loss(logp, logp.detach() + 0.3 * (old - old.mean()), logp.detach() + ref - old, A, mask), logp

    parameters = [table, *trunk.parameters()]
    value, logp = loss()
    gradients = torch.autograd.grad(value, parameters)
    frozen = logp.detach()

    def loss_with_old_fixed():
        hidden = trunk(table[ids], mask=causal, is_causal=True)[:, :-1]
        logp = torch.log_softmax(hidden @ table.T, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return main.grpo_loss(logp, frozen + 0.3 * (old - old.mean()), frozen + ref - old, A, mask).item()

    generator, h = random.Random(0), 1e-5
    with torch.no_grad():
        for _ in range(60):
            which = generator.randrange(len(parameters))
            flat, at = parameters[which].view(-1), generator.randrange(parameters[which].numel())
            was = flat[at].item()
            flat[at] = was + h
            above = loss_with_old_fixed()
            flat[at] = was - h
            below = loss_with_old_fixed()
            flat[at] = was
            assert abs((above - below) / (2 * h) - gradients[which].view(-1)[at].item()) < 1e-8


# ---- a step of the loop, on a real model ---------------------------------------------------------------------------


def sgd(policy):
    return torch.optim.SGD(policy.parameters(), lr=1.0)


def measured_update(*inputs):
    """What the metrics of a step tell of one update."""
    return main.update_metrics([main.update(*inputs)])


def step_gradient(state, rollout, advantages, logp_old=None, logp_ref=None):
    """The clipped gradient that one update hands to its optimizer."""
    seen = {}
    state.optimizer.step = lambda: seen.update(gradient=[p.grad.clone() for p in state.policy.parameters()])
    measured = measured_update(state, rollout, advantages, logp_old, logp_ref)
    return torch.cat([g.flatten() for g in seen["gradient"]]), measured


SPREAD = tensor([1.5, -0.5, -0.5, -0.5, 0.9, 0.9, -0.9, -0.9, 0.5, 0.5, 0.5, -1.5])


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_the_token_budget_changes_neither_the_gradient_nor_its_norm(setup, denominator):
    results = []
    for budget in (8192, 60, 20):
        state, rollout = setup(TOKEN_BUDGET=budget, DENOMINATOR=denominator, MAX_GRAD_NORM=0.01)
        old = rollout.logp + 0.3 * torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(1))
        ref = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
        results.append(step_gradient(state, rollout, SPREAD, old, ref))
    for gradient, measured in results:
        assert gradient.norm() == pytest.approx(0.01, rel=1e-3)  # clipped once, at the end
        assert measured["grad_norm"] > 0.02 and measured["grad_norm"] == pytest.approx(
            results[0][1]["grad_norm"], rel=1e-4
        )
        assert_close(gradient, results[0][0], atol=1e-6, rtol=0)
        for name in ("loss", "kl", "clip_low", "clip_high", "sampler_gap", "ratio_max"):
            assert measured[name] == pytest.approx(results[0][1][name], rel=1e-4, abs=1e-6)


def split(rollout, rows, budget):
    """The micro-batches of some rows, on one rank."""
    llms.limit_memory(budget, 1000)
    batches = list(llms.micro_batches(rollout, rows))
    assert all(weight == 1.0 for _, weight in batches)
    return [rows for rows, _ in batches]


def test_micro_batches_hold_every_row_once_and_keep_the_budget_with_their_padding():
    prompts, completions = [4, 60, 10, 30, 31, 1, 1, 1], [1, 30, 7, 10, 10, 2, 2, 30]
    ids, attention, mask = llms.batch([[7] * n for n in prompts], [[7] * n for n in completions], "cpu")
    rollout = llms.Rollout(ids, attention, mask, None, None, None, None, group_size=1)
    batches = split(rollout, range(8), 100)
    assert sorted(row for rows in batches for row in rows) == list(range(8))
    assert all(rollout.rows(rows)[0].numel() <= 100 for rows in batches)
    assert len(batches) == 4  # 90 | 41 40 | 1 + 30, 10 + 7 | the small ones
    assert sorted(row for rows in split(rollout, [6, 0], 100) for row in rows) == [0, 6]


def test_the_outputs_of_a_question_stay_together_longest_first():
    lengths = [1, 9, 5, 9, 1, 5]  # two questions with three outputs each
    ids, attention, mask = llms.batch([[7, 7]] * 3 + [[8, 8, 8]] * 3, [[7] * n for n in lengths], "cpu")
    rollout = llms.Rollout(ids, attention, mask, None, None, None, None, group_size=3)
    assert split(rollout, range(6), 1000) == [[3, 5, 4, 1, 2, 0]]


def test_outputs_without_advantage_are_left_out_where_that_keeps_the_gradient(setup, monkeypatch):
    advantages, scored = SPREAD.clone(), []
    advantages[4:8] = 0.0
    real = llms.token_logprobs
    monkeypatch.setattr(llms, "token_logprobs", lambda *given: scored.append(len(given[1])) or real(*given))
    for beta, rows in ((0.0, 8), (0.04, 12)):
        gradients = []
        for left_out in (False, True):
            state, rollout = setup(BETA=beta, DENOMINATOR="token", MAX_GRAD_NORM=1e9)
            elsewhere = rollout.logp + 0.3  # a reference, so that there is a KL to lose
            scored.clear()
            ref = elsewhere if beta or not left_out else None  # with a reference at β = 0 all rows are scored
            gradients.append(step_gradient(state, rollout, advantages, None, ref)[0])
        assert sum(scored) == rows
        assert (gradients[0] - gradients[1]).abs().max() < 1e-6


def test_leaving_out_every_output_is_a_step_on_a_gradient_of_zero(setup):  # AdamW's momentum moves on all the same
    weights = []
    for ref in (False, True):
        state, rollout = setup(BETA=0.0)
        main.update(state, rollout, SPREAD, None, None)
        main.update(state, rollout, torch.zeros(12), None, rollout.logp if ref else None)
        weights.append(torch.cat([p.detach().flatten() for p in state.policy.parameters()]))
    assert torch.equal(*weights)


def test_out_of_memory_halves_the_budget_and_does_the_update_again(setup, monkeypatch, capsys):
    state, rollout = setup(BETA=0.0, MAX_GRAD_NORM=1e9)
    expected, _ = step_gradient(state, rollout, SPREAD)
    real, seen = llms.token_logprobs, []

    def limited(model, ids, *others):
        seen.append(ids.numel())
        if len(seen) == 3 or ids.numel() > 100:  # wherever it is too much, and once when some of it is done
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, *others)

    state, rollout = setup(BETA=0.0, MAX_GRAD_NORM=1e9, TOKEN_BUDGET=200)
    monkeypatch.setattr(llms, "LEAST_LIMIT", 17, raising=False)
    monkeypatch.setattr(llms, "token_logprobs", limited)
    gradient, _ = step_gradient(state, rollout, SPREAD)
    assert_close(gradient, expected, atol=1e-6, rtol=0)  # what the broken attempts left behind is gone
    printed = capsys.readouterr().out
    assert "--token_budget 200; trying again with 100" in printed and "with 50" in printed
    assert llms.LIMITS["token_budget"] == 50 and main.TOKEN_BUDGET == 200  # a constant is never changed
    llms.LIMITS["token_budget"] = 17
    monkeypatch.setattr(llms, "token_logprobs", lambda *given: limited(None, torch.zeros(200)))
    with pytest.raises(torch.OutOfMemoryError):
        llms.log_probs(state.policy, rollout, main.TEMPERATURE)


def test_out_of_memory_while_sampling_halves_the_cache(setup, monkeypatch):
    state, _ = setup(CACHE_TOKENS=1000)
    monkeypatch.setattr(llms, "LEAST_LIMIT", 17, raising=False)
    real, seen = llms.decoding_batch, []

    def limited(*inputs):
        seen.append(llms.LIMITS["cache_tokens"])
        if seen[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*inputs)

    monkeypatch.setattr(llms, "decoding_batch", limited)
    assert len(sample(state).texts) == 12
    assert seen == [1000, 500, 250] and llms.LIMITS["cache_tokens"] == 250


def test_masking_truncated_outputs_takes_them_out_of_the_gradient(setup):
    state, rollout = setup(MASK_TRUNCATED=True, BETA=0.0, MAX_GRAD_NORM=1e9)
    assert rollout.truncated.any() and not rollout.truncated.all()
    gradient, _ = step_gradient(state, rollout, SPREAD)
    state, rollout = setup(MASK_TRUNCATED=False, BETA=0.0, MAX_GRAD_NORM=1e9)
    without = torch.where(rollout.truncated, 0.0, SPREAD)
    assert_close(step_gradient(state, rollout, without)[0], gradient, atol=1e-6, rtol=0)
    state, rollout = setup(MASK_TRUNCATED=True, BETA=0.0)
    everything = rollout._replace(truncated=torch.ones_like(rollout.truncated))
    gradient, measured = step_gradient(state, everything, SPREAD)
    assert not measured["skipped_updates"] and measured["loss"] == 0 and (gradient == 0).all()


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_tokens_of_masked_outputs_are_in_no_denominator_and_the_outputs_still_count(setup, denominator):
    settings = {"DENOMINATOR": denominator, "BETA": 0.0, "MAX_GRAD_NORM": 1e9}
    state, rollout = setup(MASK_TRUNCATED=True, **settings)
    rollout = rollout._replace(truncated=tensor([False] * 3 + [True] + [False] * 4 + [True] * 2 + [False] * 2))
    gradient, _ = step_gradient(state, rollout, SPREAD)
    lengths = rollout.mask.sum(1)
    kept = torch.where(rollout.truncated, 0, lengths)
    factor = {"sequence": 1.0, "token": lengths.sum() / kept.sum(), "constant": 1.0}
    factor["group"] = (lengths.view(3, 4).sum(1) / kept.view(3, 4).sum(1)).repeat_interleave(4)
    state, _ = setup(MASK_TRUNCATED=False, **settings)
    alike = torch.where(rollout.truncated, 0.0, SPREAD) * factor[denominator]
    assert_close(gradient, step_gradient(state, rollout, alike)[0], atol=1e-6, rtol=1e-5)
    assert gradient.norm() > 0.01


def test_what_is_recorded_of_an_update_by_hand(setup):
    # all ratios are 1.25: above 1 + 0.2, below 1 + 0.28
    for low, high, above in ((0.2, 0.28, 0.0), (0.28, 0.2, 1.0)):
        state, rollout = setup(BETA=0.0, EPSILON_LOW=low, EPSILON_HIGH=high)
        logp = llms.log_probs(state.policy, rollout, main.TEMPERATURE)
        advantages = SPREAD.clone()
        advantages[4:8] = 0.0  # the second question teaches nothing
        measured = measured_update(state, rollout, advantages, logp - math.log(1.25), None)
        lengths = rollout.mask.sum(1)
        share = lengths[advantages > 0].sum() / lengths[advantages != 0].sum()  # of the tokens that are learnt from
        assert measured["clip_high"] == pytest.approx(above * share.item(), abs=1e-6) and measured["clip_low"] == 0
        assert measured["ratio_max"] == pytest.approx(1.25, abs=1e-4)
        # log π_θold is lower than what was recorded while sampling: the gap is a distance
        for name in ("sampler_gap", "sampler_gap_max"):
            assert measured[name] == pytest.approx(math.log(1.25), abs=1e-4)
    # all ratios are 0.75: below 1 - 0.2, above 1 - 0.28
    for low, high, below in ((0.2, 0.28, 1.0), (0.28, 0.2, 0.0)):
        state, rollout = setup(BETA=0.04, EPSILON_LOW=low, EPSILON_HIGH=high)
        logp = llms.log_probs(state.policy, rollout, main.TEMPERATURE)
        measured = measured_update(state, rollout, SPREAD, logp - math.log(0.75), logp + 0.5)
        lengths = rollout.mask.sum(1)
        share = lengths[SPREAD < 0].sum() / lengths.sum()
        assert measured["clip_low"] == pytest.approx(below * share.item(), abs=1e-6) and measured["clip_high"] == 0
        # with log(π_ref/π_θ) = ½: k3 = e^½ - ½ - 1 (k1 would be -0.5, k2 0.125)
        assert measured["kl"] == pytest.approx(0.1487212707, abs=1e-4)
        assert measured["kl_log_ratio_max"] == pytest.approx(0.5, abs=1e-4)


def test_the_distance_to_the_reference_has_no_sign():
    one = torch.ones(1, 1)
    for logp_ref in (0.5, -0.5):
        measured = main.diagnostics(0 * one, 0 * one, logp_ref * one, None, one, one.bool())
        assert measured["kl_log_ratio_max"].item() == 0.5


@pytest.mark.parametrize("estimator", main.KLS)
def test_the_kl_that_is_recorded_is_k3_whichever_is_in_the_loss(constants, estimator):
    constants(KL=estimator)
    one = torch.ones(1, 1)
    measured = main.diagnostics(0 * one, 0.2 * one, 0.5 * one, None, one, one.bool())
    assert measured["kl"].item() == pytest.approx(0.1487212707)  # e^½ - ½ - 1


def test_the_second_update_of_a_rollout_has_ratios_to_the_policy_that_sampled_it(setup, monkeypatch):
    state, _ = setup(STEPS=1, MU=2, REWARDS={"random": 1.0})
    real, seen = main.update, []
    monkeypatch.setattr(main, "update", lambda *inputs: seen.append(real(*inputs)) or seen[-1])
    (row,) = train(state, PROBLEMS)
    first, second = (update["ratio_max"] for update in seen)
    assert first < 1.00001 and second > 1.0001 and row["ratio_max"] == second


@pytest.mark.parametrize("algorithm", ["grpo", "online_rft"])
def test_all_policies_are_read_at_the_temperature_that_sampled(setup, monkeypatch, algorithm):
    state, _ = setup(ALGORITHM=algorithm, STEPS=1, MU=2, TEMPERATURE=0.7)
    real, seen = main.update, []
    monkeypatch.setattr(main, "update", lambda *inputs: seen.append(real(*inputs)) or seen[-1])
    train(state, PROBLEMS)
    first = seen[0]  # nothing has moved: π_θ, π_θold, π_ref and the policy that sampled are the same
    assert first["ratio_max"] < 1.0001 and first["kl_log_ratio_max"] < 1e-4 and first["sampler_gap_max"] < 1e-4


def test_right_after_a_rollout_every_ratio_is_one_and_the_kl_and_the_loss_are_zero(setup):
    state, rollout = setup(MU=2)
    old = llms.log_probs(state.policy, rollout, main.TEMPERATURE)
    ref = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
    measured = measured_update(state, rollout, SPREAD, old, ref)
    assert measured["ratio_max"] == 1.0 and measured["clip_low"] == measured["clip_high"] == 0
    assert measured["kl"] < 1e-6 and abs(measured["loss"]) < 1e-6 and measured["sampler_gap_max"] < 1e-5
    frozen = old.clone(), ref.clone(), rollout.ids.clone()
    again = measured_update(state, rollout, SPREAD, old, ref)
    assert again["ratio_max"] > 1.0001 and again["kl"] > 0
    assert all(torch.equal(a, b) for a, b in zip(frozen, (old, ref, rollout.ids)))


def test_one_step_raises_outputs_with_positive_advantage_and_lowers_the_others(setup):
    for sign in (1.0, -1.0):
        state, rollout = setup(BETA=0.0, optimizer=sgd, LEARNING_RATE=1e-4, MAX_GRAD_NORM=1.0)
        one = torch.zeros(12)
        one[3] = sign
        before = llms.log_probs(state.policy, rollout, main.TEMPERATURE)[3].sum()
        main.update(state, rollout, one, None, None)
        assert (llms.log_probs(state.policy, rollout, main.TEMPERATURE)[3].sum() - before) * sign > 0


def test_without_any_advantage_the_weights_stay_bit_equal(setup):
    state, rollout = setup(BETA=0.0, optimizer=sgd)
    before = [p.clone() for p in state.policy.parameters()]
    main.update(state, rollout, main.group_advantages(torch.full((3, 4), 2.95)).flatten(), None, None)
    assert all(torch.equal(a, b) for a, b in zip(before, state.policy.parameters()))


def test_a_gradient_that_is_not_finite_leaves_weights_and_optimizer_alone(setup):
    state, rollout = setup()
    ref = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
    main.update(state, rollout, SPREAD, None, ref)
    before = {name: value.clone() for name, value in tensors(state).items()}
    broken = SPREAD.clone()
    broken[0] = float("nan")
    measured = measured_update(state, rollout, broken, None, ref)
    assert measured["skipped_updates"]
    assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())
    assert all(p.grad is None or not p.grad.any() for p in state.policy.parameters())


def outputs_of(texts, group_size):
    """A rollout of outputs of which only the texts matter."""
    nothing = torch.zeros(len(texts), 5)
    masks = nothing.long(), nothing.long(), nothing.bool()
    return llms.Rollout(*masks, nothing, nothing, nothing[:, 0].bool(), texts, group_size=group_size)


def rewards_of(texts, problem):
    """The rewards of some outputs of one question, weighted and summed, [G], and each by name."""
    by_name = main.score(main.State(None, None), [problem], outputs_of(texts, len(texts)))
    return main.weighted_sum(by_name)[0].tolist(), {name: values[0].tolist() for name, values in by_name.items()}


def test_an_output_on_which_a_rule_fails_gets_nothing_for_it_and_the_others_theirs(monkeypatch, capsys):
    real = evaluator.rewards

    def surprised(text, problem):
        if text == "boom":
            raise ZeroDivisionError("one of the rules")
        return real(text, problem) | ({"integer": math.nan, "safety": math.inf} if text == "nan" else {})

    monkeypatch.setattr(evaluator, "rewards", surprised)
    problem = {"question": "one and one?", "answer": "2", "kind": "math"}
    rewards, by_name = rewards_of(["<answer>2</answer>", "boom", "nan", "three"], problem)
    assert rewards == [2.75, 0, 0, 0]  # 2 + 0.5 + 0.5 · 2/4
    assert by_name["integer"] == [1, 0, 0, 0]
    printed = capsys.readouterr().err
    assert "2 × a reward failed" in printed and "one of the rules" in printed and "one and one?" in printed
    assert rewards_of(["nan", "three"], problem)[0] == [0, 0]  # two failures, of one output
    with pytest.raises(main.RunError, match="one of the rules"):
        rewards_of(["boom", "boom"], problem)


def test_the_order_of_events_is_algorithm_1(setup, monkeypatch):
    state, _ = setup(ITERATIONS=2, STEPS=2, MU=3)
    state.reference, events, references = None, [], []

    def spy(module, name, event):
        real = getattr(module, name)

        def call(*args, **kwargs):
            events.append(event)
            result = real(*args, **kwargs)
            references.append(result) if event == "ref" else None
            return result

        monkeypatch.setattr(module, name, call)

    spy(llms, "frozen_copy", "ref")
    spy(llms, "sample", "sample")
    spy(main, "score", "reward")
    spy(main, "outcome_advantages", "advantage")
    spy(main, "update", "update")
    spy(state.optimizer, "step", "step")
    spy(state.optimizer, "zero_grad", "zero")
    rows = train(state, PROBLEMS * 9)
    step = ["sample", "reward", "advantage"] + ["update", "step", "zero"] * 3
    assert events == (["ref"] + step * 2) * 2
    assert state.updates == 2 * 2 * 3
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[1]["kl"] > 1e-6  # the policy has left the first reference
    first = [p.clone() for p in references[1].parameters()]
    rollout = sample(state)
    main.update(state, rollout, SPREAD, None, llms.log_probs(state.reference, rollout, main.TEMPERATURE))
    assert all(torch.equal(a, b) for a, b in zip(first, references[1].parameters()))  # updates do not reach it


def test_beta_0_never_makes_or_runs_a_reference(setup, monkeypatch):
    state, _ = setup(BETA=0.0, STEPS=1)
    monkeypatch.setattr(llms, "frozen_copy", lambda *_, **__: pytest.fail("a reference was made"))
    (row,) = train(state, PROBLEMS)
    assert state.reference is None and "kl" not in row


def test_a_training_line_holds_every_promised_key_and_its_seconds_add_up(setup):
    state, _ = setup(STEPS=2)
    row = train(state, PROBLEMS)[-1]
    promised = (
        "step reward reward_std accuracy zero_std_groups loss kl entropy ratio_max clip_low clip_high sampler_gap length"
        " length_max truncated grad_norm lr tokens seconds seconds/sample seconds/reward seconds/logprobs seconds/update"
        " rewards/correctness rewards/integer rewards/strict_format rewards/soft_format rewards/tag_count memory"
        " token_budget cache_tokens"
    )
    assert set(promised.split()) <= row.keys()
    parts = sum(row[f"seconds/{name}"] for name in ("sample", "reward", "logprobs", "update"))
    assert 0 <= row["seconds"] - parts < 0.1 * row["seconds"] + 0.05
    assert row["tokens"] > 0 and row["lr"] == 1e-3 and 0 <= row["entropy"] < math.log(600)
    assert 0.1 < row["memory"] < 24  # GB


def test_updates_that_are_not_finite_leave_the_weights_intact_and_metrics_without_nan(setup):
    state, _ = setup(STEPS=3, REWARDS=main.REWARDS | {"tag_count": float("nan")})  # nan in every reward
    before = [p.clone() for p in state.policy.parameters()]
    rows = train(state, PROBLEMS * 3)
    assert all(torch.equal(a, b) for a, b in zip(before, state.policy.parameters()))
    assert all(row["skipped_updates"] and "reward" not in row for row in rows)
    text = (state.run / "metrics.jsonl").read_text()
    assert "NaN" not in text and "null" not in text


def test_an_update_that_is_left_out_counts_in_the_schedule(setup):
    state, _ = setup(STEPS=3, SCHEDULE="linear", REWARDS=main.REWARDS | {"tag_count": float("nan")})
    rows = train(state, PROBLEMS * 3)
    assert [row["updates"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


HEALTHY = dict.fromkeys(("zero_advantage", "loss", "kl", "kl_log_ratio_max", "entropy", "accuracy"), 0.0)
HEALTHY |= dict.fromkeys(("clip_low", "clip_high", "ratio_max", "truncated", "sampler_gap", "grad_norm"), 0.0)
HEALTHY |= {"step": 1, "skipped_updates": 0}


def quiet_training(state):
    """What happens around Algorithm 1, without tests and without a progress bar."""
    training = main.Training(state, [], only_try=False)
    training.bar = tqdm(disable=True)
    return training


def test_three_steps_in_a_row_that_are_not_finite_end_the_run(setup):
    state, _ = setup()
    state.step = 1  # nothing is saved or drawn
    training = quiet_training(state)
    for failed in (1, 1, 0, 1, 1):
        training.after_step(state, HEALTHY | {"skipped_updates": failed})
    with pytest.raises(main.RunError, match="three steps"):
        training.after_step(state, HEALTHY | {"skipped_updates": 1})


def test_no_checkpoint_is_written_while_updates_are_not_finite(setup, monkeypatch):
    state, _ = setup(SAVE_EVERY=1)
    saved = []
    monkeypatch.setattr(main, "save_checkpoint", lambda state, writer: saved.append(state.step))
    monkeypatch.setattr(main.plot, "draw", lambda *inputs: None)
    training = quiet_training(state)
    for state.step, failed in ((1, 0), (2, 1), (3, 0)):
        training.after_step(state, HEALTHY | {"skipped_updates": failed})
    assert saved == [1, 3]


def test_a_checkpoint_that_could_not_be_written_ends_the_run_at_the_next_step(setup, monkeypatch):
    def write(*_):
        raise OSError("the disk is full")

    state, _ = setup()
    monkeypatch.setattr(llms, "write_checkpoint", write)
    state.step = 1  # nothing is saved or drawn
    training = quiet_training(state)
    main.save_checkpoint(state, training.writer)
    with pytest.raises(OSError, match="the disk is full"):
        for _ in range(100):  # until the thread that writes has ended
            training.after_step(state, HEALTHY)
            time.sleep(0.1)


# ---- steps on tokens, curricula, other rewards ---------------------------------------------------------------------


def written(setup, text, **values):
    """A rollout of two outputs of one question, token by token what a text says, and the state that it belongs to."""
    state, _ = setup(QUESTIONS_PER_STEP=1, GROUP_SIZE=2, **values)
    ids = state.tokenizer(text)["input_ids"] + [state.tokenizer.eos_token_id]
    ids, attention, mask = llms.batch([[5, 6, 7]] * 2, [ids, ids[:4]], "cpu")
    zeros = torch.zeros(mask.shape)
    texts = [text, state.tokenizer.decode(ids[1, 3:7], skip_special_tokens=True)]
    return state, llms.Rollout(ids, attention, mask, zeros, zeros, tensor([False, True]), texts, group_size=2)


ONE = {"kind": "math", "question": "?", "answer": "2", "solution": "1 + 1 = 2"}


def test_the_reward_of_a_step_is_on_the_token_that_ends_it(setup, monkeypatch):
    text = "<reasoning>\nSo 1 + 1 = 2.\nThen é + 2 * 2 = 5.\n</reasoning>\n<answer>\n2\n</answer>"
    state, rollout = written(setup, text, SUPERVISION="both")
    seen = []
    monkeypatch.setattr(main, "process_advantages", lambda *steps: seen.extend(steps) or torch.zeros(steps[0].shape))
    batch = main.Batch([ONE], rollout, {}, tensor([[1.0, 0.0]]))
    main.step_advantages(state, batch)
    rewards, ends = seen  # [1, 2, T]
    at = ends[0, 0].nonzero().flatten().tolist()
    assert len(at) == 2 and rewards[0, 0, at].tolist() == [1.0, 0.0]
    decoded = [state.tokenizer.decode(rollout.ids[0, 3 : 3 + t + 1]) for t in at]
    assert decoded[0].rstrip().endswith("1 + 1 = 2.") and decoded[1].rstrip().endswith("2 * 2 = 5.")
    assert not ends[0, 1].any() and batch.by_name["steps"].tolist() == [[0.5, 0.0]]  # no step: the outcome alone


def test_the_steps_of_an_output_are_judged_by_its_own_question(setup, monkeypatch):
    state, rollout = setup(SUPERVISION="both")  # 3 questions with 4 outputs each
    asked = []
    monkeypatch.setattr(evaluator, "step_rewards", lambda text, problem: asked.append((text, problem)) or [])
    main.step_advantages(state, main.Batch(PROBLEMS[:3], rollout, {}, torch.zeros(3, 4)))
    assert asked == [(text, PROBLEMS[i // 4]) for i, text in enumerate(rollout.texts)]


def test_as_printed_the_answer_is_the_last_step_and_its_reward_is_that_of_the_output(setup):
    text = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n2\n</answer>"
    state, rollout = written(setup, text, SUPERVISION="process")
    advantages = main.step_advantages(state, main.Batch([ONE], rollout, {}, tensor([[4.0, 0.0]])))
    # the pool is 1 for the step and 4 for the answer of the first output, 0 for the second: mean 5/3, std √(13/3)
    std = (13 / 3) ** 0.5 + 1e-4
    step, answer, other = ((r - 5 / 3) / std for r in (1, 4, 0))
    end, first = int(rollout.mask[0].sum()) - 1, advantages[0]
    assert first[0].item() == pytest.approx(step + answer, abs=1e-5)
    assert first[end].item() == pytest.approx(answer, abs=1e-5) and first[end - 3].item() == pytest.approx(answer)
    assert advantages[1, :4].tolist() == pytest.approx([other] * 4, abs=1e-5) and not advantages[1, 4:].any()


def test_the_recorded_mean_of_the_steps_leaves_out_the_answer(setup):
    text = "<reasoning>\n1 + 1 = 2\n2 + 2 = 5\n</reasoning>\n<answer>\n2\n</answer>"
    state, rollout = written(setup, text, SUPERVISION="process")
    batch = main.Batch([ONE], rollout, {}, tensor([[4.0, 0.0]]))
    main.step_advantages(state, batch)
    assert batch.by_name["steps"].tolist() == [[0.5, 0.0]]


def test_with_both_the_advantages_of_steps_have_the_weight_of_steps(setup, monkeypatch):
    state, rollout = setup(SUPERVISION="both", REWARDS={"correctness": 1.0, "steps": 0.25})
    monkeypatch.setattr(main, "process_advantages", lambda rewards, ends: torch.full(rewards.shape, 8.0))
    advantages = main.step_advantages(state, main.Batch(PROBLEMS[:3], rollout, {}, tensor([[1.0, 0, 0, 0]] * 3)))
    assert advantages[:2, 0].tolist() == pytest.approx([1.5 + 2.0, -0.5 + 2.0], abs=1e-3)


@pytest.mark.parametrize("supervision", ["outcome", "process", "both"])
def test_a_step_of_training_gives_one_advantage_to_all_tokens_or_one_to_each(setup, monkeypatch, supervision):
    text = "<reasoning>\n1 + 1 = 2\n2 + 2 = 5\n</reasoning>\n<answer>\n2\n</answer>"
    state, rollout = written(setup, text, SUPERVISION=supervision, STEPS=1)
    monkeypatch.setattr(llms, "sample", lambda *inputs: rollout)
    real, seen = main.update, []
    monkeypatch.setattr(main, "update", lambda *inputs: seen.append(inputs[2]) or real(*inputs))
    (row,) = train(state, [ONE])
    assert ("rewards/steps" in row) == (supervision != "outcome") and row["grad_norm"] > 0
    (advantages,) = seen
    if supervision == "outcome":
        assert advantages.shape == (2,)
    else:  # one value up to the end of the first step, one up to the second, one after it
        assert advantages.shape == (2, row["length_max"]) and len(set(advantages[0].tolist())) >= 2


def test_a_stage_follows_the_other_at_its_step_and_a_second_iteration_begins_again(constants):
    constants(DATASET="knights:2:2,countdown:3:3", STEPS=5)
    assert [main.stage_of(step)[0] for step in range(11)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4]
    constants(STEPS=7)  # resumed with more steps than the stages have: the last stage goes on
    assert [main.stage_of(step) for step in (4, 5, 6)] == [(1, "countdown:3")] * 3


def test_a_curriculum_goes_through_its_stages_and_resumes_within_one(setup):
    constants = {"DATASET": "arithmetic:1:2,knights:1:3", "STEPS": 5, "QUESTIONS_PER_STEP": 1, "MAX_PROMPT_TOKENS": 400}
    state, _ = setup(**constants)
    rows = train(state)
    assert [row["stage"] for row in rows] == ["arithmetic:1"] * 2 + ["knights:1"] * 3
    assert [row["questions"] for row in rows] == [1, 2, 3, 4, 5] and (state.stage, state.position) == (1, 3)
    assert "rewards/integer" in rows[0] and "rewards/integer" not in rows[4]
    state.step = 4  # within the second stage
    save(state)
    fresh, _ = setup(**constants)
    main.load_checkpoint(fresh)
    ours, theirs = (main.next_questions(one)[0] for one in (state, fresh))
    assert ours == theirs


def test_the_questions_of_two_stages_with_one_task_are_not_the_same(setup):
    state, _ = setup(DATASET="knights:1:2,knights:1:2", STEPS=4, MAX_PROMPT_TOKENS=400)
    first, _ = main.next_questions(state)
    state.step = 2
    assert main.next_questions(state)[0] != first


def test_the_weighted_sum_takes_in_rewards_that_are_no_rules(constants):
    constants(REWARDS={"correctness": 2.0, "overlong": 4.0, "reward_model": 0.5})
    values = {"correctness": tensor([[1.0, 0.0]]), "overlong": tensor([[0.0, -0.5]])}
    assert main.weighted_sum(values | {"reward_model": tensor([[1.0, -1.0]])}).tolist() == [[2.5, -2.5]]


def test_the_penalty_of_length_falls_over_the_last_fifth_of_the_limit(constants):
    constants(MAX_NEW_TOKENS=10)
    ids, attention, mask = llms.batch([[7]] * 4, [[7] * n for n in (1, 8, 9, 10)], "cpu")
    rollout = llms.Rollout(ids, attention, mask, group_size=2)
    assert main.overlong(rollout).tolist() == [[0.0, 0.0], [-0.5, -1.0]]


def test_a_reward_is_one_function_and_its_weight_one_entry(monkeypatch, constants):
    monkeypatch.setitem(evaluator.REWARDS, "brevity", lambda completion, problem: float(len(completion) < 10))
    problem = {"question": "?", "answer": "2", "kind": "math"}
    rewards, by_name = rewards_of(["#### 2", "a longer output"], problem)
    assert by_name["brevity"] == [1.0, 0.0] and rewards == [2.5, 0.0]  # measured; without a weight it counts 0
    constants(REWARDS=main.REWARDS | {"brevity": 3.0})
    assert rewards_of(["#### 2", "a longer output"], problem)[0] == [5.5, 0.0]
    main.check_settings()
    monkeypatch.delitem(evaluator.REWARDS, "brevity")
    with pytest.raises(main.SettingsError, match="--rewards: 'brevity' is not a reward"):
        main.check_settings()


def test_every_rule_has_a_weight_and_every_constant_is_a_flag():
    _, _, without_weight = main.CONSTANTS["REWARDS"].comment.partition("; also: ")
    named = [*main.CONSTANTS["REWARDS"].value, *without_weight.split(", ")]
    assert len(named) == len(set(named))
    assert set(named) == {*evaluator.REWARDS, "overlong", "random", "reward_model", "judge", "steps"}
    source = SOURCE.split("# -- End of the constants")[0]
    assert set(re.findall(r"^([A-Z][A-Z0-9_]+) =", source, re.MULTILINE)) == set(main.CONSTANTS)


def test_the_test_questions_are_shared_out_over_the_tasks(constants):
    constants(DATASET="knights:1:2,countdown:3:2", EVAL_QUESTIONS=6)
    assert [problem["task"] for problem in main.check_data()] == ["knights:1"] * 3 + ["countdown:3"] * 3
    constants(EVAL_DATASET="arithmetic,order:2")
    assert [problem["task"] for problem in main.check_data()] == ["arithmetic"] * 3 + ["order:2"] * 3


def test_the_random_reward_is_a_fair_coin_that_no_output_can_earn(setup, constants):
    state, _ = setup()
    problems, rollout = (
        [{"question": "?", "answer": "1", "kind": "math"}] * 50,
        outputs_of(["<answer>1</answer>"] * 1000, 20),
    )
    assert "random" not in main.score(state, problems, rollout)
    constants(REWARDS=main.REWARDS | {"random": 1.0})
    before, tosses = state.generator.get_state(), []
    for state.questions in (0, 50):
        tosses.append(main.score(state, problems, rollout)["random"])
    assert torch.equal(state.generator.get_state(), before)  # sampling goes on as without it
    first, second = tosses
    assert first.shape == (50, 20) and set(first.unique().tolist()) == {0.0, 1.0} and 0.45 < first.mean() < 0.55
    assert 0.4 < (first == second).float().mean() < 0.6  # the same outputs, other tosses
    assert "random" not in main.rule_rewards(problems, rollout)  # and none in a test


def test_two_ranks_toss_the_coins_of_one(setup, constants, monkeypatch):
    constants(REWARDS=main.REWARDS | {"random": 1.0})
    state, _ = setup()
    problems = [{"question": "?", "answer": "1", "kind": "math"}] * 3
    toss = lambda n: main.coin_tosses(state, problems[:n], outputs_of(["1"] * 4 * n, 4)).tolist()
    alone, parts = toss(3), []
    for rank, count in ((0, 1), (1, 2)):
        monkeypatch.setattr(llms, "total_over_ranks", lambda questions: 3)
        monkeypatch.setattr(
            llms, "share", lambda rows, rank=rank: rows[len(rows) * rank // 2 : len(rows) * (rank + 1) // 2]
        )
        parts += toss(count)
    assert parts == alone
    constants(SEED=1)
    monkeypatch.undo()
    assert toss(3) != alone


def test_a_reward_model_scores_batches_as_it_scores_one_and_is_standardised(setup, reward_model):
    state, rollout = setup()
    judge = llms.load_reward_model(reward_model)
    problems = PROBLEMS[:3]
    state.reward_model = judge
    scores = main.score(state, problems, rollout)["reward_model"].flatten()
    assert not scores.requires_grad
    assert scores.shape == (12,) and scores.mean().abs() < 1e-5 and abs(scores.std() - 1) < 1e-2
    questions = [problem["question"] for problem in problems for _ in range(4)]
    raw = tensor(llms.reward_scores(judge, questions * 2, rollout.texts * 2))  # more than go into one batch
    assert_close(raw[:12], raw[12:], atol=1e-5, rtol=1e-4)
    raw = raw[:12]
    alone = [llms.reward_scores(judge, [q], [text])[0] for q, text in zip(questions, rollout.texts)]
    assert_close(raw, tensor(alone), atol=1e-5, rtol=1e-4)
    assert_close(scores, (raw - raw.mean()) / raw.std(), atol=1e-3, rtol=1e-3)


def test_questions_that_are_too_long_are_skipped_and_counted_never_cut(setup):
    state, _ = setup(MAX_PROMPT_TOKENS=200, QUESTIONS_PER_STEP=2)
    too_long = {"question": "why? " * 300, "answer": "1", "kind": "math"}
    state.stream = iter([PROBLEMS[0], too_long, PROBLEMS[1], PROBLEMS[2]])
    problems, _ = main.next_questions(state)
    assert problems == PROBLEMS[:2] and (state.position, state.prompts_skipped) == (3, 1)


def test_rows_that_cannot_be_read_are_skipped_and_counted_and_the_first_is_named(setup, capsys):
    state, _ = setup(QUESTIONS_PER_STEP=2)
    bad = rldatasets.DataError("cannot read x, train split, row 7: no answer")
    state.stream = iter([PROBLEMS[0], bad, bad, *PROBLEMS[1:3], bad, PROBLEMS[3]])
    assert main.next_questions(state)[0] == PROBLEMS[:2] and (state.position, state.rows_skipped) == (4, 2)
    assert main.next_questions(state)[0] == PROBLEMS[2:4] and (state.position, state.rows_skipped) == (7, 3)
    assert capsys.readouterr().out.count("note: cannot read x, train split, row 7: no answer. Such rows") == 1


def test_a_prompt_may_be_as_long_as_the_limit(setup):
    state, _ = setup(QUESTIONS_PER_STEP=1)
    state.prompt_limit = len(main.prompt_ids(state.tokenizer, PROBLEMS[0]))
    state.stream = iter([PROBLEMS[0]])
    assert main.next_questions(state)[0] == [PROBLEMS[0]] and state.prompts_skipped == 0


@pytest.mark.parametrize(
    "settings, words, says",
    [
        ({"MAX_PROMPT_TOKENS": 100}, 5, "every prompt of knights is longer than 100 tokens: raise --max_prompt_tokens"),
        ({"MAX_NEW_TOKENS": 465}, 0, "every prompt of arithmetic is longer than 47 tokens: lower --max_new_tokens"),
        ({"MAX_NEW_TOKENS": 490}, 5, "reads 512 with the output: lower --max_new_tokens"),
        ({}, 1000, "reads 512 with the output: name other questions with --eval_dataset"),
    ],
)
def test_prompts_that_leave_no_room_are_refused_with_the_flag_that_helps(setup, settings, words, says):
    state, _ = setup(**settings)  # prompts of arithmetic have 55 tokens or more, of knights more than 150
    tests = [PROBLEMS[0] | {"question": "why? " * words}]  # 39 tokens without a word
    with pytest.raises(main.SettingsError, match=says):
        main.check_prompts(state, tests, [("arithmetic", 2), ("knights", 2)])


def test_a_checkpoint_brings_back_every_tensor_stream_and_counter(setup):
    state, _ = setup(STEPS=3)
    questions = PROBLEMS * 3
    train(state, questions)
    save(state)
    fresh, _ = setup(STEPS=3)
    main.load_checkpoint(fresh)
    for one in (state, fresh):
        one.step = 2  # one more step, by both
        rows = train(one, questions[one.position :])
    ours, theirs = tensors(state), tensors(fresh)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    last, again = ({k: v for k, v in row.items() if "seconds" not in k and k != "memory"} for row in rows[-2:])
    assert last == again


def test_a_checkpoint_brings_back_counters_that_are_not_0(setup):
    counters = ("step", "updates", "stage", "position", "questions", "prompts_skipped", "rows_skipped", "tokens")
    state, _ = setup()
    for number, name in enumerate(counters):
        setattr(state, name, number + 1)
    save(state)
    fresh, _ = setup()
    main.load_checkpoint(fresh)
    assert [getattr(fresh, name) for name in counters] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_ran_out_of_memory_is_resumed_with_the_limits_it_found(setup, monkeypatch):
    state, _ = setup(STEPS=4, TOKEN_BUDGET=400)
    token_logprobs, calls = llms.token_logprobs, itertools.count()

    def limited(model, ids, *others):
        next(calls)
        if ids.numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logprobs(model, ids, *others)

    monkeypatch.setattr(llms, "LEAST_LIMIT", 100)
    monkeypatch.setattr(llms, "token_logprobs", limited)
    questions = PROBLEMS * 4
    train(state, questions, after_step=lambda state, metrics: state.step == 2)
    assert llms.LIMITS == {"token_budget": 200, "cache_tokens": main.CACHE_TOKENS, "copies_kept": 1}
    save(state)
    monkeypatch.setattr(llms, "token_logprobs", token_logprobs)  # there is enough memory now
    whole = [row["loss"] for row in train(state, questions[state.position :])[2:]]
    fresh, _ = setup(STEPS=4, TOKEN_BUDGET=400)
    assert llms.LIMITS["token_budget"] == 400
    main.load_checkpoint(fresh)
    assert llms.LIMITS["token_budget"] == 200
    resumed = train(fresh, questions[fresh.position :], run=fresh.run / "resumed")
    assert [row["loss"] for row in resumed] == whole and {row["token_budget"] for row in resumed} == {200}
    assert all(torch.equal(one, other) for one, other in zip(tensors(state).values(), tensors(fresh).values()))
    fresh, _ = setup(STEPS=4, TOKEN_BUDGET=300)  # as its flag would
    main.load_checkpoint(fresh)
    assert llms.LIMITS["token_budget"] == 300


def test_a_checkpoint_that_is_damaged_or_of_other_settings_is_refused(setup, constants):
    state, _ = setup()
    save(state)
    path = state.run / "checkpoint" / "state.safetensors"
    whole = bytearray(path.read_bytes())
    constants(BETA=0.5)
    with pytest.raises(main.SettingsError, match="BETA"):
        main.load_checkpoint(state)
    constants(BETA=0.04)
    main.load_checkpoint(state)
    whole[-100] ^= 1
    for broken in (bytes(whole), bytes(whole[:-50]), b"", b"{}" * 100):
        path.write_bytes(broken)
        with pytest.raises(llms.ModelError, match="damaged"):
            main.load_checkpoint(state)


# ---- learning ------------------------------------------------------------------------------------------------------


def bandit(rewards_of, steps, rate, seed, arms=10, group=16):
    """GRPO on a softmax over arms: the probability of the first arm after some steps."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.zeros(arms, requires_grad=True)
    for _ in range(steps):
        arm = torch.multinomial(torch.softmax(z.detach(), 0), group, replacement=True, generator=generator)
        advantages = main.group_advantages(rewards_of(arm, generator)[None])[0]
        logp = torch.log_softmax(z, 0)[arm][:, None]
        main.grpo_loss(logp, logp.detach(), None, advantages, torch.ones(group, 1)).backward()
        with torch.no_grad():
            z -= rate * z.grad
            z.grad = None
    return torch.softmax(z.detach(), 0)[0].item(), z


def test_the_best_of_ten_arms_is_found_and_chance_teaches_nothing(constants):
    constants(BETA=0.0)
    for seed in range(3):
        assert bandit(lambda arm, _: (arm == 0).float(), 200, 0.5, seed)[0] > 0.98
    by_chance = [bandit(lambda arm, g: torch.rand(len(arm), generator=g), 50, 0.1, seed)[0] for seed in range(20)]
    assert abs(sum(by_chance) / 20 - 0.1) < 0.01
    assert (bandit(lambda arm, _: torch.full((len(arm),), 2.95), 50, 0.5, 0)[1] == 0).all()


def test_the_learning_rate_warms_up_and_follows_its_schedule(constants):
    constants(LEARNING_RATE=1.0, WARMUP=4, STEPS=14, ITERATIONS=1, MU=1, SCHEDULE="constant")
    assert [main.learning_rate(u) for u in (0, 3, 4, 13)] == [0.2, 0.8, 1.0, 1.0]
    constants(SCHEDULE="linear")
    assert [main.learning_rate(u) for u in (4, 9, 13)] == [1.0, 0.5, 0.1]
    constants(SCHEDULE="cosine")
    assert main.learning_rate(9) == pytest.approx(0.5) and main.learning_rate(13) < 0.03
    constants(COLD_START=10, SCHEDULE="linear")  # then the same again, 10 updates later
    for rank, rate in ((0, 2e-5), (8, 2e-4)):
        constants(LORA_RANK=rank)
        assert [main.learning_rate(u) / rate for u in (0, 4, 7, 9)] == pytest.approx([0.2, 1.0, 0.5, 1 / 6])
    assert [main.learning_rate(u) for u in (10, 14, 19, 23)] == [0.2, 1.0, 0.5, 0.1]


def test_the_schedule_spans_all_updates_of_all_iterations(constants):
    constants(LEARNING_RATE=1.0, WARMUP=4, COLD_START=0, SCHEDULE="linear")
    for iterations, steps, mu in ((1, 14, 1), (2, 7, 1), (1, 7, 2)):  # 14 updates
        constants(ITERATIONS=iterations, STEPS=steps, MU=mu)
        assert [main.learning_rate(u) for u in (4, 9, 13)] == [1.0, 0.5, 0.1]


def test_an_update_is_made_with_the_learning_rate_of_its_number(setup, monkeypatch):
    state, _ = setup(STEPS=2, WARMUP=9, LEARNING_RATE=1e-2)
    real, rates = state.optimizer.step, []
    monkeypatch.setattr(state.optimizer, "step", lambda: rates.append(state.optimizer.param_groups[0]["lr"]) or real())
    rows = train(state, PROBLEMS)
    assert rates == [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3])


def test_shots_are_the_first_training_problems_in_every_prompt_as_turns_of_the_dialogue(setup):
    state, _ = setup(SHOTS=2)
    first, second = rldatasets.examples("arithmetic", 2)
    assert [first, second] == list(itertools.islice(rldatasets.load("arithmetic", "train"), 2))
    for problem in PROBLEMS[:2]:
        text = state.tokenizer.decode(main.prompt_ids(state.tokenizer, problem))
        parts = [first["question"], rldatasets.written_out(first), second["question"], rldatasets.written_out(second)]
        places = [text.index(part) for part in [*parts, problem["question"]]]
        assert places == sorted(places) and text.count("<|im_start|>user") == 3 and text.count("system") == 1


def test_the_limit_of_prompts_is_that_of_their_questions_without_the_shots(setup):
    limits, lengths = [], []
    for shots in (0, 1):
        state, _ = setup(SHOTS=shots, MAX_PROMPT_TOKENS=100)
        limits.append(state.prompt_limit)
        lengths.append(len(main.prompt_ids(state.tokenizer, PROBLEMS[0])))
    assert limits[0] == 100 and limits[1] - limits[0] == lengths[1] - lengths[0] > 20


def test_a_first_step_without_form_or_right_answers_says_so_once_with_an_output_and_what_to_do(
    setup, capsys, monkeypatch
):
    state, _ = setup(REWARDS=main.REWARDS | {"safety": 1.0}, STEPS=3)  # nearly every output earns this one
    train(state, PROBLEMS * 3)
    out = capsys.readouterr().out
    assert out.count("hardly an output of this step is right or has the form") == 1
    for part in ("<reasoning> 0.00", "</answer> 0.00", PROBLEMS[0]["question"], "--cold_start", "--shots"):
        assert part in out
    real = evaluator.rewards
    right = lambda text, problem: real(text, problem) | {"correctness": float(len(text) % 2)}
    monkeypatch.setattr(evaluator, "rewards", right)
    state, _ = setup(STEPS=1)
    train(state, PROBLEMS * 3)
    assert "hardly an output" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, share, silent",
    [("correctness", 1, True), ("correctness", 2, False), ("soft_format", 2, False), ("tests", 2, False)],
)
def test_that_note_comes_below_one_in_fifty(monkeypatch, name, share, silent):
    monkeypatch.setattr(report, "completion", lambda record: "")
    nothing = {"correctness": 0.0, "soft_format": 0.0, "tests": 0.0, "truncated": 0.0, "completion": ""}
    records = [nothing | {name: float(i < share)} for i in range(100)]
    assert (report.silence(records, []) is not None) == silent


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_an_evaluation_counts_right_answers_votes_and_passes(setup, monkeypatch):
    state, _ = setup(EVAL_SAMPLES=3, EVAL_QUESTIONS=0)
    texts = {
        1: ["<answer>0</answer>", "#### 3", "x"],
        3: ["0", "#### 0", "#### 0", "#### 2", "#### 2", "#### 1", "", "", ""],
    }
    monkeypatch.setattr(llms, "sample", lambda *inputs: outputs_of(texts[inputs[3]], inputs[3]))
    metrics, records = main.evaluate(state, PROBLEMS[:3])  # golds 0, 2, 4
    assert metrics["eval/accuracy"] == pytest.approx(1 / 3) and metrics["eval/n"] == 3
    assert [record["correctness"] for record in records] == [1, 0, 0]
    assert metrics["eval/pass@1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert metrics["eval/pass@3"] == metrics["eval/maj@3"] == pytest.approx(2 / 3)
    assert metrics["eval/maj@1"] == pytest.approx(1 / 3)


def test_all_ranks_decide_alike_whether_answers_are_voted_on(setup, monkeypatch):
    state, _ = setup(EVAL_SAMPLES=2)
    monkeypatch.setattr(llms, "sample", lambda *inputs: outputs_of(["#### 0"] * len(inputs[2]) * inputs[3], inputs[3]))
    monkeypatch.setattr(llms, "share", lambda rows: rows[:2])  # this rank has no program
    program = PROBLEMS[2] | {"kind": "program"}
    for problems, votes in ((PROBLEMS[:3], True), ([*PROBLEMS[:2], program], False)):
        metrics, records = main.evaluate(state, [problem | {"task": problem["kind"]} for problem in problems])
        assert len(records) == 2 and "eval/pass@2" in metrics and ("eval/maj@2" in metrics) == votes


def test_the_weights_of_the_rewards_are_the_constants(constants):
    text, problem = "<answer>72</answer>", {"question": "?", "answer": "72", "kind": "math"}
    assert rewards_of([text] * 2, problem)[0] == [2.75, 2.75]  # 2 + 0.5 + 0.5 · 2/4
    constants(REWARDS=main.REWARDS | {"correctness": 0.0, "tag_count": 4.0})
    assert rewards_of([text], problem)[0] == [2.5]
    assert evaluator.rewards(text, problem)["tag_count"] == 0.5  # unweighted by itself


# ---- the constants -------------------------------------------------------------------------------------------------


def line_of(name):
    """The line of the source on which a constant begins."""
    (line,) = re.findall(rf"^{name} = .*", SOURCE, re.MULTILINE)
    return line


def edited(folder, **lines):
    """main.py after someone has edited the lines of some constants: a module from a copy."""
    source = SOURCE
    for name, line in lines.items():
        source = source.replace(line_of(name), line)
    path = folder / "main.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_main", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_force(module, name, *argv):
    """The value of a constant after a command line has been read by a fresh program."""
    before = module.settings()
    module.choose_settings(*module.parse(list(argv)))
    value = getattr(module, name)
    module.__dict__.update(before)
    return value


def test_what_stands_in_the_constants_is_in_force(tmp_path):
    for tiny, other in ((50, 467), (7, 467), (50, 9)):
        module = edited(tmp_path, STEPS=f"STEPS = of_model({tiny}, {other})  # steps")
        assert module.STEPS == module.CONSTANTS["STEPS"].of("tiny") == tiny  # before any command line
        assert module.CONSTANTS["STEPS"].of("another") == other
        assert in_force(module, "STEPS") == in_force(module, "STEPS", "--model", "tiny") == tiny
        assert in_force(module, "STEPS", "--model", "another") == other
        for model in ("tiny", "another"):
            assert in_force(module, "STEPS", "--model", model, "--steps", "3") == 3  # a flag wins
        told = " ".join(module.new_parser().format_help().split())
        assert f"default: {tiny} for the tiny model, {other} for others" in told


def test_the_model_that_stands_in_the_constants_decides_between_the_two_values(tmp_path):
    module = edited(tmp_path, MODEL='MODEL = "another"  # its name', BETA="BETA = 0.5  # β")
    tiny, other = main.CONSTANTS["STEPS"].value
    assert tiny != other and module.STEPS == in_force(module, "STEPS") == other
    assert in_force(module, "STEPS", "--model", "tiny") == tiny
    assert in_force(module, "BETA") == in_force(module, "BETA", "--model", "tiny") == 0.5  # one value for all
    assert in_force(module, "BETA", "--beta", "0.1") == 0.1


def test_a_constant_can_be_written_as_a_calculation(tmp_path):
    module = edited(tmp_path, STEPS="STEPS = 7473 // 16  # one pass: 467")
    assert module.STEPS == in_force(module, "STEPS") == in_force(module, "STEPS", "--model", "another") == 467
    assert module.CONSTANTS["STEPS"].comment == "one pass: 467"


NOT_CONSTANTS = [
    "MU = 1",
    "MU = 1  #without a blank",
    "Mu = 1  # updates",
    "print(1)  # no constant",
    "MU, SEED = 1, 0  # two",
]
WRONG_TYPES = ["[1, 2]", "None", "1.5", '"1"', "True", 'of_model(1, "2")', "of_model([1], 2)"]


@pytest.mark.parametrize("line", NOT_CONSTANTS)
def test_a_line_among_the_constants_that_is_none_ends_the_program_with_its_number(tmp_path, line):
    with pytest.raises(SystemExit) as ended:
        edited(tmp_path, MU=line)
    number = SOURCE.splitlines().index(line_of("MU")) + 1
    assert re.fullmatch(rf"main.py: error: line {number}: .*NAME = value  # .*", ended.value.code)


@pytest.mark.parametrize("value", WRONG_TYPES)
def test_a_constant_of_another_type_ends_the_program_with_its_line(tmp_path, value):
    with pytest.raises(SystemExit) as ended:
        edited(tmp_path, MU=f"MU = {value}  # updates")
    number = SOURCE.splitlines().index(line_of("MU")) + 1
    assert ended.value.code.startswith(f"main.py: error: line {number}: MU must be a whole number, not ")


@pytest.mark.parametrize(
    "name, value, demand",
    [("MASK_TRUNCATED", '"false"', "True or False"), ("BETA", '"x"', "a number"), ("KL", "3", "a text")],
)
def test_each_constant_has_a_type(tmp_path, name, value, demand):
    with pytest.raises(SystemExit) as ended:
        edited(tmp_path, **{name: f"{name} = {value}  # edited"})
    assert f"{name} must be {demand}, not {value.replace(chr(34), chr(39))}" in ended.value.code


def test_a_decimal_number_may_be_written_without_its_point(tmp_path):
    module = edited(tmp_path, BETA="BETA = 0  # no KL")
    assert in_force(module, "BETA") == 0.0 and in_force(module, "BETA", "--beta", "0.04") == 0.04


def test_a_constant_cannot_be_left_out(tmp_path):
    with pytest.raises(SystemExit, match="main.py: error: BETA is missing from the constants"):
        edited(tmp_path, BETA="# BETA = 0.04  # off")


def test_every_constant_stands_in_the_table_of_types():
    assert set(main.TYPES) == set(main.CONSTANTS)
    for name, value in main.settings().items():
        assert type(value) is main.TYPES[name], name


def test_such_a_line_is_all_that_the_program_prints(tmp_path):
    (tmp_path / "main.py").write_text(SOURCE.replace(line_of("MU"), "MU = 1"), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(Path(main.__file__).parent)}
    command = [sys.executable, str(tmp_path / "main.py"), "--help"]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and re.match(r"main.py: error: line \d+: ", done.stderr)


def test_a_comment_names_every_method_of_its_table_and_no_other():
    tables = {
        "ALGORITHM": {"grpo", *main.TABLE_10},
        "ADVANTAGE": main.ADVANTAGES.keys(),
        "OBJECTIVE": main.OBJECTIVES.keys(),
        "KL": main.KLS.keys(),
        "CORRECTION": main.CORRECTIONS.keys(),
    }
    for name, methods in tables.items():
        choices = main.CONSTANTS[name].choices()
        assert set(choices) == methods and len(choices) == len(methods)
    others = {name for name, constant in main.CONSTANTS.items() if constant.choices()} - tables.keys()
    assert others == {"SUPERVISION", "DENOMINATOR", "SCHEDULE", "PRECISION"}  # which have no table
    assert set(main.CONSTANTS["DENOMINATOR"].choices()) == set(DENOMINATORS)


@pytest.mark.parametrize("name", [*main.TABLES, "SUPERVISION", "DENOMINATOR", "SCHEDULE"])
def test_another_value_is_refused_with_the_choices(constants, name):
    constants(**{name: "another"})
    choices = ", ".join(main.TABLES.get(name, main.CONSTANTS[name].choices()))
    with pytest.raises(
        main.SettingsError, match=re.escape(f"--{name.lower()} must be one of {choices}, not 'another'")
    ):
        main.check_settings()


def test_there_are_few_enough_constants_to_read_them_all():
    assert len(main.CONSTANTS) <= 60


def test_a_reward_that_the_tokens_put_out_of_reach_is_named_with_the_reason(setup, capsys):
    state, _ = setup(MAX_NEW_TOKENS=200)
    main.note_lost_rewards(state)
    assert capsys.readouterr().out == ""
    state.tokenizer = copy.deepcopy(state.tokenizer)
    state.tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    main.note_lost_rewards(state)
    said = capsys.readouterr().out
    lost = "correctness, integer, strict_format, soft_format, tag_count"
    assert (
        said.startswith(f"note: out of reach for the first worked solution: {lost}; after ") and said.count("\n") == 1
    )
    assert "its tokens go on with '\\n" in said and "not with '<answer>" in said


def test_a_limit_that_cuts_every_worked_solution_is_noticed_too(setup, capsys):
    state, _ = setup(MAX_NEW_TOKENS=20)
    main.note_lost_rewards(state)
    assert "tag_count; it is longer than --max_new_tokens 20." in capsys.readouterr().out


def test_a_reward_that_raises_does_not_end_the_look_at_what_is_out_of_reach(setup, monkeypatch):
    def broken(completion, problem):
        raise KeyError("cost")

    monkeypatch.setattr(evaluator, "REWARDS", {"broken": broken})
    state, _ = setup()
    main.note_lost_rewards(state)


def test_options_of_the_template_are_pairs():
    main.choose_settings(*main.parse(["--template_options", "enable_thinking=false,style=brief"]))
    assert llms.TEMPLATE_OPTIONS == {"enable_thinking": False, "style": "brief"}
    with pytest.raises(main.SettingsError, match="--template_options must be name=value pairs"):
        main.choose_settings(*main.parse(["--template_options", "brief"]))
    main.choose_settings(*main.parse([]))
    assert llms.TEMPLATE_OPTIONS == {}


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(*words) -> the one line with which a command line is refused."""
    monkeypatch.setattr(main, "run_training", lambda actions: pytest.fail("a run was started"))

    def one_line(*argv):
        assert main.main(list(argv)) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        return printed.err

    return one_line


@pytest.mark.parametrize("text, name", [("correctness=2,politeness=1", "politeness"), ("=1", "")])
def test_rewards_that_are_not_there_are_refused_with_those_that_are(refused, text, name):
    error = refused("--rewards", text)
    assert f"--rewards: {name!r} is not a reward; there are " in error
    known = error.strip().partition("there are ")[2].split(", ")
    assert {*evaluator.REWARDS, *evaluator.GROUP_REWARDS, "overlong", "random", "reward_model", "judge"} <= set(known)


@pytest.mark.parametrize("text", ["correctness", "correctness=", "correctness=two", "correctness=1,,integer=1", ""])
def test_rewards_that_cannot_be_read_are_refused_in_one_line(refused, text):
    error = refused("--rewards", text)
    assert (
        "--rewards: name=weight pairs, as in correctness=2,integer=0.5, not " in error and error.count(repr(text)) == 1
    )


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_a_number_is_refused(refused, weight):
    assert "the weight of integer must be below 2 to the 63" in refused("--rewards", f"correctness=1,integer={weight}")


def test_rewards_replace_the_table_and_what_is_not_in_it_counts_nothing():
    actions, flags = main.parse(["--rewards", "integer=0.25, correctness = -3"])
    main.choose_settings(actions, flags)
    assert main.REWARDS == {"integer": 0.25, "correctness": -3.0}
    rewards, by_name = rewards_of(["<answer>2</answer>", "#### 3"], {"question": "?", "answer": "2", "kind": "math"})
    assert rewards == [-2.75, 0.25] and by_name["tag_count"] == [0.5, 0.0]  # measured, with weight 0


@pytest.mark.parametrize("flag, reward", [("--reward_model", "reward_model"), ("--judge", "judge")])
def test_a_model_that_scores_needs_a_weight(refused, flag, reward):
    for weights in ("correctness=2", f"correctness=2,{reward}=0"):
        error = refused(flag, "somebody/something", "--rewards", weights)
        assert f"--rewards must be given a weight for {reward}" in error
    main.choose_settings(*main.parse([flag, "somebody/something", "--rewards", f"correctness=2,{reward}=0.5"]))


def test_a_test_needs_no_method_and_no_weight_for_its_judge(constants):
    arguments = "--evaluate tiny --against tiny --judge tiny --rewards correctness=1 --group_size 1 --algorithm sft"
    main.choose_settings(*main.parse(arguments.split()))  # raises nothing
    assert main.JUDGE == "tiny"


def test_what_stands_in_the_block_is_not_ignored_by_a_method_that_cannot_use_it(constants, monkeypatch):
    as_edited = main.CONSTANTS["ADVANTAGE"]._replace(value="rloo")
    monkeypatch.setitem(main.CONSTANTS, "ADVANTAGE", as_edited)
    with pytest.raises(main.SettingsError, match="--advantage must be grpo for sft, not 'rloo'"):
        main.choose_settings(*main.parse(["--algorithm", "sft"]))


# ---- how the paper's part is laid out ------------------------------------------------------------------------------

PAPERS_FUNCTIONS = (
    "grpo_step draw next_questions score rule_rewards weighted_sum step_advantages update backward diagnostics"
    " learning_rate clipped k3 denominators group_advantages"
)  # grpo_loss and process_advantages stand in sections of their own, before the loop


def papers_part():
    """The functions of main.py above the line where the paper ends, by name, and the tables: {name: functions in it}."""
    above = SOURCE.partition(" Here the paper ends ")[0].count("\n")
    functions, tables = {}, {}
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.FunctionDef) and node.lineno < above:
            functions[node.name] = node
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            tables[node.targets[0].id] = {value.id for value in ast.walk(node.value) if isinstance(value, ast.Name)}
    return functions, tables


@pytest.mark.parametrize("name", PAPERS_FUNCTIONS.split())
def test_a_function_of_the_paper_stands_near_its_first_use(name):
    functions, tables = papers_part()
    uses = []  # lines; who reads a table uses what is in it
    for other, node in functions.items():
        for part in ast.walk(node):
            if other != name and isinstance(part, ast.Name) and (part.id == name or name in tables.get(part.id, ())):
                uses.append(part.lineno)
    definition = functions[name]
    first = min(uses)
    assert max(definition.lineno - first, first - definition.end_lineno) <= 150


def test_adams_state_is_there_before_the_first_step_which_it_does_not_change(setup):
    state, rollout = setup()
    plain = torch.optim.AdamW(
        [weight.detach().clone().requires_grad_() for weight in state.policy.parameters()],
        main.LEARNING_RATE,
        (0.9, 0.99),
        weight_decay=0.0,
    )
    size = sum(weight.numel() for weight in state.policy.parameters())
    before = sum(x.numel() for held in state.optimizer.state.values() for x in held.values() if x.dim())
    assert before == 2 * size
    for weight, other in zip(state.policy.parameters(), plain.param_groups[0]["params"]):
        weight.grad = torch.ones_like(weight)
        other.grad = torch.ones_like(weight)
    for optimizer in (state.optimizer, plain):
        optimizer.step()
    for weight, other in zip(state.policy.parameters(), plain.param_groups[0]["params"]):
        assert torch.equal(weight, other)


def test_the_tiny_model_has_one_thread_and_others_have_all(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    for command, expected in (("", [1]), ("--model x", []), ("--threads 2", [2]), ("--threads 0", [])):
        calls.clear()
        main.choose_settings(*main.parse(command.split()))
        assert calls == expected, command
