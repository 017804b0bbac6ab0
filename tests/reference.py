"""The plain way to the numbers of llms.py: no packing, no KV cache, no chunks, the library's own attention."""

import copy

import torch

import llms


def plain(model):
    """A copy with the library's own attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    return other


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, generator):
    """A Rollout, every token of which comes from a forward pass over all that stands before it."""
    model, ends, completions, logp, entropy = plain(model), llms.end_tokens(model, tokenizer), [], [], []
    for prompt in prompts:
        ids, columns = torch.tensor([prompt] * group_size), []
        uniform = torch.rand(group_size, max_new_tokens, generator=generator) if temperature else None
        for t in range(max_new_tokens):
            log_pi = torch.log_softmax(model(ids).logits[:, -1] / (temperature or 1.0), 1)  # [G, V]
            pi = log_pi.exp()
            token = (pi.cumsum(1) <= uniform[:, t : t + 1]).sum(1, keepdim=True) if temperature else pi.argmax(1, True)
            columns.append((log_pi.gather(1, token), -(pi * log_pi).sum(1, keepdim=True)))
            ids = torch.cat([ids, token], 1)
        tables = [torch.cat(column, 1) for column in zip(*columns)]  # 2 × [G, T]
        for row, tokens in enumerate(ids[:, len(prompt) :].tolist()):
            length = next((t + 1 for t, token in enumerate(tokens) if token in ends), max_new_tokens)
            completions.append(tokens[:length])
            logp.append(tables[0][row, :length])
            entropy.append(tables[1][row, :length])
    tensors = llms.batch([prompt for prompt in prompts for _ in range(group_size)], completions, "cpu")
    padded = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (logp, entropy)]
    truncated = torch.tensor([tokens[-1] not in ends for tokens in completions])
    texts = [
        tokenizer.decode(tokens if cut else tokens[:-1], skip_special_tokens=True)
        for tokens, cut in zip(completions, truncated)
    ]
    return llms.Rollout(*tensors, *padded, truncated, texts, group_size)


def padded_inputs(ids, attention):
    """The arguments of a model that reads padded rows."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": attention, "position_ids": positions, "use_cache": False}


def token_logprobs(model, ids, attention, mask, temperature):
    """log π of each completion token from all logits of padded rows: [N, T]; the model has the library's attention."""
    T = mask.shape[1]
    log_pi = torch.log_softmax(model(**padded_inputs(ids, attention)).logits[:, -T - 1 : -1] / temperature, -1)
    return log_pi.gather(2, ids[:, -T:, None]).squeeze(2) * mask


def token_values(critic, ids, attention, mask):
    """The values of a critic from padded rows: [N, T]; its trunk has the library's attention."""
    hidden = critic.trunk(**padded_inputs(ids, attention)).last_hidden_state[:, -mask.shape[1] - 1 : -1]
    return critic.value_head(hidden).squeeze(2) * mask
