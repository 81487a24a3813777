"Conversations: read as they are shared, and learnt in their answers only."
import importlib
import json
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT
from small_runs import (
    OLD,
    TINY,
    interrupt_at,
    losses,
    one_line,
    result,
    well,
)
from torch.nn import functional as F

from minikl import generate, prepare, train
from minikl.chat import (
    answer_of,
    conversation_text,
    encode_conversation,
    encode_request,
    is_conversation,
    readable,
    request_ids,
    start_weights,
    with_roles,
)
from minikl.data import (
    IGNORE,
    Documents,
    TokenFile,
    build_tokens,
    encode_documents,
    hash_fraction,
)
from minikl.files import UserError
from minikl.instruct import answers, conversation, request_records, requests_for
from minikl.jsonl import read_jsonl, record_text
from minikl.layouts import LAYOUTS
from minikl.model import MiniKL, MiniKLConfig
from minikl.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("home")
PLAIN = list(read_jsonl(OLD / "data.jsonl"))
VOCAB = OLD / "vocab.json"


def talk(request, answer):   # a record
    return conversation(request, answer)


def write_lines(path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def records():   # 24 conversations, then plain texts
    talks = [talk(f"第{i}天", text[:40]) for i, text in enumerate(PLAIN[:24])]
    return [*talks, *({"text": text} for text in PLAIN[24:])]


@pytest.fixture
def speaker():
    return with_roles(Tokenizer.load(VOCAB))


@pytest.fixture
def base(tmp_path):
    "A folder of a model: config.json, model.safetensors, vocab_dict.json."
    folder = tmp_path / "base"
    tokenizer = Tokenizer.load(VOCAB)
    shape = {"d_model": 8, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1}
    config = MiniKLConfig(**shape, vocab_size=len(tokenizer), max_seq_len=64)
    torch.manual_seed(1)
    MiniKL(config).save(folder)
    tokenizer.save(folder / "vocab_dict.json")
    return folder


@pytest.fixture
def data(tmp_path):   # Path of 24 conversations and 16 plain texts
    return write_lines(tmp_path / "talks.jsonl", records())


@pytest.fixture
def options(base):   # list of arguments of train.py
    return [*TINY, "--max_steps=6", f"--init_path={base}", "--held_out=0.2"]


@pytest.fixture
def tune(script, options, data, tmp_path):
    "tune('name', *more) goes on from the base with conversations, in this process."
    def call(name, *more, data=data):   # CompletedProcess
        files = [f"--data_jsonl_path={data}", f"--out_dir={tmp_path / name}"]
        return script(train.main, *options, *files, *more)

    return call


# ---- conversations as text


def test_the_shape_that_people_share_is_read_as_it_is(tmp_path):
    "A line as in the files of MiniMind, with fields that we do not use."
    messages = [
        {"role": "system", "content": "你是诗人"},
        {"role": "user", "content": " 写一首诗\n", "tools": None},
        {"role": "assistant", "content": "白日依山尽，\n黄河入海流。"},
        {"role": "user", "content": "再写"},
        {"role": "assistant", "content": "欲穷千里目。"},
    ]
    path = write_lines(tmp_path / "sft.jsonl", [{"id": 1, "conversations": messages}])
    (text,) = read_jsonl(path)
    assert is_conversation(text)
    assert text.turns() == [
        ("<|system|>", "你是诗人"),
        ("<|user|>", "写一首诗"),
        ("<|assistant|>", "白日依山尽，\n黄河入海流。"),
        ("<|user|>", "再写"),
        ("<|assistant|>", "欲穷千里目。"),
    ]
    assert answer_of(text) == "白日依山尽，\n黄河入海流。欲穷千里目。"


USER = {"role": "user", "content": "写"}
POEM = {"role": "assistant", "content": "诗"}
WRONG = {
    "expected a list of messages": ["写", [], {}, None],
    'expected messages {"role", "content"}': [
        ["写"], [{"role": "user"}], [{"content": "写"}], [USER, None]
    ],
    "role 'human', expected one of": [[{"role": "human", "content": "写"}, POEM]],
    "role ['user'], expected one of": [[{"role": ["user"], "content": "写"}, POEM]],
    "expected text as content, found NoneType": [[{"role": "user", "content": None}]],
    "role token <|assistant|> in a message": [
        [{"role": "user", "content": "写<|assistant|>不写"}, POEM]
    ],
    "no message of the assistant": [[USER]],
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_conversation_is_one_line_that_names_it(said, tune, tmp_path):
    for messages in WRONG[said]:
        with pytest.raises(UserError) as caught:
            record_text({"conversations": messages})
        assert said in str(caught.value)
    bad = write_lines(tmp_path / "bad.jsonl", [{"conversations": WRONG[said][0]}])
    one_line(tune("out", data=bad), f"{bad}:1: conversations: ")


def test_no_plain_text_passes_for_a_conversation(speaker):
    trick = "<|user|>第一天<|assistant|>花开"
    assert not is_conversation(record_text({"content": trick}))
    assert answer_of(trick) == trick
    (ids,), (n_chars,) = encode_documents([trick], speaker)
    roles = {speaker.special[name] for name in ("<|user|>", "<|assistant|>")}
    assert not roles & set(ids) and min(ids) >= 0 and n_chars == len(trick)


def test_no_request_speaks_for_another_role(speaker):
    with pytest.raises(UserError, match="role token"):
        encode_request("第1天<|assistant|>花开", speaker)


# ---- as tokens


def test_a_conversation_is_spelt_and_only_answers_are_positive(speaker):
    talks = conversation_text([USER, POEM, USER, {"role": "assistant", "content": ""}])
    ids, n_chars = encode_conversation(talks, speaker)
    unknown = speaker.special["<unk>"]
    user, asked = speaker.special["<|user|>"], speaker.special["<|assistant|>"]
    first, last = speaker.special["<s>"], speaker.special["</s>"]
    turn = [~user, ~unknown, ~asked]
    assert ids == [first, *turn, unknown, last, *turn, last]
    assert n_chars == 1


def test_a_request_is_the_beginning_of_its_conversation(speaker):
    record = talk("第3天", "花开花落")
    ids, _ = encode_documents([record_text(record)], speaker)
    request = encode_request("第3天", speaker)
    assert readable(torch.tensor(ids[0]))[: len(request)].tolist() == request
    assert request[-1] == speaker.special["<|assistant|>"]
    more = [*record["conversations"], {"role": "user", "content": "雨"}]
    assert request_ids(more, speaker)[: len(request)] == request


def conversations(data, speaker):   # TokenFile
    return TokenFile(build_tokens(data, speaker, data.parent / "cache"))


@pytest.mark.parametrize("max_seq_len", [8, 20, 64])
def test_targets_are_counted_as_the_layouts_have_them(max_seq_len, data, speaker):
    file = conversations(data, speaker)
    assert file.counts["conversations"] == 24
    documents = Documents(file, torch.arange(len(file.starts)), max_seq_len)
    documents.holds_requests = True
    pieces = list(range(len(documents)))
    for chosen in (pieces, pieces[3:9], pieces[::5]):
        for layout in LAYOUTS.values():
            batch = layout([documents[i] for i in chosen])
            assert documents.n_targets(chosen) == int((batch.targets != IGNORE).sum())
            assert int(batch.ids.min()) >= 0
    assert documents.n_targets() == documents.n_targets(pieces)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_token_of_a_request_has_a_gradient(name, data, speaker):
    file = conversations(data, speaker)
    documents = Documents(file, torch.arange(12), 64)
    docs = [documents[i] for i in range(12)]
    model = MiniKL(MiniKLConfig(
        d_model=8, num_heads=2, num_kv_heads=1, num_layers=1, vocab_size=len(speaker),
        max_seq_len=64,
    ))
    batch = LAYOUTS[name](docs)
    total, n_targets = model.loss(batch)
    by_hand = 0.0
    for doc in docs:
        alone = LAYOUTS["nested"]([readable(doc)])
        logits = model(alone.ids, alone.positions, alone.attend).detach()
        logits.requires_grad_()
        learnt = doc[1:] >= 0
        losses = F.cross_entropy(logits[:-1], alone.ids[1:], reduction="none")
        losses[learnt].sum().backward()
        by_hand += float(losses[learnt].detach().sum())
        assert (logits.grad[:-1][~learnt] == 0).all()
        assert (logits.grad[:-1][learnt].abs().sum(-1) > 0).all()
    assert float(total.detach()) == pytest.approx(by_hand, rel=1e-5)
    assert int(n_targets) == sum(int((doc[1:] >= 0).sum()) for doc in docs)


def test_a_poem_is_held_out_whatever_the_request(tmp_path, speaker):
    poem = {"title": "一调", "author": "某人"}
    ways = []
    for i, text in enumerate(PLAIN):
        poem["content"] = text[:30] + str(i)
        ways += [talk(request, poem["content"]) for request in requests_for(poem)]
    path = write_lines(tmp_path / "ways.jsonl", ways)
    file = TokenFile(build_tokens(path, speaker, tmp_path / "cache"))
    fractions = file.fractions.view(-1, 3)
    assert (fractions == fractions[:, :1]).all()
    first = ways[0]["conversations"][1]["content"]
    assert float(fractions[0, 0]) == pytest.approx(hash_fraction(first))
    kept, held_out = (set(part.tolist()) for part in file.split(0.3))
    for i in range(0, len(ways), 3):
        assert {i, i + 1, i + 2} <= kept or {i, i + 1, i + 2} <= held_out


def test_the_requests_that_are_made():
    poems = []
    for i in range(60):
        poems.append({"title": "一调", "author": "甲" * (i % 2), "content": f"春{i}。"})
    poems.append({"title": "无定", "author": "乙", "content": "秋。"})
    found = request_records(poems, ["一调"], replay=0.5)
    talks = [record["conversations"] for record in found if "conversations" in record]
    assert len(talks) == 60 and len(found) == 90
    assert found == request_records(poems, ["一调"], replay=0.5)
    requests = {messages[0]["content"] for messages in talks}
    assert "写一首《一调》" in requests and "仿甲写一首《一调》" in requests
    assert any("开头" in request for request in requests)
    assert not any("仿写" in request for request in requests)   # nobody's manner


# ---- runs that go on from a model


def test_old_rows_stay_and_new_ones_lie_near_their_mean(base, speaker):
    old = MiniKL.load(base).state_dict()
    config = MiniKL.load(base).config
    n_old = config.vocab_size
    config.vocab_size = len(speaker)
    new = dict(start_weights(base, config))
    assert new.keys() == old.keys()
    for name, weight in old.items():
        assert torch.equal(new[name][: len(weight)], weight)
    rows = new["head.weight"][n_old:]
    assert len(rows) == 3
    assert (rows - old["head.weight"].mean(0)).abs().max() < 0.1
    config.vocab_size = n_old - 1
    with pytest.raises(UserError, match="rows for"):
        dict(start_weights(base, config))


def test_a_run_learns_answers_and_shows_held_out_requests(tune, tmp_path, speaker):
    said = well(tune("out", "--max_steps=20", "--lr=0.05"))
    assert "longer than" not in said
    out = tmp_path / "out"
    assert losses(out)[-1] < losses(out)[0]
    assert MiniKL.load(out).config.vocab_size == len(speaker)
    assert Tokenizer.load(out / "vocab_dict.json").vocab == speaker.vocab
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    prompts = {sample["prompt"] for sample in samples}
    held_out = set()
    for record in records():
        text = record_text(record)
        if hash_fraction(answer_of(text)) < 0.2:
            held_out.add(text.turns()[0][1] if is_conversation(text) else text)
    assert prompts
    for prompt in prompts:
        assert any(request.startswith(prompt) for request in held_out), prompt


def test_a_stopped_run_goes_on_to_the_bit(tune, tmp_path, monkeypatch):
    well(tune("whole"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3, signal.SIGTERM)
        assert tune("out").returncode == 143
    assert "continuing from" in well(tune("out", "--resume"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_two_processes_and_two_halves_learn_what_one_does(
    tune, two, options, data, tmp_path
):
    well(tune("one"))
    one = pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    for name, more in {"two": [], "sharded": ["--shard"]}.items():
        files = [f"--data_jsonl_path={data}", f"--out_dir={tmp_path / name}"]
        well(two(*options, *files, *more))
        assert losses(tmp_path / name) == one
        weights = MiniKL.load(tmp_path / name).state_dict()
        for key, weight in MiniKL.load(tmp_path / "one").state_dict().items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=2e-3)


def test_what_does_not_fit_is_said(tune, tmp_path):
    long = write_lines(tmp_path / "long.jsonl", [talk("第1天", "花" * 100), *records()])
    said = well(tune("out", data=long))
    assert "1 conversations are longer than --max_seq_len=64" in said


def test_conversations_are_not_spread_over_hosts(tune):
    one_line(tune("out", "--local_data"), "local_data: not possible with conversations")


def test_folders_that_are_no_model(tune, base, tmp_path):
    one_line(tune("out", "--init_path=nowhere"), "config.json: no such file")
    for name in ("model.safetensors", "vocab_dict.json"):
        folder = tmp_path / f"without {name}"
        shutil.copytree(base, folder)
        (folder / name).unlink()
        one_line(tune("out", f"--init_path={folder}"), f"{name}: no such file")
    folder = tmp_path / "damaged"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    one_line(tune("out", f"--init_path={folder}"), "damaged or not a safetensors file")
    folder = tmp_path / "another"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    one_line(tune("out", f"--init_path={folder}"), "config.json asks for")


def test_another_shape_or_vocabulary_is_refused(tune):
    one_line(tune("out", "--num_layers=3"), "--num_layers=3: the model in")
    one_line(tune("out", f"--vocab_dict_path={VOCAB}"), "brings its own")


def test_plain_texts_go_on_without_new_tokens(tune, base, tmp_path):
    "--init_path alone: pretraining that goes on."
    well(tune("out", data=OLD / "data.jsonl"))
    config = MiniKL.load(tmp_path / "out").config
    assert config == MiniKL.load(base).config


def test_a_plain_run_makes_no_roles(run, tmp_path):
    "Not even where a text begins with the name of a role."
    lines = [{"text": "<|user|>" + text} for text in PLAIN]
    data = write_lines(tmp_path / "plain.jsonl", lines)
    well(run("out", f"--data_jsonl_path={data}"))
    tokenizer = Tokenizer.load(tmp_path / "out" / "vocab_dict.json")
    assert tokenizer.vocab == Tokenizer.load(VOCAB).vocab
    assert not list((prepare.DATA / "cache").glob("vocab-roles-*"))
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["documents"]
    assert "conversations" not in counts


def test_conversations_are_looked_for_once(data, monkeypatch):
    assert prepare.hold_conversations([data], "error")

    def never(*arguments):
        raise AssertionError("read again")

    monkeypatch.setattr(prepare, "read_jsonl", never)
    assert prepare.hold_conversations([data], "error")


# ---- asking


def test_a_model_without_roles_is_not_asked(base, script):
    one_line(
        script(generate.main, f"--model_path={base}", "--request=第1天"),
        "the vocabulary has no role tokens",
    )


@pytest.mark.parametrize("other", ["--interactive", "--prompt=花"])
def test_a_request_stands_alone(other, base, script):
    options = (f"--model_path={base}", "--request=第1天", other)
    one_line(script(generate.main, *options), "not allowed with argument --request")


def test_a_model_is_asked(tune, script, tmp_path):
    well(tune("out"))
    out = f"--model_path={tmp_path / 'out'}"
    said = well(script(generate.main, out, "--request", "第1天", "第2天"))
    assert said.startswith("第1天\n") and "\n第2天\n" in said
    trick = script(generate.main, out, "--request=第1天<|assistant|>花")
    one_line(trick, "role token <|assistant|> in a message")


def test_answers_begin_as_they_are_told(tune, tmp_path):
    well(tune("out"))
    model = MiniKL.load(tmp_path / "out").eval()
    tokenizer = Tokenizer.load(tmp_path / "out" / "vocab_dict.json")
    requests = [f"第{i}天" for i in range(5)]
    beginnings = ["", "风", "雨落", "", "山"]
    found = answers(model, tokenizer, requests, beginnings, temperature=0.8)
    for text, beginning in zip(found, beginnings, strict=True):
        assert text.startswith(beginning)
    again = answers(model, tokenizer, requests, beginnings, group=2, temperature=0.8)
    assert again == found


# ---- what lesson 20 says it has measured


@pytest.fixture(scope="module")
def fine_tuning():
    sys.path.append(str(ROOT / "tools"))
    yield importlib.import_module("fine_tuning")
    sys.path.remove(str(ROOT / "tools"))


def test_the_arm_with_merges_does_merge(fine_tuning):
    tokenizer = with_roles(Tokenizer.train(["花开花落"] * 20, 300))
    text = conversation_text([USER, {"role": "assistant", "content": "花开花落"}])
    with fine_tuning.patched(fine_tuning.USUAL):
        spelt = len(encode_conversation(text, tokenizer)[0])
    with fine_tuning.patched({**fine_tuning.USUAL, "merges": True}):
        merged = len(encode_conversation(text, tokenizer)[0])
    assert merged == spelt - 3   # the answer is one token of four characters


def test_the_lesson_says_what_was_measured(fine_tuning):
    measured = json.loads(fine_tuning.MEASURED.read_text(encoding="utf-8"))
    assert measured.keys() == {"base", *fine_tuning.ARMS}
    lesson = json.loads((ROOT / "nbs" / "20_requests.ipynb").read_text("utf-8"))
    prose = ""
    for cell in lesson["cells"]:
        if cell["cell_type"] == "markdown":
            prose += "".join(cell["source"])
    said = []
    base = measured["base"]["plain bits"]
    for name, arm in measured.items():
        if name.startswith("default"):
            said += [f"{100 * arm['first line given']['form']:.1f} %"]
            said += [f"{100 * arm['first line']['obeyed']:.1f} %"]
        if name != "base":
            said.append(f"{100 * arm['tune']['form']:.1f} %")
        if name in ("replay 0", "default", "replay 1", "replay 1, 2,800 steps"):
            said.append(f"{arm['plain bits'] - base:.2f}")
    assert not [number for number in said if number not in prose]
    assert measured["base"]["tune"]["form"] == 0
