"""Draw the storeys of the project and every import between them: `python scripts/draw_architecture.py`.

Storeys and their order are those of the contracts in pyproject.toml; modules and imports are read from the code.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture-storeys.svg"
LIBRARY, COMMANDS = "flashsloth", "flashsloth_cli"

WIDTH, LEFT, BOX = 860, 20, 560
CHARACTERS, LINE, TITLE, GAP = 88, 15, 24, 14
COLOURS = ("#4e79a7", "#b07aa1", "#59a14f", "#9c755f", "#edc948", "#76b7b2", "#f28e2b", "#7f7f7f")


def storeys() -> list[list[str]]:
    """Packages from the top down; those of one list stand side by side and do not know each other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == [LIBRARY])
    return [[COMMANDS], *([f"{LIBRARY}.{name.strip()}" for name in layer.split("|")] for layer in layers)]


def modules_of(package: str, graph: grimp.ImportGraph) -> list[str]:
    return sorted(name.removeprefix(f"{package}.") for name in graph.find_descendants(package))


def imports(packages: list[str], graph: grimp.ImportGraph) -> list[tuple[str, str]]:
    """Pairs of packages of which the first imports the second, imports for type checkers included."""
    return [
        (importer, imported)
        for importer in packages
        for imported in packages
        if importer != imported and graph.direct_import_exists(importer=importer, imported=imported, as_packages=True)
    ]


def draw(levels: list[list[str]], graph: grimp.ImportGraph) -> str:
    """An SVG: a box for each package, and on its right an arc to each that it imports; arcs upwards are red."""
    packages = [package for level in levels for package in level]
    pairs = imports(packages, graph)
    boxes, edges = [], {}
    top = 16
    for level in levels:
        for package in level:
            text = textwrap.wrap(", ".join(modules_of(package, graph)), CHARACTERS)
            height = TITLE + LINE * len(text) + 8
            edges[package] = (top, top + height)
            name = package.removeprefix(f"{LIBRARY}.")
            boxes.append(
                f'<rect x="{LEFT}" y="{top}" width="{BOX}" height="{height}" rx="6" fill="#eef3fb" stroke="#444"/>'
            )
            boxes.append(f'<text x="{LEFT + 12}" y="{top + 18}" font-size="14" font-weight="bold">{name}</text>')
            for row, words in enumerate(text):
                y = top + TITLE + LINE * row + 11
                boxes.append(f'<text x="{LEFT + 12}" y="{y}" font-size="11" fill="#333">{words}</text>')
            top += height + (4 if package != level[-1] else GAP)
    arcs = []
    right = LEFT + BOX
    for importer, imported in pairs:
        # Arcs arrive above the middle of a box and leave below it, in the order in which they do not cross.
        leaving = [target for source, target in pairs if source == importer]
        arriving = [source for source, target in pairs if target == imported]
        start = edges[importer][1] - 5 - 3 * leaving.index(imported)
        end = edges[imported][0] + 5 + 3 * (len(arriving) - 1 - arriving.index(importer))
        reach = right + 30 + 0.3 * abs(end - start)
        colour = COLOURS[packages.index(importer) % len(COLOURS)] if end > start else "#d00000"
        path = f"M{right} {start}C{reach:.1f} {start} {reach:.1f} {end} {right + 1} {end}"
        arcs.append(
            f'<path d="{path}" stroke="{colour}" stroke-width="1.3" fill="none" marker-end="url(#tip)">'
            f"<title>{importer} imports {imported}</title></path>"
        )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" fill="#444"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{top}" fill="#fff"/>',
        *arcs,
        *boxes,
        "</svg>\n",
    ])  # fmt: skip


def picture() -> str:
    graph = grimp.build_graph(LIBRARY, COMMANDS, cache_dir=None)
    return draw(storeys(), graph)


if __name__ == "__main__":
    PICTURE.write_text(picture())
