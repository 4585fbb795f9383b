"""Parts of a trainer's step, for tests that look between them."""

from megaarch.training.steps_in_flight import PendingTotals


def forward_backward(trainer, batches):
    """Gradients of the step that follows, from these micro-batches; returns its loss."""
    _, weight = PendingTotals(batches, trainer.grid).read()
    trainer.engine.train()
    trainer.model.set_dropout_step(trainer.settings.training.seed, trainer.launched.step)
    return trainer.engine.forward_backward(batches, max(weight, 1e-8))
