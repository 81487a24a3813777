"""MiniKL beside the library that people would use instead, in one process and in turns.

    python tools/versus.py tokenizer [--quick]
        training and encoding, against tokenizers, rustbpe and tiktoken
    python tools/versus.py llama [--quick] [--compile]
        training and generation, against transformers' LlamaForCausalLM
"""
import argparse
import os
import time
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch


def race(
    arms,     # {name: function without arguments}
    repeats,  # timed turns of each arm, after one that is not timed
):            # {name: list of seconds, one per turn}
    "All arms in turns, so that a busy moment of the machine meets all of them."
    for arm in arms.values():
        arm()
    seconds = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - start)
    return seconds


class Kept:
    "A function that keeps what it returned last: an arm of `race` trains something."
    def __init__(self, function):
        self.function = function
        self.result = None

    def __call__(self):
        self.result = self.function()


def ratio(
    slow,  # list of seconds, one per turn
    fast,  # the same of another arm
):         # float
    "How many times as fast one arm is as another: the median over turns."
    return median(a / b for a, b in zip(slow, fast, strict=True))


def report(
    title,      # what was done
    seconds,    # from `race`
    baselines,  # {column: arm}, the arms to compare with
    amount,     # how much of `unit` an arm did in one turn
    unit="tokens",
):
    """Print one line per arm.

    A ratio is the baseline's time divided by the arm's own, median over turns.
    """
    width = 2 + max(map(len, baselines))
    columns = "".join(f"{column:>{width}}" for column in baselines)
    print(f"\n{title}")
    print(f"{'':54}times as fast as")
    print(f"{'':30}{'ms':>8}{unit + '/s':>12}{columns}")
    for name, turns in seconds.items():
        ratios = [ratio(seconds[baseline], turns) for baseline in baselines.values()]
        columns = "".join(f"{number:>{width}.2f}" for number in ratios)
        ms = 1000 * median(turns)
        print(f"{name:30}{ms:>8,.0f}{amount / median(turns):>12,.0f}{columns}")


# ---- llama


def llama_pair(config):
    "One set of random weights, twice: (MiniKL, {attention: LlamaForCausalLM})."
    from transformers import LlamaConfig, LlamaForCausalLM

    from minikl.llama import llama_config, llama_weights
    from minikl.model import MiniKL
    ours = MiniKL(config)
    theirs = {}
    for attention in ("eager", "sdpa"):
        settings = LlamaConfig(**llama_config(config), attn_implementation=attention)
        model = LlamaForCausalLM(settings)
        model.load_state_dict(llama_weights(ours))
        theirs[f"transformers, {attention}"] = model
    return ours, theirs


def training_step(loss, weights):   # function without arguments
    "Loss, backward, AdamW."
    optimizer = torch.optim.AdamW(weights, lr=1e-9, fused=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    optimizer.zero_grad()
    return step


def loss_and_gradient_norm(loss, weights):   # (float, float)
    value = loss()
    value.backward()
    norms = torch.stack([weight.grad.norm() for weight in weights])
    return value.item(), norms.norm().item()


def training_arms(
    ours,    # MiniKL
    theirs,  # {name: LlamaForCausalLM}
    docs,    # list of 1-D id tensors
    compiled=False,
):           # {name: step}
    """Forward, loss, backward, AdamW.

    Each is checked to have the loss and the gradient of the others.
    """
    from torch.nn.utils.rnn import pad_sequence

    from minikl.bench import check_equal
    from minikl.layouts import Nested
    from minikl.learner import compile_blocks
    n_targets = sum(len(doc) - 1 for doc in docs)
    ids = pad_sequence(docs, batch_first=True, padding_value=0)
    labels = pad_sequence(docs, batch_first=True, padding_value=-100)

    def our_loss(model, batch):
        return model.loss(batch)[0] / n_targets

    def their_loss(model):
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    models = {"MiniKL, nested": ours, **theirs}
    losses = {"MiniKL, nested": partial(our_loss, ours, Nested(docs))}
    losses |= {name: partial(their_loss, model) for name, model in theirs.items()}
    if compiled:
        models |= {f"{name}, compiled": model for name, model in models.items()}
        fast_ours = deepcopy(ours)
        fast_theirs = torch.compile(theirs["transformers, sdpa"])
        fast_batch = compile_blocks(fast_ours, Nested)(docs)   # as the trainer does it
        models["MiniKL, nested, compiled"] = fast_ours
        losses["MiniKL, nested, compiled"] = partial(our_loss, fast_ours, fast_batch)
        losses["transformers, sdpa, compiled"] = partial(their_loss, fast_theirs)
    arms = {}
    found = {}
    for name, loss in losses.items():
        weights = list(models[name].train().parameters())
        found[name] = loss_and_gradient_norm(loss, weights)
        arms[name] = training_step(loss, weights)
    check_equal(found)
    return arms


def matmul_arm(config, n_tokens):   # (arm, FLOPs)
    """Nothing but the products of all linear layers, first to last and back.

    Each works on tensors of its own that are already there.
    """
    kv = config.num_kv_heads * config.d_head
    block = [
        (config.d_model, config.d_model),
        (config.d_model, config.d_model),
        (config.d_model, kv),
        (config.d_model, kv),
        (config.d_model, config.d_ff),
        (config.d_model, config.d_ff),
        (config.d_ff, config.d_model),
    ]
    shapes = block * config.num_layers + [(config.d_model, config.vocab_size)]
    tensors = []
    for rows, columns in shapes:
        x = torch.randn(n_tokens, rows)
        weight = torch.randn(columns, rows)
        gradient = torch.randn(n_tokens, columns)
        tensors.append((x, weight, gradient))

    def arm():
        for x, weight, _ in tensors:
            torch.matmul(x, weight.T)
        for x, weight, gradient in reversed(tensors):
            torch.matmul(gradient, weight)
            torch.matmul(gradient.T, x)

    return arm, sum(6 * n_tokens * rows * columns for rows, columns in shapes)


def full_length_race(ours, theirs, baselines, options):   # {name: ms}
    "Training steps on documents of one length, beside matrix products alone."
    from minikl.bench import random_docs
    config = ours.config
    n_docs = 8
    length = 64 if options.quick else 256
    n_tokens = n_docs * length
    docs = random_docs([length] * n_docs, config.vocab_size)
    arms = training_arms(ours, theirs, docs, options.compile)
    products, flops = matmul_arm(config, n_tokens)
    arms["matrix products alone"] = products
    seconds = race(arms, options.repeats)
    found = {name: 1000 * median(turns) for name, turns in seconds.items()}
    alone = seconds.pop("matrix products alone")
    title = f"Training step, {n_docs} documents of {length} tokens"
    report(title, seconds, baselines, n_tokens)

    shares = {name: ratio(alone, turns) for name, turns in seconds.items()}
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    print(
        "matrix products of the linear layers alone: "
        f"{1000 * median(alone):,.0f} ms, {flops / median(alone) / 1e9:,.0f} GFLOP/s; "
        f"share of a step: {shown}"
    )
    # attention has two products, forward and twice that backward, the causal half of
    # each
    attention = 6 * config.num_layers * n_docs * length**2 * config.d_model
    more = attention / flops
    shown = ", ".join(
        f"{name} {(1 + more) * share:.0%}" for name, share in shares.items()
    )
    print(
        f"with attention's own products, {more:.1%} more FLOPs, at that rate: {shown}"
    )
    return found


def ragged_race(ours, theirs, baselines, options):
    "Training steps on documents of all lengths."
    from minikl.bench import random_docs, zipf_lengths
    lengths = zipf_lengths(32, 64 if options.quick else 256)
    docs = random_docs(lengths, ours.config.vocab_size)
    seconds = race(training_arms(ours, theirs, docs), options.repeats)
    longest = max(lengths)
    padded = len(docs) * longest / sum(lengths)
    title = (
        f"Training step, {len(docs)} documents of 1 … {longest} tokens, "
        f"{padded:.1f} padded for each real one"
    )
    report(title, seconds, baselines, sum(lengths))


def generation_race(ours, theirs, baselines, options):   # {name: list of seconds}
    "Greedy generation with a cache; both have to write the same."
    from minikl.bench import random_docs
    from minikl.generate import generate
    n_new = 32 if options.quick else 128
    prompt = random_docs([32], ours.config.vocab_size)[0]

    def our_text():
        return list(generate(ours.eval(), prompt.tolist(), n_new, temperature=0))

    def their_text(model):
        ids = model.generate(
            prompt[None], do_sample=False, eos_token_id=None, max_new_tokens=n_new
        )
        return ids[0, 32:].tolist()

    arms = {"MiniKL, cache": our_text}
    arms |= {name: partial(their_text, model.eval()) for name, model in theirs.items()}
    texts = {tuple(arm()) for arm in arms.values()}
    if len(texts) > 1:
        raise ValueError("greedy generation differs")
    seconds = race(arms, options.repeats)
    title = f"Greedy generation, 32 + {n_new} tokens, with cache"
    report(title, seconds, baselines, n_new)
    return seconds


def llama(options):   # {"full length": {name: ms}, "generation": {name: seconds}}
    """Four races against transformers.

    Training steps on full-length and on ragged documents, matrix products alone, cached
    greedy generation.
    """
    import transformers

    from minikl.model import MiniKLConfig
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    size = {}
    if options.quick:
        size = {"d_model": 128, "num_heads": 4, "num_kv_heads": 4}
        size |= {"num_layers": 2, "vocab_size": 1000}
    config = MiniKLConfig(max_seq_len=1024, **size)
    torch.manual_seed(0)
    ours, theirs = llama_pair(config)
    print(
        f"transformers {transformers.__version__}; d_model {config.d_model}, "
        f"{config.num_layers} layers, vocabulary {config.vocab_size}"
    )
    baselines = {name.split(", ")[1]: name for name in theirs}
    full_length = full_length_race(ours, theirs, baselines, options)
    ragged_race(ours, theirs, baselines, options)
    generation = generation_race(ours, theirs, baselines, options)
    return {"full length": full_length, "generation": generation}


# ---- tokenizer


def cut_like_ours(other):
    "Have a tokenizer of Hugging Face cut texts where MiniKL does."
    import tokenizers as hf

    from minikl.tokenizer import SPLIT
    pattern = hf.Regex(SPLIT.pattern)
    other.pre_tokenizer = hf.pre_tokenizers.Split(pattern, "isolated")
    return other


def tokenizer_training_race(
    texts,       # list of str
    vocab_size,  # int
    alphabet,    # characters that all begin with
    n_mb,        # of the texts
    options,     # of the command line
):               # (Tokenizer, rustbpe.Tokenizer or None)
    "Train on the same texts."
    import tokenizers as hf

    from minikl.tokenizer import SPLIT, Tokenizer
    def train_minikl():
        return Tokenizer.train(
            texts, vocab_size + 256, special_tokens=(), character_coverage=1
        )

    def train_hf():
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            min_frequency=2,
            show_progress=False,
        )
        other = cut_like_ours(hf.Tokenizer(hf.models.BPE()))
        other.train_from_iterator(texts, trainer)

    minikl = Kept(train_minikl)
    rust = None
    arms = {"MiniKL": minikl, "tokenizers.BpeTrainer": train_hf}
    # optional: pip install rustbpe tiktoken
    if find_spec("rustbpe") and find_spec("tiktoken"):
        import rustbpe

        def train_rustbpe():
            other = rustbpe.Tokenizer()
            other.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT.pattern)
            return other

        rust = Kept(train_rustbpe)
        arms["rustbpe, from bytes"] = rust
    seconds = race(arms, min(options.repeats, 5))
    ours = minikl.result
    print(
        f"tokenizers {hf.__version__}; {n_mb:.1f} MB of text, "
        f"{len(alphabet):,} characters, {len(ours.merges):,} merges"
    )
    baselines = {"BpeTrainer": "tokenizers.BpeTrainer"}
    report("Training", seconds, baselines, 1000 * n_mb, "KB")
    return ours, rust and rust.result


def same_in_hugging_face(ours):   # tokenizers.Tokenizer
    "A trained tokenizer, with the same merges in the same order."
    import tokenizers as hf
    merges = [tuple(ours.tokens[ord(part)] for part in pair) for pair in ours.merges]
    return cut_like_ours(hf.Tokenizer(hf.models.BPE(vocab=ours.vocab, merges=merges)))


def encoding_race(texts, ours, from_bytes, n_mb, options):
    "Encode the same texts; tokenizers has to find the same ids."
    from minikl.tokenizer import SPLIT
    theirs = same_in_hugging_face(ours)
    found = [encoding.ids for encoding in theirs.encode_batch(texts)]
    if found != ours.encode_batch(texts):
        raise ValueError("the ids differ")
    arms = {
        "MiniKL, encode_batch": partial(ours.encode_batch, texts),
        "tokenizers, encode_batch": partial(theirs.encode_batch, texts),
        "tokenizers, encode_batch_fast": partial(theirs.encode_batch_fast, texts),
    }
    if from_bytes:
        import tiktoken
        ranks = {bytes(token): i for token, i in from_bytes.get_mergeable_ranks()}
        bytewise = tiktoken.Encoding(
            "rustbpe",
            pat_str=SPLIT.pattern,
            special_tokens={},
            mergeable_ranks=ranks,
        )
        arms["tiktoken, from bytes"] = partial(
            bytewise.encode_ordinary_batch, texts, num_threads=options.threads
        )
    seconds = race(arms, options.repeats)
    columns = ("encode_batch", "encode_batch_fast")
    baselines = {name: f"tokenizers, {name}" for name in columns}
    title = "Encoding, same ids as tokenizers"
    report(title, seconds, baselines, 1000 * n_mb, "KB")


def tokenizer(options):
    """Training and encoding of the poetry corpus, from characters.

    Against tokenizers and, where they are installed, rustbpe and tiktoken.
    """
    from minikl.corpora import build_poetry, build_toy
    from minikl.jsonl import read_jsonl
    texts = list(read_jsonl(build_toy() if options.quick else build_poetry()))
    vocab_size = 1000 if options.quick else 12_000
    alphabet = sorted(set("".join(texts)))
    n_mb = sum(len(text.encode()) for text in texts) / 1e6
    ours, from_bytes = tokenizer_training_race(
        texts, vocab_size, alphabet, n_mb, options
    )
    encoding_race(texts, ours, from_bytes, n_mb, options)


# ---- the command line

COMMANDS = {"tokenizer": tokenizer, "llama": llama}


def main(argv=None):   # what a command found, for the lesson that draws it
    parser = argparse.ArgumentParser(
        "versus.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    with_compiler = "also with torch.compile (needs a C++ compiler)"
    add("what", choices=COMMANDS)
    add("--quick", action="store_true", help="small sizes, a few seconds")
    add("--compile", action="store_true", help=with_compiler)
    add("--repeats", type=int, default=7, help="timed turns; the table shows medians")
    add("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="true",
        RAYON_NUM_THREADS=str(options.threads),
    )
    torch.set_num_threads(options.threads)
    print(
        f"cpu, float32, {options.threads} threads, torch {torch.__version__}, "
        f"median of {options.repeats} turns",
        end=", ",
    )
    return COMMANDS[options.what](options)


if __name__ == "__main__":
    main()
