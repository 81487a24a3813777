"Attention: what lesson 04 promises beyond its own checks."

import pytest
import torch
from torch.nn import functional as F

from minikl.attention import Attention, causal_attention
from minikl.rope import rope_table, rotate


class Marked(torch.Tensor):
    "A tensor that is not exactly of type Tensor, as nn.Parameter is not."


def qkv(seq=7, heads=2, kv_heads=2, d_head=16):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, seq, heads, d_head, generator=generator)
    k = torch.randn(1, seq, kv_heads, d_head, generator=generator)
    v = torch.randn(1, seq, kv_heads, d_head, generator=generator)
    return q, k, v


def by_hand(q, k, v):
    "Grouped causal attention of one text, with the softmax written out."
    group = q.shape[1] // k.shape[1]
    results = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / q.shape[-1] ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        results.append(weights @ v[:, head // group])
    return torch.stack(results, dim=1)


@pytest.mark.parametrize("shape", [(5, 6, 3, 2), (1, 2, 1, 8), (7, 4, 2, 16)])
def test_grouped_heads_equal_the_formula(shape):
    q, k, v = qkv(*shape)
    expected = by_hand(q[0], k[0], v[0])
    torch.testing.assert_close(causal_attention(q, k, v)[0], expected)
    torch.testing.assert_close(causal_attention(q[0], k[0], v[0]), expected)


def test_the_frequent_cases_build_no_mask(monkeypatch):
    masks = []
    sdpa = F.scaled_dot_product_attention

    def spy(*arguments, attn_mask=None, **options):
        masks.append(attn_mask)
        return sdpa(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = qkv()
    causal_attention(q, k, v)
    causal_attention(q[:, -1:], k, v)
    assert masks == [None, None]


def test_is_causal_of_pytorch_takes_the_newest_query_for_the_first():
    q, k, v = qkv()
    moved = [x.transpose(1, 2) for x in (q[:, -1:], k, v)]
    newest = F.scaled_dot_product_attention(*moved, is_causal=True)
    torch.testing.assert_close(newest[:, :, 0], v[:, 0])
    ours = causal_attention(q[:, -1:], k, v)
    torch.testing.assert_close(ours, causal_attention(q, k, v)[:, -1:])


def test_four_heads_cannot_share_three():
    q, k, v = qkv(heads=4, kv_heads=3)
    with pytest.raises(RuntimeError):
        causal_attention(q, k, v)


def test_without_attention_no_token_depends_on_another():
    layer = Attention(32, 4, 4)
    flat = torch.randn(7, 32)
    changed = flat.clone()
    changed[2] += 1
    rotation = rope_table(torch.arange(7), layer.d_head)

    def values_only(q, k, v):
        return v

    before = layer(flat, rotation, values_only)
    after = layer(changed, rotation, values_only)
    assert (after - before).any(dim=-1).tolist() == [i == 2 for i in range(7)]


def test_documents_end_to_end_leak_without_a_mask():
    torch.manual_seed(0)
    layer = Attention(32, 4, 2)
    flat = torch.randn(7, 32)
    rotation = rope_table(torch.tensor([0, 1, 2, 0, 1, 2, 3]), layer.d_head)
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    mask = (owner[:, None] == owner).tril()
    apart = layer(flat, rotation, lambda q, k, v: causal_attention(q, k, v, mask))
    leaking = layer(flat, rotation, causal_attention)
    torch.testing.assert_close(leaking[:3], apart[:3])
    assert (leaking[3:] - apart[3:]).abs().max() > 1e-2


def test_the_module_equals_the_formula_and_only_distances_matter():
    torch.manual_seed(0)
    layer = Attention(32, 4, 2)
    x = torch.randn(7, 32)
    rotation = rope_table(torch.arange(7), layer.d_head)
    q = rotate(layer.w_q(x).view(7, 4, 8), rotation)
    k = rotate(layer.w_k(x).view(7, 2, 8), rotation)
    v = layer.w_v(x).view(7, 2, 8)
    expected = layer.w_o(by_hand(q, k, v).flatten(1))
    torch.testing.assert_close(layer(x, rotation, causal_attention), expected)
    far_away = rope_table(torch.arange(1000, 1007), layer.d_head)
    moved = layer(x, far_away, causal_attention)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)


def test_positions_matter():
    torch.manual_seed(0)
    layer = Attention(32, 4, 2)
    x = torch.randn(7, 32)
    moving = rope_table(torch.arange(7), layer.d_head)
    standing = rope_table(torch.zeros(7), layer.d_head)
    moved = layer(x, moving, causal_attention)
    unmoved = layer(x, standing, causal_attention)
    assert (moved - unmoved).abs().max() > 1e-2


def test_a_subclass_of_tensor_is_a_tensor():
    layer = Attention(32, 4, 2)
    docs = torch.randn(2, 7, 32)
    rotation = rope_table(torch.arange(7), layer.d_head)
    marked = layer(docs.as_subclass(Marked), rotation, causal_attention)
    plain = layer(docs, rotation, causal_attention)
    torch.testing.assert_close(marked.as_subclass(torch.Tensor), plain)
