"""Drawing, the KV cache, batches and streaming: each against a slow version of itself.

Models have random weights, and the vocabulary is that of the toy corpus.
"""
import math
import random
from random import Random

import pytest
import torch

from minikl.corpora import toy_corpus
from minikl.files import UserError
from minikl.generate import (
    KVCache,
    choose,
    generate,
    generate_batch,
    narrow,
    stream_text,
    top_p_bar,
)
from minikl.layouts import Nested
from minikl.model import MiniKL, MiniKLConfig
from minikl.tokenizer import Tokenizer

SIZES = {
    "d_model": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 40, "max_seq_len": 64,
}
STOP = 2


def fresh(num_kv_heads=2):
    "A model whose weights are large enough for its draws to differ."
    torch.manual_seed(0)
    model = MiniKL(MiniKLConfig(**SIZES, num_kv_heads=num_kv_heads)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    return model


@torch.no_grad()
def read_whole(model, ids):  # (batch, seq) → (batch, seq, vocab)
    batch = Nested(list(ids))
    return model(batch.ids, batch.positions, batch.attend).unflatten(0, ids.shape)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for text, _ in toy_corpus()]
    return Tokenizer.train(texts, 448, character_coverage=1.0)


# probabilities

def probabilities_naive(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    "One row, in loops: all bars are set by the same probabilities."
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    ranked = sorted(shares, reverse=True)
    bars = [min_p * ranked[0]]
    if top_k:
        bars.append(ranked[min(top_k, len(ranked)) - 1])
    together = 0.0
    for share in ranked:
        together += share
        if top_p < 1 and together >= top_p:
            bars.append(share)
            break
    kept = [share if share >= max(bars) else 0.0 for share in shares]
    return [share / sum(kept) for share in kept]


def odd_rows():
    "Random rows, rows full of ties, and one of equals."
    generator = torch.Generator().manual_seed(0)
    normal = 3 * torch.randn(4, 10, generator=generator)
    tied = torch.randint(3, (4, 10), generator=generator).float()
    return torch.cat([normal, tied, torch.zeros(1, 10)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 10, 99])
@pytest.mark.parametrize("top_p", [1e-9, 0.47, 0.91, 1.0])
def test_narrow_is_what_the_loops_say(temperature, top_k, top_p):
    "0.47 and 0.91 on purpose: rounding decides whether nine times 0.1 reaches 0.9."
    rows = odd_rows()
    for min_p in (0, 0.033, 0.3, 1):
        knobs = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        }
        naive = [probabilities_naive(row, **knobs) for row in rows.tolist()]
        torch.testing.assert_close(
            narrow(rows, **knobs), torch.tensor(naive), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("top_p", [0.03, 0.47, 0.91])
def test_top_p_finds_its_bar_beyond_the_first_ranks(top_p):
    "Far more than 256 tokens must stay."
    normal = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.zeros(1, 2000), normal])
    naive = [probabilities_naive(row, top_p=top_p) for row in rows.tolist()]
    torch.testing.assert_close(
        narrow(rows, top_p=top_p), torch.tensor(naive), atol=1e-6, rtol=0
    )


def rows_of_all_kinds(vocab):
    "Equal, flat, peaked, tied, and with tokens that are forbidden, in one batch."
    generator = torch.Generator().manual_seed(vocab)
    normal = torch.randn(6, vocab, generator=generator)
    normal *= torch.tensor([[0.0], [0.01], [1.0], [3.0], [10.0], [100.0]])
    tied = torch.randint(4, (2, vocab), generator=generator).float()
    forbidden = torch.randn(2, vocab, generator=generator)
    forbidden[0, ::2] = -math.inf
    forbidden[1, 1:] = -math.inf
    return torch.cat([normal, tied, forbidden])


@pytest.mark.parametrize("vocab", [2, 3, 10, 257, 4000])
@pytest.mark.parametrize("top_p", [1e-9, 0.25, 0.5, 0.95, 1 - 1e-6])
def test_what_top_p_keeps_is_enough_and_no_more(vocab, top_p):
    "Whatever is likelier than the bar is not enough; equals stay or go together."
    shares = rows_of_all_kinds(vocab).softmax(-1)
    bars = top_p_bar(shares, top_p)
    assert (shares == bars).any(-1).all()
    kept = torch.where(shares >= bars, shares, 0).double().sum(-1)
    likelier = torch.where(shares > bars, shares, 0).double().sum(-1)
    assert (kept > top_p - 1e-6).all()
    assert (likelier < top_p + 1e-6).all()


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.95])
def test_the_bar_is_that_of_a_sorted_row(top_p):
    "And the other rows of the batch do not move it. No sum here is a close call."
    shares = rows_of_all_kinds(4000)[1:].softmax(-1)
    bars = top_p_bar(shares, top_p)
    for row, bar in zip(shares, bars, strict=True):
        ranked = row.sort(descending=True, stable=True).values
        together = ranked.double().cumsum(-1)
        assert (together - top_p).abs().min() > 1e-7
        assert bar == ranked[(together < top_p).sum()]
        assert torch.equal(top_p_bar(row[None], top_p)[0], bar)


def test_tokens_as_likely_as_the_last_one_stay():
    tied = torch.tensor([[0.4, 0.2, 0.1, 0.2, 0.1]]).log()
    assert (narrow(tied, top_p=0.5)[0] > 0).tolist() == [True, True, False, True, False]


def test_a_sum_that_is_exactly_enough_is_enough():
    halves = torch.tensor([[1 / 4, 1 / 8, 1 / 2, 1 / 8]])
    assert top_p_bar(halves, 0.75).item() == 1 / 4
    assert top_p_bar(halves, 0.76).item() == 1 / 8


def test_no_cut_leaves_all():
    rows = odd_rows()
    assert torch.equal(narrow(rows, top_k=10**9, top_p=1.0), narrow(rows))


# draws

def surprise(draws, probabilities):
    "Standard deviations of χ² above its mean; infinite where the impossible was drawn."
    seen = torch.bincount(draws, minlength=len(probabilities)).double()
    possible = probabilities > 0
    if seen[~possible].any():
        return math.inf
    expected = len(draws) * probabilities[possible].double()
    freedom = max(int(possible.sum()) - 1, 1)
    squares = ((seen[possible] - expected) ** 2 / expected).sum()
    return float(squares - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("knobs", [
    {}, {"temperature": 0.7}, {"top_k": 4}, {"temperature": 1.5, "top_p": 0.8},
    {"min_p": 0.2},
], ids=str)
def test_draws_follow_the_probabilities(knobs):
    "And measured against a wrong temperature they do not."
    row = torch.tensor([[0.5, -1.2, 2.0, 0.3, -0.4, 1.1, -2.3, 0.9, -0.1, 1.6]])
    draws = choose(row.expand(20_000, -1), [Random(0)] * 20_000, **knobs)
    assert surprise(draws, narrow(row, **knobs)[0]) < 5
    warmer = {**knobs, "temperature": knobs.get("temperature", 1) * 1.3}
    assert surprise(draws, narrow(row, **warmer)[0]) > 10


@pytest.mark.parametrize("knobs", [
    {"temperature": 0}, {"temperature": 1e-30}, {"temperature": 1e-5}, {"top_k": 1},
    {"top_p": 1e-9}, {"min_p": 1}, {"temperature": 0, "top_k": 3, "top_p": 0.5},
], ids=str)
def test_where_one_token_is_left_it_is_the_likeliest(knobs):
    rows = odd_rows()[:4]
    assert torch.equal(choose(rows, [Random(0)] * 4, **knobs), rows.argmax(-1))


def test_equals_are_drawn_alike():
    tied = torch.tensor([[0.0, 5.0, 5.0, 1.0]])
    assert choose(tied, [Random(0)], temperature=0).item() == 1  # the first
    draws = choose(tied.expand(200, -1), [Random(0)] * 200, top_k=1)
    assert set(draws.tolist()) == {1, 2}


@pytest.mark.parametrize("dart", [0.0, 1 - 2**-53])
def test_both_ends_of_the_line_belong_to_possible_tokens(dart):
    class Extreme(Random):
        def random(self):
            return dart

    rows = odd_rows()
    drawn = choose(rows, [Extreme()] * len(rows), top_k=3)
    assert (narrow(rows, top_k=3).gather(1, drawn[:, None]) > 0).all()


# the cache

@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [4, 1, 1, 1], [3, 1, 2, 1]], ids=str)
@torch.no_grad()
def test_a_cache_reads_what_the_whole_model_reads(num_kv_heads, pieces):
    model = fresh(num_kv_heads)
    ids = torch.randint(40, (2, 7))
    cache = KVCache(2, 2, 7, num_kv_heads, 8)
    read = [model(*cache.step(piece)) for piece in ids.split(pieces, dim=1)]
    together = torch.cat(read, dim=1)
    torch.testing.assert_close(together, read_whole(model, ids), atol=1e-4, rtol=0)


@torch.no_grad()
def test_wrong_positions_are_noticed():
    "Each new token claims to be the first."
    model = fresh()
    ids = torch.randint(40, (2, 7))
    cache = KVCache(2, 2, 7, 2, 8)
    for one in ids.split(1, dim=1):
        one, positions, attend = cache.step(one)
        logits = model(one, 0 * positions, attend)[:, 0]
    assert (logits - read_whole(model, ids)[:, -1]).abs().max() > 0.1


def side_by_side(model, prompts, after, padding):
    "Logits of the last prompt token and of those after it; row 1 leaves early."
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(2, len(prompts), 9, model.config.num_kv_heads, 8)
    padded = torch.nn.utils.rnn.pad_sequence(
        prompts, batch_first=True, padding_value=padding
    )
    last = [length - 1 for length in lengths]
    steps = [model(*cache.step(padded, lengths))[range(len(prompts)), last]]
    for new in after[:, :2].T:
        steps.append(model(*cache.step(new[:, None]))[:, 0])
    cache.keep([0, 2])
    for new in after[[0, 2], 2:].T:
        steps.append(model(*cache.step(new[:, None]))[:, 0])
    assert cache.lengths == [lengths[0] + 4, lengths[2] + 4]
    return [
        torch.stack([step[0] for step in steps]),
        torch.stack([step[1] for step in steps[:3]]),
        torch.stack([step[-1] for step in steps]),
    ]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@torch.no_grad()
def test_texts_of_different_length_do_not_see_each_other(num_kv_heads):
    "Nor their padding, not even in the last digit."
    model = fresh(num_kv_heads)
    prompts = [torch.randint(40, (n,)) for n in (5, 2, 3)]
    after = torch.randint(40, (3, 4))
    together = side_by_side(model, prompts, after, padding=0)
    for prompt, new, logits in zip(prompts, after, together, strict=True):
        alone = read_whole(model, torch.cat([prompt, new])[None])[0, len(prompt) - 1 :]
        torch.testing.assert_close(logits, alone[: len(logits)], atol=1e-4, rtol=0)
    other = side_by_side(model, prompts, after, padding=5)
    for one, two in zip(together, other, strict=True):
        assert torch.equal(one, two)


@torch.no_grad()
def test_a_full_cache_says_so_and_stays_as_it_was():
    model = fresh()
    ids = torch.randint(40, (2, 7))
    cache = KVCache(2, 2, 7, 2, 8)
    model(*cache.step(ids[:, :5]))
    with pytest.raises(UserError, match="room for 7 tokens, not for 8"):
        cache.step(ids[:, :3])
    with pytest.raises(UserError, match="holds 2 sequences, not 1"):
        cache.step(ids[:1, :1])
    assert cache.lengths == [5, 5]
    rest = model(*cache.step(ids[:, 5:]))
    torch.testing.assert_close(rest, read_whole(model, ids)[:, 5:], atol=1e-4, rtol=0)


# texts

def naive(model, ids, max_new_tokens, stop, seed, **knobs):
    "Everything is read again for every token."
    dice = Random(seed)
    new = []
    for _ in range(min(max_new_tokens, model.config.max_seq_len - len(ids))):
        logits = read_whole(model, torch.tensor([ids + new]))[:, -1]
        token = int(choose(logits, [dice], **knobs))
        if token == stop:
            break
        new.append(token)
    return new


def columns(steps):
    return [[token for token in column if token is not None] for column in
            zip(*steps, strict=True)]


@pytest.mark.parametrize("stop", [STOP, None])
@pytest.mark.parametrize("knobs", [
    {"temperature": 0}, {}, {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.01},
], ids=str)
def test_company_does_not_matter(stop, knobs):
    "Six prompts in two orders: each gets the tokens that it gets alone, by its seed."
    model = fresh()
    prompts = [[5, 6, 7], [1], [9] * 8, [3, 1, 4, 1, 5], [STOP, STOP], [1] * 60]
    seeds = [3, 1, 4, 1, 5, 9]
    alone = [naive(model, ids, 20, stop, seed, **knobs)
             for ids, seed in zip(prompts, seeds, strict=True)]
    single = [list(generate(model, ids, 20, stop, seed, **knobs))
              for ids, seed in zip(prompts, seeds, strict=True)]
    assert single == alone
    for order in (slice(None), slice(None, None, -1)):
        steps = generate_batch(model, prompts[order], 20, stop, seeds[order], **knobs)
        assert columns(steps) == alone[order]


def test_every_token_is_read_once():
    "The prompt once, then token by token; `max_new_tokens` counts tokens."
    model = fresh()
    read = []
    hook = model.embed.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape[1])
    )
    written = list(generate(model, [5, 6, 7], 20, temperature=0))
    hook.remove()
    assert read == [3] + [1] * 19 and len(written) == 20


def test_the_room_of_the_model_is_kept():
    model = fresh()
    assert len(list(generate(model, [1] * 63, 50))) == 1
    assert len(list(generate(model, [1] * 50, 50))) == 14
    assert list(generate(model, [1], 0)) == []


@pytest.mark.parametrize("prompts, message", [
    ([[]], "the prompt is empty"), ([[1], []], "the prompt is empty"),
    ([[1] * 64], "the prompt has 64 tokens; this model has room for 63 and a new one"),
])
def test_a_prompt_that_does_not_fit_is_refused_at_the_call(prompts, message):
    with pytest.raises(UserError, match=message):
        generate_batch(fresh(), prompts)


def test_seeds_draw_the_same_and_chance_does_not():
    model = fresh()
    texts = {seed: tuple(generate(model, [1], 20, seed=seed)) for seed in range(5)}
    assert len(set(texts.values())) == 5
    for seed, text in texts.items():
        assert tuple(generate(model, [1], 20, seed=seed)) == text
    assert len({tuple(generate(model, [1], 20)) for _ in range(5)}) == 5


# streaming

def test_characters_come_whole(tokenizer):
    horse = tokenizer.encode("人🐎。")
    start = tokenizer.special["<s>"]
    stop = tokenizer.special["</s>"]
    assert list(stream_text(tokenizer, horse)) == ["人", "🐎", "。"]
    assert list(stream_text(tokenizer, horse[:3])) == ["人", "�"]  # ends inside it
    assert list(stream_text(tokenizer, [start, horse[0], stop])) == ["人"]
    assert list(stream_text(tokenizer, [])) == []


def test_any_text_streams_as_soon_as_it_is_complete(tokenizer):
    draw = random.Random(0)
    alphabets = [
        "一双人，春来花\n", "abc xyz 123", "🐎👨‍👩‍👧🇨🇳é̂",
        [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000],
    ]
    for _ in range(300):
        length = draw.randrange(12)
        text = "".join(draw.choice(draw.choice(alphabets)) for _ in range(length))
        ids = tokenizer.encode(text)
        assert "".join(stream_text(tokenizer, ids)) == text
        for end in range(len(ids)):
            complete = b"".join(map(tokenizer.token_bytes, ids[:end]))
            complete = complete.decode("utf-8", "ignore").removesuffix("�")
            shown = "".join(stream_text(tokenizer, ids[:end]))
            assert shown.removesuffix("�") == complete


def test_text_instead_of_tokens_loses_half_characters(tokenizer):
    "Why ids are kept: a text that is read again at each step never gets its horse."
    text = ""
    for token in tokenizer.encode("人🐎。"):
        text = tokenizer.decode(tokenizer.encode(text) + [token])
    assert "🐎" not in text
