"""End to end, JSONL to checked Parquet, per CPU second: this step against transformers and TRL.

    python benchmarks/sft_packing.py              # about 4 minutes of one core
    python benchmarks/sft_packing.py --turns 1    # one-turn chats only
    python benchmarks/sft_packing.py --mb 60

Both sides read the same JSONL with the same tokenizer and chat template, and write Parquet. The
peer is transformers' ``apply_chat_template(return_assistant_tokens_mask=True)`` on batches of 512,
then TRL's ``pack_dataset(strategy="bfd")``. Ours is the whole step with one worker: strict JSON,
digests, splits, spools, packing, Parquet with checksums, fsync. CPU seconds of one process each,
imports not counted; every figure is the better of two runs, taken in turns.

TRL and datasets are installed into ``.peers/trl``, once, which only the peer's process sees:
pandas, which comes with them, would be imported by pyarrow on our side too.

Claims: at least 1.15 times the peer's MB per CPU second with ``tokenizers``, at most 25 % of the
time outside of it; at least 3.5 times with ``kitoken``. Text and tokenizer (byte-level BPE, 32,000
tokens, trained here) are made from the sources of the Python installation, so that anyone can run
this.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron.steps.data_prep.sft_packing.templates import read_template

PEERS = ("trl==1.16.0", "datasets==5.2.0", "dill", "multiprocess", "pandas")
PEERS_DIRECTORY = Path(__file__).parent / ".peers" / "trl"
PACK_SIZE = 4096
TRAIN_MB = 12
CASES = {1: "one turn", 5: "five turns"}  # questions in a conversation
# How Llama 3 and Qwen cut text into words.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def source_text(limit_bytes: int) -> Iterator[str]:
    """Yield the Python sources that are installed, the standard library first."""
    paths = sysconfig.get_paths()
    size_bytes = 0
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            if root == paths["stdlib"] and "site-packages" in path.parts:
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            size_bytes += len(text)
            yield text
            if size_bytes > limit_bytes:
                return


def make_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE and write it as Hugging Face files."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source_text(TRAIN_MB << 20), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": read_template("chatml"),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_chats(path: Path, *, turns: int, size_bytes: int) -> None:
    """Write conversations of ``turns`` questions, cut from the sources."""
    rng = random.Random(0)  # noqa: S311 (text, no secret)
    text = "".join(source_text(2 * size_bytes))
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size_bytes:
            messages = []
            for _ in range(turns):
                for role, median in (("user", 250), ("assistant", 1200)):
                    length = int(median * rng.lognormvariate(0, 0.8))
                    start = rng.randrange(len(text) - length)
                    messages.append({"role": role, "content": text[start : start + length]})
            written += stream.write(json.dumps({"messages": messages}) + "\n")


def run_ours(data: Path, tokenizer: Path, output: Path, engine: str) -> dict[str, float]:
    """Run the step in this process and return what it cost."""
    from nemotron.artifacts import Producer, read_artifact, verify_files
    from nemotron.steps.data_prep.sft_packing.engine import Engine
    from nemotron.steps.data_prep.sft_packing.schema import Config
    from nemotron.steps.data_prep.sft_packing.step import run

    importlib.import_module("kitoken")  # imports are not counted
    inside = 0.0
    encode = Engine.encode

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal inside
        start = time.process_time()
        try:
            return encode(*arguments, **options)
        finally:
            inside += time.process_time() - start

    Engine.encode = timed
    config = Config(
        blend_path=str(data),
        output_dir=output,
        tokenizer=str(tokenizer),
        chat_template=None,
        pack_size=PACK_SIZE,
        num_shards=1,
        num_workers=1,
        tokenization={"engine": engine},  # pyright: ignore[reportArgumentType]
    )
    start = time.process_time()
    run(config, Producer(step="benchmark", config_sha256="0" * 64, code_version="0"))
    seconds = time.process_time() - start
    artifact = read_artifact(output, "packed_parquet")
    verify_files(output, artifact)
    return {"seconds": seconds, "inside": inside, "tokens": artifact.properties["report"]["tokens"]}


def run_peer(data: Path, tokenizer: Path, output: Path) -> dict[str, float]:
    """Template, tokenize and mask with transformers, pack with TRL, write Parquet."""
    from datasets import Dataset, disable_progress_bars  # pyright: ignore
    from transformers import AutoTokenizer
    from trl.data_utils import pack_dataset  # pyright: ignore

    disable_progress_bars()
    start = time.process_time()
    backend = AutoTokenizer.from_pretrained(tokenizer)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
    with data.open(encoding="utf-8") as stream:
        lines = list(stream)
    for first in range(0, len(lines), 512):
        batch = backend.apply_chat_template(
            [json.loads(line)["messages"] for line in lines[first : first + 512]],
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        for name, column in columns.items():
            column.extend(batch[name])
    tokens = sum(map(len, columns["input_ids"]))
    kwargs = {"keep_in_memory": True, "load_from_cache_file": False}
    packed = pack_dataset(Dataset.from_dict(columns), PACK_SIZE, "bfd", kwargs)
    packed.to_parquet(output)
    return {"seconds": time.process_time() - start, "tokens": tokens}


def install_peers() -> None:
    """Install what only the peer needs; transformers and pyarrow are those of this environment."""
    if PEERS_DIRECTORY.is_dir():
        return
    aside = PEERS_DIRECTORY.with_name("trl.partial")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(aside), *PEERS], check=True)
    aside.rename(PEERS_DIRECTORY)


def measure(side: str, data: Path, tokenizer: Path, directory: Path) -> dict[str, float]:
    """Run one side in a process of its own."""
    output = Path(tempfile.mkdtemp(dir=directory)) / "out"
    command = [sys.executable, __file__, "--side", side, str(data), str(tokenizer), str(output)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if side == "peer":
        path = [str(PEERS_DIRECTORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(label: str, data: Path, tokenizer: Path, directory: Path) -> None:
    """Print one table: every side twice, in turns."""
    sides = ("peer", "tokenizers", "kitoken")
    runs = [{side: measure(side, data, tokenizer, directory) for side in sides} for _ in range(2)]
    best = {
        side: min((run[side] for run in runs), key=lambda run: run["seconds"]) for side in sides
    }
    megabytes = data.stat().st_size / 1e6
    print(f"\n{label}: {megabytes:.1f} MB of JSONL, {best['peer']['tokens'] / 1e6:.1f}M tokens")
    print(f"{'':<26}{'CPU s':>8}{'MB/CPU s':>10}{'ratio':>8}{'outside':>9}{'peak MiB':>10}")
    for side in sides:
        found = best[side]
        seconds = found["seconds"]
        outside = f"{1 - found['inside'] / seconds:.0%}" if "inside" in found else ""
        name = "transformers + trl" if side == "peer" else f"ours, {side}"
        print(
            f"{name:<26}{seconds:>8.1f}{megabytes / seconds:>10.2f}"
            f"{best['peer']['seconds'] / seconds:>7.2f}x{outside:>9}{found['peak_mib']:>10.0f}"
        )


def run_side(side: str, data: Path, tokenizer: Path, output: Path) -> None:
    """What ``measure`` starts: one side, its figures as the last line."""
    if side == "peer":
        found = run_peer(data, tokenizer, output)
    else:
        found = run_ours(data, tokenizer, output, side)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def main() -> None:
    """Print the machine and both tables."""
    parser = argparse.ArgumentParser(description="compare packing")
    parser.add_argument("--mb", type=int, default=20, help="size of each JSONL file")
    parser.add_argument(
        "--turns", type=int, choices=CASES, nargs="*", default=list(CASES), help="which chats"
    )
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, *paths = arguments.side
        run_side(side, *map(Path, paths))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        install_peers()
        make_tokenizer(directory / "tokenizer")
        for turns in arguments.turns:
            data = directory / f"{turns}.jsonl"
            make_chats(data, turns=turns, size_bytes=arguments.mb << 20)
            compare(CASES[turns], data, directory / "tokenizer", directory)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
