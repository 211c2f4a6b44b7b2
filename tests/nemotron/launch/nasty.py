"""Text that a shell would act on, if one ever read it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# What an environment or an argument can hold: no NUL, and nothing that is no character.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
nasty = st.sampled_from(["$(touch canary)", "`touch canary`", "'; touch canary; '", "a\nb", "-n"])
values = texts | nasty
check_shell = settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
