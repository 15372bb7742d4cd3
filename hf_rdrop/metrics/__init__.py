"""`evaluate.Metric` classes that need no network: what `evaluate.load` would fetch from the Hub, as plain classes.

Needs the `scripts` extra (`evaluate`, `scikit-learn`, `scipy`, `seqeval`, `sacrebleu`, `rouge-score`); nothing else in
`hf_rdrop` imports this package.
"""

from .calibration import Calibration
from .glue import Glue
from .rouge import Rouge
from .sacrebleu import SacreBleu
from .seqeval import Seqeval
from .sequence_classification import SequenceClassification

__all__ = ["Calibration", "Glue", "Rouge", "SacreBleu", "Seqeval", "SequenceClassification"]
