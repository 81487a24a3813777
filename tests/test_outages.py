"Outages: data that vanish, memory that is full, servers that are gone."
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from minikl import train

SHAPE = (
    "--batch_size=8 --log_every=2 --threads=1 --eval_documents=8 --d_model=32 "
    "--num_heads=2 --num_kv_heads=2 --num_layers=1"
).split()
STEPS = ["--max_steps=4"]
TOY = ["--corpus=toy", "--vocab_size=400"]


def metrics(out):
    "The metrics of a finished run without those of the clock."
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for line in found:
        line.pop("seconds")
        line.pop("tokens_per_s", None)
    return found


def one_line(done, expected):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and expected in done.stderr


def test_data_that_vanish_are_missed_by_resume(script, tmp_path):
    "The run that goes on wants to see its data, also where its tokens are there."
    data = tmp_path / "mine.jsonl"
    shutil.copy(ROOT / "data" / "toy.jsonl", data)
    options = [f"--data_jsonl_path={data}", "--vocab_size=400", *SHAPE]
    out = f"--out_dir={tmp_path}/out"
    assert script(train.main, *options, *STEPS, out).returncode == 0
    data.unlink()
    longer = [*options, "--max_steps=8", out, "--resume"]
    one_line(script(train.main, *longer), f"{data}: No such file or directory")
    shutil.copy(ROOT / "data" / "toy.jsonl", data)
    assert script(train.main, *longer).returncode == 0
    assert metrics(tmp_path / "out")[-1]["step"] == 8


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept by Linux only")
def test_full_memory_is_one_line_that_says_what_to_lower(python, tmp_path):
    def limit():
        addresses = 2 * 2**30  # bytes
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))

    options = ["--d_model=512", "--batch_size=2800", "--layout=padded"]
    done = python(
        "minikl/train.py", *TOY, *SHAPE, *STEPS, *options, f"--out_dir={tmp_path}",
        preexec_fn=limit,
    )
    one_line(done, "out of memory: lower --batch_size")


@pytest.mark.long
def test_a_server_of_metrics_that_is_gone_stops_no_run(script, tmp_path):
    "W&B waits half a minute, says so, and the numbers are those without it."
    pytest.importorskip("wandb")
    plain = script(train.main, *TOY, *SHAPE, *STEPS, f"--out_dir={tmp_path}/plain")
    assert plain.returncode == 0, plain.stderr
    nobody = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    options = [*TOY, *SHAPE, *STEPS, "--use_wandb", f"--out_dir={tmp_path}/outage"]
    done = subprocess.run(
        [sys.executable, "minikl/train.py", *options],
        cwd=ROOT,
        env={**os.environ, **nobody},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "W&B is off for the rest of this run" in done.stdout + done.stderr
    assert metrics(tmp_path / "outage") == metrics(tmp_path / "plain")
