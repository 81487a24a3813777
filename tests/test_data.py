"What the tokenizer and the data pipeline do with what nobody expects."
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
import torch

import minikl.data
import minikl.jsonl
import minikl.tokenizer
from minikl import corpora, data
from minikl.corpora import (
    CannotFetch,
    build_corpus,
    build_poetry,
    build_toy,
    fetch_poetry,
)
from minikl.data import (
    Documents,
    TokenFile,
    build_tokens,
    fingerprint,
    hash_fraction,
    plain_fingerprint,
    sample_pieces,
    shuffled,
)
from minikl.files import UserError, file_sha256
from minikl.jsonl import read_jsonl, record_text
from minikl.tokenizer import SPECIAL_TOKENS, Tokenizer

HALF = "\ud83d"   # half a surrogate pair
ROOT = Path(__file__).resolve().parent.parent


def jsonl(path, *texts):
    "A corpus with these texts; escapes, so that halves of pairs can be written."
    lines = [json.dumps({"content": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tokenizer(*texts, vocab_size=300):
    return Tokenizer.train(texts or ["一生一代一双人"] * 2, vocab_size)


# ---- where things go


def copied_package(folder):
    "The package without the project around it, as pip installs it."
    package = folder / "site-packages" / "minikl"
    package.mkdir(parents=True)
    for path in (ROOT / "minikl").glob("*.py"):
        (package / path.name).write_bytes(path.read_bytes())
    return package


def place_of(package, monkeypatch):
    "What `home` answers for a package that lies there."
    monkeypatch.setattr(minikl, "__file__", str(package / "__init__.py"))
    return corpora.home()


def test_home_is_the_folder_data_of_the_project(monkeypatch):
    monkeypatch.delenv("MINIKL_HOME", raising=False)
    assert corpora.home() == ROOT / "data"


def test_home_of_an_installed_package_is_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIKL_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = place_of(copied_package(tmp_path), monkeypatch)
    assert tmp_path in found.parents and "site-packages" not in found.parts


def test_home_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIKL_HOME", "here")
    assert corpora.home() == tmp_path / "here"


def test_import_creates_nothing_and_the_toy_corpus_is_built_at_home(tmp_path):
    package = copied_package(tmp_path)
    environment = {
        **os.environ,
        "MINIKL_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(package.parent),
    }
    code = (
        "from minikl import corpora; print(corpora.DATA.exists(), corpora.__file__); "
        "print(corpora.build_toy())"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    before, toy = done.stdout.splitlines()
    assert before == f"False {package / 'corpora.py'}"
    assert Path(toy) == tmp_path / "home" / "toy.jsonl"
    assert Path(toy).read_bytes() == (ROOT / "data" / "toy.jsonl").read_bytes()


# ---- names of what was built


def test_another_pattern_gives_other_tokens(tmp_path, monkeypatch):
    corpus = jsonl(tmp_path / "a.jsonl", "ab ab")
    vocabulary = tokenizer("ab ab")
    folder = build_tokens(corpus, vocabulary, tmp_path)
    plain = plain_fingerprint(corpus)
    monkeypatch.setattr(minikl.tokenizer, "SPLIT", re.compile("."))
    assert build_tokens(corpus, vocabulary, tmp_path) != folder
    assert plain_fingerprint(corpus) == plain


def test_another_code_gives_another_fingerprint(tmp_path, monkeypatch):
    corpus = jsonl(tmp_path / "a.jsonl", "ab")
    package = copied_package(tmp_path)
    names = set()
    for name in (None, "bpe.py", "tokenizer.py", "jsonl.py", "data.py"):
        if name:
            with open(package / name, "a", encoding="utf-8") as file:
                file.write("# edited\n")
        monkeypatch.setattr(minikl, "__file__", str(package / "__init__.py"))
        data.hash_of_code.cache_clear()
        names.add(fingerprint(corpus, 1))
    data.hash_of_code.cache_clear()
    assert len(names) == 5


def test_the_old_fingerprint_is_still_known(tmp_path):
    corpus = jsonl(tmp_path / "a.jsonl", "ab")
    vocabulary = {"a": 0, HALF: 1}
    settings = [[vocabulary, "error"], file_sha256(corpus)]
    old = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    assert plain_fingerprint(corpus, vocabulary, "error") == old
    assert fingerprint(corpus, vocabulary, "error") != old


def test_a_token_file_is_named_after_data_and_vocabulary(tmp_path, monkeypatch):
    "As in checkpoints of older versions; the folder is of the code, too."
    vocabulary = tokenizer("ab")
    path = jsonl(tmp_path / "a.jsonl", "ab")
    folder = build_tokens(path, vocabulary, tmp_path)
    name = f"tokens-{plain_fingerprint(path, vocabulary.vocab, 'error')}"
    assert TokenFile(folder).name == name
    monkeypatch.setattr(minikl.tokenizer, "SPLIT", regex.compile(r"[a-z]|."))
    edited = build_tokens(path, vocabulary, tmp_path)
    assert edited != folder and TokenFile(edited).name == TokenFile(folder).name


def test_without_verifying_no_column_is_hashed(tmp_path, monkeypatch):
    folder = build_tokens(jsonl(tmp_path / "a.jsonl", "ab"), tokenizer("ab"), tmp_path)
    tokens = TokenFile(folder).tokens.tolist()
    monkeypatch.setattr(data, "file_sha256", None)
    assert TokenFile(folder, verify=False).tokens.tolist() == tokens
    (folder / "ends").unlink()
    with pytest.raises(UserError, match="ends: damaged"):
        TokenFile(folder, verify=False)


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "[]",
        "5",
        "null",
        '"sha256"',
        '{"sha256": 5}',
        '{"sha256": {"tokens": "0"}}',
        pytest.param("[" * 200_000, id="nested"),
    ],
)
def test_a_damaged_table_of_contents_is_named(contents, tmp_path):
    folder = build_tokens(jsonl(tmp_path / "a.jsonl", "ab"), tokenizer("ab"), tmp_path)
    (folder / "meta.json").write_text(contents)
    for verify in (True, False):
        with pytest.raises(UserError, match="damaged.*delete this folder"):
            TokenFile(folder, verify=verify)


def test_two_builders_at_once_share_one_result(tmp_path):
    corpus = jsonl(tmp_path / "a.jsonl", "ab")
    vocabulary = tokenizer("ab")
    meet = threading.Barrier(2)
    found = []

    def encode_batch(texts, **options):
        meet.wait(timeout=30)   # neither is done before the other has begun
        return vocabulary.encode_batch(texts, **options)

    waiting = SimpleNamespace(
        vocab=vocabulary.vocab, special=vocabulary.special, encode_batch=encode_batch
    )

    def build():
        found.append(build_tokens(corpus, waiting, tmp_path / "cache"))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 2 and len(set(found)) == 1
    assert list((tmp_path / "cache").iterdir()) == found[:1]
    assert TokenFile(found[0]).counts["documents"] == 1


# ---- what cannot be fetched


@pytest.fixture
def npm(tmp_path, monkeypatch):
    "Puts an npm into PATH that is this shell script."
    if os.name == "nt":
        pytest.skip("needs a shell")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "printf"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(corpora, "find_spec", {}.get)

    def install(script):
        path = programs / "npm"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return install


def test_no_npm(npm, tmp_path):
    with pytest.raises(CannotFetch, match="npm is needed .* install Node.js"):
        fetch_poetry(tmp_path / "built")


TWO_LINES = "printf 'npm error code E500\\nnpm error no' >&2; exit 1"


@pytest.mark.parametrize(
    "script, said",
    [
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", "npm error code ENOTFOUND$"),
        (TWO_LINES, "E500 npm error no"),
        ("printf '\\377\\351' >&2; exit 1", "could not fetch"),   # not UTF-8
        ("exit 1", "no answer"),
        ("echo junk > chinese-poetry-2.0.1.tgz", "damaged or not the one expected"),
    ],
)
def test_npm_fails(npm, script, said, tmp_path):
    npm(script)
    with pytest.raises(CannotFetch, match=said) as caught:
        fetch_poetry(tmp_path / "built")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "built").iterdir()) == []


def test_npm_is_asked_to_say_what_went_wrong(npm, tmp_path):
    npm('echo "$@" >&2; exit 1')
    with pytest.raises(CannotFetch) as caught:
        fetch_poetry(tmp_path / "built")
    assert "--silent" not in str(caught.value)


@pytest.mark.parametrize(
    "script, free",
    [
        ("echo half > a.tgz; echo 'npm error code ENOSPC' >&2; exit 1", 10**9),
        ("exit 1", 999_999),
    ],
)
def test_a_full_disk_is_no_missing_network(npm, script, free, tmp_path, monkeypatch):
    npm(script)
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(corpora.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError) as caught:
        fetch_poetry(tmp_path / "built")
    assert not isinstance(caught.value, CannotFetch)
    assert caught.value.errno == errno.ENOSPC


def test_a_place_that_cannot_be_written_is_no_missing_network(npm, tmp_path):
    npm("exit 1")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        build_poetry(tmp_path / "file" / "folder")
    assert not isinstance(caught.value, CannotFetch)


@pytest.mark.parametrize("damage", ["empty", "junk", "cut"])
def test_a_damaged_archive_is_named(damage, tmp_path):
    noise = io.BytesIO(random.Random(0).randbytes(100_000))
    member = tarfile.TarInfo("package/dist/lunyu/lunyu.json")
    member.size = 100_000
    with tarfile.open(tmp_path / "whole.tgz", "w:gz") as tar:
        tar.addfile(member, noise)
    whole = (tmp_path / "whole.tgz").read_bytes()
    content = {"empty": b"", "junk": b"junk", "cut": whole[:50_000]}[damage]
    (tmp_path / "chinese-poetry-2.0.1.tgz").write_bytes(content)
    with pytest.raises(UserError, match="poetry-2.0.1.tgz: damaged.*delete it"):
        build_poetry(tmp_path)


# ---- an even sample


def test_short_documents_are_sampled_as_ever():
    texts = [str(i) for i in range(2000)]
    for share, held_out in ((0.1, 0.03), (0.5, 0.2), (1, 0.03)):
        last = held_out + share * (1 - held_out)
        within = [text for text in texts if held_out <= hash_fraction(text) <= last]
        assert list(sample_pieces(iter(texts), share, held_out)) == within


def test_a_dozen_books_are_sampled_evenly():
    books = [random.Random(i).randbytes(1_000_000).hex() for i in range(12)]
    sample = list(sample_pieces(books, 0.3, 0.03))
    assert max(map(len, sample)) <= 65_536
    assert 0.2 < sum(map(len, sample)) / sum(map(len, books)) < 0.4
    for book in books:
        assert any(piece in book for piece in sample) == (hash_fraction(book) >= 0.03)
    held_out = [book for book in books if hash_fraction(book) < 0.5]
    sample = list(sample_pieces(books, 0.3, 0.5))
    assert held_out and not any(piece in book for book in held_out for piece in sample)


def test_a_sample_is_never_empty_where_there_is_text():
    books = [letter * 70_000 for letter in "abcdefgh"]
    first = next(book for book in books if hash_fraction(book) >= 0.3)
    assert list(sample_pieces(books, 1e-12, 0.3)) == [first]
    assert list(sample_pieces(books, 1, 0)) == books   # all of it: nothing is cut
    assert list(sample_pieces([], 0.5, 0.03)) == []


# ---- half surrogate pairs


def test_half_a_pair_in_a_vocabulary_comes_back(tmp_path):
    tokens = [HALF, "!", "a", f"<{HALF}x>", "🙂", HALF + "!"]
    vocabulary = Tokenizer({token: i for i, token in enumerate(tokens)})
    vocabulary.save(tmp_path / "v.json")
    again = Tokenizer.load(tmp_path / "v.json")
    assert again.vocab == vocabulary.vocab and again.special == {f"<{HALF}x>": 3}
    text = f"a{HALF}!🙂{HALF}"
    assert again.encode(text) == [2, 5, 4, 0] and again.decode([2, 5, 4, 0]) == text
    assert again.encode_batch([text] * 2000) == [[2, 5, 4, 0]] * 2000
    assert again.encode(f"a<{HALF}x>", allowed_special=[f"<{HALF}x>"]) == [2, 3]


def test_two_halves_that_json_would_join_are_refused(tmp_path):
    vocabulary = Tokenizer({HALF: 0, "\ude42": 1, HALF + "\ude42": 2})
    with pytest.raises(UserError, match="v.json: JSON cannot hold"):
        vocabulary.save(tmp_path / "v.json")
    assert list(tmp_path.iterdir()) == []


def test_half_a_pair_is_nothing_for_hugging_face(tmp_path):
    with pytest.raises(UserError, match="t.json: .*half a surrogate pair"):
        Tokenizer({HALF: 0}).save_huggingface(tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_half_a_pair_in_names_and_settings(tmp_path):
    special = f"<{HALF}x>"
    trained = Tokenizer.train([f"a{HALF}b a{HALF}b"], 300, (*SPECIAL_TOKENS, special))
    assert trained.decode(trained.encode(f"a{HALF}")) == f"a{HALF}"
    corpus = jsonl(tmp_path / "a.jsonl", f"a{HALF}b", HALF)
    assert list(read_jsonl(corpus)) == [f"a{HALF}b", HALF]
    folder = build_tokens(corpus, trained, tmp_path)
    assert TokenFile(folder).n_chars.tolist() == [3, 1]
    assert len(fingerprint(corpus, {special: 0})) == 16
    for baseline in (data.bigram_bits_per_char, corpora.xz_bits_per_char):
        assert baseline([f"a{HALF}b"], [HALF]) > 0


def test_a_file_name_that_is_not_unicode(tmp_path):
    name = os.fsdecode(b"a\xff.jsonl")
    try:
        (tmp_path / name).write_text('{"text": ""}\n{"text": "ab"}\n{"tex\n')
    except OSError:
        pytest.skip("this file system wants Unicode")
    folder = build_tokens(tmp_path / name, tokenizer("ab"), tmp_path / "cache", "skip")
    passed_over = (folder / "passed_over.txt").read_text(encoding="utf-8").splitlines()
    assert len(passed_over) == 2
    assert passed_over[0].endswith("a\\udcff.jsonl:1: no text")


def test_half_a_pair_in_a_corpus_that_is_built(tmp_path):
    record = {"content": f"a{HALF}b"}
    path = build_corpus(tmp_path, ["c.jsonl"], [("c.jsonl", record)])
    assert list(read_jsonl(path)) == [f"a{HALF}b"]


# ---- only regular files


def read_all(paths):
    return list(read_jsonl(paths))


@pytest.mark.parametrize("use", [read_all, fingerprint, plain_fingerprint])
def test_only_regular_files_are_data(use, tmp_path):
    good = jsonl(tmp_path / "good.jsonl", "a")
    wrong = {tmp_path: "a folder; name the files in it"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jsonl.gz")
        wrong[tmp_path / "pipe.jsonl.gz"] = "not a regular file; write its text"
        wrong["/dev/zero"] = "not a regular file; write its text"
    for path, message in wrong.items():
        with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message):
            use([good, path])
    with pytest.raises(FileNotFoundError):
        use([good, tmp_path / "none.jsonl"])
    (tmp_path / "link.jsonl").symlink_to(good)
    use([good, tmp_path / "link.jsonl"])


def test_all_files_are_looked_at_before_any_is_read(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", "a")
    with pytest.raises(UserError, match="not a regular file"):
        next(read_jsonl([good, tmp_path]))


# ---- records and vocabularies


def test_null_is_no_text():
    assert record_text({"content": None, "text": "ok"}) == "ok"
    assert record_text({"para": ["a", "b"], "text": None}) == "a\nb"
    assert record_text({"content": None, "text": None}) == ""
    assert record_text({"content": "", "text": "second"}) == ""


def test_null_is_counted_as_empty(tmp_path):
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"content": null}\n{"content": null, "text": "ok"}\n')
    told = []

    def report(kind, line):
        told.append(kind)

    assert list(read_jsonl(corpus, report=report)) == ["ok"]
    assert told == ["empty"]


@pytest.mark.parametrize("depth", [100, 950, 970, 990, 200_000])
def test_a_vocabulary_of_brackets(depth, tmp_path):
    (tmp_path / "v.json").write_text('{"a":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(UserError, match="v.json: ") as caught:
        Tokenizer.load(tmp_path / "v.json")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_what_is_no_damage_keeps_its_traceback(tmp_path, monkeypatch):
    class Broken:
        def __enter__(self):
            return iter(self.lines())

        def __exit__(self, *error):
            return None

        def lines(self):
            raise MemoryError
            yield

    corpus = jsonl(tmp_path / "a.jsonl", "a")
    monkeypatch.setattr(minikl.jsonl, "open", lambda *_: Broken(), raising=False)
    with pytest.raises(MemoryError):
        list(read_jsonl(corpus))


@pytest.mark.parametrize(
    "content, why",
    [
        ("", "no documents"),
        ("{", "toy.jsonl:1: not JSON"),
        ('{"content": "a"}\n{"con', "broken off"),
    ],
)
def test_a_damaged_corpus_of_ours_is_named(content, why, tmp_path):
    (tmp_path / "toy.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"{why}.*; delete it to have it built again"):
        build_toy(tmp_path)


# ---- order


def test_every_seed_has_an_order():
    for seed in (0, 1, 41, 9_223_000_000_000):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 2)
        expected = torch.randperm(50, generator=generator)
        assert shuffled(50, seed, 2).tolist() == expected.tolist()
    large = (20_250_101_123_456, 2**63 - 2, 2**63 - 1)
    orders = {tuple(shuffled(50, seed, 0).tolist()) for seed in large}
    assert len(orders) == 3
    ones = torch.ones(5, dtype=torch.long)
    numbers = SimpleNamespace(
        tokens=torch.arange(5),
        ends=ones.cumsum(0),
        starts=ones.cumsum(0) - 1,
        n_chars=ones,
    )
    drawn = Documents(numbers, torch.arange(5), 8).draw(0, 5, seed=2**63 - 1)
    assert sorted(drawn) == list(range(5))


# ---- the C locale


def test_the_locale_does_not_matter(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from minikl.corpora import build_corpus; from minikl.data import *\n"
        "from minikl.jsonl import read_jsonl; from minikl.tokenizer import Tokenizer\n"
        "folder = Path(sys.argv[1])\n"
        "record = {'content': chr(0x4e00) * 3}\n"
        "corpus = build_corpus(folder, ['c.jsonl'], [('c.jsonl', record)])\n"
        "Tokenizer.train(read_jsonl(corpus), 300).save(folder / 'v.json')\n"
        "tokenizer = Tokenizer.load(folder / 'v.json')\n"
        "file = TokenFile(build_tokens(corpus, tokenizer, folder))\n"
        "print(file.n_chars.tolist())"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env={**os.environ, **locale},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "[3]\n"), done.stderr
