"""Which checkpoints of a run stay: the newest ones, and for good those at every so many steps.

A checkpoint leaves the way it came: renamed first, so that it is complete or absent at any moment.
"""

import shutil
from pathlib import Path

from megaarch.checkpoint import manifest

ASIDE = ".writing"  # suffix of a checkpoint that is not one yet
LEAVING = ".removing"  # of one that is none any more


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    return sorted(p for p in folder.glob("step-" + 8 * "[0-9]") if p.is_dir())


def prune(folder: Path, written: Path, keep: int, keep_every: int) -> None:
    """Drop what need not stay, now that `written` is complete.

    keep: how many of the newest stay; 0: all. keep_every: steps at whose multiples a checkpoint
    stays for good; 0: none. A damaged one counts for nothing, and goes where it is of a later step;
    `written` is never dropped.
    """
    if not keep:
        return
    others = []
    for path in complete(folder):
        if not sizes_fit(path):
            if path > written:
                path.rename(path.with_suffix(LEAVING))
        elif path < written:
            others.append(path)
    for old in others[: max(len(others) - keep + 1, 0)]:
        step = int(old.name.removeprefix("step-"))
        if not (keep_every and step % keep_every == 0):
            old.rename(old.with_suffix(LEAVING))
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what a save or a removal that was cut off left behind. No save is in flight."""
    for suffix in (ASIDE, LEAVING):
        for rest in folder.glob(f"step-*{suffix}"):
            shutil.rmtree(rest, ignore_errors=True)
    for rest in folder.glob("latest.*"):
        rest.unlink(missing_ok=True)


def sizes_fit(path: Path) -> bool:
    """Whether all files are there with their sizes: what can be seen without reading them."""
    try:
        return manifest.first_fault(path, manifest.read(path).items(), read=False) is None
    except (OSError, ValueError):
        return False
