"""The step catalogue: what runs inside a job. A leaf directory with a step.toml is a step."""
