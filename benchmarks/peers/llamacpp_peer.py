"""llama.cpp in bfloat16, through llama-cpp-python."""

from __future__ import annotations

import time
from pathlib import Path

from protocol import Job, Run, Timing, Unsupported, serve


def start(folder: Path, threads: int) -> tuple[str, Run]:
    """Write the model as GGUF beside its folder, once, and load it."""
    import llama_cpp
    from gguf_file import write_gguf

    converted = folder / "model.gguf"
    if not converted.exists():
        write_gguf(folder, converted)
    model = llama_cpp.Llama(
        str(converted), n_ctx=4_096, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run(job: Job) -> Timing:
        if job.beams > 1:
            raise Unsupported("has no beam search")
        if len(job.prompts) > 1:
            raise Unsupported("llama-cpp-python decodes one sequence at a time")
        ends: list[float] = []
        model.reset()
        start = time.perf_counter()
        model.eval(job.prompts[0])
        for _ in range(job.new):
            token = model.sample(temp=0.0)
            ends.append(time.perf_counter())
            if len(ends) < job.new:
                model.eval([token])
        return Timing.of(start, ends)

    return f"llama-cpp-python {llama_cpp.__version__}", run


if __name__ == "__main__":
    serve(start)
