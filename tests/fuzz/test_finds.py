"""What the fuzzer found, each as small as it could be made."""

from typing import Any

import pytest

from tests.fuzz.grammar import Attention, Block, Branch, Spec
from tests.fuzz.oracles import examine
from toca_compile import ToCa

FINDS: list[tuple[Spec, Any]] = []


@pytest.mark.parametrize(("spec", "policy"), FINDS)
def test_found_once(spec: Spec, policy: Any) -> None:
    assert examine(spec, [policy]) == []


_ = Attention, Block, Branch, ToCa
