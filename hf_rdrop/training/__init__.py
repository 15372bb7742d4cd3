"""A training run: `settings` (the arguments, typed), `run` (what is on the model, the loss of a batch), `checks` and
`first_batch` (refusals before and on the first step), `item_counts` and `loss_log` (what is averaged and logged).
"""
