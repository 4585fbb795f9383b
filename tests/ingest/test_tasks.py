"""Tasks: what wordings make of items, what is read of promptsource, and items of the documentation."""

import json
import random
from itertools import islice

import pytest

from megaarch.errors import UserError
from megaarch.ingest import corpus, embedded_corpus, sources, split
from megaarch.ingest.lines import Shard
from megaarch.ingest.tasks import documentation, promptsource
from megaarch.ingest.tasks.task import Task, find, shuffled
from megaarch.ingest.tasks.template import Question, Wording, with_shots

SHIPPED = "configs/tasks"
COPA = """
dataset: super_glue
subset: copa
templates:
  4d879cbe-2fd7-424a-9d78-3f5200313fba: !Template
    answer_choices: "{{choice1}} ||| {{choice2}}"
    id: 4d879cbe-2fd7-424a-9d78-3f5200313fba
    jinja: "{{ premise }} Why? ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics: [Accuracy]
    name: why
    reference: ''
  66ea075e-4d03-4a78-b1fa-9a5228cf0c9d: !Template
    answer_choices: null
    id: 66ea075e-4d03-4a78-b1fa-9a5228cf0c9d
    jinja: "Tell a story. ||| {{ premise }}"
    metadata: !TemplateMetadata {}
    name: a story
"""
ITEM = {"premise": "It rained.", "choice1": "Clouds came.", "choice2": "It shone.", "label": 0}


def wording(prompt: str, choices: str | None = None) -> Wording:
    return Wording("copa", "plain", prompt, choices)


def task(folder, name="copa", **more):
    """A task of JSON lines in `folder`."""
    (folder / "test.jsonl").write_text("\n".join(json.dumps(ITEM | {"n": i}) for i in range(5)))
    (folder / "train.jsonl").write_text(json.dumps(ITEM | {"premise": "It froze."}) + "\n\n")
    said = {
        "summary": "Why?",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "wordings": [
            {
                "name": "plain",
                "prompt": "{{ premise }} Why? ||| {{ answer_choices[label] }}",
                "choices": "{{ choice1 }} ||| {{ choice2 }}",
            }
        ],
    }
    path = folder / f"{name}.task.yaml"
    path.write_text(json.dumps(said | more))  # JSON is YAML
    return path


def test_a_wording_makes_a_question_of_an_item():
    asked = wording(
        "{{ premise }}  Why? ||| {{ answer_choices[label] }}", "{{ choice1 }}|||{{ choice2 }}"
    ).question(ITEM)
    assert asked == Question("It rained.  Why?", "Clouds came.", ("Clouds came.", "It shone."), 0)
    assert wording("{{ premise }} ||| yes").question(ITEM) == Question("It rained.", "yes")
    assert wording("{{ premise }} ||| {% if label %}x{% endif %}").question(ITEM) is None


def test_examples_stand_before_a_question_with_their_answers():
    shots = [Question("One?", "1"), Question("Two?", "2")]
    found = with_shots(Question("Three?", "3", ("3", "4"), 0), shots)
    assert found.input == "One? 1\n\nTwo? 2\n\nThree?" and found.choices == ("3", "4")


@pytest.mark.parametrize(
    "prompt, choices, said",
    [
        ("{{ premise }}", None, "a prompt is input ||| target, and this one has 1 parts"),
        ("{{ nothing }} ||| x", None, "'nothing' is undefined"),
        ("{{ premise ||| x", None, "task copa, wording plain: expected token"),
        ("{{ premise }} ||| x", "a ||| b", "the target 'x' must be one of its choices"),
        ("{{ premise }} ||| a", "a ||| a", "which differ: 'a', 'a'"),
        ("{{ premise.__class__.__mro__ }} ||| x", None, "access to attribute"),
        ("{{ 'a' * 10 ** 9 }} ||| x", None, r"the operator \*\* is not for templates"),
        ("{{ 'a' * 1000000000 }} ||| x", None, r"the operator \* is not for templates"),
        ("{% for i in range(99999) %}{{ premise * 1 }}{% endfor %} ||| x", None, "operator"),
        ("{% for i in range(99999) %}{{ premise }} {{ i }}{% endfor %} ||| x", None, "1,048,576"),
        ("{% include 'x' %} ||| x", None, "no loader"),
        ("{{ 1 / 0 }} ||| x", None, "division by zero"),
        ("{{ premise | nonsense }} ||| x", None, "No filter named 'nonsense'"),
    ],
)
def test_what_a_wording_may_not_say_is_one_sentence(prompt, choices, said):
    with pytest.raises(UserError, match=said):
        wording(prompt, choices).question(ITEM)


DOUBLINGS = (
    "x ~ x",
    "x + x",
    "x ~ 'b' ~ x",
    "[x, x]",
    "[x, x] | join",
    "x | replace('a', 'aa' ~ x)",
)


@pytest.mark.parametrize(
    "prompt",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in [1] | map('string') %}{% for j in zip(range(99999)) %}{% for k in zip(range(999)) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(40) }}",
        *("{% set x = 'a' %}" + ("{% set x = " + how + " %}") * 60 for how in DOUBLINGS),
        "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
        "{% set n = namespace(x='a') %}" + "{% set n.x = n.x ~ n.x %}" * 60,
        "{% set x = [1] %}" + "{% set x = x + x %}" * 60,
        "{% set x = 9 %}" + "{% set x = x * x %}" * 60,
        *(
            "{{ " + call + " }}"
            for call in (
                "'x' | center(5000000000)",
                "['x'] | map('center', 5000000000) | list",
                "'x'.ljust(5000000000)",
                "('x' | attr('zfill'))(5000000000)",
                "(5).to_bytes(5000000000, 'big')",
                "[1] | batch(5000000000, 'x') | list",
                "[1] | slice(5000000000) | list",
                "premise | indent(5000000000)",
                "'\t'.expandtabs(5000000000)",
            )
        ),
    ],
    ids=lambda prompt: prompt[:90],
)
def test_work_without_an_end_is_refused(prompt):
    with pytest.raises(UserError, match="it takes too much work"):
        wording(prompt + " ||| x").question(ITEM)


@pytest.mark.parametrize(
    "text", ["'%5000000000d' % 1", "'%*d' | format(5000000000, 1)", "'{:{}}'.format(1, 5000000000)"]
)
def test_a_width_without_bound_is_refused(text):
    with pytest.raises(UserError, match="such a width is not for templates"):
        wording("{{ " + text + " }} ||| x").question(ITEM)


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "1 + " * 20000 + "1 }}", "nested too deeply"),
        ("{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "nested too deeply"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{{ [1] | dictsort }}", "no attribute 'items'"),
        ("{{ premise | truncate(-5) }}", "expected length"),
        ("{% macro f(a, a) %}{% endmacro %}", "duplicate argument"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "blocks are not for templates"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ '{0.__class__}'.format(premise) }}", "access to attribute"),
        ("{{ premise | attr('__class__') }}", "access to attribute"),
    ],
    ids=lambda text: text[:60],
)
def test_what_a_template_may_raise_is_one_sentence(prompt, said):
    with pytest.raises(UserError, match=said):
        wording(prompt + " ||| x").question(ITEM)


def test_what_templates_of_promptsource_do_is_not_refused():
    item = {"text": "one two\n" * 3000, "pairs": [[n, "b"] for n in range(200)], "big": 331002651}
    prompts = {
        "{{ text | replace('one', 'another number') | truncate(1000, true) | length }}": "1000",
        "{% set n = namespace(found=0) %}{% for a, b in pairs %}{% set n.found = n.found + a %}"
        "{% if loop.last %}{{ loop.length }}{% endif %}{% endfor %} {{ n.found }}": "200 19900",
        "{{ '{:,} of {}'.format(big, pairs | length) }} {{ '%s' | format(big) }}": (
            "331,002,651 of 200 331002651"
        ),
        "{{ pairs | map(attribute=0) | select('odd') | list | length }}": "100",
        "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(big) }}": "<331002651>",
        "{% if nothing is defined %}a{% endif %}{{ nothing | default('b') }}": "b",
        "{{ text.split()[:2] | join(' ') }} {{ dict(zip('ab', [1, 2])).items() | list }}": (
            "one two [('a', 1), ('b', 2)]"
        ),
    }
    for prompt, wanted in prompts.items():
        assert wording(prompt + "||| x").question(item).input == wanted


def test_promptsource_is_read_as_it_is(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(COPA)
    story, why = promptsource.wordings("copa", path)
    assert why.question(ITEM).choices == ("Clouds came.", "It shone.")
    assert why.question(ITEM | {"label": -1}) is None  # a test set without labels
    assert story.question(ITEM) == Question("Tell a story.", "It rained.")


@pytest.mark.parametrize(
    "text, said",
    [
        ("templates: {a: !Template {name: x}}", "jinja: Field required"),
        ("templates: {a: !!python/object/apply:os.system [true]}", "could not determine a constr"),
        ("templates: {a: !Other {name: x, jinja: y}}", "could not determine a constructor"),
        ("rows: []", "templates: Field required"),
    ],
)
def test_a_file_that_is_no_promptsource_is_refused(tmp_path, text, said):
    path = tmp_path / "templates.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        promptsource.wordings("copa", path)


def test_a_task_of_json_lines(tmp_path):
    found = Task(task(tmp_path))
    assert found.name == "copa" and len(found.test) == 5
    assert list(found.pairs()) == [("It froze. Why?", "Clouds came.")]
    [first, *_] = found.questions(found.wordings[0], 2, 0)
    assert first.input == "It rained. Why?"
    [first, second] = found.questions(found.wordings[0], 2, 1)
    assert first.input == second.input == "It froze. Why? Clouds came.\n\nIt rained. Why?"
    with pytest.raises(UserError, match="2 examples were asked for, and it has 1"):
        found.questions(found.wordings[0], 2, 2)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"data": {"train": "train.jsonl"}}, "data: give either documentation, or test"),
        ({"data": {"test": "../away.jsonl"}}, "away.jsonl"),
        ({"data": {"test": "none.jsonl"}}, "none.jsonl"),
        ({"wordings": []}, "wordings: give one or more"),
        ({"wording": []}, "wording: Extra inputs"),
        ({"summary": 3}, "summary: Input should be a valid string"),
    ],
)
def test_a_task_that_cannot_be_read_is_one_sentence(tmp_path, more, said):
    path = task(tmp_path, **more)
    with pytest.raises((UserError, OSError), match=said):
        Task(path).test  # noqa: B018


def test_a_bad_record_is_named_by_its_line(tmp_path):
    path = task(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(UserError, match="test.jsonl, line 2: it is no JSON"):
        Task(path).test  # noqa: B018


def test_a_record_may_hold_what_unicode_calls_a_line_s_end(tmp_path):
    path = task(tmp_path)
    record = json.dumps(ITEM | {"premise": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "test.jsonl").write_text(record + "\r\n")
    assert [item["premise"] for item in Task(path).test] == ["a\u2028b\x85c"]


def test_tasks_are_a_source_of_pairs(tmp_path):
    path = task(tmp_path)
    assert corpus.kind(str(tmp_path / "*.task.yaml")) == "supervised"
    assert list(corpus.read(Shard(path), corpus.PAIR)) == [("It froze. Why?", "Clouds came.")]
    with pytest.raises(UserError, match="is a task, whose items are pairs"):
        list(corpus.read(Shard(path)))
    before = sources.identity(str(path))
    (tmp_path / "train.jsonl").write_text(json.dumps(ITEM) + "\n" * 9)
    assert sources.identity(str(path)) != before


def test_what_is_no_task_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "x.yaml"):
        with pytest.raises(UserError, match="is no task and no folder of tasks"):
            find(str(path))


def test_shipped_tasks_ask_what_can_be_asked_in_every_wording():
    tasks = find(SHIPPED)
    assert len(tasks) >= 8
    assert {t.file.data.documentation for t in tasks} == set(documentation.TASKS)
    for found in tasks:
        assert len(found.wordings) >= 2 and len(found.train) >= 300 and len(found.test) >= 30
        for one in found.wordings:
            questions = [one.question(fields) for fields in (*found.train, *found.test)]
            assert all(q.choices[q.answer] == q.target for q in questions)
            answers = {q.answer for q in questions}
            assert answers == set(range(len(questions[0].choices)))  # every place is right at times


def test_held_out_items_come_from_documents_that_every_split_holds_out():
    texts = {name: split.place(split.digest(text)) for name, text in embedded_corpus.documents()}
    train, test = (documentation.documents(side) for side in (False, True))
    assert all(texts[document.name] < documentation.HELD_OUT for document in test)
    assert all(texts[document.name] >= documentation.FARTHEST for document in train)
    known = {sentence for document in test for sentence in document.sentences}
    asked = documentation.items("next_sentence", held_out=True)
    assert all(set(item["choices"]) <= known for item in asked)


def test_items_are_the_same_in_every_process():
    first = documentation.items("missing_word", held_out=True)
    documentation.items.cache_clear()
    assert documentation.items("missing_word", held_out=True) == first
    with pytest.raises(
        UserError, match="the documentation has no task 'x': it has name_to_summary"
    ):
        documentation.items("x", held_out=True)


@pytest.mark.parametrize("items, shots", [(1, 1), (7, 7), (5000, 3)])
def test_examples_are_drawn_as_a_sample_of_all_is(items, shots):
    drawn = list(islice(shuffled(range(items), "a 7"), shots))
    assert drawn == random.Random("a 7").sample(range(items), items)[:shots]


@pytest.mark.parametrize(
    "text",
    [
        "'" + "%(a)999999d" * 300 + "' | format(a=1)",
        "'" + "%999999d" * 300 + "' % " + repr((1,) * 300),
        "'" + "{0:999999}" * 300 + "'.format(1)",
        repr([1] * 300) + " | tojson(indent=999999)",
        repr([[[[1] * 300]]]) + " | tojson(indent=99999)",
    ],
    ids=lambda text: text[:20] + text[-20:],
)
def test_widths_add_up(text):
    with pytest.raises(UserError, match="it takes too much work"):
        wording("{% if " + text + " %}{% endif %} ||| x").question(ITEM)
