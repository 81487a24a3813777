"Learning and encoding in tensors: the edges that a lesson has no room for."

import random

import pytest
import torch

from minikl.bpe import (
    BatchEncoder,
    PairTable,
    Row,
    chunks,
    code_points,
    in_a_row,
    kind_of,
    learn_merges,
    merge_rows,
    piece_starts,
)
from minikl.corpora import toy_corpus
from minikl.tokenizer import SPLIT, Tokenizer, merge_all

IDS = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    "words, n_merges, expected",
    [
        ({}, 9, []),  # no text
        ({"": 3}, 9, []),  # an empty word
        ({"a": 5}, 9, []),  # no pair
        ({"ab": 1}, 9, []),  # a pair, but only once
        ({"ab": 5}, 0, []),  # no merges wanted
        ({"aaaa": 1}, 9, [(0, 0)]),  # three overlapping pairs, then two tokens
        ({"aaa": 2}, 9, [(0, 0), (3, 0)]),  # the first two of three
        ({"aXaXa": 9}, 9, []),  # a character without an id is an edge
        ({"\ud800a": 9, "a": 9}, 9, []),  # and so is the one that stands for edges
        ({"ab": 2, "bc": 2}, 1, [(0, 1)]),  # a tie: the smallest pair
    ],
)
def test_edges_of_learning(words, n_merges, expected):
    assert learn_merges(words, IDS, 3, n_merges) == expected


def test_words_do_not_touch():
    ids, weights = in_a_row({"ab": 4, "ba": 3}, IDS)
    assert ids.tolist() == [-1, 0, 1, -1, 1, 0, -1]
    assert [weights[i].item() for i in (1, 2, 4, 5)] == [4, 4, 3, 3]


def test_runs_do_not_overlap():
    row = Row(*in_a_row({"aaaaa": 1, "aa": 1}, IDS))
    places = torch.tensor([1, 2, 3, 4, 7])
    assert row.every_second(places).tolist() == [1, 3, 7]


def test_no_pairs_and_many():
    ids = torch.arange(3, dtype=torch.int32)
    assert PairTable({}, 3)(ids, ids).tolist() == [PairTable.NONE] * 3
    draw = random.Random(0)
    merges = {}
    while len(merges) < 2000:
        merges[chr(draw.randrange(300)) + chr(draw.randrange(300))] = None
    merges = {pair: chr(300 + i) for i, pair in enumerate(merges)}
    table = PairTable(merges, 3000)
    every = torch.arange(300, dtype=torch.int32)
    found = table(every[:, None], every[None])
    for left in range(300):
        for right in range(300):
            new = merges.get(chr(left) + chr(right))
            expected = PairTable.NONE if new is None else ord(new)
            assert found[left, right] == expected


def test_code_points_of_half_characters():
    text = "a\ud83d\U0010ffff"
    assert code_points(text).tolist() == [ord(char) for char in text]
    assert code_points("").tolist() == []


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["", "", "abc"],
        ["abc", "", ""],
        ["abcdef"],
        ["ab", "cdefgh", "", "i"],
    ],
)
def test_chunks_lose_nothing(texts):
    bundles = list(chunks(iter(texts), 3))
    assert sum(bundles, []) == texts and all(bundles)


def test_chunks_begin_after_enough_characters():
    assert list(chunks(["ab", "cd", "ef", "g"], 4)) == [["ab", "cd"], ["ef", "g"]]


@pytest.mark.parametrize(
    "texts",
    [
        ["", "", "明月 " * 3000, "", ""],  # empty texts at both ends
        ["a" * 5000],
        [" " * 5000],
        ["\n" * 5000],
        ["7" * 5000],
        ["…" * 70_000],
        ["。\n" * 40_000, "  \n\n x" * 5000],  # across several batches
        ["明月\ud800" * 3000],  # half a character is spelt in bytes
    ],
)
def test_a_batch_is_one_text_at_a_time(texts):
    tokenizer = Tokenizer.train(["明月 明月。\n…… aaaa 7777"] * 3, 300)
    answers = tokenizer.encode_batch(texts)
    assert answers == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in answers] == texts


# cutting, merging and encoding of odd strings

ODD = list("abz 一双人魂龘，。！<>|/_-0159٣Ⅷéßжաで한\n\r\t\0\x1b\x85\u3000\u2028\u0301")
ODD += list("🙂👩🏽\u200d\U0010ffff") + ["\ud83d", "\ude42", "<s>", "  ", "\r\n"]
ODD += [char * 66 for char in "a。 \n7"]


def random_text(rng):
    return "".join(rng.choices(ODD, k=rng.randrange(25)))


def pieces_differ(texts):   # bool
    "Whether `piece_starts` cuts a batch of texts elsewhere than SPLIT cuts each."
    whole = "".join(texts)
    lengths = torch.tensor([len(p) for text in texts for p in SPLIT.findall(text)])
    expected = lengths.cumsum(0) - lengths
    text_starts = torch.zeros(len(whole) + 1, dtype=bool)
    text_starts[[sum(map(len, texts[:i])) for i in range(len(texts))]] = True
    kinds = torch.tensor([kind_of(char) for char in whole], dtype=torch.int8)
    starts = piece_starts(code_points(whole), kinds, text_starts[:-1])
    return starts.nonzero().flatten().tolist() != expected.tolist()


def test_pieces_are_those_of_the_pattern():
    "Twenty thousand odd strings, four to a batch."
    rng = random.Random(10)
    for _ in range(5000):
        texts = [random_text(rng) for _ in range(4)]
        assert not pieces_differ(texts), ascii(texts)


def test_a_table_has_nothing_but_the_merges():
    tokenizer = Tokenizer.train([text for text, _ in toy_corpus()], 448)
    table = PairTable(tokenizer.merges, len(tokenizer))
    every = torch.arange(len(tokenizer), dtype=torch.int32)
    expected = torch.full((len(tokenizer),) * 2, PairTable.NONE, dtype=torch.int32)
    for (left, right), new in tokenizer.merges.items():
        expected[ord(left), ord(right)] = ord(new)
    assert torch.equal(table(every[:, None], every), expected)


def test_rows_merge_as_single_pieces_do():
    "A hundred pieces of many lengths at once, against `merge_all` of lesson 01."
    toy = "\0\0\0\1\3\0\0\0\1\0\2" * 50
    merges = {"\0\0": "\4", "\0\1": "\5", "\4\5": "\6"}
    cuts = [0, *sorted(random.Random(12).sample(range(1, 550), 99)), 550]
    ids = code_points(toy).clone()
    kept = merge_rows(ids, torch.tensor(cuts), PairTable(merges, 7))
    bounds = zip(cuts[:-1], cuts[1:], strict=True)
    expected = "".join(merge_all(toy[begin:end], merges) for begin, end in bounds)
    assert "".join(map(chr, ids[kept].tolist())) == expected


def test_odd_strings_in_a_batch_are_those_one_by_one():
    tokenizer = Tokenizer.train([text for text, _ in toy_corpus()], 448)
    rng = random.Random(13)
    texts = [random_text(rng) for _ in range(20_000)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text), ascii(text)


def test_the_work_of_merging_is_linear():
    "Fewer than four places are looked at for each character of the toy corpus."
    texts = [text for text, _ in toy_corpus()]
    tokenizer = Tokenizer.train(texts, 448)
    n_places = []

    class CountingTable(PairTable):
        def __call__(self, left, right):
            n_places.append(left.numel() + len(left))
            return super().__call__(left, right)

    encoder = BatchEncoder(tokenizer)
    encoder.table = CountingTable(tokenizer.merges, len(tokenizer))
    encoder.encode(*encoder.learn_chars(texts))
    assert sum(n_places) < 4 * sum(map(len, texts))
