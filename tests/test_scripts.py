"The scripts as people call them: from a shell, with whatever they have."
import json
import os
import signal
import subprocess
import sys
import time

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


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    "A model trained by torchrun on that corpus and vocabulary."
    out = tmp_path_factory.mktemp("trained") / "out"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29618", "minikl/train.py",
                           f"--vocab_dict_path={corpus}/vocab.json", f"--data_jsonl_path={corpus}/data.jsonl", "--max_steps=30", f"--out_dir={out}"],
                          cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


def snapshot(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def losses(out): return [line["loss"] for line in map(json.loads, open(out / "metrics.jsonl")) if "loss" in line]


def test_any_jsonl_and_vocabulary_train_and_generate(corpus, trained, python):
    assert set(snapshot(trained)) == {"model.safetensors", "config.json", "vocab_dict.json", "metrics.jsonl", "loss.png", "run.json"}
    assert losses(trained)[-1] < losses(trained)[0]
    for model in (trained, trained / "model.safetensors"):
        done = python("minikl/generate.py", f"--vocab_dict_path={corpus}/vocab.json", f"--model_path={model}", "--prompt=风吹过", "--max_new_tokens=20")
        assert done.returncode == 0 and done.stdout.startswith("风吹过") and len(done.stdout) > 5, done.stderr


@pytest.mark.parametrize("way", [["minikl/train.py"], ["-m", "minikl.train"]], ids=["path", "module"])
def test_one_process_needs_no_torchrun(way, tmp_path, python):
    done = python(*way, *TINY, "--corpus=toy", "--max_steps=12", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "held-out bits per character" in done.stdout


@pytest.mark.parametrize("options", [[], ["--grad_accum=2"], ["--layout=padded"], ["--layout=packed"]], ids=" ".join)
def test_two_processes_learn_what_one_does(options, tmp_path, python, torchrun):
    common = ["minikl/train.py", *TINY, "--corpus=toy", "--max_steps=20", "--threads=1", *options]
    assert python(*common, f"--out_dir={tmp_path}/one").returncode == 0
    assert torchrun(*common, f"--out_dir={tmp_path}/two").returncode == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_on_cpu(dtype, tmp_path, python):
    done = python("minikl/train.py", *TINY, "--corpus=toy", "--max_steps=40", f"--dtype={dtype}", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]


def bad(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


MISTAKES = {   # name: (options of train.py, words that the one line must hold)
    "missing file": (lambda f: ["--data_jsonl_path=nowhere.jsonl"], ["nowhere.jsonl"]),
    "not JSON": (lambda f: [f"--data_jsonl_path={bad(f, 'x.jsonl', chr(10).join(['{\"text\": \"a\"}', '{\"text\": ']))}"], ["x.jsonl:2"]),
    "no text": (lambda f: [f"--data_jsonl_path={bad(f, 'x.jsonl', '{\"body\": \"a\"}')}"], ["x.jsonl:1", "content", "body"]),
    "empty corpus": (lambda f: [f"--data_jsonl_path={bad(f, 'x.jsonl', '')}"], ["x.jsonl"]),
    "vocabulary is a list": (lambda f: ["--corpus=toy", f"--vocab_dict_path={bad(f, 'v.json', '[1, 2]')}"], ["v.json", "list"]),
    "vocabulary lacks an id": (lambda f: ["--corpus=toy", f"--vocab_dict_path={bad(f, 'v.json', '{\"a\": 0, \"b\": 2}')}"], ["v.json", "1"]),
    "heads": (lambda f: ["--d_model=100", "--num_heads=3"], ["d_model=100", "num_heads=3"]),
    "out_dir is a file": (lambda f: ["--corpus=toy", f"--out_dir={bad(f, 'taken', '')}"], ["taken"]),
    "batch size": (lambda f: ["--corpus=toy", "--batch_size=0"], ["batch_size"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_clear_line(mistake, tmp_path, python):
    options, words = MISTAKES[mistake]
    options = options(tmp_path)
    if not any(option.startswith("--out_dir") for option in options): options.append(f"--out_dir={tmp_path}/out")
    done = python("minikl/train.py", *TINY[2:], *options)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in ["error: ", *words]), lines[0]


def test_mistakes_of_generate(trained, tmp_path, python):
    def error(*options):
        done = python("minikl/generate.py", *options)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr
    assert "nowhere" in error("--model_path=nowhere")
    assert "512" in error(f"--model_path={trained}", "--prompt=" + "风" * 600) or "511" in error(f"--model_path={trained}", "--prompt=" + "风" * 600)
    for name, data in snapshot(trained).items(): (tmp_path / name).write_bytes(data)
    (tmp_path / "model.safetensors").write_bytes(snapshot(trained)["model.safetensors"][:1000])
    assert "model.safetensors" in error(f"--model_path={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(snapshot(trained)["model.safetensors"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 2 * config["d_model"]}))
    assert "config.json" in error(f"--model_path={tmp_path}")


def test_interrupted_run_leaves_the_last_one_alone(trained):
    before = snapshot(trained)
    process = subprocess.Popen([sys.executable, "minikl/train.py", *TINY, "--corpus=toy", "--max_steps=100000", f"--out_dir={trained}"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not any(path.name.startswith("metrics.jsonl.") and path.stat().st_size for path in trained.iterdir()): time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert errors.strip().splitlines()[-1].startswith("interrupted")
    assert {name: data for name, data in snapshot(trained).items() if name in before} == before


def test_without_network_the_toy_corpus_takes_over(tmp_path):
    "A copy of the package beside nothing but the toy corpus, on a machine whose npm fetches nothing."
    import shutil
    shutil.copytree(ROOT / "minikl", tmp_path / "minikl")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "toy.jsonl", tmp_path / "data")
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 1\n")
    npm.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "minikl/train.py", *TINY, "--max_steps=3"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "toy corpus" in line)
    assert "no route to host" in line


def test_wandb_offline_and_broken(tmp_path, python):
    for mode in ("offline", "nonsense"):
        done = python("minikl/train.py", *TINY, "--corpus=toy", "--max_steps=12", "--use_wandb", "--wandb_project=test", f"--out_dir={tmp_path}/{mode}",
                      env={**os.environ, "WANDB_MODE": mode})
        assert done.returncode == 0 and "held-out bits" in done.stdout, done.stderr
    assert list((tmp_path / "offline").rglob("*.wandb")), "nothing was logged"
