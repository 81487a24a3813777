"""Which change bought what: arms that differ in one thing, trained as many minutes.

    python tools/quality.py speed [ARM …]   processor time of a step, arms in turns with
                                            the default (all: 5 minutes of one core)
    python tools/quality.py train [ARM …]   train arms that are not trained yet
                                            (6 minutes of one core each; --minutes=1: 2)
    python tools/quality.py bracket [ARM …] train arms with AdamW at other rates, until
                                            the best has a worse one on either side
    python tools/quality.py seeds [ARM …]   train arms again with two more seeds, at
                                            their best rate
    python tools/quality.py collect         write what was measured to
                                            nbs/measured/quality.json

Each arm trains for as many steps as fit into the minutes, by its measured speed. Runs
lie in out/quality/; one that was interrupted is gone on with.
"""
import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import minikl.learner
import minikl.train
from minikl.attention import causal_attention
from minikl.checkpoint import FORMERLY
from minikl.corpora import DATA, build_poetry
from minikl.data import (
    IGNORE,
    Documents,
    TokenFile,
    build_tokens,
    encode_documents,
    hash_fraction,
)
from minikl.files import write_atomically
from minikl.jsonl import read_jsonl
from minikl.layouts import Layout, Nested, Padded
from minikl.learner import Learner
from minikl.model import MiniKL
from minikl.options import parse_options
from minikl.parallel import Ranks, evaluate
from minikl.recorded import read_json_lines
from minikl.step import Precision, make_optimizers, schedule
from minikl.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer
from minikl.trainer import Run

OUT = ROOT / "out" / "quality"
MEASURED = ROOT / "nbs" / "measured" / "quality.json"
# of the default run, two processes on two quiet cores: 24,000 tokens/s
STEPS_PER_MINUTE = 1670 / 3
HELD_OUT = 0.03   # the share of the documents that no arm is trained on


# ---- the model that most people would write


class GPT2Block(nn.Module):
    """LayerNorm and biases, one matrix for queries, keys and values, GELU.

    Radford et al. 2019.
    """
    def __init__(self, config):
        super().__init__()
        d_model = config.d_model
        self.n_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.ffn_norm = nn.LayerNorm(d_model)
        self.w_qkv = nn.Linear(d_model, 3 * d_model)
        self.w_o = nn.Linear(d_model, d_model)
        self.w_up = nn.Linear(d_model, 4 * d_model)
        self.w_down = nn.Linear(4 * d_model, d_model)

    def forward(self, x, attend):
        qkv = self.w_qkv(self.attention_norm(x))
        q, k, v = qkv.unflatten(-1, (3 * self.n_heads, -1)).chunk(3, dim=-2)
        x = x + self.w_o(attend(q, k, v).flatten(-2))
        return x + self.w_down(F.gelu(self.w_up(self.ffn_norm(x))))


class GPT2(MiniKL):
    "As MiniKL, but with learned positions and the blocks of GPT-2."
    def __init__(self, config):
        super().__init__(config)
        self.places = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(
            GPT2Block(config) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            if name.endswith(("w_o.weight", "w_down.weight")):
                weight.data /= (2 * config.num_layers) ** 0.5

    def hidden(self, ids, positions, attend):
        x = self.embed(ids) + self.places(positions)
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x)


# ---- packed text, as GPT-2 and nanoGPT have it in pretraining


class Blocks(Layout):
    """Documents in one stream, cut into rows of BLOCK tokens: (rows, BLOCK).

    A token sees whatever stands before it in its row, other documents too. What it
    should answer is the same as in every layout.
    """
    def __init__(self, docs):
        super().__init__(docs)
        stream = torch.cat(docs)
        n_rows = math.ceil(len(stream) / BLOCK)
        n_padding = n_rows * BLOCK - len(stream)
        self.ids = F.pad(stream, (0, n_padding)).view(n_rows, BLOCK)
        self.targets = F.pad(self.targets, (0, n_padding), value=IGNORE)
        self.targets = self.targets.view(n_rows, BLOCK)
        self.positions = torch.arange(BLOCK).expand(n_rows, BLOCK)

    def attend(self, q, k, v):
        return causal_attention(q, k, v)


def evaluate_alone(model, documents, layout, *more):   # bits per character
    "Every document for itself, however the training has laid them out."
    return evaluate(model, documents, Padded if layout is Blocks else layout, *more)


# ---- the arms

BLOCK = 256   # tokens of a row
# What an arm may say beside the options of train.py: its model, its vocabulary, beta2
# of AdamW, the floor of the schedule, and a layout of its own.
EXTRA = {
    "model": MiniKL,
    "vocabulary": "",
    "beta2": 0.95,
    "final": 0.0,
    "blocks": False,
}
# the configuration of github.com/karpathy/nanoGPT for CPUs
NANO = {
    "model": GPT2,
    "vocabulary": "characters",
    "max_seq_len": 64,
    "batch_size": 12,
    "layout": "padded",
    "num_layers": 4,
    "tie_embeddings": True,
    "optimizer": "adamw",
    "lr": 1e-3,
    "beta2": 0.99,
    "final": 0.1,
    "warmup": 0.05,
}
# each rung keeps what the rungs before it changed; None: the default of train.py
LADDER = [
    ("64 characters", {"beta2": None, "final": None, "warmup": None}),
    ("whole poems", {"max_seq_len": None}),
    ("32 poems", {"batch_size": None}),
    ("tokens", {"vocabulary": None}),
    ("nested", {"layout": None}),
    ("block", {"model": None}),
    ("untied", {"tie_embeddings": None}),
    ("Muon", {"optimizer": None, "lr": None}),
    ("default", {"num_layers": None}),
]
# from the rung "tokens", one thing changed: a stream of tokens in place of padding
PACKED = {"blocks": True, "max_seq_len": BLOCK}
# from the default, one thing changed
ONE_OUT = {
    "padded": {"layout": "padded"},
    "constant": {"final": 1.0},
    "batch 16": {"batch_size": 16},
    "batch 64": {"batch_size": 64},
    "8,000 tokens": {"vocab_size": 8000},
    "characters": {"vocabulary": "characters"},
    "4 × 192": {"d_model": 192, "num_layers": 4},
    "3 × 96": {"d_model": 96, "num_layers": 3},
    "tied": {"tie_embeddings": True},
}
# the recipe of train.py; from it, one thing taken out again
SINCE = {
    "recipe": {},
    "recipe, cosine": {"decay": "cosine"},
    "recipe, random start": {"first_weights": "random"},
    "recipe, whole vocabulary": {"candidates": 0},
    "recipe, 16 bits": {"dtype": "fastest"},
}
USUAL = "recipe, 16 bits"   # what `make run` trains
RATES = 1.5e-3, 3e-3, 6e-3   # of AdamW, tried first
SEEDS = 0, 1, 2
# the arms whose differences the lesson speaks of
SEEDED = ("untied", "Muon", "default")
# evaluated on the way, too
CURVES = ("nanoGPT", "tokens", "packed", "default", "recipe")


def all_arms():   # {name: what differs from the defaults of train.py}
    arms = {}
    rung = NANO
    for name, change in LADDER:
        changed = {**rung, **change}
        rung = {key: value for key, value in changed.items() if value is not None}
        arms[name] = rung
    if arms["default"]:
        raise ValueError(f"the ladder does not end at the default: {arms['default']}")
    arms["nanoGPT"] = NANO
    arms["packed"] = arms["tokens"] | PACKED
    arms |= ONE_OUT
    # all of these differ from the recipe up to lesson 24
    return {name: FORMERLY | arm for name, arm in arms.items()} | SINCE


ARMS = all_arms()


def characters():   # Path
    """Vocabulary file with a token for each character of the training poems.

    So nanoGPT has it. All other characters are bytes.
    """
    path = OUT / "characters.json"
    if not path.exists():
        poems = read_jsonl(build_poetry())
        training = (text for text in poems if hash_fraction(text) >= HELD_OUT)
        chars = sorted(set("".join(training)))
        tokens = [*SPECIAL_TOKENS, *BYTE_TOKENS, *chars]
        Tokenizer({token: i for i, token in enumerate(tokens)}).save(path)
    return path


@contextmanager
def patched(
    arm,   # from ARMS
):         # list of arguments for train.py
    "While this context lasts, whatever of an arm is no option of train.py is changed."
    extra = {**EXTRA, **arm}
    options = {name: value for name, value in arm.items() if name not in EXTRA}
    if extra["vocabulary"]:
        options["vocab_dict_path"] = characters()

    def optimizers(*arguments):
        made = make_optimizers(*arguments)
        for group in made[-1].param_groups:
            group["betas"] = (0.9, extra["beta2"])
        return made

    layouts = {"padded": Blocks} if extra["blocks"] else {}
    model_class = patch.object(Learner, "model_class", extra["model"])
    with model_class, patch.dict(minikl.learner.LAYOUTS, layouts), patch.multiple(
        minikl.learner,
        schedule=partial(schedule, final=extra["final"]),
        make_optimizers=optimizers,
        evaluate=evaluate_alone,
    ):
        yield ["--threads=1", *(f"--{name}={value}" for name, value in options.items())]


# ---- speed


def begin_run(name, folder):   # Run
    "A run of an arm, after a first step: it has its memory and its optimizer's state."
    with patched(ARMS[name]) as arguments:
        options = parse_options(
            [*arguments, "--max_steps=1000", f"--out_dir={folder}"]
        )
        run = Run(options, Ranks(1))
    take_step(run, 0, 0.01)
    return run


def take_step(run, step, done):   # StepResult
    return run.learner.step(run.data.documents, step, done)


def seconds_of_a_step(run, turn):   # of processor time
    "128 documents for every arm; the same poems in the same turn."
    n_steps = 128 // run.options.learning.batch_size
    start = time.process_time()
    for step in range(turn * n_steps, (turn + 1) * n_steps):
        take_step(run, step, 0.01)
    return (time.process_time() - start) / n_steps


def measure_speed(options):
    """Processor time of a step with one thread, arms in turns on the same poems.

    Written to out/quality/speed.json: {arm: seconds}.
    """
    names = dict.fromkeys(["default", *(options.arms or ARMS)])
    seconds = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: begin_run(name, folder) for name in names}
        for turn in range(options.turns):
            for name, run in runs.items():
                seconds[name].append(seconds_of_a_step(run, turn))
            print(f"turn {turn + 1} of {options.turns}", flush=True)
    default = median(seconds["default"])
    found = read_speed() if options.arms else {}
    base = found.get("default", default)   # seconds when the others were measured
    for name, turns in seconds.items():
        ratios = [a / b for a, b in zip(turns, seconds["default"], strict=True)]
        found[name] = base * median(ratios)
    write_atomically(OUT / "speed.json", json.dumps(found, indent=1))
    for name, value in found.items():
        ms = 1000 * value
        print(f"{name:24} {ms:7.0f} ms, {value / found['default']:5.2f} of the default")


def read_speed():   # {arm: seconds}, measured here or as the lesson has it
    path = OUT / "speed.json"
    if path.exists():
        return json.loads(path.read_text())
    return json.loads(MEASURED.read_text())["speed"]


# ---- training


def n_steps_of(name, minutes):
    """How many steps of an arm fit into so many minutes.

    In each of them the default run makes STEPS_PER_MINUTE.
    """
    speed = read_speed()
    ratio = speed["default"] / speed[name]
    return max(1, round(minutes * STEPS_PER_MINUTE * ratio))


def folder_of(name, minutes, lr=0, seed=0):   # Path
    if lr:
        name += f" lr={lr:g}"
    if seed:
        name += f" seed={seed}"
    return OUT / f"{minutes:g} min" / name


def bits_of(folder):   # per character, of a finished run
    run = json.loads((folder / "run.json").read_text())
    return run["bits_per_char"]["MiniKL"]


def rates_of(name, minutes):   # {rate of AdamW: bits per character}, from low to high
    "What has been tried, with the first seed."
    rates = {}
    for path in folder_of(name, minutes).parent.glob(f"{name} lr=*/run.json"):
        said = path.parent.name.removeprefix(f"{name} lr=")
        if "seed" not in said:
            rates[float(said)] = bits_of(path.parent)
    return dict(sorted(rates.items()))


def best_rate(name, minutes):   # 0 where no others were tried
    rates = rates_of(name, minutes)
    return min(rates, key=rates.get, default=0)


def rates_here():   # {arm: {rate: bits}}, of those that were tried on this machine
    found = {name: rates_of(name, 1) for name in ARMS}
    return {name: rates for name, rates in found.items() if rates}


def train_arm(options):
    """Train one arm in this process.

    Three of them are evaluated on the way, too, which counts no minutes.
    """
    (name,) = options.arms
    n_steps = n_steps_of(name, options.minutes)
    arm = dict(ARMS[name])
    if options.lr:
        arm["lr"] = options.lr
    if options.seed:
        arm["seed"] = options.seed
    more = []
    if name in CURVES and options.minutes == 3:
        more.append(f"--eval_every={math.ceil(n_steps / 6)}")
    out = folder_of(name, options.minutes, options.lr, options.seed)
    more += [f"--max_steps={n_steps}", "--keep_checkpoints=1", "--resume"]
    with patched(arm) as arguments:
        minikl.train.main([*arguments, *more, f"--out_dir={out}"])


def train_in_a_process(name, minutes, lr=0, seed=0):
    "Train an arm unless it is trained, and print what came out or what went wrong."
    out = folder_of(name, minutes, lr, seed)
    if (out / "run.json").exists():
        return
    chosen = [f"--minutes={minutes}", f"--lr={lr}", f"--seed={seed}"]
    command = [sys.executable, __file__, "arm", name, *chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        lines = [line for line in done.stdout.splitlines() if "bits per" in line]
    else:
        lines = done.stderr.splitlines()
    print(f"{out.name}:", *lines, flush=True)


def train(options):
    "Train arms that are not trained yet, each in a process of its own."
    more = {"minutes": options.minutes, "lr": options.lr, "seed": options.seed}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(partial(train_in_a_process, **more), options.arms or ARMS))


def bracket_arm(name, minutes):
    "Try rates of AdamW until the best one is neither the lowest nor the highest."
    rates = set(RATES)
    while True:
        for lr in sorted(rates):
            train_in_a_process(name, minutes, lr)
        best = best_rate(name, minutes)
        if best not in (min(rates), max(rates)):
            return
        rates.add(best / 2 if best == min(rates) else best * 2)


def bracket(options):
    names = [name for name, arm in ARMS.items() if arm.get("optimizer") == "adamw"]
    names.remove("nanoGPT")   # that has the rate which nanoGPT recommends
    one = partial(bracket_arm, minutes=options.minutes)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, options.arms or names))


def seeds(options):
    "Train arms again, at their best rate, with the other seeds."
    for name in options.arms or SEEDED:
        lr = best_rate(name, options.minutes)
        for seed in SEEDS[1:]:
            train_in_a_process(name, options.minutes, lr, seed)


# ---- what was measured


def surprise(model, tokenizer, text):   # [[token, bits]]
    "How many bits each token of a text costs, its end included."
    ids = torch.tensor(encode_documents([text], tokenizer)[0][0])
    batch = Nested([ids])
    with torch.no_grad():
        logits = model(batch.ids, batch.positions, batch.attend)[:-1]
        nats = F.cross_entropy(logits, ids[1:], reduction="none")
    bits = (nats / math.log(2)).tolist()
    tokens = [tokenizer.decode([i]) for i in ids[1:].tolist()]
    return [[token, round(n, 2)] for token, n in zip(tokens, bits, strict=True)]


def lines_with(key, folder):   # list of lines of metrics.jsonl
    return [line for line in read_json_lines(folder / "metrics.jsonl") if key in line]


def summary(folder):
    "What a finished run was, and what came out: the numbers that the lesson draws."
    run = json.loads((folder / "run.json").read_text())
    losses = lines_with("loss", folder)
    evaluations = lines_with("bits_per_char", folder)
    last = [line["loss"] for line in losses[-5:]]
    curve = [[line["step"], round(line["bits_per_char"], 4)] for line in evaluations]
    return {
        "steps": losses[-1]["step"],
        "tokens": losses[-1]["tokens"],
        "parameters": run["parameters"],
        "bits_per_char": round(run["bits_per_char"]["MiniKL"], 4),
        "loss": round(sum(last) / len(last), 4),
        "curve": curve,
    }


def band(arm, minutes):
    "The losses of three seeds: how far apart runs come out that differ in nothing."
    folders = [folder_of(arm, minutes, seed=seed) for seed in SEEDS]
    arms = [lines_with("loss", folder) for folder in folders]
    first = arms[0]
    return {
        "minutes": f"{minutes:g} min",
        "steps": first[-1]["step"],
        "tokens": [line["tokens"] for line in first],
        "losses": [[round(line["loss"], 3) for line in lines] for lines in arms],
    }


def documents_between(low, high, file, max_seq_len):   # Documents
    "Those whose place in the hash order of documents lies in a range."
    chosen = (low <= file.fractions) & (file.fractions < high)
    return Documents(file, chosen.nonzero().flatten(), max_seq_len)


def about_the_default(folder):
    "How much one unseen poem surprises the default model; bits on seen poems."
    run = json.loads((folder / "run.json").read_text())
    tokenizer = Tokenizer.load(folder / "vocab_dict.json")
    model = MiniKL.load(folder).eval()
    poem = next(
        text
        for text in read_jsonl(build_poetry())
        if text.startswith("一重山，两重山") and hash_fraction(text) < HELD_OUT
    )
    file = TokenFile(build_tokens(build_poetry(), tokenizer, DATA / "cache"))
    length = model.config.max_seq_len
    held_out = documents_between(0, HELD_OUT, file, length)
    seen = documents_between(HELD_OUT, HELD_OUT + 0.03, file, length)
    n_tokens = sum(len(document) - 1 for document in held_out)
    bits = evaluate(model, seen, Nested, Precision("fp32"), Ranks(1))
    others = {k: round(v, 4) for k, v in run["bits_per_char"].items() if k != "MiniKL"}
    return {
        "poem": surprise(model, tokenizer, poem),
        "tokens_per_char": round(n_tokens / held_out.n_chars, 4),
        "seen": round(bits, 4),
        "baselines": others,
    }


def store(**measurements):
    """Put measurements into their file.

    Each is one line of JSON, so that a diff shows what changed.
    """
    known = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    lines = [
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in sorted((known | measurements).items())
    ]
    write_atomically(MEASURED, "{\n" + ",\n".join(lines) + "\n}\n")


def collect(options):
    "Gather finished runs, the losses of three seeds, and what the default run knows."
    known = json.loads(MEASURED.read_text())
    measurements = {"speed": {name: round(n, 4) for name, n in read_speed().items()}}
    for path in sorted(OUT.glob("* min/*/run.json")):
        kind = "since" if path.parent.name.startswith("recipe") else "runs"
        group = f"{kind}, {path.parent.parent.name}"   # for lesson 26 and 17
        runs = measurements.setdefault(group, dict(known.get(group, {})))
        runs[path.parent.name] = summary(path.parent)
    measurements["rates"] = known["rates"] | rates_here()
    default = [folder_of("default", 3, seed=seed) for seed in SEEDS]
    if all((folder / "run.json").exists() for folder in default):
        measurements |= about_the_default(default[0])
    usual = [folder_of(USUAL, 3, seed=seed) for seed in SEEDS]
    if all((folder / "run.json").exists() for folder in usual):
        measurements["band"] = band(USUAL, 3)
    store(**measurements)
    told = [
        f"{name} {list(value) if name.startswith('runs') else ''}"
        for name, value in measurements.items()
    ]
    print(f"{MEASURED.relative_to(ROOT)}: " + ", ".join(told))


# ---- the command line

COMMANDS = {
    "speed": measure_speed,
    "train": train,
    "arm": train_arm,
    "bracket": bracket,
    "seeds": seeds,
    "collect": collect,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        "quality.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    arms = f"of {', '.join(ARMS)} (default: all that are missing)"
    add("what", choices=COMMANDS)
    add("arms", nargs="*", help=arms)
    add("--jobs", type=int, default=1, help="arms at the same time, one core each")
    add("--turns", type=int, default=7, help="of the speed measurement")
    add("--lr", type=float, default=0, help="try another learning rate")
    add("--seed", type=int, default=0, help="try another seed")
    add("--minutes", type=float, default=3, help="of two cores, for each arm")
    options = parser.parse_intermixed_args(argv)
    if unknown := set(options.arms) - ARMS.keys():
        parser.error(f"no such arm: {', '.join(unknown)}")
    OUT.mkdir(parents=True, exist_ok=True)
    COMMANDS[options.what](options)


if __name__ == "__main__":
    main()
