"""A transformers configuration from a run file, checked before any weight is touched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.load import Loaded
from harness.errors import Refused, first_line
from harness.model.attention import use_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
_DROPOUT = re.compile(r"(?!classifier|summary)\w*(dropout|pdrop)")


def load_config(loaded: Loaded) -> PretrainedConfig:
    """The configuration of the model that the run file names.

    Raises:
        Refused: unknown architecture or field, a folder without a configuration, code that is not trusted, a dropout that it does not have,
            attention that does not fit.
    """
    from transformers import AutoConfig

    section, where = loaded.run.model, f"model.dropout ({loaded.origin('model.dropout')})"
    if section.architecture is not None:
        config = _from_architecture(dict(section.architecture), loaded)
    else:
        _refuse_missing_folder(section.path, "model.path", loaded)
        try:
            config = AutoConfig.from_pretrained(section.path, trust_remote_code=section.trust_code)
        except Exception as error:
            raise Refused(
                f"The model configuration of {section.path!r} cannot be read: {first_line(error)}",
                where=f"model.path ({loaded.origin('model.path')})",
                remedy="Give a folder with a config.json of transformers, or a name on the hub; model.trust_code=true runs code that ships with it.",
            ) from None
    if section.dropout is not None:
        try:
            found = _set_dropout(config, section.dropout)
        except Exception as error:  # transformers checks the types of fields, and MPT's dropout is none but 0
            raise Refused(f"The dropout of the model cannot be set: {first_line(error)}", where=where, remedy="Remove the key.") from None
        if found == 0 and section.dropout > 0:
            raise Refused(f"The configuration of a model of type {config.model_type!r} has no dropout.", where=where, remedy="Remove the key.")
    config.use_cache = False
    use_attention(  # as on a CPU, which fits everywhere; the engine knows its device and chooses again
        config, section.attention, device_type="cpu", precision=loaded.run.train.precision, sequence_length=loaded.run.data.sequence_length,
        where=f"model.attention ({loaded.origin('model.attention')})",
    )
    return config


def _set_dropout(config: PretrainedConfig, share: float) -> int:
    """Set every dropout of a configuration and of those within it; returns how many there are."""
    from transformers import PretrainedConfig

    count = 0
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            count += _set_dropout(value, share)
        elif _DROPOUT.match(name) and isinstance(value, int | float):
            setattr(config, name, type(value)(share) if share == 0 else share)
            count += 1
    return count


def _from_architecture(fields: dict[str, Any], loaded: Loaded) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    where = f"model.architecture ({loaded.origin('model.architecture')})"
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise Refused(f"There is no architecture {kind!r} in transformers.", where=where, remedy="Set `model_type`, such as gpt2, llama or qwen2.")
    config_class = CONFIG_MAPPING[kind]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Refused(f"{kind!r} is not a causal language model.", where=where, remedy="Choose one, such as gpt2, llama or qwen2.")
    default = config_class()
    unknown = [name for name in fields if not hasattr(default, name)]
    if unknown:
        raise Refused(f"The configuration of {kind} has no field {unknown[0]!r}.", where=where, remedy=f"Use fields of {config_class.__name__}.")
    try:
        return config_class(**fields)
    except Exception as error:
        raise Refused(f"The architecture is not valid: {first_line(error)}", where=where, remedy="Mend the field.") from None


def _refuse_missing_folder(name: str, key: str, loaded: Loaded) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise Refused(f"There is no folder {name}.", where=f"{key} ({loaded.origin(key)})", remedy="Give a folder in Hugging Face format.")


def load_tokenizer(name: str, *, where: str, trust_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub.

    Raises:
        Refused: when there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_code)
    except Exception as error:
        raise Refused(f"There is no tokenizer in {name!r}: {first_line(error)}", where=where, remedy="Name a folder that holds one.") from None


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest row that the position embeddings of `config` carry, or None when nothing bounds it."""
    for name in _POSITIONS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_vocabulary(config: PretrainedConfig, *, vocab_size: int, loaded: Loaded) -> None:
    """Refuse a tokenizer larger than the embedding.

    Args:
        config: the model's configuration.
        vocab_size: largest token id of the data plus one.
        loaded: the run file.
    """
    rows = config.get_text_config().vocab_size
    if vocab_size > rows:
        raise Refused(
            f"The tokenizer has {vocab_size} tokens, but the embedding of the model has {rows} rows.",
            where=f"data.tokenizer ({loaded.origin('data.tokenizer')}) and model ({loaded.origin('model')})",
            remedy="Use the tokenizer of the model, or a model with a larger vocabulary.",
        )


def check_length(config: PretrainedConfig, *, loaded: Loaded) -> None:
    """Refuse rows longer than the positions."""
    positions, length = max_positions(config.get_text_config()), loaded.run.data.sequence_length
    if positions is not None and length > positions:
        raise Refused(
            f"Rows of {length} tokens are longer than the {positions} positions of the model.",
            where=f"data.sequence_length ({loaded.origin('data.sequence_length')})", remedy=f"Use {positions} or fewer.",
        )
