"""What tests of the search share: promoted candidates, and Ray's workers on this machine."""

import os

import pytest

from common.configuration import Configuration
from common.ranks import uniform
from common.search import RayExecutor, RaySettings


@pytest.fixture
def promoted(factors):
    """Two candidates of one budget and one of another."""
    rows = [("0.5-0", 0.5, 0.6), ("0.5-1", 0.5, 0.5), ("0.3-0", 0.3, 0.3)]
    configs = [uniform(factors, fraction) for _, _, fraction in rows]
    return [
        {
            "trial": trial,
            "budget": budget,
            "config": Configuration(config),
            "params": factors.params(config),
            "flops": factors.flops(config),
            "val_accuracy": 0.5,
            "divergence": 0.1,
            "status": "screened",
            "seed": 0,
        }
        for (trial, budget, _), config in zip(rows, configs, strict=True)
    ]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ.update(RAY_worker_niceness="0")  # beside other tests, workers of the usual niceness would hardly run
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def workers(cluster, screener):
    made = []

    def make(number, of=screener, **settings):
        made.append(RayExecutor(of, RaySettings(workers=number, threads=1, **settings), most=4))
        return made[-1]

    yield make
    for executor in made:
        executor.close()
