"""What several test files share: small random checkpoints in Hugging Face format, and constants that go back."""

import os

# before anything reads them: no test reaches the network, and models this small gain nothing by more threads
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch
import transformers

import llms
import main
import rldatasets
from plots import report

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2, "rope_theta": 500000.0}),
    "gpt2": (transformers.GPT2Config, {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> a folder with a small random model and a real BPE tokenizer with a chat template."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            corpus = rldatasets.tiny_corpus(0, 200)[1]
            tokenizer = llms.tiny_tokenizer([message["content"] for messages, _ in corpus for message in messages])
            kind, extra = FAMILIES[family]
            ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
            config = kind(**SHAPE, **extra, **ends, vocab_size=len(tokenizer), max_position_embeddings=512)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # a fresh model is almost uniform: sharpen it, so that mistakes show
                for parameter in model.parameters():
                    parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
            made[family] = root / family
            llms.save(model, tokenizer, made[family])
        return str(made[family])

    return make


@pytest.fixture(scope="session")
def reward_model(checkpoint, tmp_path_factory):
    """A folder with a small random sequence classifier: one score for a question and its answer."""
    torch.manual_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    config = transformers.Qwen2Config(
        **SHAPE, num_key_value_heads=2, vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=512
    )
    model = transformers.Qwen2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("judge") / "reward-model"
    llms.save(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(autouse=True)
def constants():
    """Set constants of main.py for one test: constants(MU=3). They, and llms.py's, go back by themselves."""
    before, limits, precision = main.settings(), dict(llms.LIMITS), llms.PRECISION
    yield lambda **values: main.__dict__.update(values)
    main.__dict__.update(before)
    llms.LIMITS.update(limits)
    llms.PRECISION = precision


PROBLEMS = [
    {"question": f"What is {i} and {i}?", "answer": str(2 * i), "kind": "math", "solution": ""} for i in range(9)
]


@pytest.fixture
def setup(checkpoint, constants, tmp_path):
    """setup(**constants) -> a state around a small random model, and a rollout of 3 questions with 4 outputs each."""

    def make(family="qwen2", optimizer=None, **settings):
        constants(
            QUESTIONS_PER_STEP=3, GROUP_SIZE=4, MAX_NEW_TOKENS=12, STEPS=4, WARMUP=0, LEARNING_RATE=1e-3,
            TOKEN_BUDGET=8192, SHOW_EVERY=0, DATASET="arithmetic", EVAL_EVERY=100, SAVE_EVERY=100, SCHEDULE="constant",
            EVAL_QUESTIONS=0,
        )  # fmt: skip
        constants(**settings)
        policy, tokenizer = llms.load(checkpoint(family))
        policy.generation_config.eos_token_id = list(range(20, 60))  # so many that outputs are ragged
        state = main.new_state(policy, tokenizer, tmp_path)
        state.optimizer = optimizer(policy) if optimizer else state.optimizer
        state.reference = llms.frozen_copy(policy) if main.BETA else None
        return state, sample(state)

    return make


def sample(state):
    prompts = [[5 + i] * (3 + i) for i in range(main.QUESTIONS_PER_STEP)]
    shape = main.GROUP_SIZE, main.MAX_NEW_TOKENS, main.TEMPERATURE
    return llms.sample(state.policy, state.tokenizer, prompts, *shape, state.generator)


def train(state, problems=None, run=None, after_step=lambda state, metrics: 0):
    """Algorithm 1 on given problems, or those of DATASET; the rows of its metrics."""
    state.run, state.stream = run or state.run, problems and iter(problems)
    state.run.mkdir(exist_ok=True)
    main.train(state, after_step)
    return report.read_lines(state.run / "metrics.jsonl")


def save(state):
    """Write a checkpoint, and wait for it."""
    writer = llms.CheckpointWriter()
    main.save_checkpoint(state, writer)
    writer.wait()


def tensors(state):
    """Everything that a checkpoint holds of a state, by name."""
    return llms.named_tensors(state.networks(), state.optimizer, state.generator)
