"""Naive float64 re-derivations of every formula: loops that share no code with hf_rdrop."""

import math


def naive_softmax(scores):
    top = max(scores)
    exps = [math.exp(s - top) for s in scores]
    return [e / sum(exps) for e in exps]


def naive_symmetric_kl(a, b):
    """1/2 sum_c (p_c - q_c)(log p_c - log q_c) for two lists of scores; a class that is -inf in both adds nothing."""
    p, q = naive_softmax(a), naive_softmax(b)
    return 0.5 * sum((x - y) * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True) if x > 0 or y > 0)


def naive_bernoulli_kl(a, b):
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    terms = [(p, q), (1 - p, 1 - q)]
    return 0.5 * sum((x - y) * (math.log(x) - math.log(y)) for x, y in terms)


def naive_cross_entropy(scores, label, smoothing=0.0):
    logs = [math.log(p) for p in naive_softmax(scores)]
    return -(1 - smoothing) * logs[label] - smoothing * sum(logs) / len(logs)


def pairs(m):
    return [(i, j) for i in range(m) for j in range(i + 1, m)]


def torch_reference(logits, labels, alpha, problem_type="single_label_classification", smoothing=0.0):
    """R-Drop's loss from `[m, N, C]` (or `[m, N]`) float64 logits by loops over passes and items, with autograd.

    Returns (loss, ce, kl).
    """
    m, n = logits.shape[:2]
    ce, kl, count = [], [], 0
    for item in range(n):
        if problem_type == "single_label_classification" and labels[item] == -100:
            continue
        count += 1
        rows = [logits[i, item] for i in range(m)]
        if problem_type == "single_label_classification":
            logs = [row - row.exp().sum().log() for row in rows]
            ce += [-(1 - smoothing) * lp[labels[item]] - smoothing * lp.sum() / len(lp) for lp in logs]
            kl += [
                (0.5 * ((logs[i].exp() - logs[j].exp()) * (logs[i] - logs[j])).sum(), 1 / len(pairs(m)))
                for i, j in pairs(m)
            ]
        elif problem_type == "multi_label_classification":
            ones = [row.sigmoid() for row in rows]
            y = labels[item].double()
            ce += [-(y * p.log() + (1 - y) * (1 - p).log()).mean() for p in ones]
            for i, j in pairs(m):
                p, q = ones[i], ones[j]
                both = (p - q) * (p.log() - q.log()) + (q - p) * ((1 - p).log() - (1 - q).log())
                kl.append((0.5 * both.mean(), 1 / len(pairs(m))))
        else:
            ce += [((row - labels[item]) ** 2).mean() for row in rows]
            kl += [(((rows[i] - rows[j]) ** 2).mean(), 1 / len(pairs(m))) for i, j in pairs(m)]
    if count == 0:
        zero = logits.sum() * 0
        return zero, zero, zero
    ce_mean = sum(ce) / (m * count)
    kl_mean = sum(value * weight for value, weight in kl) / count
    return ce_mean + alpha / 2 * kl_mean, ce_mean, kl_mean


def naive_kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def naive_jensen_shannon(p, q):
    """In nats, by its second definition: the entropy of the mean less the mean of the entropies."""

    def entropy(probabilities):
        return -sum(x * math.log(x) for x in probabilities if x > 0)

    return entropy([(x + y) / 2 for x, y in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2


def naive_squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def naive_agreement(name, problem_type, passes, mask=None):
    """Mean over pairs of passes and valid items of an agreement of `hf_rdrop.agreements`.

    `passes` holds for each pass a list of items, each a list of scores; a label or a prediction counts as an item of
    its own. `mask` says for each item (single-label) or score whether it counts.
    """
    values = []
    for i, j in pairs(len(passes)):
        for n, (a, b) in enumerate(zip(passes[i], passes[j], strict=True)):
            if problem_type == "single_label_classification":
                if mask is None or mask[n]:
                    values.append(_naive_distance(name, a, b, naive_softmax(a), naive_softmax(b)))
                continue
            for c, (x, y) in enumerate(zip(a, b, strict=True)):
                if mask is not None and not mask[n][c]:
                    continue
                if problem_type == "regression":
                    values.append((x - y) ** 2)
                elif name == "squared_probabilities":
                    values.append((1 / (1 + math.exp(-x)) - 1 / (1 + math.exp(-y))) ** 2)
                else:
                    p, q = naive_softmax([x, 0]), naive_softmax([y, 0])
                    values.append(_naive_distance(name, [x], [y], p, q))
    return sum(values) / len(values) if values else 0.0


def _naive_distance(name, a, b, p, q):
    return {
        "symmetric_kl": lambda: (naive_kl(p, q) + naive_kl(q, p)) / 2,
        "one_sided_kl": lambda: naive_kl(p, q),
        "jensen_shannon": lambda: naive_jensen_shannon(p, q),
        "squared_logits": lambda: naive_squared(a, b) / len(a),
        "squared_probabilities": lambda: naive_squared(p, q),
    }[name]()
