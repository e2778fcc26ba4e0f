"""Receipts and tables as office programs print them: laid out by ReportLab, drawn by PDFium. For the test split only.

It asks what `web` asks of such pages, of another layout, another text renderer and other fonts.
Needs `pip install 'flashsloth[draw]'`; without ReportLab's fonts PDFium takes its own.
"""

import io
import random
from typing import Any

from PIL import Image

from .augment import augment
from .colours import COLOURS, RGB, choose_ink, luminance
from .sample import Glyph, Sample, choose_turns
from .web_browser import INSTALL_COMMAND
from .web_facts import Priced, Table, choose_priced, choose_table
from .web_questions import all_tasks, question_makers

FONTS = (
    ("Helvetica", "Helvetica-Bold"),
    ("Times-Roman", "Times-Bold"),
    ("Courier", "Courier-Bold"),
    ("Vera", "VeraBd"),
)
TEXT = 12  # points
LEAST_TEXT, LARGEST_TEXT = 13 / 288, 30 / 288  # size of letters as a share of the longer side
KEYS = (
    "price", "item", "sum", "total", "count_items", "cheapest", "dearest", "title", "cell", "row_of", "largest",
    "smallest", "count_rows",
)  # fmt: skip


def _share(colour: RGB) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in colour)


def _rows(facts: Priced | Table) -> list[list[str]]:
    """The cells, the first row being the header of a table."""
    if isinstance(facts, Table):
        return [[facts.corner, *facts.columns]] + [
            [name, *cells] for name, cells in zip(facts.rows, facts.cells, strict=True)
        ]
    rows = [[item, facts.sign + facts.written(price)] for item, price in zip(facts.items, facts.prices, strict=True)]
    return rows + ([["total", facts.sign + facts.written(sum(facts.prices))]] if facts.total else [])


def _style(rng: random.Random, facts: Priced | Table, ink: RGB, paper: RGB) -> list[tuple[Any, ...]]:
    """ReportLab's commands for a table."""
    normal, bold = rng.choice(FONTS)
    line, first, last = _share(ink), (0, 0), (-1, -1)
    light = luminance(paper) > 125
    shade = tuple(channel * 0.88 if light else min(1.0, channel + 0.13) for channel in _share(paper))
    commands: list[tuple[Any, ...]] = [
        ("FONT", first, last, normal, TEXT),
        ("TEXTCOLOR", first, last, line),
        ("ALIGN", (1, 0), last, rng.choice(("RIGHT", "RIGHT", "CENTER", "LEFT"))),
        ("TOPPADDING", first, last, rng.uniform(1, 4)),
        ("BOTTOMPADDING", first, last, rng.uniform(3, 6)),
        ("LEFTPADDING", first, last, rng.uniform(4, 9)),
    ]
    rules = rng.choice(("GRID", "BOX", "LINEBELOW", "none"))
    if rules != "none":
        commands.append((rules, first, last, rng.uniform(0.4, 1.2), line))
    if rng.random() < 0.4:
        commands.append(("ROWBACKGROUNDS", (0, 1), last, [shade, _share(paper)]))
    if isinstance(facts, Table):
        commands.append(("FONT", first, (-1, 0), bold, TEXT))
        commands.append(("LINEBELOW", first, (-1, 0), 1.2, line))
        if rng.random() < 0.4:
            fill = rng.choice([COLOURS[name] for name in ("red", "green", "blue", "purple")])
            commands += [("BACKGROUND", first, (-1, 0), _share(fill)), ("TEXTCOLOR", first, (-1, 0), (1, 1, 1))]
    elif facts.total:
        commands += [("FONT", (0, -1), last, bold, TEXT), ("LINEABOVE", (0, -1), last, 1.5, line)]
    return commands


def _print(rng: random.Random, facts: Priced | Table, ink: RGB, paper: RGB, size: int) -> tuple[bytes, float]:
    """(a PDF of one page, pixels a point) at which its longer side has `size` pixels."""
    try:
        from reportlab import platypus
        from reportlab.pdfbase import pdfmetrics, ttfonts
        from reportlab.pdfgen.canvas import Canvas
    except ImportError as error:
        raise ImportError(f"Office tables are drawn with reportlab; install it with {INSTALL_COMMAND}.") from error
    for name in ("Vera", "VeraBd"):  # they come with ReportLab
        if name not in pdfmetrics.getRegisteredFontNames():
            pdfmetrics.registerFont(ttfonts.TTFont(name, f"{name}.ttf"))
    case = rng.choice(("lower", "title", "capitalize", "upper"))
    cells = [[getattr(text, case)() for text in row] for row in _rows(facts)]
    commands = _style(rng, facts, ink, paper)
    table = platypus.Table(cells, style=commands)
    buffer = io.BytesIO()
    canvas = Canvas(buffer, invariant=1)
    width, height = table.wrapOn(canvas, 1000, 1000)
    title = getattr(facts.title, case)()
    bold = rng.choice(FONTS)[1]
    above = 1.6 * TEXT if title else 0
    margin = rng.uniform(4, 12)
    inner = max(width, pdfmetrics.stringWidth(title, bold, 1.15 * TEXT)), height + above
    # the largest letters bound how much is enlarged, and the shorter side is at least half of the longer one
    longer = max(*(side + 2 * margin for side in inner), TEXT / LARGEST_TEXT)
    page = [max(longer / 2, side + 2 * margin) for side in inner]
    page[0 if inner[0] >= inner[1] else 1] = longer
    canvas.setPageSize(page)
    canvas.setFillColorRGB(*_share(paper))
    canvas.rect(-1, -1, page[0] + 2, page[1] + 2, stroke=0, fill=1)
    left = margin + rng.random() * (page[0] - 2 * margin - inner[0])
    bottom = margin + rng.random() * (page[1] - 2 * margin - inner[1])
    table.drawOn(canvas, left, bottom)
    canvas.setFillColorRGB(*_share(ink))
    canvas.setFont(bold, 1.15 * TEXT)
    canvas.drawString(left + 3, bottom + height + 0.45 * TEXT, title)
    canvas.save()
    return buffer.getvalue(), size / longer


def _draw(data: bytes, scale: float, size: int) -> tuple[Image.Image, list[Glyph]]:
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError(f"Office tables are drawn with pypdfium2; install it with {INSTALL_COMMAND}.") from error
    document = pypdfium2.PdfDocument(data)
    page = document[0]
    image = page.render(scale=scale).to_pil().convert("RGB")
    image = image.crop((0, 0, min(image.width, size), min(image.height, size)))  # PDFium rounds up
    text = page.get_textpage()
    glyphs, height = [], page.get_height()
    for index, character in enumerate(text.get_text_range()):
        if "!" <= character <= "~":
            left, bottom, right, top = text.get_charbox(index, loose=True)
            glyphs.append(Glyph(character, (left + right) / 2 * scale, (height - (bottom + top) / 2) * scale))
    for part in (text, page, document):
        part.close()
    return image, glyphs


def render_office(rng: random.Random, test: bool, image_size: int, turns: int) -> Sample:
    """Draws a receipt or a table and asks about it; ValueError for the training split."""
    if not test:
        raise ValueError("The family 'office_tables' is for measuring only; use split 'test', or train on 'web'.")
    ink, paper = ((0, 0, 0), (255, 255, 255)) if rng.random() < 0.4 else choose_ink(rng)
    while True:
        facts = (choose_priced if rng.random() < 0.4 else choose_table)(rng, test)
        data, scale = _print(rng, facts, ink, paper, image_size)
        if TEXT * scale >= LEAST_TEXT * image_size:
            break
    image, glyphs = _draw(data, scale, image_size)
    image = augment(image, rng, paper, glyphs)
    chosen = choose_turns(rng, question_makers(rng, facts, "office", test), turns)
    return Sample(image, "office_tables", facts.caption(), chosen, True, glyphs)


OFFICE_TASKS = all_tasks("office", KEYS)
