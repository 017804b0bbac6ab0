"""What came after the paper: each setting against numbers from enumeration, and in the loop."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import PROBLEMS, tensors, train
from test_main import WORKED, loss_and_gradient, ragged
from test_table10 import SOLVED
from torch import tensor
from torch.testing import assert_close

import evaluator
import llms
import main
from plots import report

# a policy over three tokens, of which the first is right; the reference or teacher; the policy that has sampled
Z, Z_REF, Z_OLD = (tensor(z, dtype=torch.float64) for z in ([0.2, -0.5, 1.1], [0.9, 0.1, -0.3], [-0.4, 0.6, 0.0]))
RIGHT = tensor([1.0, 0.0, 0.0], dtype=torch.float64)
INF = math.inf


def double(rows):
    return tensor(rows, dtype=torch.float64)


def close(found, expected, atol=1e-9):
    assert_close(torch.as_tensor(found, dtype=torch.float64), double(expected), atol=atol, rtol=0)


def expected_gradient(G, advantages_of=None, sampled_by=Z, reward=RIGHT, lengths=None, kl_only=False):
    """The mean over all groups of G outputs of one token, of the gradient of the objective with respect to Z."""
    z = Z.clone().requires_grad_()
    logp, sampled, ref = (torch.log_softmax(x, 0) for x in (z, sampled_by, Z_REF))
    T = max(lengths or [1])
    mask = tensor([[t < length for t in range(T)] for length in lengths or [1] * G])
    total = 0.0
    for group in itertools.product(range(3), repeat=G):
        rows = tensor(group)
        A = (advantages_of or main.group_advantages)(reward[rows][None]).flatten()
        of_group = lambda x, rows=rows: x[rows][:, None].expand(G, T)
        loss = main.grpo_loss(
            of_group(logp), of_group(logp).detach(), of_group(ref), A, mask, logp_sampled=of_group(sampled)
        )
        total = total - sampled[rows].sum().exp() * loss
    total.backward()
    return z.grad


# ---- advantages ----------------------------------------------------------------------------------------------------


def test_one_std_for_the_batch_is_that_of_rewards_less_their_groups_mean(constants):
    constants(SCALE="batch")
    first, second = main.group_advantages(double([[1, 0, 0, 0], [1, 1, 1, 1]]))
    close(first, [2.2905880612661393] + [-0.7635293537553798] * 3, 1e-12)
    assert second.tolist() == [0.0] * 4  # counted in the std, and exactly 0
    first, second = main.group_advantages(double([[1, 0, 0, 0], [1, 1, 1, 0]]))
    close(first, [1.6198352501942768] + [-0.5399450833980923] * 3, 1e-12)
    close(second, [0.5399450833980923] * 3 + [-1.6198352501942768], 1e-12)
    constant = tensor([[0.7], [2.1], [2.95]]).expand(3, 57)
    assert (main.group_advantages(constant) == 0).all()


def test_the_last_group_with_spread_is_pushed_four_times_as_hard_by_the_std_of_the_batch(constants):
    rewards = torch.zeros(16, 64, dtype=torch.float64)
    rewards[3, 0] = 1e6
    by_group = main.group_advantages(rewards)[3, 0]
    constants(SCALE="batch")
    assert (main.group_advantages(rewards)[3, 0] / by_group).item() == pytest.approx(4.029652, abs=1e-6)


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 0], [3, -1, -1, -1]), ([1, 1, 0, 0], [1, 1, -1, -1]), ([0] * 4, [0] * 4), ([1] * 4, [0] * 4),
        ([2.5, 0.5, 0.5, 0.5], [1.5, -0.5, -0.5, -0.5]), ([1] + [0] * 63, [63] + [-1] * 63), ([-1, -1, 0, 0], [0] * 4),
    ],
)  # fmt: skip
def test_maxrl_divides_by_the_mean(constants, rewards, expected):
    constants(SCALE="mean")
    close(main.group_advantages(double([rewards]))[0], expected, 1e-12)


def test_maxrl_follows_the_first_terms_of_the_gradient_of_log_p(constants):
    constants(SCALE="mean", BETA=0.0)
    close(expected_gradient(2), [0.1888766090, -0.0317277978, -0.1571488112])  # ∇p
    close(expected_gradient(3), [0.3300111518, -0.0554358062, -0.2745753456])
    close(expected_gradient(4), [0.4354713212, -0.0731511758, -0.3623201455])


@pytest.mark.parametrize(
    "G, right, k, of_right, of_wrong",
    [
        (4, 1, 2, 1.0, -1 / 3), (8, 2, 4, 0.5222329679, -0.1740776560), (8, 4, 4, 0.1203858531, -0.1203858531),
        (64, 1, 8, 2.6457513111, -0.0419960526), (64, 8, 8, 0.6874624343, -0.0982089192),
        (8, 0, 4, 0.0, 0.0), (8, 5, 4, 0.0, 0.0), (8, 8, 4, 0.0, 0.0),
    ],
)  # fmt: skip
def test_pass_k_compares_the_best_of_k_outputs(constants, G, right, k, of_right, of_wrong):
    constants(PASS_K=k)
    rewards = double([[1e6] * right + [0.0] * (G - right)])  # so large that the 1e-4 does not count
    advantages = main.group_advantages(rewards)
    close(advantages[0], [of_right] * right + [of_wrong] * (G - right), 1e-8)
    assert advantages.sum().abs() < 1e-9
    if of_right == 0:
        assert (main.group_advantages(rewards.float() * 0.7) == 0).all()  # exactly, in fp32 too


def test_pass_k_is_the_mean_over_all_sets_of_k_outputs(constants):
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round(decimals=1) * 1e6
    for k in (2, 3, 5):
        constants(PASS_K=k)
        for row, advantages in zip(rewards, main.group_advantages(rewards)):
            sets = list(itertools.combinations(range(6), k))
            best = double([max(row[i] for i in of_set) for of_set in sets])
            z = ((best - best.mean()) / best.std(correction=0)).nan_to_num()  # 0 where all are equal
            expected = [z[[i in of_set for of_set in sets]].mean() for i in range(6)]
            assert_close(advantages, torch.stack(expected), atol=1e-6, rtol=0)


def test_the_best_of_two_of_graded_rewards(constants):
    constants(PASS_K=2)
    best, _ = main.best_of_k(double([[2.5, 0.5, 0.5, 0, 1.2]]))
    close(best[0], [2.5, 1.175, 1.175, 1.175, 1.525], 1e-12)


def test_pass_k_without_a_scale_follows_the_gradient_of_pass_at_k(constants):
    constants(SCALE="none", BETA=0.0, PASS_K=2)
    close(expected_gradient(4), [0.0705672714, -0.0118540042, -0.0587132672])
    close(expected_gradient(5), [0.0846807257, -0.0142248051, -0.0704559207])
    constants(PASS_K=4)
    close(expected_gradient(4), [0.0, 0.0, 0.0])


def test_pass_k_is_not_grpo_again(constants):
    for right in (1, 2, 3, 4):
        rewards = double([[1.0] * right + [0.0] * (8 - right)])
        constants(PASS_K=1)
        plain = main.group_advantages(rewards)
        constants(PASS_K=4)
        assert (main.group_advantages(rewards) - plain).abs().max() > 0.1


def test_each_reward_is_normalised_by_itself_and_the_sum_over_the_batch(constants):
    constants(NORMALIZE="each", WEIGHT_CORRECTNESS=1.0, WEIGHT_INTEGER=0.5)
    rewards = {"correctness": double([[1, 0, 0, 0], [1, 1, 1, 0]]), "integer": double([[1, 1, 0, 0], [1, 1, 1, 1]])}
    first, second = main.normalized_each(rewards)
    close(first, [1.7558775392, -0.0608378916, -0.8475198238, -0.8475198238])
    close(second, [0.4541788577] * 3 + [-1.3625365731])
    close(main.group_advantages(main.weighted_sum(rewards))[0], [1.4140135907, 0, -0.7070067953, -0.7070067953])
    one = {"correctness": double([[1e6, 0, 0, 0]] + [[0.0] * 4] * 3)}
    close(main.normalized_each(one)[0], [3.3541019662] + [-1.1180339887] * 3, 1e-3)  # the outer 1e-4 counts


def test_the_signs_have_weights_of_their_own(constants):
    constants(SCALE="none", BETA=0.0, POSITIVE=1.0, NEGATIVE=0.0)
    close(expected_gradient(2), [0.0705672714, -0.0118540042, -0.0587132672])
    close(expected_gradient(4), [0.1058509071, -0.0177810063, -0.0880699008])
    constants(POSITIVE=0.0, NEGATIVE=1.0)
    close(expected_gradient(2), [0.0238710331, -0.0040098947, -0.0198611384])
    constants(POSITIVE=0.1)
    close(expected_gradient(4), [0.0463916403, -0.0077929427, -0.0385986977])


# ---- the random reward: on average no advantage can be learnt from coins -------------------------------------------


def coin_gradient(G, lengths):
    """The mean gradient where outputs are rewarded by coins; outputs of token a have lengths[a] tokens."""
    z = Z.clone().requires_grad_()
    logp, total = torch.log_softmax(z, 0), 0.0
    for group in itertools.product(range(3), repeat=G):
        rows = logp[list(group)]
        mask = tensor([[t < lengths[a] for t in range(max(lengths))] for a in group])
        spread = torch.zeros(mask.shape, dtype=torch.float64) + rows[:, None] * (torch.arange(max(lengths)) == 0)
        for coins in itertools.product((0.0, 1e6), repeat=G):
            A = main.group_advantages(double([coins]))[0]
            loss = main.grpo_loss(spread, spread.detach(), None, A, mask)
            total = total - rows.sum().exp().detach() * loss / 2**G
    total.backward()
    return z.grad


@pytest.mark.parametrize("denominator", ["constant", "sequence", "token"])
@pytest.mark.parametrize("settings", [{}, {"SCALE": "mean"}, {"SCALE": "none"}, {"PASS_K": 2}, {"BASELINE": "others"}])
def test_coins_teach_nothing_whatever_the_lengths(constants, denominator, settings):
    constants(BETA=0.0, MAX_NEW_TOKENS=4, DENOMINATOR=denominator, **settings)
    assert coin_gradient(3 if "PASS_K" in settings else 2, (1, 4, 2)).abs().max() < 1e-9


def test_coins_do_teach_lengths_where_the_signs_have_different_weights(constants):
    constants(BETA=0.0, NEGATIVE=0.0, MAX_NEW_TOKENS=4, DENOMINATOR="sequence")
    close(coin_gradient(2, (1, 4, 2)), [0.0180966752, -0.0076553671, -0.0104413081])
    constants(DENOMINATOR="token")
    close(coin_gradient(2, (1, 4, 2)), [0.0075702347, -0.0046221770, -0.0029480577])
    constants(DENOMINATOR="constant")
    close(coin_gradient(2, (1, 4, 2)), [0.0, 0.0, 0.0])


# ---- the objective -------------------------------------------------------------------------------------------------


def slope(ratio, A):
    """The objective of one token and its derivative with respect to log π."""
    logp = double([[math.log(ratio)]])
    loss, gradient = loss_and_gradient(logp, 0 * logp, None, double([A]), torch.ones(1, 1).bool())
    return -loss.item(), -gradient.item()


def test_cispo_only_limits_the_weight_of_a_token(constants):
    constants(BETA=0.0, CLIP="weight", EPSILON_LOW=1.0, EPSILON_HIGH=0.28)
    for ratio, A, gradient in ((1.5, 1, 1.28), (1.5, -1, -1.28), (0.5, 1, 0.5), (0.5, -1, -0.5), (1, 1, 1)):
        assert slope(ratio, A)[1] == pytest.approx(gradient, abs=1e-12)
    constants(EPSILON_LOW=0.2)
    assert slope(0.5, 1)[1] == pytest.approx(0.8, abs=1e-12)


CISPO = [
    (4.0, "token", 0.2516000456490187, [[-0.2699717615, -0.2, -0.1809674836], [0.2, 0.2983649395, 0]]),
    (4.0, "sequence", -0.002356402654891898, None),
    (0.28, "token", 0.26728374180359593, [[-0.256, -0.2, -0.1809674836], [0.2, 0.256, 0]]),
]


@pytest.mark.parametrize("high, denominator, value, gradient", CISPO)
def test_a_worked_example_of_cispo(constants, high, denominator, value, gradient):
    constants(BETA=0.0, CLIP="weight", EPSILON_LOW=1.0, EPSILON_HIGH=high, DENOMINATOR=denominator)
    (logp, mask), old, _, A = WORKED
    loss, found = loss_and_gradient(logp, old, None, A, mask)
    close(loss, value, 1e-12)
    if gradient:
        close(found, gradient)


K3_PLUS = [
    ("token", -0.11846016286218236, [[0.0053994352, -0.21, -0.1809674836], [0.198, 0.3043322383, 0]]),
    ("sequence", 0.10921120506931062, [[0.0044995294, -0.175, -0.1508062363], [0.2475, 0.3804152979, 0]]),
]


@pytest.mark.parametrize("denominator, value, gradient", K3_PLUS)
def test_a_worked_example_of_k3_with_the_ratio(constants, denominator, value, gradient):
    constants(BETA=0.1, KL="k3+", DENOMINATOR=denominator)
    (logp, mask), old, ref, A = WORKED
    loss, found = loss_and_gradient(logp, old, ref, A, mask)
    close(loss, value, 1e-12)
    close(found, gradient)


def test_k3_with_the_ratio_is_the_reverse_kl_of_any_samples_its_gradient_too(constants):
    constants(BETA=1.0, KL="k3+")
    for sampled_by in (Z, Z_OLD):
        z = Z.clone().requires_grad_()
        logp, old, ref = (torch.log_softmax(x, 0)[:, None] for x in (z, sampled_by, Z_REF))
        losses = [
            main.grpo_loss(logp[a : a + 1], old[a : a + 1], ref[a : a + 1], torch.zeros(1), torch.ones(1, 1))
            for a in range(3)
        ]
        value = sum(p * loss for p, loss in zip(old.exp().flatten(), losses))
        value.backward()
        close(value.item(), 0.5027774185)
        close(z.grad, [-0.3331852833, -0.1529028005, 0.4860880838])


SAMPLED = ragged([[-1, -2.2, -3], [-1.5, -1.5]])[0]
IMPORTANCE = [  # ratio, outside, low, high: the loss and its gradient
    ("token", "truncate", 0.0, 2.0, -0.13507663221290184,
     [[0.0036253849, -0.2572549770, -0.3619349672], [0.1978965816, 0.4487335706, 0]]),
    ("token", "mask", 0.5, 2.0, 0.22685833500148206,
     [[0.0036253849, -0.2572549770, 0], [0.1978965816, 0.4487335706, 0]]),
    ("sequence", "truncate", 0.0, 2.0, -0.49463476808900164,
     [[0.0036253849, -0.4129744254, -0.3619349672], [0.2962615212, 0.4487335706, 0]]),
    ("sequence", "mask", 0.0, 3.0, 0.7473001991253824,
     [[0.0036253849, -0.0129744254, 0], [0.2962615212, 0.4487335706, 0]]),
]  # fmt: skip


@pytest.mark.parametrize("ratio, outside, low, high, value, gradient", IMPORTANCE)
def test_a_worked_example_of_importance_sampling(constants, ratio, outside, low, high, value, gradient):
    constants(BETA=0.1, DENOMINATOR="token", IS_RATIO=ratio, IS_OUTSIDE=outside, IS_LOW=low, IS_HIGH=high)
    (logp, mask), old, ref, A = WORKED
    whole = logp.clone().requires_grad_()
    loss = main.grpo_loss(whole, old, ref, A, mask, logp_sampled=SAMPLED)
    loss.backward()
    close(loss.item(), value, 1e-12)
    close(whole.grad, gradient)
    parts = [
        main.grpo_loss(*(x[i : i + 1] for x in (logp, old, ref, A, mask)), 2, 5, SAMPLED[i : i + 1]) for i in (0, 1)
    ]
    close(sum(parts).item(), value, 1e-12)
    spoilt = torch.where(mask, SAMPLED, math.nan)
    assert main.grpo_loss(logp, old, ref, A, mask, logp_sampled=spoilt).item() == pytest.approx(value, abs=1e-12)


def test_the_weights_of_tokens_and_of_sequences(constants):
    (_, mask), old, _, _ = WORKED
    constants(IS_RATIO="token")
    close(main.sampling_weight(old, SAMPLED, mask)[0], [0.7408182207, 1.2214027582, 13.4637380350])
    constants(IS_RATIO="sequence")
    close(main.sampling_weight(old, SAMPLED, mask).flatten(), [12.1824939607, 1.4918246976])
    close(main.within_limits(double([12.18, 1.5, 1000.0, INF])), [2.0, 1.5, 2.0, 2.0])
    constants(IS_OUTSIDE="mask", IS_HIGH=3.0)
    close(main.within_limits(double([12.18, 1.5, 1000.0, INF])), [0.0, 1.5, 0.0, 0.0])


FIXED_A = double([1, -1, 0.5])
STALE = [
    ({"IS_RATIO": "token", "IS_HIGH": INF}, [0.1420300012, -0.1805122808, 0.0384822796]),  # = on policy
    ({"IS_RATIO": "token", "IS_HIGH": 2.0}, [0.1482284658, -0.1774342143, 0.0292057485]),
    ({"IS_RATIO": "token", "IS_LOW": 0.5, "IS_OUTSIDE": "mask"}, [0.1888766090, -0.0317277978, -0.1571488112]),
    ({"IS_RATIO": "none"}, [0.2391092034, -0.4983062983, 0.2591970949]),  # the gradient of no policy
]


@pytest.mark.parametrize("settings, expected", STALE)
def test_importance_weights_correct_for_another_sampling_policy(constants, settings, expected):
    constants(BETA=0.0, **settings)
    close(expected_gradient(1, lambda reward: reward, Z_OLD, FIXED_A), expected)


@pytest.mark.parametrize("ratio, expected", [
    ("sequence", [-0.0265301001, -0.0363284755, 0.0628585756]),  # exact
    ("token", [-0.0029088364, 0.0542241396, -0.0513153032]),  # biased, even in its sign
])  # fmt: skip
def test_only_weights_of_whole_outputs_are_exact(constants, ratio, expected):
    constants(BETA=0.0, IS_RATIO=ratio, IS_HIGH=INF, DENOMINATOR="constant", MAX_NEW_TOKENS=1)
    z, total = Z.clone().requires_grad_(), 0.0
    for a, b in itertools.product(range(3), repeat=2):
        second, second_old = Z + 0.5 * a * double([1, -1, 0]), Z_OLD + 0.3 * a * double([0, 1, -1])
        logp = torch.stack([torch.log_softmax(z, 0)[a], torch.log_softmax(second, 0)[b]])[None]
        sampled = torch.stack([torch.log_softmax(Z_OLD, 0)[a], torch.log_softmax(second_old, 0)[b]])[None]
        A, mask = double([(a == b) - 1 / 3]), torch.ones(1, 2).bool()
        loss = main.grpo_loss(logp, logp.detach(), None, A, mask, logp_sampled=sampled)
        total = total - sampled.sum().exp() * loss
    total.backward()
    close(z.grad, expected)


def test_the_dual_clip_ends_the_gradient_of_bad_tokens_that_became_likely(constants):
    constants(BETA=0.0, DELTA=3.0)
    for ratio, A, J, gradient in ((3.5, -1, -3, 0), (2.5, -1, -2.5, -2.5), (3.5, 1, 1.2, 0), (0.5, -1, -0.8, 0)):
        assert slope(ratio, A) == pytest.approx((J, gradient), abs=1e-12)
    far = tensor([[100.0]])  # exp(100) is inf in fp32
    loss, gradient = loss_and_gradient(far, 0 * far, None, tensor([-1.0]), torch.ones(1, 1).bool())
    assert loss.item() == pytest.approx(3.0) and gradient.item() == 0.0


def test_luspo_is_a_row_of_constants(constants):
    constants(BETA=0.0, RATIO="sequence", DENOMINATOR="constant", MAX_NEW_TOKENS=3)
    (logp, mask), old, _, A = WORKED
    loss, _ = loss_and_gradient(logp, old, None, A, mask)
    assert 3 * loss.item() == pytest.approx(-0.3820059005, abs=1e-9)  # × the limit of tokens, here a learning rate


@pytest.mark.parametrize("clip, expected", [
    (INF, [0.0, 0.0, 0.0]), (0.2, [-0.0317277978, 0.1097655879, -0.0780377901]), ("cispo", [0.0, 0.0, 0.0]),
])  # fmt: skip
def test_signs_by_chance_move_the_policy_only_through_a_clip_that_depends_on_the_sign(constants, clip, expected):
    cispo = clip == "cispo"
    constants(BETA=0.0, CLIP="weight" if cispo else "objective", EPSILON_LOW=0.2, EPSILON_HIGH=0.2)
    if clip == INF:
        constants(EPSILON_LOW=1.0, EPSILON_HIGH=1e9)
    z = Z.clone().requires_grad_()
    logp, old = (torch.log_softmax(x, 0)[:, None] for x in (z, Z_OLD))
    one, total = torch.ones(1, 1).bool(), 0.0
    for a, sign in itertools.product(range(3), (1.0, -1.0)):
        loss = main.grpo_loss(logp[a : a + 1], old[a : a + 1], None, double([sign]), one)
        total = total - loss * old[a, 0].exp() / 2
    total.backward()
    close(z.grad, expected)


# ---- in the loop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """A rule that a random model meets half of the time: the right answers are those with an even number of letters."""
    real = evaluator.rewards
    even = lambda text, problem: real(text, problem) | {"correctness": float(len(text) % 2 == 0)}
    monkeypatch.setattr(evaluator, "rewards", even)


def gradient(state):
    return torch.cat([weight.grad.flatten() for weight in state.policy.parameters()])


def output(length):
    return [[5, 6], list(range(5, 5 + length)), [-1.0] * length, [0.5] * length, False, "word " * length]


def drawn(rewards, lengths):
    """A batch of groups with such rewards and lengths."""
    rollout = llms.from_outputs([output(n) for of_q in lengths for n in of_q], "cpu")
    return main.Batch(PROBLEMS[: len(rewards)], rollout, {"correctness": tensor(rewards)})


def test_refill_keeps_the_groups_with_right_and_wrong_outputs_and_counts_all(setup, monkeypatch):
    state, _ = setup(QUESTIONS_PER_STEP=2, GROUP_SIZE=2, REFILL=3, BETA=0.0, STEPS=1)
    draws = [
        drawn([[1.0, 0.0], [0.0, 0.0]], [[3, 5], [4, 4]]),
        drawn([[0.0, 1.0], [1.0, 0.0]], [[6, 1], [7, 7]]),
    ]
    monkeypatch.setattr(main, "draw", lambda state, source: draws.pop(0))
    batch = main.refill(state)
    assert batch.by_name["correctness"].tolist() == [[1.0, 0.0], [0.0, 1.0]] and batch.learns
    assert batch.rollout.mask.sum(1).tolist() == [3, 5, 6, 1]  # Σ|o_i| = 15
    assert [record["length"] for record in batch.dropped] == [4, 4, 7, 7]  # 37 in all
    assert batch.extra == {"refill/draws": 2, "refill/mixed": 0.75}
    row = main.record_step(state, batch, torch.ones(4), [])
    assert (row["accuracy"], row["length"], row["zero_std_groups"]) == (0.375, 37 / 8, 0.25)
    assert row["zero_advantage"] == 0.5 and row["skipped_updates"] == 0


def test_after_the_last_draw_refill_trains_on_what_there_is(setup, monkeypatch):
    state, _ = setup(QUESTIONS_PER_STEP=2, GROUP_SIZE=2, BETA=0.0, STEPS=1)
    one, none = ([[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]])
    cases = [(1, one, True, 2, 0.5), (2, one, True, 4, 0.5), (2, none, False, 4, 0.0)]
    for draws, rewards, learns, outputs, share in cases:
        main.REFILL = draws
        monkeypatch.setattr(main, "draw", lambda state, source, rewards=rewards: drawn(rewards, [[3, 5], [4, 4]]))
        batch = main.refill(state)
        assert (batch.learns, len(batch.rollout.texts)) == (learns, outputs)
        assert batch.extra == {"refill/draws": draws, "refill/mixed": share}
        assert len(batch.dropped) == 4 * draws - outputs


def test_a_step_without_a_group_to_learn_from_counts_and_changes_nothing(setup, monkeypatch):
    monkeypatch.setattr(evaluator, "rewards", lambda text, problem: {"correctness": 0.0})
    state, _ = setup(REFILL=2, STEPS=1)
    before = [weight.clone() for weight in state.policy.parameters()]
    (row,) = train(state, PROBLEMS)
    assert all(map(torch.equal, before, state.policy.parameters()))
    assert (row["step"], row["updates"], row["questions"], row["grad_norm"]) == (1, 0, 6, 0.0)


def test_refill_counts_the_tokens_and_questions_of_all_draws(setup, judged, monkeypatch):
    real, lengths = main.draw, []

    def noted(state, source):
        batch = real(state, source)
        lengths.extend(batch.rollout.mask.sum(1).tolist())
        return batch

    monkeypatch.setattr(main, "draw", noted)
    monkeypatch.setattr(evaluator, "rewards", lambda text, problem: {"correctness": float(len(text) % 6 == 0)})
    state, _ = setup(STEPS=1, REFILL=5, BETA=0.0)
    (row,) = train(state, PROBLEMS * 5)
    assert row["refill/draws"] > 1 and row["questions"] == 3 * row["refill/draws"] and row["updates"] == 1
    assert row["tokens"] == sum(lengths) and row["length"] == pytest.approx(sum(lengths) / len(lengths))


def test_questions_are_of_the_stage_in_which_they_are_trained_on(setup):
    state, _ = setup(
        DATASET="arithmetic:1:2,knights:1:2", STEPS=4, STALENESS=2, IS_RATIO="token", QUESTIONS_PER_STEP=1,
        MAX_PROMPT_TOKENS=400,
    )  # fmt: skip
    rows = train(state)
    asked = [row["question"] for row in report.read_lines(state.run / "samples.jsonl")]
    assert [row["stage"] for row in rows] == ["arithmetic:1"] * 2 + ["knights:1"] * 2
    assert ["knave" in question for question in asked] == [False] * 8 + [True] * 8


def test_outputs_keep_everything_in_plain_form(setup):
    state, rollout = setup()
    again = llms.from_outputs(rollout.outputs(), "cpu")
    for name, before, after in zip(rollout._fields, rollout, again):
        assert before == after if name == "texts" else torch.equal(before, after), name


def test_steps_train_on_outputs_of_k_steps_before(setup, monkeypatch, tmp_path):
    real, drawn_at = main.draw, []

    def noted(state, source):
        drawn_at.append(state.step)
        return real(state, source)._replace(extra={"drawn at": state.step})

    monkeypatch.setattr(main, "draw", noted)
    for k, versions in ((0, [0, 1, 2, 3, 4, 5]), (2, [0, 0, 0, 1, 2, 3])):
        state, _ = setup(STEPS=6, STALENESS=k, IS_RATIO="token", COLD_START=0)
        drawn_at.clear()
        rows = train(state, PROBLEMS * 3, tmp_path / str(k))
        assert drawn_at == [row["drawn at"] for row in rows] == versions and not state.queue
        assert [row["questions"] for row in rows] == [3, 6, 9, 12, 15, 18] if k == 0 else [9, 12, 15, 18, 18, 18]


def test_outputs_of_the_policy_itself_have_weight_1_and_stale_ones_do_not(setup, judged, tmp_path):
    for k, gap in ((0, "sampler_gap"), (1, "staleness_gap")):
        state, _ = setup(STEPS=3, STALENESS=k, IS_RATIO="token", LEARNING_RATE=1e-2)
        rows = train(state, PROBLEMS * 2, tmp_path / gap)
        assert all(gap in row for row in rows)
        assert abs(rows[0]["is_weight"] - 1) < 1e-5 and rows[0]["is_weight_max"] < 1 + 1e-5
        last = rows[-1]["is_weight_max"]
        assert last < 1 + 1e-5 if k == 0 else last > 1 + 1e-3


@pytest.mark.parametrize("settings", [{"STALENESS": 2}, {"STALENESS": 1, "REFILL": 2}])
def test_a_checkpoint_holds_the_outputs_that_wait(setup, judged, settings):
    settings = {"STEPS": 6, "IS_RATIO": "sequence", **settings}
    state, _ = setup(**settings)
    train(state, PROBLEMS * 9, after_step=lambda state, row: int(state.step == 3))
    main.save_checkpoint(state)
    llms.check_written(wait=True)
    fresh, _ = setup(**settings)
    main.load_checkpoint(fresh)
    rows = [train(one, (PROBLEMS * 9)[one.position :]) for one in (state, fresh)][-1]
    ours, theirs = tensors(state), tensors(fresh)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    timeless = [{k: v for k, v in row.items() if "seconds" not in k and k != "memory"} for row in rows[3:]]
    assert timeless[:3] == timeless[3:] and len(timeless) == 6


def test_distillation_from_a_copy_of_the_policy_has_no_gradient(setup):
    state, _ = setup(ALGORITHM="distill", TEACHER="", BETA=0.0, STEPS=1)
    state.teacher = llms.frozen_copy(state.policy)
    (row,) = train(state, PROBLEMS)
    assert row["grad_norm"] == row["distill/kl"] == row["distill/max"] == 0.0


def test_distillation_has_the_gradient_of_k2_to_the_teacher(setup):
    state, rollout = setup(BETA=1.0, KL="k2", DENOMINATOR="token")
    with torch.no_grad():
        for weight in state.reference.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    state.teacher, N = state.reference, len(rollout.texts)
    GC, _, extra = main.from_teacher(state, rollout, {}, None, None)
    assert extra["distill/kl"] > 1e-4
    gradients = []
    for A, ref, loss in (
        (GC, None, main.ppo_loss),
        (torch.zeros(N), main.log_probs(state, state.teacher, rollout), main.grpo_loss),
    ):
        main.backward(state, rollout, A, None, ref, loss, None, main.TOKEN_BUDGET)
        gradients.append(gradient(state))
    assert gradients[0].norm() > 1e-3
    assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_distillation_on_a_toy_policy_follows_the_reverse_kl(constants):
    teacher = torch.log_softmax(Z_REF, 0) - torch.log_softmax(Z, 0)
    constants(BETA=0.0)
    close(expected_gradient(1, lambda reward: reward, reward=teacher), [0.3331852833, 0.1529028005, -0.4860880838])


@pytest.mark.parametrize("settings", [{"STALENESS": 1, "IS_RATIO": "token"}, {"REFILL": 2}])
def test_a_cold_start_neither_waits_nor_refills_nor_counts_tokens(setup, judged, settings):
    state, _ = setup(COLD_START=2, STEPS=2, BETA=0.0, **settings)
    rows = train(state, SOLVED * 20)
    assert [(row["questions"], row["tokens"]) for row in rows[:2]] == [(3, 0), (6, 0)]
    assert "refill/draws" not in rows[1] and rows[2]["tokens"] > 0


def test_the_loop_normalises_each_reward(setup, judged, monkeypatch):
    state, _ = setup(NORMALIZE="each", BETA=0.0, STEPS=1, WEIGHT_CORRECTNESS=1.0, WEIGHT_RANDOM=0.5)
    seen, real = {}, (main.next_batch, main.update)
    monkeypatch.setattr(main, "next_batch", lambda *a: seen.setdefault("batch", real[0](*a)))
    monkeypatch.setattr(main, "update", lambda s, r, A, *rest: seen.update(A=A) or real[1](s, r, A, *rest))
    train(state, PROBLEMS)
    expected = main.normalized_each(seen["batch"].by_name).flatten()
    assert torch.equal(seen["A"], expected) and expected.any()


def test_the_ratio_of_the_kl_is_neither_of_the_sequence_nor_limited(constants):
    (logp, mask), old, ref, _ = WORKED
    zero, found = torch.zeros(2), []
    for settings in ({}, {"RATIO": "sequence"}, {"DELTA": 1.21}):
        constants(BETA=1.0, KL="k3+", RATIO="token", DELTA=0.0)
        constants(**settings)
        found.append(main.grpo_loss(logp, old, ref, zero, mask).item())
    close(found[1:], [found[0]] * 2, 1e-12)


def test_where_no_group_is_mixed_the_last_draw_is_kept(setup, monkeypatch):
    state, _ = setup(QUESTIONS_PER_STEP=2, GROUP_SIZE=2, REFILL=2, BETA=0.0, STEPS=1)
    draws = [drawn([[1.0, 1.0], [0.0, 0.0]], lengths) for lengths in ([[3, 5], [4, 4]], [[6, 1], [7, 7]])]
    monkeypatch.setattr(main, "draw", lambda state, source: draws.pop(0))
    batch = main.refill(state)
    assert batch.rollout.mask.sum(1).tolist() == [6, 1, 7, 7]
    assert [record["length"] for record in batch.dropped] == [3, 5, 4, 4]


def test_groups_of_different_kinds_make_one_batch(setup):
    state, _ = setup(GROUP_SIZE=2)
    outputs = [output(2)] * 2
    groups = [(PROBLEMS[0], outputs, {"correctness": [1.0, 0.0]})]
    groups.append((PROBLEMS[1], outputs, {"correctness": [0.0, 1.0], "tests": [0.5, 0.0]}))
    batch = main.batch_of(state, groups)
    assert {name: x.tolist() for name, x in batch.by_name.items()} == {
        "correctness": [[1.0, 0.0], [0.0, 1.0]],
        "tests": [[0.0, 0.0], [0.5, 0.0]],
    }


@pytest.mark.parametrize("learns", [True, False])
def test_a_checkpoint_holds_all_about_a_batch_that_waits(setup, learns):
    state, _ = setup(GROUP_SIZE=2)
    record = {"reward": 0.0, "length": 4}
    state.queue = [drawn([[1.0, 0.0]], [[3, 5]])._replace(learns=learns, dropped=[record], extra={"refill/draws": 2})]
    main.save_checkpoint(state)
    llms.check_written(wait=True)
    fresh, _ = setup(GROUP_SIZE=2)
    main.load_checkpoint(fresh)
    (batch,) = fresh.queue
    assert (batch.learns, batch.dropped, batch.extra) == (learns, [record], {"refill/draws": 2})


def test_zero_advantage_is_of_outputs_all_of_whose_tokens_have_none():
    batch = drawn([[1.0, 0.0]], [[2, 2]])
    records = main.batch_records(batch, tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert [record["zero_advantage"] for record in records] == [0.0, 1.0]


def test_clip_shares_of_cispo_count_both_signs(constants):
    one = torch.ones(1, 1)
    for clip, expected in (("objective", (0, 0)), ("weight", (1, 1))):
        constants(CLIP=clip)
        low = main.diagnose(one * math.log(0.5), 0 * one, None, None, one, one.bool(), 1)["clip_low"]
        high = main.diagnose(one * math.log(1.5), 0 * one, None, None, -one, one.bool(), 1)["clip_high"]
        assert (low, high) == expected


def test_what_is_recorded_of_importance_weights(constants):
    mask = tensor([[True, True], [True, False]])
    old, sampled = double([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2, 2).double()
    for k, name in ((0, "sampler_gap"), (1, "staleness_gap")):
        constants(IS_RATIO="sequence", IS_HIGH=2.0, STALENESS=k)
        found = main.diagnose(old, old, None, sampled, torch.ones(2, 1), mask, 3)
        assert found["is_outside"] == pytest.approx(2 / 3) and found["is_weight_max"] == pytest.approx(math.e)
        assert found["is_weight"] == pytest.approx((2 * math.e + 1 / math.e) / 3)
        assert found[f"{name}_max"] == 1.0


def test_the_advantages_have_the_dtype_of_the_rewards(constants):
    constants(PASS_K=2)
    assert main.group_advantages(torch.eye(3)).dtype == torch.float32


@pytest.mark.parametrize("k", [0, 2])
def test_each_steps_seconds_are_its_own(setup, k):
    state, _ = setup(STEPS=4, STALENESS=k, IS_RATIO="token")
    rows = train(state, PROBLEMS * 3)
    assert all(0 < sum(v for n, v in row.items() if n.startswith("seconds/")) <= row["seconds"] for row in rows), rows
    assert sum(row["seconds"] for row in rows) < 60


@pytest.mark.parametrize("loss", [main.grpo_loss, main.ppo_loss])
def test_an_update_weighs_by_what_was_recorded_while_sampling(setup, loss):
    state, rollout = setup(BETA=0.0, IS_RATIO="token", IS_HIGH=10.0)
    A, found = torch.arange(12.0) - 5.5, []
    for shift in (0.0, math.log(2)):
        recorded = rollout._replace(logp=rollout.logp - shift)
        main.backward(state, recorded, A, None, None, loss, None, main.TOKEN_BUDGET)
        found.append(gradient(state))
    assert found[0].norm() > 1e-3
    assert_close(2 * found[0], found[1], atol=1e-5, rtol=1e-3)


def test_what_is_recorded_of_the_distance_to_the_teacher(setup):
    state, rollout = setup(ALGORITHM="distill", BETA=0.0)
    state.teacher = llms.frozen_copy(state.policy)
    with torch.no_grad():
        for weight in state.teacher.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # one way and the other, so that once the largest is negative
        distance = main.log_probs(state, state.teacher, rollout) - main.log_probs(state, state.policy, rollout)
        distance = distance[rollout.mask]
        extra = main.from_teacher(state, rollout, {}, None, None)[2]
        assert extra["distill/kl"] == pytest.approx(-distance.mean().item(), rel=1e-4)
        assert extra["distill/max"] == pytest.approx(distance.abs().max().item(), rel=1e-4)
        state.policy, state.teacher = state.teacher, state.policy


def test_a_teacher_is_loaded_and_frozen(setup, checkpoint):
    state, _ = setup(ALGORITHM="distill", TEACHER=checkpoint("llama"), BETA=0.0)
    assert not any(weight.requires_grad for weight in state.teacher.parameters()) and not state.teacher.training


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "distill"])
def test_with_every_weight_outside_the_limits_nothing_is_learnt(setup, judged, checkpoint, algorithm):
    limits = {"IS_RATIO": "token", "IS_LOW": 5.0, "IS_HIGH": 10.0, "IS_OUTSIDE": "mask"}
    for settings, learns in (({}, True), (limits, False)):
        state, _ = setup(ALGORITHM=algorithm, BETA=0.0, STEPS=1, **settings)
        if algorithm == "distill":
            state.teacher = llms.load(checkpoint("llama"))[0]
        (row,) = train(state, PROBLEMS, state.run / f"{algorithm}{learns}")
        assert (row["grad_norm"] > 0) == learns and row.get("is_outside", 1.0) == 1.0


def test_distillation_may_be_weighted_by_what_was_recorded(constants):
    main.choose_settings(*main.parse("--algorithm distill --teacher tiny --is_ratio token".split()))


def test_outputs_that_wait_for_fewer_questions_than_there_are_ranks_are_refused(setup, monkeypatch):
    state, _ = setup(GROUP_SIZE=2)
    state.queue = [drawn([[1.0, 0.0]] * n, [[3, 5]] * n) for n in (3, 1, 2)]
    main.save_checkpoint(state)
    llms.check_written(wait=True)
    fresh, _ = setup(GROUP_SIZE=2)
    monkeypatch.setattr(llms, "WORLD", 2)
    with pytest.raises(main.SettingsError, match="too many ranks.* only 1 of its questions"):
        main.load_checkpoint(fresh)


def test_a_changed_counter_in_a_checkpoint_is_noticed(setup):
    state, _ = setup()
    main.save_checkpoint(state)
    llms.check_written(wait=True)
    path = state.run / "checkpoint" / "state.safetensors"
    data = path.read_bytes()
    assert data.count(b'"step": 0') == 1
    path.write_bytes(data.replace(b'"step": 0', b'"step": 3'))
    with pytest.raises(llms.ModelError, match="damaged"):
        llms.read_checkpoint(state.run / "checkpoint")


# ---- rows of constants ---------------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ("--pass_k 8 --group_size 8", "--pass_k must be below"), ("--pass_k 2 --scale mean", "--pass_k must be 1"),
    ("--pass_k 2 --supervision process", "--pass_k must be 1"), ("--pass_k 2 --normalize each", "--normalize must be"),
    ("--scale mean --weight_overlong 1", "a reward can be negative"), ("--scale mean --weight_integer -1", "negative"),
    ("--scale mean --reward_model judge", "negative"), ("--scale batch --supervision both", "must be group or none"),
    ("--normalize each --supervision process", "--normalize must be"), ("--clip weight --delta 3", "--delta must be 0"),
    ("--delta 1.1", "--delta must be 0, or above"), ("--is_low 2 --is_high 2", "--is_low must be below"),
    ("--is_ratio token --algorithm rft", "--is_ratio must be as it is"), ("--staleness 1", "--is_ratio must be token"),
    ("--staleness 1 --is_ratio token --algorithm ppo", "--staleness must be as"),
    ("--refill 3 --algorithm sft", "--refill must be as"), ("--teacher tiny", "--teacher must be empty"),
    ("--positive 0.1 --algorithm rft", "--positive must be as it is"), ("--negative 0 --supervision both", "must be 1"),
    ("--delta 3 --algorithm online_rft", "--delta must be as"), ("--refill 3 --supervision process", "must be 0"),
    ("--scale mean --supervision process", "group or none"), ("--scale none --normalize each", "--normalize must be"),
    ("--scale batch --normalize each", "must be sum"), ("--negative 0.5 --normalize each", "--normalize must be"),
    ("--algorithm distill --teacher tiny --ratio sequence", "--ratio must be token"),
    ("--algorithm distill", "--teacher must be a model"), ("--positive 0.1 --normalize each", "--normalize must be"),
]  # fmt: skip


@pytest.mark.parametrize("flags, says", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(flags, says):
    with pytest.raises(main.SettingsError, match=says):
        main.choose_settings(*main.parse(flags.split()))


# Two questions with eight outputs, of which 1 and 3 are right. The ratios of an output's tokens, and their mean:
RIGHT_OF_8 = double([[1.0] + [0.0] * 7, [1.0] * 3 + [0.0] * 5])
RATIOS = [[0.5], [1.0], [1.25], [8.0], [0.5, 2.0], [1.5, 1.0, 1.0], [1.002], [8.0, 0.25, 0.5]] * 2
MEANS = [0.5, 1.0, 1.25, 8.0, 1.0, 1.5 ** (1 / 3), 1.002, 1.0] * 2
U = [1.0, 1.5, 3.0] * 5 + [1.0]  # π_θold/π_sampled of an output's tokens
GROUP = (2.4749, -0.35355), (1.20761, -0.72457)  # Â of the right and the wrong outputs of both questions
BATCH = (2.04356, -0.29194), (1.45968, -0.87581)


def clip(low, high):
    """The weight of a token, by its ratio: 0 where it is clipped."""
    return lambda rho, A: 0 if (A > 0 and rho > high) or (A < 0 and rho < low) else rho


def cap(rho, A):
    return min(rho, 5)


ROWS = {  # Â, weight, denominator, importance weight: a token's gradient is weight · Â × importance / denominator
    "Dr. GRPO": (((0.875, -0.125), (0.625, -0.375)), clip(0.8, 1.2), "constant"),
    "RLOO": (((1, -1 / 7), (5 / 7, -3 / 7)), clip(0.8, 1.2), "constant"),
    "DAPO": (GROUP, clip(0.8, 1.28), "token"),
    "Magistral": (BATCH, clip(0.8, 1.28), "token"),
    "MaxRL": (((7, -1), (5 / 3, -1)), clip(0.8, 1.2), "sequence"),
    "pass@k training": (((1, -1 / 7), (0.27735, -0.16641)), clip(0.8, 1.2), "sequence"),
    "GDPO": (((2.56177, -0.36597), (1.25, -0.75)), clip(0.8, 1.2), "sequence"),
    "W-REINFORCE": (((0.24749, -0.35355), (0.120761, -0.72457)), clip(0.8, 1.2), "sequence"),
    "GSPO": (GROUP, clip(1 - 3e-4, 1 + 4e-4), "sequence"),
    "LUSPO": (GROUP, clip(1 - 2e-3, 1 + 2.5e-3), "constant"),
    "CISPO": (GROUP, cap, "token"),
    "dual clip": (GROUP, lambda rho, A: 0 if A < 0 and rho > 3 else clip(0.8, 1.2)(rho, A), "sequence"),
    "DeepSeek-V3.2's KL": (GROUP, clip(0.8, 1.2), "sequence"),
    "TIS": (GROUP, clip(0.8, 1.2), "sequence", lambda u, n: min(u, 2)),
    "sequence TIS": (GROUP, clip(0.8, 1.2), "sequence", lambda u, n: min(u**n, 2)),
    "IcePop": (GROUP, clip(0.8, 1.2), "sequence", lambda u, n: u if u <= 2 else 0),
    "ScaleRL": (BATCH, cap, "token", lambda u, n: min(u, 5)),
}
README = (Path(main.__file__).parent / "README.md").read_text()
SETTINGS = dict(re.findall(r"^\| \[?([^|(\]]+?)\]?(?: ?\(.+?\))? \| `(--.+?)` \|", README, re.MULTILINE))


def test_the_readme_has_sixteen_variants_or_more_and_each_is_tried():
    assert len(SETTINGS) >= 16 and SETTINGS.keys() == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_readme_has_the_gradient_of_its_formula(constants, name):
    main.choose_settings(*main.parse(["--beta", "0", "--group_size", "8", *SETTINGS[name].split()]))
    constants(MAX_NEW_TOKENS=4, WEIGHT_CORRECTNESS=1.0)
    advantages = main.normalized_each if main.NORMALIZE == "each" else lambda by_name: main.group_advantages(RIGHT_OF_8)
    A = advantages({"correctness": RIGHT_OF_8}).flatten()
    logp, mask = ragged([[-1.0] * len(ratios) for ratios in RATIOS])
    old = logp - ragged(RATIOS, 1.0)[0].log()
    sampled = old - double(U).log()[:, None]
    logp = logp.clone().requires_grad_()
    main.grpo_loss(logp, old, logp.detach() + math.log(2), A, mask, logp_sampled=sampled).backward()

    by_question, weight, denominator, *importance = ROWS[name]
    right, tokens = RIGHT_OF_8.flatten().tolist(), sum(map(len, RATIOS))
    for i, (ratios, mean, u) in enumerate(zip(RATIOS, MEANS, U)):
        n, A_i = len(ratios), by_question[i // 8][0 if right[i] else 1]
        for t, rho in enumerate(ratios):
            expected = A_i * weight(mean if "SPO" in name and name != "CISPO" else rho, A_i)
            expected *= importance[0](u, n) if importance else 1
            expected += main.BETA * rho * math.log(2)  # of ρ·k3: towards a reference that is twice as likely
            expected /= {"sequence": 16 * n, "token": tokens, "constant": 16 * 4}[denominator]
            close(-logp.grad[i, t], expected, 2e-4 * max(1, abs(expected)))
