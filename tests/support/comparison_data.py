"""Made-up runs for the tests of a comparison's report and pictures."""

METRICS = {"ner": "eval_f1", "mt": "eval_bleu"}
ARMS = ["baseline", "baseline-2x", "rdrop", "rdrop-shared"]
SCORES = {
    ("ner", "baseline"): (0.50, 0.60, 0.55),
    ("ner", "baseline-2x"): (0.52, 0.61, 0.54),
    ("ner", "rdrop"): (0.55, 0.64, 0.57),
    ("ner", "rdrop-shared"): (0.53, 0.61, 0.57),
    ("mt", "baseline"): (20.0, 21.0, 22.0),
    ("mt", "baseline-2x"): (20.5, 21.0, 22.6),
    ("mt", "rdrop"): (19.0, 20.5, 21.0),
    ("mt", "rdrop-shared"): (20.0, 21.4, 21.8),
}
SECONDS = {"baseline": 10.0, "baseline-2x": 20.0, "rdrop": 19.0, "rdrop-shared": 13.0}


def make_run(task, arm, seed, score, seconds=10.0, **metrics):
    points = range(1, 9)
    history = {
        "step": [10 * i for i in points],
        "epoch": [i / 4 for i in points],
        "loss": [1 / i for i in points],
        "ce_loss": [1 / i for i in points],
        "kl_loss": [0.1 / i * arm.startswith("rdrop") for i in points],
    }
    figures = {METRICS[task]: score, "train_runtime": seconds, "eval_runtime": 1.0, **metrics}
    return {"task": task, "arm": arm, "seed": seed, "metrics": figures, "history": history}


def make_runs():
    """Two tasks, four arms, three seeds."""
    return [
        make_run(task, arm, seed, score, SECONDS[arm], eval_loss=0.5 + seed / 10, train_samples_per_second=100.0)
        for (task, arm), scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]


def make_choices():
    """Trials with three alphas for R-Drop, and of the baseline; one failed."""
    trials = [
        {"settings": {"dropout": dropout, "rdrop_alpha": alpha}, "score": 0.5 + alpha / 10 - dropout, "seed": 7}
        for alpha in (0.5, 1.0, 2.0)
        for dropout in (0.1, 0.2)
    ]
    plain = [{"settings": {"dropout": d}, "score": s, "seed": 7} for d, s in ((0.1, 0.41), (0.2, 0.44), (0.3, None))]
    return {
        ("ner", "baseline"): {"settings": {"dropout": 0.2}, "trials": plain},
        ("ner", "rdrop"): {"settings": {"dropout": 0.1, "rdrop_alpha": 2.0}, "trials": trials},
        ("ner", "rdrop-shared"): {
            "settings": {"dropout": 0.1, "rdrop_alpha": 2.0},
            "taken_from": "rdrop",
            "trials": [],
        },
    }
