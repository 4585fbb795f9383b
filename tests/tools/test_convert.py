"""Conversions by command: whole round trips, Hugging Face's own models as the oracle, and what is
refused."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from megaarch import cli, config
from megaarch.checkpoint import checkpoint
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.interchange import FAMILIES, files, verify
from megaarch.interchange.convert import settings_of
from megaarch.interchange.vocabulary import TABLES
from tests.interchange.models import MODELS, V
from tests.tools.conversions import PIECES, convert, saved

CLASS = {name: getattr(transformers, family.hf_class) for name, family in FAMILIES.items()}


@pytest.fixture(params=MODELS)
def theirs(request, words, tmp_path):
    """(folder, model) of a family, with its tokenizer beside it."""
    return saved(request.param, words, tmp_path / "theirs")


@torch.no_grad()
def logits(model, seed=5):
    tokens = torch.randint(0, PIECES, (2, 11), generator=torch.Generator().manual_seed(seed))
    given = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens.flip(1)
    return model.eval()(**given).logits[..., :PIECES]


def test_every_family_comes_in_and_goes_out_with_the_same_logits(theirs, tmp_path, capsys):
    folder, model = theirs
    assert convert(folder, tmp_path / "run", "--from", "hf") == 0
    out = capsys.readouterr().out
    assert "equal bit for bit" in out and "random tokens differ by at most" in out
    assert convert(tmp_path / "run", tmp_path / "back", "--to", "hf") == 0
    assert "random tokens differ by at most" in capsys.readouterr().out
    family = model.config.model_type
    again = CLASS[family].from_pretrained(tmp_path / "back", local_files_only=True)
    expected = logits(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    record = json.loads((tmp_path / "back" / "config.json").read_text())
    assert record["eos_token_id"] == PIECES + 2  # behind the pieces, where training has it
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_weights_go_out_in_bf16_and_in_files_of_a_bounded_size(
    theirs, tmp_path, capsys, monkeypatch
):
    folder, model = theirs
    assert convert(folder, tmp_path / "run", "--from", "hf") == 0
    monkeypatch.setattr(files, "SHARD", 9_000)
    given = ("--to", "hf", "--dtype", "bfloat16", "--verify")
    assert convert(tmp_path / "run", tmp_path / "back", *given) == 0
    said = capsys.readouterr().out
    assert "equal bit for bit" in said and "random tokens differ by at most" in said
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and not (tmp_path / "back" / "model.safetensors").exists()
    assert shards[-1].name == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    size, owners = 0, {}
    for shard in shards:
        tensors = load_file(shard)
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        own = sum(t.nbytes for t in tensors.values())
        assert own <= 9_000 or len(tensors) == 1
        size, owners = size + own, owners | dict.fromkeys(tensors, shard.name)
    assert index == {"metadata": {"total_size": size}, "weight_map": owners}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert convert(tmp_path / "back", tmp_path / "again", "--verify") == 0
    kept, rounded = (files.read_checkpoint(tmp_path / name).weights for name in ("run", "again"))
    for name, weight in kept.items():  # rows of padding do not go out
        rows = weight[: len(rounded[name])].bfloat16().float()
        same = rounded[name][: len(rows)] == rows
        assert same.all() or (name in TABLES and not rows[~same].any())
    again = CLASS[model.config.model_type].from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16


def test_a_prefix_decoder_is_said_to_run_with_a_causal_mask_elsewhere(run, tmp_path, capsys):
    for preset, said in (("prefix_lm", True), ("gpt", False)):
        folder, _ = run(preset, logging__directory=str(tmp_path / preset))
        assert convert(folder, tmp_path / f"{preset}-hf", "--to", "hf") == 0
        lines = capsys.readouterr().out.splitlines()
        told = [line for line in lines if "LlamaForCausalLM has a causal mask" in line]
        assert len(told) == said


def test_weights_in_several_files_and_under_old_names(words, tmp_path):
    whole, _ = saved("gpt2", words, tmp_path / "whole")
    shards, _ = saved("gpt2", words, tmp_path / "shards", max_shard_size="9KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    old, _ = saved("bert", words, tmp_path / "old")
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare)
    tensors = load_file(whole / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    named = load_file(old / "model.safetensors")
    parts = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, former in parts.items():
        named = {name.replace(new, former): t for name, t in named.items()}
    runs = {}
    for name, source in (("whole", whole), ("shards", shards), ("bare", bare), ("old", old)):
        if name == "old":
            assert convert(source, tmp_path / "new", "--from", "hf") == 0
            save_file(named, source / "model.safetensors", {"format": "pt"})
        assert convert(source, tmp_path / f"run-{name}", "--from", "hf", "--verify") == 0
        runs[name] = files.read_checkpoint(tmp_path / f"run-{name}").weights
    for name in ("shards", "bare"):
        verify.check_tensors(runs["whole"], runs[name], name)
    verify.check_tensors(runs["old"], files.read_checkpoint(tmp_path / "new").weights, "old")


def test_specials_start_from_the_models_own_and_the_rest_from_the_mean(words, tmp_path):
    folder, model = saved("t5-v1.1", words, tmp_path / "theirs")
    assert convert(folder, tmp_path / "run", "--sentinels", "4") == 0
    weights, record = files.read_checkpoint(tmp_path / "run")
    settings = settings_of(record)
    words = Tokenizer(folder / "tokenizer.json", 4, settings.model.vocabulary_size).vocabulary
    assert words.size == PIECES + 12 + 4
    for ours, table in (
        ("embedding.weight", model.shared.weight),
        ("output.weight", model.lm_head.weight),
    ):
        rows, table = weights[ours], table.detach()
        assert len(rows) == 256 and not rows[words.size :].any()
        assert torch.equal(rows[:PIECES], table[:PIECES])
        same = {words.pad: 0, words.bos: 0, words.eos: 1, words.mask: 3, words.sentinel(0): 4}
        for ours_id, theirs_id in same.items():
            assert torch.equal(rows[ours_id], table[theirs_id])
        for row in (words.query, words.sentinel(3)):
            torch.testing.assert_close(rows[row], table[:PIECES].mean(0))


@pytest.mark.parametrize("name", ["llama", "t5-v1.1", "bert"])
def test_training_starts_from_a_hugging_face_model(name, words, tmp_path, capsys):
    folder, _ = saved(name, words, tmp_path / "theirs")
    assert convert(folder, tmp_path / "run") == 0
    text = tmp_path / "text.jsonl"
    rows = [" ".join(f"word{(n * k) % 130}" for k in range(1, 60)) for n in range(1, 60)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    given = [f"data.source={text}", f"data.cache={tmp_path / 'cache'}", "training.steps=1"]
    given += ["model.sequence_length=20", "training.device=cpu", "logging.tensorboard=false"]
    start = str(tmp_path / "run" / "start.yaml")
    mine = [*given, f"logging.directory={tmp_path / 'mine'}", "training.learning_rate=1e-20"]
    assert cli.main(["train", start, "--set", *mine]) == 0
    parent = files.read_checkpoint(tmp_path / "run").weights
    child = files.read_checkpoint(tmp_path / "mine").weights
    assert parent.keys() == child.keys()
    for key, tensor in parent.items():  # the one step is too small to be seen
        torch.testing.assert_close(child[key], tensor, atol=1e-12, rtol=1e-6)
    there = [*given, f"logging.directory={tmp_path / 'run'}"]
    assert cli.main(["train", start, "--set", *there]) == 2
    assert "holds weights alone and cannot be continued" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["glm", "t5", "xlnet"])
def test_one_file_and_back_is_exact_for_any_preset(preset, run, tmp_path, capsys):
    folder, settings = run(preset)
    file = tmp_path / "deep" / "model.safetensors"
    assert convert(folder, file, "--to", "safetensors", "--verify") == 0
    assert convert(file, tmp_path / "again", "--verify") == 0
    assert capsys.readouterr().out.count("equal bit for bit") == 2
    before, after = (files.read_checkpoint(path) for path in (folder, tmp_path / "again"))
    verify.check_tensors(before.weights, after.weights, "again")
    assert before.record.raw() | {"weights_only": True} == after.record.raw()
    assert checkpoint.newest(tmp_path / "again").name == checkpoint.newest(folder).name
    assert settings_of(after.record).model == settings.model
    assert list(load_file(file)) == sorted(before.weights)


YARN = {"kind": "yarn", "factor": 2.0, "original_length": 24}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_length": 24}


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("gpt", {}),
        ("prefix_lm", {}),
        ("gpt", {"model__rope_scaling": YARN}),
        ("gpt", {"model__rope_scaling": LLAMA3, "model__activation": "geglu"}),
    ],
)
def test_our_decoders_go_out_as_llama_and_come_back_as_they_were(
    preset, given, run, tmp_path, capsys
):
    folder, settings = run(preset, **given)
    assert convert(folder, tmp_path / "hf", "--to", "hf", "--verify") == 0
    assert convert(tmp_path / "hf", tmp_path / "back", "--verify") == 0
    before, after = (files.read_checkpoint(path) for path in (folder, tmp_path / "back"))
    size = settings.model.vocabulary_size
    for name, tensor in before.weights.items():
        rows = slice(size if name == "embedding.weight" else None)
        assert torch.equal(after.weights[name][rows], tensor[rows])
    again = settings_of(after.record)
    assert again.model.architecture == settings.model.architecture
    assert again.model.rope_scaling == settings.model.rope_scaling
    assert again.data.objective == settings.data.objective
    assert after.record.tokenizer.fingerprint == before.record.tokenizer.fingerprint
    start = yaml.safe_load((tmp_path / "back" / "start.yaml").read_text())
    assert config.resolve(start).model == again.model


def test_what_does_not_fit_a_family_is_told_all_at_once(run, tmp_path, capsys):
    folder, _ = run("t5", model__output_bias=True)
    assert convert(folder, tmp_path / "hf", "--to", "hf") == 2
    error = capsys.readouterr().err
    assert error.count("convert.py:") == 1 and "this is no t5 model" in error
    for name in (
        "attention_scale is 0.35",
        "output_bias",
        "kv_heads is 2",
        "position_encoding is rope",
    ):
        assert f"model.{name}" in error
    assert "hidden_size" not in error
    for family in ("gpt2", "llama", "bert", "bart"):
        assert convert(folder, tmp_path / "hf", "--to", "hf", "--family", family) == 2
        assert f"{family} has" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_two_position_axes_and_two_streams_have_no_family(run, tmp_path, capsys):
    folder, _ = run("glm", logging__directory=str(tmp_path / "glm"))
    assert convert(folder, tmp_path / "hf", "--to", "hf") == 2
    assert "its positions have 2 axes" in capsys.readouterr().err
    folder, _ = run("xlnet", logging__directory=str(tmp_path / "xlnet"))
    assert convert(folder, tmp_path / "hf", "--to", "hf") == 2
    assert "no Hugging Face family here has the architecture two_stream" in capsys.readouterr().err


def test_damaged_and_missing_files_are_named(words, tmp_path, capsys):
    folder, _ = saved("gpt2", words, tmp_path / "theirs", max_shard_size="9KB")
    index = folder / "model.safetensors.index.json"
    good, given = index.read_text(), json.loads((folder / "config.json").read_text())
    owners = json.loads(good)["weight_map"]
    first = sorted(set(owners.values()))[0]

    def told(what, *more):
        assert convert(folder, tmp_path / "run", *more) == 2
        error = capsys.readouterr().err
        assert what in error and error.count("convert.py:") == 1
        assert not (tmp_path / "run").exists()
        return error

    told("has 140 pieces", "--tokenizer", words) if V < PIECES else None
    told("/nowhere does not exist", "--tokenizer", "/nowhere")
    index.write_text("{}")
    told("index.json is damaged")
    index.write_text(json.dumps({"weight_map": owners | {"more.weight": first}}))
    told("lacks more.weight")
    index.write_text(json.dumps({"weight_map": owners | {"more.weight": "more.safetensors"}}))
    told("more.safetensors does not exist")
    index.write_text(good)
    (folder / first).write_bytes((folder / first).read_bytes()[:-3])
    told("cannot be read as safetensors")
    index.unlink()
    told("the weights are missing")
    (folder / "pytorch_model.bin").write_bytes(b"")
    told("pytorch_model.bin is a pickle")
    folder, _ = saved("gpt2", words, folder)
    for changes, said in (
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": ["gpt2"]}, "model_type ['gpt2']"),
        ({"n_embd": None}, "n_embd of this Hugging Face config must be a whole number"),
        ({"n_head": "three"}, "n_head of this Hugging Face config must be a whole number"),
        ({"n_head": 5}, "does not divide"),
        ({"vocab_size": V - 50}, "wte.weight [150, 24] does not make embedding.weight"),
        ({"vocab_size": V + 50}, "it has 150 rows and vocab_size is 200"),
        ({"megaarch": ["gpt"]}, "megaarch has to be an object"),
        ({"megaarch": {"preset": "gtp"}}, "megaarch.preset 'gtp' is none of gpt,"),
        ({"megaarch": {"sentinels": "4"}}, "megaarch.sentinels has to be a number"),
        ({"megaarch": {"sentinels": 2**63}}, "a number from 0 to 1,048,576, not 9223"),
    ):
        (folder / "config.json").write_text(json.dumps(given | changes))
        assert str(folder) in told(said)
    (folder / "config.json").write_text("[]")
    told("config.json holds no JSON object")
    del given["n_layer"]
    (folder / "config.json").write_text(json.dumps(given))
    told("weights lack transformer.h.")  # transformers' default is twelve layers
    (folder / "config.json").write_text("{")
    told("config.json is not JSON")


def test_a_tokenizer_of_another_model_or_none_is_told(words, tmp_path, capsys):
    folder, _ = saved("gpt2", words, tmp_path / "theirs")
    backend = Backend(WordLevel({f"w{n}": n for n in range(V + 1)}, unk_token="w0"))
    backend.save(str(tmp_path / "large.json"))
    given = ["--tokenizer", tmp_path / "large.json"]
    assert convert(folder, tmp_path / "run", *given) == 2
    assert "151 pieces and the model a vocabulary of 150" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert convert(folder, tmp_path / "run") == 2
    assert "give --tokenizer FILE" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_mistakes_are_one_sentence_and_exit_code_2(run, tmp_path, capsys):
    folder, _ = run()
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for arguments, said in (
        (("/nowhere", tmp_path / "x"), "/nowhere does not exist"),
        ((tmp_path / "empty", tmp_path / "x"), "has no complete checkpoint"),
        ((folder, tmp_path / "empty"), "empty exists"),
        ((tmp_path / "foreign.safetensors", tmp_path / "x"), "no megaarch record"),
        ((tmp_path / "empty", tmp_path / "x", "--from", "hf"), "it has no config.json"),
        ((folder, tmp_path / "x", "--dtype", "bfloat16"), "--dtype bfloat16: is for --to hf"),
        ((folder, tmp_path / "x", "--sentinels", "-1"), "--sentinels must be from 0 to"),
        (
            (folder, tmp_path / "x", "--sentinels", "2000000"),
            "--sentinels must be from 0 to 1,048,576",
        ),
    ):
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("convert.py:") == 1 and "Traceback" not in error
    newest = checkpoint.newest(folder)
    (newest / "progress.json").write_text("{}")
    assert convert(newest, tmp_path / "x") == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_cell_is_named_by_its_study(run, tmp_path, capsys):
    folder, _ = run()
    study = tmp_path / "study"
    cell = study / "cells" / "gpt" / "base-1e+10-seed0"
    cell.parent.mkdir(parents=True)
    folder.rename(cell)
    (study / "study.yaml").touch()
    assert convert(study / "gpt", tmp_path / "gpt.safetensors", "--to", "safetensors") == 0
    assert convert(study / "t5", tmp_path / "x") == 2
    assert f"names no runs of the study {study}" in capsys.readouterr().err
    assert convert(study, tmp_path / "x") == 2
    assert f"is a study: give one of them:\n  {cell}" in capsys.readouterr().err


def test_a_safetensors_file_with_a_damaged_record_is_named(run, tmp_path, capsys):
    folder, _ = run()
    file = tmp_path / "model.safetensors"
    record = files.read_checkpoint(folder).record.raw()
    good = json.dumps(record)
    for text, said in (
        ("{}", "the megaarch record is damaged: progress: Field required"),
        ("[]", "the megaarch record is damaged: the file: "),
        ("", "the megaarch record is not JSON"),
        (json.dumps(record | {"settings": []}), "settings: "),
        (json.dumps(record | {"tokenizer": {}}), "tokenizer.path: "),
        (json.dumps(record | {"progress": {"step": "2nd"}}), "progress.step: "),
        (json.dumps(record | {"settings": record["settings"] | {"model": []}}), "settings.model: "),
    ):
        save_file({"a": torch.zeros(1)}, file, {files.KEY: text})
        for to in ("checkpoint", "hf"):
            assert convert(file, tmp_path / "x", "--to", to) == 2
            error = capsys.readouterr().err
            assert said in error and str(file) in error and error.count("convert.py:") == 1
            assert not (tmp_path / "x").exists()
    save_file({"a": torch.zeros(1)}, file, {files.KEY: good})
    assert files.read_safetensors(file).record.raw() == record


def test_a_run_without_its_tokenizer_file_goes_out_without_special_ids(run, tmp_path, capsys):
    folder, _ = run()
    weights, record = files.read_checkpoint(folder)
    record.tokenizer.path = str(tmp_path / "gone.model")
    files.write_checkpoint(tmp_path / "moved", files.Saved(weights, record))
    assert convert(tmp_path / "moved", tmp_path / "hf", "--to", "hf", "--verify") == 0
    assert "without tokenizer and special ids" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None
