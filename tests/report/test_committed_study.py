"""The study whose record is committed: docs/findings.md says what its page says."""

import re
from pathlib import Path

import pytest

from megaarch.probes import catalogue
from megaarch.report.evidence import evidence
from megaarch.study.results import Results

RECORD = Path("benchmarks/2026-11-29-why-decoder-only")


@pytest.fixture(scope="module")
def arguments():
    return evidence(Results.read(RECORD / "results.json"), catalogue.read(RECORD))


def test_every_answer_of_the_findings_is_the_record_s(arguments):
    rows = re.findall(r"^\| (\d) \|[^|]*\| ([^|]*) \|", Path("docs/findings.md").read_text(), re.M)
    assert rows == [(str(a.number), a.verdict.answer) for a in arguments]


def test_the_committed_page_says_the_same(arguments):
    page = (RECORD / "report.html").read_text()
    for argument in arguments:
        assert argument.verdict.found.replace("'", "&#39;") in page
