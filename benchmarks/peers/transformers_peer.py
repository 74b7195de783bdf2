"""transformers' `generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from protocol import Job, Run, Timing, serve


def start(folder: Path, threads: int) -> tuple[str, Run]:
    """bfloat16, its default attention (PyTorch's SDPA)."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(job: Job) -> Timing:
        longest = max(map(len, job.prompts))
        rows = [[0] * (longest - len(own)) + own for own in job.prompts]
        mask = [[0] * (longest - len(own)) + [1] * len(own) for own in job.prompts]
        ends: list[float] = []

        def clock(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends.append(time.perf_counter())
            return scores

        start = time.perf_counter()
        model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            num_beams=job.beams,
            max_new_tokens=job.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[clock],
        )
        return Timing.of(start, ends)

    return f"transformers {transformers.__version__}, torch {torch.__version__}", run


if __name__ == "__main__":
    serve(start)
