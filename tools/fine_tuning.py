"""How well are requests obeyed? Arms that differ in one thing, trained as many steps.

    python tools/fine_tuning.py train [ARM …]   train arms that are not trained yet, one
                                                after the other, and examine them (about
                                                3 minutes of one core each)
    python tools/fine_tuning.py collect         write what was measured to
                                                nbs/measured/requests.json

They begin with the model that `make run` leaves in out/. Runs lie in out-requests/.
"""
import argparse
import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import minikl.chat
import minikl.instruct
import minikl.prepare
import minikl.train
from minikl.corpora import DATA, build_poetry
from minikl.data import Documents, TokenFile, build_tokens, encode_prompt
from minikl.files import write_atomically
from minikl.form import clauses, home_judge, split_records
from minikl.instruct import answers, build_requests
from minikl.layouts import Nested
from minikl.model import MiniKL
from minikl.parallel import Ranks, evaluate
from minikl.step import Precision
from minikl.tokenizer import Tokenizer

BASE = ROOT / "out"
OUT = ROOT / "out-requests"
MEASURED = ROOT / "nbs" / "measured" / "requests.json"
RECIPE = (
    "--batch_size=16",
    "--lr=0.02",
    "--muon_lr=0.02",
    "--decay=cosine",
    "--candidates=0",
)
KNOBS = {"temperature": 0.8, "top_p": 0.95}
USUAL = {
    "replay": 0.25,
    "seed": 0,
    "steps": 1400,
    "merges": False,   # tokens of many characters in conversations, too
}
ARMS = {
    "default": {},
    "default, seed 1": {"seed": 1},
    "default, seed 2": {"seed": 2},
    "replay 0": {"replay": 0},
    "replay 1": {"replay": 1},
    "replay 1, 2,800 steps": {"replay": 1, "steps": 2800},
    "merges": {"merges": True},
}


def merged(text, tokenizer):   # in place of `spelt`
    return tokenizer.encode(text)


def patched(arm):   # context in which an arm is trained and examined
    "What is no option of train.py. Tokens of another kind go to a cache of their own."
    stack = ExitStack()
    if arm["merges"]:
        home = OUT / "merges, data"
        stack.enter_context(patch.object(minikl.chat, "spelt", merged))
        stack.enter_context(patch.object(minikl.instruct, "spelt", merged))
        stack.enter_context(patch.object(minikl.prepare, "DATA", home))
    return stack


# ---- the examination


def plain_bits(model, tokenizer):   # bits per character
    "Held-out poems, as they stand in the corpus, without a request."
    file = TokenFile(build_tokens(build_poetry(), tokenizer, DATA / "cache"))
    held_out = file.split(0.03)[1]
    documents = Documents(file, held_out, model.config.max_seq_len)
    return evaluate(model, documents, Nested, Precision("fp32"), Ranks(1))


def shares(tunes, texts):   # {"form", "passes"}
    judge = home_judge()
    verdicts = [judge.examine(*pair) for pair in zip(tunes, texts, strict=True)]
    return {
        "texts": len(texts),
        "form": mean(verdict.form for verdict in verdicts),
        "passes": mean(verdict.passes for verdict in verdicts),
    }


def first_line(text):   # with its mark
    return "".join(clauses(text)[0])


def examine(folder):   # what a trained model does, {kind of request: shares}
    model = MiniKL.load(folder).eval()
    tokenizer = Tokenizer.load(folder / "vocab_dict.json")
    commonest = home_judge().commonest(12)
    kept, held_out = split_records(build_poetry())
    found = {"plain bits": plain_bits(model, tokenizer)}

    tunes = commonest * 32
    requests = [f"写一首《{tune}》" for tune in tunes]
    texts = answers(model, tokenizer, requests, **KNOBS)
    found["tune"] = shares(tunes, texts)

    draw = random.Random(0)
    poems = [record for record in kept if record["title"] in commonest]
    asked = draw.sample([record for record in poems if record["author"]], 384)
    tunes = [record["title"] for record in asked]
    requests = [f"仿{record['author']}写一首《{record['title']}》" for record in asked]
    found["author"] = shares(tunes, answers(model, tokenizer, requests, **KNOBS))

    asked = [record for record in held_out if record["title"] in commonest] * 3
    tunes = [record["title"] for record in asked]
    lines = [first_line(record["content"]) for record in asked]
    pairs = zip(lines, tunes, strict=True)
    requests = [f"以“{line}”开头写一首《{tune}》" for line, tune in pairs]
    texts = answers(model, tokenizer, requests, **KNOBS)
    found["first line"] = shares(tunes, texts)
    obeyed = []
    characters = []
    for line, text in zip(lines, texts, strict=True):
        obeyed.append(text.startswith(line))
        pairs = zip(line, text, strict=False)
        characters.append(sum(a == b for a, b in pairs) / len(line))
    found["first line"] |= {"obeyed": mean(obeyed), "characters": mean(characters)}
    texts = answers(model, tokenizer, requests, lines, **KNOBS)
    found["first line given"] = shares(tunes, texts)
    return found


# ---- the commands


def train(names):
    "Train and examine arms one after the other, those that are not there yet."
    for name in names or ARMS:
        arm = USUAL | ARMS[name]
        folder = OUT / name
        with patched(arm):
            data = OUT / f"{name}.jsonl"
            if not (folder / "run.json").exists():
                build_requests(data, replay=arm["replay"])
                files = [f"--init_path={BASE}", f"--data_jsonl_path={data}"]
                more = [f"--seed={arm['seed']}", f"--max_steps={arm['steps']}"]
                more += ["--threads=1", "--resume"]
                out = f"--out_dir={folder}"
                minikl.train.main([*files, *RECIPE, *more, out])
            if not (folder / "found.json").exists():
                found = json.dumps(examine(folder), ensure_ascii=False, indent=1)
                write_atomically(folder / "found.json", found)
                print(name, found, flush=True)


def examine_base():   # what the base model does, to which a request is a beginning
    model = MiniKL.load(BASE).eval()
    tokenizer = Tokenizer.load(BASE / "vocab_dict.json")
    tunes = home_judge().commonest(12) * 32
    requests = [f"写一首《{tune}》" for tune in tunes]
    with patch.object(minikl.instruct, "encode_request", encode_prompt):
        texts = answers(model, tokenizer, requests, **KNOBS)
    bits = plain_bits(model, tokenizer)
    return {"plain bits": bits, "tune": shares(tunes, texts)}


def collect(names):
    "Gather what was found, beside what the base model does."
    measured = {"base": examine_base()}
    for name in ARMS:
        path = OUT / name / "found.json"
        if path.exists():
            measured[name] = json.loads(path.read_text())
            run = json.loads((OUT / name / "run.json").read_text())
            measured[name]["bits"] = run["bits_per_char"]["MiniKL"]
    text = json.dumps(measured, ensure_ascii=False, indent=1)
    write_atomically(MEASURED, text + "\n")


COMMANDS = {"train": train, "collect": collect}


def main(argv=None):
    parser = argparse.ArgumentParser(
        "fine_tuning.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)} (default: all)")
    options = parser.parse_args(argv)
    if unknown := set(options.arms) - ARMS.keys():
        parser.error(f"no such arm: {', '.join(unknown)}")
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    COMMANDS[options.what](options.arms)


if __name__ == "__main__":
    main()
