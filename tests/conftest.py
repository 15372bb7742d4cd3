"""Settings of every test, and fixtures that tests of several folders use."""

import gc
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils.logging import set_verbosity_warning

from support import ROOT
from support import script_data as made
from support.killed_runs import glue_like
from support.training import HEADS

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


def pytest_configure(config):
    """Have what our own code calls that is deprecated fail the test."""
    own = ["hf_rdrop", *(path.stem for path in (ROOT / "scripts").iterdir() if path.name != "accelerate")]
    for module in own:
        for category in ("DeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", rf"error::{category}:{module}(\.|$)")


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_search():
    """Each training, and each measured sample, begins with collecting garbage, which took longer than the rest of a
    tiny training while it searched all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def library_is_quiet_again():
    """Forget the levels that a script which was run in this process has given to loggers."""
    for logger in (logging.getLogger(name) for name in ("hf_rdrop", "hf_rdrop.training.first_batch")):
        logger.setLevel(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    set_verbosity_warning()


@pytest.fixture(params=HEADS)
def head(request):
    return request.param


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Folder of a tiny BERT without a head, for the scripts."""
    return made.make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """Arguments of run_glue.py but for its output folder, and the folder of its uninterrupted run."""
    return glue_like(tmp_path_factory.mktemp("glue"), "run_glue")
