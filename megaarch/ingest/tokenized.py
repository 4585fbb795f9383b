"""A source that is tokenized already, with the manifest and held-out documents that `preprocess`
put next to it, if it did."""

from pathlib import Path

import numpy as np

from megaarch.data.example import SPECIALS
from megaarch.errors import UserError
from megaarch.ingest import corpus
from megaarch.ingest.indexed_dataset import IndexedDataset, IndexedDocuments
from megaarch.ingest.lines import Shard
from megaarch.ingest.manifest import DatasetManifest
from megaarch.ingest.sources import HELD_OUT
from megaarch.ingest.tokenizer import Tokenizer

DOCUMENTS = 1 << 20  # whose last tokens are looked at together


class TokenizedSource:
    """An indexed dataset, its manifest (None where there is none) and its held-out documents.

    UserError where these are damaged, or are known to have been more or fewer documents.
    """

    def __init__(self, dataset: IndexedDataset):
        self.dataset, self.path = dataset, dataset.path
        self.documents = IndexedDocuments(dataset)
        self.manifest = DatasetManifest.read(dataset.path)
        file = Path(dataset.path + HELD_OUT)
        self.heldout = [text for (text,) in corpus.read(Shard(file))] if file.is_file() else []
        if self.manifest and len(self.heldout) != self.manifest.heldout_documents:
            raise UserError(
                f"{file} holds {len(self.heldout):,} documents, and "
                f"{self.manifest.heldout_documents:,} were held out when it was made: restore it, "
                "or preprocess the text again"
            )

    def check(self, tokenizer: Tokenizer) -> str:
        """Returns the digest of all tokens. UserError for ids that are neither pieces nor specials
        of the tokenizer, and where the dataset is known to have been made otherwise."""

        def check_ids(ids: np.ndarray) -> None:
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= tokenizer.base_size + len(SPECIALS):
                raise UserError(
                    f"{self.path}.bin holds token {least if least < 0 else most}, but the "
                    f"tokenizer has {tokenizer.base_size} pieces and {len(SPECIALS)} specials: it "
                    "was made with another one"
                )

        made = self.manifest
        if made and made.request.tokenizer != tokenizer.text_fingerprint:
            raise UserError(
                f"{self.path}.bin was made with the tokenizer {made.tokenizer_file}, and "
                "data.tokenizer is another one: set data.tokenizer to that file"
            )
        digest = self.dataset.digest(check_ids)
        if made and made.digest not in (None, digest):
            raise UserError(
                f"{self.path}.bin has changed since it was made: restore it, or delete it and "
                "preprocess the text again"
            )
        return digest

    def notes(self, tokenizer: str | None, eos: int) -> list[str]:
        """Returns warnings about its split, and about documents that lack their eos.

        tokenizer: the file whose eos it is.
        """
        filled = np.flatnonzero(self.documents.lengths)
        ended, others = 0, set()
        for start in range(0, len(filled), DOCUMENTS):
            last = self.documents.last_tokens(filled[start : start + DOCUMENTS])
            ended += int((last == eos).sum())
            others.update(np.unique(last[last != eos])[:2].tolist())
        found = list(self.manifest.notes) if self.manifest else []
        if ended < len(filled):
            which = f"{len(filled) - ended:,} of its {len(filled):,} documents do not end"
            if not ended:
                which = f"none of its {len(filled):,} documents ends"
            instead = f" (they end in {others.pop()})" if len(others) == 1 else ""
            found.append(
                f"data source {self.path}: {which} in eos, which is token {eos} under {tokenizer}"
                f"{instead}: the model does not learn where a document ends; give each that token, "
                "as tools/preprocess.py does with --append-eos"
            )
        return found
