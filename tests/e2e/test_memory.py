"""4-bit weights stay 4-bit: what a loaded model keeps, and what loading takes, measured against the file."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nybble.engine.args import EngineArgs
from nybble.engine.loader import get_model
from nybble.plugins.manager import PluginHost
from nybble.quant import Linear

GROUP = 128
SYMMETRIC = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
SETTINGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq act-order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "ct": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [],
           "config_groups": {"group_0": {"targets": ["Linear"], "weights": SYMMETRIC}}},
}


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def stored(form: str, n: int, k: int) -> dict[str, torch.Tensor]:
    """Random codes of one matrix, as the form's files have them."""
    groups = k // GROUP
    if form == "awq":
        return {"qweight": words(k, n // 8), "qzeros": words(groups, n // 8), "scales": torch.ones(groups, n).half()}
    if form == "ct":
        return {"weight_packed": words(n, k // 8), "weight_scale": torch.ones(n, groups).bfloat16(),
                "weight_shape": torch.tensor([n, k])}
    order = torch.randperm(k) if "act-order" in form else torch.arange(k)
    return {"qweight": words(k // 8, n), "qzeros": words(groups, n // 8), "scales": torch.ones(groups, n).half(),
            "g_idx": (order // GROUP).int()}


def write(folder: Path, form: str, *, hidden: int, layers: int) -> tuple[Path, int]:
    """A Llama of random codes, and the bytes of its quantized matrices' tensors."""
    sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (2 * hidden, hidden), "mlp.up_proj": (2 * hidden, hidden),
              "mlp.down_proj": (hidden, 2 * hidden)}
    plain = {"model.embed_tokens": (64, hidden), "lm_head": (64, hidden), "model.norm": (hidden,)}
    tensors = {}
    for i in range(layers):
        plain |= {f"model.layers.{i}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        for name, shape in sizes.items():
            tensors |= {f"model.layers.{i}.{name}.{last}": t for last, t in stored(form, *shape).items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    tensors |= {f"{name}.weight": torch.ones(shape).bfloat16() for name, shape in plain.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": 64,
        "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "quantization_config": SETTINGS[form]}))
    return folder, size


def live_bytes() -> int:
    """Of every storage that a tensor keeps alive, once each."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.layout == torch.strided:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", SETTINGS)
def test_a_loaded_model_is_as_large_as_its_file(tmp_path, form, dtype):
    """Codes, scales and whatever else runs the quantized layers: within 10 % of their tensors in the file."""
    folder, size = write(tmp_path, form, hidden=512, layers=1)
    before, host = live_bytes(), PluginHost.load(allow="")
    args = EngineArgs(model=str(folder), device="cpu", dtype=dtype, skip_tokenizer_init=True, use_tqdm_on_load=False)
    loaded = get_model(args.create_engine_config(host), host, torch.device("cpu"))
    linears = [m for m in loaded.model.modules() if isinstance(m, Linear) and not m.method.plain]
    assert len(linears) in (4, 7) and all(layer.kernel is not None for layer in linears)
    assert sum(layer.nbytes for layer in linears) == pytest.approx(size, rel=0.1)
    plain = sum(t.nbytes for t in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert live_bytes() - before < 1.1 * size + plain + 2**20, "something else keeps weights alive"
    assert {layer.layer: layer.bytes for layer in loaded.layers} == {
        m.name: m.nbytes for m in loaded.model.modules() if isinstance(m, Linear)}


MEASURE = """
import sys
from pathlib import Path
import psutil, torch
from nybble.engine.args import EngineArgs
from nybble.engine.loader import get_model
from nybble.plugins.manager import PluginHost

def load(folder):
    host = PluginHost.load(allow="")
    args = EngineArgs(model=folder, device="cpu", dtype="bfloat16", skip_tokenizer_init=True, use_tqdm_on_load=False)
    return get_model(args.create_engine_config(host), host, torch.device("cpu"))

small = load(sys.argv[1])  # whatever the first load imports
before = psutil.Process().memory_info().rss
model = load(sys.argv[2])
# Not ru_maxrss, which begins at what the process that forked this one had.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(peak - before, psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_never_holds_a_16_bit_copy(tmp_path):
    """Weights as stored, and one layer's codes on their way into the layout of its kernel."""
    (tmp_path / "small").mkdir(), (tmp_path / "large").mkdir()
    small, _ = write(tmp_path / "small", "ct", hidden=512, layers=1)
    large, size = write(tmp_path / "large", "ct", hidden=2048, layers=3)
    assert size > 60e6
    # With a fixed threshold glibc gives freed tensors back at once; else its heap keeps some of them for reuse.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE, small, large], capture_output=True, text=True, timeout=60,
                          env=environment)
    assert done.returncode == 0, done.stderr
    peak, final = map(int, done.stdout.split())
    assert final < 1.3 * size, f"{final / size:.2f} times the file stays"
    assert peak < 2 * size, f"{peak / size:.2f} times the file at the peak; a 16-bit copy is 4 times"
