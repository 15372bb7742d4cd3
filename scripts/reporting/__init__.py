"""Reports of every kind: markdown tables, the look of pictures, output folders, consistency."""
