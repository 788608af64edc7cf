"""LLMEngine: the synchronous front end; requests in, a step at a time, outputs out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from ..plugins.errors import RequestError
from ..plugins.manager import PluginHost
from .args import EngineArgs
from .config import EngineConfig
from .core.client import EngineCoreClient, InprocClient, ProcClient
from .demo import resolve_demo
from .expert_stats import ExpertCounts, check_counting, check_experts
from .layer_report import AttentionReport, LayerReport, render
from .metrics import StepStats
from .plan import KVCacheLayout
from .request import RequestOutput, SamplingParams
from .text.input_processor import InputProcessor, PromptType
from .text.output_processor import OutputProcessor
from .text.tokenizer import Tokenizer


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer of a config, or None when the user serves token ids only."""
    if config.model.tokenizer is None:
        return None
    return Tokenizer.from_folder(Path(config.model.tokenizer), chat_template=config.model.chat_template)


def servable_config(config: EngineConfig, layout: KVCacheLayout) -> EngineConfig:
    """The config with its context cut to what the KV cache can hold, so that what never fits is refused early."""
    length = min(config.model.max_model_len, layout.max_tokens)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, max_model_len=length))


def raise_refusal(output: RequestOutput) -> None:
    """Raise RequestError for a request that the engine did not take."""
    for completion in output.outputs:
        if completion.error_code is not None:
            raise RequestError(completion.error or "the engine refused the request", code=completion.error_code)


class LLMEngine:
    """Drives an EngineCore in this process (default) or in its own (`engine_process`).

    Ready when constructed. Raises what create_engine_config and loading raise.
    """

    def __init__(self, config: EngineConfig, *, host: PluginHost | None = None, engine_process: bool = False) -> None:
        self.tokenizer = load_tokenizer(config)
        host = host or PluginHost.load(prefer=config.plugins.prefer, strict=config.plugins.strict)
        self.client: EngineCoreClient = ProcClient(config) if engine_process else InprocClient(config, host)
        try:
            self.config = servable_config(config, self.client.layout)
            self.input_processor = InputProcessor(self.config, self.tokenizer)
        except BaseException:
            self.client.shutdown()
            raise
        self.output_processor = OutputProcessor(self.tokenizer)
        if config.load.report is not None:
            print(render(self.layers, self.attention, config.load.report), flush=True)

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, engine_process: bool = False) -> LLMEngine:
        args = resolve_demo(args)
        host = PluginHost.load(prefer=args.prefer, strict=args.strict_plugins)
        return cls(args.create_engine_config(host), host=host, engine_process=engine_process)

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """What became of every linear layer at load."""
        return self.client.layers

    @property
    def attention(self) -> AttentionReport | None:
        """How attention is computed; None where the executor does not say."""
        return self.client.attention

    def add_request(self, request_id: str, prompt: PromptType, params: SamplingParams, *, priority: int = 0,
                    cache_salt: str | None = None) -> None:
        """Queue a prompt. Raises RequestError; the engine and other requests are then untouched."""
        processed = self.input_processor.process(request_id, prompt, params, priority=priority,
                                                 cache_salt=cache_salt, arrival_time=time.monotonic())
        self.client.add_requests(self.output_processor.add_request(processed))

    def step(self) -> list[RequestOutput]:
        """Run one step; nothing to do gives []. A request the core refused ends with `finish_reason` "error" and an
        `error_code` on its completions. Raises EngineDeadError when the engine is gone."""
        if not self.has_unfinished_requests():
            return []
        processed = self.output_processor.process(self.client.get_outputs(), time.monotonic())
        if processed.abort_ids:
            self.client.abort_requests(processed.abort_ids)
        return processed.request_outputs

    def abort_request(self, request_ids: list[str]) -> list[RequestOutput]:
        """End requests now; returns their last outputs, finish_reason "abort". Unknown ids are ignored."""
        outputs, core_ids = self.output_processor.abort(request_ids)
        if core_ids:
            self.client.abort_requests(core_ids)
        return outputs

    def has_unfinished_requests(self) -> bool:
        return self.output_processor.has_unfinished()

    def default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config suggests."""
        return SamplingParams(**self.input_processor.default_sampling_params())

    def reset_prefix_cache(self) -> bool:
        return self.client.reset_prefix_cache()

    def expert_counts(self, reset: bool = False) -> list[ExpertCounts]:
        """The tokens of every expert, by layer, since the engine was ready or the last reset.

        Raises UsageError without --expert-stats and for a model without experts.
        """
        check_counting(self.config.device.expert_stats)
        return check_experts(self.client.expert_counts(reset))

    @property
    def stats(self) -> StepStats:
        return self.client.stats

    def shutdown(self) -> None:
        """Release the model. Idempotent."""
        self.client.shutdown()
