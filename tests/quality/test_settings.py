"""Settings: checked when they are given, overridden by name."""

from pathlib import Path
from typing import Any

import pytest

from toca_compile import TocaError
from toca_compile.quality.compare import compare_pipeline
from toca_compile.quality.settings import ComparisonSettings, overridden


def test_single_settings_are_given_by_name() -> None:
    settings = overridden(ComparisonSettings(steps=20, repeats=1), {"steps": 8, "out": Path("pictures")})
    assert settings == ComparisonSettings(steps=8, repeats=1, out=Path("pictures"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"repeats": 0}, "repeats"),
        ({"steps": 2.5}, "steps"),
        ({"seed": -1}, "seed"),
        ({"stepz": 8}, "no setting 'stepz'"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_anything_is_sampled(given: dict[str, Any], why: str) -> None:
    with pytest.raises(TocaError, match=why):
        compare_pipeline(None, {}, {}, **given)
