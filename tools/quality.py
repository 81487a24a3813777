"""Which change bought what: arms that differ in one thing, each trained for as many steps as fit into the same minutes.

    python tools/quality.py speed                processor time of a step, all arms in turns (5 minutes of one core)
    python tools/quality.py train [ARM …]        train arms that are not trained yet (6 minutes of one core each; --minutes=1: 2)
    python tools/quality.py collect              write what was measured to nbs/measured/quality.json

Runs lie in out/quality/; one that was interrupted is gone on with.
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
import minikl.train
from minikl.data import DATA, Documents, TokenFile, build_poetry, build_tokens, encode_documents, hash_fraction, read_jsonl
from minikl.model import MiniKL
from minikl.nested import Nested
from minikl.report import json_lines
from minikl.files import write_atomically
from minikl.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer
from minikl.parallel import Ranks, evaluate
from minikl.training import Precision, make_optimizers, schedule

OUT, MEASURED = ROOT / "out" / "quality", ROOT / "nbs" / "measured" / "quality.json"
STEPS_PER_MINUTE = 1670 / 3   # of the default run, two processes on two quiet cores: 24,000 tokens/s


class GPT2Block(nn.Module):
    "LayerNorm and biases, one matrix for queries, keys and values, GELU. Radford et al. 2019."
    def __init__(self, config):
        super().__init__()
        self.n_heads, d_model = config.num_heads, config.d_model
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.w_qkv, self.w_o = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.w_up, self.w_down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x, attend):
        q, k, v = self.w_qkv(self.attention_norm(x)).unflatten(-1, (3 * self.n_heads, -1)).chunk(3, dim=-2)
        x = x + self.w_o(attend(q, k, v).flatten(-2))
        return x + self.w_down(F.gelu(self.w_up(self.ffn_norm(x))))


class GPT2(MiniKL):
    "What most people would write: as MiniKL, but with learned positions and the blocks of GPT-2."
    def __init__(self, config):
        super().__init__(config)
        self.places = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(GPT2Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        for name, weight in self.named_parameters():
            if weight.ndim == 2: nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"): nn.init.zeros_(weight)
            if name.endswith(("w_o.weight", "w_down.weight")): weight.data /= (2 * config.num_layers) ** 0.5

    def hidden(self, ids, positions, attend):
        x = self.embed(ids) + self.places(positions)
        for block in self.blocks: x = block(x, attend)
        return self.norm(x)


# What an arm may say beside the options of train.py: `model`, `vocabulary`, `beta2` of AdamW, and the floor of the schedule.
EXTRA = dict(model=MiniKL, vocabulary="", beta2=0.95, final=0.0)
NANO = dict(model=GPT2, vocabulary="characters", max_seq_len=64, batch_size=12, layout="padded", num_layers=4, tie_embeddings=True,
            optimizer="adamw", lr=1e-3, beta2=0.99, final=0.1, warmup=0.05)   # configuration of github.com/karpathy/nanoGPT for CPUs
LADDER = [   # each rung keeps what the rungs before it changed; None: the default of train.py
    ("nanoGPT", {}),
    ("whole poems", dict(max_seq_len=None, batch_size=None, lr=3e-3, beta2=None, final=None, warmup=None)),
    ("tokens", dict(vocabulary=None)),
    ("nested", dict(layout=None)),
    ("block", dict(model=None)),
    ("untied", dict(tie_embeddings=None)),
    ("Muon", dict(optimizer=None, lr=None)),
    ("default", dict(num_layers=None)),
]
ONE_OUT = {   # from the default, one thing changed
    "padded": dict(layout="padded"), "AdamW": dict(optimizer="adamw", lr=3e-3), "constant": dict(final=1.0),
    "batch 16": dict(batch_size=16), "batch 64": dict(batch_size=64), "8,000 tokens": dict(vocab_size=8000), "characters": dict(vocabulary="characters"),
    "4 × 192": dict(d_model=192, num_layers=4), "3 × 96": dict(d_model=96, num_layers=3), "tied": dict(tie_embeddings=True, lr=6e-3),
    "seed 1": dict(seed=1), "seed 2": dict(seed=2),
}
CURVES = ("nanoGPT", "tokens", "default")   # evaluated on the way, too


def all_arms():   # {name: what differs from the defaults of train.py}
    arms, rung = {}, NANO
    for name, change in LADDER:
        rung = {key: value for key, value in {**rung, **change}.items() if value is not None}
        arms[name] = rung
    if arms["default"]: raise ValueError(f"the ladder does not end at the default: {arms['default']}")
    return {**arms, **ONE_OUT}


ARMS = all_arms()


def characters():
    "Vocabulary file with a token for each character of the training poems, as nanoGPT has it; bytes for all others."
    path = OUT / "characters.json"
    if not path.exists():
        chars = sorted(set("".join(text for text in read_jsonl(build_poetry()) if hash_fraction(text) >= 0.03)))
        Tokenizer({token: i for i, token in enumerate([*SPECIAL_TOKENS, *BYTE_TOKENS, *chars])}).save(path)
    return path


@contextmanager
def patched(arm):   # arguments for train.py; whatever is no option of it is changed while this context lasts
    extra, options = {**EXTRA, **arm}, {name: value for name, value in arm.items() if name not in EXTRA}
    if extra["vocabulary"]: options["vocab_dict_path"] = characters()
    def optimizers(*arguments):
        made = make_optimizers(*arguments)
        for group in made[-1].param_groups: group["betas"] = (0.9, extra["beta2"])
        return made
    with patch.multiple(minikl.train, MiniKL=extra["model"], schedule=partial(schedule, final=extra["final"]), make_optimizers=optimizers):
        yield ["--threads=1", *(f"--{name}={value}" for name, value in options.items())]


def measure_speed(options):
    "Processor time of a step with one thread, all arms in turns on the same poems: out/quality/speed.json, {arm: seconds}."
    runs, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ARMS:
            if name.startswith("seed"): continue
            with patched(ARMS[name]) as arguments:
                parsed = minikl.train.parse_options([*arguments, "--max_steps=1000", f"--out_dir={folder}"])
                runs[name], seconds[name] = minikl.train.Run(*parsed, Ranks(1)), []
            runs[name].step(0, 0.01)   # memory is taken, and the optimizer gets its state
        for turn in range(options.turns):
            for name, run in runs.items():
                n_steps = 128 // run.options.batch_size
                start = time.process_time()
                for step in range(turn * n_steps, (turn + 1) * n_steps): run.step(step, 0.01)
                seconds[name].append((time.process_time() - start) / n_steps)
            print(f"turn {turn + 1} of {options.turns}", flush=True)
    default = median(seconds["default"])
    found = {name: default * median(a / b for a, b in zip(turns, seconds["default"])) for name, turns in seconds.items()}
    write_atomically(OUT / "speed.json", json.dumps(found, indent=1))
    for name, value in found.items(): print(f"{name:14} {1000 * value:7.0f} ms, {value / default:5.2f} of the default")


def n_steps_of(name, minutes):
    "How many steps of an arm fit into the minutes in which the default run makes STEPS_PER_MINUTE each."
    speed = json.loads((OUT / "speed.json").read_text())
    return max(1, round(minutes * STEPS_PER_MINUTE * speed["default"] / speed.get(name, speed["default"])))


def folder_of(name, minutes, lr=0): return OUT / f"{minutes:g} min" / (f"{name} lr={lr:g}" if lr else name)


def train_arm(options):
    "Train one arm in this process. Three of them are evaluated on the way, too, which counts no minutes."
    (name,) = options.arms
    n_steps = n_steps_of(name, options.minutes)
    curve = [f"--eval_every={math.ceil(n_steps / 6)}"] if name in CURVES and options.minutes == 3 else []
    with patched(ARMS[name] | ({"lr": options.lr} if options.lr else {})) as arguments:
        minikl.train.main([*arguments, *curve, f"--max_steps={n_steps}", "--keep_checkpoints=1", "--resume",
                           f"--out_dir={folder_of(name, options.minutes, options.lr)}"])


def train(options):
    "Train arms that are not trained yet, each in a process of its own."
    def one(name):
        if (folder_of(name, options.minutes, options.lr) / "metrics.jsonl").exists(): return
        command = [sys.executable, __file__, "arm", name, f"--lr={options.lr}", f"--minutes={options.minutes}"]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines()
        print(f"{name} {options.lr or ''}:", *[line for line in lines if "bits per" in line or done.returncode], flush=True)
    with ThreadPoolExecutor(options.jobs) as pool: list(pool.map(one, options.arms or ARMS))


def surprise(model, tokenizer, text):
    "[[token, bits]] of a text, its end included."
    with torch.no_grad():
        ids = torch.tensor(encode_documents([text], tokenizer)[0][0])
        batch = Nested([ids])
        nats = F.cross_entropy(model(batch.ids, batch.positions, batch.attend)[:-1], ids[1:], reduction="none")
    return [[tokenizer.decode([i]), round(bits, 2)] for i, bits in zip(ids[1:].tolist(), (nats / math.log(2)).tolist())]


def summary(folder):
    "What a finished run was, and what came out: the numbers that the lesson draws."
    run, lines = json.loads((folder / "run.json").read_text()), json_lines(folder / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    return {"steps": losses[-1]["step"], "tokens": losses[-1]["tokens"], "parameters": run["parameters"], "bits_per_char": round(run["bits_per_char"]["MiniKL"], 4),
            "loss": round(sum(line["loss"] for line in losses[-5:]) / len(losses[-5:]), 4),
            "curve": [[line["step"], round(line["bits_per_char"], 4)] for line in lines if "bits_per_char" in line]}


def store(**parts):
    "Put parts into the file of measurements: one line of JSON for each, so that a diff shows what changed."
    known = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    lines = (f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in sorted((known | parts).items()))
    write_atomically(MEASURED, "{\n" + ",\n".join(lines) + "\n}\n")


def collect(options):
    "Gather the finished runs, the losses of three seeds, and how much one unseen poem surprises the default model."
    runs = {}
    for path in sorted(OUT.glob("* min/*/run.json")): runs.setdefault(path.parent.parent.name, {})[path.parent.name] = summary(path.parent)
    parts = {"speed": {name: round(seconds, 4) for name, seconds in json.loads((OUT / "speed.json").read_text()).items()},
             **{f"runs, {minutes}": found for minutes, found in runs.items()}}
    for minutes, found in runs.items():   # the longest run of three seeds comes last
        if found.keys() >= {"default", "seed 1", "seed 2"}:
            losses = [[line for line in json_lines(OUT / minutes / name / "metrics.jsonl") if "loss" in line] for name in ("default", "seed 1", "seed 2")]
            parts["band"] = {"minutes": minutes, "steps": found["default"]["steps"], "tokens": [line["tokens"] for line in losses[0]],
                             "losses": [[round(line["loss"], 3) for line in lines] for lines in losses]}
    default = OUT / "3 min" / "default"
    if (default / "run.json").exists():
        tokenizer, run = Tokenizer.load(default / "vocab_dict.json"), json.loads((default / "run.json").read_text())
        poem = next(text for text in read_jsonl(build_poetry()) if text.startswith("一重山，两重山") and hash_fraction(text) < 0.03)
        file, model = TokenFile(build_tokens(build_poetry(), tokenizer, DATA / "cache")), MiniKL.load(default).eval()
        held_out, seen = (Documents(file, ((low <= file.fractions) & (file.fractions < low + 0.03)).nonzero().flatten(), model.config.max_seq_len) for low in (0, 0.03))
        parts |= {"poem": surprise(model, tokenizer, poem), "tokens_per_char": round(sum(len(doc) - 1 for doc in held_out) / held_out.n_chars, 4),
                  "seen": round(evaluate(model, seen, Nested, Precision("fp32"), Ranks(1)), 4),
                  "baselines": {name: round(bits, 4) for name, bits in run["bits_per_char"].items() if name != "MiniKL"}}
    store(**parts)
    print(f"{MEASURED.relative_to(ROOT)}: " + ", ".join(f"{name} {list(part) if name.startswith('runs') else ''}" for name, part in parts.items()))


COMMANDS = {"speed": measure_speed, "train": train, "arm": train_arm, "collect": collect}


def main(argv=None):
    parser = argparse.ArgumentParser("quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)} (default: all that are missing)")
    parser.add_argument("--jobs", type=int, default=1, help="arms trained at the same time, one core each")
    parser.add_argument("--turns", type=int, default=7, help="of the speed measurement")
    parser.add_argument("--lr", type=float, default=0, help="try another learning rate")
    parser.add_argument("--minutes", type=float, default=3, help="of two cores, for each arm")
    options = parser.parse_intermixed_args(argv)
    if unknown := set(options.arms) - ARMS.keys(): parser.error(f"no such arm: {', '.join(unknown)}")
    OUT.mkdir(parents=True, exist_ok=True)
    COMMANDS[options.what](options)


if __name__ == "__main__": main()
