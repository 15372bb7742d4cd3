"""Damaged and unfinished checkpoints are named, and the newest whole one is offered."""

import errno
import os
import random
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file

from finetuning.run import find_checkpoint
from hf_rdrop import RDropTrainer
from hf_rdrop.checkpoints import CheckpointError, check_checkpoint, find_damage, last_finished, saving
from hf_rdrop.checkpoints.integrity import checkpoint_to_resume
from support.training import make_model, train

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json")


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "zeros":
        file.write_bytes(bytes(file.stat().st_size))
    elif how == "garbage":
        file.write_bytes(random.Random(0).randbytes(file.stat().st_size))
    elif how == "one byte":  # in the header of safetensors; in the data of what torch.save wrote, not its padding
        content, place = bytearray(file.read_bytes()), 2
        if file.suffix != ".safetensors":
            with ZipFile(file) as parts:
                data = parts.read(next(name for name in parts.namelist() if name.endswith("data.pkl")))
            place = content.index(data) + len(data) // 2
        content[place] ^= 255
        file.write_bytes(content)


@pytest.fixture
def checkpoints(glue, tmp_path):
    """The checkpoints of an uninterrupted run, of steps 2 to 12."""
    return Path(shutil.copytree(glue[1], tmp_path / "out"))


# Not every model has a config.json, and with a byte changed JSON is still JSON.
UNNOTICED = (("config.json", "missing"), ("config.json", "one byte"), ("trainer_state.json", "one byte"))
DAMAGE = [
    (name, how)
    for name in FILES
    for how in ("missing", "truncated", "empty", "zeros", "garbage", "one byte")
    if (name, how) not in UNNOTICED
]


@pytest.mark.parametrize(("name", "how"), DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_offered(checkpoints, name, how):
    last, before = checkpoints / "checkpoint-12", checkpoints / "checkpoint-10"
    assert find_damage(last) is None
    damage(last / name, how)
    damage(before / "model.safetensors", "truncated")
    content = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as error:
        find_checkpoint(str(checkpoints), str(last))
    words = str(error.value)
    assert f"{last} is " in words and name in words
    assert f"--resume_from_checkpoint {checkpoints / 'checkpoint-8'}." in words
    if name == "trainer_state.json":  # killed while it saved: that must not stop what goes on by itself
        damage(before / "trainer_state.json", "missing")
        assert find_checkpoint(str(checkpoints), "last") == str(checkpoints / "checkpoint-8")
    else:
        with pytest.raises(ValueError, match=name):
            find_checkpoint(str(checkpoints), "last")
        assert content == {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}


def test_the_trainer_refuses_a_damaged_checkpoint_and_passes_over_unfinished_ones(tmp_path, caplog):
    out = tmp_path / "out"
    train(make_model("single"), output_dir=str(out), save_strategy="steps", save_steps=1, max_steps=4)
    damage(out / "checkpoint-4" / "trainer_state.json", "truncated")

    class Resuming(RDropTrainer):
        def train(self):
            return super().train(resume_from_checkpoint=self.given)

    Resuming.given = True
    trainer = train(make_model("single"), "single", Resuming, output_dir=str(out), max_steps=4)
    assert trainer.state.global_step == 4 and "checkpoint-4 is passed over" in caplog.text
    damage(out / "checkpoint-3" / "optimizer.pt", "truncated")
    for given in (True, str(out / "checkpoint-3")):
        Resuming.given = given
        with pytest.raises(ValueError) as error:
            train(make_model("single"), "single", Resuming, output_dir=str(out))
        assert "checkpoint-3 is damaged: optimizer.pt is" in str(error.value)
        assert f"resume_from_checkpoint={str(out / 'checkpoint-2')!r}" in str(error.value)


def test_other_kinds_of_checkpoints_are_whole(tmp_path, checkpoints):
    def variant(name, *remove):
        folder = shutil.copytree(checkpoints / "checkpoint-2", tmp_path / name)
        for file in remove:
            (folder / file).unlink()
        return folder

    only_model = variant("only-model", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    ranks = variant("ranks", "rng_state.pth")
    for rank in range(2):
        torch.save({"cpu": torch.get_rng_state()}, ranks / f"rng_state_{rank}.pth")
    adapter = variant("adapter", "model.safetensors", "config.json")
    save_file({"lora": torch.ones(3)}, adapter / "adapter_model.safetensors")
    sharded = variant("sharded", "model.safetensors")
    make_model("single").save_pretrained(sharded, max_shard_size="8KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    deepspeed = variant("deepspeed", "model.safetensors", "optimizer.pt", "scheduler.pt")
    (deepspeed / "global_step2").mkdir()
    torch.save({}, deepspeed / "global_step2" / "mp_rank_00_model_states.pt")
    fsdp = variant("fsdp", "model.safetensors", "optimizer.pt")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / part).mkdir()
        (fsdp / part / "__0_0.distcp").write_bytes(b"x")
    for folder in (only_model, ranks, adapter, sharded, deepspeed, fsdp):
        assert find_damage(folder) is None, folder
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002.* is missing"):
        check_checkpoint(sharded)


def test_a_checkpoint_written_anew_is_unfinished_until_it_is_whole(checkpoints):
    """What an earlier run has left there must not vouch for a mixture of both."""
    checkpoint = checkpoints / "checkpoint-12"
    with pytest.raises(KeyboardInterrupt), saving(checkpoint):
        assert last_finished(checkpoints) == checkpoints / "checkpoint-10"
        raise KeyboardInterrupt
    assert checkpoint.is_dir() and last_finished(checkpoints) == checkpoints / "checkpoint-10"
    with pytest.raises(OSError, match="elsewhere") as error, saving(checkpoint):
        raise ConnectionError("elsewhere")  # not the disk's doing
    assert not isinstance(error.value, CheckpointError) and checkpoint.is_dir()
    with pytest.raises(CheckpointError, match=r"No space left on device .*checkpoint-10\b"), saving(checkpoint):
        raise RuntimeError from OSError(errno.ENOSPC, "No space left on device")
    assert not checkpoint.exists() and (checkpoints / "checkpoint-10").exists()


def test_going_on_without_a_finished_checkpoint_says_what_to_do(tmp_path, caplog):
    assert checkpoint_to_resume(None, tmp_path) is None and checkpoint_to_resume(False, tmp_path) is None
    start, end = (
        "^resume_from_checkpoint=True: .* holds no complete checkpoint",
        r"\. Start anew in another output folder",
    )
    with pytest.raises(ValueError, match=f"{start}{end}, or name"):
        checkpoint_to_resume(True, tmp_path / "none")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=rf"{start} \(checkpoint-3 is unfinished: .*\){end}, or name"):
        checkpoint_to_resume(True, tmp_path)
    assert "checkpoint-3 is passed over, as it is unfinished" in caplog.text
    with pytest.raises(ValueError, match=r"^--resume_from_checkpoint True: "):
        checkpoint_to_resume(True, tmp_path, "--resume_from_checkpoint {}")
    with pytest.raises(ValueError, match="No checkpoint beside it is whole: start anew in another folder"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-3"), tmp_path)
