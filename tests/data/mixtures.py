"""The objectives of the catalogue that make examples of text, with their components."""

from megaarch.config.catalogue import OBJECTIVES

MIXTURES = {name: row.components() for name, row in OBJECTIVES.items() if row.mixture is not None}


def build(name, **settings):
    """The weighted components of an objective under these settings of `data`."""
    return OBJECTIVES[name].components(**settings)
