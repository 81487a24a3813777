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
