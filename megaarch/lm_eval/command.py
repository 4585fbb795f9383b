"""`lm_eval` with our models known to it, and what goes wrong there in one sentence."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from megaarch.errors import UserError

NETWORK = (
    "huggingface_hub",
    "requests",
    "urllib3",
    "httpx",
    "httpx2",
    "httpcore",
    "datasets",
    "aiohttp",
)
# raised by lm_eval or datasets
OF_ARGUMENTS = (ValueError, KeyError, FileNotFoundError, RuntimeError)
CONFIRMED = "--confirm_run_unsafe_code"
MISSING = "lm-evaluation-harness is missing: pip install 'megaarch[lm-eval]'"


def run_lm_eval(arguments: Sequence[str]) -> int:
    """Runs `lm_eval` with these arguments; returns its exit code. UserError where it is missing, where a
    task or its data cannot be reached, and for what it says of its arguments."""
    before, sys.argv = sys.argv, ["lm_eval", *arguments]  # which it reads
    try:
        with told():
            register()
            from lm_eval.__main__ import cli_evaluate

            with restricted(confirmed=CONFIRMED in arguments):
                cli_evaluate()
    finally:
        sys.argv = before
    return 0


def register() -> None:
    """Makes the model `megaarch` known to lm_eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(MISSING) from None
    import megaarch.lm_eval.model  # noqa: F401


@contextmanager
def restricted(confirmed: bool = False) -> Iterator[None]:
    """Has tasks run no Python of files outside lm_eval's package, unless that is confirmed, and templates
    reach no attribute that jinja's sandbox keeps from them. UserError for a task that would."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.tasks import _yaml_loader

    load, environment = _yaml_loader._import_func_in_yml, lm_eval.utils.env
    package = Path(lm_eval.__file__).resolve().parent

    def imported(name: str, folder: Path) -> Any:
        if not confirmed and not folder.resolve().is_relative_to(package):
            raise UserError(
                f"a task in {folder} runs the function {name}: read its code, and give {CONFIRMED} to "
                "megaarch lm-eval to run it"
            )
        return load(name, folder)

    sandbox = SandboxedEnvironment(undefined=environment.undefined, keep_trailing_newline=True)
    sandbox.filters = environment.filters
    _yaml_loader._import_func_in_yml, lm_eval.utils.env = imported, sandbox
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml, lm_eval.utils.env = load, environment


@contextmanager
def told() -> Iterator[None]:
    """Turns an error of the harness over a user's task, data or arguments into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _sentence(error: BaseException) -> str | None:
    """Returns what a user can mend; None for a bug."""
    said = " ".join(str(error).split())[:300]
    chain: BaseException | None = error
    while chain is not None:
        room = type(chain).__module__.partition(".")[0]
        if room in NETWORK or isinstance(chain, ConnectionError):
            return (
                f"a task's data cannot be reached or read ({said}): give tasks whose data lies in local files "
                "(docs/tasks.md), or fill the cache of datasets on a machine with network"
            )
        if room == "jinja2":
            return f"lm_eval: a task's template cannot be rendered: {said}"
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, OF_ARGUMENTS) and _of_harness(error):
        return f"lm_eval: {said}"
    return None


def _of_harness(error: BaseException) -> bool:
    """Whether lm_eval or datasets raised it, and not a file of ours that they called."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    rooms = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    known = [room for room in rooms if room in ("lm_eval", "datasets", "megaarch")]
    return bool(known) and known[-1] != "megaarch"
