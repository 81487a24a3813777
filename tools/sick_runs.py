"""Make many small runs, healthy ones and sick ones, and keep the figures of each.

    python tools/sick_runs.py [--runs=8] [--healthy=24] [--processes=2]

Every run has a corpus, a model, a seed and a severity of its own, drawn from a seeded
generator. Runs lie in out/sick_runs/; one that is there is not made again. What the
rules of lesson 15 look at goes to nbs/measured/report.json.
"""
import argparse
import io
import json
import math
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "nbs" / "measured" / "report.json"
OUT = ROOT / "out" / "sick_runs"
POETRY = ROOT / "data" / "poetry.jsonl"
ILLNESSES = (
    "too short", "rate too high", "rate too low", "few texts", "padded", "slow disk",
    "damaged text", "clipped",
)


# ---- corpora


def toy_texts(draw, n):   # list of str
    from minikl.corpora import toy_corpus
    return [text for text, _ in toy_corpus(n, seed=draw.randrange(10**6))]


def poems(draw, n):   # list of str: of the real corpus, none of them long
    lines = POETRY.read_text(encoding="utf-8").splitlines()
    texts = []
    while len(texts) < n:
        record = json.loads(draw.choice(lines))
        text = record.get("content") or record["text"]
        if len(text) < 150:
            texts.append(text)
    return texts


def scrolls(draw, texts):   # list of str of very different length
    spread = draw.uniform(0.9, 1.6)
    made = []
    for _ in range(300):
        n_texts = min(8, int(draw.paretovariate(spread)))
        made.append("\n".join(draw.choices(texts, k=n_texts)))
    return made


def damage(draw, texts):   # how many documents, and how long
    n_bad, size = draw.randint(1, 4), draw.randint(150, 600)
    for place in draw.sample(range(len(texts)), n_bad):
        letters = [chr(draw.randrange(0x20, 0x2FA0)) for _ in range(size)]
        texts[place] = "".join(letters)
    return f"{n_bad} × {size} characters"


def write(path, texts):
    lines = [json.dumps({"content": text}) + "\n" for text in texts]
    Path(path).write_text("".join(lines), encoding="utf-8")


# ---- runs


def model_options(draw):   # list of str
    return [
        f"--d_model={draw.choice((32, 48, 64))}",
        f"--num_layers={draw.choice((1, 2))}",
        f"--vocab_size={draw.choice((300, 450))}",
        f"--batch_size={draw.choice((8, 16))}",
        f"--seed={draw.randrange(1000)}",
        "--num_heads=2", "--num_kv_heads=2", "--log_every=2", "--eval_every=30",
        "--save_every=0", "--threads=1", "--dtype=fp32",
    ]


def spoil_options(illness, draw):   # (steps, options, severity in words)
    "What the illness asks of the options."
    if illness == "healthy":
        return draw.randint(120, 220), [], ""
    if illness == "too short":
        return draw.randint(32, 70), [], ""
    steps = draw.randint(60, 120)
    if illness == "rate too high":
        factor = math.exp(draw.uniform(math.log(10), math.log(100)))
    elif illness == "rate too low":
        factor = 1 / math.exp(draw.uniform(math.log(10), math.log(100)))
    elif illness == "clipped":
        clip = round(math.exp(draw.uniform(math.log(0.02), math.log(0.2))), 3)
        return steps, [f"--clip={clip}"], f"clip {clip}"
    elif illness == "padded":
        return steps, ["--layout=padded"], ""
    else:
        return steps, [], ""
    rate = 0.02 * factor
    return steps, [f"--lr={rate}", f"--muon_lr={rate}"], f"rate × {factor:.3g}"


def slow_down(run, start, factor):
    "From step `start` on, each step takes `factor` times as long as those before."
    step = run.learner.step
    seconds = []

    def slow_step(documents, number, done):
        began = time.perf_counter()
        result = step(documents, number, done)
        if number < start:
            seconds.append(time.perf_counter() - began)
        else:
            time.sleep((factor - 1) * sorted(seconds)[len(seconds) // 2])
        return result

    run.learner.step = slow_step


def make_run(illness, number, folder):   # what is kept of a run
    "Train it, unless it lies in the folder already, and read its figures."
    from minikl.options import parse_options
    from minikl.parallel import Ranks
    from minikl.recorded import read_run
    from minikl.report import symptoms_of
    from minikl.trainer import Run
    draw = random.Random(f"{illness} {number}")
    place = Path(folder) / f"{illness}-{number}".replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    corpus = "toy" if number % 4 < 2 else "poems"   # both in each half
    n_texts = draw.randint(600, 1000)
    if illness == "few texts":
        n_texts = draw.randint(30, 120)
    texts = (toy_texts if corpus == "toy" else poems)(draw, n_texts)
    steps, options, severity = spoil_options(illness, draw)
    if illness == "few texts":
        severity = f"{n_texts} texts"
        options += ["--held_out=0.3"]
    if illness == "padded":
        texts = scrolls(draw, texts)
    if illness == "damaged text":
        severity = damage(draw, texts)
    start = round(draw.uniform(0.4, 0.7) * steps)
    factor = draw.uniform(1.6, 4)
    if illness == "slow disk":
        severity = f"{factor:.1f} times as slow"
    out = place / "out"
    options += model_options(draw)
    options += [f"--max_steps={steps}", f"--data_jsonl_path={place / 'texts.jsonl'}"]
    if not (out / "run.json").exists():
        write(place / "texts.jsonl", texts)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            run = Run(parse_options([*options, f"--out_dir={out}"]), Ranks(threads=1))
            if illness == "slow disk":
                slow_down(run, start, factor)
            run.work()
        print(illness, number, corpus, steps, severity, flush=True)
    figures = {}
    for name, value in asdict(symptoms_of(read_run(out))).items():
        if isinstance(value, float):
            value = float(f"{value:.4g}") if math.isfinite(value) else None
        if not isinstance(value, str):
            figures[name] = value
    return {
        "illness": illness, "half": "choose" if number % 2 == 0 else "test",
        "corpus": corpus, "steps": steps, "severity": severity, "figures": figures,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8, help="of each illness")
    parser.add_argument("--healthy", type=int, default=24)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs = []
    for number in range(max(options.runs, options.healthy)):
        if number < options.healthy:
            jobs.append(("healthy", number))
        if number < options.runs:
            jobs += [(illness, number) for illness in ILLNESSES]
    OUT.mkdir(parents=True, exist_ok=True)
    os.environ["MINIKL_HOME"] = str(OUT / "home")   # for vocabularies and token files
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        runs = list(pool.map(partial(make_run, folder=OUT), *zip(*jobs, strict=True)))
    runs.sort(key=lambda run: run["illness"])   # stable: in order of their numbers
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    MEASURED.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
