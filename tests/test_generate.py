"""Model files, the prompt script and the Llama export: mistakes, absurd sizes, odd terminals.

Everything runs in process with a model of a few hundred weights, unless a process is the matter.
"""
import json
from unittest.mock import patch

import pytest
import torch

from minikl import bench, generate, llama
from minikl.files import UserError
from minikl.generate import choose, narrow
from minikl.model import MiniKL, MiniKLConfig, count_by_formula, pick_device
from minikl.tokenizer import Tokenizer

TINY = dict(d_model=8, num_heads=2, num_kv_heads=1, num_layers=1, max_seq_len=64)
TOKENS = ["<unk>", "<s>", "</s>", *"一生代双人，风吹过雨落"]


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


# devices

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
    "The sum that decides a draw is made in float64, on the CPU wherever the logits are."
    from random import Random
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    ends = narrow(logits, 0.9, top_p=0.9).double().cumsum(-1)
    darts = torch.tensor([[Random(i).random()] for i in range(40)], dtype=torch.double)
    wanted = torch.searchsorted(ends, darts * ends[:, -1:], right=True).squeeze(-1)
    randoms = [Random(i) for i in range(40)]
    assert torch.equal(choose(logits, randoms, 0.9, top_p=0.9), wanted)


# configurations

@pytest.mark.parametrize("wrong", [
    dict(d_model=8.0), dict(d_model=True), dict(num_heads="2"), dict(num_layers=None),
    dict(num_layers=10_001), dict(num_layers=10**9), dict(d_model=2**21), dict(d_ff=2**20 + 1),
    dict(d_ff=8.0), dict(d_ff=False), dict(vocab_size=2**24 + 1), dict(num_heads=2**40),
    dict(max_seq_len=2**31), dict(max_seq_len=10**19), dict(max_seq_len=64.0),
    dict(theta=0.5), dict(theta=float("nan")), dict(theta=float("inf")), dict(theta=True),
    dict(theta=10**400), dict(norm_eps=-1), dict(norm_eps=0), dict(norm_eps=float("nan")),
    dict(norm_eps=1.5), dict(qk_norm=1), dict(tie_embeddings="no"), dict(ffn=["GLU"]),
    dict(activation=["silu"]), dict(d_model=2**19, num_heads=8, ffn="FFN"),
], ids=str)
def test_a_config_refuses_what_is_no_size(wrong):
    name = "d_ff" if wrong.get("d_model") == 2**19 else next(iter(wrong))
    with pytest.raises(UserError, match=f"^{name}=.*: expected "):
        MiniKLConfig(**wrong)


def test_a_config_keeps_what_it_is_given():
    assert MiniKLConfig(theta=1_000_000) == MiniKLConfig(theta=1e6)
    assert type(MiniKLConfig(theta=10_000).theta) is int
    assert MiniKLConfig(max_seq_len=2**31 - 1, num_layers=10_000).d_ff == 1368


def test_weights_are_counted_without_making_them():
    sizes = dict(d_model=2**20, d_ff=2**20, num_layers=10_000, vocab_size=2**24)
    assert count_by_formula(MiniKLConfig(**sizes, qk_norm=True)) > 7e16
    for more in ({}, dict(qk_norm=True), dict(tie_embeddings=True), dict(ffn="FFN")):
        config = MiniKLConfig(**TINY, vocab_size=9, **more)
        n_weights = sum(weight.numel() for weight in MiniKL(config).parameters())
        assert count_by_formula(config) == n_weights


# model files

def config_text(folder, **changes):
    return json.dumps(json.loads((folder / "config.json").read_text()) | changes)


@pytest.mark.parametrize("changes", [
    dict(d_model=2**20), dict(vocab_size=2**24), dict(num_layers=10_000), dict(d_ff=2**20),
    dict(tie_embeddings=True), dict(qk_norm=True), dict(ffn="FFN"), dict(num_kv_heads=2),
], ids=str)
def test_nothing_is_allocated_for_weights_that_do_not_fit(changes, folder):
    (folder / "config.json").write_text(config_text(folder, **changes))
    with patch("torch.nn.Module.to_empty", side_effect=AssertionError("allocated")):
        with pytest.raises(UserError, match="model.safetensors: .* but .*config.json asks for"):
            MiniKL.load(folder)


@pytest.mark.parametrize("text, message", [
    ("[" * 100_000, "nested too deeply"), ("[1]", "expected a JSON object, found list"),
    ("null", "expected a JSON object, found NoneType"), ("{}", "lacks 'd_model'"),
    ("", "Expecting value"), ('{"d_model": 8', "Expecting"), (b"\xff\xfe", "codec can't decode"),
])
def test_a_config_file_that_is_none_is_named(text, message, folder):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(data)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        MiniKL.load(folder)


@pytest.mark.parametrize("changes", [
    dict(d_model=8.0), dict(d_model=True), dict(num_layers=[1]), dict(theta=None),
    dict(qk_norm=0), dict(activation={}), dict(max_seq_len=10**19),
], ids=str)
def test_a_wrong_field_is_named_with_its_file(changes, folder):
    (folder / "config.json").write_text(config_text(folder, **changes))
    with pytest.raises(UserError, match=f"config.json: {next(iter(changes))}=.*expected"):
        MiniKL.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_saved_one(dtype, tmp_path):
    "Also where the file holds narrower numbers than a model computes with."
    from safetensors.torch import load_file
    from safetensors.torch import save as to_bytes
    model = MiniKL(MiniKLConfig(**TINY, vocab_size=9, qk_norm=True))
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    model.save(tmp_path, weights)
    assert (tmp_path / "model.safetensors").read_bytes() == to_bytes(weights)
    again = MiniKL.load(tmp_path)
    assert again.config == model.config
    stored = load_file(tmp_path / "model.safetensors")
    for name, weight in again.named_parameters():
        assert weight.dtype == torch.float32 and weight.requires_grad
        assert torch.equal(weight, stored[name].float())


def test_model_files_can_be_written_with_others(folder):
    from minikl.files import write_together
    model = MiniKL.load(folder)
    assert list(model.files()) == ["model.safetensors", "config.json"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_together(folder.parent / "new", {**model.files(), "vocab_dict.json": "{}"})
    after = {path.name: path.read_bytes() for path in (folder.parent / "new").iterdir()}
    assert after == {**before, "vocab_dict.json": b"{}"}


def test_a_full_disk_leaves_the_old_model_whole(folder):
    "The configuration used to be replaced before the weights were written."
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    from safetensors import SafetensorError
    with patch("minikl.model.save_file", side_effect=SafetensorError("No space left")):
        with pytest.raises(OSError, match="No space left"):
            MiniKL(MiniKLConfig(**TINY, vocab_size=9)).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
