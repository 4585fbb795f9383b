"""What site.sh, sbatch and a time limit say: read, or refused in one sentence."""

import os

import pytest

from megaarch.cluster import slurm_commands
from megaarch.cluster.slurm_commands import Site
from megaarch.errors import UserError


def test_a_site_that_is_not_there_or_incomplete_is_named(site_folder, tmp_path):
    with pytest.raises(ValueError, match=r"site\.sh does not exist: copy .*site\.example\.sh"):
        Site.read(tmp_path)
    (site_folder / "site.sh").write_text("GPUS_PER_NODE=8\nRANKS_PER_NODE=many\n")
    with pytest.raises(ValueError, match="RANKS_PER_NODE must be a number from 1, not 'many'"):
        Site.read(site_folder)
    numbers = "GPUS_PER_NODE=8 RANKS_PER_NODE=8 CPUS_PER_RANK=8\n"
    (site_folder / "site.sh").write_text(numbers)
    read = Site.read(site_folder)
    assert (read.warning_seconds, read.cpu_partition, read.cpu_options) == (300, "", ())
    for wrong, sentence in (
        ("soon", "must be a number from 1"),
        ("9" * 5000, "must be a number from 1"),  # int() takes 4,300 digits at most
        ("70000", "must be 65535 at most"),
    ):
        (site_folder / "site.sh").write_text(f"{numbers}WARNING_SECONDS={wrong}\n")
        with pytest.raises(ValueError, match=f"WARNING_SECONDS {sentence}"):
            Site.read(site_folder)
    (site_folder / "site.sh").write_text("module load cuda\n")
    with pytest.raises(ValueError, match=r"site\.sh fails \(code 127\).*: .*module"):
        Site.read(site_folder)


@pytest.mark.parametrize(
    "end, code",
    [
        ("exit", 0),
        ("exit 0", 0),
        ("exit 3", 3),
        ('trap "echo bye" EXIT; exit 0', 0),
        ("exec true", 0),
        ("exec bash", 0),  # which would read from the terminal
        ("return 4", 4),
        ("set -e; false", 1),
        ("[[ -d /absent ]] && source /absent/activate", 1),
    ],
)
def test_a_site_that_ends_its_shell_is_one_sentence(end, code, site_folder):
    file = site_folder / "site.sh"
    file.write_text(f"{file.read_text()}{end}\n")
    sentence = rf"site\.sh fails \(code {code}\): it must come to its end, without exit or exec"
    with pytest.raises(ValueError, match=sentence):
        Site.read(site_folder)
    file.write_text(file.read_text().replace(end, "echo loaded; return 0"))
    read = Site.read(site_folder)
    assert (read.gpus_per_node, read.cpu_partition) == (2, "cpu")


def test_what_a_sites_trap_prints_is_no_option(site_folder):
    file = site_folder / "site.sh"
    wanted = Site.read(site_folder)
    file.write_text(f"{file.read_text()}trap 'echo bye' EXIT\n")
    assert Site.read(site_folder) == wanted


def test_a_site_that_waits_or_never_ends_is_one_sentence(site_folder, monkeypatch):
    monkeypatch.setattr(slurm_commands, "PATIENCE", 1)
    (site_folder / "site.sh").write_text("while true; do :; done\n")
    with pytest.raises(UserError, match=r"site\.sh does not come to its end within 1 s"):
        Site.read(site_folder)
    (site_folder / "site.sh").unlink()
    os.mkfifo(site_folder / "site.sh")
    with pytest.raises(UserError, match=r"site\.sh is a pipe or a device"):
        Site.read(site_folder)


@pytest.mark.parametrize(
    "answer, number",
    [("12", 12), ("12;east", 12), ("welcome\n12;east\nbye", 12), ("", None), ("queued", None)],
)
def test_the_number_of_a_job_is_found_among_what_a_sites_sbatch_says(
    answer, number, site_folder, tmp_path, monkeypatch
):
    with (site_folder / "site.sh").open("a") as site:
        site.write("printf 'modules: '\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    site = Site.read(site_folder)
    if number is None:
        with pytest.raises(ValueError, match=f"no number of a job: {answer or 'modules:'}: sbatch"):
            slurm_commands.submit(site, ["sbatch"])
    else:
        assert slurm_commands.submit(site, ["sbatch"]) == number


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("2-12", 216000), ("1-0:30", 88200)],
)
def test_time_limits_as_sbatch_reads_them(text, seconds):
    assert slurm_commands.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:", "-1", "9" * 5000, f"1-{'9' * 5000}", "1:0:0:0"])
def test_a_time_limit_that_is_none_is_one_sentence(text):
    with pytest.raises(
        UserError, match=r"^--time .*: give it as hours:minutes:seconds or days-hours"
    ):
        slurm_commands.seconds(text)
