"""What a run achieved, from the files it left: a page with plots (write_report) and a few lines for the console."""

from sbtrain.report.page import write_report
from sbtrain.report.tables import summary_table

__all__ = ["summary_table", "write_report"]
