"""`megaarch evaluate`: the yardsticks of one trained run, from its newest checkpoint."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from megaarch import config
from megaarch.checkpoint import checkpoint
from megaarch.config.schema import Data, Evaluation, Model
from megaarch.distributed import launch
from megaarch.errors import UserError
from megaarch.evaluation import tasks, yardsticks
from megaarch.evaluation.heldout_scores import Heldout, shortened_prompts
from megaarch.evaluation.items import cut, split, text_warnings
from megaarch.evaluation.scorer import Scorer
from megaarch.evaluation.validation import usual_items
from megaarch.files import first_fault
from megaarch.ingest.prepare import prepare
from megaarch.ingest.prepared_data import Prepared
from megaarch.study.folder import load_config
from megaarch.study.results import CellRecord
from megaarch.training.open_run import Opened, open_run

SCORING = "study.evaluation."
SPLIT = ("source", "kind", "text_field", "held_out")  # the settings that choose and divide the text


def evaluate_run(run: Path, overrides: Sequence[str] = ()) -> tuple[Heldout, list[str]]:
    """Returns the scores of the run in folder `run` on its held-out text, and warnings. A study's cell is scored on
    the documents that judge it there; a run of no study, by whose documents nothing was chosen, on all.

    overrides: `--set` settings, e.g. data.source to score other text, or study.evaluation.tasks. One process
    holds the whole model; several take the run's layout, or what overrides say of it, and return the same.
    UserError where the folder has no complete checkpoint, or its text has changed since.
    """
    scoring = [text for text in overrides if text.startswith(SCORING)]
    found = open_run(run, [text for text in overrides if text not in scoring])
    settings, prepared = found.settings, text_of(found)
    warnings = [_may_have_seen(found, prepared)]
    if not prepared.heldout:
        raise UserError("data.source: this data has no held-out text to score")
    evaluation = _evaluation(settings.model, scoring)
    tasks.check(evaluation, settings)
    if _chose(found):
        items = split(prepared.heldout, prepared.tokenizer, evaluation)["test"]
    else:
        items = cut(prepared.heldout, prepared.tokenizer, evaluation)
    vocabulary = prepared.tokenizer.vocabulary
    scorer = Scorer(found.engine, settings, vocabulary, evaluation.batch_rows)
    heldout = yardsticks.evaluate(scorer, items, evaluation)
    trained = _trained_on(found.record.raw_settings())
    heldout.tasks = tasks.score(scorer, prepared.tokenizer, evaluation, trained)
    warnings = [
        *text_warnings(prepared.heldout, prepared.tokenizer),
        *warnings,
        _left_out(heldout, evaluation),
        shortened_prompts([heldout.tasks]),
    ]
    return heldout, [warning for warning in warnings if warning]


def _chose(found: Opened) -> bool:
    """Whether a study may have chosen the run's settings by some of the held-out documents at hand: those of
    its cell's own text, or of the study's."""
    if CellRecord.read(found.run) is None:
        return False
    sources = [found.as_trained().data.source]
    folders = [path for path in found.run.resolve().parents if (path / "study.yaml").is_file()]
    sources += [config.resolve(load_config(path)).data.source for path in folders[:1]]
    return found.settings.data.source in sources


def _trained_on(raw: config.Raw | None, before: Sequence[str] = ()) -> set[str]:
    """Returns the names of the tasks that a run of these settings was trained on, or any whose weights it comes
    from, as far as they can be found. before: the runs that are known to come from it."""
    if raw is None:
        return set()
    data, names = {name: raw["data"][name] for name in ("objective", "source")}, set()
    with suppress(UserError):  # its files are there no more
        names = tasks.trained_on(Data.model_validate(data))
    start = raw["training"].get("start_from")
    if not start or start in before:
        return names
    with suppress(UserError):
        parent = checkpoint.latest_settings(Path(start))
        parent = parent or checkpoint.latest_settings(Path(start).parent.parent)  # of a checkpoint
        names |= _trained_on(parent, [*before, start])
    return names


def _left_out(found: Heldout, evaluation: Evaluation) -> str | None:
    """A sentence on the lengths of a continuation that were not scored; None where all were."""
    lengths = [
        str(length) for length in evaluation.lengths if str(length) not in found.continuation
    ]
    if not (evaluation.by_length and lengths):
        return None
    return (
        f"Continuations of {', '.join(lengths)} tokens are left out: no held-out item, or no row of "
        "the run's, is so long."
    )


def text_of(found: Opened) -> Prepared:
    """Returns the run's text, or other text, under the tokenizer that the run was trained with.

    UserError where another one is asked for.
    """
    settings, saved = found.settings, found.record
    data, size, used = settings.data, settings.model.vocabulary_size, saved.tokenizer
    under_it = data.model_copy(update={"tokenizer": used.path})
    if data.tokenizer is None and settings.data.source != saved.raw_settings()["data"]["source"]:
        data = under_it
    prepared = launch.first(lambda: prepare(data, size))
    if data.tokenizer is None and prepared.tokenizer.fingerprint != used.fingerprint:
        # a study's cell with text of its own: the tokenizer is the study's
        prepared = launch.first(lambda: prepare(under_it, size))
    if prepared.tokenizer.fingerprint != used.fingerprint:
        raise UserError(
            f"data.tokenizer: the run was trained with another tokenizer, {used.path}: its "
            "scores would mean nothing; give that file"
        )
    return prepared


def _may_have_seen(found: Opened, prepared: Prepared) -> str | None:
    """Returns a warning where the run may have trained on what is scored, as far as that is known:
    nothing is known of another source, of which it says how much is scored, and what was converted from
    elsewhere has trained on no text here.

    UserError where source and split are the run's, and the text has changed since.
    """
    settings, saved, was = found.settings, found.record, found.as_trained().data
    same = {name: getattr(settings.data, name) == getattr(was, name) for name in SPLIT}
    if not same["source"] and prepared.manifest.kind != "indexed":
        return (
            f"Of {prepared.manifest.source} {prepared.manifest.heldout_share:.0%} is scored, what data.held_out "
            "holds out of it; for more give --set data.held_out=0.9."
        )
    if not (same["source"] and saved.fingerprint) or prepared.fingerprint == saved.fingerprint:
        return None
    if not all(same.values()):
        return (
            "The run was trained on this source, split otherwise: it may have seen what is scored."
        )
    if _lacks_held_out(found.run):
        return (
            "What its study holds out was left out of this cell's own text, so that it cannot be "
            "told whether the text has changed since."
        )
    raise UserError(
        f"data.source: {prepared.manifest.source} has changed since the run was trained, which "
        "may have seen what would be scored: restore it, or score other text with --set "
        "data.source=FILE"
    )


def _lacks_held_out(run: Path) -> bool:
    """Whether the run, or that of the checkpoint `run`, is a study's cell whose own text lacks what the study
    holds out. One that is not finished may be."""
    of_one = run.parent.name == "checkpoints"
    record = CellRecord.read(run.parent.parent if of_one else run)
    if record is None:
        return False
    text = record.result.data if record.result else None
    return text is None or (text.excluded_documents or 0) + (text.excluded_paragraphs or 0) > 0


def _evaluation(model: Model, overrides: Sequence[str]) -> Evaluation:
    """The items for the model's rows, as the `--set` settings say otherwise."""
    given = dict(config.parse_override(text) for text in overrides)
    given = {name.removeprefix(SCORING): value for name, value in given.items()}
    try:
        return Evaluation.model_validate(usual_items(model).model_dump() | given)
    except ValidationError as error:
        raise UserError(f"--set {SCORING}{first_fault(error)}") from None
