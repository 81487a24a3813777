"""Disturb small training runs again and again, and compare them with a run left in peace.

    python tools/soak.py [--kills=50] [--disks=20] [--processes=1] [--seed=0]

Each run goes to a folder in which another run has finished. It is killed wherever it
happens to be, or its disk fills up, and it is resumed until it gets through. Ends with
exit code 1 unless (a) everything that the finished run had left was untouched until the
new run had ended, and (b) every metric but the clock's, the sample texts and the model
came out bit for bit.
"""
import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
# lines, evaluations and checkpoints out of step with one another, so that a checkpoint
# also falls between two lines
TINY = (
    "--corpus=toy --max_steps=240 --batch_size=8 --log_every=5 --eval_every=36 "
    "--save_every=3 --eval_documents=8 --threads=1 "
    "--d_model=32 --num_heads=2 --num_kv_heads=2 --num_layers=1"
).split()
LAST = "step-00000240"


def start(out, log, *options, processes=1, limit=None):  # Popen
    "The training script; `limit` is the largest file in bytes that it may write."
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = torchrun if processes > 1 else []
    def limited():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(
        [sys.executable, *launcher, "minikl/train.py", *TINY, f"--out_dir={out}", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=limited,
    )


def kill(process, chance):
    "SIGKILL to all processes of a run or, of several ranks, to a single one."
    ranks = psutil.Process(process.pid).children(recursive=True)
    victims = [psutil.Process(process.pid), *ranks]
    if ranks and chance.random() < 0.5:
        victims = [chance.choice(ranks)]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait(120)
    psutil.wait_procs(ranks, 120)


def wait_for(process, sign):
    while process.poll() is None and not sign():
        time.sleep(0.001)


def result(out):
    "All that must come out alike: metrics without the clock's, texts, weights."
    lines = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    clock = ("seconds", "tokens_per_s")
    timeless = [{k: v for k, v in line.items() if k not in clock} for line in lines]
    return timeless, *((out / name).read_bytes() for name in ("samples.jsonl", "model.safetensors"))


def of_the_finished_run(out):  # {path: bytes}
    paths = [path for path in out.rglob("*") if path.is_file()]
    names = [str(path.relative_to(out)) for path in paths]
    own = [n for n in names if not n.startswith("running/") and "/." not in f"/{n}"]
    return {name: (out / name).read_bytes() for name in own}


class Soak:
    "Counts what happened, in folders below one folder."
    def __init__(self, folder, processes=1, seed=0):
        self.folder, self.processes = Path(folder), processes
        self.chance = random.Random(seed)
        self.count = dict.fromkeys(
            ("kills", "while_writing", "disks", "resumes", "runs", "lost", "mismatches"), 0
        )
        self.log = open(self.folder / "log", "w", encoding="utf-8")
        for name, seed in (("whole", 0), ("yesterday", 1)):
            code = start(self.folder / name, self.log, f"--seed={seed}", processes=processes).wait(300)
            assert code == 0, self.told()
        self.expected = result(self.folder / "whole")
        self.yesterday = of_the_finished_run(self.folder / "yesterday")

    def told(self):
        self.log.flush()
        return (self.folder / "log").read_text(encoding="utf-8")[-3000:]

    def new_folder(self):
        out = self.folder / f"run-{self.count['runs']}"
        shutil.copytree(self.folder / "yesterday", out)
        return out

    def look(self, out):  # whether the run is done
        "After a disturbance, or the end: is everything there that has to be?"
        untouched = of_the_finished_run(out) == self.yesterday
        if (out / "running").exists():
            ended = (out / "running" / "results").exists()
            self.count["lost"] += not (untouched or ended)
            return False
        if untouched:
            return False   # it was disturbed before it began
        self.count["mismatches"] += result(out) != self.expected
        self.count["runs"] += 1
        shutil.rmtree(out)
        return True

    def options(self, out):
        "The first attempt is a new run; the others go on with it."
        return ["--resume"] if any(out.glob("running/checkpoints/step-*")) else []

    def kills(self, n):
        "Kill `n` times; a run that gets through is compared, and the next begins."
        done = True
        while self.count["kills"] < n or not done:
            if done:
                out = self.new_folder()
            more = self.options(out)
            self.count["resumes"] += bool(more)
            running = out / "running" / "checkpoints"
            metrics = out / "running" / "metrics.jsonl"
            def state():
                written = metrics.stat().st_mtime_ns if metrics.exists() else 0
                return written, sorted(running.glob("step-*"))
            before = state()
            process = start(out, self.log, *more, processes=self.processes)
            if self.count["kills"] < n:
                moment = self.chance.choice(("starting", "training", "writing", "ending"))
                self.wait_until(process, moment, state, before, out)
                if process.poll() is None:
                    self.count["while_writing"] += (running / ".writing").exists()
                    kill(process, self.chance)
                    self.count["kills"] += 1
            code = process.wait(300)
            assert code <= 0 or self.processes > 1, self.told()
            done = self.look(out)

    def wait_until(self, process, moment, state, before, out):
        "Wait for the moment at which to kill."
        chance = self.chance
        if moment == "starting":
            return time.sleep(chance.uniform(0, 3))
        running = out / "running" / "checkpoints"
        wait_for(process, lambda: state()[0] != before[0] and state()[1] != before[1])
        if moment == "training":
            time.sleep(chance.uniform(0, 0.3))
        if moment == "writing":
            wait_for(process, (running / ".writing").exists)
            time.sleep(chance.uniform(0, 0.004))
        if moment == "ending":
            wait_for(process, lambda: (running / LAST).exists())
            time.sleep(chance.choice((0, 0.01, 0.1, 0.3)) * chance.random())

    def disks(self, n):
        "Let the disk fill up `n` times: files may not grow beyond some random size."
        model = (self.folder / "whole" / "model.safetensors").stat().st_size
        for _ in range(n):
            out = self.new_folder()
            limit = self.chance.randrange(1000, 2 * model)
            process = start(out, subprocess.PIPE, limit=limit)   # no log on this disk
            told = process.communicate(timeout=300)[0].decode()
            assert process.returncode in (0, 2), told
            self.count["disks"] += 1
            if not self.look(out):
                more = self.options(out)
                self.count["resumes"] += bool(more)
                assert start(out, self.log, *more).wait(300) == 0, self.told()
                assert self.look(out), self.told()

    def report(self):  # exit code
        print(", ".join(f"{name.replace('_', ' ')} {n}" for name, n in self.count.items()))
        return int(self.count["lost"] + self.count["mismatches"] > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("kills", 50), ("disks", 20), ("processes", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(folder, chosen.processes, chosen.seed)
        soak.kills(chosen.kills)
        soak.disks(chosen.disks)
        sys.exit(soak.report())
