"""Templates of promptsource (Bach et al. 2022): the `templates.yaml` of a dataset.

templates:
  <id>: !Template
    name: ...
    jinja: "input ||| target"
    answer_choices: "yes ||| no"        # or null
    metadata: !TemplateMetadata {...}
"""

from pathlib import Path

from pydantic import BaseModel

from megaarch.config.load import read_yaml
from megaarch.files import fit
from megaarch.ingest.tasks.template import Wording

TAGS = ("!Template", "!TemplateMetadata")


class _Template(BaseModel):
    name: str
    jinja: str
    answer_choices: str | None = None


class _Templates(BaseModel):
    templates: dict[str, _Template]


def wordings(task: str, path: Path) -> list[Wording]:
    """Returns the wordings of a file, in the order of their names. UserError for a file that is none
    of promptsource's."""
    found = fit(read_yaml(path, TAGS), _Templates, path).templates.values()
    return [
        Wording(task, one.name, one.jinja, one.answer_choices)
        for one in sorted(found, key=lambda one: one.name)
    ]
