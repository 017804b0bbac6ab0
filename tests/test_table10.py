"""Table 10 (§5.2.1): each method's data source and gradient coefficient, and PPO's and DPO's parts by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import PROBLEMS, save, tensors, train
from torch import nn, tensor
from torch.testing import assert_close

import evaluator
import llms
import main
import rldatasets

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
    dtype = torch.float64

    def __init__(self, seed):
        super().__init__()
        self.base_model, self.head = OneHot(), nn.Linear(V, V, bias=False, dtype=torch.float64)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(seed))

    def get_output_embeddings(self):
        return self.head


class Step:
    """A toy policy, a reference elsewhere, four outputs of one question with their verdicts, and steps on them."""

    def __init__(self, monkeypatch, tmp_path):
        self.monkeypatch, self.metrics = monkeypatch, []  # the latter of each step
        ids, attention, mask = llms.batch([QUESTION] * 4, OUTPUTS, "cpu")
        self.rollout = llms.Rollout(ids, attention, mask, None, None, torch.zeros(4).bool(), [""] * 4, group_size=4)
        policy, optimizer = Toy(0), torch.optim.SGD
        self.state = main.State(policy, None, tmp_path, optimizer(policy.parameters(), lr=1.0), reference=Toy(1))
        llms.limit_memory(100, 100)
        self.rollout = self.rollout._replace(logp=llms.log_probs(policy, self.rollout, main.TEMPERATURE))
        self.rewards = tensor([RIGHT])

    def batch(self):
        """The four outputs with their rewards, as they were drawn."""
        problems = [{"solution": "worked"}] * len(self.rewards)
        return main.Batch(problems, self.rollout, {"correctness": self.rewards}, self.rewards)

    def gradient(self, algorithm):
        """The gradient on W in a whole step of this method, whose outputs and rewards are given."""
        seen, problems = {}, self.batch().problems
        self.state.optimizer.step = lambda: seen.update(W=self.state.policy.head.weight.grad.clone())
        self.monkeypatch.setattr(main, "next_questions", lambda state: (problems, [QUESTION] * len(self.rewards)))
        self.monkeypatch.setattr(llms, "sample", lambda *inputs: self.rollout)
        self.monkeypatch.setattr(llms, "rollout_from_texts", lambda *inputs: self.rollout)
        self.monkeypatch.setattr(rldatasets, "written_out", lambda problem: "worked")
        self.monkeypatch.setattr(main, "score", lambda *inputs: {"correctness": self.rewards})
        if algorithm == "grpo":
            batch, _, _ = main.grpo_step(self.state)
        else:
            batch, _, _ = main.other_step(self.state, main.TABLE_10[algorithm])
        self.metrics.append(batch.metrics)
        return seen["W"]


@pytest.fixture
def toy(constants, monkeypatch, tmp_path):
    constants(
        MAX_GRAD_NORM=1e9, BETA=0.5, BETA_DPO=0.5, MU=1, DENOMINATOR="sequence", GAMMA=1.0, LAMBDA=1.0, GROUP_SIZE=4,
        REWARDS={"correctness": 1.0}, SCHEDULE="constant",
    )  # fmt: skip
    return Step(monkeypatch, tmp_path)


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
    constants(ALGORITHM=algorithm)
    llms.limit_memory(budget, 100)
    assert len(list(llms.micro_batches(toy.rollout, range(4)))) == batches
    if algorithm == "ppo":
        toy.state.critic = llms.Critic(toy.state.policy)
        toy.state.critic.value_head.double()
    d = log_ratios(toy.state)
    coefficients = [[TABLE[algorithm](i, t, d) for t in range(len(output))] for i, output in enumerate(OUTPUTS)]
    expected = score_function(toy.state.policy.head.weight.detach(), coefficients)
    assert_close(toy.gradient(algorithm), -expected, atol=1e-7, rtol=0)


def test_the_gradient_of_dpo_is_the_derivative_of_equation_12(toy):
    gradient = toy.gradient("dpo")  # right: 0 and 3, wrong: 1 and 2
    W = toy.state.policy.head.weight.detach().clone().requires_grad_()
    log_pi, log_ref = torch.log_softmax(W, 0), torch.log_softmax(toy.state.reference.head.weight.detach(), 0)

    def mean_log_ratio(output):
        moves = list(zip(output, [QUESTION[-1], *output]))
        return sum(log_pi[move] - log_ref[move] for move in moves) / len(moves)

    pairs = [(0, 1), (3, 2)]
    margins = [0.5 * (mean_log_ratio(OUTPUTS[i]) - mean_log_ratio(OUTPUTS[j])) for i, j in pairs]
    J = sum(-torch.log(1 + torch.exp(-margin)) for margin in margins) / 2
    J.backward()
    assert_close(gradient, -W.grad, atol=1e-7, rtol=0)
    extra = toy.metrics[0]
    assert extra["dpo/loss"] == pytest.approx(-J.item(), abs=1e-6) and extra["dpo/pairs"] == 2


@pytest.mark.parametrize("denominator", ["sequence", "token", "group", "constant"])
def test_any_split_into_micro_batches_gives_the_critic_and_the_policy_the_same_gradient(toy, constants, denominator):
    constants(DENOMINATOR=denominator, ALGORITHM="ppo")
    state = toy.state
    state.critic = llms.Critic(state.policy)
    state.critic.value_head.double()
    nn.init.normal_(state.critic.value_head.weight, generator=torch.Generator().manual_seed(2))
    logp_ref = llms.log_probs(state.reference, toy.rollout, main.TEMPERATURE)
    results = []
    for budget in (100, 13, 7):
        llms.limit_memory(budget, 100)
        seen = {}
        state.optimizer.step = lambda seen=seen: seen.update(V=state.critic.value_head.weight.grad.clone())
        batch = toy.batch()
        A = main.ppo_advantages(state, batch, None, logp_ref)
        measured = main.update(state, toy.rollout, A, None, None, main.ppo_loss, batch.targets)
        results.append((seen["V"], measured["value_loss"], measured["loss"]))
        state.critic.value_head.weight.grad = None  # the optimizer of this test does not know the critic
    for V, value_loss, loss in results:
        assert_close(V, results[0][0], atol=1e-12, rtol=0)
        assert value_loss == pytest.approx(results[0][1], abs=1e-6) and loss == pytest.approx(results[0][2], abs=1e-6)
    assert results[0][0].norm() > 1e-3


def test_the_critic_learns_from_outputs_without_advantage_too(toy, constants):
    constants(BETA=0.0)
    state = toy.state
    state.critic = llms.Critic(state.policy)
    state.critic.value_head.double()
    state.optimizer = torch.optim.SGD([*state.policy.parameters(), *state.critic.parameters()], lr=1.0)
    values, returns = torch.zeros(toy.rollout.mask.shape), torch.ones(toy.rollout.mask.shape)
    main.update(state, toy.rollout, torch.zeros(4), None, None, main.ppo_loss, (values, returns))
    assert state.critic.value_head.bias.item() > 0  # from V = 0 up to the returns, 1


def with_critic(toy):
    """A toy state whose optimizer also trains a critic, and what PPO's update needs: V before it, and the returns."""
    state = toy.state
    state.critic = llms.Critic(state.policy)
    state.critic.value_head.double()
    state.optimizer = torch.optim.SGD([*state.policy.parameters(), *state.critic.parameters()], lr=1.0)
    shape = toy.rollout.mask.shape
    return state, (torch.zeros(shape), torch.ones(shape))


def test_the_gradient_of_the_critic_is_clipped_by_itself_and_that_of_the_policy_is_recorded(toy, constants):
    seen = {}
    for limit in (1e9, 0.01):
        constants(BETA=0.0, MAX_GRAD_NORM=limit)
        state, targets = with_critic(toy)

        def step(state=state, limit=limit):
            for name, network in (("policy", state.policy), ("critic", state.critic)):
                seen[name, limit] = torch.cat([weight.grad.flatten() for weight in network.parameters()]).norm().item()

        state.optimizer.step = step
        A = tensor([2.0, -2.0, -2.0, 2.0])
        measured = main.update(state, toy.rollout, A, None, None, main.ppo_loss, targets)
        assert measured["grad_norm"] == pytest.approx(seen["policy", 1e9])  # as it was before the clipping
    assert 0.02 < seen["policy", 1e9] and 0.02 < seen["critic", 1e9] != pytest.approx(seen["policy", 1e9])
    assert seen["policy", 0.01] == pytest.approx(0.01, rel=1e-3) == seen["critic", 0.01]


def test_a_gradient_of_the_critic_that_is_not_finite_leaves_out_the_update(toy, constants):
    constants(BETA=0.0)
    state, targets = with_critic(toy)
    state.critic.value_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = [weight.clone() for network in (state.policy, state.critic) for weight in network.parameters()]
    A = tensor([1.0, -1.0, -1.0, 1.0])
    measured = main.update(state, toy.rollout, A, None, None, main.ppo_loss, targets)
    assert measured["skipped_updates"] == 1 and measured["grad_norm"] > 0
    after = [weight for network in (state.policy, state.critic) for weight in network.parameters()]
    assert all(map(torch.equal, before, after))


def test_dpo_without_a_right_and_a_wrong_output_learns_nothing(toy):
    for verdict in ([1.0] * 4, [0.0] * 4):
        toy.rewards = tensor([verdict])
        assert not toy.gradient("dpo").any() and toy.metrics[-1] == {"dpo/pairs": 0}


def test_an_output_that_is_masked_is_in_no_pair_of_dpo(toy, constants):
    constants(MASK_TRUNCATED=True)  # right: 0 and 3, wrong: 1 and 2
    toy.rollout = toy.rollout._replace(truncated=tensor([False, True, False, False]))
    GC = main.preference(toy.state, toy.batch(), None, None)
    assert GC[0] > 0 and GC[2] == -GC[0] and not GC[[1, 3]].any()


def test_dpo_pairs_outputs_of_the_same_question_only(toy):
    toy.rewards = tensor([[1.0, 1.0], [0.0, 1.0]])  # two questions: rows 0, 1 and rows 2, 3
    GC = main.preference(toy.state, toy.batch(), None, None)
    assert GC[:2].tolist() == [0.0, 0.0] and GC[3] > 0 and GC[2] == -GC[3]


def test_right_is_the_right_answer_whatever_else_is_rewarded(toy):
    batch = toy.batch()  # right: 0 and 3
    batch.rewards = tensor([[2.5, 0.5, 0.5, 3.0]])
    assert main.is_right(toy.state, batch, None, None).tolist() == RIGHT
    assert [rows.tolist() for rows in main.right_and_wrong(batch)] == [[0, 3], [1, 2]]


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_a_pair_of_dpo_by_hand(toy, monkeypatch):
    # means of log π_θ/π_ref over |o⁺| = 2 and |o⁻| = 1 tokens: 0.2 and -0.2, so Δ = 0.5 · 0.4 = 0.2
    toy.rollout = toy.rollout._replace(mask=tensor([[True, True], [True, False]]), truncated=tensor([False, False]))
    toy.rewards = tensor([[1.0, 0.0]])
    logp = {toy.state.policy: tensor([[0.4, 0.0], [-0.2, 0.0]]), toy.state.reference: torch.zeros(2, 2)}
    monkeypatch.setattr(llms, "log_probs", lambda model, rollout, temperature: logp[model])
    batch = toy.batch()
    GC = main.preference(toy.state, batch, None, None)
    extra = batch.metrics
    assert extra["dpo/margin"] == pytest.approx(0.2) and extra["dpo/loss"] == pytest.approx(0.598139, abs=1e-6)
    # β σ(-0.2) = 0.5 · 0.450166, times N/P = 2
    assert GC.tolist() == pytest.approx([0.450166, -0.450166], abs=1e-6)


def test_dpo_has_a_beta_of_its_own(toy, constants):
    coefficients = []
    for beta, beta_dpo in ((0.5, 0.5), (9.0, 0.5), (0.5, 0.25)):
        constants(BETA=beta, BETA_DPO=beta_dpo)
        coefficients.append(main.preference(toy.state, toy.batch(), None, None))
    assert torch.equal(coefficients[0], coefficients[1]) and (coefficients[0] - coefficients[2]).abs().max() > 0.01


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


def test_with_no_values_and_one_reward_at_the_end_ppos_advantage_is_the_reward(toy, constants):
    constants(BETA=0.0)
    toy.state.critic = llms.Critic(toy.state.policy)
    toy.state.critic.value_head.double()
    toy.rewards = tensor([[3.0, -1.0, 0.5, 2.0]])
    batch = toy.batch()
    A = main.ppo_advantages(toy.state, batch, None, None)
    values, returns = batch.targets
    assert_close(A, (toy.rewards.view(4, 1) * toy.rollout.mask).to(A))
    assert not values.any() and torch.equal(returns, A)


def test_the_critic_learns_the_reward_and_the_advantage_is_what_it_did_not_expect(toy, constants):
    constants(BETA=0.0)
    toy.state.critic = llms.Critic(toy.state.policy)
    toy.state.critic.value_head.double()
    nn.init.constant_(toy.state.critic.value_head.bias, 0.25)  # V of every token
    batch = toy.batch()
    A = main.ppo_advantages(toy.state, batch, None, None)
    values, returns = batch.targets
    mask, rewards = toy.rollout.mask, tensor(RIGHT)[:, None]
    assert_close(values, (0.25 * mask).to(A))
    assert_close(returns, (rewards * mask).to(A))
    assert_close(A, ((rewards - 0.25) * mask).to(A))


def test_the_kl_in_ppos_rewards_is_that_of_the_old_policy_where_it_is_known(toy, constants):
    constants(BETA=0.5)
    toy.state.critic = llms.Critic(toy.state.policy)
    toy.state.critic.value_head.double()
    toy.rewards = torch.zeros(1, 4)
    mask, recorded = toy.rollout.mask, toy.rollout.logp
    to_come = mask.flip(1).cumsum(1).flip(1) * mask  # the tokens from t on
    for logp_old, kl in ((None, 1.0), (recorded + 1.0 * mask, 2.0)):
        A = main.ppo_advantages(toy.state, toy.batch(), logp_old, recorded - 1.0 * mask)
        assert_close(A, (-0.5 * kl * to_come).to(A))


def test_ppos_value_loss_by_hand():  # arXiv 1707.06347: from 0 a value may go to ± 0.2
    values = tensor([[0.1], [0.5], [-0.5]]).requires_grad_()
    one = torch.ones(3, 1)
    loss = main.value_loss(values, torch.zeros(3, 1), one, one.bool(), one)
    loss.backward()
    assert loss.item() == pytest.approx(0.81 / 2 + 0.64 / 2 + 2.25 / 2)
    assert_close(values.grad, tensor([[-0.9], [0.0], [-1.5]]))  # 0.5 has gone far enough, -0.5 went the wrong way


def test_ppo_clips_as_grpo_does_and_has_no_kl_in_its_loss(constants):
    constants(BETA=0.7)
    logp = torch.log(tensor([[1.5, 0.5, 1.1]])).requires_grad_()
    zeros, mask = torch.zeros(1, 3), torch.ones(1, 3).bool()
    loss = main.ppo_loss(logp, zeros, None, tensor([[1.0, -1.0, 2.0]]), mask, tensor([[3.0]]))
    loss.backward()
    assert -loss.item() == pytest.approx((1.2 - 0.8 + 2.2) / 3)
    assert_close(logp.grad, tensor([[0.0, 0.0, -2.2 / 3]]))


def test_against_the_others_an_output_is_measured_as_rloo_does():  # 1 - 0, and 0 - 1/3
    assert_close(main.rloo(tensor([[1.0, 0, 0, 0]])).float(), tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))


# ---- in the loop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """A rule that a random model meets half of the time: the right answers are those with an even number of letters."""
    real = evaluator.rewards
    even = lambda text, problem: real(text, problem) | {"correctness": float(len(text) % 2 == 0)}
    monkeypatch.setattr(evaluator, "rewards", even)


def test_the_data_source_is_that_of_the_table(setup, judged, tmp_path, monkeypatch):
    sampled = []
    real = llms.sample
    monkeypatch.setattr(llms, "sample", lambda model, *inputs: sampled.append(model) or real(model, *inputs))
    sources = {"sft": None, "rft": "reference", "dpo": "reference", "online_rft": "policy", "ppo": "policy"}
    for algorithm, source in (sources | {"grpo": "policy"}).items():
        state, _ = setup(ALGORITHM=algorithm, STEPS=2)
        sampled.clear()
        first, second = train(state, run=tmp_path / algorithm)
        assert sampled == [getattr(state, source)] * 2 if source else not sampled
        assert ("sampler_gap" in first) == (source == "policy")
        assert first["grad_norm"] > 0 and second["skipped_updates"] == 0
        if source == "policy":  # nowhere else can the KL of the policy be estimated
            assert first["kl"] < 1e-6 < second["kl"]  # the reference stays behind
        else:
            assert not {"kl", "entropy", "sampler_gap"} & (first.keys() | second.keys())
        assert ("value_loss" in first) == (algorithm == "ppo")


def test_sft_learns_the_worked_solution_with_its_end_token(setup):
    state, _ = setup(ALGORITHM="sft", STEPS=8, LEARNING_RATE=5e-3, MAX_NEW_TOKENS=64, QUESTIONS_PER_STEP=1)
    problem = {"kind": "math", "question": "1 + 1?", "answer": "2", "solution": "1 + 1 = 2"}
    prompt = llms.encode(state.tokenizer, rldatasets.prompt(problem))
    solution = [rldatasets.written_out(problem)]
    rollout = llms.rollout_from_texts(state.policy, state.tokenizer, [prompt], solution, main.MAX_NEW_TOKENS)
    ids = rollout.ids[0, len(prompt) :].tolist()
    assert state.tokenizer.decode(ids[:-1]) == solution[0]
    assert ids[-1] == state.tokenizer.eos_token_id and rollout.mask.all() and not rollout.truncated.any()
    before = llms.log_probs(state.policy, rollout, main.TEMPERATURE).sum()
    rows = train(state, [problem] * 8)
    assert rows[0]["loss"] == pytest.approx(-before.item() / len(ids), rel=1e-4)  # the mean of - log π
    assert rows[-1]["loss"] < rows[0]["loss"] - 2 and rows[0]["accuracy"] == 1.0
    cut = llms.rollout_from_texts(state.policy, state.tokenizer, [prompt], solution, 5)
    assert cut.mask.sum() == 5 and cut.truncated.all() and cut.ids[0, len(prompt) :].tolist() == ids[:5]
    state.step = 0
    with pytest.raises(main.RunError, match="no worked solution"):
        train(state, [problem | {"solution": ""}])


def test_sft_counts_the_tokens_of_every_step(setup):
    state, _ = setup(ALGORITHM="sft", STEPS=3, MAX_NEW_TOKENS=5)
    rows = train(state, SOLVED * 3)
    assert [row["tokens"] for row in rows] == [15, 30, 45]  # 3 solutions a step, each cut at 5 tokens


@pytest.mark.parametrize("algorithm", ["online_rft", "ppo", "distill"])
def test_the_second_update_of_a_rollout_has_ratios_to_the_policy_that_sampled_it(setup, judged, algorithm):
    state, _ = setup(ALGORITHM=algorithm, STEPS=1, MU=2)
    state.teacher = llms.frozen_copy(state.policy)
    nn.init.normal_(state.teacher.get_output_embeddings().weight)  # another policy
    (row,) = train(state)
    assert row["grad_norm"] > 0 and row["ratio_max"] > 1.0001


@pytest.mark.parametrize("algorithm, distance", [("dpo", "dpo/margin"), ("distill", "distill/kl")])
def test_two_models_are_compared_at_the_same_temperature(setup, judged, algorithm, distance):
    state, _ = setup(ALGORITHM=algorithm, STEPS=1, TEMPERATURE=0.7)
    state.teacher = llms.frozen_copy(state.policy)
    (row,) = train(state)  # policy, reference and teacher are the same
    assert row["grad_norm"] > 0 if algorithm == "dpo" else row["grad_norm"] == 0
    assert row[distance] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("algorithm, rank", [("ppo", 0), ("ppo", 2), ("grpo", 2), ("rft", 0), ("dpo", 2)])
def test_a_checkpoint_of_every_kind_of_run_goes_on_bit_for_bit(setup, judged, tmp_path, algorithm, rank):
    settings = {"ALGORITHM": algorithm, "LORA_RANK": rank, "STEPS": 2, "ITERATIONS": 2}
    (whole, _), (resumed, _) = setup(**settings), setup(**settings)

    def save_step_3(state, metrics):  # from within the second iteration
        if state.step == 3:
            save(state)
        return 0

    train(whole, PROBLEMS * 20, after_step=save_step_3)
    main.load_checkpoint(resumed)
    assert resumed.step == 3
    rows = train(resumed, (PROBLEMS * 20)[resumed.position :])
    assert rows[-1]["grad_norm"] > 0
    ours, theirs = tensors(whole), tensors(resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- cold start: SFT before Algorithm 1 ----------------------------------------------------------------------------

SOLVED = [problem | {"solution": f"It is <<{i}+{i}={2 * i}>>{2 * i}."} for i, problem in enumerate(PROBLEMS)]


def cold_start_at(monkeypatch, rate):
    """Let the cold start have this learning rate, after its warm-up; what comes after it keeps its own."""
    real = main.learning_rate

    def learning_rate(number):
        if number >= main.COLD_START:
            return real(number)
        return rate * (real(number) / (2e-4 if main.LORA_RANK else 2e-5))

    monkeypatch.setattr(main, "learning_rate", learning_rate)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_cold_start_is_a_run_of_sft_and_then_a_run_from_its_model(setup, monkeypatch, rank):
    cold_start_at(monkeypatch, 3e-3)
    both, _ = setup(COLD_START=3, STEPS=2, LORA_RANK=rank)
    rows = train(both, SOLVED * 20)
    sft, _ = setup(COLD_START=0, ALGORITHM="sft", LEARNING_RATE=3e-3, STEPS=3, LORA_RANK=rank)
    train(sft, SOLVED * 20)
    then, _ = setup(ALGORITHM="grpo", LEARNING_RATE=1e-3, STEPS=2, LORA_RANK=rank, BETA=0.04)
    then.policy.load_state_dict(sft.policy.state_dict())
    then.reference = llms.frozen_copy(then.policy)
    llms.reset_adam(then.optimizer)
    then.stream = iter((SOLVED * 20)[9:])
    for row in rows[3:]:
        llms.start_clock()
        learnt = main.grpo_step(then)
        then.step += 1
        again = main.record_step(then, *learnt)
        assert {key: again[key] for key in ("reward", "loss", "kl", "grad_norm")} == {
            key: row[key] for key in ("reward", "loss", "kl", "grad_norm")
        }
    assert all(torch.equal(a, b) for a, b in zip(both.policy.parameters(), then.policy.parameters()))


def test_a_cold_start_has_one_update_a_step_and_its_own_learning_rate_and_its_rows_tell_of_no_samples(setup):
    state, _ = setup(COLD_START=3, STEPS=2, MU=2, WARMUP=1)
    rows = train(state, SOLVED * 20)
    assert [(row["step"], row["updates"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 5), (5, 7)]
    assert [row["lr"] for row in rows[:3]] == [1e-5, 2e-5, 2e-5] and rows[3]["lr"] == (0.5e-3 + 1e-3) / 2
    assert [row["stage"] for row in rows] == ["cold start"] * 3 + ["arithmetic"] * 2
    assert "accuracy" not in rows[2] and rows[2]["loss"] > 0 and "kl" not in rows[2]
    assert {"accuracy", "reward", "approach/guessed"} <= rows[3].keys()


def test_a_signal_in_the_cold_start_ends_the_run_after_that_step(setup):
    state, _ = setup(COLD_START=2, STEPS=2)
    state.stream = iter(SOLVED * 20)
    assert main.train(state, lambda state, metrics: 15 if state.step == 1 else 0) == 15
    assert state.step == 1


def test_the_critic_begins_as_the_policy_after_the_cold_start(setup):
    state, _ = setup(ALGORITHM="ppo", COLD_START=2, STEPS=1, LEARNING_RATE=0.0)
    loaded = [weight.clone() for weight in state.policy.base_model.parameters()]
    train(state, SOLVED * 20)  # the step of PPO itself changes nothing at this learning rate
    trunk, policy = list(state.critic.trunk.parameters()), list(state.policy.base_model.parameters())
    assert all(map(torch.equal, trunk, policy)) and not all(map(torch.equal, policy, loaded))


def test_a_cold_start_has_the_questions_of_the_first_stage(setup):
    settings = {"DATASET": "arithmetic:1:2,knights:1:2", "STEPS": 4, "MAX_PROMPT_TOKENS": 400}
    state, _ = setup(COLD_START=3, **settings)
    assert [main.stage_of(step)[1] for step in range(7)] == ["arithmetic:1"] * 5 + ["knights:1"] * 2


def test_the_reference_is_the_model_after_the_cold_start(setup, monkeypatch):
    cold_start_at(monkeypatch, 1e-2)
    state, _ = setup(COLD_START=3, STEPS=2, REWARDS=main.REWARDS | {"random": 2.0})
    rows = train(state, SOLVED * 20)
    assert rows[3]["kl"] == 0.0 and rows[4]["kl"] > 0


def test_a_first_step_without_right_answers_is_told_after_a_cold_start_too(setup, capsys):
    state, _ = setup(COLD_START=2, STEPS=2)
    train(state, SOLVED * 20)
    out = capsys.readouterr().out
    assert out.count("hardly an output") == 1 and out.index("step    2") < out.index("hardly an output")


@pytest.mark.parametrize("rank, saved_at", [(0, 1), (0, 2), (0, 3), (0, 4), (2, 2), (2, 3)])
def test_a_run_with_a_cold_start_goes_on_bit_for_bit_from_within_it_and_after_it(setup, monkeypatch, rank, saved_at):
    cold_start_at(monkeypatch, 1e-2)
    settings = {"COLD_START": 2, "STEPS": 2, "ITERATIONS": 2, "LORA_RANK": rank}
    (whole, _), (resumed, _) = setup(**settings), setup(**settings)

    def save_once(state, metrics):
        if state.step == saved_at:
            save(state)
        return 0

    whole.reference = resumed.reference = None  # as at the start of the program
    train(whole, SOLVED * 20, after_step=save_once)
    main.load_checkpoint(resumed)
    assert resumed.step == saved_at and (resumed.reference is None) == (saved_at <= 2)
    rows = train(resumed, (SOLVED * 20)[resumed.position :])
    assert rows[-1]["step"] == 6 and rows[-1]["grad_norm"] > 0
    ours, theirs = tensors(whole), tensors(resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_second_iteration_moves_the_reference_and_not_the_critic(setup):
    state, rollout = setup(ALGORITHM="ppo", LORA_RANK=2)
    for layer in llms.lora_layers(state.policy):
        nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.normal_(state.critic.value_head.weight)
    before = llms.values(state.critic, rollout)
    old = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
    state.reference = llms.frozen_copy(state.policy)
    moved = llms.log_probs(state.reference, rollout, main.TEMPERATURE)
    assert torch.equal(moved, llms.log_probs(state.policy, rollout, main.TEMPERATURE))
    assert (moved - old).abs().max() > 1e-3
    assert torch.equal(llms.values(state.critic, rollout), before) and before.any()


@pytest.mark.parametrize("rank", [0, 2])
def test_the_critic_has_no_trained_weight_in_common_with_the_policy(setup, rank):
    state, _ = setup(ALGORITHM="ppo", LORA_RANK=rank)
    ours = {id(weight) for weight in state.policy.parameters() if weight.requires_grad}
    theirs = {id(weight) for weight in state.critic.parameters() if weight.requires_grad}
    assert ours and theirs and not ours & theirs
    assert {id(weight) for group in state.optimizer.param_groups for weight in group["params"]} == ours | theirs
