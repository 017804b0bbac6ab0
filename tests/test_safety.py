"""What comes from elsewhere stays data: no pickle is opened, no code of a download is run, no name in the data becomes
a path, and the user's token is neither shown nor written. What programs of a model may do: tests/test_sandbox.py"""

import builtins
import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from http.server import ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from pyarrow import Table, parquet
from test_program import ROOT, SMALL, Hub, inside  # noqa: F401 (a fixture: the program in this process)

import evaluator
import llms
import main
import rldatasets
from plots import report

ROW = {"question": "What is 1 + 1?", "answer": "So <<1+1=2>>2. #### 2"}
TOKEN = "hf_SECRETsecretSECRETsecret"


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(tmp_path):
    """A trap whose file must not be there in the end."""
    yield (trap := Trap(tmp_path / "sprung"))
    assert not Path(trap.path).exists(), "it was unpickled, or run"


@pytest.fixture(params=["load", "load_reward_model"])
def model(request, checkpoint, reward_model, tmp_path):
    """A folder with a model, the policy's and then the reward model's, and what loads it."""
    source = checkpoint("qwen2") if request.param == "load" else reward_model
    return shutil.copytree(source, tmp_path / "model"), getattr(llms, request.param)


def pickles(trap):
    """A trap as three libraries write it."""
    as_torch, as_numpy = io.BytesIO(), io.BytesIO()
    torch.save(trap, as_torch)
    numpy.save(as_numpy, numpy.array([trap], dtype=object), allow_pickle=True)
    return [pickle.dumps(trap), as_torch.getvalue(), as_numpy.getvalue()]


@contextlib.contextmanager
def refused(error, says):
    """What is done inside must be refused in one line."""
    with warnings.catch_warnings(action="ignore"), pytest.raises(error, match=says) as refusal:
        yield
    assert "\n" not in str(refusal.value)


def change(path, **entries):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def files_below(folder):
    return {path for path in folder.rglob("*") if not path.is_dir()}


# ---- nothing is unpickled ------------------------------------------------------------------------------------------


def test_the_trap_works(tmp_path):
    for number, content in enumerate(pickles(Trap(tmp_path / "sprung"))):
        loads = (
            pickle.load,
            lambda file: torch.load(file, weights_only=False),
            lambda file: numpy.load(file, None, True),
        )
        loads[number](io.BytesIO(content))
        (tmp_path / "sprung").unlink()


@pytest.mark.parametrize("content", ["trap", "weights"])
@pytest.mark.parametrize("named", ["by nothing", "by the index of safetensors"])
def test_pickled_weights_are_refused_even_honest_ones(model, trap, content, named):
    folder, load = model
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights if content == "weights" else trap, folder / "pytorch_model.bin")
    if named == "by the index of safetensors":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(llms.ModelError, "model"):
        load(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_pickle_in_the_place_of_a_file_of_a_model_is_refused(model, trap, name):
    folder, load = model
    for content in pickles(trap):
        (folder / name).write_bytes(content)
        with refused(llms.ModelError, "model"):
            load(str(folder))


def test_what_else_lies_in_a_model_folder_is_not_opened(model, trap):
    folder, load = model
    for content, ending in zip(pickles(trap), ("pkl", "bin", "npy")):
        for name in ("pytorch_model", "training_args", "optimizer", "adapter_model", "tokenizer", "vocab"):
            (folder / f"{name}.{ending}").write_bytes(content)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.model"):
        torch.save(trap, folder / name)
    assert load(str(folder))[0].config.model_type == "qwen2"


def test_a_pickle_in_the_place_of_a_checkpoint_is_refused(setup, trap):
    state, _ = setup()
    writer = llms.CheckpointWriter()
    main.save_checkpoint(state, writer)
    writer.wait()
    main.load_checkpoint(state)
    for content in pickles(trap):
        (state.run / "checkpoint" / "state.safetensors").write_bytes(content)
        with refused(llms.ModelError, "is damaged"):
            main.load_checkpoint(state)


@pytest.mark.parametrize("ending", ["pkl", "pt", "npy", "arrow", "jsonl", "json", "jsonl.gz", "parquet", "csv"])
def test_pickled_data_is_refused(tmp_path, trap, ending):
    for content in pickles(trap):
        (tmp_path / f"train.{ending}").write_bytes(content)
        for path in (tmp_path, tmp_path / f"train.{ending}"):
            with refused(rldatasets.DataError, str(path)):
                next(rldatasets.load(str(path), "train"))


def test_pickles_beside_the_rows_and_in_them_are_not_opened(tmp_path, trap):
    for content, ending in zip(pickles(trap), ("pkl", "pt", "npy")):
        (tmp_path / f"train.{ending}").write_bytes(content)
    parquet.write_table(Table.from_pylist([ROW | {"more": pickle.dumps(trap)}]), tmp_path / "train.parquet")
    assert [problem["answer"] for problem in rldatasets.load(str(tmp_path), "train")] == ["2"]


# ---- no code of a download is run ----------------------------------------------------------------------------------


@pytest.fixture
def code(trap, monkeypatch):
    """A module that springs the trap, for a user who would say yes to whatever is asked."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return f"open({trap.path!r}, 'w').close()\nraise ImportError('it was run')\n"


@pytest.mark.parametrize("kind", ["qwen2", "vit", "unheard_of"])  # a known model; one without such a head; neither
def test_the_code_in_a_model_folder_is_not_run(model, code, kind):
    folder, load = model
    (folder / "modeling_x.py").write_text(code)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer")
    new = {"model_type": kind, "trust_remote_code": True, "auto_map": dict.fromkeys(classes, "modeling_x.X")}
    change(folder / "config.json", **new)
    with contextlib.suppress(llms.ModelError):  # a shape that is known without the code may be loaded
        load(str(folder))


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "XTokenizer"])
def test_the_code_of_a_tokenizer_is_not_run(model, code, name):
    folder, load = model
    (folder / "tokenization_x.py").write_text(code)
    new = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": ["tokenization_x.X"] * 2}, "trust_remote_code": True}
    change(folder / "tokenizer_config.json", **new)
    with contextlib.suppress(llms.ModelError):
        load(str(folder))


def test_the_loading_script_of_a_data_set_is_not_run(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    for script in ("openai/gsm8k/gsm8k.py", "mine/mine.py", "parquet/parquet.py", "json.py"):
        Path(script).parent.mkdir(parents=True, exist_ok=True)
        Path(script).write_text(code)
    with refused(rldatasets.DataError, "gsm8k"):
        next(rldatasets.load("gsm8k", "train"))
    Path("mine/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: mine.py\n---\n")
    parquet.write_table(Table.from_pylist([ROW]), "mine/train.parquet")
    assert [problem["answer"] for problem in rldatasets.load("mine", "train")] == ["2"]


@pytest.fixture(scope="module")
def readers(checkpoint, reward_model):
    """What reads a chat template, and its tokenizer: of the policy, and of the reward model."""
    tokenizer, judge = llms.load(checkpoint("qwen2"))[1], llms.load_reward_model(reward_model)
    ask, score = (
        lambda: llms.encode(tokenizer, rldatasets.prompt(ROW)),
        lambda: llms.reward_scores(judge, ["q"], ["o"]),
    )
    return {"policy": (tokenizer, ask), "reward model": (judge[1], score)}


TEMPLATES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch sprung') }}",
    "{{ lipsum.__globals__['os'].popen('touch sprung').read() }}",
    "{{ messages[0].update({'content': 'another'}) }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ 1 / 0 }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("reader", ["policy", "reward model"])
def test_a_chat_template_reaches_nothing_of_python(readers, trap, tmp_path, monkeypatch, reader, template):
    monkeypatch.chdir(tmp_path)
    tokenizer, read = readers[reader]
    tokenizer.chat_template = template
    with refused(llms.ModelError, "chat template"):
        read()


# ---- no name leaves the run folder ---------------------------------------------------------------------------------


def test_what_stands_in_the_rows_becomes_no_path(checkpoint, inside, tmp_path, monkeypatch):  # noqa: F811
    for folder in ("work", "data", "temporary"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    names = ["../../x", str(tmp_path / "x"), "a\nb", "a\0b", "..", "~/x", "x" * 5000]
    fields = ("task", "task_id", "kind", "functions", "test", "name", "split", "stage", "run", "path", "file")
    rows = [
        dict.fromkeys(fields, name) | {"question": f"{name[:200]}?", "answer": f"{name} #### {name}"} for name in names
    ]
    program = {"text": "Write f.", "code": "def f(): return open('../../x', 'w')", "task_id": "../../x"}
    program["test_list"] = [*(f"open({name[:200]!r}, 'w')" for name in names), "assert f()"]
    for name, content in (("rows", rows), ("others", rows), ("programs", [program])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    before = files_below(tmp_path)
    stages = "../data/rows.jsonl:1" + ",../data/../data/programs.jsonl:1" * (evaluator.sandbox_problem() is None)
    how = "--questions_per_step 2 --group_size 2 --max_new_tokens 8 --test --eval_dataset arithmetic"
    how += ",../data/../data/others.jsonl" + " --tensorboard" * bool(find_spec("tensorboard"))
    status, _, err = inside("--model", f"{checkpoint('qwen2')}/../qwen2/.", "--dataset", stages, *how.split())
    assert status == 0, err
    run = tmp_path / "work" / "runs" / "test-1"
    assert files_below(tmp_path) - before == files_below(run) and (run / "model" / "config.json").exists()
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("model", ["..", "a/..", "a/", "a/../../b", "/", ".", "a b", "~", "..."])
@pytest.mark.parametrize("dataset", ["arithmetic", "..", "data/..", "data/rows.jsonl/../..", "data/../../../x.jsonl"])
def test_a_new_run_lies_in_runs_whatever_the_model_and_the_data_are_called(tmp_path, monkeypatch, model, dataset):
    (tmp_path / "a" / "b" / "data" / "rows.jsonl").mkdir(parents=True)
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW))
    monkeypatch.chdir(tmp_path / "a" / "b")
    for test in (["--test"], []):
        actions, flags = main.parse([*test, "--model", model, "--dataset", dataset, "--steps", "1"])
        main.choose_settings(actions, flags)
        run = report.new_folder(main.RUN, main.MODEL, main.DATASET, actions.test)
        assert run.resolve().parent == tmp_path / "a" / "b" / "runs"


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", "a/", ".", "./a", "x" * 300], ids=lambda name: name[:9])
def test_the_name_of_a_run_is_a_name_and_no_path(checkpoint, inside, tmp_path, name):  # noqa: F811
    code, _, err = inside("--model", checkpoint("qwen2"), *SMALL.split(), "--run", name)
    assert code == 2 and err.count("\n") == 1 and not any(tmp_path.iterdir())


# ---- the token -----------------------------------------------------------------------------------------------------


def test_the_token_is_shown_to_the_hub_alone(tmp_path, monkeypatch):
    shown, hub = [], ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(Hub, "log_message", lambda request, *_: shown.append(request.headers["Authorization"]))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    home = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, str(ROOT / "main.py"), "--model", "some/gated", "--dataset", "arithmetic"]
    how = {"env": os.environ | home | {"HF_TOKEN": TOKEN}, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path, check=False, **how)
    hub.shutdown()
    assert done.returncode == 2 and "is gated" in done.stderr and f"Bearer {TOKEN}" in shown
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in files_below(tmp_path))


def test_the_token_is_in_no_output_and_in_no_file(checkpoint, inside, tmp_path, monkeypatch):  # noqa: F811
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    small = ["--model", checkpoint("qwen2"), *SMALL.split(), "--run", "x", "--test"]
    board = ["--tensorboard"] if find_spec("tensorboard") else []
    commands = [[*small, *board], small, ["--resume", "runs/x", "--steps", "3"], ["--help"], ["--group_sise", "8"]]
    commands += [["--model", "some/gated", "--dataset", "arithmetic"], ["--model", "tiny", "--dataset", "nothing"]]
    outcomes = [inside(*command) for command in commands]
    assert [status for status, _, _ in outcomes] == [0, 2, 0, 0, 2, 2, 2]
    assert not any(TOKEN in out + err for _, out, err in outcomes)
    assert not any(TOKEN.encode() in path.read_bytes() for path in files_below(tmp_path))
