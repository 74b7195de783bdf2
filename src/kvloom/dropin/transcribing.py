"""Whisper: its own `generate` runs, with the decoding of each pass on the cache.

That `generate` makes the decoder's first tokens of `language` and `task`, cuts long recordings at the timestamps that
it decodes, and decodes a piece again at a higher temperature where it distrusts the outcome. All of this is
transformers'. It asks its parent class to decode; here the parent is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from kvloom.dropin.outputs import Output
from kvloom.errors import InvalidRequest, UnsupportedOption
from kvloom.language_model.calls import Asked
from kvloom.language_model.model import LanguageModel
from kvloom.models import HostedModel

Decode = Callable[[Tensor | None, Asked], Tensor | Output]


def transcribes(lm: LanguageModel) -> bool:
    """Whether a model's `generate` is Whisper's."""
    return isinstance(lm.binding, HostedModel) and isinstance(lm.binding.model, WhisperGenerationMixin)


def transcribe(lm: LanguageModel, inputs: Tensor | None, asked: Asked, decode: Decode) -> Any:
    """Run Whisper's `generate` for a call.

    Args:
        decode: decodes sources of the encoder's length.

    Raises:
        InvalidRequest: no features. `UnsupportedOption`: what would need attention weights, or recordings side by side.
        ValueError: what Whisper's `generate` refuses itself.
    """
    assert isinstance(lm.binding, HostedModel), "asked before"
    arguments = dict(asked.options)
    features = arguments.pop("input_features", None)
    if inputs is not None and features is not None:
        raise InvalidRequest("`inputs` and `input_features` are the same argument. Pass one of them.")
    features = inputs if features is None else features
    if not isinstance(features, Tensor) or features.ndim != 3 or not features.numel():
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InvalidRequest(f"`input_features` must be a tensor [batch, bins, frames]; got {got}.")
    _refuse(arguments, len(features))
    transcriber = _Transcriber(lm.binding.model, decode)
    lm.binding.check_ready()
    return transcriber.generate(
        features,
        generation_config=asked.generation_config,
        logits_processor=None if asked.logits_processor is None else list(asked.logits_processor),
        stopping_criteria=asked.stopping_criteria,
        **arguments,
    )


def _refuse(arguments: dict[str, Any], recordings: int) -> None:
    if arguments.get("return_token_timestamps"):
        raise UnsupportedOption(
            "`return_token_timestamps` is not supported: it needs attention weights, which are never materialised. "
            "`return_timestamps=True` gives those of segments."
        )
    if arguments.get("no_speech_threshold") is not None and recordings > 1:
        raise UnsupportedOption(
            f"`no_speech_threshold` is not supported for {recordings} recordings at once: each is decoded by itself. "
            "Pass them one by one."
        )


class _Decoding(GenerationMixin):  # type: ignore[misc]  # transformers is untyped for us
    """What Whisper's `generate` takes for its parent's."""

    _decode: Decode

    def generate(
        self,
        inputs: Tensor,
        generation_config: GenerationConfig,
        logits_processor: Any,
        stopping_criteria: Any,
        prefix_allowed_tokens_fn: Any,
        **arguments: Any,
    ) -> Any:
        """Decode one pass. What allows tokens is known to `_decode` already."""
        config = _plain(generation_config)
        return self._decode(inputs, Asked(None, config, logits_processor, stopping_criteria, arguments))


class _Transcriber(WhisperGenerationMixin, _Decoding):  # type: ignore[misc]  # transformers is untyped for us
    """A Whisper model that decodes on the cache; all but its decoding is the model's own."""

    def __init__(self, model: Any, decode: Decode) -> None:
        self._model, self._decode = model, decode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward."""
        return self._model(*inputs, **named)


def _plain(config: GenerationConfig) -> GenerationConfig:
    """A generation config without what Whisper's `generate` has added, and has acted upon already."""
    known = vars(GenerationConfig()).keys()
    return GenerationConfig(**{name: own for name, own in vars(config).items() if name in known and name[0] != "_"})
