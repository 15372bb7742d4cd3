"""Parts of sweep.py: its trials, and the report on them."""
