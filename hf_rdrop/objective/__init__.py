"""The loss of a batch.

`heads` decides what logits and labels mean, `batch_layout` which tensors are rows, labels and items. `parent_loss`
asks the Trainer class underneath for CE, and `batch_loss` adds the divergence between the passes.
"""
