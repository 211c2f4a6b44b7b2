"""Small steps to launch, so that the launcher is tested without a model: seconds, not minutes."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import nemotron
import nemotron.steps
from nemotron import catalog

STEPS = {
    "demo/make/step.toml": """
        [step]
        id = "demo/make"
        name = "Make"
        category = "demo"
        description = "Writes a file."
        tags = ["fast", "demo"]
        launch = "python"
        gpus_per_node = 0

        [[consumes]]
        type = "training_jsonl"
        required = false
        keys = ["source"]

        [[produces]]
        type = "packed_parquet"
        keys = ["output_dir"]

        [[strategies]]
        when = "you test"
        then = "use it"
        """,
    "demo/make/schema.py": """
        from pathlib import Path
        from typing import Literal
        from nemotron.config import Schema

        Behaviour = Literal[
            *("ok", "refuse", "crash", "sleep", "die", "argv", "nothing", "spill"),
            *("stop", "stop_once", "hold"),
        ]

        class Config(Schema):
            source: str | None = None
            output_dir: Path = Path("out/make")
            behaviour: Behaviour = "ok"
        """,
    "demo/make/step.py": """
        import os, signal, subprocess, sys, time
        from nemotron.artifacts import hold
        from nemotron.errors import ExitCode, NemotronError
        from nemotron.steps._entry import PreemptedError, run_step
        from nemotron.steps.demo.make.schema import Config

        def run(config, producer):
            print("making", flush=True)
            if config.behaviour == "refuse":
                fix = "make it even"
                raise NemotronError("too_odd", "that is odd", fix=fix, exit_code=ExitCode.DATA)
            if config.behaviour == "hold":
                with hold(config.output_dir.absolute()):
                    while not os.path.exists("release"):
                        time.sleep(0.05)
                return
            if config.behaviour == "stop_once" and not os.path.exists("stopped"):
                open("stopped", "x").close()
                raise PreemptedError("stopped")
            if config.behaviour == "stop":
                raise PreemptedError("stopped")
            if config.behaviour == "crash":
                sys.exit(3)
            if config.behaviour == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if config.behaviour == "sleep":
                time.sleep(60)
            if config.behaviour == "spill":
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            if config.behaviour == "nothing":
                return
            config.output_dir.mkdir(parents=True, exist_ok=True)
            lines = [os.environ.get("COLOUR", "none"), os.environ.get("OMP_NUM_THREADS", "none")]
            (config.output_dir / "made.txt").write_text("\\n".join(lines))

        if __name__ == "__main__":
            arguments = [word for word in sys.argv[1:] if word != "--extra"]
            if "--extra" in sys.argv:
                print("extra", flush=True)
            raise SystemExit(run_step("demo/make", Config, run, arguments))
        """,
    "demo/make/config/default.yaml": """
        output_dir: ${oc.env:DEMO_OUTPUT,./out/make}
        """,
    "demo/make/config/tiny.yaml": "defaults: default.yaml\n",
    "demo/train/step.toml": """
        [step]
        id = "demo/train"
        name = "Train"
        category = "demo"
        description = "Reads what demo/make wrote."
        tags = ["demo"]
        launch = "torchrun"
        image = "registry.example/demo:25.10"
        gpus_per_node = 8

        [[consumes]]
        type = "packed_parquet"
        keys = ["data.packs", "data.glob"]
        missing = "missing_packs"

        [[produces]]
        type = "checkpoint_lora"
        keys = ["save"]

        [[parameters]]
        name = "peft.dim"
        description = "Rank."
        default = 4
        choices = [4, 8]

        [[errors]]
        name = "missing_packs"
        cause = "there are no packs"
        recovery = "run demo/make"
        exit_code = 3

        [[errors]]
        name = "output_path_overlaps_inputs"
        cause = "the output would replace an input"
        recovery = "choose another save"
        exit_code = 3
        """,
    "demo/train/schema.py": """
        from pathlib import Path
        from pydantic import Field
        from nemotron.config import Schema

        class Data(Schema):
            packs: str | None = None
            glob: str | None = None

        class Recipe(Schema):
            tensor_model_parallel_size: int = 1

        class Peft(Schema):
            dim: int = 4
            dropout: float = Field(default=0.0, allow_inf_nan=True)

        class Config(Schema):
            data: Data = Data()
            recipe: Recipe = Recipe()
            peft: Peft = Peft()
            save: Path = Path("out/train")
            run_name: str | None = None
            tokenizer: str = "bpe"

            @property
            def num_ranks(self) -> int:
                return self.recipe.tensor_model_parallel_size
        """,
    "demo/train/checks.py": """
        from pathlib import Path
        from nemotron.errors import ExitCode, NemotronError
        from nemotron.steps.demo.train.schema import Config

        def check(config: Config) -> list[NemotronError]:
            return check_config(config) + check_packs(config)

        def check_packs(config: Config) -> list[NemotronError]:
            if (Path(config.data.packs or "") / "odd").exists():
                code = ExitCode.PREFLIGHT
                return [NemotronError("odd_packs", "odd packs", fix="pack again", exit_code=code)]
            return []

        def check_config(config: Config) -> list[NemotronError]:
            if config.peft.dim == 13:
                code = ExitCode.PREFLIGHT
                return [NemotronError("unlucky", "dim is 13", fix="peft.dim=12", exit_code=code)]
            return []
        """,
    "demo/train/step.py": """
        import os
        from pathlib import Path
        from nemotron.steps._entry import run_step
        from nemotron.steps.demo.train.schema import Config

        def run(config, producer):
            config.save.mkdir(parents=True, exist_ok=True)
            text = (Path(config.data.packs) / "made.txt").read_text()
            (config.save / f"rank{os.environ.get('RANK', '')}.txt").write_text(text)

        if __name__ == "__main__":
            raise SystemExit(run_step("demo/train", Config, run))
        """,
    "demo/train/config/default.yaml": """
        run:
          env: {container_image: "registry.example/demo:25.10", gpus_per_node: 4}
        data:
          packs: ./out/make
        recipe:
          tensor_model_parallel_size: 2
        """,
    "demo/train/config/tiny.yaml": """
        defaults: default.yaml
        peft:
          dim: 8
        run:
          producers:
            packed_parquet: {step: demo/make, config: tiny}
        """,
    "demo/use/step.toml": """
        [step]
        id = "demo/use"
        name = "Use"
        category = "demo"
        description = "Reads what demo/make wrote, without torchrun."
        launch = "python"

        [[consumes]]
        type = "packed_parquet"
        keys = ["packs"]

        [[produces]]
        type = "checkpoint_hf"
        keys = ["save"]
        """,
    "demo/use/schema.py": """
        from pathlib import Path
        from nemotron.config import Schema

        class Config(Schema):
            packs: Path = Path("out/make")
            save: Path = Path("out/use")
        """,
    "demo/use/step.py": """
        from nemotron.steps._entry import run_step
        from nemotron.steps.demo.use.schema import Config

        def run(config, producer):
            config.save.mkdir(parents=True, exist_ok=True)
            (config.save / "used.txt").write_text((config.packs / "made.txt").read_text())

        if __name__ == "__main__":
            raise SystemExit(run_step("demo/use", Config, run))
        """,
    "demo/use/config/default.yaml": "packs: ./out/make\n",
    "demo/use/config/tiny.yaml": """
        defaults: default
        run: {producers: {packed_parquet: {step: demo/make, config: tiny}}}
        """,
    "demo/use/config/broken.yaml": """
        defaults: default
        run: {producers: {packed_parquet: {step: demo/make, config: broken}}}
        """,
    "demo/make/config/broken.yaml": "{defaults: default, behaviour: refuse}\n",
    "demo/use/config/silent.yaml": """
        defaults: default
        run: {producers: {packed_parquet: {step: demo/make, config: silent}}}
        """,
    "demo/make/config/silent.yaml": "{defaults: default, behaviour: nothing}\n",
    "demo/loop/step.toml": """
        [step]
        id = "demo/loop"
        name = "Loop"
        category = "demo"
        description = "Reads what it writes."
        launch = "python"

        [[consumes]]
        type = "packed_parquet"
        keys = ["packs"]

        [[produces]]
        type = "packed_parquet"
        keys = ["save"]
        """,
    "demo/loop/schema.py": """
        from nemotron.config import Schema

        class Config(Schema):
            packs: str
            save: str
        """,
    "demo/loop/config/one.yaml": """
        {packs: two, save: one, run: {producers: {packed_parquet: {step: demo/loop, config: two}}}}
        """,
    "demo/loop/config/two.yaml": """
        {packs: one, save: two, run: {producers: {packed_parquet: {step: demo/loop, config: one}}}}
        """,
    "other/use/step.toml": """
        [step]
        id = "other/use"
        name = "Use again"
        category = "other"
        description = "Has the name of another step."
        launch = "python"
        """,
    "other/use/schema.py": """
        from nemotron.config import Schema

        class Config(Schema):
            pass
        """,
    "other/use/config/default.yaml": "{}\n",
    "_shared/step.toml": "this is not a step\n",
}

SITE = """
import os
import nemotron.steps
nemotron.steps.__path__.append(os.environ["DEMO_STEPS"])
"""


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the steps above, made once: imported modules stay the same."""
    root = tmp_path_factory.mktemp("steps")
    for name, text in STEPS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
        if path.name == "step.toml" and not name.startswith("_"):
            for package in (path.parent, path.parent.parent):
                (package / "__init__.py").touch()
    site = root / "_site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty directory that is the working directory, with no environment of ours."""
    for name in ("NEMOTRON_ENV_FILE", "HF_TOKEN", "OMP_NUM_THREADS", "NEMOTRON_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    (work / "pyproject.toml").touch()  # ends the upward search for profiles
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def demo(demo_root: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the demo steps where the packaged ones are, for this process and its jobs."""
    monkeypatch.setattr(nemotron.steps, "__path__", [*nemotron.steps.__path__, str(demo_root)])
    monkeypatch.setattr(catalog, "steps_root", lambda: demo_root)
    source = Path(nemotron.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{demo_root / '_site'}:{source}")
    monkeypatch.setenv("DEMO_STEPS", str(demo_root))
    return here
