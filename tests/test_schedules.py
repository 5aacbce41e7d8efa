import pytest
import torch

from r2kit.schedules import Plan, reductions, since_best


def test_step_divides_by_ten_every_thirty_epochs():
    plan = Plan("step", 0, 100 * 7, 100, every=30, factor=0.1)
    shares = [plan.share(epoch * 7 + 6) for epoch in range(100)]
    assert shares == pytest.approx([0.1 ** (epoch // 30) for epoch in range(100)])


def test_step_takes_a_list_of_epochs():
    plan = Plan("step", 0, 300 * 4, 300, every=(150, 225), factor=0.1)
    at = {epoch: plan.share(epoch * 4) for epoch in (0, 149, 150, 224, 225, 299)}
    assert list(at.values()) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert plan.share(150 * 4 - 1) == 1.0  # the last step before


def test_one_cycle_is_torchs():
    plan = Plan("one_cycle", 30, 100, 10)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    # torch's last step is its total less one, and its rise ends at pct_start x total less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=101, pct_start=0.31 * 100 / 101)
    for step in range(100):
        assert plan.share(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.02), step
        assert plan.momentum(step) == pytest.approx(optimizer.param_groups[0]["momentum"], abs=0.002), step
        optimizer.step()
        schedule.step()
    assert plan.share(0) == pytest.approx(1 / 25)
    assert plan.share(30) == 1.0
    assert plan.share(100) == pytest.approx(1e-4 / 25)
    assert Plan("cosine", 0, 10, 1).momentum(3) is None


def test_constant_and_plateau():
    assert Plan("constant", 2, 10, 5).share(9) == 1.0
    assert Plan("plateau", 2, 10, 5, factor=0.5).share(9, reductions=2) == 0.25
    assert Plan("plateau", 2, 10, 5).share(0) == pytest.approx(1 / 3)


def test_the_schedule_runs_by_the_clock_where_it_is_ahead():
    plan = Plan("cosine", 5, 1000, 100)
    assert plan.share(2, time_share=0.5) == plan.share(2)  # the warm-up is counted in steps
    assert plan.share(20, time_share=0.5) == plan.share(500)
    assert plan.share(700, time_share=0.5) == plan.share(700)
    assert plan.share(20, time_share=1.0) == pytest.approx(0.0, abs=1e-12)
    assert plan.progress(20, 0.5) == 0.5
    assert plan.progress(2000) == 1.0


def test_epochs_without_a_better_one():
    assert since_best([]) == 0
    assert since_best([(0.5, -1.0), (0.5, -1.0), (0.4, 0.0)]) == 2  # the first of equals is the best
    assert since_best([(0.5, -1.0), (0.5, -0.9)]) == 0
    scores = [(1.0,), (0.9,), (0.9,), (1.1,), (1.0,), (1.0,), (1.0,), (1.0,)]
    assert [reductions(scores[:n], 2) for n in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 3]
