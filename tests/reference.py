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
