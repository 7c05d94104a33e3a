"""From pictures and conversations to batches, with numpy alone.

`sources` give a `Sample` per index, `processor` turns its chat messages into an `Example` (token ids, codes,
positions, patches), and `collate` packs examples into a `Batch`. `order` says which sample stands at which place of a
run and `plan` which places stand in which row of which step, both as pure functions of the seed and the step; `loading`
finds the sample of a place, and `pipeline` joins the three into rows.
"""
