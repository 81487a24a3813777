"MiniKL beside the well-known libraries, in one process, by turns: python tools/versus.py tokenizer"
import os
import statistics
import sys
import time

THREADS = 2
os.environ.update(RAYON_NUM_THREADS=str(THREADS), TOKENIZERS_PARALLELISM="true")

import torch

import minikl.data
from minikl.tokenizer import SPLIT, Tokenizer


def by_turns(
    arms,          # {name: function without arguments}
    repeats=5,
):                 # ({name: median seconds}, {name: last result})
    "Each arm once a turn, in turn, so that whatever else the machine does hits all of them."
    times, results = {name: [] for name in arms}, {}
    for _ in range(repeats):
        for name, run in arms.items():
            start = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}, results


def table(title, rows):
    "Rows of text in columns, the first row the heads."
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}")
    for row in rows: print("  " + "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))


def tokenizer(vocab_size=12_000):
    "Training and encoding of the poetry corpus, from characters, against tokenizers, rustbpe and tiktoken."
    import rustbpe
    import tiktoken
    import tokenizers as hf
    texts = list(minikl.data.read_jsonl(minikl.data.build_poetry()))
    alphabet, n_mb = sorted(set("".join(texts))), sum(len(text.encode()) for text in texts) / 1e6

    def train_hf():
        other = hf.Tokenizer(hf.models.BPE())
        other.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(SPLIT.pattern), "isolated")
        other.train_from_iterator(texts, hf.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, min_frequency=2, show_progress=False))
        return other

    def train_rustbpe():
        other = rustbpe.Tokenizer()
        other.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT.pattern)
        return other

    trainers = {"minikl": lambda: Tokenizer.train(texts, vocab_size + 256, special_tokens=(), character_coverage=1),
                "tokenizers.BpeTrainer": train_hf, "rustbpe (from bytes)": train_rustbpe}
    times, trained = by_turns(trainers, repeats=3)
    ours, n_merges = trained["minikl"], len(trained["minikl"].merges)
    table(f"training: {n_mb:.1f} MB of poetry, {len(alphabet):,} characters and {n_merges:,} merges, {THREADS} threads",
          [("", "time (s)", "minikl's time is")] + [(name, f"{time_s:.2f}", f"{times['minikl'] / time_s:.2f} x") for name, time_s in times.items()])

    merges = [tuple(ours.tokens[ord(part)] for part in pair) for pair in ours.merges]
    same = hf.Tokenizer(hf.models.BPE(vocab=ours.vocab, merges=merges))
    same.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(SPLIT.pattern), "isolated")
    bytewise = tiktoken.Encoding("rustbpe", pat_str=SPLIT.pattern, special_tokens={},
                                 mergeable_ranks={bytes(token): i for token, i in trained["rustbpe (from bytes)"].get_mergeable_ranks()})
    def encode_minikl():
        ours.cache.clear()
        return ours.encode_batch(texts)
    encoders = {"minikl": encode_minikl, "tokenizers.encode_batch": lambda: same.encode_batch(texts),
                "tokenizers.encode_batch_fast": lambda: same.encode_batch_fast(texts),
                "tiktoken (from bytes)": lambda: bytewise.encode_ordinary_batch(texts, num_threads=THREADS)}
    times, encoded = by_turns(encoders)
    for name in ("tokenizers.encode_batch", "tokenizers.encode_batch_fast"):
        assert encoded["minikl"] == [encoding.ids for encoding in encoded[name]], f"{name} gives other ids"
    table(f"encoding: the same corpus, {sum(map(len, encoded['minikl'])):,} tokens; minikl and tokenizers give the same ids",
          [("", "MB/s", "minikl's throughput is")] + [(name, f"{n_mb / time_s:.1f}", f"{time_s / times['minikl']:.2f} x") for name, time_s in times.items()])


COMMANDS = {"tokenizer": tokenizer}

if __name__ == "__main__":
    names = sys.argv[1:]
    if not names or not COMMANDS.keys() >= set(names): sys.exit(f"usage: python tools/versus.py {' | '.join(COMMANDS)}")
    torch.set_num_threads(THREADS)
    for name in names: COMMANDS[name]()
