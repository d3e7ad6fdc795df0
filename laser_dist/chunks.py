"""Chunks of a micro-batch by token budget, so that memory is flat whatever the lengths are (see GradCache)."""


def chunks_needed(lengths: list[int], budget: int) -> int:
    """Least number of chunks of at most `budget` tokens that `split_rows` makes of these rows.

    Raises ValueError if one row alone has more.
    """
    if max(lengths) > budget:
        raise ValueError(f"row {lengths.index(max(lengths))} has {max(lengths)} tokens")
    count = -(-sum(lengths) // budget)
    while max(sum(lengths[row] for row in chunk) for chunk in split_rows(lengths, count)) > budget:
        count += 1
    return count


def split_rows(lengths: list[int], count: int) -> list[list[int]]:
    """Row indexes in `count` chunks of about equally many tokens, none empty: each row to the lightest, longest first.

    Ranks with equally many rows can all make the same number, which ZeRO-3's collectives need of them.
    """
    if not 1 <= count <= len(lengths):
        raise ValueError(f"{count} chunks of {len(lengths)} rows: each needs at least one")
    chunks: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        lightest = min(range(count), key=lambda c: (tokens[c], c))
        chunks[lightest].append(row)
        tokens[lightest] += lengths[row]
    return [sorted(chunk) for chunk in chunks]
