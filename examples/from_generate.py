"""A script that used `model.generate`, moved to KVLoom by changing one line.

It runs without a network, on a small model with random weights; put your own model and tokenizer in the place of these.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import kvloom

torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    eos_token_id=1,
)
model = Qwen2ForCausalLM(config).eval()

# What a tokenizer with padding_side="left" makes of two prompts of different lengths.
inputs = {
    "input_ids": torch.tensor([[11, 12, 13, 14, 15, 16], [0, 0, 0, 21, 22, 23]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
}
options = {"max_new_tokens": 24, "num_beams": 4, "num_return_sequences": 2}
details = {"return_dict_in_generate": True, "output_scores": True}

before = model.generate(**inputs, **options, **details)
outputs = kvloom.generate(model, **inputs, **options, **details)  # the changed line

# The rest of the script reads the same output class.
scores = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
for tokens, score in zip(outputs.sequences[:, inputs["input_ids"].shape[1] :], scores.sum(dim=1), strict=True):
    print(f"{score:8.3f}  {tokens.tolist()}")
print("the same sequences:", torch.equal(before.sequences, outputs.sequences))
