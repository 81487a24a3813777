"""MiniKL beside the library that people would use instead, in one process and in turns.

    python tools/versus.py tokenizer [--quick]              training and encoding against tokenizers, rustbpe and tiktoken
    python tools/versus.py llama [--quick] [--compile]      training and generation against transformers' LlamaForCausalLM
"""
import argparse
import os
import time
from copy import deepcopy
from importlib.util import find_spec
from statistics import median

import torch


def race(
    arms,     # {name: function without arguments}
    repeats,  # timed turns of each arm, after one that is not timed
):            # {name: list of seconds, one per turn}
    "All arms in turns, so that a busy moment of the machine meets all of them."
    for arm in arms.values(): arm()
    seconds = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, slow, fast):
    "How many times as fast one arm is as another: the median over turns."
    return median(a / b for a, b in zip(seconds[slow], seconds[fast]))


def report(
    title,      # what was done
    seconds,    # from `race`
    baselines,  # {column: arm}, the arms to compare with
    amount,     # how much of `unit` an arm did in one turn
    unit="tokens",
):
    "Print one line per arm. A ratio is the baseline's time divided by the arm's own, median over turns."
    width = 2 + max(map(len, baselines))
    columns = "".join(f"{column:>{width}}" for column in baselines)
    print(f"\n{title}\n{'':54}times as fast as\n{'':30}{'ms':>8}{unit + '/s':>12}{columns}")
    for name, turns in seconds.items():
        ratios = "".join(f"{ratio(seconds, baseline, name):>{width}.2f}" for baseline in baselines.values())
        print(f"{name:30}{1000 * median(turns):>8,.0f}{amount / median(turns):>12,.0f}{ratios}")


def llama_pair(config):
    "One set of random weights, twice: (MiniKL, {attention: LlamaForCausalLM})."
    from transformers import LlamaConfig, LlamaForCausalLM

    from minikl.llama import llama_config, llama_weights
    from minikl.model import MiniKL
    ours, theirs = MiniKL(config), {}
    for attention in ("eager", "sdpa"):
        model = theirs[f"transformers, {attention}"] = LlamaForCausalLM(LlamaConfig(**llama_config(config), attn_implementation=attention))
        model.load_state_dict(llama_weights(ours))
    return ours, theirs


def training_arms(ours, theirs, docs, compiled=False):
    "Forward, loss, backward, AdamW: {name: step}, each checked to have the loss and the gradient of the others."
    from torch.nn.utils.rnn import pad_sequence

    from minikl.bench import check_equal
    from minikl.nested import Nested
    from minikl.train import compile_blocks
    n_targets = sum(len(doc) - 1 for doc in docs)
    ids, labels = (pad_sequence(docs, batch_first=True, padding_value=fill) for fill in (0, -100))
    models = {"MiniKL, nested": ours, **theirs}
    losses = {name: lambda model=model: model(input_ids=ids, labels=labels, use_cache=False).loss for name, model in theirs.items()}
    batch = Nested(docs)
    losses = {"MiniKL, nested": lambda: ours.loss(batch)[0] / n_targets, **losses}
    if compiled:
        models.update({f"{name}, compiled": model for name, model in models.items()})
        fast_ours, fast_theirs = deepcopy(ours), torch.compile(theirs["transformers, sdpa"])
        fast_batch = compile_blocks(fast_ours, Nested)(docs)   # as the trainer does it
        models["MiniKL, nested, compiled"] = fast_ours
        losses["MiniKL, nested, compiled"] = lambda: fast_ours.loss(fast_batch)[0] / n_targets
        losses["transformers, sdpa, compiled"] = lambda: fast_theirs(input_ids=ids, labels=labels, use_cache=False).loss
    arms, found = {}, {}
    for name, loss in losses.items():
        weights = list(models[name].train().parameters())
        value = loss()
        value.backward()
        found[name] = value.item(), torch.stack([weight.grad.norm() for weight in weights]).norm().item()
        optimizer = torch.optim.AdamW(weights, lr=1e-9, fused=True)
        def step(loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        optimizer.zero_grad()
        arms[name] = step
    check_equal(found)
    return arms


def matmul_arm(config, n_tokens):
    "Nothing but the products of all linear layers, first to last and back, each on tensors of its own that are already there: (arm, FLOPs)."
    kv = config.num_kv_heads * config.d_head
    inside = [(config.d_model, config.d_model)] * 2 + [(config.d_model, kv)] * 2 + [(config.d_model, config.d_ff)] * 2 + [(config.d_ff, config.d_model)]
    shapes = inside * config.num_layers + [(config.d_model, config.vocab_size)]
    tensors = [(torch.randn(n_tokens, rows), torch.randn(columns, rows), torch.randn(n_tokens, columns)) for rows, columns in shapes]
    def arm():
        for x, weight, _ in tensors: x @ weight.T
        for x, weight, gradient in reversed(tensors): gradient @ weight, gradient.T @ x
    return arm, sum(6 * n_tokens * rows * columns for rows, columns in shapes)


def llama(options):
    "Training steps on full-length and on ragged documents, matrix products alone, cached greedy generation."
    import transformers

    from minikl.bench import random_docs, zipf_lengths
    from minikl.generate import generate
    from minikl.model import MiniKLConfig
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    size = dict(d_model=128, num_heads=4, num_kv_heads=4, num_layers=2, vocab_size=1000) if options.quick else dict()
    config, n_docs, length = MiniKLConfig(max_seq_len=1024, **size), 8, 64 if options.quick else 256
    torch.manual_seed(0)
    ours, theirs = llama_pair(config)
    print(f"transformers {transformers.__version__}; d_model {config.d_model}, {config.num_layers} layers, vocabulary {config.vocab_size}")
    baselines = {name.split(", ")[1]: name for name in theirs}

    docs = random_docs([length] * n_docs, config.vocab_size)
    arms = training_arms(ours, theirs, docs, options.compile)
    products, flops = matmul_arm(config, n_docs * length)
    seconds = race({**arms, "matrix products alone": products}, options.repeats)
    results = {"full length": {name: 1000 * median(turns) for name, turns in seconds.items()}}
    alone = seconds.pop("matrix products alone")
    report(f"Training step, {n_docs} documents of {length} tokens", seconds, baselines, n_docs * length)
    print(f"matrix products of the linear layers alone: {1000 * median(alone):,.0f} ms, {flops / median(alone) / 1e9:,.0f} GFLOP/s; "
          "share of a step: " + ", ".join(f"{name} {median(a / b for a, b in zip(alone, seconds[name])):.0%}" for name in seconds))
    attention = 6 * config.num_layers * n_docs * length**2 * config.d_model   # two products, forward and twice that backward, the causal half of each
    print(f"with attention's own products, {attention / flops:.1%} more FLOPs, at that rate: "
          + ", ".join(f"{name} {(1 + attention / flops) * median(a / b for a, b in zip(alone, seconds[name])):.0%}" for name in seconds))

    lengths = zipf_lengths(n_docs * 4, length)
    docs = random_docs(lengths, config.vocab_size)
    seconds = race(training_arms(ours, theirs, docs), options.repeats)
    report(f"Training step, {len(docs)} documents of 1 … {max(lengths)} tokens, {len(docs) * max(lengths) / sum(lengths):.1f} padded for each real one", seconds, baselines, sum(lengths))

    prompt, n_new = random_docs([32], config.vocab_size)[0], 32 if options.quick else 128
    llama_arm = lambda model: model.generate(prompt[None], do_sample=False, eos_token_id=None, max_new_tokens=n_new)[0, 32:].tolist()
    arms = {"MiniKL, cache": lambda: list(generate(ours.eval(), prompt.tolist(), n_new, temperature=0)),
            **{name: lambda model=model.eval(): llama_arm(model) for name, model in theirs.items()}}
    if len({tuple(arm()) for arm in arms.values()}) > 1: raise ValueError("greedy generation differs")
    results["generation"] = race(arms, options.repeats)
    report(f"Greedy generation, 32 + {n_new} tokens, with cache", results["generation"], baselines, n_new)
    return results


def tokenizer(options):
    "Training and encoding of the poetry corpus, from characters, against tokenizers, rustbpe and tiktoken."
    import tokenizers as hf

    from minikl.corpora import build_poetry, build_toy
    from minikl.jsonl import read_jsonl
    from minikl.tokenizer import SPLIT, Tokenizer
    texts = list(read_jsonl(build_toy() if options.quick else build_poetry()))
    vocab_size, alphabet, n_mb = 1000 if options.quick else 12_000, sorted(set("".join(texts))), sum(len(text.encode()) for text in texts) / 1e6
    def cut(other):
        other.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(SPLIT.pattern), "isolated")
        return other

    trained = {}
    def train_minikl(): trained["minikl"] = Tokenizer.train(texts, vocab_size + 256, special_tokens=(), character_coverage=1)
    def train_hf():
        trainer = hf.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
        cut(hf.Tokenizer(hf.models.BPE())).train_from_iterator(texts, trainer)
    arms = {"MiniKL": train_minikl, "tokenizers.BpeTrainer": train_hf}
    both = find_spec("rustbpe") and find_spec("tiktoken")   # optional: pip install rustbpe tiktoken
    if both:
        import rustbpe
        import tiktoken
        def train_rustbpe():
            trained["rustbpe"] = rustbpe.Tokenizer()
            trained["rustbpe"].train_from_iterator(iter(texts), vocab_size, pattern=SPLIT.pattern)
        arms["rustbpe, from bytes"] = train_rustbpe
    seconds = race(arms, min(options.repeats, 5))
    ours = trained["minikl"]
    print(f"tokenizers {hf.__version__}; {n_mb:.1f} MB of text, {len(alphabet):,} characters, {len(ours.merges):,} merges")
    report("Training", seconds, {"BpeTrainer": "tokenizers.BpeTrainer"}, 1000 * n_mb, "KB")

    theirs = cut(hf.Tokenizer(hf.models.BPE(vocab=ours.vocab, merges=[tuple(ours.tokens[ord(part)] for part in pair) for pair in ours.merges])))
    if [encoding.ids for encoding in theirs.encode_batch(texts)] != ours.encode_batch(texts): raise ValueError("the ids differ")
    arms = {"MiniKL, encode_batch": lambda: ours.encode_batch(texts), "tokenizers, encode_batch": lambda: theirs.encode_batch(texts),
            "tokenizers, encode_batch_fast": lambda: theirs.encode_batch_fast(texts)}
    if both:
        ranks = {bytes(token): i for token, i in trained["rustbpe"].get_mergeable_ranks()}
        bytewise = tiktoken.Encoding("rustbpe", pat_str=SPLIT.pattern, special_tokens={}, mergeable_ranks=ranks)
        arms["tiktoken, from bytes"] = lambda: bytewise.encode_ordinary_batch(texts, num_threads=options.threads)
    seconds = race(arms, options.repeats)
    report("Encoding, same ids as tokenizers", seconds, {name: f"tokenizers, {name}" for name in ("encode_batch", "encode_batch_fast")}, 1000 * n_mb, "KB")


COMMANDS = {"tokenizer": tokenizer, "llama": llama}


def main(argv=None):
    parser = argparse.ArgumentParser("versus.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile (needs a C++ compiler)")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns; the table shows medians")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(options.threads))
    torch.set_num_threads(options.threads)
    print(f"cpu, float32, {options.threads} threads, torch {torch.__version__}, median of {options.repeats} turns", end=", ")
    return COMMANDS[options.what](options)


if __name__ == "__main__": main()
