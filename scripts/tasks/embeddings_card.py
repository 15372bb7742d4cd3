"""Model card of run_contrastive.py: how the embeddings were trained, and how to compute them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from finetuning.results import write_file
from hf_rdrop.cards.markdown import inline, is_hub_id, last_part, link, number, public, table

# What the embedding of a sentence is, and the line of code that takes it from hidden states.
EMBEDDINGS = {
    "cls": ("the last layer's state of its first token", "hidden[:, 0]"),
    "mean": ("the mean of the last layer's states of its tokens", "(hidden * mask).sum(1) / mask.sum(1)"),
    "last": (
        "the last layer's state of its last token",
        "hidden[torch.arange(len(hidden)), mask[..., 0].sum(1) - 1]",
    ),
}
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Sentence embeddings: {{ base }}, trained without labels{{ data }} by
[SimCSE](https://arxiv.org/abs/2104.08821)'s unsupervised method. Each sentence passed through the model twice with
different dropout masks; its two embeddings were to be more similar (cosine) than those of different sentences of a
batch.
{%- if evaluation %}


## Evaluation results

Correlation of the cosine similarity of pairs of sentences with their score, dropout off, on the evaluation data:

{{ evaluation }}
{%- endif %}

## How to use it

The embedding of a sentence is {{ embedding }}. (A pooler
that the model may have is neither used nor trained.) Put the folder of the model, or its name on the Hub, in the place
of the name below.

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({{ name }}, padding_side="right")
model = AutoModel.from_pretrained({{ name }}).eval()
inputs = tokenizer(["A sentence.", "Another one."], padding=True, return_tensors="pt")
mask = inputs["attention_mask"][..., None]
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
embeddings = torch.nn.functional.normalize({{ code }}, dim=-1)
print(embeddings @ embeddings.T)
```

## Training

{{ settings }}

What the embeddings call similar was learned from the model's pretraining and the training sentences alone; it is no
measure of truth or quality. Check it on pairs of your own before you rely on it.
"""


@dataclass(frozen=True)
class EmbeddingRun:
    """A finished training of embeddings, as its card describes it.

    Attributes:
        hub_model_id: name of the repository that the model is pushed to; None without one.
        base_name: name of the model on the Hub that training began with; None if it came from a folder.
        base_folder: the name or folder that its configuration remembers.
        dataset: name of the data set, None for files.
        before: correlations before training, `eval_*_before`; may be empty.
        after: correlations after training, `eval_*`; may be empty.
    """

    hub_model_id: str | None
    base_name: str | None
    base_folder: str
    dataset: str | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    sentences: int | None
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    pooling: str
    temperature: float
    mlp_head: bool


def write_card(folder: Path, run: EmbeddingRun) -> None:
    """Write README.md into the folder; paths of this machine are cut to their last component."""
    title = last_part(str(run.hub_model_id or folder.resolve())) or "model"
    columns = {"before training": run.before, "after": run.after}
    evaluation = run.after and table(
        ["correlation", *(name for name, found in columns.items() if found)],
        [
            [title, *(number(found.get(f"{key}_before", found.get(key))) for found in columns.values() if found)]
            for key, title in (("eval_spearmanr", "Spearman's"), ("eval_pearson", "Pearson's"))
        ],
    )
    settings = {
        "sentences": run.sentences,
        "steps": run.steps,
        "batch size (one sentence, the rest are its negatives)": run.batch_size,
        "temperature": run.temperature,
        "layer over the token, in training only": "yes" if run.mlp_head else "no",
        "learning rate": run.learning_rate,
        "seed": run.seed,
    }
    embedding, code = EMBEDDINGS[run.pooling]
    base = (
        link(run.base_name) if run.base_name else f"a model from a local folder ({inline(last_part(run.base_folder))})"
    )
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="feature-extraction",
            base_model=run.base_name if is_hub_id(run.base_name) else None,
            datasets=[run.dataset] if is_hub_id(run.dataset) else None,
            tags=["simcse", "sentence-similarity", "generated_from_trainer"],
        ),
        template_str=TEMPLATE,
        title=inline(title),
        base=base,
        data=f" on {link(run.dataset, 'datasets/')}" if run.dataset else "",
        evaluation=evaluation,
        embedding=embedding,
        code=code,
        name=repr(public(run.hub_model_id or title)),
        settings=table(["setting", "value"], [[name, number(value)] for name, value in settings.items()]),
    )
    write_file(folder / "README.md", str(card))
