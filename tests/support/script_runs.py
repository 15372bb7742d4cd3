"""Short runs of the scripts on tiny data, and what they leave behind."""

import json

from safetensors.torch import load_file

from support import script_data as made

QUICK = [
    "--use_cpu",
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "1",
    "--learning_rate",
    "1e-3",
    "--save_strategy",
    "no",
]


def arguments(folder, files, model, *more, steps="do_train do_eval do_predict", quick=QUICK):
    """A command line that trains on `files` (train, validation, test) for three steps."""
    options = dict(zip(("train_file", "validation_file", "test_file"), files, strict=False))
    options |= {"model_name_or_path": model, "output_dir": str(folder / "out")}
    if quick is QUICK and "--max_steps" not in more and "--num_train_epochs" not in more:
        options["max_steps"] = "3"
    flags = [f"--{step}" for step in steps.split()]
    return [*(f"--{name}={value}" for name, value in options.items()), *flags, *quick, *map(str, more)]


def write_splits(folder, rows, name="{split}.jsonl", sizes=(24, 12, 7)):
    """Files for training, validation and test of `rows(count, seed)`."""
    splits = zip(("train", "validation", "test"), sizes, strict=True)
    return [
        made.write(folder / name.format(split=split), rows(size, seed)) for seed, (split, size) in enumerate(splits)
    ]


def classification(kind):
    return lambda rows, seed: made.classification_rows(kind, rows, seed)


def read(folder, name="all_results.json"):
    return json.loads((folder / "out" / name).read_text())


def logged(folder):
    return [entry for entry in read(folder, "trainer_state.json")["log_history"] if "loss" in entry]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder_a, folder_b, **tolerance):
    a, b = weights(folder_a), weights(folder_b)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if tolerance and not name.endswith("key.bias"):  # softmax ignores it: its gradient is rounding alone
            assert tensor.allclose(b[name], **tolerance), name
        elif not tolerance:
            assert tensor.equal(b[name]), name
