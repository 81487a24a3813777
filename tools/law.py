"""Short runs over width, depth and data, from which lesson 27 learns a law.

    python tools/law.py measure          processor time of a step of every shape, then
                                         all runs that are not in the file yet
                                         (two hours of one core; --jobs=2: half)
    python tools/law.py predict          fit the law, and write down what it says about
                                         thirty minutes
    python tools/law.py long             the run of thirty minutes that it speaks of
                                         (two processes), and four with the options that
                                         suit half an hour
    torchrun --nproc-per-node=2 tools/law.py pace
                                         what a step of two processes takes with these
                                         options, and with those of before
    python tools/law.py three            three minutes of two processes, by this pace
    python tools/law.py list             the short runs: which there are, which are done

A minute is the processor time of 557 steps of the reference: the recipe of lesson 17,
with --decay=cosine --first_weights=random --candidates=0. A run of another shape gets
as many steps as cost the same processor time with the default options. Results lie in
nbs/measured/law.json, one line a run; a queue that was interrupted goes on.
"""
import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minikl.checkpoint import FORMERLY
from minikl.files import write_atomically
from minikl.law import (
    HEAD,
    POEMS,
    SHAPES,
    STEPS_PER_MINUTE,
    body_weights,
    fit_law,
    outcome,
)
from minikl.learner import Learner
from minikl.options import parse_options
from minikl.parallel import Ranks
from minikl.plan import FOR_MANY_PASSES, some_of
from minikl.prepare import read_data
from minikl.recorded import read_json_lines
from minikl.shortcuts import weights_at_first
from minikl.step import Precision

MEASURED = ROOT / "nbs" / "measured" / "law.json"
REFERENCE = [f"--{name}={value}" for name, value in FORMERLY.items()]
TURNS = 7                  # of a speed measurement
STEPS_PER_TURN = 3
SEEN = 500                 # training poems, at least, to evaluate on


def shape_name(layers, width):
    return f"{layers}x{width}"


@dataclass(frozen=True)
class Trial:
    "A run: which model, how long, on which part of the corpus."

    layers: int
    width: int
    minutes: float = 1
    part: int = 1   # every so many-th poem
    more: str = ""  # another option

    @property
    def shape(self):
        return shape_name(self.layers, self.width)

    @property
    def name(self):
        name = f"{self.shape}, {self.minutes:g} min, 1/{self.part}"
        return f"{name}, {self.more}" if self.more else name


# the most informative first, for whoever stops the queue early
TRIALS = [
    Trial(4, 192),
    Trial(2, 128),
    Trial(1, 64),
    Trial(2, 128, part=4),
    Trial(1, 128, part=8),
    Trial(3, 256),
    Trial(2, 192),
    Trial(2, 128, minutes=0.25),
    Trial(4, 192, minutes=0.5),
    Trial(2, 128, part=8),
    Trial(2, 64),
    Trial(1, 64, part=4),
    Trial(1, 128),
    Trial(4, 192, part=8),
    Trial(2, 128, minutes=0.5),
    Trial(3, 128),
    Trial(1, 64, minutes=0.25),
    Trial(2, 64, part=8),
    Trial(2, 128, part=2),
    Trial(1, 64, part=2),
    Trial(1, 128, part=2),
    Trial(2, 64, part=2),
    # three minutes: the law is to foretell them first
    Trial(4, 192, minutes=3),
    Trial(2, 192, minutes=3),
    Trial(2, 128, minutes=3),
    Trial(1, 128, minutes=3),
    Trial(2, 128, minutes=3, part=2),
]
# half of the poems are read nearly five times: what learns them by heart?
HALF_THE_POEMS = [
    Trial(2, 128, minutes=3, part=2, more=more)
    for more in (
        "--dtype=bf16",
        "--dtype=bf16 --candidates=0",
        "--dtype=bf16 --first_weights=random",
        "--dtype=bf16 --first_weights=random --candidates=0",
        "--dtype=bf16 --first_weights=random --lr=0.01",
        "--dtype=bf16 --first_weights=random --lr=0.005",
        "--dtype=bf16 --first_weights=random --lr=0.01 --muon_lr=0.03",
        "--dtype=bf16 --first_weights=random --muon_lr=0.01",
        "--dtype=bf16 --first_weights=random --candidates=0 --lr=0.005",
        "--dtype=bf16 --candidates=0 --lr=0.005",
        "--dtype=bf16 --weight_decay=0.5",
    )
]
# with candidates a step takes 1/1.2 of the time, so there are more of them
AS_LONG = [
    Trial(2, 128, minutes=3.6, part=2, more=more)
    for more in (
        "--dtype=bf16 --first_weights=random --lr=0.005",
        "--dtype=bf16 --first_weights=random --lr=0.01",
    )
]
TRIALS += HALF_THE_POEMS + AS_LONG
# evaluated on the way as well: what the middle of a schedule looks like
WATCHED = {Trial(2, 128), Trial(1, 64), Trial(4, 192)}


# ---- the file


def read_measured():   # {group: {name: what was measured}}
    return json.loads(MEASURED.read_text("utf-8")) if MEASURED.exists() else {}


def store(group, **measurements):
    "Add to a group of the file. Each entry is a line, so that a diff shows it."
    known = read_measured()
    known[group] = known.get(group, {}) | measurements
    parts = []
    for name, entries in sorted(known.items()):
        lines = [
            f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in entries.items()
        ]
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    write_atomically(MEASURED, "{\n" + ",\n".join(parts) + "\n}\n")


def now():   # text
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


# ---- a run


def shape_options(layers, width):   # list of arguments for train.py
    return [
        f"--num_layers={layers}",
        f"--d_model={width}",
        f"--num_heads={width // HEAD}",
        f"--num_kv_heads={width // HEAD}",
        "--device=cpu",
        "--dtype=fp32",
    ]


def options_of(layers, width, *more):   # Options
    return parse_options([*shape_options(layers, width), *more])


@lru_cache
def corpus():   # (Ranks, TrainingData), once in each process
    ranks = Ranks(threads=1, device="cpu")
    options = options_of(2, 128)
    return ranks, read_data(options.data, options.model, ranks)


def learner_for(options, documents):   # Learner, before its first step
    ranks, data = corpus()
    config = replace(options.model, vocab_size=len(data.tokenizer))
    weights = weights_at_first(options, config, documents, ranks)
    return Learner(config, options.learning, options.machine, ranks, weights)


def seconds_of_a_step(learner, documents, turn):
    "Of the processor; of the clock on the wall if processes wait for each other."
    clock = time.process_time if learner.ranks.world == 1 else time.perf_counter
    start = clock()
    for step in range(turn * STEPS_PER_TURN, (turn + 1) * STEPS_PER_TURN):
        learner.step(documents, step, 0.01)
    return (clock() - start) / STEPS_PER_TURN


def measure_speed(arms):   # {name: Options} → {name: cost}
    """What a step of each arm costs, in units of a step of the first: all arms by
    turns, on the same poems in the same turn."""
    documents = corpus()[1].documents
    learners = {name: learner_for(arm, documents) for name, arm in arms.items()}
    first = next(iter(learners))
    seconds = {name: [] for name in learners}
    for turn in range(TURNS + 1):
        for name, learner in learners.items():
            seconds[name].append(seconds_of_a_step(learner, documents, turn))
    found = {}
    for name, turns in seconds.items():
        pairs = zip(turns[1:], seconds[first][1:], strict=True)  # after a warm-up
        found[name] = round(median(a / b for a, b in pairs), 4)
    return found


def train(trial, ratio):   # what comes out: dict
    "One run, in this process."
    ranks, data = corpus()
    documents = some_of(data.documents, slice(None, None, trial.part))
    options = options_of(trial.layers, trial.width, *trial.more.split())
    start = time.process_time()
    learner = learner_for(options, documents)
    n_steps = max(1, round(trial.minutes * STEPS_PER_MINUTE / ratio))
    watched = [n_steps // 4, n_steps // 2] if trial in WATCHED else []
    seconds = time.process_time() - start
    curve = []
    n_tokens = 0
    for step in range(n_steps):
        if step in watched:
            bits = learner.bits_per_char(data.held_out)
            curve.append([step, n_tokens, round(bits, 4)])
        start = time.process_time()
        result = learner.step(documents, step, (step + 0.5) / n_steps)
        seconds += time.process_time() - start
        n_tokens += result.n_targets
    seen = some_of(documents, slice(None, None, max(1, len(documents) // SEEN)))
    seen.n_chars = round(seen.n_targets() / data.targets_per_char)
    return {
        "layers": trial.layers,
        "width": trial.width,
        "minutes": trial.minutes,
        "part": trial.part,
        "steps": n_steps,
        "tokens": n_tokens,
        "unique": documents.n_targets(),
        "bits_per_char": round(learner.bits_per_char(data.held_out), 4),
        "seen": round(learner.bits_per_char(seen), 4),
        "seconds": round(seconds, 1),
        "curve": curve,
        "when": now(),
    }


def measure(options):
    "Everything that is missing in the file."
    shapes = sorted({(trial.layers, trial.width) for trial in TRIALS} | set(SHAPES))
    names = {shape_name(*shape) for shape in shapes}
    if names - read_measured().get("ratios", {}).keys():
        arms = {"reference": options_of(2, 128, *REFERENCE)}
        for shape in shapes:   # how a run begins does not matter for its pace
            arms[shape_name(*shape)] = options_of(*shape, "--first_weights=random")
        ratios = measure_speed(arms)
        store("ratios", **ratios)
        print(f"processor time of a step, reference = 1: {ratios}", flush=True)
    ratios = read_measured()["ratios"]
    done = read_measured().get("runs", {})
    missing = [trial for trial in TRIALS if trial.name not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        runs = {pool.submit(train, t, ratios[t.shape]): t for t in missing}
        for finished in as_completed(runs):
            name = runs[finished].name
            result = finished.result()
            store("runs", **{name: result})
            print(f"{now()} {name}: {result['bits_per_char']} bits", flush=True)


# ---- the prediction, and the run that it is about

LONG = 30                # minutes of two cores
LONG_SHAPE = (4, 192)    # that of lesson 17
DRAWS = 60               # of the bootstrap
NORMS = {"added up": 1.0, "as in a triangle": 2.0}   # of the law


def cost_of(layers, width):   # measured, in steps of the reference
    return read_measured()["ratios"][shape_name(layers, width)]


def whole_corpus(runs, minutes):   # those with so many minutes or fewer
    return [r for r in runs if r["part"] == 1 and r["minutes"] <= minutes]


def expected(law, run):   # bits per character
    weights = body_weights(run["layers"], run["width"])
    return float(law.bits(weights, run["tokens"]))


def miss(law, run):   # predicted minus measured bits
    return expected(law, run) - run["bits_per_char"]


def leave_one_out(runs, norm):   # predicted minus measured bits, for each run
    "What laws that do not know a run say about it."
    laws = [fit_law(runs[:i] + runs[i + 1 :], norm) for i in range(len(runs))]
    return [miss(law, run) for law, run in zip(laws, runs, strict=True)]


def bootstrap(runs, n_draws, norm):   # list of Law
    "Laws that other runs of the same kind could have led to. Efron 1979."
    generator = torch.Generator().manual_seed(0)
    laws = []
    for _ in range(n_draws):
        drawn = torch.randint(len(runs), (len(runs),), generator=generator)
        laws.append(fit_law([runs[i] for i in drawn.tolist()], norm))
    return laws


def root_mean_square(numbers):
    return (sum(x**2 for x in numbers) / len(numbers)) ** 0.5


def predict(options):
    "Written down before the long run, with the time and all that it rests on."
    measured = read_measured()
    if "long" in measured:
        sys.exit("the long run is over: what would be written now is no prediction")
    everything = list(measured["runs"].values())
    short = whole_corpus(everything, minutes=1)
    runs = whole_corpus(everything, minutes=3)
    longer = [run for run in runs if run["minutes"] == 3]
    fits = {name: fit_law(short, norm) for name, norm in NORMS.items()}
    errors = {}
    for name, law in fits.items():
        errors[name] = root_mean_square([miss(law, run) for run in longer])
    best = min(errors, key=errors.get)
    law = fit_law(runs, NORMS[best])
    laws = {"runs of a minute": fits[best], "and of three": law}

    def after_it(shape, law):   # Outcome
        return outcome(*shape, LONG * STEPS_PER_MINUTE / cost_of(*shape), law)

    drawn = bootstrap(runs, DRAWS, NORMS[best])
    answers = sorted(after_it(LONG_SHAPE, one).bits for one in drawn)
    shapes = {shape_name(*shape): after_it(shape, law).bits for shape in SHAPES}
    ours = after_it(LONG_SHAPE, law)
    prediction = {
        "when": now(),
        "runs": len(runs),
        "norm": NORMS[best],
        "three_minutes": {name: round(bits, 4) for name, bits in errors.items()},
        "law": asdict(law),
        "minutes": LONG,
        "shape": shape_name(*LONG_SHAPE),
        "cost": cost_of(*LONG_SHAPE),
        "steps": ours.steps,
        "tokens": ours.tokens,
        "passes": round(ours.tokens / POEMS, 2),
        "bits": round(ours.bits, 4),
        "low": round(answers[DRAWS // 20], 4),
        "high": round(answers[-1 - DRAWS // 20], 4),
        "laws": {
            name: round(after_it(LONG_SHAPE, one).bits, 4) for name, one in laws.items()
        },
        "shapes": {name: round(bits, 4) for name, bits in shapes.items()},
    }
    store("prediction", **prediction)
    for name, value in prediction.items():
        print(name, value)


# ---- runs of two processes

HALF_HOUR = ["--dtype=fastest", *FOR_MANY_PASSES.split()]
HALF_HOUR_STEPS = 9900   # chosen before `pace` was measured: 26 minutes by it
OLD_STEPS = 5800   # of the recipe of before, in lesson 17
SEEDS = 0, 1, 2


def pace(options):
    "What steps of two processes cost, where one with the recipe of before costs 1."
    ranks, _ = corpus()
    if ranks.world == 1:
        sys.exit("pace: expected two processes; begin it by torchrun")
    three_minutes = {
        "before": REFERENCE,
        "32 bits": ["--first_weights=random"],
        "16 bits": ["--first_weights=random", "--dtype=fastest"],
    }
    half_an_hour = {"before": REFERENCE, "half an hour": HALF_HOUR}
    found = {}
    for shape, arms in (((2, 128), three_minutes), (LONG_SHAPE, half_an_hour)):
        costs = measure_speed({arm: options_of(*shape, *arms[arm]) for arm in arms})
        for arm, cost in costs.items():
            found[f"{shape_name(*shape)}, {arm}"] = cost
    if ranks.rank == 0:
        store("pace", **found)
        print(found)
    torch.distributed.destroy_process_group()


def train_long(options):
    "The run that was foretold, and those with other options."
    shape = shape_name(*LONG_SHAPE)
    foretold = read_measured()["prediction"]["steps"]
    train_in_two("long", shape, LONG_SHAPE, foretold)
    for seed in SEEDS:
        name = named(f"{shape}, half an hour", seed)
        chosen = [*HALF_HOUR, f"--seed={seed}"]
        train_in_two("long", name, LONG_SHAPE, HALF_HOUR_STEPS, *chosen)
    train_in_two("long", f"{shape}, as many steps", LONG_SHAPE, OLD_STEPS, *HALF_HOUR)


def train_three(options):
    "As many steps as two processes take in three minutes, by `pace`."
    shape = 2, 128
    for name, dtype in (("32 bits", "fp32"), ("16 bits", "fastest")):
        cost = read_measured()["pace"][f"{shape_name(*shape)}, {name}"]
        n_steps = round(3 * STEPS_PER_MINUTE / cost)
        for seed in SEEDS:
            chosen = [f"--dtype={dtype}", f"--seed={seed}"]
            train_in_two("three", named(name, seed), shape, n_steps, *chosen)


def named(name, seed):   # text
    return f"{name} seed={seed}" if seed else name


def train_in_two(group, name, shape, n_steps, *more):
    "A run by torchrun, unless it is done; one that was interrupted goes on."
    if name in read_measured().get(group, {}):
        return
    out = ROOT / "out" / group / name
    chosen = [
        f"--max_steps={n_steps}",
        f"--eval_every={n_steps // 100 * 10}",   # where a line is logged
        *shape_options(*shape),
        *more,
        f"--out_dir={out}",
        "--resume",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    script = str(ROOT / "minikl" / "train.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*torchrun, script, *chosen], env=environment, check=True)
    store(group, **{name: long_result(out, *shape)})


def long_result(out, layers, width):   # dict, of a finished run
    run = json.loads((out / "run.json").read_text("utf-8"))
    lines = read_json_lines(out / "metrics.jsonl")
    logged = {line["step"]: line for line in lines if "tokens" in line}
    curve = []
    for line in lines:
        if "bits_per_char" in line:
            tokens = logged[line["step"]]["tokens"]
            curve.append([line["step"], tokens, round(line["bits_per_char"], 4)])
    return {
        "layers": layers,
        "width": width,
        "steps": max(logged),
        "tokens": logged[max(logged)]["tokens"],
        "bits_per_char": round(run["bits_per_char"]["MiniKL"], 4),
        "curve": curve,
        "when": now(),
    }


def list_trials(options):
    done = read_measured().get("runs", {})
    for trial in TRIALS:
        print(trial.name, done.get(trial.name, {}).get("bits_per_char", "to do"))
    print(sum(trial.minutes for trial in TRIALS), "minutes of two cores in all")


# ---- the command line

COMMANDS = {
    "measure": measure,
    "predict": predict,
    "pace": pace,
    "long": train_long,
    "three": train_three,
    "list": list_trials,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        "law.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    options = parser.parse_args(argv)
    if options.what in ("pace", "long", "three") and Precision.fastest("cpu") == "fp32":
        sys.exit(f"{options.what}: this processor has no products of 16 bits")
    COMMANDS[options.what](options)


if __name__ == "__main__":
    main()
