"""CE, divergence and their gradients from hidden states and the weight of a head, without the logits.

`linear` is the public function, `blocks` its arithmetic on a block of rows, `head` puts it in the place of a model's
head.
"""

from .linear import linear_rdrop_loss
