"""A pytest plugin for tests on a real GPU (``-p gpu_guard``; benchmarks/gpu uses it), where a wrong kernel may hang, or
leave the process's CUDA context unusable.

Environment:
    LLMFAST_GPU_PROGRESS: a file that gets a line for each test that starts and for each outcome, and "finished" at the
        end. Tests that are in it already are left out, and so are the other cases of one that hung.
    LLMFAST_GPU_SHARD: ``i/n``: only every n-th test, from the i-th.
    LLMFAST_GPU_TEST_LIMIT: seconds after which a test takes the process down, with a traceback. Default 30.
"""

import faulthandler
import os
from pathlib import Path

import pytest
import torch

LIMIT = float(os.environ.get("LLMFAST_GPU_TEST_LIMIT", "30"))
STDERR = os.fdopen(os.dup(2), "w")  # while pytest captures, 2 is a file that nobody will read
PROGRESS = Path(os.environ.get("LLMFAST_GPU_PROGRESS") or os.devnull)


def note(text: str) -> None:
    with PROGRESS.open("a") as file:
        file.write(text.replace("\n", " ")[:600] + "\n")


def function_of(nodeid: str) -> str:
    return nodeid.split("[", 1)[0]


def pytest_sessionstart(session) -> None:
    if torch.cuda.is_available():  # the context's creation is no test's time
        torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items) -> None:
    shard, shards = (int(part) for part in os.environ.get("LLMFAST_GPU_SHARD", "0/1").split("/"))
    lines = [line.split(" ", 2) for line in PROGRESS.read_text().splitlines()] if PROGRESS.is_file() else []
    seen = {line[1] for line in lines if line[0] == "start"}
    ended = {line[1] for line in lines if line[0] in ("passed", "failed", "skipped")}
    hung = {function_of(nodeid) for nodeid in seen - ended}
    key = lambda item: item.nodeid.replace(" ", "_")  # noqa: E731
    mine = [item for index, item in enumerate(items) if index % shards == shard and key(item) not in seen]
    items[:] = [item for item in mine if function_of(key(item)) not in hung]
    for item in mine:
        if function_of(key(item)) in hung:
            note(f"failed {key(item)} not run: another case of it took its process down")
            note(f"start {key(item)}")
            note(f"skipped {key(item)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    note(f"start {item.nodeid.replace(' ', '_')}")
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    name = item.nodeid.replace(" ", "_")
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        note(f"failed {name} {crash.message if crash else str(report.longrepr)[-300:]}")
    elif report.when == "call" or report.skipped:
        note(f"{report.outcome} {name}")
    return report


def pytest_runtest_logfinish(nodeid, location) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # sticky: nothing after it would run
        note(f"failed {nodeid.replace(' ', '_')} the CUDA context is lost: {error}")
        os._exit(3)


def pytest_sessionfinish(session, exitstatus) -> None:
    if exitstatus in (0, 1, 5):
        note("finished")
