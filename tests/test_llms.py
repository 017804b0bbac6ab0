"""The model of llms.py: what is sampled is what is scored, and both are what tests/reference.py computes plainly."""

import json
import math
import resource
import shutil
import subprocess
import sys
import threading
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
import transformers
from conftest import SHAPE, tensors

import llms
import main
import rldatasets

FAMILIES = ("qwen2", "qwen3", "llama")
EVERYTHING = 10**9  # a cache budget that never binds


def prompts(tokenizer, lengths=(3, 9, 5)):
    """Prompts of ragged lengths, made of ordinary tokens."""
    return [[5 + (7 * i + n) % 200 for i in range(n)] for n in lengths]


MANY_ENDS = list(range(20, 60))  # so many that outputs end at ragged lengths


def draw(model, tokenizer, asked=None, n=4, longest=12, temperature=1.0, seed=0, cache_tokens=EVERYTHING):
    generator = torch.Generator().manual_seed(seed)
    model.generation_config.eos_token_id = MANY_ENDS
    llms.LIMITS["cache_tokens"] = cache_tokens
    return llms.sample(model, tokenizer, asked or prompts(tokenizer), n, longest, temperature, generator)


def draw_plainly(model, tokenizer, asked=None, n=4, longest=12, temperature=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model.generation_config.eos_token_id = MANY_ENDS
    return reference.sample(model, tokenizer, asked or prompts(tokenizer), n, longest, temperature, generator)


class Scripted(torch.nn.Module):
    """A model that says given tokens: row r, whose prompt has 10 (r + 1) tokens, says script[r] (vocabulary 20)."""

    def __init__(self, script, ends):
        super().__init__()
        self.script, self.config = script, transformers.PretrainedConfig()
        self.generation_config = transformers.GenerationConfig(eos_token_id=ends)
        self.device, self.base_model = torch.device("cpu"), self.says

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.eye(20))

    def says(self, input_ids, position_ids, layout, **_):
        x = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        layout.attention(0, x, x, x, 1.0)  # as each layer of a model does
        hidden = torch.zeros(*position_ids.shape, 20)
        for row, column in position_ids.ne(-1).nonzero().tolist():
            prompt, place = divmod(int(position_ids[row, column]) + 1, 10)
            if prompt:  # else nothing is predicted from this token of the prompt
                hidden[row, column, self.script[prompt - 1][min(place, 4)]] = 100.0
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)


class Words:
    """A tokenizer for Scripted: a token is written as its number."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def test_the_mask_runs_to_the_first_end_token_and_includes_it():
    script = [[5, 6, 1, 0, 0], [1, 5, 5, 5, 5], [5, 6, 7, 8, 1], [5, 6, 7, 8, 9], [5, 1, 1, 1, 1], [5, 0, 6, 1, 0]]
    asked = [[3] * 10 * (row + 1) for row in range(6)]
    out = llms.sample(Scripted(script, 1), Words(), asked, 1, 5, 1.0, torch.Generator())
    assert ["".join(str(int(m)) for m in row) for row in out.mask] == [
        "11100",
        "10000",
        "11111",
        "11111",
        "11000",
        "11110",
    ]
    assert out.truncated.tolist() == [False, False, False, True, False, False]
    assert out.texts == ["5 6", "", "5 6 7 8", "5 6 7 8 9", "5", "5 0 6"]
    out = llms.sample(Scripted([[5, 9, 1, 0, 0]], [1, 9]), Words(), asked[:1], 1, 5, 1.0, torch.Generator())
    assert out.mask.tolist() == [[True, True]] and not out.truncated.any()  # any of several end tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_is_recorded_while_sampling_is_what_is_scored(checkpoint, family, temperature):
    model, tokenizer = llms.load(checkpoint(family))
    out = draw(model, tokenizer, n=8, longest=20, temperature=temperature)
    assert out.mask.sum(1).unique().numel() > 1  # ragged
    scored = llms.token_logprobs(model, out.ids, out.attention, out.mask, temperature)
    assert (scored - out.logp).abs().max() < 1e-5
    wrong = llms.token_logprobs(model, out.ids, out.attention, out.mask, 1.7 - temperature)
    assert (wrong - out.logp).abs().max() > 1e-2  # at the other temperature it is another policy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_scores_like_one_unpadded_forward_per_token(checkpoint, family):
    model, tokenizer = llms.load(checkpoint(family))
    out = draw(model, tokenizer, n=2, longest=8)
    scored, plain = llms.token_logprobs(model, out.ids, out.attention, out.mask, 1.0), reference.plain(model)
    for i in range(len(out.ids)):
        row = out.ids[i][out.attention[i].bool()]
        length = int(out.mask[i].sum())
        for t in range(length):
            prefix = row[: len(row) - length + t]
            logits = plain(prefix[None]).logits[0, -1]
            assert abs(torch.log_softmax(logits, -1)[row[len(prefix)]] - scored[i, t]) < 1e-5


def test_the_scores_of_greedy_tokens_come_from_the_plain_forward_pass(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    asked, plain = prompts(tokenizer), reference.plain(model)
    out = llms.sample(model, tokenizer, asked, 1, 10, 0.0)
    for prompt, row, mask in zip(asked, out.ids, out.mask):
        ids, said = torch.tensor([prompt]), row[-len(mask) :][mask].tolist()
        expected = []
        while len(expected) < len(said):
            expected.append(int(plain(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([expected[-1:]])], 1)
        assert said == expected


def padded(asked, said, left, right, fill):
    """A batch with more padding than it needs, and any token in the padding."""
    ids, attention, mask = llms.batch(asked, said, "cpu")
    N = len(ids)
    attention = torch.cat([torch.zeros(N, left, dtype=int), attention, torch.zeros(N, right, dtype=int)], 1)
    ids = torch.cat([torch.full((N, left), fill), ids, torch.full((N, right), fill)], 1)
    ids[attention == 0] = fill
    return ids, attention, torch.cat([mask, torch.zeros(N, right, dtype=bool)], 1)


@pytest.mark.parametrize("family, dtype, tolerance", [("gpt2", torch.float64, 1e-12), ("qwen2", torch.float32, 2e-5)])
def test_padding_changes_neither_scores_nor_gradient(checkpoint, family, dtype, tolerance):
    model, _ = llms.load(checkpoint(family))
    model.to(dtype)
    asked, said = [[7, 2, 9], [8, 7, 6, 5, 0]], [[9, 8, 7, 2], [2]]  # 2 ends, 0 pads: both may stand inside a prompt
    results = []
    for left, right, fill in ((0, 0, 0), (4, 1, 2), (6, 9, 17)):
        model.zero_grad()
        logp = llms.token_logprobs(model, *padded(asked, said, left, right, fill), 1.0)
        logp.sum().backward()
        results.append((logp[:, :4], [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert (logp[:, 4:] == 0).all() and logp[1, 1:].eq(0).all()
    for logp, gradients in results[1:]:
        assert (logp - results[0][0]).abs().max() < tolerance
        assert all((a - b).abs().max() < 100 * tolerance for a, b in zip(gradients, results[0][1]))


def test_rows_of_a_rollout_lose_only_padding(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    out = draw(model, tokenizer)
    scored = llms.token_logprobs(model, out.ids, out.attention, out.mask, 1.0)
    for rows in ([0], [3, 0], [5, 6, 7], list(range(12))):
        ids, attention, mask = out.rows(rows)
        assert attention.any(0).all() and mask.any(0).all()  # no column of padding is left
        part = llms.token_logprobs(model, ids, attention, mask, 1.0)
        assert (part - scored[rows, : part.shape[1]]).abs().max() < 2e-5


def test_scoring_in_chunks_equals_scoring_at_once(checkpoint, monkeypatch):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    out, results = draw(model, tokenizer), []
    for logits_at_once in (2**24, 3 * model.config.vocab_size, 1):
        monkeypatch.setitem(llms.LOGITS_AT_ONCE, "cpu", logits_at_once)
        model.zero_grad()
        logp = llms.token_logprobs(model, out.ids, out.attention, out.mask, 0.7)
        logp.sum().backward()
        results.append((logp.detach(), model.get_output_embeddings().weight.grad.clone()))
    for logp, gradient in results[1:]:
        assert (logp - results[0][0]).abs().max() < 1e-6
        assert (gradient - results[0][1]).abs().max() < 1e-6 * results[0][1].abs().max() + 1e-5


def sample_tokens(logits, n, temperature):
    """n tokens from the same logits, their log-probabilities and entropies: 3 × [n]."""
    uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    return (x.squeeze(1) for x in llms.sample_token(logits.expand(n, -1), temperature, uniform))


def test_every_token_of_97_nearly_equal_ones_is_reached():  # no top-k, no top-p
    torch.manual_seed(0)
    tokens, _, _ = sample_tokens(torch.randn(97) * 0.1, 4000, 1.0)
    assert tokens.unique().numel() == 97


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_tokens_come_as_often_as_the_tempered_softmax_says(temperature):
    logits, n = torch.tensor([0.2, -0.5, 1.1, 0.0, -2.0]), 100_000
    tokens, _, _ = sample_tokens(logits, n, temperature)
    expected = n * torch.softmax(logits.double() / temperature, 0)
    # chi squared of 4 degrees of freedom, p = 1e-4
    assert ((tokens.bincount(minlength=5) - expected) ** 2 / expected).sum() < 23.5


def test_the_log_probability_at_temperature_is_the_softmax_of_divided_logits():
    tokens, logp, _ = sample_tokens(torch.tensor([0.2, -0.5, 1.1]), 50, 0.7)
    expected = {0: -1.6064, 1: -2.6064, 2: -0.3207}  # log of e^(z/0.7) over its sum, by hand
    assert logp.tolist() == pytest.approx([expected[token] for token in tokens.tolist()], abs=1e-4)
    assert tokens.unique().numel() == 3


def test_the_expected_score_is_zero_only_at_the_temperature_that_sampled(checkpoint):  # no drift
    model, _ = llms.load(checkpoint("llama"))
    every = [[token] for token in range(model.config.vocab_size)]
    ids, attention, mask = llms.batch([[7, 3, 9]] * len(every), every, "cpu")

    def expected_gradient(sampled_at, scored_at):
        model.zero_grad()
        with torch.no_grad():
            pi = llms.token_logprobs(model, ids, attention, mask, sampled_at).exp()
        assert pi.sum() == pytest.approx(1.0, abs=1e-4)
        (pi * llms.token_logprobs(model, ids, attention, mask, scored_at)).sum().backward()
        return model.get_output_embeddings().weight.grad.norm()

    assert expected_gradient(0.7, 0.7) < 1e-4
    assert expected_gradient(0.7, 1.0) > 1e-2


def test_the_entropy_of_a_uniform_choice_is_log_v_and_of_a_sure_one_is_zero():
    sure = torch.zeros(97)
    sure[3] = 1000.0
    three_to_one = torch.tensor([math.log(3.0), 0.0])
    for logits, expected in ((torch.zeros(97), 4.574710979), (sure, 0.0), (three_to_one, 0.5623351)):
        _, _, entropy = sample_tokens(logits, 3, 1.0)
        assert entropy.tolist() == pytest.approx([expected] * 3, abs=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_a_token_without_probability_is_never_selected(uniform):
    logits = torch.tensor([[-math.inf, 0.1, 0.2, 0.3, -math.inf, -math.inf]])
    token, logp, _ = llms.sample_token(logits, 1.0, torch.tensor([[uniform]]))
    assert 1 <= token.item() <= 3 and logp.isfinite().all()


def test_the_same_seed_gives_the_same_samples_and_the_outputs_of_a_group_differ(checkpoint):
    model, tokenizer = llms.load(checkpoint("llama"))
    first, again, other = draw(model, tokenizer), draw(model, tokenizer), draw(model, tokenizer, seed=1)
    assert first.texts == again.texts != other.texts
    assert all(len(set(first.texts[i : i + 4])) > 1 for i in (0, 4, 8))


def test_a_small_cache_budget_loses_no_output(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    asked = prompts(tokenizer, (3, 9, 5, 4, 8))
    at_once = llms.sample(model, tokenizer, asked, 2, 6, 0.0)
    llms.LIMITS["cache_tokens"] = 60  # two prompts at once
    in_turns = llms.sample(model, tokenizer, asked, 2, 6, 0.0)
    assert at_once.texts == in_turns.texts
    assert torch.equal(at_once.ids, in_turns.ids) and torch.equal(at_once.mask, in_turns.mask)


def test_out_of_memory_while_sampling_changes_no_output(checkpoint, monkeypatch, capsys):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    generator, make, sizes = torch.Generator().manual_seed(0), llms.decoding_batch, []
    expected = draw(model, tokenizer)

    def limited(model, size, ends):
        sizes.append(size.slots)
        decoding = make(model, size, ends)
        if size.slots > 4:
            decoding.decode = out_of_memory  # some outputs have begun
        return decoding

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llms, "decoding_batch", limited)
    monkeypatch.setattr(llms, "LEAST_LIMIT", 17)
    llms.LIMITS["cache_tokens"] = 12 * 21
    out = llms.sample(model, tokenizer, prompts(tokenizer), 4, 12, 1.0, generator)
    assert sizes == [12, 4] and llms.LIMITS["cache_tokens"] == 6 * 21
    assert "--cache_tokens 252; trying again with 126" in capsys.readouterr().out
    assert llms.LIMITS["copies_kept"] == 1  # there was nothing to forget
    assert torch.equal(out.ids, expected.ids)  # the random numbers were drawn once
    after = torch.Generator().manual_seed(0)
    torch.rand(12, 12, generator=after)
    assert torch.equal(generator.get_state(), after.get_state())
    llms.LIMITS["cache_tokens"] = 17
    monkeypatch.setattr(llms, "decoding_batch", lambda *_: out_of_memory())
    with pytest.raises(torch.OutOfMemoryError):
        llms.sample(model, tokenizer, prompts(tokenizer), 4, 12, 1.0, generator)


def test_a_limit_is_not_halved_below_the_least():
    seen = []

    @llms.retry_with_less_memory("token_budget")
    def compute():
        seen.append(llms.LIMITS["token_budget"])
        raise torch.OutOfMemoryError("CUDA out of memory")

    llms.LIMITS["token_budget"] = 3000
    with pytest.raises(torch.OutOfMemoryError):
        compute()
    assert seen == [3000, 1500, 1024]


def test_what_only_sampling_keeps_goes_before_a_limit_does_and_stays_away(checkpoint, monkeypatch):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    on_meta, _ = llms.load(checkpoint("qwen2"))
    monkeypatch.setitem(llms.SHARDED, model, None)  # now a copy is sampled from, as on a GPU
    monkeypatch.setitem(llms.SKELETONS, model, on_meta)
    rollout = draw(model, tokenizer)
    seen = []

    @llms.retry_with_less_memory("token_budget")
    def update():
        seen.append((len(llms.DECODING), llms.LIMITS["token_budget"]))
        if llms.DECODING:
            raise torch.OutOfMemoryError("CUDA out of memory")

    llms.LIMITS["token_budget"] = 3000
    update()
    assert seen == [(1, 3000), (0, 3000)]
    again = draw(model, tokenizer)
    assert again.texts == rollout.texts and len(llms.DECODING) == 1
    update()  # the copy goes before it can be in the way
    assert seen[2:] == [(0, 3000)] and llms.LIMITS["copies_kept"] == 0
    llms.limit_memory(10**9, 10**9)
    assert llms.LIMITS["copies_kept"] == 1


def test_each_model_keeps_the_copy_that_samples_and_only_its_cache_is_made_again(checkpoint, monkeypatch):
    models = []
    for _ in range(2):
        model, tokenizer = llms.load(checkpoint("qwen2"))
        model.generation_config.eos_token_id = MANY_ENDS
        monkeypatch.setitem(llms.SHARDED, model, None)
        monkeypatch.setitem(llms.SKELETONS, model, llms.load(checkpoint("qwen2"))[0])
        models.append(model)
    copies, make = [], llms.copy_to_sample
    monkeypatch.setattr(llms, "copy_to_sample", lambda model: copies.append(model) or make(model))
    kept = []
    for longest in (9, 28, 9):  # tokens of the longest prompt: the cache needs 21 or 40 columns
        for model in models:
            llms.sample(model, tokenizer, prompts(tokenizer, (longest, 3)), 4, 12, 0.0)
            kept.append(llms.DECODING[model])
    assert copies == models
    assert [decoding.size.columns for decoding in kept] == [21, 21, 40, 40, 40, 40]
    assert kept[2:4] == kept[4:]  # its recorded graphs can be used again
    assert kept[0] is not kept[2] and kept[0].model is kept[2].model


def test_a_rank_with_fewer_micro_batches_goes_on_with_dummy_ones(checkpoint, monkeypatch):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    out = draw(model, tokenizer)
    llms.LIMITS["token_budget"] = 60
    batches = list(llms.micro_batches(out, range(12)))
    assert all(weight == 1.0 for _, weight in batches) and len(batches) > 2
    assert all(out.rows(rows)[0].numel() <= 60 or len(rows) == 1 for rows, _ in batches)
    expected = llms.log_probs(model, out, 1.0)
    monkeypatch.setattr(llms, "gather", lambda rows: [*rows, len(batches) + 2])
    assert list(llms.micro_batches(out, range(12))) == [*batches, ([0], 0.0), ([0], 0.0)]
    assert torch.equal(llms.log_probs(model, out, 1.0), expected)
    assert list(llms.micro_batches(out, [])) == [([0], 0.0)] * (len(batches) + 2)


def test_a_micro_batch_may_have_exactly_the_budget():
    rollout = llms.Rollout(*llms.batch([[7, 7]] * 4, [[8, 8, 8]] * 4, "cpu"))
    for budget, batches in ((20, [[0, 1, 2, 3]]), (19, [[0, 1, 2], [3]]), (10, [[0, 1], [2, 3]])):  # rows of 5 tokens
        llms.LIMITS["token_budget"] = budget
        assert llms.split_rows(rollout, range(4)) == batches


def test_the_numbers_of_all_ranks_become_one_dict(monkeypatch):
    monkeypatch.setattr(llms, "gather", lambda rows: [*rows, ("loss", 2.0), ("kl", 5.0)])
    assert llms.merged_over_ranks({"loss": 1.0, "gap": 3.0}, sum) == {"loss": 3.0, "gap": 3.0, "kl": 5.0}
    assert llms.merged_over_ranks({"loss": 1.0}, max) == {"loss": 2.0, "kl": 5.0}
    assert llms.merged_over_ranks({}, max) == {"loss": 2.0, "kl": 5.0}


def test_the_ids_that_are_trained_on_are_the_ids_that_were_drawn():  # never decoded and encoded again
    script = [[5, 6, 7, 8, 9]]
    out = llms.sample(Scripted(script, 1), Words(), [[3] * 10], 1, 5, 1.0, torch.Generator())
    assert out.ids[0, -5:].tolist() == script[0]


def test_a_given_text_that_is_too_long_is_cut_where_its_tokens_are(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))  # each digit is a token
    for limit, text, truncated in ((3, "123", True), (5, "12345", True), (6, "12345", False)):  # 6 with the end token
        out = llms.rollout_from_texts(model, tokenizer, [[7, 3]] * 2, ["12345", "1"], limit)
        assert out.texts == [text, "1"] and out.truncated.tolist() == [truncated, False]
        assert out.mask.sum(1).tolist() == [limit, 2]


def test_a_mark_is_put_on_the_token_that_reaches_its_position(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    out = llms.rollout_from_texts(model, tokenizer, [[7, 3]] * 2, ["12345", "6"], 12)
    numbers, marked = llms.at_tokens(tokenizer, out, [[(2, 0.5), (5, -1.0)], []])
    assert numbers.tolist() == [[0, 0.5, 0, 0, -1.0, 0], [0] * 6]  # tokens "2" and "5", not the end token
    assert marked.tolist() == [[False, True, False, False, True, False], [False] * 6]


def test_one_output_has_two_slots_of_the_cache(checkpoint, monkeypatch):  # a GPU computes one row less exactly
    model, tokenizer = llms.load(checkpoint("qwen2"))
    sizes, make = [], llms.decoding_batch
    monkeypatch.setattr(llms, "decoding_batch", lambda model, size, ends: sizes.append(size) or make(model, size, ends))
    out = draw(model, tokenizer, [[7, 3]], n=1)
    assert sizes == [(1, 2, 14, 12)] and len(out.texts) == 1


def test_the_checkpoints_own_sampling_settings_are_not_inherited(checkpoint, tmp_path):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    before = draw(model, tokenizer).texts
    model.generation_config.update(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0)
    assert draw(model, tokenizer).texts == before


def test_packed_rows_are_imitated_as_if_each_stood_alone(checkpoint):
    model, _ = llms.load(checkpoint("qwen2"))
    rows, logp = [([5, 6, 7], [8, 9]), ([3], [4, 4, 2, 1]), ([9, 9, 9, 9], [7])], []
    for prompt, completion in rows:
        log_pi = reference.plain(model)(torch.tensor([prompt + completion])).logits[0].log_softmax(1)
        logp += [log_pi[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
    assert llms.imitation_loss(model, rows).item() == pytest.approx(-sum(logp) / 7, abs=1e-5)


@pytest.mark.parametrize("family, norms", [("qwen2", 5), ("qwen3", 9), ("llama", 5)])
def test_the_norms_of_the_copy_that_samples_are_torchs_own_where_their_numbers_are_the_same(checkpoint, family, norms):
    model, _ = llms.load(checkpoint(family))
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(torch.rand_like(weight) + 0.5 if "norm" in name else 1.0)
        model.model.layers[1].input_layernorm.forward = lambda x: x  # another norm, as some families have
        before = reference.plain(model)(torch.arange(9)[None]).logits
        llms.use_fused_norms(model)
        after = reference.plain(model)(torch.arange(9)[None]).logits
    assert sum(type(module) is torch.nn.RMSNorm for module in model.modules()) == norms - 1
    assert type(model.model.layers[1].input_layernorm) is not torch.nn.RMSNorm
    assert [name for name, _ in model.named_parameters()] == names
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_dropout_is_off_whatever_the_checkpoint_says(checkpoint):
    model, _ = llms.load(checkpoint("gpt2"))  # saved with dropout 0.5
    model.train()
    inputs = (*llms.batch([[7, 3, 9]], [[9, 8, 7, 2]], "cpu"), 1.0)
    assert torch.equal(llms.token_logprobs(model, *inputs), llms.token_logprobs(model, *inputs))


def test_every_end_token_of_the_generation_config_ends_an_output(checkpoint):
    model, tokenizer = llms.load(checkpoint("llama"))
    model.generation_config.eos_token_id = [11, 12]
    assert llms.end_tokens(model, tokenizer) == sorted({11, 12, tokenizer.eos_token_id})


def test_a_prompt_uses_the_chat_template_or_plain_paragraphs(checkpoint):
    _, tokenizer = llms.load(checkpoint("qwen2"))
    messages = rldatasets.prompt({"question": "How many eggs?"})
    text = tokenizer.decode(llms.encode(tokenizer, messages))
    assert text.startswith("<|im_start|>system\nRespond") and text.endswith("<|im_start|>assistant\n")
    tokenizer.chat_template = None
    example = {"question": "1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}  # it ends as an output does
    shown = tokenizer.decode(llms.encode(tokenizer, rldatasets.prompt({"question": "How many eggs?"}, [example])))
    assert "</answer><|im_end|>\n\nHow many eggs?" in shown and shown.count("<|im_end|>") == 1
    plain = tokenizer.decode(llms.encode(tokenizer, messages))
    assert plain.startswith("Respond") and plain.endswith("</answer>\n\nHow many eggs?\n\n")


def test_a_template_that_writes_the_date_writes_the_one_that_is_set(checkpoint, monkeypatch):
    _, tokenizer = llms.load(checkpoint("qwen2"))
    now = '{{ strftime_now("%d %b %Y") }}'  # LLaMA 3 has both lines
    tokenizer.chat_template = (
        f"{now}: {{% if strftime_now is defined %}}{{% set day = strftime_now('%d') %}}{{{{ day }}}}{{% endif %}}"
    )
    monkeypatch.setattr(llms, "TODAY", date(2024, 7, 26))
    assert llms.apply_template(tokenizer, [{"role": "user", "content": "?"}]) == "26 Jul 2024: 26"


def test_a_saved_model_opens_with_the_auto_classes_and_is_the_same(checkpoint, tmp_path):
    model, tokenizer = llms.load(checkpoint("qwen3"))
    llms.save(model, tokenizer, tmp_path / "saved")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), opened.parameters()))
    assert not list(tmp_path.glob("*.unfinished"))


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(setup, tmp_path, monkeypatch):
    state, _ = setup()
    may_write, write = threading.Event(), llms.safetensors.torch.save_file
    slow = lambda *inputs, **named: may_write.wait(60) and write(*inputs, **named)
    monkeypatch.setattr(llms.safetensors.torch, "save_file", slow)
    writer = llms.CheckpointWriter()
    writer.save(tmp_path, state.networks(), state.optimizer, state.generator, {"step": 1})
    weight = state.policy.model.norm.weight.data
    before = weight.clone()
    weight.add_(1.0)  # as the next update does
    assert not (tmp_path / "state.safetensors").exists()
    may_write.set()
    writer.wait()
    about, saved = llms.read_checkpoint(tmp_path)
    assert about == {"step": 1} and torch.equal(saved["policy/model.norm.weight"], before)


def test_a_checkpoint_that_cannot_be_written_is_an_error_also_where_another_ends_the_run(setup, tmp_path, monkeypatch):
    state, _ = setup()
    may_fail = threading.Event()
    monkeypatch.setattr(
        llms, "write_checkpoint", lambda *_: may_fail.wait(60) and (tmp_path / "no" / "file").write_text("")
    )
    writer = llms.CheckpointWriter()
    save = lambda: writer.save(tmp_path, state.networks(), state.optimizer, state.generator, "text")
    save()
    writer.check()  # it has not ended, and is not waited for
    may_fail.set()
    with pytest.raises(FileNotFoundError):
        save()
    save()
    with pytest.raises(FileNotFoundError) as error, writer:
        raise main.RunError("three steps")
    assert "three steps" in str(error.value.__context__)
    writer.wait()  # it is said once


@pytest.mark.parametrize("writes", ["the weights", "the tokenizer", "a checkpoint"])
def test_a_full_disk_is_an_os_error_of_one_line_and_leaves_what_was_there(setup, tmp_path, monkeypatch, writes):
    state, _ = setup()
    folder = tmp_path / ("checkpoint" if writes == "a checkpoint" else "model")

    def save():
        if writes == "a checkpoint":
            writer = llms.CheckpointWriter()
            writer.save(folder, state.networks(), state.optimizer, state.generator, "text")
            writer.wait()
        else:
            llms.save(state.policy, state.tokenizer, folder)

    save()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if writes == "the tokenizer":
        monkeypatch.setattr(state.policy, "save_pretrained", lambda folder, state_dict: Path(folder).mkdir())
    next(state.policy.parameters()).data.add_(1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))  # no file may become longer, as on a disk that is full
    try:
        with pytest.raises(OSError, match=f"{folder} cannot be written: .*File too large") as error:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_frozen_copy_shares_no_memory_and_asks_for_no_gradient(checkpoint):
    model, _ = llms.load(checkpoint("qwen2"))
    copy = llms.frozen_copy(model)
    for ours, theirs in zip(model.parameters(), copy.parameters()):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr() and not theirs.requires_grad


@pytest.mark.parametrize(
    "name, says", [("./nowhere", "no such model folder"), ("not a name", "unknown model: not a name")]
)
def test_an_unknown_model_is_refused_in_one_line(name, says):
    with pytest.raises(llms.ModelError, match=says) as error:
        llms.load(name)
    assert "\n" not in str(error.value)


def test_a_row_longer_than_the_model_reads_is_refused(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    with pytest.raises(llms.ModelError, match="512"):
        llms.sample(model, tokenizer, [[5] * 10], 1, 510, 1.0)


def test_a_row_as_long_as_the_model_reads_is_sampled(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))  # it reads 512 tokens
    assert llms.sample(model, tokenizer, [[7] * 509], 2, 3, 0.0).mask.shape[1] <= 3
    with pytest.raises(llms.ModelError, match="take up to 513 tokens, the model reads 512"):
        llms.sample(model, tokenizer, [[7] * 510], 2, 3, 0.0)


@pytest.mark.parametrize("damage", ["truncated weights", "a missing layer", "no tokenizer", "no config"])
def test_a_broken_model_folder_is_refused_in_one_line(checkpoint, tmp_path, damage):
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "broken")
    if damage == "truncated weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    elif damage == "a missing layer":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "config.json").unlink()
    with pytest.raises(llms.ModelError) as error:
        llms.load(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_chat_template_without_a_system_role_gets_one_message(checkpoint):
    _, tokenizer = llms.load(checkpoint("qwen2"))
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuse + "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    text = tokenizer.decode(llms.encode(tokenizer, rldatasets.prompt({"question": "How many eggs?"})))
    assert text.startswith("[user] Respond") and text.endswith("How many eggs?")


CHATML = llms.CHAT_TEMPLATE
NO_SYSTEM = """{% for m in messages %}{% if m.role == 'user' %}<|user|>
{{ m.content }}<|end|>
{% elif m.role == 'assistant' %}<|assistant|>
{{ m.content }}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""  # as Phi-3's
REFUSES = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('not in turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""  # as Gemma's
LLAMA_2 = """{% if messages[0].role == 'system' %}{% set said = '<<SYS>>' + messages[0].content + '<</SYS>>' %}
{%- set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + (said if loop.index0 == 0 else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"""
THINKS = """{% for m in messages %}{% set content = m.content.split('</think>')[-1] %}<|im_start|>{{ m.role }}
{{ content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}

</think>

{% endif %}{% endif %}"""  # as those of Qwen3 and of R1's pupils


def with_template(folder, template, ends=(), eos=None):
    """A tokenizer with a chat template, with the tokens that end a turn in it, and with another eos."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*ends, "<think>", "</think>"])
    tokenizer.chat_template = template
    if eos:
        tokenizer.add_special_tokens({"eos_token": eos})
    return tokenizer


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"), (NO_SYSTEM, "<|end|>"), (REFUSES, "<end_of_turn>"), (LLAMA_2, "</s>"),
        (THINKS, "<|im_end|>"), ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", None), (None, None),
    ],
)  # fmt: skip
def test_what_the_template_writes_after_a_turn_ends_an_output_and_a_written_one_too(checkpoint, template, end):
    model, _ = llms.load(checkpoint("qwen2"))
    model.generation_config.eos_token_id = None
    tokenizer = with_template(checkpoint("qwen2"), template, [end] if end else [], eos="<|endoftext|>")
    named = {"<|endoftext|>", end or "<|endoftext|>"}
    assert set(tokenizer.convert_ids_to_tokens(llms.end_tokens(model, tokenizer))) == named
    written = llms.rollout_from_texts(model, tokenizer, [[3]], ["42"], 9)
    assert tokenizer.decode(written.ids[0, 1:]).removeprefix("42") == (end or "<|endoftext|>")
    assert written.texts == ["42"] and not written.truncated.any()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 1 / 0 }}{% endif %}{% endfor %}",
        "<|im_start|>{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}<|im_end|>{{ m.content | upper }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_write_what_the_assistant_says_names_no_end(checkpoint, template):
    _, tokenizer = llms.load(checkpoint("qwen2"))
    tokenizer.chat_template = template
    assert llms.end_of_turn(tokenizer) is None


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, REFUSES, LLAMA_2, THINKS])
def test_the_instruction_is_in_the_prompt_whatever_the_template_does_with_it(checkpoint, template):
    tokenizer = with_template(checkpoint("qwen2"), template, ["<|end|>", "<end_of_turn>"])
    worked = {"question": "1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}
    for examples in ([], [worked]):
        messages = rldatasets.prompt({"question": "How many eggs?"}, examples)
        text = tokenizer.decode(llms.encode(tokenizer, messages))
        assert text.count("Respond in the following") == 1 and text.count("How many eggs?") == 1
        assert text.index("Respond") < text.index("How many eggs?")
        assert ("1 + 1 = 2" in text) == bool(examples)


def test_a_prompt_may_end_in_thoughts_and_options_go_to_the_template(checkpoint, monkeypatch):
    model, _ = llms.load(checkpoint("qwen2"))
    tokenizer = with_template(checkpoint("qwen2"), THINKS)
    model.resize_token_embeddings(len(tokenizer))
    messages = rldatasets.prompt({"question": "How many eggs?"})
    prompt = llms.encode(tokenizer, messages)
    rollout = llms.sample(model, tokenizer, [prompt], 2, 4, 1.0, torch.Generator())
    assert all(text.startswith("<think>") for text in rollout.texts)
    _, outputs = llms.token_lists(rollout.ids, rollout.attention, rollout.mask)
    first = len("<think>") + len(tokenizer.decode(outputs[0][:1]))
    _, marked = llms.at_tokens(tokenizer, rollout, [[(first, 1.0)], []])
    assert marked[0].tolist() == [True, False, False, False][: len(marked[0])]
    written = llms.rollout_from_texts(model, tokenizer, [prompt], ["42"], 99)
    assert written.texts == ["<think></think>\n\n42"]
    monkeypatch.setitem(llms.TEMPLATE_OPTIONS, "enable_thinking", False)
    closed = llms.encode(tokenizer, messages)
    assert tokenizer.decode(closed).endswith("<think>\n\n</think>\n\n") and llms.opening(tokenizer, closed) == ""


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused_in_one_line(checkpoint, tmp_path):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    tokenizer.add_tokens(["<new>"])
    llms.save(model, tokenizer, tmp_path / "few")
    with pytest.raises(
        llms.ModelError, match=r"few cannot be run: its tokenizer has a token \d+, and its embedding \d+ rows"
    ):
        llms.load(str(tmp_path / "few"))


def test_an_adapter_alone_is_named_as_such(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y", "peft_type": "LORA"}')
    with pytest.raises(llms.ModelError, match="is a LoRA adapter without its base model: merge it"):
        llms.load(str(tmp_path))


def test_a_model_whose_own_forward_pass_fails_is_refused_in_one_line(tmp_path, checkpoint):
    _, tokenizer = llms.load(checkpoint("qwen2"))
    shape = {"hidden_size": 36, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 9}
    config = transformers.Qwen2Config(**shape, num_key_value_heads=4, vocab_size=len(tokenizer))
    llms.save(transformers.AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "odd")
    with pytest.raises(llms.ModelError, match="odd cannot be run: its own forward pass fails") as error:
        llms.load(str(tmp_path / "odd"))
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_named(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(llms.ModelError, match="not finite"):
        draw(model, tokenizer)


# ---- attention without padding: every fast way returns what the plain one does --------------------------------------

ALL = (*FAMILIES, "gpt2")


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sampled_outputs_are_those_of_the_plain_loop(checkpoint, family, temperature):
    model, tokenizer = llms.load(checkpoint(family))
    asked = prompts(tokenizer, (3, 9, 9, 1, 30, 9, 2))  # 9 twice in a row: the same question twice
    expected = draw_plainly(model, tokenizer, asked, temperature=temperature)
    assert expected.mask.sum(1).unique().numel() > (3 if temperature else 1)  # ragged
    for budget in (EVERYTHING, 12 * (30 + 12), 1):  # all at once; 12 rows, refilled as outputs end; a group at a time
        out = draw(model, tokenizer, asked, temperature=temperature, cache_tokens=budget)
        assert torch.equal(out.ids, expected.ids) and torch.equal(out.mask, expected.mask)
        assert torch.equal(out.truncated, expected.truncated) and out.texts == expected.texts
        assert (out.logp - expected.logp).abs().max() < 1e-5
        assert (out.entropy - expected.entropy).abs().max() < 1e-5


@pytest.mark.parametrize("family", ALL)
def test_scores_values_and_gradient_are_those_of_padded_rows(checkpoint, family):
    model, tokenizer = llms.load(checkpoint(family))
    asked = [question for question in prompts(tokenizer, (3, 9, 30)) for _ in range(3)]
    completions = [[7] * n for n in (1, 12, 4, 1, 1, 1, 5, 2, 9)]
    ids, attention, mask = llms.batch(asked, completions, "cpu")
    weight, found = torch.linspace(-1, 1, mask.numel()).view(mask.shape), []
    for one, logprobs, values in (
        (model.double(), llms.token_logprobs, llms.Critic.token_values),
        (reference.plain(model), reference.token_logprobs, reference.token_values),
    ):
        critic = llms.Critic(one)
        torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
        logp, V = logprobs(one, ids, attention, mask, 0.7), values(critic, ids, attention, mask)
        ((logp * weight).sum() + (V * weight).sum()).backward()
        parameters = [*one.parameters(), *critic.parameters()]
        found.append([logp, V, *(p.grad for p in parameters if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    # relative to the largest, for the library's norms compute in fp32 whatever the model is in
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-6 * max(1, b.abs().max())


def test_a_prompt_is_read_once_for_its_outputs_and_padding_never(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    read = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: read.append(inputs[0].numel()))
    out = draw(model, tokenizer, prompts(tokenizer, (3, 9)), n=4)
    tokens = int(out.mask.sum()) - 8  # nothing is predicted from the last token of the 8 outputs
    assert sum(read) == 3 + 9 + tokens
    read.clear()
    llms.token_logprobs(model, out.ids, out.attention, out.mask, 1.0)
    assert read == [3 + 9 + tokens]


def test_waiting_prompts_begin_where_outputs_end_and_never_more_than_the_cache_holds(checkpoint):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    steps = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: steps.append(inputs[0].shape))
    model.generation_config.eos_token_id = list(range(20, 60))
    llms.LIMITS["cache_tokens"] = 8 * 17
    out = llms.sample(model, tokenizer, prompts(tokenizer, [5] * 40), 1, 12, 1.0, torch.Generator().manual_seed(0))
    rows = [n for n, tokens in steps if tokens == 1]
    assert max(rows) == 8 and len(out.texts) == 40
    lengths = out.mask.sum(1)
    assert len(rows) < lengths.view(5, 8).amax(1).sum() - 5  # fewer steps than five waves of eight take


def test_steps_after_the_end_of_an_output_change_nothing(checkpoint):  # as on a GPU, 16 at a time
    model, tokenizer = llms.load(checkpoint("qwen2"))
    asked = prompts(tokenizer, (3, 9))
    expected = draw_plainly(model, tokenizer, asked)
    # 8 outputs in a cache of 10 slots, two more than needed, and 21 columns; up to 12 tokens
    decoding = llms.DecodingBatch(model, llms.Size(8, 10, 21, 12), llms.end_tokens(model, tokenizer))
    decoding.reset(1.0, torch.rand(8, 12, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        decoding.prefill(asked, 4)
        for _ in range(16):
            decoding.decode_step(10, 21)
    assert decoding.ended.all() and decoding.length[:8].tolist() == expected.mask.sum(1).tolist()
    T = expected.mask.shape[1]
    assert torch.equal(decoding.tokens[:8, :T] * expected.mask, expected.ids[:, -T:] * expected.mask)
    assert ((decoding.logp[:8, :T] - expected.logp) * expected.mask).abs().max() < 1e-5


def test_the_copy_that_samples_is_renewed_in_place_and_keeps_its_adapters(checkpoint, monkeypatch):
    model, _ = llms.load(checkpoint("qwen2"))
    llms.add_lora(model, 2, 4.0)
    monkeypatch.setattr(llms, "PRECISION", "bf16")
    size, ends = llms.Size(4, 4, 20, 8), [11]
    with torch.no_grad():
        copied = llms.decoding_batch(model, size, ends).model
        before = {name: weight.data_ptr() for name, weight in copied.named_parameters()}
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
        assert llms.decoding_batch(model, size, ends).model is copied
    weights = dict(model.named_parameters())
    assert set(before) == set(weights) and any("lora_B" in name for name in before)
    for name, weight in copied.named_parameters():
        assert torch.equal(weight, weights[name].to(weight)) and weight.data_ptr() == before[name]
        assert weight.dtype == (torch.bfloat16 if "proj" in name else torch.float32)
    assert {buffer.dtype for buffer in copied.buffers()} == {torch.float32}  # angles of far positions need them
    assert copied.lm_head.weight is copied.model.embed_tokens.weight  # tied as before


@pytest.mark.parametrize("rank", [0, 2])
def test_in_bf16_all_fits_together(checkpoint, monkeypatch, rank):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    exact = draw(model, tokenizer)
    scored = llms.token_logprobs(model, exact.ids, exact.attention, exact.mask, 1.0)
    if rank:
        llms.add_lora(model, rank, 4.0)
    monkeypatch.setattr(llms, "PRECISION", "bf16")
    reference = llms.frozen_copy(model)
    kept = {layer.weight.dtype for layer in llms.linear_layers(reference).values()}
    assert kept == {torch.float32 if rank else torch.bfloat16}  # with LoRA the weights are the policy's own
    given = (exact.ids, exact.attention, exact.mask, 1.0)
    logp = llms.token_logprobs(model, *given)
    assert torch.equal(llms.token_logprobs(reference, *given), logp)  # the same numerics: the KL begins at 0
    assert 0 < (logp - scored).abs().max() < 0.5 and (logp - scored)[exact.mask].abs().mean() < 0.05
    logp.sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in model.parameters() if w.requires_grad)
    llms.Critic(model).token_values(*given[:3]).sum().backward()
    whole = llms.copy_with(model, torch.Tensor.bfloat16)  # what samples on a GPU
    for sampled, most in ((model, 0.01), (whole, 0.05)):
        out = draw(sampled, tokenizer)
        gap = (out.logp - llms.token_logprobs(model, out.ids, out.attention, out.mask, 1.0))[out.mask]
        assert gap.abs().mean() < most


def test_bf16_is_chosen_for_a_cpu_only_by_its_flag_which_says_what_it_costs(checkpoint, monkeypatch, capsys):
    cpu = torch.device("cpu")
    assert not llms.in_bf16(cpu)
    monkeypatch.setattr(llms, "PRECISION", "bf16")
    assert llms.in_bf16(cpu)
    model = llms.load(checkpoint("qwen2"))[0]
    assert llms.compute_dtype(model) == torch.float32  # of the head
    for one, enabled in ((model, True), (llms.copy_with(model, torch.Tensor.bfloat16), False)):
        with llms.autocast(one):
            assert torch.is_autocast_enabled("cpu") == enabled
    monkeypatch.setattr(llms, "bf16_rate", lambda: 0.6123)
    llms.check_bf16()
    assert capsys.readouterr().out == "note: this CPU multiplies bf16 numbers at 0.61 times the rate of fp32.\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(llms.ModelError, match="--precision bf16: Tesla T4 does not compute in bf16"):
        llms.check_bf16()


def test_the_rate_of_bf16_is_above_1_where_it_is_faster(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 11.0])  # fp32 takes 2 s, bf16 1 s
    monkeypatch.setattr(llms.time, "perf_counter", lambda: next(times))
    assert llms.bf16_rate() == 2.0


@pytest.mark.parametrize("bias", [False, True])
def test_the_heads_gradient_by_hand_is_that_of_the_log_softmax(monkeypatch, bias):
    monkeypatch.setitem(llms.LOGITS_AT_ONCE, "cpu", 3 * 11)  # chunks of 3 tokens
    g = torch.Generator().manual_seed(0)
    hidden, weight, b, d = (torch.randn(*shape, generator=g).double() for shape in ((7, 5), (11, 5), (11,), (7,)))
    inputs = [x.requires_grad_() for x in (hidden, weight, b)[: 2 + bias]]
    targets = torch.tensor([0, 10, 3, 3, 5, 9, 1])
    by_hand = llms.HeadLogprobs.apply(hidden, weight, b if bias else None, targets, 0.7, torch.float64)
    logits = hidden @ weight.T + (b if bias else 0)
    expected = torch.log_softmax(logits / 0.7, 1)[range(7), targets]
    assert (by_hand - expected).abs().max() < 1e-12
    for one, other in zip(
        torch.autograd.grad((by_hand * d).sum(), inputs), torch.autograd.grad((expected * d).sum(), inputs)
    ):
        assert (one - other).abs().max() < 1e-12


PECULIAR = {
    "a window": (transformers.MistralConfig, {"sliding_window": 4}),
    "a window wider than any text": (transformers.MistralConfig, {"sliding_window": 4096}),
    "two attentions in a layer": (transformers.DiffLlamaConfig, {}),
    "biases by distance": (transformers.BloomConfig, {"n_layer": 2, "n_head": 4}),
    "a state": (transformers.MambaConfig, {"state_size": 4}),
    "scaled logits": (transformers.GraniteConfig, {"logits_scaling": 8.0}),
    "capped logits": (transformers.NanoChatConfig, {"final_logit_softcapping": 1000.0}),
}


@pytest.mark.parametrize("kind", PECULIAR)
def test_a_model_that_would_be_computed_wrongly_is_refused_with_what_is_supported(checkpoint, tmp_path, kind):
    _, tokenizer = llms.load(checkpoint("llama"))
    architecture, extra = PECULIAR[kind]
    shape = SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    heads = {"num_key_value_heads": 2} if "n_head" not in extra else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(architecture(**shape | heads | extra))
    llms.save(model, tokenizer, tmp_path / "model")
    with pytest.raises(llms.ModelError, match="supported are Qwen2, Qwen2.5, Qwen3, LLaMA 3, SmolLM") as error:
        llms.load(str(tmp_path / "model"))
    assert "\n" not in str(error.value) and str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize("kind", ["logits", "attention"])
def test_what_is_not_in_the_configuration_shows_in_the_logits_of_a_short_text(checkpoint, monkeypatch, kind):
    head = transformers.Qwen2ForCausalLM.forward

    def scaled(*inputs, **named):
        out = head(*inputs, **named)
        return out.__class__(logits=1.01 * out.logits)

    if kind == "logits":
        monkeypatch.setattr(transformers.Qwen2ForCausalLM, "forward", scaled)
    else:
        attention = llms.PackedBatch.attention
        monkeypatch.setattr(llms.PackedBatch, "attention", lambda *inputs: 1.1 * attention(*inputs))
    with pytest.raises(llms.ModelError, match="supported are"):
        llms.load(checkpoint("qwen2"))


def test_our_attention_leaves_no_trace_in_a_saved_model(checkpoint, tmp_path):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    llms.save(model, tokenizer, tmp_path / "model")
    assert "packed" not in "".join(file.read_text() for file in (tmp_path / "model").glob("*.json"))


def test_a_model_without_our_attention_fails_instead_of_mixing_up_the_rows(checkpoint):
    model, _ = llms.load(checkpoint("qwen2"))
    inputs = (*llms.batch([[7, 3, 9]], [[9, 8]], "cpu"), 1.0)
    with pytest.raises(RuntimeError):
        llms.token_logprobs(reference.plain(model), *inputs)


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["model-1.safetensors", "model-2.bin"]])
def test_an_index_that_names_a_pickle_is_refused_before_anything_is_opened(checkpoint, tmp_path, monkeypatch, files):
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {f"weight.{i}": file for i, file in enumerate(files)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = []
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: opened.append(1))
    with pytest.raises(llms.ModelError, match="not all of the weights are in safetensors files") as error:
        llms.load(str(folder))
    assert not opened and "\n" not in str(error.value)


def test_weights_in_several_files_are_loaded(checkpoint, tmp_path):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    again, _ = llms.load(str(tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_configuration_that_names_a_pickle_as_its_weights_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(llms.ModelError, match="not all of the weights are in safetensors files"):
        llms.load(str(folder))


# ---- LoRA, gradient checkpointing, memory ---------------------------------------------------------------------------


def with_adapter(folder, trained=False):
    """A model with adapters of rank 4, as they begin or after some training, and a batch to score."""
    model, tokenizer = llms.load(folder)
    llms.add_lora(model, 4, 8.0)
    if trained:
        for layer in llms.lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    said = torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return (
        model,
        tokenizer,
        llms.batch([row[:5] for row in said], [row[5 : 9 + i] for i, row in enumerate(said)], "cpu"),
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_with_the_adapter_off_the_model_is_its_base_bit_for_bit(checkpoint, family):
    base, _ = llms.load(checkpoint(family))
    model, _, batch = with_adapter(checkpoint(family))
    batch = list(batch)
    new = llms.token_logprobs(model, *batch, 1.0)
    assert torch.equal(new, llms.token_logprobs(base, *batch, 1.0))  # B = 0: the KL of the first step is 0
    assert torch.equal(new, llms.token_logprobs(llms.frozen_copy(model), *batch, 1.0))
    assert len(llms.lora_layers(model)) == 2 * 7  # q, k, v, o, gate, up and down of both layers


def test_an_adapter_adds_alpha_by_r_times_b_a_x():
    linear = torch.nn.Linear(2, 3)
    layer = llms.LoRALinear(linear, 2, 6.0)
    A, B = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    x = torch.tensor([[1.0, -1.0]])  # A x is (1, 1), B A x is (1, 1, 0), and 6 / 2 is 3
    assert (layer(x) - linear(x)).tolist()[0] == pytest.approx([3.0, 3.0, 0.0], abs=1e-6)


def test_the_reference_of_a_lora_policy_holds_only_an_adapter_of_its_own_and_stays_where_it_was(checkpoint):
    model, _, batch = with_adapter(checkpoint("qwen2"))
    batch, ours = list(batch), {weight.data_ptr() for weight in model.parameters()}
    reference = llms.frozen_copy(model)
    own = {name for name, weight in reference.named_parameters() if weight.data_ptr() not in ours}
    assert own == {name for name, weight in model.named_parameters() if weight.requires_grad}  # those of the adapter
    assert not any(weight.requires_grad for weight in reference.parameters())
    before = llms.token_logprobs(reference, *batch, 1.0)
    for layer in llms.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    trained = llms.token_logprobs(model, *batch, 1.0)
    assert torch.equal(llms.token_logprobs(reference, *batch, 1.0), before) and (trained - before).abs().max() > 1e-3
    again = llms.frozen_copy(model)  # a second iteration: the reference is the policy as it is now, and stays there
    for layer in llms.lora_layers(model):
        torch.nn.init.zeros_(layer.lora_B)
    assert torch.equal(llms.token_logprobs(again, *batch, 1.0), trained)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_lora_model_is_saved_merged_as_a_plain_checkpoint(checkpoint, tmp_path, family):
    model, tokenizer, batch = with_adapter(checkpoint(family), trained=True)
    ids, attention, _ = batch
    unmerged = reference.plain(model)(input_ids=ids, attention_mask=attention).logits
    llms.save(model, tokenizer, tmp_path / "merged")
    opened, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    merged = opened(input_ids=ids, attention_mask=attention).logits
    assert (merged - unmerged).abs().max() / unmerged.abs().max() < 1e-5
    base, _ = llms.load(checkpoint(family))
    assert (reference.plain(base)(input_ids=ids, attention_mask=attention).logits - merged).abs().max() > 1e-2


def test_a_lora_model_that_was_saved_computes_as_before(checkpoint, tmp_path):
    model, tokenizer, batch = with_adapter(checkpoint("qwen2"), trained=True)
    before = llms.token_logprobs(model, *batch, 1.0)
    llms.save(model, tokenizer, tmp_path / "merged")
    assert (llms.token_logprobs(model, *batch, 1.0) - before).abs().max() < 1e-3


def test_only_adapters_are_trained_and_without_a_rank_there_are_none(setup):
    plain, _ = setup(LORA_RANK=0)
    assert not any("lora" in name for name in tensors(plain))
    assert len(plain.optimizer.param_groups[0]["params"]) == len(
        list(plain.policy.parameters())
    ) and not llms.lora_layers(plain.policy)
    state, rollout = setup(LORA_RANK=4, STEPS=1)
    trained = {
        id(weight) for weight in [weight for group in state.optimizer.param_groups for weight in group["params"]]
    }
    assert trained == {id(weight) for name, weight in state.policy.named_parameters() if ".lora_" in name}
    before = {name: weight.clone() for name, weight in tensors(state).items()}
    kept = {name for name in before if name.startswith("reference/")}
    assert kept and all(".lora_" in name for name in kept)  # of the reference only the adapter is written
    main.update(
        state, rollout, torch.linspace(-1, 1, 12), None, llms.log_probs(state.reference, rollout, main.TEMPERATURE)
    )
    moved = {name for name, weight in tensors(state).items() if name not in before or not weight.equal(before[name])}
    assert moved and all(".lora_" in name for name in moved) and not moved & kept


def test_gradient_checkpointing_gives_the_same_gradient_and_runs_the_layers_again(checkpoint):
    gradients, calls = [], []
    for again in (False, True):
        model, _, batch = with_adapter(checkpoint("qwen2"), trained=True)
        torch.manual_seed(0)
        for layer in llms.lora_layers(model):
            torch.nn.init.normal_(layer.lora_B.data, std=0.1)
        if again:
            llms.enable_gradient_checkpointing(model)
        calls.append(0)
        mlp = model.base_model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        llms.token_logprobs(model, *batch, 1.0).sum().backward()
        gradients.append(torch.cat([layer.lora_A.grad.flatten() for layer in llms.lora_layers(model)]))
    assert torch.equal(*gradients) and gradients[0].any() and calls == [1, 2]


def test_a_rank_above_the_smallest_linear_layer_is_refused(checkpoint):
    model, _ = llms.load(checkpoint("llama"))  # its smallest layers are those of two key heads of 8
    before = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with pytest.raises(llms.ModelError, match="rank 17 is above .* smallest linear layer, 16") as error:
        llms.add_lora(model, 17, 8.0)
    assert "\n" not in str(error.value)
    assert before == [name for name, weight in model.named_parameters() if weight.requires_grad]
    llms.add_lora(model, 16, 8.0)


def test_the_peak_of_memory_grows_by_what_is_used():
    program = "import llms, torch; x = torch.ones(100_000_000); a = llms.peak_memory(); y = x + 1; "
    program += "b = llms.peak_memory(); del y; print(a, b, llms.peak_memory())"
    out = subprocess.check_output([sys.executable, "-c", program], cwd=Path(llms.__file__).parent)
    before, after, later = map(float, out.split())
    assert 0.4 < before < 5 and 0.38 < after - before < 0.42 and later == after  # GB: 400 MB of fp32


def test_the_seconds_of_a_part_add_up_until_the_next_step(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(llms.time, "perf_counter", lambda: next(now))
    llms.start_clock()
    for _ in range(2):
        with llms.timed("sample"):
            pass
    assert llms.SECONDS == {"seconds/sample": 2.0 + 4.0}
    llms.start_clock()
    assert llms.SECONDS == {}


def test_the_copy_that_is_sampled_from_follows_the_model_is_used_again_and_can_be_freed(checkpoint, monkeypatch):
    model, tokenizer = llms.load(checkpoint("qwen2"))
    expected = [draw(model, tokenizer, n=n, seed=n).texts for n in (4, 2, 8)]
    on_meta, _ = llms.load(checkpoint("qwen2"))
    monkeypatch.setitem(llms.SHARDED, model, None)  # now a copy is sampled from, as on a GPU
    monkeypatch.setitem(llms.SKELETONS, model, on_meta)
    used = []
    for n, texts in zip((4, 2, 8), expected):  # fewer rows are no reason for another copy, more rows are
        assert draw(model, tokenizer, n=n, seed=n).texts == texts
        used.append(llms.DECODING[model])
    assert used[0] is used[1] is not used[2] and used[0].model is used[2].model
    longer = draw(model, tokenizer, n=4, longest=20)  # another limit is one too
    assert llms.DECODING[model] is not used[2] and longer.mask.shape[1] > 12
    assert draw(model, tokenizer, n=4, seed=4).texts == expected[0]
    kept = llms.DECODING[model]
    generator = torch.Generator().manual_seed(4)
    model.generation_config.eos_token_id = list(range(30, 70))  # other end tokens are one, too
    others = llms.sample(model, tokenizer, prompts(tokenizer), 4, 12, 1.0, generator)
    assert llms.DECODING[model] is not kept and others.texts != expected[0]
    llms.free_copies()
    assert len(llms.DECODING) == 0
    monkeypatch.setattr(llms, "PRECISION", "bf16")
    for _ in range(2):
        draw(model, tokenizer)
        copied = dict(llms.DECODING[model].model.named_parameters())
        assert all(torch.equal(copied[name], weight.to(copied[name])) for name, weight in model.named_parameters())
        assert copied["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
        assert copied["model.embed_tokens.weight"].dtype == torch.float32
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(-1)


def test_a_model_that_is_no_decoder_is_refused_in_one_line(tmp_path):
    transformers.T5Config(d_model=8, num_layers=1, vocab_size=10).save_pretrained(tmp_path / "t5")
    with pytest.raises(llms.ModelError) as error:
        llms.load(str(tmp_path / "t5"))
    assert "\n" not in str(error.value)


def test_a_reward_model_reads_no_more_than_it_can(reward_model):
    judge, read = llms.load_reward_model(reward_model), []
    judge[0].register_forward_hook(
        lambda module, inputs, named, out: read.append(named["input_ids"].shape), with_kwargs=True
    )
    llms.reward_scores(judge, ["1 + 1?"] * 2, ["2", "word " * 1000])
    assert read == [(2, 512)]


def test_the_score_of_several_classes_is_the_log_odds_of_the_last(reward_model):
    judge, logits = llms.load_reward_model(reward_model), []
    judge[0].score = torch.nn.Linear(SHAPE["hidden_size"], 3, bias=False)
    judge[0].register_forward_hook(lambda module, inputs, out: logits.append(out.logits))
    scores = llms.reward_scores(judge, ["1 + 1?"] * 3, ["2", "3", "a few words"])
    good = logits[0].softmax(1)[:, 2]
    assert scores == pytest.approx((good / (1 - good)).log().tolist(), abs=1e-4) and len(set(scores)) == 3


def test_a_matrix_made_orthogonal_keeps_its_directions_and_loses_its_lengths():
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 6), (6, 4)):
        U, _, V = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        matrix = U @ torch.diag(torch.tensor([9.0, 3.0, 1.0, 0.5])) @ V
        lengths = U.T @ llms.orthogonalised(matrix) @ V.T
        assert lengths.diagonal().min() > 0.6 and lengths.diagonal().max() < 1.3
        assert (lengths - torch.diag(lengths.diagonal())).abs().max() < 1e-4


def test_a_step_of_muon_is_as_long_as_its_learning_rate_whatever_the_gradient_is():
    for scale in (1e-3, 1e3):
        matrix, momentum = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2)
        matrix.grad = scale * torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        llms.muon_step(matrix, momentum, 0.1)
        assert matrix[0, 1] == matrix[1, 0] == 0
        assert -0.13 < matrix[0, 0] < -0.06 and 0.06 < matrix[1, 1] < 0.13  # downhill
        first = matrix.detach().clone()
        matrix.grad = torch.zeros(2, 2)
        llms.muon_step(matrix, momentum, 0.1)  # the momentum goes on
        assert (matrix / first).diagonal().min() > 1.5


def test_a_step_of_muon_on_a_tall_matrix_is_longer_and_follows_nesterovs_momentum(monkeypatch):
    monkeypatch.setattr(llms, "orthogonalised", lambda direction: direction)
    matrix, momentum = torch.zeros(4, 1, requires_grad=True), torch.zeros(4, 1)
    matrix.grad = torch.ones(4, 1)
    llms.muon_step(matrix, momentum, 1.0)  # momentum 0.05; direction 0.05 × 1 + 0.95 × 0.05 = 0.0975; √4 times as far
    assert torch.allclose(matrix, torch.full((4, 1), -0.195))
