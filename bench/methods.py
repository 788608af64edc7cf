"""`nybble bench methods`: one made-up Llama in every storage format: tokens per second and bytes in memory."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import run as run_process
from typing import Any

from ..engine.args import setting
from ..plugins.env import child_environment
from ..plugins.errors import UsageError, did_you_mean
from .command import make_parser, publish, read_settings, track
from .results import Metric, make_result

VOCAB = 16384
# About 100 million parameters, of which 85 million are in the matrices that methods store.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 2048, "vocab_size": VOCAB,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False},
             "input_activations": inputs and {**inputs, "strategy": "token", "dynamic": True}}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": {"g": group}}


METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "gptq-4": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True, "desc_act": False},
    "gptq-3": {"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": True, "desc_act": False},
    "gptq-2": {"quant_method": "gptq", "bits": 2, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "ct-fp8": _compressed("float-quantized", {**FP8, "strategy": "channel"}, FP8),
    "ct-int8": _compressed("int-quantized", {**INT8, "strategy": "channel"}, INT8),
    "ct-w4": _compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, None),
}


@dataclass(frozen=True, kw_only=True)
class MethodArgs:
    """What every method does, each in a process of its own."""

    methods: str = setting("all", "methods, separated by commas", group="benchmark")
    dtypes: str = setting("float32,bfloat16", "of activations, separated by commas", group="benchmark")
    device: str = setting("cpu", "cpu or cuda", group="benchmark", choices=("cpu", "cuda"))
    batch_size: int = setting(8, "requests at once", group="benchmark", low=1)
    input_len: int = setting(32, "prompt tokens of each", group="benchmark", low=1)
    output_len: int = setting(64, "output tokens of each", group="benchmark", low=1)
    repeats: int = setting(3, "times each batch is run, after one that is not counted", group="benchmark", low=1)


def main(argv: list[str]) -> int:
    parser = make_parser("methods", MethodArgs, "Run one random Llama of 100 million parameters in every format.")
    parsed = parser.parse(argv)
    args = read_settings(MethodArgs, parsed)
    names = list(METHODS) if args.methods == "all" else args.methods.split(",")
    if unknown := next((name for name in names if name not in METHODS), None):
        raise UsageError(f"there is no method {unknown!r}", known=METHODS, fix=did_you_mean(unknown, METHODS))
    metrics: dict[str, Metric] = {}
    cases = [(name, dtype) for dtype in args.dtypes.split(",") for name in names]
    with tempfile.TemporaryDirectory(prefix="nybble-bench-") as folder:
        for name, dtype in track(cases, "methods"):
            config = {**LLAMA, **({"quantization_config": METHODS[name]} if METHODS[name] else {})}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            metrics |= measure(name, dtype, Path(folder), args)
    publish(make_result("methods", argv, model="random-llama-100m", toy_model=False, device=args.device,
                        workload=asdict(args) | {"config": LLAMA}, metrics=metrics), parsed.output_json)
    return 0


def measure(name: str, dtype: str, folder: Path, args: MethodArgs) -> dict[str, Metric]:
    """One format, in a process of its own so that memory is its own too."""
    work = json.dumps({"folder": str(folder), "dtype": dtype, **asdict(args)})
    done = run_process([sys.executable, "-m", __name__, work], capture_output=True, text=True,
                       env=child_environment(sys.path), check=False)
    if done.returncode:
        raise UsageError(f"method {name} in {dtype} failed", found=done.stderr.strip()[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    key = f"{name}/{dtype}"
    print(f"{key:<22} {max(found['rates']):8.1f} tok/s, linear layers {found['bytes'] / 1e6:7.1f} MB, process grew by "
          f"{found['grown'] / 1e6:7.1f} MB, {', '.join(found['kernels'])}", flush=True)
    return {f"{key}/tokens_per_s": Metric.of(found["rates"], "tok/s", better="higher"),
            f"{key}/linear_mb": Metric.of([found["bytes"] / 1e6], "MB", better="lower"),
            f"{key}/resident_mb": Metric.of([found["grown"] / 1e6], "MB", better="lower")}


def child(work: dict[str, Any]) -> dict[str, Any]:
    """Load, generate, and say how fast it was and what it took."""
    import time

    import psutil

    from ..engine.args import EngineArgs
    from ..engine.llm import LLM
    from .workload import generate_exactly, make_rng, random_prompts

    process = psutil.Process()
    import torch  # its own memory is not the model's

    torch.empty(1)
    before = process.memory_info().rss
    llm = LLM.from_engine_args(EngineArgs(
        model=work["folder"], load_format="dummy", skip_tokenizer_init=True, dtype=work["dtype"], device=work["device"],
        use_tqdm_on_load=False, num_gpu_blocks_override=2 + work["batch_size"] * 16, max_model_len=256))
    grown = process.memory_info().rss - before
    layers = llm.llm_engine.layers
    rates, rng = [], make_rng(0)
    for turn in range(1 + work["repeats"]):
        prompts = random_prompts(rng, [work["input_len"]] * work["batch_size"], VOCAB)
        start = time.perf_counter()
        generate_exactly(llm, prompts, [work["output_len"]] * work["batch_size"], detokenize=False)
        if turn:
            rates.append(work["batch_size"] * work["output_len"] / (time.perf_counter() - start))
    llm.shutdown()
    return {"rates": rates, "bytes": sum(layer.bytes for layer in layers), "grown": grown,
            "kernels": sorted({layer.kernel for layer in layers})}


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
