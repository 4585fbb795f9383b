"""What dialogue_cost.py counts is what generation runs, as torch counts and holds it; and dialogues by a
closed form."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaarch.attention import Parts, causal
from megaarch.attention.mask import CAUSAL
from megaarch.config import catalogue
from megaarch.data.example import SPECIALS, Converted, ConvertedStream
from megaarch.data.packing import pack
from megaarch.inference.decode import Decoding, Layout
from megaarch.inference.dialogue import Dialogue
from megaarch.inference.dialogue_cost import dialogue, policies
from megaarch.inference.generate import Generator, Options
from megaarch.inference.memory_traffic import cache_bytes, memory_traffic
from megaarch.inference.prompts import prompt
from megaarch.model import flops
from tests.data.toy_vocabulary import TEXT, toy_vocabulary
from tests.inference.models import GENERATING, made

VOCABULARY = toy_vocabulary(128 - (TEXT + len(SPECIALS)) % 128)  # no padded ids
TEXTS, ANSWERS, ROWS = (5, 7, 1), (4, 1, 6), 2
SIZE = torch.float32.itemsize


def model_of(preset, **options):
    return made(preset, torch.float32, vocabulary_size=VOCABULARY.size, **options)


def forms(settings):
    objective, architecture = settings.data.objective, settings.model.architecture
    return partial(prompt, objective, architecture, vocabulary=VOCABULARY)


def tokens(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(TEXT, size=n) for n in lengths]


def pairs(leave_out=()):
    """Each preset with each of its policies."""
    for preset in GENERATING:
        for policy in policies(forms(model_of(preset)[1]), np.arange(3)):
            if policy not in leave_out:
                yield pytest.param(preset, policy, id=f"{preset}-{policy}")


def run(model, settings, policy, before=lambda: None):
    """Runs a dialogue; yields each turn as counted, and its decoding once it has run. before: called
    before each turn."""
    texts, answers = tokens(TEXTS), tokens(ANSWERS)
    layout = Layout(torch.device("cpu"), catalogue.position_axes(settings.data.objective), 0)
    decoding = None
    for turn, answer in zip(
        dialogue(forms(settings), texts, answers, policy, ROWS), answers, strict=True
    ):
        before()
        with torch.no_grad():
            if turn.held == 0:
                decoding = Decoding(model, layout, [turn.prompt] * ROWS)
                decoding.start()
            else:
                decoding.counts = None
                decoding.go_on([turn.stream] * ROWS)
            for token in answer[:-1]:
                decoding.step(np.full(ROWS, token))
        yield turn, decoding


def visible_pairs_alone(q, k, v, parts: Parts, **_):
    """Attention as a matrix product of each query with the keys that it sees, and no others."""
    out = torch.zeros_like(q)
    for b in range(len(parts)):
        for shape, q0, q1, k0, k1 in parts.row(b):
            for i in range(q0, q1):
                stop = k1 - (q1 - 1 - i) if shape == CAUSAL else k1
                group = q.shape[2] // k.shape[2]
                keys, values = (
                    x[b, k0:stop].repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v)
                )
                scores = q[b, i][:, None] @ keys.transpose(1, 2)
                out[b, i] = (scores.softmax(-1) @ values)[:, 0]
    return out


def attentions(model):
    return [m for m in model.modules() if hasattr(m, "attend")]


@pytest.mark.parametrize(("preset", "policy"), pairs())
def test_flops_are_those_that_torch_counts(preset, policy):
    """torch counts products whole, so attention runs as products over the visible pairs."""
    model, settings = model_of(preset)
    for module in attentions(model):
        module.attend = visible_pairs_alone
    with FlopCounterMode(display=False) as counter:
        reached = 0
        for turn, decoding in run(model, settings, policy):
            assert decoding.counts == turn.counts
            done, reached = counter.get_total_flops() - reached, counter.get_total_flops()
            assert done == flops.forward(settings.model, turn.counts).total


@pytest.mark.parametrize(("preset", "policy"), pairs())
def test_cache_bytes_are_those_of_its_tensors(preset, policy):
    model, settings = model_of(preset)
    for turn, decoding in run(model, settings, policy):
        cache = decoding.cache
        assert cache.lengths.tolist() == [turn.kept] * ROWS
        slots = cache_bytes(settings.model, turn.axes, cache.slots, turn.memory, SIZE)
        assert ROWS * slots == cache.nbytes  # with the room that it has made
        named = [item for at in cache.layers.values() for item in at.tensors.items()]
        memory = [x for name, x in named if name.startswith("memory")]
        held = [cache.positions, *(x for name, x in named if not name.startswith("memory"))]
        used = sum(x[:, : turn.kept].nbytes for x in held) + sum(x.nbytes for x in memory)
        assert turn.cache_bytes(settings.model, SIZE) == used


class Moved:
    """Bytes that each call of a model reads of weights and of its cache, and that its products and attention
    read and write besides."""

    def __init__(self, model):
        self.found, self.encoder = [], range(model.stacks[-1].layers.start)
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end)
        for name, module in model.named_modules():
            if hasattr(module, "attend"):
                module.attend = partial(self.attend, module.attend, name)
            elif module is not model and len(list(module.parameters(recurse=False))):
                module.register_forward_hook(self.ran)
        model.sharding.logits = partial(self.logits, model.sharding.logits)

    def begin(self, *_):
        self.weights, self.looked_up, self.cache, self.activations = {}, 0, 0, 0

    def end(self, *_):
        weights = sum(self.weights.values()) + self.looked_up
        self.found.append((weights, self.cache, self.activations))

    def ran(self, module, inputs, out):
        if isinstance(module, torch.nn.Embedding):
            self.looked_up += out.nbytes
        else:
            self.read(*module.parameters(recurse=False))
        if isinstance(module, torch.nn.Linear):
            self.activations += inputs[0].nbytes + out.nbytes

    def read(self, *weights):
        self.weights |= {w.data_ptr(): w.nbytes for w in weights}

    def logits(self, right, hidden, weight, bias):
        out = right(hidden, weight, bias)
        self.read(*(p for p in (weight, bias) if p is not None))
        self.activations += hidden.nbytes + out.nbytes
        return out

    def attend(self, right, name, q, k, v, parts, bias=None, **options):
        if bias is not None:
            self.read(bias.table)
        seen = int(parts.dense().any(1).sum()) * (k[0, 0].nbytes + v[0, 0].nbytes)
        encodes = int(name.split(".")[1]) in self.encoder
        self.cache += 0 if encodes else seen
        out = right(q, k, v, parts, bias=bias, **options)
        self.activations += q.nbytes + out.nbytes + (seen if encodes else 0)
        return out


@pytest.mark.parametrize(
    ("preset", "encoding"),
    [
        (preset, encoding)
        for preset in GENERATING
        for encoding in ("rope", "learned", "relative")
        if (preset, encoding) != ("glm", "relative")  # which has one axis
    ],
)
def test_bytes_that_move_are_those_of_the_modules_tensors(preset, encoding):
    model, settings = model_of(preset, position_encoding=encoding, attention="reference")
    moved = Moved(model)
    for turn, _ in run(model, settings, "reuse", moved.found.clear):
        calls = [turn.prefill, *(turn.step(n + 1) for n in range(turn.steps))]
        given = [(turn.axes, c.counts, c.keys, c.memory, SIZE) for c in calls]
        assert moved.found == [memory_traffic(settings.model, *each) for each in given]


class Ids:
    """A tokenizer whose text is written in ids."""

    vocabulary = VOCABULARY

    def encode(self, text):
        return np.array(text.split(), dtype=np.int64)

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_turn_blocks_are_one_row_under_their_dense_mask():
    """Each answer's logits over the cache are those of the whole dialogue in one forward pass, where a token
    sees what came before it and a person's token all of its turn."""
    model, settings = made("prefix_lm", torch.float64, vocabulary_size=VOCABULARY.size)
    talk = Dialogue(Generator(model, settings, Ids()), Options(max_tokens=4), turn_blocks=True)
    cached = []
    hook = model.register_forward_hook(lambda module, given, logits: cached.append(logits[0]))
    row, turns = [talk.generator.prompt_of(np.array([TEXT])).stream.tokens[0]], [0]
    for turn, text in enumerate(tokens(TEXTS)):
        answer = talk.say(" ".join(map(str, text)))
        row += [*text, *answer.tokens]
        turns += [turn] * len(text) + [-1] * len(answer.tokens)  # -1: of no block
    hook.remove()
    place, of = torch.arange(len(row)), torch.tensor(turns)
    seen = (place <= place[:, None]) | ((of == of[:, None]) & (of >= 0))

    def dense(q, k, v, parts, scale=None, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2)

    stream = ConvertedStream(
        np.array(row), place.numpy()[:, None], [causal(0, len(row), 0, len(row))]
    )
    converted = Converted((stream,), *(np.zeros(1, dtype) for dtype in (int, int, np.float32)))
    batch = pack([[converted]], converted.shape, pad=0, axes=1, sample_index=[0])
    for module in attentions(model):
        module.attend = dense
    with torch.no_grad():
        whole = model.logits(batch)[0]
    asked = [i - 1 for i in range(1, len(row)) if turns[i] < 0]  # before each token of an answer
    assert len(cached) == len(asked) == 3 * 4
    torch.testing.assert_close(torch.stack(cached), whole[asked], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("turn_blocks", [False, True])
def test_a_dialogue_goes_on_where_a_prompt_was_interrupted(turn_blocks):
    """Before the first token of its answer, the likeliest moment for a person's Ctrl-C."""
    model, settings = model_of("prefix_lm")
    talk = Dialogue(Generator(model, settings, Ids()), Options(max_tokens=3), turn_blocks)
    first, second, third = (" ".join(map(str, text)) for text in tokens(TEXTS))
    talk.say(first)

    def interrupt(module, given):
        raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk.say(second)
    hook.remove()
    assert len(talk.say(third).tokens) == 3
    assert len(talk.history) == sum(TEXTS) + 2 * 3


@pytest.mark.parametrize(("preset", "policy"), pairs(leave_out=["recompute"]))
def test_a_dialogue_runs_what_is_counted(preset, policy):
    model, settings = model_of(preset)
    talk = Dialogue(
        Generator(model, settings, Ids()), Options(max_tokens=4), policy == "turn_blocks"
    )
    texts, last, before = tokens(TEXTS), None, None
    for text, turn in zip(
        texts, dialogue(forms(settings), texts, [np.arange(4)] * 3, policy), strict=True
    ):
        answer = talk.say(" ".join(map(str, text)))
        assert answer.finish == "length" and len(answer.tokens) == 4
        assert (talk.decoding is last) == (turn.held > 0)
        ran = talk.decoding.counts
        assert ran == (turn.counts if turn.held == 0 else before + turn.counts)
        assert talk.decoding.cache.lengths.tolist() == [turn.kept]
        last, before = talk.decoding, ran


def row(m, layers, n, pairs):
    """FLOPs of n tokens in a stack of self-attention and feed-forward, by docs/counting.md."""
    size = m.hidden_size // m.heads
    projections = 2 * m.hidden_size * m.heads * size + 2 * m.hidden_size * m.kv_heads * size
    feed_forward = 3 * m.hidden_size * m.feed_forward_size
    return 2 * n * layers * (projections + feed_forward) + 4 * layers * m.heads * size * pairs


def cross(m, n, memory):
    """Returns the FLOPs of a decoder's cross-attention: n tokens to an encoder's new output."""
    size = m.hidden_size // m.heads
    queries, keys = m.hidden_size * m.heads * size, m.hidden_size * m.kv_heads * size
    return m.layers * (
        2 * 2 * queries * n + 2 * 2 * keys * memory + 4 * m.heads * size * n * memory
    )


def closed(preset, policy, m, t, p, a):
    """FLOPs of turn t, from 1, of a dialogue whose turns have p tokens and answers a."""
    text = t * p + (t - 1) * a  # of the dialogue up to the answer
    head = 2 * a * m.hidden_size * m.vocabulary_size
    if preset == "gpt":  # behind a start token; the last token of an answer runs with the next turn
        end, begin = t * (p + a), (t - 1) * (p + a) if policy == "reuse" else 0
        return head + row(m, m.layers, end - begin, (end * (end + 1) - begin * (begin + 1)) // 2)
    if preset == "prefix_lm":
        new, seen = 1 + text, 1 + text
        pairs = new * new
        if policy == "turn_blocks" and t > 1:
            new, seen = 1 + p, t * p + (t - 1) * a + 1
            pairs = (
                p * seen + seen - p
            )  # the turn; the token that was not run, behind what was kept
        pairs += sum(seen + i for i in range(1, a))
        return head + row(m, m.layers, new + a - 1, pairs)
    # bart: p [MASK], and ^ p; t5: p' <k> eos, and ^ <0> .. <k> with the 3 of each 20 tokens that p' lacks
    spans = (text - 1) // 20
    t5 = (text - 3 * spans + spans + 2, 1 + 4 * spans + 1)
    encoder, decoder = t5 if preset == "t5" else (text + 1, 1 + text)
    decoder += a - 1
    return (
        head
        + row(m, m.layers, encoder, encoder**2)
        + row(m, m.layers, decoder, decoder * (decoder + 1) // 2)
        + cross(m, decoder, encoder)
    )


@pytest.mark.parametrize("sizes", [(1, 9, 4), (4, 9, 4), (3, 1, 1), (5, 17, 30)])
@pytest.mark.parametrize(
    ("preset", "policy"),
    [
        ("gpt", "recompute"),
        ("gpt", "reuse"),
        ("prefix_lm", "recompute"),
        ("prefix_lm", "reuse"),
        ("prefix_lm", "turn_blocks"),
        ("t5", "recompute"),
        ("t5", "reuse"),
        ("bart", "reuse"),
    ],
)
def test_a_dialogue_costs_what_its_closed_form_says(preset, policy, sizes):
    turns, p, a = sizes
    _, settings = model_of(preset)
    found = dialogue(forms(settings), tokens([p] * turns), tokens([a] * turns), policy)
    wanted = [closed(preset, policy, settings.model, t + 1, p, a) for t in range(turns)]
    assert [flops.forward(settings.model, turn.counts).total for turn in found] == wanted
