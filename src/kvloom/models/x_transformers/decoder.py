"""A bare `Decoder` of x-transformers: embeddings to hidden states, with its keys and values in the store.

What is run is a batch of sequences of equal lengths, as the decoder takes it. In the first pass cross-attention
projects the encoder's outputs, which go into slots of their own; in later ones it is handed what they became.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from kvloom.attention import build_plan
from kvloom.cache import CachedSequence, CacheLayout, KVCache, LayerShape, Store, in_own_dtype, place_source
from kvloom.errors import AttachMismatch, KVLoomError, UnsupportedModel
from kvloom.exclusive import interruptible
from kvloom.models.autocast import refuse_autocast
from kvloom.models.dense.batches import DenseBatch, dense_batches
from kvloom.models.identity import digest_of_writes
from kvloom.models.proofs.tolerance import relative_errors, tolerance_of
from kvloom.models.x_transformers.shared import (
    attention_layers,
    gathered,
    layer_cache,
    reason_of,
    refuse_decoder,
    rows_of,
    source_dim,
)

TRIAL_TOKENS, TRIAL_SOURCE_TOKENS = 3, 5
CHECK_ROWS, CHECK_SOURCE_TOKENS = 2, 13
CHECK_CHUNKS = (5, 1, 30, 1, 1)
BLOCK_TOKENS = 4


class DecoderBinding:
    """A causal decoder in evaluation mode, whose weights and mode are left as they are.

    Attributes:
        dim: width of embeddings and of hidden states.
        source_dim: width of the encoder's outputs; None without cross-attention.
        layers: what each attention keeps, self-attention first.

    Raises:
        UnsupportedModel: it cannot be run on a cache; says why. `AttachMismatch` if its cached output is not its own.
    """

    name = "x-transformers cache"

    def __init__(self, decoder: Any) -> None:
        refuse_decoder(decoder)
        self._decoder = decoder
        weight = next(decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.dim = int(decoder.dim)
        self.check_ready()
        self.source_dim = source_dim(decoder) if decoder.cross_attend else None
        try:
            self._order, self.layers = self._trial()
            self._prove()
        except KVLoomError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"this {type(decoder).__name__} cannot be run on its own cache: {reason_of(error)}"
            ) from error

    def check_ready(self) -> None:
        """Refuse autocast, training mode, and a decoder that was moved since it was attached."""
        refuse_autocast(self.device)
        weight = next(self._decoder.parameters())
        if (weight.dtype, weight.device) != (self.dtype, self.device):
            raise UnsupportedModel(
                f"the decoder was attached as {self.dtype} on {self.device}, and is {weight.dtype} on {weight.device} "
                "now. Attach it again."
            )
        if any(module.training for module in self._decoder.modules()):
            raise UnsupportedModel(
                "the decoder is in training mode, so its output is random. Call decoder.eval() first."
            )

    def fingerprint(self) -> bytes:
        """Changes whenever the weights do."""
        return digest_of_writes([self._decoder])

    @torch.no_grad()
    def forward_own(self, embeddings: Tensor, encoder_outputs: Tensor | None) -> Tensor:
        """The whole pass without a cache, float[batch, tokens, dim]: what everything else is compared with."""
        outputs: Tensor = self._decoder(embeddings, context=encoder_outputs)
        return outputs

    @torch.no_grad()
    def extend(
        self, cache: KVCache, sequences: list[CachedSequence], embeddings: Tensor, encoder_outputs: Tensor | None
    ) -> Tensor:
        """Run new tokens of some sequences that are equally long.

        Args:
            sequences: one for each row, changed only if the pass succeeds.
            embeddings: float[batch, tokens, dim].
            encoder_outputs: float[batch, source, source_dim] where the sequences are empty; later it is not looked at.

        Returns:
            float[batch, tokens, dim], the rows of the new tokens.

        Raises `PoolExhausted` if the blocks do not suffice. A source that was placed by then stays in its sequence.
        """
        count = embeddings.shape[1]
        begins = sequences[0].tokens == 0
        source_slots = None
        if begins and encoder_outputs is not None:
            placed = [place_source(cache, sequence, encoder_outputs.shape[1]) for sequence in sequences]
            source_slots = torch.cat([torch.from_numpy(slots) for slots in placed]).to(self.device)
        extension = cache.extend([(sequence, count) for sequence in sequences])
        try:
            plan = build_plan(cache, extension, logits=[1] * len(sequences), device=self.device)
            (batch,) = dense_batches(plan, self.device)
            outputs = self._run(
                embeddings, batch, in_own_dtype(cache.store), encoder_outputs if begins else None, source_slots
            )
        except BaseException:
            cache.rollback(extension)
            raise
        cache.commit(extension)
        return outputs

    def _run(
        self, embeddings: Tensor, batch: DenseBatch, store: Store, source: Tensor | None, source_slots: Tensor | None
    ) -> Tensor:
        past = None
        if batch.past:
            past = layer_cache(gathered(batch, store, self._order, self.layers), batch.past)
        if past is not None and self.source_dim is not None:
            # The decoder wants a context, and projects none of it behind a cache.
            source = embeddings.new_empty((len(embeddings), 0, self.source_dim))
        with interruptible():
            outputs, intermediates = self._decoder(
                embeddings, context=source, cache=past, cache_age=embeddings.shape[1], return_hiddens=True
            )
        for layer, own in zip(self._order, intermediates.attn_intermediates, strict=True):
            if not self.layers[layer].reach.cross:
                keys, values = (rows_of(states[:, :, batch.past :]) for states in own.cached_kv)
                store.write(layer, batch.write_slots, keys, values)
            elif source_slots is not None:
                store.write(layer, source_slots, *(rows_of(states) for states in own.cached_kv))
        return cast(Tensor, outputs)

    @torch.no_grad()
    def _trial(self) -> tuple[list[int], tuple[LayerShape, ...]]:
        """For each attention in the order of the forward pass its layer in the store, and the store's layers."""
        embeddings, source = self._random(1, TRIAL_TOKENS, TRIAL_SOURCE_TOKENS)
        _, intermediates = self._decoder(embeddings, context=source, return_hiddens=True)
        return attention_layers(self._decoder, intermediates)

    def _prove(self) -> None:
        """Chunks and single tokens of two sequences, and a fork with another ending, against the whole pass."""
        tokens = sum(CHECK_CHUNKS)
        embeddings, source = self._random(CHECK_ROWS, tokens, CHECK_SOURCE_TOKENS)
        other = torch.cat([embeddings[:, : CHECK_CHUNKS[0]], embeddings[:, CHECK_CHUNKS[0] :].flip(1)], dim=1)
        layout = CacheLayout(layers=self.layers, dtype=self.dtype, block_tokens=BLOCK_TOKENS)
        blocks = 2 * CHECK_ROWS * layout.blocks_of(tokens + CHECK_SOURCE_TOKENS)
        cache = KVCache(layout, budget_bytes=layout.bytes_per_row_of_blocks * blocks, device=self.device)
        sequences = [cache.open() for _ in range(CHECK_ROWS)]
        begun = self.extend(cache, sequences, embeddings[:, : CHECK_CHUNKS[0]], source)
        forks = [cache.fork(sequence) for sequence in sequences]
        for inputs, held in ((embeddings, sequences), (other, forks)):
            parts = torch.split(inputs, list(CHECK_CHUNKS), dim=1)[1:]
            got = torch.cat([begun, *(self.extend(cache, held, part, None) for part in parts)], dim=1).float()
            expected = self.forward_own(inputs, source).float()
            error, tolerance = float(relative_errors(got, expected).max()), tolerance_of(self.dtype)
            if not error <= tolerance:
                raise AttachMismatch(
                    f"the decoder's cached output differs from its own: relative error {error:.2g}, tolerance "
                    f"{tolerance:.2g} for {self.dtype}. It is not run on the cache rather than run wrongly."
                )

    def _random(self, rows: int, tokens: int, source_tokens: int) -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(20_26)
        embeddings = torch.randn((rows, tokens, self.dim), generator=generator).to(self.device, self.dtype)
        if self.source_dim is None:
            return embeddings, None
        source = torch.randn((rows, source_tokens, self.source_dim), generator=generator)
        return embeddings, source.to(self.device, self.dtype)
