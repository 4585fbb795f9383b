"""`megaarch train`: one run of one model."""

import argparse
import logging
from pathlib import Path

from megaarch import config
from megaarch.cli.options import Adder, config_arguments, read

log = logging.getLogger(__name__)


def add(command: Adder) -> None:
    train = command(
        "Train one model",
        "Writes metrics.jsonl, TensorBoard files and checkpoints to logging.directory; run again, "
        "it continues from the newest checkpoint there.",
    )
    config_arguments(train)
    train.add_argument(
        "--prepare",
        action="store_true",
        help="prepare the text or check the tokens, in one process, and end: a run then begins at once",
    )


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaarch.config.idle import idle
    from megaarch.distributed import launch
    from megaarch.distributed.heartbeat import Heartbeat
    from megaarch.ingest.prepare import prepare
    from megaarch.parallel.validate import join
    from megaarch.study import lock
    from megaarch.study.progress_bar import ProgressBar, ProgressDisplay
    from megaarch.training import memory_check
    from megaarch.training.limit import Limit
    from megaarch.training.trainer import Trainer, device_of

    settings = config.resolve(read(options), options.config)
    if settings.study:
        raise config.ConfigError(["study: this is a study; run it with megaarch compare"])
    Limit.of(settings.training)  # or says what lacks, before the data
    if options.prepare:
        prepared = prepare(settings.data, settings.model.vocabulary_size)
        tokens = prepared.manifest.train_tokens
        print(f"{tokens:,} tokens to train on, prepared in {prepared.directory}")
        return 0
    device = device_of(settings)
    memory_check.check(settings, device)
    grid = join(settings, device)
    for sentence in idle(settings) if grid.is_main else ():
        log.warning(sentence)
    directory = Path(settings.logging.directory)
    for folder in (directory, directory / "checkpoints"):
        if folder.exists() and not folder.is_dir():
            raise config.ConfigError([f"logging.directory: {folder} is a file"])
    with Heartbeat(grid, settings.training) as heartbeat:
        prepared = launch.first(lambda: prepare(settings.data, settings.model.vocabulary_size))
        hold_out = None
        if settings.training.eval_every > 0:
            # a second, for what it imports
            from megaarch.evaluation.validation import validate

            hold_out = validate(settings, prepared)
        with ProgressDisplay(Console(stderr=True, quiet=not grid.is_main)) as display:
            bar = ProgressBar(settings.model.preset or settings.model.architecture, display.show)
            with lock.alone(directory, "run", grid):
                trainer = Trainer(
                    settings,
                    prepared,
                    grid=grid,
                    heartbeat=heartbeat,
                    watch=bar.update,
                    hold_out=hold_out,
                    shares=(1.0,),
                )
                progress = trainer.run()
    if grid.is_main:
        print(
            f"{progress.step} steps in {progress.seconds:.1f} s, {progress.flops:.3e} FLOPs, "
            f"{progress.seen_tokens:,} tokens: {settings.logging.directory}"
        )
    launch.leave()
    return 0
