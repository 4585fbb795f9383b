"""`megaarch generate`: text from a trained run."""

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from megaarch.cli.errors import is_first_process
from megaarch.cli.options import RUN_HELP, Adder, set_argument
from megaarch.errors import UserError
from megaarch.files import parse_json, read_text

if TYPE_CHECKING:
    from megaarch.inference.generate import Answer, Generator, Options, Say


def add(command: Adder) -> None:
    generate = command(
        "Continue text with a trained run",
        "Each model continues in the conditional form of its objective; docs/inference.md.",
    )
    generate.add_argument("run", metavar="RUN", help=RUN_HELP)
    given = generate.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    given.add_argument(
        "--input",
        metavar="FILE",
        help='JSON lines with a "prompt" each; each comes out with its "text" beside it',
    )
    given.add_argument(
        "--chat", action="store_true", help="a dialogue at the terminal, line by line"
    )
    add = generate.add_argument
    add("--max-tokens", metavar="N", type=int, default=128, help="of an answer (default: 128)")
    add(
        "--temperature",
        metavar="T",
        type=float,
        help="0: the most likely token (default, unless --top-k or --top-p are given; then 1)",
    )
    add("--top-k", metavar="K", type=int, help="draw among the K most likely tokens")
    add(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="draw among the least set of tokens that holds this probability",
    )
    add(
        "--repetition-penalty",
        metavar="R",
        type=float,
        default=1.0,
        help="above 1: tokens of prompt and answer become less likely",
    )
    add("--seed", metavar="S", type=int, default=0, help="of the draws (default: 0)")
    add("--stop", metavar="TEXT", action="append", default=[], help="ends an answer; repeatable")
    add(
        "--batch-size",
        metavar="B",
        type=int,
        default=8,
        help="prompts that share steps (default: 8)",
    )
    add(
        "--chunk",
        metavar="N",
        type=int,
        help="tokens of a prompt run at a time, in causal decoders",
    )
    add("--turn-blocks", action="store_true", help="--chat: a prefix decoder keeps its cache")
    add("--tokenizer", metavar="FILE", help="the run's, where it is no longer where it was")
    add("--json", action="store_true", help="print JSON objects, with tokens and what ended them")
    set_argument(generate)


def run(options: argparse.Namespace) -> int:
    from megaarch.distributed import launch
    from megaarch.inference.generate import Generator, Options
    from megaarch.inference.sampling import Sampling

    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.seed
    )
    how = Options(
        options.max_tokens, sampling, tuple(options.stop), options.batch_size, options.chunk
    )
    records = None if options.input is None else read_prompts(options.input)
    if options.turn_blocks and not options.chat:
        raise UserError("--turn-blocks is a mask of dialogues: give --chat")
    generator = Generator.of_run(options.run, options.set, options.tokenizer)
    if options.chat:
        chat(generator, how, options.turn_blocks, options.json)
    elif records is not None:
        answer_all(generator, records, how)
    else:
        stream = None if options.json else streamed()
        (answer,) = generator.answers([options.prompt], how, stream)
        show({"prompt": options.prompt} | as_json(answer) if options.json else None)
    launch.leave()
    return 0


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines. UserError where one has no prompt."""
    records = []
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = parse_json(line, where)
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{where}: is not an object with a text "prompt"')
        if taken := ANSWER & record.keys():
            raise UserError(
                f"{where}: has a key {min(taken)!r}, under which the answer would be written: rename it"
            )
        records.append(record)
    if not records:
        raise UserError(f"{path} has no prompts: give a JSON object with a prompt on each line")
    return records


def answer_all(generator: "Generator", records: list[dict[str, Any]], how: "Options") -> None:
    """Prints each batch's answers as soon as they are there. A KeyboardInterrupt says how many these were."""
    answers, done = generator.answers([record["prompt"] for record in records], how), 0
    try:
        for record, answer in zip(records, answers, strict=True):
            show(record | as_json(answer))
            done += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{done} of {len(records)} prompts were answered") from None


ANSWER = {"text", "tokens", "finish"}


def as_json(answer: "Answer") -> dict[str, Any]:
    return {"text": answer.text, "tokens": len(answer.tokens), "finish": answer.finish}


def show(record: dict[str, Any] | None) -> None:
    """Prints a line: an object, or the end of what was streamed."""
    if not is_first_process():
        return
    line = "" if record is None else json.dumps(record, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, or a terminal without such letters
        line = json.dumps(record)
    print(line, flush=True)


def streamed() -> "Say | None":
    """Returns what prints pieces of an answer as they come; None in processes that do not print."""
    if not is_first_process():
        return None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal has no letters for
    return lambda number, piece: print(piece, end="", flush=True)


def chat(generator: "Generator", how: "Options", turn_blocks: bool, as_lines: bool) -> None:
    """A dialogue until the input ends. Ctrl-C ends an answer, and between answers the dialogue. A turn that
    cannot be answered is no part of it."""
    from megaarch.inference.dialogue import Dialogue

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a turn that is not UTF-8 is refused alone
    dialogue = Dialogue(generator, how, turn_blocks)
    grid = generator.grid  # a user may think for longer than a collective of its GPUs waits
    while (text := grid.share(ask() if grid.is_main else None, grid.host_group)) is not None:
        if not text.strip():
            continue
        try:
            answer = dialogue.say(text + "\n", None if as_lines else streamed())
            show({"prompt": text} | as_json(answer) if as_lines else None)
        except KeyboardInterrupt:
            show(None)
        except UserError as error:
            if is_first_process():
                print(f"megaarch: {error}", file=sys.stderr)


def ask() -> str | None:
    """Returns the next line at the terminal, None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
