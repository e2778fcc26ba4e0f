"""Outlines of countries from the TopoJSON of npm's world-atlas, and their projection to a plane."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .sprites import FILL_COMMAND, countries

PROJECTIONS = ("flat", "equal-area")
TEST_PROJECTION = "mercator"
GRID = 0.1  # degrees
LEAST_AREA = 2e-5  # of an island, on the unit sphere: 800 square kilometres


@dataclass(frozen=True)
class Outline:
    """A country's rings, each (N, 2) of longitude and latitude in degrees, and its area on the unit sphere.

    `bounds` is (west, south, east, north) of each ring, `main` the index of the largest one.
    """

    name: str
    rings: tuple[np.ndarray, ...]
    bounds: tuple[tuple[float, float, float, float], ...]
    area: float
    main: int


def ring_area(ring: np.ndarray) -> float:
    """Area on the unit sphere, through the cylindrical equal-area projection, which keeps it."""
    x, y = np.radians(ring[:, 0]), np.sin(np.radians(ring[:, 1]))
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def _thinned(arc: np.ndarray) -> np.ndarray:
    """An arc with one point a step of a grid that is finer than a pixel; its ends stay."""
    steps = np.any(np.diff(np.round(arc / GRID), axis=0) != 0, axis=1)
    keep = np.concatenate([[True], steps])
    keep[-1] = True
    return arc[keep]


def decode_topology(topology: dict) -> dict[str, list[np.ndarray]]:
    """The outer rings of every country of a TopoJSON file, by the name it has there."""
    scale, shift = topology["transform"]["scale"], topology["transform"]["translate"]
    # arcs are steps from point to point on a grid
    arcs = [_thinned(np.cumsum(np.array(arc, dtype=float), axis=0) * scale + shift) for arc in topology["arcs"]]

    def ring(indices: list[int]) -> np.ndarray:
        # ~i stands for arc i backwards; the last point of an arc is the first of the next
        parts = [arcs[index] if index >= 0 else arcs[~index][::-1] for index in indices]
        points = np.concatenate([part[:-1] for part in parts])
        # Russia and Fiji cross the 180th meridian
        points[:, 0] = np.unwrap(points[:, 0], period=360)
        return points

    found: dict[str, list[np.ndarray]] = {}
    for geometry in topology["objects"]["countries"]["geometries"]:
        polygons = {"Polygon": [geometry.get("arcs")], "MultiPolygon": geometry.get("arcs")}.get(geometry["type"], [])
        found[geometry["properties"]["name"]] = [ring(polygon[0]) for polygon in polygons]
    return found


@lru_cache(maxsize=2)
def load_outlines(folder: Path, resolution: str) -> tuple[Outline, ...]:
    """All countries at 50m or 110m; those of countries.tsv by the names they have there, Antarctica left out."""
    path = folder / "node_modules" / "world-atlas" / f"countries-{resolution}.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; fill the folder with `{FILL_COMMAND}`.")
    names = {country.atlas: country.name for country in countries()}
    found: list[Outline] = []
    for name, rings in decode_topology(json.loads(path.read_text(encoding="utf-8"))).items():
        rings = [ring for ring in rings if len(ring) > 3]  # of specks little is left
        areas = [ring_area(ring) for ring in rings]
        rings = [ring for ring, area in zip(rings, areas, strict=True) if area in (max(areas), max(area, LEAST_AREA))]
        main = max(range(len(rings)), key=lambda index: ring_area(rings[index])) if rings else 0
        bounds = [(*ring.min(axis=0).tolist(), *ring.max(axis=0).tolist()) for ring in rings]
        if name != "Antarctica" and rings:
            found.append(Outline(names.get(name, ""), tuple(rings), tuple(bounds), sum(areas), main))
    return tuple(found)


def project(points: np.ndarray, center: tuple[float, float], projection: str) -> np.ndarray:
    """(N, 2) of longitude and latitude to x to the right and y downwards, in radians at the centre.

    Args:
        center: longitude and latitude of the middle of the map.
        projection: `flat`, `equal-area` (Lambert's azimuthal) or `mercator`.
    """
    longitude, latitude = np.radians(points[:, 0] - center[0]), np.radians(points[:, 1])
    middle = np.radians(center[1])
    if projection == "mercator":
        shift = np.arctanh(np.sin(middle))
        rise = np.arctanh(np.sin(np.clip(latitude, -1.45, 1.45))) - shift
        return np.stack([longitude, -rise], axis=1) * np.cos(middle)
    if projection == "flat":
        return np.stack([longitude * np.cos(middle), middle - latitude], axis=1)
    cosine = np.sin(middle) * np.sin(latitude) + np.cos(middle) * np.cos(latitude) * np.cos(longitude)
    factor = np.sqrt(2 / np.maximum(1 + cosine, 0.05))
    x = factor * np.cos(latitude) * np.sin(longitude)
    y = np.cos(middle) * np.sin(latitude) - np.sin(middle) * np.cos(latitude) * np.cos(longitude)
    return np.stack([x, -factor * y], axis=1)
