"""The proof that a converted checkpoint or an exported bundle still computes what the published one does.

A *run* puts the same cases (`cases`) through the Torch reference (`oracle`) and a candidate (`candidates`) and keeps
raw figures (`metrics`, `runner`) in one JSON file. A *judgement* (`judge`) holds a run against a profile of
thresholds, which are data, and can be repeated without running anything. `report` shows both; `cli` is the command
`verify-parity`.

`stream` makes a run layer by layer: `parts_oracle` is the reference of which one layer is in memory, `stream_state` what a
run that was killed goes on from.

`mindir` runs a bundle's graphs node by node in Torch, `interpreted` is a bundle that runs so: evidence for graphs of a
device that is not here. `bisect` names the first wrong operator of such a bundle: `points` are the places of the network
where it compares, `places` finds them in a graph, `watching` keeps what a graph holds there, `expected` is the reference.

Nothing is imported here: the command answers `--help` without Torch, transformers or MindSpore.
"""
