"""Push to the Hub as Trainer does, but from a clean copy of the output folder."""

import contextlib
import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import httpx
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from .private import Private

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # a mixin, like RDropMixin

logger = logging.getLogger(__name__)

LOCK = "_lock"  # in the copy that an upload is made of, held by its process; "_*" is never uploaded
_locks: dict[Path, FileLock] = {}


class CleanPushMixin(_AnyTrainer):
    """Let a `Trainer` upload without access tokens, folders of this machine, its user and its name.

    Trainer uploads `args.output_dir` as it is: pickled arguments with the access token in them, paths, TensorBoard
    logs named after the host. Here `args.output_dir` is a clean copy of that folder during uploads.

    Raises:
        OSError: the Hub refuses or cannot be reached; with what to do about it.
    """

    _staging: Path | None = None  # of the push under way
    _token: str | None = None

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            _remove_stale(self._output_dir)
        with _explained("the repository on the Hub cannot be made ready. Nothing was uploaded, no training was lost."):
            super().init_hf_repo(*args, **kwargs)
            if not self.is_world_process_zero():
                return
            api = HfApi(token=kwargs.get("token", args[0] if args else None) or self.args.hub_token)
            repository, branch = str(self.hub_model_id), self.args.hub_revision
            api.auth_check(repository, write=True)  # the Trainer takes a reader's token until it uploads
            if branch and not branch.startswith("refs/"):
                api.create_branch(repository, branch=branch, exist_ok=True)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push as `Trainer.push_to_hub` does, with all its arguments and those of `create_model_card`."""
        original, self._token = self.args, kwargs.get("token", args[2] if len(args) > 2 else None)
        self._staging = self._make_staging() if self.is_world_process_zero() else None
        jobs: list[Future[Any]] = []
        try:
            with _explained(f"the upload to the Hub failed. The model in {original.output_dir} is whole: push again."):
                done = super().push_to_hub(*args, **kwargs)
            jobs += [done] if isinstance(done, Future) else []
            return done
        finally:
            staging, self._staging, self.args = self._staging, None, original
            _remove_after(jobs, staging)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self._staging is not None:  # model and card are saved, the upload comes next
            self._private().copy_folder(self._output_dir, self._staging)
            self.args = self._upload_args(self._staging)
            torch.save(self.args, self._staging / TRAINING_ARGS_NAME)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        if self.push_in_progress and not (self.args.hub_always_push or self.push_in_progress.is_done()):
            return  # the Trainer leaves this one out: nothing to copy
        staging, private = self._make_staging(), self._private()
        model, checkpoint = staging / "model", staging / Path(checkpoint_folder).name
        private.copy_folder(self._output_dir, model, weights=False)  # those of the checkpoint come instead
        private.copy_folder(Path(checkpoint_folder), checkpoint)
        original, processing = self.args, self.processing_class
        if processing is not None:
            processing.save_pretrained(staging / "processing")
            private.copy_folder(staging / "processing", model)
        before = self._push_jobs()
        # Without the processing class the Trainer does not save it once more over its clean copy.
        self.args, self.processing_class = self._upload_args(model), None
        torch.save(self.args, checkpoint / TRAINING_ARGS_NAME)
        try:
            super()._push_from_checkpoint(str(checkpoint))
        finally:
            self.args, self.processing_class = original, processing
            jobs = [job for job in self._push_jobs() if job not in before]
            for job in jobs:
                job.add_done_callback(_warn_if_failed)
            _remove_after(jobs, staging)

    def _push_jobs(self) -> "list[Future[Any]]":
        return list(self.push_in_progress.jobs) if self.push_in_progress else []

    def _make_staging(self) -> Path:
        self._output_dir.mkdir(parents=True, exist_ok=True)
        # In the output folder, because hard links need the same file system.
        staging = Path(tempfile.mkdtemp(prefix="_upload-", dir=self._output_dir))
        _locks[staging] = FileLock(staging / LOCK)
        _locks[staging].acquire()
        return staging

    def _private(self) -> Private:
        folders = [self._output_dir, Path.cwd(), Path.home()]
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        if name and os.path.isdir(name):
            folders.append(Path(name))
        return Private([self._token, self.args.hub_token, get_token()], folders)

    def _upload_args(self, folder: Path) -> TrainingArguments:
        """Copy the arguments with another output folder; they pickle as a clean copy of themselves."""
        cleaned, args = self._private().clean_args(self.args), copy.copy(self.args)
        args.output_dir = str(folder)
        # Protocol 0, because with later ones the pickler insists on the class of the object that it was given.
        reduce = {"__reduce_ex__": lambda _, protocol: cleaned.__reduce_ex__(0)}
        args.__class__ = type(type(args).__name__, (type(args),), reduce)
        return args


@contextlib.contextmanager
def _explained(what_failed: str) -> Iterator[None]:
    """Turn the client's errors into one that a user can act on."""
    try:
        yield
    except (httpx.HTTPError, ConnectionError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = {
            401: "The access token is missing or wrong: log in with `hf auth login`, or give hub_token.",
            403: "The access token may not write there: use one with write access, or another hub_model_id.",
            404: "There is no such repository or revision, or the access token may not see it.",
        }.get(status or 0, "Check the network and HF_ENDPOINT; the Hub may also be busy.")
        raise OSError(f"{what_failed} {advice} ({str(error).strip().splitlines()[0]})") from error


def _warn_if_failed(job: "Future[Any]") -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(f"An upload of a checkpoint to the Hub failed; training goes on, its files are here: {error}")


def _remove_after(jobs: "list[Future[Any]]", folder: Path | None) -> None:
    """Remove the folder once the last of the uploads from it is over."""
    left = set(jobs)

    def remove(job: Any = None) -> None:
        left.discard(job)
        if not left and folder is not None:
            _locks.pop(folder).release()
            shutil.rmtree(folder, ignore_errors=True)

    if not jobs:
        remove()
    for job in jobs:
        job.add_done_callback(remove)


def _remove_stale(folder: Path) -> None:
    """Remove the copies whose uploads died with their process; the lock of one that lives is held."""
    for lock in folder.glob(f"_upload-*/{LOCK}"):
        held = FileLock(lock)
        with contextlib.suppress(Timeout, OSError):
            held.acquire(timeout=0)
            held.release()
            shutil.rmtree(lock.parent, ignore_errors=True)
