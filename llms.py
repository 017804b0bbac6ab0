"""The model: a language model is loaded, scores given tokens, samples outputs, and is saved.

This file knows weights, token ids, masks and log-probabilities. It does not know what a right answer is, or what
advantages, β and ε are. Much of it makes the plain computation fast. The plain way to the same numbers, without a cache
and without packing, is tests/reference.py: 62 lines. Here a "checkpoint" is always the state of a training run.

    load, save                            a model and its tokenizer, from the Hugging Face hub or from a folder
    encode, batch, Rollout                a prompt as token ids; many as tensors; outputs, sampled or given as texts
    at_tokens                             numbers at characters of a text, put on its tokens (process supervision)
    token_logprobs, Critic                log π of given tokens, with gradient; PPO's value function
    LIMITS, micro_batches                 how many tokens are computed at once; a rollout in parts
    log_probs, values                     log π and values of a whole rollout, without gradient
    timed, SECONDS                        what takes how long
    sample                                outputs, with the log-probability of each token as it was sampled
    add_lora, frozen_copy                 small trained adapters beside the linear layers; the reference
    CheckpointWriter, load_checkpoint     the state of a training run in one file, which a thread writes
    load_reward_model, reward_scores      a learned reward model
    load_judge, judge_group               a language model that compares outputs
    tiny_folder                           the model that needs no download, trained on the spot
    distributed, shard, gather, share     several GPUs, one process each
    decoding_batch, decode_gpu            a copy that samples; on a GPU bf16 and CUDA graphs

How a batch lies in memory, with P columns for prompts and T for completions:

    ids        [pad pad  q   q  | o   o   o  <e> pad]     [N, P + T]
    attention  [ 0   0   1   1  | 1   1   1   1   0 ]     [N, P + T]   by length, never by `id != pad`
    mask                        [ 1   1   1   1   0 ]     [N, T]       |o_i| = 4: the end token counts, padding does not
"""

import bisect
import copy
import functools
import gc
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import traceback
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# settings of the libraries
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# fewer gaps in a GPU's memory
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# cuDNN makes a plan for each new shape, which takes longer than the attention itself
torch.backends.cuda.enable_cudnn_sdp(False)
# weights come from the repository that was named: no converted copy of them from elsewhere
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

# With several GPUs torchrun starts a process for each, a rank, and sets these. Otherwise there is rank 0 alone.
RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

# the date for chat templates that write one: see `dated`; a resumed run keeps its first
TODAY = date.today()

# tqdm's `disable`: with None a bar is hidden only where there is no terminal
NO_BAR = RANK > 0 or None


class ModelError(ValueError):
    """What is wrong with a model, in one line for the person who named it."""


# ---- loading and saving --------------------------------------------------------------------------------------------


def load(name):
    """A causal language model in fp32, and its tokenizer. If `name` is the folder of a run: the model in it."""
    if (Path(name) / "metrics.jsonl").is_file():  # the folder of a run
        if not (Path(name) / "model").is_dir():
            raise ModelError(f"{name} is a run that has no model yet: python main.py --resume {name}")
        name = f"{name}/model"
    model, tokenizer = from_pretrained(transformers.AutoModelForCausalLM, name, dtype=torch.float32)
    if not tokenizer("How many?")["input_ids"]:  # any text
        raise ModelError(f"{name} has no tokenizer")
    if not end_tokens(model, tokenizer):
        raise ModelError(f"{name} names no end token, neither in its generation config nor in its tokenizer")
    rows = len(model.get_input_embeddings().weight)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        few = f"its tokenizer has a token {largest}, and its embedding {rows} rows"
        raise ModelError(f"{name} cannot be run: {few} (in transformers: model.resize_token_embeddings)")
    # with several ranks it comes to the GPU when it is sharded
    if torch.cuda.is_available() and WORLD == 1:
        model.cuda()
    use_packed_attention(model, name)
    return model, tokenizer


def from_pretrained(auto_class, name, **options):
    """A model and its tokenizer, from a folder or from the hub. No pickle is opened, no code of a download is run."""
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        # no dropout: the policy that is scored must be the one that sampled
        config.update({key: 0.0 for key in vars(config) if "dropout" in key or "pdrop" in key})
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        refuse_pickles(name, config)
        model, report = auto_class.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a broken folder can raise any error
        raise ModelError(explain(name, error)) from error
    missing = report["missing_keys"]
    if missing:
        raise ModelError(f"{name} lacks weights of its own architecture: {min(missing)} and maybe more")
    return model.eval(), tokenizer


def refuse_pickles(name, config):
    """ModelError where the configuration or the index of the weights names a file that is not a safetensors file.

    `use_safetensors` alone does not refuse it.
    """
    files = [getattr(config, "transformers_weights", None) or "model.safetensors"]
    with suppress(OSError):  # no index: the weights are in that one file
        index = transformers.utils.cached_file(name, "model.safetensors.index.json")
        files += json.loads(Path(index).read_bytes())["weight_map"].values()
    if not all(file.endswith(".safetensors") for file in files):
        raise ModelError("not all of the weights are in safetensors files, and no others are read")


def explain(name, error):
    """Why a model could not be loaded, and what to do about it, in one line."""
    # names and texts of all errors that led to it
    causes = "".join(traceback.format_exception(error, limit=0))
    suffixes = {path.suffix for path in (Path(name), *Path(name).glob("*"))}
    if (Path(name) / "adapter_config.json").exists():
        merged = "merge it into its base model (in peft: merge_and_unload), save that and give its folder"
        return f"{name} is a LoRA adapter without its base model: {merged}"
    if ".gguf" in suffixes and ".safetensors" not in suffixes:
        return f"{name} is a GGUF model, quantised to be run and not to be trained: give the original, in safetensors"
    if suffixes & {".bin", ".pt", ".pth"} and ".safetensors" not in suffixes:
        return f"{name} has its weights as pickle, which can run code: give a copy in safetensors (save_pretrained)"
    if "GatedRepoError" in causes:
        return f"{name} is gated: accept its terms on its page, then set HF_TOKEN to your access token"
    if re.match(r"runs/|[./~]", name) and not Path(name).exists():
        return f"unknown model: {name}: no such model folder"
    if "RepositoryNotFound" in causes or "HFValidationError" in causes or "is not a valid model identifier" in causes:
        return f"unknown model: {name}: no such model folder, nor on the Hugging Face hub (private ones need HF_TOKEN)"
    if "LocalEntryNotFound" in causes or "OfflineMode" in causes or "ConnectError" in causes:
        return f"{name} is not on this machine and the hub cannot be reached: give a folder, or use --model tiny"
    reason = str(error).strip() or repr(error)
    return f"cannot load {name}: {reason.splitlines()[0]}"


@torch.no_grad()
def save(model, tokenizer, folder):
    """Write a plain Hugging Face folder, whole or not at all. All ranks must call it, when training is over.

    Adapters are merged into the weights that the model has in memory, too.
    """
    if model in SHARDED:
        model = copy_with(model, keep_on_rank_0)
        if RANK:
            return
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    merge_adapters(model)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    with disk_errors(folder):
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


@contextmanager
def disk_errors(folder):
    """Make every error in a block an OSError that names the folder, for example when the disk is full."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have errors of their own, or raise plain Exception
        raise OSError(f"{folder} cannot be written: {error}") from error


def keep_on_rank_0(tensor):
    """A copy on the CPU of rank 0. The other ranks keep its shape only; they had to help to gather it."""
    return tensor.to("meta" if RANK else "cpu", copy=True)


def enable_gradient_checkpointing(model):
    """Keep only the input of each layer in the forward pass, and compute the rest again in the backward pass."""
    # in newer versions of transformers it has another name
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


# ---- prompts and batches -------------------------------------------------------------------------------------------


TEMPLATE_OPTIONS = {}  # {name: value} for chat templates, such as enable_thinking: False


def apply_template(tokenizer, messages, **options):
    """A dialogue as the text that the tokenizer's chat template makes of it."""
    try:
        template = dated(tokenizer.get_chat_template())
        options = TEMPLATE_OPTIONS | options
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        reason = f"the chat template of {tokenizer.name_or_path} fails: {error}"
        raise ModelError(reason.splitlines()[0]) from error


def dated(template):
    """A chat template with TODAY where it would write the date: tomorrow, its prompts would be others."""
    # a call is strftime_now("%d %b %Y")
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: repr(TODAY.strftime(call[2])), template)


def encode(tokenizer, messages):
    """Token ids of a prompt: through the tokenizer's chat template, or plain paragraphs where it has none."""
    plain = ""
    for message in messages:
        plain += message["content"]
        if message["role"] == "assistant":  # a worked example ends as an output does
            plain += tokenizer.eos_token or ""
        plain += "\n\n"
    if not tokenizer.chat_template:
        return tokenizer(plain)["input_ids"]
    has_instruction = messages[0]["role"] == "system"
    text = ""
    try:
        text = apply_template(tokenizer, messages, add_generation_prompt=True)
    except ModelError:
        if not has_instruction:
            raise
    if has_instruction and messages[0]["content"] not in text:  # the template refuses or drops it
        _, question, *rest = messages
        question = {"role": "user", "content": f"{messages[0]['content']}\n\n{question['content']}"}
        text = apply_template(tokenizer, [question, *rest], add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(model, tokenizer):
    """Every id that ends a completion: those of the model's generation config, the tokenizer's, the chat template's."""
    ends = model.generation_config.eos_token_id
    if not isinstance(ends, list):
        ends = [ends]
    return sorted({*ends, tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None})


def end_of_turn(tokenizer):
    """The token that the chat template writes after what the assistant says, or None: some base models' configs name
    another."""
    if not tokenizer.chat_template:
        return None
    said = "So it is 42."
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": said}]
    try:
        _, found, after = apply_template(tokenizer, messages).rpartition(said)
    except ModelError:  # some templates write prompts only
        return None
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if found and ids and ids[0] in tokenizer.added_tokens_decoder else None


def opening(tokenizer, prompt):
    """What the prompt has written of the output already: `<think>` where it ends so, as some chat templates make it."""
    return "<think>" if tokenizer.decode(prompt[-8:], skip_special_tokens=False).rstrip().endswith("<think>") else ""


def text_of(tokenizer, prompt, tokens):
    """The tokens of an output as text, without the special ones."""
    return opening(tokenizer, prompt) + tokenizer.decode(tokens, skip_special_tokens=True)


def context_length(model):
    """How many tokens the model reads, prompt and output together."""
    return getattr(model.config, "max_position_embeddings", math.inf)


def repeated(rows, times):
    """Each row several times, one after the other."""
    return [row for row in rows for _ in range(times)]


def batch(prompts, completions, device):
    """ids and attention [N, P + T], mask [N, T] of lists of token ids, laid out as drawn at the top of this file."""
    ids = torch.cat([padded(prompts, "left"), padded(completions)], 1)
    before = padded([[True] * len(prompt) for prompt in prompts], "left")  # [N, P]
    mask = padded([[True] * len(completion) for completion in completions])  # [N, T]
    attention = torch.cat([before, mask], 1).long()
    return ids.to(device), attention.to(device), mask.to(device)


def padded(rows, side="right"):
    """Lists as a tensor with padding of 0 or False: [N, longest]."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)


def token_counts(attention, mask):
    """The numbers of tokens of the prompts and of the outputs: two lists of N."""
    lengths = mask.sum(1)
    prompt_lengths = attention.sum(1) - lengths
    return prompt_lengths.tolist(), lengths.tolist()


def token_lists(ids, attention, mask):
    """The prompts and the outputs of a batch as lists of token ids, without padding."""
    P = ids.shape[1] - mask.shape[1]
    rows = ids.tolist()
    prompt_lengths, lengths = token_counts(attention, mask)
    prompts = [row[P - n : P] for row, n in zip(rows, prompt_lengths)]
    outputs = [row[P : P + n] for row, n in zip(rows, lengths)]
    return prompts, outputs


class Rollout(NamedTuple):
    """N = Q·G outputs, the G of one question in consecutive rows; laid out as drawn at the top of this file."""

    ids: Tensor  # [N, P + T]
    attention: Tensor  # [N, P + T]
    mask: Tensor  # [N, T]  True on the |o_i| tokens of output i
    logp: Tensor = None  # [N, T]  log π of each token as sampled (τ = 0: at 1); None if the policy did not sample it
    entropy: Tensor = None  # [N, T]  the entropy of π for each token, in nats
    truncated: Tensor = None  # [N]  True where no end token came within the limit
    texts: list = None  # [N]  the completions, without their end token; with <think> where the prompt ends in it
    group_size: int = 1  # G

    def rows(self, index):
        """ids, attention and mask of some of the rows, without the padding that only the others need."""
        prompt_lengths, lengths = token_counts(self.attention[index], self.mask[index])
        P = self.ids.shape[1] - self.mask.shape[1]
        T = max(lengths)
        columns = slice(P - max(prompt_lengths), P + T)
        return self.ids[index, columns], self.attention[index, columns], self.mask[index, :T]

    def saved(self):
        """Sampled outputs as plain lists, without padding: each [prompt, tokens, log π, entropy, truncated, text]."""
        prompts, outputs = token_lists(self.ids, self.attention, self.mask)
        logp = self.logp.tolist()
        entropy = self.entropy.tolist()
        truncated = self.truncated.tolist()
        saved = []
        for row, tokens in enumerate(outputs):
            n = len(tokens)
            saved.append([prompts[row], tokens, logp[row][:n], entropy[row][:n], truncated[row], self.texts[row]])
        return saved


def rollout_from_saved(saved, group_size, device):
    """The rollout that `Rollout.saved` has written down, or some of its questions."""
    prompts, completions, logp, entropy, truncated, texts = zip(*saved)
    return Rollout(
        *batch(prompts, completions, device),
        logp=padded(logp).to(device),
        entropy=padded(entropy).to(device),
        truncated=torch.tensor(truncated, device=device),
        texts=list(texts),
        group_size=group_size,
    )


def rollout_from_texts(model, tokenizer, prompts, texts, max_new_tokens):
    """A rollout of given texts, one for each prompt, each with an end token; too long ones are cut.

    Its texts are those that the tokenizer makes of their tokens.
    """
    ends = [end_of_turn(tokenizer), tokenizer.eos_token_id, *end_tokens(model, tokenizer)]
    end = next(token for token in ends if token is not None)
    completions = []
    truncated = []
    read = []  # the texts of the tokens
    for prompt, text in zip(prompts, texts):
        closing = "</think>\n\n" if opening(tokenizer, prompt) else ""
        tokens = tokenizer(closing + text, add_special_tokens=False)["input_ids"]
        truncated.append(len(tokens) >= max_new_tokens)
        tokens = tokens[:max_new_tokens]
        read.append(text_of(tokenizer, prompt, tokens))
        completions.append(tokens if truncated[-1] else [*tokens, end])
    truncated = torch.tensor(truncated, device=model.device)
    return Rollout(*batch(prompts, completions, model.device), truncated=truncated, texts=read)


def at_tokens(tokenizer, rollout, marks):
    """Numbers at positions in the outputs' texts, moved to tokens: numbers [N, T], and where there is one [N, T].

    marks: for each output [(position in its text, number)], for example (end of a reasoning step, its reward). Of two
    positions in one token the later number counts.
    """
    numbers = torch.zeros(rollout.mask.shape)
    marked = torch.zeros(rollout.mask.shape, dtype=torch.bool)
    prompts, outputs = token_lists(rollout.ids, rollout.attention, rollout.mask)
    for row, pairs in enumerate(marks):
        before = len(opening(tokenizer, prompts[row]))
        for position, number in pairs:
            token = token_at(tokenizer, outputs[row], position - before)
            numbers[row, token] = number
            marked[row, token] = True
    return numbers, marked


def token_at(tokenizer, ids, position):
    """The index of the first token with which the text of `ids` has `position` characters, or of the last token."""

    def length_with(token):
        return len(tokenizer.decode(ids[: token + 1], skip_special_tokens=True))

    # a search by halves: with more tokens the text is never shorter
    return bisect.bisect_left(range(len(ids) - 1), position, key=length_with)


# ---- attention over packed sequences -------------------------------------------------------------------------------
# In a decoder only attention mixes tokens. So the tokens of a batch can be packed into one sequence, without padding
# and with each prompt only once, if the attention knows which of them belong together:
#
#     tokens     q  q  q  o₁ o₁ o₂ o₂ o₂  q' q' o₃ o₃ …       the last token of an output is left out
#     positions  0  1  2  3  4  3  4  5   0  1  2  3       each output follows its prompt, and sees it and itself
#
# In every layer transformers calls `packed_attention`, which calls the attention of a "layout". There are two. In a
# PackedBatch whole texts are read at once. In a KVCache, below, each output grows by one token at a time.

UNSUPPORTED = """{} cannot be run here: supported are Qwen2, Qwen2.5, Qwen3, LLaMA 3, SmolLM and models like them, \
with softmax attention to the whole text once a layer, and logits straight from the head"""

# With a mask of 4 dimensions transformers makes none of its own. It is empty: an attention that used it would fail.
NO_MASK = torch.zeros(1, 1, 1, 0)


def packed_attention(module, query, key, value, mask, *, layout, scaling=None, **_):
    """The attention of one layer, as transformers calls it, with arguments that are not needed here."""
    query = query.to(value.dtype)  # under autocast RoPE leaves queries and keys in fp32
    key = key.to(value.dtype)
    return layout.attention(module.layer_idx, query, key, value, scaling), None


def run_trunk(trunk, layout, ids, positions):
    """Last hidden states of tokens in a layout: ids, positions [rows, tokens] -> [rows, tokens, D]."""
    out = trunk(
        input_ids=ids,
        position_ids=positions,
        attention_mask=NO_MASK,
        layout=layout,
        use_cache=False,
    )
    return out.last_hidden_state


@torch.no_grad()
def use_packed_attention(model, name):
    """Give a model the attention of this section. ModelError if a short text has other logits with it."""
    prompt = [3, 1, 4, 1, 5]  # any tokens
    output = [2, 6, 5]
    try:
        expected = model(torch.tensor([prompt + output], device=model.device)).logits[0, :-1]  # [7, V]
    except Exception as error:  # a config that contradicts itself raises whatever it likes
        raise ModelError(f"{name} cannot be run: its own forward pass fails: {error}") from error
    check_finite(expected)
    transformers.AttentionInterface.register("packed", packed_attention)
    model.set_attn_implementation("packed")
    config = model.config.get_text_config()
    packed = PackedBatch([(prompt, [output])], model.device, keep_kv=True)
    try:
        logits = head_logits(packed.read(model.base_model), *head_weights(model))  # [7, V]
        same = (logits - expected).abs().max() < 1e-3 * expected.abs().max()
        once_a_layer = list(packed.kv) == list(range(config.num_hidden_layers))
    except Exception as error:  # an architecture that does not know our arguments raises whatever it likes
        raise ModelError(UNSUPPORTED.format(name)) from error
    if not (same and once_a_layer and reads_the_whole_text(config)):
        raise ModelError(UNSUPPORTED.format(name))


def reads_the_whole_text(config):
    """Does every layer read the whole text, and is no logit capped? A comparison on a short text cannot show that."""
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False
    if set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        return False
    return getattr(config, "final_logit_softcapping", None) is None


class Group(NamedTuple):
    """The outputs of a prompt in a PackedBatch, each without its last token: nothing is predicted from that one."""

    n: int  # the number of outputs
    T: int  # tokens of the longest, without its last
    places: Tensor  # [tokens]  row of each token in a table [n·T, …] in which the outputs are padded

    def pad(self, x):
        """Their tokens with padding: [1, heads, tokens, D] -> [n, heads, T, D]."""
        x = x[0].transpose(0, 1)  # [tokens, heads, D]
        table = x.new_zeros(self.n * self.T, *x.shape[1:])  # [n·T, heads, D]
        table = table.index_copy(0, self.places, x)
        return table.unflatten(0, (self.n, self.T)).transpose(1, 2)


class PackedBatch:
    """Prompts and their outputs packed into one sequence: q₁ o₁ o₂ … q₂ o_{G+1} …"""

    def __init__(self, groups, device, keep_kv=False):
        """groups: [(a prompt, [its outputs])], all of them lists of token ids."""
        ids, positions, predictors = [], [], []
        self.groups = []
        self.sizes = []  # tokens of the first prompt, of its outputs, of the next prompt …
        for prompt, outputs in groups:
            ids += prompt
            positions += range(len(prompt))
            prompt_end = len(ids) - 1  # it predicts the first token of each output
            T = max(map(len, outputs)) - 1
            places = []
            for row, output in enumerate(outputs):
                length = len(output) - 1
                places += range(row * T, row * T + length)
                predictors += [prompt_end, *range(len(ids), len(ids) + length)]
                ids += output[:-1]
                positions += range(len(prompt), len(prompt) + length)
            self.sizes += [len(prompt), len(places)]
            self.groups.append(Group(len(outputs), T, torch.tensor(places, device=device)))
        self.ids = torch.tensor([ids], device=device)  # [1, tokens]
        self.positions = torch.tensor([positions], device=device)  # [1, tokens]
        # place of the token that predicts each output token
        self.predictors = torch.tensor(predictors, device=device)
        self.keep_kv = keep_kv
        self.kv = {}  # {layer: (keys, values)}, each [1, heads, tokens, D]

    def read(self, trunk):
        """The last hidden states of all tokens: [tokens, D]."""
        return run_trunk(trunk, self, self.ids, self.positions)[0]

    def attention(self, layer, query, key, value, scaling):
        """Causal attention of every output to its prompt and itself: [1, heads, tokens, D] -> [1, tokens, heads, D]."""
        if self.keep_kv:
            if layer in self.kv:
                raise ModelError("a layer has two attentions")
            self.kv[layer] = key, value
        # fast fp32 kernels need as many key heads as query heads
        if query.is_cuda and query.dtype == torch.float32:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        split = [x.split(self.sizes, 2) for x in (query, key, value)]
        qkv = list(zip(*split))  # (query, key, value) of the first prompt, of its outputs, of the next prompt …
        parts = []
        for group, of_prompt, of_outputs in zip(self.groups, qkv[::2], qkv[1::2]):
            parts.append(prompt_attention(*of_prompt, scaling))
            if len(group.places):  # else each output has one token, which is left out
                parts.append(outputs_attention(group, of_prompt, of_outputs, scaling))
        return torch.cat(parts)[None]


def prompt_attention(query, key, value, scaling):
    """Attention of a prompt to itself: [1, heads, P, D] -> [P, heads, D]."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


def outputs_attention(group, of_prompt, of_outputs, scaling):
    """Attention of the outputs of a prompt to the prompt and to themselves: [tokens, heads, D].

    of_prompt, of_outputs: (query, key, value) of their tokens. Here the outputs are padded to the longest.
    """
    # here: it takes as long to import as torch
    from torch.nn.attention.bias import causal_lower_right

    _, prompt_key, prompt_value = of_prompt  # [1, heads, P, D]
    query, key, value = [group.pad(x) for x in of_outputs]  # [n, heads, T, D]
    key = torch.cat([prompt_key.expand(group.n, -1, -1, -1), key], 2)  # [n, heads, P + T, D]
    value = torch.cat([prompt_value.expand(group.n, -1, -1, -1), value], 2)
    mask = causal_lower_right(group.T, key.shape[2])  # the queries are the last T of P + T tokens
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, group.places)


# ---- scoring -------------------------------------------------------------------------------------------------------


def with_full_weights(function):
    """Decorator of function(module, …): if the module is sharded, its weights are gathered while the function runs."""

    @functools.wraps(function)
    def run(module, *inputs):
        if module not in SHARDED:
            return function(module, *inputs)
        return SHARDED[module](lambda: function(module, *inputs))

    return run


@with_full_weights
def token_logprobs(model, ids, attention, mask, temperature):
    """log π(o_{i,t} | q, o_{i,<t}) = log softmax(logits / τ) of each completion token, fp32, [N, T]; 0 off the mask."""
    hidden = hidden_states(model.base_model, ids, attention, mask)  # [tokens, D]
    weight, bias = head_weights(model)
    targets = ids[:, -mask.shape[1] :][mask]  # [tokens]
    dtype = compute_dtype(model)
    logp = HeadLogprobs.apply(hidden, weight, bias, targets, temperature, dtype)  # [tokens]
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


class Critic(nn.Module):
    """PPO's value function: a copy of the policy's trunk, trained by itself, with a value head that begins at 0."""

    def __init__(self, model):
        super().__init__()
        self.trunk = copy_with(model.base_model)
        head = model.get_output_embeddings().weight
        self.value_head = nn.Linear(head.shape[1], 1).to(head)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @with_full_weights
    def token_values(self, ids, attention, mask):
        """V(q, o_{i,<t}), the expected reward from token t on, before it is sampled: fp32, [N, T]; 0 off the mask."""
        hidden = hidden_states(self.trunk, ids, attention, mask)  # [tokens, D]
        hidden = hidden.to(self.value_head.weight.dtype)  # never in bf16
        values = self.value_head(hidden).squeeze(1)  # [tokens]
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


def hidden_states(trunk, ids, attention, mask):
    """The trunk's last hidden state from which each completion token is predicted, row after row: [tokens, D]."""
    groups = []  # [(a prompt, [its outputs])]: consecutive rows with the same prompt share it
    for prompt, output in zip(*token_lists(ids, attention, mask)):
        if not groups or groups[-1][0] != prompt:
            groups.append((prompt, []))
        groups[-1][1].append(output)
    packed = PackedBatch(groups, ids.device)
    # gradient checkpointing needs train mode; nothing else does, dropout is 0
    trunk.train(torch.is_grad_enabled())
    with autocast(trunk):
        hidden = packed.read(trunk)
    trunk.eval()
    return hidden.index_select(0, packed.predictors)


# how many logits are in memory at once while tokens are scored
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}


class HeadLogprobs(torch.autograd.Function):
    """log softmax(logits / τ) of given tokens with logits = W h + b, for a chunk of tokens at a time.

    All logits at once, N·T rows of 150,000 numbers, would be most of a step's memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, dtype):
        """hidden [tokens, D], weight [V, D], bias [V] or None, targets [tokens] -> [tokens], computed in `dtype`."""
        hidden = hidden.to(dtype)
        weight = weight.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature = temperature
        ctx.chunk = max(1, LOGITS_AT_ONCE[weight.device.type] // len(weight))
        # written in place, as in backward: a list of chunks would leave gaps in memory
        logp = at_least_fp32(hidden.new_empty(len(hidden)))
        for chunk in slices(len(hidden), ctx.chunk):
            logits = head_logits(hidden[chunk], weight, bias, temperature)  # [chunk, V]
            target = targets[chunk, None]  # [chunk, 1]
            logp[chunk] = logits.gather(1, target).squeeze(1) - logits.logsumexp(1)  # [chunk]
        return logp

    @staticmethod
    def backward(ctx, d_logp):
        """∂ log π_i / ∂ logits_j = (1[i = j] - π_j) / τ."""
        hidden, weight, bias, targets = ctx.saved_tensors
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dtype = d_logp.dtype
        d_logp = d_logp / ctx.temperature
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        for chunk in slices(len(hidden), ctx.chunk):
            d = d_logp[chunk, None]  # [chunk, 1]
            pi = torch.softmax(head_logits(hidden[chunk], weight, bias, ctx.temperature), 1)  # [chunk, V]
            d_logits = pi.mul_(-d).scatter_add_(1, targets[chunk, None], d)  # [chunk, V]
            if needs_bias:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[chunk] = d_logits @ weight
            if needs_weight and weight.dtype == dtype:  # in place, which saves a [V, D]
                d_weight.addmm_(d_logits.T, hidden[chunk])
            elif needs_weight:
                d_weight += d_logits.T @ hidden[chunk]
        return d_hidden.to(dtype), d_weight, d_bias, None, None, None


def slices(rows, at_once):
    """Slices that cover so many rows."""
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


def head_weights(model):
    """The weight [V, D] of a model's head, and its bias [V] or None."""
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def head_logits(hidden, weight, bias, temperature=1.0):
    """(W h + b) / τ in fp32 or wider: hidden [n, D] -> [n, V]. Sampling and scoring both compute it here.

    On a GPU bf16 numbers are multiplied, but their sums stay in fp32: rounded to bf16, a logit of 20 is wrong by 0.06.
    """
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if bias is not None:
            logits = logits + bias
    else:
        logits = at_least_fp32(F.linear(hidden, weight, bias))
    return at_temperature(logits, temperature)


def at_temperature(logits, temperature):
    """logits / τ. At τ = 1 nothing is copied. τ = 0 takes the likeliest token, and has log π at τ = 1."""
    if temperature in (0, 1):
        return logits
    return logits / temperature


def at_least_fp32(logits):
    """Logits in fp32, or float64 if they are: a log-softmax in bf16 is wrong by up to 0.03."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_finite(logits):
    if not logits.isfinite().all():
        raise ModelError("the model's logits are not finite: its weights are broken, or training has diverged")


# ---- memory, micro-batches, time -----------------------------------------------------------------------------------

# How many tokens are computed at once: in a micro-batch, padding included; in the KV cache. See `limit_memory`.
# copies_kept: 1 while `sample` keeps its copies of models, caches and graphs for the next time; 0 once memory ran out.
LIMITS = {"token_budget": 10**9, "cache_tokens": 10**9, "copies_kept": 1}
LEAST_LIMIT = 1024  # they are not halved below it


def limit_memory(token_budget, cache_tokens):
    """Set how many tokens are computed at once."""
    LIMITS.update(token_budget=token_budget, cache_tokens=cache_tokens, copies_kept=1)


def retry_with_less_memory(name):
    """Decorator of a function that computes LIMITS[name] tokens at once.

    If the GPU's memory is too small, the function is called again: first without the copies that `sample` keeps, then
    with half of the limit. With several ranks, or at the least limit, the error is raised.
    """

    def decorator(function):
        @functools.wraps(function)
        def run(*inputs, **named):
            while True:
                if DECODING and not LIMITS["copies_kept"]:
                    free_copies()
                kept = len(DECODING)
                limit = LIMITS[name]
                try:
                    return function(*inputs, **named)
                except torch.OutOfMemoryError:
                    if WORLD > 1 or (limit <= LEAST_LIMIT and not kept):
                        raise
                # here the error is gone, and the tensors that it held
                free_copies()
                change = "without what sampling keeps"
                if kept:
                    LIMITS["copies_kept"] = 0
                else:
                    LIMITS[name] = max(limit // 2, LEAST_LIMIT)
                    change = f"with {LIMITS[name]}"
                tqdm.write(f"note: out of memory with --{name} {limit}; trying again {change}.")

        return run

    return decorator


def split_rows(rollout, rows):
    """Rows as lists of at most LIMITS["token_budget"] tokens; a row with more tokens gets a list of its own.

    Padding counts, because attention pads the outputs of a question. Outputs of a question stay together where they
    fit, as their prompt is read once. The longest come first: if memory is too small, it shows at once.
    """
    prompt_lengths, lengths = token_counts(rollout.attention, rollout.mask)
    longest = {}  # question: tokens of its longest row
    for row in rows:
        question = row // rollout.group_size
        longest[question] = max(longest.get(question, 0), prompt_lengths[row] + lengths[row])

    def place(row):
        question = row // rollout.group_size
        return -longest[question], question, -lengths[row]

    batches = []
    P = T = 0  # the longest prompt and the longest output of the last list
    for row in sorted(rows, key=place):
        P = max(P, prompt_lengths[row])
        T = max(T, lengths[row])
        if not batches or (len(batches[-1]) + 1) * (P + T) > LIMITS["token_budget"]:
            batches.append([])
            P = prompt_lengths[row]
            T = lengths[row]
        batches[-1].append(row)
    return batches


def micro_batches(rollout, rows):
    """Split rows as `split_rows` does: yields (rows, factor) with factor 1.

    Then it yields row 0 with factor 0 until the rank with the most micro-batches is through: when weights are sharded
    all ranks must make equal numbers of forward passes.
    """
    batches = split_rows(rollout, rows)
    most = max(gather([len(batches)]))
    for part in batches:
        yield part, 1.0
    for _ in range(most - len(batches)):
        yield [0], 0.0


def peak_memory():
    """The most memory, in GB, that this process has needed: on a GPU since the last call, on a CPU since its start."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


CLOCK = {"start": 0.0}
SECONDS = {}  # {"seconds/PART": how long this part has taken in this step}


def start_clock():
    """Begin a new step: its seconds are 0."""
    SECONDS.clear()
    CLOCK["start"] = time.perf_counter()


@contextmanager
def timed(part):
    """Add the seconds of a block or function, those of the GPU included, to SECONDS."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    name = f"seconds/{part}"
    SECONDS[name] = SECONDS.get(name, 0.0) + time.perf_counter() - start


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, threads: {torch.get_num_threads()}"


@timed("logprobs")
@retry_with_less_memory("token_budget")
@torch.no_grad()
def in_micro_batches(function, network, rollout, *more):
    """function(network, ids, attention, mask, *more) of all rows of a rollout, without gradient: [N, T]."""
    result = None
    for rows, weight in micro_batches(rollout, range(len(rollout.mask))):
        part = function(network, *rollout.rows(rows), *more)  # [n, T of these rows]
        if result is None:
            result = part.new_zeros(rollout.mask.shape)  # [N, T]
        if weight:
            result[rows, : part.shape[1]] = part
    return result


def log_probs(model, rollout, temperature):
    """log π of every token of a rollout, without gradient: [N, T]."""
    return in_micro_batches(token_logprobs, model, rollout, temperature)


def values(critic, rollout):
    """The critic's value before every token of a rollout, without gradient: [N, T]."""
    return in_micro_batches(Critic.token_values, critic, rollout)


# ---- sampling ------------------------------------------------------------------------------------------------------

PROMPTS_AT_ONCE = 16  # read in one forward pass while sampling


@timed("sample")
@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, generator=None):
    """Sample `group_size` completions of each prompt (token ids) from softmax(logits / τ); τ = 0 takes the likeliest.

    Nothing else changes the distribution: no top-k, no top-p, and of a model's generation config only the end tokens
    count. `prompts` is this rank's share. Each rank draws the random numbers of all ranks and uses its part, so any
    number of ranks samples the same outputs.
    """
    counts = gather([len(prompts)])  # prompts of each rank
    most_tokens = max(gather([len(prompt) for prompt in prompts])) + max_new_tokens  # of prompt and output
    limit = context_length(model)
    if most_tokens > limit:
        raise ModelError(f"prompt and output take up to {most_tokens} tokens, the model reads {limit}")
    N = len(prompts) * group_size
    before = sum(counts[:RANK]) * group_size  # outputs of the ranks before this one
    uniform = torch.empty(0, max_new_tokens)
    if temperature:
        uniform = torch.rand(sum(counts) * group_size, max_new_tokens, generator=generator)
        uniform = uniform[before : before + N]
    ends = end_tokens(model, tokenizer)

    @retry_with_less_memory("cache_tokens")
    def sample_outputs():
        # the same size on all ranks: it decides whether sharded weights are copied, which all must do together
        columns = most_tokens if model.device.type == "cpu" else round_up(most_tokens, COLUMN_BLOCK)
        prompts_at_once = max(1, LIMITS["cache_tokens"] // (columns * group_size))
        at_once = min(prompts_at_once, max(counts)) * group_size
        slots = max(2, at_once)  # 2: see `decode_gpu`
        size = Size(max(counts) * group_size, slots, columns, max_new_tokens)
        decoding = decoding_batch(model, size, ends)
        decoding.reset(temperature, uniform)
        decoding.sample_all(prompts, group_size, at_once)
        return decoding

    decoding = sample_outputs()
    lengths = decoding.length[:N].tolist()
    completions = [row[:length] for row, length in zip(decoding.tokens[:N].tolist(), lengths)]
    truncated = [tokens[-1] not in ends for tokens in completions]
    texts = []
    asked = repeated(prompts, group_size)
    for prompt, tokens, too_long in zip(asked, completions, truncated):
        if not too_long:
            tokens = tokens[:-1]  # without the end token
        texts.append(text_of(tokenizer, prompt, tokens))
    ids, attention, mask = batch(asked, completions, model.device)
    logp = decoding.logp[:N, : mask.shape[1]].where(mask, 0.0)  # [N, T]
    entropy = decoding.entropy[:N, : mask.shape[1]].where(mask, 0.0)
    check_finite(logp)  # from nan logits the last token is sampled, without an error
    return Rollout(
        ids,
        attention,
        mask,
        logp=logp,
        entropy=entropy,
        truncated=torch.tensor(truncated, device=model.device),
        texts=texts,
        group_size=group_size,
    )


def sample_token(logits, temperature, uniform):
    """A token from softmax(logits / τ) for each row, its log π and the entropy of π: fp32 [n, V] -> 3 × [n, 1].

    It is the first at which the cumulative sum of π passes `uniform` [n, 1], random numbers between 0 and 1.
    """
    logits = at_temperature(logits, temperature)  # [n, V]
    pi = torch.softmax(logits, -1)  # [n, V]
    if temperature:
        cumulative = pi.cumsum(-1)  # [n, V]
        total = cumulative[:, -1:]
        # less than the total: else a token with π = 0 at the end could be drawn
        below_total = total.nextafter(torch.zeros_like(total))
        target = torch.minimum(uniform * total, below_total)
        token = torch.searchsorted(cumulative, target, right=True)
        token = token.clamp(max=logits.shape[1] - 1)  # it is beyond the last only where logits are nan
    else:
        token = logits.argmax(-1, keepdim=True)
    logp = pi.gather(1, token).log()  # π is known here; in scoring it is not, and log π is logits - logsumexp
    # H = - Σ π log π = log Σ exp(logits) - Σ π logits; log Σ exp(logits) is logits - log π of any token
    entropy = logits.gather(1, token) - logp - (pi * logits).sum(-1, keepdim=True)
    return token, logp.float(), entropy.float()


class KVCache:
    """Keys and values of all layers, in slots: one for each output that is being sampled."""

    def __init__(self, slots, columns, device):
        self.slots = slots
        self.columns = columns  # tokens in a slot
        # {layer: [keys, values]}, each [slots, heads, columns, D]; made when the first prompt is read
        self.layers = {}
        self.numbers = torch.arange(max(slots, columns), device=device)  # 0, 1, 2 …, of slots or of columns
        # of the step that is being computed, in the first n slots:
        self.positions = None  # [n]  where the new token stands, in prompt and output
        self.bias = None  # [n, 1, 1, width]  -∞ for columns that are not filled yet, else 0

    def write_prompts(self, packed, first, group_size):
        """Copy keys and values of packed prompts into `group_size` slots each, from slot `first` on."""
        for layer, both in packed.kv.items():
            if layer not in self.layers:
                self.layers[layer] = [x.new_zeros(self.slots, x.shape[1], self.columns, x.shape[3]) for x in both]
            for table, x in zip(self.layers[layer], both):
                of_prompts = x[0].split(packed.sizes[::2], 1)  # [heads, P, D] of each
                for slots, of_prompt in zip(table[first:].split(group_size), of_prompts):
                    slots[:, :, : of_prompt.shape[1]] = of_prompt

    def begin_step(self, positions, width):
        """Prepare a step: slot i reads the token at positions[i], and the first `width` columns: positions [n]."""
        self.positions = positions
        unfilled = self.numbers[:width] > positions[:, None]  # [n, width]
        bias = self.layers[0][0].new_zeros(len(positions), 1, 1, width)
        self.bias = bias.masked_fill_(unfilled[:, None, None], -math.inf)

    def attention(self, layer, query, key, value, scaling):
        """Attention of one new token per slot to all of its slot: [n, heads, 1, D] -> [n, 1, heads, D]."""
        keys, values = self.layers[layer]  # [slots, heads, columns, D]
        n, _, _, width = self.bias.shape
        keys[self.numbers[:n], :, self.positions] = key[:, :, 0]  # [n, heads, D]
        values[self.numbers[:n], :, self.positions] = value[:, :, 0]
        keys = keys[:n, :, :width]
        values = values[:n, :, :width]
        # query heads that share a key head become several queries of that one head: so keys need not be repeated
        queries = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)  # [n, key heads, query heads of each, D]
        out = F.scaled_dot_product_attention(queries, keys, values, self.bias, scale=scaling)
        return out.flatten(1, 2)[:, None]

    def move(self, slots, to):
        """Copy some slots to others."""
        for table in itertools.chain(*self.layers.values()):
            table[to] = table[slots]


class Size(NamedTuple):
    """How large the tables and the cache of a DecodingBatch are."""

    outputs: int  # N
    slots: int  # of the cache
    columns: int  # of the cache: tokens in a slot
    max_new_tokens: int  # of an output


class DecodingBatch:
    """N outputs: a row for each in the tables, and a slot of the KV cache for each of those that are sampled now.

        slot              0   1   2   3 | 4   5       the first `active` slots are in use
        output_of_slot    7   2   5   4 |-1  -1       -1, a free slot: it uses the last row of the tables
        tokens[7]         o   o   o   …               length[7] of them; each step adds one

    An output that has ended keeps its slot for a while. What is sampled for it then is not counted: it goes into the
    column after its last token. A GPU computes free slots, too.
    """

    def __init__(self, model, size, ends):
        self.model = model
        self.size = size
        self.ends = ends
        self.cache = KVCache(size.slots, size.columns, model.device)
        self.graphs = {}  # on a GPU {(slots, columns that are read, temperature): the CUDA graph of a decode step}
        self.recordable = True
        self.temperature = 1.0
        self.begun = 0  # outputs that have begun
        self.active = 0  # slots in use
        rows = size.outputs + 1
        table = (rows, size.max_new_tokens + 1)
        with model.device:
            self.end_ids = torch.tensor(ends)
            self.output_of_slot = torch.zeros(size.slots).long()
            self.tokens = torch.zeros(table).long()
            self.logp = torch.zeros(table)
            self.entropy = torch.zeros(table)
            self.uniform = torch.zeros(table)  # the random number for each token
            self.length = torch.zeros(rows).long()  # the number of tokens of each output
            # where the newest one stands in prompt and output
            self.position = torch.zeros(rows).long()
            self.ended = torch.ones(rows).bool()

    def serves(self, size, ends):
        """Can it be used for outputs of this size, with these end tokens?"""
        large_enough = all(old >= new for old, new in zip(self.size, size))
        return large_enough and self.size.max_new_tokens == size.max_new_tokens and self.ends == ends

    def reset(self, temperature, uniform):
        """Forget all outputs. uniform [N, T]: the random numbers for their tokens, [0, T] at temperature 0."""
        self.temperature = temperature
        self.begun = 0
        self.active = 0
        self.uniform[: len(uniform), :-1] = uniform.to(self.uniform.device)
        self.output_of_slot.fill_(-1)

    def sample_all(self, prompts, group_size, at_once):
        """Sample all outputs, at most `at_once` at a time: when enough have ended, the next prompts begin."""
        waiting = list(prompts)
        enough = max(group_size, at_once // 8)  # free slots
        bar = tqdm(
            total=len(prompts) * group_size,
            desc="sampling",
            unit="output",
            leave=False,
            delay=2,
            disable=NO_BAR,
        )
        with bar:
            while waiting or self.active:
                while waiting and at_once - self.active >= enough:
                    count = min(PROMPTS_AT_ONCE, (at_once - self.active) // group_size)
                    self.prefill(waiting[:count], group_size)
                    del waiting[:count]
                self.decode()
                bar.update(self.remove_ended())

    def prefill(self, prompts, group_size):
        """Read each prompt once, copy its keys and values to the slots of its outputs, sample their first tokens."""
        # an output of one token: nothing of it is read, the prompt's last token predicts it
        packed = PackedBatch([(prompt, [[0]]) for prompt in prompts], self.model.device, keep_kv=True)
        with autocast(self.model):
            hidden = packed.read(self.model.base_model)[packed.predictors]  # [Q, D]
        logits = head_logits(hidden, *head_weights(self.model))  # [Q, V]
        self.cache.write_prompts(packed, self.active, group_size)
        n = len(prompts) * group_size
        outputs = torch.arange(self.begun, self.begun + n, device=logits.device)
        self.output_of_slot[self.active : self.active + n] = outputs
        self.position[outputs] = packed.positions[0, packed.predictors].repeat_interleave(group_size)
        self.length[outputs] = 0
        self.ended[outputs] = False
        self.begun += n
        self.active += n
        self.append_tokens(outputs, logits.repeat_interleave(group_size, 0))

    def append_tokens(self, outputs, logits):
        """Sample the next token of some outputs and write it down: outputs [n], logits [n, V]."""
        # row and column in the tables, each [n, 1]
        place = outputs[:, None], self.length[outputs, None]
        token, logp, entropy = sample_token(logits, self.temperature, self.uniform[place])
        self.tokens[place] = token
        self.logp[place] = logp
        self.entropy[place] = entropy
        grown = (~self.ended[outputs]).long()  # [n]  1, or 0 for an output that has ended
        self.length[outputs] += grown
        self.position[outputs] += grown
        self.ended[outputs] |= (token == self.end_ids).any(1) | (self.length[outputs] == self.size.max_new_tokens)

    def decode_step(self, n, width):
        """Read the newest token of the first n slots, and sample the next. The cache is read up to column `width`."""
        outputs = self.output_of_slot[:n]
        position = self.position[outputs]  # [n]
        token = self.tokens[outputs, self.length[outputs] - 1]  # [n]
        self.cache.begin_step(position, width)
        with autocast(self.model):
            hidden = run_trunk(self.model.base_model, self.cache, token[:, None], position[:, None])
        logits = head_logits(hidden[:, -1], *head_weights(self.model))  # [n, V]
        self.append_tokens(outputs, logits)

    def decode(self):
        """Sample the next token of every slot in use; on a GPU the next few."""
        last = int(self.position[self.output_of_slot[: self.active]].max())
        if self.position.is_cuda:
            decode_gpu(self, last)
        else:
            self.decode_step(self.active, last + 1)

    def remove_ended(self):
        """Free the slots of the outputs that have ended, and return their number. The last slots fill the gaps."""
        ended = self.ended[self.output_of_slot[: self.active]].tolist()
        before = self.active
        self.active = ended.count(False)
        gaps = [slot for slot in range(self.active) if ended[slot]]
        # as many as there are gaps
        moved = [slot for slot in range(self.active, before) if not ended[slot]]
        if gaps:
            self.output_of_slot[gaps] = self.output_of_slot[moved]
            self.cache.move(moved, gaps)
        self.output_of_slot[self.active : before] = -1
        return before - self.active


# ---- LoRA (arXiv 2106.09685), the reference and other copies -------------------------------------------------------


class LoRALinear(nn.Linear):
    """W x + (α/r) B A x: W is frozen; A [r, in] and B [out, r] are trained, B is 0 at first."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        # as nn.Linear is initialised
        A = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features, device="cpu"), a=5**0.5)
        self.lora_A = nn.Parameter(A.to(linear.weight))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def linear_layers(model):
    """Every linear layer of the trunk, {name: layer}: without the head and the embeddings."""
    return {name: layer for name, layer in model.base_model.named_modules() if isinstance(layer, nn.Linear)}


def add_lora(model, rank, alpha, seed=0):
    """Put an adapter beside every linear layer of the trunk, and freeze everything else. It seeds torch's generator."""
    torch.manual_seed(seed)
    layers = linear_layers(model)
    smallest = min((min(layer.weight.shape) for layer in layers.values()), default=0)
    if rank > smallest:
        raise ModelError(f"LoRA rank {rank} is above the size of the model's smallest linear layer, {smallest}")
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.base_model.set_submodule(name, LoRALinear(layer, rank, alpha))


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


def merge_adapters(model):
    """W ← W + (α/r) B A; then B is 0, as at first."""
    for layer in lora_layers(model):
        layer.weight += layer.scale * layer.lora_B @ layer.lora_A
        layer.lora_B.zero_()


def frozen_copy(model):
    """A copy that no gradient and no update reaches: the reference.

    With LoRA it has the adapter as it is now. It uses the frozen weights of the policy itself, unless they are sharded.
    Without LoRA its linear layers are in bf16 where the policy computes in bf16 anyway.
    """
    gc.collect()  # free the old reference: FSDP keeps it alive through a reference cycle
    if model in SHARDED:
        reference = copy_with(model, torch.Tensor.cpu)
    else:
        reference = copy_with(model)
    if in_bf16(model.device) and not lora_layers(reference):
        round_linear_layers(reference)
    return shard(reference.requires_grad_(False))


@torch.no_grad()
def copy_with(module, change=None):
    """A copy with change(weight) in the place of each weight; sharded weights are gathered first.

    Without `change` the copy has clones of the trained weights, and shares the frozen ones.
    """
    source = SKELETONS.get(module, module)
    copies = {}  # {id of a weight of the source: the weight that the copy gets}
    for old, weight in zip(source.parameters(), module.parameters()):
        new = full_tensor(weight)
        if change:
            new = change(new)
        elif weight.requires_grad:
            new = new.clone()
        copies[id(old)] = nn.Parameter(new, weight.requires_grad)
    # deepcopy looks up each object's id in this dict before it copies the object: so it takes these weights
    return copy.deepcopy(source, copies)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on. `with writer:` waits for the last one at its end."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.writing = None  # the result of the thread, a Future, until somebody has asked for it

    def save(self, folder, networks, optimizer, generator, about):
        """Replace the folder's state.safetensors, whole or not at all. All ranks call it.

        networks is {name: module}; `about` becomes JSON. Nothing is pickled. The thread writes a copy of the tensors,
        which takes as much memory as the file.
        """
        self.wait()  # for the checkpoint before this one
        tensors = {}
        for name, tensor in named_tensors(networks, optimizer, generator).items():
            tensors[name] = keep_on_rank_0(full_tensor(tensor))
        # a tensor, not metadata: it can be long, and the checksum covers it
        tensors["about"] = torch.frombuffer(bytearray(json.dumps(about), "ascii"), dtype=torch.uint8)
        if RANK == 0:
            self.writing = self.thread.submit(write_checkpoint, folder, tensors)

    def check(self):
        """If the last write has ended with an error, raise it."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self):
        """Wait for the last write. If it ended with an error, raise it, once."""
        writing = self.writing
        self.writing = None
        if writing:
            writing.result()

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, trace):
        self.wait()
        if error is None:
            barrier()  # the other ranks wait for rank 0


def named_tensors(networks, optimizer, generator):
    """The tensors of a checkpoint by name, not copied; tied weights appear once.

    With LoRA the frozen weights are left out: a resumed run loads them with its model.
    """
    tensors = {"generator": generator.get_state()}
    for network, module in networks.items():
        adapters = lora_layers(module)
        for name, weight in module.named_parameters():
            if adapters and not weight.requires_grad and ".lora_" not in name:
                continue
            name = f"{network}/{name}"
            tensors[name] = weight.detach()
            for key, value in optimizer.state.get(weight, {}).items():
                tensors[f"adam/{key}/{name}"] = value
    return tensors


def checksum(tensors):
    """A CRC of the bytes of tensors, so that a damaged file is noticed."""
    total = 0
    for name in sorted(tensors):
        as_bytes = tensors[name].contiguous().view(-1).view(torch.uint8)
        total = zlib.crc32(as_bytes.numpy(), total)
    return str(total)


def write_checkpoint(folder, tensors):
    folder.mkdir(exist_ok=True)
    unfinished = folder / "unfinished"
    with disk_errors(folder):
        safetensors.torch.save_file(tensors, unfinished, metadata={"checksum": checksum(tensors)})
    with open(unfinished, "rb+") as file:  # +: Windows asks for it
        os.fsync(file.fileno())  # on the disk before it gets its name
    os.replace(unfinished, folder / "state.safetensors")


def read_checkpoint(folder):
    """What was saved as `about`, and the tensors of a checkpoint; ModelError if the file is damaged."""
    path = folder / "state.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
        intact = checksum(tensors) == safetensors.safe_open(path, "pt").metadata()["checksum"]
        about = tensors.pop("about")
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged or no checkpoint of this program: {error}") from None
    if not intact:
        raise ModelError(f"{path} is damaged: its bytes are not those that were written")
    return json.loads(about.numpy().tobytes()), tensors


def load_checkpoint(saved, networks, optimizer, generator):
    """Fill networks, optimizer and generator with the tensors of a checkpoint."""
    tensors = named_tensors(networks, optimizer, generator)
    different = tensors.keys() ^ saved.keys()
    if different:
        raise ModelError(f"the checkpoint was made with another model: only one of the two has {min(different)}")
    try:
        for name, tensor in tensors.items():
            fill(tensor, saved[name])
    except RuntimeError as error:  # the same names, other shapes
        raise ModelError(f"the checkpoint was made with another model: {error}") from error
    generator.set_state(tensors["generator"])  # a copy of its state was filled


def reset_adam(optimizer):
    """AdamW's state as before its first step, which would make it: so too little memory for it shows at once."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }


# ---- a learned reward model ----------------------------------------------------------------------------------------


def load_reward_model(name):
    """A sequence classifier that was trained to score answers, from the hub or from a folder, and its tokenizer."""
    model, tokenizer = from_pretrained(transformers.AutoModelForSequenceClassification, name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{name} has no padding token")
    model.config.pad_token_id = tokenizer.pad_token_id
    if torch.cuda.is_available():
        model.cuda()
    return model, tokenizer


@torch.no_grad()
def reward_scores(reward_model, questions, completions):
    """A score for each completion: the only logit, or the log-odds of the last class, which should mean "good"."""
    model, tokenizer = reward_model
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    options = {
        "padding": True,
        "truncation": True,
        "max_length": limit,
        "return_tensors": "pt",
    }
    scores = []
    for chunk in slices(len(questions), 16):  # rows at once
        asked = questions[chunk]
        answers = completions[chunk]
        # a decoder reads the dialogue; the template has its own special tokens
        if tokenizer.chat_template:
            texts = []
            for question, answer in zip(asked, answers):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                texts.append(apply_template(tokenizer, messages))
            inputs = tokenizer(texts, **options, add_special_tokens=False)
        else:  # an encoder reads pairs of texts
            inputs = tokenizer(asked, answers, **options)
        with autocast(model):
            logits = model(**inputs.to(model.device)).logits.float()  # [rows, classes]
        good = logits[:, -1]
        if logits.shape[1] > 1:
            good = good - logits[:, :-1].logsumexp(1)
        scores += good.tolist()
    return scores


def standardised(scores):
    """(score - mean) / std, over the outputs of all ranks: [N]."""
    everyones = torch.tensor(gather(scores))
    std = everyones.std(correction=min(1, len(everyones) - 1))
    return (torch.tensor(scores) - everyones.mean()) / (std + 1e-4)


# ---- a judge -------------------------------------------------------------------------------------------------------

COMPARE = """Two answers to the same question. Which one is better?

Question: {}

Answer 1: {}

Answer 2: {}

Reply with the number of the better answer, 1 or 2, and nothing else."""


def load_judge(name):
    """A frozen language model that compares answers, and its tokenizer, to which 1 and 2 must be different tokens."""
    model, tokenizer = load(name)
    if last_token(tokenizer, "1") == last_token(tokenizer, "2"):
        raise ModelError(f"{name} cannot be a judge: 1 and 2 are the same token to it")
    return model.requires_grad_(False), tokenizer


def last_token(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"][-1]


def judge_group(judge, question, texts):
    """How each of G outputs fares against the others, each pair shown in both orders: two lists of G numbers.

    The first is the mean probability of being the better one, a soft reward. The second is the share of its pairs in
    which the verdict goes to the place, first or second, and not to an output.
    """
    G = len(texts)
    said = first_is_better(judge, question, list(itertools.permutations(texts, 2)))  # [G (G - 1)]
    first = torch.full((G, G), 0.5, dtype=torch.float64)  # [G, G]: i, shown first, is better than j
    first[~torch.eye(G, dtype=torch.bool)] = said.double()  # row by row, as the pairs
    wins = (first + 1 - first.T) / 2  # [G, G]
    flips = ((first > 0.5) == (first.T > 0.5)).fill_diagonal_(False)  # [G, G]
    wins = (wins.sum(1) - 0.5) / (G - 1)  # [G], without the diagonal
    return wins.tolist(), (flips.sum(1) / (G - 1)).tolist()


@torch.no_grad()
@retry_with_less_memory("token_budget")
def first_is_better(judge, question, pairs):
    """What a judge says of pairs of answers: the probability of the reply 1 against 2, for each pair: [pairs]."""
    model, tokenizer = judge
    texts = [COMPARE.format(question, first, second) for first, second in pairs]
    prompts = [encode(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    limit = context_length(model)
    if max(map(len, prompts)) >= limit:
        raise ModelError(f"a question with two answers is longer than the judge reads, {limit} tokens")
    replies = [[last_token(tokenizer, "1")], [last_token(tokenizer, "2")]] * len(pairs)
    rollout = Rollout(*batch(repeated(prompts, 2), replies, model.device), group_size=2)
    log_p = torch.zeros(len(replies), 1, device=model.device)
    # not `micro_batches`, in which ranks wait for each other: here they ask about unequal numbers of questions
    for rows in split_rows(rollout, range(len(replies))):
        log_p[rows] = token_logprobs(model, *rollout.rows(rows), 1.0)
    log_p = log_p.view(-1, 2).cpu()  # [pairs, 2]
    return torch.sigmoid(log_p[:, 0] - log_p[:, 1])


# ---- the tiny model ------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TINY = {
    "learning_rates": [4e-3, 8e-4],  # of AdamW, the highest one for each part of the corpus
    "muon_learning_rate": 0.01,  # the highest one, of the matrices between embedding and head
    "rows_per_step": 16,  # of supervised learning
    "vocabulary": 640,  # tokens at most
    "shape": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True},
}


def tiny_tokenizer(texts):
    """Qwen2's byte-level BPE and chat template with a vocabulary of its own; each digit is a token."""
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        texts,
        TINY["vocabulary"],
        show_progress=False,
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.add_tokens(["<reasoning>", "</reasoning>", "<answer>", "</answer>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny(folder, corpora):
    """Train a Qwen2 of 0.4 M parameters on lists of [(messages, completion)], one after the other; save it."""
    torch.manual_seed(0)
    texts = []
    for messages, completion in itertools.chain(*corpora):
        for message in messages:
            texts += [message["role"], message["content"], "assistant", completion]
    tokenizer = tiny_tokenizer(texts)
    config = transformers.Qwen2Config(
        **TINY["shape"],
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_packed_attention(model, "the tiny model")
    matrices = [layer.weight for layer in linear_layers(model).values()]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    count = TINY["rows_per_step"]
    bar = tqdm(
        total=sum(len(corpus) // count for corpus in corpora),
        desc="building the tiny model, once",
        leave=False,
        disable=NO_BAR,
    )
    with bar:
        for corpus, highest in zip(corpora, TINY["learning_rates"]):
            rows = []
            for messages, completion in corpus:
                output = tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
                rows.append((encode(tokenizer, messages), output))
            steps = len(rows) // count
            for step in range(steps):
                imitation_loss(model, rows[step * count : (step + 1) * count]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                share = min(1.0, (step + 1) / 20) * (1 - step / steps)  # of the highest learning rates
                adam.param_groups[0]["lr"] = highest * share
                adam.step()
                for matrix, momentum in zip(matrices, momenta):
                    muon_step(matrix, momentum, TINY["muon_learning_rate"] * share)
                model.zero_grad()
                bar.update()
    save(model, tokenizer, folder)


def muon_step(matrix, momentum, lr):
    """A step along the momentum, made orthogonal (Muon, Jordan 2024): training needs a quarter of AdamW's steps.

    torch.optim.Muon multiplies in bf16, which takes 35 times as long on a CPU that does not compute in bf16.
    """
    momentum.lerp_(matrix.grad, 0.05)
    direction = matrix.grad.lerp(momentum, 0.95)  # Nesterov's
    rows, columns = matrix.shape
    with torch.no_grad():
        matrix -= lr * max(1.0, rows / columns) ** 0.5 * orthogonalised(direction)


def orthogonalised(matrix):
    """U V^T of its singular value decomposition U S V^T, about: singular values become 0.7 to 1.2."""
    rows, columns = matrix.shape
    if rows > columns:
        return orthogonalised(matrix.T).T  # the products below are smaller
    X = matrix / matrix.norm()
    for _ in range(5):  # Newton-Schulz: S becomes a S + b S³ + c S⁵
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def imitation_loss(model, rows):
    """Minus the mean log-probability of the completions' tokens, for rows of (prompt, completion), two lists of ids."""
    packed = PackedBatch([(prompt + completion, [[0]]) for prompt, completion in rows], model.device)  # no outputs
    in_completion = []
    for prompt, completion in rows:
        in_completion += [False] * len(prompt) + [True] * len(completion)
    in_completion = torch.tensor(in_completion)  # [tokens]
    hidden = packed.read(model.base_model)[:-1]  # [tokens - 1, D]: each predicts the token after it
    return F.cross_entropy(model.lm_head(hidden[in_completion[1:]]), packed.ids[0, in_completion])


def tiny_folder(runs, corpora):
    """The folder of the tiny model, which is built when it is first asked for."""
    # another corpus or TINY has another folder; after a change of this code, delete the old one
    folder = runs / f"tiny-base-{zlib.crc32(repr((corpora, TINY)).encode()):08x}"
    if LOCAL_RANK == 0 and not folder.exists():
        runs.mkdir(exist_ok=True)
        build_tiny(folder, corpora)
    barrier()  # the others wait for it
    return str(folder)


# ---- several GPUs --------------------------------------------------------------------------------------------------
# All ranks run the same lines and meet in a few of them: where weights are gathered, where gradients are added up, and
# in `gather`. With one rank all of this does nothing.

PARENT = os.getppid()  # torchrun's process, where there is one


@contextmanager
def distributed():
    """A block in which the ranks can meet."""
    if WORLD == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    # an hour: the ranks wait for the slowest one to sample; torchrun or the connection notices a dead rank much sooner
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))
    yield
    dist.destroy_process_group()  # not after an error, when the others may never come


def orphaned():
    """Has torchrun been killed, without time to end its ranks?"""
    return WORLD > 1 and os.getppid() != PARENT


def lost_another_rank(error):
    """Is this the error that a rank meets when another one has died?"""
    return WORLD > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def gather(rows):
    """The lists of all ranks as one, on every rank."""
    if WORLD == 1:
        return list(rows)
    parts = [None] * WORLD
    dist.all_gather_object(parts, rows)
    return list(itertools.chain(*parts))


def barrier():
    """Wait until all ranks are here."""
    gather([])


def share(rows):
    """This rank's share of a list that all ranks have; `gather` puts the shares together again."""
    return rows[len(rows) * RANK // WORLD : len(rows) * (RANK + 1) // WORLD]


def total_over_ranks(number):
    """A number, added up over all ranks."""
    return sum(gather([number]))


def sums_over_ranks(*numbers):
    """Each of some numbers, added up over all ranks."""
    return [sum(of_ranks) for of_ranks in zip(*gather([numbers]))]


def mean_over_ranks(numbers):
    """The mean of the numbers of all ranks."""
    everyones = gather(numbers)
    return sum(everyones) / len(everyones)


def merged_over_ranks(numbers, merge):
    """The dicts {name: number} of all ranks as one; `merge` is sum or max. A rank may lack some names, or all."""
    collected = {}
    for name, number in gather(list(numbers.items())):
        collected.setdefault(name, []).append(number)
    return {name: merge(of_ranks) for name, of_ranks in collected.items()}


class Root(nn.Sequential):
    """The children of a module. FSDP gathers weights while a forward runs; this forward runs any function."""

    def forward(self, function):
        return function()


SHARDED = weakref.WeakKeyDictionary()  # {a module whose weights are split over the ranks: its Root}
SKELETONS = weakref.WeakKeyDictionary()  # {such a module: the same without weights, to make copies of}


def shard(module):
    """Split the weights of a module over all ranks, layer by layer (FSDP2); with_full_weights lets functions read them.

    Gradients are added up over the ranks, not averaged: every loss is divided by the counts of all ranks already.
    """
    if WORLD == 1:
        return module
    # here: slow to import, and not needed by one process
    from torch.distributed.fsdp import fully_shard

    skeleton = copy_with(module, lambda weight: weight.to("meta"))
    root = Root(*module.children())
    trunk = getattr(module, "base_model", module)
    layers = next((part for part in trunk.modules() if isinstance(part, nn.ModuleList)), ())
    for part in (*layers, root):
        fully_shard(part, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)
        # the plain sum: no operation that also multiplies by the factor
        part.set_force_sum_reduction_for_comms(True)
    SHARDED[module] = root
    SKELETONS[module] = skeleton
    return module


def full_tensor(tensor, dtype=None):
    """All of a tensor: if it is sharded, it is gathered, in `dtype` if given. All ranks must call it together."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.to(dtype or tensor.dtype).full_tensor()


def fill(tensor, values):
    """Copy values into a tensor, or this rank's part of them into a sharded one."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = values.to(tensor.device)
        # no source rank: every rank has all values, and none sends them
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


# ==== On a GPU, or in bf16 ==========================================================================================
# On a GPU the model computes in bf16, while its weights stay in fp32. A copy of it samples, all in bf16, and its decode
# steps are recorded as CUDA graphs. On a CPU the model itself samples, in fp32. A whole copy samples there if the model
# is sharded, or if PRECISION is bf16.

# decode steps; then the CPU waits for the GPU, and looks which outputs have ended
STEPS_BETWEEN_LOOKS = 16
# sizes of the cache, and of its part that is read, are multiples of it: so few graphs are needed
COLUMN_BLOCK = 256


PRECISION = "auto"  # fp32, bf16, or auto: bf16 on a GPU that has it, else fp32


def in_bf16(device):
    """Does a model whose weights are in fp32 compute in bf16 on this device?"""
    if PRECISION == "auto":
        return has_bf16(device)
    return PRECISION == "bf16"


def has_bf16(device):
    """Is it a GPU that computes in bf16?"""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_bf16():
    """Refuse bf16 on a GPU without it; say how fast a CPU is in it, as some only emulate it."""
    if torch.cuda.is_available():
        if not has_bf16(torch.device("cuda")):
            raise ModelError(f"--precision bf16: {device_name()} does not compute in bf16")
    elif RANK == 0:
        tqdm.write(f"note: this CPU multiplies bf16 numbers at {bf16_rate():.2g} times the rate of fp32.")


def bf16_rate():
    """The rate of this CPU for products of bf16 matrices, divided by that for fp32: measured, in a moment."""

    def seconds(dtype):
        x = torch.ones(512, 512, dtype=dtype)
        x @ x  # the first one takes longer
        start = time.perf_counter()
        for _ in range(30):
            x @ x
        return time.perf_counter() - start

    return seconds(torch.float32) / seconds(torch.bfloat16)


def compute_dtype(model):
    """The dtype of the head's products, and of the copy that samples on a GPU.

    It is never bf16 on a CPU, which would round the logits to bf16 as well.
    """
    return torch.bfloat16 if model.device.type == "cuda" and in_bf16(model.device) else model.dtype


def autocast(model):
    """The precision of a forward pass: where weights are in fp32, matrices may be multiplied in bf16."""
    enabled = in_bf16(model.device) and model.dtype == torch.float32
    # no cache: with it, the gradients of a weight that is used several times would be added up in bf16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


# {model: the DecodingBatch of a copy of it, with its CUDA graphs}
DECODING = weakref.WeakKeyDictionary()


def decoding_batch(model, size, ends):
    """A DecodingBatch of the model itself; on a GPU, in bf16, or if the model is sharded, of a whole copy.

    The copy is kept for the next call, which gives it the new weights. For a larger batch or other end tokens only the
    tables and the cache are made again. Adapters are not merged into the copy: in bf16, what they have learnt would be
    rounded away.
    """
    if model.device.type == "cpu" and model not in SHARDED and not in_bf16(model.device):
        return DecodingBatch(model, size, ends)
    if model not in DECODING:
        if WORLD > 1:
            free_copies()  # several ranks cannot try again where memory is too small for the copies of two models
        DECODING[model] = DecodingBatch(copy_to_sample(model), size, ends)
    elif not DECODING[model].serves(size, ends):
        DECODING[model] = DecodingBatch(DECODING[model].model, size, ends)
    decoding = DECODING[model]
    for weight, new in zip(decoding.model.parameters(), model.parameters()):
        weight.copy_(full_tensor(new, weight.dtype))  # in place: CUDA graphs read these weights
    return decoding


def copy_to_sample(model):
    """A whole, frozen copy: all of it in compute_dtype on a GPU; on a CPU in bf16 its linear layers only."""
    dtype = compute_dtype(model)
    copied = copy_with(model, lambda weight: weight.to(dtype)).to(model.device)
    if copied.device.type == "cuda":
        use_fused_norms(copied)
    elif in_bf16(copied.device):
        round_linear_layers(copied)
    return copied.requires_grad_(False)


def round_linear_layers(model):
    """Put the linear layers of a frozen copy into bf16: so they are rounded once, and not at every use."""
    for layer in linear_layers(model).values():
        layer.to(torch.bfloat16)


def free_copies():
    """Forget what `sample` keeps for the next time: copies of models, their KV caches, CUDA graphs."""
    DECODING.clear()
    torch.cuda.empty_cache()  # does nothing without a GPU


def use_fused_norms(model):
    """Put torch's RMSNorm, one kernel on a GPU, in the place of each of the model's, if their numbers agree."""
    for name, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta")
            fused.weight = norm.weight
            x = torch.linspace(-3, 2, norm.weight.numel()).to(norm.weight)  # [D]
            # within the rounding of bf16
            if torch.allclose(fused(x), norm(x), rtol=0.02, atol=0.01):
                model.set_submodule(name, fused)


def round_up(number, step):
    """The next multiple of `step`."""
    return math.ceil(number / step) * step


def decode_gpu(decoding, last):
    """Sample the next tokens of every slot in use. `last` is the largest position of a newest token."""
    # the next power of 2, so that few graphs are needed
    n = 2 ** (decoding.active - 1).bit_length()
    # at least 2: with one row, matrix products are less exact
    n = min(decoding.size.slots, max(2, n))
    width = min(decoding.size.columns, round_up(last + 1 + STEPS_BETWEEN_LOOKS, COLUMN_BLOCK))
    kind = n, width, decoding.temperature  # what is fixed in a recorded step
    for _ in range(STEPS_BETWEEN_LOOKS):
        if kind in decoding.graphs:
            decoding.graphs[kind].replay()
        else:
            decoding.decode_step(n, width)  # once as usual, before it can be recorded
            record(decoding, kind)


def record(decoding, kind):
    """Record a decode step, without running it. If that fails, all steps run as usual from then on."""
    if not decoding.recordable:
        return
    n, width, _ = kind
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    pool = None  # of memory, which all graphs share
    for other in decoding.graphs.values():
        pool = other.pool()
    try:
        # thread_local: what other threads do, as that of a CheckpointWriter, does not end the recording
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            decoding.decode_step(n, width)
        decoding.graphs[kind] = graph
    except torch.OutOfMemoryError:  # it is a RuntimeError too
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # the failed recording leaves another one set
        decoding.recordable = False
        # torch's allocator takes the recording for unfinished, and frees less: see CUDAGraph::capture_end
        reason = str(error).splitlines()[0]
        tqdm.write(f"note: sampling without CUDA graphs, which is slower and may need more memory: {reason}")
