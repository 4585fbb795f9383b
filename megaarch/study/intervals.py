"""Bootstrap intervals over documents: for one cell's figure, and for two cells in pairs."""

import numpy as np

RESAMPLES = 1000


def ratio_interval(amounts: np.ndarray, sizes: np.ndarray, documents: np.ndarray) -> list[float]:
    """95% interval of sum(amounts) / sum(sizes) when whole documents are drawn again.

    amounts, sizes, documents: [N]. The draws depend on the documents alone, so they are the same
    for every cell.
    """
    names, place = np.unique(documents, return_inverse=True)
    top = np.bincount(place, weights=amounts, minlength=len(names))
    bottom = np.bincount(place, weights=sizes, minlength=len(names))
    draws = np.random.default_rng(0).integers(0, len(names), size=(RESAMPLES, len(names)))
    ratios = top[draws].sum(axis=1) / np.maximum(bottom[draws].sum(axis=1), 1e-12)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return [float(low), float(high)]


def paired_interval(a: dict, b: dict) -> list[float] | None:
    """95% interval of a's figure less b's over the same items, or None where they differ.

    a, b: `paired` entries of two cells: `documents`, `sizes` and `amounts` of each item. Pairing
    takes out what makes an item hard for every model.
    """
    if a["documents"] != b["documents"] or a["sizes"] != b["sizes"]:
        return None
    difference = np.subtract(a["amounts"], b["amounts"])
    return ratio_interval(difference, np.asarray(a["sizes"]), np.asarray(a["documents"]))
