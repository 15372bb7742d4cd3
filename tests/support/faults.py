"""Runs in processes of their own that die as told: `Runs` forks them off a server that has imported everything."""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from pytest import MonkeyPatch
from transformers import Trainer, TrainerState

from hf_rdrop import RDropMixin, RDropTrainer, RDropTrainingArguments
from hf_rdrop.checkpoints import last_finished
from support.training import make_model, train


def start(target, log, *args, **kwargs):
    """A process that runs `target` with its output in a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.faults", "run_glue", "run_ner", "run_translation"])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # older Pythons' servers look nowhere else
    process = context.Process(target=_run, args=(target, str(log), args, kwargs))
    process.start()
    return process


def finish(target, log, *args, **kwargs):
    """Run to the end; returns the exit status (-9: killed)."""
    process = start(target, log, *args, **kwargs)
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def _run(target, log, args, kwargs):
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    try:
        target(*args, **kwargs)
    except Exception:  # as the interpreter would
        traceback.print_exc()
        sys.exit(1)


# ---- What runs ----


def plain_run(folder, rows, fault=None, **args):
    """A short run of `RDropTrainer`, gone on with where an earlier one has left a checkpoint."""

    class Resuming(RDropTrainer):
        def train(self):
            whole = last_finished(Path(folder)) is not None
            return super().train(resume_from_checkpoint=whole or None)

    if fault:
        plan(*fault)
    trainer = train(make_model("single", 0.3), "single", Resuming, rows=rows, output_dir=str(folder), **args)
    trainer.save_model(f"{folder}/final")
    trainer.state.save_to_json(f"{folder}/final/trainer_state.json")


def script_run(name, argv, fault=None):
    """A script as from the command line."""
    from finetuning.command_line import cli

    script = __import__(name)
    if fault:
        plan(*fault)
    cli(lambda: script.main([str(argument) for argument in argv]))


def wait_in_a_temporary_folder(parent):
    """A script that is busy with what it will leave nothing of."""
    from finetuning.command_line import cli

    def main():
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            Path(folder, "busy").touch()  # only now is the folder sure to be taken away
            time.sleep(60)

    cli(main)


def push_and_wait(folder, url, token, home):
    """A push that has copied what it uploads, and then takes a minute; to the Hub at `url`."""
    from support.hub_server import use_hub

    class Waiting(RDropTrainer):
        def create_model_card(self, *args, **kwargs):
            time.sleep(60)

    use_hub(SimpleNamespace(url=url, token=token), home, MonkeyPatch())
    args = RDropTrainingArguments(
        str(folder), push_to_hub=True, hub_model_id="tester/model", use_cpu=True, report_to=[]
    )
    Waiting(model=make_model("single"), args=args).push_to_hub()


# ---- What goes wrong ----


def plan(kind, step):
    """Have this process fail in the optimizer step after `step`, or in saving its checkpoint.

    Kinds: `step` is killed in its forward; `model.safetensors`, `optimizer.pt`, `rng_state.pth` and
    `trainer_state.json` are killed with half of that file written; `slow` says that it is at work, and takes its time
    for each step and file; `full` finds no room for the optimizer's state.
    """
    checkpoint = f"checkpoint-{step}"
    if kind == "step":
        patch(RDropMixin, "compute_loss", lambda self, *_, **__: self.state.global_step == step and kill())
    elif kind == "slow":
        patch(RDropMixin, "compute_loss", lambda *_, **__: print("at work", flush=True) or time.sleep(0.02))
        patch(torch, "save", lambda *_, **__: time.sleep(0.02))
        patch(Trainer, "_save_rng_state", lambda *_: time.sleep(0.02))
    elif kind == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails, as on a full disk
        limit = (30_000, resource.RLIM_INFINITY)
        patch(
            torch, "save", lambda _, path: checkpoint in str(path) and resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        )
    elif kind == "model.safetensors":
        patch(Trainer, "_save_optimizer_and_scheduler", lambda self, path: checkpoint in path and halve(path, kind))
    elif kind == "trainer_state.json":
        patch(TrainerState, "save_to_json", lambda _, path: checkpoint in path and halve(path, ""), after=True)
    else:
        patch(
            torch, "save", lambda _, path: str(path).endswith(f"{checkpoint}/{kind}") and halve(path, ""), after=True
        )


def patch(owner, name, action, after=False):
    original = getattr(owner, name)

    def patched(*args, **kwargs):
        if not after:
            action(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            action(*args, **kwargs)
        return result

    setattr(owner, name, patched)


def halve(folder, name):
    path = Path(folder, name) if name else Path(folder)
    os.truncate(path, path.stat().st_size // 2)
    kill()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)
