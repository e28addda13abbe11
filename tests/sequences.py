"""Tag lists for tests: well-formed IOB2, and anything."""

from hypothesis import strategies as st


@st.composite
def iob2(draw, max_size=12, types=("LOC", "PER", "creative-work")):
    """A well-formed IOB2 tag list."""
    tags, prev = [], "O"
    for _ in range(draw(st.integers(1, max_size))):
        choices = ["O"] + [f"B-{t}" for t in types] + (["I-" + prev[2:]] if prev != "O" else [])
        prev = draw(st.sampled_from(choices))
        tags.append(prev)
    return tags


def random_sequences(rng, n, letters, types):
    tags = ["O"] * 4 + [f"{a}-{t}" for a in letters for t in types]
    lengths = [rng.randint(1, 12) for _ in range(n)]
    true = [[rng.choice(tags) for _ in range(k)] for k in lengths]
    return true, [[t if rng.random() < 0.7 else rng.choice(tags) for t in s] for s in true]
