"""How many replicas are wanted."""

from types import SimpleNamespace

import pytest

from rvllm.ray.scaling import KV_USE, ScalePolicy, desired_replicas


@pytest.mark.parametrize(
    ("now", "requests", "uses", "wanted"),
    [
        (1, 0.0, [0.0], 1),
        (1, 16.0, [0.2], 1),
        (1, 17.0, [0.2], 2),
        (1, 160.0, [0.2], 10),
        (1, 2.0, [0.9], 2),  # few requests, long ones
        (4, 0.0, [0.0] * 4, 1),
        (4, 40.0, [0.1] * 4, 3),
        (4, 47.9, [0.1] * 4, 4),  # three would be full at once
        (3, 16.0, [0.7, 0.7, 0.7], 3),
    ],
)
def test_requests_and_caches_come_to_their_targets(
    now: int, requests: float, uses: list[float], wanted: int
) -> None:
    context = SimpleNamespace(
        current_num_replicas=now,
        total_num_requests=requests,
        aggregated_metrics={KV_USE: dict(enumerate(uses))},
    )
    assert ScalePolicy(16, 0.7)(context) == (wanted, {})


def test_the_count_does_not_swing() -> None:
    """With the load unchanged, what is wanted is wanted again."""
    for tenths in range(1, 1000):
        now = desired_replicas(5, tenths / 10, {}, 16, 0.7)
        assert desired_replicas(now, tenths / 10, {}, 16, 0.7) == now


def test_without_figures_of_caches_requests_decide() -> None:
    context = SimpleNamespace(current_num_replicas=1, total_num_requests=33, aggregated_metrics=None)
    assert ScalePolicy(16, 0.7)(context)[0] == 3
