"""docs/frameworks.md says what docs/frameworks.yaml has evidence for."""

from pathlib import Path

import yaml

DOCS = Path(__file__).parents[1] / "docs"
MASKS = ("causal", "packed", "prefix", "bidirectional", "encoder_decoder", "two_stream")


def test_the_table_says_what_the_evidence_says():
    frameworks = yaml.safe_load((DOCS / "frameworks.yaml").read_text())["frameworks"]
    lines = (DOCS / "frameworks.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    rows = {name: of_masks for name, _, *of_masks in cells[2:]}
    assert rows == {f["name"]: [f["masks"][mask] for mask in MASKS] for f in frameworks}
    for framework in frameworks:
        assert set(framework["evidence"]) == set(MASKS)
        assert set(framework["masks"].values()) <= {"fused", "dense", "flex", "no", "unknown"}
