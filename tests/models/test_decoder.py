"""A decoder that is run for its kernels' sake: which layers stay."""

from __future__ import annotations

import pytest
import torch

from nybble.engine.args import EngineArgs
from nybble.engine.loader import get_model
from nybble.plugins.manager import PluginHost

MLA = dict(num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
           v_head_dim=24, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, first_k_dense_replace=2)
WINDOWS = dict(use_sliding_window=True, sliding_window=32, max_window_layers=3)


@pytest.fixture
def model_of(make_checkpoint):
    def model_of(arch, **settings):
        host = PluginHost.load(allow="")
        args = EngineArgs(model=str(make_checkpoint(arch, **settings)), device="cpu", use_tqdm_on_load=False)
        return get_model(args.create_engine_config(host), host, torch.device("cpu")).model

    return model_of


@pytest.mark.parametrize("arch, settings, kept", [
    ("Llama", dict(num_hidden_layers=1), [0]), ("Llama", dict(num_hidden_layers=4), [0, 1]),
    ("DeepseekV2", MLA | dict(num_hidden_layers=5), [0, 1, 2]),
    ("Qwen2", WINDOWS | dict(num_hidden_layers=5), [0, 1, 3])], ids=["one", "alike", "dense first", "windows"])
def test_the_first_and_one_of_each_kind(arch, settings, kept, model_of):
    model = model_of(arch, **settings)
    whole = list(model.layers)
    with model.one_layer_of_a_kind():
        assert [whole.index(layer) for layer in model.layers] == kept
    assert list(model.layers) == whole


def test_all_are_back_after_an_error(model_of):
    model = model_of("Llama", num_hidden_layers=4)
    with pytest.raises(ValueError), model.one_layer_of_a_kind():
        raise ValueError
    assert len(model.layers) == 4
