"""What share of a cell's FLOPs goes where architectures and sizes differ in a way that a ranking does not show."""

from pydantic import ValidationError

from megaarch.config.matmuls import layer_products
from megaarch.config.schema import Model
from megaarch.data.batch import Counts
from megaarch.model import flops
from megaarch.study.results import CellResult


def head_share(cell: CellResult) -> float | None:
    """Returns the share that its output layer took; None where it is not known."""
    model = _model(cell, {"hidden_size", "vocabulary_size"}, {"head_transform"})
    if model is None or not cell.flops:
        return None
    counts = Counts(0, (0, 0), (0, 0), (0, 0), int(cell.target_tokens or 0), (0, 0))
    return flops.training(model, counts) / cell.flops


def unread_share(cell: CellResult) -> float | None:
    """Returns the share that its last layer took for outputs which no target reads: the attention's output
    product and the feed-forward of tokens that are no targets. A decoder that predicts every token has none,
    nor has a stack behind an encoder. A lower bound: these tokens' queries and their attention are left out.
    None where it is not known.
    """
    if cell.architecture == "encoder_decoder":
        return 0.0
    needed = {"hidden_size", "heads", "feed_forward_size", "activation"}
    model = _model(cell, needed, {"head_size"})
    if model is None or cell.seen_tokens is None or cell.target_tokens is None or not cell.flops:
        return None
    unread = max(int(cell.seen_tokens - cell.target_tokens), 0)
    products = layer_products(model, 0)
    weights = sum(
        products[name].inputs * products[name].outputs
        for name in ("attention.output", "up", "down")
    )
    return flops.TRAINING * 2 * unread * weights / cell.flops


def _model(cell: CellResult, needed: set[str], more: set[str]) -> Model | None:
    """Returns a model with the cell's settings of these names; None where the record lacks one of `needed`."""
    found = cell.section("model")
    if not needed <= found.keys():
        return None
    try:
        return Model.model_validate({name: found[name] for name in (needed | more) & found.keys()})
    except ValidationError:  # of another version's settings
        return None
