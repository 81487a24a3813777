"""Kill a small training run again and again, wherever it happens to be, resume it, and compare it with a run left in peace.

    python tools/soak.py [--kills=50] [--processes=1] [--seed=0] [--breaking="a step skipped"]

Ends with exit code 1 unless every metric but the clock's, the sample texts and the model came out bit for bit.
With --breaking it does all this to a copy of the package in which something has been broken on purpose, and has to fail.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
# lines, evaluations and checkpoints out of step with one another, so that a checkpoint also falls between two lines
TINY = ("--corpus=toy --max_steps=240 --batch_size=8 --log_every=5 --eval_every=36 --save_every=3 --eval_documents=8 --threads=1 "
        "--d_model=32 --num_heads=2 --num_kv_heads=2 --num_layers=1").split()

GO_ON = 'self.at.update(facts["at"])'
BREAKS = {   # {name: [(module, what stands there, once, what is put in its place)]}, as a tired programmer might
    "optimizers not restored": [("training.py", '"state": kept}', '"state": {}}')],
    "a step skipped": [("train.py", GO_ON, GO_ON + '; self.at["step"] += 1')],
    "half a line of metrics forgotten": [("train.py", GO_ON, GO_ON + '; self.at.update(nats=0, targets=0)')],
    "in place, and unchecked": [("training.py", "os.rename(aside, folder / name)", "shutil.copytree(aside, folder / name, copy_function=slow)"),
                                ("training.py", 'if files.pop("SHA256SUMS", None) == checksums(files): return', 'files.pop("SHA256SUMS", None); return'),
                                ("training.py", "def write_checkpoint(", "def slow(*paths): __import__('time').sleep(0.002); shutil.copy(*paths)\n\ndef write_checkpoint(")],
}


def broken(name, folder):
    "A copy of the package and the toy corpus, with one of BREAKS in it."
    shutil.copytree(ROOT / "minikl", folder / "minikl")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data" / "toy.jsonl", folder / "data")
    for module, old, new in BREAKS[name]:
        source = (folder / "minikl" / module).read_text(encoding="utf-8")
        if source.count(old) != 1: sys.exit(f"tools/soak.py: {module} holds {old!r} {source.count(old)} times, not once; mend BREAKS")
        (folder / "minikl" / module).write_text(source.replace(old, new), encoding="utf-8")
    return folder


def start(out, processes, log, root):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(root), "TQDM_DISABLE": "1"}
    return subprocess.Popen([sys.executable, *launcher, "minikl/train.py", *TINY, f"--out_dir={out}", "--resume"], cwd=root, env=environment, stdout=log, stderr=log)


def kill(process, chance):
    "SIGKILL to all processes of a run or, of several ranks, to a single one."
    ranks = psutil.Process(process.pid).children(recursive=True)
    for victim in [chance.choice(ranks)] if ranks and chance.random() < 0.5 else [psutil.Process(process.pid), *ranks]:
        try: victim.kill()
        except psutil.NoSuchProcess: pass
    process.wait(120)
    psutil.wait_procs(ranks, 120)


def wait_for(process, sign):
    while process.poll() is None and not sign(): time.sleep(0.001)


def result(out):
    "All that must come out alike: the metrics without the clock's, the sample texts, and the weights."
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines], *((out / name).read_bytes() for name in ("samples.jsonl", "model.safetensors"))


def soak(kills, folder, processes=1, seed=0, root=ROOT):
    "Kill `kills` times. A run that gets through is compared with the undisturbed one, and the next begins."
    folder, chance, count = Path(folder), random.Random(seed), dict(kills=0, while_writing=0, resumes=0, runs=0, mismatches=0)
    with open(folder / "log", "w") as log:
        assert start(folder / "whole", processes, log, root).wait(300) == 0, (folder / "log").read_text()
        expected, done = result(folder / "whole"), False
        while count["kills"] < kills or not done:
            out = folder / f"run-{count['runs']}"
            running, checkpoints = out / "metrics.jsonl.running", out / "checkpoints"
            state = lambda: [running.stat().st_mtime_ns if running.exists() else 0, *sorted(checkpoints.glob("step-*"))]
            before, process, killed = state(), start(out, processes, log, root), False
            if count["kills"] < kills:
                moment = chance.choice(("starting", "training", "writing", "writing"))
                if moment == "starting": time.sleep(chance.uniform(0, 3))
                else:
                    wait_for(process, lambda: state()[0] != before[0] and state()[1:] != before[1:])   # it has begun, and saved once
                    if moment == "training": time.sleep(chance.uniform(0, 0.3))
                    else: wait_for(process, (checkpoints / ".writing").exists)
                    time.sleep(chance.uniform(0, 0.004))
                killed = process.poll() is None
                if killed: kill(process, chance)
                count["kills"] += killed
                count["while_writing"] += killed and (checkpoints / ".writing").exists()
            assert process.wait(300) == 0 or killed, (folder / "log").read_text()
            if done := (out / "run.json").exists() and not running.exists():
                count["mismatches"] += result(out) != expected
                count["runs"] += 1
    count["resumes"] = (folder / "log").read_text().count("continuing from")
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 50), ("processes", 1), ("seed", 0)): parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--breaking", choices=BREAKS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = broken(chosen.breaking, Path(folder) / "broken") if chosen.breaking else ROOT
        count = soak(chosen.kills, folder, chosen.processes, chosen.seed, root)
    print(", ".join(f"{name.replace('_', ' ')} {number}" for name, number in count.items()))
    sys.exit(count["mismatches"] > 0 or count["kills"] < chosen.kills or count["runs"] == 0)
