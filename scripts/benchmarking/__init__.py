"""Parts of benchmark.py: work (`loss`, `steps`, `precision`), timing (`measure`), output (`report`, `plots`)."""
