"""Labels, texts and naive counts that tests of several metrics use."""

import math
from collections import Counter

import numpy as np


def naive_accuracy(predicted, actual):
    return sum(p == a for p, a in zip(predicted, actual, strict=True)) / len(actual)


def naive_f1(predicted, actual, positive=1):
    hits = sum(p == a == positive for p, a in zip(predicted, actual, strict=True))
    total = sum(p == positive for p in predicted) + sum(a == positive for a in actual)
    return 2 * hits / total if total else 0.0


def naive_mcc(predicted, actual):
    pairs = Counter(zip(predicted, actual, strict=True))
    tp, tn, fp, fn = pairs[1, 1], pairs[0, 0], pairs[1, 0], pairs[0, 1]
    denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / denominator if denominator else 0.0


def naive_pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def random_labels(seed, classes=2, size=200):
    rng = np.random.default_rng(seed)
    actual = rng.integers(0, classes, size)
    return np.where(rng.random(size) < 0.7, actual, rng.integers(0, classes, size)), actual


HYPOTHESES = ["the small dog sees an old cat today", "a king paints the long river near the house"]
REFERENCES = ["the small dog saw an old cat today", "the king paints the long river near a big house"]
