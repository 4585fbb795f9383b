"""Steps of the presets run once for all checks; what they found is printed at the end, and written as
JSON: pytest tests/fake_cuda --account FILE"""

from pathlib import Path

import pytest

from tests.fake_cuda import account, step

MODES = {"eager": ["training.compile=false"], "compiled": ["training.compile=true"]}
FOUND: dict[str, dict[str, dict]] = {mode: {} for mode in MODES}


def pytest_addoption(parser):
    parser.addoption("--account", type=Path, help="where to write the account of all steps, JSON")


@pytest.fixture(scope="session")
def measured():
    """measured(preset, mode): the record of a step at 1.3 billion parameters."""

    def of(preset: str, mode: str) -> dict:
        if preset not in FOUND[mode]:
            settings = step.benchmark(preset, MODES[mode])
            FOUND[mode][preset] = account.record(step.run(settings))
        return FOUND[mode][preset]

    return of


def pytest_terminal_summary(terminalreporter, config):
    for mode, presets in FOUND.items():
        if presets:
            terminalreporter.section(f"a step on one H200 by account, {mode}")
            terminalreporter.write_line(account.HEADER)
            for preset, found in presets.items():
                terminalreporter.write_line(account.line(preset, found))
    path = config.getoption("--account", None)
    if path and any(FOUND.values()):
        account.write(path, FOUND)
