"""run_image_classification.py: real short runs on digits and folders, and refusals of what is no image."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from transformers import ViTForImageClassification, ViTImageProcessorPil

import consistency
import init_model
import run_image_classification
import sweep
from finetuning.command_line import cli
from tasks import image_processing
from tasks.images import read_digits, read_folder

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 40), "red": (210, 30, 20)}
QUICK = ["--use_cpu", "--report_to=none", "--disable_tqdm=true", "--logging_steps=1", "--save_strategy=no"]
QUICK += ["--learning_rate=3e-3", "--per_device_train_batch_size=16", "--per_device_eval_batch_size=64"]
SIZES = ["--hidden_size=16", "--num_layers=2", "--num_heads=2"]


def vision(folder, *more):
    return str(init_model.main(["--architecture=vision", "--output_dir", str(folder), *SIZES, *more]))


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A model for digits."""
    folder = tmp_path_factory.mktemp("models") / "grey"
    return vision(folder, "--image_size=8", "--patch_size=2", "--num_channels=1")


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return vision(tmp_path_factory.mktemp("models") / "colour", "--image_size=8", "--patch_size=4")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train, validation and test (without classes) folders of noisy colours, in several formats, modes and sizes."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        for name, rgb in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (int(draw.integers(1, 20)), int(draw.integers(1, 20)), 3)
                values = np.clip(np.array(rgb) + draw.normal(0, 20, size), 0, 255).astype(np.uint8)
                image = Image.fromarray(values)
                kind = ("png", "jpg", "bmp", "webp", "gif", "tiff")[number % 6]
                image = image.convert("RGBA") if number == 6 else image
                image.save(folder / f"{number:02}.{kind}")
    (root / "test").mkdir()
    for position, name in enumerate(COLOURS):
        shutil.copy(root / "validation" / name / "00.png", root / "test" / f"{position}.png")
    return root


def run(folder, model, *more, steps=("--do_train", "--do_eval")):
    argv = [f"--model_name_or_path={model}", f"--output_dir={folder}", *steps, *QUICK, *map(str, more)]
    return run_image_classification.main(argv)


def folders(root, *splits):
    return [f"--{split}_dir={root / split}" for split in splits]


# ---- Runs ----


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_digits_are_learnt(grey, tmp_path, alpha):
    more = ("--digits", "--num_train_epochs=8", f"--rdrop_alpha={alpha}", "--max_train_samples=400")
    metrics = run(tmp_path / "out", grey, *more)
    assert (metrics["train_samples"], metrics["eval_samples"]) == (400, 602)
    assert 0.2 < metrics["eval_accuracy"] < 1  # by chance 0.1
    assert {"eval_f1_macro", "eval_ece", "eval_nll", "eval_brier"} <= metrics.keys()
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "ce_loss" in entry]
    assert all((entry["kl_loss"] > 0) == (alpha > 0) for entry in logged)
    assert all(abs(entry["loss"] - entry["ce_loss"] - alpha / 2 * entry["kl_loss"]) < 1e-4 for entry in logged)
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == json.loads(json.dumps(metrics))
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {index: str(index) for index in range(10)}

    # The saved folder is all that is needed to predict as the script did.
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    images, classes, _ = read_digits("validation")
    with torch.no_grad():
        found = model.eval()(**processor(images, return_tensors="pt")).logits.argmax(-1)
    assert float((found == torch.tensor(classes)).double().mean()) == pytest.approx(metrics["eval_accuracy"])


def test_folders_of_images(colour, pictures, tmp_path):
    sources = folders(pictures, "train", "validation", "test")
    steps = ("--do_train", "--do_eval", "--do_predict")
    metrics = run(tmp_path / "out", colour, *sources, "--num_train_epochs=12", "--rdrop_alpha=0.6", steps=steps)
    assert (metrics["train_samples"], metrics["eval_samples"], metrics["predict_samples"]) == (36, 12, 3)
    assert metrics["eval_accuracy"] > 0.8
    lines = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()
    assert lines == ["image\tprediction", "0.png\tblue", "1.png\tgreen", "2.png\tred"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(pictures) not in card and str(tmp_path) not in card

    # Evaluated alone it is the same, also where the classes' folders are only those of two of them.
    again = run(tmp_path / "again", tmp_path / "out", *sources[1:], steps=("--do_eval", "--do_predict"))
    assert again["eval_accuracy"] == metrics["eval_accuracy"] and again["eval_loss"] == metrics["eval_loss"]
    assert (tmp_path / "again" / "predict_results.txt").read_text().splitlines() == lines
    shutil.copytree(pictures / "validation", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "green")
    two = run(tmp_path / "on-two", tmp_path / "out", f"--validation_dir={tmp_path / 'two'}", steps=("--do_eval",))
    assert two["eval_samples"] == 8


def test_a_test_folder_with_classes_is_scored(colour, pictures, tmp_path):
    sources = [*folders(pictures, "train"), f"--test_dir={pictures / 'validation'}"]
    metrics = run(tmp_path / "out", colour, *sources, "--max_steps=2", steps=("--do_train", "--do_predict"))
    assert "predict_accuracy" in metrics and metrics["predict_samples"] == 12
    lines = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()
    assert lines[1].startswith("blue/00.png\t") and lines[-1].startswith("red/03.")


def stand_in(monkeypatch, **columns):
    """A data set of the Hub with these columns."""
    images = [Image.fromarray(np.full((9, 7), 80 * (row % 3), np.uint8)) for row in range(24)]
    features = {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["black", "dark", "light"])}
    table = {"img": images, "fine": [row % 3 for row in range(24)], **columns}
    split = datasets.Dataset.from_dict(
        table, features=datasets.Features({n: f for n, f in features.items() if n in table})
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: {"train": split, "test": split})


HUB = ("--dataset_name=some/images", "--image_column_name=img", "--label_column_name=fine")


def test_a_data_set_of_the_hub(grey, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    steps = ("--do_train", "--do_eval", "--do_predict")
    more = ("--validation_from_train=0.25", "--num_train_epochs=2", "--label_noise=0.3", "--consistency_samples=2")
    metrics = run(tmp_path / "out", grey, *HUB, *more, steps=steps)
    assert (metrics["train_samples"], metrics["eval_samples"]) == (18, 6)
    assert "predict_accuracy" in metrics and metrics["eval_consistency_kl_between"] > 0
    lines = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction" and {line.split("\t")[1] for line in lines[1:]} <= {
        "black",
        "dark",
        "light",
    }
    assert "image-classification" in (tmp_path / "out" / "README.md").read_text()


def test_label_noise_changes_training_targets_only(grey, tmp_path, monkeypatch):
    seen = {}

    class Recorder(image_processing.PreparedImages):
        def __init__(self, dataset, column, targets, processor, channels):
            seen[len(dataset)] = targets
            super().__init__(dataset, column, targets, processor, channels)

    monkeypatch.setattr(run_image_classification, "PreparedImages", Recorder)
    more = ("--digits", "--max_train_samples=50", "--max_eval_samples=40", "--max_steps=1", "--label_noise=0.2")
    run(tmp_path / "out", grey, *more)
    clean = {50: read_digits("train")[1][:50], 40: read_digits("validation")[1][:40]}
    assert sum(a != b for a, b in zip(seen[50], clean[50], strict=True)) == 10
    assert seen[40] == clean[40]


TINY = ["--digits", "--max_train_samples=60", "--max_eval_samples=30"]


def test_consistency_takes_the_script(grey, tmp_path):
    run(tmp_path / "model", grey, *TINY, "--max_steps=2")
    models = ["--models", f"a={tmp_path / 'model'}", "--num_samples=2", f"--output_dir={tmp_path / 'consistency'}"]
    data = [*TINY, "--use_cpu", "--disable_tqdm=true", "--per_device_eval_batch_size=32"]
    found = consistency.main(["--script=run_image_classification.py", *models, "--", *data])
    assert found["score"] == "accuracy"


def test_the_command_after_a_sweep_evaluates_where_there_are_validation_images():
    line = ["--script=run_image_classification.py", "--metric=eval_accuracy", "--output_dir=x", "--"]
    for data, evaluates in (
        (["--digits"], True),
        (["--train_dir=a"], False),
        (["--train_dir=a", "--validation_dir=b"], True),
    ):
        assert ("--do_eval" in sweep.final_command(sweep.parse([*line, *data]), {})) == evaluates


@pytest.mark.slow
def test_sweep_takes_the_script(grey, tmp_path):
    line = ["--script=run_image_classification.py", "--metric=eval_accuracy", "--num_trials=2", "--rdrop_alpha=0.6"]
    fixed = ["--rdrop_dropout=0.1", "--learning_rate", "1e-3", "3e-3", f"--output_dir={tmp_path / 'sweep'}"]
    others = [option for option in QUICK if "learning_rate" not in option and "strategy" not in option]
    model = [f"--model_name_or_path={grey}", "--num_train_epochs=1"]
    best = sweep.main([*line, *fixed, "--", *TINY, *model, *others])
    assert 0 <= best["score"] <= 1


# ---- Data ----


def test_the_digits_are_scikit_learns():
    digits = load_digits()
    parts = [read_digits(split) for split in ("train", "validation")]
    assert [len(part[0]) for part in parts] == [1195, 602]
    shares = [np.bincount(part[1]) for part in parts]
    assert (abs(shares[0] - 2 * shares[1]) <= 2).all()  # each class by the same share
    pixels = [np.asarray(image).tobytes() for part in parts for image in part[0]]
    everything = zip(digits.images, digits.target.tolist(), strict=True)
    expected = {np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label for image, label in everything}
    assert len(pixels) == len(digits.images) and set(pixels) == expected.keys()
    for part in parts:
        assert all(
            expected[np.asarray(image).tobytes()] == label for image, label in zip(part[0], part[1], strict=True)
        )
    assert parts[0][2].names == [str(digit) for digit in range(10)]


def test_writers_of_the_validation_digits_are_others():
    """Neighbours are of one writer: a split at random is easier than ours, which goes by the order."""
    (train, y, _), (validation, z, _) = (read_digits(split) for split in ("train", "validation"))
    x, v = (np.array([np.asarray(image).ravel() for image in part], float) for part in (train, validation))
    ours = KNeighborsClassifier(1).fit(x, y).score(v, z)
    everything, classes = np.concatenate([x, v]), np.array([*y, *z])
    order = np.random.default_rng(0).permutation(len(everything))
    first, last = order[: len(x)], order[len(x) :]
    random = KNeighborsClassifier(1).fit(everything[first], classes[first]).score(everything[last], classes[last])
    assert ours < random - 0.01


def test_images_are_converted_turned_and_scaled_as_the_processor_says(tmp_path):
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    wide = np.zeros((2, 6, 3), np.uint8)
    wide[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(wide, -1)).save(tmp_path / "upright.png")
    Image.fromarray(wide).convert("CMYK").save(tmp_path / "cmyk.tiff")
    Image.fromarray(wide).convert("L").save(tmp_path / "grey.png")
    files = [str(tmp_path / name) for name in ("turned.png", "upright.png", "cmyk.tiff", "grey.png")]
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    prepared = image_processing.PreparedImages(rows, "image", [3, 1, 2, 0], processor, 3)
    turned, upright, cmyk, grey = (prepared[row]["pixel_values"] for row in range(4))
    assert turned.shape == grey.shape == (3, 4, 4) and prepared[0]["labels"] == 3
    torch.testing.assert_close(turned, upright)
    torch.testing.assert_close(cmyk, grey)
    assert turned[:, :, -1].min() > turned[:, :, 0].max() and grey[:, 0].min() > grey[:, -1].max()
    assert "labels" not in image_processing.PreparedImages(rows, "image", None, processor, 3)[0]
    with pytest.raises(ValueError, match="5 channels"):
        image_processing.PreparedImages(rows, "image", None, processor, 5)


# ---- Refusals ----


def refused(folder, capsys, *argv):
    """The one message with which the script ends, before anything is written."""
    steps = () if any(str(argument).startswith("--do_") for argument in argv) else ("--do_train", "--do_eval")
    with pytest.raises(SystemExit) as stop:
        cli(
            lambda: run_image_classification.main(
                [f"--output_dir={folder / 'out'}", *steps, *QUICK, "--max_steps=1", *map(str, argv)]
            )
        )
    captured = capsys.readouterr()
    assert stop.value.code == 2
    errors = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in captured.err, captured.err
    assert not (folder / "out").exists()
    return errors[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no data", "--digits"]),
        (["--digits", "--train_dir=x"], ["more than one", "--digits"]),
        (["--digits", "--dataset_name=x"], ["more than one"]),
        (["--digits", "--label_noise=2"], ["--label_noise", "from 0 to 1"]),
        (["--digits", "--do_predict"], ["--digits", "leave --do_predict out"]),
        (["--digits", "--do_eval", "--validation_from_train=0.2"], ["--validation_from_train", "--do_train"]),
        (["--digits", "--max_train_samples=0"], ["--max_train_samples", "at least 1"]),
        (["--digits", "--train_file=x.csv"], ["unknown argument --train_file", "--train_dir"]),
        (["--train_dir={}/train"], ["--do_eval needs images", "--validation_dir"]),
        (["--train_dir={}/nowhere", "--do_train"], ["nowhere", "does not exist"]),
        (["--train_dir={}/test/0.png", "--do_train"], ["0.png", "is a file"]),
        (["--train_dir={}/test", "--do_train"], ["0.png", "lies in no class's folder"]),
        (["--train_dir={}", "--do_train"], ["blue", "folder inside the folder of class", "train"]),
    ],
)
def test_arguments_and_folders(grey, pictures, tmp_path, capsys, argv, words):
    argv = [argument.format(pictures) for argument in argv]
    message = refused(tmp_path, capsys, f"--model_name_or_path={grey}", *argv)
    for word in words:
        assert word in message


def broken_png(file):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-1500])


BROKEN = {
    "truncated.png": (broken_png, "truncated"),
    "text.jpg": (lambda file: file.write_text("no image"), "cannot identify"),
    "empty.png": (lambda file: file.write_bytes(b""), "cannot identify"),
    "deep.png": (lambda file: Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(file), "more than 8 bits"),
    "real.tiff": (lambda file: Image.fromarray(np.ones((4, 4), np.float32)).save(file), "more than 8 bits"),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", list(BROKEN))
def test_a_bad_image_is_found_before_the_first_step(colour, pictures, tmp_path, capsys, name, split):
    shutil.copytree(pictures, tmp_path / "own")
    write, reason = BROKEN[name]
    write(tmp_path / "own" / split / "green" / name)
    model = f"--model_name_or_path={colour}"
    message = refused(tmp_path, capsys, model, *folders(tmp_path / "own", "train", "validation"))
    for word in (f"of the {split} data", f"green/{name}", reason):
        assert word in message


def test_workers_find_the_bad_image_too(colour, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "own")
    broken_png(tmp_path / "own" / "train" / "red" / "zz.png")
    more = folders(tmp_path / "own", "train", "validation")
    message = refused(tmp_path, capsys, f"--model_name_or_path={colour}", *more, "--dataloader_num_workers=2")
    assert "row 37 of the train data" in message and "zz.png" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda own: shutil.rmtree(own / "train" / "blue") or shutil.rmtree(own / "train" / "red"),
            ["'green'", "nothing to tell apart"],
        ),
        (
            lambda own: (own / "validation" / "red").rename(own / "validation" / "pink"),
            ["'pink'", "does not occur in the training data"],
        ),
        (lambda own: (own / "train" / "white").mkdir(), ["white", "holds no image"]),
        (lambda own: shutil.copy(own / "test" / "0.png", own / "train"), ["train/0.png", "no class's folder"]),
        (lambda own: shutil.rmtree(own / "train") or (own / "train").mkdir(), ["train", "holds no image"]),
    ],
)
def test_classes_that_are_unclear(colour, pictures, tmp_path, capsys, change, words):
    shutil.copytree(pictures, tmp_path / "own")
    change(tmp_path / "own")
    more = folders(tmp_path / "own", "train", "validation")
    message = refused(tmp_path, capsys, f"--model_name_or_path={colour}", *more)
    for word in words:
        assert word in message


def test_other_files_are_reported_and_left_out(pictures, tmp_path, caplog):
    shutil.copytree(pictures / "train", tmp_path / "train")
    (tmp_path / "train" / "red" / "notes.txt").write_text("about")
    (tmp_path / "train" / "red" / ".hidden.png").write_text("about")
    files, classes = read_folder(str(tmp_path / "train"), needs_classes=True)
    assert len(files) == len(classes) == 36 and "notes.txt" in caplog.text and ".hidden" not in caplog.text


@pytest.mark.parametrize(
    ("argv", "columns", "words"),
    [
        (["--image_column_name=image"], {}, ["no column 'image'", "img"]),
        (["--image_column_name=fine"], {}, ["column 'fine'", "no images", "ClassLabel"]),
        (["--label_column_name=label"], {}, ["no column 'label'", "--label_column_name"]),
        ([], {"fine": [None, *[0, 1] * 11, 2]}, ["row 1 of the train data", "missing"]),
        ([], {"fine": [-1, *[0, 1] * 11, 2]}, ["row 1 of the train data", "-1 is out of range"]),
        ([], {"img": [None] * 24}, ["row 1 of the train data", "there is no image"]),
    ],
)
def test_columns_of_the_hub(grey, tmp_path, capsys, monkeypatch, argv, columns, words):
    stand_in(monkeypatch, **columns)
    message = refused(tmp_path, capsys, f"--model_name_or_path={grey}", *HUB, *argv, "--do_train")
    for word in words:
        assert word in message


def test_models_that_do_not_fit(grey, colour, pictures, tmp_path, capsys):
    sources = folders(pictures, "train", "validation")
    for name in ("bare", "sizes", "other"):
        shutil.copytree(colour, tmp_path / name)
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    message = refused(tmp_path, capsys, f"--model_name_or_path={tmp_path / 'bare'}", *sources)
    assert "preprocessor_config.json" in message
    # The processor leaves the images in their sizes, or makes them of another than the model's.
    for name, size in (("sizes", {"do_resize": False}), ("other", {"size": {"height": 12, "width": 12}})):
        ViTImageProcessorPil(**size).save_pretrained(tmp_path / name)
    message = refused(tmp_path, capsys, f"--model_name_or_path={tmp_path / 'sizes'}", *sources)
    assert "row 2 of the train data" in message and "do not fit into one batch" in message
    message = refused(tmp_path, capsys, f"--model_name_or_path={tmp_path / 'other'}", *sources)
    assert "12" in message and "8" in message
    message = refused(tmp_path, capsys, f"--model_name_or_path={grey}", f"--image_processor_name={colour}", "--digits")
    assert "row 1" in message and "mean must have 1 elements" in message and "--image_processor_name" in message
    message = refused(tmp_path, capsys, f"--model_name_or_path={grey}", "--digits", "--rdrop_dropout=0")
    assert "dropout" in message


def test_a_model_of_text_is_refused(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a b\nc d\n")
    more = ["--train_files", str(tmp_path / "texts.txt"), "--vocab_size=300", "--output_dir", str(tmp_path / "bert")]
    init_model.main([*SIZES, *more])
    message = refused(tmp_path, capsys, f"--model_name_or_path={tmp_path / 'bert'}", "--digits")
    assert "image" in message


def test_a_metric_that_no_evaluation_will_have_is_refused_at_the_start(grey, tmp_path):
    with pytest.raises(ValueError, match=r"f1: .*no such metric.*f1_macro"):
        run(tmp_path / "out", grey, *TINY, "--eval_strategy=epoch", "--metric_for_best_model=f1")
    assert not (tmp_path / "out").exists()
