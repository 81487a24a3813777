"""What is true on a GPU: the same answers, and what they cost.

    python tools/accelerator.py FOLDER [PART …]    all parts take about five minutes

Each part prints one JSON object, and FOLDER/gpu.json collects them. Needs the poems in
data/. Times are medians; every comparison runs both sides by turns in one process.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minikl.bench import random_docs, training_steps
from minikl.generate import KVCache, generate_batch
from minikl.layouts import LAYOUTS, Nested
from minikl.model import MiniKL, MiniKLConfig, count_by_formula
from minikl.recorded import read_json_lines
from minikl.step import Precision, make_optimizers, pick_device, train_step

DEVICE = pick_device()


def wait():
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def by_turns(sides, repeats=7):   # {name: function} → {name: median seconds}
    "Time several functions by turns, after one round that is not counted."
    taken = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, work in sides.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            taken[name].append(time.perf_counter() - start)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


# ---- the same answers


def gradients_of(model, batch):   # (loss per target, gradient of all weights: one row)
    model.zero_grad()
    total, n_targets = model.loss(batch)
    (total / n_targets).backward()
    rows = [weight.grad.flatten() for weight in model.parameters()]
    return float(total.detach() / n_targets), torch.cat(rows).double().cpu()


def same_answers():
    "Loss and gradient of each layout and precision against float64 on the CPU."
    config, steps = training_steps(1)
    torch.manual_seed(0)
    exact = MiniKL(config).double()
    model = MiniKL(config)
    model.load_state_dict(exact.state_dict())
    model.to(DEVICE)
    loss, gradient = gradients_of(exact, Nested(steps[0]))
    found = {}
    for dtype in ("fp32", "bf16", "fp16"):
        for name, layout in LAYOUTS.items():
            with Precision(dtype, DEVICE.type).autocast():
                other, other_gradient = gradients_of(model, layout(steps[0]).to(DEVICE))
            error = (other_gradient - gradient).norm() / gradient.norm()
            found[f"{dtype} {name}"] = {
                "loss": abs(other / loss - 1),
                "gradient": float(error),
            }
    return found


@torch.inference_mode()
def cached_generation():
    "Largest difference of logits with the cache and without, relative to their size."
    config, steps = training_steps(1)
    model = MiniKL(config).to(DEVICE)
    doc = max(steps[0], key=len).to(DEVICE)
    batch = LAYOUTS["padded"]([doc.cpu()]).to(DEVICE)
    whole = model(batch.ids, batch.positions, batch.attend)[0]
    cache = KVCache(
        config.num_layers, 1, len(doc), config.num_kv_heads, config.d_head,
        device=DEVICE, dtype=torch.float32,
    )
    rows = [model(*cache.step(token.view(1, 1)))[0, 0] for token in doc]
    error = (torch.stack(rows) - whole).abs().max() / whole.abs().max()
    return {"tokens": len(doc), "error": float(error)}


# ---- the script


def trained(folder, *options):
    "Run the training script. {bits per character, seconds of training and of all}."
    command = [sys.executable, "-m", "minikl.train", f"--out_dir={folder}", *options]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        return {"failed": done.stderr[-600:]}
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        "bits_per_char": run["bits_per_char"]["MiniKL"],
        "training_s": run["training_seconds"],
        "whole_s": seconds,
        "dtype": run["dtype"],
    }


def script(folder):
    "The default model in three precisions, and compiled."
    choices = {
        "bf16": ["--dtype=bf16"],
        "fp32": ["--dtype=fp32"],
        "compiled bf16": ["--compile"],
        "fp16": ["--dtype=fp16"],
    }
    found = {}
    for name, options in choices.items():
        found[name] = trained(folder / name, "--max_steps=1670", *options)
        print(name, json.dumps(found[name]), flush=True)
    return found


def resumed(folder):
    "A killed run that is resumed, against one that is left alone: largest difference."
    options = ["--max_steps=120", "--save_every=40", "--log_every=1", "--dtype=bf16"]
    trained(folder / "whole", *options)
    trained(folder / "again", *options)
    command = [sys.executable, "-m", "minikl.train", f"--out_dir={folder / 'killed'}"]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    checkpoint = folder / "killed" / "running" / "checkpoints" / "step-00000080"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trained(folder / "killed", *options, "--resume")
    losses = {}
    for name in ("whole", "again", "killed"):
        lines = read_json_lines(folder / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    pairs = list(zip(losses["whole"], losses["killed"], strict=True))
    repeated = list(zip(losses["whole"], losses["again"], strict=True))
    return {
        "lines": len(pairs),
        "largest difference, killed": max(abs(a - b) for a, b in pairs),
        "largest difference, left alone twice": max(abs(a - b) for a, b in repeated),
    }


# ---- what it costs


class Jagged(Nested):
    "Nested, with PyTorch's own kernel for documents of different lengths."

    def __init__(self, docs):
        super().__init__(docs)
        lengths = torch.tensor([0, *self.lengths])
        self.offsets = lengths.cumsum(0)
        self.longest = max(self.lengths)

    def attend(self, q, k, v):   # (tokens, heads, d_head)
        from torch.nested import nested_tensor_from_jagged

        def nested(x):
            return nested_tensor_from_jagged(
                x, self.offsets, min_seqlen=1, max_seqlen=self.longest
            ).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            *map(nested, (q.to(v.dtype), k.to(v.dtype), v)), is_causal=True
        )
        return mixed.transpose(1, 2).values()


def step_of(model, batch, optimizers):   # function: one whole step in bf16
    precision = Precision("bf16", DEVICE.type)
    n_targets = int((batch.targets >= 0).sum())

    def step():
        train_step(model.loss, [batch], model, optimizers, precision, n_targets)

    return step


def kernels():
    "A whole step of each layout, and of PyTorch's jagged kernel, in bf16."
    found = {}
    config, steps = training_steps(1)
    wide = MiniKLConfig(
        d_model=512, num_heads=8, num_kv_heads=8, num_layers=8, vocab_size=8000
    )
    generator = torch.Generator().manual_seed(0)
    lengths = (16 * 2 ** (6 * torch.rand(128, generator=generator))).long().tolist()
    cases = {
        "poems, width 128": (config, steps[0]),
        "16 to 1,024 tokens, width 512": (wide, random_docs(lengths, 8000)),
    }
    for case, (size, docs) in cases.items():
        model = MiniKL(size).to(DEVICE)
        optimizers = make_optimizers(model)
        sides = {}
        losses = {}
        for name, layout in {**LAYOUTS, "jagged kernel": Jagged}.items():
            try:
                batch = layout(docs).to(DEVICE)
                with Precision("bf16", DEVICE.type).autocast():
                    total, n_targets = model.loss(batch)
                total.backward()
                losses[name] = float(total.detach() / n_targets)
                sides[name] = step_of(model, batch, optimizers)
            except RuntimeError as error:
                losses[name] = str(error).splitlines()[0][:200]
            model.zero_grad()
        seconds = by_turns(sides)
        found[case] = {
            "tokens": sum(map(len, docs)),
            "loss": losses,
            "step_ms": {name: 1000 * value for name, value in seconds.items()},
        }
    return found


def sizes():
    "Tokens and floating-point operations a second of whole steps, by width, in bf16."
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    seconds = by_turns({"product": lambda: a @ a})["product"]
    found = {"matrix product TFLOP/s": 2 * 8192**3 / seconds / 1e12}
    shapes = {128: (2, 32, 4000), 512: (8, 128, 8000), 1024: (16, 256, 16000)}
    for width, (layers, n_docs, vocab) in shapes.items():
        config = MiniKLConfig(
            d_model=width, num_heads=width // 64, num_kv_heads=width // 64,
            num_layers=layers, vocab_size=vocab,
        )
        docs = random_docs([256] * n_docs, vocab)
        model = MiniKL(config).to(DEVICE)
        optimizers = make_optimizers(model)
        batch = Nested(docs).to(DEVICE)
        n_targets = int((batch.targets >= 0).sum())
        step = step_of(model, batch, optimizers)
        seconds = by_turns({"step": step})["step"]
        weights = count_by_formula(config) - config.vocab_size * width
        flops = 6 * weights * n_targets + 6 * layers * width * 256 * n_targets
        found[width] = {
            "weights": count_by_formula(config),
            "tokens": n_targets,
            "tokens_per_s": n_targets / seconds,
            "TFLOP/s": flops / seconds / 1e12,
        }
        del model, optimizers
    return found


def writing():
    "New tokens a second, side by side, with top-p and without."
    config, _ = training_steps(1)
    model = MiniKL(config).to(DEVICE).eval()
    found = {}
    for batch in (1, 64, 512):
        for top_p in (1.0, 0.95):
            def write(batch=batch, top_p=top_p):
                prompts = [[5, 6, 7]] * batch
                seeds = range(batch)
                for _ in generate_batch(model, prompts, 64, None, seeds, top_p=top_p):
                    pass

            seconds = by_turns({"write": write}, repeats=3)["write"]
            found[f"batch {batch}, top_p {top_p}"] = 64 * batch / seconds
    return found


PARTS = {
    "same_answers": same_answers,
    "cached_generation": cached_generation,
    "kernels": kernels,
    "sizes": sizes,
    "writing": writing,
    "script": script,
    "resumed": resumed,
}


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(os.environ.get("TMPDIR", "/tmp")) / "minikl-gpu"
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    results = {"device": name, "torch": torch.__version__}
    for part in sys.argv[2:] or PARTS:
        start = time.perf_counter()
        arguments = [work / part] if part in ("script", "resumed") else []
        try:
            results[part] = PARTS[part](*arguments)
        except Exception as error:   # the other parts are still worth running
            results[part] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        taken = time.perf_counter() - start
        print(part, f"{taken:.0f} s", json.dumps(results[part]), flush=True)
        (folder / "gpu.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
