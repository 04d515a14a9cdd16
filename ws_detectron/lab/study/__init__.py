"""Studies: variants compared over batch sizes and seeds, trained run by run and reported."""

from .plan import StudyRun, search_runs, study_runs
from .records import StudyResults
from .report import write_report
from .runner import Options, commands, read_study_results, report_study, run_study
from .spec import Search, Study, Variant, read_study

__all__ = [
    "Variant",
    "StudyRun",
    "Options",
    "Search",
    "Study",
    "StudyResults",
    "commands",
    "read_study",
    "read_study_results",
    "report_study",
    "run_study",
    "search_runs",
    "study_runs",
    "write_report",
]
