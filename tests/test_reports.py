"""Tables and pages of everything that measures."""

from pathlib import Path

import jinja2
import pytest

from flashsloth.reports.page import write_page
from flashsloth.reports.table import MEGA, Column, Table


def test_columns_read_and_write_values():
    columns = (
        Column("name", lambda item: item["name"]),
        Column("millions", lambda item: item.get("count"), ",.1f", MEGA),
        Column("share", lambda item: item.get("share"), lambda share: f"{share:.0%}"),
    )
    table = Table.of("Sizes", columns, [{"name": "a|b", "count": 2_500_000_000}, {"name": "c", "share": 0.25}])
    assert table.columns == ("name", "millions", "share")
    # what is not known is no zero
    assert table.rows == [("a|b", "2,500.0", "-"), ("c", "-", "25%")]
    assert str(table) == (
        "**Sizes**\n\n| name | millions | share |\n| --- | ---: | ---: |\n| a\\|b | 2,500.0 | - |\n| c | - | 25% |"
    )


def test_a_page_is_whole_or_as_it_was(tmp_path: Path):
    template, page = tmp_path / "page.md.jinja", tmp_path / "page.md"
    template.write_text("# {{ title }}\n\n{{ table }}\n")
    write_page(page, template, title="Sizes", table=Table("", ("a", "b"), [("x", "1")], texts=2))
    written = page.read_text()
    assert written == "# Sizes\n\n| a | b |\n| --- | --- |\n| x | 1 |\n"
    with pytest.raises(jinja2.UndefinedError, match="'table' is undefined"):
        write_page(page, template, title="Sizes")
    assert page.read_text() == written
