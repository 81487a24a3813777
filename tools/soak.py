"""Disturb small training runs again and again: they must come out like one in peace.

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
from contextlib import suppress
from dataclasses import asdict, dataclass
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


def start(
    out,          # folder of the run
    log,          # where what it prints goes
    *options,     # of the training script
    processes=1,  # under torchrun where there are more
    limit=None,   # the largest file in bytes that it may write
):                # Popen
    "Start the training script."
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher.append(f"--nproc-per-node={processes}")
    script = ["minikl/train.py", *TINY, f"--out_dir={out}", *options]

    def limited():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, *launcher, *script],
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
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait(120)
    psutil.wait_procs(ranks, 120)


def wait_for(process, sign):
    "Until `sign()` is true, or the process has ended."
    while process.poll() is None and not sign():
        time.sleep(0.001)


def written(out):   # (time of the last line of metrics, list of checkpoints)
    "How far a run has come that is under way."
    metrics = out / "running" / "metrics.jsonl"
    checkpoints = out / "running" / "checkpoints"
    changed = metrics.stat().st_mtime_ns if metrics.exists() else 0
    return changed, sorted(checkpoints.glob("step-*"))


def result(out):
    "All that must come out alike: metrics without the clock's, texts, weights."
    with open(out / "metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        for name in ("seconds", "tokens_per_s"):
            line.pop(name, None)
    texts = (out / "samples.jsonl").read_bytes()
    return lines, texts, (out / "model.safetensors").read_bytes()


def of_the_finished_run(out):  # {path: bytes}
    "All files but those of a run under way and hidden ones."
    paths = [path for path in out.rglob("*") if path.is_file()]
    names = [str(path.relative_to(out)) for path in paths]
    own = [n for n in names if not n.startswith("running/") and "/." not in f"/{n}"]
    return {name: (out / name).read_bytes() for name in own}


@dataclass
class Counts:
    "What happened. A run is lost or a mismatch where something is broken."
    kills: int = 0
    while_writing: int = 0   # kills that met a checkpoint half written
    disks: int = 0           # that filled up
    resumes: int = 0
    runs: int = 0            # that got through
    lost: int = 0            # something of the finished run was touched too early
    mismatches: int = 0      # came out other than the run left in peace

    def __str__(self):
        numbers = asdict(self).items()
        return ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in numbers)


class Soak:
    "Disturbs runs in folders below one folder, and counts what happened."
    def __init__(self, folder, processes=1, seed=0):
        self.folder = Path(folder)
        self.processes = processes
        self.chance = random.Random(seed)
        self.count = Counts()
        self.log = open(self.folder / "log", "w", encoding="utf-8")
        self.in_peace("whole", seed=0)
        self.in_peace("yesterday", seed=1)
        self.expected = result(self.folder / "whole")
        self.yesterday = of_the_finished_run(self.folder / "yesterday")

    def in_peace(self, name, seed):
        "A run that nobody disturbs."
        options = [f"--seed={seed}"]
        out = self.folder / name
        process = start(out, self.log, *options, processes=self.processes)
        code = process.wait(300)
        assert code == 0, self.told()

    def told(self):
        self.log.flush()
        return (self.folder / "log").read_text(encoding="utf-8")[-3000:]

    def new_folder(self):
        "A folder in which a run has finished."
        out = self.folder / f"run-{self.count.runs}"
        shutil.copytree(self.folder / "yesterday", out)
        return out

    def look(self, out):  # whether the run is done
        "After a disturbance, or the end: is everything there that has to be?"
        untouched = of_the_finished_run(out) == self.yesterday
        if (out / "running").exists():
            ended = (out / "running" / "results").exists()
            self.count.lost += not (untouched or ended)
            return False
        if untouched:
            return False   # it was disturbed before it began
        self.count.mismatches += result(out) != self.expected
        self.count.runs += 1
        shutil.rmtree(out)
        return True

    def options(self, out):
        "The first attempt is a new run; the others go on with it."
        resumes = any(out.glob("running/checkpoints/step-*"))
        self.count.resumes += resumes
        return ["--resume"] if resumes else []

    def kills(self, n):
        "Kill `n` times; a run that gets through is compared, and the next begins."
        done = True
        while self.count.kills < n or not done:
            if done:
                out = self.new_folder()
            self.attempt(out, self.count.kills < n)
            done = self.look(out)

    def attempt(self, out, to_be_killed):
        "Begin a run or go on with it, and kill it unless it has ended by then."
        options = self.options(out)
        before = written(out)
        process = start(out, self.log, *options, processes=self.processes)
        if to_be_killed:
            self.wait_for_a_moment(process, out, before)
            if process.poll() is None:
                writing = out / "running" / "checkpoints" / ".writing"
                self.count.while_writing += writing.exists()
                kill(process, self.chance)
                self.count.kills += 1
        code = process.wait(300)
        assert code <= 0 or self.processes > 1, self.told()

    def wait_for_a_moment(
        self,
        process,
        out,     # its folder
        before,  # what was `written` there when it began
    ):
        "Wait for the moment at which to kill."
        chance = self.chance
        moment = chance.choice(("starting", "training", "writing", "ending"))
        if moment == "starting":
            time.sleep(chance.uniform(0, 3))
            return

        def trains():   # a line and a checkpoint have come since it began
            pairs = zip(written(out), before, strict=True)
            return all(now != then for now, then in pairs)

        wait_for(process, trains)
        checkpoints = out / "running" / "checkpoints"
        if moment == "training":
            time.sleep(chance.uniform(0, 0.3))
        if moment == "writing":
            wait_for(process, (checkpoints / ".writing").exists)
            time.sleep(chance.uniform(0, 0.004))
        if moment == "ending":
            wait_for(process, (checkpoints / LAST).exists)
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
            self.count.disks += 1
            if not self.look(out):
                options = self.options(out)
                assert start(out, self.log, *options).wait(300) == 0, self.told()
                assert self.look(out), self.told()

    def report(self):  # exit code
        print(self.count)
        return int(self.count.lost + self.count.mismatches > 0)


def main():
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


if __name__ == "__main__":
    main()
