"Adapters: beside those of peft, in every setting of a model, and damaged files."
import json
import re
import struct

import pytest
import torch
from conftest import ROOT
from torch import nn

from minikl.checkpoint import read_tensors
from minikl.files import UserError
from minikl.generate import generate
from minikl.layouts import Nested, Packed, Padded
from minikl.lora import (
    TARGETS,
    Adapter,
    adapter_of,
    add_lora,
    base_hash,
    load_adapter,
    lora_layers,
    merged,
    read_adapter,
    remove_lora,
    save_adapter,
    use_adapter,
)
from minikl.model import MiniKL, MiniKLConfig, write_weights

SIZES = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2}
SETTINGS = (
    {},
    {"ffn": "FFN"},
    {"tie_embeddings": True},
    {"qk_norm": True, "num_kv_heads": 1},
)


def new_model(**options):
    torch.manual_seed(0)
    return MiniKL(MiniKLConfig(**{**SIZES, "vocab_size": 60, **options}))


def documents():   # list of 1-D id tensors
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 9, 9, 14)
    return [torch.randint(60, (n,), generator=generator) for n in lengths]


def with_change(model, rank=3):
    "The model with an adapter that does something."
    add_lora(model, rank, 2 * rank)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.1)
    return model


@torch.no_grad()
def logits(model):
    batch = Padded(documents())
    return model(batch.ids, batch.positions, batch.attend)


# ---- the oracle

NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}


def test_the_same_adapter_in_peft_gives_the_same_logits_and_gradients():
    peft = pytest.importorskip("peft")
    ours = with_change(new_model())
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS))
    theirs = peft.inject_adapter_in_model(config, new_model())
    weights = dict(theirs.named_parameters())
    for name, value in adapter_of(ours).weights.items():
        layer, _, letter = name.rpartition(".")
        weights[f"{layer}.{NAMES[letter]}"].data.copy_(value)
    assert (logits(ours) - logits(new_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    for model in (ours, theirs):
        model.loss(Nested(documents()))[0].backward()
    for name, layer in lora_layers(ours).items():
        for letter in "AB":
            mine = getattr(layer, letter).grad
            wanted = weights[f"{name}.{NAMES[letter]}"].grad
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    learning = {name for name, weight in weights.items() if weight.requires_grad}
    assert len(learning) == len(adapter_of(ours).weights)


# ---- models


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_at_first_nothing_changes_and_merged_is_the_same_map(options):
    model = new_model(**options)
    before = logits(model)
    add_lora(model, 2, 4)
    assert torch.equal(logits(model), before)
    remove_lora(model)
    with_change(model)
    assert (logits(model) - before).abs().max() > 0.01
    whole = merged(model)
    torch.testing.assert_close(logits(whole), logits(model), rtol=0, atol=1e-5)
    assert whole.state_dict().keys() == new_model(**options).state_dict().keys()
    assert all(weight.requires_grad for weight in whole.parameters())
    assert lora_layers(model)   # which stays as it was
    assert torch.equal(logits(remove_lora(model)), before)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_only_the_adapter_has_gradients(options):
    model = with_change(new_model(**options))
    model.loss(Nested(documents()))[0].backward()
    has_gradient = {
        name for name, weight in model.named_parameters() if weight.grad is not None
    }
    assert has_gradient == set(adapter_of(model).weights)


def test_layouts_and_generation_agree_beside_an_adapter():
    model = with_change(new_model())
    sums = []
    for layout in (Padded, Packed, Nested):
        with torch.no_grad():
            sums.append(model.loss(layout(documents()))[0])
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(sums[0], sums[2])
    whole = merged(model)
    texts = [list(generate(m, [1, 2, 3], 20, seed=5)) for m in (model, whole)]
    assert texts[0] == texts[1]
    assert texts[0] != list(generate(remove_lora(model), [1, 2, 3], 20, seed=5))


def test_a_merged_model_is_saved_and_loaded_like_any_other(tmp_path):
    model = with_change(new_model())
    merged(model).save(tmp_path)
    loaded = MiniKL.load(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


# ---- files


def test_an_adapter_goes_through_a_file_and_learns_on(tmp_path):
    model = with_change(new_model())
    path = tmp_path / "new folder" / "one.safetensors"
    save_adapter(model, path)
    n_weights = sum(weight.numel() for weight in adapter_of(model).weights.values())
    assert path.stat().st_size < 4 * n_weights + 4000
    other = new_model()
    adapter = load_adapter(other, path)
    assert (adapter.rank, adapter.alpha) == (3, 6)
    assert torch.equal(logits(other), logits(model))
    other.loss(Nested(documents()))[0].backward()
    for name, weight in other.named_parameters():
        assert weight.requires_grad == name.endswith((".A", ".B")), name


def test_what_is_kept_does_not_move_with_the_model():
    model = with_change(new_model())
    kept = adapter_of(model)
    use_adapter(model, kept)
    for layer in lora_layers(model).values():
        layer.A.data.zero_()
    assert all(w.any() for w in kept.weights.values())


def test_adapters_of_other_ranks_and_places_are_switched():
    model = new_model()
    adapters = [None]
    outputs = [logits(model)]
    for rank, targets in ((1, ("w_q",)), (5, TARGETS), (2, ("w_up", "w_down"))):
        learnt = add_lora(new_model(), rank, 3.0, targets)
        for layer in lora_layers(learnt).values():
            nn.init.normal_(layer.B)
        adapters.append(adapter_of(learnt))
        outputs.append(logits(learnt))
    for i in (1, 2, 0, 3, 1, 0, 2):
        use_adapter(model, adapters[i])
        assert torch.equal(logits(model), outputs[i])


def test_the_hash_is_of_the_base_alone():
    model = new_model()
    plain = base_hash(model)
    assert base_hash(with_change(model)) == plain == base_hash(new_model())
    for weight in new_model().state_dict():
        other = new_model()
        other.state_dict()[weight].view(-1)[-1] += 1e-6
        assert base_hash(other) != plain, weight


def test_an_adapter_of_another_base_is_refused_and_nothing_changes(tmp_path):
    path = tmp_path / "one.safetensors"
    save_adapter(with_change(new_model()), path)
    other = with_change(new_model(), rank=2)
    other.norm.weight.data += 1e-3
    before = logits(other)
    with pytest.raises(UserError, match="another base") as caught:
        load_adapter(other, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(logits(other), before)


def facts_of(model, **changes):   # metadata of a file
    adapter = adapter_of(model)
    facts = {"rank": adapter.rank, "alpha": adapter.alpha, "base": adapter.base}
    return {"adapter": json.dumps({**facts, **changes})}


def test_a_file_with_other_tensors_is_refused(tmp_path):
    model = with_change(new_model())
    weights = adapter_of(model).weights
    path = tmp_path / "one.safetensors"
    cases = {
        "missing": {k: v for k, v in weights.items() if k != "blocks.1.ffn.w_up.B"},
        r"\(3, 7\)": {**weights, "blocks.0.attention.w_q.A": torch.zeros(3, 7)},
        "w_z": {**weights, "blocks.0.attention.w_z.A": torch.zeros(3, 32)},
        "expected some of": {},
    }
    for message, tensors in cases.items():
        write_weights(tensors, path, facts_of(model))
        base = new_model()
        before = logits(base)
        with pytest.raises(UserError, match=message):
            load_adapter(base, path)
        assert torch.equal(logits(base), before) and not lora_layers(base)


OTHER_FACTS = [{"rank": "x"}, {"rank": 0}, {"alpha": None}]


@pytest.mark.parametrize("changes", OTHER_FACTS, ids=str)
def test_a_file_with_other_facts_is_refused(changes, tmp_path):
    model = with_change(new_model())
    path = tmp_path / "one.safetensors"
    write_weights(adapter_of(model).weights, path, facts_of(model, **changes))
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_adapter(new_model(), path)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(FileNotFoundError, match=r"one\.safetensors: no such file"):
        read_adapter(path)
    save_adapter(with_change(new_model()), path)
    data = path.read_bytes()
    for broken in (b"", data[:100], data[:-1], struct.pack("<Q", 2**40) + data[8:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_adapter(path)
    write_weights({"x": torch.zeros(2)}, path)
    assert set(read_tensors(path)) == {"x"}
    with pytest.raises(UserError, match="not of an adapter"):
        read_adapter(path)


def test_what_cannot_be_adapted_is_refused_and_nothing_changes():
    model = new_model()
    for rank in (0, -1, 33):
        with pytest.raises(UserError, match=f"rank={rank}"):
            add_lora(model, rank, 1.0)
    for targets in ((), ("head",), ("w_q", "embed")):
        with pytest.raises(UserError, match="expected some of"):
            add_lora(model, 2, 4, targets)
    with pytest.raises(UserError, match="no adapter"):
        adapter_of(model)
    assert not lora_layers(model)
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_adapter_without_a_model_is_no_more_than_its_fields():
    adapter = adapter_of(with_change(new_model()))
    again = Adapter(adapter.rank, adapter.alpha, adapter.base, dict(adapter.weights))
    assert torch.equal(
        logits(use_adapter(new_model(), again)), logits(with_change(new_model()))
    )


# ---- the figures in the prose of the lesson


def mean_of_seeds(measured, name, key):
    names = [name, f"{name}, seed 1", f"{name}, seed 2"]
    return sum(measured[run][key] for run in names) / 3


def figures(measured):   # list of (as the lesson says it, the measurement)
    raw = measured["raw, rank 0, rate 0, n_steps 0"]
    full = measured["raw, rank 0, rate 0.001"]
    start = measured["repaired, rank 0, rate 0, n_steps 0"]
    gain = raw["nalan"] - full["nalan"]
    found = [
        ("1.31 bits", gain),
        ("83 %", 100 * (raw["ends"] - full["ends"]) / gain),
        ("8.71", raw["nalan"]),
        ("6.83", start["nalan"]),
    ]
    for rank, rate, learnt, forgotten in (
        (0, 0.001, "0.122", "0.212"),
        (8, 0.003, "0.098", "0.142"),
        (4, 0.003, "0.091", "0.103"),
    ):
        name = f"repaired, rank {rank}, rate {rate}"
        nalan = start["nalan"] - mean_of_seeds(measured, name, "nalan")
        found.append((learnt, nalan))
        found.append((forgotten, mean_of_seeds(measured, name, "main") - start["main"]))
    for rank, rate, learnt, forgotten in (
        (0, 0.0003, "0.120", "0.087"),
        (0, 0.0001, "0.089", "0.044"),
        (8, 0.003, "0.094", "0.137"),
        (8, 0.001, "0.087", "0.077"),
    ):
        run = measured[f"repaired, rank {rank}, rate {rate:g}"]
        found.append((learnt, start["nalan"] - run["nalan"]))
        found.append((forgotten, run["main"] - start["main"]))
    for title, learnt in (("maps only", "0.076"), ("cut to rank 8", "0.057")):
        found.append((learnt, start["nalan"] - measured["inside"][title]["nalan"]))
    return found


def test_figures_in_the_prose_are_those_that_were_measured():
    nbs = ROOT / "nbs"
    measured = json.loads((nbs / "measured" / "lora.json").read_text(encoding="utf-8"))
    cells = json.loads((nbs / "21_lora.ipynb").read_text(encoding="utf-8"))["cells"]
    prose = "".join(
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
    )
    for said, measurement in figures(measured):
        assert said in prose, said
        number = said.replace(",", "").split()[0]
        digits = len(number.partition(".")[2])
        assert abs(float(number) - measurement) <= 0.5001 * 10**-digits, said
