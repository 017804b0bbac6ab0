"""Table 10 (§5.2.1): each method's data source and gradient coefficient, and PPO's and DPO's parts by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

import evaluator
import llms
import main
import rldatasets
from conftest import PROBLEMS

# ---- a toy policy: the next of five tokens depends on the last one only --------------------------------------------

V = 5
QUESTION = [0, 1]
OUTPUTS = [[2, 3, 4], [3, 4], [1, 1, 2, 4], [4]]  # four outputs of one question
RIGHT = [1.0, 0.0, 0.0, 1.0]


class OneHot(nn.Module):
    """A trunk whose hidden state is the last token itself."""

    device = torch.device("cpu")

    def forward(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, V).double())


class Toy(nn.Module):
    """log π(b | … a) = log softmax(W[:, a])_b, in float64."""

    device = torch.device("cpu")

    def __init__(self, seed):
        super().__init__()
        self.base_model, self.head = OneHot(), nn.Linear(V, V, bias=False, dtype=torch.float64)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(seed))

    def get_output_embeddings(self):
        return self.head


@pytest.fixture
def toy(constants, monkeypatch):
    """A policy, a reference elsewhere, and four outputs of one question with their rewards."""
    constants(
        MAX_GRAD_NORM=1e9, TOKEN_BUDGET=100, BETA=0.5, BETA_DPO=0.5, MU=1, DENOMINATOR="sequence", GAMMA=1.0, LAMBDA=1.0
    )
    ids, attention, mask = llms.batch([QUESTION] * 4, OUTPUTS, "cpu")
    rollout = llms.Rollout(ids, attention, mask, None, None, torch.zeros(4).bool(), [""] * 4)
    policy, reference = Toy(0), Toy(1)
    state = main.State(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), None, reference=reference)
    rewards, by_name = tensor([RIGHT], dtype=torch.float64), {"correctness": RIGHT}
    rollout = rollout._replace(logp=main.score(policy, rollout))
    logp_ref = main.score(reference, rollout).double()
    return state, main.Outputs([{}], rollout, rewards, by_name, None, logp_ref)


def update_gradient(state, outputs, algorithm):
    """The gradient on W that one update of a method's row of Table 10 makes."""
    _, coefficients, loss_function = main.TABLE_10[algorithm]
    A, seen = coefficients(state, outputs), {}
    state.optimizer.step = lambda: seen.update(W=state.policy.head.weight.grad.clone())
    main.update(state, outputs.rollout, A, outputs.logp_old, outputs.logp_ref, loss_function, outputs.targets)
    return seen["W"]


def score_function(W, coefficients):
    """1/N Σ_i 1/|o_i| Σ_t GC_{i,t} ∇_W log π(o_{i,t} | …), written out: ∂log π(b|a)/∂W[:, a] is onehot(b) - π(·|a)."""
    total = torch.zeros(V, V, dtype=torch.float64)
    for output, row in zip(OUTPUTS, coefficients):
        for last, token, coefficient in zip([QUESTION[-1], *output], output, row):
            pull = -torch.softmax(W[:, last], 0)
            pull[token] += 1
            total[:, last] += coefficient * pull / len(output) / len(OUTPUTS)
    return total


def log_ratios(state):
    """log π_ref/π_θ of each token of each output."""
    W, W_ref = (torch.log_softmax(model.head.weight.detach(), 0) for model in (state.policy, state.reference))
    moves = [list(zip([QUESTION[-1], *output], output)) for output in OUTPUTS]
    return [[(W_ref - W)[token, last].item() for last, token in row] for row in moves]


A2 = 0.8660254037844386 / (1 + 1e-4 / 0.5773502691896258)  # of rewards 1, 0, 0, 1 with 1e-4 added to their std
TABLE = {  # the gradient coefficient of token t of output i, in the words of the paper
    "sft": lambda i, t, d: 1,
    "rft": lambda i, t, d: RIGHT[i],
    "online_rft": lambda i, t, d: RIGHT[i],
    "ppo": lambda i, t, d: RIGHT[i] + 0.5 * sum(d[i][t:]),  # V = 0: all that is still to come, - β log π_θ/π_ref
    "grpo": lambda i, t, d: (A2 if RIGHT[i] else -A2) + 0.5 * (math.exp(d[i][t]) - 1),  # eq. (21)
}


@pytest.mark.parametrize("budget, batches", [(100, 1), (13, 2), (7, 4)])
@pytest.mark.parametrize("algorithm", TABLE)
def test_at_the_old_policy_the_gradient_is_the_coefficient_times_the_score_function(
    toy, constants, algorithm, budget, batches
):
    state, outputs = toy
    constants(TOKEN_BUDGET=budget)
    assert len(main.micro_batches(outputs.rollout, range(4))) == batches
    state.critic = llms.Critic(state.policy) if algorithm == "ppo" else None
    if algorithm == "ppo":
        state.critic.value_head.double()
    d = log_ratios(state)
    coefficients = [[TABLE[algorithm](i, t, d) for t in range(len(output))] for i, output in enumerate(OUTPUTS)]
    expected = score_function(state.policy.head.weight.detach(), coefficients)
    assert_close(update_gradient(state, outputs, algorithm), -expected, atol=1e-7, rtol=0)


def test_the_gradient_of_dpo_is_the_derivative_of_equation_12(toy):
    state, outputs = toy  # right: 0 and 3, wrong: 1 and 2
    gradient = update_gradient(state, outputs, "dpo")
    W = state.policy.head.weight.detach().clone().requires_grad_()
    log_pi, log_ref = torch.log_softmax(W, 0), torch.log_softmax(state.reference.head.weight.detach(), 0)

    def mean_log_ratio(output):
        moves = list(zip(output, [QUESTION[-1], *output]))
        return sum(log_pi[move] - log_ref[move] for move in moves) / len(moves)

    pairs = [(0, 1), (3, 2)]
    margins = [0.5 * (mean_log_ratio(OUTPUTS[i]) - mean_log_ratio(OUTPUTS[j])) for i, j in pairs]
    J = sum(-torch.log(1 + torch.exp(-margin)) for margin in margins) / 2
    J.backward()
    assert_close(gradient, -W.grad, atol=1e-7, rtol=0)
    assert outputs.measured["dpo/loss"] == pytest.approx(-J.item(), abs=1e-6) and outputs.measured["dpo/pairs"] == 2


@pytest.mark.parametrize("denominator", ["sequence", "token", "constant"])
def test_any_split_into_micro_batches_gives_the_critic_and_the_policy_the_same_gradient(toy, constants, denominator):
    state, outputs = toy
    constants(DENOMINATOR=denominator)
    state.critic = llms.Critic(state.policy)
    state.critic.value_head.double()
    nn.init.normal_(state.critic.value_head.weight, generator=torch.Generator().manual_seed(2))
    results = []
    for budget in (100, 13, 7):
        constants(TOKEN_BUDGET=budget)
        seen = {}
        state.optimizer.step = lambda seen=seen: seen.update(V=state.critic.value_head.weight.grad.clone())
        A = main.ppo_advantages(state, outputs)
        measured = main.update(state, outputs.rollout, A, None, None, main.ppo_loss, outputs.targets)
        results.append((seen["V"], measured["value_loss"], measured["loss"]))
        state.critic.value_head.weight.grad = None  # the optimizer of this test does not know the critic
    for V, value_loss, loss in results:
        assert_close(V, results[0][0], atol=1e-12, rtol=0)
        assert value_loss == pytest.approx(results[0][1], abs=1e-6) and loss == pytest.approx(results[0][2], abs=1e-6)
    assert results[0][0].norm() > 1e-3


def test_the_critic_learns_from_outputs_without_advantage_too(toy, constants):
    state, outputs = toy
    constants(BETA=0.0)
    state.critic = llms.Critic(state.policy)
    state.critic.value_head.double()
    state.optimizer = torch.optim.SGD([*state.policy.parameters(), *state.critic.parameters()], lr=1.0)
    values, returns = torch.zeros(outputs.rollout.mask.shape), torch.ones(outputs.rollout.mask.shape)
    main.update(state, outputs.rollout, torch.zeros(4), None, None, main.ppo_loss, (values, returns))
    assert state.critic.value_head.bias.item() > 0  # from V = 0 up to the returns, 1


def test_dpo_without_a_right_and_a_wrong_output_learns_nothing(toy):
    state, outputs = toy
    for verdict in ([1.0] * 4, [0.0] * 4):
        outputs.by_name = {"correctness": verdict}
        assert not update_gradient(state, outputs, "dpo").any() and outputs.measured["dpo/pairs"] == 0


def test_an_output_that_is_masked_is_in_no_pair_of_dpo(toy, constants):
    constants(MASK_TRUNCATED=True)
    state, outputs = toy  # right: 0 and 3, wrong: 1 and 2
    outputs.rollout = outputs.rollout._replace(truncated=tensor([False, True, False, False]))
    coefficients = main.preference(state, outputs)
    assert coefficients[0] > 0 and coefficients[2] == -coefficients[0] and not coefficients[[1, 3]].any()


def test_dpo_pairs_outputs_of_the_same_question_only(toy, constants):
    state, outputs = toy
    outputs.rewards = outputs.rewards.view(2, 2)  # two questions: rows 0, 1 and rows 2, 3
    outputs.by_name = {"correctness": [1.0, 1.0, 0.0, 1.0]}
    coefficients = main.preference(state, outputs)
    assert coefficients[:2].tolist() == [0.0, 0.0] and coefficients[3] > 0 and coefficients[2] == -coefficients[3]


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_a_pair_of_dpo_by_hand(constants):
    constants(BETA_DPO=0.5)
    ref = tensor([[-1.0, -2.0], [-1.0, 0.0]])
    logp = (ref + tensor([[0.4, 0.0], [-0.2, 9.9]])).requires_grad_()  # means over |o⁺| = 2, |o⁻| = 1: 0.2 and -0.2
    mask = tensor([[True, True], [True, False]])
    objective, margin = main.dpo_objective(logp, ref, mask, tensor([[0, 1]]))
    assert margin.item() == pytest.approx(0.2) and -objective.item() == pytest.approx(0.598139, abs=1e-6)
    objective.backward()  # β σ(-0.2) / |o| = 0.5 · 0.450166 / 2 and / 1
    assert_close(logp.grad, tensor([[0.1125415, 0.1125415], [-0.225083, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "gamma, discount, expected",
    [
        (1.0, 1.0, [[0.5, 0.5, 0.5], [1.5, 0, 0]]),  # the return, 1 and 2, less the value
        (1.0, 0.0, [[0.0, 0.0, 0.5], [1.5, 0, 0]]),  # δ_t alone
        (0.5, 0.5, [[-0.28125, -0.125, 0.5], [1.5, 0, 0]]),
    ],
)
def test_gae_by_hand(constants, gamma, discount, expected):
    constants(GAMMA=gamma, LAMBDA=discount)
    rewards, values = tensor([[0.0, 0, 1], [2, 7, 7]]), torch.full((2, 3), 0.5)
    mask = tensor([[True, True, True], [True, False, False]])
    assert_close(main.gae(rewards, values, mask), tensor(expected))


def test_with_no_values_and_one_reward_at_the_end_ppos_advantage_is_the_reward(toy, constants):  # GRPO.md 1.5
    constants(BETA=0.0)
    state, outputs = toy
    state.critic = llms.Critic(state.policy)
    state.critic.value_head.double()
    outputs.rewards = tensor([[3.0, -1.0, 0.5, 2.0]], dtype=torch.float64)
    advantages = main.ppo_advantages(state, outputs)
    assert_close(advantages, outputs.rewards.view(4, 1) * outputs.rollout.mask)
    values, returns = outputs.targets
    assert not values.any() and torch.equal(returns, advantages)


def test_ppos_value_loss_by_hand(constants):  # arXiv 1707.06347: from 0 a value may go to ± 0.2
    constants(EPSILON_VALUE=0.2, DENOMINATOR="sequence")
    values = tensor([[0.1], [0.5], [-0.5]]).requires_grad_()
    one = torch.ones(3, 1)
    loss = main.value_loss(values, torch.zeros(3, 1), one, one.bool(), 1, 3)
    loss.backward()
    assert loss.item() == pytest.approx(0.81 / 2 + 0.64 / 2 + 2.25 / 2)
    assert_close(values.grad, tensor([[-0.9], [0.0], [-1.5]]))  # 0.5 has gone far enough, -0.5 went the wrong way


def test_ppo_clips_as_grpo_does_and_has_no_kl_in_its_loss(constants):
    constants(BETA=0.7)
    logp = torch.log(tensor([[1.5, 0.5, 1.1]])).requires_grad_()
    zeros, mask = torch.zeros(1, 3), torch.ones(1, 3).bool()
    loss = main.ppo_loss(logp, zeros, None, tensor([[1.0, -1.0, 2.0]]), mask, 1, 3)
    loss.backward()
    assert -loss.item() == pytest.approx((1.2 - 0.8 + 2.2) / 3)
    assert_close(logp.grad, tensor([[0.0, 0.0, -2.2 / 3]]))


def test_against_the_others_an_output_is_measured_as_rloo_does(constants):  # T6: 1 - 0, and 0 - 1/3
    constants(BASELINE="others", SCALE_BY_STD=False)
    assert_close(main.group_advantages(tensor([[1.0, 0, 0, 0]])), tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))


# ---- in the loop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """A rule that a random model meets half of the time: the right answers are those with an even number of letters."""
    real = evaluator.rewards
    even = lambda text, problem: real(text, problem) | {"correctness": float(len(text) % 2 == 0)}
    monkeypatch.setattr(evaluator, "rewards", even)


def test_the_data_source_is_that_of_the_table(setup, judged, tmp_path, monkeypatch):
    asked = []
    real = llms.sample
    monkeypatch.setattr(llms, "sample", lambda model, *how: asked.append(model) or real(model, *how))
    sources = {"sft": None, "rft": "reference", "dpo": "reference", "online_rft": "policy", "ppo": "policy"}
    for algorithm, source in (sources | {"grpo": "policy"}).items():
        state, _ = setup(ALGORITHM=algorithm, STEPS=2)
        asked.clear()
        (tmp_path / algorithm).mkdir()
        main.train(state, main.questions_of(state), [], tmp_path / algorithm, set())
        assert asked == [getattr(state, source)] * 2 if source else not asked
        first, second = main.read_lines(tmp_path / algorithm / "metrics.jsonl")
        assert (first["sampler_gap"] is None) == (source != "policy")
        assert first["grad_norm"] > 0 and second["skipped_updates"] == 0
        if source == "policy":  # nowhere else can the KL of the policy be estimated
            assert first["kl"] < 1e-6 < second["kl"]  # the reference stays behind
        else:
            assert first["kl"] is second["kl"] is second["entropy"] is None
        assert ("value_loss" in first) == (algorithm == "ppo")


def test_sft_learns_the_worked_solution_with_its_end_token(setup, tmp_path):
    state, _ = setup(ALGORITHM="sft", STEPS=8, LEARNING_RATE=5e-3, MAX_NEW_TOKENS=64, QUESTIONS_PER_STEP=1)
    problem = {"kind": "math", "question": "1 + 1?", "answer": "2", "solution": "1 + 1 = 2"}
    prompt = llms.encode(state.tokenizer, rldatasets.prompt(problem))
    rollout = main.dataset_outputs(state, [problem], [prompt])
    ids = rollout.ids[0, len(prompt) :].tolist()
    assert state.tokenizer.decode(ids[:-1]) == rldatasets.written_out(problem)
    assert ids[-1] == state.tokenizer.eos_token_id and rollout.mask.all() and not rollout.truncated.any()
    before = main.score(state.policy, rollout).sum()
    main.train(state, iter([problem] * 8), [], tmp_path, set())
    rows = main.read_lines(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(-before.item() / len(ids), rel=1e-4)  # the mean of - log π
    assert rows[-1]["loss"] < rows[0]["loss"] - 2 and rows[0]["accuracy"] == 1.0
    main.MAX_NEW_TOKENS = 5
    cut = main.dataset_outputs(state, [problem], [prompt])
    assert cut.mask.sum() == 5 and cut.truncated.all() and cut.ids[0, len(prompt) :].tolist() == ids[:5]


@pytest.mark.parametrize("algorithm, rank", [("ppo", 0), ("ppo", 2), ("grpo", 2), ("rft", 0), ("dpo", 2)])
def test_a_checkpoint_of_every_kind_of_run_goes_on_bit_for_bit(setup, judged, tmp_path, monkeypatch, algorithm, rank):
    how = {"ALGORITHM": algorithm, "LORA_RANK": rank, "STEPS": 2, "ITERATIONS": 2, "SAVE_EVERY": 3}
    real = main.save_checkpoint  # each in a folder of its own: that of step 3 is from within the second iteration
    monkeypatch.setattr(main, "save_checkpoint", lambda state, run: real(state, run / str(state.step)))
    for step in (0, 3, 4):
        (tmp_path / str(step)).mkdir()
    (whole, _), (resumed, _) = setup(**how), setup(**how)
    main.train(whole, iter(PROBLEMS * 20), [], tmp_path, set())
    main.load_checkpoint(resumed, tmp_path / "3")
    assert resumed.step == 3
    main.train(resumed, iter((PROBLEMS * 20)[resumed.position :]), [], tmp_path, set())
    assert main.read_lines(tmp_path / "metrics.jsonl")[-1]["grad_norm"] > 0
    ours, theirs = whole.tensors(), resumed.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_second_iteration_moves_the_reference_and_not_the_critic(setup):
    state, rollout = setup(ALGORITHM="ppo", LORA_RANK=2)
    for layer in llms.lora_layers(state.policy):
        nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.normal_(state.critic.value_head.weight)
    before = main.score(state.critic, rollout, llms.Critic.token_values)
    old, state.reference = main.score(state.reference, rollout), llms.frozen_copy(state.policy)
    assert torch.equal(main.score(state.reference, rollout), main.score(state.policy, rollout))
    assert (main.score(state.reference, rollout) - old).abs().max() > 1e-3
    assert torch.equal(main.score(state.critic, rollout, llms.Critic.token_values), before) and before.any()


@pytest.mark.parametrize("rank", [0, 2])
def test_the_critic_has_no_trained_weight_in_common_with_the_policy(setup, rank):
    state, _ = setup(ALGORITHM="ppo", LORA_RANK=rank)
    ours = {id(weight) for weight in state.policy.parameters() if weight.requires_grad}
    theirs = {id(weight) for weight in state.critic.parameters() if weight.requires_grad}
    assert ours and theirs and not ours & theirs
    assert {id(weight) for weight in state.trained()} == ours | theirs
