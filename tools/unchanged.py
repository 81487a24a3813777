"""Compare what the package computes before and after a change, bit for bit.

    python tools/unchanged.py record before     # before the change: fills the folder
    python tools/unchanged.py compare before    # after it: the same again, compared

Recorded are token ids (poetry and 2,000 odd strings), the batches of 50 steps, metrics
and weights of four short runs, texts, and runs resumed. `compare` also writes with the
models, and resumes the runs, that `record` left in the folder. Equality to the bit is
promised on the machine that recorded, for the same version of PyTorch.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--threads=1 --device=cpu --log_every=1 --eval_every=20 --eval_documents=50 "
    "--d_model=32 --num_heads=4 --num_layers=2 --vocab_size=600 --max_seq_len=64"
).split()
RUNS = {
    "nested": ["--corpus=poetry", "--num_kv_heads=4"],
    "padded": ["--corpus=toy", "--num_kv_heads=4", "--layout=padded", "--grad_accum=2"],
    "adamw": [
        *["--corpus=poetry", "--optimizer=adamw", "--lr=0.003"],
        *["--num_kv_heads=2", "--tie_embeddings", "--layout=packed"],
    ],
    "sharded": ["--corpus=poetry", "--num_kv_heads=2", "--shard"],
}
CLOCKS = {"seconds", "tokens_per_s"}
PROMPT = "一生一代一双人，"


def digest(*things):
    "A short hash of bytes, or of anything that JSON can hold."
    sha = hashlib.sha256()
    for thing in things:
        as_bytes = isinstance(thing, bytes)
        sha.update(thing if as_bytes else json.dumps(thing).encode())
    return sha.hexdigest()[:16]


def python(*arguments, processes=1):
    "Run a script of the package, and return what it printed."
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def odd_strings(n_strings=2000):
    "Texts that nobody would write: any characters, much of what tokenizers stumble on."
    draw = random.Random(0)
    pieces = ["<s>", "</s>", "<0x41>", "<unk>", "\r\n", "\0", "   ", "e\u0301"]
    pieces += ["👩‍👩‍👧"]
    ranges = [(32, 127), (0x4E00, 0x9FA5), (0x0, 0x2FF), (0x1F300, 0x1F6FF)]
    texts = []
    for _ in range(n_strings):
        text = ""
        for _ in range(draw.randrange(40)):
            low, high = draw.choice(ranges)
            text += draw.choice([*pieces, chr(draw.randrange(low, high))])
        texts.append(text)
    return texts


def token_ids():
    "Hashes of a vocabulary, and of the ids and texts that come out of it."
    from minikl.tokenizer import Tokenizer

    with open(ROOT / "data" / "poetry.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    poems = [record["content"] for record in records]
    poems = [poem if isinstance(poem, str) else "\n".join(poem) for poem in poems]
    tokenizer = Tokenizer.train(poems, 4000)
    batched = [[int(i) for i in ids] for ids in tokenizer.encode_batch(poems)]
    odd = [tokenizer.encode(text) for text in odd_strings()]
    return {
        "vocabulary": digest(tokenizer.vocab),
        "poetry, encode_batch": digest(batched),
        "poetry, encode": digest([tokenizer.encode(poem) for poem in poems[:2000]]),
        "odd strings, encode": digest(odd),
        "odd strings, encode_batch": digest(
            [[int(i) for i in ids] for ids in tokenizer.encode_batch(odd_strings())]
        ),
        "odd strings, decoded": digest([tokenizer.decode(ids) for ids in odd]),
    }


def batches(n_steps=50):
    "A hash of what the model is given in the first steps of a run."
    from minikl.model import MiniKL
    from minikl.train import main

    seen = []
    loss = MiniKL.loss

    def watched(self, batch, *arguments, **options):
        for tensor in (batch.ids, batch.positions, batch.targets):
            seen.append(tensor.tolist())
        return loss(self, batch, *arguments, **options)

    MiniKL.loss = watched
    with tempfile.TemporaryDirectory() as folder:
        short = [f"--max_steps={n_steps}", "--eval_every=0", f"--out_dir={folder}"]
        main([*TINY, *RUNS["nested"], *short])
    MiniKL.loss = loss
    return {f"batches of {n_steps} steps": digest(seen[: 3 * n_steps])}


def results(folder):
    "Hashes of what a run wrote, its clocks left out."
    lines = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        numbers = json.loads(line)
        lines.append({name: numbers[name] for name in numbers if name not in CLOCKS})
    names = ("model.safetensors", "config.json", "vocab_dict.json", "samples.jsonl")
    return {
        "lines of metrics": len(lines),
        "metrics": digest(lines),
        **{name: digest((folder / name).read_bytes()) for name in names},
    }


def train(name, folder, *options):
    "Train into a folder → {what: hash}."
    processes = 2 if name == "sharded" else 1
    arguments = [*TINY, *RUNS[name], *options, f"--out_dir={folder}"]
    python("minikl/train.py", *arguments, processes=processes)
    return {f"{name}: {what}": value for what, value in results(folder).items()}


def texts(folder):
    "What a model writes: the likeliest text, and two drawn ones."
    common = ["minikl/generate.py", f"--model_path={folder}", f"--prompt={PROMPT}"]
    common += ["--max_new_tokens=50", "--device=cpu"]
    return {
        "greedy text": digest(python(*common, "--temperature=0")),
        "seeded texts": digest(python(*common, "--seed=3", "--num_samples=2")),
    }


def resumed(name, folder):
    "A finished run extended by 20 steps, in a copy of its folder."
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "out"
        shutil.copytree(folder, copy)
        found = train(name, copy, "--max_steps=80", "--save_every=30", "--resume")
    return {f"resumed {what}": value for what, value in found.items()}


def everything(runs, kept):
    "All hashes. Runs go into the folder `runs`; those in `kept` write and are resumed."
    found = {**token_ids(), **batches()}
    for name in RUNS:
        found |= train(name, runs / name, "--max_steps=60", "--save_every=30")
    for name in RUNS:
        found |= resumed(name, kept / name)
    for name in ("nested", "adamw"):
        new = texts(kept / name)
        found |= {f"{name}: {what}": value for what, value in new.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    folder = options.folder.resolve()
    sys.path.insert(0, str(ROOT))
    record = folder / "hashes.json"
    if options.verb == "record":
        folder.mkdir(parents=True)
        found = everything(folder, folder)
        record.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{len(found)} hashes of what must not change: {record}")
        return
    before = json.loads(record.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as runs:
        now = everything(Path(runs), folder)
    changed = [what for what in before if now.get(what) != before[what]]
    for what in before:
        print(f"{'CHANGED' if what in changed else 'equal  '}  {what}")
    print(f"{len(before) - len(changed)} of {len(before)} equal")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
