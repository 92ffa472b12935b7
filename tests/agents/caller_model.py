"""A tiny checkpoint of random weights that likes to call tools: what it says means nothing, but it says it in form.

Left alone, random weights hardly ever begin a call. Here one number of every hidden state is large and the same, and
the head weighs it for the markers of calls, for what ends a text in JSON, and for the end of the turn. Everything else
stays random, so tools, arguments and their number differ with the seed of the sampling.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.agents import tiny_chat

LIKED = {"<|tool_calls_section_begin|>": 13.0, "<|tool_call_argument_begin|>": 9.0, "<|tool_call_end|>": 9.0,
         "<|tool_calls_section_end|>": 7.0, "<|tool_call_begin|>": 6.5, "<|im_end|>": 3.5, "</think>": 9.0,
         '"': 5.0, "o": 5.0}
"""Logits beside those of a random token, which have a deviation of about one."""


@torch.no_grad()
def save(folder: Path) -> Path:
    """As a checkpoint folder."""
    from moonbase.checkpoint import save_weights

    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    weights = model.state_dict()
    embedding, head, gain = (weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight",
                                                        "model.norm.weight"))
    size = head.shape[1]
    head *= 1.0 / (0.3 * size**0.5)
    embedding[:, 0] = 30.0  # a hundred times the others: what the last norm makes of it is the root of the size
    gain[0] = 1.0
    head[:, 0] = 0.0
    for text, logit in LIKED.items():
        for token in tokenizer.encode_rendered(text):
            head[token, 0] = logit / size**0.5
    save_weights(model, folder, model.config)
    tokenizer.save(folder)
    return folder
