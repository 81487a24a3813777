"minikl.report: whatever stands in the files, a page or a line that says what is wrong."
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from minikl import files, report
from minikl.files import UserError
from minikl.recorded import read_run
from minikl.report import FEWEST, diagnose, main, symptoms_of, write_report


def line(i, **changes):
    "The i-th line of a healthy run."
    bits = 1 + math.exp(-i)
    found = {
        "step": i, "tokens": 100 * i, "seconds": 0.1 * i, "loss": 2 * bits,
        "gradient_norm": 0.5, "lr": 0.02, "tokens_per_s": 1000.0,
        "train_bits_per_char": bits, "padding": 0.0,
    }
    return found | changes


def evaluation(i, bits=1.01):
    return {"step": i, "seconds": 0.1 * i, "bits_per_char": bits}


def sample(i, text="月"):
    return {"step": i, "prompt": "明", "text": text}


SETTINGS = {
    "command": "train.py",
    "options": {"clip": 1.0, "vocab_size": 600},
    "baselines": {"bigram": 2.0, "xz": 3.0, "entropy of the grammar": 1.0},
    "documents": {"unknown": 0, "tokens": 1000},
    "parameters": 1000,
}
RUN_LINES = [*(line(i) for i in range(1, 21)), evaluation(20)]
SAMPLES = [sample(10), sample(20)]


def to_bytes(thing):
    "JSON, or bytes as they are."
    return thing if isinstance(thing, bytes) else json.dumps(thing).encode()


def write(
    folder,
    metrics=RUN_LINES,  # list of dict, or of bytes as they are
    samples=SAMPLES,    # the same
    settings=SETTINGS,  # dict, or bytes as they are
    running=False,      # a run under way has no settings
):                      # the folder
    "The files of a run."
    place = folder / "running" if running else folder
    place.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics", metrics), ("samples", samples)):
        data = b"".join(to_bytes(line) + b"\n" for line in lines)
        (place / f"{name}.jsonl").write_bytes(data)
    if not running:
        (folder / "run.json").write_bytes(to_bytes(settings))
    return folder


def refused(capsys, *arguments):
    "The one line on stderr with which the script ends."
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    found = capsys.readouterr()
    assert ended.value.code == 2 and found.out == "", found
    assert found.err.startswith("error: ") and found.err.count("\n") == 1, found.err
    return found.err


def test_a_good_run_has_a_page(tmp_path, capsys):
    main([str(write(tmp_path / "out"))])
    assert "Nothing conspicuous" in capsys.readouterr().out
    assert "明" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


BAD_LINES = [
    b"5",
    b"wrong",
    b'{"loss": 1}',
    b"[" * 100_000,
    b"\xff\xfe",
    b"null",
    b"[1]",
    b'"x"',
    b"",
    b"1" * 5000,
    to_bytes(line(3, step="3")),
    to_bytes(line(3, tokens=None)),
    to_bytes(line(3, loss=math.nan)),
    to_bytes(line(3, lr=math.inf)),
    to_bytes(line(3, gradient_norm=1e308)),
    to_bytes(line(3, padding=True)),
    to_bytes(line(3, seconds=10**400)),
    b'{"step": 3, "bits_per_char": "one"}',
    b'{"bits_per_char": 1}',
    b'{"a": ' * 30 + b"1" + b"}" * 30,
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: repr(bad[:30]))
def test_a_damaged_line_is_named(tmp_path, capsys, bad):
    good = [line(i) for i in range(1, 21)]
    out = write(tmp_path / "out", [*good[:2], bad, *good[3:]])
    said = refused(capsys, out)
    assert f"{out}/metrics.jsonl: line 3: " in said and "expected" in said
    assert not (out / "report.html").exists()


BAD_SAMPLES = [b"{}", b"3", b'{"step": 1, "prompt": 1, "text": "x"}', b"x"]


@pytest.mark.parametrize("bad", BAD_SAMPLES)
def test_a_damaged_sample_is_named(tmp_path, capsys, bad):
    out = write(tmp_path / "out", samples=[sample(10), bad, sample(20)])
    assert f"{out}/samples.jsonl: line 2: " in refused(capsys, out)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    out = write(tmp_path / "out", running=True)
    with open(out / "running" / "metrics.jsonl", "ab") as file:
        file.write('{"step": 21, "text": "明'.encode()[:-1])
    run = read_run(out)
    assert (run.finished, len(run.training), run.settings) == (False, 20, {})
    write_report([out])


NO_OBJECTS = [b"null", b"[1]", b'"x"', b"{", b"", b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("bad", NO_OBJECTS)
def test_a_damaged_run_json_is_named(tmp_path, capsys, bad):
    out = write(tmp_path / "out", settings=bad)
    assert f"{out}/run.json: expected a JSON object" in refused(capsys, out)


STRANGE_SETTINGS = [
    {},
    {"options": [1], "baselines": [2], "documents": 3, "parameters": "many"},
    {
        "options": {"clip": "1", "vocab_size": 1},
        "documents": {"unknown": 0, "tokens": 0},
    },
    {
        "options": {"clip": 0, "vocab_size": "x"},
        "documents": {"unknown": "a", "tokens": []},
    },
    {"options": {"clip": -1, "vocab_size": -5}, "documents": {"tokens": 5}},
    {
        "baselines": {
            "bigram": "2", "xz": 0, "x": None, "y": -1, "z": 10**400, "n": math.nan,
        }
    },
    {
        "baselines": {
            "\ud83d": 2.0, "$x$ <b>": 2.0, "": 1.0, "_a": 3.0, "\0\x1b\n": 1.5,
        }
    },
    {"command": "\ud83d", "data": ["\udcff"], "parameters": 10**400, "options": None},
]


@pytest.mark.parametrize("settings", STRANGE_SETTINGS)
def test_strange_settings_are_left_out(tmp_path, settings):
    write_report([write(tmp_path / "out", settings=settings)])


STRANGE_NUMBERS = [
    {"gradient_norm": 0.0},
    {"train_bits_per_char": 0.0, "loss": 0.0},
    {"tokens_per_s": 0.0},
    {"gradient_norm": math.inf},
    {"tokens": 0},
    {"train_bits_per_char": 1e-320},
    {"train_bits_per_char": -1.0},
    {"tokens": 1e39},
    {"lr": 1e39, "tokens_per_s": -1e39},
    {"gradient_norm": 1e39},
    {"train_bits_per_char": 1e39},
    {"step": 10**39},
]


@pytest.mark.parametrize("values", STRANGE_NUMBERS)
def test_strange_numbers_have_a_page(tmp_path, values):
    metrics = [line(i, **values) for i in range(1, 21)] + [evaluation(20)]
    write_report([write(tmp_path / "out", metrics)])


STRANGE_BITS = [0.0, 0, math.nan, math.inf, -math.inf, 1e39, 1e-320, -1]


@pytest.mark.parametrize("bits", STRANGE_BITS)
def test_strange_evaluations_have_a_page(tmp_path, bits):
    metrics = [line(i) for i in range(1, 21)] + [evaluation(10), evaluation(20, bits)]
    settings = SETTINGS if bits else {}
    write_report([write(tmp_path / "out", metrics, settings=settings)])


@pytest.mark.parametrize("n", [1, 2, FEWEST - 1, FEWEST])
def test_a_short_run_has_a_page(tmp_path, n):
    out = write(tmp_path / "out", [line(i) for i in range(1, n + 1)], [], {})
    write_report([out])
    assert ("short" in diagnose(read_run(out))) == (n < FEWEST)


def test_a_run_without_training_is_refused(tmp_path, capsys):
    for metrics in ([], [b"{}"], [evaluation(3)]):
        out = write(tmp_path / "out", metrics)
        assert "no metrics.jsonl with a line of training" in refused(capsys, out)


def test_surrogates_in_texts_and_names(tmp_path, capsys):
    name = os.fsdecode(b"\xff $x$ <b>")
    nasty = write(tmp_path / name, samples=[sample(1, "\ud83d")])
    main([str(nasty), str(write(tmp_path / "b"))])
    page = (nasty / "report.html").read_text(encoding="utf-8")
    assert "\\ud83d" in page and "\\udcff" in page and "<b>" not in page


class Page(HTMLParser):
    "The tags, addresses and words of a page."
    def __init__(self, page):
        super().__init__()
        self.tags = set()
        self.addresses = []
        self.words = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            is_address = name in ("src", "href", "xlink:href")
            if is_address and not value.startswith("#"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.words.append(data)


def test_text_by_strangers_stays_text(tmp_path):
    "A name, data and texts as nasty as they come. The same run has the same page."
    said = {"prompt": "</td><img src=x>", "text": "<script>'二'</script>"}
    settings = {**SETTINGS, "data": ["<script src=http://evil>"]}
    name = "<script>alert(1)<&script> $x$"
    nasty = write(tmp_path / name, samples=[{"step": 20, **said}], settings=settings)
    good = write(tmp_path / "good")
    path, _ = write_report([nasty, good])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe"}
    assert page.addresses == []
    assert "</td><img src=x><script>'二'</script>" in "".join(page.words)
    assert '<html lang="en">' in text and 'charset="utf-8"' in text
    assert write_report([nasty, good])[0].read_text(encoding="utf-8") == text


FRIENDLY = {
    **SETTINGS,
    "parameters": 1_419_904,
    "data": ["/home/somebody/poetry.jsonl"],
    "vocabulary": "C:\\Users\\somebody\\vocab.json",
    "started": "2026-11-28T18:54:06+00:00",
    "device_name": "AMD EPYC",
    "processes": 2,
    "torch": "2.13.0",
    "training_seconds": 180.04184208820001,
    "command": "minikl/train.py --minutes=3 --out_dir='my out' --resume",
}


def words_of(out):   # text
    "What a reader of the page of a run sees, all on one line."
    page = write_report([out])[0].read_text(encoding="utf-8")
    _, _, body = page.partition("</style>")
    return " ".join("".join(Page(body).words).split())


def test_the_page_says_what_when_and_where(tmp_path):
    said = words_of(write(tmp_path / "out", settings=FRIENDLY))
    assert "A model of 1.4 million weights, trained on poetry.jsonl" in said
    assert "28 November 2026, 18:54 · 2 seconds of training" in said
    assert "AMD EPYC, 2 processes · PyTorch 2.13.0" in said
    assert "somebody" not in said
    run_again = "torchrun --nproc-per-node=2 minikl/train.py --minutes=3"
    assert f"{run_again} '--out_dir=my out'" in said and "--resume" not in said


def test_an_old_run_has_no_date(tmp_path):
    said = words_of(write(tmp_path / "out"))
    assert "A model of 1,000 weights" in said and "· " not in said.split("1.01")[0]


@pytest.mark.parametrize("value", [None, 5, "", "yesterday", "<b>", "2026-99-99", []])
def test_a_strange_date_is_left_out(tmp_path, value):
    names = ("started", "device_name", "torch", "processes", "data", "vocabulary")
    settings = {**FRIENDLY, **dict.fromkeys(names, value)}
    out = write(tmp_path / "out", settings=settings)
    assert "2 seconds of training" in words_of(out)
    assert "<b>" not in (out / "report.html").read_text(encoding="utf-8")


def test_numbers_are_rounded(tmp_path):
    page = words_of(write(tmp_path / "out", settings=FRIENDLY))
    said = page.split("Run it again")[1]
    assert "training_seconds180" in said.replace(" ", "")
    assert "parameters1,419,904" in said and "tokens: 1,000" in said
    assert "180.04" not in said and "{" not in said


def test_no_step_stands_there_twice(tmp_path):
    steps = [1, 2, 5, 5, 10, 15, 20, 20]
    samples = [sample(step, f"第{i}首") for i, step in enumerate(steps)]
    out = write(tmp_path / "out", samples=samples)
    said = words_of(out)
    shown = [word for word in said.split() if word.startswith("第")]
    found = re.findall(r"step (\d+) 明第(\d)首", said)
    assert found == [("1", "0"), ("5", "3"), ("10", "4"), ("20", "7")], shown
    assert "continued at 6 steps" in said
    said = words_of(write(tmp_path / "out", samples=[sample(20), sample(20)]))
    assert "texts at one step only, 20" in said and said.count("step 20 明") == 1


def test_the_verse_is_on_top_and_chinese(tmp_path):
    text = "月何处去？不见双影。<b>"
    out = write(tmp_path / "out", samples=[sample(10), sample(20, text)])
    page = write_report([out])[0].read_text(encoding="utf-8")
    verse = '<span class="prompt">明</span>月何处去？\n不见双影。\n&lt;b&gt;</block'
    assert verse in page and "<b>" not in page and page.count('<blockquote') == 1
    assert 'lang="zh">' + verse in page
    samples = [{"step": 20, "prompt": "To be", "text": " or not. So."}]
    page = write_report([write(tmp_path / "out", samples=samples)])[0].read_text()
    assert '<blockquote class="verse ">' in page and " or not. So.</block" in page


def test_the_held_out_figure_stands_beside_the_baselines(tmp_path):
    metrics = [line(i) for i in range(1, 21)]
    metrics += [evaluation(10, 1.5), evaluation(15, 1.2), evaluation(20, 1.25)]
    said = words_of(write(tmp_path / "out", metrics))
    assert "1.25 bits per character" in said
    assert "choose among 2.4 equally likely ones" in said
    assert "38% fewer bits than a bigram table of character pairs (2.00)" in said
    assert "and 25% more bits than the entropy of the grammar" in said
    assert "held-out text was predicted best at step 15: 1.20." in said
    assert "ahead of bigram and xz and not ahead of entropy of the grammar" in said
    said = words_of(write(tmp_path / "out", metrics[:20]))
    assert "of held-out text" not in said and "1.00 bits per character." in said


@pytest.mark.parametrize("name", ["", "nowhere", "file", "nul\0", "\ud83d", "x" * 5000])
def test_no_folder_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here")
    # '' is not '.', in which there is a run
    shutil.copytree(tmp_path / "here", tmp_path, dirs_exist_ok=True)
    (tmp_path / "file").write_text("x")
    assert refused(capsys, name)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    first = write(tmp_path / "a")
    second = write(tmp_path / "b")
    monkeypatch.setattr(report, "svg", FewDrawings())
    main([str(first), str(second)])
    capsys.readouterr()
    assert (first / "report.html").exists() and not (second / "report.html").exists()
    (second / "report.html").mkdir()   # something that no file can replace
    assert "report.html" in refused(capsys, second, first)

    def forbidden(dir, prefix):
        raise PermissionError(13, "Permission denied", f"{dir}/{prefix}x")

    monkeypatch.setattr(files.tempfile, "mkstemp", forbidden)
    assert "Permission denied" in refused(capsys, first)


def test_one_of_several_folders_is_damaged(tmp_path, capsys):
    good = write(tmp_path / "a")
    bad = write(tmp_path / "b", [line(1), b"5"])
    assert f"{bad}/metrics.jsonl: line 2: " in refused(capsys, good, bad)
    assert not (good / "report.html").exists()


def checkpoint(
    out,    # folder of a run
    place,  # of its checkpoints
    step,
    state,  # dict, or bytes as they are
):
    path = out / place / f"step-{step:08}" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(to_bytes(state))


def test_settings_of_a_run_under_way(tmp_path):
    out = write(tmp_path / "out", running=True)
    assert read_run(out).settings == {}
    first = [line(1)]
    before = {"lines": [line(2)], "settings": {"run": "before"}}
    checkpoint(out, "checkpoints", 90, before)
    assert read_run(out).settings == {}
    old = {"lines": first, "settings": {"run": "old version"}}
    checkpoint(out, "checkpoints", 5, old)
    assert read_run(out).settings == {"run": "old version"}
    running = "running/checkpoints"
    checkpoint(out, running, 2, {"lines": [], "settings": {"run": 2}})
    checkpoint(out, running, 10, {"lines": first, "settings": {"run": 10}})
    assert read_run(out).settings == {"run": 10}
    checkpoint(out, running, 20, b"{")
    checkpoint(out, running, 30, b"[" * 100_000)
    checkpoint(out, running, 40, {"settings": 5})
    assert read_run(out).settings == {"run": 10}
    write(out)
    shutil.rmtree(out / "running")
    assert read_run(out).settings == SETTINGS


def test_a_run_of_an_older_version_under_way(tmp_path):
    out = write(tmp_path / "out")
    for name in ("metrics", "samples"):
        (out / f"{name}.jsonl").rename(out / f"{name}.jsonl.running")
    (out / "run.json").unlink()
    run = read_run(out)
    assert (run.finished, len(run.training), len(run.samples)) == (False, 20, 2)


def test_last_step_is_that_of_the_last_line(tmp_path):
    metrics = [line(i) for i in range(1, 21)]
    metrics.insert(10, evaluation(10))
    out = write(tmp_path / "out", metrics, running=True)
    assert symptoms_of(read_run(out)).last_step == 20
    assert "step 20;" in diagnose(read_run(out))["unfinished"][0]


def test_what_is_not_known_is_not_said(tmp_path):
    metrics = [line(i, train_bits_per_char=1 + i / 10) for i in range(1, 21)]
    run = read_run(write(tmp_path / "out", metrics, settings={}))
    (said, _), = diagnose(run).values()
    assert said.startswith("Learning rate too high: later it rose by")
    assert "nan" not in said


TOKENS = [
    b"null", b"5", b"NaN", b"Infinity", b"-1e999", b'"x"', b"{}", b"[1]", b"\xff",
    b"\n", b"0", b"true", b"1e-320", b'"\\ud83d"', b"[" * 3000, b"9" * 400, b",",
    b"}", b"-1",
]


def damage(data, chance):
    "Some bytes with one thing wrong."
    kind = chance.randrange(6)
    at = chance.randrange(len(data) + 1)
    if kind == 0:   # one byte
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1:]
    if kind == 1:   # cut off
        return data[:at]
    if kind == 2:   # something put in
        return data[:at] + chance.choice(TOKENS) + data[at:]
    if kind == 3:   # a piece gone
        return data[:at] + data[at + chance.randrange(1, 60):]
    lines = data.split(b"\n")
    i = chance.randrange(len(lines))
    if kind == 4:   # another line
        lines[i] = chance.choice(TOKENS)
    else:           # another value in a line
        lines[i] = another_value(lines[i], chance)
    return b"\n".join(lines)


def another_value(line, chance):
    "A line of JSON with something else behind one of its names."
    fields = line.split(b", ")
    j = chance.randrange(len(fields))
    name, colon, value = fields[j].partition(b": ")
    closing = value[len(value.rstrip(b"}]")):]
    fields[j] = name + colon + chance.choice(TOKENS) + closing
    return b", ".join(fields)


class FewDrawings:
    "Draws every 20th report only: a page has five drawings, which take a second."
    def __init__(self):
        self.draw = report.svg
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.draw(*arguments) if self.calls // 5 % 20 == 0 else ""


def test_no_damage_ends_in_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "svg", FewDrawings())
    good = write(tmp_path / "good")
    chance = random.Random(0)
    refusals = 0
    pages = 0
    for number in range(400):
        out = shutil.copytree(good, tmp_path / "out", dirs_exist_ok=True)
        for _ in range(chance.randrange(1, 3)):
            path = out / chance.choice(["metrics.jsonl", "samples.jsonl", "run.json"])
            path.write_bytes(damage(path.read_bytes(), chance))
        try:
            write_report([out])
            pages += 1
        except UserError as error:
            assert "\n" not in str(error) and str(out) in str(error), number
            refusals += 1
    assert refusals > 50 and pages > 50


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_during_imports_is_silent(tmp_path):
    (tmp_path / "numpy.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    for how in ([report.__file__], ["-m", "minikl.report"]):
        done = subprocess.run(
            [sys.executable, *how],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            cwd=tmp_path,
            timeout=50,
            # a job in the background has been told to ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_main_gives_ctrl_c_back(tmp_path, monkeypatch):
    "While it works, Python handles Ctrl-C; in the end is in force what was before."
    handlers = []

    def interrupted(folders):
        handlers.append(signal.getsignal(signal.SIGINT))
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path)])
        assert (ended.value.code, handlers) == (130, [signal.default_int_handler])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
