"""The pairs of head and family that are tried: Transformers' own mappings."""

from typing import NamedTuple

from transformers.models.auto import modeling_auto


class Pair(NamedTuple):
    """One family under one head.

    Args:
        head: a key of `HEADS`.
        family: the model type.
        model_class: the name of the class.
    """

    head: str
    family: str
    model_class: str

    @property
    def name(self) -> str:
        return f"{self.head}/{self.family}"


# The heads in the order of the table, with the mapping that each is read from and the kind of its loss.
HEADS = {
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
    "multiple choice": "MULTIPLE_CHOICE",
    "masked LM": "MASKED_LM",
    "causal LM": "CAUSAL_LM",
    "seq2seq LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "speech seq2seq": "SPEECH_SEQ_2_SEQ",
    "image classification": "IMAGE_CLASSIFICATION",
    "video classification": "VIDEO_CLASSIFICATION",
    "audio classification": "AUDIO_CLASSIFICATION",
    "semantic segmentation": "SEMANTIC_SEGMENTATION",
    "CTC": "CTC",
    "audio frame classification": "AUDIO_FRAME_CLASSIFICATION",
    "speaker embeddings": "AUDIO_XVECTOR",
    "next sentence": "NEXT_SENTENCE_PREDICTION",
    "visual question answering": "VISUAL_QUESTION_ANSWERING",
    "document question answering": "DOCUMENT_QUESTION_ANSWERING",
    "masked images": "MASKED_IMAGE_MODELING",
    "object detection": "OBJECT_DETECTION",
}


def all_pairs() -> list[Pair]:
    """List every pair of the installed Transformers, by head."""
    found = []
    for head, name in HEADS.items():
        mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {})
        for family, classes in mapping.items():
            for model_class in [classes] if isinstance(classes, str) else classes[:1]:
                found.append(Pair(head, family, model_class))
    return found
