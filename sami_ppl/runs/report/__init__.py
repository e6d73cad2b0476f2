"""The report of a fit: tables and pictures on one HTML page."""

from sami_ppl.runs.report.write import write_report as write_report
