"""Model files, the prompt script, the Llama export: mistakes, absurd sizes, terminals.

Everything runs in this process, with a model of a few hundred weights, unless processes
are what a test is about.
"""
import io
import json
import os
import signal
import subprocess
import sys
from random import Random
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from conftest import ROOT

from minikl import bench, generate, llama
from minikl.files import UserError, write_together
from minikl.generate import choose, narrow
from minikl.model import MiniKL, MiniKLConfig, count_by_formula
from minikl.step import pick_device
from minikl.tokenizer import Tokenizer

TINY = {
    "d_model": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "num_layers": 1,
    "max_seq_len": 64,
}
TOKENS = ["<unk>", "<s>", "</s>", *"一生代双人，风吹过雨落"]
FULL_DISK = patch(
    "minikl.model.save_file",
    side_effect=safetensors.SafetensorError("No space left"),
)


@pytest.fixture
def folder(tmp_path):
    "A folder with a model of random weights and its vocabulary."
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    torch.manual_seed(0)
    MiniKL(MiniKLConfig(**TINY, vocab_size=len(TOKENS))).save(tmp_path / "out")
    (tmp_path / "out" / "vocab_dict.json").write_text(json.dumps(vocabulary))
    return tmp_path / "out"


def ends(main, argv, capsys):
    "Run a script in process: (exit code, stdout, stderr)."
    code = 0
    try:
        main([str(argument) for argument in argv])
    except SystemExit as error:
        code = error.code
    out, complaint = capsys.readouterr()
    return code, out, complaint


def refuses(main, argv, message, capsys):
    code, out, complaint = ends(main, argv, capsys)
    assert (code, out, complaint.count("\n")) == (2, "", 1), complaint
    assert complaint.startswith("error: ") and message in complaint


# ---- devices


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_takes_the_accelerator_that_is_there(kind):
    found = "torch.accelerator.current_accelerator"
    with patch(found, return_value=torch.device(kind)):
        assert pick_device().type == pick_device(kind).type == kind
        assert pick_device("cpu").type == "cpu"
    with patch(found, return_value=None):
        assert pick_device("auto") == torch.device("cpu")
        expected = f"^device='{kind}': not available here; expected one of auto, cpu$"
        with pytest.raises(UserError, match=expected):
            pick_device(kind)


@pytest.mark.parametrize("main", [generate.main, bench.main])
def test_a_device_that_is_not_there_is_one_line(main, folder, capsys):
    argv = ["--device=tpu"]
    if main is generate.main:
        argv.append(f"--model_path={folder}")
    refuses(main, argv, "device='tpu': not available here; expected one of", capsys)


def test_draws_are_what_they_were():
    "The sum that decides a draw is made in float64, on the CPU."
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    sums = narrow(logits, 0.9, top_p=0.9).double().cumsum(-1)
    darts = torch.tensor([[Random(i).random()] for i in range(40)], dtype=torch.double)
    wanted = torch.searchsorted(sums, darts * sums[:, -1:], right=True).squeeze(-1)
    randoms = [Random(i) for i in range(40)]
    assert torch.equal(choose(logits, randoms, 0.9, top_p=0.9), wanted)


# ---- configurations


NAN = float("nan")
TOO_WIDE = {"d_model": 2**19, "num_heads": 8, "ffn": "FFN"}   # d_ff is four times that
NO_SIZES = [
    {"d_model": 8.0},
    {"d_model": True},
    {"num_heads": "2"},
    {"num_layers": None},
    {"num_layers": 10_001},
    {"num_layers": 10**9},
    {"d_model": 2**21},
    {"d_ff": 2**20 + 1},
    {"d_ff": 8.0},
    {"d_ff": False},
    {"vocab_size": 2**24 + 1},
    {"num_heads": 2**40},
    {"max_seq_len": 2**31},
    {"max_seq_len": 10**19},
    {"max_seq_len": 64.0},
    {"theta": 0.5},
    {"theta": NAN},
    {"theta": float("inf")},
    {"theta": True},
    {"theta": 10**400},
    {"norm_eps": -1},
    {"norm_eps": 0},
    {"norm_eps": NAN},
    {"norm_eps": 1.5},
    {"qk_norm": 1},
    {"tie_embeddings": "no"},
    {"ffn": ["GLU"]},
    {"activation": ["silu"]},
    TOO_WIDE,
]


@pytest.mark.parametrize("wrong", NO_SIZES, ids=str)
def test_a_config_refuses_what_is_no_size(wrong):
    name = "d_ff" if wrong is TOO_WIDE else next(iter(wrong))
    with pytest.raises(UserError, match=f"^{name}=.*: expected "):
        MiniKLConfig(**wrong)


def test_a_config_keeps_what_it_is_given():
    assert MiniKLConfig(theta=1_000_000) == MiniKLConfig(theta=1e6)
    assert type(MiniKLConfig(theta=10_000).theta) is int
    assert MiniKLConfig(max_seq_len=2**31 - 1, num_layers=10_000).d_ff == 1368


def test_weights_are_counted_without_making_them():
    sizes = {"d_model": 2**20, "d_ff": 2**20, "num_layers": 10_000, "vocab_size": 2**24}
    assert count_by_formula(MiniKLConfig(**sizes, qk_norm=True)) > 7e16
    for more in ({}, {"qk_norm": True}, {"tie_embeddings": True}, {"ffn": "FFN"}):
        config = MiniKLConfig(**TINY, vocab_size=9, **more)
        n_weights = sum(weight.numel() for weight in MiniKL(config).parameters())
        assert count_by_formula(config) == n_weights


# ---- model files


def config_text(folder, **changes):
    return json.dumps(json.loads((folder / "config.json").read_text()) | changes)


OTHER_SHAPES = [
    {"d_model": 2**20},
    {"vocab_size": 2**24},
    {"num_layers": 10_000},
    {"d_ff": 2**20},
    {"tie_embeddings": True},
    {"qk_norm": True},
    {"ffn": "FFN"},
    {"num_kv_heads": 2},
]


@pytest.mark.parametrize("changes", OTHER_SHAPES, ids=str)
def test_nothing_is_allocated_for_weights_that_do_not_fit(changes, folder):
    (folder / "config.json").write_text(config_text(folder, **changes))
    allocates = patch(
        "torch.nn.Module.to_empty", side_effect=AssertionError("allocated")
    )
    message = "model.safetensors: .* but .*config.json asks for"
    with allocates, pytest.raises(UserError, match=message):
        MiniKL.load(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ("{}", "lacks 'd_model'"),
        ("", "Expecting value"),
        ('{"d_model": 8', "Expecting"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_config_file_that_is_none_is_named(text, message, folder):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(data)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        MiniKL.load(folder)


WRONG_FIELDS = [
    {"d_model": 8.0},
    {"d_model": True},
    {"num_layers": [1]},
    {"theta": None},
    {"qk_norm": 0},
    {"activation": {}},
    {"max_seq_len": 10**19},
]


@pytest.mark.parametrize("changes", WRONG_FIELDS, ids=str)
def test_a_wrong_field_is_named_with_its_file(changes, folder):
    (folder / "config.json").write_text(config_text(folder, **changes))
    name = next(iter(changes))
    with pytest.raises(UserError, match=f"config.json: {name}=.*expected"):
        MiniKL.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_saved_one(dtype, tmp_path):
    "Also where the file holds narrower numbers than a model computes with."
    model = MiniKL(MiniKLConfig(**TINY, vocab_size=9, qk_norm=True))
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    model.save(tmp_path, weights)
    as_bytes = safetensors.torch.save(weights)
    assert (tmp_path / "model.safetensors").read_bytes() == as_bytes
    again = MiniKL.load(tmp_path)
    assert again.config == model.config
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, weight in again.named_parameters():
        assert weight.dtype == torch.float32 and weight.requires_grad
        assert torch.equal(weight, stored[name].float())


def names_and_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_model_files_can_be_written_with_others(folder):
    model = MiniKL.load(folder)
    assert list(model.files()) == ["model.safetensors", "config.json"]
    new = folder.parent / "new"
    write_together(new, {**model.files(), "vocab_dict.json": "{}"})
    expected = {**names_and_bytes(folder), "vocab_dict.json": b"{}"}
    assert names_and_bytes(new) == expected


def test_a_full_disk_leaves_the_old_model_whole(folder):
    "The configuration used to be replaced before the weights were written."
    before = names_and_bytes(folder)
    model = MiniKL(MiniKLConfig(**TINY, vocab_size=9))
    with FULL_DISK, pytest.raises(OSError, match="No space left"):
        model.save(folder)
    assert names_and_bytes(folder) == before


# ---- the prompt script


def script(folder, *options):
    return [f"--model_path={folder}", "--max_new_tokens=5", *options]


OUT_OF_BOUNDS = [
    "--num_samples=1000000000",
    "--num_samples=0",
    "--max_new_tokens=1000000000000",
    "--max_new_tokens=-1",
    "--temperature=nan",
    "--top_p=nan",
    "--min_p=-0.1",
    "--top_k=-1",
]


@pytest.mark.parametrize("option", OUT_OF_BOUNDS)
def test_options_have_bounds(option, folder, capsys):
    name = option.split("=")[0]
    refuses(generate.main, script(folder, option), f"{name}=", capsys)


def test_many_samples_are_not_made_before_they_are_written(folder, capsys):
    "A million samples of one prompt: the first comes before the second group is begun."
    began = []
    true_batch = generate.generate_batch

    def counted(model, prompts, *more, **options):
        began.append(len(prompts))
        if len(began) > 2:
            raise UserError("enough")
        return true_batch(model, prompts, *more, **options)

    with patch("minikl.generate.generate_batch", counted):
        argv = script(folder, "--num_samples=1000000", "--prompt=风")
        code, out, complaint = ends(generate.main, argv, capsys)
    assert (code, complaint) == (2, "error: enough\n")
    assert began[:2] == [1, 16] and out.count("风") >= 16


def test_all_prompts_are_checked_before_the_first_is_written(folder, capsys):
    prompts = ["--prompt", *["风"] * 20, "风" * 200]
    message = "the prompt has 201 tokens"
    refuses(generate.main, script(folder, *prompts), message, capsys)


NOT_UTF8 = ["b\udcff", "\ud83d", "\udced\udca0\udcbd"]


@pytest.mark.parametrize("prompt", NOT_UTF8, ids=ascii)
def test_a_prompt_that_is_not_utf8_is_refused(prompt, folder, capsys):
    message = "is not UTF-8 text"
    refuses(generate.main, script(folder, f"--prompt={prompt}"), message, capsys)


@pytest.mark.parametrize("stdin", [None, "unreadable"])
def test_a_conversation_needs_somebody_to_type(stdin, folder, capsys, monkeypatch):
    if stdin is None:
        monkeypatch.setattr("sys.stdin", None)
    else:
        monkeypatch.setattr("builtins.input", lambda prompt: open(folder))
    code, out, complaint = ends(generate.main, script(folder, "--interactive"), capsys)
    assert code == 2 and complaint.count("\n") == 1
    assert complaint.startswith("error: --interactive: ")


def test_a_conversation_goes_on_after_bytes_that_are_no_text(
    folder, capsys, monkeypatch
):
    typed = "b\udcff\n风\n".encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
    code, out, complaint = ends(generate.main, script(folder, "--interactive"), capsys)
    assert (code, complaint) == (0, "")
    assert "error: the prompt 'b\\udcff' is not UTF-8 text" in out and "> 风" in out


def test_a_bug_in_a_conversation_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "风")
    with patch("minikl.generate.choose", side_effect=ValueError("a bug")):
        with pytest.raises(ValueError, match="a bug"):
            generate.main(script(folder, "--interactive"))


@pytest.mark.parametrize("main", [generate.main, llama.main])
def test_another_vocabulary_is_one_line(main, folder, capsys):
    Tokenizer({"<unk>": 0, "风": 1}).save(folder / "vocab_dict.json")
    argv = [f"--model_path={folder}"]
    if main is llama.main:
        argv.append(f"--out_dir={folder.parent}/llama")
    refuses(main, argv, "the vocabulary has 2 tokens, the model 14", capsys)


# ---- the export


@pytest.mark.parametrize("way", ["itself", "symlink", "relative", "another model"])
def test_an_export_spares_our_own_models(way, folder, capsys, monkeypatch):
    out = folder
    if way == "symlink":
        out = folder.parent / "link"
        out.symlink_to(folder)
    if way == "relative":
        monkeypatch.chdir(folder)
        out = "."
    if way == "another model":
        out = folder.parent / "other"
        MiniKL.load(folder).save(out)
    before = names_and_bytes(folder)
    argv = [f"--model_path={folder}", f"--out_dir={out}"]
    refuses(llama.main, argv, "choose another --out_dir", capsys)
    assert names_and_bytes(folder) == before


def test_an_export_may_replace_an_export(folder, capsys):
    argv = [f"--model_path={folder}/model.safetensors", f"--out_dir={folder}-llama"]
    for _ in range(2):
        assert ends(llama.main, argv, capsys)[0] == 0
    back = llama.import_llama(f"{folder}-llama")
    for name, weight in MiniKL.load(folder).state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)


def test_an_export_that_fails_leaves_the_earlier_one(folder, capsys):
    out = folder.parent / "llama"
    argv = [f"--model_path={folder}", f"--out_dir={out}"]
    assert ends(llama.main, argv, capsys)[0] == 0
    before = names_and_bytes(out)
    config = MiniKLConfig(**TINY, vocab_size=len(TOKENS), tie_embeddings=True)
    MiniKL(config).save(folder)
    with FULL_DISK:
        refuses(llama.main, argv, "No space left", capsys)
    assert names_and_bytes(out) == before


def test_an_import_compares_before_it_allocates(folder, capsys):
    out = folder.parent / "llama"
    argv = [f"--model_path={folder}", f"--out_dir={out}"]
    assert ends(llama.main, argv, capsys)[0] == 0
    text = config_text(out, hidden_size=2**20, head_dim=2**19)
    (out / "config.json").write_text(text)
    with pytest.raises(UserError, match="but MiniKL expects"):
        llama.import_llama(out)
    (out / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        llama.import_llama(out)


# ---- as processes


def default_sigint():
    "Who runs tests in the background has turned Ctrl-C off, and children inherit that."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


WAYS = [["minikl/{}.py"], ["-m", "minikl.{}"]]


@pytest.mark.parametrize("how", WAYS, ids=["path", "module"])
@pytest.mark.parametrize("name", [
    "generate", "llama", "bench", "serve", "compare", "grpo", "instruct",
])
def test_ctrl_c_while_pytorch_loads_is_quiet(name, how, tmp_path):
    "A module that is called torch presses Ctrl-C."
    press = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "torch.py").write_text(press)
    command = [sys.executable, *(part.format(name) for part in how)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=default_sigint,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_reader_who_has_seen_enough_is_no_error(folder):
    "As in `generate … | head -1`."
    command = [sys.executable, "minikl/generate.py", *script(folder, "--interactive")]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        preexec_fn=default_sigint,
    ) as process:
        assert process.stdout.readline().startswith("The beginning of a text")
        process.stdout.close()
        _, complaint = process.communicate("风\n")
    assert (process.returncode, complaint) == (141, "")


def test_a_system_that_knows_only_ascii(folder):
    "The prompt arrives as single bytes; what cannot be shown is shown by its number."
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **ascii_only}
    environment.pop("PYTHONIOENCODING", None)
    command = [sys.executable, "minikl/generate.py", *script(folder, "--prompt=风吹过")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(r"\u98ce\u5439\u8fc7")
