"""Comparison of runs: rows of one table, statistics, and a report as Markdown, CSV and one HTML page."""
