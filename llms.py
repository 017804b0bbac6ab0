"""The model: loading, sampling, log-probabilities, LoRA, a reward model, a judge, the tiny model, several GPUs.

Everything between text and the maths: weights, token ids, masks and log-probabilities. What a right answer is, what an
advantage is, what β and ε are, is not known here. Here a "checkpoint" is always the state of a training run.

    load, save                            a model and its tokenizer, from the Hugging Face hub or a folder
    save_, read_, load_checkpoint         the state of a training run in one file, to resume it; written in a thread
    encode, batch, Rollout, rollout_of    a prompt as token ids; many as tensors; completions, sampled or given as texts
    Rollout.outputs, from_outputs         sampled outputs in plain numbers, to be kept or to be shared anew
    sample                                completions, with the log-probability of each token as it was sampled
    token_logprobs, Critic                log π of given tokens, with gradient; PPO's value function
    Memory, in_micro_batches              how many tokens are computed at once; scoring in micro-batches
    enable_gradient_checkpointing         less memory in the backward pass, which then takes longer
    at_tokens                             character positions in a text to tokens: a step's reward on its last token
    add_lora, frozen_copy                 small trained adapters beside the linear layers; the reference
    reward_model, reward_scores           a learned reward model
    load_judge, first_is_better           a language model that compares two answers
    tiny_folder                           the model that needs no download, trained on the spot
    distributed, shard, gather, share …   several GPUs, one process each

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
import shutil
import sys
import time
import traceback
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
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

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # fewer gaps in a GPU's memory
torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for each shape, which takes longer than attention
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"  # weights come from the repository that was named, and no other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

LOGITS_AT_ONCE = 2**24  # logits in memory at once while tokens are scored; 8 times as many on a GPU

# With several GPUs torchrun starts a process for each, a rank, and sets these. Otherwise there is rank 0 alone.
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class ModelError(ValueError):
    """What is wrong with a model, in one line for the person who named it."""


# ---- loading and saving --------------------------------------------------------------------------------------------


def load(name):
    """A causal language model in fp32 and its tokenizer; the folder of a run stands for the model in it."""
    if (Path(name) / "metrics.jsonl").is_file():  # a run
        if not (Path(name) / "model").is_dir():
            raise ModelError(f"{name} is a run that has no model yet: python main.py --resume {name}")
        name = f"{name}/model"
    model, tokenizer = from_pretrained(transformers.AutoModelForCausalLM, name, dtype=torch.float32)
    if not tokenizer("How many?")["input_ids"]:
        raise ModelError(f"{name} has no tokenizer")
    if not end_tokens(model, tokenizer):
        raise ModelError(f"{name} names no end token, neither in its generation config nor in its tokenizer")
    if torch.cuda.is_available() and WORLD == 1:  # with several ranks it comes to the GPU when it is sharded
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
        options |= {"config": config, "use_safetensors": True, "trust_remote_code": False}
        model, loaded = auto_class.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # a broken folder makes four libraries raise whatever they like
        raise ModelError(explain(name, error)) from error
    if loaded["missing_keys"]:
        raise ModelError(f"{name} lacks weights of its own architecture: {min(loaded['missing_keys'])} and maybe more")
    return model.eval(), tokenizer


def refuse_pickles(name, config):
    """Raise ModelError where the configuration or the index of the weights names a file that is no safetensors file."""
    files = [getattr(config, "transformers_weights", None) or "model.safetensors"]
    with suppress(OSError):  # no index: the weights are in that one file
        index = transformers.utils.cached_file(name, "model.safetensors.index.json")
        files += json.loads(Path(index).read_text())["weight_map"].values()
    if not all(file.endswith(".safetensors") for file in files):
        raise ModelError("its weights are not all in safetensors files, and no others are read")


def explain(name, error):
    """Why a model could not be loaded, and what to do about it, in one line."""
    causes = "".join(traceback.format_exception(error, limit=0))  # names and texts of all errors that led to it
    suffixes = {path.suffix for path in (Path(name), *Path(name).glob("*"))}
    if ".gguf" in suffixes and ".safetensors" not in suffixes:
        return f"{name} is a GGUF model, quantised to be run and not to be trained: give the original, in safetensors"
    if suffixes & {".bin", ".pt", ".pth"} and ".safetensors" not in suffixes:
        return f"{name} has its weights as pickle, which can run code: give a copy in safetensors (save_pretrained)"
    if "GatedRepoError" in causes:
        return f"{name} is gated: accept its terms on its page, then set HF_TOKEN to your access token"
    if "RepositoryNotFound" in causes or "HFValidationError" in causes or "is not a valid model identifier" in causes:
        return f"unknown model: {name}: no such model folder, nor on the Hugging Face hub (private ones need HF_TOKEN)"
    if "LocalEntryNotFound" in causes or "OfflineMode" in causes or "ConnectError" in causes:
        return f"{name} is not on this machine and the hub cannot be reached: give a folder, or use --model tiny"
    return f"cannot load {name}: {(str(error).strip() or repr(error)).splitlines()[0]}"


@torch.no_grad()
def save(model, tokenizer, folder):
    """Write a plain Hugging Face folder, whole or not at all. It merges the adapters: call it when training is over."""
    if model in SHARDED:
        model = copy_with(model, lambda weight: weight.to("meta" if RANK else "cpu"))
        if RANK:
            return
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for layer in lora_layers(model):  # W ← W + (α/r) B A; then B is 0, as at first
        layer.weight += layer.scale * layer.lora_B @ layer.lora_A
        layer.lora_B.zero_()
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    with disk_errors(folder):
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


@contextmanager
def disk_errors(folder):
    """A block that writes to a folder: whatever it raises, for example when the disk is full, becomes an OSError."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have errors of their own, or raise plain Exception
        raise OSError(f"{folder} cannot be written: {error}") from error


def enable_gradient_checkpointing(model):
    """Keep only the input of each layer in the forward pass, and compute the rest again in the backward pass."""
    new_name = "activation_checkpointing_enable"  # newer versions of transformers call it so
    getattr(model, new_name if hasattr(model, new_name) else "gradient_checkpointing_enable")()


# ---- checkpoints ---------------------------------------------------------------------------------------------------

WRITER, WRITING = ThreadPoolExecutor(1), []  # the thread that writes checkpoints; what it is writing


def named_tensors(networks, optimizer, generator):
    """Every tensor of a checkpoint by name, without a copy; tied weights appear once.

    networks is {name: module}. With LoRA the frozen weights are left out: a resumed run loads them with its model.
    """
    weights = {f"{network}/{name}": w for network, module in networks.items() for name, w in module.named_parameters()}
    if any(".lora_" in name for name in weights):  # the trained ones, and the reference's adapter
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad or ".lora_" in name}
    tensors = {name: weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"adam/{key}/{name}": value for key, value in optimizer.state.get(weight, {}).items()}
    return tensors | {"generator": generator.get_state()}


def checksum(tensors):
    """A CRC of tensors, so that a damaged file is noticed."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), total)
    return str(total)


def save_checkpoint(folder, networks, optimizer, generator, about):
    """Replace the folder's state.safetensors, whole or not at all; about becomes JSON. Nothing is pickled.

    A thread writes a copy, which takes as much memory as the file, while training goes on; see `check_written`.
    """
    check_written(wait=True)  # the checkpoint before this one
    tensors = named_tensors(networks, optimizer, generator)
    # all ranks gather, rank 0 keeps
    tensors = {name: full_tensor(x).to("meta" if RANK else "cpu", copy=True) for name, x in tensors.items()}
    tensors["about"] = torch.frombuffer(bytearray(json.dumps(about), "ascii"), dtype=torch.uint8)
    if RANK == 0:
        WRITING.append(WRITER.submit(write_checkpoint, folder, tensors))


def write_checkpoint(folder, tensors):
    folder.mkdir(exist_ok=True)
    with disk_errors(folder):
        safetensors.torch.save_file(tensors, folder / "unfinished", {"checksum": checksum(tensors)})
    with open(folder / "unfinished", "rb") as file:
        os.fsync(file.fileno())  # on the disk before it gets its name
    os.replace(folder / "unfinished", folder / "state.safetensors")


def check_written(wait=False):
    """Raise what went wrong while the last checkpoint was written, if that has ended already or is waited for."""
    while WRITING and (wait or WRITING[0].done()):
        WRITING.pop().result()


@contextmanager
def writing():
    """A block that ends, also with an error, only when the last checkpoint is written."""
    try:
        yield
    finally:
        check_written(wait=True)
    gather([])  # the other ranks wait for rank 0


def read_checkpoint(folder):
    """What was saved as `about`, and the tensors of a checkpoint; ModelError if the file is damaged."""
    path = folder / "state.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)  # memory-mapped: each is read from the disk when it is used
        intact = safetensors.safe_open(path, "pt").metadata()["checksum"] == checksum(tensors)
        about = tensors.pop("about")
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged or no checkpoint of this program: {error}") from None
    if not intact:
        raise ModelError(f"{path} is damaged: its bytes are not those that were written")
    return json.loads(about.numpy().tobytes()), tensors


@torch.no_grad()
def load_checkpoint(saved, networks, optimizer, generator):
    """Fill networks, optimizer and generator with the tensors of a checkpoint."""
    if any(name.startswith("adam/") for name in saved):  # AdamW's state as after its first step, filled below
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            moments = {"exp_avg": torch.empty_like(weight), "exp_avg_sq": torch.empty_like(weight)}
            optimizer.state[weight] = {"step": torch.zeros((), device=weight.device)} | moments
    tensors = named_tensors(networks, optimizer, generator)
    if different := tensors.keys() ^ saved.keys():
        raise ModelError(f"the checkpoint was made with another model: only one of the two has {min(different)}")
    try:
        for name, tensor in tensors.items():
            fill(tensor, saved[name])
    except RuntimeError as error:  # the same names, other shapes
        raise ModelError(f"the checkpoint was made with another model: {error}") from error
    generator.set_state(saved["generator"])


# ---- prompts and batches -------------------------------------------------------------------------------------------


def apply_template(tokenizer, messages, **options):
    """A dialogue as the text that the tokenizer's chat template makes of it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        raise ModelError(f"the chat template of {tokenizer.name_or_path} fails: {error}".splitlines()[0]) from error


def encode(tokenizer, messages):
    """Token ids of a prompt: through the tokenizer's chat template, or plain paragraphs where it has none."""
    end = {"assistant": tokenizer.eos_token or ""}  # after a worked example, as after an output
    paragraphs = "\n\n".join(message["content"] + end.get(message["role"], "") for message in messages)
    if not tokenizer.chat_template:
        return tokenizer(paragraphs + "\n\n")["input_ids"]
    try:
        text = apply_template(tokenizer, messages, add_generation_prompt=True)
    except ModelError:  # some templates refuse a system message: then everything is one message of the user
        text = apply_template(tokenizer, [{"role": "user", "content": paragraphs}], add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(model, tokenizer):
    """Every id that ends a completion: those of the model's generation config, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return sorted({token for token in ends if token is not None})


def batch(prompts, completions, device):
    """ids and attention [N, P + T], mask [N, T] of lists of token ids, laid out as drawn at the top of this file."""
    p, c = (torch.tensor([[len(tokens)] for tokens in rows]) for rows in (prompts, completions))  # [N, 1]
    mask = torch.arange(c.max()) < c  # [N, T]
    attention = torch.cat([torch.arange(p.max()) >= p.max() - p, mask], 1)  # [N, P + T]
    ids = torch.zeros(attention.shape, dtype=torch.long)
    ids[attention] = torch.tensor([token for row in zip(prompts, completions) for tokens in row for token in tokens])
    return ids.to(device), attention.long().to(device), mask.to(device)


class Rollout(NamedTuple):
    """N = Q·G sampled outputs, the G of one question in consecutive rows; laid out as drawn at the top of this file."""

    ids: Tensor  # [N, P + T]
    attention: Tensor  # [N, P + T]
    mask: Tensor  # [N, T]  True on the |o_i| tokens of output i
    logp: Tensor  # [N, T]  log π of each token as it was sampled: at temperature τ, at 1 if τ = 0; None if not sampled
    entropy: Tensor  # [N, T]  of the same distribution, in nats; None if not sampled
    truncated: Tensor  # [N]  True where no end token came within the limit
    texts: list  # [N]  the completions, without their end token

    def rows(self, index):
        """ids, attention and mask of some of the rows, without the padding that only the others need."""
        attention, mask = self.attention[index], self.mask[index]
        P, T = attention.shape[1] - mask.shape[1], int(mask.sum(1).max())
        columns = slice(P - int(attention[:, :P].sum(1).max()), P + T)  # the longest prompt and output
        return self.ids[index, columns], attention[:, columns], mask[:, :T]

    def micro_batches(self, rows, group_size, token_budget):
        """Split rows into lists of at most token_budget tokens, counted with padding; a longer row gets its own list.

        A packed batch has fewer: no padding, and one prompt for neighbouring outputs of a question. Longest come first.
        """
        outputs, totals = self.mask.sum(1).tolist(), self.attention.sum(1).tolist()  # lengths in tokens
        prompts = [total - output for total, output in zip(totals, outputs)]
        questions = itertools.groupby(rows, lambda row: row // group_size)
        questions = [sorted(group, key=lambda row: -outputs[row]) for _, group in questions]
        questions.sort(key=lambda group: -max(totals[row] for row in group))
        batches = []
        for row in itertools.chain.from_iterable(questions):
            candidate = [*batches[-1], row] if batches else [row]
            width = max(prompts[i] for i in candidate) + max(outputs[i] for i in candidate)
            if batches and len(candidate) * width <= token_budget:
                batches[-1] = candidate
            else:
                batches.append([row])
        return batches

    def outputs(self):
        """Sampled outputs without padding, as numbers and texts: [prompt, tokens, log π, entropy, truncated, text]."""
        P = self.attention.shape[1] - self.mask.shape[1]
        prompts, outputs = self.attention[:, :P].sum(1).tolist(), self.mask.sum(1).tolist()
        columns = [x.tolist() for x in (self.ids, self.logp, self.entropy, self.truncated)]
        rows = zip(prompts, outputs, *columns, self.texts)
        return [[ids[P - p : P], ids[P : P + n], logp[:n], H[:n], cut, text] for p, n, ids, logp, H, cut, text in rows]


def from_outputs(outputs, device):
    """A rollout of sampled outputs in the form of `Rollout.outputs`."""
    prompts, completions, logp, entropy, truncated, texts = map(list, zip(*outputs))
    ids, attention, mask = batch(prompts, completions, device)
    padded = [pad_sequence(list(map(torch.tensor, rows)), True).to(device) for rows in (logp, entropy)]  # 2 × [N, T]
    return Rollout(ids, attention, mask, *padded, torch.tensor(truncated, device=device), texts)


def rollout_of(model, tokenizer, prompts, texts, max_new_tokens):
    """A rollout of given texts, one for each prompt, each with an end token; too long ones are cut, ids and text."""
    end = end_tokens(model, tokenizer)[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] + [end] for text in texts]
    truncated = [len(tokens) > max_new_tokens for tokens in completions]
    completions = [tokens[:max_new_tokens] for tokens in completions]
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    texts = [decode(tokens) if cut else text for text, tokens, cut in zip(texts, completions, truncated)]
    tensors = batch(prompts, completions, model.device)
    return Rollout(*tensors, None, None, torch.tensor(truncated, device=model.device), texts)


def at_tokens(tokenizer, rollout, marks):
    """Numbers at character positions of the outputs' texts, each put on the first token that reaches its position.

    marks: for each output [(position, number)], e.g. (end of a step, its reward) -> numbers; where one was put: [N, T].
    """
    numbers, marked = torch.zeros(rollout.mask.shape), torch.zeros(rollout.mask.shape, dtype=torch.bool)
    for row, pairs in enumerate(marks):
        ids = rollout.ids[row, -rollout.mask.shape[1] :][rollout.mask[row]].tolist()
        length_with = lambda token, ids=ids: len(tokenizer.decode(ids[: token + 1], skip_special_tokens=True))
        for position, number in pairs:
            token = min(bisect.bisect_left(range(len(ids)), position, key=length_with), len(ids) - 1)
            numbers[row, token], marked[row, token] = number, True
    return numbers, marked


# ---- attention over packed sequences -------------------------------------------------------------------------------
# In a decoder only attention mixes tokens. So the tokens of a batch can be packed into one sequence, without padding
# and with each prompt only once, if the attention knows which of them belong together. In every layer transformers
# calls `packed_attention`, which calls the attention of a `layout`: a PackedBatch where tokens are read at once (in
# prefill, and all of scoring), a DecodingBatch where outputs grow by one token at a time.

UNSUPPORTED = """{} cannot be run here: supported are Qwen2, Qwen2.5, Qwen3, LLaMA 3, SmolLM and models like them, \
with softmax attention to the whole text once a layer, and logits straight from the head"""
NO_MASK = torch.zeros(1, 1, 1, 0)  # 4 dimensions: transformers builds no mask; empty: any attention but ours fails


def packed_attention(module, query, key, value, mask, *, layout, scaling=None, **_):
    """The attention of one layer, as transformers calls it."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE leaves them in fp32
    return layout.attention(module.layer_idx, query, key, value, scaling), None


def run_trunk(trunk, layout, ids, positions):
    """Last hidden states of tokens that lie as a layout says: ids, positions [rows, tokens] -> [rows, tokens, D]."""
    options = {"attention_mask": NO_MASK, "layout": layout, "use_cache": False}
    return trunk(input_ids=ids, position_ids=positions, **options).last_hidden_state


@torch.no_grad()
def use_packed_attention(model, name):
    """Give a model the attention of this section; ModelError if a short text does not have the same logits with it."""
    prompt, output = [3, 1, 4, 1, 5], [2, 6, 5]
    expected = model(torch.tensor([prompt + output], device=model.device)).logits[0, :-1]  # [7, V]
    check_finite(expected)
    transformers.AttentionInterface.register("packed", packed_attention)
    model.set_attn_implementation("packed")
    packed, config = PackedBatch([(prompt, [output])], model.device, keep_kv=True), model.config.get_text_config()
    # only the configuration tells of a window that is wider than the short text, and of a cap that is above its logits
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    supported = not window and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    supported &= getattr(config, "final_logit_softcapping", None) is None
    try:
        hidden = run_trunk(model.base_model, packed, packed.ids, packed.positions)[0]  # [7, D]
        logits = head_logits(hidden, *head_weights(model))  # [7, V]
        supported &= bool((logits - expected).abs().max() < 1e-3 * expected.abs().max())
        supported &= [layer for layer, _, _ in packed.kv] == [*range(config.num_hidden_layers)]  # one attention each
    except Exception as error:  # an architecture that does not know our arguments raises whatever it likes
        raise ModelError(UNSUPPORTED.format(name)) from error
    if not supported:
        raise ModelError(UNSUPPORTED.format(name))


class PackedBatch:
    """Prompts and their outputs packed into one sequence: q₁ o₁ o₂ … q₂ o_{G+1} …"""

    def __init__(self, groups, device, keep_kv=False):
        """groups: [(a prompt, [its outputs])], all of them lists of token ids."""
        ids, positions, predictors = [], [], []
        self.groups = []  # (prompt length P, number of outputs n, longest T, places of their tokens in a padded [n·T])
        for prompt, outputs in groups:
            ids += prompt
            positions += range(len(prompt))
            prompt_end = len(ids) - 1  # it predicts the first token of each output
            lengths = [len(output) - 1 for output in outputs]  # without the last token: nothing is predicted from it
            for output, length in zip(outputs, lengths):
                predictors += [prompt_end, *range(len(ids), len(ids) + length)]
                ids += output[:-1]
                positions += range(len(prompt), len(prompt) + length)
            longest = max(lengths, default=0)
            filled = [row * longest + t for row, length in enumerate(lengths) for t in range(length)]
            self.groups.append((len(prompt), len(outputs), longest, torch.tensor(filled, device=device)))
        self.ids, self.positions = torch.tensor([[ids], [positions]], device=device)  # 2 × [1, tokens]
        self.predictors = torch.tensor(predictors, device=device)  # place of the token that predicts each output token
        self.kv = [] if keep_kv else None  # (layer, keys, values), each [1, heads, tokens, D]

    def attention(self, layer, query, key, value, scaling):
        """Causal attention of every output to its prompt and itself: [1, heads, tokens, D] -> [1, tokens, heads, D]."""
        from torch.nn.attention.bias import causal_lower_right  # here: it takes as long to import as torch

        if self.kv is not None:
            self.kv.append((layer, key, value))
        if query.is_cuda and query.dtype == torch.float32:  # fast fp32 kernels need as many key heads as query heads
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        options, parts = {"scale": scaling, "enable_gqa": True}, []
        sizes = [size for P, _, _, filled in self.groups for size in (P, len(filled))]
        pieces = iter(zip(*(x.split(sizes, 2) for x in (query, key, value))))  # prompt, its outputs, the next prompt …
        for P, n, T, filled in self.groups:
            q, k, v = next(pieces)  # [1, heads, P, D]
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)[0].transpose(0, 1))
            outputs = next(pieces)
            if len(filled):
                packed = (x[0].transpose(0, 1) for x in outputs)
                padded = [x.new_zeros(n * T, *x.shape[1:]).index_copy(0, filled, x) for x in packed]  # [n·T, heads, D]
                q, own_k, own_v = (x.unflatten(0, (n, T)).transpose(1, 2) for x in padded)  # [n, heads, T, D]
                k = torch.cat([k.expand(n, -1, -1, -1), own_k], 2)  # [n, heads, P + T, D]
                v = torch.cat([v.expand(n, -1, -1, -1), own_v], 2)
                out = F.scaled_dot_product_attention(q, k, v, causal_lower_right(T, P + T), **options)
                parts.append(out.transpose(1, 2).flatten(0, 1).index_select(0, filled))
        return torch.cat(parts)[None]


# ---- sampling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, generator, cache_tokens):
    """Sample `group_size` completions of each prompt (token ids) from softmax(logits / τ); τ = 0 takes the likeliest.

    Nothing else changes the distribution: no top-k, no top-p, and of a model's generation config only the end tokens
    count. The KV cache holds `cache_tokens` tokens, but at least one group and 2 rows. `prompts` is this rank's share;
    each rank draws the random numbers of all and uses its part, so any number of ranks samples the same outputs.
    """
    counts, lengths = zip(*gather([(len(prompts), max(map(len, prompts)))]))  # prompts, and the longest, of each rank
    longest = max(lengths) + max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", longest)
    if longest > limit:
        raise ModelError(f"prompt and output take up to {longest} tokens, the model reads {limit}")
    columns = longest if model.device.type == "cpu" else -(-longest // 256) * 256  # of the KV cache
    rows = min(max(counts), max(1, cache_tokens // (columns * group_size))) * group_size
    ends = end_tokens(model, tokenizer)
    # the same size on all ranks: it decides whether sharded weights are copied, which all must do together
    decoding = decoding_batch(model, (max(counts) * group_size, max(2, rows), columns, max_new_tokens), ends)
    uniform = torch.rand(sum(counts) * group_size if temperature else 0, max_new_tokens, generator=generator)
    before, N = sum(counts[:RANK]) * group_size, len(prompts) * group_size  # outputs of the ranks before this one
    decoding.reset(temperature, uniform[before : before + N])
    decoding.sample_all(prompts, group_size, rows)

    completions = [row[:n].tolist() for row, n in zip(decoding.tokens[:N].cpu(), decoding.length.tolist())]
    ids, attention, mask = batch([q for q in prompts for _ in range(group_size)], completions, model.device)
    logp, entropy = (x[:N, : mask.shape[1]].where(mask, 0.0) for x in (decoding.logp, decoding.entropy))  # [N, T]
    check_finite(logp)  # from nan logits the last token is sampled, without an error
    truncated = [output[-1] not in ends for output in completions]
    without_end = [output if cut else output[:-1] for output, cut in zip(completions, truncated)]
    texts = [tokenizer.decode(output, skip_special_tokens=True) for output in without_end]
    return Rollout(ids, attention, mask, logp, entropy, torch.tensor(truncated, device=model.device), texts)


def sample_token(logits, temperature, uniform):
    """A token from softmax(logits / τ) for each row, its log π and the entropy of π: fp32 [n, V] -> 3 × [n, 1].

    It is the first at which the cumulative sum of π passes `uniform` [n, 1], random numbers between 0 and 1.
    """
    logits = logits if temperature in (0, 1) else logits / temperature  # [n, V]
    pi = torch.softmax(logits, -1)  # [n, V]
    if temperature:
        cumulative = pi.cumsum(-1)  # [n, V]
        total = cumulative[:, -1:]
        # less than the total, or a token with π = 0 at the end could be selected; clamp: nan selects a token too
        uniform = torch.minimum(uniform * total, total.nextafter(0 * total))
        token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[1] - 1)
    else:
        token = logits.argmax(-1, keepdim=True)
    logp = pi.gather(1, token).log()
    # H = - Σ π log π = log Σ exp(logits) - Σ π logits; log Σ exp(logits) is logits - log π of any token
    entropy = logits.gather(1, token) - logp - (pi * logits).sum(-1, keepdim=True)
    return token, logp.float(), entropy.float()


def check_finite(logits):
    if not logits.isfinite().all():
        raise ModelError("the model's logits are not finite: its weights are broken, or training has diverged")


class DecodingBatch:
    """N outputs that are being sampled, and a KV cache with a row for each of those that are sampled now.

    Each output has a row in the tables below. Their last row, -1, is for free rows of the cache, computed on a GPU.
    An output that has ended is sampled on until its row is freed; these tokens go into the column after its last one.
    """

    def __init__(self, model, size, ends):
        self.model, self.size = model, size
        N, self.rows, self.columns, self.limit = size
        self.ends = torch.tensor(ends, device=model.device)
        self.cache = {}  # {layer: its keys and values, 2 × [rows, heads, columns, D]}
        self.graphs, self.recordable = {}, True  # on a GPU: {(n, width, τ): the CUDA graph of a decode step}
        self.output_of_row = torch.zeros(self.rows, dtype=torch.long, device=model.device)  # -1 for a free row
        self.tokens = torch.zeros(N + 1, self.limit + 1, dtype=torch.long, device=model.device)
        self.logp, self.entropy, self.uniform = torch.zeros(3, N + 1, self.limit + 1, device=model.device)
        # of each output: the number of sampled tokens, and where the newest one stands in prompt and output
        self.length, self.position = torch.zeros(2, N + 1, dtype=torch.long, device=model.device)
        self.ended = torch.ones(N + 1, dtype=torch.bool, device=model.device)

    def reset(self, temperature, uniform):
        """Forget all outputs. uniform [N, T]: the random numbers for their tokens, [0, T] at temperature 0."""
        self.temperature = temperature
        self.begun, self.active = 0, 0  # outputs that have begun; rows of the cache in use, which are the first ones
        self.uniform[: len(uniform), :-1] = uniform.to(self.uniform.device)
        self.output_of_row.fill_(-1)

    def sample_all(self, prompts, group_size, rows):
        """Sample all outputs, at most `rows` at a time; where some end, those of the next prompts begin."""
        waiting = list(prompts)
        options = {"unit": "output", "leave": False, "delay": 2, "disable": RANK > 0 or None}
        with tqdm(total=len(prompts) * group_size, desc="sampling", **options) as bar:
            while waiting or self.active:
                # refill when an eighth of the rows is free; read at most 16 prompts in one pass
                while waiting and (free := rows - self.active) >= max(group_size, rows // 8):
                    count = min(16, free // group_size)
                    self.prefill(waiting[:count], group_size)
                    del waiting[:count]
                self.decode()
                bar.update(self.remove_ended())

    def prefill(self, prompts, group_size):
        """Read each prompt once, copy its keys and values to the rows of its outputs, and sample their first tokens."""
        packed = PackedBatch([(prompt, []) for prompt in prompts], self.position.device, keep_kv=True)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.position.device)
        last = lengths.cumsum(0) - 1  # where each prompt ends in the packed sequence
        hidden = run_trunk(self.model.base_model, packed, packed.ids, packed.positions)[0, last]  # [Q, D]
        logits = head_logits(hidden, *head_weights(self.model))  # [Q, V]
        check_finite(logits)
        first, n = self.active, len(prompts) * group_size
        for layer, *kv in packed.kv:  # 2 × [1, heads, tokens, D]
            if layer not in self.cache:
                self.cache[layer] = [x.new_zeros(self.rows, x.shape[1], self.columns, x.shape[3]) for x in kv]
            for cache, x in zip(self.cache[layer], kv):
                for row, prompt in zip(range(first, first + n, group_size), x[0].split(lengths.tolist(), 1)):
                    cache[row : row + group_size, :, : prompt.shape[1]] = prompt
        outputs = torch.arange(self.begun, self.begun + n, device=self.position.device)
        self.output_of_row[first : first + n] = outputs
        self.position[outputs] = lengths.repeat_interleave(group_size) - 1  # the newest token is the prompt's last
        self.length[outputs], self.ended[outputs] = 0, False
        self.begun, self.active = self.begun + n, self.active + n
        self.append_tokens(outputs, logits.repeat_interleave(group_size, 0))

    def append_tokens(self, outputs, logits):
        """Sample the next token of some outputs and write it down: outputs [n], logits [n, V]."""
        place = outputs[:, None], self.length[outputs, None]  # row and column in the tables, 2 × [n, 1]
        token, self.logp[place], self.entropy[place] = sample_token(logits, self.temperature, self.uniform[place])
        self.tokens[place] = token
        goes_on = ~self.ended[outputs]  # [n]
        self.length[outputs] += goes_on
        self.position[outputs] += goes_on
        self.ended[outputs] |= (token == self.ends).any(1) | (self.length[outputs] == self.limit)

    def attention(self, layer, query, key, value, scaling):
        """Attention of one new token per row to all of its row: [n, heads, 1, D] -> [n, 1, heads, D]."""
        keys, values = self.cache[layer]
        keys[self.write_at], values[self.write_at] = key[:, :, 0], value[:, :, 0]
        n, _, _, width = self.bias.shape
        keys, values = keys[:n, :, :width], values[:n, :, :width]
        # query heads that share a key head are passed as several query tokens of one head: so no key is repeated
        queries = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)  # [n, key heads, query heads of each, D]
        out = F.scaled_dot_product_attention(queries, keys, values, self.bias, scale=scaling)
        return out.flatten(1, 2)[:, None]

    def decode_step(self, n, width):
        """Read the newest token of the first n rows, and sample the next. The cache is read up to column `width`."""
        outputs = self.output_of_row[:n]
        position = self.position[outputs]  # [n]
        self.write_at = torch.arange(n, device=position.device), slice(None), position  # rows, heads, columns
        unfilled = torch.arange(width, device=position.device) > position[:, None]  # [n, width]
        self.bias = torch.zeros(n, 1, 1, width, device=position.device, dtype=self.cache[0][0].dtype)
        self.bias.masked_fill_(unfilled[:, None, None], -math.inf)
        token = self.tokens[outputs, self.length[outputs] - 1]  # [n]
        hidden = run_trunk(self.model.base_model, self, token[:, None], position[:, None])[:, -1]  # [n, D]
        self.append_tokens(outputs, head_logits(hidden, *head_weights(self.model)))

    def decode(self):
        """Sample the next token of every row in use; on a GPU the next 16, replayed from CUDA graphs."""
        last = int(self.position[self.output_of_row[: self.active]].max())
        if self.position.device.type != "cuda":
            return self.decode_step(self.active, last + 1)
        # rounded up, so that few graphs are needed; at least 2 rows: with one, matrix products are less exact
        n = min(self.rows, max(2, 2 ** (self.active - 1).bit_length()))
        width = min(self.columns, (last + 16) // 256 * 256 + 256)
        for _ in range(16):
            if (key := (n, width, self.temperature)) in self.graphs:
                self.graphs[key].replay()
                continue
            self.decode_step(n, width)  # once as usual, before it can be recorded
            if self.recordable:
                self.record(key, lambda: self.decode_step(n, width))

    def record(self, key, step):
        """Record a step as a CUDA graph, without running it. If that fails, all steps run as usual from then on."""
        graph, others, stream = torch.cuda.CUDAGraph(), list(self.graphs.values()), torch.cuda.current_stream()
        try:
            pool = others[0].pool() if others else None
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # or other threads end it
                step()
            self.graphs[key] = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            self.recordable = False
            tqdm.write(f"note: sampling without CUDA graphs, which is slower: {str(error).splitlines()[0]}")

    def remove_ended(self):
        """Free the rows of the outputs that have ended, and return their number. The last rows fill the gaps."""
        ended = self.ended[self.output_of_row[: self.active]].tolist()
        before, self.active = self.active, ended.count(False)
        gaps = [row for row in range(self.active) if ended[row]]
        moved = [row for row in range(self.active, before) if not ended[row]]  # as many as there are gaps
        if gaps:
            for x in (self.output_of_row, *itertools.chain.from_iterable(self.cache.values())):
                x[gaps] = x[moved]
        self.output_of_row[self.active : before] = -1
        return before - self.active


DECODING = weakref.WeakKeyDictionary()  # {model on a GPU: the last DecodingBatch, with its CUDA graphs}


def decoding_batch(model, size, ends):
    """A DecodingBatch of the model itself; on a GPU, or if it is sharded, of a whole copy, in bf16 if the GPU has it.

    size: outputs, rows and columns of the cache, longest output. A copy whose batch is large enough is used again.
    Adapters stay beside their layers: merged into a weight of bf16, what they have learnt would be rounded away.
    """
    if model.device.type == "cpu" and model not in SHARDED:
        return DecodingBatch(model, size, ends)
    last = DECODING[model].size if model in DECODING else (0, 0, 0, 0)
    if last[-1] != size[-1] or any(old < new for old, new in zip(last, size)):
        free_copies()
        dtype = model.dtype if precision(model.device) is torch.float32 else torch.bfloat16
        copied = copy_with(model, lambda weight: weight.to(dtype)).to(model.device).requires_grad_(False)
        if copied.device.type == "cuda":
            use_fused_norms(copied)
        DECODING[model] = DecodingBatch(copied, size, ends)
    decoding = DECODING[model]
    for weight, new in zip(decoding.model.parameters(), model.parameters()):
        weight.copy_(full_tensor(new, weight.dtype))  # in place: CUDA graphs read these weights
    return decoding


@torch.no_grad()
def use_fused_norms(model):
    """Put torch's RMSNorm, one kernel on a GPU, in the place of each of the model's, if their numbers agree."""
    for name, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta")
            fused.weight = norm.weight
            x = torch.linspace(-3, 2, norm.weight.numel()).to(norm.weight)  # [D]
            if torch.allclose(fused(x), norm(x), rtol=0.02, atol=0.01):  # within the rounding of bf16
                model.set_submodule(name, fused)


# ---- scoring -------------------------------------------------------------------------------------------------------


def with_full_weights(function):
    """Decorator of function(module, …): if the module is sharded, its weights are gathered while the function runs."""

    @functools.wraps(function)
    def run(module, *inputs):
        work = functools.partial(function, module, *inputs)
        return SHARDED[module][0](work) if module in SHARDED else work()

    return run


@with_full_weights
def token_logprobs(model, ids, attention, mask, temperature):
    """log π(o_{i,t} | q, o_{i,<t}) = log softmax(logits / τ) of each completion token, fp32, [N, T]; 0 off the mask."""
    hidden = hidden_states(model.base_model, ids, attention, mask)  # [tokens, D]
    dtype = hidden.dtype if precision(model.device) is torch.float32 else torch.bfloat16
    targets = ids[:, -mask.shape[1] :][mask]  # [tokens]
    logp = HeadLogprobs.apply(hidden, *head_weights(model), targets, temperature, dtype)  # [tokens]
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


class Critic(nn.Module):
    """PPO's value function: a trunk of its own, at first a copy of the policy's, and on it a value head, at first 0."""

    def __init__(self, model):
        super().__init__()
        self.trunk = copy_with(model.base_model)
        head = model.get_output_embeddings().weight
        self.value_head = nn.Linear(head.shape[1], 1, device=head.device, dtype=head.dtype)
        for weight in self.value_head.parameters():
            nn.init.zeros_(weight)

    @with_full_weights
    def token_values(self, ids, attention, mask):
        """V(q, o_{i,<t}), the expected reward from token t on, before it is sampled: fp32, [N, T]; 0 off the mask."""
        hidden = hidden_states(self.trunk, ids, attention, mask)  # [tokens, D]
        values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(1)  # [tokens], never in bf16
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


def hidden_states(trunk, ids, attention, mask):
    """The trunk's last hidden state from which each completion token is predicted, row after row: [tokens, D]."""
    P = ids.shape[1] - mask.shape[1]
    lengths = zip(ids.tolist(), attention[:, :P].sum(1).tolist(), mask.sum(1).tolist())
    rows = [(row[P - prompt : P], row[P : P + output]) for row, prompt, output in lengths]
    groups = [(prompt, [output for _, output in same]) for prompt, same in itertools.groupby(rows, lambda row: row[0])]
    packed = PackedBatch(groups, ids.device)  # consecutive rows with the same prompt share it
    trunk.train(torch.is_grad_enabled())  # gradient checkpointing needs train mode; nothing else does, dropout is 0
    with autocast(trunk):
        hidden = run_trunk(trunk, packed, packed.ids, packed.positions)[0]
    trunk.eval()
    return hidden.index_select(0, packed.predictors)


class HeadLogprobs(torch.autograd.Function):
    """log softmax(logits / τ) of given tokens with logits = W h + b, for a chunk of tokens at a time.

    All logits at once, N·T rows of 150,000 numbers, would be most of a step's memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, dtype):
        """hidden [tokens, D], weight [V, D], bias [V] or None, targets [tokens] -> [tokens], computed in `dtype`."""
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
        ctx.save_for_backward(hidden, weight, bias, targets)
        at_once = LOGITS_AT_ONCE * (8 if weight.is_cuda else 1)
        ctx.temperature, ctx.chunk = temperature, max(1, at_once // len(weight))
        # written in place, as in backward: a list of chunks would leave gaps in memory
        logp = at_least_fp32(hidden.new_empty(len(hidden)))
        for h, target, out in zip(*(x.split(ctx.chunk) for x in (hidden, targets, logp))):
            logits = head_logits(h, weight, bias, temperature)  # [chunk, V]
            out.copy_(logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1))  # [chunk]
        return logp

    @staticmethod
    def backward(ctx, d_logp):
        """∂ log π_i / ∂ logits_j = (1[i = j] - π_j) / τ."""
        hidden, weight, bias, targets = ctx.saved_tensors
        d_hidden, dtype = torch.empty_like(hidden), d_logp.dtype
        d_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None else None
        chunks = (x.split(ctx.chunk) for x in (hidden, targets, d_logp / ctx.temperature, d_hidden))
        for h, target, d, out in zip(*chunks):
            pi = torch.softmax(head_logits(h, weight, bias, ctx.temperature), 1)  # [chunk, V]
            d_logits = pi.mul_(-d[:, None]).scatter_add_(1, target[:, None], d[:, None])  # [chunk, V]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            out.copy_(d_logits @ weight)
            if d_weight is not None and weight.dtype == dtype:  # in place, which saves a [V, D]
                d_weight.addmm_(d_logits.T, h)
            elif d_weight is not None:
                d_weight += d_logits.T @ h
        return d_hidden.to(dtype), d_weight, d_bias, None, None, None


def precision(device):
    """bf16 on a GPU that computes in it, else fp32."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def autocast(model):
    """The precision of a forward pass: bf16 on a GPU (the weights stay in fp32), fp32 on a CPU."""
    bf16 = precision(model.device) is torch.bfloat16
    # no cache: with it, the gradients of a weight that is used several times would be added up in bf16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


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
        logits = logits if bias is None else logits + bias
    else:
        logits = at_least_fp32(F.linear(hidden, weight, bias))
    return logits if temperature == 1 else logits / temperature


def at_least_fp32(logits):
    """Logits in fp32, or float64 if they are: a log-softmax in bf16 is wrong by up to 0.03."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ---- LoRA (arXiv 2106.09685), the reference and other copies -------------------------------------------------------


class LoRALinear(nn.Linear):
    """W x + (α/r) B A x: W is frozen; A [r, in] and B [out, r] are trained, B is 0 at first. W x if both are None."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        A = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features, device="cpu"), a=5**0.5)
        self.lora_A = nn.Parameter(A.to(linear.weight))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.lora_B is None else y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def linear_layers(model):
    """Every linear layer of the trunk, {name: layer}: without the head and the embeddings."""
    return {name: layer for name, layer in model.base_model.named_modules() if isinstance(layer, nn.Linear)}


def add_lora(model, rank, alpha, seed=0):
    """Put an adapter beside every linear layer of the trunk, and freeze everything else."""
    torch.manual_seed(seed)
    layers = linear_layers(model)
    smallest = min((min(layer.in_features, layer.out_features) for layer in layers.values()), default=0)
    if rank > smallest:
        raise ModelError(f"LoRA rank {rank} is above the size of the model's smallest linear layer, {smallest}")
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.base_model.set_submodule(name, LoRALinear(layer, rank, alpha))


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


@torch.no_grad()
def frozen_copy(model, adapter=True):
    """A copy that no gradient and no update reaches: the reference.

    With LoRA it shares the frozen weights (unless they are sharded); adapter=True keeps the adapter as it is now, False
    gives the model as it was loaded. Without LoRA a GPU stores the linear layers in bf16, in which it computes anyway.
    """
    gc.collect()  # free the old reference: FSDP keeps it alive through a reference cycle
    reference = copy_with(model, torch.Tensor.cpu if model in SHARDED else None)
    if not adapter:
        for layer in lora_layers(reference):
            layer.lora_A = layer.lora_B = None
    if precision(model.device) is torch.bfloat16 and not lora_layers(reference):
        for layer in linear_layers(reference).values():  # rounded once, here, and not at every use
            layer.to(torch.bfloat16)
    return shard(reference.requires_grad_(False))


@torch.no_grad()
def copy_with(module, change=None):
    """A copy with change(weight) in the place of each weight; sharded weights are gathered first."""
    clone = lambda weight: weight.clone() if weight.requires_grad else weight  # without `change`: share frozen ones
    source = SHARDED[module][1] if module in SHARDED else module
    memo = {  # deepcopy puts these in the place of the weights
        id(old): nn.Parameter((change or clone)(full_tensor(weight)), weight.requires_grad)
        for old, weight in zip(source.parameters(), module.parameters())
    }
    return copy.deepcopy(source, memo)


# ---- memory and time -----------------------------------------------------------------------------------------------


class Memory:
    """How many tokens are computed at once: {name: limit}, halved down to `least` after running out of GPU memory."""

    def __init__(self, token_budget, cache_tokens, least=1024):
        self.limits, self.least = {"token_budget": token_budget, "cache_tokens": cache_tokens}, least

    def fit(self, name, work):
        """work(limit). Out of GPU memory, halve the limit and begin again; with several ranks, fail."""
        while True:
            limit = self.limits[name]
            try:
                return work(limit)
            except torch.OutOfMemoryError as error:
                if WORLD > 1 or limit <= self.least:
                    remedy = "a smaller one, --lora_rank 32 or --gradient_checkpointing may help"
                    raise torch.OutOfMemoryError(f"out of memory with --{name} {limit}: {remedy}") from error
            self.limits[name] = max(limit // 2, self.least)  # here the error is gone, and the tensors that it held
            free_copies()
            tqdm.write(f"note: out of memory with --{name} {limit}; trying again with {self.limits[name]}.")


@torch.no_grad()
def in_micro_batches(function, model, rollout, group_size, token_budget):
    """function(model, ids, attention, mask) of all rows of a rollout, in micro-batches and without gradient: [N, T]."""
    batches = rollout.micro_batches(range(len(rollout.mask)), group_size, token_budget)
    parts = [function(model, *rollout.rows(rows)) for rows, _ in lockstep(batches)]
    result = parts[0].new_zeros(rollout.mask.shape)  # [N, T]
    for rows, part in zip(batches, parts):  # without the dummy batches at the end
        result[rows, : part.shape[1]] = part
    return result


def free_copies():
    """Forget what sampling on a GPU keeps for the next time: a copy of the model, its KV cache, CUDA graphs."""
    DECODING.clear()
    torch.cuda.empty_cache()  # does nothing without a GPU


def peak_memory():
    """The most memory, in GB, that this process has needed: on a GPU since the last call, on a CPU since its start."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    import resource  # missing on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


SECONDS = {}  # {"seconds/part": wall-clock seconds, added up until somebody clears it}


@contextmanager
def timed(part):
    """Add the seconds of a block or function, those of the GPU included, to SECONDS."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    SECONDS[f"seconds/{part}"] = SECONDS.get(f"seconds/{part}", 0.0) + time.perf_counter() - start


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


# ---- a learned reward model ----------------------------------------------------------------------------------------


def load_reward_model(name):
    """A sequence classifier that was trained to score answers, and its tokenizer, from the hub or from a folder."""
    model, tokenizer = from_pretrained(transformers.AutoModelForSequenceClassification, name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{name} has no padding token")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.cuda() if torch.cuda.is_available() else model, tokenizer


def reward_model(name):
    """A reward model and its tokenizer; None, with a note, if a rank cannot load it: then the rules judge alone."""
    try:
        loaded, errors = load_reward_model(name), []
    except ModelError as error:
        loaded, errors = None, [str(error)]
    errors = gather(errors)
    if errors and RANK == 0:
        tqdm.write(f"note: {errors[0]}; the rules judge alone.")
    return None if errors else loaded


@torch.no_grad()
def reward_scores(model, tokenizer, questions, completions, rows=16):
    """Scores of completions as answers: the only logit, or the log-odds of the last class, taken to be the good one."""
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    scores = []
    for start in range(0, len(questions), rows):
        asked, answers = questions[start : start + rows], completions[start : start + rows]
        if tokenizer.chat_template:  # a decoder reads the dialogue; the template has its own special tokens
            pairs = zip(asked, answers)
            dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": o}] for q, o in pairs]
            texts = [apply_template(tokenizer, dialogue) for dialogue in dialogues]
            inputs = tokenizer(texts, **options, add_special_tokens=False)
        else:  # an encoder reads pairs of texts
            inputs = tokenizer(asked, answers, **options)
        with autocast(model):
            logits = model(**inputs.to(model.device)).logits.float()  # [rows, classes]
        others = logits[:, :-1].logsumexp(1) if logits.shape[1] > 1 else 0.0
        scores += (logits[:, -1] - others).tolist()
    return scores


def standardised(scores):
    """Scores less the mean over all ranks' outputs, divided by their std."""
    of_all, scores = torch.tensor(gather(scores)), torch.tensor(scores)
    return ((scores - of_all.mean()) / (of_all.std(correction=min(1, len(of_all) - 1)) + 1e-4)).tolist()


# ---- a judge -------------------------------------------------------------------------------------------------------

COMPARE = """Two answers to the same question. Which one is better?

Question: {}

Answer 1: {}

Answer 2: {}

Reply with the number of the better answer, 1 or 2, and nothing else."""


def load_judge(name):
    """A frozen causal model that compares answers, and its tokenizer, in which 1 and 2 must be different tokens."""
    model, tokenizer = load(name)
    if len({last_token(tokenizer, number) for number in "12"}) < 2:
        raise ModelError(f"{name} cannot be a judge: 1 and 2 are the same token to it")
    return model.requires_grad_(False), tokenizer


def last_token(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"][-1]


@torch.no_grad()
def first_is_better(model, tokenizer, question, pairs, token_budget):
    """What a judge says of pairs of answers: the probability of the reply 1 against 2, for each pair: [pairs]."""
    asked = [[{"role": "user", "content": COMPARE.format(question, *pair)}] for pair in pairs]
    prompts = [encode(tokenizer, messages) for messages in asked]
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    if max(map(len, prompts)) >= limit:
        raise ModelError(f"a question with two answers is longer than the judge reads, {limit} tokens")
    replies = [[last_token(tokenizer, number)] for number in "12"] * len(pairs)
    tensors = batch([prompt for prompt in prompts for _ in "12"], replies, model.device)
    rollout = Rollout(*tensors, None, None, None, None)
    log_p = torch.zeros(len(replies), 1, device=model.device)
    for rows in rollout.micro_batches(range(len(replies)), 2, token_budget):
        log_p[rows] = token_logprobs(model, *rollout.rows(rows), 1.0)
    one, two = log_p.view(-1, 2).cpu().T  # 2 × [pairs]
    return torch.sigmoid(one - two)


# ---- the tiny model ------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TINY = {
    "learning_rates": [4e-3, 8e-4],  # the highest one for each part of the corpus
    "rows_per_step": 16,  # of supervised learning
    "vocabulary": 640,  # tokens at most
    "shape": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True},
}


def tiny_tokenizer(texts):
    """Qwen2's byte-level BPE and chat template with a vocabulary of its own; each digit is a token."""
    options = {"show_progress": False, "new_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(texts, TINY["vocabulary"], **options)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.add_tokens(["<reasoning>", "</reasoning>", "<answer>", "</answer>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny(folder, corpora):
    """Train a Qwen2 of half a million parameters on lists of [(messages, completion)], one after the other; save it."""
    torch.manual_seed(0)
    texts = []
    for messages, completion in (row for corpus in corpora for row in corpus):
        for message in messages:
            texts += [message["role"], message["content"], "assistant", completion]
    tokenizer = tiny_tokenizer(texts)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = transformers.Qwen2Config(**TINY["shape"], **special, vocab_size=len(tokenizer))
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_packed_attention(model, "the tiny model")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    count = TINY["rows_per_step"]
    total = sum(len(corpus) // count for corpus in corpora)
    with tqdm(total=total, desc="building the tiny model, once", leave=False, disable=RANK > 0 or None) as bar:
        for corpus, highest in zip(corpora, TINY["learning_rates"]):
            rows = [(encode(tokenizer, messages), completion) for messages, completion in corpus]
            rows = [(prompt, tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for prompt, text in rows]
            steps = len(rows) // count
            for step in range(steps):
                imitation_loss(model, rows[step * count : (step + 1) * count]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.param_groups[0]["lr"] = highest * min(1.0, (step + 1) / 20) * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
    save(model, tokenizer, folder)


def imitation_loss(model, rows):
    """Minus the mean log-probability of the completions' tokens, for rows of (prompt, completion), two lists of ids."""
    packed = PackedBatch([(prompt + completion, []) for prompt, completion in rows], model.device)  # no padding
    learnt = [t >= len(prompt) for prompt, completion in rows for t in range(len(prompt + completion))]
    learnt = torch.tensor(learnt)  # [tokens]
    hidden = run_trunk(model.base_model, packed, packed.ids, packed.positions)[0, :-1]  # [tokens - 1, D]
    return F.cross_entropy(model.lm_head(hidden[learnt[1:]]), packed.ids[0, learnt])


def tiny_folder(runs, corpora):
    """The folder of the tiny model, which is built when it is first asked for."""
    folder = runs / f"tiny-base-{zlib.crc32(repr((corpora, TINY)).encode()):08x}"
    if LOCAL_RANK == 0 and not folder.exists():  # by one rank of each machine
        runs.mkdir(exist_ok=True)
        build_tiny(folder, corpora)
    gather([])  # the others wait for it
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
    # an hour: ranks wait for the one that samples longest; a dead rank is noticed sooner, by torchrun or the connection
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))
    yield
    dist.destroy_process_group()  # not after an error, when the others may never come


def orphaned():
    """Has torchrun been killed, without time to end its ranks?"""
    return WORLD > 1 and os.getppid() != PARENT


def lost_another_rank(error):
    """Is this the error that a rank meets when another one has died?"""
    return WORLD > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def on_rank_0(function):
    """A function that only rank 0 runs: it writes or draws something, and returns nothing."""
    return function if RANK == 0 else functools.wraps(function)(lambda *inputs, **named: None)


def gather(rows):
    """The lists of all ranks as one, on every rank."""
    parts = [rows] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def sums_over_ranks(*numbers):
    """Each of some numbers, added up over all ranks."""
    return [sum(of_ranks) for of_ranks in zip(*gather([numbers]))]


def share(rows):
    """This rank's share of a list that all ranks have; `gather` puts the shares together again."""
    return rows[len(rows) * RANK // WORLD : len(rows) * (RANK + 1) // WORLD]


def lockstep(batches):
    """(rows, True) for each batch; then ([0], False) until the rank with the most batches is through.

    FSDP needs equal numbers of forward passes: ranks that finish early run dummy batches.
    """
    turns = max(gather([len(batches)]))
    return [(rows, True) for rows in batches] + [([0], False)] * (turns - len(batches))


class Root(nn.Sequential):
    """A module's children for FSDP, which gathers weights while a forward runs: so this forward runs any function."""

    def forward(self, function):
        return function()


SHARDED = weakref.WeakKeyDictionary()  # {a module: (its Root, the same module without weights, to make copies of)}


def shard(module):
    """Split the weights of a module over all ranks, layer by layer (FSDP2); with_full_weights lets functions read them.

    Gradients are added up over the ranks, not averaged: every loss is divided by the counts of all ranks already.
    """
    if WORLD == 1:
        return module
    from torch.distributed.fsdp import fully_shard  # here: slow to import, and not needed by one process

    on_meta, root = copy_with(module, lambda weight: weight.to("meta")), Root(*module.children())
    trunk = getattr(module, "base_model", module)
    layers = next((part for part in trunk.modules() if isinstance(part, nn.ModuleList)), ())
    for part in (*layers, root):
        fully_shard(part, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    SHARDED[module] = root, on_meta
    return module


def full_tensor(tensor, dtype=None):
    """All of a tensor that may be sharded, gathered in `dtype` if it is. All ranks must call it together."""
    return tensor.to(dtype or tensor.dtype).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(tensor, values):
    """Copy values into a tensor, or this rank's part of them into a sharded one."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
