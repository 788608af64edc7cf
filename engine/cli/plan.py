"""`nybble plan`: what a model will take of a device's memory, from its config and headers alone."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from ...plugins.errors import OutOfMemoryError, UsageError
from ..values import PARSERS
from .parser import Parser, add_engine_flags, engine_args

if TYPE_CHECKING:
    from ..memory_plan import MemoryPlan

GPU_NAMES = ("h100", "h200", "a100", "l40s")
GIB = 2**30


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("--gpu", required=True, metavar="GPU", help=f"{', '.join(GPU_NAMES)}, or its bytes (24G)")
    parser.add_argument("--context", metavar="N", help="tokens of a request [default: the longest there may be]")
    parser.add_argument("--json", action="store_true", help="the plan as JSON, in bytes")
    add_engine_flags(parser)


def run(parsed: Namespace) -> int:
    """Print the plan; the exit code is OutOfMemoryError's when the model would not fit."""
    args, _ = engine_args(parsed)
    context = None if parsed.context is None else _size("--context", parsed.context)
    name = parsed.gpu.lower()
    asked = None if name in GPU_NAMES else _size("--gpu", parsed.gpu)
    from ...plugins.manager import PluginHost
    from ..demo import resolve_demo
    from ..memory_plan import GPUS, plan_memory

    args = replace(resolve_demo(args), skip_tokenizer_init=True)
    host = PluginHost.load(prefer=args.prefer, strict=args.strict_plugins)
    plan = plan_memory(args, GPUS[name] if asked is None else asked, context, host)
    print(json.dumps(plan.as_dict(), indent=1) if parsed.json else as_text(plan))
    return 0 if plan.kv_tokens else OutOfMemoryError.exit_code


def _size(flag: str, text: str) -> int:
    """A positive number of bytes or tokens. Raises UsageError."""
    try:
        size: int = PARSERS[int](text)
    except ValueError:
        size = 0
    if size < 1:
        known = GPU_NAMES if flag == "--gpu" else None
        raise UsageError(f"{flag} must be a size, such as 8192 or 24G", found=repr(text), known=known)
    return size


def as_text(plan: MemoryPlan) -> str:
    weights = ", ".join(f"{role} {size / GIB:.2f}" for role, size in plan.weights.items())
    rest = plan.usable - plan.context_bytes - plan.weight_bytes - plan.scratch
    lines = [
        f"{plan.model} on a device of {plan.device_bytes / GIB:.1f} GiB, {plan.usable / GIB:.1f} for the engine",
        f"  weights   {plan.weight_bytes / GIB:8.2f} GiB  {weights}",
        f"  CUDA      {plan.context_bytes / GIB:8.2f} GiB  the context, and libraries' own",
        f"  scratch   {plan.scratch / GIB:8.2f} GiB  a step of {plan.max_num_batched_tokens} tokens, sampling for "
        f"{plan.max_num_seqs} requests",
        f"  KV cache  {plan.kv_bytes / GIB:8.2f} GiB  {plan.kv_tokens} tokens of {plan.kv_bytes_per_token} bytes",
        f"  unused    {max(0, rest - plan.kv_bytes) / GIB:8.2f} GiB",
    ]
    if not plan.kv_tokens:
        return "\n".join([*lines, f"it does not fit: {-rest / GIB:.2f} GiB are missing before the KV cache"])
    return "\n".join([*lines, f"{plan.concurrency:.1f} requests of {plan.context} tokens at once"])
