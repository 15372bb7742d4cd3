"""The benchmark: what is timed (`loss`, `steps`, `precision`), how (`measure`), and the report (`report`, `plots`)."""
