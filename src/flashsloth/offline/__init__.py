"""Many questions about many images without a user waiting: records in, a resumable file of answers out."""

from .records import Record, read_records
from .runner import RunSettings, RunSummary, run_records

__all__ = ["Record", "RunSettings", "RunSummary", "read_records", "run_records"]
