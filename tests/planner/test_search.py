"""What the planner lists runs; what it cannot do, it says in one sentence."""

import copy
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from megaarch import config
from megaarch.cli import main
from megaarch.config import ConfigError
from megaarch.config.schema import Parallel
from megaarch.model.parameter_count import parameter_count
from megaarch.parallel.validate import check
from megaarch.planner import display
from megaarch.planner.cells import cells
from megaarch.planner.hardware import gpu, hardware
from megaarch.planner.search import candidates, search
from megaarch.planner.time import Cluster, Seconds, step_seconds
from megaarch.study.describe import describe
from megaarch.training.memory_check import in_words

PRESETS = ("gpt", "t5", "xlnet", "glm")


@pytest.fixture
def planned(raw):
    mine = copy.deepcopy(raw)
    mine["model"] |= {"layers": 6, "hidden_size": 512, "heads": 8, "feed_forward_size": 1408}
    mine["training"] |= {"global_batch_size": 64, "precision": "bf16"}
    return mine


@pytest.mark.parametrize("preset", PRESETS)
def test_no_listed_layout_is_refused_and_all_fit(preset, planned):
    planned["model"]["preset"] = preset
    cluster = Cluster(gpu("h100"))
    plans = search(config.resolve(planned), 16, cluster)
    assert len(plans) > 20
    for plan in plans:
        check(plan.settings, 16)
        config.resolve(plan.settings.model_dump(exclude={"study"}))
        assert plan.memory.total <= cluster.room(plan.settings.parallel)
        assert 0 < plan.mfu < 1 and plan.steps and plan.gpu_hours > 0
    times = [plan.seconds.total for plan in plans]
    assert times == sorted(times)


def test_no_candidate_is_refused_whatever_the_model(planned):
    draw = random.Random(0)
    for _ in range(6):
        planned["model"] |= {
            "preset": draw.choice(PRESETS),
            "layers": draw.randint(1, 7),
            "heads": draw.choice([2, 4, 8]),
            "feed_forward_size": draw.choice([1408, 1000, 1022]),
        }
        planned["training"]["global_batch_size"] = draw.choice([24, 64, 96])
        settings = config.resolve(planned)
        for found in candidates(settings, 8, Cluster(gpu("a100")), Counter()):
            check(found, 8)  # ConfigError, if it is


def tried(planned, gpus, cluster):
    """The layouts of one pipeline stage that are looked at."""
    found = candidates(config.resolve(planned), gpus, cluster, Counter())
    parallel = {plan.parallel for plan in found}
    return [each for each in parallel if each.pipeline_parallel == 1]


def test_shards_fill_a_node_or_some_nodes_or_all(planned):
    """A gather over 1,024 ranks is slow, and copies of what a node holds send more than they need."""
    found = tried(planned, 32, Cluster(gpu("h100")))
    for tensor, shards in ((1, {8, 16, 32}), (4, {2, 4, 8})):
        mine = [each for each in found if each.tensor_parallel == tensor]
        assert {each.data_parallel_shard for each in mine} == shards
        assert all(each.data_ranks == 32 // tensor for each in mine)


@pytest.mark.parametrize(
    ("length", "contexts"), [(4096, {1}), (8192, {1, 2, 4}), (65536, {1, 2, 4, 8})]
)
def test_long_rows_are_split_within_a_node_and_very_long_ones_over_nodes(length, contexts, planned):
    planned["model"] |= {"sequence_length": length, "heads": 16}
    found = tried(planned, 16, Cluster(gpu("a100"), 4))
    assert {each.context_parallel for each in found} == contexts


@pytest.mark.parametrize("preset", PRESETS)
def test_batches_in_tokens_have_room_in_every_layout(preset, planned):
    """17,001 tokens: rows that divide by nothing."""
    planned["model"]["preset"] = preset
    del planned["training"]["global_batch_size"]
    planned["training"]["global_batch_tokens"] = 17_001
    settings = config.resolve(planned)
    rows = 17_001 / describe(settings, "").seen_tokens_per_row
    plans = search(settings, 16, Cluster(gpu("h100")))
    assert len(plans) > 20
    for plan in plans:
        check(plan.settings, 16)
        training, parallel = plan.settings.training, plan.settings.parallel
        data = parallel.data_parallel_shard * parallel.data_parallel_replicate
        count = training.global_batch_size // (training.micro_batch_size * data)
        assert rows <= training.global_batch_size <= rows + 1 + count * data


def test_a_run_takes_what_is_listed_though_zero_bubble_cannot_be_compiled(planned):
    planned["model"] |= {"layers": 12, "hidden_size": 1024, "feed_forward_size": 2816}
    planned["model"] |= {"sequence_length": 512}
    small = Cluster(gpu("h100").model_copy(update={"memory": 8}))
    free = search(config.resolve(planned), 8, small)
    assert "zero_bubble" in {plan.settings.parallel.schedule for plan in free}
    planned["training"]["compile"] = True
    plans = search(config.resolve(planned), 8, small)
    assert plans and "zero_bubble" not in {plan.settings.parallel.schedule for plan in plans}
    assert {plan.settings.parallel.recompute for plan in plans} > {"none"}
    for plan in plans:
        config.resolve(plan.settings.model_dump(exclude={"study"}))


def test_a_slower_network_never_makes_a_step_faster(planned):
    settings = config.resolve(
        planned | {"parallel": {"data_parallel_shard": 8, "pipeline_parallel": 2}}
    )
    fast = gpu("h100")
    slow = fast.model_copy(update={"network": fast.network / 10})
    times = [step_seconds(settings, Cluster(kind, 4)).total for kind in (fast, slow)]
    assert times[0] < times[1]


def test_nodes_whose_gpus_share_a_network_port_are_planned_as_such(planned, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(planned))
    found = []
    for more in ([], ["--network", "50"], ["--network", "1"]):
        assert main(["plan", str(path), "--gpus", "32", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["plans"][0]["seconds"]["total"])
    assert found[0] == found[1] < found[2]  # an H100's own, and a slower one


def test_recomputation_trades_time_for_memory(planned):
    from megaarch.planner.memory import step_memory

    found = []
    for recompute in ("none", "selective", "full"):
        given = {"data_parallel_shard": 8, "recompute": recompute}
        settings = config.resolve(planned | {"parallel": given})
        found.append(
            (step_memory(settings).activations, step_seconds(settings, Cluster(gpu("h100"))).total)
        )
    memory, seconds = zip(*found, strict=True)
    assert memory[0] > memory[1] > memory[2]
    assert seconds[0] < seconds[1] < seconds[2]


def test_seconds_add_up_and_the_limit_is_the_dearest():
    found = Seconds(products=5.0, tensor=2.0, bubble=3.0)
    assert found.total == 10.0 and found.limit == "bubble"


def test_the_command_prints_layouts_and_json(planned, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(planned))
    ask = ["plan", str(path), "--gpus", "8", "--gpu", "a100", "--top", "3"]
    assert main(ask) == 0
    text = capsys.readouterr().out
    assert "--set parallel.tensor_parallel=" in text
    assert all(len(line) <= 110 for line in text.partition("\n\n")[0].splitlines())
    assert main([*ask, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert len(plans) == 3
    assert plans[0]["seconds"]["total"] <= plans[1]["seconds"]["total"]
    assert plans[0]["memory"]["total"] == pytest.approx(
        sum(v for k, v in plans[0]["memory"].items() if k != "total")
    )


@pytest.fixture
def study(planned, tmp_path):
    """Writes a study of two presets, changed by `given`; returns its path."""
    del planned["training"]["steps"]
    cells = [{"name": "gpt", "preset": "gpt"}, {"name": "t5-of-a-long-name", "preset": "t5"}]

    def write(**given):
        path = tmp_path / "study.yaml"
        whole = {"budgets": [1e15], "cells": cells} | given
        path.write_text(yaml.safe_dump(planned | {"study": whole}))
        return str(path)

    return write


def test_a_study_has_one_layout_a_cell(study, capsys):
    assert main(["plan", study(), "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == ["cell", "gpt", "t5-of-a-long-name"]
    assert len({line.index(word) for line, word in zip(lines, ("layout", "dp8", "dp8"))}) == 1


def test_a_study_is_summed_over_cells_and_seeds(study, capsys):
    ask = ["plan", study(seeds=[0, 1, 2]), "--gpus", "8"]
    ask += ["--set", "training.save_every=1", "training.keep_checkpoints=2"]
    assert main([*ask, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hours = {plan["name"]: plan["hours"] for plan in found["plans"]}
    assert all(plan["steps"] > 1 for plan in found["plans"])
    whole = found["study"]
    assert whole["runs"] == 6 and whole["sweep_gpu_hours"] == 0
    assert whole["hours"] == pytest.approx(3 * sum(hours.values()))
    assert whole["gpu_hours"] == pytest.approx(8 * whole["hours"])
    assert whole["longest"] == max(hours, key=lambda name: hours[name])
    assert whole["longest_hours"] == max(hours.values())
    of_study = cells(config.read_yaml(ask[1])).values()
    weights = sum(parameter_count(cell.settings.model, 1) for cell in of_study)
    assert whole["disk"] == 3 * 2 * 3 * 4 * weights  # seeds, checkpoints, AdamW's copies, fp32
    assert main(ask) == 0
    text = capsys.readouterr().out
    assert "all 6 runs: " in text and f"the longest: {whole['longest']}, " in text
    assert f"checkpoints that stay: {in_words(whole['disk'])}" in text


def test_a_sweep_is_summed_apart(study, capsys):
    tune = {"learning_rates": [1e-3, 2e-3, 4e-3], "budget": 0.1}
    ask = ["plan", study(seeds=[0, 1], tune=tune), "--gpus", "8"]
    assert main([*ask, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["study"]
    assert found["sweep_gpu_hours"] == pytest.approx(3 * 0.1 * found["gpu_hours"] / 2)
    assert main(ask) == 0
    assert "their sweep before that: " in capsys.readouterr().out


def test_a_cell_that_goes_on_takes_its_own_budget_alone(study, capsys):
    goes_on = {"set": {"training.start_optimizer": True}, "from": "gpt", "budget": 2.5e14}
    parts = [{"name": "gpt", "preset": "gpt"}, {"name": "more", "preset": "gpt"} | goes_on]
    assert main(["plan", study(cells=parts), "--gpus", "8", "--json"]) == 0
    first, more = (plan["steps"] for plan in json.loads(capsys.readouterr().out)["plans"])
    assert more == pytest.approx(first / 4, abs=1)


@pytest.mark.parametrize(
    ("name", "mib", "torch"),  # nvidia-smi's total; GiB in all by torch's out-of-memory message
    [
        ("a100", 81920, 79.15),
        ("a100-40gb", 40960, 39.39),
        ("h100", 81559, 79.10),
        ("h200", 143771, 139.72),
        ("b200", 183359, 178.35),
    ],
)
def test_tensors_may_take_what_a_process_and_its_communicators_leave(name, mib, torch):
    kind, constants = gpu(name), hardware().constants
    assert kind.memory == pytest.approx(mib * 2**20 / 1e9, abs=0.005)
    cluster = Cluster(kind)
    assert cluster.room() < torch * 2**30 - 0.5e9  # a context beside them
    alone = Parallel()
    assert cluster.room(alone) == cluster.room()
    left = [cluster.room(Parallel(data_parallel_shard=8))]
    left.append(cluster.room(Parallel(data_parallel_shard=8, tensor_parallel=2)))
    each = constants.communicator * 1e9 * (1 - constants.fragments)
    assert cluster.room() - left[0] == pytest.approx(2 * each)  # its axis, and all ranks
    assert left[0] - left[1] == pytest.approx(each)


def test_columns_of_small_and_of_large_plans_stand_apart(planned):
    plan = search(config.resolve(planned), 8, Cluster(gpu("a100")))[0]

    def words(seconds, steps):
        found = replace(plan, seconds=Seconds(products=seconds), steps=steps)
        return len(display.line("name", found, 4).split())

    usual = words(1.0, 100)
    assert {words(t, n) for t in (3.4567e-4, 1.2345e-7, 1.2345e5) for n in (1, 10**7)} == {usual}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "8", "--gpu", "h10"], "did you mean h100?"),
        (["--gpus", "12"], "does not divide into nodes of 8"),
        (["--gpus", "8", "--set", "training.global_batch_size=12"], "do not divide"),
        # no number of data-parallel ranks divides the batch, each for a reason of its own number
        (
            ["--gpus", "504", "--set", "training.global_batch_size=512"],
            "512 rows do not divide among",
        ),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "-8"], "--gpus -8: must be at least 1"),
        (["--gpus", "8", "--set", "training.precision=fp32"], "set it to bf16"),
        (["--gpus", "8", "--set", "parallel.engine=deepspeed"], "set it to torch"),
        (["--gpus", "8", "--set", "parallel.zero_stage=2"], "parallel.zero_stage is DeepSpeed's"),
        (["--gpus", "8", "--top", "0"], "--top 0"),
        (["--gpus", "8", "--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--gpus", "8", "--network", "0"], "--network 0: must be above 0"),
        (["--gpus", "8", "--network", "nan"], "--network nan: must be above 0"),
        (["--gpus", "1", "--set", "model.hidden_size=32768", "model.layers=96"], "nothing fits"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, planned, tmp_path, capsys):
    if "training.global_batch_size=12" in arguments:
        planned["training"]["micro_batch_size"] = 4
        planned["model"]["heads"] = 1
        planned["model"]["feed_forward_size"] = 1409  # nothing but data parallelism is left
        planned["model"]["layers"] = 1
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(planned))
    assert main(["plan", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "8", "--gpu", "h10"], "did you mean h100?"),
        (["--gpu", "h10"], "did you mean h100?"),
        (["--set", "training.precision=fp32"], "set it to bf16"),
        (["--set", "parallel.engine=deepspeed"], "set it to torch"),
        (["--gpus", "8", "--set", "parallel.engine=deepspeed"], "set it to torch"),
    ],
)
def test_a_dry_run_of_what_the_planner_has_no_figures_of_is_refused(
    arguments, sentence, planned, tmp_path, capsys
):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(planned))
    assert main(["dry-run", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error


def test_dry_run_names_the_nearest_cell(planned, tmp_path, capsys):
    del planned["training"]["steps"]
    planned["study"] = {"budgets": [1e15], "cells": [{"name": "gpt", "preset": "gpt"}]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(planned))
    assert main(["dry-run", str(path), "--cell", "gtp"]) == 2
    assert "did you mean gpt?" in capsys.readouterr().err


def test_a_layout_that_does_not_fit_is_no_dry_run(planned):
    from megaarch.planner.dry_run import dry_run

    with pytest.raises(ConfigError, match="heads"):
        dry_run(config.resolve(planned | {"parallel": {"tensor_parallel": 16}}))


@pytest.mark.parametrize("command", ["plan", "dry-run"])
def test_rows_beyond_the_learned_positions_are_refused_as_a_run_refuses_them(
    command, planned, tmp_path, capsys
):
    planned["model"] |= {"preset": "bart", "position_encoding": "learned"}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(planned))
    assert main([command, str(path), "--gpus", "2"]) == 2
    error = capsys.readouterr().err
    assert "48 positions are fewer than the 56 tokens of a row that denoising makes" in error
