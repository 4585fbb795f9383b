"""What a cell starts from: another cell of the study, or a checkpoint from outside
(`training.start_from` without the cell's `from`)."""

from pathlib import Path

from megaarch.checkpoint import checkpoint, manifest
from megaarch.checkpoint.record import read_record
from megaarch.errors import UserError
from megaarch.study.cells import StudyCell
from megaarch.study.results import CellRecord

Spent = tuple[float | None, float | None]


def parent_record(cell: StudyCell) -> CellRecord | None:
    """The record of the cell that this one starts from."""
    start = cell.settings.training.start_from
    return CellRecord.read(Path(start)) if cell.parent and start else None


def parent_diverged(cell: StudyCell) -> bool:
    """Whether the cell that this one starts from has no result, for it or one before it diverged."""
    record = parent_record(cell)
    return record is not None and record.diverged is not None


def has_ended(cell: StudyCell, record: CellRecord | None) -> bool:
    """Whether the same command has nothing to do for a cell of this record: there is a result; or it diverged, and
    may skip no more steps now; or its parent has diverged still."""
    gone = record and record.diverged
    if not gone:
        return bool(record and record.result)
    return (
        parent_diverged(cell)
        if gone.parent
        else cell.settings.training.skip_limit <= gone.skip_limit
    )


def outside(cell: StudyCell) -> Path | None:
    """The checkpoint, or the folder of its run, that a cell starts from and no cell has made."""
    start = cell.settings.training.start_from
    return Path(start) if start and not cell.parent else None


def identity(cell: StudyCell) -> dict[str, str | None]:
    """Returns what tells the outside checkpoint of a cell from others: nothing where it has none. One
    that is gone since is that with which the cell was run."""
    if (start := outside(cell)) is None:
        return {}
    try:
        return {"start_from": f"checkpoint {manifest.digest(checkpoint.locate(start))}"}
    except (OSError, UserError):
        record = CellRecord.read(cell.folder)
        return {"start_from": record.signature.get("start_from") if record else None}


def has_run(cell: StudyCell) -> bool:
    """Whether the cell has a result of the outside checkpoint that its settings name."""
    record, start = CellRecord.read(cell.folder), cell.settings.training.start_from
    return bool(record and record.result and record.result.start == start)


def inherited(cell: StudyCell) -> Spent:
    """FLOPs and seen tokens behind the weights that a cell starts from, None where they are not known."""
    if start := outside(cell):
        return _spent(start)
    before = parent_record(cell)
    if before is None or before.result is None:
        return 0.0, 0
    parent = before.result
    return (
        (parent.total_flops or 0.0, parent.total_tokens or 0)
        if parent.start_known
        else (None, None)
    )


def _spent(start: Path) -> Spent:
    """The totals of a checkpoint, None where there was training before those: of what was converted, and
    of a run that began with other weights."""
    try:
        saved = read_record(checkpoint.locate(start))
    except (OSError, UserError):
        return None, None
    began = saved.settings.training.get("start_from") and not saved.inherited
    if saved.weights_only or saved.generation or began:
        return None, None
    return saved.progress.flops, saved.progress.seen_tokens
