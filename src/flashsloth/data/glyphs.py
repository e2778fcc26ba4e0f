"""Characters written on rendered images, as a tensor of a batch: what an encoder can be told that its patches show.

Shape suffixes: B images, G glyphs of an image (padded).
"""

import string
from collections.abc import Sequence

import torch
from torch import Tensor

CHARACTERS = string.ascii_lowercase + string.digits


def glyph_tensor(glyphs: Sequence[Sequence[tuple[str, float, float]]]) -> Tensor:
    """(class, x, y) of the characters of a batch of images, (B, G, 3) float32; rows are filled up with class 0.

    Args:
        glyphs: (character, x, y) of each image, both in parts of its width and height; case does not matter, and
            other characters are left out.
    """
    rows = [
        [(float(CHARACTERS.index(character.lower()) + 1), x, y) for character, x, y in image
         if character.lower() in CHARACTERS]
        for image in glyphs
    ]  # fmt: skip
    longest = max([1, *map(len, rows)])
    return torch.tensor([row + [(0.0, 0.0, 0.0)] * (longest - len(row)) for row in rows])
