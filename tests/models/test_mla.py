"""The latent attention layer over a paged cache, its matrix in every way a format may store it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.engine.attention.base import StepShape
from nybble.engine.attention.torch_paged import TorchPagedBackend
from nybble.engine.plan import KVCacheLayout
from nybble.models import Batch, MLAAttention
from nybble.quant import LayerShape, Linear, Part, Unquantized
from nybble.quant.online import OnlineFp8Method

HEADS, NOPE, ROPE, LATENT, VALUE, TOKENS, SCALE = 3, 16, 8, 32, 24, 21, 0.2
CPU = torch.device("cpu")


def make_layer(method, dtype=torch.float32):
    shape = LayerShape(in_features=LATENT, parts=(Part(name="kv_b_proj", size=HEADS * (NOPE + VALUE)),))
    kv_b = Linear("", shape, method, dtype=dtype, device=CPU)
    (slot,) = kv_b.slots()
    slot.put(0, torch.randn(*slot.target.shape) / LATENT**0.5)
    layer = MLAAttention(0, kv_b, num_heads=HEADS, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, kv_lora_rank=LATENT,
                         v_head_dim=VALUE, scale=SCALE)
    stored = dict(kv_b.weights)
    layer.after_load()
    return layer, lambda x: method.apply(method.after_load(stored, shape), x)


def attend(layer, q, latent, k_pe, rope, cuts):
    """In steps that end at `cuts`, over blocks of 4 tokens."""
    layout = KVCacheLayout(num_blocks=9, block_size=4, groups=[])
    backend = TorchPagedBackend([layer], layout, dtype=q.dtype, device=CPU)
    table, positions, out = torch.tensor([[7, 2, 5, 1, 8, 3]], dtype=torch.int32), torch.arange(TOKENS), []
    slots = table[0, positions // 4].long() * 4 + positions % 4
    for start, end in zip((0, *cuts), (*cuts, TOKENS)):
        these = slice(start, end)
        step = StepShape(query_lens=np.array([end - start]), seq_lens=np.array([end]), block_table=table,
                         host_block_table=table.numpy(), slots=slots[these], max_query_len=end - start,
                         query_start=torch.tensor([0, end - start]).int(), device_seq_lens=torch.tensor([end]).int())
        batch = Batch(ids=positions[these], positions=positions[these], attn=backend.prepare(step))
        out.append(layer(q[these], latent[these], k_pe[these], tuple(t[these] for t in rope), batch))
    return torch.cat(out)


@pytest.mark.parametrize("method", [Unquantized(), OnlineFp8Method.per_channel()], ids=["plain", "fp8"])
@pytest.mark.parametrize("cuts", [(), tuple(range(1, TOKENS)), (13, 14)], ids=["whole", "by token", "in parts"])
def test_it_sees_what_its_matrix_makes_of_the_latents(method, cuts):
    """Also where the format rounds its input: by the same codes whichever way attention is computed."""
    torch.manual_seed(len(cuts))
    layer, kv_b = make_layer(method)
    q, latent = torch.randn(TOKENS, HEADS * (NOPE + ROPE)), torch.randn(TOKENS, LATENT)
    k_pe = torch.randn(TOKENS, ROPE)
    still = torch.ones(TOKENS, 1, ROPE), torch.zeros(TOKENS, 1, ROPE)  # rotation is the models' test
    found = attend(layer, q, latent, k_pe, still, cuts)
    k_nope, v = kv_b(latent).view(TOKENS, HEADS, -1).split((NOPE, VALUE), dim=-1)
    k = torch.cat((k_nope, k_pe[:, None].expand(-1, HEADS, -1)), dim=-1)
    scores = torch.einsum("qhd,khd->hqk", q.view(TOKENS, HEADS, -1), k) * SCALE
    scores += torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    expected = torch.einsum("hqk,khv->qhv", scores.softmax(-1), v).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_stored_matrix_is_dropped():
    layer, _ = make_layer(OnlineFp8Method.per_channel(), torch.bfloat16)
    assert not layer.kv_b.weights and layer.w_kv.dtype == torch.bfloat16
    assert layer.kv_b.nbytes == layer.w_kv.nbytes and layer.kv_b.runs_by == "absorbed"
    assert {layer.w_uk.data_ptr(), layer.w_uv.data_ptr() - NOPE * LATENT * 2} == {layer.w_kv.data_ptr()}
