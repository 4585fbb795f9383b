"""What a Hugging Face family says of itself, and what its file in families/ is written with.

A family is named as Hugging Face's `model_type` names it. Its file lists every key of its config.json
and every tensor of its weights; hf_config.py and hf_weights.py account for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.interchange.transforms import Transform

Used = Mapping[str, Any]  # the used keys of a config.json, as `hf_config.complete` returns them
Tensors = dict[str, str]  # our name -> their name, or names
DECODERS = ("causal_decoder", "prefix_decoder")
Id = Annotated[int, Field(ge=-1, le=1 << 31)]  # of a special token; older configs have -1


@dataclass(frozen=True)
class Key:
    """A key of config.json that is used.

    default: what transformers' config class takes where the key is missing. kind: of the schema's
    numbers, for a whole number. setting: the model setting that the key is, read and written; without
    one the family's `read` and `write` say what it means. Two keys of one setting have to be equal.
    alias: a further name of the key; transformers lets it win. copied_from: the key whose value, by
    that very name, stands in for None.
    """

    default: Any
    kind: Any = None
    setting: str | None = None
    alias: str | None = None
    copied_from: str | None = None


@dataclass(frozen=True)
class Family:
    """hf_class: transformers' class, by name. preset: of a model that comes from there.

    config.json: each of its keys is one of `keys`; or in `only`, with the values that are not refused;
    or in `without_effect`, and changes no logit. read: the settings that no key is by itself. write:
    the keys that no setting is by itself. is_nearest: whether a model is written as this family's by
    default. same_weights: further architectures with the same weights. heads_divide_width: whether
    transformers insists on it, also where a head's size is given.

    Weights: tables of the tensors that stand once, and of a layer of each stream. A name that ends in .weight
    or .bias is one tensor; any other is a module, whose weight and bias go the same way. `{i}` is the layer's
    index in its own stack. layouts: of tensors that are not laid out as `LAYOUTS` has it. prefix: of the base
    model's tensors, which files of a model without a head leave out. copies: our name -> their further names
    for the same tensor where config.json ties them, in the order in which transformers ties them.
    always_tied: T5's, whose tie_word_embeddings says whether logits are scaled. zero_if_missing: a tensor [1,
    V] that older files lack. no_effect_tensors: patterns of tensors that no logit depends on.
    """

    hf_class: str
    preset: str
    is_nearest: Callable[[schema.Model], bool]
    keys: dict[str, Key]
    read: Callable[[Used], dict[str, Any]]
    write: Callable[[schema.Model], dict[str, Any]]
    once: Tensors
    layers: dict[str, Tensors]
    prefix: str
    copies: dict[str, tuple[str, ...]]
    no_effect_tensors: tuple[str, ...]
    without_effect: str
    only: dict[str, tuple] = field(default_factory=dict)
    layouts: dict[str, Transform] = field(default_factory=dict)
    same_weights: tuple[str, ...] = ()
    heads_divide_width: bool = False
    always_tied: bool = False
    zero_if_missing: str | None = None

    @property
    def output(self) -> str:
        """The output layer's weight."""
        return self.hf_name("output.weight")

    def hf_name(self, ours: str) -> str:
        """Their name of one of our tensors that stand once."""
        module, _, leaf = ours.rpartition(".")
        return f"{self.once[module]}.{leaf}" if module else self.once[ours]

    def aliases(self) -> dict[str, str]:
        """Maps further names of keys to the keys."""
        return {key.alias: name for name, key in self.keys.items() if key.alias}

    def key_of(self, setting: str) -> str | None:
        """The first key that is this setting."""
        return next((name for name, key in self.keys.items() if key.setting == setting), None)


def special_ids(pad: int | None, bos: int | None, eos: int | None, start: int | None = None):
    """The keys of special tokens, with the class's defaults."""
    found = {"pad": pad, "bos": bos, "eos": eos, "decoder_start": start}
    return {f"{name}_token_id": Key(default, Id) for name, default in found.items()}


def under(prefix: str, table: Tensors) -> Tensors:
    """The table with a prefix before each of their names."""
    return {ours: " ".join(prefix + name for name in row.split()) for ours, row in table.items()}


# Their activation -> ours; some are further names of the same function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# Of gated units. GEGLU's gelu is tanh's here, so that of `gelu` (by erf) is another function.
GATES = {"silu": "swiglu", "swish": "swiglu"} | {
    theirs: "geglu" for theirs, ours in ACTIVATIONS.items() if ours == "gelu_tanh"
}


def activation(config: Used, key: str, gated: bool = False, name: Any = None) -> str:
    """Our activation. name: theirs, where it is not the key's value as it stands. UserError names the
    key."""
    known, name = GATES if gated else ACTIVATIONS, config[key] if name is None else name
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"megaarch cannot express {key}: {config[key]!r} of this Hugging Face config: the "
            f"activation of a {'gated' if gated else 'plain'} unit is one of {', '.join(known)}"
        )
    return known[name]


def activation_name(model: schema.Model) -> str:
    """Their name of a plain activation; "gelu" for a gated one, which `config_for` then refuses."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return names.get(model.activation, "gelu")
