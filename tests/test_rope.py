"Rotation by position: what lesson 03 promises beyond its own checks."

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.llama import modeling_llama

from minikl.rope import rope_table, rotate


class Count(TorchDispatchMode):
    "Counts the operations that PyTorch is asked for while it is open."

    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += 1
        return op(*args, **(kwargs or {}))


def rotate_interleaved(x, rotation):
    "The other convention: neighbours form a pair."
    cos, sin = rotation
    even = x[..., 0::2]
    odd = x[..., 1::2]
    turned = [even * cos - odd * sin, even * sin + odd * cos]
    return torch.stack(turned, dim=-1).flatten(-2)


def test_the_number_of_operations_does_not_depend_on_the_number_of_documents():
    counts = []
    for n_docs in (1, 300):
        x = torch.randn(n_docs * 5, 2, 8)
        positions = torch.arange(5).repeat(n_docs)
        with Count() as count:
            rotate(x, rope_table(positions, 8))
        counts.append(count.n)
    assert counts[0] == counts[1] > 0


def test_a_parameter_is_rotated_like_any_tensor():
    x = torch.randn(8, 2, 8)
    rotation = rope_table(torch.arange(8), 8)
    assert torch.equal(rotate(nn.Parameter(x), rotation), rotate(x, rotation))


def test_an_empty_batch_comes_out_empty():
    rotation = rope_table(torch.arange(0), 4)
    assert rotate(torch.randn(0, 2, 4), rotation).shape == (0, 2, 4)


def test_rows_with_their_own_numbering_and_a_newest_token_on_its_own():
    x = torch.randn(2, 8, 4, 64)
    positions = torch.stack([torch.arange(8), torch.arange(100, 108)])
    whole = rotate(x, rope_table(positions, 64))
    row = rotate(x[1], rope_table(torch.arange(100, 108), 64))
    newest = rotate(x[:, 7:], rope_table(positions[:, 7:], 64))
    torch.testing.assert_close(whole[1], row)
    torch.testing.assert_close(whole[:, 7:], newest)


def test_the_dtype_is_kept_and_rounded_once():
    rotation = rope_table(torch.arange(1000, 1006), 64)
    assert {part.dtype for part in rotation} == {torch.float32}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(6, 2, 64).to(dtype)
        wide = x.to(torch.promote_types(dtype, torch.float32))
        assert rotate(x, rotation).dtype == dtype
        assert torch.equal(rotate(x, rotation), rotate(wide, rotation).to(dtype))


def test_angles_in_bfloat16_would_be_caught():
    positions = torch.arange(8192)
    speeds = 1e6 ** (-torch.arange(0, 64, 2) / 64)
    angles = torch.outer(positions.bfloat16(), speeds.bfloat16()).float()[:, None]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64, generator=generator)

    def spread(rotation):  # of the scores at distance 1: they should all be equal
        scores = (rotate(q, rotation)[1:] * rotate(k, rotation)[:-1]).sum(dim=(-1, -2))
        return scores.max() - scores.min()

    assert spread(rope_table(positions, 64)) < 0.02
    assert spread((angles.cos(), angles.sin())) > 1


def test_neighbours_and_halves_differ_by_a_permutation_only():
    to_halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    x = torch.randn(7, 1, 8)
    rotation = rope_table(torch.arange(7), 8)
    ours = rotate(x[..., to_halves], rotation)[..., to_halves.argsort()]
    torch.testing.assert_close(rotate_interleaved(x, rotation), ours)
    assert (rotate(x, rotation) - ours).abs().max() > 0.1


def test_gptj_pairs_neighbours():
    positions = torch.stack([torch.arange(40), torch.arange(500, 540)])
    q = torch.randn(2, 40, 4, 64)
    cos, sin = rope_table(positions, 64)
    theirs = gptj_rotate(q, sin.squeeze(2), cos.squeeze(2))
    torch.testing.assert_close(rotate_interleaved(q, (cos, sin)), theirs)
    assert (rotate(q, (cos, sin)) - theirs).abs().max() > 1


def test_the_score_of_a_copy_falls_with_distance_as_the_formula_says():
    distances = torch.tensor([1, 10, 100, 1000])
    x = torch.randn(1000, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    for theta in (1e2, 1e4, 1e6):
        rotation = rope_table(distances, 64, theta)
        measured = (rotate(x, rotation) * x).sum(dim=-1).mean(dim=(0, 2)) / 64
        expected = rotation[0].mean(dim=(-1, -2))
        torch.testing.assert_close(measured, expected, atol=0.05, rtol=0)


def test_llama_pairs_halves():
    "The rotation of `transformers`, which puts heads before tokens."
    positions = torch.stack([torch.arange(40), torch.arange(500, 540)])
    q = torch.randn(2, 40, 4, 64)   # (batch, seq, heads, d_head)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, positions)
    heads_first = q.transpose(1, 2)
    theirs, _ = modeling_llama.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    found = rotate(q, rope_table(positions, 64))
    # an angle of 539 is known to 539 / 2**24 = 3e-5, and q is at most about 4.5
    torch.testing.assert_close(found, theirs.transpose(1, 2), atol=2e-4, rtol=0)
