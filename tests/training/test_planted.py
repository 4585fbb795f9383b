"""Checkpoints that someone has tampered with, manifest and all: whatever is planted in them, no reading
command executes it, each says one sentence; and those of version 0.1 are brought to this one."""

import copy
import functools
import io
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megaarch import cli, config
from megaarch.checkpoint import checkpoint, storage
from megaarch.checkpoint.manifest import find_fault
from megaarch.interchange import pickled_metadata, upgrade
from megaarch.training.trainer import Trainer
from tests.lm_eval.local import write_tasks
from tests.tools.run import tool

pytestmark = pytest.mark.slow

METADATA = "torch.distributed.checkpoint.metadata"


@pytest.fixture(scope="module")
def given(raw, tmp_path_factory):
    """The raw settings of a run of three steps, in a folder of its own."""
    mine = copy.deepcopy(raw)
    config.set_path(mine, "training.steps", 3)
    config.set_path(mine, "logging.directory", str(tmp_path_factory.mktemp("trained") / "run"))
    return mine


@pytest.fixture(scope="module")
def trained(given, prepared):
    trainer = Trainer(config.resolve(copy.deepcopy(given)), prepared)
    trainer.run()
    return trainer


@pytest.fixture
def step(given, trained, tmp_path):
    """The checkpoint of a copy of the run in `tmp_path / "run"`."""
    shutil.copytree(given["logging"]["directory"], tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-00000003"


@pytest.fixture
def pickled(step, trained):
    """That checkpoint as version 0.1 wrote it, by torch's own writer and with its metadata."""
    shutil.rmtree(step / "state")
    state = checkpoint.state_of(trained.engine, trained.optimizer)
    dcp.save(state, checkpoint_id=step / "state")
    seal(step)
    return step


def seal(step):
    """A manifest that fits what is there."""
    files = [f for f in step.rglob("*") if f.is_file() and f.name != "manifest.json"]
    manifest = {
        str(f.relative_to(step)): [f.stat().st_size, zlib.crc32(f.read_bytes())] for f in files
    }
    (step / "manifest.json").write_text(json.dumps(manifest))


def _task(folder):
    """The path of a task of two items."""
    (folder / "items.jsonl").write_text('{"text": "stones", "label": "no"}\n' * 2)
    wording = {"name": "own", "prompt": "{{ text }}? ||| {{ label }}", "choices": "no ||| yes"}
    said = {"summary": "?", "data": {"test": "items.jsonl"}, "wordings": [wording]}
    (folder / "own.task.yaml").write_text(json.dumps(said))
    return str(folder / "own.task.yaml")


def commands(given, tmp_path):
    """Every command that reads a checkpoint's state, by name, as calls."""
    resumed, started = copy.deepcopy(given), copy.deepcopy(given)
    config.set_path(resumed, "logging.directory", str(tmp_path / "run"))
    config.set_path(resumed, "training.steps", 5)
    config.set_path(started, "logging.directory", str(tmp_path / "child"))
    config.set_path(started, "training.start_from", str(tmp_path / "run"))
    for name, mine in (("resumed", resumed), ("started", started)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(mine))
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    convert = tool("convert")
    model, tasks = f"run={run}", str(tmp_path / "tasks")
    of_model = ["--model", "megaarch", "--model_args", model, "--include_path", tasks]
    return {
        "train": lambda: cli.main(["train", str(tmp_path / "resumed.yaml")]),
        "start_from": lambda: cli.main(["train", str(tmp_path / "started.yaml")]),
        "evaluate": lambda: cli.main(["evaluate", run]),
        "tasks": lambda: cli.main(["evaluate", run, "--tasks", _task(tmp_path)]),
        "generate": lambda: cli.main(
            ["generate", run, "--prompt", "The river", "--max-tokens", "2"]
        ),
        "lm-eval": lambda: cli.main(["lm-eval", *of_model, "--tasks", "local_word"]),
        "convert": lambda: convert([run, out, "--to", "safetensors"]),
        "verify": lambda: convert([run, out, "--to", "checkpoint", "--verify"]),
        "upgrade": lambda: tool("upgrade_checkpoint")([run]),
    }


COMMANDS = ("train", "start_from", "evaluate", "tasks", "generate", "convert", "verify")


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", value) if isinstance(value, str) else None


def line(text):
    return text.encode() + b"\n"


def planted(kind, witness, true):
    """A pickle of this kind that makes the file `witness` where it is loaded. true: that of the
    checkpoint."""
    command = f"touch {witness}"
    string = b"X" + len(command).to_bytes(4, "little") + command.encode()
    reduce = b"cos\nsystem\n" + string + b"\x85R"
    if kind == "reduce":
        return pickle.dumps(Call(os.system, command), protocol=4)
    if kind == "older protocol":
        return pickle.dumps(Call(os.system, command), protocol=0)
    if kind == "eval":
        return pickle.dumps(Call(eval, f"__import__('os').system({command!r})"))
    if kind == "popen":
        return pickle.dumps(Call(subprocess.check_call, ["touch", str(witness)]))
    if kind == "true metadata follows":
        return b"\x80\x04" + reduce + b"0" + true[2:]
    if kind == "in an entry":
        metadata = pickle.loads(true)
        metadata.planner_data = Call(os.system, command)
        return pickle.dumps(metadata)
    if kind == "nested":
        return pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, command))))
    if kind == "inst":
        return b"(S'" + command.encode() + b"'\nios\nsystem\n."
    if kind == "obj":
        return b"(cos\nsystem\n" + string + b"o."
    if kind == "newobj":
        arguments = pickle.dumps((["touch", str(witness)],), protocol=2)[2:-1]
        return b"\x80\x02csubprocess\nPopen\n" + arguments + b"\x81."
    if kind == "newobj_ex":
        arguments = pickle.dumps((["touch", str(witness)],), protocol=2)[2:-1]
        return b"\x80\x04csubprocess\nPopen\n" + arguments + b"}\x92."
    if kind == "build":
        setter = b"}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"
        return b"\x80\x02c" + line(METADATA) + line("Metadata") + b")\x81" + setter + string + b"b."
    if kind == "through a listed module":  # metadata.py imports os
        names = pickle.dumps((METADATA, "os.system"), protocol=4)
        parts = [a for o, a, _ in pickletools.genops(names) if isinstance(a, str)]
        called = b"".join(b"\x8c" + bytes([len(p)]) + p.encode() for p in parts) + b"\x93"
        return b"\x80\x04" + called + string + b"\x85R."
    raise KeyError(kind)


KINDS = (
    "reduce",
    "older protocol",
    "eval",
    "popen",
    "true metadata follows",
    "in an entry",
    "nested",
    "inst",
    "obj",
    "newobj",
    "newobj_ex",
    "build",
    "through a listed module",
)
# of these unpickling calls __new__ alone, or lacks arguments; the instructions are refused all the same
NEVER_CALLED = ("newobj", "newobj_ex", "build")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NEVER_CALLED])
def test_what_is_planted_would_run_where_it_is_unpickled(kind, pickled, tmp_path):
    true = (pickled / "state" / ".metadata").read_bytes()
    pickle.loads(planted(kind, tmp_path / "witness", true))
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_pickle_never_runs(kind, given, pickled, tmp_path, capsys):
    file = pickled / "state" / ".metadata"
    file.write_bytes(planted(kind, tmp_path / "witness", file.read_bytes()))
    seal(pickled)
    refused("upgrade", given, tmp_path, capsys, f"{file} is not the metadata of a checkpoint")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reads_a_pickle(command, given, pickled, tmp_path, capsys):
    """Each says how the checkpoint is brought to this version."""
    file = pickled / "state" / ".metadata"
    file.write_bytes(planted("reduce", tmp_path / "witness", file.read_bytes()))
    seal(pickled)
    said = f"{pickled} is of megaarch 0.1, whose index is a pickle: bring it to this version with python"
    refused(command, given, tmp_path, capsys, said)


def test_lm_eval_reads_no_pickle(given, pickled, tmp_path, capsys, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is missing")
    few = functools.partialmethod(tasks.TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(tasks.TaskManager, "__init__", few)
    write_tasks(tmp_path / "tasks")
    file = pickled / "state" / ".metadata"
    file.write_bytes(planted("reduce", tmp_path / "witness", file.read_bytes()))
    seal(pickled)
    assert commands(given, tmp_path)["lm-eval"]() == 2
    assert not (tmp_path / "witness").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megaarch: ")]
    assert len(said) == 1 and f"{pickled} is of megaarch 0.1" in said[0]


def refused(command, given, tmp_path, capsys, sentence):
    """The command ends with one sentence; nothing has run and nothing was made."""
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    assert commands(given, tmp_path)[command]() == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "witness").exists()
    assert sentence in error and "Traceback" not in error and error.count("\n") == 1
    # torch's advice to load it all the same
    assert "Weights only load failed" not in error and "weights_only" not in error
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "child" / "checkpoints").exists()


def nested(content):
    """The pickle with its offset of 7 in a million tuples, whose hash needs more than the stack."""
    return content.replace(b"K\x07\x85", b"K\x07" + b"\x85" * 1_000_000, 1)


PLACED = {MetadataIndex("a", torch.Size([7])): _StorageInfo("file", 0, 1)}


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"Pa\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02c" + line(METADATA) + line("Metadata") + b"}(X\x01\x00\x00\x00aI1\nub.",
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of 2**32 places
        b"\x80\x02" + b"]" + b"\x85" * 200_000 + b".",
        b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns.",
        b"\x80\x02}(N" + b"\x85" * 1_000_000 + b"Nu.",
        nested(pickle.dumps(Metadata({}, storage_data=PLACED), protocol=2)),
        b"\x80\x02}" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"((" + b"\x85" * 100 + b"d.",
        b"\x80\x04.",
        b"",
        b"\x80",
        b"N.",
        b"\x80\x02}X\x01\x00\x00\x00a)s0.",
        pickle.dumps(Metadata({"model.x": BytesStorageMetadata()}, storage_data={})),
        pickle.dumps(Metadata({}, storage_data={"model.x": 3})),
        pickle.dumps(Metadata(3, storage_data={MetadataIndex("a"): None})),
        pickle.dumps(Metadata(None)),
    ],
)
def test_what_is_no_metadata_of_torch_is_refused(content):
    with pytest.raises(pickled_metadata.Refused):
        pickled_metadata.parse(content)


def test_what_was_looked_at_is_what_is_unpickled():
    """The string that begins in a frame and ends behind it hides instructions from who reads it whole."""
    hidden = b"\x00" + b"c" + line("os") + line("system") + b"."
    size = len(hidden).to_bytes(4, "little")
    frame = b"\x95" + (2).to_bytes(8, "little")
    content = b"\x80\x04" + frame + b"X" + size + hidden + b"."
    assert [i.name for i, _, _ in pickletools.genops(content)] == [
        "PROTO",
        "FRAME",
        "BINUNICODE",
        "STOP",
    ]
    with pytest.raises(pickled_metadata.Refused, match="it is no metadata of torch's"):
        pickled_metadata.parse(content)


def test_frames_change_nothing():
    content = pickle.dumps(Metadata({}, storage_data={}), protocol=4)
    frame = b"\x95" + (1 << 40).to_bytes(8, "little")
    assert content[2:3] == b"\x95"
    for given in (content, content[:2] + content[11:], content[:2] + frame + content[11:]):
        assert pickled_metadata.parse(given) == {"format": 1, "tensors": {}, "values": {}}


@pytest.mark.parametrize("command", ["train", "start_from", "evaluate", "convert"])
def test_an_upgraded_checkpoint_is_read(command, given, pickled, trained, tmp_path, capsys):
    assert not (pickled / "state" / "metadata.json").exists()
    assert commands(given, tmp_path)["upgrade"]() == 0, capsys.readouterr().err
    assert f"{pickled} is of this version now" in capsys.readouterr().out
    assert find_fault(pickled) is None
    assert commands(given, tmp_path)[command]() == 0, capsys.readouterr().err
    weights = checkpoint.read_weights(pickled)
    for name, value in trained.model.named_parameters():
        assert torch.equal(weights[name], value), name
    assert commands(given, tmp_path)["upgrade"]() == 0
    assert "is of this version already" in capsys.readouterr().out


def test_an_upgrade_that_dies_may_be_made_again(pickled, monkeypatch):
    before = (pickled / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(upgrade, "size_and_checksum", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upgrade.upgrade(pickled)
    assert (pickled / "manifest.json").read_bytes() == before
    assert upgrade.upgrade(pickled) == [pickled] and find_fault(pickled) is None


def test_an_upgrade_writes_through_no_link(pickled, tmp_path):
    (tmp_path / "profile").write_text("mine")
    for name in ("__0_1.distcp", "metadata.json"):
        (pickled / "state" / name).symlink_to(tmp_path / "profile")
    assert upgrade.upgrade(pickled) == [pickled] and find_fault(pickled) is None
    assert (tmp_path / "profile").read_text() == "mine"


def test_a_damaged_checkpoint_keeps_no_other_from_its_upgrade(pickled, tmp_path, given, capsys):
    older = pickled.with_name("step-00000002")
    shutil.copytree(pickled, older)
    step = json.loads((older / "progress.json").read_text())
    step["progress"]["step"] = 2
    (older / "progress.json").write_text(json.dumps(step))
    seal(older)
    (older / "state" / "__0_0.distcp").write_bytes(b"half")
    assert commands(given, tmp_path)["upgrade"]() == 2
    error = capsys.readouterr().err
    assert f"{older} was not upgraded: " in error and str(pickled) not in error
    assert "it is damaged (state/__0_0.distcp has 4 bytes" in error
    assert find_fault(pickled) is None


def test_an_upgraded_optimizer_s_state_is_what_it_was(given, pickled, trained, prepared):
    mine = copy.deepcopy(given)
    config.set_path(mine, "logging.directory", str(pickled.parents[1]))
    assert upgrade.upgrade(pickled.parents[1]) == [pickled]
    again = Trainer(config.resolve(mine), prepared)
    _, theirs = trained.engine.state(trained.optimizer)
    _, ours = again.engine.state(again.optimizer)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        same = torch.equal(value, ours[name]) if torch.is_tensor(value) else value == ours[name]
        assert same and type(value) is type(ours[name]), name


def test_a_checkpoint_holds_no_pickle_but_that_of_tensors(step):
    assert not (step / "state" / ".metadata").exists()
    index = storage.read_index(step / "state")
    assert index.values and index.tensors
    for file, start, length in index.values.values():
        json.loads((step / "state" / file).read_bytes()[start : start + length])


def executing(tmp_path):
    content = io.BytesIO()
    torch.save(Call(os.system, f"touch {tmp_path / 'witness'}"), content)
    return content.getvalue()


def append(step, content):
    """Bytes added to the shard: its name, and where they are."""
    file = step / "state" / "__0_0.distcp"
    start = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(content)
    return file.name, start, len(content)


@pytest.mark.parametrize(
    ("entry", "command"),
    [*(("weight", command) for command in COMMANDS), ("moment", "train"), ("option", "train")],
)
def test_a_payload_that_executes_is_not_loaded(entry, command, given, step, tmp_path, capsys):
    index = json.loads((step / "state" / "metadata.json").read_text())
    place = append(step, executing(tmp_path))
    if entry == "option":
        index["values"][next(iter(index["values"]))] = place
    else:
        start = {"weight": "model.", "moment": "optimizer.state."}[entry]
        name = min(
            (name for name in index["tensors"] if name.startswith(start)),
            key=lambda name: index["tensors"][name]["size"],
        )
        chunk = index["tensors"][name]["chunks"][0]
        chunk[2:] = [place[0], place[1], place[2]]
    (step / "state" / "metadata.json").write_text(json.dumps(index))
    seal(step)
    refused(command, given, tmp_path, capsys, "step-00000003")


@pytest.mark.parametrize("entry", ["optimizer.param_groups", "optimizer.state.", "model."])
def test_bytes_in_place_of_an_entry_are_not_loaded(entry, given, pickled, tmp_path, capsys):
    """What torch would load with weights_only=False."""
    file = pickled / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.startswith(entry))
    index = next(index for index in metadata.storage_data if index.fqn == name)
    info = metadata.storage_data.pop(index)
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    _, info.offset, info.length = append(pickled, executing(tmp_path))
    metadata.storage_data[MetadataIndex(name)] = info
    file.write_bytes(pickle.dumps(metadata))
    seal(pickled)
    refused("upgrade", given, tmp_path, capsys, f"{name} in {pickled / 'state'} is no plain value")


def index_of(step):
    return json.loads((step / "state" / "metadata.json").read_text())


DAMAGE = {
    "a list": lambda index: [],
    "null": lambda index: None,
    "no tensors": lambda index: index | {"tensors": None},
    "a file elsewhere": lambda index: moved(index, "../../../elsewhere.distcp"),
    "an absolute file": lambda index: moved(index, "/etc/passwd"),
    "an unknown type": lambda index: typed(index, "os"),
    "a larger type": lambda index: typed(index, "complex128"),
    "past the end": lambda index: moved(index, "__0_0.distcp", 1 << 50),
    "an absent file": lambda index: moved(index, "__7_0.distcp"),
    "a huge size": lambda index: sized(index, 1 << 61),
    "a negative size": lambda index: sized(index, -1),
    "a size as text": lambda index: sized(index, "32"),
}


def first(index):
    return next(tensor for name, tensor in index["tensors"].items() if name.startswith("model."))


def moved(index, file, start=0):
    first(index)["chunks"][0][2:4] = [file, start]
    return index


def typed(index, dtype):
    first(index)["dtype"] = dtype
    return index


def sized(index, size):
    first(index)["size"][0] = first(index)["chunks"][0][1][0] = size
    return index


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["train", "convert"])
def test_a_damaged_index_is_one_sentence(command, damage, given, step, tmp_path, capsys):
    index = DAMAGE[damage](index_of(step))
    (step / "state" / "metadata.json").write_text(json.dumps(index))
    seal(step)
    refused(command, given, tmp_path, capsys, "state/metadata.json is damaged")


def test_a_shard_that_is_a_link_out_of_the_checkpoint_is_refused(step, tmp_path):
    shard = step / "state" / "__0_0.distcp"
    shard.rename(tmp_path / "elsewhere.distcp")
    shard.symlink_to(tmp_path / "elsewhere.distcp")
    assert "leads out of the folder" in find_fault(step)


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a\0b"])
def test_a_manifest_names_files_of_its_checkpoint_alone(name, step, tmp_path):
    (tmp_path / "secret").write_text("s")
    manifest = json.loads((step / "manifest.json").read_text())
    (step / "manifest.json").write_text(json.dumps(manifest | {name: [1, zlib.crc32(b"s")]}))
    assert "the folder" in find_fault(step) or "no name" in find_fault(step)


def test_a_copy_of_a_checkpoint_under_another_step_is_not_continued(
    given, step, tmp_path, capsys, caplog
):
    shutil.copytree(step, step.with_name("step-00000900"))
    assert checkpoint.newest(tmp_path / "run") == step
    assert "named after step 900, and it is of step 3" in caplog.text
    shutil.rmtree(step)
    refused("train", given, tmp_path, capsys, "named after step 900, and it is of step 3")


def test_a_checkpoint_may_lie_under_a_name_of_its_own(given, step, tmp_path, capsys):
    step.rename(tmp_path / "best")
    mine = copy.deepcopy(given)
    config.set_path(mine, "logging.directory", str(tmp_path / "child"))
    config.set_path(mine, "training.start_from", str(tmp_path / "best"))
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(mine))
    assert cli.main(["train", str(tmp_path / "child.yaml")]) == 0, capsys.readouterr().err
    assert (Path(tmp_path) / "child" / "checkpoints" / "step-00000003").is_dir()
