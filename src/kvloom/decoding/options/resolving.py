"""From all the places where options stand to the options of one request.

`resolve` merges what the caller passes, the `generation_config=` object, the model's own generation config
and the library defaults, in that order of precedence, and checks the outcome. Token counts that depend on
the prompt are left to `Options.lengths`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import GenerationConfig

from kvloom.decoding.options.checks import BEAMS_ONLY, CHECKS, SAMPLING_ONLY, token_ids_in
from kvloom.decoding.options.options import Options
from kvloom.decoding.options.refusals import ALREADY_SO, REFUSED, refuse_unsupported, unknown_option
from kvloom.errors import InvalidRequest
from kvloom.notices import warn

_LIBRARY_DEFAULTS = {"top_k": 50}
_NEUTRAL = {f.name: f.default for f in fields(Options) if f.name in CHECKS and f.default is not MISSING}


def resolve(
    model_config: GenerationConfig | None,
    generation_config: GenerationConfig | None,
    options: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    max_position_embeddings: int | None = None,
    known: Iterable[str] = (),
) -> Options:
    """The options of a request.

    Args:
        model_config: the model's own generation config.
        generation_config: the one the caller passes; what it leaves at None comes from the model's.
        options: the caller's keyword arguments, which win. None switches an option off
            (`eos_token_id=None`: no EOS), except `max_length=None`, which means not given.
        vocab_size: if given, token ids that the caller passes must lie below it.
        max_position_embeddings: the model's context in tokens; bounds the default of 20 new tokens.
        known: names that the caller handles itself: suggested for typos, skipped in `options`.

    Raises:
        UnknownOption: a name that neither transformers nor KVLoom has.
        UnsupportedOption: a transformers option that is refused here and would change the output.
        InvalidRequest: a value, or a combination of values, that cannot work.
    """
    own = _entries("the model's generation config", model_config)
    passed = _entries("`generation_config`", generation_config)
    # A copy of the model's own config carries the model's entries; only the changes are the caller's.
    asked = {name: value for name, value in passed.items() if not _same(value, own.get(name))} | dict(options)
    known = frozenset(known)
    asked = {name: value for name, value in asked.items() if name not in known - CHECKS.keys()}
    _refuse(asked, own, known)
    values = _checked(asked, own)
    _check_vocabulary(values, asked, vocab_size)
    resolved = Options(**values, max_position_embeddings=max_position_embeddings)
    _check_together(resolved)
    _warn_unused(asked, resolved)
    return resolved


def _entries(what: str, config: GenerationConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise InvalidRequest(f"{what} must be a transformers.GenerationConfig, but is {config!r}.")
    entries = {name: value for name, value in vars(config).items() if value is not None}
    return {name: value for name, value in entries.items() if not name.startswith("_")}


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def _refuse(asked: Mapping[str, Any], own: Mapping[str, Any], known: Iterable[str]) -> None:
    names = {*CHECKS, *known}
    for name, value in asked.items():
        if name in REFUSED:
            refuse_unsupported(name, value, from_checkpoint=False)
        elif name not in names and name not in ALREADY_SO:
            raise unknown_option(name, names)
    # Other unknown entries of a checkpoint ("chat_format", ...) mean nothing to transformers either.
    for name in (own.keys() & REFUSED.keys()) - asked.keys():
        refuse_unsupported(name, own[name], from_checkpoint=True)


def _checked(asked: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = dict(_LIBRARY_DEFAULTS)
    candidates = {**own, **{n: v for n, v in asked.items() if (n, v) != ("max_length", None)}}
    sampling = candidates.get("do_sample") is True
    for name in CHECKS.keys() & candidates.keys():
        value = candidates[name]
        if value is None:
            values[name] = _NEUTRAL[name]
        elif name in asked or not _irrelevant(name, sampling):
            values[name] = CHECKS[name](name, value)
    return values


def _irrelevant(name: str, sampling: bool) -> bool:
    """Whether a checkpoint's odd value is better skipped than refused: it has no effect."""
    return name in SAMPLING_ONLY and not sampling


def _check_vocabulary(values: Mapping[str, Any], asked: Mapping[str, Any], vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    for name in asked.keys() & values.keys():
        for token in token_ids_in(name, values[name]):
            if not 0 <= token < vocab_size:
                last = vocab_size - 1
                raise InvalidRequest(f"`{name}` names token {token}; the vocabulary has ids 0 to {last}.")


def _check_together(options: Options) -> None:
    returned, beams = options.num_return_sequences, options.num_beams
    if beams == 1 and returned > 1 and not options.do_sample:
        raise InvalidRequest(
            f"`num_return_sequences={returned}` needs several sequences, but greedy decoding has one. "
            "Set `do_sample=True` or `num_beams`."
        )
    if 1 < beams < returned:
        raise InvalidRequest(f"`num_return_sequences={returned}` exceeds `num_beams={beams}`. Raise `num_beams`.")
    if options.exponential_decay_length_penalty and not options.eos_token_id:
        raise InvalidRequest("`exponential_decay_length_penalty` works on the EOS score: set `eos_token_id`.")
    suppressed = set(options.suppress_tokens or ())
    bos = () if options.forced_bos_token_id is None else (options.forced_bos_token_id,)
    for forced in (bos, options.forced_eos_token_id or ()):
        if forced and suppressed.issuperset(forced):
            raise InvalidRequest(f"`suppress_tokens` forbids {list(forced)}, which another option forces. Change one.")


def _warn_unused(asked: Mapping[str, Any], options: Options) -> None:
    """Say so, as transformers does, when an option is set that the chosen method does not look at."""
    unused = [] if options.do_sample else [(name, "do_sample=True") for name in SAMPLING_ONLY]
    unused += [] if options.num_beams > 1 else [(name, "num_beams above 1") for name in BEAMS_ONLY]
    for name, need in unused:
        default = _LIBRARY_DEFAULTS.get(name, _NEUTRAL[name])
        if asked.get(name) is not None and asked[name] != default:
            warn(f"`{name}={asked[name]!r}` has no effect: it needs {need}.")
