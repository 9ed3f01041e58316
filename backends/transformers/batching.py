"""Which waiting sequences share a forward pass: a pure choice over their lengths."""

from collections.abc import Sequence

#: Padded tokens of a pass for each real one, at most: padding costs energy, and the padded request pays for it.
MOST_PADDED_PER_TOKEN = 1.5


def pick(sizes: Sequence[int], most_tokens: int, most_sequences: int) -> list[int]:
    """Indices into `sizes` (tokens, in order of arrival) of the next pass.

    The oldest always goes. Others join in order of arrival while the pass, padded to its longest, stays within
    `most_tokens` and `most_sequences`, and padding stays within `MOST_PADDED_PER_TOKEN`.
    """
    chosen = [0]
    longest = real = sizes[0]
    for index in range(1, len(sizes)):
        if len(chosen) == most_sequences:
            break
        padded_length = max(longest, sizes[index])
        padded = padded_length * (len(chosen) + 1)
        if padded <= most_tokens and padded <= MOST_PADDED_PER_TOKEN * (real + sizes[index]):
            chosen.append(index)
            longest, real = padded_length, real + sizes[index]
    return chosen
