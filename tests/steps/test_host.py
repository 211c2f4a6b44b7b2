"""nemotron.steps._host: cores and memory, also where the system is not Linux."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from nemotron.steps._host import available_cores, peak_host_memory_bytes


def test_cores_are_counted_where_the_system_does_not_bind_processes_to_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # as on macOS
    assert available_cores() == os.cpu_count()


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_in_whatever_unit_the_system_counts(
    platform: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    monkeypatch.setattr("sys.platform", platform)
    assert peak_host_memory_bytes() == 7 * unit
