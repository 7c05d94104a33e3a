"""From pictures and conversations to batches, with numpy alone.

`sources` give a `Sample` per index, `processor` turns its chat messages into an `Example` (token ids, codes,
positions, patches), `collate` packs examples into a `Batch`, and `pipeline` decides which sample stands in which
row of which step, as a pure function of the seed and the step.
"""
