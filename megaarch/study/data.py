"""The text of a study: what each cell trains on, and the held-out items that score them all."""

from functools import lru_cache

from megaarch.config.schema import Data
from megaarch.ingest.prepare import kind_of, prepare
from megaarch.ingest.prepared_data import Prepared
from megaarch.ingest.split import Exclusion
from megaarch.study.cells import StudyCell


@lru_cache(maxsize=8)
def _read(own: str, base: str, size: int) -> Prepared:
    """The data `own` as the study whose data are `base` has them. Both are JSON, to be hashed."""
    data = Data.model_validate_json(own)
    if own == base:
        return prepare(data, size)
    shared = _read(base, base, size)
    data = data.model_copy(update={"tokenizer": str(shared.tokenizer.path)})
    return prepare(data, size, exclude=Exclusion.of(shared.heldout, shared.heldout_pairs))


def own_text(base: Data, size: int) -> Prepared:
    """The study's own text, under a vocabulary of `size` ids."""
    text = base.model_dump_json()
    return _read(text, text, size)


def text_of(cell: StudyCell, base: Data) -> Prepared:
    """Returns what a cell trains on: the study's text, or data of its own under the study's tokenizer
    and without what the study holds out."""
    size, own = cell.settings.model.vocabulary_size, cell.settings.data
    # the objective does not touch the text, unless its records are both text and pairs
    chosen = {name: getattr(own, name) for name in ("source", "kind", "text_field", "held_out")}
    alike = "supervised" not in {own.objective, base.objective} or own.objective == base.objective
    same = all(getattr(base, name) == value for name, value in chosen.items())
    if same and (alike or kind_of(own) == kind_of(base)):
        return own_text(base, size)
    if not alike:
        chosen["objective"] = own.objective
    own_data = base.model_copy(update=chosen).model_dump_json()
    return _read(own_data, base.model_dump_json(), size)
