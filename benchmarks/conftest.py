"""Timings are taken in one process: pytest-benchmark does nothing under pytest-xdist."""


def pytest_xdist_auto_num_workers(config) -> int:
    return 0
