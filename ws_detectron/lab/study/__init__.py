"""Studies: trains variants over batch sizes and seeds, and reports how they compare."""

from .plan import search_runs, study_runs
from .records import StudyResults
from .runner import (
    Options,
    check_packages,
    commands,
    draw_studies,
    read_study_results,
    report_study,
    run_study,
)
from .study_file import Study, Variant, read_study

__all__ = [
    "Options",
    "Study",
    "StudyResults",
    "Variant",
    "check_packages",
    "commands",
    "draw_studies",
    "read_study",
    "read_study_results",
    "report_study",
    "run_study",
    "search_runs",
    "study_runs",
]
