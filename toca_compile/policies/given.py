"""What users give as a policy."""

from collections.abc import Mapping
from typing import Any, cast

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import told
from toca_compile.ir.plan import Policy
from toca_compile.policies.levels import LEVELS, Level
from toca_compile.policies.peers import from_config, from_dict
from toca_compile.policies.presets import PRESETS, preset


def checked_policy(policy: Any) -> Policy:
    """What was given as a policy: itself, the name of a level or of a preset, or what another library calls one.

    Raises:
        PolicyError: it is nothing of that; the message says what to write.
    """
    if not isinstance(policy, type) and callable(getattr(policy, "plan", None)):
        return cast(Policy, policy)
    if isinstance(policy, str) and policy in LEVELS:
        return Level(policy)
    if isinstance(policy, str) and policy in PRESETS:
        return preset(policy)
    if isinstance(policy, Mapping) and not hasattr(policy.get("policy"), "plan"):
        return from_dict(policy)
    meant = from_config(policy)
    if meant is not None:
        return meant
    remedy = ""
    if isinstance(policy, type):
        remedy = f": write {policy.__name__}(...), an instance of it"
    elif isinstance(policy, str):
        remedy = (
            f", and no level ({', '.join(LEVELS)}): a published configuration has a name in toca_compile.preset(name), "
            "a file is read by load_policy"
        )
    elif isinstance(policy, Mapping):
        remedy = ": pass the policy itself (optimize takes lowering, strict and grid as keywords)"
    elif hasattr(policy, "plan"):
        remedy = ", whose plan is no method: it is called with the model's sites and returns a Plan"
    raise PolicyError(
        f"policy must be a caching policy such as toca_compile.ToCa(num_steps=50), not {told(policy)}{remedy}"
    )
