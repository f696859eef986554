"""What older versions of other libraries lack: tests that need it are skipped by name."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from typing import Any

import pytest
from packaging.version import Version
from transformers import TrainingArguments


def has(package: str, version: str) -> bool:
    """Whether ``package`` is of this version or a later one."""
    return Version(importlib.metadata.version(package)) >= Version(version)


def needs(package: str, version: str, why: str) -> pytest.MarkDecorator:
    """Skip the test where ``package`` is older than ``version``; ``why`` says what it lacks."""
    return pytest.mark.skipif(not has(package, version), reason=f"needs {package} {version} or later: {why}")


REUSED_IN_SHARDS = has("transformers", "5.23")
"""Whether passes are reused where FSDP2 shards layers; before, its hooks ran inside of what is checkpointed."""
FSDP2_ONCE = not has("accelerate", "1.13")
"""Whether FSDP2 of Accelerate prepares a model once only, and writes no checkpoints to go on from."""
APART = has("accelerate", "1.15")
"""Whether Accelerate has FSDP2 gather the embedding by itself, and norm and head."""
_OLD_FSDP = "state_dict_type" not in inspect.getsource(TrainingArguments)


def asked_for(arguments: dict[str, Any]) -> dict[str, Any]:
    """Training arguments of the newest transformers, as this one takes them: an old one has FSDP1 by default."""
    if not (_OLD_FSDP and arguments.get("fsdp") is True):
        return arguments
    given = {"version": 2, "reshard_after_forward": True, **arguments.get("fsdp_config", {})}
    kind = "FULL_STATE_DICT" if has("accelerate", "1.7") else "SHARDED_STATE_DICT"
    of_accelerate = {"state_dict_type": kind, "activation_checkpointing": "false"}
    for name, default in of_accelerate.items():  # as `accelerate launch` says it
        os.environ[f"FSDP_{name.upper()}"] = str(given.pop(name, default))
    return {**arguments, "fsdp": "full_shard auto_wrap", "fsdp_config": given}
