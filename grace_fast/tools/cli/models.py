"""The model of a command: a directory or a name on the hub."""

from __future__ import annotations

from typing import Any

from grace_fast import errors
from grace_fast.tools.cli.command import fail


def load(name: str) -> tuple[Any, Any]:
    """Return a transformers model, of the class its config names, and its tokenizer."""
    errors.require("editing a model", "transformers")
    import transformers

    try:
        # A stranger's directory may hold code: it is refused rather than asked about.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is None:
            fallback = transformers.AutoModelForCausalLM
            named = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else fallback
        return named.from_pretrained(name).eval(), tokenizer
    except ImportError:
        raise
    except Exception as error:  # readers of its files have errors of their own kinds
        fail(f"cannot load the model {name!r}: {' '.join(str(error).split())}")
