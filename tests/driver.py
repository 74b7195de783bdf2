"""A decoder driven without engine and cache: every step recomputes every row by the model's own forward."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvloom.decoding import Decoder, Hypothesis, to_host


@torch.no_grad()
def drive(
    model: PreTrainedModel, decoder: Decoder, prompt: list[int], *, first_batch: int = 1, apart: bool = False
) -> list[Hypothesis]:
    """Decode until the decoder is done. A row's last bits depend on how many rows are multiplied together, so:

    `first_batch` is how often the prompt is run in the first pass (`generate` runs it once a beam), and with
    `apart` each row is run alone.
    """
    rows = [prompt]
    while not decoder.done:
        batch = torch.tensor(rows if len(rows) > 1 else rows * first_batch)
        passes = batch.split(1 if apart else len(batch))
        logits = torch.cat([model(own, use_cache=False, logits_to_keep=1).logits[:, -1] for own in passes])
        step = decoder.decide(logits[: decoder.rows])
        host = to_host([step])[0]
        decoder.advance(step, host)
        chosen = zip(host.parents, host.tokens, host.finished, strict=True)
        rows = [[*rows[parent], token] for parent, token, finished in chosen if not finished]
    return decoder.results()


def assert_raw_results(model: PreTrainedModel, prompt: list[int], found: Hypothesis, *, top: int) -> None:
    """Logits, log-probabilities and alternatives are those of the unprocessed model along the sequence."""
    sequence = torch.tensor([prompt + found.token_ids])
    expected = model(sequence).logits[0, len(prompt) - 1 : -1]
    logprobs = expected.log_softmax(-1)
    chosen = logprobs.gather(1, sequence[0, len(prompt) :, None])[:, 0]
    assert found.logits is not None and found.top_logprobs is not None
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found.logprobs), chosen, rtol=1e-4, atol=1e-4)
    assert [best.token_ids for best in found.top_logprobs] == logprobs.topk(top).indices.tolist()
