"""One measurement of the race, in one process with one thread: speed, or a training.

    python tools/fair.py SOURCE                      how many steps the entry may take
    python tools/fair.py SOURCE --steps=N --seed=0   train it so many steps

SOURCE is the name of an entry in minikl.ingredients, or a Python file with a line
ENTRY = Entry(…). The last line printed is the result as JSON. tools/race.py calls it.
"""
import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import fields, replace
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import mean, median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minikl.corpora import CORPORA, CannotFetch
from minikl.files import OneLineParser, UserError, one_line_errors
from minikl.ingredients import INGREDIENTS, REFERENCE, Entry
from minikl.learner import Learner
from minikl.model import MiniKL, MiniKLConfig
from minikl.options import LearningOptions, check, parse_options
from minikl.parallel import Ranks
from minikl.prepare import read_data
from minikl.shortcuts import weights_at_first

WORK = 300   # steps of the reference, 32 documents each
TURNS = 7    # of a comparison of speed
MOMENTS = 8   # of the run, in each turn
ENTRY_OPTIONS = {
    *(one.name for one in fields(MiniKLConfig)),
    *(one.name for one in fields(LearningOptions)),
    "vocab_dict_path",
} - {"seed"}


# ---- an entry becomes a model and what trains it


def entry_in(path):   # Entry
    "What a Python file calls ENTRY. `UserError` without one."
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    spec = spec_from_file_location("entry", path)
    module = module_from_spec(spec)
    sys.modules["entry"] = module   # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}"
        raise UserError(f"{where}: this is no Python: {error.msg}") from None
    entry = getattr(module, "ENTRY", None)
    if not isinstance(entry, Entry):
        raise UserError(f"{path}: expected a line ENTRY = Entry(…) in it")
    return entry


def entry_of(source):   # name of an ingredient, or path of a Python file → Entry
    "`UserError` where there is none, or one that changes what it must not."
    known = {REFERENCE.idea: REFERENCE, **INGREDIENTS}
    if source.endswith(".py"):
        entry = entry_in(source)
    elif source in known:
        entry = known[source]
    else:
        raise UserError(f"{source}: expected ENTRY.py or one of {', '.join(known)}")
    for name in entry.options.keys() - ENTRY_OPTIONS:
        raise UserError(
            f"{source}: the option {name!r} is not an entry's to choose; those of the "
            "model and of learning are, but for the seed"
        )
    return entry


def options_of(entry, corpus, seed=0):   # Options
    chosen = REFERENCE.options | entry.options
    chosen |= {"corpus": corpus, "seed": seed, "device": "cpu", "threads": 1}
    options = parse_options([f"--{name}={value}" for name, value in chosen.items()])
    check(options, 1)
    return options


def is_reference(entry):   # bool
    same = options_of(entry, "poetry") == options_of(REFERENCE, "poetry")
    return same and entry.learner is Learner


@lru_cache
def data_for(corpus, vocab_dict_path, vocab_size, max_seq_len):   # TrainingData
    "Read once per process; it takes none of an entry's time."
    try:
        CORPORA[corpus]()
    except CannotFetch as error:
        raise UserError(f"the race needs the corpus {corpus}: {error}") from None
    entry = Entry("", {"vocab_size": vocab_size, "max_seq_len": max_seq_len})
    options = options_of(entry, corpus)
    options.data.vocab_dict_path = vocab_dict_path
    return read_data(options.data, options.model, Ranks(threads=1, device="cpu"))


def data_of(entry, corpus):   # TrainingData
    options = options_of(entry, corpus)
    model = options.model
    vocabulary = options.data.vocab_dict_path
    return data_for(corpus, vocabulary, model.vocab_size, model.max_seq_len)


def fitted(weights, own):   # {name: tensor}
    "Of weights from counts what another model has, too; the others stay its own."
    counted = ("embed.weight", "head.weight", "w_o.weight", "w_down.weight")
    for name, weight in weights:
        same = name in own and own[name].shape == weight.shape
        if same and name.endswith(counted):
            own[name] = weight
    return own


def learner_of(entry, corpus, seed=0):   # Learner
    data = data_of(entry, corpus)
    options = options_of(entry, corpus, seed)
    config = replace(options.model, vocab_size=len(data.tokenizer))
    ranks = Ranks(threads=1, device="cpu")
    weights = weights_at_first(options, config, data.documents, ranks)
    model_class = entry.learner.model_class
    if weights and model_class is not MiniKL:
        torch.manual_seed(seed)
        weights = fitted(weights, model_class(config).state_dict()).items()
    machine = options.machine
    return entry.learner(config, options.learning, machine, ranks, weights)


# ---- what a step costs, and how many an entry gets


def start(entry, corpus):   # (Learner, seconds until the end of its first step)
    documents = data_of(entry, corpus).documents
    begun = time.process_time()
    learner = learner_of(entry, corpus)
    learner.step(documents, 0, 0.001)
    return learner, time.process_time() - begun


def sweep(learner, documents, turn):   # seconds of processor time for a step
    "Steps at moments spread over the whole run, since an entry may change on its way."
    n_steps = max(3, round(MOMENTS * 32 / learner.learning.batch_size))
    begun = time.process_time()
    for i in range(n_steps):
        learner.step(documents, turn * n_steps + i, (i + 0.5) / n_steps)
    return (time.process_time() - begun) / n_steps


def compare_speed(entry, corpus, work):   # {"ratio", "turns", "start", "steps"}
    """How many steps of an entry cost as much as `work` steps of the reference.

    Both take turns in this process. What the entry needs before its steps, such as
    counting what its first weights come from, is taken off, in steps of the reference.
    """
    both = {"reference": REFERENCE, "entry": entry}
    documents = {name: data_of(one, corpus).documents for name, one in both.items()}
    starts = defaultdict(list)
    learners = {}
    for _ in range(3):
        for name, one in both.items():
            learners[name], seconds = start(one, corpus)
            starts[name].append(seconds)
    seconds = defaultdict(list)
    order = list(both)
    for turn in range(TURNS):
        for name in order:
            seconds[name].append(sweep(learners[name], documents[name], turn))
        order.reverse()
    pairs = zip(seconds["entry"], seconds["reference"], strict=True)
    turns = [ours / theirs for ours, theirs in pairs]
    before = {name: median(starts[name]) - median(seconds[name]) for name in both}
    later = (before["entry"] - before["reference"]) / median(seconds["reference"])
    ratio, later = round(median(turns), 3), round(max(0, later), 1)
    if is_reference(entry):
        ratio, later = 1.0, 0.0   # by definition; its turns tell how exact this is
    steps = max(1, round((work - later) / ratio))
    turns = [round(one, 3) for one in turns]
    return {"ratio": ratio, "turns": turns, "start": later, "steps": steps}


def train(entry, corpus, seed, n_steps):   # {"bits", "loss", "parameters"}
    learner = learner_of(entry, corpus, seed)
    data = data_of(entry, corpus)
    losses = []
    for step in range(n_steps):
        result = learner.step(data.documents, step, (step + 0.5) / n_steps)
        losses.append(result.nats / result.n_targets)
    return {
        "bits": round(learner.bits_per_char(data.held_out), 4),
        "loss": round(mean(losses[-max(1, n_steps // 10) :]), 4),
        "parameters": sum(weight.numel() for weight in learner.model.parameters()),
    }


# ---- the command line


def main(argv=None):
    parser = OneLineParser(
        "fair.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source")
    add("--steps", type=int, default=0)
    add("--seed", type=int, default=0)
    add("--work", type=int, default=WORK)
    add("--corpus", choices=CORPORA, default="poetry")
    with one_line_errors():
        options = parser.parse_args(argv)
        entry = entry_of(options.source)
        if options.steps:
            found = train(entry, options.corpus, options.seed, options.steps)
        else:
            found = compare_speed(entry, options.corpus, options.work)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
