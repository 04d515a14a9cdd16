"""Studies: trains variants over batch sizes and seeds, and reports how they compare."""

from .plan import StudyRun, search_runs, study_runs
from .records import StudyResults
from .report import write_report
from .runner import Options, commands, draw_studies, read_study_results, report_study, run_study
from .spec import Search, Study, Variant, read_study

__all__ = [
    "Variant",
    "StudyRun",
    "Options",
    "Search",
    "Study",
    "StudyResults",
    "commands",
    "draw_studies",
    "read_study",
    "read_study_results",
    "report_study",
    "run_study",
    "search_runs",
    "study_runs",
    "write_report",
]
