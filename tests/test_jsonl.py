"Lines that are odd or broken, and the token file that is built from them."

import gzip
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from minikl import data
from minikl.data import (
    CHAT_MARKERS,
    COLUMNS,
    Documents,
    TokenFile,
    build_tokens,
    encode_documents,
    encode_prompt,
    fingerprint,
    hash_fraction,
    next_tokens,
    shuffled,
)
from minikl.files import UserError
from minikl.jsonl import ZSTD, read_jsonl, record_text
from minikl.tokenizer import Tokenizer

POEMS = [
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。",
    "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。",
    "千山鸟飞绝，万径人踪灭。\n孤舟蓑笠翁，独钓寒江雪。",
]


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(POEMS, 400)


@pytest.fixture
def four(tmp_path):
    lines = [json.dumps({"content": poem}) + "\n" for poem in POEMS]
    path = tmp_path / "four.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def columns(folder):
    return [(folder / name).read_bytes() for name in COLUMNS]


# ---- lines


def test_the_text_of_a_record():
    assert record_text({"content": "  一\n"}) == "一"
    assert record_text({"content": []}) == ""
    assert record_text({"text": "second", "content": "first"}) == "first"
    assert record_text({"content": None}) == ""
    assert record_text({"paragraphs": ["一", "二"]}) == "一\n二"


def test_odd_lines_are_read(tmp_path):
    "A byte-order mark, Windows line ends, blank lines, U+2028, no newline at the end."
    odd = tmp_path / "odd.jsonl"
    last = '{"text": "b\u2028c"}'.encode()
    odd.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": ""}\r\n' + last)
    reported = []
    found = read_jsonl(odd, report=lambda *told: reported.append(told))
    assert list(found) == ["a", "b\u2028c"]
    assert reported == [("empty", f"{odd}:3: no text")]  # a blank line is no record


BROKEN = {
    b'{"id": 7 "content": "x"}': "not JSON: Expecting ',' delimiter at column 10",
    b'{"id": 7, "poem": "x"}': "no text: expected a field 'content' or",
    b'{"content": ["x", 7]}': "field 'content': expected text or a list of lines",
    b'["x"]': "expected a JSON object, found list",
    b'{"content": "\xff"}': "'utf-8' codec can't decode byte 0xff in position 13",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_or_skipped(line, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"content": "good"}\n' + line + b'\n{"content": "good"}\n')
    reason = f"{path}:2: {BROKEN[line]}"
    with pytest.raises(UserError) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(reason)
    reported = []
    found = read_jsonl(path, "skip", lambda *told: reported.append(told))
    assert list(found) == ["good", "good"]
    assert len(reported) == 1 and reported[0][0] == "bad"
    assert reported[0][1].startswith(reason)


def spoilt_files():
    "Compressed files: {name: bytes}."
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20_000)]
    many = "".join(json.dumps({"content": digest}) + "\n" for digest in hashes).encode()
    packed = gzip.compress(many, mtime=0)
    smaller = importlib.import_module(ZSTD).compress(many)
    return {
        "half.jsonl.gz": packed[: len(packed) // 2],
        "half.jsonl.zst": smaller[: len(smaller) // 2],
        "noise.jsonl.gz": packed[:10] + b"\xff" * 100 + packed[110:],  # after its head
        "fake.jsonl.gz": b'{"content": "not compressed at all"}\n',
        "fake.jsonl.zst": b'{"content": "neither"}\n',
    }


def test_a_damaged_compressed_file_is_named_one_line_after_the_last(tmp_path):
    for name, content in spoilt_files().items():
        (tmp_path / name).write_bytes(content)
        got = []
        with pytest.raises(UserError) as caught:
            for text in read_jsonl(tmp_path / name, "skip"):
                got.append(text)
        assert str(caught.value).startswith(f"{tmp_path / name}:{len(got) + 1}: ")
        assert (len(got) > 5000) == name.startswith("half")


def test_half_a_file_would_be_taken_for_a_whole_one():
    "A decompressor returns what there is; `read_jsonl` has to insist on the end."
    half = spoilt_files()["half.jsonl.zst"]
    found = importlib.import_module(ZSTD).ZstdDecompressor().decompress(half)
    assert 5_000 < found.count(b"}") < 15_000


def test_plain_and_compressed_files_hold_the_same_texts(four, tmp_path):
    "The last is two compressed files, one after the other, which the format allows."
    packed = tmp_path / "four.jsonl.gz"
    packed.write_bytes(gzip.compress(four.read_bytes()))
    twice = tmp_path / "four.jsonl.zst"
    twice.write_bytes(2 * importlib.import_module(ZSTD).compress(four.read_bytes()))
    assert list(read_jsonl([four, packed, twice])) == POEMS * 4


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, ZSTD, None)
    with pytest.raises(UserError, match="zst: not possible .* pip install backports"):
        list(read_jsonl(tmp_path / "a.jsonl.zst"))


# ---- documents


def test_markers_are_tokens_where_the_vocabulary_has_them():
    chat = "<|im_start|>user\n一二<|im_end|> <s>"
    names = ("<s>", "</s>", *CHAT_MARKERS)
    marked = Tokenizer.train([chat], 300, special_tokens=names)
    assert encode_documents([], marked) == ([], [])
    prompt = encode_prompt(chat, marked)  # no control token comes out of a prompt
    assert prompt == [marked.special["<s>"], *marked.encode(chat)]
    assert not set(prompt[1:]) & set(marked.special.values())
    (ids,), (n_chars,) = encode_documents([chat], marked)
    assert [i for i in ids if i in marked.special.values()] == [
        marked.special[name] for name in ("<s>", *CHAT_MARKERS, "</s>")
    ]
    assert marked.decode(ids) == "user\n一二 <s>"   # the last <s> was text
    assert n_chars == len("user\n一二 <s>")
    plain = Tokenizer.train([chat], 300)   # has no markers: they are text
    (ids,), _ = encode_documents([chat], plain)
    begin, end = plain.special["<s>"], plain.special["</s>"]
    assert ids == [begin, *plain.encode(chat), end]
    bare = Tokenizer.train([chat], 300, special_tokens=())
    assert encode_prompt(chat, bare) == bare.encode(chat)
    assert encode_documents([chat], bare) == ([bare.encode(chat)], [len(chat)])


def test_places_are_spread_evenly():
    "Chi-squared over 33 bins: 32 expected, with a standard deviation of 8."
    fractions = [hash_fraction(str(i)) for i in range(20_000)]
    counts = torch.histc(torch.tensor(fractions, dtype=torch.double), 33, 0, 1)
    expected = len(fractions) / 33
    assert float(((counts - expected) ** 2 / expected).sum()) < 32 + 4 * 8
    assert 0 <= hash_fraction("") < 1 and 0 <= hash_fraction("\ud800") < 1


def numbers(sizes):
    "A token file in memory whose tokens are 0, 1, 2, …"
    sizes = torch.tensor(sizes, dtype=torch.long)
    ends = sizes.cumsum(0)
    tokens = torch.arange(int(sizes.sum()), dtype=torch.int32)
    return SimpleNamespace(tokens=tokens, ends=ends, starts=ends - sizes, n_chars=sizes)


def cut_slowly(ids, max_seq_len):
    pieces = []
    start = 0
    while True:
        pieces.append(ids[start : start + max_seq_len])
        start += max_seq_len - 1
        if start >= len(ids) - 1:
            return pieces


@pytest.mark.parametrize("max_seq_len", range(2, 13))
def test_pieces_of_documents_of_every_length(max_seq_len):
    file = numbers(range(1, 41))
    total = 0
    for i in range(40):
        ids = file.tokens[file.starts[i] : file.ends[i]].tolist()
        documents = Documents(file, torch.tensor([i]), max_seq_len)
        pieces = [piece.tolist() for piece in documents]
        assert pieces == cut_slowly(ids, max_seq_len)
        assert sum((piece[1:] for piece in pieces), []) == ids[1:]
        total += len(pieces)
    documents = Documents(file, torch.arange(40), max_seq_len)  # all at once
    assert len(documents) == total
    assert int((documents.ends - documents.starts).max()) <= max_seq_len


def test_pieces_of_which_this_machine_has_the_tokens():
    documents = Documents(numbers(range(1, 41)), torch.arange(40), 16)
    assert documents.n_targets() == sum(len(doc) - 1 for doc in documents)
    assert documents.n_targets([3, 5]) == len(documents[3]) + len(documents[5]) - 2
    assert documents.local_indices() == list(range(len(documents)))
    expected = [i for i, start in enumerate(documents.starts) if start >= 40]
    documents.starts = documents.starts - 40   # the first 40 tokens lie elsewhere
    assert documents.local_indices() == expected
    documents.tokens = documents.tokens[:100]   # and so do the last ones
    local = [i for i in expected if documents.starts[i] < 100]
    assert documents.local_indices() == local and len(local) < len(expected)


def test_no_documents_and_nothing_to_predict():
    none = Documents(numbers([3]), torch.tensor([], dtype=torch.long), 8)
    assert len(none) == 0
    with pytest.raises(UserError, match="no documents"):
        none.batch(0, 4)
    with pytest.raises(UserError, match="max_seq_len=1: expected 2 or more"):
        Documents(numbers([3]), torch.arange(1), 1)
    with pytest.raises(UserError, match="at least one token"):
        next_tokens(torch.tensor([], dtype=torch.long))


def stream(n, seed, n_epochs):
    order = []
    for epoch in range(n_epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(n, generator=generator).tolist()
    return order


@pytest.mark.parametrize("batch_size", [1, 8, 7, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_is_a_stream_wherever_one_begins(batch_size, seed):
    documents = Documents(numbers([1] * 40), torch.arange(40), 8)
    expected = stream(40, seed, 10)
    for step in reversed(range(400 // batch_size)):
        found = [int(ids) for ids in documents.batch(step, batch_size, seed)]
        assert found == expected[step * batch_size : (step + 1) * batch_size]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [shuffled(40, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert shuffled(1000, 0, 0) is shuffled(1000, 0, 0)
    assert shuffled(1000, 0, 0).nbytes == 8000


# ---- the token file


@pytest.mark.parametrize("size", [1, 30, 60, 1000])
def test_chunks_of_every_size(size, four, small, tmp_path, monkeypatch):
    "They give the same file, and really are of that size."
    folder = build_tokens(four, small, tmp_path / "whole")
    sizes = []

    def encode_batch(texts, **options):
        sizes.append(len(texts))
        return small.encode_batch(texts, **options)

    watching = SimpleNamespace(
        vocab=small.vocab, special=small.special, encode_batch=encode_batch
    )
    monkeypatch.setattr(data, "CHUNK", size)
    again = build_tokens(four, watching, tmp_path / "chunks")
    assert columns(again) == columns(folder)
    assert sizes == {1: [1] * 4, 30: [1] * 4, 60: [2, 2], 1000: [4]}[size]


def test_a_name_changes_with_every_byte_and_where_files_are_cut(four, tmp_path):
    name = fingerprint([four], {"一": 0})
    assert name == fingerprint(str(four), {"一": 0})
    raw = four.read_bytes()
    (tmp_path / "front").write_bytes(raw[:99])
    (tmp_path / "back").write_bytes(raw[99:])
    assert name != fingerprint([tmp_path / "front", tmp_path / "back"], {"一": 0})
    (tmp_path / "near").write_bytes(raw[:-1] + b" ")
    assert name != fingerprint(tmp_path / "near", {"一": 0})
    assert name != fingerprint(four, {"一": 1})


@pytest.mark.parametrize("name", COLUMNS)
def test_a_damaged_column_is_named(name, four, small, tmp_path):
    folder = build_tokens(four, small, tmp_path / "cache")
    whole = (folder / name).read_bytes()
    flipped = whole[:9] + bytes([whole[9] ^ 4]) + whole[10:]
    for spoilt in (whole[:-1], flipped, whole * 2, b""):
        (folder / name).write_bytes(spoilt)
        with pytest.raises(UserError, match=f"{name}: damaged.*delete the folder"):
            TokenFile(folder)


def test_what_is_passed_over_is_counted_and_named(four, small, tmp_path):
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"text": ""}\n{"text": "a"}\n[]\n', encoding="utf-8")
    folder = build_tokens([four, odd], small, tmp_path / "cache", "skip")
    counts = TokenFile(folder).counts
    assert (counts["documents"], counts["empty"], counts["bad"]) == (5, 1, 1)
    assert (folder / "passed_over.txt").read_text(encoding="utf-8").splitlines() == [
        f"{odd}:1: no text",
        f"{odd}:3: expected a JSON object, found list",
    ]
    with pytest.raises(UserError, match="odd.jsonl:3: "):
        build_tokens([four, odd], small, tmp_path / "cache")


def cannot_encode(texts, **options):
    raise NotImplementedError


def test_a_token_file_is_built_once_and_whole_or_not_at_all(four, small, tmp_path):
    folder = build_tokens(four, small, tmp_path / "cache")
    idle = SimpleNamespace(vocab=small.vocab, special={}, encode_batch=cannot_encode)
    assert build_tokens(four, idle, tmp_path / "cache") == folder
    with pytest.raises(NotImplementedError):
        build_tokens(four, idle, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_writing_to_the_tensor_does_not_reach_the_disk(four, small, tmp_path):
    folder = build_tokens(four, small, tmp_path / "cache")
    file = TokenFile(folder)
    first = int(file.tokens[0])
    file.tokens[0] = 399
    assert int(TokenFile(folder).tokens[0]) == first != 399


def test_a_corpus_without_documents_leaves_nothing(small, tmp_path):
    (tmp_path / "nothing.jsonl").write_text('{"content": " "}\n')
    with pytest.raises(UserError, match="nothing.jsonl: no documents"):
        build_tokens(tmp_path / "nothing.jsonl", small, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_small_corpus_holds_out_its_lowest_document(four, small, tmp_path):
    file = TokenFile(build_tokens(four, small, tmp_path / "cache"))
    kept, held_out = file.split(1e-9)
    assert held_out.tolist() == [int(file.fractions.argmin())]
    assert sorted([*kept.tolist(), *held_out.tolist()]) == [0, 1, 2, 3]


BUILDER = """
import sys, time
from pathlib import Path
from minikl.data import build_tokens
from minikl.tokenizer import Tokenizer

class Slow(Tokenizer):
    def encode_batch(self, texts, **options):
        Path(sys.argv[4]).touch()
        time.sleep(600)

build_tokens(sys.argv[1], Slow.load(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_build_leaves_no_token_file_and_is_swept_up(four, small, tmp_path):
    small.save(tmp_path / "small.json")
    cache = tmp_path / "cache"
    begun = tmp_path / "begun"
    arguments = map(str, (four, tmp_path / "small.json", cache, begun))
    victim = subprocess.Popen([sys.executable, "-c", BUILDER, *arguments])
    while not begun.exists():
        assert victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    (left,) = cache.iterdir()
    assert left.name.startswith(".building-")
    hour_ago = time.time() - 3700
    for path in [left, *left.rglob("*")]:
        os.utime(path, (hour_ago, hour_ago))
    assert [build_tokens(four, small, cache)] == list(cache.iterdir())
