"""From pictures and conversations to batches, with numpy alone.

`sources` give a `Sample` per index, `processor` turns its chat messages into an `Example` (token ids, codes,
positions, patches), and `collate` packs examples into a `Batch`. `order` says which sample each draw of a run
takes and `plan` which draws stand in which row of which step, both as pure functions of the seed and the step;
`loading` finds the sample of a draw, and `pipeline` joins the three into rows.
"""
