"""What compare.py is made of.

- What is asked for: `config` (command line and YAML), `arms` (tasks, arms, candidates), `tuning`, `demo`.
- What comes out: `results` (JSON, and everything below), `rows` with `cost` and `statistics` (from runs to figures),
  `report` and `tables` (markdown, terminal), `plots`, `curves` and `style`.
"""
