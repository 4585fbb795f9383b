"""The whole numbers of a Hugging Face config, within the bounds of the settings that they become."""

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megaarch.config.schema import Count, Distance, Layers, Length, Number, Width
from megaarch.errors import UserError
from megaarch.interchange.keys import FAMILY_KEYS

Identity = Annotated[int, Field(ge=-1, le=1 << 31)]  # of a special token; older configs have -1
KINDS = {
    Layers: "n_layer num_hidden_layers num_layers num_decoder_layers encoder_layers decoder_layers",
    Width: "n_embd hidden_size d_model n_head num_attention_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_key_value_heads head_dim d_kv relative_attention_num_buckets",
    Number: "n_inner intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim vocab_size",
    Length: "n_positions max_position_embeddings original_max_position_embeddings",
    Distance: "relative_attention_max_distance",
    Count: "type_vocab_size",
    Identity: "pad_token_id bos_token_id eos_token_id decoder_start_token_id",
}
SIZES = {key: kind for kind, keys in KINDS.items() for key in keys.split()}
# Of the families whose heads share the width: key of the heads, of the width, of a head's own size.
HEADS = {
    "gpt2": ("n_head", "n_embd", None),
    "llama": ("num_attention_heads", "hidden_size", "head_dim"),
    "bert": ("num_attention_heads", "hidden_size", None),
    "bart": ("encoder_attention_heads", "d_model", None),
}


def check(used: Mapping[str, Any], family: str) -> None:
    """ValueError names the key whose value is no whole number within its bounds, and heads that do not
    divide what they share. used: of `keys.complete`."""
    defaults = FAMILY_KEYS[family].defaults
    for key in (
        key for key in used if key in SIZES
    ):  # T5's second depth may be a copy of the first
        value, kind = used[key], SIZES[key]
        if value is None and (defaults[key] is None or kind is Identity):
            continue
        values = value if key == "eos_token_id" and isinstance(value, list) else [value]
        for one in values:
            _check_size(key, one, kind)
    if family in HEADS:
        _check_heads(used, *HEADS[family])


def _check_size(key: str, value: Any, kind: Any) -> None:
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        rules = kind.__metadata__[0].metadata
        least = next(
            r.gt + 1 if isinstance(r, Gt) else r.ge for r in rules if isinstance(r, Gt | Ge)
        )
        most = next(r.le for r in rules if isinstance(r, Le))
        raise UserError(
            f"{key} of this Hugging Face config must be a whole number from {least} to {most:,}, not "
            f"{value!r:.60}"
        ) from None


def _check_heads(used: Mapping[str, Any], heads: str, width: str, own: str | None) -> None:
    size = used[own] if own else None
    if size is None and used[width] % used[heads]:
        raise UserError(
            f"{heads} {used[heads]} of this Hugging Face config does not divide {width} {used[width]}"
        )
    if own is None:  # what follows is Llama's
        return
    keys = used["num_key_value_heads"]
    if keys is not None and used[heads] % keys:
        raise UserError(
            f"num_key_value_heads {keys} of this Hugging Face config does not divide {heads} "
            f"{used[heads]}"
        )
    size = size or used[width] // used[heads]
    if size % 2:
        raise UserError(f"{own} of this Hugging Face config must be even for RoPE, not {size}")
