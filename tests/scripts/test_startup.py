"""Command lines of compare.py, sweep.py and reference_cards.py are answered without what takes long to import."""

import json
import signal
import subprocess
import sys

import pytest

from comparison import devices
from finetuning.command_line import STATUS
from hf_rdrop import sigterm
from support import ROOT

SCRIPTS = ROOT / "scripts"
HEAVY = ("torch", "transformers", "datasets", "evaluate", "sklearn", "scipy", "pandas", "matplotlib")
PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(SCRIPTS)!r})
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("loaded:", *sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)
""".replace(f"{HEAVY!r} &", f"set({HEAVY!r}) &")


def answer(folder, *line):
    """Status, output and heavy modules of a command line."""
    command = [sys.executable, "-c", PROGRAM, str(SCRIPTS / line[0]), *line[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    told, _, loaded = done.stderr.rpartition("loaded:")
    return done.returncode, done.stdout + told, loaded.split()


TASK = ("--script", "run_ner.py", "--metric", "eval_f1", "--output_dir", "x")
ROW = {"task": "a", "metric": "eval_f1", "arm": "baseline"}
RUN = {"task": "a", "arm": "baseline", "seed": 1, "arguments": [], "metrics": {"eval_f1": 0.5}, "history": {}}


@pytest.mark.parametrize(
    ("line", "status", "word"),
    [
        (("compare.py", "--help"), 0, "usage:"),
        (("compare.py", "--demo", "--dry_run"), 0, "24 of 24 runs would start"),
        (("compare.py", "--demo", "--quick", "--dry_run"), 0, "2 of 2 runs would start"),
        (("compare.py", *TASK, "--tune", "learning_rate=1,2", "--dry_run", "--", "--do_train"), 0, "would start"),
        (("compare.py", "--quick"), 2, "--demo"),
        (("compare.py", *TASK, "--rdrop_alpha", "-1", "--", "--do_train"), 2, "rdrop_alpha must be"),
        (("compare.py", "--sedes", "1"), 2, "usage:"),
        (("compare.py", "--demo", "--dry_run", "--take_from", "cut.json"), 2, "is no comparison.json"),
        (("sweep.py", "--help"), 0, "usage:"),
        (("sweep.py", *TASK, "--rdrop_alpha", "-1", "2", "--", "--do_x"), 2, "rdrop_alpha must be"),
        (("sweep.py", *TASK, "--", "--seed", "1", "--output_dir", "y"), 2, "--output_dir is set by sweep.py"),
        (("reference_cards.py", "--help"), 0, "usage:"),
        (("reference_cards.py", "--comparison", "cut.json", "--output_dir", "x"), 2, "is no comparison.json"),
        (("reference_cards.py", "--comparison", "c.json", "--output_dir", "x", "--tasks", "b"), 2, "there are a"),
    ],
)
def test_answered_without_heavy_modules(tmp_path, line, status, word):
    (tmp_path / "cut.json").write_text('{"rows": [')
    (tmp_path / "c.json").write_text(json.dumps({"rows": [ROW], "runs": [RUN], "trials": []}))
    if devices.may_have_one():
        pytest.skip("how many runs are started at once is torch's to say where there may be an accelerator")
    code, told, loaded = answer(tmp_path, *line)
    assert (code, loaded) == (status, []) and word in told, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "cut.json"]


def test_the_check_sees_a_heavy_module(tmp_path):
    (tmp_path / "heavy.py").write_text("import scipy, json")
    assert answer(tmp_path, tmp_path / "heavy.py")[2] == ["scipy"]


def test_status_of_a_terminated_script_is_the_library_s():
    assert STATUS == sigterm.STATUS == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None", "cuda"),
        ("cuda = None\nhip = '6.4'", "hip"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu = None", "cpu"),
        ("__version__ = '3'", ""),
        ("cuda =", ""),
    ],
)
def test_what_torch_was_built_for(tmp_path, monkeypatch, version, found):
    (tmp_path / "version.py").write_text(version)
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert devices.torch_build() == found
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(devices, "DEVICES", (str(tmp_path),))
    assert devices.may_have_one() == (found != "cpu")  # when in doubt torch is asked
    monkeypatch.setattr(devices, "DEVICES", (str(tmp_path / "none"),))
    assert not devices.may_have_one()
