"""A benchmark whose process crashes, hangs or loses the GPU: what is reported, and that the rest runs."""

import json
import os
import signal
import time

import pytest

from megaarch.errors import UserError
from tools.throughput import isolate, pytest_cases
from tools.throughput.isolate import isolated
from tools.throughput.record import Event, Record

NAMES = ("a", "b", "c")


def once(how, lost, deadline):
    """A benchmark of three things, the second of which goes wrong."""
    for name in NAMES:
        event = Event({"name": name})
        yield event
        if event.key in lost:
            yield event._replace(result={"wrong": lost[event.key]})
            continue
        if name == "b":
            if how == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif how == "exit":
                os._exit(7)
            elif how == "hang":
                time.sleep(600)
            elif how == "gpu":
                raise isolate.DeviceLost("an illegal memory access")
            elif how == "unexpected":
                raise KeyError("nobody has seen this")
        yield event._replace(result={"ms": 1.0})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("crash", "its process was ended by SIGSEGV"),
        ("exit", "its process ended with exit code 7"),
        ("hang", "its process gave no sign of life for 1 s"),
        ("gpu", "its process lost the GPU: an illegal memory access"),
        ("unexpected", "its process ended with exit code 1"),
    ],
)
def test_what_is_lost_is_reported_and_the_rest_runs(how, reason):
    events = list(isolated(once, (how,), None, patience=1.0))
    found = {event.head["name"]: event.result for event in events if event.result}
    assert found == {"a": {"ms": 1.0}, "b": {"wrong": reason}, "c": {"ms": 1.0}}


def test_past_its_deadline_a_process_is_ended(monkeypatch):
    monkeypatch.setattr(isolate, "expired", lambda deadline: True)
    events = list(isolated(once, ("hang",), None, patience=1.0))
    assert [event.result for event in events if event.result] == [
        {"ms": 1.0},
        {"unfinished": "out of time"},
    ]


def mistaken(lost, deadline):
    yield from ()
    raise UserError("no such mask")


def test_a_mistake_is_told_as_in_one_process():
    with pytest.raises(ValueError, match="no such mask"):
        list(isolated(mistaken, (), None))


def test_a_record_is_whole_while_results_come(tmp_path, monkeypatch):
    """What a killed run leaves can be read, and says that it is not complete."""
    monkeypatch.setattr("tools.throughput.record.EVERY", 0.0)
    record = Record("attention", {}, tmp_path, "prefix")
    record.take(Event({"name": "a"}))
    assert not list(tmp_path.iterdir())
    for ms in (2.0, 1.0):
        record.take(Event({"name": "a"}, {"ms": ms}))
        (path,) = tmp_path.iterdir()
        found = json.loads(path.read_text())
        assert found["results"] == [{"name": "a", "ms": ms}] and not found["complete"]
    record.write(complete=True)
    assert json.loads(path.read_text())["complete"] and "-prefix-" in path.name


TESTS = """
import os, signal, time
import pytest

def test_right(): pass
@pytest.mark.skip(reason="no such kernel")
def test_skipped(): pass
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
def test_wrong(): assert 1 == 2, "dq is off"
def test_exit(): os._exit(3)
@pytest.mark.parametrize("n", [1, 2])
def test_last(n): pass
"""


def outcomes(folder, text, **options):
    path = folder / "test_it.py"
    path.write_text(text)
    found = {}
    for head, result in pytest_cases.run([str(path)], options.pop("deadline", None), **options):
        if result is not None:
            found[head["test"].rpartition("::")[2]] = result
    return found


def test_each_test_has_its_outcome_though_others_crash(tmp_path):
    found = outcomes(tmp_path, TESTS)
    assert {name: r["outcome"] for name, r in found.items()} == {
        "test_right": "passed",
        "test_skipped": "skipped",
        "test_crash": "failed",
        "test_wrong": "failed",
        "test_exit": "failed",
        "test_last[1]": "passed",
        "test_last[2]": "passed",
    }
    assert found["test_skipped"]["skipped"] == "no such kernel"
    assert found["test_crash"]["wrong"] == "its process was ended by SIGSEGV"
    assert found["test_exit"]["wrong"] == "its process ended with exit code 3"
    assert "dq is off" in found["test_wrong"]["wrong"]


ORDER = """
import pytest

@pytest.mark.parametrize("kernel", ["proven", "new"])
@pytest.mark.parametrize("n", [1, 2])
def test_case(n, kernel): pass
def test_auto(): pass
"""


def test_all_cases_of_a_kernel_run_together(tmp_path):
    found = [name.removeprefix("test_") for name in outcomes(tmp_path, ORDER)]
    assert found == ["auto", "case[1-proven]", "case[2-proven]", "case[1-new]", "case[2-new]"]


def test_a_test_that_hangs_is_stopped(tmp_path):
    text = "import time\ndef test_hang(): time.sleep(600)\ndef test_next(): pass\n"
    found = outcomes(tmp_path, text, patience=1.0)
    assert found["test_hang"]["wrong"] == "its process was stopped after 1 s without an outcome"
    assert found["test_next"]["outcome"] == "passed"


def test_a_file_that_does_not_import_is_a_failure(tmp_path):
    found = outcomes(tmp_path, "import nothing_of_this_name\n")
    (result,) = found.values()
    assert "nothing_of_this_name" in result["wrong"] and "Traceback" in result["details"]
