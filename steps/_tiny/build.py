"""Make the tiny world: ``python -m nemotron.steps._tiny.build --output DIR``.

Writes ``chat.jsonl``, ``prompts.json`` and ``model/`` (tokenizer and pre-trained base). Needs no
network. With the same torch build and processor and ``OMP_NUM_THREADS=1`` the bytes are the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from nemotron.steps._tiny import chats, corpus
from nemotron.steps._tiny.pretrain import CONFIG, pretrain
from nemotron.steps._tiny.tokenizer import train_tokenizer, write_tokenizer

SEED = 1
TOKENIZER_DOCUMENTS = 4000
NUM_STEPS = 4000
STEP_TOKENS = 2048
NUM_ROWS = 8


def main() -> None:
    """Build everything into ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    output: Path = parser.parse_args().output
    model = output / "model"
    model.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.monotonic()
    write_texts(output)
    tokenizer = build_tokenizer()
    write_tokenizer(tokenizer, model)
    stream = token_stream(tokenizer, NUM_STEPS * STEP_TOKENS + 1)
    weights = pretrain(
        stream,
        num_steps=NUM_STEPS,
        step_tokens=STEP_TOKENS,
        num_rows=NUM_ROWS,
        seed=SEED,
    )
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "model.safetensors").chmod(0o644)  # safetensors writes 0600 whatever the umask
    write_configs(tokenizer, model)
    print(f"built {output} in {time.monotonic() - start:.0f} s")


def write_texts(output: Path) -> None:
    """Write ``chat.jsonl``, one conversation per line, and ``prompts.json``."""
    lines = [json.dumps(item, ensure_ascii=False) for item in chats.conversations(SEED)]
    (output / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(output / "prompts.json", chats.demo_prompts(corpus.load_world(SEED)))


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer, trained on the first documents of the corpus."""
    return train_tokenizer(itertools.islice(corpus.documents(SEED), TOKENIZER_DOCUMENTS))


def token_stream(tokenizer: Tokenizer, num_tokens: int) -> torch.Tensor:
    """Return ``num_tokens`` ids of corpus documents, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    ids: list[int] = []
    for document in corpus.documents(SEED):
        ids += [*tokenizer.encode(document).ids, end]
        if len(ids) >= num_tokens:
            break
    return torch.tensor(ids[:num_tokens])


def write_configs(tokenizer: Tokenizer, model: Path) -> None:
    """Write ``config.json`` and ``generation_config.json``."""
    ids = {
        "bos_token_id": tokenizer.token_to_id(corpus.END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(corpus.END),
        "pad_token_id": tokenizer.token_to_id(corpus.END_OF_TEXT),
    }
    _write_json(model / "config.json", CONFIG | ids)
    _write_json(model / "generation_config.json", ids | {"max_new_tokens": 64})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
