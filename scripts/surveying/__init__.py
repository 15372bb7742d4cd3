"""Of `families.py`: a tiny model of each family, the checks of its training, and the table of what was found."""
