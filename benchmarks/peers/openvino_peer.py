"""OpenVINO GenAI, its continuous-batching pipeline, bfloat16 where the CPU has it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from protocol import Job, Run, Timing, serve


def start(folder: Path, threads: int) -> tuple[str, Run]:
    """Convert the model beside its folder, once, and load it."""
    import numpy as np
    import openvino
    import openvino_genai

    converted = folder / "openvino"
    if not converted.exists():
        command = [
            "optimum.commands.optimum_cli",
            "export",
            "openvino",
            "--model",
            str(folder),
            "--weight-format",
            "fp16",
        ]
        subprocess.run(
            [sys.executable, "-m", *command, "--task", "text-generation-with-past", str(converted)],
            check=True,
            stdout=sys.stderr,
        )
    pipeline = openvino_genai.LLMPipeline(str(converted), "CPU", INFERENCE_NUM_THREADS=threads)

    def run(job: Job) -> Timing:
        longest = max(map(len, job.prompts))
        ids = np.zeros((len(job.prompts), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(job.prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        config = openvino_genai.GenerationConfig(max_new_tokens=job.new, ignore_eos=True, apply_chat_template=False)
        if job.beams > 1:
            config.num_beams = job.beams
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
        start = time.perf_counter()
        result = pipeline.generate(inputs, config)
        total = time.perf_counter() - start
        metrics = result.perf_metrics.raw_metrics
        # Microseconds from one token to the next; the first stands for the prompt.
        durations = [float(own) / 1e6 for own in metrics.token_infer_durations]
        return Timing(total, durations[0], durations[1:])

    return f"openvino-genai {openvino_genai.__version__}", run


if __name__ == "__main__":
    serve(start)
