"""A strict reader of config.json: a model asks for each field it implements, and what nobody asked for is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..plugins.errors import CheckpointError

# Fields that describe training, tooling or text defaults and cannot change a forward pass.
INERT = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache initializer_range pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id attention_dropout
    hidden_dropout embd_pdrop resid_pdrop attn_pdrop classifier_dropout quantization_config auto_map
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript
    problem_type id2label label2id finetuning_task task_specific_params tokenizer_class name_or_path
    chunk_size_feed_forward use_return_dict nybble_demo unsloth_version unsloth_fixed tie_encoder_decoder
    is_encoder_decoder cross_attention_hidden_size add_cross_attention is_decoder max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
    tf_legacy_loss use_bfloat16 router_aux_loss_coef router_jitter_noise output_router_logits aux_loss_alpha
    seq_aux""".split()
)


class Fields:
    """config.json as one model reads it.

    Every read marks its field; `finish` refuses the fields that were never read, since an unknown field may change the
    arithmetic. Values that say "off" (null, false) are harmless and pass.
    """

    def __init__(self, raw: Mapping[str, Any], reader: str) -> None:
        self.raw, self.reader = raw, reader
        self._read: set[str] = set()

    def _get(self, name: str, kind: tuple[type, ...], default: Any) -> Any:
        self._read.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"config.json has no {name!r}, which {self.reader} needs",
                                      fix=f"add it, or pass --hf-overrides '{{\"{name}\": ...}}'")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise CheckpointError(f"config.json: {name} must be {' or '.join(k.__name__ for k in kind)}",
                                  found=repr(value))
        return value

    def integer(self, name: str, default: Any = ..., *, zero: bool = False) -> Any:
        """A positive integer (or 0 with `zero`); `default` (also None) when absent, required without one."""
        value = self._get(name, (int,), _REQUIRED if default is ... else default)
        if value is not None and value < (0 if zero else 1):
            raise CheckpointError(f"config.json: {name} must be positive", found=value)
        return value

    def number(self, name: str, default: Any = ...) -> Any:
        value = self._get(name, (float, int), _REQUIRED if default is ... else default)
        return None if value is None else float(value)

    def flag(self, name: str, default: Any = ...) -> Any:
        return self._get(name, (bool,), _REQUIRED if default is ... else default)

    def mapping(self, name: str) -> dict[str, Any]:
        return dict(self._get(name, (dict,), {}))

    def indices(self, name: str, size: int) -> frozenset[int]:
        """A list of numbers from 0 to size - 1; empty when absent."""
        found = self._get(name, (list,), [])
        if any(type(index) is not int or not 0 <= index < size for index in found):
            raise CheckpointError(f"config.json: {name} must list numbers from 0 to {size - 1}", found=found)
        return frozenset(found)

    def require(self, name: str) -> None:
        """The field must be written out, even as null."""
        if name not in self.raw:
            raise CheckpointError(f"config.json has no {name!r}, which {self.reader} needs (null means none)",
                                  fix=f"pass --hf-overrides '{{\"{name}\": ...}}'")

    def layer_types(self, layers: int) -> list[str] | None:
        """transformers 5's kind of attention per layer, or None when absent."""
        kinds = self._get("layer_types", (list,), None)
        if kinds is None:
            return None
        known = ["full_attention", "sliding_attention"]
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            raise CheckpointError(f"config.json: layer_types must name the attention of {layers} layers",
                                  found=kinds, known=known)
        return kinds

    def expect(self, name: str, *known: Any) -> None:
        """State an assumption: the field is absent or one of `known`."""
        self._read.add(name)
        value = self.raw.get(name)
        if value is not None and value not in known:
            raise CheckpointError(f"{self.reader} does not implement {name} = {value!r}",
                                  known=[repr(k) for k in known])

    def finish(self) -> None:
        """Refuse what nobody read. Call last."""
        unread = {
            name: value for name, value in self.raw.items()
            if name not in self._read and name not in INERT and not name.startswith("_")
            and value is not None and value is not False and value != {}
        }
        if unread:
            name = min(unread)
            raise CheckpointError(
                f"{self.reader} does not implement the config.json field{'s' if len(unread) > 1 else ''} "
                f"{', '.join(sorted(unread))}",
                found=", ".join(f"{k} = {v!r}"[:80] for k, v in sorted(unread.items())),
                fix=f"if it has no effect on this model, switch it off: --hf-overrides '{{\"{name}\": null}}'",
            )


_REQUIRED = object()
