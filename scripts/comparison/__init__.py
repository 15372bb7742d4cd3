"""Parts of compare.py.

- What is asked for: `config` (command line and YAML), `arms` (tasks, arms, candidates), `tuning`, `demo`.
- What runs: `queue`.
- What comes out: `runs` (comparison.json by `file` and `history`, and everything below), `figures` with `cost` and
  `statistics`, `report` and `tables` (markdown, terminal), `plots` and `curves`, `cards` and `card_words` (of
  reference runs).
"""
