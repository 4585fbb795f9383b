"""From one format to another: a checkpoint, one safetensors file, a Hugging Face folder.

Everything passes through `files.Saved`, one tensor at a time (`lazy.Lazy`). A checkpoint belongs to no
layout, so reading it and writing it again is all that re-sharding takes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megaarch import config
from megaarch.checkpoint.lazy import Lazy, Weights, changed, like
from megaarch.checkpoint.record import NO_PROGRESS, CheckpointRecord
from megaarch.config import catalogue
from megaarch.config.schema import MOST_SENTINELS, Model, Settings
from megaarch.errors import UserError
from megaarch.files import read_json
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.ingest.trained_tokenizer import tokenizer_of
from megaarch.interchange import files, verify
from megaarch.interchange.families import FAMILIES
from megaarch.interchange.files import Saved
from megaarch.interchange.hf_config import complete, config_for, family_in, family_of, settings_from
from megaarch.interchange.hf_weights import from_hf, settle, to_hf
from megaarch.interchange.tokenizer_files import tokenizer_files
from megaarch.interchange.vocabulary import TABLES, fitted
from megaarch.training.open_run import run_folder

OWN = "megaarch"  # in config.json: what Hugging Face's settings cannot say
SENTINELS = 100


@dataclass(frozen=True)
class Conversion:
    """What is to be made of what. given: the source's format. tokenizer: the file, where it is not found.
    sentinels: of a model from Hugging Face; None is what its folder says. dtype: of the weights in a Hugging
    Face folder. verify: read the output back and compare, with Hugging Face logits too; None: the logits where
    transformers and the memory for it are there. say: is told what was found."""

    source: Path
    output: Path
    to: str
    given: str | None = None
    family: str | None = None
    tokenizer: str | None = None
    sentinels: int | None = None
    dtype: str = "float32"
    verify: bool | None = None
    say: Callable[[str], None] = print


def convert(job: Conversion) -> None:
    """Makes the output. UserError for what cannot be made; nothing
    is overwritten and nothing half done is left."""
    files.check_new(job.output)
    if job.dtype != "float32" and job.to != "hf":
        raise UserError(f"--dtype {job.dtype}: is for --to hf; what trains here has fp32 weights")
    given = job.given or format_of(job.source)
    reads = {"checkpoint": files.read_checkpoint, "safetensors": files.read_safetensors}
    saved = _from_hf(job) if given == "hf" else reads[given](job.source)
    settings = settings_of(saved.record, str(job.source))
    axes = catalogue.position_axes(settings.data.objective)
    verify.check_shapes(saved.weights, settings.model, axes, str(job.source))
    tokenizer = _tokenizer_of(job, saved.record, settings)
    if tokenizer:
        saved.record.tokenizer.path = str(Path(tokenizer.path).absolute())
    if job.to == "hf":
        _to_hf(job, saved, settings, tokenizer)
    else:
        with files.placed(job.output) as output:
            if job.to == "safetensors":
                files.write_safetensors(output, saved)
            else:
                files.write_checkpoint(output, saved)
                _write_start(output / "start.yaml", job.output, saved, settings)
            if job.verify is not False:
                back = reads[job.to](output).weights
                job.say(verify.check_tensors(saved.weights, back, str(job.output)))
    numbers = sum(tensor.numel() for tensor in like(saved.weights).values())
    job.say(f"{job.output}: {numbers:,} parameters, {job.to}")


def format_of(source: Path) -> str:
    """What a source is, by its looks."""
    if source.is_file():
        return "safetensors"
    if not source.is_dir() and not run_folder(source).is_dir():
        raise UserError(f"{source} does not exist")
    return "hf" if (source / files.CONFIG).exists() else "checkpoint"


def _check_logits(
    job: Conversion, weights: Weights, model: Model, folder: Path, family: str, pieces: int
) -> None:
    if job.verify is False:
        return
    if job.verify is None and (why := verify.cannot_run(weights)):
        job.say(f"without a comparison of logits: {why}")
    else:
        job.say(verify.check_logits(weights, model, folder, family, pieces))


def settings_of(record: CheckpointRecord, where: str = "this checkpoint") -> Settings:
    """The settings that a checkpoint was trained with. ConfigError where they are none."""
    raw = {key: value for key, value in record.raw_settings().items() if key != "study"}
    return config.resolve(raw, f"the settings of {where}")


def _from_hf(job: Conversion) -> Saved:
    theirs, tensors = files.read_hf(job.source)
    own = _own(theirs, job.source / files.CONFIG)
    with _told_of(job.source / files.CONFIG):
        settings_from(theirs)
    with _told_of(job.source):
        tensors, theirs = settle(changed(tensors, lambda _, t: t.float()), theirs)
        family, model = family_in(theirs), settings_from(theirs)
        weights = from_hf(tensors, model, family)
    path = str(Path(job.tokenizer or files.find_tokenizer(job.source)).absolute())
    pieces = min(Tokenizer(path, sentinels=0).base_size, model.vocabulary_size)
    if job.verify is not False:
        back = to_hf(weights, model, family)
        kept = Lazy({name: back.like[name] for name in tensors}, back.__getitem__)
        job.say(verify.check_tensors(tensors, kept, str(job.source)))
    sentinels = job.sentinels if job.sentinels is not None else own.get("sentinels", SENTINELS)
    tokenizer = _same_tokenizer(path, sentinels, model.vocabulary_size, own)
    if tokenizer is None:
        old = model.vocabulary_size
        ids = _special_ids(job, complete(theirs, family))
        behind = _sentinels_behind(job.source, family, path, old - pieces)
        weights, model, tokenizer, trained = fitted(weights, model, path, sentinels, ids, behind)
        job.say(
            f"{pieces:,} of {old:,} rows are pieces of {path}; with specials and {sentinels} "
            f"sentinels, {trained} of which were trained, the vocabulary is {model.vocabulary_size:,}"
        )
    _check_logits(job, weights, model, job.source, family, pieces)
    usual = FAMILIES[family].preset
    preset = own.get("preset", usual)
    objective = own.get("objective") or catalogue.PRESETS[preset or usual].objective
    given = model.model_dump() | {"preset": preset}
    given["architecture"] = own.get("architecture", model.architecture)
    data = {"tokenizer": path, "sentinels": sentinels, "objective": objective}
    settings = config.resolve({"model": given, "data": data}, str(job.source / files.CONFIG))
    record = {
        "progress": NO_PROGRESS,
        "fingerprint": None,
        "settings": settings.model_dump(mode="json", by_alias=True),
        "tokenizer": {"path": path, "fingerprint": tokenizer.fingerprint},
    }
    return Saved(weights, CheckpointRecord.model_validate(record))


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """A UserError names the path."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _own(theirs: dict[str, Any], file: Path) -> dict[str, Any]:
    """What `_to_hf` has put into config.json; empty in others' files."""
    own = theirs.get(OWN) or {}
    if not isinstance(own, dict):
        raise UserError(f"{file}: {OWN} has to be an object, not {own!r}")
    preset, sentinels = own.get("preset"), own.get("sentinels", SENTINELS)
    if preset is not None and (not isinstance(preset, str) or preset not in catalogue.PRESETS):
        raise UserError(
            f"{file}: {OWN}.preset {preset!r} is none of {', '.join(catalogue.PRESETS)}"
        )
    if type(sentinels) is not int or not 0 <= sentinels <= MOST_SENTINELS:
        raise UserError(
            f"{file}: {OWN}.sentinels has to be a number from 0 to {MOST_SENTINELS:,}, not {sentinels!r}"
        )
    return own


def _same_tokenizer(path: str, sentinels: int, size: int, own: dict) -> Tokenizer | None:
    """The tokenizer, where a model from here comes back with the one it was trained with."""
    try:
        tokenizer = Tokenizer(path, sentinels, size)
    except ValueError:  # its specials do not fit
        return None
    return tokenizer if tokenizer.fingerprint == own.get("tokenizer") else None


def _sentinels_behind(folder: Path, family: str, path: str, rows: int) -> int:
    """Returns how many sentinels T5 has behind the pieces of a SentencePiece file, where transformers puts them:
    `extra_ids` of tokenizer_config.json, 100 where that does not say; 0 where `rows` do not hold them."""
    if family != "t5" or Path(path).suffix != ".model":
        return 0
    beside = folder / "tokenizer_config.json"
    found = read_json(beside) if beside.is_file() else {}
    number = found.get("extra_ids", 100) if isinstance(found, dict) else 100
    return number if isinstance(number, int) and 0 <= number <= rows else 0


def _special_ids(job: Conversion, theirs: dict[str, Any]) -> dict[str, int | None]:
    eos = theirs.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    if len(ends) > 1:
        others = ", ".join(map(str, ends[1:]))
        job.say(f"an answer ends at id {ends[0]} alone, and no longer at {others} (eos_token_id)")
    start = theirs.get("decoder_start_token_id")
    return {
        "pad": theirs.get("pad_token_id"),
        "bos": theirs.get("bos_token_id") if start is None else start,
        "eos": next(iter(ends), None),
    }


def _to_hf(job: Conversion, saved: Saved, settings: Settings, tokenizer: Tokenizer | None) -> None:
    model, axes = settings.model, catalogue.position_axes(settings.data.objective)
    family = job.family or family_of(model)
    if family not in FAMILIES:
        raise UserError(f"--family {family}: is not one of {', '.join(FAMILIES)}")
    theirs, dtype = config_for(model, family, axes), getattr(torch, job.dtype)
    if settings_from(theirs).architecture != model.architecture:
        job.say(
            f"{theirs['architectures'][0]} has a causal mask: transformers and vLLM will run this "
            f"{model.architecture} so that no token of a prompt sees a later one, as it was not trained"
        )
    weights = changed(saved.weights, lambda _, tensor: tensor.to(dtype).float())
    ids, beside = _special_tokens(job, model, tokenizer)
    theirs |= ids
    theirs |= {
        "torch_dtype": job.dtype,
        OWN: {
            "preset": model.preset,
            "architecture": model.architecture,
            "objective": settings.data.objective,
            "sentinels": settings.data.sentinels,
            "tokenizer": saved.record.tokenizer.fingerprint,
        },
    }
    tensors = to_hf(weights, model, family)
    with files.placed(job.output) as output:
        files.write_hf(output, theirs, tensors, beside, dtype)
        if job.verify is not False:
            back = _read_back(output, model, family)
            kept = _without_padding(weights, model.vocabulary_size)
            job.say(verify.check_tensors(kept, back, str(job.output)))
        _check_logits(job, weights, model, output, family, model.vocabulary_size)


def _special_tokens(
    job: Conversion, model: Model, tokenizer: Tokenizer | None
) -> tuple[dict[str, int | None], dict[str, bytes]]:
    """The ids in config.json, and the files that have to agree with them."""
    special = tokenizer.vocabulary.special if tokenizer else {}
    ids = {f"{name}_token_id": special.get(name) for name in ("pad", "bos", "eos")}
    if model.architecture == "encoder_decoder":
        ids["decoder_start_token_id"] = special.get("bos")
    if tokenizer is None:
        return ids, {}
    beside, fault = tokenizer_files(tokenizer, model.sequence_length)
    if fault:
        job.say(f"without tokenizer.json: {tokenizer.path} cannot be one: {fault}")
    if model.architecture != "encoder":
        beside["generation_config.json"] = json.dumps(ids, indent=2).encode()
    return ids, beside


def _read_back(folder: Path, model: Model, family: str) -> Lazy:
    config_again, again = files.read_hf(folder)
    again, config_again = settle(changed(again, lambda _, tensor: tensor.float()), config_again)
    back = from_hf(again, settings_from(config_again), family)
    return _without_padding(back, model.vocabulary_size)


def _without_padding(weights: Weights, size: int) -> Lazy:
    return changed(weights, lambda name, tensor: tensor[:size] if name in TABLES else tensor)


def _tokenizer_of(
    job: Conversion, record: CheckpointRecord, settings: Settings
) -> Tokenizer | None:
    """The tokenizer that a model was trained with, where its file is still there."""
    try:
        return tokenizer_of(record, settings, job.tokenizer, job.source)
    except UserError as error:
        if job.tokenizer:
            raise
        what = "tokenizer and special ids" if job.to == "hf" else "a look at its tokenizer"
        job.say(f"without {what}: {error}")
        return None


def _write_start(file: Path, run: Path, saved: Saved, settings: Settings) -> None:
    """start.yaml: the settings of a run that starts from these weights."""
    model = settings.model.model_dump(exclude_defaults=True)
    data = {
        "tokenizer": saved.record.tokenizer.path,
        "sentinels": settings.data.sentinels,
        "objective": settings.data.objective,
    }
    training = {"start_from": str(run.resolve())}
    raw = {"model": model, "data": data, "training": training}
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
