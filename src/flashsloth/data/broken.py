"""What happens to broken samples: counted, named, skipped up to a limit, then the run stops."""

import hashlib
import logging
import multiprocessing

from .text_files import printable

logger = logging.getLogger(__name__)

MAX_PLACE, MAX_REASON = 400, 600  # characters that messages show


class BrokenSamples:
    """Counts the different broken samples of one source, over all worker processes of a loader.

    The count lives in shared memory: workers that are forked, or get it sent when they start, add to the same one. A
    sample that is met again in a later epoch, or by another worker, counts once. Every process of a distributed run
    counts what it meets itself.

    Args:
        max_broken: how many may be skipped.
    """

    def __init__(self, max_broken: int) -> None:
        self.max_broken = max_broken
        # made for processes that are started anew, it is shared with forked ones as well; the reverse does not hold
        context = multiprocessing.get_context("spawn")
        self._count = context.Value("q", 0)
        self._keys = context.Array("Q", max_broken + 1, lock=False)

    @property
    def count(self) -> int:
        """Different broken samples met so far."""
        return self._count.value

    def add(self, place: str, reason: object) -> None:
        """Record one broken sample.

        Args:
            place: file and record, the same whenever the sample is met.
            reason: what is wrong with it.

        Raises:
            ValueError: more than `max_broken` samples are broken.
        """
        key = int.from_bytes(hashlib.blake2b(place.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        with self._count.get_lock():
            known = key in self._keys[: self._count.value]
            if not known:
                if self._count.value <= self.max_broken:
                    self._keys[self._count.value] = key
                self._count.value += 1
            count = self._count.value
        place, reason = printable(place, MAX_PLACE), printable(reason, MAX_REASON)
        if count > self.max_broken:
            raise ValueError(
                f"{place} is broken: {reason}; that is broken sample number {count} and max_broken is "
                f"{self.max_broken}. Repair the data (flashsloth data check names every defect), or raise max_broken "
                "to skip them."
            )
        if not known:
            logger.warning("%s is broken: %s; skipped (%d of at most %d)", place, reason, count, self.max_broken)
