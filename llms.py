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
    shard(module)                 its weights split over all ranks, where torchrun has started several
    tokens_at(tokenizer, ...)     which tokens write given characters
    reward_scores(...)            what a learned reward model says of completions
    save(model, tokenizer, ...)   a plain Hugging Face folder

The trunk computes no padding and every prompt once for all its outputs, in sampling and in scoring alike: `Packed` and
`Drawing` say how. `draw_in_waves` and the padded half of `states` are the plain way to the same numbers.

How a batch lies in memory (prompt left-padded, completion right-padded, so that all completions start in one column):

    ids        [pad pad  q   q  | o   o   o  <e> pad]     [N, P + T]
    attention  [ 0   0   1   1  | 1   1   1   1   0 ]     [N, P + T]   by length, never by `id != pad`
    mask                        [ 1   1   1   1   0 ]     [N, T]       |o_i| = 4: the end token counts, padding does not
"""

import bisect
import copy
import functools
import gc
import logging
import math
import os
import shutil
import sys
import weakref
from collections import deque
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

LOGITS_AT_ONCE = 2**24  # log-probabilities take few tokens at a time, so that this many logits suffice; 8 × on a GPU


class ModelError(ValueError):
    """What is wrong with a model, in one line for the person who named it."""


# ---- several ranks -------------------------------------------------------------------------------------------------
# torchrun starts the program once per GPU; each process is a rank. All of them run the same lines and meet in a few of
# them: where weights are gathered, where gradients are added up, and in `gather`. Alone, all of this does nothing.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
PARENT = os.getppid()  # torchrun's process, where there is one


@contextmanager
def together():
    """A block in which the ranks can meet; only rank 0 is heard in it, save for errors."""
    if WORLD == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    if RANK:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    # one rank may sample for long while the others wait; that one has died, torchrun or a broken connection says
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))
    yield
    dist.destroy_process_group()  # not after an error, when the others may never come


def orphaned():
    """Has torchrun been killed, without time to end its ranks?"""
    return WORLD > 1 and os.getppid() != PARENT


def lost_another_rank(error):
    """Is this what a rank meets when another one has died?"""
    return WORLD > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def gather(rows):
    """The lists of all ranks as one, on every rank."""
    parts = [rows] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def share(rows):
    """This rank's share of a list that all ranks have; `gather` puts the shares together again."""
    return rows[len(rows) * RANK // WORLD : len(rows) * (RANK + 1) // WORLD]


def in_step(batches):
    """(batch, True) for each, then (row 0, False) until the rank with the most of them is through.

    Weights are gathered by all ranks or by none: whoever is done earlier goes on computing what does not count.
    """
    turns = max(gather([len(batches)]))
    return [(rows, True) for rows in batches] + [([0], False)] * (turns - len(batches))


def on_rank_0(function):
    """A function that only rank 0 runs: it writes or draws something, and returns nothing."""
    return function if RANK == 0 else functools.wraps(function)(lambda *inputs, **named: None)


@contextmanager
def one_first():
    """A block that one rank of each machine goes through before its others, which wait: what it makes, they find."""
    if LOCAL_RANK:
        gather([])
    yield
    if not LOCAL_RANK:
        gather([])


SKELETONS = weakref.WeakKeyDictionary()  # {a sharded module: the same without weights}, to make copies of


def shard(module):
    """Split the weights of a module over all ranks, layer by layer (FSDP2). What reads them is `gathering`, below.

    Gradients are added up over the ranks, not averaged: every loss is divided by the counts of all ranks already.
    """
    if WORLD == 1:
        return module
    SKELETONS[module] = copy_with(module, lambda weight: torch.empty_like(weight, device="meta"))
    for part in (*layers_of(module), module):
        fully_shard(part, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    module.gathered = lambda function, *inputs, **named: function(module, *inputs, **named)
    register_fsdp_forward_method(module, "gathered")
    return module


def is_sharded(module):
    return module in SKELETONS


def gathering(function):
    """Let a function of a module and some inputs find a sharded module's weights whole, layer after layer."""

    @functools.wraps(function)
    def on_whole_weights(module, *inputs, **named):
        if is_sharded(module):
            return module.gathered(function, *inputs, **named)
        return function(module, *inputs, **named)

    return on_whole_weights


def whole(tensor, dtype=None):
    """All of a tensor that may be sharded, which then travels in a dtype; all ranks ask together."""
    return tensor.to(dtype or tensor.dtype).full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor, values):
    """Copy values into a tensor, or this rank's part of them into a sharded one."""
    if isinstance(tensor, DTensor):
        values = values.to(tensor.device)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


def copy_with(module, change):
    """A copy of a module with `change(weight)` in the place of each weight, which of a sharded one has no values."""
    plain = SKELETONS.get(module, module)
    return copy.deepcopy(
        plain, {id(weight): nn.Parameter(change(weight), weight.requires_grad) for weight in plain.parameters()}
    )


# ---- loading and saving --------------------------------------------------------------------------------------------

SAFE = {"use_safetensors": True, "trust_remote_code": False}  # no pickle is opened, no code of a download is run


def no_pickles():
    raise ModelError("its weights are pickled, and only safetensors are read")


transformers.modeling_utils.check_torch_load_is_safe = no_pickles  # asked where an index names something else


def configuration(name):
    """A model's shape, without its weights; that of the tiny model for "tiny"."""
    if name == "tiny":
        return transformers.Qwen2Config(**TINY["shape"], vocab_size=TINY["vocabulary"])
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"no such model folder: {name}")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes four libraries raise is the same news to the user
        raise ModelError(explain(name, error)) from error


def load(name):
    """A causal language model in fp32 and its tokenizer, from a folder or from the Hugging Face hub.

    The weights stay in fp32 (a step of 1e-6 is lost in bf16); `compute` says in which precision they are used. Dropout
    is set to 0: the policy that is scored must be the one that sampled. The model is on the GPU if there is one, but
    with several ranks only when it is sharded.
    """
    config = configuration(name)
    for key in vars(config):
        if "dropout" in key or "pdrop" in key:
            setattr(config, key, 0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        how = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, loaded = AutoModelForCausalLM.from_pretrained(name, **how, **SAFE)
    except Exception as error:  # as above
        raise ModelError(explain(name, error)) from error
    if loaded["missing_keys"]:
        raise ModelError(f"{name} lacks weights of its own architecture: {min(loaded['missing_keys'])} and maybe more")
    if not tokenizer("How many?")["input_ids"]:
        raise ModelError(f"{name} has no tokenizer")
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config.get_text_config(), key, None) not in (None, 1.0):
            raise ModelError(f"{name} changes its logits behind the head ({key}), which is not known here")
    if not end_tokens(model, tokenizer):
        raise ModelError(f"{name} names no end token, neither in its generation config nor in its tokenizer")
    if torch.cuda.is_available() and WORLD == 1:
        model.cuda()
    attend_by_layout(model)
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
    if is_sharded(model):
        sharded, model = model, empty_copy(model, torch.float32, "cpu" if RANK == 0 else "meta")
        renew(model, sharded)
        if RANK:
            return
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


@torch.no_grad()
def frozen_copy(model, adapter=True):
    """A copy that no gradient and no update reaches: the reference.

    With LoRA it shares the model's weights (unless they are sharded), and has an adapter like the model's as it is now,
    or none: that is the model as it was loaded. On a GPU its linear layers are held in bf16, in which they compute.
    """
    sharded = is_sharded(model)
    if sharded:
        gc.collect()  # the last one: FSDP's own references to it go round in a circle
    reference = copy_with(model, lambda weight: torch.empty_like(weight, device="cpu")) if sharded else own_copy(model)
    for layer in adapted(reference) if not adapter else ():
        layer.lora_A = layer.lora_B = None
    if precision(model.device) is torch.bfloat16 and not adapted(reference):
        for layer in linear_layers(reference).values():  # as they would be rounded at every use
            layer.to(torch.bfloat16)
    reference.requires_grad_(False)
    if sharded:
        weights = dict(model.named_parameters())
        for name, weight in shard(reference).named_parameters():
            weight.copy_(weights[name])
    return reference


def precision(device):
    """bf16 on a GPU that computes in it, else fp32."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def compute(model, keep_casts):
    """The precision of a forward pass: bf16 on a GPU (the weights themselves stay in fp32), fp32 on a CPU.

    With `keep_casts` a weight's bf16 copy is kept until the end: right for the many steps of sampling, but gradients
    that reach one weight from several places would be added up in bf16.
    """
    bf16 = precision(model.device) is torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16, cache_enabled=keep_casts)


def at_least_fp32(logits):
    """A log-softmax in bf16 is wrong by up to 0.03: logits go to fp32 first, float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ---- LoRA (arXiv 2106.09685) ---------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """W x + (α/r) B A x: W is frozen, A [r, in] and B [out, r] are trained, B from 0; without them W x."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        drawn = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features, device="cpu"), a=5**0.5)
        self.lora_A = nn.Parameter(drawn.to(linear.weight))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.lora_B is None else y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def layers_of(module):
    """The layers of the trunk: the outermost list in it."""
    parts = getattr(module, "base_model", module).modules()
    return next((part for part in parts if isinstance(part, nn.ModuleList)), nn.ModuleList())


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
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:  # no causal language model
        raise ModelError(explain(name, error)) from error


def largest_rank(model):
    """The rank beyond which an adapter is no smaller than the layer it stands beside; 0 without linear layers."""
    sizes = [min(layer.in_features, layer.out_features) for layer in linear_layers(model).values()]
    return min(sizes, default=0)


def memory(model, copies, cache_tokens, token_budget, checkpointing, on_gpu, ranks=1):
    """An estimate of what a run needs at its peak, in bytes, by part; of several ranks, what each needs.

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
    reference, critic = copies
    sampled_from = size * total if on_gpu or ranks > 1 else 0
    per_layer = sum(weight.numel() for weight in layers_of(model).parameters()) / layers
    outside = total - layers * per_layer  # embeddings and head
    light = trained < total  # adapters alone are trained
    own = 4 * total if light else size * trained + (2 * outside if on_gpu else 0)  # of a reference
    # the weights and gradients, in fp32, of the parts that are whole just now
    gathered = (4 if light else 8) * (outside + 2 * per_layer) if ranks > 1 else 0
    cast = 2 * (outside + per_layer if checkpointing else total) if on_gpu else 0  # weights in bf16, for the way back
    critics = 16 * trained + (4 * (total - trained) if ranks > 1 else 0)
    sampling = size * cache_tokens * layers * key_value
    updating = 4 * trained / ranks + gathered + size * token_budget * kept + cast
    return {
        "weights": 4 * total / ranks,
        "AdamW": 8 * trained / ranks,
        "copies": (own * reference + critics * critic) / ranks + sampled_from,
        f"sampling {'and' if on_gpu else 'or'} updating": (sampling + updating if on_gpu else max(sampling, updating))
        + 3 * 4 * LOGITS_AT_ONCE * (8 if on_gpu else 1),
    }


# ---- prompts and batches -------------------------------------------------------------------------------------------


def templated(tokenizer, messages, **how):
    """A dialogue in the words of the checkpoint's chat template."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template is a program, and raises what it likes
        raise ModelError(f"the chat template of {tokenizer.name_or_path} fails: {error}".splitlines()[0]) from error


def encode(tokenizer, messages):
    """Token ids of a prompt: through the checkpoint's chat template, or plain paragraphs where it has none."""
    if tokenizer.chat_template:
        # a template that knows no system role refuses one: then the user says it all
        user = {"role": "user", "content": "\n\n".join(message["content"] for message in messages)}
        try:
            text = templated(tokenizer, messages, add_generation_prompt=True)
        except ModelError:
            text = templated(tokenizer, [user], add_generation_prompt=True)
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
    kinds = zip((ids, attention, mask), (torch.long, torch.long, torch.bool))
    return (torch.tensor(rows, dtype=kind, device=device) for rows, kind in kinds)


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


# ---- attention without padding -------------------------------------------------------------------------------------
# All of a decoder but its attention looks at one token at a time. So the tokens of a batch may lie in one line, without
# padding and with each prompt once, if the attention knows which of them belong together. Here it is ours, and does as
# a layout says: Packed is that of whole rows, Drawing that of outputs which grow by a token at a time.

NO_MASK = torch.zeros(1, 1, 1, 1)  # what has four dimensions is passed on as it is: the library builds no mask


def attention_by_layout(module, query, key, value, mask, layout=None, **how):
    """The attention of a layer as the library calls it: the library's own, or a layout's where one is given."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, **how)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE leaves them in fp32
    return layout.attend(module.layer_idx, query, key, value, how.get("scaling")), None


AttentionInterface.register("by_layout", attention_by_layout)
AttentionMaskInterface.register("by_layout", sdpa_mask)


@torch.no_grad()
def attend_by_layout(model):
    """Let a model attend as layouts say, and say whether it can; a model that cannot is run on padded rows.

    It cannot where attention sees a window only, keeps a state, or is another than causal softmax attention, once a
    layer, as a short line shows that is read both ways.
    """
    config, before = model.config.get_text_config(), model.config._attn_implementation
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if not model._supports_attention_backend or kinds != {"full_attention"} or window or model._is_stateful:
        return False
    ids, attention, mask = batch([[3, 1, 4, 1, 5]], [[2, 6, 5]], model.device)
    packed, expected = Packed(ids, attention, mask), model(ids).logits[0, :-1]
    packed.kept = []
    model.set_attn_implementation("by_layout")
    difference = (model(**packed.inputs()).logits[0] - expected).abs().max()
    layers = [layer for layer, _, _ in packed.kept]
    if not difference < 1e-3 * expected.abs().max() or len(layers) != len(set(layers)):
        model.set_attn_implementation(before)
    return by_layout(model)


def by_layout(model):
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == "by_layout"


def repeats(ids, attention, mask):
    """Whether an output has the prompt of the one above it: a list of N; False for prompts without outputs, T = 0."""
    P = ids.shape[1] - mask.shape[1]
    prompts = torch.where(attention[:, :P] > 0, ids[:, :P], -1)
    return [False, *((prompts[1:] == prompts[:-1]).all(1) & (mask.shape[1] > 0)).tolist()]


class Packed:
    """Rows in one line, q₁ o₁ o₂ … q₂ o_{G+1} …: those that follow each other with the same prompt share it.

    The last token of an output is left out, for nothing is predicted from it.
    """

    def __init__(self, ids, attention, mask):
        P, width = ids.shape[1] - mask.shape[1], ids.shape[1]
        line, places = [], []  # where in ids a token stands, and its place in its own row
        asked, said = [], []  # where in the line is what predicts the first token of a prompt's outputs; each token
        self.questions, self.kept = [], None  # (prompt tokens, outputs, their longest, cells); keys and values
        sizes = zip(attention.sum(1).tolist(), mask.sum(1).tolist(), repeats(ids, attention, mask))
        for row, (size, length, again) in enumerate(sizes):
            start, p = row * width + P, size - length
            if not again:
                line += range(start - p, start)
                places += range(p)
                asked.append(len(line) - 1)
                self.questions.append((p, []))
            self.questions[-1][1].append(max(0, length - 1))
            said += [asked[-1], *range(len(line), len(line) + length - 1)][:length]
            line += range(start, start + length - 1)
            places += range(p, size - 1)
        for number, (p, lengths) in enumerate(self.questions):
            T = max(lengths)
            cells = [row * T + t for row, length in enumerate(lengths) for t in range(length)]
            self.questions[number] = (p, len(lengths), T, torch.tensor(cells, device=ids.device))
        index = lambda numbers: torch.tensor(numbers, dtype=torch.long, device=ids.device)
        self.ids, self.places = ids.flatten()[index(line)][None], index(places)[None]  # [1, line]
        self.asked, self.said = index(asked), index(said)

    def attend(self, layer, query, key, value, scaling):
        """Causal attention of [1, heads, line, D], each output's to its prompt and itself: [1, line, heads, D]."""
        if self.kept is not None:
            self.kept.append((layer, key, value))
        if query.is_cuda and query.dtype == torch.float32:  # its fast kernels want a key head for every query head
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        heads, at, parts = {"scale": scaling, "enable_gqa": True}, 0, []
        for p, n, T, cells in self.questions:
            q, k, v = (x[:, :, at : at + p] for x in (query, key, value))  # [1, heads, p, D]
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **heads)[0].transpose(0, 1))
            at += p
            if len(cells):
                own = (x[0, :, at : at + len(cells)].transpose(0, 1) for x in (query, key, value))  # [Σ|o_i|, heads, D]
                padded = [x.new_zeros(n * T, *x.shape[1:]).index_copy(0, cells, x).unflatten(0, (n, T)) for x in own]
                q, *own = (x.transpose(1, 2) for x in padded)  # [n, heads, T, D]
                k, v = (torch.cat([prompt.expand(n, -1, -1, -1), x], 2) for prompt, x in zip((k, v), own))
                out = F.scaled_dot_product_attention(q, k, v, causal_lower_right(T, p + T), **heads)
                parts.append(out.transpose(1, 2).flatten(0, 1).index_select(0, cells))
                at += len(cells)
        return torch.cat(parts)[None]

    def inputs(self):
        """What to give to a model, or to its trunk."""
        how = {"attention_mask": NO_MASK, "layout": self, "use_cache": False}
        return {"input_ids": self.ids, "position_ids": self.places} | how


class Drawing:
    """Outputs that are being drawn: row i of each tensor is one of them, for i below the number that is alive."""

    def __init__(self, rows, columns, max_new_tokens, ends, temperature, device):
        self.ends, self.temperature, self.alive, self.columns = ends, temperature, 0, columns
        self.keys, self.values = {}, {}  # of each layer, [rows, heads, columns, D]
        self.graphs, self.recordable = {}, True  # on a GPU: {(rows, columns, T): a recorded step}
        self.token, self.place, self.length = torch.zeros(3, rows, dtype=torch.long, device=device)  # the newest token
        self.ended = torch.ones(rows, dtype=torch.bool, device=device)
        # one column more than tokens: what is drawn behind an end falls behind it, and its length stays
        self.said = torch.zeros(rows, max_new_tokens + 1, dtype=torch.long, device=device)
        self.logp, self.entropy, self.chance = torch.zeros(3, rows, max_new_tokens + 1, device=device)

    def holds(self, rows, columns, max_new_tokens):
        """Is there room for so many rows of so many tokens, the outputs' limit being the same?"""
        return len(self.token) >= rows and self.columns >= columns and self.said.shape[1] == max_new_tokens + 1

    def begin(self, model, prompts, group_size, generator):
        """Read some prompts, each once, hand their keys and values to their G outputs, and draw the first tokens."""
        packed, first = Packed(*batch(prompts, [[]] * len(prompts), model.device)), self.alive
        packed.kept = []
        logits = model(**packed.inputs(), logits_to_keep=packed.asked).logits[0]  # [Q, V]
        check_finite(logits)
        for layer, *kept in packed.kept:
            for cache, x in zip((self.keys, self.values), kept):  # x [1, heads, line, D]
                if layer not in cache:
                    cache[layer] = x.new_zeros(len(self.token), x.shape[1], self.columns, x.shape[3])
                line = x[0].split([len(prompt) for prompt in prompts], 1)
                for question, prompt in enumerate(line):
                    row = first + question * group_size
                    cache[layer][row : row + group_size, :, : prompt.shape[1]] = prompt
        self.alive += len(prompts) * group_size
        rows = slice(first, self.alive)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self.place[rows] = lengths.repeat_interleave(group_size)
        self.length[rows], self.ended[rows] = 0, False
        if self.temperature:
            shape = (self.alive - first, self.chance.shape[1] - 1)
            self.chance[rows, :-1] = torch.rand(shape, generator=generator)
        self.draw(rows, logits.repeat_interleave(group_size, 0))

    def draw(self, rows, logits):
        """Draw a token for each of some rows, and note what it was: logits [n, V]."""
        length = self.length[rows, None]  # [n, 1]
        drawn = choose(logits, self.temperature, self.chance[rows].gather(1, length))  # 3 × [n, 1]
        for notes, x in zip((self.said, self.logp, self.entropy), drawn):
            notes[rows].scatter_(1, length, x)
        self.token[rows] = drawn[0][:, 0]
        self.length[rows] += ~self.ended[rows]
        self.ended[rows] |= (drawn[0] == self.ends).any(1) | (self.length[rows] == self.said.shape[1] - 1)

    def attend(self, layer, query, key, value, scaling):
        """Attention of one new token per row to all of its row: [n, heads, 1, D] -> [n, 1, heads, D]."""
        n = len(query)
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.place[:n]], values[self.rows, :, self.place[:n]] = key[:, :, 0], value[:, :, 0]
        keys, values = keys[:n, :, : self.reach], values[:n, :, : self.reach]
        # query heads with the same key head are taken for queries of one head: no key is repeated
        queries = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)  # [n, key heads, query heads each, D]
        out = F.scaled_dot_product_attention(queries, keys, values, self.bias, scale=scaling)
        return out.flatten(1, 2)[:, None]

    def step(self, model, n, reach):
        """Read the newest token of the first n rows, none of which goes beyond column `reach`, and draw the next."""
        place = self.place[:n, None]
        self.rows, self.reach = torch.arange(n, device=place.device), reach
        columns = torch.arange(reach, device=place.device)
        self.bias = torch.zeros(n, 1, 1, reach, device=place.device, dtype=next(iter(self.keys.values())).dtype)
        self.bias.masked_fill_((columns > place)[:, None, None], -math.inf)  # of what a row does not have yet
        how = {"attention_mask": NO_MASK, "layout": self, "use_cache": False}
        logits = model(input_ids=self.token[:n, None], position_ids=place, **how).logits[:, -1]  # [n, V]
        self.place[:n] += ~self.ended[:n]
        self.draw(slice(0, n), logits)

    def leave(self, row):
        """Take an output out; the last row moves into its place. Returns its tokens, their log π, the entropies."""
        length, last = int(self.length[row]), self.alive - 1
        output = [x[row, :length].clone() for x in (self.said, self.logp, self.entropy)]
        if row < last:
            used = int(self.place[last]) + 1
            for cache in (*self.keys.values(), *self.values.values()):
                cache[row, :, :used] = cache[last, :, :used]
            rows = (self.token, self.place, self.length, self.ended, self.said, self.logp, self.entropy, self.chance)
            for x in rows:
                x[row] = x[last]
        self.alive, self.ended[last] = last, True
        return output

    def go_on(self, model):
        """Draw the next token of all outputs that are alive, or on a GPU the next 16 without asking how it stands.

        There the kernels of a step are recorded once for a number of rows and columns, and then only replayed.
        """
        last = int(self.place[: self.alive].max())
        if self.place.device.type != "cuda":
            return self.step(model, self.alive, last + 1)
        # few numbers of rows and columns, few recordings; a single row is summed up in another way, less exactly
        n = min(len(self.place), max(2, 2 ** (self.alive - 1).bit_length()))
        reach = min(self.columns, (last + 16) // 256 * 256 + 256)
        for _ in range(16):
            if (key := (n, reach, self.temperature)) in self.graphs:
                self.graphs[key].replay()
                continue
            self.step(model, n, reach)  # a recording needs one before it
            if self.recordable:
                self.record(key, lambda: self.step(model, n, reach))

    def record(self, key, step):
        """Record a step without running it; a model in which something cannot be recorded is called every time."""
        graph, others, stream = torch.cuda.CUDAGraph(), list(self.graphs.values()), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=others[0].pool() if others else None):
                step()
            self.graphs[key] = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            self.recordable = False
            tqdm.write(f"note: sampling without recorded steps, which is slower: {str(error).splitlines()[0]}")


def rounded_copy(model, dtype):
    """A copy with weights of another precision, or the very weights where they have it; RoPE's buffers stay in fp32."""
    return copy_with(model, lambda weight: weight.to(dtype)).requires_grad_(False)


def empty_copy(model, dtype, device):
    """A copy whose weights have no values yet."""
    copied = copy_with(model, lambda weight: torch.empty_like(weight, dtype=dtype, device=device))
    return copied.to(device).requires_grad_(False)


@torch.no_grad()
def renew(copied, model):
    """Bring the weights of a copy to where the model's are now, in place. Adapters stay beside their layers.

    Merged into a weight of bf16, what they have learnt would be rounded away.
    """
    for mine, weight in zip(copied.parameters(), model.parameters()):
        mine.copy_(whole(weight, mine.dtype))


COPIES = weakref.WeakKeyDictionary()  # {model: the copy of it that was sampled from last}


def sampled_from(model):
    """The model itself; on a GPU a copy in bf16 as it is now, and of a sharded model a copy of the whole."""
    sharded = is_sharded(model)
    if not sharded and (model.device.type == "cpu" or not by_layout(model)):
        return model
    if model not in COPIES:
        COPIES.clear()
        dtype = model.dtype if precision(model.device) is torch.float32 else torch.bfloat16
        COPIES[model] = empty_copy(model, dtype, model.device) if sharded else rounded_copy(model, dtype)
    renew(COPIES[model], model)
    return COPIES[model]


def drawing_of(model, rows, columns, max_new_tokens, ends, temperature):
    """What is sampled into; on a GPU the same as the last time, with its recordings, if there is room in it."""
    drawing = model.__dict__.pop("drawing", None)
    if drawing is None or not drawing.holds(rows, columns, max_new_tokens):
        drawing = None  # its memory is free before the next takes some
        drawing = Drawing(rows, columns, max_new_tokens, ends, temperature, model.device)
    if model.device.type == "cuda":
        model.drawing = drawing
    drawing.alive, drawing.temperature = 0, temperature
    drawing.ended.fill_(True)
    return drawing


# ---- sampling ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, generator, cache_tokens):
    """Draw `group_size` completions for every prompt (a list of token ids) from softmax(logits / temperature).

    Nothing else bends the distribution: no top-k, no top-p, nothing from the checkpoint's generation config but its end
    tokens. Temperature 0 takes the most probable token (evaluation). At most `cache_tokens` tokens are kept in the
    key-value cache at once, but at least one group; where outputs end, those of the next prompts begin.

    Each rank draws for its own share of the prompts, and with its own part of the generator's numbers (a CPU's): the
    outputs are the same for any number of ranks.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", longest)
    if longest > limit:
        raise ModelError(f"prompt and output take up to {longest} tokens, the model reads {limit}")
    ends = torch.tensor(end_tokens(model, tokenizer), device=model.device)
    columns = longest if model.device.type == "cpu" else -(-longest // 256) * 256
    source, total, mine, prompts = sampled_from(model), len(prompts), share(range(len(prompts))), share(prompts)
    rows = min(len(prompts), max(1, cache_tokens // (columns * group_size))) * group_size  # at once
    skip(generator, mine.start, group_size, max_new_tokens, temperature)
    with tqdm(total=len(prompts) * group_size, desc="sampling", unit="output", leave=False, delay=2) as bar:
        how = (group_size, max_new_tokens, temperature, generator, ends, rows, columns, bar)
        outputs = (draw_by_layout if by_layout(model) else draw_in_waves)(source, prompts, *how)
    skip(generator, total - mine.stop, group_size, max_new_tokens, temperature)

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


def skip(generator, questions, group_size, max_new_tokens, temperature):
    """Leave out the random numbers with which other ranks draw the outputs for some questions."""
    for _ in range(questions if temperature else 0):
        torch.rand(group_size, max_new_tokens, generator=generator)


def choose(logits, temperature, chance):
    """A token from softmax(logits / T) for each row, the log π of it and the entropy of π: logits [n, V] -> 3 × [n, 1].

    It is the token at which the sum of π over the vocabulary passes a number `chance` [n, 1] between 0 and 1.
    """
    logits = at_least_fp32(logits) if temperature in (0, 1) else at_least_fp32(logits) / temperature  # [n, V]
    pi = torch.softmax(logits, -1)  # [n, V]
    if temperature:
        below = pi.cumsum(-1)  # [n, V]
        total = below[:, -1:]
        # rounding must not carry it to the total, beyond the last token that can be drawn; nan stays in the vocabulary
        chance = torch.minimum(chance * total, total.nextafter(0 * total))
        token = torch.searchsorted(below, chance, right=True).clamp(max=logits.shape[1] - 1)
    else:
        token = logits.argmax(-1, keepdim=True)
    logp = pi.gather(1, token).log()
    # H = - Σ π log π = log Σ exp(logits) - Σ π logits, and the first is logits - log π of any token
    entropy = logits.gather(1, token) - logp - (pi[:, None] @ logits[:, :, None])[:, 0]
    return token, logp.float(), entropy.float()


def check_finite(logits):
    if not logits.isfinite().all():
        raise ModelError("the model's logits are not finite: its weights are broken, or training has diverged")


def draw_by_layout(model, prompts, group_size, max_new_tokens, temperature, generator, ends, rows, columns, bar):
    """All outputs as [(token ids, log-probabilities, entropies)]; where some end, those of waiting prompts begin."""
    drawing = drawing_of(model, rows, columns, max_new_tokens, ends, temperature)
    outputs, waiting = [None] * len(prompts) * group_size, deque(range(len(prompts)))
    numbers = []  # of the outputs that are being drawn, row by row
    while waiting or numbers:
        while waiting and rows - len(numbers) >= max(group_size, rows // 8):
            room = min(16, (rows - len(numbers)) // group_size, len(waiting))  # prompts to read in one pass
            asked = [waiting.popleft() for _ in range(room)]
            drawing.begin(model, [prompts[question] for question in asked], group_size, generator)
            numbers += [question * group_size + i for question in asked for i in range(group_size)]
        drawing.go_on(model)
        for row in reversed(drawing.ended[: len(numbers)].nonzero().flatten().tolist()):
            outputs[numbers[row]] = drawing.leave(row)
            numbers[row] = numbers[-1]
            numbers.pop()
            bar.update()
    return outputs


def draw_in_waves(model, prompts, group_size, max_new_tokens, temperature, generator, ends, rows, columns, bar):
    """All outputs as [(token ids, log-probabilities, entropies)], the plain way: what any other way must return."""
    outputs = []
    for start in range(0, len(prompts), rows // group_size):
        wave = prompts[start : start + rows // group_size]
        ids, attention, _ = batch(wave, [[]] * len(wave), model.device)  # [Q, P]
        cache, place = DynamicCache(), positions(attention)
        n = len(ids) * group_size
        drawn, ended = [], torch.zeros(n, dtype=torch.bool, device=model.device)
        chance = torch.zeros(n, max_new_tokens, device=model.device)
        if temperature:
            chance.copy_(torch.rand(chance.shape, generator=generator))
        with compute(model, keep_casts=True):
            for t in range(max_new_tokens):
                inputs = {"attention_mask": attention, "position_ids": place, "past_key_values": cache}
                logits = model(input_ids=ids, **inputs, logits_to_keep=1).logits[:, -1]  # [n, V]
                if t == 0:  # the prompt is read once, and its keys and values are handed to the G outputs
                    check_finite(logits)
                    cache.batch_repeat_interleave(group_size)
                    logits, attention, place = (
                        x.repeat_interleave(group_size, 0) for x in (logits, attention, place[:, -1:])
                    )
                drawn.append(choose(logits, temperature, chance[:, t : t + 1]))  # 3 × [n, 1]
                ids = drawn[-1][0]
                ended |= torch.isin(ids[:, 0], ends)
                if ended.all():
                    break
                attention, place = torch.cat([attention, torch.ones_like(ids)], 1), place + 1
        notes = [torch.cat(column, 1) for column in zip(*drawn)]  # 3 × [n, T]
        is_end = torch.isin(notes[0], ends)
        lengths = ((is_end.cumsum(1) - is_end.long()) == 0).sum(1).tolist()  # up to the first end, and with it
        outputs += [tuple(x[row, :length] for x in notes) for row, length in enumerate(lengths)]
        bar.update(len(lengths))
    return outputs


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
    if by_layout(trunk):
        packed = Packed(ids, attention, mask)
        hidden = trunk(**packed.inputs()).last_hidden_state[0].index_select(0, packed.said)  # [tokens, D]
    else:
        inputs = {"attention_mask": attention, "position_ids": positions(attention), "use_cache": False}
        hidden = trunk(input_ids=ids, **inputs).last_hidden_state
        # position j predicts token j + 1: the first completion token comes from the last prompt position
        hidden = hidden[:, -mask.shape[1] - 1 : -1][mask]  # [tokens, D]
    trunk.eval()
    return hidden


class HeadLogprobs(torch.autograd.Function):
    """log softmax(logits / T) of given tokens, logits = W h + b, of which only a chunk of tokens' is ever there."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, dtype):
        """hidden [tokens, D], weight [V, D], bias [V] or None, targets [tokens] -> [tokens], computed in a dtype."""
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
        ctx.save_for_backward(hidden, weight, bias, targets)
        at_once = LOGITS_AT_ONCE * (8 if weight.is_cuda else 1)
        ctx.temperature, ctx.chunk = temperature, max(1, at_once // len(weight))
        logp = at_least_fp32(hidden.new_empty(len(hidden)))  # filled in place, like all below: malloc would leave gaps
        for h, target, out in zip(*(x.split(ctx.chunk) for x in (hidden, targets, logp))):
            logits = at_least_fp32(F.linear(h, weight, bias)) / temperature  # [chunk, V]
            out.copy_(logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1))  # [chunk]
        return logp

    @staticmethod
    def backward(ctx, d_logp):
        """∂ log π_i / ∂ logits_j = (1[i = j] - π_j) / T."""
        hidden, weight, bias, targets = ctx.saved_tensors
        d_hidden, full = torch.empty_like(hidden), d_logp.dtype
        d_weight = torch.zeros_like(weight, dtype=full) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=full) if bias is not None else None
        chunks = (x.split(ctx.chunk) for x in (hidden, targets, d_logp / ctx.temperature, d_hidden))
        for h, target, d, out in zip(*chunks):
            pi = torch.softmax(at_least_fp32(F.linear(h, weight, bias)) / ctx.temperature, 1)  # [chunk, V]
            d_logits = pi.mul_(-d[:, None]).scatter_add_(1, target[:, None], d[:, None])  # [chunk, V]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            out.copy_(d_logits @ weight)
            if d_weight is not None and weight.dtype == full:
                d_weight.addmm_(d_logits.T, h)
            elif d_weight is not None:
                d_weight += d_logits.T @ h
        return d_hidden.to(full), d_weight, d_bias, None, None, None


@gathering
def token_logprobs(model, ids, attention, mask, temperature):
    """log π(o_{i,t} | q, o_{i,<t}) = log softmax(logits / T) of each completion token, fp32, [N, T]; 0 off the mask.

    The logits are never there all at once: N·T rows of 150,000 numbers would be most of a step's memory. The trunk
    gives the hidden states; the head is applied to a chunk of completion tokens at a time, and again going backward.
    """
    head = model.get_output_embeddings()
    with compute(model, keep_casts=False):
        hidden = states(model.base_model, ids, attention, mask)  # [tokens, D]
    dtype = (
        torch.promote_types(hidden.dtype, head.weight.dtype)
        if precision(model.device) is torch.float32
        else torch.bfloat16
    )
    targets = ids[:, -mask.shape[1] :][mask]  # [tokens]
    logp = HeadLogprobs.apply(hidden, head.weight, getattr(head, "bias", None), targets, temperature, dtype)  # [tokens]
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


class Critic(nn.Module):
    """PPO's value function: a trunk of its own, the policy's to begin with, and a value head on it, 0 to begin with."""

    def __init__(self, model):
        super().__init__()
        self.trunk = own_copy(model.base_model)
        head = model.get_output_embeddings().weight
        self.value_head = nn.Linear(head.shape[1], 1, device=head.device, dtype=head.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @gathering
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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **SAFE)
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
            pairs = ([templated(tokenizer, dialogue) for dialogue in dialogues],)
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
