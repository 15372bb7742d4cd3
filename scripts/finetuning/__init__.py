"""Parts of a training script.

`run` starts it; `files`, `data`, `labels` and `unlabeled` bring its rows, `model` its model; `trainer` trains it and
`results` names what it writes.
"""
