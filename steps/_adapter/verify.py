"""``nemotron adapter verify``: makes every check that a merge makes of its inputs."""

from __future__ import annotations

import json
from typing import Any

from nemotron.artifacts import Producer
from nemotron.steps._adapter.opening import OpenedAdapter, open_with_base
from nemotron.steps._adapter.schema import VerifyConfig
from nemotron.steps._entry import run_step


def run(config: VerifyConfig, producer: Producer) -> None:
    """Verify an adapter and print what it is."""
    opened = open_with_base(config.adapter, base=config.base)
    found = describe(opened)
    print(json.dumps(found, indent=2) if config.as_json else _page(found))


def describe(opened: OpenedAdapter) -> dict[str, Any]:
    """Return the facts about a verified adapter."""
    adapter, record = opened.adapter, opened.record
    has = {
        "allow_unverified_base=true": opened.is_base_verified,
        "allow_unvalidated=true": opened.is_validated,
        "hf_model_path=DIR": opened.model_files is not None,
    }
    return {
        "adapter": str(adapter.directory),
        "layout": opened.layout,
        "base": str(opened.base_path),
        "base_is_verified": opened.is_base_verified,
        "files_are_verified": record is not None,
        "dim": adapter.dim,
        "alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "num_modules": len(adapter.modules),
        "target_modules": list(adapter.target_modules),
        "iteration": opened.recorded.get("iteration"),
        "valid_loss": opened.recorded.get("valid_loss"),
        "merge_needs": [option for option, is_there in has.items() if not is_there],
    }


def _page(found: dict[str, Any]) -> str:
    base = "fingerprint as recorded by the adapter"
    if not found["base_is_verified"]:
        base = "names and shapes match; the adapter records no fingerprint"
    files = "BLAKE3 as in artifact.json"
    if not found["files_are_verified"]:
        files = "no artifact.json: changed values cannot be detected unless they are not finite"
    loss = found["valid_loss"]
    needs = [f"merge     only with {option}" for option in found["merge_needs"]]
    return "\n".join(
        [
            f"adapter   {found['adapter']} ({found['layout']})",
            f"base      {found['base']}: {base}",
            f"files     {files}",
            f"lora      r {found['dim']}, alpha {found['alpha']:g}, {found['num_modules']} modules "
            f"({', '.join(found['target_modules'])}); names, shapes, ranks match; all are finite",
            f"held-out  loss {loss:.4f}" if loss is not None else "held-out  never measured",
            *needs,
        ]
    )


if __name__ == "__main__":
    raise SystemExit(run_step("adapter verify", VerifyConfig, run))
