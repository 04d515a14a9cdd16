"""Studies: arms compared over batch sizes and seeds, run cell by cell and reported."""

from .cells import Cell, search_cells, study_cells
from .report import write_report
from .results import StudyResults
from .run_study import Options, commands, read_study_results, report_study, run_study
from .spec import Arm, Search, Study, read_study

__all__ = [
    "Arm",
    "Cell",
    "Options",
    "Search",
    "Study",
    "StudyResults",
    "commands",
    "read_study",
    "read_study_results",
    "report_study",
    "run_study",
    "search_cells",
    "study_cells",
    "write_report",
]
