"""Many questions about many images without a user waiting: records in, a resumable file of answers out."""

from ..inference.batches import Record
from .records import read_records
from .runner import RunSettings, RunSummary, run_records

__all__ = ["Record", "RunSettings", "RunSummary", "read_records", "run_records"]
