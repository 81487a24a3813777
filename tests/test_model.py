"The model: an oracle in plain loops, layouts, cache, configuration, files."
import errno
import json
import math
from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minikl.attention import causal_attention
from minikl.files import UserError
from minikl.generate import KVCache
from minikl.layouts import LAYOUTS, Nested, Packed, Padded
from minikl.model import MiniKL, MiniKLConfig, count_by_formula
from minikl.rope import rope_table
from minikl.step import pick_device

VARIANTS = [
    {"num_kv_heads": kv_heads, "ffn": ffn, "tie_embeddings": tied}
    for kv_heads in (4, 2, 1)
    for ffn in ("GLU", "FFN")
    for tied in (False, True)
]
VARIANTS += [{"num_kv_heads": kv_heads, "qk_norm": True} for kv_heads in (4, 1)]


def tiny(**changes):
    sizes = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2}
    return MiniKLConfig(**{**sizes, "vocab_size": 50, "max_seq_len": 64, **changes})


def strong_model(**changes):
    "Large random weights in double precision: no mistake is hidden by small numbers."
    torch.manual_seed(1)
    model = MiniKL(tiny(**changes)).double()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def documents():
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 3, 1, 7, 12)
    return [torch.randint(50, (n,), generator=generator) for n in lengths]


def rms_norm_by_hand(x, gain):
    rows = [row / (sum(f**2 for f in row) / len(row) + 1e-5) ** 0.5 for row in x]
    return torch.stack(rows) * gain


def rotated_by_hand(row, position, theta):
    out = row.clone()
    half = len(row) // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / len(row))
        out[i] = row[i] * math.cos(angle) - row[i + half] * math.sin(angle)
        out[i + half] = row[i] * math.sin(angle) + row[i + half] * math.cos(angle)
    return out


def attention_by_hand(x, w, config):
    q, k, v = ((x @ w[f"attention.w_{name}.weight"].T) for name in "qkv")
    q, k, v = (rows.unflatten(-1, (-1, config.d_head)) for rows in (q, k, v))
    if config.qk_norm:
        q = torch.stack([rms_norm_by_hand(r, w["attention.q_norm.weight"]) for r in q])
        k = torch.stack([rms_norm_by_hand(r, w["attention.k_norm.weight"]) for r in k])
    mix = torch.zeros_like(q)
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        for i in range(len(x)):
            query = rotated_by_hand(q[i, head], i, config.theta)
            scores = []
            for j in range(i + 1):
                key = rotated_by_hand(k[j, shared], j, config.theta)
                scores.append(query @ key / config.d_head**0.5)
            for j, share in enumerate(torch.stack(scores).softmax(0)):
                mix[i, head] += share * v[j, shared]
    return mix.flatten(1) @ w["attention.w_o.weight"].T


def ffn_by_hand(x, w, config):
    inner = x @ w["ffn.w_up.weight"].T
    gate = x @ w["ffn.w_gate.weight"].T if config.ffn == "GLU" else inner
    bent = gate / (1 + (-gate).exp())
    return (bent * inner if config.ffn == "GLU" else bent) @ w["ffn.w_down.weight"].T


def logits_by_hand(model, ids):
    weights, config = model.state_dict(), model.config
    x = torch.stack([weights["embed.weight"][i] for i in ids])
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items()}
        read = rms_norm_by_hand(x, w["attention_norm.weight"])
        x = x + attention_by_hand(read, w, config)
        x = x + ffn_by_hand(rms_norm_by_hand(x, w["ffn_norm.weight"]), w, config)
    head = weights["embed.weight" if config.tie_embeddings else "head.weight"]
    return rms_norm_by_hand(x, weights["norm.weight"]) @ head.T


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_model_equals_loops(variant):
    model = strong_model(**variant)
    ids = documents()[0]
    by_hand = logits_by_hand(model, ids)
    found = model(ids, torch.arange(7), Nested([ids]).attend)
    assert (found - by_hand).abs().max() < 1e-6   # angles are float32
    backwards = model(ids, torch.arange(7).flip(0), Nested([ids]).attend)
    assert (backwards - by_hand).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_give_one_loss_and_one_gradient(variant):
    model = strong_model(**variant)
    found = []
    for layout in (Padded, Packed, Nested):
        summed, n_targets = model.loss(layout(documents()))
        assert n_targets == 25
        gradients = torch.autograd.grad(summed, list(model.parameters()))
        found.append([summed.detach(), *gradients])
    assert all(gradient.any() for gradient in found[0])   # every weight learns
    for padded, packed, nested in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-8)
        torch.testing.assert_close(nested, padded, rtol=0, atol=1e-8)
    assert {Padded, Packed, Nested} <= set(LAYOUTS.values())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cache_gives_the_same_logits(variant):
    model = strong_model(**variant)
    config = model.config
    ids = documents()[4][None]
    whole = model(ids, torch.arange(12)[None], causal_attention)
    for cuts in ([1] * 12, [7, 1, 4], [12]):
        sizes = (2, 1, 12, config.num_kv_heads, config.d_head)
        cache = KVCache(*sizes, dtype=torch.float64)
        pieces = [model(*cache.step(part)) for part in ids.split(cuts, dim=1)]
        found = torch.cat(pieces, dim=1)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_no_document_sees_its_neighbour_or_its_future():
    model = strong_model()
    batch = Packed([doc for doc in documents() if len(doc) > 1])
    kept = []
    model.embed.register_forward_hook(lambda module, inputs, x: kept.append(x))
    logits = model(batch.ids, batch.positions, batch.attend)
    rows = [
        torch.autograd.grad(row.sum(), kept[0], retain_graph=True)[0].norm(dim=-1)
        for row in logits
    ]
    owner = torch.arange(4).repeat_interleave(torch.tensor(batch.lengths))
    assert torch.equal(torch.stack(rows) > 0, (owner[:, None] == owner).tril())


def test_document_that_is_too_long():
    with pytest.raises(UserError, match="65 tokens does not fit max_seq_len=64"):
        MiniKL(tiny()).loss(Packed([torch.zeros(65, dtype=torch.long)]))


class Operations(TorchDispatchMode):
    "Notes every operation, and the shapes of the tensors that it makes."

    def __init__(self):
        super().__init__()
        self.names = []
        self.shapes = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.names.append(str(op))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.shapes |= {tuple(x.shape) for x in tensors}
        return out


class MarkedTensor(torch.Tensor):
    pass


@torch.no_grad()
def test_angles_are_computed_once_and_no_mask_is_made():
    torch.manual_seed(0)
    model = MiniKL(tiny())
    docs = [torch.randint(50, (61,)) for _ in range(2)]   # nothing else has 61
    batch = Padded(docs)
    with Operations() as seen:
        logits = model(batch.ids, batch.positions, batch.attend)
    assert seen.names.count("aten.cos.default") == 1
    assert not [shape for shape in seen.shapes if shape.count(61) > 1]
    assert (2, 61, 32) in seen.shapes
    marked = batch.ids.as_subclass(MarkedTensor)
    again = model(marked, batch.positions, batch.attend).as_subclass(torch.Tensor)
    assert torch.equal(again, logits)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@torch.no_grad()
def test_first_weights_keep_the_stream_level():
    sizes = {}
    for is_scaled in (True, False):
        torch.manual_seed(0)
        model = MiniKL(tiny(d_model=64, num_layers=32))
        x = model.embed(torch.randint(50, (64,)))
        first = x.square().mean().sqrt()
        rotation = rope_table(torch.arange(64), model.config.d_head)
        for block in model.blocks:
            if not is_scaled:
                block.attention.w_o.weight *= 8
                block.ffn.w_down.weight *= 8
            x = block(x, rotation, causal_attention)
        sizes[is_scaled] = x.square().mean().sqrt() / first
    assert abs(sizes[True] - 1) < 0.1
    assert sizes[False] > 4


@torch.no_grad()
def test_last_norm_makes_logits_independent_of_the_stream():
    for has_norm, expected in ((True, 1), (False, 10)):
        torch.manual_seed(0)
        model = MiniKL(tiny(d_model=64))
        if not has_norm:
            model.norm = nn.Identity()
        ids = documents()[4]
        before = model(ids, torch.arange(12), causal_attention).std()
        for name, weight in model.named_parameters():
            if name.endswith(("embed.weight", "w_o.weight", "w_down.weight")):
                weight *= 10
        after = model(ids, torch.arange(12), causal_attention).std()
        assert abs(after / before - expected) < 0.2 * expected


@torch.no_grad()
def test_query_key_norm_bounds_the_scores():
    largest = {}
    for qk_norm in (False, True):
        torch.manual_seed(0)
        model = MiniKL(tiny(d_model=64, qk_norm=qk_norm))
        for block in model.blocks:
            block.attention.w_q.weight *= 1000
        bounds = []

        def attend(q, k, v, bounds=bounds):
            lengths = q.norm(dim=-1).max() * k.norm(dim=-1).max()
            bounds.append((lengths / q.shape[-1] ** 0.5).item())
            return causal_attention(q, k, v)

        model(documents()[4], torch.arange(12), attend)
        largest[qk_norm] = bounds
    assert max(abs(bound - 4) for bound in largest[True]) < 1e-3   # sqrt(d_head)
    assert min(largest[False]) > 100


def test_training_costs_six_flops_per_weight_and_token():
    torch.manual_seed(0)
    config = MiniKLConfig(d_model=128, num_layers=3, vocab_size=1000)
    model = MiniKL(config)
    batch = Padded([torch.randint(1000, (64,)) for _ in range(4)])
    matrices = [
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and name != "embed.weight"
    ]
    flops = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
            model.loss(batch)[0].backward()
        flops[backend] = counter.get_total_flops() / batch.ids.numel()
    assert flops[SDPBackend.FLASH_ATTENTION] == 6 * sum(matrices)
    attention = 12 * config.num_layers * 64 * config.d_model
    assert flops[SDPBackend.MATH] == 6 * sum(matrices) + attention
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.loss(batch)
    assert counter.get_total_flops() / batch.ids.numel() == 2 * sum(matrices)


@pytest.mark.parametrize("variant", VARIANTS)
def test_count_by_formula(variant):
    n_weights = sum(weight.numel() for weight in MiniKL(tiny(**variant)).parameters())
    assert n_weights == count_by_formula(tiny(**variant))


@pytest.mark.parametrize("message, wrong", [
    ("d_model=0: expected a whole number, 1 to 1048576", {"d_model": 0}),
    ("num_heads=8.0: expected a whole number", {"num_heads": 8.0}),
    ("num_layers=1000000000: expected a whole number, 1 to 10000",
     {"num_layers": 10**9}),
    ("d_ff=-8: expected a whole number", {"d_ff": -8}),
    ("d_ff=4194304: expected at most 1048576", {"d_model": 2**20, "ffn": "FFN"}),
    ("theta=nan: expected a number, 1 or more", {"theta": math.nan}),
    ("norm_eps=-1: expected a number, 1e-30 to 1", {"norm_eps": -1}),
    ("qk_norm=1: expected true or false", {"qk_norm": 1}),
    ("d_model=100 does not divide by num_heads=8", {"d_model": 100}),
    ("d_model/num_heads=3 is odd", {"d_model": 24}),
    ("num_heads=8 does not divide by num_kv_heads=3", {"num_kv_heads": 3}),
    ("expected 'GLU' or 'FFN'", {"ffn": "glu"}),
    ("expected one of silu, gelu, relu", {"activation": "swish"}),
])
def test_configuration_names_the_mistake(message, wrong):
    with pytest.raises(UserError) as error:
        MiniKLConfig(**wrong)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="flag_kv_cache"):
        MiniKLConfig(flag_kv_cache=True)


def test_every_field_has_its_own_help():
    fields = MiniKLConfig.__dataclass_fields__.values()
    texts = [field.metadata["help"] for field in fields]
    assert len(set(texts)) == len(texts) and all(len(text) > 15 for text in texts)


def test_pick_device():
    accelerator = "torch.accelerator.current_accelerator"
    with patch(accelerator, return_value=None):
        assert [pick_device().type, pick_device("cpu").type] == ["cpu", "cpu"]
        with pytest.raises(UserError, match="'cuda': not available here; .* auto, cpu"):
            pick_device("cuda")
    for kind in ("cuda", "mps", "xpu"):
        with patch(accelerator, return_value=torch.device(kind)):
            found = [pick_device(name).type for name in ("auto", "cpu", kind)]
        assert found == [kind, "cpu", kind]


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant, tmp_path):
    model = MiniKL(tiny(**variant))
    model.save(tmp_path)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        again = MiniKL.load(path)
        assert again.config == model.config
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name


def test_failed_save_leaves_the_old_model(tmp_path):
    MiniKL(tiny()).save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    full = OSError(errno.ENOSPC, "disk full")
    with patch("os.fsync", side_effect=full), pytest.raises(OSError) as error:
        MiniKL(tiny()).save(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "model.safetensors").read_bytes() == before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors"]


GOOD = asdict(tiny())


def changed(**changes):
    return json.dumps({**GOOD, **changes}).encode()


WITHOUT_D_FF = {name: value for name, value in GOOD.items() if name != "d_ff"}


@pytest.mark.parametrize("message, file, data", [
    ("model.safetensors: no such file", "model.safetensors", None),
    ("damaged or not a safetensors file", "model.safetensors", b"\x10" * 1000),
    ("config.json: no such file", "config.json", None),
    ("config.json: Expecting value", "config.json", b"d_model: 32"),
    ("config.json: expected a JSON object", "config.json", b"[]"),
    ("config.json: lacks 'd_ff'", "config.json", json.dumps(WITHOUT_D_FF).encode()),
    ("config.json: d_model=33 does not divide", "config.json", changed(d_model=33)),
    ("config.json: d_model='32': expected a whole", "config.json",
     changed(d_model="32")),
    ("w_k.weight is (16, 32), but", "config.json",
     changed(d_model=2**20, vocab_size=2**20)),
    ("embed.weight is (50, 32), but", "config.json", changed(vocab_size=51)),
    ("head.weight is (50, 32), but", "config.json", changed(tie_embeddings=True)),
])
def test_load_names_file_and_mistake(message, file, data, tmp_path):
    MiniKL(tiny()).save(tmp_path)
    if data is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(data)
    with pytest.raises((UserError, FileNotFoundError)) as error:
        MiniKL.load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_activations_are_curves():
    "Additivity, since a ReLU network without biases does double its output."
    for activation in ("silu", "gelu", "relu"):
        torch.manual_seed(0)
        ffn = MiniKL(tiny(ffn="FFN", activation=activation)).blocks[0].ffn
        for weight in ffn.parameters():
            nn.init.normal_(weight)
        a, b = torch.randn(2, 4, 32)
        assert not torch.allclose(ffn(a + b), ffn(a) + ffn(b), atol=0.1)
        if activation == "relu":
            assert torch.allclose(ffn(2 * a), 2 * ffn(a), rtol=1e-3, atol=1e-3)
        assert ffn.activation is getattr(F, activation)


def test_no_output_of_the_model_depends_on_a_later_token():
    "Through the whole model: the derivative by the embedding of each place."
    sizes = {"d_model": 16, "num_heads": 2, "num_kv_heads": 2, "num_layers": 2}
    config = MiniKLConfig(**sizes, vocab_size=50)
    model = MiniKL(config).double()
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    model.embed.forward = lambda ids: x
    ids = torch.zeros(12, dtype=torch.long)
    logits = model(ids, torch.arange(12), causal_attention)
    for i, output in enumerate(logits.sum(dim=-1)):
        influence = torch.autograd.grad(output, x, retain_graph=True)[0].norm(dim=-1)
        assert not influence[i + 1 :].any() and influence[: i + 1].all()
