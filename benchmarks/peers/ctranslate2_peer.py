"""CTranslate2 in float32: it has no fast bfloat16 on most CPUs, and falls back to this by itself."""

from __future__ import annotations

import time
from pathlib import Path

from protocol import Job, Run, Timing, serve


def start(folder: Path, threads: int) -> tuple[str, Run]:
    """Convert the model beside its folder, once, and load it."""
    import ctranslate2

    converted = folder / "ctranslate2"
    if not converted.exists():
        converter = ctranslate2.converters.TransformersConverter(str(folder), low_cpu_mem_usage=True)
        converter.convert(str(converted), quantization="float32")
    generator = ctranslate2.Generator(str(converted), device="cpu", intra_threads=threads, compute_type="float32")

    def run(job: Job) -> Timing:
        start = time.perf_counter()
        results = generator.generate_batch(
            [[f"<{token}>" for token in prompt] for prompt in job.prompts],
            beam_size=job.beams,
            min_length=job.new,
            max_length=job.new,
            include_prompt_in_result=False,
        )
        assert all(len(own.sequences_ids[0]) == job.new for own in results)
        return Timing(time.perf_counter() - start)

    return f"ctranslate2 {ctranslate2.__version__}, float32", run


if __name__ == "__main__":
    serve(start)
