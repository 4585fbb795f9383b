"""A source that is tokenized already: checked against its tokenizer and what lies beside it."""

import numpy as np

from megaarch.data.example import SPECIALS
from megaarch.data.indexed import IndexedDataset, IndexedDocuments
from megaarch.data.tokenizer import Tokenizer
from megaarch.errors import UserError
from megaarch.ingest import sidecar

DOCUMENTS = 1 << 20  # whose last tokens are looked at together


def check(dataset: IndexedDataset, tokenizer: Tokenizer) -> str:
    """The digest of all tokens. ValueError for ids that are neither pieces nor specials of the
    tokenizer, and where the dataset is known to have been made otherwise."""

    def look(ids: np.ndarray) -> None:
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= tokenizer.base_size + len(SPECIALS):
            raise UserError(
                f"{dataset.path}.bin holds token {least if least < 0 else most}, but the "
                f"tokenizer has {tokenizer.base_size} pieces and {len(SPECIALS)} specials: it was "
                "made with another one"
            )

    sidecar.check_tokenizer(dataset.path, tokenizer)
    digest = dataset.digest(look)
    sidecar.check_digest(dataset.path, digest)
    return digest


def notes(dataset: IndexedDataset, tokenizer: str | None, eos: int) -> list[str]:
    """What a person should know of it: of its split, and whether documents lack their eos.

    tokenizer: the file whose eos it is.
    """
    documents = IndexedDocuments(dataset)
    filled = np.flatnonzero(documents.lengths)
    ended, others = 0, set()
    for start in range(0, len(filled), DOCUMENTS):
        last = documents.last_tokens(filled[start : start + DOCUMENTS])
        ended += int((last == eos).sum())
        others.update(np.unique(last[last != eos])[:2].tolist())
    said = sidecar.notes(dataset.path)
    if ended < len(filled):
        which = f"{len(filled) - ended:,} of its {len(filled):,} documents do not end"
        if not ended:
            which = f"none of its {len(filled):,} documents ends"
        instead = f" (they end in {others.pop()})" if len(others) == 1 else ""
        said.append(
            f"data source {dataset.path}: {which} in eos, which is token {eos} under {tokenizer}"
            f"{instead}: the model does not learn where a document ends; give each that token, as "
            "tools/preprocess.py does with --append-eos"
        )
    return said
