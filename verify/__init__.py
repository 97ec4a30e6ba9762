"""The proof that a converted checkpoint or an exported bundle still computes what the published one does.

A *run* puts the same cases (`cases`) through the Torch reference (`oracle`) and a candidate (`candidates`) and keeps
raw figures (`metrics`, `runner`) in one JSON file. A *judgement* (`judge`) holds a run against a profile of
thresholds, which are data, and can be repeated without running anything. `report` shows both; `cli` is the command
`verify-parity`.

`mindir` runs a bundle's graphs node by node in Torch, `interpreted` is a bundle that runs so: evidence for graphs of a
device that is not here.

Nothing is imported here: the command answers `--help` without Torch, transformers or MindSpore.
"""
