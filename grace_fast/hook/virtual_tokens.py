"""Virtual tokens, which peft puts before a prompt: in the call (prompt tuning), or in the cache.

They are no tokens of the prompt. Those in the call (prompt tuning, p-tuning) move its end; those
in the cache (prefix tuning) would make the call look like one that goes on with a sequence.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from grace_fast.hook.positions import Call

_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")


class Virtual:
    """The virtual tokens of one model of peft's, as they are now: its adapters come and go."""

    def __init__(self, peft_model: nn.Module, base: nn.Module) -> None:
        self._peft: Any = peft_model
        self._base: Any = base

    @classmethod
    def of(cls, called: nn.Module, base: nn.Module) -> Virtual | None:
        """Return those of a model; None where peft is not there."""
        return cls(called, base) if hasattr(called, "active_peft_config") else None

    def _count(self, in_cache: bool, generating: bool) -> int:
        config = self._peft.active_peft_config
        if not getattr(config, "is_prompt_learning", False):
            return 0
        if generating:  # peft lends its own method to the model for that long
            owner = getattr(self._base.prepare_inputs_for_generation, "__self__", None)
            is_at_work = owner is self._peft
        else:
            is_at_work = not getattr(self._peft, "_adapters_disabled", False)
        kept = config.peft_type in _IN_CACHE
        return int(config.num_virtual_tokens) if is_at_work and kept == in_cache else 0

    def in_call(self) -> int:
        """Return how many a `generate` puts before its prompt."""
        return self._count(in_cache=False, generating=True)

    def without(self, call: Call, generating: bool) -> Call:
        """Return a call whose cache does not count them."""
        count = self._count(in_cache=True, generating=generating)
        if not count:
            return call
        cached = call.cached - count
        return call._replace(
            cached=max(cached, 0) if isinstance(cached, int) else cached.clamp(min=0)
        )
