"""A study from its configuration to results.json: prepare, tune, run every cell, report."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megaarch import config
from megaarch.distributed.mesh import processes
from megaarch.errors import UserError
from megaarch.evaluation import yardsticks
from megaarch.evaluation.items import Item, text_warnings
from megaarch.files import write_json
from megaarch.ingest.manifest import PreparedManifest
from megaarch.study import lock, preflight, sweep, sweep_grid, workers
from megaarch.study.cells import StudyCell, generations, not_adapted
from megaarch.study.environment import command, machine
from megaarch.study.folder import StudyFolder, save_config
from megaarch.study.progress_bar import ProgressDisplay
from megaarch.study.results import (
    Budget,
    CellRecord,
    CellResult,
    DivergedCell,
    Results,
    Text,
    Trial,
)


def compare(raw: config.Raw, directory: Path, console: Console) -> Results:
    """Runs a study's missing cells and writes `results.json`; returns it.

    Cells that are finished are kept, an interrupted one continues, and one whose settings, data
    or yardsticks have changed is a ConfigError that names what.
    """
    folder = StudyFolder.open(raw, directory)  # mistakes in it show before anything is written
    with lock.alone(directory, "study"):
        _check(folder, console)
        save_config(folder.raw, folder.directory)  # whatever would refuse it has spoken
        trials: list[Trial] = []
        records: dict[str, CellRecord] = {}
        with ProgressDisplay(console) as display:
            for generation in generations(folder.cells):
                if folder.study.tune:
                    trials += sweep.run(folder, generation, display)
                    folder = sweep.choose(folder, trials)
                keys = {cell.key for cell in generation}
                todo = [cell for cell in folder.cells if cell.key in keys]
                records |= {cell.key: found for cell, found in workers.run(folder, todo, display)}
        return _write_results(folder, records)


def gather(raw: config.Raw, directory: Path) -> Results:
    """`results.json` of the cells that are finished, where each ran as a job of its own (distributed_cell.py);
    its warnings name the others. UserError where none is."""
    folder = sweep.chosen(StudyFolder.open(raw, directory))
    found = {cell.key: folder.finished(cell) for cell in folder.cells}
    records = {key: record for key, record in found.items() if record}
    if not records:
        raise UserError(f"{directory}: no cell is finished; see megaarch status {directory}")
    return _write_results(folder, records)


def _check(folder: StudyFolder, console: Console) -> None:
    """Prepares the text of every cell. UserError or ConfigError where a cell cannot run."""
    console.print(f"Preparing the text of {folder.base.source} ...")
    folder.held_out()  # says what is missing before cells are looked at
    prepared = folder.text
    _show_data(prepared.manifest, console)
    of_text = text_warnings(prepared.heldout, prepared.tokenizer)
    for warning in (*of_text, *not_adapted(folder.cells, folder.study)):
        console.print(warning, style="yellow", markup=False)
    preflight.check(folder)
    _show_own_data(folder, console)
    identities: dict[str | None, dict[str, Any]] = {}
    tune = folder.study.tune
    chosen = sweep_grid.decided(tune) if tune else ()
    for cell in folder.cells:
        parent = identities.get(cell.parent)
        identities[cell.key] = folder.identity(cell, parent)
        # ahead of a sweep, whose trials of other settings are removed and run again
        known = folder.finished(cell, parent, but=chosen)
        if tune or not known:
            _check_one_process(cell)


def _write_results(folder: StudyFolder, records: dict[str, CellRecord]) -> Results:
    study, prepared = folder.study, folder.text
    missing = [cell.key for cell in folder.cells if cell.key not in records]
    left_out = f"Not finished, so left out: {', '.join(missing)}." if missing else None
    gone = diverged(folder, records)
    done = [cell for cell in folder.cells if cell.key in records and records[cell.key].result]
    if not done:
        if missing:
            raise UserError(
                f"{folder.directory}: no cell has a result yet; see megaarch status {folder.directory}"
            )
        said = "; ".join(f"{cell.key}: {cell.divergence.said}" for cell in gone)
        raise UserError(
            f"{folder.directory}: every cell diverged, and there is nothing to report: {said}"
        )
    of_text = text_warnings(prepared.heldout, prepared.tokenizer)
    warnings = (
        *of_text,
        left_out,
        *lost(gone),
        _unlike_items(folder, records),
        *not_adapted(folder.cells, study),
    )
    results = Results(
        format=1,
        study=study.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **dict(machine()),
        command=command(),
        budget=Budget(match=study.match, amounts=study.budgets),
        data=Text.model_validate(
            prepared.manifest.model_dump() | {"source": str(folder.base.source)}
        ),
        **unigram_of(folder),
        chance=1 / yardsticks.CHOICES,
        cells=[entry(cell, records[cell.key], folder) for cell in done],
        diverged=gone,
        tuning=folder.sweep.trials if folder.sweep else [],
        warnings=[w for w in warnings if w],
    )
    write_json(folder.directory / "results.json", results.as_json())
    return results


def diverged(folder: StudyFolder, records: dict[str, CellRecord]) -> list[DivergedCell]:
    """The cells that diverged, and those that start from one that did."""
    return [
        DivergedCell(
            name=cell.name,
            key=cell.key,
            size=cell.size,
            budget=cell.budget,
            adaptation=cell.adaptation,
            seed=cell.seed,
            divergence=gone,
        )
        for cell in folder.cells
        if (record := records.get(cell.key)) and (gone := record.diverged)
    ]


def lost(gone: list[DivergedCell]) -> Iterator[str]:
    """Says which cells diverged, and which were not run for that."""
    own = [
        f"{cell.key} (step {cell.divergence.step})" for cell in gone if not cell.divergence.parent
    ]
    if own:
        yield (
            f"Diverged, so left out: {', '.join(own)}. The run's nonfinite.json names the steps; a larger "
            "training.skip_limit goes on past them, a lower training.learning_rate may do without."
        )
    behind = [cell.key for cell in gone if cell.divergence.parent]
    if behind:
        yield f"Not run, for what they start from diverged: {', '.join(behind)}."


def _unlike_items(folder: StudyFolder, records: dict[str, CellRecord]) -> str | None:
    """Says which cells were scored on other held-out items than the rest: by another version, which cut others."""
    groups: dict[int, dict[tuple, list[str]]] = {}  # by vocabulary, whose tokens items are cut in
    for cell in folder.cells:
        record = records.get(cell.key)
        paired = record.result.heldout.paired if record and record.result else None
        if paired:
            of_vocabulary = groups.setdefault(cell.settings.model.vocabulary_size, {})
            items = (*paired.documents, *paired.sizes)
            of_vocabulary.setdefault(items, []).append(cell.key)
    few = [
        key
        for group in groups.values()
        for keys in sorted(group.values(), key=len)[:-1]
        for key in keys
    ]
    if not few:
        return None
    return f"Scored on other held-out items than the rest, by another version: {', '.join(few)}."


def entry(cell: StudyCell, record: CellRecord, folder: StudyFolder) -> CellResult:
    """A cell's entry in results.json."""
    result = record.get_result()
    judged = sweep.verdict(cell, result.learning_rate, folder.sweep)
    about = {"environment": record.environment, "digest": record.digest}
    return result.model_copy(update={**judged, **about})


def _check_one_process(cell: StudyCell) -> None:
    """ConfigError where the cell's layout is of several."""
    if (number := processes(cell.settings.parallel)) > 1:
        raise config.ConfigError(
            [
                f"cell {cell.key}: its layout (parallel) is of {number} processes and compare is "
                "one: give the study to a cluster with megaarch submit, start the cell alone with "
                f"torchrun --nproc-per-node {number} -m megaarch compare CONFIG --cell {cell.name}"
                ", or leave parallel out"
            ]
        )


def unigram_of(folder: StudyFolder) -> dict[str, Any]:
    """Fields of Results, of a unigram model of the training tokens: its bits per byte on the test's and on the curve's
    items, and what each of the test's cost it."""
    evaluation, held = folder.study.evaluation, folder.held_out()
    prepared = folder.text
    vocabulary = prepared.tokenizer.vocabulary
    counts = np.zeros(vocabulary.size)
    for dataset, _ in prepared.train:
        for block in dataset.blocks():
            counts += np.bincount(block, minlength=vocabulary.size)

    def scored(items: list[Item]) -> tuple[np.ndarray, float]:
        nats = yardsticks.unigram_nats(counts, items, vocabulary.text)
        return nats, yardsticks.bits(nats, np.array([item.span_bytes for item in items]))

    test = held["test"][: evaluation.documents]
    nats, bits = scored(test)
    _, of_curve = scored(held["validation"][: evaluation.curve_documents])
    return {
        "unigram_bits_per_byte": bits,
        "unigram_paired": yardsticks.paired(test, nats),
        "curve_unigram_bits_per_byte": of_curve,
    }


def _show_data(manifest: PreparedManifest, console: Console) -> None:
    console.print(
        f"  {manifest.train_documents:,} documents, {manifest.train_tokens:,} tokens to train "
        f"on; {manifest.heldout_documents:,} documents held out "
        f"({manifest.dropped_paragraphs} paragraphs that also stand in train dropped)"
    )


def _show_own_data(folder: StudyFolder, console: Console) -> None:
    """A line for each text that is not the study's, with the cells that train on it."""
    texts = {cell.name: folder.text_of(cell).manifest for cell in folder.cells}
    for key in dict.fromkeys(text.key for text in texts.values()):
        names = [name for name, text in texts.items() if text.key == key]
        text = texts[names[0]]
        if key == folder.text.manifest.key:
            continue
        more = len(text.sources) - 1
        source = f"{text.source.partition(', ')[0]} and {more} more" if more else text.source
        console.print(
            f"  {', '.join(names)} train{'s' * (len(names) == 1)} on {source}: "
            f"{text.train_tokens:,} tokens; left out because the study holds them out: "
            f"{text.excluded_documents} documents, {text.excluded_paragraphs} paragraphs"
        )
