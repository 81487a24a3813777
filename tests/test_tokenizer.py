"What the tokenizer does with odd texts, foreign vocabularies and damaged files."

import json
import random
from collections import Counter

import pytest
import regex
import tokenizers as hf

from minikl.files import UserError, write_atomically
from minikl.tokenizer import (
    BYTE_TOKENS,
    CONTROL,
    SPECIAL_TOKENS,
    SPLIT,
    Tokenizer,
    frequent_chars,
)

ROLES = ["<|im_start|>", "<|im_end|>"]
ODD = [
    *"abz 一双人魂龘，。！<>|/_-0159٣Ⅷéßжաで한",
    *"\n\r\t\0\x1b\x1c\x7f\x85\u00a0\u200b\u3000\u2028\u0301\u20e3",
    *"🙂👩🏽\u200d🚀\U000e0001\U0010ffff",
    *["\ud83d", "\ude42", "\udfff", "<s>", "</s>", "<pad>", "<unk>", "<0xE4>"],
    *["<0x0A>", "<|end|>", "  ", "\r\n"],
    *[char * 66 for char in "a。 \n7"],
]
POEMS = [
    "一生一代一双人，争教两处销魂。\n相思相望不相亲，天为谁春。",
    "浆向蓝桥易乞，药成碧海难奔。\n若容相访饮牛津，相对忘贫。",
    "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。",
]


def odd_texts(seed, n_texts):
    draw = random.Random(seed)
    return ["".join(draw.choices(ODD, k=draw.randrange(25))) for _ in range(n_texts)]


@pytest.fixture(scope="module")
def trained():
    special = [*SPECIAL_TOKENS, *ROLES]
    return Tokenizer.train([*POEMS * 3, *odd_texts(1, 50)], 400, special)


def characters_only():
    chars = sorted(set("".join(POEMS)))
    names = ["<pad>", "<s>", "</s>", "<unk>", *ROLES, *chars]
    return Tokenizer({token: i for i, token in enumerate(names)})


def in_no_order():
    tokens = "<unk> <s> 床 前 明 月 光 明月 床前明月光 月光".split()
    return Tokenizer({token: i for i, token in enumerate(tokens)})


def halves():
    first, second = chr(0xD83D), chr(0xDE42)
    return Tokenizer({first: 0, second: 1, first + second: 2})


def test_pieces_put_together_are_the_text():
    for text in odd_texts(3, 20_000):
        assert "".join(SPLIT.findall(text)) == text, ascii(text)


def test_no_piece_holds_a_control_token():
    n_found = 0
    for text in odd_texts(4, 20_000):
        n_found += CONTROL.search(text) is not None
        assert not any(CONTROL.search(piece) for piece in SPLIT.findall(text))
    assert n_found > 10_000  # the trial can fail
    assert all(CONTROL.fullmatch(token) for token in [*SPECIAL_TOKENS, *BYTE_TOKENS])


def test_every_text_comes_back(trained):
    seen = set()
    for text in [*POEMS, "", " ", "\n", POEMS[0] * 200, *odd_texts(7, 5000)]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text, ascii(text)
        seen.update(ids)
    assert seen.isdisjoint(trained.special.values())
    spelt = set()
    for char in "".join(ODD):
        if char not in trained.vocab:
            spelt.update(char.encode("utf-8", "surrogatepass"))
    assert {trained.byte_ids[byte] for byte in spelt} <= seen
    assert trained.encode("") == [] and trained.decode([]) == ""


def test_the_smaller_vocabulary_is_the_beginning_of_the_larger():
    large = Tokenizer.train(POEMS * 3, 360)
    size = len(large) - len(large.merges) // 2
    small = Tokenizer.train(iter(POEMS * 3), size)
    assert small.vocab == {token: i for token, i in large.vocab.items() if i < size}
    assert small.merges == dict(list(large.merges.items())[: len(small.merges)])


@pytest.mark.parametrize(
    "share, chars",
    [
        (0, ""),
        (0.4, "a"),
        (0.41, "ab"),
        (0.9, "abc"),
        (1, "abcd"),
    ],
)
def test_frequent_characters(share, chars):
    assert frequent_chars(Counter("aaaabbbccd"), share) == list(chars)


def test_half_a_character_gets_no_token():
    assert frequent_chars(Counter("ba\ud83d"), 1) == ["a", "b"]


def test_odd_vocabularies():
    assert halves().encode("\ud83d\ude42") == [2]
    assert halves().decode([2, 0]) == "\ud83d\ude42\ud83d"
    chars = characters_only()
    answers = chars.encode_batch(POEMS * 100)
    assert all(
        len(ids) == len(text) for ids, text in zip(answers, POEMS * 100, strict=True)
    )
    assert [chars.decode(ids) for ids in answers] == POEMS * 100
    assert chars.decode(chars.encode("明月🙂")) == "明月"  # what it lacks is lost
    assert chars.special["<|im_end|>"] not in chars.encode("<|im_end|>")


def test_without_bytes_text_gives_no_control_token_but_unk():
    chars = characters_only()
    seen = set()
    for text in odd_texts(10, 2000):
        seen.update(chars.encode(text))
    assert seen.intersection(chars.special.values()) == {chars.special["<unk>"]}


def test_ids_that_no_text_gives(trained):
    assert trained.decode([trained.byte_ids[0xE4]]) == "�"
    framed = [trained.special["<s>"], *trained.encode("明月"), trained.special["</s>"]]
    assert trained.decode(framed) == "明月"
    for wrong in (-1, len(trained)):
        with pytest.raises(UserError, match=f"token id {wrong} is outside the vocab"):
            trained.decode([wrong])


def test_allowed_special_tokens(trained):
    message = "<|im_start|>user\n<s>明月<|im_end|>"
    framed = trained.encode(message, allowed_special=ROLES)
    assert [framed[0], framed[-1]] == [trained.special[role] for role in ROLES]
    assert framed[1:-1] == trained.encode("user\n<s>明月")  # <s> was not allowed
    batch = trained.encode_batch([message] * 200, allowed_special=ROLES)
    assert batch == [framed] * 200
    with pytest.raises(UserError, match="no special token '<|system|>'"):
        trained.encode(message, allowed_special=["<|system|>"])


def test_longest_match(trained):
    for text in [*POEMS, *odd_texts(9, 300)]:
        assert trained.decode(trained.encode_longest_match(text)) == text
    phrases = in_no_order()
    assert phrases.encode_longest_match("床前明月光明月光") == [8, 7, 6]
    assert 1 not in phrases.encode_longest_match("床前明月光<s>")


def test_saved_and_read_again(trained, tmp_path):
    path = tmp_path / "vocab_dict.json"
    trained.save(path)
    again = Tokenizer.load(path)
    assert (again.vocab, again.merges, again.special) == (
        trained.vocab,
        trained.merges,
        trained.special,
    )

    def fails(temporary):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fails)
    assert Tokenizer.load(path).vocab == trained.vocab
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_half_a_surrogate_pair_in_a_file(tmp_path):
    half = Tokenizer({"\ud83d": 0, "a": 1, "\ud83da": 2})
    half.save(tmp_path / "half.json")
    assert Tokenizer.load(tmp_path / "half.json").vocab == half.vocab
    with pytest.raises(UserError, match="JSON cannot hold"):
        halves().save(tmp_path / "half.json")
    with pytest.raises(UserError, match="half a surrogate pair"):
        halves().save_huggingface(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": 0', "not a JSON file"),
        ('["a", "b"]', "found list"),
        ("3", "found int"),
        ("{}", "found an empty one"),
        ('{"a": "0"}', "the id of 'a' is '0'"),
        ('{"a": true}', "expected a whole number"),
        ('{"a": 0.5}', "expected a whole number"),
        ('{"a": 0, "b": 2}', "id 1 is missing"),
        ('{"a": 0, "b": 0}', "id 1 is missing"),
        ('{"a": -1, "b": 0}', "id 1 is missing"),
        ("[" * 200_000, "too many nested brackets"),
        (b"\xff\xfe{", "not a JSON file"),
    ],
)
def test_damaged_vocabularies(content, message, tmp_path):
    write_atomically(tmp_path / "bad.json", content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        Tokenizer.load(tmp_path / "none.json")


def test_huggingface_gives_the_same_ids(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    texts = [*POEMS, *[regex.sub(r"\p{Cs}", "", text) for text in odd_texts(8, 3000)]]
    plain = Tokenizer.train(POEMS * 3, 360, character_coverage=1)
    for ours in (trained, plain, characters_only(), in_no_order()):
        try:
            ours.save_huggingface(path)
        except UserError as error:
            pytest.fail(str(error))
        theirs = hf.Tokenizer.from_file(str(path))
        theirs.encode_special_tokens = True  # as text
        answers = theirs.encode_batch(texts, add_special_tokens=False)
        for text, answer in zip(texts, answers, strict=True):
            assert ours.encode(text) == answer.ids, ascii(text)
            if ours.byte_ids:
                assert theirs.decode(answer.ids) == text, ascii(text)
        file = json.loads(path.read_text(encoding="utf-8"))
        assert len(file["model"]["merges"]) == len(ours.merges)
