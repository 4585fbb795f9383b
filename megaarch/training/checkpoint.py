"""Checkpoints: complete or absent, verified, layout-free (torch.distributed.checkpoint).

run/checkpoints/step-00000100/   state/       weights and optimizer, by parameter name
                                 progress.json  totals, settings, data fingerprint
                                 manifest.json  size and checksum of every file
run/checkpoints/latest           the name of the newest complete one; moved last
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from megaarch.parallel.mesh import Grid

log = logging.getLogger(__name__)
# One entry a parameter: a pipeline rank, and another layout's parameter groups, take their own.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    progress: dict[str, Any],
    keep: int,
    grid: Grid | None = None,
) -> Path:
    """Write the checkpoint of `step` aside, verify it, rename it, move `latest`.

    keep: how many of the newest to keep; 0 keeps all. grid: all its processes call this and write
    their shards; the main one does the rest. OSError on all of them where something fails.
    """
    folder = run / "checkpoints"
    path = folder / f"step-{step:08d}"
    aside = folder / f"{path.name}.writing"
    with _on_main(grid) as main:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    weights, state = get_state_dict(model, optimizer, options=BY_NAME)
    _quietly(dcp.save, {"model": weights, "optimizer": state}, checkpoint_id=aside / "state")
    with _on_main(grid) as main:
        if main:
            _finish(folder, path, aside, progress, keep)
    return path


def _finish(folder: Path, path: Path, aside: Path, progress: dict[str, Any], keep: int) -> None:
    (aside / "progress.json").write_text(json.dumps(progress, indent=1))
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(aside)): [p.stat().st_size, _checksum(p)] for p in files}
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in [*files, aside / "manifest.json"]:
        _flush(file)
    if fault := find_fault(aside):
        raise OSError(f"checkpoint {aside} does not read back as written: {fault}")
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)
    _flush(folder)
    mark = folder / "latest.writing"
    mark.write_text(path.name + "\n")
    mark.replace(folder / "latest")
    if keep:
        # a damaged one counts for nothing, and what was just written is never dropped
        others = [p for p in _complete(folder) if p != path and _sizes_fit(p)]
        for old in others[: len(others) - keep + 1]:
            shutil.rmtree(old)


@contextmanager
def _on_main(grid: Grid | None) -> Iterator[bool]:
    """Whether this is the main process. All wait for its block, and raise the error it raises."""
    error = None
    try:
        yield grid is None or grid.is_main
    except OSError as raised:
        error = raised
    if grid is not None:
        error = grid.share(error)
    if error:
        raise error


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; a damaged one is named, skipped, the one before
    it used."""
    for path in reversed(_complete(run / "checkpoints")):
        fault = find_fault(path)
        if fault is None:
            return path
        log.warning("checkpoint %s is damaged (%s); using the one before it", path, fault)
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        json.loads((path / "progress.json").read_text())
        if not {"progress.json", "state/.metadata"} <= manifest.keys():
            return "manifest.json does not list what a checkpoint holds"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    for name, (size, checksum) in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _checksum(file) != checksum:
            return f"{name} has a wrong checksum"
    return None


def read_progress(path: Path) -> dict[str, Any]:
    """The totals, settings and fingerprint saved with a checkpoint."""
    return json.loads((path / "progress.json").read_text())


def load(
    path: Path, model: nn.Module, optimizer: Optimizer | None, grid: Grid | None = None
) -> None:
    """Read weights (and the optimizer's state) into place, whatever layout they are in.

    grid: all its processes call this. ValueError where the checkpoint's parameters are not the
    model's; a pipeline rank holds some of them only.
    """
    optimizers = [optimizer] if optimizer else []
    weights, state = get_state_dict(model, optimizers, options=BY_NAME)
    wanted: dict[str, Any] = {"model": weights}
    if optimizer:
        wanted["optimizer"] = state
    _compare(path, weights, partial=grid is not None and grid.size("pp") > 1)
    _quietly(dcp.load, wanted, checkpoint_id=path / "state")
    set_state_dict(
        model,
        optimizers,
        model_state_dict=wanted["model"],
        optim_state_dict=wanted.get("optimizer", {}),
        options=BY_NAME,
    )


def _compare(path: Path, weights: dict[str, Any], partial: bool) -> None:
    saved = dcp.FileSystemReader(path / "state").read_metadata().state_dict_metadata
    there = {
        k.removeprefix("model."): tuple(v.size) for k, v in saved.items() if k.startswith("model.")
    }
    here = {name: tuple(p.shape) for name, p in weights.items()}
    wanted = here if partial else {**there, **here}
    names = [n for n in wanted if there.get(n) != here.get(n)]
    if names:
        name = names[0]
        raise ValueError(
            f"checkpoint {path} is of another model: {name} is {there.get(name, 'absent')} there "
            f"and {here.get(name, 'absent')} here ({len(names)} parameters differ)"
        )


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-" + 8 * "[0-9]") if p.is_dir())


def _sizes_fit(path: Path) -> bool:
    """Whether all files are there with their sizes: what can be seen without reading them."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return all((path / name).stat().st_size == size for name, (size, _) in manifest.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _quietly(call, *args, **options) -> None:
    # one process without a process group is a layout like any other; torch warns of it
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(*args, **options)
