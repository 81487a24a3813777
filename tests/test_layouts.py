"Padded, packed, nested: a search for lengths that make them differ, and the edges."

import logging
from itertools import accumulate

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from minikl.data import IGNORE
from minikl.layouts import LAYOUTS, Layout, Nested, Packed, Padded
from minikl.model import MiniKL, MiniKLConfig

LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=6)
SEARCH = settings(max_examples=12, deadline=None, derandomize=True, database=None)
AWKWARD = [[1], [1, 1, 1], [4, 4, 4], [16, 1], [1, 9, 4, 4, 16, 1, 7, 4]]
DOCS = [torch.arange(n) + 5 for n in (7, 1, 3, 3)]


def small_model(num_kv_heads, dtype):
    torch.manual_seed(1)
    shape = {"d_model": 32, "num_heads": 4, "num_layers": 1, "vocab_size": 50}
    model = MiniKL(MiniKLConfig(num_kv_heads=num_kv_heads, **shape))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.to(dtype)


def attend_naive(q, k, v):
    "Causal attention of one document, in loops."
    group = q.shape[1] // k.shape[1]
    mixes = []
    for place in range(len(q)):
        for head in range(q.shape[1]):
            keys = k[: place + 1, head // group]
            values = v[: place + 1, head // group]
            scores = keys @ q[place, head] / q.shape[-1] ** 0.5
            mixes.append(scores.softmax(0) @ values)
    return torch.stack(mixes).view(q.shape)


def everything(model, logits, loss):
    "Logits of each document, the loss, the gradient of every weight."
    weights = list(model.parameters())
    gradients = [torch.zeros_like(weight) for weight in weights]
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    slopes = torch.cat([gradient.flatten() for gradient in gradients])
    return [torch.cat(logits), loss.reshape(1), slopes]


def document_by_document(model, docs):
    logits = [model(doc, torch.arange(len(doc)), attend_naive) for doc in docs]
    loss = torch.zeros((), dtype=logits[0].dtype)
    for doc, rows in zip(docs, logits, strict=True):
        for place in range(len(doc) - 1):
            loss = loss - rows[place].log_softmax(-1)[doc[place + 1]]
    return everything(model, logits, loss)


def in_layout(model, batch):
    logits = model(batch.ids, batch.positions, batch.attend)
    flat = logits.flatten(0, -2)
    targets = batch.targets.flatten()
    loss = F.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="sum")
    return everything(model, batch.unbatch(logits), loss)


def worst_error(lengths, num_kv_heads, dtype, layouts=None):
    "Largest difference from the oracle, relative to the largest number."
    model = small_model(num_kv_heads, dtype)
    docs = [torch.randint(50, (n,)) for n in lengths]
    expected = document_by_document(model, docs)
    errors = []
    for layout in layouts or LAYOUTS.values():
        for ours, right in zip(in_layout(model, layout(docs)), expected, strict=True):
            scale = right.abs().max().item() or 1
            errors.append((ours - right).abs().max().item() / scale)
    return max(errors)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_lengths_make_layouts_differ(dtype, num_kv_heads):
    bound = 1e-10 if dtype == torch.float64 else 1e-5

    @SEARCH
    @given(LENGTHS)
    def search(lengths):
        assert worst_error(lengths, num_kv_heads, dtype) < bound

    search()
    for lengths in AWKWARD:
        assert worst_error(lengths, num_kv_heads, dtype) < bound


def no_owners(docs):
    batch = Packed(docs)
    batch.mask = torch.ones_like(batch.mask).tril()
    return batch


def runs_over(docs):
    batch = Packed(docs)
    batch.targets[:-1] = batch.ids[1:]
    return batch


def glues_two(docs):
    batch = Nested(docs)
    if len(docs) > 1:
        lengths = [sum(batch.lengths[:2]), *batch.lengths[2:]]
        batch.groups = [(1, n) for n in lengths]
    return batch


@pytest.mark.parametrize("broken", [no_owners, runs_over, glues_two])
def test_the_search_finds_mistakes(broken):
    def differs(lengths):
        return worst_error(lengths, 4, torch.float64, [broken]) > 0.01

    assert len(find(LENGTHS, differs, settings=SEARCH)) == 2


def test_what_stands_in_the_padding_does_not_matter():
    model = small_model(2, torch.float64)
    batch = Padded(DOCS)
    expected = model(batch.ids, batch.positions, batch.attend)
    padding = torch.arange(7) >= torch.tensor(batch.lengths)[:, None]
    batch.ids[padding] = 49
    changed = model(batch.ids, batch.positions, batch.attend)
    pairs = zip(batch.unbatch(changed), batch.unbatch(expected), strict=True)
    for ours, right in pairs:
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    assert (changed - expected)[padding].abs().max() > 0.1


def test_the_mask_of_packed_equals_loops():
    expected = torch.zeros(14, 14, dtype=torch.bool)
    start = 0
    for n in (7, 1, 3, 3):
        for query in range(n):
            for key in range(query + 1):
                expected[start + query, start + key] = True
        start += n
    assert torch.equal(Packed(DOCS).mask, expected)


def test_positions_far_away_change_little():
    model = small_model(2, torch.float64)
    batch = Packed(DOCS)
    expected = model(batch.ids, batch.positions, batch.attend)
    for positions in (torch.arange(14), batch.positions + 1_000_000):
        moved = model(batch.ids, positions, batch.attend)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_promised_errors_and_the_move_to_a_device(layout):
    with pytest.raises(ValueError, match="at least one token"):
        layout([DOCS[0], DOCS[0][:0]])
    with pytest.raises(ValueError, match="at least one document"):
        layout([])
    batch = layout(DOCS)
    assert batch.to("meta") is batch
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {"meta"}


def test_documents_come_back_in_their_order():
    for layout in (Layout, *LAYOUTS.values()):
        batch = layout(DOCS)
        for ours, doc in zip(batch.unbatch(batch.ids), DOCS, strict=True):
            assert torch.equal(ours, doc)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_pytorch_have_no_causal_attention_on_a_cpu():
    "Why Nested makes groups. If this fails, PyTorch has learnt something new."
    for talker in ("torch.fx", "torch.nested"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    x = torch.randn(14, 4, 8)  # (tokens, heads, d_head)
    offsets = torch.tensor([0, *accumulate(Nested(DOCS).lengths)])
    jagged = torch.nested.nested_tensor_from_jagged(x, offsets)
    q = jagged.transpose(1, 2)  # (docs, heads, ragged, d_head)
    found = F.scaled_dot_product_attention(q, q, q).transpose(1, 2)[1]
    alone = x[1:4].transpose(0, 1)
    right = F.scaled_dot_product_attention(alone, alone, alone).transpose(0, 1)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="No viable backend"):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
