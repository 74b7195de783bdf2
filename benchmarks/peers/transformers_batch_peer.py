"""transformers' continuous batching, `generate_batch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from protocol import Job, Run, Timing, Unsupported, serve


def start(folder: Path, threads: int) -> tuple[str, Run]:
    """bfloat16, its paged attention on PyTorch's SDPA."""
    import torch
    import transformers
    from transformers import GenerationConfig

    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()

    def run(job: Job) -> Timing:
        if job.beams > 1:
            raise Unsupported("has no beam search")
        config = GenerationConfig(max_new_tokens=job.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=job.prompts, generation_config=config, progress_bar=False)
        total = time.perf_counter() - start
        if len(outputs) != len(job.prompts) or any(len(own.generated_tokens) < job.new for own in outputs.values()):
            raise Unsupported("did not finish all prompts on this machine")
        return Timing(total)

    return f"transformers {transformers.__version__}, torch {torch.__version__}", run


if __name__ == "__main__":
    serve(start)
