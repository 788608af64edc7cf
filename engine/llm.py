"""LLM: offline generation over a list of prompts, with vLLM's signatures and outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from ..plugins.errors import RequestError, UsageError, nearest
from .args import EngineArgs
from .expert_stats import ExpertCounts
from .llm_engine import LLMEngine, raise_refusal
from .request import RequestOutput, RequestOutputKind, SamplingParams
from .text.input_processor import PromptType
from .text.tokenizer import Tokenizer

Messages = list[dict[str, Any]]


class LLM:
    """A model and its engine. `LLM("folder", max_model_len=2048).generate("Hello")`.

    Args:
        model: checkpoint folder; the default is the embedded toy model.
        engine_process: run the engine in a process of its own.
        settings: any field of EngineArgs.
    Raises:
        UsageError, CheckpointError, OutOfMemoryError, PluginError: nothing is left running.
    """

    def __init__(self, model: str = "nybble-demo", *, engine_process: bool = False, **settings: Any) -> None:
        known = [f.name for f in fields(EngineArgs)]
        for name in settings:
            if name not in known:
                guess = nearest(name, known)
                raise UsageError(f"LLM has no setting {name!r}", known=None if guess else known,
                                 fix=f"did you mean {guess}?" if guess else None)
        self._start(LLMEngine.from_engine_args(EngineArgs(model=model, **settings), engine_process=engine_process))

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, engine_process: bool = False) -> LLM:
        llm = cls.__new__(cls)
        llm._start(LLMEngine.from_engine_args(args, engine_process=engine_process))
        return llm

    def _start(self, engine: LLMEngine) -> None:
        self.llm_engine = engine
        self._ids = itertools.count()

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs are in the order of the prompts.

        Args:
            prompts: one prompt or a list; each a str, a list of token ids, or {"prompt_token_ids": [...]}.
            sampling_params: one for all, or one per prompt; None takes the checkpoint's defaults.
            priority: one number per prompt for the "priority" policy; lower goes first.
            lora_request, tokenization_kwargs: vLLM's; anything but None is refused.
        Raises:
            RequestError: a prompt or its params are refused; nothing of the call is left in the engine.
        """
        refuse_unsupported(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs)
        listed = as_prompt_list(prompts)
        params = self._params_list(sampling_params, len(listed))
        if priority is not None and len(priority) != len(listed):
            raise RequestError("priority must have one number per prompt", param="priority",
                               found=f"{len(priority)} for {len(listed)} prompts")
        ids = [str(next(self._ids)) for _ in listed]
        try:
            for i, request_id in enumerate(ids):
                self.llm_engine.add_request(request_id, listed[i], params[i], priority=priority[i] if priority else 0)
            return self._run(ids, use_tqdm)
        except BaseException:
            self.llm_engine.abort_request(ids)
            raise

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        chat_template: None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Complete one conversation or a list of them through the checkpoint's chat template.

        `lora_request`, `chat_template` (a setting of LLM here) and `tokenization_kwargs` must be None. Raises as
        `generate`, and RequestError for what the template refuses.
        """
        refuse_unsupported(lora_request=lora_request, chat_template=chat_template,
                           tokenization_kwargs=tokenization_kwargs)
        one = not messages or isinstance(messages[0], dict)
        conversations = cast(Sequence[Messages], [messages] if one else messages)
        tokenizer = self.get_tokenizer()
        prompts: list[PromptType] = [
            tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt,
                                          continue_final_message=continue_final_message, tools=tools,
                                          **(chat_template_kwargs or {}))
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        if self.llm_engine.tokenizer is None:
            raise UsageError("this engine has no tokenizer", found="skip_tokenizer_init=True")
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return self.llm_engine.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        return self.llm_engine.reset_prefix_cache()

    def expert_counts(self, reset: bool = False) -> list[ExpertCounts]:
        """As LLMEngine's; needs `expert_stats=True`."""
        return self.llm_engine.expert_counts(reset)

    def shutdown(self) -> None:
        self.llm_engine.shutdown()

    def _params_list(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            params = [params] * count
        if len(params) != count:
            raise RequestError("sampling_params must be one, or one per prompt", param="sampling_params",
                               found=f"{len(params)} for {count} prompts")
        return [p.replace(output_kind=RequestOutputKind.FINAL_ONLY) for p in params]

    def _run(self, ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        """Step until all of `ids` are done."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        done: dict[str, RequestOutput] = {}
        tokens = 0
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[rate]}"))
        with Progress(*columns, disable=not use_tqdm, transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task("generating", total=len(ids), rate="")
            while len(done) < len(ids):
                for output in self.llm_engine.step():
                    if output.finished:
                        raise_refusal(output)
                        done[output.request_id] = output
                        tokens += sum(len(o.token_ids) for o in output.outputs)
                        elapsed = bar.tasks[0].elapsed or 0.0
                        bar.update(task, advance=1, rate=f"{tokens / elapsed:.0f} tok/s" if elapsed else "")
        return [done[request_id] for request_id in ids]


def refuse_unsupported(**arguments: object) -> None:
    """vLLM's arguments that nybble has no use for: None passes, anything else is refused by name."""
    for name, value in arguments.items():
        if value is not None:
            fix = "give it to LLM(chat_template=...) as a file" if name == "chat_template" else "leave it out"
            raise RequestError(f"{name} is not supported", param=name, found=repr(value)[:80], fix=fix)


def as_prompt_list(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """One prompt, or a list of prompts, as a list: a list of ints is one prompt of token ids."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise RequestError("prompts must be a prompt or a list of them", param="prompts", found=repr(prompts)[:80],
                           known=["str", "list[int]", "dict", "a list of these"])
    return cast(list[PromptType], [list(prompts)] if isinstance(prompts[0], int) else list(prompts))
