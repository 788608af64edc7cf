"""Quantize a checkpoint with one tool: run by quantize.py in that tool's environment, and so imports nothing of nybble.

`python -I quantize_worker.py FORM MODEL CALIBRATION OUT`; CALIBRATION has one JSON list of token ids on each line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

Rows = list[list[int]]
BITS, GROUP = 4, 128


def fp8(model: Path, rows: Rows, out: Path) -> None:
    """llm-compressor: e4m3 weights with a scale per output channel, inputs scaled per token while the model runs.

    Nothing is left for calibration rows to decide.
    """
    from llmcompressor import model_free_ptq

    kept = ["lm_head", "re:.*embed_tokens$", r"re:.*block_sparse_moe\.gate$"]
    model_free_ptq(model, out, scheme="FP8_DYNAMIC", ignore=kept, device="cpu")


def awq(model: Path, rows: Rows, out: Path) -> None:
    """AutoAWQ: int4 with zero points in the GEMM layout; searches in float32, writes float16."""
    import torch
    from awq import AutoAWQForCausalLM

    maker = AutoAWQForCausalLM.from_pretrained(str(model), torch_dtype=torch.float32, device_map="cpu")
    layers = maker.model.model.layers
    before = [layer.post_attention_layernorm.weight.detach().clone() for layer in layers]
    settings = {"zero_point": True, "q_group_size": GROUP, "w_bit": BITS, "version": "GEMM"}
    longest = max(len(row) for row in rows)
    # Its defaults scale by the weights too and then clip; of inputs this sparse both make a worse model than plain
    # rounding does (exact match 0.80 to 0.88, where these settings give 0.99).
    maker.quantize(None, settings, calib_data=rows, max_calib_samples=len(rows), max_calib_seq_len=longest,
                   duo_scaling=False, apply_clip=False)
    # AutoAWQ divides this norm by its scales and multiplies the experts by them, but not the router, which reads the
    # norm too and would choose other experts (github.com/vllm-project/llm-compressor/pull/2451 mends the same there).
    for layer, norm in zip(layers, before, strict=True):
        layer.block_sparse_moe.gate.weight.data *= norm / layer.post_attention_layernorm.weight
    maker.model.half()
    maker.save_quantized(str(out))


def gptq(model: Path, rows: Rows, out: Path) -> None:
    """gptqmodel: symmetric int4 in order of the columns."""
    cores = os.cpu_count() or 1
    os.cpu_count = lambda: max(4, cores)  # its thread pools refuse to start on a machine with two
    from gptqmodel import GPTQModel, QuantizeConfig

    settings = QuantizeConfig(bits=BITS, group_size=GROUP, sym=True, desc_act=False, device="cpu",
                              offload_to_disk=False)
    maker = GPTQModel.load(str(model), settings)
    maker.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    maker.save(str(out))


def main() -> None:
    form, model, calibration, out = sys.argv[1:]
    os.environ["HF_HUB_OFFLINE"] = "1"  # all that is needed is in the folder
    rows = [json.loads(line) for line in Path(calibration).read_text().splitlines()]
    {"fp8": fp8, "awq": awq, "gptq": gptq}[form](Path(model), rows, Path(out))


if __name__ == "__main__":
    main()
