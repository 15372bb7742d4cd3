"""R-Drop (regularized dropout) for Hugging Face Transformers."""

from .consistency.measure import Consistency, measure_consistency
from .dropout import inspect_dropout, set_dropout
from .loss import RDropLoss
from .sub_models.sources import SubModels, insert_dropout
from .trainer import RDropMixin, RDropSeq2SeqTrainer, RDropTrainer
from .training_args import RDropArguments, RDropSeq2SeqTrainingArguments, RDropTrainingArguments
from .version import __version__

__all__ = [
    "Consistency",
    "RDropArguments",
    "RDropLoss",
    "RDropMixin",
    "RDropSeq2SeqTrainer",
    "RDropSeq2SeqTrainingArguments",
    "RDropTrainer",
    "RDropTrainingArguments",
    "SubModels",
    "__version__",
    "insert_dropout",
    "inspect_dropout",
    "measure_consistency",
    "set_dropout",
]
