"""What a reader gets to see of a zoo and its encoder: the report page, and the numbers behind it as JSON."""

from __future__ import annotations

from weightspace.report.page import (
    Curve,
    PredictedTrue,
    Report,
    RetrievalRow,
    ZooMap,
    write_report,
)
from weightspace.report.verdicts import Verdict, probe_verdicts, reconstruction_verdicts, retrieval_verdicts

__all__ = [
    "Curve",
    "PredictedTrue",
    "Report",
    "RetrievalRow",
    "Verdict",
    "ZooMap",
    "probe_verdicts",
    "reconstruction_verdicts",
    "retrieval_verdicts",
    "write_report",
]
