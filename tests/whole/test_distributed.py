"""Two processes (DDP over gloo) give the loss, the logs and the gradients of one."""

from functools import cache
from itertools import chain

import pytest
import torch

from hf_rdrop.generators import draw_own_masks
from support.distributed_worker import DDP_OPTIONS, PARTS, UNEVEN, run, run_unshifted
from support.processes import assert_same, launch
from support.settings import arguments
from support.training import InOrder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks found in a part of the runs: `ranks("quick")` or `ranks("slow")`."""

    @cache
    def run_part(part):
        return launch("distributed_worker.py", tmp_path_factory.mktemp("ddp") / "found.pt", part)

    return run_part


def parts(key, name=str):
    """All entries of `PARTS` under this key, with their part."""
    return [
        pytest.param(part, entry, id=name(entry), marks=[pytest.mark.slow] if part == "slow" else [])
        for part, entries in PARTS.items()
        for entry in entries[key]
    ]


def name_of(case):
    head, option, split = case
    return "-".join([head, option, "x".join(map(str, split))])


@pytest.mark.parametrize(("part", "case"), parts("cases", name_of))
def test_two_processes_equal_one(ranks, part, case):
    head, option, _ = case
    expected = run(head, 16, 1, option=option)
    for rank in ranks(part):
        (found,) = [result for ran, result in rank["cases"] if ran == case]
        assert_same(found, expected)
        assert found["fused"] == expected["fused"] == ("fused head" in option)
    if option != "plain" and "interval" not in option:
        assert all(kl > 1e-3 for _, _, kl, _ in expected["logs"])  # the passes differ


@pytest.mark.slow
@pytest.mark.parametrize("name", DDP_OPTIONS)
def test_options_of_ddp_change_nothing(ranks, name):
    found = [entry[1:] for entry in ranks("slow")[0]["options"] if entry[0] == name]
    assert len(found) == 2
    for head, option, result in found:
        assert_same(result, run(head, 16, 1, option=option))


@pytest.mark.parametrize(("part", "head"), parts("per rank"))
def test_without_averaging_tokens_across_devices_each_rank_is_a_mean_of_its_own(ranks, part, head):
    """Loss and gradient are the mean over ranks of the means over each rank's items."""
    found = [rank["per rank"][head] for rank in ranks(part)]
    alone = []
    for result in found:
        rows = [row for step, rows, _ in result["seen"] if step == 0 for row in rows]
        assert len(rows) == 8
        alone.append(run(head, 8, 1, rows=InOrder(rows), max_steps=1))
    loss, ce, kl = (sum(result["logs"][0][i] for result in alone) / 2 for i in range(3))
    assert found[0]["logs"][0][:3] == pytest.approx([loss, ce, kl], rel=2e-5)
    first, second = (result["gradients"][0] for result in alone)
    limit = 2e-5 * max(float(gradient.abs().max()) for gradient in first.values())
    for name, gradient in found[0]["gradients"][0].items():
        torch.testing.assert_close(gradient, (first[name] + second[name]) / 2, rtol=0, atol=limit)
    together = run(head, 16, 1)["logs"][0][0]
    is_even = head in ("single", "multi", "regression")  # every row has as many items
    assert (abs(loss - together) < 1e-5 * loss) == is_even


@pytest.mark.parametrize(("part", "name"), parts("uneven"))
def test_uneven_last_batches(ranks, part, name):
    """A step's loss is that of one process over all the rows that the ranks were given for it.

    To give all ranks as many rows, Accelerate repeats some from the beginning of the epoch, as for the plain Trainer;
    these count twice.
    """
    found = [rank["uneven"][name] for rank in ranks(part)]
    steps = sorted({step for step, _, _ in found[0]["seen"]})
    rows = [
        [row for result in found for at, rows, _ in result["seen"] if at == step for row in rows] for step in steps
    ]
    different = {tuple(row["input_ids"]) for step in rows for row in step}
    assert (len(different), sum(map(len, rows))) == (13, UNEVEN[name][1])
    expected = run("token", max(map(len, rows)), 1, rows=InOrder([*chain(*rows)]), max_steps=len(steps))
    assert_same(found[0], expected)


def test_logs_are_means_over_the_ranks(ranks):
    both = ranks("quick")
    assert len(both) == 2
    for (case, one), (_, other) in zip(*(rank["cases"] for rank in both), strict=True):
        assert one["logs"] == other["logs"]
        for step, (loss, ce, kl, _) in enumerate(one["logs"]):
            local = [sum(value for at, _, value in run["seen"] if at == step) for run in (one, other)]
            assert loss == pytest.approx(sum(local) / 2, rel=1e-5)
            assert loss == pytest.approx(ce + arguments(case[1])["rdrop_alpha"] / 2 * kl, rel=1e-5)
    losses = [{case[0]: result for case, result in rank["cases"]}["token"]["seen"][0][2] for rank in both]
    assert abs(losses[0] - losses[1]) > 1e-2  # so a mean is something else than the first rank's


def test_nothing_is_gathered_within_a_step(ranks):
    """But for DDP's own reduction of the gradients, which does not go through these functions."""
    for rank in ranks("quick"):
        for _, result in rank["cases"]:
            assert result["within"] == []
            assert result["between"]  # the number of items of the step; the logs


def test_masks_differ_between_halves_and_ranks(ranks):
    """Trainer gives all ranks the same seed. Two independent masks of rate 0.3 agree in 58% of the places."""
    masks = [half for rank in ranks("quick") for half in rank["masks"].chunk(2)]
    for i, mask in enumerate(masks):
        assert mask.float().mean() == pytest.approx(0.7, abs=0.05)
        for other in masks[:i]:
            assert (mask == other).float().mean() == pytest.approx(0.58, abs=0.06)


def test_the_first_process_draws_as_it_would_alone():
    cpu, drawn = torch.device("cpu"), []
    for seed in (0, 1):
        for rank in (0, 1, 2):
            torch.manual_seed(seed)
            alone = torch.rand(5)
            torch.manual_seed(seed)
            draw_own_masks(rank, cpu)
            drawn.append(torch.rand(5))
            assert torch.equal(drawn[-1], alone) == (rank == 0)
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 6  # also beside another run's


def test_length_grouping_gives_every_row_to_one_rank(ranks):
    """In each epoch, although the ranks' random numbers differ."""
    seen = [rank["by length"] for rank in ranks("quick")]
    assert [len(batches) for batches in seen] == [8, 8]
    orders = []
    for epoch in (slice(0, 4), slice(4, 8)):
        rows = [tuple(row["input_ids"]) for batches in seen for _, batch, _ in batches[epoch] for row in batch]
        assert len(rows) == len(set(rows)) == 24
        orders.append(rows)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("adapter", [False, True])
def test_all_ranks_measure_the_same_shift_though_one_has_no_labels(ranks, adapter):
    expected = run_unshifted(adapter, gradient_accumulation_steps=8)
    for rank in ranks("quick"):
        found = rank["unshifted"][adapter]
        assert [log[:2] for log in found["logs"]] == [pytest.approx(log[:2], rel=2e-5) for log in expected["logs"]]
