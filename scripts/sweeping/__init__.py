"""Parts of sweep.py: its trials, and the report on them."""

LOG_SCALE = ("rdrop_alpha", "learning_rate")  # drawn, and drawn as axes, logarithmically
