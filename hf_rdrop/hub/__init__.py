"""Uploads of any `Trainer`: `push` makes a clean copy, `private` knows what must not be in it. No R-Drop in here."""

from .push import CleanPushMixin
