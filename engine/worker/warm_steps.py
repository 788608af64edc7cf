"""The steps that a start runs so that requests wait for no compiler: the sizes that bring about other kernels."""

from __future__ import annotations

from typing import NamedTuple

# Numbers of tokens between two powers of two from which on some kernel differs: 4-bit products of very wide layers.
ALSO = (192,)
# Prompts of a crowd: as many requests as leave no work for splits of the keys; short ones have other tiles than long.
CROWD, CROWD_TOKENS = 256, (2, 16)
# A prompt that begins in the cache, and what is left of it: few and many queries over many keys.
PREFIXED, CHUNKS = 1024, (2, 50)


class WarmStep(NamedTuple):
    """`prompts` of `tokens` each, whose last `chunk` come in a step of their own (0: all come at once)."""

    tokens: int
    prompts: int
    chunk: int = 0


def warm_steps(*, max_tokens: int, max_seqs: int, longest: int, block_size: int, num_blocks: int,
               spare: int) -> list[WarmStep]:
    """Steps to warm up by, smallest first: every power of two of tokens, crowds of short prompts, and chunks.

    Args:
        max_tokens, max_seqs: of one step. longest: prompt; more tokens than that are several prompts.
        block_size, num_blocks: of the cache, the null block included. spare: tokens that each prompt produces.
    """
    sizes = sorted({*(2 << i for i in range(max_tokens.bit_length())), *ALSO})
    prompts = [-(-tokens // max(1, longest)) for tokens in sizes]
    steps = [WarmStep(tokens // count, count) for tokens, count in zip(sizes, prompts)]
    steps += [WarmStep(tokens, min(CROWD, max_seqs, max_tokens // tokens)) for tokens in CROWD_TOKENS]
    steps += [WarmStep(min(PREFIXED, longest, max_tokens), 1, chunk) for chunk in CHUNKS]

    def fits(step: WarmStep) -> bool:
        blocks = step.prompts * -(-(step.tokens + spare) // block_size)
        return (step.chunk < step.tokens <= longest and 1 <= step.prompts <= max_seqs and blocks < num_blocks
                and step.tokens * step.prompts <= max_tokens)

    one = WarmStep(min(max_tokens, longest, (num_blocks - 1) * block_size - spare), 1)
    found = sorted({step for step in steps if fits(step)}, key=lambda step: (step.tokens * step.prompts, step))
    return found or [step for step in (one,) if fits(step)]


def rehearsal_sizes(most: int) -> list[int]:
    """Numbers of decoding requests, up to `most`, between two of which no kernel is another: powers of two, and three
    times them, since splits of the keys are merged by kernels for the next power of two of splits."""
    sizes = {size for i in range(most.bit_length()) for size in (1 << i, 3 << i)}
    return sorted({size for size in sizes if size < most} | {most})
