"Learning and encoding in tensors: the edges that a lesson has no room for."

import random

import pytest
import torch

from minikl.bpe import PairTable, Row, chunks, code_points, in_a_row, learn_merges
from minikl.tokenizer import Tokenizer

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
