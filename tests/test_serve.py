"The page to write with and its API: by the official client, and in a browser."
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import torch
from conftest import ROOT

from minikl import serve
from minikl.chat import request_ids, with_roles
from minikl.data import encode_prompt
from minikl.files import UserError
from minikl.form import Judge
from minikl.generate import generate
from minikl.layouts import Padded
from minikl.model import MiniKL, MiniKLConfig
from minikl.serve import in_background
from minikl.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer
from minikl.writer import Answer, OneThread

# by Yan Shu (991–1055): the answer that the small model of these tests has learnt
POEM = (
    "一曲新词酒一杯。去年天气旧亭台。夕阳西下几时回。\n"
    "无可奈何花落去，似曾相识燕归来。小园香径独徘徊。"
)
REQUEST = "写一首《浣溪沙》"
SHAPE = {"d_model": 32, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1}
KNOBS = {"temperature": 0.8, "top_p": 0.95}   # what a request has that names none


class Endings:
    "A table of rhymes that knows one rhyme."

    def rhyme(self, one, other):
        return {one, other} <= set("杯台回来徊")


PATTERN = tuple((7, mark) for mark in "。。。，。。")
JUDGE = Judge({"浣溪沙": PATTERN}, {"浣溪沙": "AAA-AA"}, Endings())


def learnt(model, ids, steps=120):   # the model
    "Train until the model knows a text by heart."
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = Padded([torch.tensor(ids)])
    for _ in range(steps):
        loss, n_targets = model.loss(batch)
        optimizer.zero_grad()
        (loss / n_targets).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def chat():   # OneThread
    "A model that answers one request, and knows nothing else."
    torch.set_num_threads(1)
    tokens = [*SPECIAL_TOKENS, *BYTE_TOKENS, *sorted({*POEM, *REQUEST})]
    plain = Tokenizer({token: i for i, token in enumerate(tokens)})
    tokenizer = with_roles(plain)
    config = MiniKLConfig(**SHAPE, vocab_size=len(tokenizer), max_seq_len=256)
    torch.manual_seed(0)
    ids = request_ids([{"role": "user", "content": REQUEST}], tokenizer)
    for char in POEM:
        ids += tokenizer.char_ids(char)
    model = learnt(MiniKL(config), [*ids, tokenizer.special["</s>"]])
    return OneThread(model, tokenizer, "parrot", JUDGE)


@pytest.fixture(scope="module")
def base():   # OneThread
    "Random weights, bytes in the vocabulary, and no end of a text."
    torch.set_num_threads(1)
    tokens = ["<unk>", "<s>", *BYTE_TOKENS, *"一生代双人，风吹过雨落"]
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)})
    config = MiniKLConfig(**SHAPE, vocab_size=len(tokenizer), max_seq_len=8192)
    torch.manual_seed(0)
    return OneThread(MiniKL(config).eval(), tokenizer, "base")


@pytest.fixture(scope="module")
def places(chat, base):   # {name: address}
    with in_background(chat) as one, in_background(base) as other:
        yield {"parrot": one, "base": other}


def client(place):
    options = {"api_key": "none", "max_retries": 0, "timeout": 60}
    return openai.OpenAI(base_url=f"{place}/v1", **options)


def request(place, method, path, body=None, **headers):   # status, headers, body
    host = place.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


def alone(writer, prompt, n_tokens, seed):   # what generate.py would write
    ids = encode_prompt(prompt, writer.tokenizer)
    new = generate(writer.model, ids, n_tokens, seed=seed, **KNOBS)
    answer = Answer(writer.tokenizer, n_tokens)
    return "".join(answer.add(token) for token in new) + answer.end()


# ---- the API, by the official client


def test_models(places):
    models = client(places["base"]).models
    assert [model.id for model in models.list()] == ["base"]
    assert models.retrieve("base").owned_by == "minikl"
    with pytest.raises(openai.NotFoundError, match="none"):
        models.retrieve("none")


def test_a_completion_is_what_generate_writes(places, base):
    wish = {"model": "base", "prompt": "一生", "max_tokens": 20, "seed": 5}
    create = client(places["base"]).completions.create
    done = create(**wish, presence_penalty=0.5, user="who")
    (choice,) = done.choices
    assert choice.text == alone(base, "一生", 20, 5)
    assert choice.finish_reason == "length"
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 20)   # <s> 一 生
    assert usage.total_tokens == 23
    with create(**wish, stream=True) as stream:
        parts = list(stream)
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "length"]
    assert {part.usage for part in parts} == {None}
    assert create(**wish | {"seed": None}).choices[0].text != choice.text


def test_several_prompts_and_answers(places, base):
    create = client(places["base"]).completions.create
    wish = {"model": "base", "prompt": ["一生", "风"], "max_tokens": 8, "seed": 7}
    expected = []
    for prompt in ("一生", "风"):
        expected += [alone(base, prompt, 8, seed) for seed in (7, 8)]
    done = create(**wish, n=2)
    assert [choice.text for choice in done.choices] == expected
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 32)
    texts = [""] * 4
    usages = []
    options = {"include_usage": True}
    for part in create(**wish, n=2, stream=True, stream_options=options):
        usages.append(part.usage)
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == expected
    assert usages[-1].total_tokens == 37 and set(usages[:-1]) == {None}


def test_a_stop_string_ends_the_text_before_it(places, base):
    create = client(places["base"]).completions.create
    wish = {"model": "base", "prompt": "一生", "max_tokens": 40, "seed": 5}
    text = create(**wish).choices[0].text
    stop = text[10:13]
    for choices in ([stop], [stop, "none"], stop):
        (choice,) = create(**wish, stop=choices).choices
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
    parts = list(create(**wish, stop=stop, stream=True))
    streamed = "".join(part.choices[0].text for part in parts)
    assert streamed == text[: text.index(stop)]


@pytest.mark.parametrize("content", [REQUEST, [{"type": "text", "text": REQUEST}]])
def test_a_conversation(places, content):
    create = client(places["parrot"]).chat.completions.create
    messages = [{"role": "user", "content": content}]
    wish = {"model": "parrot", "messages": messages, "temperature": 0}
    done = create(**wish)
    (choice,) = done.choices
    assert choice.message.role == "assistant" and choice.message.content == POEM
    assert choice.finish_reason == "stop"
    assert done.usage.prompt_tokens == len(REQUEST) + 3   # <s> <|user|> <|assistant|>
    assert done.usage.completion_tokens == len(POEM)
    parts = list(create(**wish, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    shown = [part.choices[0].delta.content for part in parts]
    assert "".join(shown) == POEM and len(shown) > len(POEM)   # one by one
    assert parts[-1].choices[0].finish_reason == "stop"
    short = create(**wish, max_completion_tokens=7)
    assert short.choices[0].message.content == POEM[:7]
    assert short.choices[0].finish_reason == "length"


MISTAKES = {   # what is wrong: (fields of the request, what is said)
    "temperature": ({"temperature": -1}, "temperature: expected a number from 0 to 2"),
    "words": ({"temperature": "hot"}, 'temperature: .*, not "hot"'),
    "nan": ({"top_p": math.nan}, "top_p: .*, not NaN"),
    "bool": ({"n": True}, "n: expected a whole number from 1 to 16, not true"),
    "many": ({"n": 17}, "n: .*, not 17"),
    "none": ({"max_tokens": 0}, "max_tokens: .*, not 0"),
    "seed": ({"seed": 0.5}, "seed: expected a whole number"),
    "stop": ({"stop": ["a", ""]}, "stop: expected a text"),
    "prompt": ({"prompt": [1, 2]}, "prompt: expected a text or a list"),
    "prompts": ({"prompt": ["a"] * 9, "n": 2}, "prompt: expected 1 to 16 texts"),
    "long": ({"prompt": "风" * 9000}, "has 9001 tokens; this model has room for 8191"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, places):
    fields, message = MISTAKES[name]
    body = json.dumps({"model": "base", "prompt": "一", **fields})
    status, _, reply = request(places["base"], "POST", "/v1/completions", body)
    error = json.loads(reply)["error"]
    assert status == 400 and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    if name not in ("nan",):   # which the client does not send
        with pytest.raises(openai.BadRequestError, match=message):
            wish = {"model": "base", "prompt": "一", **fields}
            client(places["base"]).completions.create(**wish)


BAD_MESSAGES = (None, [], "hello", [1], [{"role": "user"}], [{"content": "一"}],
                [{"role": "king", "content": "一"}],
                [{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=str)
def test_bad_messages(messages, places):
    body = json.dumps({"model": "parrot", "messages": messages})
    path = "/v1/chat/completions"
    status, _, reply = request(places["parrot"], "POST", path, body)
    assert status == 400
    assert json.loads(reply)["error"]["message"].startswith("messages: expected")


def test_what_is_not_here(places):
    create = client(places["base"]).completions.create
    with pytest.raises(openai.NotFoundError, match='"gpt".*only base') as caught:
        create(model="gpt", prompt="一")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="no role tokens"):
        messages = [{"role": "user", "content": "一"}]
        client(places["base"]).chat.completions.create(model="base", messages=messages)
    for method, path, expected in (
        ("GET", "/none", 404), ("GET", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
    ):
        status, _, reply = request(places["base"], method, path)
        assert status == expected and json.loads(reply)["error"]["message"]


@pytest.mark.parametrize(("body", "expected"), [
    (b"", 400), (b"{", 400), (b"[1]", 400), (b"[" * 100_000, 400),
    (b'{"prompt": "\xff"}', 400), (b'{"n": ' + b"9" * 9999 + b"}", 400),
    (b" " * (2 << 20), 413),
])
def test_what_is_no_request(body, expected, places):
    status, _, reply = request(places["base"], "POST", "/v1/completions", body)
    assert status == expected and json.loads(reply)["error"]["message"]


# ---- who may ask


@pytest.mark.parametrize("path", ["/", "/about", "/v1/models", "/none"])
def test_nothing_is_meant_for_other_sites(path, places):
    status, headers, _ = request(places["base"], "GET", path)
    assert not [name for name in headers if name.startswith("Access-Control")]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    host = places["base"].removeprefix("http://")
    assert request(places["base"], "GET", path, Origin=f"http://{host}")[0] == status
    for name, value in (
        ("Origin", "http://a.example"), ("Origin", "null"),
        ("Host", "a.example"), ("Host", "127.0.0.1.a.example:80"), ("Host", "[::"),
        ("Origin", "http://["),
    ):
        refused, headers, _ = request(places["base"], "GET", path, **{name: value})
        assert refused == 403
        assert not [name for name in headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.0.0.2", "::1"])
def test_names_of_this_computer(name):
    assert serve.is_own(name)
    assert not serve.is_own(f"{name}.a.example")
    assert not serve.is_own(None)


# ---- many at once, and those that go away


def test_many_at_once_get_what_each_gets_alone(places, base):
    def ask(seed):
        done = client(places["base"]).completions.create(
            model="base", prompt="一生", max_tokens=30, seed=seed
        )
        return done.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    assert texts == [alone(base, "一生", 30, seed) for seed in range(8)]


def test_a_short_text_does_not_wait_for_a_long_one(places):
    create = client(places["base"]).completions.create
    long = create(model="base", prompt="一", max_tokens=8000, stream=True)
    next(long)
    assert create(model="base", prompt="一", max_tokens=5).choices[0].text
    next(long)   # it goes on
    long.close()


@pytest.fixture
def steps(base):   # list that grows with each step of the model
    seen = []
    hook = base.model.register_forward_hook(lambda *_: seen.append(None))
    yield seen
    hook.remove()


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_goes_away_stops_the_writing(is_stream, places, steps):
    body = {"prompt": "一", "max_tokens": 8000, "stream": is_stream}
    text = json.dumps(body).encode()
    host, port = places["base"].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(text), text)
        )
        deadline = time.time() + 60
        while len(steps) < 20 and time.time() < deadline:
            time.sleep(0.01)
    time.sleep(0.5)   # the server hears of it
    n_steps = len(steps)
    assert 20 <= n_steps < 8000
    time.sleep(0.5)
    assert len(steps) == n_steps
    assert request(places["base"], "GET", "/about")[0] == 200


# ---- the script


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    "What a training run leaves, as far as the server needs it."
    folder = tmp_path_factory.mktemp("out")
    base.model.save(folder)
    base.tokenizer.save(folder / "vocab_dict.json")
    return folder


@pytest.mark.parametrize(("options", "message"), [
    (["--port=65536"], "--port=65536: expected 0 to 65535"),
    (["--host="], "--host: expected a name or an address"),
    (["--host=none.invalid", "--port=0"], "--host=none.invalid"),
    (["--port=0", "--model_path=none"], "none"),
    (["--port=x"], "--port"),
])
def test_a_wrong_option_is_one_line(options, message, folder, script):
    done = script(serve.main, f"--model_path={folder}", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line(folder, script):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = script(serve.main, f"--model_path={folder}", f"--port={port}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--port={port}: another program listens there" in done.stderr


def test_without_a_corpus_there_is_no_check(chat, base, monkeypatch, capsys):
    def missing():
        raise UserError("no npm")

    monkeypatch.setattr(serve, "home_judge", missing)
    assert serve.judge_of(base.tokenizer) is None
    assert capsys.readouterr().err == ""   # nobody has asked
    assert serve.judge_of(chat.tokenizer) is None
    assert capsys.readouterr().err == "no check of form: no npm\n"
    with in_background(OneThread(chat.model, chat.tokenizer, "mute")) as place:
        about = json.loads(request(place, "GET", "/about")[2])
        assert about["chat"] and about["tunes"] == {}
        body = json.dumps({"tune": "浣溪沙", "text": POEM})
        assert request(place, "POST", "/check", body)[0] == 404


def test_check(places):
    def check(**body):
        reply = request(places["parrot"], "POST", "/check", json.dumps(body))
        return reply[0], json.loads(reply[2])

    status, verdict = check(tune="浣溪沙", text=POEM[:16])
    assert status == 200 and not verdict["passes"]
    assert [clause["ok"] for clause in verdict["clauses"]] == [True] * 2 + [False] * 4
    assert verdict["clauses"][1] == {
        "text": "去年天气旧亭台。", "length": 7, "wanted": 7,
        "ok": True, "rhymes": True,
    }
    assert check(tune="无", text=POEM)[0] == 404
    assert check(tune=[], text=POEM)[0] == 404
    assert check(tune="浣溪沙")[0] == 400


posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")


@pytest.fixture
def process(folder):
    "The server as a process of a group of its own, to which Ctrl-C means something."
    command = [sys.executable, "-m", "minikl.serve", f"--model_path={folder}"]
    process = subprocess.Popen(
        [*command, "--port=0"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    yield process
    process.kill()
    process.wait()


@posix
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_ctrl_c_closes_it_while_it_writes(number, code, process, folder):
    place = process.stdout.readline().split()[0]
    create = client(place).completions.create
    name = folder.name
    stream = create(model=name, prompt="一", max_tokens=8000, stream=True)
    next(stream)
    listening = psutil.Process(process.pid).net_connections("inet")
    listening = [one.laddr for one in listening if one.status == psutil.CONN_LISTEN]
    assert [f"http://{host}:{port}" for host, port in listening] == [place]
    process.send_signal(signal.Signals[number])
    assert process.wait(30) == code
    said = process.stderr.read()
    assert said.count("\n") == 1 and "Traceback" not in said, said


# ---- the page, in a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
VIEWS = [(1400, "light"), (1400, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


def said(page):   # the line below the poem
    return page.text_content("#said")


def until(page, expression):
    "Wait for JavaScript to be true (Playwright's own way needs eval: forbidden here)."
    deadline = time.time() + 60
    while not page.evaluate(expression):
        assert time.time() < deadline, expression
        page.wait_for_timeout(20)


@pytest.fixture
def visit(browser, places):
    "visit('parrot') opens its page; in the end nothing must have gone wrong on it."
    problems = []
    opened = []

    def call(name, width=1400, scheme="light", **options):   # page
        screen = {"width": width, "height": 900}
        page = browser.new_page(viewport=screen, color_scheme=scheme, **options)
        opened.append(page)

        def look(request):
            if not request.url.startswith((places[name], "data:")):
                problems.append(f"asks for {request.url}")

        page.on("request", look)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: said.type == "error" and problems.append(said))
        page.goto(places[name])
        until(page, "document.querySelector('#model').textContent")
        return page

    call.problems = problems
    yield call
    for page in opened:
        page.close()
    assert not problems, "\n".join(map(str, problems))


def text_of(page):   # the poem as far as it is written, without places still empty
    return page.evaluate(
        """[...document.querySelectorAll(".clause")]
            .map(clause => clause.dataset.said).join("")"""
    )


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_poem_is_written_and_checked(width, scheme, visit):
    page = visit("parrot", width, scheme)
    page.evaluate(
        """() => {
            const slider = document.querySelector("#temperature");
            slider.value = 0;
            slider.oninput();
        }"""
    )
    assert page.input_value("#request") == REQUEST   # of the tune that is chosen
    assert page.locator(".empty").all_text_contents() == [
        f"○○○○○○○{mark}" for mark in "。。。，。。"
    ]
    page.click("#write")
    until(page, "document.querySelector('.tick')")
    early = text_of(page)
    poem = "".join(POEM.split())
    assert poem.startswith(early) and early < poem   # it comes bit by bit
    until(page, "document.querySelector('#said').textContent")
    assert text_of(page) == poem
    ticks = page.locator(".check").all_text_contents()
    assert [tick[:4] for tick in ticks] == ["7/7✓"] * 6
    assert [tick[4:] for tick in ticks] == ["", "韵", "韵", "", "韵", "韵"]
    assert said(page).startswith("句式 form ✓ 6/6 押韵 rhyme 100 % 42 字")
    assert page.is_visible("#seal")
    too_wide = "document.documentElement.scrollWidth - window.innerWidth"
    assert page.evaluate(too_wide) <= 0
    assert page.is_disabled("#stop") and not page.is_visible("#error")


@needs_browser
def test_a_first_line_becomes_part_of_the_request(visit):
    page = visit("parrot")
    page.fill("#first", "一曲新词酒一杯")
    assert page.input_value("#request") == f"以“一曲新词酒一杯。”开头{REQUEST}"
    page.fill("#first", "去年，")
    assert page.input_value("#request") == f"以“去年，”开头{REQUEST}"


@needs_browser
def test_what_is_wrong_is_marked(visit):
    "Another request: the model has not learnt it, and its text is no good."
    page = visit("parrot", reduced_motion="reduce")
    page.fill("#request", "《浣溪沙》去年花落")
    page.click("#write")
    until(page, "document.querySelector('#said').textContent")
    assert said(page).startswith("句式 form ✗")
    assert page.locator(".tick.no").count() > 0 and not page.is_visible("#seal")
    page.fill("#request", "写一首")   # of no tune: nothing is checked
    page.click("#write")
    until(page, "document.querySelector('#said').textContent")
    assert page.locator(".tick").count() == 0
    assert "form" not in said(page)


@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
def test_a_base_model_continues_and_can_be_stopped(width, visit, steps):
    page = visit("base", width)
    assert not page.is_visible("#request") and not page.is_visible("#tunes")
    page.click("#write")
    until(page, "document.querySelectorAll('#poem .new').length > 9")
    page.click("#stop")
    n_shown = page.locator("#poem .new").count()
    page.wait_for_timeout(300)
    assert page.locator("#poem .new").count() == n_shown < 200
    poem = page.text_content("#poem")
    assert poem.startswith("一生一代一双人，")
    seed = page.input_value("#seed")
    for press, is_same in (("#write", True), ("#again", False)):
        page.click(press)
        until(
            page, f"document.querySelectorAll('#poem .new').length > {n_shown}"
        )
        assert page.text_content("#poem").startswith(poem) == is_same
    assert page.input_value("#seed") != seed
    page.keyboard.press("Escape")
    assert page.is_disabled("#stop")


@needs_browser
def test_an_error_is_one_line_on_the_page(visit, monkeypatch):
    page = visit("base")
    page.fill("#prompt", "风" * 9000)
    page.click("#write")
    page.wait_for_selector("#error:visible")
    assert "has 9001 tokens" in page.text_content("#error")
    page.route("**/v1/**", lambda route: route.abort())   # the server is gone
    page.fill("#prompt", "风")
    page.click("#write")
    until(page, "document.querySelector('#error').textContent.match(/服务/)")
    page.unroute("**/v1/**")
    page.click("#write")
    until(page, "document.querySelectorAll('#poem .new').length > 3")
    assert not page.is_visible("#error")
    # Chromium notes both on its console; nothing else does
    assert len(visit.problems) == 2
    assert all("Failed to load resource" in said.text for said in visit.problems)
    visit.problems.clear()
