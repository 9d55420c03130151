"""The figures of a report: tables in, matplotlib figures out, nothing computed here that is a claim.

answer  the reported arms and their differences         course  errors by epoch, the answer at hand, schedules
tuning  heat maps, tuning budgets, error by training loss         frame   style, looks, saving
"""

from analysis.figures.answer import result
from analysis.figures.course import anytime, curves, error_by_epoch, reported, schedules
from analysis.figures.frame import looks, png, svg
from analysis.figures.tuning import budget_curves, gap_plot, heat_maps

__all__ = [
    "anytime",
    "budget_curves",
    "curves",
    "error_by_epoch",
    "gap_plot",
    "heat_maps",
    "looks",
    "png",
    "reported",
    "result",
    "schedules",
    "svg",
]
