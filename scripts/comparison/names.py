"""Names of arms that everything in a comparison knows."""

BASELINE = "baseline"
RDROP = "rdrop"
# What R-Drop has to beat besides the baseline: as many forward passes, and as many rows in a step.
CONTROLS = ("baseline-2x", "doubled")
GREY = (BASELINE, *CONTROLS)  # in pictures
