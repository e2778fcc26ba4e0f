"""Pages in Markdown: sentences in a template, numbers in tables."""

from pathlib import Path
from typing import Any

import jinja2

from ..checkpoints.files import write_whole


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Fill a Jinja template; the file appears whole or not at all.

    Args:
        path: of the page.
        template: sentences and headings; `{{ table }}` stands for a `Table`.
        values: what the template names; a name without a value is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    write_whole(path, environment.get_template(template.name).render(values))
