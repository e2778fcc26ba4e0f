"""What is worth keeping from one request to the next, within a number of bytes: encoded images, and turns.

Shape suffixes: P un-pooled patches, E width of the encoder, T tokens.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from .batch import RowStates


class FeatureCache:
    """Un-pooled features of images by the hash of their pixels; the one not used for longest goes first.

    Args:
        max_bytes: of all features; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, pixels: Hashable) -> Tensor | None:
        """Features (P, E), or None."""
        features_PE = self._features.get(pixels)
        if features_PE is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(pixels)
        return features_PE

    def put(self, pixels: Hashable, features_PE: Tensor) -> None:
        """Keep features that own their memory."""
        if features_PE.nbytes > self.max_bytes or pixels in self._features:
            return
        self._features[pixels] = features_PE
        self.nbytes += features_PE.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._features.popitem(last=False)[1].nbytes


class PrefixCache:
    """Keys and values of finished rows by their tokens; the one not used for longest goes first.

    A key has `record_bytes` for each token, which say everything that the token's keys and values depend on besides
    the tokens before it. Keys are sorted, so that the one with the longest common beginning is a neighbour.

    Args:
        max_bytes: of all keys and values; 0 keeps none.
        record_bytes: of a token in a key.
    """

    def __init__(self, max_bytes: int, record_bytes: int) -> None:
        self.max_bytes, self.record_bytes, self.nbytes = max_bytes, record_bytes, 0
        self._keys: list[bytes] = []
        self._rows: OrderedDict[bytes, RowStates] = OrderedDict()

    def find(self, key: bytes) -> tuple[int, RowStates]:
        """How many first tokens are known, and the row that begins with them."""
        place = bisect_left(self._keys, key)
        best, states = 0, []
        for neighbour in self._keys[max(place - 1, 0) : place + 1]:
            shared = self._shared(key, neighbour)
            if shared > best:
                best, states = shared, self._rows[neighbour]
                self._rows.move_to_end(neighbour)
        return best, states

    def put(self, key: bytes, states: RowStates) -> None:
        """Keep a row. It takes the place of one that is its beginning, as an earlier turn is."""
        size = _nbytes(key, states)
        if size > self.max_bytes:
            return
        place = bisect_left(self._keys, key)
        if place < len(self._keys) and self._keys[place].startswith(key):
            self._rows.move_to_end(self._keys[place])
            return
        if place and key.startswith(self._keys[place - 1]):
            self._forget(self._keys[place - 1])
        insort(self._keys, key)
        self._rows[key] = states
        self.nbytes += size
        while self.nbytes > self.max_bytes:
            self._forget(next(iter(self._rows)))

    def _shared(self, key: bytes, other: bytes) -> int:
        """Tokens at the beginning of both."""
        width = self.record_bytes
        tokens = range(width, min(len(key), len(other)) + 1, width)
        return bisect_left(tokens, True, key=lambda length: key[:length] != other[:length])

    def _forget(self, key: bytes) -> None:
        self.nbytes -= _nbytes(key, self._rows.pop(key))
        self._keys.pop(bisect_left(self._keys, key))


def _nbytes(key: bytes, states: RowStates) -> int:
    return len(key) + sum(keys.nbytes + values.nbytes for keys, values in states)
