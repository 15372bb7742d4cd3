"""A model with dropout off compared with its dropout sub-models and their ensemble."""

from .measure import Consistency, Score, check_measurable, measure_consistency
