"The judge of form: what it counts, what it learns, what it lets pass."
import itertools
import json
import math
import random

import pytest
import torch

from minikl import form
from minikl.data import hash_fraction
from minikl.files import UserError
from minikl.form import (
    Judge,
    by_pattern,
    clauses,
    cut,
    dominant,
    endings_of,
    home_judge,
    letters,
    links,
    split_records,
    usual_marks,
)
from minikl.rhyme import RhymeTable, count_matrix, expectation, maximization

# two rhymes of an invented language, and characters that end no line
FIRST = "甲乙丙丁戊己"
SECOND = "子丑寅卯辰巳"
FILLER = "山水云月花"


def poem(chance, scheme="AA-A", lengths=(5, 5, 7, 5), filler=FILLER):
    "A poem whose letters rhyme; what has no letter ends as it likes."
    rhymes = chance.sample([FIRST, SECOND], 2)
    text = ""
    for length, letter in zip(lengths, scheme, strict=True):
        line = chance.choices(filler, k=length - 1)
        ending = filler if letter == "-" else rhymes[ord(letter) - ord("A")]
        mark = "，" if letter == "-" else "。"
        text += "".join(line) + chance.choice(ending) + mark
    return text


@pytest.fixture(scope="module")
def records():
    chance = random.Random(0)
    found = [{"title": "一调", "content": poem(chance)} for _ in range(60)]
    for _ in range(40):
        text = poem(chance, "AABB", (4, 4, 4, 4))
        found.append({"title": "换韵", "content": text})
    for lengths in ((3, 3), (4, 4), (5, 5)) * 8:   # a title without a pattern
        text = poem(chance, "AA", lengths)
        found.append({"title": "无定", "content": text})
    return found


@pytest.fixture(scope="module")
def judge(records):
    return Judge.learn(records, n_classes=4)


# ---- clauses and patterns


@pytest.mark.parametrize(
    "text, found",
    [
        ("", []),
        ("\n \u3000", []),
        ("林断山明竹隐墙。", [("林断山明竹隐墙", "。")]),
        ("知否？\n知否！", [("知否", "？"), ("知否", "！")]),
        ("“去、来”；", [("去来", "；")]),
        ("无尾", [("无尾", "")]),
        ("，。", [("", "，"), ("", "。")]),
        ("𠮷a1。", [("𠮷a1", "。")]),
    ],
)
def test_clauses(text, found):
    assert clauses(text) == found


def test_what_clauses_loses_is_only_what_counts_as_nothing(records):
    for record in records:
        joined = "".join(itertools.chain.from_iterable(clauses(record["content"])))
        assert joined == record["content"]


def test_marks_are_those_of_most_poems():
    poems = [clauses("山，水。"), clauses("山。水？"), clauses("山，水。")]
    assert usual_marks(poems) == "，。"
    assert endings_of(poems) == ["水", "水", "水"]


@pytest.mark.parametrize("many, few, is_rule", [(19, 0, 0), (20, 0, 1), (45, 6, 0)])
def test_nine_of_ten_and_twenty_poems_make_a_rule(many, few, is_rule):
    poems = {(2, 2): [clauses("山水，山水。")] * many, (1,): [clauses("山。")] * few}
    assert dominant(poems) == ((2, 2) if is_rule else None)


def test_groups_end_where_a_rhyme_ends():
    assert cut("abcd", [True, True, True]) == ["abcd"]
    assert cut("abcd", [True, False, True]) == ["ab", "cd"]
    assert cut("abcd", [False, True, False]) == ["bc"]
    assert cut("ab", [False]) == []


def test_letters_name_the_groups():
    assert letters("。，。。", [True, False]) == "A-AB"
    assert letters("，。", []) == "-A"


# ---- the rhyme table


def test_a_step_never_lowers_the_fit():
    chance = random.Random(1)
    groups = ["".join(chance.choices("abcdef", k=3)) for _ in range(50)]
    _, counts = count_matrix(groups)
    generator = torch.Generator().manual_seed(0)
    belongs = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    belongs = belongs / belongs.sum(1, keepdim=True)
    last = -math.inf
    for _ in range(30):
        sizes, spread = maximization(counts, belongs, smoothing=0)
        belongs, fit = expectation(counts, sizes, spread.clamp(min=1e-300))
        assert fit >= last - 1e-9
        last = fit


def test_the_table_finds_the_rhymes(judge):
    for group in (FIRST, SECOND):
        assert all(judge.table.rhyme(a, b) for a in group for b in group)
    assert not any(judge.table.rhyme(a, b) for a in FIRST for b in SECOND)


def test_the_same_seed_gives_the_same_table():
    groups = ["甲乙", "乙丙", "子丑", "丑寅"] * 3
    tables = [RhymeTable.learn(groups, n_classes=2, seed=5) for _ in range(2)]
    assert tables[0].shares == tables[1].shares
    assert tables[0].sizes == tables[1].sizes


def test_an_unknown_character_rhymes_with_itself_alone(judge):
    assert judge.table.rhyme("龘", "龘")
    assert not judge.table.rhyme("龘", "甲")
    assert not judge.table.rhyme("甲", "龘")


def test_rhymes_of_a_pattern_are_found(records, judge):
    found = by_pattern(records)
    poems = endings_of(found["换韵"][4, 4, 4, 4])
    assert links(judge.table, poems) == [True, False, True]


# ---- the judge


def test_the_judge_learns_tunes_and_schemes(judge):
    assert judge.commonest(2) == ["一调", "换韵"]
    assert set(judge.tunes) == {"一调", "换韵"}
    assert judge.tunes["一调"] == ((5, "。"), (5, "。"), (7, "，"), (5, "。"))
    assert judge.rhymes == {"一调": "AA-A", "换韵": "AABB"}


def test_other_poems_of_the_tune_pass(judge):
    chance = random.Random(9)
    for _ in range(50):
        verdict = judge.examine("一调", poem(chance))
        assert verdict.passes and verdict.form and verdict.rhyme == 1
        assert [line.rhymes for line in verdict.clauses] == [None, True, None, True]
        assert judge.examine("换韵", poem(chance, "AABB", (4, 4, 4, 4))).passes


GOOD = "山山山山甲。山山山山乙。山山山山山山山，山山山山丙。"
WRONG = {   # what is wrong: (text, form, rhyme)
    "nothing": (GOOD, True, 1),
    "another mark": (GOOD.replace("甲。", "甲！"), True, 1),
    "line breaks": (GOOD.replace("。", "。\n"), True, 1),
    "a pause": (GOOD.replace("山山甲", "山、山甲"), True, 1),
    "a rhyme": (GOOD.replace("丙", "子"), True, 0.5),
    "both rhymes": (GOOD.replace("乙", "子"), True, 0),
    "a character less": (GOOD.replace("山甲", "甲"), False, 1),
    "a character more": (GOOD.replace("山乙", "山山乙"), False, 1),
    "no rhyme there": (GOOD.replace("，", "。"), False, 1),
    "a comma": (GOOD.replace("乙。", "乙，"), False, 1),
    "no end": (GOOD[:-1], False, 1),
    "a clause less": (GOOD[:-6], False, 0.5),
    "a clause more": (GOOD + "山山山山丙。", False, 1),
    "nothing there": ("", False, 0),
    "an empty clause": ("。" + GOOD, False, 0),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_seen(judge, what):
    text, is_right, rhyme = WRONG[what]
    verdict = judge.examine("一调", text)
    assert (verdict.form, verdict.rhyme) == (is_right, rhyme)
    assert verdict.passes == (is_right and rhyme == 1)
    assert len(verdict.clauses) == max(4, len(clauses(text)))


def test_a_line_says_where(judge):
    lines = judge.examine("一调", GOOD[:-6]).clauses
    assert lines[3] == ("", 0, 5, False, False)
    lines = judge.examine("一调", GOOD + "山，").clauses
    assert lines[4] == ("山，", 1, None, False, None)


def test_no_rhyme_asked_for_is_no_rhyme_found(judge):
    alone = Judge({"独": ((2, "。"),)}, {"独": "A"}, judge.table)
    verdict = alone.examine("独", "山甲。")
    assert verdict.form and math.isnan(verdict.rhyme) and not verdict.passes


def test_an_unknown_tune_is_refused(judge):
    with pytest.raises(UserError, match="no pattern of '无定'.*一调"):
        judge.examine("无定", GOOD)


def test_a_judge_comes_back_from_its_file(judge, tmp_path):
    judge.save(tmp_path / "judge.json")
    loaded = Judge.load(tmp_path / "judge.json")
    assert list(loaded.tunes.items()) == list(judge.tunes.items())
    assert loaded.rhymes == judge.rhymes
    assert loaded.table.shares == judge.table.shares
    assert loaded.table.sizes == judge.table.sizes
    for text, _, _ in WRONG.values():
        assert loaded.examine("一调", text) == judge.examine("一调", text)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tunes": 7}', "\ufeff"])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "judge.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="judge.json: no judge; delete it"):
        Judge.load(tmp_path / "judge.json")


# ---- the judge of the corpus


def test_the_split_is_that_of_training(records, tmp_path):
    path = tmp_path / "poems.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    kept, held_out = split_records(path)
    assert len(kept) + len(held_out) == len(records)
    assert all(hash_fraction(record["content"]) < 0.03 for record in held_out)
    assert all(hash_fraction(record["content"]) >= 0.03 for record in kept)


def test_the_judge_is_learnt_once(records, tmp_path, monkeypatch):
    path = tmp_path / "poetry.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(form, "build_poetry", lambda: path)
    monkeypatch.setattr(form, "DATA", tmp_path)
    home_judge.cache_clear()
    first = home_judge()
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(Judge, "learn", None)   # not to be called again
    home_judge.cache_clear()
    assert home_judge().tunes == first.tunes
    assert home_judge() is home_judge()
    assert list((tmp_path / "cache").iterdir()) == files
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    home_judge.cache_clear()
    with pytest.raises(TypeError):   # another corpus: it has to be learnt again
        home_judge()
    home_judge.cache_clear()
