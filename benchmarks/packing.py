"""Packing alone: rows, CPU time and mixing of shuffle_fill against best fit, first fit and TRL.

    python benchmarks/packing.py            # 1e5 and 1e6 documents, about 3 minutes
    python benchmarks/packing.py --quick    # 1e5 only

Claims: at most 0.05 % more rows than best-fit decreasing on chat and reasoning lengths and at most
1 % on lengths made to be hard; less than 5 microseconds of CPU a document; at most twice as many
documents a row, at the 99th percentile, as first-fit shuffle. TRL's ``bfd`` runs where trl and
datasets are installed (``sft_packing.py`` installs them into ``.peers/trl``), as it is called by
default (1,000 documents at a time) and on all at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemotron.steps.data_prep.sft_packing.packing import Rows, pack

TRL_DOCUMENTS = 100_000


def chat(random: np.random.Generator, count: int) -> np.ndarray:
    """Chat: log-normal, median 400 tokens, a few of them longer than a row."""
    return random.lognormal(np.log(400), 1.1, count)


def reasoning(random: np.random.Generator, count: int) -> np.ndarray:
    """Chat, and 40 % long traces."""
    traces = random.lognormal(np.log(2500), 0.8, count)
    return np.where(random.random(count) < 0.4, traces, chat(random, count))


def hard(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """Everything near a half and a third of a row, so that little fits beside anything."""
    centre = np.where(random.random(count) < 0.5, capacity / 2, capacity / 3)
    return random.normal(centre, 0.03 * centre)


def lengths_of(name: str, count: int, capacity: int) -> np.ndarray:
    """Return the lengths of a distribution, cut at the capacity as the step cuts them."""
    random = np.random.default_rng(0)
    make: dict[str, Callable[[], np.ndarray]] = {
        "chat": lambda: chat(random, count),
        "reasoning": lambda: reasoning(random, count),
        "hard": lambda: hard(random, count, capacity),
    }
    return np.clip(make[name]().astype(np.int64), 2, capacity)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the CPU seconds it took."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def check(lengths: np.ndarray, rows: Rows, capacity: int) -> None:
    """Every document once, no row too full."""
    filled = np.add.reduceat(lengths[rows.documents], rows.starts[:-1])
    is_whole = np.array_equal(np.sort(rows.documents), np.arange(len(lengths)))
    if not is_whole or filled.max() > capacity:
        raise SystemExit("rows are wrong: a document is missing or a row too full")


def trl_rows(lengths: np.ndarray, capacity: int) -> dict[str, tuple[int, float]]:
    """Return rows and CPU seconds of TRL, by default and on all documents at once."""
    sys.path.append(str(Path(__file__).parent / ".peers" / "trl"))
    try:
        from datasets import Dataset, disable_progress_bars  # pyright: ignore
        from trl.data_utils import pack_dataset  # pyright: ignore
    except ImportError:
        return {}
    disable_progress_bars()
    ids = np.zeros(int(lengths.max()), dtype=np.int32)
    dataset = Dataset.from_dict({"input_ids": [ids[:length] for length in lengths]})
    found: dict[str, tuple[int, float]] = {}
    for name, options in (("trl bfd (as called)", {}), ("trl bfd (all at once)", len(lengths))):
        size = options if isinstance(options, int) else 1000
        kwargs = {"batch_size": size, "keep_in_memory": True, "load_from_cache_file": False}
        packed, seconds = timed(lambda kw=kwargs: pack_dataset(dataset, capacity, "bfd", kw))
        found[name] = (len(packed), seconds)
    return found


def compare(name: str, count: int, capacity: int) -> None:
    """Print one table."""
    lengths = lengths_of(name, count, capacity)
    bound = -(-int(lengths.sum()) // capacity)
    print(f"\n{name}, {count:,} documents, pack_size {capacity}: at least {bound:,} rows")
    print(f"{'':<24}{'rows':>10}{'vs best fit':>13}{'us/doc':>9}{'docs/row p99':>14}{'max':>6}")
    best = 0
    for algorithm in ("best_fit_decreasing", "shuffle_fill", "first_fit_shuffle"):
        rows, seconds = timed(
            lambda a=algorithm: pack(lengths, capacity=capacity, algorithm=a, seed=0)
        )
        check(lengths, rows, capacity)
        best = best or rows.num_rows
        sizes = np.diff(rows.starts)
        print(
            f"{algorithm:<24}{rows.num_rows:>10,}{rows.num_rows / best - 1:>+13.3%}"
            f"{1e6 * seconds / count:>9.2f}{np.percentile(sizes, 99):>14.0f}{sizes.max():>6}"
        )
    if count <= TRL_DOCUMENTS:
        for label, (num_rows, seconds) in trl_rows(lengths, capacity).items():
            ratio = num_rows / best - 1
            print(f"{label:<24}{num_rows:>10,}{ratio:>+13.3%}{1e6 * seconds / count:>9.2f}")


def main() -> None:
    """Print the machine and every table."""
    parser = argparse.ArgumentParser(description="compare packing")
    parser.add_argument("--quick", action="store_true", help="1e5 documents only")
    counts = (100_000,) if parser.parse_args().quick else (100_000, 1_000_000)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"Python {platform.python_version()}, numpy {np.__version__}; CPU time of one core")
    for count in counts:
        for capacity in (4096, 8192):
            for name in ("chat", "reasoning", "hard"):
                compare(name, count, capacity)


if __name__ == "__main__":
    main()
