"""R-Drop (regularized dropout) for Hugging Face Transformers.

What lies on top of this package is public; every folder is one concern and says how it is done. Imports go down this
list, never up (tests/test_architecture.py):

==================  ====================================================================================
`trainer`           `RDropTrainer`, `RDropSeq2SeqTrainer`, `RDropMixin`: wiring; the loss is scaled here
`cards/`            the model card: metadata, facts, history, evidence, template
`training/`         a run: settings, first batch, checks before it, item counts, the log of its losses
`cost/`             what a step costs, predicted from the sizes of model and batch
`sub_models/`       sub-models beyond dropout: dropped layers, inserted dropout
`training_args`     every `rdrop_*` argument
`fused/`            CE, divergence and gradients of a language-model head without its logits
`trunk/`            lower layers that the passes share, and when they cannot be shared
`consistency/`      dropout off compared with sub-models and their ensemble
`objective/`        what logits and labels mean (`heads`), CE and divergence of a batch
`loss`              `RDropLoss` for loops without a Trainer
`agreements`        the other divergences, and weighted sums of them
`contrastive`       InfoNCE between passes
`functional`        the symmetric KL divergence, value and gradient (language models: `fused/blocks`)
`batch`             [x; x] and back
`dropout`           what is random in a model, and setting it
`generators`        its random numbers: seeded, shared out over processes, restored
`sigterm`           a checkpoint when the job is ended
`checkpoints/`      damaged checkpoints found, exact resuming; knows no R-Drop
`hub/`              uploads without tokens and paths; knows no R-Drop
`metrics/`          `evaluate` metrics that need no network
`files`             writing a file at once; internal
`alpha`             the range of alpha; internal
==================  ====================================================================================

Names are loaded when they are first used: `import hf_rdrop` costs nothing, `hf_rdrop.functional` needs torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .consistency import Consistency, measure_consistency
    from .dropout import inspect_dropout, set_dropout
    from .loss import RDropLoss
    from .sub_models import SubModels, insert_dropout
    from .trainer import RDropMixin, RDropSeq2SeqTrainer, RDropTrainer
    from .training_args import RDropArguments, RDropSeq2SeqTrainingArguments, RDropTrainingArguments

_HOMES = {
    "consistency": ("Consistency", "measure_consistency"),
    "dropout": ("inspect_dropout", "set_dropout"),
    "loss": ("RDropLoss",),
    "sub_models": ("SubModels", "insert_dropout"),
    "trainer": ("RDropMixin", "RDropSeq2SeqTrainer", "RDropTrainer"),
    "training_args": ("RDropArguments", "RDropSeq2SeqTrainingArguments", "RDropTrainingArguments"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MORE = "agreements batch checkpoints contrastive cost functional fused metrics sigterm"
_MODULES = {*_HOMES, *_MORE.split(" ")}
__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """Load a name when it is first used (PEP 562)."""
    if name in _HOME_OF:
        found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = found
        return found
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
