"""From logits to tokens: sampling and search, token by token (`autoregressive`), and labellings by CTC (`ctc`)."""

from dl_jax.decode.autoregressive import (
    TINY,
    Beams,
    Choose,
    Step,
    beam_search,
    draw,
    generate,
    greedy,
    nucleus,
    reorder,
    repetition_penalty,
    temperature,
    top_k,
    with_repetition_penalty,
)

__all__ = [
    "TINY",
    "Beams",
    "Choose",
    "Step",
    "beam_search",
    "draw",
    "generate",
    "greedy",
    "nucleus",
    "reorder",
    "repetition_penalty",
    "temperature",
    "top_k",
    "with_repetition_penalty",
]
