"The training step: its edges, float16, Muon against PyTorch's."
import math
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn

from minikl.files import UserError
from minikl.layouts import Nested, Packed, Padded
from minikl.learner import Learner
from minikl.model import MiniKL, MiniKLConfig
from minikl.options import parse_options
from minikl.parallel import Ranks
from minikl.step import (
    Muon,
    Precision,
    make_optimizers,
    orthogonalize,
    schedule,
    train_step,
)

LISTS = [[1, 5, 2], [1, 5, 6, 2], [1, 7, 8, 9, 5, 6, 2], [1, 10, 2]]
LISTS += [[1, 7, 8, 9, 7, 8, 9, 7, 8, 9, 5, 6, 10, 2], [1, 11, 5, 2]]
DOCS = [torch.tensor(ids) for ids in LISTS]
N_TARGETS = 29


def new_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_heads": 2, "num_kv_heads": 2, "num_layers": 2}
    return MiniKL(MiniKLConfig(**{**sizes, "vocab_size": 16, **changes})).to(dtype)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights_of(model):
    return flat(model.parameters())


def test_schedule():
    assert schedule(0) == 0 and schedule(0.02) == 1 and schedule(0, warmup=0) == 1
    assert schedule(0.51) == pytest.approx(0.5)
    assert schedule(1.0) == pytest.approx(0)
    assert schedule(1.7, final=0.1) == pytest.approx(0.1)
    assert schedule(0.05, warmup=0.1) == pytest.approx(0.5)
    down = [schedule(share, decay="linear") for share in (0.01, 0.02, 0.51, 1, 1.7)]
    assert down == pytest.approx([0.5, 1, 0.5, 0, 0])
    assert schedule(0.265, decay="linear") == pytest.approx(0.75)
    assert schedule(0.265) > 0.85


def five_steps(optimizer_class):
    torch.manual_seed(1)
    shapes = ((32, 32), (32, 48), (48, 32))
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    start = flat(weights)
    optimizer = optimizer_class(weights, lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.randn(weight.shape)
        optimizer.step()
    return flat(weights) - start


def test_muon_equals_that_of_pytorch():
    theirs = five_steps(torch.optim.Muon)   # multiplies in bfloat16
    for dtype in (torch.bfloat16, None):
        ours = five_steps(partial(Muon, dtype=dtype))
        assert 0 < (ours - theirs).norm() < 0.03 * ours.norm()
    name = "torch.optim._muon._zeropower_via_newtonschulz"
    with patch(name, lambda gradient, *_: orthogonalize(gradient)):
        assert torch.equal(ours, five_steps(torch.optim.Muon))


def test_orthogonalize_turns_no_gradient_into_no_step():
    assert not orthogonalize(torch.zeros(3, 4)).any()
    torch.manual_seed(0)
    found = torch.linalg.svdvals(orthogonalize(torch.randn(20, 30)))
    assert 0.6 < found.min() and found.max() < 1.3


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_has_one_optimizer(kind, tied):
    model = new_model(tie_embeddings=tied, num_kv_heads=1)
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizers = make_optimizers(model, kind)
    groups = [group for one in optimizers for group in one.param_groups]
    owned = [names[id(weight)] for group in groups for weight in group["params"]]
    assert sorted(owned) == sorted(names.values())
    decaying = [group for group in groups if group["weight_decay"]]
    decayed = {names[id(weight)] for group in decaying for weight in group["params"]}
    inside = {name for name in names.values() if name.startswith("blocks.")}
    assert decayed == {name for name in inside if "norm" not in name}
    rates = [0.02, 3e-3] if kind == "muon" else [3e-3, 3e-3]
    assert [group["peak_lr"] for group in groups] == rates


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="expected 'muon' or 'adamw'"):
        make_optimizers(new_model(), "sgd")
    with pytest.raises(UserError, match="expected auto, fastest, fp32, bf16 or fp16"):
        Precision("float16")


def test_precision():
    assert Precision("auto").name == "fp32"
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        with patch("torch.cuda.is_bf16_supported", return_value=supported):
            assert Precision.best("cuda") == expected
    for found, expected in (({}, "fp32"), ({"avx512_bf16": True}, "bf16")):
        with patch("torch.cpu.get_capabilities", return_value=found):
            assert Precision("fastest").name == expected
            assert Precision("auto").name == "fp32"
    for name in ("fp32", "bf16", "fp16"):
        precision = Precision(name)
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == precision.dtype
        assert precision.scaler.is_enabled() == (name == "fp16")


def test_nothing_to_predict():
    model = new_model(torch.float64)
    before = weights_of(model)
    optimizers = make_optimizers(model, weight_decay=0)
    batch = Nested([doc[:1] for doc in DOCS])
    found = train_step(model.loss, [batch], model, optimizers, Precision(), 0)
    assert [value.item() for value in found] == [0, 0]
    assert torch.equal(weights_of(model), before)


class PretendedDDP:
    "Calls a loss, and notes whether gradients would be exchanged."

    def __init__(self, loss):
        self.loss = loss
        self.is_quiet = False
        self.log = []

    def __call__(self, batch):
        self.log.append("kept" if self.is_quiet else "exchanged")
        return self.loss(batch)

    @contextmanager
    def no_sync(self):
        self.is_quiet = True
        yield
        self.is_quiet = False


def test_gradients_are_exchanged_once_and_summed():
    parts = [Padded(DOCS[:2]), Packed(DOCS[2:5]), Nested(DOCS[5:])]
    norms = {}
    for n_ranks in (1, 3):
        model = new_model(torch.float64)
        ddp = PretendedDDP(model.loss)
        args = (ddp, parts, model, make_optimizers(model), Precision(), N_TARGETS)
        norms[n_ranks] = train_step(*args, n_ranks=n_ranks)[1].item()
        assert ddp.log == ["kept", "kept", "exchanged"]
    assert norms[3] == pytest.approx(3 * norms[1], rel=1e-12)


def break_one_matrix(model, name="blocks.0.attention.w_q.weight"):
    model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)


def test_overflow_skips_the_whole_step_and_halves_the_scale():
    model = new_model()
    break_one_matrix(model)
    precision = Precision("fp16")
    args = (model.loss, [Nested(DOCS)], model, make_optimizers(model), precision)
    train_step(*args, N_TARGETS)
    assert torch.equal(weights_of(model), weights_of(new_model()))
    assert precision.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("dtype, attempts", [("fp32", 1), ("bf16", 1), ("fp16", 18)])
def test_gradient_that_nothing_can_help(dtype, attempts):
    model = new_model()
    break_one_matrix(model)
    optimizers = make_optimizers(model)
    args = (model.loss, [Nested(DOCS)], model, optimizers, Precision(dtype), N_TARGETS)
    for _ in range(attempts - 1):
        train_step(*args)
    message = "1 of 21 weights .* nearest to the loss blocks.0.attention.w_q.weight"
    with pytest.raises(FloatingPointError, match=message):
        train_step(*args)
    assert torch.equal(weights_of(model), weights_of(new_model()))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_muon_multiplies_in_16_bits_where_they_have_the_range(name):
    options = parse_options([f"--dtype={name}", "--device=cpu"])
    ranks = Ranks(threads=1)
    config = new_model().config
    learner = Learner(config, options.learning, options.machine, ranks)
    muon, _ = learner.optimizers
    assert muon.dtype == (torch.bfloat16 if name == "bf16" else None)
