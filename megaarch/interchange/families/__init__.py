"""The Hugging Face families, a file each. A further family is one more file and its line here."""

from megaarch.interchange.families import bart, bert, gpt2, llama, t5
from megaarch.interchange.family import Family

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2.GPT2,
    "llama": llama.LLAMA,
    "bert": bert.BERT,
    "t5": t5.T5,
    "bart": bart.BART,
}
