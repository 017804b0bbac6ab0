"""What came after the paper: each method against numbers from enumeration, and in the loop."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import PROBLEMS, save, tensors, train
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
P_GRADIENT = tensor([0.1888766090, -0.0317277978, -0.1571488112], dtype=torch.float64)  # ∇p, p = π(right)
INF = math.inf


def double(rows):
    return tensor(rows, dtype=torch.float64)


def close(found, expected, atol=1e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert_close(torch.as_tensor(found, dtype=torch.float64), expected, atol=atol, rtol=0)


def expected_gradient(G, advantages_of=None, sampled_by=Z, reward=RIGHT, lengths=None):
    """The mean over all groups of G outputs, of the gradient of the objective with respect to Z.

    An output is one token a, or with lengths lengths[a] tokens, of which the policy chooses the first alone.
    """
    z = Z.clone().requires_grad_()
    logp, sampled, ref = (torch.log_softmax(x, 0) for x in (z, sampled_by, Z_REF))
    lengths = lengths or (1, 1, 1)
    T = max(lengths)
    total = 0.0
    for group in itertools.product(range(3), repeat=G):
        rows = tensor(group)
        mask = tensor([[t < lengths[a] for t in range(T)] for a in group])
        A = (advantages_of or main.group_advantages)(reward[rows][None]).flatten()
        of_group = lambda x, rows=rows: x[rows][:, None] * (torch.arange(T) == 0)
        loss = main.grpo_loss(
            of_group(logp), of_group(logp).detach(), of_group(ref), A, mask, logp_sampled=of_group(sampled)
        )
        total = total - sampled[rows].sum().exp() * loss
    total.backward()
    return z.grad


# ---- advantages ----------------------------------------------------------------------------------------------------


def test_every_method_that_can_be_chosen_is_tried_here():
    tried = {method for row in COMMANDS.values() for method in re.findall(r"--(?:advantage|objective) (\w+)", row)}
    assert tried == (main.ADVANTAGES.keys() | main.OBJECTIVES.keys()) - {"grpo"}
    assert main.KLS.keys() == KL_GRADIENTS.keys()
    assert {method for method, *_ in CORRECTIONS} | {"none"} == main.CORRECTIONS.keys()


def test_the_paper_divides_by_the_std_of_the_group():
    close(main.group_advantages(double([[1, 0, 0, 0]]))[0, :2], [1.4997000599880024, -0.4999000199960008], 1e-12)


def test_dr_grpo_subtracts_the_mean_and_rloo_the_mean_of_the_others():
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, of_dr_grpo, of_rloo in zip(rewards.tolist(), main.dr_grpo(rewards), main.rloo(rewards)):
        close(of_dr_grpo, [r - sum(row) / 5 for r in row], 1e-12)
        close(of_rloo, [r - (sum(row) - r) / 4 for r in row], 1e-12)
    close(main.dr_grpo(double([[1, 0, 0, 0]]))[0], [0.75, -0.25, -0.25, -0.25], 1e-12)
    close(main.rloo(double([[1, 0, 0, 0]]))[0], [1, -1 / 3, -1 / 3, -1 / 3], 1e-12)


def test_rloo_follows_the_gradient_of_the_share_that_is_right_and_dr_grpo_a_part_of_it(constants):
    constants(BETA=0.0)
    for G in (2, 3, 4):
        close(expected_gradient(G, main.rloo), P_GRADIENT)
        close(expected_gradient(G, main.dr_grpo), (G - 1) / G * P_GRADIENT)


@pytest.mark.parametrize("advantages_of", [main.dr_grpo, main.rloo, main.batch_std, main.maxrl, main.pass_at_k])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero_in_fp32(advantages_of):
    constant = tensor([[0.7], [2.1], [2.95]]).expand(3, 57)
    assert (advantages_of(constant) == 0).all()


def test_one_std_for_the_batch_is_that_of_rewards_less_their_groups_mean():
    first, second = main.batch_std(double([[1, 0, 0, 0], [1, 1, 1, 1]]))
    close(first, [2.2905880612661393] + [-0.7635293537553798] * 3, 1e-12)
    assert second.tolist() == [0.0] * 4  # counted in the std, and exactly 0
    first, second = main.batch_std(double([[1, 0, 0, 0], [1, 1, 1, 0]]))
    close(first, [1.6198352501942768] + [-0.5399450833980923] * 3, 1e-12)
    close(second, [0.5399450833980923] * 3 + [-1.6198352501942768], 1e-12)


def test_the_last_group_with_spread_is_pushed_four_times_as_hard_by_the_std_of_the_batch():
    rewards = torch.zeros(16, 64, dtype=torch.float64)
    rewards[3, 0] = 1e6
    by_group = main.group_advantages(rewards)[3, 0]
    assert (main.batch_std(rewards)[3, 0] / by_group).item() == pytest.approx(4.029652, abs=1e-6)


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 0], [3, -1, -1, -1]), ([1, 1, 0, 0], [1, 1, -1, -1]), ([0] * 4, [0] * 4), ([1] * 4, [0] * 4),
        ([2.5, 0.5, 0.5, 0.5], [1.5, -0.5, -0.5, -0.5]), ([1] + [0] * 63, [63] + [-1] * 63), ([-1, -1, 0, 0], [0] * 4),
    ],
)  # fmt: skip
def test_maxrl_divides_by_the_mean(rewards, expected):
    close(main.maxrl(double([rewards]))[0], expected, 1e-12)


MAXRL = {
    2: [0.1888766090, -0.0317277978, -0.1571488112],  # ∇p
    3: [0.3300111518, -0.0554358062, -0.2745753456],
    4: [0.4354713212, -0.0731511758, -0.3623201455],
}


def test_maxrl_follows_the_first_terms_of_the_gradient_of_log_p(constants):
    constants(BETA=0.0)
    for G, expected in MAXRL.items():
        close(expected_gradient(G, main.maxrl), expected)


def test_maxrl_follows_whole_log_likelihoods_only_with_a_constant_denominator(constants):
    cosines = {}
    for denominator in ("sequence", "token", "constant"):
        constants(BETA=0.0, MAX_NEW_TOKENS=4, DENOMINATOR=denominator)
        found = expected_gradient(4, main.maxrl, lengths=(2, 1, 4))
        cosines[denominator] = torch.cosine_similarity(found, P_GRADIENT, 0).item()
    close(4 * found, MAXRL[4])  # constant: the same as with outputs of one token
    assert cosines == pytest.approx({"sequence": 0.971, "token": 0.999, "constant": 1.0}, abs=5e-4)


@pytest.mark.parametrize(
    "G, right, k, of_right, of_wrong",
    [
        (4, 1, 2, 1.0, -1 / 3), (8, 2, 4, 0.5222329679, -0.1740776560), (8, 4, 4, 0.1203858531, -0.1203858531),
        (64, 1, 8, 2.6457513111, -0.0419960526), (64, 8, 8, 0.6874624343, -0.0982089192),
        (8, 0, 4, 0.0, 0.0), (8, 5, 4, 0.0, 0.0), (8, 8, 4, 0.0, 0.0),
    ],
)  # fmt: skip
def test_pass_at_k_has_the_printed_closed_form(constants, G, right, k, of_right, of_wrong):
    constants(PASS_K=k)
    rewards = double([[1.0] * right + [0.0] * (G - right)])
    advantages = main.pass_at_k(rewards)
    close(advantages[0], [of_right] * right + [of_wrong] * (G - right))
    assert advantages.sum().abs() < 1e-9
    if of_right == 0:
        assert (main.pass_at_k(rewards.float() * 0.7) == 0).all()  # exactly, in fp32 too


def test_pass_at_k_is_the_mean_over_all_sets_of_k_outputs(constants):
    for G, k in itertools.product(range(2, 8), range(1, 7)):
        sets = list(itertools.combinations(range(G), k))
        constants(PASS_K=k)
        for right in range(G + 1) if sets else ():
            rewards = double([1.0] * right + [0.0] * (G - right))[torch.randperm(G)]
            best = double([max(rewards[i] for i in of_set) for of_set in sets])
            z = ((best - best.mean()) / best.std(correction=0)).nan_to_num(0.0, 0.0, 0.0)  # 0 where all are equal
            expected = [z[[i in of_set for of_set in sets]].mean() for i in range(G)]
            assert_close(main.pass_at_k(rewards[None])[0], torch.stack(expected), atol=1e-9, rtol=0)


def test_pass_at_k_with_all_outputs_in_one_set_teaches_nothing_and_with_less_follows_the_gradient_of_p(constants):
    constants(BETA=0.0, PASS_K=4)
    close(expected_gradient(4, main.pass_at_k), [0.0, 0.0, 0.0])
    constants(PASS_K=2)
    for G in (4, 5):
        found = expected_gradient(G, main.pass_at_k)
        assert torch.cosine_similarity(found, P_GRADIENT, 0).item() == pytest.approx(1, abs=1e-9) and found[0] > 0.05


def test_pass_at_k_is_not_grpo_again(constants):
    constants(PASS_K=4)
    for right in (1, 2, 3, 4):
        rewards = double([[1.0] * right + [0.0] * (8 - right)])
        assert (main.pass_at_k(rewards) - main.group_advantages(rewards)).abs().max() > 0.1


def test_each_reward_is_normalised_by_itself_and_the_sum_over_the_batch(constants):
    constants(REWARDS={"correctness": 1.0, "integer": 0.5})
    rewards = {"correctness": double([[1, 0, 0, 0], [1, 1, 1, 0]]), "integer": double([[1, 1, 0, 0], [1, 1, 1, 1]])}
    first, second = main.gdpo(rewards)
    close(first, [1.7558775392, -0.0608378916, -0.8475198238, -0.8475198238])
    close(second, [0.4541788577] * 3 + [-1.3625365731])
    close(main.group_advantages(main.weighted_sum(rewards))[0], [1.4140135907, 0, -0.7070067953, -0.7070067953])
    one = {"correctness": double([[1e6, 0, 0, 0]] + [[0.0] * 4] * 3)}
    close(main.gdpo(one)[0], [3.3541019662] + [-1.1180339887] * 3, 1e-3)  # the outer 1e-4 counts


def test_w_reinforce_looks_at_no_group():
    for rewards in ([1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
        close(main.w_reinforce(double([rewards]))[0], [0.1 if r else -1.0 for r in rewards], 1e-7)


def test_w_reinforce_pulls_away_from_wrong_outputs_ten_times_as_hard_as_towards_right_ones(constants):
    # E[𝕀_right ∇log π] = ∇p = - E[𝕀_wrong ∇log π], as no baseline is subtracted
    constants(BETA=0.0)
    for G in (1, 2, 3):
        close(expected_gradient(G, main.w_reinforce), 1.1 * P_GRADIENT, 1e-8)


# ---- the random reward: on average no advantage can be learnt from coins -------------------------------------------


def coin_gradient(advantages_of, G, lengths=(1, 4, 2)):
    """The mean gradient where outputs are rewarded by coins; outputs of token a have lengths[a] tokens."""
    main.GROUP_SIZE = G
    z = Z.clone().requires_grad_()
    logp, total = torch.log_softmax(z, 0), 0.0
    for group in itertools.product(range(3), repeat=G):
        rows = logp[list(group)]
        mask = tensor([[t < lengths[a] for t in range(max(lengths))] for a in group])
        spread = torch.zeros(mask.shape, dtype=torch.float64) + rows[:, None] * (torch.arange(max(lengths)) == 0)
        for coins in itertools.product((0.0, 1e6), repeat=G):
            A = advantages_of(double([coins]))[0]
            loss = main.grpo_loss(spread, spread.detach(), None, A, mask)
            total = total - rows.sum().exp().detach() * loss / 2**G
    total.backward()
    return z.grad


WHERE_COINS_TEACH_NOTHING = [main.group_advantages, main.maxrl, main.dr_grpo, main.batch_std, main.pass_at_k, main.rloo]


@pytest.mark.parametrize("denominator", ["constant", "sequence", "token", "group"])
@pytest.mark.parametrize("advantages_of", WHERE_COINS_TEACH_NOTHING)
def test_coins_teach_nothing_whatever_the_lengths(constants, denominator, advantages_of):
    constants(BETA=0.0, MAX_NEW_TOKENS=4, DENOMINATOR=denominator, PASS_K=2)
    assert coin_gradient(advantages_of, 3 if advantages_of is main.pass_at_k else 2).abs().max() < 1e-9


def test_coins_do_teach_lengths_where_only_better_outputs_are_learnt_from(constants):
    better_only = lambda rewards: main.group_advantages(rewards).clamp(min=0)
    constants(BETA=0.0, MAX_NEW_TOKENS=4, DENOMINATOR="sequence")
    close(coin_gradient(better_only, 2), [0.0180966752, -0.0076553671, -0.0104413081])
    constants(DENOMINATOR="token")
    close(coin_gradient(better_only, 2), [0.0075702347, -0.0046221770, -0.0029480577])
    constants(DENOMINATOR="constant")
    close(coin_gradient(better_only, 2), [0.0, 0.0, 0.0])


def test_coins_teach_w_reinforce_nothing_with_the_constant_denominator_alone(constants):
    for denominator, learns in (("constant", False), ("sequence", True), ("token", True)):
        constants(BETA=0.0, MAX_NEW_TOKENS=4, DENOMINATOR=denominator)
        assert (coin_gradient(main.w_reinforce, 2).abs().max() > 1e-3) == learns


# ---- the objective -------------------------------------------------------------------------------------------------


def slope(ratio, A):
    """The objective of one token and its derivative with respect to log π."""
    logp = double([[math.log(ratio)]])
    loss, gradient = loss_and_gradient(logp, 0 * logp, None, double([A]), torch.ones(1, 1).bool())
    return -loss.item(), -gradient.item()


def test_cispo_only_limits_the_weight_of_a_token(constants):
    constants(BETA=0.0, OBJECTIVE="cispo", EPSILON_LOW=1.0, EPSILON_HIGH=0.28)
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
    constants(BETA=0.0, OBJECTIVE="cispo", EPSILON_LOW=1.0, EPSILON_HIGH=high, DENOMINATOR=denominator)
    (logp, mask), old, _, A = WORKED
    loss, found = loss_and_gradient(logp, old, None, A, mask)
    close(loss, value, 1e-12)
    if gradient:
        close(found, gradient)


def test_the_group_denominator_is_the_tokens_of_a_question_then_the_mean_over_questions(constants):
    constants(BETA=0.0, DENOMINATOR="group", GROUP_SIZE=2)
    lengths = (3, 1, 2, 4)  # two questions with 4 and 6 tokens
    logp, mask = ragged([[-1.0] * n for n in lengths])
    A = double([1.0, -2.0, 3.0, 0.5])
    whole = loss_and_gradient(logp, logp, None, A, mask)
    close(-whole[0], ((3 * 1 - 1 * 2) / 4 + (2 * 3 + 4 * 0.5) / 6) / 2, 1e-12)
    close(-whole[1][:, 0], [1 / 8, -2 / 8, 3 / 12, 0.5 / 12], 1e-12)
    denominator = main.denominators(tensor(lengths), 2)
    for rows in ([0, 3], [1], [2]):  # a micro-batch holds parts of both
        part = loss_and_gradient(logp[rows], logp[rows], None, A[rows], mask[rows], denominator[rows])
        close(part[1], whole[1][rows], 1e-12)
    constants(DENOMINATOR="token")
    close(-loss_and_gradient(logp, logp, None, A, mask)[0], (3 * 1 - 1 * 2 + 2 * 3 + 4 * 0.5) / 10, 1e-12)
    constants(DENOMINATOR="group")
    assert main.denominators(tensor([0, 0, 2, 0]), 2).flatten().tolist() == [1, 1, 4, 4]  # two outputs are left out


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


def kl_over_samples_of(sampled_by):
    """The mean of the KL in the loss over samples of a policy, and its gradient with respect to Z."""
    z = Z.clone().requires_grad_()
    logp, old, ref = (torch.log_softmax(x, 0)[:, None] for x in (z, sampled_by, Z_REF))
    losses = [
        main.grpo_loss(logp[a : a + 1], old[a : a + 1], ref[a : a + 1], torch.zeros(1), torch.ones(1, 1))
        for a in range(3)
    ]
    value = sum(p * loss for p, loss in zip(old.exp().flatten(), losses))
    value.backward()
    return value.item(), z.grad


REVERSE_KL = [-0.3331852833, -0.1529028005, 0.4860880838]
KL_GRADIENTS = {"k1": [0.0] * 3, "k2": REVERSE_KL, "k3": [-0.3184892418, -0.1311615248, 0.4496507666]}
KL_GRADIENTS["k3+"] = REVERSE_KL


@pytest.mark.parametrize("estimator", KL_GRADIENTS)
def test_each_estimator_of_the_kl_has_the_gradient_that_enumeration_gives(constants, estimator):
    constants(BETA=1.0, KL=estimator)
    value, gradient = kl_over_samples_of(Z)
    close(gradient, KL_GRADIENTS[estimator])
    if estimator != "k2":  # the others are the KL itself, on average
        close(value, 0.5027774185)


def test_k3_with_the_ratio_is_the_reverse_kl_of_any_samples_its_gradient_too(constants):
    constants(BETA=1.0, KL="k3+")
    for sampled_by in (Z, Z_OLD):
        value, gradient = kl_over_samples_of(sampled_by)
        close(value, 0.5027774185)
        close(gradient, REVERSE_KL)


SAMPLED = ragged([[-1, -2.2, -3], [-1.5, -1.5]])[0]
CORRECTIONS = [  # method, highest weight: the loss and its gradient
    ("tis", 2.0, -0.13507663221290184,
     [[0.0036253849, -0.2572549770, -0.3619349672], [0.1978965816, 0.4487335706, 0]]),
    ("icepop", 2.0, 0.22685833500148206,
     [[0.0036253849, -0.2572549770, 0], [0.1978965816, 0.4487335706, 0]]),
    ("sequence_tis", 2.0, -0.49463476808900164,
     [[0.0036253849, -0.4129744254, -0.3619349672], [0.2962615212, 0.4487335706, 0]]),
]  # fmt: skip


@pytest.mark.parametrize("method, highest, value, gradient", CORRECTIONS)
def test_a_worked_example_of_importance_sampling(constants, method, highest, value, gradient):
    constants(BETA=0.1, DENOMINATOR="token", CORRECTION=method, CORRECTION_MAX=highest)
    (logp, mask), old, ref, A = WORKED
    whole = logp.clone().requires_grad_()
    loss = main.grpo_loss(whole, old, ref, A, mask, logp_sampled=SAMPLED)
    loss.backward()
    close(loss.item(), value, 1e-12)
    close(whole.grad, gradient)
    denominator = main.denominators(mask.sum(1), main.GROUP_SIZE)
    parts = [
        main.grpo_loss(*(x[i : i + 1] for x in (logp, old, ref, A, mask, denominator, SAMPLED))).item() for i in (0, 1)
    ]
    close(sum(parts), value, 1e-12)
    spoilt = torch.where(mask, SAMPLED, math.nan)
    assert main.grpo_loss(logp, old, ref, A, mask, logp_sampled=spoilt).item() == pytest.approx(value, abs=1e-12)


def test_the_weights_of_tokens_and_of_sequences(constants):
    (_, mask), old, _, _ = WORKED
    tokens = [[0.7408182207, 1.2214027582, 13.4637380350], [1.0, 1.4918246976, 1.0]]  # 1 where there is no token
    products = [[12.1824939607], [1.4918246976]]
    constants(CORRECTION="tis", CORRECTION_MAX=INF)
    close(main.tis(old, SAMPLED, mask), tokens)
    constants(CORRECTION_MAX=2.0)
    close(main.tis(old, SAMPLED, mask), [[0.7408182207, 1.2214027582, 2.0], [1.0, 1.4918246976, 1.0]])
    constants(CORRECTION="sequence_tis")
    close(main.sequence_tis(old, SAMPLED, mask), [[2.0], [1.4918246976]])
    constants(CORRECTION_MAX=INF)
    close(main.sequence_tis(old, SAMPLED, mask), products)


def weights_of(method, weights, dtype=torch.float64):
    """What a correction makes of outputs of one token with such π_θold/π_sampled."""
    main.CORRECTION = method
    old = tensor(weights, dtype=dtype).log()[:, None]
    return main.CORRECTIONS[method](old, torch.zeros_like(old), torch.ones(old.shape).bool()).flatten()


def test_icepop_keeps_weights_from_a_half_to_5_and_leaves_out_the_others(constants):
    constants(CORRECTION_MAX=2.0)
    close(
        weights_of("icepop", [0.0, 0.1, 0.499, 0.501, 1.0, 2.5, 4.99, 5.01, 1000.0]),
        [0] * 3 + [0.501, 1, 2.5, 4.99, 0, 0],
    )


@pytest.mark.parametrize("method", ["tis", "sequence_tis"])
def test_tis_limits_high_weights_only(constants, method):
    for highest in (2.0, 5.0):
        constants(CORRECTION_MAX=highest)
        close(weights_of(method, [0.01, 0.9, 1.9, 12.18, 1e300]), [0.01, 0.9, 1.9, highest, highest])


def test_an_infinite_weight_is_recorded_as_such_and_not_as_0(setup):
    state, rollout = setup(CORRECTION="sequence_tis", BETA=0.0)
    older = rollout._replace(logp=torch.where(rollout.mask, rollout.logp - 50.0, 0.0))  # 50 nats a token: e^100 for two
    measured = main.backward(state, older, torch.ones(12), None, None, main.grpo_loss, None)
    assert measured["correction_max"] == INF


def test_a_weight_beyond_the_numbers_of_fp32_is_limited_or_left_out(constants):
    far = torch.full((1, 2), 100.0)
    mask = torch.ones(1, 2).bool()
    for method, expected in (("tis", 2.0), ("sequence_tis", 2.0), ("icepop", 0.0)):
        constants(CORRECTION=method, CORRECTION_MAX=2.0)
        assert (main.CORRECTIONS[method](far, 0 * far, mask) == expected).all()


FIXED_A = double([1, -1, 0.5])
STALE = [
    ({"CORRECTION": "tis", "CORRECTION_MAX": INF}, [0.1420300012, -0.1805122808, 0.0384822796]),  # = on policy
    ({"CORRECTION": "tis", "CORRECTION_MAX": 2.0}, [0.1482284658, -0.1774342143, 0.0292057485]),
    ({"CORRECTION": "icepop"}, None),
    ({"CORRECTION": "none"}, [0.2391092034, -0.4983062983, 0.2591970949]),  # the gradient of no policy
]


@pytest.mark.parametrize("settings, expected", STALE)
def test_importance_weights_correct_for_another_sampling_policy(constants, settings, expected):
    constants(BETA=0.0, **settings)
    if settings["CORRECTION"] == "icepop":  # ∇π(0) + ½ ∇π(2), as the weight of token 1 is 0.24
        policy = torch.softmax(Z, 0)
        expected = policy[0] * (double([1, 0, 0]) - policy) + policy[2] / 2 * (double([0, 0, 1]) - policy)
    close(expected_gradient(1, lambda reward: reward, Z_OLD, FIXED_A), expected)


@pytest.mark.parametrize("method, expected", [
    ("sequence_tis", [-0.0265301001, -0.0363284755, 0.0628585756]),  # exact
    ("tis", [-0.0029088364, 0.0542241396, -0.0513153032]),  # biased, even in its sign
])  # fmt: skip
def test_only_weights_of_whole_outputs_are_exact(constants, method, expected):
    constants(BETA=0.0, CORRECTION=method, CORRECTION_MAX=INF, DENOMINATOR="constant", MAX_NEW_TOKENS=1)
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
    constants(BETA=0.0, OBJECTIVE="dual_clip", DELTA=3.0)
    for ratio, A, J, gradient in ((3.5, -1, -3, 0), (2.5, -1, -2.5, -2.5), (3.5, 1, 1.2, 0), (0.5, -1, -0.8, 0)):
        assert slope(ratio, A) == pytest.approx((J, gradient), abs=1e-12)
    far = tensor([[100.0]])  # exp(100) is inf in fp32
    loss, gradient = loss_and_gradient(far, 0 * far, None, tensor([-1.0]), torch.ones(1, 1).bool())
    assert loss.item() == pytest.approx(3.0) and gradient.item() == 0.0


@pytest.mark.parametrize("objective", main.OBJECTIVES)
def test_a_ratio_beyond_the_numbers_of_fp32_spoils_no_gradient(constants, objective):
    constants(BETA=0.0, OBJECTIVE=objective)
    far = tensor([[100.0]])
    for A in (1.0, -1.0):
        loss, gradient = loss_and_gradient(far, 0 * far, None, tensor([A]), torch.ones(1, 1).bool())
        assert loss.isfinite().all() and gradient.isfinite().all()
        if A > 0 and objective != "cispo":
            assert (loss.item(), gradient.item()) == (pytest.approx(-1.2), 0.0)


def test_a_worked_example_of_gspo_and_luspo_is_a_row_of_constants(constants):
    constants(BETA=0.0, OBJECTIVE="gspo", DENOMINATOR="sequence")
    (logp, mask), old, _, A = WORKED
    # mean log-ratios .2/3 and .2: the first is inside the clip, and so is the second as its Â is below 0
    close(loss_and_gradient(logp, old, None, A, mask)[0], (math.exp(0.2) - math.exp(0.2 / 3)) / 2, 1e-12)
    constants(DENOMINATOR="constant", MAX_NEW_TOKENS=3)
    loss, _ = loss_and_gradient(logp, old, None, A, mask)
    assert 3 * loss.item() == pytest.approx(-0.3820059005, abs=1e-9)  # × the limit of tokens, here a learning rate


@pytest.mark.parametrize("clip, expected", [
    (INF, [0.0, 0.0, 0.0]), (0.2, [-0.0317277978, 0.1097655879, -0.0780377901]), ("cispo", [0.0, 0.0, 0.0]),
])  # fmt: skip
def test_signs_by_chance_move_the_policy_only_through_a_clip_that_depends_on_the_sign(constants, clip, expected):
    constants(BETA=0.0, OBJECTIVE="cispo" if clip == "cispo" else "grpo", EPSILON_LOW=0.2, EPSILON_HIGH=0.2)
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


def batch_with(rollout):
    """A batch around a rollout whose rewards do not matter."""
    return main.Batch(PROBLEMS[:3], rollout, {}, torch.zeros(3, 4))


def drawn(rewards, lengths):
    """A batch of groups with such rewards and lengths."""
    rollout = llms.rollout_from_saved([output(n) for of_q in lengths for n in of_q], len(rewards[0]), "cpu")
    by_name = {"correctness": tensor(rewards)}
    return main.Batch(PROBLEMS[: len(rewards)], rollout, by_name, main.weighted_sum(by_name))


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
    assert batch.metrics == {"refill/draws": 2, "refill/mixed": 0.75}
    state.step = 1
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
        assert batch.metrics == {"refill/draws": draws, "refill/mixed": share}
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
        DATASET="arithmetic:1:2,knights:1:2", STEPS=4, STALENESS=2, CORRECTION="tis", QUESTIONS_PER_STEP=1,
        MAX_PROMPT_TOKENS=400,
    )  # fmt: skip
    rows = train(state)
    asked = [row["question"] for row in report.read_lines(state.run / "samples.jsonl")]
    assert [row["stage"] for row in rows] == ["arithmetic:1"] * 2 + ["knights:1"] * 2
    assert ["knave" in question for question in asked] == [False] * 8 + [True] * 8


def test_outputs_keep_everything_in_plain_form(setup):
    _, rollout = setup()
    again = llms.rollout_from_saved(rollout.saved(), 4, "cpu")
    for name, before, after in zip(rollout._fields, rollout, again):
        assert before == after if name in ("texts", "group_size") else torch.equal(before, after), name


def test_steps_train_on_outputs_of_k_steps_before(setup, monkeypatch, tmp_path):
    real, drawn_at = main.draw, []

    def noted(state, source):
        drawn_at.append(state.step)
        batch = real(state, source)
        batch.metrics["drawn at"] = state.step
        return batch

    monkeypatch.setattr(main, "draw", noted)
    for k, versions in ((0, [0, 1, 2, 3, 4, 5]), (2, [0, 0, 0, 1, 2, 3])):
        state, _ = setup(STEPS=6, STALENESS=k, CORRECTION="tis", COLD_START=0)
        drawn_at.clear()
        rows = train(state, PROBLEMS * 3, tmp_path / str(k))
        assert drawn_at == [row["drawn at"] for row in rows] == versions and not state.queue
        assert [row["questions"] for row in rows] == [3, 6, 9, 12, 15, 18] if k == 0 else [9, 12, 15, 18, 18, 18]


def test_outputs_of_the_policy_itself_have_weight_1_and_stale_ones_do_not(setup, judged, tmp_path):
    for k, gap in ((0, "sampler_gap"), (1, "staleness_gap")):
        state, _ = setup(STEPS=3, STALENESS=k, CORRECTION="tis", LEARNING_RATE=1e-2)
        rows = train(state, PROBLEMS * 2, tmp_path / gap)
        assert all(gap in row for row in rows)
        assert abs(rows[0]["correction"] - 1) < 1e-5 and rows[0]["correction_max"] < 1 + 1e-5
        last = rows[-1]["correction_max"]
        assert last < 1 + 1e-5 if k == 0 else last > 1 + 1e-3


@pytest.mark.parametrize("settings", [{"STALENESS": 2}, {"STALENESS": 1, "REFILL": 2}])
def test_a_checkpoint_holds_the_outputs_that_wait(setup, judged, settings):
    settings = {"STEPS": 6, "CORRECTION": "sequence_tis", **settings}
    state, _ = setup(**settings)
    train(state, PROBLEMS * 9, after_step=lambda state, row: int(state.step == 3))
    save(state)
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
    batch = batch_with(rollout)
    GC = main.from_teacher(state, batch, None, None)
    assert batch.metrics["distill/kl"] > 1e-4
    gradients = []
    for A, ref, loss in (
        (GC, None, main.ppo_loss),
        (torch.zeros(N), llms.log_probs(state.teacher, rollout, 1.0), main.grpo_loss),
    ):
        main.backward(state, rollout, A, None, ref, loss, None)
        gradients.append(gradient(state))
    assert gradients[0].norm() > 1e-3
    assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_distillation_on_a_toy_policy_follows_the_reverse_kl(constants):
    teacher = torch.log_softmax(Z_REF, 0) - torch.log_softmax(Z, 0)
    constants(BETA=0.0)
    close(expected_gradient(1, lambda reward: reward, reward=teacher), [0.3331852833, 0.1529028005, -0.4860880838])


@pytest.mark.parametrize("settings", [{"STALENESS": 1, "CORRECTION": "tis"}, {"REFILL": 2}])
def test_a_cold_start_neither_waits_nor_refills_nor_counts_tokens(setup, judged, settings):
    state, _ = setup(COLD_START=2, STEPS=2, BETA=0.0, **settings)
    rows = train(state, SOLVED * 20)
    assert [(row["questions"], row["tokens"]) for row in rows[:2]] == [(3, 0), (6, 0)]
    assert "refill/draws" not in rows[1] and rows[2]["tokens"] > 0


@pytest.mark.parametrize("method", main.ADVANTAGES)
def test_the_loop_has_the_advantages_that_are_asked_for(setup, judged, monkeypatch, method):
    coin = 0.0 if method in ("pass_at_k", "w_reinforce") else 0.5  # these two take right or wrong alone
    state, _ = setup(ADVANTAGE=method, BETA=0.0, STEPS=1, REWARDS={"correctness": 1.0, "random": coin}, PASS_K=2)
    seen, real = {}, (main.draw, main.update)
    monkeypatch.setattr(main, "draw", lambda *a: seen.setdefault("batch", real[0](*a)))
    monkeypatch.setattr(main, "update", lambda s, r, A, *rest: seen.update(A=A) or real[1](s, r, A, *rest))
    train(state, PROBLEMS)
    by_name = seen["batch"].by_name
    total = by_name["correctness"] + by_name["random"] / 2 if coin else by_name["correctness"]
    expected = main.ADVANTAGES[method](by_name if method == "gdpo" else total)
    assert torch.equal(seen["A"], expected.flatten()) and expected.any()


def test_the_ratio_of_the_kl_is_neither_of_the_sequence_nor_limited(constants):
    (logp, mask), old, ref, _ = WORKED
    zero, found = torch.zeros(2), []
    for objective in ("grpo", "gspo", "dual_clip"):
        constants(BETA=1.0, KL="k3+", OBJECTIVE=objective, DELTA=1.21)
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
    rewards = [{"correctness": [1.0, 0.0]}, {"correctness": [0.0, 1.0], "tests": [0.5, 0.0]}]
    groups = [{"problem": PROBLEMS[i], "outputs": outputs, "rewards": rewards[i]} for i in (0, 1)]
    batch = main.batch_of(state, groups, True, [], {})
    assert {name: x.tolist() for name, x in batch.by_name.items()} == {
        "correctness": [[1.0, 0.0], [0.0, 1.0]],
        "tests": [[0.0, 0.0], [0.5, 0.0]],
    }


@pytest.mark.parametrize("learns", [True, False])
def test_a_checkpoint_holds_all_about_a_batch_that_waits(setup, learns):
    state, _ = setup(GROUP_SIZE=2)
    record = {"reward": 0.0, "length": 4}
    batch = drawn([[1.0, 0.0]], [[3, 5]])
    batch.learns, batch.dropped, batch.metrics = learns, [record], {"refill/draws": 2}
    state.queue = [batch]
    save(state)
    fresh, _ = setup(GROUP_SIZE=2)
    main.load_checkpoint(fresh)
    (read,) = fresh.queue
    assert (read.learns, read.dropped, read.metrics) == (learns, [record], {"refill/draws": 2})
    assert torch.equal(read.rewards, batch.rewards) and read.problems == batch.problems


def test_zero_advantage_is_of_outputs_all_of_whose_tokens_have_none():
    batch = drawn([[1.0, 0.0]], [[2, 2]])
    records = main.batch_records(batch, tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert [record["zero_advantage"] for record in records] == [0.0, 1.0]


def test_clip_shares_of_cispo_count_both_signs(constants):
    one = torch.ones(1, 1)
    for objective, expected in (("grpo", (0, 0)), ("cispo", (1, 1))):
        constants(OBJECTIVE=objective)
        low = main.diagnostics(one * math.log(0.5), 0 * one, None, None, one, one.bool())["clip_low"]
        high = main.diagnostics(one * math.log(1.5), 0 * one, None, None, -one, one.bool())["clip_high"]
        assert (low, high) == expected


def test_clip_shares_of_gspo_are_of_whole_outputs(constants):
    constants(OBJECTIVE="gspo")
    mask = torch.ones(2, 2).bool()
    logp = torch.log(tensor([[1.5, 1 / 1.5], [1.5, 1.5]]))  # the ratios of the outputs are 1 and 1.5
    measured = main.diagnostics(logp, 0 * logp, None, None, torch.ones(2, 1), mask)
    assert (measured["clip_high"] * mask).tolist() == [[False, False], [True, True]]
    assert (measured["ratio_max"] * mask).max().item() == pytest.approx(1.5)


def test_what_is_recorded_of_importance_weights(constants):
    mask = tensor([[True, True], [True, False]])
    old, sampled = double([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2, 2).double()
    for k, name in ((0, "sampler_gap"), (1, "staleness_gap")):
        constants(CORRECTION="sequence_tis", CORRECTION_MAX=2.0, STALENESS=k)
        measured = main.diagnostics(old, old, None, sampled, torch.ones(2, 1), mask)
        mean = {key: (x * mask).sum().item() / 3 for key, x in measured.items()}  # as `backward` adds them up
        largest = {key: (x * mask).max().item() for key, x in measured.items()}
        assert mean["correction_limited"] == pytest.approx(2 / 3)
        assert largest["correction_max"] == pytest.approx(math.e)
        assert mean["correction"] == pytest.approx((2 * math.e + 1 / math.e) / 3)
        assert mean[name] == pytest.approx(2 / 3) and largest[f"{name}_max"] == 1.0


def test_a_recorded_weight_is_that_of_the_old_policy_in_the_second_update_too(constants):
    constants(CORRECTION="tis", CORRECTION_MAX=2.0)
    one = torch.ones(1, 1)
    measured = main.diagnostics(one * 0.5, one * 0.1, None, 0 * one, one, one.bool())
    assert measured["correction"].item() == pytest.approx(math.exp(0.1)) == measured["correction_max"].item()
    assert not measured["correction_limited"].any() and measured["sampler_gap"].item() == pytest.approx(0.1)


def test_the_loss_has_the_dtype_of_the_log_probabilities(constants):
    constants(PASS_K=1)
    logp, mask = torch.full((4, 2), -1.0), torch.ones(4, 2)
    advantages = main.pass_at_k(torch.eye(2)).flatten()
    assert advantages.dtype == torch.float64  # which gives rewards of one group no more than rounding errors
    assert main.grpo_loss(logp, logp, logp, advantages, mask).dtype == torch.float32


@pytest.mark.parametrize("k", [0, 2])
def test_each_steps_seconds_are_its_own(setup, k):
    state, _ = setup(STEPS=4, STALENESS=k, CORRECTION="tis")
    rows = train(state, PROBLEMS * 3)
    assert all(0 < sum(v for n, v in row.items() if n.startswith("seconds/")) <= row["seconds"] for row in rows), rows
    assert sum(row["seconds"] for row in rows) < 60


@pytest.mark.parametrize("loss", [main.grpo_loss, main.ppo_loss])
def test_an_update_weighs_by_what_was_recorded_while_sampling(setup, loss):
    state, rollout = setup(BETA=0.0, CORRECTION="tis", CORRECTION_MAX=10.0)
    A, found = torch.arange(12.0) - 5.5, []
    for shift in (0.0, math.log(2)):
        recorded = rollout._replace(logp=rollout.logp - shift)
        main.backward(state, recorded, A, None, None, loss, None)
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
        distance = llms.log_probs(state.teacher, rollout, 1.0) - llms.log_probs(state.policy, rollout, 1.0)
        distance = distance[rollout.mask]
        batch = batch_with(rollout)
        main.from_teacher(state, batch, None, None)
        extra = batch.metrics
        assert extra["distill/kl"] == pytest.approx(-distance.mean().item(), rel=1e-4)
        assert extra["distill/max"] == pytest.approx(distance.abs().max().item(), rel=1e-4)
        state.policy, state.teacher = state.teacher, state.policy


def test_a_teacher_is_loaded_and_frozen(setup, checkpoint):
    state, _ = setup(ALGORITHM="distill", TEACHER=checkpoint("llama"), BETA=0.0)
    assert not any(weight.requires_grad for weight in state.teacher.parameters()) and not state.teacher.training


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "distill"])
def test_with_every_weight_left_out_nothing_is_learnt(setup, judged, checkpoint, monkeypatch, algorithm):
    real = llms.sample

    def far_from_the_policy(*inputs):
        rollout = real(*inputs)
        return rollout._replace(logp=rollout.logp - 2.0)  # weights of e² = 7.4

    monkeypatch.setattr(llms, "sample", far_from_the_policy)
    for correction, learns in (("none", True), ("icepop", False)):
        state, _ = setup(ALGORITHM=algorithm, BETA=0.0, STEPS=1, CORRECTION=correction)
        if algorithm == "distill":
            state.teacher = llms.load(checkpoint("llama"))[0]
        (row,) = train(state, PROBLEMS, state.run / f"{algorithm}{learns}")
        assert (row["grad_norm"] > 0) == learns and row.get("correction_limited", 1.0) == 1.0


def test_distillation_may_be_weighted_by_what_was_recorded(constants):
    main.choose_settings(*main.parse(["--algorithm", "distill", "--teacher", "tiny", "--correction", "tis"]))


def test_outputs_that_wait_for_fewer_questions_than_there_are_ranks_are_refused(setup, monkeypatch):
    state, _ = setup(GROUP_SIZE=2)
    state.queue = [drawn([[1.0, 0.0]] * n, [[3, 5]] * n) for n in (3, 1, 2)]
    save(state)
    fresh, _ = setup(GROUP_SIZE=2)
    monkeypatch.setattr(llms, "WORLD", 2)
    with pytest.raises(main.SettingsError, match="too many ranks.* only 1 of its questions"):
        main.load_checkpoint(fresh)


def test_a_changed_counter_in_a_checkpoint_is_noticed(setup):
    state, _ = setup()
    save(state)
    path = state.run / "checkpoint" / "state.safetensors"
    data = path.read_bytes()
    assert data.count(b'"step": 0') == 1
    path.write_bytes(data.replace(b'"step": 0', b'"step": 3'))
    with pytest.raises(llms.ModelError, match="damaged"):
        llms.read_checkpoint(state.run / "checkpoint")


# ---- rows of the README --------------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ("--advantage pass_at_k --pass_k 8 --group_size 8 --rewards correctness=1", "--pass_k must be below"),
    ("--advantage pass_at_k", "correctness=1 with --advantage pass_at_k"), ("--pass_k 0", "--pass_k must be at least"),
    ("--advantage w_reinforce --rewards correctness=1,integer=1", "correctness=1 with --advantage w_reinforce"),
    ("--advantage pass_at_k --reward_model x --rewards correctness=1,reward_model=1", "must be correctness=1"),
    ("--advantage w_reinforce --judge x --rewards correctness=1,judge=1", "must be correctness=1"),
    ("--advantage pass_at_k --supervision process --rewards correctness=1", "--advantage must be grpo"),
    ("--advantage maxrl --rewards correctness=1,overlong=1", "a reward can be negative"),
    ("--advantage maxrl --rewards correctness=1,integer=-1", "negative"),
    ("--advantage maxrl --reward_model x", "negative"), ("--advantage batch_std --supervision both", "must be grpo"),
    ("--advantage gdpo --supervision process", "--advantage must be grpo"), ("--advantage mean", "must be one of grpo"),
    ("--advantage maxrl --supervision process", "must be grpo"), ("--advantage rloo --supervision both", "be grpo"),
    ("--advantage pass_at_k --rewards correctness=-1", "--rewards must be correctness=1 with"),
    ("--rewards judge=1", "--rewards must be a table with a weight that can be earned"),
    ("--objective dual_clip --delta 1.1", "--delta must be above 1"), ("--correction_max 0", "must be above 0"),
    ("--correction tis --algorithm rft", "--correction must be none for rft"),
    ("--staleness 1", "--correction must be tis, sequence_tis or icepop"),
    ("--staleness 1 --correction tis --algorithm ppo", "--staleness must be 0 for"),
    ("--refill 3 --algorithm sft", "--refill must be 0 for"), ("--teacher tiny", "--teacher must be empty"),
    ("--advantage rloo --algorithm rft", "--advantage must be grpo for"),
    ("--objective dual_clip --algorithm online_rft", "--objective must be grpo for"),
    ("--correction mis", "one of none, tis"),
    ("--refill 3 --supervision process", "must be 0"), ("--objective sapo", "must be one of grpo, gspo, cispo"),
    ("--algorithm distill --teacher tiny --objective gspo", "--objective must be another than gspo"),
    ("--algorithm ppo --objective gspo", "another than gspo"), ("--supervision both --objective gspo", "another than"),
    ("--algorithm distill", "--teacher must be a model"), ("--denominator groups", "one of sequence, token, group"),
]  # fmt: skip


@pytest.mark.parametrize("flags, says", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(flags, says):
    with pytest.raises(main.SettingsError, match=says):
        main.choose_settings(*main.parse(flags.split()))


# Two questions with eight outputs, of which 1 and 3 are right. The ratios of an output's tokens, and their mean; the
# outputs of the second question are twice as long:
RIGHT_OF_8 = double([[1.0] + [0.0] * 7, [1.0] * 3 + [0.0] * 5])
OF_ONE = [[0.5], [1.0], [1.25], [8.0], [0.5, 2.0], [1.5, 1.0, 1.0], [1.002], [8.0, 0.25, 0.5]]
RATIOS = OF_ONE + [2 * ratios for ratios in OF_ONE]
MEANS = [0.5, 1.0, 1.25, 8.0, 1.0, 1.5 ** (1 / 3), 1.002, 1.0] * 2
U = [1.0, 1.5, 3.0, 8.0, 0.25] * 3 + [1.0]  # π_θold/π_sampled of an output's tokens
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
    "DAPO": (GROUP, clip(0.8, 1.28), "group"),
    "Magistral": (BATCH, clip(0.8, 1.28), "group"),
    "MaxRL": (((7, -1), (5 / 3, -1)), clip(0.8, 1.2), "constant"),
    "pass@k training": (((1, -1 / 7), (0.27735, -0.16641)), clip(0.8, 1.2), "sequence"),
    "GDPO": (((2.56177, -0.36597), (1.25, -0.75)), clip(0.8, 1.2), "sequence"),
    "W-REINFORCE": (((0.1, -1), (0.1, -1)), clip(0.8, 1.2), "constant"),
    "GSPO": (GROUP, clip(1 - 3e-4, 1 + 4e-4), "sequence"),
    "LUSPO": (GROUP, clip(1 - 2e-3, 1 + 2.5e-3), "constant"),
    "CISPO": (GROUP, cap, "group"),
    "dual clip": (GROUP, lambda rho, A: 0 if A < 0 and rho > 3 else clip(0.8, 1.2)(rho, A), "sequence"),
    "DeepSeek-V3.2's KL": (GROUP, clip(0.8, 1.2), "sequence"),
    "TIS": (GROUP, clip(0.8, 1.2), "sequence", lambda u, n: min(u, 2)),
    "sequence TIS": (GROUP, clip(0.8, 1.2), "sequence", lambda u, n: min(u**n, 2)),
    "IcePop": (GROUP, clip(0.8, 1.2), "sequence", lambda u, n: u if 0.5 <= u <= 5 else 0),
    "ScaleRL": (BATCH, cap, "group", lambda u, n: min(u, 5)),
}
# what a row must set beside the gradient: the whole reward, and how outputs are drawn
ALSO = {
    "DAPO": {"REFILL": 10, "MASK_TRUNCATED": True, "REWARDS": {"correctness": 2, "overlong": 1}},
    "Magistral": {"REFILL": 10, "REWARDS": {"correctness": 0.9, "soft_format": 0.1, "overlong": 0.1}},
    "MaxRL": {"REWARDS": {"correctness": 1}},
    "pass@k training": {"REWARDS": {"correctness": 1}},
    "W-REINFORCE": {"REWARDS": {"correctness": 1}},
    "TIS": {"STALENESS": 4},
    "sequence TIS": {"STALENESS": 4},
    "IcePop": {"STALENESS": 4},
    "ScaleRL": {"STALENESS": 8},
}
OFF_POLICY = {"DAPO", "Magistral", "GSPO", "LUSPO", "CISPO", "dual clip"}  # with μ = 1 and no staleness the ratio is 1
README = (Path(main.__file__).parent / "README.md").read_text()
TABLE = README.partition("\n## Ablations")[2].partition("\n## ")[0]
COMMANDS = dict(re.findall(r"^\| \[?([^|(\]]+?)\]?(?: ?\(.+?\))? \| `python main\.py (--.+?)` \|", TABLE, re.MULTILINE))


def test_the_readme_has_sixteen_variants_or_more_and_each_is_tried():
    assert len(COMMANDS) >= 16 and COMMANDS.keys() == ROWS.keys()
    assert TABLE.count("\n| ") == len(COMMANDS) + 1  # the head of the table


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_readme_is_a_whole_command(name):
    main.choose_settings(*main.parse(COMMANDS[name].split()))
    assert main.BETA == (0.04 if "KL" in name else 0) and main.MU == (4 if name in OFF_POLICY else 1)
    for key in ("REFILL", "STALENESS", "MASK_TRUNCATED", "REWARDS"):
        assert getattr(main, key) == ALSO.get(name, {}).get(key, main.CONSTANTS[key].of("tiny"))


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_readme_has_the_gradient_of_its_formula(constants, name):
    main.choose_settings(*main.parse(COMMANDS[name].split()))
    constants(MAX_NEW_TOKENS=4, REWARDS={"correctness": 1.0})
    assert main.GROUP_SIZE == 8
    A = main.outcome_advantages(main.Batch([], None, {"correctness": RIGHT_OF_8}, RIGHT_OF_8)).flatten()
    logp, mask = ragged([[-1.0] * len(ratios) for ratios in RATIOS])
    old = logp - ragged(RATIOS, 1.0)[0].log()
    sampled = old - double(U).log()[:, None]
    logp = logp.clone().requires_grad_()
    main.grpo_loss(logp, old, logp.detach() + math.log(2), A, mask, logp_sampled=sampled).backward()

    by_question, weight, denominator, *importance = ROWS[name]
    right = RIGHT_OF_8.flatten().tolist()
    tokens = [13] * 8 + [26] * 8  # of the output's question
    for i, (ratios, mean, u) in enumerate(zip(RATIOS, MEANS, U)):
        n, A_i = len(ratios), by_question[i // 8][0 if right[i] else 1]
        for t, rho in enumerate(ratios):
            expected = A_i * weight(mean if "SPO" in name and name != "CISPO" else rho, A_i)
            expected *= importance[0](u, n) if importance else 1
            expected += main.BETA * rho * math.log(2)  # of ρ·k3: towards a reference that is twice as likely
            expected /= {"sequence": 16 * n, "group": 2 * tokens[i], "constant": 16 * 4}[denominator]
            close(-logp.grad[i, t], expected, 2e-4 * max(1, abs(expected)))
