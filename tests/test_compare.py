"Models side by side: what is counted, found, asked, written and refused."
import html
import json
import math
import random
import re

import pytest
import torch

from minikl import compare, compared
from minikl.asking import Writer, bits_of, pieces
from minikl.chat import with_roles
from minikl.compare import (
    ENOUGH,
    Contest,
    Copies,
    characters,
    distinct,
    judge_poems,
    rhyme_pairs,
    sorted_places,
    wilson,
)
from minikl.files import UserError
from minikl.form import Judge
from minikl.model import MiniKL, MiniKLConfig
from minikl.recorded import read_comparison
from minikl.rhyme import RhymeTable
from minikl.tokenizer import Tokenizer

TUNES = {"短": ((3, "，"), (3, "。"), (5, "，"), (3, "。")), "换": ((2, "。"),) * 4}
GOOD = {"短": "山水云，山水甲。山水云月花，山水乙。", "换": "山甲。山乙。山子。山丑。"}


@pytest.fixture(scope="module")
def judge():
    shares = {}
    for kind, group in enumerate(("甲乙丙", "子丑寅")):
        shares |= {character: {kind: 1.0} for character in group}
    table = RhymeTable([0.5, 0.5], shares)
    return Judge(TUNES, {"短": "-A-A", "换": "AABB"}, table)


@pytest.fixture(scope="module")
def contest(judge):
    texts = [*GOOD.values(), "云月花，水月甲。"]
    return Contest(judge, Copies(texts), list(TUNES), texts, list(GOOD.items()))


def save(folder, roles=True, seed=0):
    "A tiny model that has learnt nothing."
    texts = [*GOOD.values(), "写一首《短》《换》"]
    chars = set("".join(texts))
    tokenizer = Tokenizer.train(texts, 260 + len(chars), character_coverage=1)
    if roles:
        tokenizer = with_roles(tokenizer)
    torch.manual_seed(seed)
    config = MiniKLConfig(
        d_model=8, num_heads=2, num_kv_heads=1, num_layers=1, d_ff=8,
        vocab_size=len(tokenizer), max_seq_len=48,
    )
    model = MiniKL(config)
    model.save(folder)
    tokenizer.save(folder / "vocab_dict.json")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for name in ("asked", "plain"):
        (home / name).mkdir()
    return save(home / "asked"), save(home / "plain", roles=False)


# ---- intervals


@pytest.mark.parametrize(
    "count, n, low, high",   # Wilson's, from R's prop.test without correction
    [(18, 20, 0.6990, 0.9721), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1)],
)
def test_wilson(count, n, low, high):
    assert wilson(count, n) == pytest.approx((low, high), abs=1e-4)


def test_intervals_hold_the_share_and_shrink():
    for n in (1, 7, 192):
        for count in range(n + 1):
            low, high = wilson(count, n)
            share = count / n
            assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100, 384))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] / 2 == pytest.approx(0.05, abs=0.001)
    assert wilson(0, 0) == (0, 1)


# ---- variety


def test_distinct_counts_no_marks_and_no_pair_across_texts():
    assert distinct(["春风，春雨。"], 1) == 3 / 4
    assert distinct(["春、风\n春", "风春"], 2) == 2 / 3
    assert math.isnan(distinct(["。", ""], 1)) and math.isnan(distinct(["春"], 2))


def test_distinct_looks_at_equal_amounts():
    texts = ["春" * 10, "".join(map(chr, range(0x4E00, 0x4E00 + 90)))]
    assert distinct(texts, 1, enough=10) == 1 / 10
    assert distinct(texts, 1, enough=20) == 11 / 20
    more = [*texts, "花" * 50] * 100
    assert distinct(more, 1) == distinct([characters("".join(more))[:ENOUGH]], 1)


# ---- copies


def longest_naive(text, corpus):
    for size in range(len(text), 0, -1):
        for start in range(len(text) - size + 1):
            if text[start : start + size] in corpus:
                return text[start : start + size]
    return ""


@pytest.mark.parametrize("alphabet", ["ab", "春江花月夜", "a\U00020bb7\ud800春"])
def test_places_are_sorted(alphabet):
    chance = random.Random(0)
    for n in (1, 2, 3, 50, 200):
        text = "".join(chance.choices(alphabet, k=n))
        assert sorted_places(text) == sorted(range(n), key=lambda i: text[i:])
    assert sorted_places("a" * 9) == list(range(8, -1, -1))


@pytest.mark.parametrize("alphabet", ["甲乙", "春江花月夜", "甲乙丙丁戊己庚辛壬癸云"])
def test_copies_are_those_of_the_naive_search(alphabet):
    chance = random.Random(1)
    for _ in range(20):
        texts = []
        for _ in range(8):
            texts.append("".join(chance.choices(alphabet, k=chance.randint(0, 30))))
        copies = Copies(texts)
        corpus = "\n".join(texts)
        for _ in range(10):
            text = "".join(chance.choices(alphabet, k=chance.randint(0, 25)))
            assert copies.longest(text) == longest_naive(text, corpus)


def test_copies_stay_inside_a_text_and_pass_over_marks():
    copies = Copies(["一江、春水。", "向东流。"])
    assert copies.longest("一江春，水向东") == "一江春水"
    assert copies.longest("向东流一江") == "向东流"
    assert copies.longest("一江春水") == "一江春水"
    assert copies.longest("龘。") == copies.longest("") == ""
    assert Copies([]).longest("春") == Copies(["。"]).longest("春") == ""


# ---- rhymes and all together


def test_the_pairs_are_those_that_the_judge_hears(judge):
    chance = random.Random(2)
    for tune, pattern in TUNES.items():
        for _ in range(50):
            marks = [mark for _, mark in pattern][: chance.randint(0, 6)]
            clauses = ("".join(chance.choices("甲乙子丑云", k=3)) + m for m in marks)
            text = "".join(clauses)
            verdict = judge.examine(tune, text)
            pairs = rhyme_pairs(judge, tune, verdict)
            heard = [all(pair) and judge.table.rhyme(*pair) for pair in pairs]
            assert sum(heard) / len(heard) == verdict.rhyme


def test_what_a_good_poem_comes_to(judge, contest):
    found = judge_poems(list(GOOD.items()), judge, contest.copies)
    assert found["form"] == found["clauses"] == found["rhyme"] == 1
    assert found["same"] == 0 and found["n_poems"] == 2
    assert found["copied_text"] == characters(GOOD["短"])
    assert found["copied"] == (14 + 8) / 2
    json.dumps(found, allow_nan=False)


def test_what_nothing_comes_to(judge, contest):
    found = judge_poems([("短", ""), ("换", "。")], judge, contest.copies)
    assert found["form"] == found["clauses"] == found["rhyme"] == found["same"] == 0
    assert found["distinct_1"] is None and found["copied_most"] == 0
    json.dumps(found, allow_nan=False)


def test_the_same_character_is_no_art(judge, contest):
    found = judge_poems([("换", "山甲。山甲。山甲。山甲。")], judge, contest.copies)
    assert found["rhyme"] == found["same"] == 1


def test_without_the_dictionary(judge, contest, monkeypatch):
    def missing(*_):
        raise UserError("not possible without the package pypinyin")

    monkeypatch.setattr(compare, "needed", missing)
    result = contest.poets()
    assert result["pinyin"] is None and result["rhyme"] == 1
    page = compared.render([result], "", judge)
    assert "pypinyin is not installed" in page


def test_with_the_dictionary():
    pytest.importorskip("pypinyin")
    assert compare.pinyin_rhyme("红", "中") and not compare.pinyin_rhyme("红", "香")
    assert not compare.pinyin_rhyme("", "") and not compare.pinyin_rhyme("红", "")


# ---- asking models


def test_pieces_overlap_by_one_token():
    for n in (1, 2, 5, 6, 11, 30):
        ids = list(range(n))
        parts = [part.tolist() for part in pieces(ids, 6)]
        assert sum((part[1:] for part in parts), parts[0][:1]) == ids
        assert max(map(len, parts)) <= 6 and all(len(p) > 1 for p in parts[1:])


def test_bits_are_those_of_the_tokens(folders):
    model = Writer(folders[0]).model
    ids = torch.tensor([1, 261, 262, 263, 2])
    logits = model(ids[None], torch.arange(5)[None], plain_attend)[0]
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    bits = bits_of(model, [ids.tolist()])
    assert bits == pytest.approx(nats.item() / math.log(2), rel=1e-4)
    read = [1, ~261, ~262, 263, 2]   # the first two cost nothing
    nats = torch.nn.functional.cross_entropy(logits[2:-1], ids[3:], reduction="sum")
    assert bits_of(model, [read]) == pytest.approx(nats.item() / math.log(2), rel=1e-4)


def plain_attend(q, k, v):
    from minikl.attention import causal_attention
    return causal_attention(q, k, v)


@pytest.mark.parametrize("which", [0, 1])
def test_answers_do_not_depend_on_their_neighbors(folders, which):
    writer = Writer(folders[which], max_new_tokens=12)
    assert writer.knows_roles == (which == 0)
    requests = ["写一首《短》", "写一首《换》", "写", "写一首《短》"]
    texts = writer.write(requests, seed=3)
    assert writer.write(requests, seed=3, group=2) == texts
    assert texts[1:2] == writer.write(requests[1:2], seed=4)
    assert writer.write(requests, seed=90) != texts


def test_a_request_is_read_and_not_counted(folders):
    "A request in other words changes the bits, and not the number of answers."
    for folder in folders:
        writer = Writer(folder)
        one = writer.answer_bits(["写一首《短》"], [GOOD["短"]])
        other = writer.answer_bits(["写一首《换》"], [GOOD["短"]])
        assert one != other and one == pytest.approx(other, rel=0.1)


def test_a_contest_is_the_same_for_the_same_seed(folders, contest):
    writer = Writer(folders[0], max_new_tokens=20)
    results = [contest.measure(writer, n_poems=2, seed=1) for _ in range(2)]
    for result in results:
        assert result.pop("seconds") > 0
    assert results[0] == results[1]
    assert [poem["tune"] for poem in results[0]["poems"]] == ["短", "换"] * 2


# ---- the script and its page


@pytest.fixture
def at_home(contest, monkeypatch):
    monkeypatch.setattr(Contest, "at_home", lambda n: contest)


def test_the_script_writes_both_files(folders, at_home, script, tmp_path):
    asked, plain = folders
    done = script(compare.main, asked, plain, f"--out={tmp_path}", "--poems=2",
                  "--max_new_tokens=20", "--seed=7")
    assert done.returncode == 0, done.stderr
    assert "poems in exact form" in done.stdout and "95 % interval" in done.stdout
    state = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    names = [result["name"] for result in state["models"]]
    assert names == ["the poets", "asked", "plain"]
    assert state["options"]["seed"] == 7
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "plain was not trained on requests" in page
    assert "asked was not" not in page
    assert not re.search(r"https?:|src=|url\(", page) and 'lang="zh"' in page
    for result in state["models"][1:]:
        assert len(result["poems"]) == 4
        shown = f"{result['plain_bits']:.2f}"
        assert shown in page and shown in done.stdout


def test_the_first_folder_gets_the_page(folders, at_home, script):
    asked, _ = folders
    done = script(compare.main, asked, "--poems=1", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    assert (asked / "compare.html").exists()
    figures = read_comparison(asked)
    assert figures["name"] == "asked" and 0 <= figures["form"] <= 1
    assert read_comparison(asked.parent) == {}


def test_two_folders_of_one_name(folders, at_home, script, tmp_path):
    (tmp_path / "asked").mkdir()
    other = save(tmp_path / "asked", seed=1)
    done = script(compare.main, folders[0], other, "--poems=1", f"--out={tmp_path}",
                  "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert [result["name"] for result in state["models"][1:]] == [
        str(folders[0]), str(other)
    ]


def test_a_folder_named_twice_is_refused(folders, script, tmp_path):
    asked, plain = folders
    done = script(compare.main, asked, plain, f"{asked}/", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "this one is twice" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused_before_the_work(
    folders, at_home, contest, script, tmp_path, monkeypatch
):
    monkeypatch.setattr(contest, "poets", None)   # the work would begin with them
    (tmp_path / "file").write_text("")
    done = script(compare.main, folders[0], f"--out={tmp_path / 'file' / 'out'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_what_models_write_is_escaped(judge, contest):
    evil = "<script>alert(1)</script>，&amp;。"
    result = contest.judged("<b>me</b>", [("短", evil)])
    page = compared.render([result], "<i>", judge)
    for text in ("<script>", "<b>me", "<i>."):
        assert text not in page
    assert html.escape("<b>me</b>") in page


def test_every_metric_of_a_result_has_words(contest, folders):
    result = contest.measure(Writer(folders[0], max_new_tokens=5), n_poems=1)
    assert compared.METRICS.keys() <= result.keys()
    lines = compared.table([contest.poets(), result]).splitlines()
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1
    assert len(lines) == len(compared.METRICS) + 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["none"], "none: no model.safetensors in this folder"),
        (["asked", "none"], "none: no model.safetensors in this folder"),
        (["asked", "--bogus=1"], "unrecognized arguments: --bogus=1"),
        (["asked", "--poems=0"], "--poems=0: expected 1 to 10000"),
        (["asked", "--poems=x"], "invalid int value: 'x'"),
        (["asked", "--temperature=-1"], "--temperature=-1.0: expected 0 or more"),
        (["asked", "--top_p=0"], "--top_p=0.0: expected more than 0"),
        ([], "required: folders"),
    ],
)
def test_mistakes_are_one_line(arguments, said, folders, script, tmp_path, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    done = script(compare.main, *arguments)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("n", [0, 3])
def test_so_many_tunes_are_not_known(n, judge, monkeypatch):
    monkeypatch.setattr(compare, "home_judge", lambda: judge)
    with pytest.raises(UserError, match=f"--tunes={n}: expected 1 to 2"):
        Contest.at_home(n)
