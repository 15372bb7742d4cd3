"""The model card of a training run.

`card` writes it: the base class's `metadata` completed, then the body of `template.md`. The body is filled from the
`facts` of the training, its `objective` in words, its `history` of losses, and the `evidence` of comparison.json and
consistency.json; `markdown` writes them down.
"""
