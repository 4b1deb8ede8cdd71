"""What users read of a model: what the compiler found (``explain``), and what its calls did (``summary``)."""

from toca_compile.report.data import GraphReport, SiteReport, StepCounts, StepReport
from toca_compile.report.report import Report, Subject
from toca_compile.report.summary import StepSummary, Summary, summarise

__all__ = [
    "GraphReport",
    "Report",
    "SiteReport",
    "StepCounts",
    "StepReport",
    "StepSummary",
    "Subject",
    "Summary",
    "summarise",
]
