"""Checkpoints of any `Trainer`: `integrity` finds damaged ones, `resuming` goes on exactly. No R-Drop in here."""

from .integrity import CheckpointError, check_checkpoint, checkpoint_to_resume, find_damage, last_finished, saving
