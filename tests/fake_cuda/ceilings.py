"""What a step of each preset may cost at most: ceilings.yaml, which is only ever lowered.

python -m tests.fake_cuda.ceilings build/account.json      writes it from an account, plus 5%
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("ceilings.yaml")
MARGIN = 1.05


def read() -> dict[str, Any]:
    """By mode (eager, compiled) and preset: kernels, gigabytes, compiled graphs, waits by phase and
    name; date and torch: of the account that they come from."""
    return yaml.safe_load(FILE.read_text())


def above(found: dict[str, Any], ceiling: dict[str, Any]) -> list[str]:
    """A sentence for each figure of an account's record that is above its ceiling."""
    figures = {"kernels": found["kernels"], "gigabytes": found["bytes"] / 1e9}
    figures["graphs"] = found["graphs"]
    over = [(name, figure, ceiling[name]) for name, figure in figures.items()]
    over += [(at, count, ceiling["waits"].get(at, 0)) for at, count in found["waits"].items()]
    return [f"{name}: {is_:.0f}, at most {most}" for name, is_, most in over if is_ > most]


def main() -> None:
    account = json.loads(Path(sys.argv[1]).read_text())
    made: dict[str, Any] = {name: account[name] for name in ("date", "torch")}
    for mode in ("eager", "compiled"):
        made[mode] = {
            preset: {
                "kernels": math.ceil(MARGIN * found["kernels"]),
                "gigabytes": math.ceil(MARGIN * found["bytes"] / 1e9),
                "graphs": found["graphs"],
                "waits": found["waits"],
            }
            for preset, found in account[mode].items()
        }
    FILE.write_text(yaml.safe_dump(made, sort_keys=False))


if __name__ == "__main__":
    main()
