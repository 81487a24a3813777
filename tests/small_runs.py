"""Runs as small as they can be, and what is left of them: for tests of training.

The fixture `run` of conftest.py trains with TINY on GIVEN, in this process.
"""
import json
import os
import signal

from conftest import ROOT

from minikl.learner import Learner

OLD = ROOT / "tests" / "old_runs"   # corpus, vocabulary, checkpoints of older versions
RESULTS = (
    "model.safetensors",
    "config.json",
    "vocab_dict.json",
    "metrics.jsonl",
    "samples.jsonl",
    "loss.png",
    "run.json",
)
SHAPE = [
    "--d_model=8",
    "--num_heads=2",
    "--num_kv_heads=1",
    "--num_layers=1",
    "--max_seq_len=64",
]
TINY = [*SHAPE, "--batch_size=4", "--log_every=1", "--threads=1"]
GIVEN = [f"--data_jsonl_path={OLD}/data.jsonl", f"--vocab_dict_path={OLD}/vocab.json"]


def well(done):   # what it said
    "It ended without an error."
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_line(done, said, code=2):
    "It ended with this exit code and one line that says this."
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def everything(out):
    "{path: bytes} of all that does not belong to a run under way."
    paths = [path for path in out.rglob("*") if path.is_file() and path.name[0] != "."]
    names = {path.relative_to(out): path for path in paths}
    return {str(n): p.read_bytes() for n, p in names.items() if n.parts[0] != "running"}


def metrics(out):
    "The lines of metrics.jsonl without what the clock has measured."
    with open(out / "metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        for name in ("seconds", "tokens_per_s"):
            line.pop(name, None)
    return lines


def losses(out):
    return [line["loss"] for line in metrics(out) if "loss" in line]


def result(out):
    "What must come out alike: metrics, weights, configuration, vocabulary."
    return metrics(out), *((out / name).read_bytes() for name in RESULTS[:3])


def before_each_step(monkeypatch, call):
    "Have every run do `call(step)` before it takes a step."
    take = Learner.step

    def stepping(self, documents, step, done):
        call(step)
        return take(self, documents, step, done)

    monkeypatch.setattr(Learner, "step", stepping)


def interrupt_at(monkeypatch, step, number):
    "Send a signal to this process when a run takes this step."
    def interrupt(i):
        if i == step:
            signal.raise_signal(number)

    before_each_step(monkeypatch, interrupt)


class Killed(BaseException):
    "From here on nothing happens any more."


def kill_after(monkeypatch, n):
    "Let `n` operations that change names happen, and none after them."
    done = []

    def mortal(operation):
        def call(*arguments, **options):
            if len(done) >= n:
                raise Killed
            done.append(operation.__name__)
            return operation(*arguments, **options)
        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
