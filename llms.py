"""The model: loading, the tiny one, sampling, log-probabilities, LoRA, saving.

Everything between a checkpoint and the maths: weights, token ids, masks and log-probabilities. What a right answer is,
what an advantage is, what β and ε are, is not known here.

    load(name)                    a causal language model and its tokenizer, from the hub or from a folder
    build_tiny(folder, corpus)    the model that needs no download, trained on the spot
    encode(tokenizer, messages)   a prompt's token ids
    sample(...)                   completions, with the log-probability of each token as it was drawn
    as_rollout(...)               completions that are given as texts, in the same form
    token_logprobs(...)           log π of given tokens, with gradient
    frozen_copy(model)            the reference
    add_lora(model, rank, alpha)  a small trained adapter beside every linear layer, the weights themselves frozen
    memory(...)                   how much a run will need
    Critic(model)                 PPO's value function
    tokens_at(tokenizer, ...)     which tokens write given characters
    reward_scores(...)            what a learned reward model says of completions
    save(model, tokenizer, ...)   a plain Hugging Face folder

How a batch lies in memory (prompt left-padded, completion right-padded, so that all completions start in one column):

    ids        [pad pad  q   q  | o   o   o  <e> pad]     [N, P + T]
    attention  [ 0   0   1   1  | 1   1   1   1   0 ]     [N, P + T]   by length, never by `id != pad`
    mask                        [ 1   1   1   1   0 ]     [N, T]       |o_i| = 4: the end token counts, padding does not
"""

import bisect
import copy
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

LOGITS_AT_ONCE = 2**24  # log-probabilities are computed over so few positions at a time that this many logits suffice


class ModelError(ValueError):
    """What is wrong with a model, in one line for the person who named it."""


# ---- loading and saving --------------------------------------------------------------------------------------------


def configuration(name):
    """A model's shape, without its weights; that of the tiny model for "tiny"."""
    if name == "tiny":
        return transformers.Qwen2Config(**TINY["shape"], vocab_size=TINY["vocabulary"])
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"no such model folder: {name}")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # whatever a broken folder makes four libraries raise is the same news to the user
        raise ModelError(explain(name, error)) from error


def load(name):
    """A causal language model in fp32 and its tokenizer, from a folder or from the Hugging Face hub.

    The weights stay in fp32 (a step of 1e-6 is lost in bf16); `compute` says in which precision they are used. Dropout
    is set to 0: the policy that is scored must be the one that sampled. The model is on the GPU if there is one.
    """
    config = configuration(name)
    for key in vars(config):
        if "dropout" in key or "pdrop" in key:
            setattr(config, key, 0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        how = {"config": config, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        model, loaded = AutoModelForCausalLM.from_pretrained(name, **how)
    except Exception as error:  # as above
        raise ModelError(explain(name, error)) from error
    if loaded["missing_keys"]:
        raise ModelError(f"{name} lacks weights of its own architecture: {min(loaded['missing_keys'])} and maybe more")
    if not tokenizer("How many?")["input_ids"]:
        raise ModelError(f"{name} has no tokenizer")
    if not end_tokens(model, tokenizer):
        raise ModelError(f"{name} names no end token, neither in its generation config nor in its tokenizer")
    if torch.cuda.is_available():
        model.cuda()
    return model.eval(), tokenizer


def explain(name, error):
    """Why a model could not be loaded, and what to do about it, in one line."""
    causes, cause = "", error
    while cause is not None:
        causes, cause = f"{causes} {type(cause).__name__}: {cause}", cause.__cause__ or cause.__context__
    if "GatedRepoError" in causes:
        return f"{name} is gated: accept its terms on its page, then set HF_TOKEN to your access token"
    if "RepositoryNotFound" in causes or "HFValidationError" in causes or "is not a valid model identifier" in causes:
        return f"unknown model: {name} is neither a folder nor on the Hugging Face hub (a private one needs HF_TOKEN)"
    if "LocalEntryNotFound" in causes or "OfflineMode" in causes or "ConnectError" in causes:
        offline = "offline, give a folder with the model, or use --model tiny"
        return f"{name} is not on this machine and the Hugging Face hub cannot be reached: {offline}"
    return f"cannot load {name}: {(str(error).strip() or repr(error)).splitlines()[0]}"


def save(model, tokenizer, folder):
    """Write a plain Hugging Face folder, adapters merged, whole or not at all: it is renamed when it is complete."""
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    merge_lora(model)
    plain = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    model.save_pretrained(unfinished, state_dict=plain)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def checkpoint_layers(model):
    """Keep only what goes into each layer of the trunk for the way back, and compute the rest again there."""
    name = "activation_checkpointing_enable"  # of transformers 5.2x; before it had the other name
    try:
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    except ValueError as error:
        raise ModelError(str(error).splitlines()[0]) from error


def own_copy(module):
    """A deep copy, but of what is trained only: weights that no update reaches are shared, not held twice."""
    return copy.deepcopy(module, {id(weight): weight for weight in module.parameters() if not weight.requires_grad})


def frozen_copy(model, adapter=True):
    """A copy that no gradient and no update reaches: the reference.

    With LoRA it shares the model's weights, and has an adapter like the model's as it is now, or none: that is the
    model as it was loaded.
    """
    reference = own_copy(model)
    for layer in adapted(reference) if not adapter else ():
        layer.lora_A = layer.lora_B = None
    return reference.requires_grad_(False)


def compute(model, keep_casts):
    """The precision of a forward pass: bf16 on a GPU (the weights themselves stay in fp32), fp32 on a CPU.

    With `keep_casts` a weight's bf16 copy is kept until the end: right for the many steps of sampling, but gradients
    that reach one weight from several places would be added up in bf16.
    """
    on_gpu = model.device.type == "cuda"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=keep_casts)


def at_least_fp32(logits):
    """A log-softmax in bf16 is wrong by up to 0.03: logits go to fp32 first, float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ---- LoRA (arXiv 2106.09685) ---------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """W x + (α/r) B A x: W is frozen, A [r, in] and B [out, r] are trained, B from 0; without them W x."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.lora_B is None else y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def linear_layers(model):
    """Every linear layer of the trunk, {name: layer}: the head is none of them, nor are the embeddings."""
    return {name: layer for name, layer in model.base_model.named_modules() if isinstance(layer, nn.Linear)}


def add_lora(model, rank, alpha):
    """Put an adapter beside every linear layer of the trunk, and freeze everything else."""
    model.requires_grad_(False)
    for name, layer in linear_layers(model).items():
        model.base_model.set_submodule(name, LoRALinear(layer, rank, alpha))


def adapted(model):
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to the weights, W ← W + (α/r) B A, and set them to 0."""
    for layer in adapted(model):
        layer.weight += layer.scale * layer.lora_B @ layer.lora_A
        layer.lora_B.zero_()


def skeleton(name):
    """A model without memory behind it, to count and measure its parts before anything is loaded."""
    config = configuration(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:  # no causal language model
        raise ModelError(explain(name, error)) from error


def largest_rank(model):
    """The rank beyond which an adapter is no smaller than the layer it stands beside; 0 without linear layers."""
    sizes = [min(layer.in_features, layer.out_features) for layer in linear_layers(model).values()]
    return min(sizes, default=0)


def memory(model, copies, cache_tokens, token_budget, checkpointing, on_gpu):
    """An estimate of what a run needs at its peak, in bytes, by part.

    model   as it is trained, with its adapters where it has any
    copies  (bool, bool): is there a reference with weights of its own, and a critic?
    """
    config = model.config.get_text_config()
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value = 2 * head_size * (getattr(config, "num_key_value_heads", None) or heads)  # numbers a token and layer
    size = 2 if on_gpu else 4  # bytes of what is computed; weights, gradients and AdamW are in fp32
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = 10 * config.hidden_size + 2 * head_size * heads + key_value + 5 * inner  # kept a token for the way back
    layers = config.num_hidden_layers
    kept = layer + layers * config.hidden_size if checkpointing else layers * layer
    sampling = size * cache_tokens * layers * key_value + (2 * total if on_gpu else 0)
    updating = 4 * trained + size * token_budget * kept + (2 * total if on_gpu else 0)
    reference, critic = copies
    return {
        "weights": 4 * total,
        "AdamW": 8 * trained,
        "copies": 4 * trained * reference + 16 * trained * critic,
        "sampling or updating": max(sampling, updating) + 3 * 4 * LOGITS_AT_ONCE,
    }


# ---- prompts and batches -------------------------------------------------------------------------------------------


def encode(tokenizer, messages):
    """Token ids of a prompt: through the checkpoint's chat template, or plain paragraphs where it has none."""
    if tokenizer.chat_template:
        # a template that knows no system role refuses one: then the user says it all
        user = {"role": "user", "content": "\n\n".join(message["content"] for message in messages)}
        for attempt in (messages, [user]):
            try:
                text = tokenizer.apply_chat_template(attempt, add_generation_prompt=True, tokenize=False)
                break
            except jinja2.TemplateError as error:
                reason = error
        else:
            raise ModelError(f"the chat template of {tokenizer.name_or_path} fails: {reason}")
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer("\n\n".join(message["content"] for message in messages) + "\n\n")["input_ids"]


def end_tokens(model, tokenizer):
    """Every id that ends a completion: those of the checkpoint's generation config, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


def positions(attention):
    """Each token's place in its own row, padding not counted: [N, P + T]."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def batch(prompts, completions, device):
    """ids and attention [N, P + T], mask [N, T] of lists of token ids, laid out as drawn at the top of this file."""
    P, T = max(map(len, prompts)), max(map(len, completions))
    ids, attention, mask = [], [], []
    for prompt, completion in zip(prompts, completions):
        left, right = P - len(prompt), T - len(completion)
        ids.append([0] * left + prompt + completion + [0] * right)
        attention.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
        mask.append([True] * len(completion) + [False] * right)
    return (torch.tensor(rows, device=device) for rows in (ids, attention, mask))


class Rollout(NamedTuple):
    """N = Q·G sampled outputs, the G of one question in consecutive rows; laid out as drawn at the top of this file."""

    ids: Tensor  # [N, P + T]
    attention: Tensor  # [N, P + T]
    mask: Tensor  # [N, T]  True on the |o_i| tokens of output i
    logp: Tensor  # [N, T]  log π of each token as the policy drew it, at the sampling temperature; None if it did not
    entropy: Tensor  # [N, T]  of the distribution it was drawn from, in nats; None if it was not drawn
    truncated: Tensor  # [N]  True where no end token came within the limit
    texts: list  # [N]  the completions, without their end token

    def rows(self, index):
        """ids, attention and mask of some of the rows, without the padding that only the others need."""
        attention, mask = self.attention[index], self.mask[index]
        P, T = attention.shape[1] - mask.shape[1], int(mask.sum(1).max())
        columns = slice(int((attention[:, :P].sum(0) == 0).sum()), P + T)
        return self.ids[index, columns], attention[:, columns], mask[:, :T]


# ---- sampling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, generator, cache_tokens):
    """Draw `group_size` completions for every prompt (a list of token ids) from softmax(logits / temperature).

    Nothing else bends the distribution: no top-k, no top-p, nothing from the checkpoint's generation config but its end
    tokens. Temperature 0 takes the most probable token (evaluation). At most `cache_tokens` tokens are kept in the
    key-value cache at once, but at least one group; more prompts than that are sampled one wave after another.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", longest)
    if longest > limit:
        raise ModelError(f"prompt and output take up to {longest} tokens, the model reads {limit}")
    ends = torch.tensor(end_tokens(model, tokenizer), device=model.device)
    at_once = max(1, cache_tokens // (longest * group_size))
    outputs = []  # per completion: token ids, log-probabilities, entropies
    with tqdm(total=len(prompts) * group_size, desc="sampling", unit="output", leave=False, delay=2) as bar:
        for start in range(0, len(prompts), at_once):
            wave = prompts[start : start + at_once]
            outputs += sample_wave(model, wave, group_size, max_new_tokens, temperature, generator, ends, bar)

    completions = [tokens.tolist() for tokens, _, _ in outputs]
    ids, attention, mask = batch([prompt for prompt in prompts for _ in range(group_size)], completions, model.device)
    padded = [
        torch.zeros(mask.shape, device=model.device).masked_scatter(mask, torch.cat(column))
        for column in list(zip(*outputs))[1:]
    ]
    truncated = ~torch.isin(torch.stack([tokens[-1] for tokens, _, _ in outputs]), ends)
    texts = [
        tokenizer.decode(tokens if cut else tokens[:-1], skip_special_tokens=True)
        for tokens, cut in zip(completions, truncated.tolist())
    ]
    return Rollout(ids, attention, mask, *padded, truncated, texts)


def sample_wave(model, prompts, group_size, max_new_tokens, temperature, generator, ends, bar):
    """Sample some prompts side by side: [(token ids, log-probabilities, entropies)] of each output in turn."""
    rows = len(prompts) * group_size
    ids, attention, _ = batch(prompts, [[]] * len(prompts), model.device)  # [Q, P]
    drawn = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=model.device)
    logp, entropy = torch.zeros(2, rows, max_new_tokens, device=model.device)
    lengths = torch.full((rows,), max_new_tokens, device=model.device)
    alive = torch.arange(rows, device=model.device)  # the rows that have not ended; only these are in the cache

    cache, place = DynamicCache(), positions(attention)

    def next_logits(tokens):
        inputs = {"attention_mask": attention, "position_ids": place, "past_key_values": cache, "logits_to_keep": 1}
        return model(input_ids=tokens, **inputs).logits[:, -1]

    with compute(model, keep_casts=True):
        # the prompt is read once, and its keys and values are handed to the G outputs
        logits = next_logits(ids).repeat_interleave(group_size, 0)  # [N, V]
        if not logits.isfinite().all():
            raise ModelError("the model's logits are not finite: its weights are broken, or training has diverged")
        cache.batch_repeat_interleave(group_size)
        attention, place = attention.repeat_interleave(group_size, 0), place[:, -1:].repeat_interleave(group_size, 0)
        for t in range(max_new_tokens):
            log_pi = torch.log_softmax(at_least_fp32(logits) / (temperature or 1), -1)  # [alive, V]
            pi = log_pi.exp()
            token = torch.multinomial(pi, 1, generator=generator) if temperature else log_pi.argmax(-1, keepdim=True)
            drawn[alive, t] = token.squeeze(1)
            logp[alive, t] = log_pi.gather(1, token).squeeze(1).float()
            entropy[alive, t] = -torch.special.xlogy(pi, pi).sum(-1).float()
            going = (~torch.isin(token.squeeze(1), ends)).nonzero().squeeze(1)
            if len(going) < len(alive):  # rows that ended leave the batch and the cache
                bar.update(len(alive) - len(going))
                lengths[alive] = t + 1
                cache.batch_select_indices(going)
                alive, token, attention, place = alive[going], token[going], attention[going], place[going]
                lengths[alive] = max_new_tokens
            if len(alive) == 0 or t == max_new_tokens - 1:
                break
            attention, place = torch.cat([attention, torch.ones_like(token)], 1), place + 1
            logits = next_logits(token)
    bar.update(len(alive))
    return [(drawn[i, :n], logp[i, :n], entropy[i, :n]) for i, n in enumerate(lengths.tolist())]


def as_rollout(model, tokenizer, prompts, texts, max_new_tokens):
    """A rollout of given texts, one for each prompt, that end with an end token and are cut like outputs."""
    end = end_tokens(model, tokenizer)[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] + [end] for text in texts]
    truncated = torch.tensor([len(tokens) > max_new_tokens for tokens in completions], device=model.device)
    layout = batch(prompts, [tokens[:max_new_tokens] for tokens in completions], model.device)
    return Rollout(*layout, None, None, truncated, texts)


# ---- scoring -------------------------------------------------------------------------------------------------------


def states(trunk, ids, attention, mask):
    """The trunk's last hidden state from which each completion token is predicted, row after row: [tokens, D]."""
    trunk.train(torch.is_grad_enabled())  # without dropout all that this switches is gradient checkpointing
    inputs = {"attention_mask": attention, "position_ids": positions(attention), "use_cache": False}
    hidden = trunk(input_ids=ids, **inputs).last_hidden_state
    trunk.eval()
    # position j predicts token j + 1: the first completion token comes from the last prompt position
    return hidden[:, -mask.shape[1] - 1 : -1][mask]


def token_logprobs(model, ids, attention, mask, temperature):
    """log π(o_{i,t} | q, o_{i,<t}) = log softmax(logits / T) of each completion token, fp32, [N, T]; 0 off the mask.

    The logits are never there all at once: N·T rows of 150,000 numbers would be most of a step's memory. The trunk
    gives the hidden states; the head is applied to a chunk of completion positions at a time, and again going backward.
    """
    with compute(model, keep_casts=False):
        hidden = states(model.base_model, ids, attention, mask)  # [tokens, D]
        targets = ids[:, -mask.shape[1] :][mask]  # [tokens]
        head = model.get_output_embeddings()

        def chunk_logprobs(hidden, targets):
            logits = at_least_fp32(head(hidden)) / temperature  # [chunk, V]
            return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)  # [chunk]

        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        chunks = zip(hidden.split(size), targets.split(size))
        logp = torch.cat([checkpoint(chunk_logprobs, *chunk, use_reentrant=False) for chunk in chunks])
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


class Critic(nn.Module):
    """PPO's value function: a trunk of its own, the policy's to begin with, and a value head on it, 0 to begin with."""

    def __init__(self, model):
        super().__init__()
        self.trunk = own_copy(model.base_model)
        self.value_head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def token_values(self, ids, attention, mask):
        """V(q, o_{i,<t}), what is still to be earned before token t is drawn, fp32, [N, T]; 0 off the mask."""
        with compute(self.trunk, keep_casts=False):
            hidden = states(self.trunk, ids, attention, mask)  # [tokens, D]
        values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(1)  # [tokens], never in bf16
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


def tokens_at(tokenizer, rollout, row, characters):
    """For ascending positions in the text of an output: the index of the token that completes the text up to there."""
    ids = rollout.ids[row, -rollout.mask.shape[1] :][rollout.mask[row]].tolist()
    found, start = [], 0
    for character in characters:
        lengths = range(start + 1, len(ids) + 1)  # how many tokens may it take?
        written = lambda count: len(tokenizer.decode(ids[:count], skip_special_tokens=True))
        start += min(bisect.bisect_left(lengths, character, key=written), len(lengths) - 1)
        found.append(start)
    return found


# ---- a learned reward model ----------------------------------------------------------------------------------------


def load_reward_model(name):
    """A sequence classifier that was trained to score answers, and its tokenizer, from the hub or from a folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # as above
        raise ModelError(explain(name, error)) from error
    if loaded["missing_keys"]:
        raise ModelError(f"{name} is no sequence classifier: it lacks {min(loaded['missing_keys'])} and maybe more")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{name} has no padding token")
    model.config.pad_token_id = tokenizer.pad_token_id
    if torch.cuda.is_available():
        model.cuda()
    return model.eval(), tokenizer


@torch.no_grad()
def reward_scores(model, tokenizer, questions, completions, rows=16):
    """The score of each completion as the answer to its question: the only logit, or the log-odds of the last class,
    which is taken to be the good one."""
    scores = []
    for start in range(0, len(questions), rows):
        pairs = questions[start : start + rows], completions[start : start + rows]
        if tokenizer.chat_template:  # a decoder reads the dialogue, an encoder a pair of texts
            dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": o}] for q, o in zip(*pairs)]
            pairs = ([tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues],)
        limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
        batch = tokenizer(*pairs, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
        with compute(model, keep_casts=True):
            logits = model(**batch).logits.float()  # [rows, classes]
        others = logits[:, :-1].logsumexp(1) if logits.shape[1] > 1 else 0.0
        scores += (logits[:, -1] - others).tolist()
    return scores


# ---- the tiny model ------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TINY = {
    "steps": 1000,  # of the supervised warm-up
    "rows": 16,
    "learning_rate": 4e-3,
    "vocabulary": 640,  # tokens at most
    "shape": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}


def tiny_tokenizer(texts):
    """Qwen2's byte-level BPE and chat template with a vocabulary of its own; digits stand alone."""
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        texts, TINY["vocabulary"], show_progress=False, new_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.add_tokens(["<reasoning>", "</reasoning>", "<answer>", "</answer>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny(folder, corpus):
    """Build a Qwen2-architecture model of about half a million parameters, teach it a corpus [(messages, completion)]
    by supervised learning on the completions, and save it: about a minute on two cores."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(
        [
            piece
            for messages, text in corpus
            for message in messages
            for piece in (message["role"], message["content"], "assistant", text)
        ]
    )
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(transformers.Qwen2Config(**TINY["shape"], **ids))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    pairs = [
        (encode(tokenizer, messages), tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
        for messages, text in corpus
    ]

    for step in tqdm(range(TINY["steps"]), desc="building the tiny model, once", unit="step", leave=False):
        rows = [pairs[(step * TINY["rows"] + row) % len(pairs)] for row in range(TINY["rows"])]
        ids, attention, mask = batch(*zip(*rows), model.device)
        loss = -token_logprobs(model, ids, attention, mask, temperature=1.0).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = TINY["learning_rate"] * min(1.0, (step + 1) / 20) * (1 - step / TINY["steps"])
        optimizer.step()
        optimizer.zero_grad()
    save(model, tokenizer, folder)
