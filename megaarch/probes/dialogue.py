"""What the turns of a dialogue cost a model, counted and not measured: docs/inference.md."""

from functools import partial

from megaarch.config.catalogue import OBJECTIVES
from megaarch.evaluation.record_schema import Record
from megaarch.inference.dialogue_cost import dialogue, policies
from megaarch.inference.memory_traffic import cache_bytes
from megaarch.inference.prompts import prompt
from megaarch.model import flops
from megaarch.probes.catalogue import Options
from megaarch.probes.probed_model import Subject
from megaarch.study.describe import made_up_tokens, made_up_vocabulary

TURNS = 8
SENTINELS = 100  # enough for a prompt of 2,000 tokens in T5's form; the model may have fewer
ELEMENT = 2  # bytes of a number in the cache: bf16


class Dialogue(Record):
    """tokens: of each turn and of each answer. flops: of each turn, by policy (inference/dialogue_cost.py).
    prompt_bytes_per_token, answer_bytes_per_token: what the cache keeps of each, in bf16; None, with no flops,
    where the model cannot generate."""

    tokens: int
    flops: dict[str, list[int]]
    prompt_bytes_per_token: float | None = None
    answer_bytes_per_token: float | None = None


def measure(subject: Subject, options: Options) -> Dialogue:
    """Counts a dialogue of TURNS turns, of half a row's tokens each and as long an answer."""
    model, objective = subject.settings.model, subject.settings.data.objective
    length = max(options.length_of(subject) // 2, 1)
    if not OBJECTIVES[objective].comparable:
        return Dialogue(tokens=length, flops={})
    vocabulary = made_up_vocabulary(model.vocabulary_size, SENTINELS)
    row = made_up_tokens(vocabulary, length)
    form = partial(prompt, objective, model.architecture, vocabulary=vocabulary)
    texts = [row] * TURNS
    found = {policy: list(dialogue(form, texts, texts, policy)) for policy in policies(form, row)}
    first = found["recompute"][0]
    kept = cache_bytes(model, first.axes, first.kept - first.steps, first.memory, ELEMENT)
    return Dialogue(
        tokens=length,
        flops={
            policy: [flops.forward(model, turn.counts).total for turn in turns]
            for policy, turns in found.items()
        },
        prompt_bytes_per_token=kept / length,
        answer_bytes_per_token=cache_bytes(model, first.axes, 1, 0, ELEMENT),
    )
