"""The batch scripts that a person submits by hand, on the cluster: text to tokens to a model to a
file, and a benchmark."""

import json
import time

import pytest
import yaml
from safetensors.torch import load_file

from megaarch.ingest.tokenizer import train_sentencepiece
from tests.conftest import made_up_text
from tests.slurm.conftest import ROOT

pytestmark = [pytest.mark.timeout(1500), pytest.mark.xdist_group("slurm")]
PATIENCE = 600  # seconds, on a machine with much else to do


@pytest.fixture
def sbatch(cluster, launch, tmp_path, monkeypatch):
    """sbatch(NAME, OPTIONS, ARGUMENTS) submits launch/NAME.sbatch from the checkout; its id."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEGAARCH_LAUNCH", str(launch))

    def submit(name, options, arguments):
        log, script = tmp_path / f"{name}.log", launch / f"{name}.sbatch"
        command = ["sbatch", "--parsable", f"--output={log}", *options, str(script), *arguments]
        return cluster.run(*map(str, command))

    return submit


def test_each_script_does_its_work_over_nodes(cluster, sbatch, raw, tmp_path):
    texts = [made_up_text(seed, 12) for seed in range(60)]
    source, tokenizer = tmp_path / "text.jsonl", tmp_path / "t.model"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_sentencepiece(texts[:9], 400, 16, tokenizer)
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(raw))
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    over_two, tp2 = ["--nodes=2", "--ntasks-per-node=1"], "parallel.tensor_parallel=2"

    made = sbatch(
        "preprocess", over_two, ["--input", source, "--tokenizer", tokenizer, "--output", tokens]
    )
    own = [f"data.source={tokens}.bin", f"data.tokenizer={tokenizer}", "model.vocabulary_size=400"]
    settings = [tp2, f"logging.directory={run}", "training.steps=2", *own]
    trained = sbatch(
        "train", [*over_two, f"--dependency=afterok:{made}"], [config, "--set", *settings]
    )
    file = tmp_path / "model.safetensors"
    last = sbatch(
        "convert", [f"--dependency=afterok:{trained}"], [run, file, "--to", "safetensors"]
    )
    timed = sbatch(
        "benchmark",
        over_two,
        [config, "--set", tp2, "--presets", "gpt", "--repetitions", "1", "--output", tmp_path],
    )
    small = ["--masks", "causal", "--lengths", "24", "--tokens", "48", "--repetitions", "1"]
    alone = sbatch("attention", [], [*small, "--output", tmp_path])
    waited = ("squeue", "--noheader", f"--jobs={made},{trained},{last},{timed},{alone}")
    until = time.monotonic() + PATIENCE
    while cluster.run(*waited) and time.monotonic() < until:
        time.sleep(0.3)
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert file.exists(), (logs, cluster.logs())
    assert any(name.startswith("layers.1.") for name in load_file(file))
    (found,) = tmp_path.glob("*-scaling-cpu.json")
    result = json.loads(found.read_text())["results"][0]
    assert result["preset"] == "gpt" and result["ranks"] == 2, result
    (found,) = tmp_path.glob("*-attention-cpu.json")
    assert json.loads(found.read_text())["complete"], logs["attention"]
