"""The model card of run_contrastive.py: how the embeddings were trained, and how to compute them."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from hf_rdrop.cards.markdown import inline, is_hub_id, last_part, link, number, public, table
from hf_rdrop.files import write_atomically

if TYPE_CHECKING:
    from contrastive_training import ContrastiveTrainer

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


def write_card(
    trainer: "ContrastiveTrainer", before: dict[str, float], base_name: str | None, dataset: str | None
) -> None:
    """Write README.md into the trainer's output folder; paths of this machine are cut to their last component.

    Args:
        trainer: on the process that writes.
        before: correlations before training, `eval_*_before`; may be empty.
        base_name: name of the model on the Hub that training began with; None if it came from a folder.
        dataset: name of the data set, None for files.
    """
    args, folder = trainer.args, Path(str(trainer.args.output_dir))
    title = last_part(str(args.hub_model_id or folder.resolve())) or "model"
    local = last_part(str(trainer.model.config.name_or_path))
    after = next((entry for entry in reversed(trainer.state.log_history) if "eval_spearmanr" in entry), None)
    columns = {"before training": before, "after": after or {}}
    evaluation = after and table(
        ["correlation", *(name for name, found in columns.items() if found)],
        [
            [title, *(number(found.get(f"{key}_before", found.get(key))) for found in columns.values() if found)]
            for key, title in (("eval_spearmanr", "Spearman's"), ("eval_pearson", "Pearson's"))
        ],
    )
    settings = {
        "sentences": len(trainer.train_dataset) if trainer.train_dataset is not None else None,
        "steps": trainer.state.global_step,
        "batch size (one sentence, the rest are its negatives)": args.per_device_train_batch_size,
        "temperature": args.temperature,
        "layer over the token, in training only": "yes" if args.mlp_head else "no",
        "learning rate": args.learning_rate,
        "seed": args.seed,
    }
    embedding, code = EMBEDDINGS[args.pooling]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="feature-extraction",
            base_model=base_name if is_hub_id(base_name) else None,
            datasets=[dataset] if is_hub_id(dataset) else None,
            tags=["simcse", "sentence-similarity", "generated_from_trainer"],
        ),
        template_str=TEMPLATE,
        title=inline(title),
        base=link(base_name) if base_name else f"a model from a local folder ({inline(local)})",
        data=f" on {link(dataset, 'datasets/')}" if dataset else "",
        evaluation=evaluation,
        embedding=embedding,
        code=code,
        name=repr(public(args.hub_model_id or title)),
        settings=table(["setting", "value"], [[name, number(value)] for name, value in settings.items()]),
    )
    write_atomically(folder / "README.md", str(card))
